"""Synthetic discs with holes, the objects of the Helsinki Tomography Challenge 2022.

The challenge's objects are discs 70 mm across with holes cut out of them, scanned one at a time. They are
known to be of one material, so an image is 1 where there is material and 0 where there is none, and a pixel
on an edge holds the share of its area that is material.

Shapes are described by functions of the position that are negative inside and measure the distance to the
edge in units of the disc's radius; unions and intersections are minima and maxima of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.errors import PriorError
from priors.network import NetworkSettings
from priors.training import TrainingSettings, stream_seed

FIELD_MM = 512 * 0.1483
"""Side of the image, in mm: the challenge's references have 512 pixels of 0.1483 mm."""

RADIUS_MM, RADIUS_SPREAD = 34.87, 0.01
"""Radius of the disc, and by which share of it discs differ at most."""

CENTRE_MM = 1.8
"""By how much a disc's centre is off the image's at most, along each axis (12 of the challenge's pixels)."""

_RIM = 0.94
"""Holes end at this share of the radius: the discs are never cut open."""

_SUPERSAMPLING = 2
"""Subpixels, along each axis, on which edges are drawn; each of them holds an area fraction already."""

DISC_SETTINGS = TrainingSettings(
    level=0.85,
    unit="object",
    # What is black or white is plain until the noise is nearly as large as the step between them.
    sigma_centre=0.5,
    sigma_spread=1.3,
    # Whole discs of 128 pixels: the coarsest level is 8 x 8, so that each pixel knows of the whole outline.
    network=NetworkSettings(channels=1, widths=(48, 96, 160, 192), sigma_data=0.5),
)
"""Settings for whole images of discs."""


class DiscImages:
    """Source of whole images of discs with holes, each in one of eight orientations.

    Making a disc takes longer than is to be spent on it at every step, so there is a large number of
    different ones, made when they are first drawn and kept.

    Parameters
    ----------
    number
        How many different discs there are.
    seed
        Of the discs: those of different seeds have nothing in common.

    Raises
    ------
    PriorError
        If the number is not positive.
    """

    def __init__(self, number: int = 8192, seed: int = 0) -> None:
        if number < 1:
            raise PriorError(f"the number of discs must be positive, got {number}")
        self.number = number
        self.seed = seed
        self._made: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return self.number

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """See :meth:`priors.training.ImageSource.draw`; ``(batch, size, size)``, float32, from 0 to 1."""
        images = []
        for _ in range(batch):
            index = int(torch.randint(self.number, (), generator=generator))
            turns, flip = (int(torch.randint(high, (), generator=generator)) for high in (4, 2))
            image = torch.rot90(self._disc(index, size), turns)
            images.append(image.T if flip else image)
        return torch.stack(images).float()

    def _disc(self, index: int, size: int) -> Tensor:
        if (index, size) not in self._made:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, index))
            # Half precision is a quarter of the least noise that the prior knows, and half the memory.
            self._made[index, size] = random_disc(size, generator).half()
        return self._made[index, size]


def disc_images(number: int, size: int = 128, seed: int = 0) -> Tensor:
    """Make random discs with holes; the first images of a larger number are those of a smaller one.

    Parameters
    ----------
    number
        How many.
    size
        Height and width in pixels of a field of view of 75.9 mm.
    seed
        The same seed makes the same images.

    Returns
    -------
    Tensor
        ``(number, size, size)``, float32, from 0 (air) to 1 (material).

    Raises
    ------
    PriorError
        If the number or the size is not positive.
    """
    if number < 1 or size < 1:
        raise PriorError(f"the number of discs and their size must be positive, got {number} and {size}")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([random_disc(size, generator) for _ in range(number)])


