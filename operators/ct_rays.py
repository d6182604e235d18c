"""What each ray of a scan meets: the rows of the system matrix, ray by ray.

Two models of a line integral through square pixels. Both follow a ray along the axis on which it advances
faster, one row (or column) of pixels at a time, so that it meets at most two pixels at each step:

- ``joseph`` interpolates linearly between the two pixel centres beside the ray [1]_. Smooth in the position
  of the ray; the default.
- ``line`` takes the exact length of the ray in each pixel [2]_, as if the image were made of uniform squares.

References
----------
.. [1] P. M. Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE Trans. Med.
   Imaging 1:192-196, 1982.
.. [2] R. L. Siddon, "Fast calculation of the exact radiological path for a three-dimensional CT array", Med.
   Phys. 12:252-255, 1985.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from operators.base import Shape
from operators.ct_geometry import FanBeam, ParallelBeam

PROJECTORS = ("joseph", "line")


@dataclass(frozen=True)
class _Paths:
    """Rays that all advance faster along the same axis, as straight lines over the steps of that axis.

    At step i the ray is at ``base + slope * i`` on the other axis, in pixels.
    """

    rays: slice
    along_rows: bool
    base: np.ndarray
    slope: np.ndarray
    length: np.ndarray
    """Length of the ray within one step, mm."""


def largest_entries(
    geometry: ParallelBeam | FanBeam, image_shape: Shape, pixel_size: float, rays_per_detector: int = 1
) -> int:
    """Count entries of the system matrix, from above and closely, without making it."""
    total = 0
    for view in range(geometry.num_views):
        for paths in _paths(geometry, view, image_shape, pixel_size, rays_per_detector):
            steps, width = image_shape if paths.along_rows else image_shape[::-1]
            total += int(_steps_within(paths, steps, width)[1].sum())
    return 2 * total


def view_entries(
    geometry: ParallelBeam | FanBeam,
    view: int,
    image_shape: Shape,
    pixel_size: float,
    projector: str,
    rays_per_detector: int = 1,
    dtype: type[np.floating] = np.float64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the rows of the system matrix for one view.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    view : int
        Index of the view.
    image_shape : (int, int)
        Height and width in pixels.
    pixel_size : float
        Side of a pixel in mm.
    projector : {"joseph", "line"}
        Model of the line integral.
    rays_per_detector : int
        Rays over the width of a detector element, whose mean it measures.
    dtype : type
        Of the weights, float32 or float64; positions are computed in float64 for both.

    Returns
    -------
    counts : ndarray
        Number of entries of each detector element, int64 ``(K,)``.
    pixels : ndarray
        Index of each entry's pixel in the flattened image, int32 ``(entries,)``.
    weights : ndarray
        Its weight in mm, ``(entries,)``.
    """
    parts = [
        _entries(paths, image_shape, projector, dtype)
        for paths in _paths(geometry, view, image_shape, pixel_size, rays_per_detector)
    ]
    counts, pixels, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if rays_per_detector > 1:
        return _averaged(counts, pixels, weights, rays_per_detector)
    return counts, pixels, weights


def _paths(
    geometry: ParallelBeam | FanBeam, view: int, shape: Shape, pixel_size: float, rays_per_detector: int
) -> Iterator[_Paths]:
    """Cut the rays of a view, in order, into runs that advance along one axis."""
    positions = geometry.detector_positions
    if rays_per_detector > 1:
        within = (np.arange(rays_per_detector) + 0.5) / rays_per_detector - 0.5
        positions = (positions[:, None] + within * geometry.detector_spacing).reshape(-1)
    points, directions = geometry.rays(view, positions)
    # Column and row instead of x and y, in pixels.
    column = points[:, 0] / pixel_size + (shape[1] - 1) / 2
    row = (shape[0] - 1) / 2 - points[:, 1] / pixel_size
    across, down = directions[:, 0], -directions[:, 1]
    by_rows = np.abs(down) >= np.abs(across)
    length = pixel_size * np.hypot(across, down)
    turns = np.flatnonzero(by_rows[1:] != by_rows[:-1]) + 1
    for start, stop in zip([0, *turns], [*turns, len(positions)], strict=True):
        rays = slice(int(start), int(stop))
        along_rows = bool(by_rows[start])
        fast, slow = (down, across) if along_rows else (across, down)
        slope = slow[rays] / fast[rays]
        first, other = (row, column) if along_rows else (column, row)
        yield _Paths(
            rays, along_rows, other[rays] - slope * first[rays], slope, length[rays] / np.abs(fast[rays])
        )


