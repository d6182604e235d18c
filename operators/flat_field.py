"""Flat and dark correction: what part of the beam passed the object, from counts."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.errors import OperatorError


def flat_dark_correction(counts: Tensor, flats: Tensor, darks: Tensor | None = None) -> Tensor:
    """Transmission ``(N - D) / (F - D)``, with F and D the means of the flats and of the darks.

    An element that counts no more with the beam than without it is dead: it has no transmission. Its values
    are interpolated linearly between its nearest neighbours that live, view by view.

    Parameters
    ----------
    counts : Tensor
        ``(..., views, detectors)`` real.
    flats : Tensor
        ``(..., n, detectors)``: n exposures without the object; leading dimensions broadcast.
    darks : Tensor, optional
        ``(..., m, detectors)``: m exposures without the beam. Zero, if there are none.

    Returns
    -------
    Tensor
        ``(..., views, detectors)`` floating point, 1 where nothing was in the beam. Noise may carry it above
        1, and below 0 where hardly a photon passes: `log_transform(..., photons=1.0)` is told a floor.

    Raises
    ------
    OperatorError
        If detectors differ in number, an exposure is missing, values are negative or not finite, or no
        element lives.

    Notes
    -----
    Seibert, Boone and Lindfors, "Flat-field correction technique for digital detectors", Proc.
    SPIE 3336, 1998.
    """
    named = {"counts": counts, "flats": flats} | ({} if darks is None else {"darks": darks})
    dtype = counts.dtype if counts.is_floating_point() else torch.float32
    for name, values in named.items():
        if values.ndim < 2 or 0 in values.shape:
            raise OperatorError(
                f"{name} must have shape (..., views, detectors) and hold something, got "
                f"{tuple(values.shape)}"
            )
        if values.is_complex():
            raise OperatorError(f"{name} must be real, got {values.dtype}")
        if values.shape[-1] != counts.shape[-1]:
            raise OperatorError(
                f"the counts have {counts.shape[-1]} detector elements, but the {name} {values.shape[-1]}"
            )
        if not bool(torch.isfinite(values).all()):
            raise OperatorError(f"the {name} hold NaN or infinite values")
        if bool((values < 0).any()):
            raise OperatorError(f"the {name} hold negative numbers, which are no counts")
    flat = flats.to(dtype).mean(-2, keepdim=True)
    dark = torch.zeros_like(flat) if darks is None else darks.to(dtype).mean(-2, keepdim=True)
    beam = flat - dark
    alive = beam > 0
    if not bool(alive.any(-1).all()):
        raise OperatorError("no detector element counts more in the flats than in the darks")
    transmission = (counts.to(dtype) - dark) / torch.where(alive, beam, 1)
    if bool(alive.all()):
        return transmission
    return _interpolate(transmission, alive.expand(transmission.shape))


def _interpolate(values: Tensor, alive: Tensor) -> Tensor:
    """Replace what is not alive linearly along the last dimension; constant beyond the last that lives."""
    size = values.shape[-1]
    index = torch.arange(size, device=values.device).expand(values.shape)
    left = torch.where(alive, index, -1).cummax(-1).values
    right = torch.where(alive, index, size).flip(-1).cummin(-1).values.flip(-1)
    left, right = torch.where(left < 0, right, left), torch.where(right == size, left, right)
    weight = (index - left).to(values.dtype) / (right - left).clamp_min(1)
    return (1 - weight) * values.gather(-1, left) + weight * values.gather(-1, right)
