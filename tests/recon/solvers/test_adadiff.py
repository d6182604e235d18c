"""AdaDiff: the rapid phase against its map in dense matrices, the adaptation where it has a closed form."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from operators import CoilwiseMRI, MulticoilMRI, SinglecoilMRI
from priors import Contract, DenoisingUNet, GaussianPrior, NetworkPrior, NetworkSettings, ScorePrior
from recon.solvers.adadiff import AdaDiff
from recon.solvers.base import KeyedNoise, Problem, SolverError
from tests.operators.helper import dense

SHAPE, N = (5, 4), 20
C128 = torch.complex128


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5


def gaussian_prior():
    root = randn(N, N, seed=1) / math.sqrt(N)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=0.02)


def problem(noise_std=0.2, norm=1.0):
    maps = randn(3, *SHAPE, seed=4)
    A = MulticoilMRI(norm * maps / maps.abs().square().sum(0).sqrt(), mask())
    return Problem(mask() * randn(3, *SHAPE, seed=5), A, noise_std)


def keyed(items=(0,), shape=SHAPE, dtype=C128):
    return KeyedNoise(0, "", items, shape, dtype, torch.device("cpu"))


class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit vector each, at one step each."""

    def __init__(self, steps):
        self.items = 1 + steps * N

    def __call__(self, step):
        noise = torch.zeros(self.items, N, dtype=C128)
        first = 1 + step * N
        noise[first : first + N] = torch.eye(N)
        return noise.reshape(self.items, *SHAPE)


def samples_of(solver, given, prior, noise):
    """Samples from noise of any kind."""
    return solver.sample(given, prior, noise).samples


def moments_of_the_code(solver, given, prior):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    samples = samples_of(solver, given, prior, BasisNoise(solver.levels + 1)).flatten(1)
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    normal, right = A.mH @ A, A.mH @ given.y.flatten()
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
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
    mean, covariance = moments_of_the_code(solver, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(solver, given, prior)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-9, atol=1e-9)


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


def test_coil_images_one_by_one():
    y = mask() * randn(2, *SHAPE, seed=6)
    solver, prior = AdaDiff(levels=4), gaussian_prior()
    noise = keyed((0, 1), (2, *SHAPE))
    both = solver.sample(Problem(y, CoilwiseMRI(2, mask()).to(C128), 0.1), prior, noise).samples
    for coil in range(2):
        single = Problem(y[coil], SinglecoilMRI(mask()).to(C128), 0.1)
        alone = samples_of(solver, single, prior, lambda step, coil=coil: noise(step)[:, coil])
        torch.testing.assert_close(both[:, coil], alone)


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
    given = problem(0.05)
    A = MulticoilMRI(given.operator.maps.to(torch.complex64), mask())
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


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


def test_network_evaluations_and_progress():
    prior, reports = Counting(), []
    solution = AdaDiff(levels=4).sample(problem(), prior, keyed(), lambda *report: reports.append(report))
    assert prior.calls == solution.nfe == 4
    assert reports == [(k + 1, 4) for k in range(4)]
    gain, reports = Gain(), []
    solver = AdaDiff(levels=4, adaptation_steps=3)
    solution = solver.sample(problem(), gain, keyed((0, 1)), lambda *report: reports.append(report))
    # Four evaluations of the batch, then three and a last one for each of two samples.
    assert gain.calls == 4 + 2 * 4
    assert solution.nfe == solver.nfe == 8
    assert reports == [(k + 1, 10) for k in range(10)]


def test_nan_names_the_step():
    with pytest.raises(SolverError, match="AdaDiff produced values that are not finite at step 3"):
        AdaDiff(levels=5).sample(problem(), Counting(nan_at=3), keyed())
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
