"""The noise of a sinogram, estimated from the sinogram itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import ReconError

# Fourth differences along the detector: cubic polynomials vanish, white noise keeps its variance.
_DIFFERENCE = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0]) / math.sqrt(70)

# Of the square of a standard normal number.
_MEDIAN_OF_SQUARES = 0.454936

LARGEST = 20.0
"""Line integrals beyond which no photon gets through: such data were scaled, and counts cannot be told."""


@dataclass(frozen=True, eq=False)
class SinogramNoise:
    """Noise level of every datum of a sinogram.

    Parameters
    ----------
    std
        Standard deviation, like the sinogram, positive.
    photons
        Incident photons of an element that the model stands for; infinite for a noise that is the same
        everywhere.
    """

    std: Tensor
    photons: float


def estimate_photons(sinogram: Tensor) -> float:
    r"""Effective number of incident photons an element, from the noise of line integrals.

    Behind a line integral ``p`` the noise of ``-log(N / N0)`` has the variance ``exp(p) / N0``. The fourth
    difference ``d`` along the detector holds little but noise, so ``N0`` is one over the median of
    ``d^2 exp(-p)``, over that of a squared standard normal number. Edges of the object can only lower it.
    Correlated noise, as of a detector that blurs, raises it.

    Parameters
    ----------
    sinogram
        Line integrals ``(views, detectors)``, real.

    Raises
    ------
    ReconError
        If there are fewer than 16 detector elements, or no noise at all.
    """
    if sinogram.shape[-1] < 16:
        raise ReconError(
            f"the noise of a sinogram of {sinogram.shape[-1]} detector elements cannot be estimated; give it"
        )
    d = _differences(sinogram)
    smooth = _smooth(sinogram)[..., 2:-2]
    # Where there is no object the noise may have been clipped away, or the field of view masked.
    inside = smooth > 0.1 * float(smooth.max())
    scaled = (d.square() * torch.exp(-smooth))[inside]
    variance = float(scaled.median()) / _MEDIAN_OF_SQUARES if scaled.numel() else 0.0
    # Single precision rounds line integrals at about 1e-7.
    if not variance > 1e-12:
        raise ReconError("the sinogram shows no noise: give its level, or the number of photons")
    return 1 / variance


def constant_noise_std(sinogram: Tensor) -> float:
    """Noise level of a sinogram in any units, the same everywhere, from fourth differences.

    Raises
    ------
    ReconError
        If there are fewer than 16 detector elements, or no noise at all.
    """
    if sinogram.shape[-1] < 16:
        raise ReconError(
            f"the noise of a sinogram of {sinogram.shape[-1]} detector elements cannot be estimated; give it"
        )
    std = math.sqrt(float(_differences(sinogram).square().median()) / _MEDIAN_OF_SQUARES)
    if not std > 1e-6 * float(sinogram.abs().max()):
        raise ReconError("the sinogram shows no noise: give its level")
    return std


def sinogram_noise(
    sinogram: Tensor,
    *,
    photons: float | None = None,
    noise_std: float | None = None,
    electronic_std: float = 0.0,
) -> SinogramNoise:
    """Noise of every datum: given, of so many photons, or estimated.

    Parameters
    ----------
    sinogram
        Line integrals ``(views, detectors)``, real.
    photons
        Incident photons an element; estimated (:func:`estimate_photons`) if neither this nor ``noise_std`` is
        given. Of data beyond :data:`LARGEST`, which are no line integrals as they stand, one noise level is
        estimated instead (:func:`constant_noise_std`).
    noise_std
        The same standard deviation for all data instead.
    electronic_std
        Electronic noise in photons, which adds to the variance of few photons.

    Raises
    ------
    ReconError
        If a number is not positive, both are given, or nothing can be estimated.
    """
    if photons is not None and noise_std is not None:
        raise ReconError("give either the number of photons or the noise level of the sinogram, not both")
    for name, value in (("photons", photons), ("noise_std", noise_std)):
        if value is not None and not 0 < value < math.inf:
            raise ReconError(f"{name} must be a positive number, got {value}")
    if noise_std is not None:
        return SinogramNoise(torch.full_like(sinogram, noise_std), math.inf)
    if photons is None and float(sinogram.max()) > LARGEST:
        return SinogramNoise(torch.full_like(sinogram, constant_noise_std(sinogram)), math.inf)
    incident = estimate_photons(sinogram) if photons is None else photons
    # From a smoothed line integral: weights that follow the noise of their own datum bias the result.
    counts = (incident * torch.exp(-_smooth(sinogram).clamp_min(0))).clamp_min(1.0)
    return SinogramNoise((counts + electronic_std**2).sqrt() / counts, incident)


def _differences(sinogram: Tensor) -> Tensor:
    kernel = _DIFFERENCE.to(sinogram)
    rows = sinogram.reshape(-1, 1, sinogram.shape[-1])
    return torch.nn.functional.conv1d(rows, kernel[None, None]).reshape(*sinogram.shape[:-1], -1)


def _smooth(sinogram: Tensor) -> Tensor:
    """Median of five neighbours along the detector."""
    padded = torch.nn.functional.pad(sinogram.reshape(1, -1, sinogram.shape[-1]), (2, 2), mode="replicate")
    return padded.unfold(-1, 5, 1).median(-1).values.reshape(sinogram.shape)
