"""Slices given their neighbours: against dense matrices, closed forms, and slice by slice."""

import math
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from operators import MulticoilMRI, SliceStack, ThroughPlaneAverage, Weighting
from recon import DDS, AdjacentSlices
from recon.solvers.adjacent_slices import DIFFERENCE
from recon.solvers.base import Problem, SolverError
from recon.solvers.dds_3d import through_plane
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    BasisNoise,
    Counting,
    alike_slices_problem,
    covariance_of,
    keyed_noise,
    randn,
    random_mask,
    samples_of,
    volume_problem,
)

SLICES, SHAPE, N = 3, (3, 2), 6
VOLUME = (SLICES, *SHAPE)

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(volume_problem, SLICES, SHAPE)


def solver(**settings):
    exact = {"cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, "start": "noise"}
    return AdjacentSlices(**{"nfe": 6, **exact, **settings})


class VolumeNoise(BasisNoise):
    """A unit of noise at a time, of every slice in every sweep."""

    def __init__(self, parts, steps):
        super().__init__(SHAPE, len(parts) * steps)
        self.parts = parts

    def part(self, name, shape):
        assert shape == SHAPE
        first = self.parts.index(name) * self.steps // len(self.parts)
        self.parts[self.parts.index(name)] = ""  # no part of it twice
        return lambda step: self(first + step)


def moments(given, prior, *, sweeps=1, **settings):
    dds = solver(sweeps=sweeps, **settings)
    parts = [f"{sweep}/{index}" for sweep in range(sweeps) for index in range(SLICES)]
    samples = samples_of(dds, given, prior, VolumeNoise(parts, 2 * dds.nfe + 1)).flatten(1)
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


@pytest.mark.parametrize("settings", [{}, {"cg_iterations": 3}, {"start": "warm"}, {"noise_free": True}])
def test_without_coupling_it_is_dds_slice_by_slice(settings):
    given, prior, noise = problem(), gaussian_prior(), keyed_noise(VOLUME, (0, 1))
    apart = solver(difference=math.inf, **settings)
    together = samples_of(apart, given, prior, noise)
    dds = DDS(**{item.name: getattr(apart, item.name) for item in fields(DDS)})
    for k in range(SLICES):
        alone = samples_of(dds, given.of_slice(k), prior, noise.part(f"0/{k}", SHAPE))
        assert torch.equal(together[:, k], alone)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_equal_to_the_dense_recursion(sweeps):
    """Every level of every slice is affine in the neighbours and in the noise."""
    b, given, prior = 0.4, problem(), gaussian_prior()
    dds = solver(tail=math.inf, difference=b, sweeps=sweeps)
    A = dense(given.of_slice(0).operator, SHAPE).to(C128)
    identity, C, m = torch.eye(N, dtype=C128), covariance_of(prior), prior.mean.flatten()
    sigmas = dds.levels(prior, given.noise_std)
    mean = torch.zeros(SLICES * N, dtype=C128)
    # Columns are units of noise; a slice that is drawn anew forgets its own.
    gains = [torch.zeros(N, 0, dtype=C128) for _ in range(SLICES)]
    for sweep in range(sweeps):
        for k in range(SLICES) if sweep == 0 else reversed(range(SLICES)):
            near = [j for j in (k - 1, k + 1) if 0 <= j < SLICES and (sweep > 0 or j < k)]
            x, gain = 0 * m, [sigmas[0] * identity]
            follow = torch.zeros(N, N, dtype=C128)  # of the sum of the neighbours
            for sigma, lower in pairwise(sigmas):
                W = C @ torch.linalg.inv(C + sigma**2 * identity)
                # The error of the denoised image, against which the neighbours are weighed.
                v = float((sigma**2 * W).diagonal().real.mean())
                precision = sigma**2 * A.mH @ A / given.noise_std**2 + len(near) * v / b**2 * identity
                P = torch.linalg.inv(identity + precision)
                drawn = math.sqrt(v)
                pull = sigma**2 * A.mH @ given.y[k].flatten() / given.noise_std**2
                x = P @ (W @ x + m - W @ m + pull)
                follow = P @ (W @ follow + v / b**2 * identity)
                gain = [*(P @ W @ g for g in gain), drawn * P, lower * identity]
            neighbours = [mean[j * N : (j + 1) * N] for j in near]
            mean[k * N : (k + 1) * N] = x + follow @ sum(neighbours, 0 * m)
            fresh = torch.cat(gain, 1)
            width = gains[0].shape[1]
            others = follow @ sum((gains[j] for j in near), torch.zeros(N, width, dtype=C128))
            gains = [torch.cat([g, torch.zeros(N, fresh.shape[1], dtype=C128)], 1) for g in gains]
            gains[k] = torch.cat([others, fresh], 1)
    root = torch.cat(gains)
    found = moments(given, prior, sweeps=sweeps, tail=math.inf, difference=b)
    torch.testing.assert_close(found, (mean, root @ root.mH), rtol=1e-6, atol=1e-6)


def exact_slice(given, prior, k, b, neighbours):
    """Slope in the sum of the neighbours, offset and covariance of ``p(x_k | y_k, neighbours)``."""
    A, C = dense(given.of_slice(k).operator, SHAPE).to(C128), covariance_of(prior)
    inverse = torch.linalg.inv(C)
    precision = inverse + A.mH @ A / given.noise_std**2 + neighbours / b**2 * torch.eye(N, dtype=C128)
    covariance = torch.linalg.inv(precision)
    right = inverse @ prior.mean.flatten() + A.mH @ given.y[k].flatten() / given.noise_std**2
    return covariance / b**2, covariance @ right, covariance


def deviations(found, mean, covariance):
    """Error of the mean in standard deviations, root mean square, and share of the variance."""
    variance = covariance.diagonal().real
    return (
        float(((found[0] - mean).abs().square() / (2 * variance)).mean().sqrt()),
        float((found[1].diagonal().real / variance).mean()),
    )


def conditioned_prior():
    """A prior whose covariance is far from singular."""
    prior = gaussian_prior()
    C = covariance_of(prior) + 0.3 * torch.eye(N, dtype=C128)
    return type(prior)(prior.mean, covariance=C, sigma_min=0.02)


def test_near_the_closed_form_of_an_autoregressive_volume():
    """One sweep, where a slice given the one before has a closed form, as of an autoregression along z."""
    b, given, prior = 0.4, problem(share=0.4, noise_std=0.4), conditioned_prior()
    mean: list[torch.Tensor] = []
    gains: list[list[torch.Tensor]] = []
    for k in range(SLICES):
        slope, offset, covariance = exact_slice(given, prior, k, b, min(k, 1))
        root = torch.linalg.cholesky(covariance)
        mean.append(offset + (slope @ mean[-1] if k else 0))
        earlier = [slope @ g for g in gains[-1]] if k else []
        gains.append([*earlier, root])
    exact = torch.cat(mean), torch.zeros(SLICES * N, SLICES * N, dtype=C128)
    for i in range(SLICES):
        for j in range(SLICES):
            shared = zip(gains[i], gains[j], strict=False)
            exact[1][i * N : (i + 1) * N, j * N : (j + 1) * N] = sum(g @ h.mH for g, h in shared)
    fine = {"nfe": 15, "sigma_min": 0.05}
    error, share = deviations(moments(given, prior, tail=math.inf, difference=b, **fine), *exact)
    assert error < 0.3
    assert 0.6 < share < 1.05
    apart, _ = deviations(moments(given, prior, difference=math.inf, **fine), *exact)
    assert apart > 2 * error


def test_sweeps_lead_to_the_posterior_of_the_whole_volume():
    b, given, prior = 0.4, problem(share=0.4, noise_std=0.4), conditioned_prior()
    A, C = dense(given.operator, VOLUME).to(C128), covariance_of(prior)
    D = dense_differences()
    inverse = torch.kron(torch.eye(SLICES, dtype=C128), torch.linalg.inv(C).contiguous())
    covariance = torch.linalg.inv(inverse + A.mH @ A / given.noise_std**2 + D.mT @ D / b**2)
    right = inverse @ prior.mean.flatten().repeat(SLICES) + A.mH @ given.y.flatten() / given.noise_std**2
    errors = [
        deviations(
            moments(given, prior, sweeps=sweeps, nfe=8, sigma_min=0.05, tail=math.inf, difference=b),
            covariance @ right,
            covariance,
        )[0]
        for sweeps in (1, 3)
    ]
    assert errors[1] < 0.3
    assert errors[1] < 0.7 * errors[0]


def dense_differences():
    index = torch.eye(SLICES * N, dtype=C128).reshape(-1, SLICES, *SHAPE)
    return through_plane(index).flatten(1).mT


def test_each_sample_follows_its_own_neighbour():
    """Where neighbours are held together, samples of two slices vary together."""
    given, prior, noise = problem(share=0.2), gaussian_prior(), keyed_noise(VOLUME, range(40))
    for difference, low, high in ((0.02, 0.9, 1.0), (math.inf, -0.3, 0.3)):
        x = samples_of(solver(difference=difference, tail=math.inf), given, prior, noise)
        x = (x - x.mean(0)).flatten(2)
        correlation = float(torch.linalg.vecdot(x[:, 0], x[:, 1]).real.sum() / (x[:, :2].norm() ** 2 / 2))
        assert low < correlation < high


def test_it_helps_where_slices_are_alike():
    truth, given, prior = alike_slices_problem(slices=4)
    noise = keyed_noise(tuple(truth.shape), (0, 1))
    error, rough = {}, {}
    for difference in (math.inf, None):
        x = samples_of(AdjacentSlices(nfe=8, difference=difference), given, prior, noise)
        error[difference] = float((x - truth)[:, 1:].norm())
        rough[difference] = float(through_plane(x).norm())
    assert error[None] < 0.9 * error[math.inf]
    assert rough[None] < 0.7 * rough[math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, C128])
