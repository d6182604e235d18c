"""The noise level, estimated from the acquired k-space itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from operators.base import LinearOperator
from recon.errors import ReconError

# The magnitude of complex Gaussian noise of standard deviation s per component has the median sqrt(2 ln 2) s.
_MEDIAN = math.sqrt(2 * math.log(2))


def estimate_noise(y: Tensor, operator: LinearOperator) -> float:
    """Noise standard deviation per real component of a measurement whose operator has a sampling ``mask``.

    Raises
    ------
    ReconError
        If the operator has no mask: then the noise level has to be given.
    """
    mask = getattr(operator, "mask", None)
    if mask is None or y.ndim < 2:
        raise ReconError(
            f"the noise level of {type(operator).__name__} data cannot be estimated; give noise_std"
        )
    return kspace_noise_std(y, mask)


def live_coils(kspace: Tensor) -> Tensor:
    """Which coils of k-space ``(C, H, W)`` measured anything, bool ``(C,)``: not those of zeros."""
    return (kspace != 0).flatten(1).any(1)


def kspace_noise_std(kspace: Tensor, mask: Tensor) -> float:
    """Noise standard deviation per real component of Cartesian k-space.

    Two estimates that signal can only raise, of which the lower is taken: the outermost acquired entries of
    k-space; and, where whole columns were acquired, the rows of the image (after the transform along the
    readout) that hold least, which are rows of air wherever the field of view is longer than the object.
    Medians, so that entries that do hold signal count for little; entries that are exactly zero were not
    acquired, nor was any of a coil of zeros (switched off, or padding), which would draw the medians to zero.

    Parameters
    ----------
    kspace
        ``(..., H, W)``, complex, H the readout.
    mask
        Broadcasts to ``(H, W)``.

    Returns
    -------
    float
        In the units of ``kspace``.

    Raises
    ------
    ReconError
        If nothing was acquired.
    """
    height, width = kspace.shape[-2:]
    coils = kspace.reshape(-1, height, width)
    coils = coils[live_coils(coils)]
    sampled = mask.to(kspace.device).bool().expand(height, width) & (coils != 0).any(0)
    if not bool(sampled.any()):
        raise ReconError("no entry of k-space is both sampled and different from zero")
    v = torch.linspace(-1, 1, height, device=kspace.device)[:, None].abs()
    u = torch.linspace(-1, 1, width, device=kspace.device).abs()
    radius = torch.where(sampled, torch.maximum(v, u), -1.0)
    edge = radius >= torch.quantile(radius[sampled].double(), 0.9)
    estimates = [float(coils[:, edge].abs().median()) / _MEDIAN]
    columns = sampled.all(0)
    if int(columns.sum()) >= 4 and not bool((sampled & ~columns).any()):
        hybrid = torch.fft.ifft(torch.fft.ifftshift(coils[..., columns], dim=-2), dim=-2, norm="ortho")
        rows = hybrid.abs().transpose(0, 1).flatten(1).median(dim=1).values
        estimates.append(float(torch.quantile(rows.double(), 0.05)) / _MEDIAN)
    return min(estimates)


def with_noise_floor(magnitude: Tensor, noise_std: float, num_coils: int) -> Tensor:
    """Magnitude of an object as a root sum of squares of noisy coil images shows it, on average.

    A root sum of squares adds up the noise of all coils: air is not zero in it, and everything else a little
    too bright. Targets of fastMRI are such images, so an image without noise is off from them by more than it
    errs, by several dB where there are many coils.

    Parameters
    ----------
    magnitude
        Root sum of squares without noise, any shape, real.
    noise_std
        Of a coil image, per real component, in the same units.
    num_coils
        Coils that are added up.

    Returns
    -------
    Tensor
        ``sqrt(magnitude^2 + (2 C - 1) noise_std^2)``, the mean of the noncentral chi distribution to first
        order in the noise, and within 4 % of it in air from four coils on (Constantinides et al., Magn Reson
        Med 38:852, 1997).

    Raises
    ------
    ReconError
        If the noise is no number or negative, or there are no coils.
    """
    if not 0 <= noise_std < math.inf or num_coils < 1:
        raise ReconError(
            f"the noise of a root sum of squares is that of one coil or more and a number that is not "
            f"negative, not {noise_std} of {num_coils} coils"
        )
    return (magnitude.square() + (2 * num_coils - 1) * noise_std**2).sqrt()