def _steps_within(paths: _Paths, steps: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """First step at which each ray can meet a pixel, and at how many it can, from above; int64."""
    # A ray that does not drift is within at all steps or at none; a slope of almost 0 says the same.
    slope = np.where(np.abs(paths.slope) < 1e-9, 1e-9, paths.slope)
    ends = np.sort(np.stack([(-1 - paths.base) / slope, (width - paths.base) / slope]), axis=0)
    first, last = np.maximum(np.ceil(ends[0]) - 1, 0), np.minimum(np.floor(ends[1]) + 1, steps - 1)
    count = np.maximum(last - first + 1, 0)
    return np.where(count > 0, first, 0).astype(np.int64), count.astype(np.int64)


def _entries(
    paths: _Paths, shape: Shape, projector: str, dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the entries of a run of rays; see `view_entries`."""
    steps, width = shape if paths.along_rows else shape[::-1]
    # The steps of all rays one after the other, without those outside of the image.
    first, count = _steps_within(paths, steps, width)
    ends = np.cumsum(count)
    step = np.arange(ends[-1], dtype=np.int32) + np.repeat((first - ends + count).astype(np.int32), count)
    slope = np.repeat(paths.slope, count)
    position = slope * step
    position += np.repeat(paths.base, count)
    lower, upper_part = _beside(position, slope, projector, dtype)
    size = (len(lower), 2)
    pixels, weights, kept = np.empty(size, np.int32), np.empty(size, dtype), np.empty(size, bool)
    # As unsigned numbers, negative ones are out of range as well, with one comparison.
    np.less(lower.view(np.uint32), width, out=kept[:, 0])
    np.less((lower + np.int32(1)).view(np.uint32), width, out=kept[:, 1])
    if projector == "line":
        kept[:, 1] &= upper_part > 0
    along, across = (shape[1], 1) if paths.along_rows else (1, shape[1])
    step *= along
    lower *= across
    np.add(lower, step, out=pixels[:, 0])
    np.add(pixels[:, 0], across, out=pixels[:, 1])
    length = np.repeat(paths.length.astype(dtype), count)
    np.multiply(upper_part, length, out=weights[:, 1])
    np.subtract(length, weights[:, 1], out=weights[:, 0])
    dropped = np.searchsorted(ends, np.flatnonzero(~kept.reshape(-1)) // 2, side="right")
    return 2 * count - np.bincount(dropped, minlength=len(count)), pixels[kept], weights[kept]


@dataclass(frozen=True)
class ViewSteps:
    """A run of rays that advance along one axis, at every step of it.

    Attributes
    ----------
    rays : slice
        Which rays of the view these are.
    along_rows : bool
        Whether they advance from row to row; else from column to column, and pixels are those of the
        transposed image.
    pixels : ndarray
        Index of the lower of the two pixels beside each ray at each step, int32 ``(rays, steps)``, in the
        flattened image with a frame of one pixel around it; the upper one is the next.
    upper_part : ndarray
        Weight of the upper pixel, ``(rays, steps)``; that of the lower one is what is left to 1.
    length : ndarray
        Length of each ray within one step, mm, ``(rays,)``.
    """

    rays: slice
    along_rows: bool
    pixels: np.ndarray
    upper_part: np.ndarray
    length: np.ndarray


def view_steps(
    geometry: ParallelBeam | FanBeam,
    view: int,
    image_shape: Shape,
    pixel_size: float,
    projector: str,
    rays_per_detector: int = 1,
    dtype: type[np.floating] = np.float64,
) -> Iterator[ViewSteps]:
    """Follow the rays of one view through an image framed by zeros; parameters as of `view_entries`.

    The sum over the steps is what the rows of `view_entries` give, but nothing has to be stored.
    """
    for paths in _paths(geometry, view, image_shape, pixel_size, rays_per_detector):
        steps, width = image_shape if paths.along_rows else image_shape[::-1]
        step = np.arange(steps)
        position = paths.slope[:, None] * step
        position += paths.base[:, None]
        lower, upper_part = _beside(position, paths.slope[:, None], projector, dtype)
        # Where both pixels lie outside: on the frame, there is nothing either.
        outside = (lower < -1) | (lower >= width)
        lower[outside], upper_part[outside] = -1, 0
        lower += ((step + 1) * (width + 2) + 1).astype(np.int32)
        yield ViewSteps(paths.rays, paths.along_rows, lower, upper_part, paths.length.astype(dtype))


def _beside(
    position: np.ndarray, slope: np.ndarray, projector: str, dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray]:
    """Lower one of the two pixels beside each ray, int32, and the weight of the upper one."""
    if projector == "joseph":
        floor = np.floor(position)
        return floor.astype(np.int32), (position - floor).astype(dtype)
    # Within a step the ray drifts by at most one pixel, from position - drift/2 to position + drift/2. Pixel
    # j reaches from j - 1/2 to j + 1/2.
    drift = np.maximum(np.abs(slope), 1e-12)
    start = position - drift / 2
    floor = np.floor(start + 0.5)
    return floor.astype(np.int32), (1 - np.minimum((floor + 0.5 - start) / drift, 1)).astype(dtype)


def _averaged(
    counts: np.ndarray, pixels: np.ndarray, weights: np.ndarray, rays: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the rays of each detector element together: the mean, each pixel once."""
    from scipy.sparse import csr_array

    ends = np.concatenate([[0], np.cumsum(counts)])[::rays]
    size = int(pixels.max(initial=0)) + 1
    matrix = csr_array(
        (weights / weights.dtype.type(rays), pixels, ends.astype(np.int32)), shape=(len(ends) - 1, size)
    )
    matrix.sum_duplicates()
    return np.diff(matrix.indptr).astype(np.int64), matrix.indices, matrix.data