def test_the_precision_is_that_of_students_distribution(dtype):
    """It is what the slope of the distribution's logarithm is along the difference, over the difference."""
    b, tail = 0.3, 1.7
    components = 2 if dtype.is_complex else 1
    e = torch.linspace(0.01, 2, 50, dtype=torch.float64).requires_grad_()
    log_density = -(tail + components) / 2 * torch.log1p(e.square() / (tail * b**2))
    (slope,) = torch.autograd.grad(log_density.sum(), e)
    found = AdjacentSlices(tail=tail).precision(e.detach().to(dtype), b, components)
    torch.testing.assert_close(found, -slope / e.detach())
    assert AdjacentSlices(tail=math.inf).precision(e.detach(), b, 1)[3] == pytest.approx(1 / b**2)


def test_default_difference():
    given, prior, noise = problem(), gaussian_prior(), keyed_noise(VOLUME)
    asked = DIFFERENCE * prior.contract.level
    one, same = (samples_of(solver(difference=d), given, prior, noise) for d in (None, asked))
    assert torch.equal(one, same)
    assert not torch.equal(samples_of(solver(difference=2 * asked), given, prior, noise), one)


def test_a_volume_does_not_depend_on_its_batch():
    given, prior, dds = problem(), gaussian_prior(), solver(cg_iterations=5, cg_tolerance=1e-2)
    together = samples_of(dds, given, prior, keyed_noise(VOLUME, range(3)))
    for k in range(3):
        torch.testing.assert_close(samples_of(dds, given, prior, keyed_noise(VOLUME, [k]))[0], together[k])


