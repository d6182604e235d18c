from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from operators.ct_geometry import FanBeam, ParallelBeam
from operators.errors import OperatorError
from operators.truncation import is_truncated, pad_truncated
from tests.operators.discs import disc_sinogram, turn

PARALLEL = ParallelBeam(turn(8), 60, 0.2, 0.3)  # from -5.6 to 6.2 mm
FLAT = FanBeam(turn(8, 2 * math.pi), 60, 0.3, 60.0, 90.0, -0.6)
CURVED = FanBeam(turn(8, 2 * math.pi), 60, 0.3, 60.0, 90.0, -0.6, "curved")
GEOMETRIES = pytest.mark.parametrize("geometry", [PARALLEL, FLAT, CURVED], ids=["parallel", "flat", "curved"])
WATER_DISC = ((0.0, 0.0, 10.0, 0.02),)


@GEOMETRIES
@pytest.mark.parametrize("pad", [7, (0, 5), (12, 3)])
@pytest.mark.parametrize("method", ["mirror", "water", "zero"])
def test_measured_elements_stay_where_they_were(geometry, pad, method):
    sinogram = disc_sinogram(geometry)
    padded, wider = pad_truncated(sinogram, geometry, pad, method=method)
    low, high = (pad, pad) if isinstance(pad, int) else pad
    assert padded.shape == wider.range_shape == (8, 60 + low + high)
    assert torch.equal(padded[:, low : low + 60], sinogram)
    positions = wider.detector_positions[low : low + 60]
    np.testing.assert_allclose(positions, geometry.detector_positions, atol=1e-12)
    assert (padded >= 0).all()
    assert wider.angles == geometry.angles
    if method == "zero":
        assert float(padded.sum()) == pytest.approx(float(sinogram.sum()))


def test_any_integer_pads():
    sinogram = disc_sinogram(PARALLEL)
    expected, wider = pad_truncated(sinogram, PARALLEL, 2)
    for pad in (np.int64(2), np.uint8(2), (np.int32(2), 2)):
        padded, geometry = pad_truncated(sinogram, PARALLEL, pad)  # type: ignore[arg-type]
        assert torch.equal(padded, expected)
        assert geometry == wider


@pytest.mark.parametrize("x", [0.0, 2.0])
def test_a_disc_of_water_is_continued_exactly(x):
    disc = ((x, 0.0, 10.0, 0.02),)
    sinogram = disc_sinogram(PARALLEL, disc)
    padded, wider = pad_truncated(sinogram, PARALLEL, 40, method="water")
    torch.testing.assert_close(padded, disc_sinogram(wider, disc), atol=1e-6, rtol=0)
    assert float(padded[:, 0].max()) == 0.0  # it ends


@pytest.mark.parametrize("geometry", [FLAT, CURVED], ids=["flat", "curved"])
def test_a_disc_of_water_about_the_axis_is_continued_exactly_in_fans(geometry):
    sinogram = disc_sinogram(geometry, WATER_DISC)
    padded, wider = pad_truncated(sinogram, geometry, 30, method="water")
    torch.testing.assert_close(padded, disc_sinogram(wider, WATER_DISC), atol=1e-6, rtol=0)


def test_another_attenuation_of_water():
    disc = ((0.0, 0.0, 10.0, 0.031),)
    padded, wider = pad_truncated(disc_sinogram(PARALLEL, disc), PARALLEL, 40, method="water", mu_water=0.031)
    torch.testing.assert_close(padded, disc_sinogram(wider, disc), atol=1e-6, rtol=0)


def test_mirrored_views_go_on_smoothly_and_end_at_zero():
    padded, _ = pad_truncated(disc_sinogram(PARALLEL), PARALLEL, 20)
    assert float(padded[:, [0, -1]].abs().max()) < 1e-12
    steps = padded.diff(dim=-1).abs()
    assert float(steps[:, 16:24].max()) < 2 * float(steps[:, 24:60].max())
    straight = torch.linspace(1, 3, 60, dtype=torch.float64).expand(8, 60)
    padded, _ = pad_truncated(straight, PARALLEL, (0, 30))
    # A line point-mirrored goes on as a line: only the cosine bends it.
    k = torch.arange(1, 31, dtype=torch.float64)
    expected = (3 + k * 2 / 59) * torch.cos(math.pi / 2 * k / 30)
    torch.testing.assert_close(padded[0, 60:], expected, atol=1e-12, rtol=0)


def ramp_filtered(sinogram, spacing):
    """By the discrete ramp of Kak and Slaney, eq. 3.29."""
    n = np.arange(-512, 513)
    kernel = np.zeros(1025)
    kernel[512] = 0.25
    kernel[n % 2 != 0] = -1 / (np.pi * n[n % 2 != 0]) ** 2
    return (
        np.array([np.convolve(row, kernel, "full")[512 : 512 + len(row)] for row in sinogram.numpy()])
        / spacing
    )


@pytest.mark.parametrize("method", ["mirror", "water"])
def test_the_cup_goes_away(method):
    """Filtered views of a truncated scan rise towards the ends of the detector; continued ones hardly do."""
    wide = ParallelBeam(PARALLEL.angles, 180, 0.2, 0.3)
    truth = ramp_filtered(disc_sinogram(wide), 0.2)[:, 60:120]
    cut = disc_sinogram(PARALLEL)
    padded = pad_truncated(cut, PARALLEL, 60 - 1, method=method)[0]
    before = np.abs(ramp_filtered(cut, 0.2) - truth)
    after = np.abs(ramp_filtered(padded, 0.2)[:, 59:119] - truth)
    assert after.mean() < 0.25 * before.mean()
    assert after[:, [0, -1]].mean() < 0.25 * before[:, [0, -1]].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": -1}, "padded by elements, got -1 and -1"),
        ({"pad": (1.5, 2)}, "padded by elements, got 1.5 and 2"),
        ({"pad": 60}, "60 elements cannot be mirrored over 60"),
        ({"pad": 3, "method": "wrap"}, "mirror, water, zero, not 'wrap'"),
        ({"pad": 3, "edge": 1}, "edge must be from 2 to the 60"),
        ({"pad": 3, "mu_water": 0.0}, "positive number of 1/mm, got 0.0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(OperatorError, match=message):
        pad_truncated(disc_sinogram(PARALLEL), PARALLEL, **options)


def test_a_sinogram_that_does_not_fit():
    with pytest.raises(OperatorError, match=r"\(\.\.\., 8, 60\), got torch\.float32 \(8, 61\)"):
        pad_truncated(torch.ones(8, 61), PARALLEL, 3)


@GEOMETRIES
def test_whole_objects_are_not_truncated(geometry):
    noise = 0.002 * torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    for radius, truncated in ((4.0, False), (10.0, True)):
        sinogram = disc_sinogram(geometry, ((0.5, 0.2, radius, 0.02),)).float()
        assert is_truncated(sinogram) == is_truncated(sinogram + noise) == truncated
    # From one side of the detector only, and in some of the views.
    assert is_truncated(disc_sinogram(geometry, ((4.0, 0.0, 2.5, 0.02),)))
    assert not is_truncated(torch.zeros(8, 60))
    assert not is_truncated(noise[:, :4].abs() * torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("shape", [(60,), (2, 8, 60), (0, 60)])
def test_truncation_is_told_from_one_sinogram(shape):
    with pytest.raises(OperatorError, match=r"floating-point sinogram \(views, detectors\)"):
        is_truncated(torch.ones(shape))
