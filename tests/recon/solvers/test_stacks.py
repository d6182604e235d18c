"""Priors on stacks of neighbouring slices: every sampler takes them, and slices inform each other."""

from dataclasses import replace

import pytest
import torch

from operators import MulticoilMRI, SliceStack, birdcage_maps
from priors import Contract, GaussianPrior, ScorePrior
from priors.sampling import sample_prior
from recon import reconstruct
from recon.solvers import SOLVERS, make_solver, solver_class
from recon.solvers.base import Problem, SolverError
from recon.solvers.dds import DDS
from recon.solvers.perpendicular import PerpendicularPriors
from recon.truth import MatrixOperator, dense_matrix
from tests.recon.solvers.helper import keyed_noise, posterior, samples_of

SLICES, SHAPE = 3, (8, 6)
NOISE = 0.1


class StackPrior(ScorePrior):
    """Gaussian stacks, exactly: to the prior within they are images of the rows of all slices."""

    def __init__(self, rows):
        super().__init__(Contract(slices=SLICES, level=rows.contract.level, name="stacks"))
        self.rows = rows

    def denoise_channels(self, x, sigma):
        assert x.shape[1:] == (2 * SLICES, *SHAPE)
        x = x.unflatten(1, (SLICES, 2)).transpose(1, 2).flatten(2, 3)
        out = self.rows.denoise_channels(x, sigma).unflatten(2, (SLICES, -1))
        return out.transpose(1, 2).flatten(1, 2)

    def error_variance(self, sigma):
        return self.rows.error_variance(sigma)


def alike_slices(dtype=torch.complex64):
    """Slices of white pixels, each correlated with the same pixel of the other slices."""
    pixels = SHAPE[0] * SHAPE[1]
    across = 0.1 * (0.9 + 0.1 * torch.eye(SLICES, dtype=dtype))
    covariance = torch.kron(across, torch.eye(pixels, dtype=dtype))
    mean = 0.5 * torch.ones(SLICES * SHAPE[0], SHAPE[1], dtype=dtype)
    return StackPrior(GaussianPrior(mean, covariance=covariance))


def scan(prior):
    """Every slice undersampled in the same way."""
    maps = birdcage_maps(2, SHAPE).to(prior.rows.mean.dtype)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[3:5, 2:4] = True
    operator = SliceStack(MulticoilMRI(maps / maps.abs().square().sum(0).sqrt(), mask), SLICES)
    drawn = prior.rows.sample(1, torch.Generator().manual_seed(1))[0]
    y = operator(drawn.unflatten(0, (SLICES, -1)))
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    return Problem(y + 2**0.5 * NOISE * noise * (y != 0), operator, NOISE)


@pytest.fixture(scope="module")
def problem():
    return scan(alike_slices())


SAMPLERS = [name for name in SOLVERS if solver_class(name).needs.prior]
OF_SLICES = [name for name in SAMPLERS if solver_class(name).needs.volume]
# These need what a stack of coils' data or a prior without weights has not, whatever the prior.
OTHERWISE_REFUSED = [name for name in SAMPLERS if solver_class(name).needs.projection] + ["adadiff"]


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in (*OF_SLICES, *OTHERWISE_REFUSED)])
def test_samplers_take_stacks(problem, name):
    result = reconstruct(
        problem.y, problem.operator, alike_slices(), make_solver(name), num_samples=2, noise_std=NOISE
    )
    assert result.mean.shape == (SLICES, *SHAPE)
    assert bool(torch.isfinite(result.mean.abs()).all())
    assert float(result.std.min()) > 0
    assert result.residual < 2 * NOISE


