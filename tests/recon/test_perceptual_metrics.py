"""HFEN and MS-SSIM against closed forms and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, gaussian_laplace
from skimage.metrics import structural_similarity

from recon.errors import ReconError
from recon.metrics import MS_SSIM_WEIGHTS, hfen, laplacian_of_gaussian, ms_ssim


def image(shape=(180, 176), seed=0):
    made = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    return made - made.min()


def noisy(target, level=0.3, seed=1):
    return target + level * target.std() * np.random.default_rng(seed).standard_normal(target.shape)


def test_hfen_of_a_scaled_image_is_the_factor():
    target = image()[None]
    assert hfen(target, 1.25 * target) == pytest.approx(0.25)
    assert hfen(target, target) == 0
    assert hfen(target, np.zeros_like(target)) == pytest.approx(1)


def test_hfen_does_not_see_an_offset():
    target = image()[None]
    assert hfen(target, target + 3) == pytest.approx(0, abs=1e-12)


def test_hfen_is_close_to_that_of_the_sampled_gaussians_derivative():
    # scipy derives a Gaussian along each axis; on the pixel grid the two filters differ a little.
    target, prediction = image(), noisy(image())
    norms = [np.linalg.norm(gaussian_laplace(x, 1.5, mode="nearest")) for x in (target - prediction, target)]
    assert hfen(target[None], prediction[None]) == pytest.approx(norms[0] / norms[1], rel=1e-3)


def test_kernel_is_the_laplacian_of_a_gaussian():
    kernel = laplacian_of_gaussian()
    assert kernel.shape == (15, 15)
    assert kernel.sum() == pytest.approx(0, abs=1e-14)
    # Of x²/2 the Laplacian is 1 everywhere, whatever Gaussian it is smoothed with.
    offsets = np.arange(15) - 7.0
    assert (kernel * offsets[:, None] ** 2 / 2).sum() == pytest.approx(1, rel=1e-3)


def test_hfen_is_over_the_volume():
    target = np.stack([image(seed=0), 5 * image(seed=2)])
    prediction = target.copy()
    prediction[0] *= 1.5
    parts = [np.linalg.norm(gaussian_laplace(x, 1.5)) for x in target]
    expected = 0.5 * parts[0] / math.hypot(*parts)
    assert hfen(target, prediction) == pytest.approx(expected, rel=1e-2)


def test_a_flat_target_has_no_hfen():
    with pytest.raises(ReconError, match="no edges"):
        hfen(np.full((1, 20, 20), 0.3), np.zeros((1, 20, 20)))


def by_scikit_image(target, prediction, peak):
    """MS-SSIM out of the SSIM of scikit-image; K1 so large that its luminance is 1."""
    a, b, value = target, prediction, 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        value *= structural_similarity(a, b, data_range=peak, K1=0.01 if last else 1e8, **options) ** weight
        if not last:
            a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
    return value


@pytest.mark.parametrize("shape", [(176, 176), (192, 208)])
def test_ms_ssim_is_made_of_the_ssim_of_scikit_image(shape):
    target = image(shape)
    prediction = noisy(target)
    expected = by_scikit_image(target, prediction, target.max())
    assert 0.8 < expected < 0.999
    assert ms_ssim(target[None], prediction[None]) == pytest.approx(expected, rel=1e-7)
    pair = np.stack([target, 0.5 * target]), np.stack([prediction, 0.5 * target])
    assert ms_ssim(*pair) == pytest.approx((expected + 1) / 2, rel=1e-7)


def test_ms_ssim_of_constants_is_the_luminance_of_the_last_scale():
    target, prediction = np.full((1, 176, 176), 2.0), np.full((1, 176, 176), 3.0)
    c1 = (0.01 * 2) ** 2
    luminance = (2 * 2 * 3 + c1) / (4 + 9 + c1)
    assert ms_ssim(target, prediction) == pytest.approx(luminance ** MS_SSIM_WEIGHTS[-1])


def test_ms_ssim_of_a_negative_is_zero_and_no_nan():
    target = image()
    assert ms_ssim(target[None], (target.max() - target)[None]) == 0


def test_small_images_have_no_five_scales():
    with pytest.raises(ReconError, match="at least 176 × 176, got 176 × 175"):
        ms_ssim(np.ones((1, 176, 175)), np.ones((1, 176, 175)))


@pytest.mark.parametrize("metric", [hfen, ms_ssim])
def test_volumes_have_to_fit(metric):
    with pytest.raises(ReconError, match="of one shape"):
        metric(np.ones((1, 200, 200)), np.ones((2, 200, 200)))
