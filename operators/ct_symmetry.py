"""Views of a scan that see a turned or mirrored image as another view sees the image.

The square grid of pixels, centred on the axis of rotation, stays what it is under quarter turns and
mirroring, and a ray goes over into a ray of another view. So of the views that belong together the system
matrix needs the rows of one only: the others are its products with the turned and mirrored images. A product
with n images reads the matrix once, which is what takes the time, and the matrix is up to n times smaller.

With M = R^q F^m, where F takes y to -y and R is a quarter turn, a parallel ray ``(t, u)`` goes over into
``(q π/2 + t, u)``, or ``(q π/2 - t, u)`` if mirrored, and ``(t + π, -u)`` is the same as ``(t, u)``. The rays
of a fan do so too, but where they are mirrored it is into ``(q π/2 - t + π, -u)``. With -u the elements of
the detector are reversed: k must have its counterpart at ``K - 1 - k``, so its offset must be 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from operators.base import Shape
from operators.ct_geometry import FanBeam, ParallelBeam

# Of angles, in radians: no more than what computing them leaves, so that no ray is moved to speak of.
_TOLERANCE = 1e-9
_TURN = round(2 * math.pi / _TOLERANCE)
# Sets of images that are tried; scans with a pattern have a handful.
_MOST_CHOICES = 8


@dataclass(frozen=True, order=True)
class Motion:
    """A motion of the image that keeps its grid: mirrored top to bottom, or not, then quarter turns."""

    mirrored: bool = False
    quarters: int = 0

    def moved(self, x: Tensor) -> Tensor:
        """Compose the image with the motion, ``(..., H, W)``: the value at p is that of `x` at M p."""
        return (x.mT if self.quarters % 2 else x).flip(self._flips)

    def undone(self, x: Tensor) -> Tensor:
        """Reverse `moved`, which is its adjoint too."""
        flipped = x.flip(self._flips)
        return flipped.mT if self.quarters % 2 else flipped

    @property
    def _flips(self) -> list[int]:
        """Axes that are reversed, after those of a quarter turn have been exchanged."""
        flips = [(self.quarters in (2, 3)) != self.mirrored, self.quarters in (1, 2)]
        return [axis for axis, flip in zip((-2, -1), flips, strict=True) if flip]


@dataclass(frozen=True)
class Place:
    """Where a view is found.

    Parameters
    ----------
    stored : int
        Which of the stored views sees what it sees.
    image : int
        In which of the moved images.
    reversed : bool
        Whether the elements of the detector are in the opposite order.
    """

    stored: int
    image: int = 0
    reversed: bool = False


@dataclass(frozen=True)
class ViewGroups:
    """Which views are stored, and how the others follow from them.

    Parameters
    ----------
    stored : tuple of int
        Views of the geometry whose rows make up the matrix, in their order there.
    motions : tuple of Motion
        The n images that are multiplied, the first as it is.
    places : tuple of Place
        Where each view of the geometry is found; no two at the same.
    """

    stored: tuple[int, ...]
    motions: tuple[Motion, ...]
    places: tuple[Place, ...]

    def pixels(self, image_shape: Shape) -> list[Tensor]:
        """Pixel that each pixel is moved to, for each motion; int32 ``(H W,)`` on the CPU."""
        grid = torch.arange(math.prod(image_shape), dtype=torch.int32).reshape(image_shape)
        return [motion.moved(grid).reshape(-1) for motion in self.motions]

    def rays(self, num_detectors: int) -> Tensor:
        """Find each ray in the product of the stored rows with the moved images.

        Parameters
        ----------
        num_detectors : int
            Number of detector elements K.

        Returns
        -------
        Tensor
            Indices into the flattened ``(stored K, n)``, int64 ``(views K,)``.
        """
        stored, image, reverse = (
            torch.tensor([getattr(place, name) for place in self.places])[:, None]
            for name in ("stored", "image", "reversed")
        )
        elements = torch.arange(num_detectors)
        elements = torch.where(reverse, elements.flip(0), elements)
        return ((stored * num_detectors + elements) * len(self.motions) + image).reshape(-1)

    def images(self, x: Tensor) -> Tensor:
        """Lay the moved images side by side, ``(b, H, W)`` to ``(H W, n b)``."""
        # What is beside one another in the result is brought together once, not once for each motion.
        items = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        columns = x.new_empty(*x.shape[1:], len(self.motions), len(x))
        for index, motion in enumerate(self.motions):
            columns[:, :, index] = motion.moved(items).permute(1, 2, 0)
        return columns.view(-1, len(self.motions) * len(x))

    def image(self, columns: Tensor, image_shape: Shape) -> Tensor:
        """Move images back and add them up, ``(H W, n b)`` to ``(b, H, W)``: the adjoint of `images`."""
        moved = columns.reshape(*image_shape, len(self.motions), -1).permute(2, 3, 0, 1)
        total = moved[0].permute(1, 2, 0).contiguous()
        for motion, part in zip(self.motions[1:], moved[1:], strict=True):
            total += motion.undone(part).permute(1, 2, 0)
        return total.permute(2, 0, 1)


def view_groups(geometry: ParallelBeam | FanBeam, image_shape: Shape) -> ViewGroups:
    """Find the views that are best stored.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    image_shape : (int, int)
        Height and width in pixels; quarter turns need a square, half turns and mirroring do not.

    Returns
    -------
    ViewGroups
        All views as they are, where there is no symmetry worth it.
    """
    relations = _relations(geometry, image_shape)
    angles = np.array(geometry.angles)
    # For every relation the angle of the view that a view goes over into.
    targets = np.stack(
        [
            (-angles if motion.mirrored else angles) + (motion.quarters + 2 * reverse) * math.pi / 2
            for motion, reverse in relations
        ]
    )
    own, wanted = _rounded(angles), _rounded(targets)
    search = _Search(own.tolist(), wanted.T.tolist(), relations)
    best = ViewGroups(
        tuple(range(len(angles))), (Motion(),), tuple(Place(view) for view in range(len(angles)))
    )
    for motions in search.choices():
        groups = search.grouped(motions)
        if _cost(groups) < _cost(best):
            best = groups
    return best


def _cost(groups: ViewGroups) -> float:
    """Time of a product: with n columns instead of one it takes about √n times as long."""
    return len(groups.stored) * math.sqrt(len(groups.motions))


def _relations(geometry: ParallelBeam | FanBeam, image_shape: Shape) -> list[tuple[Motion, bool]]:
    """Motions that take views to views, and whether the detector is reversed."""
    centred = geometry.detector_offset == 0
    relations = []
    for mirrored in (False, True):
        if isinstance(geometry, FanBeam):
            reverse = [mirrored] if centred or not mirrored else []
        else:
            reverse = [False, True] if centred else [False]
        for quarters in range(0, 4, 1 if image_shape[0] == image_shape[1] else 2):
            relations += [(Motion(mirrored, quarters), r) for r in reverse]
    return relations


def _rounded(angles: np.ndarray) -> np.ndarray:
    """Angles within a turn as multiples of the tolerance, int64."""
    return np.rint(np.mod(angles, 2 * math.pi) / _TOLERANCE).astype(np.int64) % _TURN


class _Search:
    """Views by their angle, and the attempts to group them."""

    def __init__(
        self, own: Sequence[int], wanted: Sequence[Sequence[int]], relations: Sequence[tuple[Motion, bool]]
    ):
        self._own, self._wanted, self._relations = own, wanted, relations
        # In the order of angles, whatever that of the views: so each group begins at the same end.
        self._order = sorted(range(len(own)), key=own.__getitem__)

    def choices(self) -> list[list[Motion]]:
        """Sets of motions that connect a view with others, the most frequent ones."""
        count = Counter(self._own)
        found: Counter[tuple[Motion, ...]] = Counter()
        for own, wanted in zip(self._own, self._wanted, strict=True):
            count[own] -= 1
            reached = {
                motion
                for (motion, _), angle in zip(self._relations, wanted, strict=True)
                if any(count[near] for near in _near(angle))
            }
            count[own] += 1
            found[tuple(sorted(reached - {Motion()}))] += 1
        return [list(motions) for motions, _ in found.most_common(_MOST_CHOICES) if motions]

    def grouped(self, motions: Sequence[Motion]) -> ViewGroups:
        """Take view after view as stored, each with the views that these motions take it to."""
        free: dict[int, list[int]] = {}
        for view in reversed(self._order):
            free.setdefault(self._own[view], []).append(view)
        stored: list[int] = []
        found: dict[int, tuple[int, Motion, bool]] = {}
        for view in self._order:
            if view in found:
                continue
            free[self._own[view]].remove(view)
            found[view] = (len(stored), Motion(), False)
            used = {Motion()}
            for (motion, reverse), angle in zip(self._relations, self._wanted[view], strict=True):
                if motion not in motions or motion in used:
                    continue
                near = next((a for a in _near(angle) if free.get(a)), None)
                if near is not None:
                    used.add(motion)
                    found[free[near].pop()] = (len(stored), motion, reverse)
            stored.append(view)
        needed = sorted({motion for _, motion, _ in found.values()})
        index = {motion: i for i, motion in enumerate(needed)}
        places = (found[view] for view in range(len(self._own)))
        return ViewGroups(
            tuple(stored), tuple(needed), tuple(Place(n, index[motion], r) for n, motion, r in places)
        )


def _near(angle: int) -> tuple[int, int, int]:
    """A rounded angle and its neighbours: equal ones may have been rounded apart."""
    return angle, (angle + 1) % _TURN, (angle - 1) % _TURN
