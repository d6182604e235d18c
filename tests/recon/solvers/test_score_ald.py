"""Score-ALD with a Gaussian prior: an affine map of its noise, held against that map worked out densely."""

import math
from functools import partial

import pytest
import torch

from operators import CoilwiseMRI, MulticoilMRI, SinglecoilMRI
from priors import GaussianPrior
from recon.solvers.base import Problem, SolverError
from recon.solvers.score_ald import ScoreALD
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

ONES = torch.ones(SHAPE, dtype=C128)


def problem(noise_std=0.2, factor=1.0):
    A = MulticoilMRI(factor * randn(3, *SHAPE, seed=4), mask())
    return Problem(factor * mask() * randn(3, *SHAPE, seed=5), A, noise_std)


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra, from Eq. 3 of the paper."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    y, m = given.y.flatten(), prior.mean.flatten()
    C = covariance_of(prior)
    sigmas = solver.sigmas(prior, given.noise_std / given.norm)
    mean = given.unfolded.flatten() if solver.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * identity
    for sigma in sigmas:
        eta = solver.step * sigma**2
        gamma_t = solver.gamma * given.norm * sigma
        precision = torch.linalg.inv(C + sigma**2 * identity)
        data = A.mH / (given.noise_std**2 + gamma_t**2)
        for _ in range(solver.steps):
            mean = mean + eta * (precision @ (m - mean) + data @ (y - A @ mean))
            slope = identity - eta * (precision + data @ A)
            covariance = slope @ covariance @ slope.mH + 2 * eta * identity
    if solver.denoise:
        gain = C @ torch.linalg.inv(C + sigmas[-1] ** 2 * identity)
        mean, covariance = m + gain @ (mean - m), gain @ covariance @ gain.mH
    return mean, covariance


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"start": "noise", "sigma_max": 8.0},
        {"denoise": False},
        {"gamma": 3.0, "step": 0.8, "steps": 1},
        {"sigma_min": 0.1, "levels": 2, "steps": 5},
    ],
)
@pytest.mark.parametrize("noise_std", [0.2, 0.0])
def test_equal_to_the_dense_recursion(settings, noise_std):
    solver = ScoreALD(**{"levels": 6, "steps": 2, **settings})
    given, prior = problem(noise_std), gaussian_prior()
    found = moments_of_the_code(solver, given, prior, 1 + solver.levels * solver.steps)
    torch.testing.assert_close(found, moments_by_recursion(solver, given, prior), rtol=1e-9, atol=1e-9)
    assert float(found[1].diagonal().real.max()) > 1e-3


def test_balanced_gradients():
    """One Langevin step by hand, for each item by itself; the noise level plays no part."""
    solver = ScoreALD(levels=1, steps=1, step=0.3, balance=5.0, denoise=False, start="noise")
    given, prior = problem(), gaussian_prior()
    A, y = dense(given.operator, SHAPE), given.y.flatten()
    C = covariance_of(prior)
    noise = keyed((0, 1, 2))
    samples = solver.sample(given, prior, noise).samples
    again = solver.sample(Problem(given.y, given.operator, 1e-3), prior, noise).samples
    torch.testing.assert_close(again, samples)
    sigma = solver.sigmas(prior, 0.2 / given.norm)[0]
    for item in range(3):
        x = sigma * noise(0)[item].flatten()
        score = torch.linalg.solve(C + sigma**2 * torch.eye(N, dtype=C128), prior.mean.flatten() - x)
        data = A.mH @ (y - A @ x)
        data = 5 * data * score.norm() / data.norm()
        eta = 0.3 * sigma**2
        expected = x + eta * (score + data) + math.sqrt(2 * eta) * noise(1)[item].flatten()
        torch.testing.assert_close(samples[item].flatten(), expected)


