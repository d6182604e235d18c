"""The adjoint with its best factor."""

from functools import partial

import pytest
import torch

from operators import SinglecoilMRI
from priors import GaussianPrior
from recon import reconstruct
from recon.solvers import make_solver
from recon.solvers.base import Problem
from recon.solvers.zero_filled import ZeroFilled
from tests.operators.helper import dense
from tests.recon.solvers.helper import C128, Matrix, multicoil_problem, randn, random_mask, solve

SHAPE = (6, 5)

multicoil = partial(multicoil_problem, SHAPE, noise_std=0.1)


def test_single_coil_gives_the_zero_filled_image():
    mask = random_mask(SHAPE)
    A, y = SinglecoilMRI(mask, SHAPE).to(C128), mask * randn(*SHAPE)
    torch.testing.assert_close(solve(ZeroFilled(), Problem(y, A, 0.0)).samples[0], A.adjoint(y))


def test_factor_is_that_of_least_squares():
    given = multicoil()
    b, A = given.adjoint_y, dense(given.operator, SHAPE)
    factor = torch.linalg.lstsq((A @ b.flatten())[:, None], given.y.flatten()[:, None]).solution
    assert abs(float(factor.imag)) < 1e-12
    torch.testing.assert_close(solve(ZeroFilled(), given).samples[0], factor * b)


def test_the_scale_of_the_operator_does_not_matter():
    given = multicoil()
    scaled = Problem(given.y, 1e3 * given.operator, 0.1)
    torch.testing.assert_close(1e3 * solve(ZeroFilled(), scaled).samples, solve(ZeroFilled(), given).samples)


def test_real_images_and_an_adjoint_that_is_not_matched():
    matrix, other = (randn(20, 12, seed=seed, dtype=torch.float64) for seed in (1, 2))
    A, y = Matrix(matrix, (4, 3), matrix + 0.1 * other), randn(20, seed=3, dtype=torch.float64)
    x = solve(ZeroFilled(), Problem(y, A, 0.1), 2).samples
    assert (x.shape, x.dtype) == ((2, 4, 3), torch.float64)
    image = y @ (matrix + 0.1 * other)
    predicted = matrix @ image
    expected = image * (predicted @ y) / (predicted @ predicted)
    torch.testing.assert_close(x[0].flatten(), expected)


def test_data_of_which_the_operator_sees_nothing():
    given = Problem(torch.zeros(3, *SHAPE, dtype=C128), multicoil().operator, 0.1)
    assert torch.equal(solve(ZeroFilled(), given).samples, torch.zeros(1, *SHAPE, dtype=C128))


@pytest.mark.parametrize("c", [1e-4, 3e5])
def test_through_the_door(c):
    given = multicoil()
    one, other = (
        reconstruct(a * given.y, given.operator, None, make_solver("zero-filled"), noise_std=a * 0.1)
        for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean)
    torch.testing.assert_close(one.mean, solve(ZeroFilled(), given).samples[0])
    assert float(one.std.abs().max()) == 0
    assert "ZeroFilled gives one image without a spread" in one.warnings
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0)
    with_prior = reconstruct(given.y, given.operator, prior, ZeroFilled(), noise_std=0.1)
    torch.testing.assert_close(with_prior.mean, one.mean)
