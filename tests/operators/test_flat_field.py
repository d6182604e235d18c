from __future__ import annotations

import math

import pytest
import torch

from operators.ct_noise import log_transform
from operators.errors import OperatorError
from operators.flat_field import flat_dark_correction


def exposures():
    """Transmission of 6 views, 9 elements, 2 slices, with gains and darks of its own for each element."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.rand(2, 6, 9, generator=generator, dtype=torch.float64)
    gain = 1000 * (1 + torch.rand(2, 1, 9, generator=generator, dtype=torch.float64))
    dark = 50 * torch.rand(2, 1, 9, generator=generator, dtype=torch.float64)
    counts = dark + gain * torch.exp(-p)
    flats, darks = (dark + gain).expand(2, 4, 9), dark.expand(2, 3, 9)
    return p, counts, flats, darks


def test_gain_and_dark_go_away():
    p, counts, flats, darks = exposures()
    transmission = flat_dark_correction(counts, flats, darks)
    torch.testing.assert_close(transmission, torch.exp(-p))
    torch.testing.assert_close(log_transform(transmission, 1.0, floor=1e-6).line_integrals, p)


def test_exposures_are_averaged_and_broadcast():
    p, counts, flats, darks = exposures()
    swing = torch.tensor([-30.0, 30.0, -10.0, 10.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(flat_dark_correction(counts, flats + swing, darks), torch.exp(-p))
    torch.testing.assert_close(flat_dark_correction(counts[0], flats[0], darks[0]), torch.exp(-p[0]))
    without = flat_dark_correction(counts - darks[:, :1], flats - darks[:, :1])
    torch.testing.assert_close(without, torch.exp(-p))


def test_integers_become_floating_point():
    counts = torch.tensor([[30, 60]], dtype=torch.int32)
    result = flat_dark_correction(counts, torch.tensor([[110, 110]]), torch.tensor([[10, 10]]))
    torch.testing.assert_close(result, torch.tensor([[0.2, 0.5]]))


def test_dead_elements_are_interpolated():
    values = torch.tensor([[0.1, 0.2, 0.9, 0.9, 0.5, 0.6, 0.9]])
    flats = torch.ones(1, 7) * 10
    flats[0, [2, 3, 6]] = 2.0
    result = flat_dark_correction(values * 8 + 2, flats, torch.full((1, 7), 2.0))
    torch.testing.assert_close(result, torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6]]))


@pytest.mark.parametrize(
    ("counts", "flats", "darks", "message"),
    [
        (torch.ones(2, 3), torch.ones(1, 4), None, "counts have 3 detector elements, but the flats 4"),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 2), "but the darks 2"),
        (torch.ones(2, 3), torch.ones(0, 3), None, r"flats must have shape .* got \(0, 3\)"),
        (torch.ones(3), torch.ones(1, 3), None, r"counts must have shape .* got \(3,\)"),
        (-torch.ones(2, 3), torch.ones(1, 3), None, "counts hold negative"),
        (torch.ones(2, 3), torch.ones(1, 3) * math.nan, None, "flats hold NaN"),
        (torch.ones(2, 3) * 1j, torch.ones(1, 3), None, "counts must be real"),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 3), "no detector element counts more"),
    ],
)
def test_what_is_refused(counts, flats, darks, message):
    with pytest.raises(OperatorError, match=message):
        flat_dark_correction(counts, flats, darks)