def test_without_data_the_marginal_approaches_the_prior():
    """The lag behind the falling levels halves when there are twice as many."""
    variance = torch.tensor([0.05, 0.2, 1.0, 3.0], dtype=torch.float64).expand(SHAPE)
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=variance, sigma_min=0.01)
    nothing = Problem(torch.zeros(SHAPE, dtype=C128), SinglecoilMRI(torch.zeros(SHAPE)).to(C128), 0.02)
    errors = []
    for levels in (40, 80):
        solver = ScoreALD(levels, 6, 0.4, gamma=1.0, sigma_max=20.0, start="noise")
        samples = samples_of(solver, nothing, prior, SimultaneousNoise(ONES, 1 + 6 * levels))
        errors.append(float(((samples[1:] - samples[0]).abs().square().sum(0) / variance - 1).abs().max()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.1


def test_at_one_level_the_stationary_law_is_that_of_langevin_dynamics():
    """Every coefficient measured: the posterior is known, and so is the excess variance of a finite step."""
    prior = GaussianPrior(torch.full(SHAPE, 0.5 + 0j, dtype=C128), variance=0.3, sigma_min=0.1, sigma_max=1)
    A = SinglecoilMRI(torch.ones(SHAPE)).to(C128)
    given = Problem(randn(*SHAPE, seed=6), A, 0.4)
    solver = ScoreALD(levels=1, steps=300, step=1.0, gamma=2.0, sigma_max=0.1, denoise=False)
    samples = samples_of(solver, given, prior, SimultaneousNoise(ONES, 301))
    mean, variance = samples[0], (samples[1:] - samples[0]).abs().square().sum(0)
    # Prior smoothed by sigma, likelihood by gamma_t = 0.2.
    lam, eta = 1 / (0.3 + 0.01), 0.01
    precision = lam + 1 / (0.16 + 0.04)
    expected = (lam * 0.5 + A.adjoint(given.y) / (0.16 + 0.04)) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)
    stationary = 1 / precision / (1 - eta * precision / 2)
    torch.testing.assert_close(variance, torch.full_like(variance, stationary), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_units_of_the_measurement_do_not_matter(factor):
    """gamma_t follows the operator's norm: operator, data and noise scaled together are the same problem."""
    prior, solver = gaussian_prior(), ScoreALD(levels=10)
    one = solver.sample(problem(), prior, keyed()).samples
    other = solver.sample(problem(0.2 * factor, factor), prior, keyed()).samples
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_coil_images():
    A = CoilwiseMRI(2, mask()).to(C128)
    given = Problem(mask() * randn(2, *SHAPE, seed=6), A, 0.1)
    noise = keyed_noise((2, *SHAPE), (0, 1))
    for solver in (ScoreALD(levels=40), ScoreALD(levels=40, balance=5.0, step=0.05)):
        x = solver.sample(given, gaussian_prior(), noise).samples
        assert x.shape == (2, 2, *SHAPE)
        assert float((A(x) - given.y).norm()) < 0.5 * float(given.y.norm())


# What a run costs and reports


def test_levels():
    prior = Counting()  # 0.002 to 20
    assert ScoreALD(levels=3).sigmas(prior, 0.02) == pytest.approx([0.3, math.sqrt(0.3 * 0.01), 0.01])
    assert ScoreALD(levels=2).sigmas(prior, 1e-4) == pytest.approx([0.3, 0.002])
    assert ScoreALD(levels=2, sigma_max=99.0, sigma_min=0.1).sigmas(prior, 0.1) == pytest.approx([20, 0.1])
    with pytest.raises(SolverError, match=r"need sigma_min <= sigma_max in the prior's range, got 3.0, 0.3"):
        ScoreALD(sigma_min=3.0).sigmas(prior, 0.01)


def test_published_settings():
    paper, released = ScoreALD.paper(), ScoreALD.released()
    wide = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0, sigma_min=1e-3, sigma_max=1e3)
    ladder = paper.sigmas(wide, 0.1)
    assert len(ladder) == 2311
    assert ladder[::2310] == pytest.approx([232, 0.0066])
    # The released code leaves the first 1155 of these out.
    assert released.sigmas(wide, 0.1) == pytest.approx(ladder[1155:])
    assert (paper.steps, released.steps, paper.balance, released.balance) == (3, 3, None, 5.0)
    assert paper.gamma == 1.0
    assert released.step * 0.0066**2 == pytest.approx(5e-5)
    assert paper.step * 0.0066**2 == pytest.approx(9e-7)
    assert not paper.denoise
    assert paper.start == released.start == "noise"
    assert ScoreALD.released(steps=1).steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"step": 0.0}, "step must be positive, got 0.0"),
        ({"gamma": -1.0}, "gamma must be positive, got -1.0"),
        ({"balance": math.nan}, "balance must be positive, got nan"),
        ({"sigma_max": math.inf}, "sigma_max must be positive, got inf"),
        ({"step": 1.0, "gamma": 1.0}, "step 1.0 is unstable with gamma 1.0"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"ScoreALD: {message}"):
        ScoreALD(**settings)
