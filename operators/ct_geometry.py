"""Scan geometries of CT: where the rays of each view run.

Lengths are in mm and angles in radians. Pixel (i, j) of an image ``(H, W)`` with square pixels of side p has
its centre at ``x = (j - (W-1)/2) p``, ``y = ((H-1)/2 - i) p``: row 0 is on top and y points up. Detector
element k of K is at ``u = (k - (K-1)/2) detector_spacing + detector_offset``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np

from operators.base import Shape
from operators.errors import OperatorError

# Angles beyond two turns are degrees more often than they are a scan.
_LARGEST_ANGLE = 4 * math.pi + 1e-6
# How far an angle may lie beyond the end of an arc and still belong to it: what the rounding of files leaves.
_ANGLE_TOLERANCE = 1e-6
LARGEST_GAP = 3.0
"""A gap between views this many times the usual one (`usual_gap`) is where nothing was measured."""


class _Views:
    """What all geometries share: an ordered set of views."""

    angles: Sequence[float]

    @property
    def num_views(self) -> int:
        """Number of views."""
        return len(self.angles)

    def subset(self, indices: Iterable[int]) -> Self:
        """Keep some of the views, in the order given.

        Parameters
        ----------
        indices : iterable of int
            Which views; negative ones count from the end.

        Returns
        -------
        Same type
            The geometry with these views.

        Raises
        ------
        OperatorError
            If there are none, or one does not exist or is no integer.
        """
        kept = checked_indices(indices, self.num_views)
        return replace(self, angles=tuple(self.angles[i] for i in kept))  # type: ignore[type-var]

    def hash(self) -> str:
        """SHA-256 of everything the geometry is made of, the same in every process."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclasses are frozen


class _Lines(_Views):
    """What the geometries of a slice share: one line of detector elements."""

    num_detectors: int
    detector_spacing: float
    detector_offset: float

    @property
    def range_shape(self) -> Shape:
        """Shape of a sinogram, ``(views, detectors)``."""
        return (self.num_views, self.num_detectors)

    @property
    def detector_positions(self) -> np.ndarray:
        """Coordinate u of each detector element in mm, float64 ``(K,)``."""
        steps = np.arange(self.num_detectors) - (self.num_detectors - 1) / 2
        return steps * self.detector_spacing + self.detector_offset

    @property
    def detector_edges(self) -> np.ndarray:
        """Coordinates u of the two ends of the detector in mm, float64 ``(2,)``."""
        return self.detector_positions[[0, -1]] + np.array([-0.5, 0.5]) * self.detector_spacing

    def _check_line(self) -> None:
        name = type(self).__name__
        self._set("angles", _checked_angles(self.angles, name))
        self._set("num_detectors", _positive_integer(self.num_detectors, "num_detectors", name))
        self._set("detector_spacing", _positive(self.detector_spacing, "detector_spacing", name))
        self._set("detector_offset", _finite(self.detector_offset, "detector_offset", name))


