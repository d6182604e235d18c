"""Non-Cartesian k-space trajectories: where a scan samples k-space.

A trajectory is a tensor ``(K, 2)`` of positions in radians per pixel, in [-π, π]. The first is along H, the
second along W: the order of an image's axes, and torchkbnufft's. A Cartesian sample of index j along an axis
of n samples lies at ``2π (j - n // 2) / n``, so a step of the Cartesian grid, called a cell here, is 2π / n.

Positions are float64: at 320 pixels, an angle rounded to float32 turns the phase at the edge of the image by
5e-5 rad.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from operators.errors import OperatorError

GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2
"""111.25°, the angle between successive spokes that spreads any number of them about evenly over 180° [1]_.

.. [1] S. Winkelmann et al., "An optimal radial profile order based on the golden ratio for time-resolved
   MRI", IEEE Trans. Med. Imaging 26:68-76, 2007.
"""


def radial(num_spokes: int, num_readout: int, *, golden_angle: bool = True) -> Tensor:
    """Make a radial trajectory: straight spokes through the centre of k-space.

    Parameters
    ----------
    num_spokes : int
        Number of spokes S.
    num_readout : int
        Samples on a spoke, at ``2π (j - num_readout // 2) / num_readout``: one is at the centre. Twice the
        matrix size is usual, and lets the object be smaller than the field of view in every direction.
    golden_angle : bool
        Whether successive spokes are 111.25° apart (`GOLDEN_ANGLE`); otherwise 180°/S.

    Returns
    -------
    Tensor
        Float64 ``(S num_readout, 2)`` in radians/pixel, one spoke after the other. The first lies along the
        columns, the next are turned towards the rows.

    Raises
    ------
    OperatorError
        If there are no spokes or fewer than two samples on them.
    """
    _check_count("num_spokes", num_spokes, 1)
    _check_count("num_readout", num_readout, 2)
    angle = _spoke_angles(num_spokes, golden_angle)
    direction = torch.stack([angle.sin(), angle.cos()], dim=-1)
    return (direction[:, None] * _readout(num_readout)[:, None]).reshape(-1, 2)


def radial_density(
    num_spokes: int, num_readout: int, shape: tuple[int, int], *, golden_angle: bool = True
) -> Tensor:
    """Density compensation of a radial trajectory in closed form: the area a sample of k-space stands for.

    A sample at radius k stands for the piece of a ring that is one step of the readout thick and reaches to
    the middle of the gap to the next spoke on either side, so that its area grows as a ramp with k; all
    spokes share the disc at the centre.

    Parameters
    ----------
    num_spokes, num_readout, golden_angle
        As for `radial`, whose order the weights have.
    shape : tuple of int
        ``(H, W)`` of the image: areas are in units of a cell of the Cartesian grid, ``(2π/H) (2π/W)``.

    Returns
    -------
    Tensor
        Float64 ``(S num_readout,)``, positive. Their sum is the area of the disc of radius π in cells, within
        the first or last half step of the readout.

    Raises
    ------
    OperatorError
        If a count or the shape is not positive.
    """
    _check_count("num_spokes", num_spokes, 1)
    _check_count("num_readout", num_readout, 2)
    _check_shape(shape)
    angle = _spoke_angles(num_spokes, golden_angle) % math.pi
    order = angle.argsort()
    after = angle[order].roll(-1) - angle[order]
    after[-1] += math.pi  # the gap between the last spoke and the first one's other end
    width = torch.empty_like(angle)
    width[order] = (after + after.roll(1)) / 2
    step = 2 * math.pi / num_readout
    radius = _readout(num_readout).abs()
    area = width[:, None] * radius * step
    area[:, num_readout // 2] = width * (step / 2) ** 2
    return area.flatten() * (math.prod(shape) / (2 * math.pi) ** 2)


def radial_acceleration(num_spokes: int, shape: tuple[int, int]) -> float:
    """Acceleration of a radial trajectory: spokes that the Nyquist criterion asks for, over those there are.

    Adjacent spokes may be one cell apart at the edge of k-space, which takes π/2 spokes for each pixel of the
    longer side.

    Parameters
    ----------
    num_spokes : int
        Number of spokes.
    shape : tuple of int
        ``(H, W)`` of the image.

    Returns
    -------
    float

    Raises
    ------
    OperatorError
        If there are no spokes, or the shape is not positive.
    """
    _check_count("num_spokes", num_spokes, 1)
    _check_shape(shape)
    return math.pi / 2 * max(shape) / num_spokes


def spiral(num_interleaves: int, num_samples: int, num_turns: float, *, density: float = 1.0) -> Tensor:
    """Make a spiral trajectory: interleaves that wind out of the centre of k-space to its edge.

    With t from 0 to 1 along an interleave, its radius is ``π t^density`` and its angle ``2π num_turns t``;
    the interleaves are turned against each other by equal angles.

    Parameters
    ----------
    num_interleaves : int
        Number of interleaves I.
    num_samples : int
        Samples on each of them, evenly spaced in t.
    num_turns : float
        Turns of an interleave, positive.
    density : float
        1 keeps the distance between turns constant (an Archimedean spiral), more makes the turns denser at
        the centre.

    Returns
    -------
    Tensor
        Float64 ``(I num_samples, 2)`` in radians/pixel, one interleave after the other.

    Raises
    ------
    OperatorError
        If a count is too small, or the number of turns or the density not positive.
    """
    _check_count("num_interleaves", num_interleaves, 1)
    _check_count("num_samples", num_samples, 2)
    for name, value in (("num_turns", num_turns), ("density", density)):
        if not 0 < value < math.inf:
            raise OperatorError(f"{name} of a spiral must be a positive number, got {value}")
    t = torch.linspace(0, 1, num_samples, dtype=torch.float64)
    start = torch.arange(num_interleaves, dtype=torch.float64) * (2 * math.pi / num_interleaves)
    angle = start[:, None] + 2 * math.pi * num_turns * t
    radius = math.pi * t**density
    return torch.stack([radius * angle.sin(), radius * angle.cos()], dim=-1).reshape(-1, 2)


def spiral_acceleration(
    num_interleaves: int, num_turns: float, shape: tuple[int, int], *, density: float = 1.0
) -> float:
    """Acceleration of a spiral at the edge of k-space: distance between adjacent turns, in cells.

    Parameters
    ----------
    num_interleaves, num_turns, density
        As for `spiral`.
    shape : tuple of int
        ``(H, W)`` of the image.

    Returns
    -------
    float
        ``density n / (2 num_interleaves num_turns)`` for n pixels on the longer side.

    Raises
    ------
    OperatorError
        If an argument is not positive.
    """
    _check_count("num_interleaves", num_interleaves, 1)
    _check_shape(shape)
    for name, value in (("num_turns", num_turns), ("density", density)):
        if not 0 < value < math.inf:
            raise OperatorError(f"{name} of a spiral must be a positive number, got {value}")
    return density * max(shape) / (2 * num_interleaves * num_turns)


def _spoke_angles(num_spokes: int, golden_angle: bool) -> Tensor:
    step = GOLDEN_ANGLE if golden_angle else math.pi / num_spokes
    return torch.arange(num_spokes, dtype=torch.float64) * step


def _readout(num_readout: int) -> Tensor:
    index = torch.arange(num_readout, dtype=torch.float64) - num_readout // 2
    return index * (2 * math.pi / num_readout)


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise OperatorError(f"{name} of a trajectory must be at least {least}, got {value}")


def _check_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise OperatorError(f"the image shape of a trajectory must be (H, W), both positive, got {shape}")