def test_weighted_data_of_each_slice():
    """Weights of a slice go with it; the operator is one whose parts were wrapped."""
    weights = 0.5 + torch.rand(SLICES, 1, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    stack = SliceStack(MulticoilMRI(randn(2, *SHAPE, seed=4), random_mask(SHAPE, 0.6)), SLICES)
    A = 0.7 * (Weighting(weights, stack.range_shape) @ stack)
    given = Problem(randn(*A.range_shape, seed=5), A, 0.2)
    x = randn(*VOLUME, seed=6)
    for k in range(SLICES):
        torch.testing.assert_close(given.of_slice(k).operator(x[k]), A(x)[k])
        assert torch.equal(given.of_slice(k).y, given.y[k])


def test_evaluations_and_reports():
    given, counting, reports = problem(), Counting(), []
    dds = solver(sweeps=2)
    solution = dds.sample(given, counting, keyed_noise(VOLUME), lambda *report: reports.append(report))
    assert solution.nfe == 12
    assert counting.calls == 12 * SLICES
    assert reports == [(k + 1, 36) for k in range(36)]
    with pytest.raises(SolverError, match=r"slice 1: AdjacentSlices produced values .* at step 2:"):
        samples_of(solver(), given, Counting(nan_at=8), keyed_noise(VOLUME))


def test_slices_that_the_data_mix_are_refused():
    A = ThroughPlaneAverage((4, *SHAPE), 2).to(C128)
    given = Problem(randn(*A.range_shape), A, 0.2)
    with pytest.raises(
        SolverError, match="needs slices measured each on its own: ThroughPlaneAverage has no"
    ):
        samples_of(solver(), given, gaussian_prior(), keyed_noise((4, *SHAPE)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"difference": 0.0}, "difference must be positive, got 0.0"),
        ({"difference": math.nan}, "difference must be positive, got nan"),
        ({"tail": -1.0}, "tail must be positive, got -1.0"),
        ({"sweeps": 0}, "sweeps must be at least 1, got 0"),
        ({"gamma": -1.0}, "gamma must not be negative, got -1.0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"AdjacentSlices: {message}"):
        replace(AdjacentSlices(), **settings)
