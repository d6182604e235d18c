"""PnP-DM with a Gaussian prior: the paper's algorithm worked out densely, and the law its chains go to."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from priors import Contract
from priors.sampling import karras_levels
from recon.solvers.base import SolverError
from recon.solvers.pnp_dm import PnPDM
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    covariance_of,
    moments_of_the_code,
    multicoil_problem,
    posterior,
)

SHAPE, N, COILS = (4, 3), 12, 3


IDENTITY = torch.eye(N, dtype=C128)

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE, coils=COILS)


def solver(**settings):
    return PnPDM(**{"nfe": 8, "cg_iterations": 400, "cg_tolerance": 0.0, **settings})


def moments(pnp, given, prior):
    turns = pnp.nfe // pnp.steps
    # A likelihood step takes one image and the data's noise, a prior step one image less than evaluations.
    steps = turns * (1 + COILS + pnp.steps - 1) + (pnp.start == "noise")
    return moments_of_the_code(pnp, given, prior, steps, all_used=True)


def moments_by_recursion(pnp, given, prior):
    """The same by dense linear algebra, from the paper's Algorithm 1."""
    A = dense(given.operator, SHAPE).to(C128)
    s2 = given.noise_std**2
    m, C = prior.mean.flatten(), covariance_of(prior)
    rhos = pnp.rhos(prior, given.noise_std)
    mean, covariance = given.unfolded.flatten(), 0 * IDENTITY
    if pnp.start == "noise":
        mean, covariance = 0 * m, rhos[0] ** 2 * IDENTITY
    reverse: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
    for rho in rhos:
        inverse = torch.linalg.inv(A.mH @ A / s2 + IDENTITY / rho**2)
        mean = inverse @ (A.mH @ given.y.flatten() / s2 + mean / rho**2)
        covariance = inverse @ covariance @ inverse.mH / rho**4 + inverse
        if rho not in reverse:
            slope, added = IDENTITY, 0 * IDENTITY
            for sigma, lower in pairwise(karras_levels(pnp.steps, rho, min(rho, prior.contract.sigma_min))):
                # The ancestral step: x' given x and x0 = D, for p(x' | x0) of level lower.
                share = (lower / sigma) ** 2
                step = share * IDENTITY + (1 - share) * C @ torch.linalg.inv(C + sigma**2 * IDENTITY)
                slope = step @ slope
                added = step @ added @ step.mH + lower**2 * (1 - share) * IDENTITY
            reverse[rho] = slope, added
        slope, added = reverse[rho]
        mean, covariance = m + slope @ (mean - m), slope @ covariance @ slope.mH + added
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.4),
        ({"steps": 1, "rho_max": 3.0}, 0.8),
        ({"steps": 4, "start": "noise", "rho_min": 0.3, "decay": 0.5}, 0.4),
        ({"nfe": 9, "steps": 2, "start": "noise", "decay": 1.0}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    pnp, given, prior = solver(**settings), problem(share), gaussian_prior()
    found = moments(pnp, given, prior)
    torch.testing.assert_close(found, moments_by_recursion(pnp, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-4


def test_chains_of_one_coupling_go_to_the_posterior_under_more_noise():
    given = problem(0.7, noise_std=0.3)
    # A prior that knows small levels, as the last level of a prior step is taken for none.
    prior = gaussian_prior(1e-3)
    rho = 0.5
    mean, covariance = posterior(given, prior, rho)
    errors = []
    for steps in (50, 100, 200):
        pnp = solver(nfe=60 * steps, steps=steps, rho_max=rho, decay=1.0)
        found_mean, found = moments_by_recursion(pnp, given, prior)
        errors.append(float((found - covariance).norm() / covariance.norm()))
        assert float((found_mean - mean).norm() / mean.norm()) < 2 / steps
    # Of first order in the steps of the reverse diffusion.
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3
    assert errors[-1] < 0.04
    # And that is not the posterior itself.
    assert float((covariance - posterior(given, prior)[1]).norm() / covariance.norm()) > 0.1


def test_chains_of_a_falling_coupling_come_near_the_posterior():
    given = problem(0.7, noise_std=0.3)
    prior = gaussian_prior(1e-3)
    mean, covariance = posterior(given, prior)
    errors = []
    for turns in (30, 120):
        pnp = solver(nfe=turns * 60, steps=60, rho_max=2.0, rho_min=0.1, start="noise")
        found_mean, found = moments_by_recursion(pnp, given, prior)
        errors.append(float((found_mean - mean).norm() / mean.norm()))
        errors.append(float((found - covariance).norm() / covariance.norm()))
    assert errors[-2] < 0.07
    assert errors[-1] < 0.08
    assert errors[2] < 0.75 * errors[0]
    assert errors[3] < 0.75 * errors[1]


# What a run does, costs and reports


def test_couplings():
    prior = Counting()
    assert solver(nfe=6, steps=2, rho_max=1.0, rho_min=0.01).rhos(prior, 0.5) == pytest.approx([1, 0.1, 0.01])
    assert solver(nfe=6, steps=2, decay=0.5, rho_min=0.3).rhos(prior, 0.5) == pytest.approx([1, 0.5, 0.3])
    assert solver(nfe=6, steps=2).rhos(prior, 0.01)[-1] == pytest.approx(0.01)
    assert solver(nfe=6, steps=2).rhos(prior, 1e-9)[-1] == pytest.approx(prior.contract.sigma_min)
    assert solver(nfe=6, steps=2).rhos(prior, 7.0) == [1.0, 1.0, 1.0]
    assert solver(nfe=2, steps=2).rhos(prior, 0.01) == [1.0]
    narrow = Counting(contract=Contract(sigma_max=0.5))
    assert solver(nfe=6, steps=2, rho_min=0.005).rhos(narrow, 0.1) == pytest.approx([0.5, 0.05, 0.005])
    with pytest.raises(SolverError, match=r"rho_min 0.7 is above the prior's largest noise level, 0.5"):
        solver(rho_min=0.7).rhos(narrow, 0.1)


def test_published_setting():
    paper = PnPDM.paper()
    assert (paper.nfe, paper.steps, paper.rho_max, paper.rho_min, paper.decay) == (10000, 100, 10.0, 0.3, 0.9)
    assert PnPDM.paper(rho_min=0.1).rho_min == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"nfe": 4, "steps": 5}, "nfe must be at least 5, got 4"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"rho_max": 0.0}, "rho_max must be positive, got 0.0"),
        ({"rho_min": math.nan}, "rho_min must be positive, got nan"),
        ({"rho_min": 2.0}, "rho_min 2.0 is above rho_max 1.0"),
        ({"decay": 1.1}, r"decay must lie in \(0, 1\], got 1.1"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"PnPDM: {message}"):
        PnPDM(**settings)
