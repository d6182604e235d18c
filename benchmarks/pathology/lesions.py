"""Lesions that are planted: ellipses, where they may lie, and how their contrast is measured.

What is planted is known, so that what a reconstruction made of it can be told from what was there anyway, and
what stands where nothing was planted is known to be false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recon.calibration import object_region
from recon.errors import ReconError

GAP = 1.5
"""Pixels between an ellipse and its ring: the blur of an edge belongs to neither."""

SUPERSAMPLING = 8
"""Points along each side of a pixel by which the part of it that an ellipse covers is counted."""

ASPECT = 0.75
"""Short over long axis."""

BRIGHTNESS = (0.15, 0.8)
"""Smallest and largest value, of the image's maximum, of the tissue into which a lesion is planted."""


@dataclass(frozen=True)
class Lesion:
    """An ellipse that adds to an image whose maximum is 1.

    Attributes
    ----------
    row, column : float
        Centre, in pixels; whole numbers are the centres of pixels.
    size : float
        Long semi-axis in pixels; the short one is :data:`ASPECT` of it.
    angle : float
        Of the long axis against the rows, in radians.
    contrast : float
        What it adds, of the image's maximum; negative for a dark lesion.
    """

    row: float
    column: float
    size: float
    angle: float
    contrast: float

    def coverage(self, shape: tuple[int, int], grown: float = 0.0) -> np.ndarray:
        """Part of every pixel that lies in the ellipse, (H, W) in [0, 1]; `grown` is added to both axes."""
        reach = math.ceil(self.size + grown) + 1
        rows, columns = (
            np.arange(max(round(at) - reach, 0), min(round(at) + reach + 1, side))
            for at, side in zip((self.row, self.column), shape, strict=True)
        )
        inside = (np.arange(SUPERSAMPLING) + 0.5) / SUPERSAMPLING - 0.5
        down = (rows[:, None] + inside).ravel() - self.row
        right = (columns[:, None] + inside).ravel() - self.column
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        along = cosine * right[None] + sine * down[:, None]
        across = cosine * down[:, None] - sine * right[None]
        ellipse = (along / (self.size + grown)) ** 2 + (across / (ASPECT * self.size + grown)) ** 2 <= 1
        parts = ellipse.reshape(len(rows), SUPERSAMPLING, len(columns), SUPERSAMPLING).mean(axis=(1, 3))
        whole = np.zeros(shape)
        whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = parts
        return whole

    def site(self, shape: tuple[int, int]) -> Site:
        """Pixels that belong to the lesion, and those of the ring around it."""
        outer = self.coverage(shape, GAP + ring_width(self.size)) >= 0.5
        return Site(
            np.flatnonzero(self.coverage(shape) >= 0.5),
            np.flatnonzero(outer & (self.coverage(shape, GAP) < 0.5)),
        )


@dataclass(frozen=True, eq=False)
class Site:
    """Where a lesion's contrast is measured: flat indices of its pixels, and of the ring around it."""

    inside: np.ndarray
    ring: np.ndarray

    def contrast(self, image: np.ndarray) -> float:
        """Mean inside less mean of the ring of an image (H, W), in its units."""
        values = image.ravel()
        return float(values[self.inside].mean() - values[self.ring].mean())


def ring_width(size: float) -> float:
    """Pixels from the inner to the outer edge of the ring around a lesion of this long semi-axis."""
    return max(2.0, size / 2)


def footprint(size: float) -> float:
    """Radius in pixels of lesion and ring together."""
    return size + GAP + ring_width(size)


def plant(image: np.ndarray, lesions: Sequence[Lesion]) -> np.ndarray:
    """Add lesions to an image (H, W) of magnitudes of maximum 1.

    Raises
    ------
    ReconError
        If the result leaves [0, 1]: the scale of the image must stay what it is.
    """
    shape = (image.shape[0], image.shape[1])
    result = image + sum((lesion.contrast * lesion.coverage(shape) for lesion in lesions), np.zeros(shape))
    if result.min() < 0 or result.max() > max(1.0, float(image.max())):
        raise ReconError(
            f"planted lesions take the image to [{result.min():.2f}, {result.max():.2f}], outside of [0, 1]"
        )
    return result.astype(image.dtype)


