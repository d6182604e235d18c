"""Replacement against exact conditionals, and against its own map worked out with dense matrices."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from operators import MulticoilMRI, SinglecoilMRI
from operators.base import LinearOperator
from priors import GaussianPrior
from recon.solvers.base import Problem, SolverError
from recon.solvers.replacement import Replacement
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    SimultaneousNoise,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    randn,
    random_mask,
    samples_of,
)

SHAPE, N = (5, 4), 20

mask = partial(random_mask, SHAPE)
gaussian_prior = partial(helper.gaussian_prior, SHAPE, sigma_min=0.02)
keyed = partial(keyed_noise, SHAPE)


class Pixels(LinearOperator):
    """Some pixels of an image, the others zero."""

    def __init__(self, mask, dtype):
        super().__init__(mask.shape, mask.shape)
        self.register_buffer("mask", mask.to(dtype))

    def _forward(self, x):
        return self.mask * x

    def _adjoint(self, y):
        return self.mask * y


def problem(noise_std=0.2):
    return Problem(mask() * randn(*SHAPE, seed=5), SinglecoilMRI(mask()).to(C128), noise_std)


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    m, C = prior.mean.flatten(), covariance_of(prior)
    measured, s = A.mH @ A, given.noise_std
    sigmas = solver.sigmas(prior, s)
    mean, covariance = 0 * m, sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        for visit in range(solver.visits):
            if visit > 0:
                covariance = covariance + (sigma**2 - lower**2) * identity
            mean = (identity - measured) @ mean + A.mH @ given.y.flatten()
            covariance = (identity - measured) @ covariance @ (identity - measured) + max(
                sigma**2 - s**2, 0
            ) * measured
            # D(x) = m + W (x - m), then x' = D + direction (x - D) / sigma + fresh z
            W = C @ torch.linalg.inv(C + sigma**2 * identity)
            fresh = solver.eta * lower * math.sqrt(1 - lower**2 / sigma**2)
            slope = W + math.sqrt(lower**2 - fresh**2) / sigma * (identity - W)
            mean, covariance = m + slope @ (mean - m), slope @ covariance @ slope.mH + fresh**2 * identity
    if s < 0.999 * sigmas[-2]:
        mean = (identity - measured) @ mean + A.mH @ given.y.flatten()
        covariance = (identity - measured) @ covariance @ (identity - measured)
    return mean, covariance


@pytest.mark.parametrize("noise_std", [0.2, 0.005, 0.0])
@pytest.mark.parametrize("settings", [{}, {"visits": 1}, {"visits": 3, "eta": 0.3}, {"eta": 0.0}])
def test_equal_to_the_dense_recursion(noise_std, settings):
    solver = Replacement(**{"levels": 5, "visits": 2, "sigma_max": 5.0, **settings})
    given, prior = problem(noise_std), gaussian_prior()
    found = moments_of_the_code(solver, given, prior, 1 + 3 * solver.nfe)
    torch.testing.assert_close(found, moments_by_recursion(solver, given, prior), rtol=1e-9, atol=1e-9)


# Exact conditionals


@pytest.mark.parametrize("dtype", [C128, torch.float64])
@pytest.mark.parametrize("noise_std", [0.3, 0.0])
def test_independent_pixels(dtype, noise_std):
    """A measured pixel ends as its posterior mean, any other as a draw from the prior, as it should."""
    variance = torch.linspace(0.1, 2, N, dtype=torch.float64).reshape(SHAPE)
    mean = randn(*SHAPE, seed=2, dtype=dtype)
    prior = GaussianPrior(mean, variance=variance, sigma_min=0.01, sigma_max=200)
    y = mask() * randn(*SHAPE, seed=5, dtype=dtype)
    given = Problem(y, Pixels(mask(), dtype), noise_std)
    errors = []
    for levels in (40, 80):
        noise = SimultaneousNoise(torch.ones(SHAPE, dtype=dtype), 1 + 2 * levels)
        samples = samples_of(Replacement(levels=levels, visits=1), given, prior, noise)
        spread = (samples[1:] - samples[0]).abs().square().sum(0)
        weight = variance / (variance + noise_std**2)
        expected = torch.where(mask(), mean + weight * (y - mean), mean)
        torch.testing.assert_close(samples[0], expected, rtol=1e-3, atol=1e-3)
        assert float(spread[mask()].max()) < 1e-12
        errors.append(float((spread / variance - 1)[~mask()].abs().max()))
    # The discretisation's error, of first order (and the variance below the last level, which is lost).
    assert errors[1] < 0.25
    assert errors[1] < 0.75 * errors[0]


def test_visits_bring_correlated_pixels_nearer_to_their_conditional():
    """Two pixels, correlation 0.9, one known: the mean of the other must be 0.9 of it, its variance 0.19."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=C128)
    prior = GaussianPrior(torch.zeros(1, 2, dtype=C128), covariance=covariance, sigma_min=0.01)
    given = Problem(torch.tensor([[1.0, 0.0]], dtype=C128), Pixels(torch.tensor([[True, False]]), C128), 0.0)
    means, variances = [], []
    for visits in (1, 8):
        solver = Replacement(levels=60, visits=visits)
        mean, spread = moments_of_the_code(solver, given, prior, 1 + 3 * solver.nfe)
        assert mean[0] == pytest.approx(1)
        means.append(abs(float(mean[1].real) - 0.9))
        variances.append(abs(float(spread[1, 1].real) - 0.19))
    assert means[0] > 5 * means[1]
    assert variances[0] > 4 * variances[1]
    assert means[1] < 0.05
    assert variances[1] < 0.02


