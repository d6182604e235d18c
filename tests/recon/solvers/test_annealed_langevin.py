"""Annealed Langevin dynamics against the stationary law of the algorithm on a Gaussian posterior."""

import itertools
import math
from functools import partial

import pytest
import torch

from priors import GaussianPrior
from recon.solvers.annealed_langevin import AnnealedLangevin
from recon.solvers.base import SolverError
from tests.operators.helper import dense
from tests.recon.solvers.helper import (
    C128,
    BasisNoise,
    Counting,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    multicoil_problem,
    randn,
    samples_of,
)

SHAPE, N = (3, 3), 9


LOW = 0.3

keyed = partial(keyed_noise, SHAPE)


def gaussian_prior(sigma_min=LOW):
    """Variances between 0.3 and 1, correlated."""
    basis = torch.linalg.qr(randn(N, N, seed=1)).Q
    values = torch.linspace(0.3, 1.0, N, dtype=torch.float64)
    covariance = (basis * values) @ basis.mH
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=covariance, sigma_min=sigma_min)


def problem(noise_std=0.5):
    return multicoil_problem(SHAPE, 0.5, noise_std)


class PlentifulNoise:
    """Independent noise for many items, drawn at once."""

    def __init__(self, items):
        self.items, self.generator = items, torch.Generator().manual_seed(0)

    def __call__(self, step):
        z = torch.randn((self.items, *SHAPE), dtype=C128, generator=self.generator)
        return math.sqrt(2) * z