@dataclass(frozen=True)
class ParallelBeam(_Lines):
    """Parallel rays: at angle t they run along ``(sin t, -cos t)`` and end at ``u = x cos t + y sin t``.

    Parameters
    ----------
    angles : sequence of float
        Angle of each view in radians; any set, in any order.
    num_detectors : int
        Number of detector elements K.
    detector_spacing : float
        Distance between their centres in mm.
    detector_offset : float
        Position of the middle of the detector in mm; 0 if the axis of rotation is seen there.

    Raises
    ------
    OperatorError
        If a number is not what it should be, or the angles look like degrees.
    """

    angles: Sequence[float]
    num_detectors: int
    detector_spacing: float
    detector_offset: float = 0.0

    def __post_init__(self) -> None:
        self._check_line()

    @property
    def fan_angle(self) -> float:
        """Angle between the outermost rays of a view: 0."""
        return 0.0

    @property
    def short_scan_arc(self) -> float:
        """Smallest arc that measures every ray: half a turn."""
        return math.pi

    @property
    def field_of_view(self) -> float:
        """Diameter in mm of the disc around the axis of rotation that whole turns show to the detector."""
        return 2 * float(np.abs(self.detector_edges).max())

    def rays(self, view: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lines that end on the detector.

        Parameters
        ----------
        view : int
            Index of the view.
        positions : ndarray
            Coordinates u in mm, ``(n,)``.

        Returns
        -------
        points, directions : ndarray
            A point of each line in mm and a vector along it, of any length; float64 ``(n, 2)``, x first.
        """
        cosine, sine = math.cos(self.angles[view]), math.sin(self.angles[view])
        points = positions[:, None] * np.array([cosine, sine])
        return points, np.broadcast_to(np.array([sine, -cosine]), points.shape)


@dataclass(frozen=True)
class FanBeam(_Lines):
    """Rays from a point source: at angle t it is at ``source_origin · (sin t, -cos t)``.

    The detector lies opposite, `source_detector` away from the source, and u increases along ``(cos t, sin
    t)``. On a flat detector u is the distance from the central ray, on a curved (equiangular) one the length
    of the arc around the source, so that the ray makes the angle ``u / source_detector`` with the central
    one.

    Parameters
    ----------
    angles : sequence of float
        Angle of each view in radians; any set, in any order.
    num_detectors : int
        Number of detector elements K.
    detector_spacing : float
        Distance between their centres in mm, on the detector.
    source_origin : float
        Distance from the source to the axis of rotation in mm.
    source_detector : float
        Distance from the source to the detector in mm.
    detector_offset : float
        Position of the middle of the detector in mm, on the detector; 0 if the central ray, the one through
        the axis of rotation, ends there.
    detector : {"flat", "curved"}
        Shape of the detector.

    Raises
    ------
    OperatorError
        If a number is not what it should be, the angles look like degrees, or the shape is unknown.
    """

    angles: Sequence[float]
    num_detectors: int
    detector_spacing: float
    source_origin: float
    source_detector: float
    detector_offset: float = 0.0
    detector: str = "flat"

    def __post_init__(self) -> None:
        self._check_line()
        for name in ("source_origin", "source_detector"):
            self._set(name, _positive(getattr(self, name), name, "FanBeam"))
        if self.detector not in ("flat", "curved"):
            raise OperatorError(f"detector of FanBeam is 'flat' or 'curved', not {self.detector!r}.")
        if self.detector == "curved" and max(abs(self.detector_edges)) >= math.pi / 2 * self.source_detector:
            raise OperatorError(
                f"a curved detector that reaches {max(abs(self.detector_edges)):.5g} mm, at a distance of "
                f"{self.source_detector:.5g} mm from the source, looks behind it."
            )

    def ray_angles(self, positions: np.ndarray) -> np.ndarray:
        """Angle between the central ray and those to coordinates u (mm), radians, of the same shape."""
        relative = positions / self.source_detector
        return np.arctan(relative) if self.detector == "flat" else relative

    @property
    def fan_angle(self) -> float:
        """Angle between the rays to the two ends of the detector, radians."""
        first, last = self.ray_angles(self.detector_edges)
        return float(last - first)

    @property
    def short_scan_arc(self) -> float:
        """Smallest arc that measures every line through the field of view: π plus the fan, if centred."""
        return math.pi + 2 * float(np.abs(self.ray_angles(self.detector_edges)).max())

    @property
    def field_of_view(self) -> float:
        """Diameter in mm of the disc around the axis of rotation that whole turns show to the detector."""
        return 2 * self.source_origin * math.sin((self.short_scan_arc - math.pi) / 2)

    @property
    def magnification(self) -> float:
        """How much larger the axis of rotation appears on the detector."""
        return self.source_detector / self.source_origin

    def rays(self, view: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lines that end on the detector; see `ParallelBeam.rays`. The points are the source."""
        cosine, sine = math.cos(self.angles[view]), math.sin(self.angles[view])
        gamma = self.ray_angles(positions)[:, None]
        central, along = np.array([-sine, cosine]), np.array([cosine, sine])
        directions = np.cos(gamma) * central + np.sin(gamma) * along
        source = self.source_origin * np.array([sine, -cosine])
        return np.broadcast_to(source, directions.shape), directions


@dataclass(frozen=True)
class ConeBeam(_Views):
    """Rays from a point source to a flat detector with rows, rotating around the z-axis.

    In the plane z = 0 it is a `FanBeam` with a flat detector; the rows are along z, row 0 at the bottom (the
    smallest z), as slice 0 of a volume is.

    Parameters
    ----------
    angles : sequence of float
        Angle of each view in radians.
    detector_shape : (int, int)
        Number of rows and of columns.
    detector_spacing : (float, float)
        Distance between rows and between columns in mm, on the detector.
    source_origin : float
        Distance from the source to the axis of rotation in mm.
    source_detector : float
        Distance from the source to the detector in mm.
    detector_offset : (float, float)
        Position of the middle of the detector in mm, along z and along u.

    Raises
    ------
    OperatorError
        If a number is not what it should be, or the angles look like degrees.
    """

    angles: Sequence[float]
    detector_shape: tuple[int, int]
    detector_spacing: tuple[float, float]
    source_origin: float
    source_detector: float
    detector_offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        name = "ConeBeam"
        self._set("angles", _checked_angles(self.angles, name))
        for field, check in (
            ("detector_shape", _positive_integer),
            ("detector_spacing", _positive),
            ("detector_offset", _finite),
        ):
            values = getattr(self, field)
            if not isinstance(values, Sequence) or len(values) != 2:
                raise OperatorError(f"{field} of ConeBeam is a pair (along z, along u), got {values!r}.")
            self._set(field, tuple(check(value, field, name) for value in values))
        for field in ("source_origin", "source_detector"):
            self._set(field, _positive(getattr(self, field), field, name))

    @property
    def range_shape(self) -> Shape:
        """Shape of a measurement, ``(rows, views, columns)``: one sinogram a row, as of a stack of slices."""
        return (self.detector_shape[0], self.num_views, self.detector_shape[1])


def equispaced_angles(num_views: int, arc: float = math.pi, start: float = 0.0) -> tuple[float, ...]:
    """Angles of equal distance over an arc, whose end is not among them.

    Parameters
    ----------
    num_views : int
        Number of angles.
    arc : float
        Length of the arc in radians: π for parallel rays, 2π for a fan.
    start : float
        The first angle in radians.

    Returns
    -------
    tuple of float
        ``start + arc * i / num_views``, radians.

    Raises
    ------
    OperatorError
        If the number is not positive or the arc is not finite.
    """
    count = _positive_integer(num_views, "num_views", "equispaced_angles")
    arc, start = (_finite(v, n, "equispaced_angles") for v, n in ((arc, "arc"), (start, "start")))
    return tuple(start + arc * i / count for i in range(count))


def view_indices(
    geometry: ParallelBeam | FanBeam | ConeBeam,
    num_views: int | None = None,
    arc: float | None = None,
    start: float = 0.0,
) -> tuple[int, ...]:
    """Choose views: those within an arc, all of them or some evenly spread.

    With the result i, ``geometry.subset(i)`` belongs to ``sinogram[..., i, :]``.

    Parameters
    ----------
    geometry : ParallelBeam, FanBeam or ConeBeam
        The full scan.
    num_views : int, optional
        How many to keep, evenly spread over the indices of those within the arc.
    arc : float, optional
        Keep the angles from `start` to `start + arc` radians, both ends included, modulo whole turns.
    start : float
        Where the arc begins, radians.

    Returns
    -------
    tuple of int
        Indices, increasing.

    Raises
    ------
    OperatorError
        If there is no view within the arc, or fewer than `num_views`.
    """
    kept = list(range(geometry.num_views))
    if arc is not None:
        arc = _positive(arc, "arc", "view_indices")
        if arc > 2 * math.pi + _ANGLE_TOLERANCE:
            raise OperatorError(f"an arc is in radians, at most 2π, got {arc:.5g}.")
        beyond = np.mod(np.array(geometry.angles) - start + _ANGLE_TOLERANCE, 2 * math.pi)
        kept = np.flatnonzero(beyond <= arc + 2 * _ANGLE_TOLERANCE).tolist()
        if not kept:
            raise OperatorError(
                f"no view lies within {math.degrees(arc):.5g}° from {math.degrees(start):.5g}°: the angles "
                f"are {math.degrees(min(geometry.angles)):.5g}° to {math.degrees(max(geometry.angles)):.5g}°."
            )
    if num_views is not None:
        count = _positive_integer(num_views, "num_views", "view_indices")
        if count > len(kept):
            raise OperatorError(f"{count} views are asked of a geometry that has {len(kept)} there.")
        kept = [kept[i * len(kept) // count] for i in range(count)]
    return tuple(kept)


Geometry = TypeVar("Geometry", ParallelBeam, FanBeam, ConeBeam)


def sparse_view(geometry: Geometry, num_views: int) -> Geometry:
    """Keep `num_views` views, evenly spread over those there are; see `view_indices`."""
    return geometry.subset(view_indices(geometry, num_views))


def limited_angle(geometry: Geometry, arc: float, start: float = 0.0) -> Geometry:
    """Keep the views from `start` to `start + arc` radians, both included; see `view_indices`."""
    return geometry.subset(view_indices(geometry, arc=arc, start=start))


def checked_indices(indices: Iterable[int], count: int) -> list[int]:
    """Indices of views as non-negative integers.

    Raises
    ------
    OperatorError
        If there are none, or one does not exist or is no integer.
    """
    # Numbers of numpy and torch as Python's.
    kept = [i.item() if getattr(i, "ndim", None) == 0 else i for i in indices]  # type: ignore[attr-defined]
    for i in kept:
        if isinstance(i, bool) or not isinstance(i, int):
            raise OperatorError(
                f"views are chosen by integer indices, got {i!r}: of a mask give np.flatnonzero(mask)."
            )
    wrong = [i for i in kept if not -count <= i < count]
    if not kept or wrong:
        what = f"no view {wrong[0]}" if wrong else "at least one view is needed"
        raise OperatorError(f"{what}: the geometry has {count} views.")
    return [i % count for i in kept]


def view_gaps(angles: np.ndarray, period: float) -> np.ndarray:
    """Distance from each angle to the next, in increasing order, the last one back to the first."""
    turned = np.sort(np.mod(angles, period))
    return np.append(np.diff(turned), turned[0] + period - turned[-1])


def usual_gap(gaps: np.ndarray) -> float:
    """Distance between neighbouring views, of gaps that may contain where nothing was measured.

    Half of the arc lies in gaps up to this one, the largest left out: that may be beyond the end of the arc.
    Views measured again at the same angle lie no arc apart, and do not count.
    """
    rest = np.sort(gaps)[:-1]
    covered = np.cumsum(rest)
    if len(rest) == 0 or covered[-1] < _ANGLE_TOLERANCE:
        return float(gaps.max())
    return float(rest[np.searchsorted(covered, covered[-1] / 2)])


def _checked_angles(angles: Iterable[float], owner: str) -> tuple[float, ...]:
    try:
        values = tuple(float(angle) for angle in angles)
    except (TypeError, ValueError) as error:
        raise OperatorError(f"angles of {owner} are a sequence of numbers, in radians.") from error
    if not values:
        raise OperatorError(f"{owner} needs the angle of at least one view, got none.")
    if not all(math.isfinite(angle) for angle in values):
        raise OperatorError(f"angles of {owner} have NaN or infinite values.")
    largest = max(values, key=abs)
    if abs(largest) > _LARGEST_ANGLE:
        raise OperatorError(
            f"angles of {owner} are in radians, within two turns, and one is {largest:.5g}: are they degrees?"
        )
    return values


def _finite(value: float, name: str, owner: str) -> float:
    if not isinstance(value, int | float | np.floating | np.integer) or not math.isfinite(value):
        raise OperatorError(f"{name} of {owner} is a finite number, got {value!r}.")
    return float(value)


def _positive(value: float, name: str, owner: str) -> float:
    number = _finite(value, name, owner)
    if number <= 0:
        raise OperatorError(f"{name} of {owner} is positive, got {value!r}.")
    return number


def _positive_integer(value: int, name: str, owner: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise OperatorError(f"{name} of {owner} is a positive integer, got {value!r}.")
    return int(value)