def test_each_chain_may_have_data_of_its_own():
    """A neighbour that every chain drew for itself passes its spread on; its mean alone would not."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=C128)
    prior = GaussianPrior(torch.zeros(1, 2, dtype=C128), covariance=covariance, sigma_min=0.01)
    A = Pixels(torch.tensor([[True, False]]), C128)
    count = 3
    noise = keyed_noise((1, 2), range(count))
    y = torch.zeros(count, 1, 2, dtype=C128)
    y[:, 0, 0] = torch.tensor([-1.0, 0.0, 2.0])
    solver = Replacement(levels=10)
    together = solver.sample(Problem(y, A, 0.0), prior, noise).samples
    for k in range(count):
        alone = keyed_noise((1, 2), (k,))
        single = solver.sample(Problem(y[k], A, 0.0), prior, alone).samples[0]
        torch.testing.assert_close(together[k], single)
        torch.testing.assert_close(single[0, 0], y[k, 0, 0])


# What a run costs and reports


def test_levels():
    prior = Counting()  # 0.002 to 20
    assert Replacement(levels=2).sigmas(prior, 0.05) == [pytest.approx(20), pytest.approx(0.05), 0.0]
    assert Replacement(levels=2).sigmas(prior, 0.0)[1] == pytest.approx(0.002)
    assert Replacement(levels=2, sigma_max=3.0, sigma_min=0.1).sigmas(prior, 0.0)[:2] == pytest.approx(
        [3, 0.1]
    )
    assert (Replacement.paper().levels, Replacement.paper().visits) == (250, 10)
    assert Replacement.paper(visits=3).visits == 3


def test_only_what_can_be_replaced():
    maps = randn(3, *SHAPE, seed=4)
    given = Problem(randn(3, *SHAPE, seed=5), MulticoilMRI(maps, mask()), 0.1)
    with pytest.raises(SolverError, match=r"Replacement replaces what was measured, .* not MulticoilMRI"):
        Replacement().sample(given, gaussian_prior(), keyed())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"visits": 0}, "visits must be at least 1, got 0"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, r"eta must lie in \[0, 1\], got nan"),
        ({"sigma_max": 0.0}, "sigma_max must be positive, got 0.0"),
        ({"sigma_min": math.inf}, "sigma_min must be positive, got inf"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"Replacement: {message}"):
        Replacement(**settings)
