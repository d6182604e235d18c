"""DAPS with a Gaussian prior: the paper's algorithm worked out densely; the posterior where it is exact."""

import math
from functools import partial
from itertools import count, pairwise

import pytest
import torch

from operators import LinearOperator, SinglecoilMRI
from priors import GaussianPrior
from priors.sampling import karras_levels
from recon.solvers.base import Problem, SolverError
from recon.solvers.daps import DAPS, data_noise
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    multicoil_problem,
    posterior,
    randn,
)

SHAPE, N, COILS = (4, 3), 12, 3


IDENTITY = torch.eye(N, dtype=C128)

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def problem(share=0.6, noise_std=0.2):
    given = multicoil_problem(SHAPE, share, noise_std, COILS)
    # Langevin's step size follows from the norm, of which power iteration gives a few digits only.
    given.__dict__["norm"] = float(torch.linalg.matrix_norm(dense(given.operator, SHAPE), 2))
    return given


def solver(**settings):
    return DAPS(
        **{"nfe": 8, "ode_steps": 2, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings}
    )


def moments(daps, given, prior):
    levels = daps.nfe // daps.ode_steps
    inner = daps.langevin_steps if daps.inner == "langevin" else 1 + COILS
    steps = 1 + levels * (inner + 1) - 1  # the last level puts no noise on
    return moments_of_the_code(daps, given, prior, steps, all_used=True)


