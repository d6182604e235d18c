"""The adjoint with its best factor."""

import math

import pytest
import torch

from operators import MulticoilMRI, SinglecoilMRI
from operators.base import LinearOperator
from priors import GaussianPrior
from recon import reconstruct
from recon.solvers import make_solver
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.zero_filled import ZeroFilled
from tests.operators.helper import dense

SHAPE = (6, 5)
C128 = torch.complex128


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Matrix(LinearOperator):
    """A matrix on real images, of any norm; with another one for its adjoint it is not matched."""

    def __init__(self, matrix, other=None):
        super().__init__((4, 3), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)
        self.register_buffer("other", matrix if other is None else other)
        self.matched_adjoint = other is None

    def _forward(self, x):
        return x.flatten(-2) @ self.matrix.T

    def _adjoint(self, y):
        return (y @ self.other).unflatten(-1, self.domain_shape)


def solve(given, items=1):
    noise = KeyedNoise(0, "", range(items), given.operator.domain_shape, given.y.dtype, torch.device("cpu"))
    return ZeroFilled().sample(given, None, noise)


def multicoil():
    A = MulticoilMRI(
        randn(3, *SHAPE, seed=4), torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.6
    )
    return Problem(A.mask * randn(3, *SHAPE, seed=5), A, 0.1)


def test_single_coil_gives_the_zero_filled_image():
    A = SinglecoilMRI(torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5, SHAPE).to(C128)
    y = A.mask * randn(*SHAPE)
    torch.testing.assert_close(solve(Problem(y, A, 0.0)).samples[0], A.adjoint(y))


def test_factor_is_that_of_least_squares():
    given = multicoil()
    b, A = given.adjoint_y, dense(given.operator, SHAPE)
    factor = torch.linalg.lstsq((A @ b.flatten())[:, None], given.y.flatten()[:, None]).solution
    assert abs(float(factor.imag)) < 1e-12
    torch.testing.assert_close(solve(given).samples[0], factor * b)


def test_the_scale_of_the_operator_does_not_matter():
    given = multicoil()
    scaled = Problem(given.y, 1e3 * given.operator, 0.1)
    torch.testing.assert_close(1e3 * solve(scaled).samples, solve(given).samples)


def test_real_images_and_an_adjoint_that_is_not_matched():
    matrix, other = (randn(20, 12, seed=seed, dtype=torch.float64) for seed in (1, 2))
    A, y = Matrix(matrix, matrix + 0.1 * other), randn(20, seed=3, dtype=torch.float64)
    x = solve(Problem(y, A, 0.1), 2).samples
    assert (x.shape, x.dtype) == ((2, 4, 3), torch.float64)
    image = y @ (matrix + 0.1 * other)
    predicted = matrix @ image
    expected = image * (predicted @ y) / (predicted @ predicted)
    torch.testing.assert_close(x[0].flatten(), expected)


def test_every_item_gets_the_image_without_the_network():
    given, steps = multicoil(), []
    noise = KeyedNoise(0, "", range(3), SHAPE, C128, torch.device("cpu"))
    solution = ZeroFilled().sample(given, None, noise, lambda *done: steps.append(done))
    assert solution.nfe == 0
    assert solution.samples.shape == (3, *SHAPE)
    assert torch.equal(solution.samples[0], solution.samples[2])
    assert steps == [(1, 1)]


def test_data_of_which_the_operator_sees_nothing():
    given = Problem(torch.zeros(3, *SHAPE, dtype=C128), multicoil().operator, 0.1)
    assert torch.equal(solve(given).samples, torch.zeros(1, *SHAPE, dtype=C128))


def test_nan_is_an_error():
    given = multicoil()
    with pytest.raises(SolverError, match="ZeroFilled produced values that are not finite at step 0"):
        solve(Problem(given.y * math.nan, given.operator, 0.1))


@pytest.mark.parametrize("c", [1e-4, 3e5])
def test_through_the_door(c):
    given = multicoil()
    one, other = (
        reconstruct(a * given.y, given.operator, None, make_solver("zero-filled"), noise_std=a * 0.1)
        for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean)
    torch.testing.assert_close(one.mean, solve(given).samples[0])
    assert float(one.std.abs().max()) == 0
    assert "ZeroFilled gives one image without a spread" in one.warnings
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0)
    with_prior = reconstruct(given.y, given.operator, prior, ZeroFilled(), noise_std=0.1)
    torch.testing.assert_close(with_prior.mean, one.mean)
