from __future__ import annotations

import pytest
import torch

from operators.ct_geometry import ParallelBeam
from operators.errors import OperatorError
from operators.rings import find_stripes, suppress_rings
from tests.operators.discs import disc_sinogram, turn

GEOMETRY = ParallelBeam(turn(120), 160, 0.2)


BODY = ((0.5, -1.0, 12.0, 0.02), (2.0, 3.0, 5.0, 0.02), (-5.0, -2.0, 4.0, -0.01))
"""Larger than a stripe is wide, as objects are."""


def clean():
    noise = torch.randn(120, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return disc_sinogram(GEOMETRY, BODY) + 0.002 * noise


def stripes(kind):
    """An error for each element, as (views, elements)."""
    error = torch.zeros(120, 160, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    if kind == "offset":
        error[:, torch.randperm(160, generator=generator)[:12]] = 0.03
        return error
    if kind == "gain":
        scale = 0.05 * torch.randn(160, generator=generator, dtype=torch.float64)
        return disc_sinogram(GEOMETRY, BODY) * scale
    error[:, 70:75] = 0.1 * disc_sinogram(GEOMETRY, BODY)[:, 70:75]  # five elements wide
    return error


def error_by_element(sinogram):
    """What rings are made of: the mean over the views."""
    return (sinogram - clean()).mean(0)


@pytest.mark.parametrize("kind", ["offset", "gain", "wide"])
def test_stripes_go_away(kind):
    """But for those at the steep edge of the object, which the method cannot tell from it."""
    spoilt = clean() + stripes(kind)
    before, after = error_by_element(spoilt), error_by_element(suppress_rings(spoilt, size=15))
    assert float(after.norm()) < 0.6 * float(before.norm())


def test_little_happens_to_a_sinogram_without_stripes():
    result = suppress_rings(clean(), size=9)
    assert float((result - clean()).norm()) < 0.01 * float(clean().norm())


def test_constant_offsets_of_single_elements_leave_nothing_in_a_ramp():
    """Sorted, all elements of this one answer alike but for the offset, which the median removes exactly."""
    ramp = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None].expand(50, 40)
    spoilt = ramp.clone()
    spoilt[:, [5, 20, 33]] += 0.2
    torch.testing.assert_close(suppress_rings(spoilt, size=5), ramp)


def test_wide_strong_stripes_are_found_and_removed():
    gain = 1 + 0.01 * torch.randn(160, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    spoilt = clean() * gain
    spoilt[:, 70:74] *= 1.3
    found = find_stripes(spoilt, size=21)
    assert found[70:74].all()
    assert int(found.sum()) < 30
    before, plain, large = (
        error_by_element(x)[70:74].norm()
        for x in (spoilt, suppress_rings(spoilt), suppress_rings(spoilt, large=True))
    )
    assert float(large) < float(plain) < 0.5 * float(before)


@pytest.mark.parametrize("element", [40, 72, 110])
def test_an_element_stuck_at_zero_is_found_and_replaced(element):
    spoilt = clean()
    spoilt[:, element] = 0
    assert find_stripes(spoilt)[element]
    large = suppress_rings(spoilt, large=True)
    error = (large - clean())[:, element]
    # Between its neighbours in every view; the sorting alone, having no order, is right in the mean only.
    assert float(error.norm()) < 0.06 * float(clean()[:, element].norm())
    assert float(error_by_element(suppress_rings(spoilt))[element].abs()) < 0.05 * clean()[:, element].mean()
    assert float((large - clean()).norm()) < 0.03 * float(clean().norm())


def test_slices_are_independent():
    both = torch.stack([clean() + stripes("offset"), clean() + stripes("gain")]).float()
    result = suppress_rings(both, size=7, large=True)
    assert result.dtype == torch.float32
    for index in range(2):
        assert torch.equal(result[index], suppress_rings(both[index], size=7, large=True))


@pytest.mark.parametrize(
    ("sinogram", "size", "message"),
    [
        (torch.ones(4, 8), 4, "odd, from 3 to the 8 elements, got 4"),
        (torch.ones(4, 8), 1, "odd, from 3"),
        (torch.ones(4, 8), 9, "odd, from 3"),
        (torch.ones(8), 3, r"got torch\.float32 \(8,\)"),
        (torch.ones(4, 8, dtype=torch.int32), 3, r"got torch\.int32"),
        (torch.ones(4, 8) / 0, 3, "NaN"),
    ],
)
def test_what_is_refused(sinogram, size, message):
    with pytest.raises(OperatorError, match=message):
        suppress_rings(sinogram, size=size)
