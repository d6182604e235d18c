from __future__ import annotations

import math

import pytest
import torch

from operators.beam_hardening import BeamHardeningCorrection
from operators.errors import OperatorError

# Two energies in equal parts.
SOFT, HARD = 0.03, 0.018


def hardened(length):
    return -torch.log(0.5 * torch.exp(-SOFT * length) + 0.5 * torch.exp(-HARD * length))


def path_lengths(count=200, longest=200.0):
    return torch.linspace(0, longest, count, dtype=torch.float64)


def test_a_beam_of_two_energies_is_made_straight():
    length = path_lengths()
    measured = hardened(length)
    mean = (SOFT + HARD) / 2
    correction = BeamHardeningCorrection.fit(measured, mean * length, degree=4)
    corrected = correction(measured)
    before = float((measured - mean * length).abs().max())
    after = float((corrected - mean * length).abs().max())
    assert before > 0.3
    assert after < 0.01 * before
    # -log of the mean begins with the mean attenuation, so the first coefficient is 1.
    assert correction.coefficients[0] == pytest.approx(1.0, abs=0.01)
    assert correction.largest == pytest.approx(float(measured.max()))


def test_a_polynomial_is_found_exactly():
    p = torch.linspace(0, 4, 50, dtype=torch.float64).reshape(5, 10)
    ideal = 1.1 * p + 0.05 * p**2 - 0.004 * p**3
    correction = BeamHardeningCorrection.fit(p, ideal, degree=3)
    assert correction.coefficients == pytest.approx((1.1, 0.05, -0.004), abs=1e-10)
    torch.testing.assert_close(correction(p), ideal)
    torch.testing.assert_close(correction.slope(p), 1.1 + 0.1 * p - 0.012 * p**2)
    assert correction(p.float()).dtype == torch.float32


def test_beyond_the_fit_it_goes_on_straight():
    correction = BeamHardeningCorrection((1.0, 0.1), 3.0)
    p = torch.tensor([-0.2, 0.0, 3.0, 5.0], dtype=torch.float64)
    expected = torch.tensor([-0.2, 0.0, 3.9, 3.9 + 2 * 1.6], dtype=torch.float64)
    torch.testing.assert_close(correction(p), expected)


def test_noise_of_the_fitted_scan_matters_little():
    length = path_lengths(2000)
    noise = 0.02 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ideal = 0.024 * length
    noisy = BeamHardeningCorrection.fit(hardened(length) + noise, ideal, degree=3)
    exact = BeamHardeningCorrection.fit(hardened(length), ideal, degree=3)
    p = hardened(path_lengths(50))
    assert float((noisy(p) - exact(p)).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("measured", "ideal", "degree", "message"),
    [
        (torch.ones(5), torch.ones(4), 2, r"one shape, got \(5,\) and \(4,\)"),
        (torch.ones(5), torch.ones(5), 0, "from 1 to 8, got 0"),
        (torch.ones(5) / 0, torch.ones(5), 2, "NaN or infinite"),
        (torch.ones(2), torch.ones(2), 3, "a fit of degree 3 needs"),
        (-torch.ones(5), torch.ones(5), 3, "some of them positive"),
        (
            torch.linspace(0, 2, 9),
            torch.linspace(0, 2, 9) * (1.2 - torch.linspace(0, 2, 9)),
            2,
            "does not rise",
        ),
    ],
)
def test_what_cannot_be_fitted(measured, ideal, degree, message):
    with pytest.raises(OperatorError, match=message):
        BeamHardeningCorrection.fit(measured, ideal, degree=degree)


def test_what_makes_no_correction():
    for coefficients, largest in (((), 1.0), ((1.0,), 0.0), ((math.nan,), 1.0)):
        with pytest.raises(OperatorError, match="finite coefficients and a positive largest"):
            BeamHardeningCorrection(coefficients, largest)
    with pytest.raises(OperatorError, match=r"got torch\.int64"):
        BeamHardeningCorrection((1.0,), 1.0)(torch.ones(2, dtype=torch.int64))
