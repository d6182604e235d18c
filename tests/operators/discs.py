"""Line integrals of discs in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from operators.ct_geometry import FanBeam, ParallelBeam

Disc = tuple[float, float, float, float]
"""x, y, radius in mm; attenuation in 1/mm."""

OBJECT: tuple[Disc, ...] = (
    (0.5, -1.0, 10.0, 0.02),
    (4.0, 3.0, 2.5, 0.03),
    (-5.0, 1.0, 1.5, -0.02),
    (1.0, -6.0, 2.0, 0.015),
)
"""A disc with inserts, off the axis."""


def disc_sinogram(geometry: ParallelBeam | FanBeam, discs: Sequence[Disc] = OBJECT) -> Tensor:
    """Float64 ``(views, detectors)``: chords of lines, by their distance from the axis and their normal."""
    u = geometry.detector_positions
    angle = np.array(geometry.angles)[:, None]
    if isinstance(geometry, FanBeam):
        gamma = np.arctan(u / geometry.source_detector)
        if geometry.detector == "curved":
            gamma = u / geometry.source_detector
        normal, distance = angle - gamma, geometry.source_origin * np.sin(gamma)
    else:
        normal, distance = angle, u
    total = np.zeros(geometry.range_shape)
    for x, y, radius, attenuation in discs:
        off = distance - (x * np.cos(normal) + y * np.sin(normal))
        total += 2 * attenuation * np.sqrt(np.clip(radius**2 - off**2, 0, None))
    return torch.from_numpy(total)


def turn(count: int, arc: float = math.pi, end: bool = False) -> tuple[float, ...]:
    return tuple(np.linspace(0, arc, count, endpoint=end))
