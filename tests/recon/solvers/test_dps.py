"""DPS with a Gaussian prior against the paper's algorithm worked out densely, in the paper's coordinates."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from operators import SinglecoilMRI
from priors import Contract, GaussianPrior, ScorePrior
from recon.solvers.base import Problem, SolverError
from recon.solvers.dps import DPS
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import C128, Counting, covariance_of, keyed_noise, multicoil_problem, randn

SHAPE, N = (6, 5), 30

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def jacobian(prior, sigma):
    """``dD/dx = C (C + sigma^2)^-1``."""
    C = covariance_of(prior)
    return C @ torch.linalg.inv(C + sigma**2 * torch.eye(N, dtype=C128))


# One step


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("sigma", [0.1, 3.0])
def test_the_gradient_is_that_of_the_norm_of_each_item(sigma, checkpoint):
    given, prior = problem(), gaussian_prior()
    x = randn(4, *SHAPE, seed=6) * torch.tensor([0.0, 0.1, 1.0, 30.0], dtype=torch.float64)[:, None, None]
    denoised, gradient = DPS(checkpoint=checkpoint).guidance(given, prior, x, sigma)
    A, J, m = dense(given.operator, SHAPE).to(C128), jacobian(prior, sigma), prior.mean.flatten()
    for k in range(4):
        D = m + J @ (x[k].flatten() - m)
        r = given.y.flatten() - A @ D
        torch.testing.assert_close(denoised[k].flatten(), D)
        torch.testing.assert_close(gradient[k].flatten(), -J.mH @ A.mH @ r / r.norm())
    assert not denoised.requires_grad
    assert not gradient.requires_grad


def test_the_gradient_of_a_denoiser_that_is_not_linear():
    class Soft(ScorePrior):
        def denoise_channels(self, x, sigma):
            return x * torch.tanh(x / sigma[:, None, None, None])

    given, prior, x = problem(), Soft(Contract()), randn(2, *SHAPE, seed=6)

    def norms(x):
        return (given.y - given.operator(prior.denoise(x, 0.7))).flatten(1).norm(dim=1)

    _, gradient = DPS().guidance(given, prior, x, 0.7)
    for seed in range(4):
        direction, h = randn(2, *SHAPE, seed=10 + seed), 1e-6
        slope = (norms(x + h * direction) - norms(x - h * direction)) / (2 * h)
        along = (gradient.conj() * direction).real.flatten(1).sum(1)
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)


def test_a_misfit_of_zero_guides_nowhere():
    A, prior = problem().operator, gaussian_prior()
    given = Problem(A(prior.mean), A, 0.1)
    _, gradient = DPS().guidance(given, prior, prior.mean[None], 1.0)
    assert float(gradient.abs().max()) < 1e-12


# A run


def paper_algorithm(nfe, noise, given, prior, step):
    """The paper's Algorithm 1 on one image, in its own variance-preserving coordinates.

    ``step(r, B)`` is the guidance for the misfit ``r`` and the Jacobian ``B`` of ``A x̂0`` with respect to the
    scaled image.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    picked = torch.linspace(999, 0, nfe, dtype=torch.float64).round().long()
    bars = [*torch.cumprod(1 - beta, 0)[picked].tolist(), 1.0]
    A, m, y = dense(given.operator, SHAPE).to(C128), prior.mean.flatten(), given.y.flatten()
    # The first image of the code is sigma z, which is sqrt(1 - bar) z here.
    x = math.sqrt(1 - bars[0]) * noise(0)[0].flatten()
    for index, (bar, lower) in enumerate(pairwise(bars)):
        alpha = bar / lower  # of a step of the shortened process
        J = jacobian(prior, math.sqrt((1 - bar) / bar))
        denoised = m + J @ (x / math.sqrt(bar) - m)
        guidance = step(y - A @ denoised, A @ J / math.sqrt(bar))
        x = (math.sqrt(alpha) * (1 - lower) * x + math.sqrt(lower) * (1 - alpha) * denoised) / (1 - bar)
        if lower < 1:
            spread = math.sqrt((1 - lower) / (1 - bar) * (1 - alpha))
            x = x + spread * noise(index + 1)[0].flatten()
        x = x - guidance
    return x.reshape(SHAPE)


@pytest.mark.parametrize("nfe", [300, 40])
def test_the_paper_setting_is_the_paper_algorithm(nfe):
    given, prior = problem(), gaussian_prior()
    # zeta' / ||r|| grad ||r||^2 with zeta' = 1; the gradient of a real function of complex numbers.
    expected = paper_algorithm(nfe, keyed([0]), given, prior, lambda r, B: -2 * B.mH @ r / r.norm())
    result = DPS.paper(nfe).sample(given, prior, keyed([0])).samples[0]
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-7)


def test_the_released_setting_takes_the_norm_without_its_square():
    given, prior = problem(), gaussian_prior()
    expected = paper_algorithm(100, keyed([0]), given, prior, lambda r, B: -0.3 * B.mH @ r / r.norm())
    result = DPS.released(100).sample(given, prior, keyed([0])).samples[0]
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-7)


# Statistics of a run: many independent pixels, where the norm of the misfit is as good as its expectation

TAU, NOISE = 0.5, 0.25


