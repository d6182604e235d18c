from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from operators.centre_of_rotation import centre_from_offset, find_detector_offset, offset_from_centre
from operators.ct_geometry import FanBeam, ParallelBeam
from operators.errors import OperatorError
from tests.operators.discs import OBJECT, disc_sinogram, turn

SPACING = 0.25
HALF = ParallelBeam(turn(90), 128, SPACING)
CLOSED = ParallelBeam(turn(91, end=True), 128, SPACING)
WHOLE = ParallelBeam(turn(120, 2 * math.pi), 128, SPACING)
FLAT = FanBeam(turn(180, 2 * math.pi), 128, 0.4, 60.0, 90.0)
CURVED = replace(FLAT, detector="curved")

CASES: dict[str, tuple[ParallelBeam | FanBeam, str]] = {
    "half a turn": (HALF, "auto"),
    "0° to 180°": (CLOSED, "fourier"),
    "whole turn": (WHOLE, "auto"),
    "0° against 180°": (CLOSED, "opposed"),
    "centres of mass": (HALF, "moments"),
    "flat fan": (FLAT, "auto"),
    "curved fan": (CURVED, "auto"),
}


def noisy(sinogram, std=0.004):
    noise = torch.randn(sinogram.shape, generator=torch.Generator().manual_seed(0), dtype=sinogram.dtype)
    return sinogram + std * noise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [-3.3, 0.0, 0.37, 2.5])
def test_offset_is_found_to_a_tenth_of_an_element(name, elements):
    geometry, method = CASES[name]
    spacing = geometry.detector_spacing
    true = replace(geometry, detector_offset=elements * spacing)
    found = find_detector_offset(noisy(disc_sinogram(true)), geometry, method=method, max_shift=6 * spacing)
    assert found == pytest.approx(elements * spacing, abs=0.1 * spacing)


SHORT = FanBeam(turn(226, math.radians(226)), 128, 0.4, 60.0, 90.0)


@pytest.mark.parametrize("start", [0, 150, 270, 300])
@pytest.mark.parametrize("geometry", [HALF, SHORT], ids=["half a turn", "short scan"])
def test_arcs_stored_modulo_a_whole_turn(geometry, start):
    wrapped = tuple((angle + math.radians(start)) % (2 * math.pi) for angle in geometry.angles)
    elements = 2.3
    true = replace(geometry, angles=wrapped, detector_offset=elements * geometry.detector_spacing)
    found = find_detector_offset(
        disc_sinogram(true), replace(true, detector_offset=0.0), max_shift=6 * geometry.detector_spacing
    )
    assert found == pytest.approx(elements * geometry.detector_spacing, abs=0.05 * geometry.detector_spacing)


@pytest.mark.parametrize("gaps", [((25, 60),), ((20, 50), (80, 110))], ids=["one gap", "two gaps"])
@pytest.mark.parametrize("geometry", [WHOLE, FLAT], ids=["parallel", "fan"])
def test_turns_with_views_left_out(geometry, gaps):
    """What would be opposed to a ray within a gap is not made up from the views beside it."""
    true = replace(geometry, detector_offset=2.3 * geometry.detector_spacing)
    kept = [i for i in range(geometry.num_views) if not any(low <= i < high for low, high in gaps)]
    found = find_detector_offset(disc_sinogram(true)[kept], geometry.subset(kept))
    assert found == pytest.approx(2.3 * geometry.detector_spacing, abs=0.05 * geometry.detector_spacing)


def test_search_begins_at_the_offset_given():
    true = replace(WHOLE, detector_offset=20.2 * SPACING)
    start = replace(WHOLE, detector_offset=18 * SPACING)
    found = find_detector_offset(disc_sinogram(true), start, max_shift=4 * SPACING)
    assert found == pytest.approx(20.2 * SPACING, abs=0.1 * SPACING)
    with pytest.raises(OperatorError, match="at the end of the search"):
        find_detector_offset(disc_sinogram(true), WHOLE, max_shift=6 * SPACING)


@pytest.mark.parametrize("geometry", [HALF, WHOLE], ids=["fourier", "opposed"])
def test_truncated_scans(geometry):
    true = replace(geometry, num_detectors=72, detector_offset=1.4 * SPACING)  # 18 mm of an object of 20 mm
    found = find_detector_offset(
        disc_sinogram(true), replace(true, detector_offset=0.0), max_shift=4 * SPACING
    )
    assert found == pytest.approx(1.4 * SPACING, abs=0.1 * SPACING)


def test_slices_are_used_together_in_any_order_of_views():
    true = replace(HALF, detector_offset=0.8)
    sinogram = noisy(torch.stack([disc_sinogram(true), disc_sinogram(true, OBJECT[:2])]), 0.02)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0)).tolist()
    found = find_detector_offset(sinogram[:, order], HALF.subset(order), max_shift=1.5)
    assert found == pytest.approx(0.8, abs=0.1 * SPACING)


def test_centre_and_offset():
    assert centre_from_offset(0.0, 640, 0.5) == 319.5
    assert offset_from_centre(296.0, 640, 0.5) == 11.75
    assert centre_from_offset(offset_from_centre(100.3, 640, 0.5), 640, 0.5) == pytest.approx(100.3)
    # The element at the centre of rotation is where the geometry has u = 0.
    geometry = ParallelBeam((0.0,), 11, 0.5, offset_from_centre(3, 11, 0.5))
    assert geometry.detector_positions[3] == 0.0


@pytest.mark.parametrize(
    ("geometry", "options", "message"),
    [
        (HALF, {"method": "guess"}, "auto, opposed, fourier, moments, not 'guess'"),
        (FLAT, {"method": "fourier"}, "for parallel beams"),
        (HALF, {"method": "opposed"}, "no views that oppose"),
        (HALF.subset([0]), {}, "a single view does not tell the centre of rotation"),
        (FLAT.subset([0]), {}, "a single view does not tell the centre of rotation"),
        (HALF.subset([0, 1]), {}, "'fourier' needs at least three views, got 2"),
        (ParallelBeam(turn(40, math.pi / 2), 128, SPACING), {}, r"half a turn in equal steps, got 40 views"),
        (FLAT.subset(range(60)), {}, "no views that oppose"),
        (HALF, {"max_shift": 0.1}, "between one element and a quarter"),
        (HALF, {"max_shift": 9.0}, "between one element and a quarter"),
        (replace(HALF, detector_offset=14.0), {"max_shift": 4.0}, "leaves the detector"),
    ],
)
def test_what_is_refused(geometry, options, message):
    with pytest.raises(OperatorError, match=message):
        find_detector_offset(disc_sinogram(geometry), geometry, **options)


def test_data_that_do_not_fit():
    sinogram = disc_sinogram(HALF)
    with pytest.raises(OperatorError, match=r"\(90, 128\), got a sinogram of shape \(90, 127\)"):
        find_detector_offset(sinogram[:, :-1], HALF)
    with pytest.raises(OperatorError, match="NaN"):
        find_detector_offset(sinogram / 0, HALF)
    cut = replace(HALF, num_detectors=48)
    with pytest.raises(OperatorError, match="not wholly in each view"):
        find_detector_offset(disc_sinogram(cut), cut, method="moments")
    short = HALF.subset(range(10))
    with pytest.raises(OperatorError, match="at least three views over at least 45°"):
        find_detector_offset(disc_sinogram(short), short, method="moments")