def moments_by_recursion(daps, given, prior):
    """The same by dense linear algebra, from the paper's Algorithm 1."""
    A = dense(given.operator, SHAPE).to(C128)
    right, s2 = A.mH @ given.y.flatten(), given.noise_std**2
    m, C = prior.mean.flatten(), covariance_of(prior)
    sigmas = daps.levels(prior, given.noise_std)
    mean = given.unfolded.flatten() if daps.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * IDENTITY
    largest = float(torch.linalg.eigvalsh(A.mH @ A).max())
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        # The ODE by Euler steps, x' = x + (s' - s) (x - D) / s.
        ladder = karras_levels(daps.ode_steps, sigma, min(sigma, prior.contract.sigma_min))
        for s, t in pairwise(ladder):
            slope = IDENTITY + (t - s) / s * (IDENTITY - C @ torch.linalg.inv(C + s**2 * IDENTITY))
            mean, covariance = m + slope @ (mean - m), slope @ covariance @ slope.mH
        r2 = sigma**2 if daps.spread == "sigma" else prior.error_variance(sigma)
        precision = A.mH @ A / s2 + IDENTITY / r2
        if daps.inner == "exact":
            inverse = torch.linalg.inv(precision)
            slope, offset, added = inverse / r2, inverse @ right / s2, inverse
        else:
            rate = daps.langevin_rate
            rate *= 1 + (daps.langevin_decay - 1) * index / max(1, len(sigmas) - 2)
            step = rate / (largest / s2 + 1 / r2)
            slope, offset, added = IDENTITY, 0 * m, 0 * IDENTITY
            for _ in range(daps.langevin_steps):
                contraction = IDENTITY - step * precision
                slope = contraction @ slope + step / r2 * IDENTITY
                offset = contraction @ offset + step * right / s2
                added = contraction @ added @ contraction.mH + 2 * step * IDENTITY
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.mH + added + lower**2 * IDENTITY
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.4),
        ({"ode_steps": 1, "start": "noise"}, 0.8),
        ({"ode_steps": 4, "spread": "sigma"}, 0.4),
        ({"inner": "langevin", "langevin_steps": 4}, 0.4),
        ({"inner": "langevin", "langevin_steps": 3, "langevin_rate": 1.5, "langevin_decay": 0.1}, 0.4),
        ({"nfe": 9, "ode_steps": 2, "start": "noise", "sigma_min": 0.5}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    daps, given, prior = solver(**settings), problem(share), gaussian_prior()
    found = moments(daps, given, prior)
    torch.testing.assert_close(found, moments_by_recursion(daps, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-4


def test_exact_for_white_images_however_few_the_levels():
    # p(x0 | x) = N(D, r^2 I) then, with r^2 the mean square error of D.
    given = problem(0.6, noise_std=0.3)
    mean = randn(*SHAPE, seed=2)
    prior = GaussianPrior(mean, covariance=0.36 * IDENTITY, sigma_min=0.05, sigma_max=1e4)
    mean, covariance = posterior(given, prior)
    for nfe in (2, 7):
        daps = solver(nfe=nfe, ode_steps=1, start="noise", sigma_max=1e4)
        found_mean, found = moments(daps, given, prior)
        torch.testing.assert_close(found_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, covariance, rtol=1e-4, atol=1e-4)
    # With r = sigma, as published, the spread is too large.
    _, wide = moments(solver(nfe=7, ode_steps=1, spread="sigma", sigma_max=1e4), given, prior)
    assert float(wide.diagonal().real.mean() / covariance.diagonal().real.mean()) > 1.02


def test_the_variance_of_a_chain_in_its_stiffest_direction():
    """One pixel, measured: the stationary variance of a chain is too large by ``1 / (1 - rate / 2)``."""
    A = SinglecoilMRI(torch.ones(1, 1), (1, 1)).to(C128)
    given, daps, steps = (
        Problem(torch.ones(1, 1, dtype=C128), A, 0.3),
        solver(langevin_steps=60),
        iter(range(60)),
    )

    def unit():  # item 0 has no noise, the others one unit each, at one step each
        noise = torch.zeros(61, 1, 1, dtype=C128)
        noise[1 + next(steps)] = 1
        return noise

    x = daps.langevin(given, torch.zeros(61, 1, 1, dtype=C128), 0.7, 0.5, unit).flatten()
    precision = 1 / 0.3**2 + 1 / 0.7**2
    assert complex(x[0]) == pytest.approx(1 / 0.3**2 / precision)
    variance = float((x[1:] - x[0]).abs().square().sum())
    assert variance == pytest.approx(1 / precision / (1 - 0.5 / 2))


def test_data_noise_is_made_of_different_numbers():
    class Shape(LinearOperator):
        def __init__(self, range_shape):
            super().__init__(SHAPE, range_shape)

    noise = keyed([0, 4])
    for range_shape, draws in (((3, 4, 3), 3), ((13,), 2), ((2, 4), 1)):
        numbers = count()
        drawn = data_noise(Shape(range_shape), partial(draw_next, noise, numbers))
        assert drawn.shape == (2, *range_shape)
        assert next(numbers) == draws
        assert len(set(drawn.flatten().tolist())) == drawn.numel()


def draw_next(noise, numbers):
    return noise(next(numbers))


# What a run does, costs and reports


def test_published_setting():
    paper = DAPS.paper()
    assert (paper.nfe // paper.ode_steps, paper.ode_steps, paper.langevin_steps) == (200, 5, 100)
    assert (paper.inner, paper.spread, paper.sigma_max, paper.sigma_min) == ("langevin", "sigma", 100.0, 0.1)
    # 1e-4 for a likelihood of standard deviation 0.01 and a unitary operator.
    assert paper.langevin_rate == pytest.approx(1e-4 / 0.01**2)
    assert DAPS.paper(4000, ode_steps=10).nfe == 4000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ode_steps": 0}, "ode_steps must be at least 1, got 0"),
        ({"nfe": 4, "ode_steps": 5}, "nfe must be at least 5, got 4"),
        ({"langevin_steps": 0}, "langevin_steps must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"langevin_rate": 2.0}, "langevin_rate must lie between 0 and 2, got 2.0"),
        ({"langevin_decay": 0.0}, r"langevin_decay must lie in \(0, 1\], got 0.0"),
        ({"spread": "wide"}, "spread is one of prior, sigma, not 'wide'"),
        ({"inner": "hmc"}, "inner is one of exact, langevin, not 'hmc'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DAPS: {message}"):
        DAPS(**settings)
