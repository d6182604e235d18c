"""ΠGDM with a Gaussian prior: against the paper's equations worked out densely, and against exact scores."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from priors import GaussianPrior
from recon.solvers.base import SolverError
from recon.solvers.pigdm import PiGDM
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

SHAPE, N = (6, 5), 30

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def solver(**settings):
    return PiGDM(**{"nfe": 6, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings})


def moments_by_recursion(pigdm, given, prior):
    """The same by dense linear algebra, from the paper's equations, with the inverse in data space."""
    A = dense(given.operator, SHAPE).to(C128)
    y, identity, data_identity = given.y.flatten(), torch.eye(N, dtype=C128), torch.eye(len(A), dtype=C128)
    m, C = prior.mean.flatten(), covariance_of(prior)
    sigmas = pigdm.levels(prior, given.noise_std)
    mean, covariance = 0 * m, sigmas[0] ** 2 * identity
    if pigdm.start == "warm":
        mean = given.unfolded.flatten()
    for sigma, lower in pairwise(sigmas):
        W = C @ torch.linalg.inv(C + sigma**2 * identity)
        r2 = {
            "sigma": sigma**2,
            "unit": sigma**2 / (1 + sigma**2),
            "prior": float((W.diagonal().real * sigma**2).mean()),
        }[pigdm.spread]
        # g = G (y - A D), D = W x + (I - W) m.
        G = W.mH @ A.mH @ torch.linalg.inv(r2 * A @ A.mH + given.noise_std**2 * data_identity)
        slope_g, offset_g = -G @ A @ W, G @ (y - A @ (identity - W) @ m)
        fresh = pigdm.eta * lower * math.sqrt(1 - lower**2 / sigma**2)
        direction = math.sqrt(lower**2 - fresh**2)
        if pigdm.guidance == "score":  # DDIM with the posterior's score in place of the prior's
            weight = sigma**2 - direction * sigma
        else:  # Algorithm 1: sqrt(bar) r^2 times the gradient in the scaled image, in units of the next
            bar, next_bar = 1 / (1 + sigma**2), 1 / (1 + lower**2)
            weight = math.sqrt(bar) * r2 / math.sqrt(bar) / math.sqrt(next_bar)
        slope = W + direction / sigma * (identity - W) + weight * slope_g
        offset = (1 - direction / sigma) * (identity - W) @ m + weight * offset_g
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.mH + fresh**2 * identity
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.8),
        ({"eta": 0.0}, 0.4),
        ({"start": "noise", "eta": 0.5}, 0.4),
        ({"spread": "unit"}, 0.4),
        ({"spread": "prior", "start": "noise"}, 0.4),
        ({"guidance": "paper", "spread": "unit", "schedule": "vp-linear", "start": "noise"}, 0.4),
        ({"guidance": "paper"}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    pigdm, given, prior = solver(**settings), problem(share), gaussian_prior()
    found = moments_of_the_code(pigdm, given, prior, pigdm.nfe + 1)
    torch.testing.assert_close(found, moments_by_recursion(pigdm, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-4


# Where the approximation is none: independent pixels of one variance

TAU = 0.6


def white_prior():
    covariance = TAU**2 * torch.eye(N, dtype=C128)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=covariance, sigma_min=0.01, sigma_max=40)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_the_score_is_exact_for_white_images(sigma):
    given, prior = problem(), white_prior()
    x = randn(3, *SHAPE, seed=6) * (1 + sigma)
    _, g = solver(spread="prior").likelihood_score(given, prior, x, sigma)
    # Bayes: grad log p(y | x) = grad log p(x | y) - grad log p(x), both of them Gaussian in closed form.
    mean, covariance = posterior(given, prior)
    blurred = covariance + sigma**2 * torch.eye(N, dtype=C128)
    conditional = -torch.linalg.solve(blurred, (x.flatten(1) - mean).mT).mT
    prior_score = -(x - prior.mean).flatten(1) / (TAU**2 + sigma**2)
    torch.testing.assert_close(g.flatten(1), conditional - prior_score, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_white_images_approach_the_posterior(eta):
    given, prior = problem(0.8, noise_std=0.5), white_prior()
    mean, covariance = posterior(given, prior)
    errors = []
    for nfe in (20, 40, 80, 160):
        pigdm = solver(nfe=nfe, eta=eta, spread="prior", start="noise", sigma_max=40.0, sigma_min=0.002)
        found_mean, found = moments_by_recursion(pigdm, given, prior)
        errors.append(float((found - covariance).norm() / covariance.norm()))
        assert float((found_mean - mean).norm() / mean.norm()) < 2 / nfe
    for coarse, fine in pairwise(errors):
        assert 1.5 < coarse / fine < 2.5
    assert errors[-1] < 0.08
    pigdm = solver(nfe=20, eta=eta, spread="prior", start="noise", sigma_max=40.0, sigma_min=0.002)
    found = moments_of_the_code(pigdm, given, prior, pigdm.nfe + 1)[1]
    assert float((found - covariance).norm() / covariance.norm()) == pytest.approx(errors[0], rel=1e-6)


def test_a_mean_variance_far_below_the_largest_diverges_and_the_upper_bound_does_not():
    # What the default is for: one strong direction among many weak ones.
    values = torch.full(SHAPE, 1e-4, dtype=torch.float64)
    values[0, 0] = 100.0
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), spectrum=values)
    given = problem(1.1, noise_std=0.01)
    sizes = {
        spread: float(solver(spread=spread, nfe=20).sample(given, prior, keyed([0])).samples.abs().max())
        for spread in ("prior", "sigma")
    }
    assert sizes["prior"] > 1e6
    assert sizes["sigma"] < 10


# What a run does, costs and reports


def test_published_setting():
    paper = PiGDM.paper()
    assert (paper.nfe, paper.eta, paper.spread, paper.guidance) == (100, 1.0, "unit", "paper")
    assert (paper.schedule, paper.start) == ("vp-linear", "noise")
    assert PiGDM.paper(20, eta=0.5).eta == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"eta": 1.1}, r"eta must lie in \[0, 1\], got 1.1"),
        ({"spread": "wide"}, "spread is one of sigma, unit, prior, not 'wide'"),
        ({"guidance": "none"}, "guidance is one of score, paper, not 'none'"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"PiGDM: {message}"):
        PiGDM(**settings)
