"""AdaDiff: the rapid phase against its map in dense matrices, the adaptation where it has a closed form."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from operators import SinglecoilMRI
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, ScorePrior
from recon.solvers.adadiff import AdaDiff
from recon.solvers.base import Problem, SolverError
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    normalised_coils_problem,
    randn,
    random_mask,
)

SHAPE, N = (5, 4), 20

mask = partial(random_mask, SHAPE)
gaussian_prior = partial(helper.gaussian_prior, SHAPE, sigma_min=0.02)
problem = partial(normalised_coils_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    normal, right = A.mH @ A, A.mH @ given.y.flatten()
    m, C = prior.mean.flatten(), covariance_of(prior)
    sigmas = solver.sigmas(prior, given.noise_std)
    mean = given.unfolded.flatten() if solver.start == "warm" else right
    covariance = sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        W = C @ torch.linalg.inv(C + sigma**2 * identity)
        # v of a Gaussian prior: the mean over pixels of its posterior variance.
        v = float((sigma**2 * W).diagonal().real.mean())
        ratio = given.noise_std**2 / v if solver.weighted else 0.0
        # Data consistency as the map x0 = P d + c of the denoised image d.
        P, c = identity, 0 * m
        for _ in range(solver.projections):
            P, c = (
                P + (ratio * (identity - P) - normal @ P) / (1 + ratio),
                c + (right - normal @ c - ratio * c) / (1 + ratio),
            )
        kept = lower**2 / sigma**2
        slope = kept * identity + (1 - kept) * P @ W
        mean = slope @ mean + (1 - kept) * (P @ (identity - W) @ m + c)
        covariance = slope @ covariance @ slope.mH + lower**2 * (1 - kept) * identity
    return mean, covariance


@pytest.mark.parametrize("noise_std", [0.2, 0.0])
@pytest.mark.parametrize(
    "settings", [{}, {"weighted": False, "start": "zero-filled"}, {"projections": 1, "sigma_min": 0.3}]
)
def test_rapid_phase_is_equal_to_the_dense_recursion(noise_std, settings):
    solver = AdaDiff(**{"levels": 5, "projections": 4, **settings})
    given, prior = problem(noise_std), gaussian_prior()
    found = moments_of_the_code(solver, given, prior, solver.levels + 1)
    torch.testing.assert_close(found, moments_by_recursion(solver, given, prior), rtol=1e-9, atol=1e-9)


def test_weighted_projections_end_at_the_proximal_point():
    """Many of them minimise ``|x - D|^2 / (2 v) + |y - A x|^2 / (2 s^2)``; with one coil, so does one."""
    prior, noise_std, sigma = gaussian_prior(), 0.3, 0.4
    single = Problem(mask() * randn(*SHAPE, seed=5), SinglecoilMRI(mask()).to(C128), noise_std)
    for given, projections in ((problem(noise_std), 400), (single, 1)):
        solver = AdaDiff(levels=1, projections=projections, sigma_max=sigma)
        x = solver.sample(given, prior, keyed()).samples[0].flatten()
        D = prior.denoise(given.unfolded + sigma * keyed()(0), sigma)[0].flatten()
        A, v = dense(given.operator, SHAPE), prior.error_variance(sigma)
        expected = torch.linalg.solve(
            torch.eye(N) / v + A.mH @ A / noise_std**2, D / v + A.mH @ given.y.flatten() / noise_std**2
        )
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_unweighted_and_single_coil_meets_the_data():
    given = Problem(mask() * randn(*SHAPE, seed=5), SinglecoilMRI(mask()).to(C128), 0.3)
    x = AdaDiff(levels=4, projections=1, weighted=False).sample(given, gaussian_prior(), keyed()).samples
    torch.testing.assert_close(given.operator(x)[0], given.y)


# Adaptation


class Gain(ScorePrior):
    """A prior with one weight: ``D(x) = gain x``; it may fail at a given evaluation."""

    def __init__(self, fail_at=None):
        super().__init__(Contract(sigma_min=0.01))
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=False)
        self.other = nn.Parameter(torch.ones(3), requires_grad=False)
        self.calls, self.fail_at = 0, fail_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise RuntimeError("out of memory")
        return self.gain * x


def rapid_images(given, items):
    """What the adaptation starts from: one level, so ``(1 - 0) D`` made consistent."""
    solver = AdaDiff(levels=1, weighted=False, projections=2)
    return solver.sample(given, Gain(), keyed(items)).samples


def test_adaptation_finds_the_weights_that_fit_each_sample():
    """With one weight the least-squares gain is known; every sample has its own."""
    given = problem(0.05)
    rapid = rapid_images(given, (0, 1))
    adapting = AdaDiff(levels=1, weighted=False, projections=2, adaptation_steps=300, learning_rate=2e-3)
    prior = Gain()
    samples = adapting.sample(given, prior, keyed((0, 1))).samples
    assert float(prior.gain.detach()) == 0.7
    gains = []
    for x, adapted in zip(rapid, samples, strict=True):
        Ax = given.operator(x)
        gains.append(float((Ax.conj() * given.y).sum().real / Ax.abs().square().sum()))
        image = gains[-1] * x
        for _ in range(2):
            image = image + given.adjoint_y - given.operator.normal(image)
        # Adam goes on swinging by about its learning rate.
        torch.testing.assert_close(adapted, image, rtol=0, atol=3e-3)
    assert abs(gains[0] - gains[1]) > 1e-2
    assert abs(gains[0] - 0.7) > 0.05


def test_first_step_of_the_adaptation():
    """Adam's first step has the size of the learning rate, downhill: ``d/dgain |y - gain A x|^2``."""
    given = problem(0.05)
    rapid = rapid_images(given, (0,))
    Ax = given.operator(rapid[0])
    slope = float((2 * (0.7 * Ax - given.y).conj() * Ax).sum().real)
    one = AdaDiff(levels=1, weighted=False, projections=2, adaptation_steps=1, learning_rate=0.01)
    image = (0.7 - math.copysign(0.01, slope)) * rapid[0]
    for _ in range(2):
        image = image + given.adjoint_y - given.operator.normal(image)
    samples = one.sample(given, Gain(), keyed()).samples
    torch.testing.assert_close(samples[0], image, rtol=1e-6, atol=1e-6)