def random_disc(size: int, generator: torch.Generator) -> Tensor:
    """Draw one disc with holes of a random family, turned by a random angle.

    Families: a solid disc, circles and ellipses, polygons with more or less round corners, a mixture of
    these, curved slots, grids of bars or of cells, cells of an irregular net, and level sets of a smooth
    random function.

    Returns
    -------
    Tensor
        ``(size, size)``, float32, from 0 (air) to 1 (material).
    """
    dice = _Dice(generator)
    pixel = FIELD_MM / (size * _SUPERSAMPLING) / RADIUS_MM
    shift_x, shift_y = (dice.uniform(-CENTRE_MM, CENTRE_MM) / RADIUS_MM for _ in range(2))
    position = (torch.arange(size * _SUPERSAMPLING) - (size * _SUPERSAMPLING - 1) / 2) * pixel
    x, y = position[None, :] - shift_x, -position[:, None] - shift_y
    radius = 1 + dice.uniform(-RADIUS_SPREAD, RADIUS_SPREAD)
    distance = torch.hypot(x, y)
    angle = dice.uniform(-math.pi, math.pi)
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    holes = dice.choose(_FAMILIES, _SHARES)(u, v, dice)
    material = torch.maximum(distance - radius, -torch.maximum(holes, distance - _RIM * radius))
    # The distance of an edge from a subpixel's centre gives the share of its area that lies inside.
    share = (0.5 - material / pixel).clamp(0, 1)
    return F.avg_pool2d(share[None, None], _SUPERSAMPLING)[0, 0]


class _Dice:
    """Random numbers as Python's own, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability

    def choose(self, options: tuple[_Family, ...], shares: tuple[float, ...]) -> _Family:
        index = torch.multinomial(torch.tensor(shares), 1, generator=self.generator)
        return options[int(index)]


_Family = Callable[[Tensor, Tensor, _Dice], Tensor]
"""A family of holes: distance function on the positions ``(1, n) or (n, n)``, drawn with dice."""


def _none(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    return torch.full(torch.broadcast_shapes(u.shape, v.shape), 2.0)


def _places(dice: _Dice, most: int, smallest: float, largest: float) -> list[tuple[float, float, float]]:
    """Circles ``(u, v, radius)`` that touch neither each other nor the rim, tried one after the other."""
    wanted, gap = dice.integer(1, most), dice.uniform(0.02, 0.08)
    similar, base = dice.chance(0.5), dice.log_uniform(smallest, largest)
    found: list[tuple[float, float, float]] = []
    for _ in range(6 * wanted):
        size = base * dice.uniform(0.85, 1.15) if similar else dice.log_uniform(smallest, largest)
        far, angle = 0.9 * math.sqrt(dice.uniform(0, 1)), dice.uniform(-math.pi, math.pi)
        u, v = far * math.cos(angle), far * math.sin(angle)
        if far + size < 0.92 and all(
            math.hypot(u - other_u, v - other_v) > size + other + gap for other_u, other_v, other in found
        ):
            found.append((u, v, size))
        if len(found) == wanted:
            break
    return found


def _ellipse(u: Tensor, v: Tensor, place: tuple[float, float, float], angle: float, aspect: float) -> Tensor:
    """Ellipse of the place's radius along its longer axis; ``aspect`` of 1 is a circle."""
    centre_u, centre_v, size = place
    p = math.cos(angle) * (u - centre_u) + math.sin(angle) * (v - centre_v)
    q = math.cos(angle) * (v - centre_v) - math.sin(angle) * (u - centre_u)
    a, b = size, size * aspect
    # First-order distance: f / |grad f| for f = |(p/a, q/b)| - 1.
    f = torch.sqrt((p / a) ** 2 + (q / b) ** 2 + 1e-12)
    return (f - 1) * f / torch.sqrt((p / a**2) ** 2 + (q / b**2) ** 2 + 1e-12)


def _polygon(u: Tensor, v: Tensor, place: tuple[float, float, float], axis: float, dice: _Dice) -> Tensor:
    """Convex polygon inside the place's circle, its corners rounded, perhaps squeezed along ``axis``."""
    centre_u, centre_v, size = place
    sides = 4 if dice.chance(0.35) else dice.integer(3, 7)
    turn = dice.uniform(-math.pi, math.pi)
    jitter = dice.uniform(0, 0.6) * math.pi / sides
    angles = [turn + 2 * math.pi * k / sides + dice.uniform(-jitter, jitter) for k in range(sides)]
    corners = [(centre_u + size * math.cos(t), centre_v + size * math.sin(t)) for t in angles]
    if dice.chance(0.5):  # squeezed along one axis: bars and skewed boxes among four-sided ones
        squeeze = dice.uniform(0.35, 1)
        corners = [_squeezed(corner, (centre_u, centre_v), squeeze, axis) for corner in corners]
    edges = []
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(u1 - u0, v1 - v0)
        edges.append(((v1 - v0) / length, -(u1 - u0) / length, u0, v0))
    inner = min(
        (centre_u - u0) * -normal_u + (centre_v - v0) * -normal_v for normal_u, normal_v, u0, v0 in edges
    )
    round_by = dice.uniform(0, 0.5) * max(inner, 0.0)
    distances = [normal_u * (u - u0) + normal_v * (v - v0) + round_by for normal_u, normal_v, u0, v0 in edges]
    return _smooth_intersection(distances) - round_by


