"""Simulated coils, phase, k-space and noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import OperatorError
from operators.fft import ifftc
from operators.simulation import (
    add_noise,
    birdcage_maps,
    random_smooth_maps,
    simulate_kspace,
    smooth_phase,
)

SHAPES = st.tuples(st.integers(8, 60), st.integers(8, 60))


def roughness(x):
    """Energy outside the lowest five frequencies of a smoothly windowed image, as a fraction."""
    windows = [torch.hann_window(n + 2)[1:-1] for n in x.shape[-2:]]
    spectrum = torch.fft.fft2(x * windows[0][:, None] * windows[1]).abs().square()
    low = [torch.fft.fftfreq(n, 1 / n).abs() <= 5 for n in x.shape[-2:]]
    return float(1 - spectrum[..., low[0][:, None] & low[1]].sum() / spectrum.sum())


@settings(deadline=None, max_examples=15)
@given(shape=SHAPES, num_coils=st.integers(1, 12))
@pytest.mark.parametrize("make", [birdcage_maps, lambda c, s: random_smooth_maps(c, s, 3)])
def test_maps_are_smooth_complex_and_normalised_in_the_mean(make, shape, num_coils):
    maps = make(num_coils, shape)
    assert maps.shape == (num_coils, *shape)
    assert maps.dtype == torch.complex64
    rss = maps.norm(dim=0)
    assert float(rss.mean()) == pytest.approx(1, rel=1e-4)
    assert rss.min() > 0
    assert roughness(maps) < 1e-3
    assert maps.angle().std() > 0.05


def test_birdcage_has_the_symmetry_of_its_ring():
    maps = birdcage_maps(4, (33, 33))  # an odd size has its centre on a pixel
    # The coil a quarter turn on sees the image turned by a quarter.
    torch.testing.assert_close(maps[1].abs(), maps[0].abs().rot90(-1))
    torch.testing.assert_close(maps[2].abs(), maps[0].abs().flip(0, 1))
    assert maps[0, 16].abs().argmax() == 32  # nearest to the first coil, at x = +1.5
    torch.testing.assert_close(maps[:, 16, 16], maps[0, 16, 16].expand(4))
    assert maps.norm(dim=0).argmin() == 33 * 33 // 2


def test_random_maps_depend_on_the_seed_and_not_on_the_size():
    maps = random_smooth_maps(4, (40, 60), 1)
    assert torch.equal(maps, random_smooth_maps(4, (40, 60), 1))
    assert (maps - random_smooth_maps(4, (40, 60), 2)).abs().max() > 0.1
    finer = random_smooth_maps(4, (80, 120), 1)[:, ::2, ::2]
    ratio = finer / maps
    torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 1000), strength=st.floats(0.1, 3))
def test_phase_is_smooth_with_the_strength_asked_for(shape, seed, strength):
    phase = smooth_phase(shape, seed, strength=strength)
    assert phase.shape == shape
    assert float(phase.mean()) == pytest.approx(0, abs=1e-5 * strength)
    assert float(phase.std(correction=0)) == pytest.approx(strength, rel=1e-4)
    assert torch.equal(phase, smooth_phase(shape, seed, strength=strength))
    assert roughness(phase) < 1e-2


def test_kspace_is_that_of_the_coil_images():
    image = torch.randn(2, 15, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    maps = random_smooth_maps(3, (15, 12), 0)
    kspace = simulate_kspace(image, maps)
    assert kspace.shape == (2, 3, 15, 12)
    torch.testing.assert_close(ifftc(kspace), maps * image[:, None])
    noisy = simulate_kspace(image, maps, 0.5, seed=1)
    assert torch.equal(noisy, simulate_kspace(image, maps, 0.5, seed=1))
    assert not torch.equal(noisy, simulate_kspace(image, maps, 0.5, seed=2))
    assert float((noisy - kspace).real.std()) == pytest.approx(0.5, rel=0.1)
    real = simulate_kspace(torch.ones(15, 12), maps)  # a real image will do
    torch.testing.assert_close(ifftc(real), maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_noise_is_white_with_its_standard_deviation_per_real_component(dtype):
    noise = add_noise(torch.full((200, 300), 7, dtype=dtype), 2.0, torch.Generator().manual_seed(0)) - 7
    assert noise.dtype == dtype
    parts = torch.view_as_real(noise).unbind(-1) if noise.is_complex() else (noise,)
    for part in parts:
        assert float(part.std()) == pytest.approx(2, rel=0.02)
        assert float(part.mean()) == pytest.approx(0, abs=0.04)
        assert float((part[1:] * part[:-1]).mean()) == pytest.approx(0, abs=0.08)
    if noise.is_complex():
        assert float((parts[0] * parts[1]).mean()) == pytest.approx(0, abs=0.08)


def test_bad_input():
    with pytest.raises(OperatorError, match="at least one coil"):
        birdcage_maps(0, (8, 8))
    with pytest.raises(OperatorError, match=r"\(H, W\)"):
        random_smooth_maps(2, (8, 0), 0)
    with pytest.raises(OperatorError, match="outside the field of view"):
        birdcage_maps(2, (8, 8), radius=0.9)
    with pytest.raises(OperatorError, match="strength"):
        smooth_phase((8, 8), 0, strength=-1)
    with pytest.raises(OperatorError, match=r"same H and W, got \(8, 8\) and \(2, 8, 9\)"):
        simulate_kspace(torch.ones(8, 8), birdcage_maps(2, (8, 9)))
    for std in (-1.0, math.inf):
        with pytest.raises(OperatorError, match="standard deviation"):
            add_noise(torch.ones(3), std, torch.Generator())