def tiny_network():
    torch.manual_seed(0)
    network = DenoisingUNet(NetworkSettings(widths=(4,), unshuffle=1, embedding=4))
    nn.init.normal_(network.head.weight, std=0.1)
    return NetworkPrior(network, Contract(sigma_min=0.01)).requires_grad_(False)


def adapting_problem():
    A = problem(0.05).operator.to(torch.complex64)
    return Problem(A(randn(*SHAPE, seed=7, dtype=torch.complex64)), A, 0.05)


@torch.no_grad()
def test_a_network_adapts_and_is_restored():
    """Under ``no_grad``, as reconstructions run; every sample starts from the same weights."""
    prior, given = tiny_network(), adapting_problem()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    plain = AdaDiff(levels=3, projections=1, sigma_max=0.5)
    adapting = replace(plain, adaptation_steps=30, learning_rate=3e-3)
    noise = keyed((0, 1), dtype=torch.complex64)
    both = adapting.sample(given, prior, noise).samples
    for name, value in prior.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(not weight.requires_grad and weight.grad is None for weight in prior.parameters())
    alone = adapting.sample(given, prior, keyed((1,), dtype=torch.complex64)).samples
    torch.testing.assert_close(alone[0], both[1])

    def misfit(x):
        return (given.operator(x) - given.y).abs().square().sum((1, 2, 3))

    assert bool((misfit(both) < 0.8 * misfit(plain.sample(given, prior, noise).samples)).all())


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_weights_are_restored_after_a_failure(fail_at):
    """In the rapid phase nothing has changed yet; in the adaptation and at its end everything has."""
    prior = Gain(fail_at)
    prior.gain.requires_grad_(True)
    solver = AdaDiff(levels=2, adaptation_steps=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        solver.sample(problem(), prior, keyed())
    assert float(prior.gain.detach()) == 0.7
    assert prior.gain.grad is None
    assert prior.gain.requires_grad
    assert not prior.other.requires_grad


def test_a_prior_without_weights_is_refused_for_adaptation_only():
    AdaDiff(levels=1).sample(problem(), gaussian_prior(), keyed())
    with pytest.raises(SolverError, match="AdaDiff adapts the weights of a prior, and 'gaussian' has none"):
        AdaDiff(levels=1, adaptation_steps=1).sample(problem(), gaussian_prior(), keyed())
    opaque = Gain()
    opaque.differentiable = False
    AdaDiff(levels=1).sample(problem(), opaque, keyed())
    with pytest.raises(SolverError, match="has none that can be differentiated: set adaptation_steps to 0"):
        AdaDiff(levels=1, adaptation_steps=1).sample(problem(), opaque, keyed())


# What a run costs and reports


def test_network_evaluations_and_progress_with_adaptation():
    gain, reports = Gain(), []
    solver = AdaDiff(levels=4, adaptation_steps=3)
    solution = solver.sample(problem(), gain, keyed((0, 1)), lambda *report: reports.append(report))
    # Four evaluations of the batch, then three and a last one for each of two samples.
    assert gain.calls == 4 + 2 * 4
    assert solution.nfe == solver.nfe == 8
    assert reports == [(k + 1, 10) for k in range(10)]


def test_a_diverging_adaptation_names_the_step():
    diverging = AdaDiff(levels=2, adaptation_steps=5, learning_rate=1e200)
    with pytest.raises(SolverError, match=r"AdaDiff produced values that are not finite at step [3-6]"):
        diverging.sample(problem(), Gain(), keyed())


def test_levels_and_published_setting():
    prior = Counting()  # 0.002 to 20
    assert AdaDiff(levels=2).sigmas(prior, 0.05) == [pytest.approx(0.6), pytest.approx(0.05), 0.0]
    assert AdaDiff(levels=2, sigma_max=99.0, sigma_min=0.1).sigmas(prior, 0.0)[:2] == pytest.approx([20, 0.1])
    paper = AdaDiff.paper()
    assert (paper.levels, paper.projections, paper.adaptation_steps) == (8, 1, 1000)
    assert (paper.learning_rate, paper.start, paper.weighted) == (1e-3, "zero-filled", False)
    assert paper.sigmas(prior, 0.05)[0] == pytest.approx(20)
    assert AdaDiff.paper(adaptation_steps=0).nfe == 8


def test_norms_up_to_the_root_of_two():
    solver = AdaDiff(levels=2, projections=500, weighted=False)
    x = solver.sample(problem(norm=1.414), gaussian_prior(), keyed()).samples
    assert float(x.abs().max()) < 100
    with pytest.raises(SolverError, match=r"AdaDiff is stable up to an operator norm of 1.414"):
        AdaDiff().sample(problem(norm=1.6), gaussian_prior(), keyed())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"projections": 0}, "projections must be at least 1, got 0"),
        ({"adaptation_steps": -1}, "adaptation_steps must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"sigma_max": math.nan}, "sigma_max must be positive, got nan"),
        ({"start": "cold"}, "start is one of warm, zero-filled, not 'cold'"),
        ({"sigma_min": -0.1}, "sigma_min must be positive, got -0.1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"AdaDiff: {message}"):
        AdaDiff(**settings)
