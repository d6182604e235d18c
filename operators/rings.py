"""Rings: detector elements that respond otherwise than their neighbours draw stripes into a sinogram."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.errors import OperatorError


def suppress_rings(sinogram: Tensor, *, size: int = 21, large: bool = False, snr: float = 3.0) -> Tensor:
    """Remove stripes along the views, which become rings in the image.

    The sorting-based method: the values of each element are sorted over the views, so that what an element
    answers to weak, medium and strong signals lies side by side with its neighbours' answers; a median across
    the elements removes what differs from them, and the values go back to the views they came from. Nothing
    is assumed of a stripe being constant along the views, and hardly any blurring is brought in.

    Parameters
    ----------
    sinogram : Tensor
        ``(..., views, detectors)`` floating point, line integrals or transmission.
    size : int
        Width of the median in elements, odd; more than twice the width of the widest stripe.
    large : bool
        First look for elements that deviate strongly and replace those by what the median says, smoothly over
        the views (the paper's method for large stripes): for stripes wider and stronger than the sorting can
        remove.
    snr : float
        How many times the scatter of the ordinary elements' gains makes an element deviate, with `large`.

    Returns
    -------
    Tensor
        Like `sinogram`.

    Raises
    ------
    OperatorError
        If the sinogram is not floating point or not finite, or the size is not odd, above 1 and at most the
        number of elements.

    Notes
    -----
    Vo, Atwood and Drakopoulos, "Superior techniques for eliminating ring artifacts in X-ray
    micro-tomography", Opt. Express 26, 28396, 2018: algorithm 3 (sorting), algorithm 4 (detection) and 5
    (large stripes). Rings concentric with an object that itself is round about the axis cannot be told from
    it.
    """
    _check(sinogram, size)
    if large:
        sinogram = _remove_large(sinogram, size, snr)
    values, order = sinogram.sort(-2)
    return torch.empty_like(sinogram).scatter_(-2, order, _median(values, size))


def find_stripes(sinogram: Tensor, *, size: int = 21, snr: float = 3.0) -> Tensor:
    """Elements whose gain deviates from that of their neighbours by more than the others' scatter.

    The gain of an element is its sorted signal over the running median across its neighbours, over the middle
    80 % of the views; the scatter is the median absolute deviation, scaled to a standard deviation, of the
    elements behind which there is an object.

    Parameters
    ----------
    sinogram : Tensor
        ``(..., views, detectors)`` floating point.
    size : int
        Width of the median in elements, odd.
    snr : float
        Threshold in units of the scatter.

    Returns
    -------
    Tensor
        Bool ``(..., detectors)``.

    Notes
    -----
    As Vo, Atwood and Drakopoulos, Opt. Express 26, 28396, 2018, algorithm 4, which takes the scatter from a
    straight line through the middle of the sorted gains.
    """
    _check(sinogram, size)
    return _deviant(_gain(sinogram, size), size, snr)


def _check(sinogram: Tensor, size: int) -> None:
    if sinogram.ndim < 2 or not sinogram.is_floating_point():
        raise OperatorError(
            f"a sinogram must be floating point (..., views, detectors), got {sinogram.dtype} "
            f"{tuple(sinogram.shape)}"
        )
    if size % 2 == 0 or not 3 <= size <= sinogram.shape[-1]:
        raise OperatorError(
            f"the width of the median must be odd, from 3 to the {sinogram.shape[-1]} elements, got {size}"
        )
    if not bool(torch.isfinite(sinogram).all()):
        raise OperatorError("the sinogram holds NaN or infinite values")


def _remove_large(sinogram: Tensor, size: int, snr: float) -> Tensor:
    gain = _gain(sinogram, size)
    stripes = _deviant(gain, size, snr)[..., None, :]
    # An element that is stuck at zero has no order to sort by: view by view, it shows what its neighbours do.
    dead = (gain <= 0)[..., None, :]
    if bool(dead.any()):
        sinogram = torch.where(dead, _median(sinogram, size), sinogram)
    # Dividing by the gain removes what is the same in all views; only deviating elements are replaced beyond.
    levelled = sinogram / torch.where(gain > 0, gain, 1)[..., None, :]
    values, order = levelled.sort(-2)
    smooth = torch.empty_like(levelled).scatter_(-2, order, _median(values, size))
    return torch.where(stripes, smooth, levelled)


def _gain(sinogram: Tensor, size: int) -> Tensor:
    """What an element shows over what its neighbours do, (..., detectors); NaN where there is no signal."""
    values = sinogram.sort(-2).values
    views = values.shape[-2]
    skip = int(0.1 * views)
    values = values[..., skip : views - skip, :]
    # The quotient of the sums is the weighted mean of the quotients: it does not care for values near zero.
    shown, expected = values.sum(-2), _median(values, size).sum(-2)
    usable = expected > 0.05 * expected.amax(-1, keepdim=True)
    return torch.where(usable, shown / torch.where(usable, expected, 1), torch.nan)


def _deviant(gain: Tensor, size: int, snr: float) -> Tensor:
    deviation = gain - _median(torch.where(gain.isnan(), 1, gain)[..., None, :], size)[..., 0, :]
    deviation = deviation - deviation.nanmedian(-1, keepdim=True).values
    scatter = 1.4826 * deviation.abs().nanmedian(-1, keepdim=True).values
    return deviation.abs() > snr * scatter  # never where the gain is not known, as NaN is not above anything


def _median(values: Tensor, size: int) -> Tensor:
    """Running median across the last dimension, the ends mirrored."""
    half = size // 2
    count = values.shape[-1]
    index = torch.arange(-half, count + half, device=values.device).abs()
    index = torch.where(index >= count, 2 * (count - 1) - index, index)
    rows = values.reshape(-1, count)
    result = torch.empty_like(rows)
    # Every window is a copy: in parts, so that they never take more than some tens of megabytes.
    part = max(1, 4_000_000 // (count * size))
    for start in range(0, len(rows), part):
        windows = rows[start : start + part, index].unfold(-1, size, 1)
        result[start : start + part] = windows.median(-1).values
    return result.reshape(values.shape)