def mean_field(dps, sigmas, zeta, pixels):
    """Slope and variance per real component of ``x = slope y + noise`` after a run on white images.

    With ``A = I`` and many pixels the norm is ``sqrt(2 pixels E r^2)``, a number, and every component follows
    the same affine recursion.
    """
    slope, variance, energy = 0.0, sigmas[0] ** 2, TAU**2 + NOISE**2
    for sigma, lower in pairwise(sigmas):
        w = TAU**2 / (TAU**2 + sigma**2)
        norm = math.sqrt(2 * pixels * ((1 - w * slope) ** 2 * energy + w**2 * variance))
        k = zeta * math.sqrt((1 + sigma**2) * (1 + lower**2)) * w / norm
        keep = w + (lower / sigma) ** 2 * (1 - w) - k * w
        slope = keep * slope + k
        variance = keep**2 * variance + lower**2 * (1 - (lower / sigma) ** 2)
    return slope, variance


@pytest.mark.parametrize("zeta", [0.3, 1.0, 3.0])
def test_the_spread_depends_on_the_step_size_as_it_has_to(zeta):
    shape = (128, 128)
    prior = GaussianPrior(torch.zeros(shape, dtype=C128), variance=TAU**2)
    A = SinglecoilMRI(torch.ones(shape)).to(C128)
    noisy = randn(*shape, seed=8) * math.sqrt(2 * (TAU**2 + NOISE**2))
    dps = DPS(nfe=40, zeta=zeta, start="noise")
    x = dps.sample(Problem(A(noisy), A, NOISE), prior, keyed_noise(shape)).samples[0]
    slope = float((noisy.conj() * x).real.sum() / noisy.abs().square().sum())
    variance = float((x - slope * noisy).abs().square().mean() / 2)
    expected_slope, expected = mean_field(dps, dps.levels(prior, NOISE), zeta, x.numel())
    assert slope == pytest.approx(expected_slope, rel=0.03, abs=0.01)
    assert variance == pytest.approx(expected, rel=0.04)


def test_too_little_guidance_leaves_the_spread_of_the_prior_and_too_much_takes_all_of_it():
    truth, weight = 1 / (1 / TAU**2 + 1 / NOISE**2), TAU**2 / (TAU**2 + NOISE**2)
    prior = GaussianPrior(torch.zeros(1, 1, dtype=C128), variance=TAU**2)
    slopes, ratios = [], []
    for zeta in (0.01, 0.1, 0.3, 2.0):  # the last two are the released and the published step sizes
        dps = DPS.paper(1000, zeta=zeta)
        slope, variance = mean_field(dps, dps.levels(prior, NOISE), zeta, 64 * 64)
        slopes.append(slope / weight)
        ratios.append(variance / truth)
    assert slopes == pytest.approx([0.025, 0.245, 0.704, 1.25], abs=0.01)
    assert ratios == pytest.approx([4.785, 3.613, 1.510, 0.002], abs=0.01)


# What a run does, costs and reports


def test_the_default_step_size_is_the_same_in_all_units():
    given, prior, dps = problem(1.1), gaussian_prior(), DPS(nfe=30)
    size = dps.step_size(given)
    assert size == pytest.approx(6 * float(given.y.norm()) / float(given.norm) / 30)
    # A measurement in other units, with the operator that makes them.
    assert dps.step_size(Problem(7 * given.y, 7 * given.operator, 1.4)) == pytest.approx(size, rel=1e-6)
    assert DPS(nfe=60).step_size(given) == pytest.approx(size / 2)
    assert DPS(zeta=0.4).step_size(given) == 0.4
    # Nothing measured: no step, and no image but the prior's.
    empty = Problem(torch.zeros_like(given.y), 0.0 * given.operator, 0.1)
    assert dps.step_size(empty) == 0.0
    unguided = DPS(nfe=30, zeta=0.0).sample(empty, prior, keyed([0])).samples
    torch.testing.assert_close(dps.sample(empty, prior, keyed([0])).samples, unguided)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_item_does_not_depend_on_its_batch(checkpoint):
    given, prior, dps = problem(), gaussian_prior(), DPS(nfe=8, checkpoint=checkpoint)
    together = dps.sample(given, prior, keyed(range(3))).samples
    for k in range(3):
        torch.testing.assert_close(DPS(nfe=8).sample(given, prior, keyed([k])).samples[0], together[k])


def test_with_checkpoints_the_network_runs_again_for_the_gradient_image_by_image():
    prior = Counting()
    DPS(nfe=3, checkpoint=True).sample(problem(), prior, keyed([0, 1]))
    assert prior.calls == 3 * 2 * 2
    DPS(nfe=3, checkpoint=True).sample(problem(), prior, keyed([0]))
    assert prior.calls == 3 * 2 * 2 + 3


def test_published_settings():
    paper, released = DPS.paper(), DPS.released()
    assert (paper.nfe, paper.zeta, paper.schedule, paper.start) == (1000, 2.0, "vp-linear", "noise")
    assert (released.nfe, released.zeta, released.schedule) == (1000, 0.3, "vp-linear")
    assert DPS.paper(500, zeta=1.0).zeta == DPS.released(500, zeta=1.0).zeta == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"zeta": -1.0}, "zeta must not be negative, got -1.0"),
        ({"travel": math.nan}, "travel must not be negative, got nan"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DPS: {message}"):
        DPS(**settings)