def choose_lesions(
    image: np.ndarray, sizes: Sequence[float], contrasts: Sequence[float], seed: int
) -> list[Lesion]:
    """Find a place for a lesion of every size and contrast, the largest first, none touching another's ring.

    A place is drawn from the evenest quarter of the tissue that is neither too dark nor too bright, so that
    the ring tells what the tissue under the lesion was.

    Parameters
    ----------
    image : numpy.ndarray
        (H, W) magnitudes of maximum 1.
    sizes : sequence of float
        Long semi-axes in pixels, at least 1.
    contrasts : sequence of float
        Of the image's maximum, not zero.
    seed : int
        Of the places and the angles.

    Raises
    ------
    ReconError
        If a size or a contrast cannot be, or there is no room.
    """
    if any(not 1 <= size < math.inf for size in sizes) or not sizes:
        raise ReconError(f"sizes of lesions are numbers of pixels from 1, got {list(sizes)}")
    if any(not 0 < abs(contrast) < 1 for contrast in contrasts) or not contrasts:
        raise ReconError(f"contrasts of lesions lie between -1 and 1 and are not 0, got {list(contrasts)}")
    rng = np.random.default_rng(seed)
    taken = np.zeros(image.shape, dtype=bool)
    lesions = []
    for size in sorted(sizes, reverse=True):
        inner, roughness = _interior(image, size), _roughness(image, size)
        for contrast in sorted(contrasts, key=abs):
            low, high = max(BRIGHTNESS[0], 0.02 - contrast), min(BRIGHTNESS[1], 0.98 - contrast)
            even = inner & (_extreme(image, size, low=True) > low) & (_extreme(image, size, low=False) < high)
            free = even & ~_near(taken, footprint(size) + 1)
            if not free.any():
                raise ReconError(
                    f"there is no room for a lesion of {size:g} pixels and contrast {contrast:g}: "
                    "plant fewer or smaller ones"
                )
            smooth = free & (roughness <= np.quantile(roughness[free], 0.25))
            row, column = (int(v) for v in rng.choice(np.argwhere(smooth)))
            lesion = Lesion(row, column, size, float(rng.uniform(0, math.pi)), contrast)
            lesions.append(lesion)
            taken |= _disc(image.shape, row, column, footprint(size))
    return lesions


def empty_sites(
    image: np.ndarray, lesions: Sequence[Lesion], size: float, count: int, seed: int
) -> list[Site]:
    """Draw places inside the object where nothing was planted, for lesions of a size.

    Parameters
    ----------
    image : numpy.ndarray
        (H, W) magnitudes.
    lesions : sequence of Lesion
        What was planted: no place overlaps with one or its ring.
    size : float
        Long semi-axis in pixels.
    count : int
        How many places; fewer if there are not as many. They may overlap with each other.
    seed : int
        Of the draw.

    Raises
    ------
    ReconError
        If there is no such place.
    """
    shape = (image.shape[0], image.shape[1])
    taken = np.zeros(shape, dtype=bool)
    for lesion in lesions:
        taken |= _disc(shape, lesion.row, lesion.column, footprint(lesion.size))
    places = np.argwhere(_interior(image, size) & ~_near(taken, footprint(size)))
    if len(places) == 0:
        raise ReconError(f"there is no place without a lesion for one of {size:g} pixels")
    rng = np.random.default_rng([seed, round(1000 * size)])
    chosen = rng.permutation(len(places))[:count]
    angles = rng.uniform(0, math.pi, size=len(chosen))
    return [
        Lesion(int(row), int(column), size, float(angle), 1.0).site(shape)
        for (row, column), angle in zip(places[chosen], angles, strict=True)
    ]


def _interior(image: np.ndarray, size: float) -> np.ndarray:
    """Pixels from which the whole footprint lies in the object and in the image."""
    from scipy import ndimage

    region = np.pad(object_region(image), 1)
    return ndimage.distance_transform_edt(region)[1:-1, 1:-1] > footprint(size)


def _near(taken: np.ndarray, distance: float) -> np.ndarray:
    from scipy import ndimage

    return ndimage.distance_transform_edt(~taken) <= distance if taken.any() else taken


def _disc(shape: tuple[int, ...], row: float, column: float, radius: float) -> np.ndarray:
    down, right = np.ogrid[: shape[0], : shape[1]]
    return (down - row) ** 2 + (right - column) ** 2 <= radius**2


def _roughness(image: np.ndarray, size: float) -> np.ndarray:
    """Variance of the image over a square as wide as the footprint."""
    from scipy import ndimage

    width = 2 * math.ceil(footprint(size)) + 1
    mean = ndimage.uniform_filter(image.astype(float), width)
    return ndimage.uniform_filter(image.astype(float) ** 2, width) - mean**2


def _extreme(image: np.ndarray, size: float, *, low: bool) -> np.ndarray:
    """Smallest or largest value over a square that holds the lesion."""
    from scipy import ndimage

    width = 2 * math.ceil(size) + 1
    return (ndimage.minimum_filter if low else ndimage.maximum_filter)(image, width)
