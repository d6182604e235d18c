"""DiffPIR with a Gaussian prior, where it is an affine map of its noise, against the paper's equations."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from recon.solvers.base import Problem, SolverError
from recon.solvers.diffpir import DiffPIR
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Matrix,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    multicoil_problem,
    randn,
)

SHAPE, N = (6, 5), 30

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def solver(**settings):
    return DiffPIR(**{"nfe": 6, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings})


def moments_by_recursion(diffpir, given, prior):
    """The paper's Algorithm 1 on the moments, in its own variance-preserving coordinates."""
    A = dense(given.operator, SHAPE).to(C128)
    y, identity = given.y.flatten(), torch.eye(N, dtype=C128)
    m, C = prior.mean.flatten(), covariance_of(prior)
    bars = [1 / (1 + sigma**2) for sigma in diffpir.levels(prior, given.noise_std)]
    start = given.unfolded.flatten() if diffpir.start == "warm" else 0 * m
    mean, covariance = math.sqrt(bars[0]) * start, (1 - bars[0]) * identity
    for bar, lower in pairwise(bars):
        # The denoised image W x / sqrt(bar) + (I - W) m.
        W = C @ torch.linalg.inv(C + (1 - bar) / bar * identity)
        # rho = lam sigma_n^2 / sigma_t^2, and argmin |y - A x|^2 + rho |x - D|^2 = P (A^H y + rho D).
        rho = diffpir.lam * given.noise_std**2 * bar / (1 - bar)
        P = torch.linalg.inv(A.mH @ A + rho * identity)
        estimate = rho * P @ W / math.sqrt(bar)
        offset = P @ (A.mH @ y + rho * (identity - W) @ m)
        # eps = (x - sqrt(bar) x̂) / sqrt(1 - bar)
        keep = math.sqrt(1 - lower) * math.sqrt(1 - diffpir.zeta) / math.sqrt(1 - bar)
        weight = math.sqrt(lower) - keep * math.sqrt(bar)
        slope = weight * estimate + keep * identity
        mean = slope @ mean + weight * offset
        covariance = slope @ covariance @ slope.mH + (1 - lower) * diffpir.zeta * identity
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.8),
        ({"zeta": 0.3}, 0.4),
        ({"zeta": 0.0, "lam": 8.0}, 0.4),
        ({"start": "noise", "zeta": 0.3, "lam": 0.5}, 0.4),
        ({"start": "noise", "schedule": "vp-linear", "zeta": 0.1}, 0.6),
    ],
)
def test_equal_to_the_paper_algorithm(settings, share):
    diffpir, given, prior = solver(**settings), problem(share), gaussian_prior()
    found = moments_of_the_code(diffpir, given, prior, diffpir.nfe + 1)
    torch.testing.assert_close(found, moments_by_recursion(diffpir, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-4


def test_the_published_setting_is_the_paper_algorithm():
    given, prior = problem(), gaussian_prior()
    diffpir = DiffPIR.paper(10)
    found = moments_of_the_code(diffpir, given, prior, diffpir.nfe + 1)
    # Its proximal problems are solved to 1e-6.
    torch.testing.assert_close(found, moments_by_recursion(diffpir, given, prior), rtol=1e-4, atol=1e-4)


def test_real_images():
    f64 = torch.float64
    prior = gaussian_prior(dtype=f64)
    M = randn(20, N, seed=4, dtype=f64) / 5
    given = Problem(randn(20, seed=5, dtype=f64), Matrix(M, SHAPE), 0.2)
    x = solver(nfe=1, start="noise", lam=2.0).sample(given, prior, keyed([0], f64)).samples[0]
    # One step: argmin |y - A x|^2 + rho |x - D|^2 by least squares on the stacked system.
    rho = 2.0 * 0.2**2 / 3.0**2
    denoised = prior.denoise(3.0 * keyed([0], f64)(0)[0], 3.0).flatten()
    stacked = torch.cat([M, math.sqrt(rho) * torch.eye(N, dtype=f64)])
    right = torch.cat([given.y, math.sqrt(rho) * denoised])
    expected = torch.linalg.lstsq(stacked, right[:, None]).solution[:, 0]
    torch.testing.assert_close(x.flatten(), expected, rtol=1e-8, atol=1e-8)


# What a run does, costs and reports


def test_published_setting():
    paper = DiffPIR.paper()
    assert (paper.nfe, paper.lam, paper.zeta, paper.schedule, paper.start) == (
        100,
        1.0,
        0.1,
        "vp-linear",
        "noise",
    )
    assert DiffPIR.paper(20, lam=8.0).lam == 8.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": -0.1}, "cg_tolerance must be at least 0, got -0.1"),
        ({"lam": 0.0}, "lam must be positive, got 0.0"),
        ({"lam": math.nan}, "lam must be positive, got nan"),
        ({"zeta": 1.1}, r"zeta must lie in \[0, 1\], got 1.1"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DiffPIR: {message}"):
        DiffPIR(**settings)
