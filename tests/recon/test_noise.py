"""The noise level, estimated from simulated k-space of an object with air around it."""

import math

import pytest
import torch

from operators import FourierTransform, MulticoilMRI, SinglecoilMRI
from operators.masks import make_mask
from operators.simulation import birdcage_maps, simulate_kspace, smooth_phase
from recon import ReconError
from recon.noise import estimate_noise, kspace_noise_std, with_noise_floor


def acquire(shape, coils, std, seed=0):
    """Fully sampled k-space of an ellipse with some structure; nothing beyond 0.75 of the field of view."""
    y, x = (torch.linspace(-1, 1, n) for n in shape)
    r = torch.hypot(y[:, None] / 0.7, x / 0.6)
    magnitude = torch.sigmoid(25 * (1 - r)) * (1 + 0.3 * torch.cos(12 * x) + 0.3 * torch.sin(17 * y[:, None]))
    image = torch.polar(magnitude, smooth_phase(shape, seed=1))
    maps = birdcage_maps(coils, shape)
    return maps, simulate_kspace(image, maps, std, seed=seed)


MASKS = {
    "everything": lambda shape: torch.ones(shape, dtype=torch.bool),
    "equispaced": lambda shape: make_mask("equispaced", shape, 4, seed=1).mask,
    "random": lambda shape: make_mask("random", shape, 4, seed=1).mask,
    "poisson": lambda shape: make_mask("poisson", shape, 4, seed=1).mask,
    "uniform-2d": lambda shape: make_mask("uniform-2d", shape, 6, seed=1).mask,
    "rows": lambda shape: make_mask("random", shape[::-1], 3, seed=1).mask.mT,
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(96, 80), (121, 91)])
@pytest.mark.parametrize("std", [0.003, 0.03, 0.3])
def test_within_ten_percent(kind, shape, std):
    maps, kspace = acquire(shape, 8, std)
    mask = MASKS[kind](shape)
    assert estimate_noise(kspace * mask, MulticoilMRI(maps, mask)) == pytest.approx(std, rel=0.1)


def test_single_coil():
    _, kspace = acquire((160, 120), 1, 0.02)
    mask = MASKS["equispaced"]((160, 120))
    A = SinglecoilMRI(mask, (160, 120))
    assert estimate_noise(kspace[0] * mask, A) == pytest.approx(0.02, rel=0.1)


def test_rows_of_air_tell_what_the_edge_of_kspace_hides():
    # An object with so much detail that its k-space reaches to every edge.
    shape, std = (96, 80), 0.02
    maps = birdcage_maps(8, shape)
    image = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    image[:12], image[-12:] = 0, 0
    kspace = simulate_kspace(image, maps, std)
    columns = make_mask("random", shape, 4, seed=1).mask
    assert kspace_noise_std(kspace * columns, columns) == pytest.approx(std, rel=0.1)
    # Without whole columns there is no such thing, and the estimate is an upper bound.
    points = make_mask("uniform-2d", shape, 4, seed=1).mask
    assert kspace_noise_std(kspace * points, points) > 2 * std


def test_what_was_not_acquired_does_not_count():
    # Zero columns within the mask: padding of the matrix, as fastMRI files have it.
    _, kspace = acquire((96, 80), 8, 0.03)
    kspace[..., :9] = 0
    kspace[..., -9:] = 0
    assert kspace_noise_std(kspace, torch.ones(80)) == pytest.approx(0.03, rel=0.1)
    # Entries outside the mask are ignored.
    kspace[..., ::2] *= 100
    assert kspace_noise_std(kspace, torch.arange(80) % 2 == 1) == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("kind", ["equispaced", "poisson"])
def test_coils_of_zeros_do_not_count(kind):
    _, kspace = acquire((96, 80), 8, 0.03)
    mask = MASKS[kind]((96, 80))
    live = kspace_noise_std(kspace[:3] * mask, mask)
    assert live == pytest.approx(0.03, rel=0.1)
    kspace[3:] = 0
    assert kspace_noise_std(kspace * mask, mask) == live


@pytest.mark.parametrize("c", [4.0, 3.7e-5, 1e-30, 1e20])
def test_follows_the_unit_of_the_data(c):
    _, kspace = acquire((64, 48), 4, 0.03)
    mask = MASKS["equispaced"]((64, 48))
    one, other = (kspace_noise_std(k * mask, mask) for k in (kspace, c * kspace))
    assert other == pytest.approx(c * one, rel=1e-4)


def test_operator_without_a_mask():
    y = torch.ones(8, 8, dtype=torch.complex64)
    with pytest.raises(ReconError, match="of FourierTransform data cannot be estimated; give noise_std"):
        estimate_noise(y, FourierTransform((8, 8)))


@pytest.mark.parametrize("mask", [torch.zeros(8), torch.arange(8) < 4])
def test_nothing_acquired(mask):
    kspace = torch.ones(2, 8, 8, dtype=torch.complex64) * (torch.arange(8) >= 4)
    with pytest.raises(ReconError, match="no entry of k-space is both sampled and different from zero"):
        kspace_noise_std(kspace, mask)


def test_median_of_pure_noise():
    noise = torch.randn(4, 200, 200, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    # Torch's complex normal numbers have E|z|^2 = 1.
    assert kspace_noise_std(noise, torch.ones(200)) == pytest.approx(math.sqrt(0.5), rel=0.05)


@pytest.mark.parametrize("coils", [1, 4, 15])
def test_noise_floor_is_the_mean_of_noisy_roots_of_sums_of_squares(coils):
    """Against draws: exact to first order where there is signal, and near in air where coils are several."""
    std, generator = 0.3, torch.Generator().manual_seed(coils)
    for magnitude in (0.0, 1.0, 3.0):
        signal = torch.full((coils,), magnitude / math.sqrt(coils), dtype=torch.complex128)
        draws = torch.view_as_complex(
            std * torch.randn(40_000, coils, 2, generator=generator, dtype=torch.float64)
        )
        mean = (signal + draws).abs().square().sum(1).sqrt().mean()
        floor = with_noise_floor(torch.tensor(magnitude).double(), std, coils)
        tolerance = 0.01 if magnitude > 0 else {1: 0.21, 4: 0.05, 15: 0.02}[coils]
        assert float(floor) == pytest.approx(float(mean), rel=tolerance)
    assert torch.equal(with_noise_floor(torch.ones(2), 0.0, coils), torch.ones(2))
    for wrong in ((-1.0, 2), (math.nan, 2), (0.1, 0)):
        with pytest.raises(ReconError, match="noise of a root sum of squares"):
            with_noise_floor(torch.ones(2), *wrong)
