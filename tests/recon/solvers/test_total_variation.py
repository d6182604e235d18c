"""Total variation against closed forms, scikit-image, and a quasi-Newton method on the smoothed function."""

import cmath
import math

import numpy as np
import pytest
import torch

from operators import CoilwiseMRI, FourierTransform, MulticoilMRI
from operators.base import LinearOperator
from recon import reconstruct
from recon.solvers import make_solver
from recon.solvers.base import Problem, SolverError
from recon.solvers.total_variation import TotalVariation, gradient, gradient_adjoint, gradient_length
from tests.operators.helper import dense, relative_error
from tests.recon.solvers.helper import C128, Matrix, in_other_units, randn, random_mask, solve

SHAPE = (12, 9)


class Identity(LinearOperator):
    def __init__(self, *shape):
        super().__init__(shape, shape)

    def _forward(self, x):
        return x

    def _adjoint(self, y):
        return y


def blocks(dtype=torch.float64):
    """Constant but for some pixels."""
    image = torch.ones(SHAPE, dtype=dtype)
    image[2:7, 3:8] += 1
    image[8:, :4] -= 0.7
    return image


def multicoil():
    mask = random_mask(SHAPE)
    A = MulticoilMRI(randn(3, *SHAPE, seed=4), mask)
    truth = blocks(C128) * cmath.exp(0.6j)
    return Problem(A(truth) + mask * 0.05 * randn(3, *SHAPE, seed=5), A, 0.035)


def tomography():
    """Real and underdetermined, of norm 40."""
    A = Matrix(randn(60, 108, seed=1, dtype=torch.float64).abs() * 0.6, SHAPE)
    return Problem(A(blocks()) + 0.1 * randn(60, seed=2, dtype=torch.float64), A, 0.1)


def objective(given, x, weight):
    misfit = float((given.operator(x) - given.y).abs().square().sum()) / 2
    down, right = torch.diff(x, dim=-2), torch.diff(x, dim=-1)
    squares = torch.zeros(x.shape, dtype=torch.float64)
    squares[..., :-1, :] += down.abs() ** 2
    squares[..., :-1] += right.abs() ** 2
    return misfit + weight * float(squares.sqrt().sum())


def quasi_newton(given, weight):
    """L-BFGS by scipy on ``sqrt(|grad x|^2 + e^2)``, e falling."""
    from scipy.optimize import minimize

    dtype, shape = given.y.dtype, given.operator.domain_shape

    def image(v):
        v = torch.as_tensor(v, dtype=torch.float64)
        return torch.view_as_complex(v.reshape(*shape, 2)) if dtype.is_complex else v.reshape(shape)

    v = np.zeros(math.prod(shape) * (2 if dtype.is_complex else 1))
    for e in (1e-1, 1e-2, 1e-3, 1e-4):

        def smooth(v, e=e):
            v = torch.tensor(v, requires_grad=True)
            x = image(v)
            squares = torch.zeros(shape, dtype=torch.float64)
            squares[:-1] = squares[:-1] + torch.diff(x, dim=-2).abs() ** 2
            squares[:, :-1] = squares[:, :-1] + torch.diff(x, dim=-1).abs() ** 2
            value = (given.operator(x) - given.y).abs().square().sum() / 2
            value = value + weight * (squares + e**2).sqrt().sum()
            value.backward()
            return value.item(), v.grad.numpy()

        v = minimize(smooth, v, jac=True, method="L-BFGS-B", options={"maxiter": 1500, "maxfun": 2000}).x
    return image(v)


@pytest.mark.parametrize(("make", "weight"), [(multicoil, 0.5), (multicoil, 0.05), (tomography, 5.0)])
def test_reaches_the_minimum(make, weight):
    given = make()
    x, other = solve(TotalVariation(weight, 3000), given).samples[0], quasi_newton(given, weight)
    ours, theirs = objective(given, x, weight), objective(given, other, weight)
    assert ours == pytest.approx(theirs, rel=2e-4)
    assert relative_error(x, other) < 1e-3
    # Both are far from where no penalty is, and from where it is all.
    assert ours < 0.8 * objective(given, given.unfolded, weight)
    assert objective(given, x, 0.0) > 1e-4 * float(given.y.abs().square().sum())


def test_few_steps_come_close():
    given = multicoil()
    weight = TotalVariation().default_weight(given)
    best = objective(given, solve(TotalVariation(weight, 3000), given).samples[0], weight)
    assert objective(given, solve(TotalVariation(), given).samples[0], weight) < 1.002 * best


