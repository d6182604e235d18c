from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.record_fastmri_metrics import CASES, make_pair, make_volume
from recon.errors import ReconError
from recon.metrics import METRICS, matthews, mse, nmse, psnr, ssim

# What the metric functions of the package fastmri 0.3.0 (fastmri.evaluate) gave on the arrays of `make_pair`;
# printed by benchmarks/record_fastmri_metrics.py under numpy 2.4.6 and scikit-image 0.26.0.
RECORDED = {
    "float64": {
        "MSE": 5.437927214477261e-11,
        "NMSE": 0.0026114901703485796,
        "PSNR": 30.531036924088504,
        "SSIM": 0.9961440034361444,
    },
    "float32": {
        "MSE": 8.507912256650041e-12,
        "NMSE": 0.0004173365014139563,
        "PSNR": 38.64588922197463,
        "SSIM": 0.9993562677484689,
    },
    "knee": {
        "MSE": 2.160070178280904e-10,
        "NMSE": 0.010391980409622192,
        "PSNR": 24.610175640368944,
        "SSIM": 0.9818217288709528,
    },
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_fastmri(case, name):
    target, prediction = make_pair(*CASES[case], seed=list(CASES).index(case))
    assert METRICS[name](target, prediction) == pytest.approx(RECORDED[case][name], rel=1e-6, abs=0)


def test_closed_forms():
    target = np.full((2, 8, 8), 2.0)
    target[1] = 4.0
    prediction = target.copy()
    prediction[0] += 1
    assert mse(target, prediction) == pytest.approx(0.5)
    assert nmse(target, prediction) == pytest.approx(1 / 20)
    assert psnr(target, prediction) == pytest.approx(10 * math.log10(16 / 0.5))
    assert psnr(target, prediction, data_range=2) == pytest.approx(10 * math.log10(4 / 0.5))
    # Of constant images SSIM keeps its luminance term alone; the range is the volume's, 4, for both slices.
    c1 = (0.01 * 4) ** 2
    assert ssim(target, prediction) == pytest.approx((1 + (2 * 2 * 3 + c1) / (4 + 9 + c1)) / 2)


def test_identical_volumes():
    volume = make_volume((2, 9, 9), seed=0)
    assert (mse(volume, volume), nmse(volume, volume), psnr(volume, volume)) == (0, 0, math.inf)
    assert ssim(volume, volume) == pytest.approx(1)


def test_metrics_do_not_depend_on_the_unit():
    target, prediction = make_pair((2, 16, 16), np.float64, 0.1, seed=5)
    for metric in (nmse, psnr, ssim):
        assert metric(1e4 * target, 1e4 * prediction) == pytest.approx(metric(target, prediction))


def test_unsigned_integers_do_not_wrap():
    target, prediction = np.full((1, 8, 8), 3, np.uint8), np.full((1, 8, 8), 5, np.uint8)
    assert mse(target, prediction) == 4


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_bad_volumes(metric):
    volume = np.ones((2, 8, 8))
    with pytest.raises(ReconError, match=r"of one shape, got \(2, 8, 8\) and \(1, 8, 8\)"):
        metric(volume, volume[:1])
    with pytest.raises(ReconError, match=r"of one shape, got \(8, 8\) and \(8, 8\)"):
        metric(volume[0], volume[0])
    with pytest.raises(ReconError, match="magnitude images"):
        metric(volume, 1j * volume)


def test_values_without_meaning():
    zeros = np.zeros((1, 8, 8))
    with pytest.raises(ReconError, match="all zeros"):
        nmse(zeros, zeros + 1)
    for metric in (psnr, ssim):
        with pytest.raises(ReconError, match="dynamic range must be positive, got 0"):
            metric(zeros, zeros + 1)
    with pytest.raises(ReconError, match="at least 7 × 7, got 6 × 8"):
        ssim(np.ones((1, 6, 8)), np.ones((1, 6, 8)))


def test_matthews_is_the_correlation_of_two_binary_images():
    rng = np.random.default_rng(0)
    a = rng.random((20, 30)) < 0.4
    b = a ^ (rng.random(a.shape) < 0.1)
    assert matthews(b, a) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert matthews(a, a) == pytest.approx(1)
    assert matthews(~a, a) == pytest.approx(-1)
    assert matthews(np.ones_like(a), a) == 0
    with pytest.raises(ReconError, match="cannot be compared"):
        matthews(a[:3], a)
