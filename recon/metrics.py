"""Image metrics as the fastMRI challenge defines them, for whole volumes.

Zbontar et al., arXiv:1811.08839, section 5: every metric is taken over a volume, with the volume's largest
target value as the dynamic range. Only magnitudes against a target of the same kind mean anything:
root-sum-of-squares and coil-combined targets differ by several dB for one and the same method.
"""

from __future__ import annotations

import math

import numpy as np

from recon.errors import ReconError

__all__ = ["METRICS", "matthews", "mse", "nmse", "psnr", "ssim"]

SSIM_WINDOW = 7


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
