"""Image metrics as the fastMRI challenge defines them, for whole volumes.

Zbontar et al., arXiv:1811.08839, section 5: every metric is taken over a volume, with the volume's largest
target value as the dynamic range. Only magnitudes against a target of the same kind mean anything:
root-sum-of-squares and coil-combined targets differ by several dB for one and the same method.
"""

from __future__ import annotations

import math

import numpy as np

from recon.errors import ReconError

__all__ = ["METRICS", "PERCEPTUAL", "hfen", "matthews", "ms_ssim", "mse", "nmse", "psnr", "ssim"]

SSIM_WINDOW = 7

LOG_SIDE, LOG_SIGMA = 15, 1.5
"""Of the Laplacian of a Gaussian of HFEN, pixels."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales of MS-SSIM, finest first."""

MS_SSIM_SIDE, MS_SSIM_SIGMA = 11, 1.5
"""Of its Gaussian window, pixels."""


def mse(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean squared error, in the squared units of the images.

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real.

    Returns
    -------
    float

    Raises
    ------
    ReconError
        If they are not two volumes of one shape.
    """
    target, prediction = _volumes(target, prediction)
    return _squared_norm(target - prediction) / target.size


def nmse(target: np.ndarray, prediction: np.ndarray) -> float:
    """Normalised mean squared error, ``‖target − prediction‖² / ‖target‖²``.

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real.

    Returns
    -------
    float

    Raises
    ------
    ReconError
        If they are not two volumes of one shape, or if the target is all zeros.
    """
    target, prediction = _volumes(target, prediction)
    norm = _squared_norm(target)
    if norm == 0:
        raise ReconError("the target is all zeros, so NMSE has no meaning")
    return _squared_norm(target - prediction) / norm


def psnr(target: np.ndarray, prediction: np.ndarray, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio of a volume, ``10 log10(data_range² / MSE)`` dB.

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real.
    data_range : float, optional
        The peak; the target volume's maximum if not given.

    Returns
    -------
    float
        In dB; infinite for identical volumes.

    Raises
    ------
    ReconError
        If they are not two volumes of one shape, or if the peak is not positive.
    """
    peak = _peak(target, data_range)
    error = mse(target, prediction)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(target: np.ndarray, prediction: np.ndarray, data_range: float | None = None) -> float:
    """Structural similarity: the mean over slices, each with the volume's dynamic range.

    Wang et al., IEEE Trans. Image Process. 13, 600, 2004, with a uniform 7 × 7 window, sample covariances,
    and K1 = 0.01, K2 = 0.03 (the defaults of scikit-image).

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real, h and w at least 7.
    data_range : float, optional
        The dynamic range; the target volume's maximum if not given.

    Returns
    -------
    float

    Raises
    ------
    ReconError
        If they are not two volumes of one shape, smaller than the window, or if the range is not positive.
    """
    from skimage.metrics import structural_similarity  # slow to import

    target, prediction = _volumes(target, prediction)
    if min(target.shape[1:]) < SSIM_WINDOW:
        size = "{} × {}".format(*target.shape[1:])
        raise ReconError(f"SSIM needs images of at least {SSIM_WINDOW} × {SSIM_WINDOW}, got {size}")
    peak = _peak(target, data_range)
    slices = zip(target, prediction, strict=True)
    return float(np.mean([structural_similarity(t, p, data_range=peak) for t, p in slices]))


METRICS = {"MSE": mse, "NMSE": nmse, "PSNR": psnr, "SSIM": ssim}
"""Those of the challenge."""


def hfen(target: np.ndarray, prediction: np.ndarray) -> float:
    """High-frequency error norm, ``‖L(target − prediction)‖ / ‖L target‖``: how well edges are kept.

    ``L`` is the Laplacian of a Gaussian, 15 × 15 pixels with σ = 1.5 (Ravishankar & Bresler, IEEE Trans.
    Med. Imaging 30, 1028, 2011), made to sum to zero; beyond its edge an image goes on with the value there.
    The paper gives the numerator; it is divided here to have no unit. Norms are over the volume.

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real.

    Returns
    -------
    float
        0 is best.

    Raises
    ------
    ReconError
        If they are not two volumes of one shape, or if nothing is left of the target.
    """
    from scipy.ndimage import correlate  # slow to import

    target, prediction = _volumes(target, prediction)
    kernel = laplacian_of_gaussian()[None]
    size = _squared_norm(correlate(target.astype(np.float64), kernel, mode="nearest"))
    if size <= (1e-12 * float(np.abs(target).max())) ** 2 * target.size:
        raise ReconError("the target has no edges, so HFEN has no meaning")
    error = target.astype(np.float64) - prediction
    return math.sqrt(_squared_norm(correlate(error, kernel, mode="nearest")) / size)


def laplacian_of_gaussian(side: int = LOG_SIDE, sigma: float = LOG_SIGMA) -> np.ndarray:
    """Laplacian of a Gaussian of unit sum, sampled on (side, side) pixels, less its mean."""
    offsets = np.arange(side) - (side - 1) / 2
    squares = offsets[:, None] ** 2 + offsets[None, :] ** 2
    gaussian = np.exp(-squares / (2 * sigma**2))
    kernel = (squares - 2 * sigma**2) / sigma**4 * gaussian / gaussian.sum()
    return kernel - kernel.mean()


def ms_ssim(target: np.ndarray, prediction: np.ndarray, data_range: float | None = None) -> float:
    """Structural similarity on five scales: the mean over slices, each with the volume's dynamic range.

    Wang, Simoncelli & Bovik, Asilomar 2003: a Gaussian window of 11 × 11 pixels with σ = 1.5, K1 = 0.01,
    K2 = 0.03; contrast times structure of the first four scales, and SSIM with its luminance of the last,
    each the mean over all windows that lie within the image, to the powers of the paper. From one scale to
    the next 2 × 2 pixels are averaged. A negative mean, which has no such power, counts as zero.

    Parameters
    ----------
    target, prediction : numpy.ndarray
        (S, h, w) real, h and w at least 176, so that the last scale has a whole window.
    data_range : float, optional
        The dynamic range; the target volume's maximum if not given.

    Returns
    -------
    float

    Raises
    ------
    ReconError
        If they are not two volumes of one shape, too small for five scales, or if the range is not positive.
    """
    target, prediction = _volumes(target, prediction)
    least = MS_SSIM_SIDE * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
    if min(target.shape[1:]) < least:
        size = "{} × {}".format(*target.shape[1:])
        raise ReconError(f"MS-SSIM needs images of at least {least} × {least}, got {size}")
    peak = _peak(target, data_range)
    values = []
    for pair in zip(target.astype(np.float64), prediction.astype(np.float64), strict=True):
        a, b = pair
        value = 1.0
        for weight in MS_SSIM_WEIGHTS[:-1]:
            value *= max(_similarity(a, b, peak)[1], 0.0) ** weight
            a, b = _halved(a), _halved(b)
        values.append(value * max(_similarity(a, b, peak)[0], 0.0) ** MS_SSIM_WEIGHTS[-1])
    return float(np.mean(values))


PERCEPTUAL = {"HFEN": hfen, "MS-SSIM": ms_ssim}
"""Measures of what is seen rather than of the error; none of them is learnt."""


def _similarity(a: np.ndarray, b: np.ndarray, peak: float) -> tuple[float, float]:
    """Means over all windows of SSIM, and of SSIM without its luminance."""
    offsets = np.arange(MS_SSIM_SIDE) - MS_SSIM_SIDE // 2
    window = np.exp(-(offsets**2) / (2 * MS_SSIM_SIGMA**2))
    window /= window.sum()

    def smooth(image: np.ndarray) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(image, MS_SSIM_SIDE, axis=0) @ window
        return np.lib.stride_tricks.sliding_window_view(rows, MS_SSIM_SIDE, axis=1) @ window

    mean_a, mean_b = smooth(a), smooth(b)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    variance = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    structure = (2 * (smooth(a * b) - mean_a * mean_b) + c2) / (variance + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * structure).mean()), float(structure.mean())


