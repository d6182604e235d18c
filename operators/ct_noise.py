"""Photons: counts from line integrals and back, and how far each measured value can be trusted.

A detector element that N₀ photons would reach through air counts ``N ~ Poisson(N₀ exp(-p)) + Normal(0,
σ_e²)`` behind a line integral p, where σ_e is the electronic noise in photons (Whiting et al., "Properties of
preprocessed sinogram data in x-ray computed tomography", Med. Phys. 33, 3290, 2006; an energy-integrating
detector is described by an effective N₀). The data of a reconstruction are ``-log(N / N₀)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.errors import OperatorError


@dataclass(frozen=True)
class LogData:
    """Line integrals made of counts.

    Attributes
    ----------
    line_integrals : Tensor
        ``-log(N / N₀)``, like the counts, without units.
    floored : Tensor
        Bool, of the same shape: where the counts were below the floor (photon starvation), so that the line
        integral is a lower bound and not a measurement.
    """

    line_integrals: Tensor
    floored: Tensor

    @property
    def num_floored(self) -> int:
        """How many counts were below the floor."""
        return int(self.floored.sum())

    @property
    def fraction_floored(self) -> float:
        """Which part of the counts was below the floor, 0 to 1."""
        return self.num_floored / max(self.floored.numel(), 1)


def simulate_counts(
    line_integrals: Tensor,
    photons: float | Tensor,
    generator: torch.Generator,
    *,
    electronic_std: float = 0.0,
) -> Tensor:
    """Simulate what a detector counts behind an object.

    Parameters
    ----------
    line_integrals : Tensor
        ``(..., views, detectors)`` floating point, noise-free.
    photons : float or Tensor
        N₀, the photons an element would count through air; a tensor broadcasts, e.g. ``(detectors,)`` for a
        bowtie filter.
    generator : torch.Generator
        Source of the noise, on the device of the line integrals.
    electronic_std : float
        σ_e, standard deviation of the electronic noise, in photons.

    Returns
    -------
    Tensor
        Counts, like `line_integrals`: whole numbers without electronic noise, and perhaps negative with it.

    Raises
    ------
    OperatorError
        If the line integrals are not floating point or not finite, or a level is not a number >= 0.
    """
    _check_finite(line_integrals, "line integrals")
    # float32 counts whole numbers up to 1.6e7 only, and a synchrotron's flat field has more.
    expected = _photons(photons, line_integrals).double() * torch.exp(-line_integrals.double())
    counts = torch.poisson(expected, generator=generator)
    if not (math.isfinite(electronic_std) and electronic_std >= 0):
        raise OperatorError(f"the electronic noise must be a number of photons >= 0, got {electronic_std}")
    if electronic_std:
        noise = torch.randn(counts.shape, dtype=counts.dtype, device=counts.device, generator=generator)
        counts = counts + electronic_std * noise
    return counts.to(line_integrals.dtype)


def log_transform(counts: Tensor, photons: float | Tensor, *, floor: float = 1.0) -> LogData:
    """Line integrals ``-log(max(N, floor) / N₀)`` of counts.

    Parameters
    ----------
    counts : Tensor
        ``(..., views, detectors)`` floating point.
    photons : float or Tensor
        N₀, in the units of the counts; broadcasts. 1 for a transmission, as `flat_dark_correction` gives it.
    floor : float
        Smallest count taken at its word, above 0, in the units of the counts. One photon, by default; the
        transmission of a flat-corrected scan needs a floor of its own, such as 1e-5.

    Returns
    -------
    LogData
        The line integrals, and where and how often the floor was needed.

    Raises
    ------
    OperatorError
        If the counts are not floating point or not finite, or N₀ or the floor are not positive.

    Notes
    -----
    The logarithm of N Poisson counts is biased by ``+1/(2N)`` and has the variance ``1/N``, to
    first order: at ten photons by a twentieth with a standard deviation of a third. Data of a few photons do
    not become usable by a floor, they become finite; `wls_weights` keeps a reconstruction from believing
    them.
    """
    _check_finite(counts, "counts")
    if not (math.isfinite(floor) and floor > 0):
        raise OperatorError(f"the floor of the counts must be a positive number, got {floor}")
    incident = _photons(photons, counts)
    return LogData(torch.log(incident / counts.clamp_min(floor)), counts < floor)


def simulate_transmission(
    line_integrals: Tensor,
    photons: float | Tensor,
    generator: torch.Generator,
    *,
    electronic_std: float = 0.0,
    floor: float = 1.0,
) -> LogData:
    """Simulate noisy line integrals: `simulate_counts`, then `log_transform`.

    Parameters
    ----------
    line_integrals, photons, generator, electronic_std
        As for `simulate_counts`.
    floor : float
        As for `log_transform`, in photons.

    Returns
    -------
    LogData
        Noisy line integrals, like those given, and where photons were too few.

    Raises
    ------
    OperatorError
        As the two do.
    """
    counts = simulate_counts(line_integrals, photons, generator, electronic_std=electronic_std)
    return log_transform(counts, photons, floor=floor)


def log_variance(counts: Tensor, *, electronic_std: float = 0.0, floor: float = 1.0) -> Tensor:
    """Variance of line integrals, ``(N + σ_e²) / N²``, from the counts they were made of.

    Parameters
    ----------
    counts : Tensor
        Photons N, measured or, better where it is known, expected (``N₀ exp(-p)``), floating point.
    electronic_std : float
        σ_e in photons.
    floor : float
        Counts below are taken as this many, so that the variance stays finite.

    Returns
    -------
    Tensor
        Like `counts`.

    Raises
    ------
    OperatorError
        If the counts are not floating point or not finite, or the floor or the noise is not a usable number.

    Notes
    -----
    First order in the noise (Thibault et al., "A recursive filter for noise reduction in
    statistical iterative tomographic imaging", Proc. SPIE 6065, 2006, eq. 4). From measured counts it is
    itself noisy.
    """
    return 1 / wls_weights(counts, electronic_std=electronic_std, floor=floor)


def wls_weights(counts: Tensor, *, electronic_std: float = 0.0, floor: float = 1.0) -> Tensor:
    """Weights of a weighted least-squares data term, ``N² / (N + σ_e²)``: one over `log_variance`.

    With these ``w``, ``½ Σ w (A x - p)²`` is, to second order, the negative log-likelihood of the counts
    (Sauer and Bouman, IEEE Trans. Signal Process. 41, 534, 1993).

    Parameters
    ----------
    counts : Tensor
        Photons N, measured or expected, floating point.
    electronic_std : float
        σ_e in photons.
    floor : float
        Counts below are taken as this many; a starved ray keeps a little weight.

    Returns
    -------
    Tensor
        Like `counts`, positive.

    Raises
    ------
    OperatorError
        If the counts are not floating point or not finite, or the floor or the noise is not a usable number.
    """
    _check_finite(counts, "counts")
    if not (math.isfinite(floor) and floor > 0):
        raise OperatorError(f"the floor of the counts must be a positive number, got {floor}")
    if not (math.isfinite(electronic_std) and electronic_std >= 0):
        raise OperatorError(f"the electronic noise must be a number of photons >= 0, got {electronic_std}")
    photons = counts.clamp_min(floor)
    # As a quotient of two moderate numbers: N² overflows float32 beyond 1.8e19 only, but loses nothing so.
    return photons / (1 + electronic_std**2 / photons)


def _photons(photons: float | Tensor, like: Tensor) -> Tensor:
    incident = torch.as_tensor(photons, dtype=like.dtype, device=like.device)
    if not bool((torch.isfinite(incident) & (incident > 0)).all()):
        raise OperatorError("the photons of the incident beam must be positive numbers")
    try:
        fits = torch.broadcast_shapes(incident.shape, like.shape) == like.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise OperatorError(
            f"photons of shape {tuple(incident.shape)} do not broadcast to data of shape {tuple(like.shape)}"
        )
    return incident


def _check_finite(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise OperatorError(f"{name} must be floating point, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise OperatorError(f"the {name} hold NaN or infinite values")
