"""The scale between scanner and prior: what it is estimated from, and what it must not depend on."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import MulticoilMRI, SinglecoilMRI
from operators.simulation import birdcage_maps, smooth_phase
from priors.level import image_level
from recon import ReconError, Scale

SHAPE = (24, 21)


def disk(shape=SHAPE):
    y, x = (torch.linspace(-1, 1, n) for n in shape)
    inside = torch.hypot(y[:, None], x) < 0.7
    return torch.polar(inside * (1 + 0.5 * x), 0.2 * smooth_phase(shape, seed=3))


def undersampled():
    maps = birdcage_maps(6, SHAPE)
    mask = torch.arange(SHAPE[1]) % 2 == 0
    mask[8:13] = True
    A = MulticoilMRI(maps, mask)
    return A, A(disk())


def fully_sampled(image):
    A = SinglecoilMRI(torch.ones(image.shape))
    return A, A(image)


@pytest.mark.parametrize("wanted", [0.5, 3.0])
def test_the_image_is_brought_to_the_level_and_to_phase_zero(wanted):
    image = disk() * cmath.rect(170, 2)
    A, y = fully_sampled(image)
    scaled = Scale.estimate(y, A, wanted).apply(image)
    assert float(image_level(scaled)) == pytest.approx(wanted, rel=1e-4)
    assert float((scaled * scaled.abs()).sum().angle()) == pytest.approx(0, abs=1e-4)


def test_undersampled_data_give_nearly_the_same():
    A, y = undersampled()
    scale = Scale.estimate(y, A, 0.5)
    B, z = fully_sampled(disk())
    full = Scale.estimate(z, B, 0.5)
    assert scale.factor == pytest.approx(full.factor, rel=0.05)
    assert scale.phase == pytest.approx(full.phase, abs=0.05)


def test_air_around_the_object_changes_nothing():
    image = disk()
    A, y = fully_sampled(image)
    B, z = fully_sampled(F.pad(image, (15, 20, 30, 3)))
    scale, padded = Scale.estimate(y, A, 0.5), Scale.estimate(z, B, 0.5)
    assert padded.factor == pytest.approx(scale.factor, rel=0.01)
    assert padded.phase == pytest.approx(scale.phase, abs=1e-5)


@settings(deadline=None, max_examples=20)
@given(exponent=st.floats(-25, 15), turn=st.floats(-math.pi, math.pi))
def test_data_times_a_number(exponent, turn):
    # Far below and above what any scanner writes; fourth powers of either leave single precision.
    A, y = undersampled()
    c = 10**exponent
    one, other = Scale.estimate(y, A, 0.5), Scale.estimate(y * cmath.rect(c, turn), A, 0.5)
    assert other.factor == pytest.approx(c * one.factor, rel=1e-4)
    assert math.remainder(other.phase - one.phase - turn, 2 * math.pi) == pytest.approx(0, abs=1e-4)


def test_a_power_of_two_changes_no_bit():
    A, y = undersampled()
    one, four = Scale.estimate(y, A, 0.5), Scale.estimate(4 * y, A, 0.5)
    assert four == Scale(4 * one.factor, one.phase)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float32])
def test_apply_and_undo(dtype):
    x = torch.randn((2, 4, 5), dtype=dtype, generator=torch.Generator().manual_seed(0))
    scale = Scale(37.0, 0.7)
    scaled = scale.apply(x)
    assert scaled.dtype == scale.undo(x).dtype == dtype
    torch.testing.assert_close(scale.undo(scaled), x)
    turn = cmath.rect(1, -0.7) if dtype.is_complex else 1.0
    torch.testing.assert_close(scaled, x * turn / 37)


def test_measurement_and_image_are_scaled_alike():
    A, y = undersampled()
    scale = Scale.estimate(y, A, 0.5)
    torch.testing.assert_close(A(scale.apply(disk())), scale.apply(y))


def test_zero_measurement():
    A, y = undersampled()
    with pytest.raises(ReconError, match="measurement is all zero"):
        Scale.estimate(0 * y, A, 0.5)
    # Nor is there anything where all that was measured is left out by the mask.
    with pytest.raises(ReconError, match="measurement is all zero"):
        Scale.estimate(y * ~A.mask + ~A.mask, A, 0.5)


@pytest.mark.parametrize(
    ("factor", "phase"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_impossible_scale(factor, phase):
    with pytest.raises(ReconError, match="a scale needs a positive factor and a finite phase"):
        Scale(factor, phase)
