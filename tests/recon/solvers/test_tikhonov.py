"""CG-SENSE against dense linear algebra and sigpy."""

import math

import numpy as np
import pytest
import torch

from operators import CoilwiseMRI
from recon import Scale, reconstruct
from recon.solvers import make_solver
from recon.solvers.base import Problem, SolverError
from recon.solvers.tikhonov import Tikhonov
from tests.operators.helper import dense
from tests.recon.solvers.helper import (
    C128,
    Matrix,
    in_other_units,
    multicoil_problem,
    randn,
    random_mask,
    solve,
)

SHAPE = (6, 5)


def multicoil(noise_std=0.1):
    return multicoil_problem(SHAPE, 0.5, noise_std)


def tomography(noise_std=0.1):
    """Real, with more rows than columns, and of norm 80."""
    A = Matrix(4 * randn(60, 30, seed=1, dtype=torch.float64).abs() / math.sqrt(3), SHAPE)
    x, n = 2 + randn(*SHAPE, seed=3, dtype=torch.float64), randn(60, seed=2, dtype=torch.float64)
    return Problem(A(x) + noise_std * n, A, noise_std)


def ridge(given, weight):
    A = dense(given.operator, SHAPE, given.y.dtype)
    normal = A.mH @ A + weight * torch.eye(A.shape[1], dtype=A.dtype)
    return torch.linalg.solve(normal, A.mH @ given.y.flatten()).reshape(SHAPE)


@pytest.mark.parametrize("make", [multicoil, tomography])
@pytest.mark.parametrize("weight", [1e-2, 1.0, 300.0])
def test_equal_to_the_dense_solution(make, weight):
    given = make()
    x = solve(Tikhonov(weight, iterations=200), given).samples[0]
    torch.testing.assert_close(x, ridge(given, weight), rtol=1e-8, atol=1e-9)


def test_without_weight_it_is_least_squares():
    given = tomography()
    expected = torch.linalg.lstsq(given.operator.matrix, given.y[:, None]).solution.reshape(SHAPE)
    torch.testing.assert_close(solve(Tikhonov(0.0, 300), given).samples[0], expected)
    # On undersampled data it is the one of least norm.
    given = multicoil()
    A = dense(given.operator, SHAPE)
    expected = (torch.linalg.pinv(A, rtol=1e-10) @ given.y.flatten()).reshape(SHAPE)
    torch.testing.assert_close(solve(Tikhonov(0.0, 300), given).samples[0], expected, rtol=1e-6, atol=1e-6)


def test_equal_to_sigpy():
    from sigpy.mri.app import SenseRecon

    given = multicoil()
    mask = given.operator.mask.numpy().astype(float)
    expected = SenseRecon(
        given.y.numpy(), given.operator.maps.numpy(), lamda=0.3, weights=mask, max_iter=200, show_pbar=False
    ).run()
    np.testing.assert_allclose(solve(Tikhonov(0.3), given).samples[0].numpy(), expected, atol=1e-6)


def test_coil_by_coil():
    mask = random_mask(SHAPE)
    A = CoilwiseMRI(3, mask, SHAPE).to(C128)
    given = Problem(mask * randn(3, *SHAPE), A, 0.1)
    # The transform of a coil is unitary, so that what was measured shrinks and the rest is zero.
    torch.testing.assert_close(solve(Tikhonov(0.25), given).samples[0], given.adjoint_y / 1.25)


@pytest.mark.parametrize("make", [multicoil, tomography])
def test_default_does_not_depend_on_units(make):
    given, solver = make(), Tikhonov(iterations=200)
    x = solve(solver, given).samples
    for factor, other in in_other_units(given):
        torch.testing.assert_close(solve(solver, other).samples, factor * x, rtol=1e-6, atol=0)


def test_progress_of_iterations_that_end_early():
    steps = []
    solve(Tikhonov(10.0, iterations=40), multicoil(), 3, lambda *done: steps.append(done))
    assert [done for done, _ in steps] == [*range(1, len(steps)), 40]
    assert {total for _, total in steps} == {40}


@pytest.mark.parametrize("c", [1e-4, 3e5])
def test_scaled_data_give_the_scaled_image(c):
    given = multicoil()
    one, other = (
        reconstruct(a * given.y, given.operator, None, make_solver("cg-sense"), noise_std=a * 0.1)
        for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean)
    # A single image in the units of the data, whose scale does not change it.
    scale = Scale.estimate(given.y, given.operator, 1.0)
    weight = Tikhonov().default_weight(Problem(scale.apply(given.y), given.operator, 0.1 / scale.factor))
    torch.testing.assert_close(one.mean, ridge(given, weight), rtol=1e-5, atol=1e-5)
    assert (one.nfe, one.num_samples) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight must not be negative, got -1.0"),
        ({"weight": math.nan}, "weight must not be negative, got nan"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"Tikhonov: {message}"):
        Tikhonov(**settings)
