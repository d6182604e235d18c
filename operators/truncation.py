"""Truncated field of view: an object wider than the detector, continued beyond the detector's ends.

Filtered backprojection of views that stop abruptly draws a bright rim and lifts the values inside. Smoothly
continued views do not; what the image shows outside of the field of view is then an estimate that no ray has
seen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from operators.attenuation import MU_WATER
from operators.ct_geometry import FanBeam, ParallelBeam
from operators.errors import OperatorError

Geometry = TypeVar("Geometry", bound=ParallelBeam | FanBeam)
_METHODS = ("mirror", "water", "zero")


def is_truncated(sinogram: Tensor, *, edge: int = 5, level: float = 0.05, share: float = 0.02) -> bool:
    """Whether projections do not fall to air at an end of the detector: the object is wider than the field.

    Parameters
    ----------
    sinogram : Tensor
        Line integrals ``(views, detectors)`` floating point.
    edge : int
        How many elements at an end are averaged; at most a tenth of the detector.
    level : float
        What counts as air, as a fraction of the largest line integrals (of their 99th percentile).
    share : float
        Of so many views at an end: fewer are noise, or a table's edge.

    Returns
    -------
    bool
        True also where there is a background all over, which scatter or flats that do not fit leave behind.

    Raises
    ------
    OperatorError
        If the sinogram is not such.
    """
    if sinogram.ndim != 2 or 0 in sinogram.shape or not sinogram.is_floating_point():
        raise OperatorError(
            f"truncation is told from a floating-point sinogram (views, detectors), got {sinogram.dtype} "
            f"{tuple(sinogram.shape)}"
        )
    edge = max(1, min(edge, sinogram.shape[-1] // 10))
    largest = float(np.quantile(sinogram.cpu().numpy(), 0.99))
    ends = torch.stack([sinogram[:, :edge].mean(-1), sinogram[:, -edge:].mean(-1)])
    return bool(((ends > level * largest).double().mean(-1) > share).any()) and largest > 0


def pad_truncated(
    sinogram: Tensor,
    geometry: Geometry,
    pad: int | tuple[int, int],
    *,
    method: str = "mirror",
    mu_water: float = MU_WATER,
    edge: int = 5,
) -> tuple[Tensor, Geometry]:
    """Continue views beyond the ends of the detector.

    Parameters
    ----------
    sinogram : Tensor
        Line integrals ``(..., views, detectors)`` floating point.
    geometry : ParallelBeam or FanBeam
        That of the sinogram.
    pad : int or tuple of int
        Elements to add on each side, or at the (low, high) end.
    method : str
        How.

        ``mirror``
            Point-mirrored at the end, ``2 p_end - p``, times a cosine that falls to zero at the outermost new
            element; not below zero (Ohnesorge et al., "Efficient correction for CT image artifacts caused by
            objects extending outside the scan field of view", Med. Phys. 27, 39, 2000).
        ``water``
            The cylinder of water that continues value and slope of the view at its end (Hsieh et al., "A
            novel reconstruction algorithm to extend the CT scan field-of-view", Med. Phys. 31, 2385, 2004).
            Exact for a homogeneous disc seen by a parallel beam.
        ``zero``
            Zeros: the wider detector for objects that were *not* truncated.
    mu_water : float
        Attenuation in 1/mm of the cylinder.
    edge : int
        How many elements at an end are averaged for its value and slope.

    Returns
    -------
    sinogram : Tensor
        ``(..., views, low + detectors + high)``. The measured values are unchanged.
    geometry : ParallelBeam or FanBeam
        That of the wider detector: the measured elements stay where they were.

    Raises
    ------
    OperatorError
        If shapes do not fit, the padding is negative or wider than the mirror reaches, or options are not
        usable.
    """
    expected = geometry.range_shape
    if sinogram.ndim < 2 or tuple(sinogram.shape[-2:]) != expected or not sinogram.is_floating_point():
        raise OperatorError(
            f"the geometry needs a floating-point sinogram (..., {expected[0]}, {expected[1]}), got "
            f"{sinogram.dtype} {tuple(sinogram.shape)}"
        )
    low, high = (pad, pad) if isinstance(pad, int | np.integer) else pad
    if not all(isinstance(count, int | np.integer) and count >= 0 for count in (low, high)):
        raise OperatorError(f"a detector is padded by elements, got {low} and {high}")
    low, high = int(low), int(high)
    if method not in _METHODS:
        raise OperatorError(f"the method is one of {', '.join(_METHODS)}, not {method!r}")
    if method == "mirror" and max(low, high) >= geometry.num_detectors:
        raise OperatorError(
            f"a view of {geometry.num_detectors} elements cannot be mirrored over {max(low, high)}"
        )
    if not 2 <= edge <= geometry.num_detectors:
        raise OperatorError(
            f"edge must be from 2 to the {geometry.num_detectors} elements of the detector, got {edge}"
        )
    if not (math.isfinite(mu_water) and mu_water > 0):
        raise OperatorError(f"the attenuation of water must be a positive number of 1/mm, got {mu_water}")
    wider = dataclasses.replace(
        geometry,
        num_detectors=low + geometry.num_detectors + high,
        detector_offset=geometry.detector_offset + (high - low) / 2 * geometry.detector_spacing,
    )
    if method == "zero":
        return torch.nn.functional.pad(sinogram, (low, high)), wider
    if method == "mirror":
        left, right = _mirror(sinogram.flip(-1), low, edge).flip(-1), _mirror(sinogram, high, edge)
    else:
        position = _distances(wider).to(sinogram)
        # At the low end the positions are mirrored too, so that there, as at the high end, they grow
        # outwards.
        left = _water(sinogram.flip(-1), -position.flip(-1)[high:], edge, mu_water).flip(-1)
        right = _water(sinogram, position[low:], edge, mu_water)
    return torch.cat([left, sinogram, right], -1), wider


def _distances(geometry: ParallelBeam | FanBeam) -> Tensor:
    """Distance from the axis at which each ray passes, in mm, signed."""
    u = geometry.detector_positions
    if isinstance(geometry, FanBeam):
        return torch.from_numpy(geometry.source_origin * np.sin(geometry.ray_angles(u)))
    return torch.from_numpy(u)


def _mirror(sinogram: Tensor, count: int, edge: int) -> Tensor:
    """New elements behind the last, (..., views, count)."""
    if not count:
        return sinogram[..., :0]
    # A straight line through the last elements: their noise would else be carried along the whole of the
    # padding.
    x = torch.arange(1 - edge, 1, dtype=sinogram.dtype, device=sinogram.device)
    columns = torch.stack([torch.ones_like(x), x], -1)
    end = (sinogram[..., -edge:] @ torch.linalg.pinv(columns).mT)[..., :1]
    mirrored = 2 * end - sinogram[..., -1 - count : -1].flip(-1)
    step = torch.arange(1, count + 1, dtype=sinogram.dtype, device=sinogram.device)
    return mirrored.clamp_min(0) * torch.cos(math.pi / 2 * step / count).clamp_min(0)


def _water(sinogram: Tensor, position: Tensor, edge: int, mu_water: float) -> Tensor:
    """New elements behind the last, at ``position[detectors:]``, which grows: ``2 μ √(R² - (x - x₀)²)``."""
    measured = sinogram.shape[-1]
    last = position[measured - 1]
    x = position[measured - edge : measured] - last
    columns = torch.stack([torch.ones_like(x), x], -1)
    # The square, p² = 4 μ² (R² - (x - x₀)²), is smooth even where the cylinder ends, and without its known
    # curvature a straight line.
    line = sinogram[..., -edge:].square() + (2 * mu_water * x) ** 2
    fit = line @ torch.linalg.pinv(columns).mT
    value, slope = fit[..., :1].clamp_min(0), fit[..., 1:]
    # A view that rises towards its end belongs to no convex object that could be continued: level there.
    slope = slope.clamp_max(0)
    new = position[measured:] - last
    squared = value + slope * new - (2 * mu_water * new) ** 2
    return squared.clamp_min(0).sqrt()