@pytest.mark.parametrize("weight", [0.05, 0.4])
def test_denoising_equal_to_scikit_image(weight):
    from skimage.restoration import denoise_tv_chambolle

    y = blocks() + 0.2 * randn(*SHAPE, dtype=torch.float64)
    expected = denoise_tv_chambolle(y.numpy(), weight, eps=1e-14, max_num_iter=20000)
    given = Problem(y, Identity(*SHAPE), 0.2)
    x = solve(TotalVariation(weight, 3000), given).samples[0]
    np.testing.assert_allclose(x.numpy(), expected, atol=5e-3)
    best = objective(given, torch.as_tensor(expected), weight)
    assert objective(given, x, weight) == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("phase", [0.0, 1.0])
def test_step_edge_in_closed_form(axis, phase):
    # A plateau of n pixels, on one side of an edge, moves by w / n towards the other.
    turn = cmath.exp(1j * phase)
    profile = torch.tensor([1.0] * 3 + [4.0] * 5, dtype=torch.float64)
    expected = torch.tensor([1.0 + 0.6 / 3] * 3 + [4.0 - 0.6 / 5] * 5, dtype=torch.float64)
    shape = (8, 1) if axis == 0 else (1, 8)
    # A unitary transform times 2: the data term is 4 |x - c|^2 / 2.
    A = 2 * FourierTransform(shape)
    y = A(profile.reshape(shape) * turn)
    x = solve(TotalVariation(4 * 0.6, 3000), Problem(y, A, 0.1)).samples[0]
    torch.testing.assert_close(x, expected.reshape(shape) * turn, rtol=0, atol=1e-3)


def test_a_large_weight_leaves_the_mean():
    y = blocks() + 0.2 * randn(*SHAPE, dtype=torch.float64)
    x = solve(TotalVariation(100.0, 2000), Problem(y, Identity(*SHAPE), 0.2)).samples[0]
    torch.testing.assert_close(x, y.mean().expand(SHAPE), rtol=0, atol=1e-3)


def test_every_coil_on_its_own():
    mask = random_mask(SHAPE, 0.6)
    A = CoilwiseMRI(2, mask, SHAPE).to(C128)
    y = A(torch.stack([blocks(C128), blocks(C128).flip(0)])) + mask * 0.05 * randn(2, *SHAPE)
    both = solve(TotalVariation(0.1, 1500), Problem(y, A, 0.05)).samples[0]
    single = CoilwiseMRI(1, mask, SHAPE).to(C128)
    for coil in (0, 1):
        one = solve(TotalVariation(0.1, 1500), Problem(y[coil : coil + 1], single, 0.05)).samples[0, 0]
        assert relative_error(both[coil], one) < 2e-3


def test_gradient():
    x = randn(*SHAPE)
    assert torch.equal(gradient(x)[0, :-1], torch.diff(x, dim=0))
    assert torch.equal(gradient(x)[1, :, :-1], torch.diff(x, dim=1))
    assert float(gradient(x)[0, -1].abs().max()) == float(gradient(x)[1, :, -1].abs().max()) == 0
    forward = dense(lambda x: gradient(x).movedim(0, 1), SHAPE)
    backward = dense(lambda g: gradient_adjoint(g.movedim(1, 0)), (2, *SHAPE))
    assert torch.equal(backward, forward.mH)
    # The bound in the step sizes.
    assert 7.5 < float(torch.linalg.matrix_norm(forward, 2)) ** 2 < 8
    torch.testing.assert_close(gradient_length(gradient(x)), gradient(x).abs().square().sum(0).sqrt())


@pytest.mark.parametrize("make", [multicoil, tomography])
def test_default_does_not_depend_on_units(make):
    given, solver = make(), TotalVariation(iterations=100)
    x = solve(solver, given).samples
    for factor, other in in_other_units(given):
        torch.testing.assert_close(solve(solver, other).samples, factor * x)


@pytest.mark.parametrize("c", [1e-4, 3e5])
def test_scaled_data_give_the_scaled_image(c):
    given = multicoil()
    one, other = (
        reconstruct(a * given.y, given.operator, None, make_solver("tv"), noise_std=a * given.noise_std)
        for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean)
    # Closer to the truth than what conjugate gradients make of the data.
    truth = blocks(C128) * cmath.exp(0.6j)
    assert relative_error(one.mean, truth) < 0.6 * relative_error(given.unfolded, truth)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight must be positive, got 0.0"),
        ({"weight": math.nan}, "weight must be positive, got nan"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"TotalVariation: {message}"):
        TotalVariation(**settings)


def test_data_of_nothing_give_nothing():
    given = multicoil()
    x = solve(TotalVariation(iterations=5), Problem(0 * given.y, given.operator, 0.1)).samples
    assert float(x.abs().max()) == 0