def posterior(given, prior, smoothing):
    """Mean and precision per real component under the prior with its covariance raised by smoothing^2."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    C = covariance_of(prior)
    prior_precision = torch.linalg.inv(C + smoothing**2 * identity)
    precision = prior_precision + A.mH @ A / given.noise_std**2
    right = prior_precision @ prior.mean.flatten() + A.mH @ given.y.flatten() / given.noise_std**2
    return torch.linalg.solve(precision, right), precision


def stationary_of_the_code(given, prior, step):
    """Limit of many steps of the code, each ``S x + r + sqrt(g) z``, by solving for it."""
    sigma = prior.contract.sigma_min
    solver = AnnealedLangevin(levels=1, last_steps=1, last_step=step, start="noise", sigma_min=sigma)

    def start_only(index):
        """A unit vector to start from, and no noise after."""
        return (1 - index) / sigma * BasisNoise(SHAPE, 1)(0)

    moved = samples_of(solver, given, prior, start_only).flatten(1)
    r, S = moved[0], (moved[1:] - moved[0]).mT
    fresh = moments_of_the_code(solver, given, prior, 1 + solver.nfe)[1] - sigma**2 * S @ S.mH
    identity = torch.eye(N, dtype=C128)
    # vec(X) = (I - conj(S) kron S)^-1 vec(F) solves the Lyapunov equation X = S X S^H + F.
    system = torch.eye(N * N, dtype=C128) - torch.kron(S.conj(), S)
    covariance = torch.linalg.solve(system, fresh.mT.flatten()).reshape(N, N).mT
    return torch.linalg.solve(identity - S, r), covariance


@pytest.mark.parametrize("step", [0.5, 3.0])
def test_stationary_law_at_a_finite_step(step):
    """For ``x - (g/2) H x + sqrt(g) z`` the Lyapunov equation is solved by ``H^-1 (1 - g H / 4)^-1``."""
    given, prior = problem(), gaussian_prior()
    mean, covariance = stationary_of_the_code(given, prior, step)
    expected, H = posterior(given, prior, LOW)
    g = step / (1 / LOW**2 + given.norm**2 / given.noise_std**2)
    stationary = torch.linalg.inv(H) @ torch.linalg.inv(torch.eye(N, dtype=C128) - g / 4 * H)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, stationary, rtol=1e-9, atol=1e-9)
    # The excess is within the documented bound, and not nothing.
    ratio = torch.linalg.eigvals(covariance @ H).real
    assert 1.01 < float(ratio.max()) <= 1 / (1 - step / 4)


def test_small_steps_and_little_smoothing_reach_the_posterior():
    """Towards the posterior of the image itself, the errors fall with the step and with sigma_min squared."""
    given = problem()
    _, H = posterior(given, gaussian_prior(), 0.0)
    exact_mean, _ = posterior(given, gaussian_prior(), 0.0)
    exact = torch.linalg.inv(H)
    errors = []
    for sigma_min, step in ((0.2, 0.4), (0.1, 0.4), (0.05, 0.4)):
        mean, covariance = stationary_of_the_code(given, gaussian_prior(sigma_min), step)
        std = exact.diagonal().real.sqrt()
        ratio = covariance.diagonal().real / exact.diagonal().real
        errors.append((float(((mean - exact_mean).abs() / std).max()), float((ratio - 1).abs().max())))
    for coarse, fine in itertools.pairwise(errors):
        assert fine[0] < 0.35 * coarse[0]
        assert fine[1] < 0.35 * coarse[1]
    assert errors[-1][0] < 0.05
    assert errors[-1][1] < 0.03


def test_samples_have_the_moments_of_the_posterior():
    """Annealed from well above; Monte-Carlo error and bias together stay below what is claimed."""
    count, given, prior = 3000, problem(), gaussian_prior(0.1)
    solver = AnnealedLangevin(8, 10, last_steps=300, last_step=0.5, sigma_min=0.1)
    samples = samples_of(solver, given, prior, PlentifulNoise(count)).flatten(1)
    mean, H = posterior(given, prior, 0.0)
    variance = torch.linalg.inv(H).diagonal().real
    error = (samples.mean(0) - mean).abs() / variance.sqrt()
    ratio = (samples - mean).abs().square().mean(0) / 2 / variance
    assert float(error.square().mean().sqrt()) < 0.05
    assert float(ratio.mean() - 1) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("start", ["warm", "noise"])
def test_equal_to_the_dense_recursion(start):
    """The levels above the last: likelihood raised by ``||A|| sigma``, step sizes of their own."""
    given, prior = problem(), gaussian_prior(0.1)
    solver = AnnealedLangevin(4, 2, 0.7, 0.8, 3, 0.9, sigma_max=3.0, sigma_min=0.1, start=start)
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    C = covariance_of(prior)
    mean = given.unfolded.flatten() if start == "warm" else torch.zeros(N, dtype=C128)
    covariance = 9.0 * identity
    for sigma, steps in zip((3.0, 3 / 30 ** (1 / 3), 3 / 30 ** (2 / 3), 0.1), (2, 2, 2, 3), strict=True):
        s2 = 0.25 + (0.0 if sigma == 0.1 else 0.64 * given.norm**2 * sigma**2)
        g = (0.9 if sigma == 0.1 else 0.7) / (1 / sigma**2 + given.norm**2 / s2)
        score = torch.linalg.inv(C + sigma**2 * identity)
        for _ in range(steps):
            slope = identity - g / 2 * score - g / (2 * s2) * A.mH @ A
            offset = g / 2 * score @ prior.mean.flatten() + g / (2 * s2) * A.mH @ given.y.flatten()
            mean, covariance = slope @ mean + offset, slope @ covariance @ slope.mH + g * identity
    found = moments_of_the_code(solver, given, prior, 1 + solver.nfe)
    torch.testing.assert_close(found, (mean, covariance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise_std", [1e-4, 10.0])
def test_stiff_and_loose_data_are_stable(noise_std):
    solver = AnnealedLangevin(levels=5, steps=3, last_steps=100, step=3.0, last_step=3.0)
    x = solver.sample(problem(noise_std), gaussian_prior(), keyed((0, 1))).samples
    assert float(x.abs().max()) < 20


# What a run costs and reports


def test_levels():
    prior = Counting()  # 0.002 to 20
    three = AnnealedLangevin(levels=3).sigmas(prior, 0.02)
    assert three == pytest.approx([0.3, math.sqrt(0.3 * 0.01), 0.01])
    assert AnnealedLangevin(levels=1).sigmas(prior, 1e-3) == pytest.approx([0.002])
    wide = AnnealedLangevin(levels=2, sigma_max=99.0, sigma_min=0.1)
    assert wide.sigmas(prior, 0.01) == pytest.approx([20, 0.1])
    with pytest.raises(SolverError, match=r"need sigma_min <= sigma_max in the prior's range, got 3.0, 0.3"):
        AnnealedLangevin(sigma_min=3.0).sigmas(prior, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"last_steps": 0}, "last_steps must be at least 1, got 0"),
        ({"step": 0.0}, "step must lie between 0 and 4, got 0.0"),
        ({"step": 4.0}, "step must lie between 0 and 4, got 4.0"),
        ({"last_step": math.nan}, "last_step must lie between 0 and 4, got nan"),
        ({"gamma": 0.0}, "gamma must be positive, got 0.0"),
        ({"sigma_max": -1.0}, "sigma_max must be positive, got -1.0"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"AnnealedLangevin: {message}"):
        AnnealedLangevin(**settings)
