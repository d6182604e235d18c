"""DiffusionMBIR: against Score-MRI slice by slice, its steps worked out densely, and phantoms."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from operators import SinglecoilMRI, SliceStack
from recon.solvers.base import Problem, SolverError
from recon.solvers.dds_3d import PAPER_LAM, PAPER_RHO, through_plane
from recon.solvers.diffusion_mbir import DiffusionMBIR
from recon.solvers.score_mri import ScoreMRI
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    alike_slices_problem,
    keyed_noise,
    randn,
    random_mask,
    samples_of,
    slicewise_covariance,
    volume_problem,
)

SLICES, SHAPE = 4, (3, 2)
VOLUME, N = (SLICES, *SHAPE), 24

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
keyed = partial(keyed_noise, VOLUME)


def norms(x):
    """Norm of every slice, ``(B, D, 1)``."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


@pytest.mark.parametrize("noise_std", [0.2, 0.0])
@pytest.mark.parametrize(
    "settings", [{"sigma_min": 0.1}, {"start": "noise", "sigma_max": 5.0, "sigma_min": 0.1}]
)
def test_without_total_variation_it_replaces_what_was_measured_as_score_mri_does(noise_std, settings):
    """Where A A^H is a projection, one step of conjugate gradients is x + A^H (y - A x)."""
    mask = random_mask(SHAPE)
    A = SinglecoilMRI(mask).to(C128)
    y = mask * randn(*VOLUME, seed=5)
    prior, noise = gaussian_prior(), keyed((0, 1))
    common = {"steps": 5, "corrector_steps": 0, **settings}
    given = Problem(y, SliceStack(A, SLICES), noise_std)
    together = samples_of(DiffusionMBIR(lam=0.0, **common), given, prior, noise)
    for k in range(SLICES):
        alone = samples_of(
            ScoreMRI(**common), Problem(y[k], A, noise_std), prior, lambda step, k=k: noise(step)[:, k]
        )
        torch.testing.assert_close(together[:, k], alone)


@pytest.mark.parametrize("noise_std", [0.2, 0.0])
def test_equal_to_the_paper_s_steps_worked_out_densely(noise_std):
    lam, rho, prior, noise = 0.1, 0.3, gaussian_prior(), keyed((0, 1, 2))
    given = volume_problem(SLICES, SHAPE, noise_std=noise_std)
    solver = DiffusionMBIR(
        steps=5, corrector_steps=2, cg_iterations=1, lam=lam, coupling=rho, start="noise", sigma_min=0.06
    )
    A, identity = dense(given.operator, VOLUME).to(C128), torch.eye(N, dtype=C128)
    square = torch.linalg.matrix_norm(A, 2) ** 2
    m, C = prior.mean.flatten().repeat(SLICES), slicewise_covariance(prior, SLICES)
    D = torch.kron(torch.eye(SLICES, dtype=C128).diff(dim=0), torch.eye(N // SLICES, dtype=C128))
    draws = iter(noise(k).flatten(1) for k in range(100))
    sigmas = solver.sigmas(prior, noise_std)
    x = sigmas[0] * next(draws)
    z = w = torch.zeros(3, len(D), dtype=C128)
    for sigma, lower in pairwise(sigmas):
        x = x + (sigma**2 - lower**2) * (m - x) @ torch.linalg.inv(C + sigma**2 * identity).mT
        if lower > 0:
            x = x + math.sqrt(sigma**2 - lower**2) * next(draws)
            for _ in range(2):
                score = (m - x) @ torch.linalg.inv(C + lower**2 * identity).mT
                fresh = next(draws)
                ratio = norms(fresh.unflatten(1, (SLICES, -1))) / norms(score.unflatten(1, (SLICES, -1)))
                eps = (2 * (0.16 * ratio) ** 2).expand(3, SLICES, N // SLICES).flatten(1)
                x = x + eps * score + (2 * eps).sqrt() * fresh
        if lower > 0 or noise_std == 0:
            # The first step of conjugate gradients: along the residual, as far as is best.
            H = A.mH @ A + rho * square * D.mH @ D
            r = A.mH @ given.y.flatten() + rho * square * (z - w) @ D.conj() - x @ H.mT
            length = r.abs().square().sum(1) / (r.conj() * (r @ H.mT)).real.sum(1)
            x = x + length[:, None] * r
            moved = x @ D.mT + w
            z = moved * (1 - lam / rho / moved.abs()).clamp_min(0)
            w = moved - z
    torch.testing.assert_close(samples_of(solver, given, prior, noise).flatten(1), x, rtol=1e-3, atol=1e-3)
    assert float((z == 0).double().mean()) not in (0.0, 1.0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_it_ends_where_the_data_s_noise_is_that_of_the_image(share):
    """Orthonormal samples of one coil: an image has their noise, but for the share that is not sampled."""
    shape, noise_std = (24, 24), 0.3
    mask = random_mask(shape, share)
    A = SliceStack(SinglecoilMRI(mask).to(C128), SLICES)
    levels: list[float] = []

    class Listening(Counting):
        def denoise_channels(self, x, sigma):
            levels.append(float(sigma[0]))
            return super().denoise_channels(x, sigma)

    given = Problem(mask * randn(SLICES, *shape, seed=5), A, noise_std)
    samples_of(DiffusionMBIR(steps=4, corrector_steps=0), given, Listening(), keyed_noise((SLICES, *shape)))
    expected = noise_std * math.sqrt(float(mask.double().mean()))
    assert min(levels) == pytest.approx(expected, rel=0.05)
    assert max(levels) == pytest.approx(2 * Counting().contract.level)


def test_total_variation_helps_where_slices_are_alike():
    truth, given, prior = alike_slices_problem(noise_std=0.01)
    noise = keyed_noise(tuple(truth.shape))
    settings: dict[str, Any] = {"steps": 20, "cg_iterations": 1, "coupling": 0.1}
    apart, together = (
        samples_of(DiffusionMBIR(**settings, lam=lam), given, prior, noise)
        for lam in (0.0, 0.01 * prior.contract.level)
    )
    assert float((together - truth).norm()) < 0.9 * float((apart - truth).norm())
    assert float(through_plane(together).abs().mean()) < 0.7 * float(through_plane(apart).abs().mean())


@pytest.mark.parametrize("weights", [{"lam": 0.0}, {}])
def test_a_volume_does_not_depend_on_its_batch(weights):
    given, prior = volume_problem(SLICES, SHAPE), gaussian_prior()
    solver = DiffusionMBIR(steps=5, **weights)
    together = samples_of(solver, given, prior, keyed(range(3)))
    for k in range(3):
        torch.testing.assert_close(samples_of(solver, given, prior, keyed([k]))[0], together[k])


def test_published_settings():
    paper = DiffusionMBIR.paper()
    assert (paper.steps, paper.sigma_max, paper.sigma_min, paper.snr) == (2000, 378.0, 0.01, 0.16)
    assert (paper.lam, paper.coupling, paper.cg_iterations) == (PAPER_LAM, PAPER_RHO, 1)
    assert paper.nfe == 3999
    assert DiffusionMBIR.paper(steps=5).steps == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"corrector_steps": -1}, "corrector_steps must be at least 0, got -1"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"slice_batch": 0}, "slice_batch must be at least 1, got 0"),
        ({"snr": 0.0}, "snr must be positive, got 0.0"),
        ({"sigma_max": math.inf}, "sigma_max must be positive, got inf"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
        ({"lam": -1.0}, "lam must not be negative, got -1.0"),
        ({"coupling": 0.0}, "coupling must be positive, got 0.0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DiffusionMBIR: {message}"):
        DiffusionMBIR(**settings)