def _squeezed(
    point: tuple[float, float], centre: tuple[float, float], factor: float, axis: float
) -> tuple[float, float]:
    along_u, along_v = math.cos(axis), math.sin(axis)
    projected = (point[0] - centre[0]) * along_u + (point[1] - centre[1]) * along_v
    return point[0] - (1 - factor) * projected * along_u, point[1] - (1 - factor) * projected * along_v


def _smooth_intersection(distances: list[Tensor]) -> Tensor:
    """Intersection of half-planes: the true distance outside next to a corner of two, the maximum elsewhere.

    Shifting its level makes round corners, which those of a plain maximum do not.
    """
    outside = torch.zeros(())
    largest = distances[0]
    for distance in distances:
        outside = outside + distance.clamp_min(0) ** 2
        largest = torch.maximum(largest, distance)
    return torch.where(largest > 0, outside.sqrt(), largest)


def _circles(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    aspect = 1.0 if dice.chance(0.5) else dice.uniform(0.4, 1)
    aligned = dice.chance(0.5)
    holes = _none(u, v, dice)
    for place in _places(dice, 14, 0.06, 0.35):
        angle = 0.0 if aligned else dice.uniform(-math.pi, math.pi)
        holes = torch.minimum(holes, _ellipse(u, v, place, angle, aspect))
    return holes


def _polygons(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    holes = _none(u, v, dice)
    aligned, turn = dice.chance(0.5), dice.uniform(-math.pi, math.pi)
    for place in _places(dice, 14, 0.08, 0.4):
        axis = turn if aligned else dice.uniform(-math.pi, math.pi)
        holes = torch.minimum(holes, _polygon(u, v, place, axis, dice))
    return holes


def _mixture(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    holes = _none(u, v, dice)
    for place in _places(dice, 12, 0.06, 0.4):
        angle = dice.uniform(-math.pi, math.pi)
        if dice.chance(0.5):
            hole = _polygon(u, v, place, angle, dice)
        else:
            hole = _ellipse(u, v, place, angle, dice.uniform(0.5, 1))
        holes = torch.minimum(holes, hole)
    return holes


def _slots(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    """Slots of one width along arcs, those of full turns being rings with a bridge."""
    holes = _none(u, v, dice)
    for centre_u, centre_v, size in _places(dice, 6, 0.15, 0.7):
        width = dice.uniform(0.025, 0.3 * size)
        middle, half = size - width / 2, dice.uniform(0.3, math.pi - width / size - 0.15)
        turn = dice.uniform(-math.pi, math.pi)
        p = math.cos(turn) * (u - centre_u) + math.sin(turn) * (v - centre_v)
        q = (math.cos(turn) * (v - centre_v) - math.sin(turn) * (u - centre_u)).abs()
        arc = (torch.hypot(p, q) - middle).abs()
        ends = torch.hypot(p - middle * math.cos(half), q - middle * math.sin(half))
        beyond = torch.atan2(q, p) > half
        holes = torch.minimum(holes, torch.where(beyond, ends, arc) - width / 2)
    return holes


def _grid(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    """Bars, or the cells between two families of struts, inside a circle or a band of the disc."""
    pitch = dice.log_uniform(0.12, 0.6)
    strut = dice.uniform(0.2, 0.7) * pitch
    skew = dice.uniform(-0.6, 0.6)
    along = v + skew * u
    row = torch.floor(along / pitch)
    half = (pitch - strut) / 2
    across = ((along - (row + 0.5) * pitch).abs() - half) / math.hypot(1, skew)
    distances = [across]
    if dice.chance(0.7):
        other = dice.log_uniform(0.12, 0.9)
        wall = dice.uniform(0.1, 0.6) * other
        stagger = dice.uniform(0, 1) * other if dice.chance(0.5) else 0.0
        position = u + stagger * torch.remainder(row, 2) + dice.uniform(0, other)
        column = torch.remainder(position, other)
        distances.append((column - other / 2).abs() - (other - wall) / 2)
    if dice.chance(0.5):
        centre, reach = dice.uniform(-0.3, 0.3), dice.uniform(0.3, 0.88)
        distances.append(torch.hypot(u - centre, v) - min(reach, 0.9 - abs(centre)))
    else:
        distances += [u.abs() - dice.uniform(0.2, 0.9), v.abs() - dice.uniform(0.2, 0.9)]
        distances.append(torch.hypot(u, v) - dice.uniform(0.8, 0.92))
    round_by = dice.uniform(0, 0.4) * half
    return _smooth_intersection([distance + round_by for distance in distances]) - round_by


def _net(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    """Cells of an irregular net, each the points nearer to its centre than to others, less half a strut."""
    cells, strut = dice.integer(4, 18), dice.uniform(0.03, 0.12)
    limit = dice.uniform(0.75, 0.92)
    points = [(limit * 1.1 * a, limit * 1.1 * b) for a, b in _spread_points(cells, dice)]
    squares = torch.stack([(u - a) ** 2 + (v - b) ** 2 for a, b in points])
    nearest = squares.argmin(0)
    own_u, own_v = (torch.tensor([point[axis] for point in points])[nearest] for axis in range(2))
    own = squares.amin(0)
    edge = torch.full(own.shape, -2.0)
    for (a, b), square in zip(points, squares, strict=True):
        apart = torch.hypot(own_u - a, own_v - b)
        # Distance to the bisector of the two centres, negative on the own side.
        bisector = (own - square) / (2 * apart).clamp_min(1e-6)
        edge = torch.maximum(edge, torch.where(apart > 0, bisector, -2.0))
    kept = torch.tensor([not dice.chance(0.15) for _ in points])[nearest]
    rounding = dice.uniform(0.005, 0.05)
    shape = _smooth_intersection([edge + strut / 2 + rounding, torch.hypot(u, v) - limit + rounding])
    return torch.where(kept, shape - rounding, edge.abs() + strut / 2)


def _spread_points(number: int, dice: _Dice) -> list[tuple[float, float]]:
    """Points in the unit disc, each the farthest from those before of a few candidates (best-candidate)."""
    points: list[tuple[float, float]] = []
    for _ in range(number):
        best, farthest = (0.0, 0.0), -1.0
        for _ in range(4):
            far, angle = math.sqrt(dice.uniform(0, 1)), dice.uniform(-math.pi, math.pi)
            candidate = (far * math.cos(angle), far * math.sin(angle))
            nearest = min((math.dist(candidate, point) for point in points), default=2.0)
            if nearest > farthest:
                best, farthest = candidate, nearest
        points.append(best)
    return points


def _level_set(u: Tensor, v: Tensor, dice: _Dice) -> Tensor:
    """Where a sum of plane waves of about one wavelength exceeds a threshold."""
    waves, wavelength = 16, dice.log_uniform(0.25, 1.2)
    frequency = 2 * math.pi / wavelength * torch.linspace(0.5, 1.3, waves)
    direction, phase = (2 * math.pi * torch.rand(2, waves, generator=dice.generator)).unbind()
    weights = dice.normal(waves)
    weights = weights / weights.norm() * math.sqrt(2)
    field = torch.zeros(torch.broadcast_shapes(u.shape, v.shape))
    slope_u, slope_v = torch.zeros_like(field), torch.zeros_like(field)
    for k, t, p, w in zip(*(z.tolist() for z in (frequency, direction, phase, weights)), strict=True):
        argument = k * math.cos(t) * u + k * math.sin(t) * v + p
        field += w * argument.cos()
        slope = -w * k * argument.sin()
        slope_u += math.cos(t) * slope
        slope_v += math.sin(t) * slope
    threshold = dice.uniform(0.2, 1.4)
    distance = (threshold - field) / torch.sqrt(slope_u**2 + slope_v**2 + 0.1 / wavelength**2)
    return torch.maximum(distance, torch.hypot(u, v) - dice.uniform(0.8, _RIM))


_FAMILIES: tuple[_Family, ...] = (_none, _circles, _polygons, _mixture, _slots, _grid, _net, _level_set)
_SHARES = (0.03, 0.17, 0.2, 0.14, 0.06, 0.14, 0.13, 0.13)