def _halved(image: np.ndarray) -> np.ndarray:
    """Means of 2 × 2 pixels; an odd last row or column is left out."""
    height, width = (side // 2 for side in image.shape)
    return image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))


def _volumes(target: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two volumes in their common floating-point type."""
    if target.ndim != 3 or target.shape != prediction.shape or target.size == 0:
        raise ReconError(
            f"metrics need two volumes (slices, h, w) of one shape, got {target.shape} and {prediction.shape}"
        )
    if np.iscomplexobj(target) or np.iscomplexobj(prediction):
        raise ReconError("metrics are of magnitude images, got complex ones")
    # Integers would wrap around in a difference; half precision would overflow in a square.
    dtype = np.result_type(target, prediction, np.float32)
    return target.astype(dtype, copy=False), prediction.astype(dtype, copy=False)


def _squared_norm(volume: np.ndarray) -> float:
    return float(np.sum(np.square(volume, dtype=np.float64)))


def _peak(target: np.ndarray, data_range: float | None) -> float:
    peak = float(target.max()) if data_range is None else float(data_range)
    if not peak > 0:
        raise ReconError(f"the dynamic range must be positive, got {peak:g}")
    return peak


def matthews(found: np.ndarray, reference: np.ndarray) -> float:
    """Matthews' correlation coefficient of two binary images: 1 if equal, 0 if unrelated.

    Parameters
    ----------
    found, reference : numpy.ndarray
        Of one shape, 0 or 1.

    Returns
    -------
    float
        ``(TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))`` (Biochim. Biophys. Acta 405, 1975);
        0 where that is undefined, because one of the images has a single value.

    Raises
    ------
    ReconError
        If the shapes differ.
    """
    if found.shape != reference.shape:
        raise ReconError(f"images of shapes {found.shape} and {reference.shape} cannot be compared")
    a, b = found.astype(bool), reference.astype(bool)
    tp, tn, fp, fn = (float((x & y).sum()) for x, y in ((a, b), (~a, ~b), (a, ~b), (~a, b)))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
