"""Priors of two planes in turn, against the same worked out with dense matrices."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from priors import Contract
from recon.solvers.base import SolverError
from recon.solvers.perpendicular import Perpendicular, PerpendicularPriors
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    samples_of,
    volume_problem,
)

D, H, W = VOLUME = (2, 3, 4)
N = D * H * W

problem = partial(volume_problem, D, (H, W))
in_plane = helper.gaussian_prior((H, W))


def across_prior(plane):
    prior = helper.gaussian_prior((D, W if plane == "coronal" else H))
    return type(prior)(0.5 * prior.mean, covariance=0.7 * covariance_of(prior), sigma_min=0.1)


def of_volume(prior, plane):
    """Mean and covariance of volumes whose slices along a plane a prior knows, in the order (D, H, W)."""
    rest = {"axial": 0, "coronal": 1, "sagittal": 2}[plane]
    planes = [axis for axis in range(3) if axis != rest]
    index = torch.arange(N).reshape(VOLUME).permute(rest, *planes).reshape(VOLUME[rest], -1)
    mean, covariance = torch.zeros(N, dtype=C128), torch.zeros(N, N, dtype=C128)
    for pixels in index:
        mean[pixels] = prior.mean.flatten()
        covariance[pixels[:, None], pixels] = covariance_of(prior)
    return mean, covariance


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
@pytest.mark.parametrize("period", [2, 3])
def test_equal_to_the_dense_recursion(plane, period):
    solver = Perpendicular(
        nfe=6, cg_iterations=400, cg_tolerance=0.0, sigma_max=3.0, start="noise", plane=plane, period=period
    )
    given, across = problem(), across_prior(plane)
    priors = PerpendicularPriors(in_plane, across)
    A, identity = dense(given.operator, VOLUME).to(C128), torch.eye(N, dtype=C128)
    normal, right = A.mH @ A, A.mH @ given.y.flatten()
    sigmas = solver.levels(priors, given.noise_std)
    mean, covariance = torch.zeros(N, dtype=C128), sigmas[0] ** 2 * identity
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        turn = (index + 1) % period == 0
        m, C = of_volume(across, plane) if turn else of_volume(in_plane, "axial")
        shrink = C @ torch.linalg.inv(C + sigma**2 * identity)
        P = torch.linalg.inv(identity + (sigma / given.noise_std) ** 2 * normal)
        drawn = float((sigma**2 * shrink).diagonal().real.mean())
        offset = P @ (m - shrink @ m + (sigma / given.noise_std) ** 2 * right)
        mean = P @ shrink @ mean + offset
        slope = P @ shrink
        covariance = slope @ covariance @ slope.mH + drawn * P @ P.mH + lower**2 * identity
    found = moments_of_the_code(solver, given, priors, 2 * solver.nfe + 1)
    torch.testing.assert_close(found, (mean, covariance), rtol=1e-8, atol=1e-8)


def test_one_prior_serves_both_planes():
    cube = volume_problem(3, (3, 3))
    prior = helper.gaussian_prior((3, 3))
    noise = keyed_noise((3, 3, 3))
    one = samples_of(Perpendicular(nfe=4), cube, prior, noise)
    both = samples_of(Perpendicular(nfe=4), cube, PerpendicularPriors(prior, prior), noise)
    assert torch.equal(one, both)


def test_turns_and_evaluations():
    first, second = Counting(), Counting()
    solver = Perpendicular(nfe=7, period=3)
    solution = solver.sample(problem(), PerpendicularPriors(first, second), keyed_noise(VOLUME))
    assert (first.calls, second.calls) == (5, 2)
    assert solution.nfe == 7


def test_priors_that_do_not_go_together():
    real = Counting(contract=Contract(channels="real"))
    with pytest.raises(
        SolverError, match="the two priors know different images: complex in the unit 'level'"
    ):
        PerpendicularPriors(Counting(), real)
    low, high = (
        Counting(contract=replace(Contract(), sigma_min=a, sigma_max=b)) for a, b in ((0.01, 0.1), (0.2, 1.0))
    )
    with pytest.raises(SolverError, match=r"no noise level in common: 0.01 to 0.1 in plane, 0.2 to 1 across"):
        PerpendicularPriors(low, high)
    joint = PerpendicularPriors(low, Counting()).contract
    assert (joint.sigma_min, joint.sigma_max) == (0.01, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plane": "axial"}, "plane is one of coronal, sagittal, not 'axial'"),
        ({"period": 1}, "period must be at least 2, got 1"),
        ({"slice_batch": math.nan}, "slice_batch must be at least 1, got nan"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"Perpendicular: {message}"):
        Perpendicular(**settings)