def test_the_posterior_of_a_stack():
    prior = alike_slices(torch.complex128)
    problem = scan(prior)
    mean, covariance = posterior(problem, prior.rows)
    variance = covariance.diagonal().real
    noise = keyed_noise(problem.operator.domain_shape, range(300), problem.y.dtype)
    with torch.no_grad():
        samples = samples_of(DDS(nfe=20), problem, prior, noise).flatten(1)
    # Without what the slices know of each other it would be another one.
    mean_image = prior.rows.mean
    unrelated = 0.1 * torch.eye(mean_image.numel(), dtype=mean_image.dtype)
    other, wide = posterior(problem, GaussianPrior(mean_image, covariance=unrelated))

    def distance(centre):
        return float(((samples.mean(0) - centre).abs().square() / (2 * variance)).mean().sqrt())

    # DDS draws the error of a denoised image as white noise, and here it is the same in all slices.
    assert distance(mean) < 0.25
    assert distance(other) > 2.5 * distance(mean)
    assert float(samples.var(0).mean() / 2) < 0.8 * float(wide.diagonal().real.mean())
    # One image of all the rows is the same problem, but for the accuracy of conjugate gradients.
    matrix = dense_matrix(problem.operator, problem.y.dtype)
    flat = MatrixOperator(matrix, mean_image.shape, problem.operator.range_shape)
    noise = keyed_noise(mean_image.shape, range(300), problem.y.dtype)
    with torch.no_grad():
        rows = samples_of(DDS(nfe=20), replace(problem, operator=flat), prior.rows, noise).flatten(1)
    torch.testing.assert_close(samples, rows, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", OF_SLICES)
def test_samplers_that_go_slice_by_slice_refuse(problem, name):
    with pytest.raises(SolverError, match="slice by slice, and prior 'stacks' knows stacks of 3 slices only"):
        reconstruct(problem.y, problem.operator, alike_slices(), make_solver(name), noise_std=NOISE)


@pytest.mark.parametrize("micro_batch", [1, SLICES])
def test_images_that_are_no_stacks_are_refused(problem, micro_batch):
    # Of single images, three samples at once have the shape of a stack.
    operator = problem.operator.of_slice(0)
    with pytest.raises(SolverError, match=r"knows stacks of slices \(3, H, W\), and .* have shape \(8, 6\)"):
        reconstruct(problem.y[0], operator, alike_slices(), DDS(), noise_std=NOISE, micro_batch=micro_batch)
    operator = SliceStack(operator, 2)
    with pytest.raises(SolverError, match=r"have shape \(2, 8, 6\)"):
        reconstruct(problem.y[:2], operator, alike_slices(), DDS(), noise_std=NOISE)


def test_perpendicular_priors_are_of_single_slices():
    single = GaussianPrior(torch.zeros(SHAPE, dtype=torch.complex64), variance=0.1)
    with pytest.raises(SolverError, match="single slices, not stacks of 1 and 3"):
        PerpendicularPriors(single, alike_slices())


def test_an_rgb_prior_stands_beside_a_real_one():
    class Shrink(ScorePrior):
        def denoise_channels(self, x, sigma):
            return x / (1 + sigma[:, None, None, None] ** 2)

    both = PerpendicularPriors(Shrink(Contract("rgb")), Shrink(Contract("real")))
    x = torch.ones(2, 3, 4)
    torch.testing.assert_close(both.denoise(x, 1.0), x / 2)
    with pytest.raises(SolverError, match="different images: rgb in the unit 'level' in plane, complex"):
        PerpendicularPriors(Shrink(Contract("rgb")), Shrink(Contract("complex")))


@pytest.mark.parametrize("sampler", ["heun", "predictor-corrector"])
def test_stacks_are_drawn_from_a_prior(sampler):
    drawn = sample_prior(alike_slices(), SHAPE, num=40, sampler=sampler, steps=60, batch=40)
    assert drawn.shape == (40, SLICES, *SHAPE)
    centred = drawn - 0.5
    # Correlation of a pixel with the same one of the next slice, 0.9.
    correlation = (centred[:, 0] * centred[:, 1].conj()).real.mean() / centred.abs().square().mean()
    assert float(correlation) == pytest.approx(0.9, abs=0.05)
