"""Slices to cut training images of: all in memory, or of volumes that are read when they are needed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from priors.errors import PriorError
from priors.level import image_level

STAY = 50
"""Training steps after which one of the volumes in memory makes room for another, if not all have room."""

_EMPTY = 0.05
"""A slice with less than this share of the energy of its volume's strongest shows next to nothing."""

_TRIES = 10_000
"""Draws of a slice after which one gives up: so many empty or unreadable ones in a row are no accident."""


@runtime_checkable
class Slices(Protocol):
    """Where slices come from."""

    def __len__(self) -> int:
        """How many different slices (or stacks of neighbouring ones) there are."""

    def pick(self, generator: torch.Generator) -> Tensor:
        """Choose one at random: ``(H, W)``, or ``(K, H, W)`` for stacks; real or complex."""


class SliceList:
    """Slices ``(H, W)`` or stacks ``(K, H, W)`` in memory, each as likely as the others.

    Raises
    ------
    PriorError
        If there are none.
    """

    def __init__(self, slices: Sequence[Tensor]) -> None:
        if not slices:
            raise PriorError("there is no image to train on")
        self.slices = list(slices)

    def __len__(self) -> int:
        return len(self.slices)

    def pick(self, generator: torch.Generator) -> Tensor:
        """See :meth:`Slices.pick`."""
        return self.slices[int(torch.randint(len(self.slices), (1,), generator=generator))]


class OfSlices:
    """What image sources made of slices have in common: they pass through volumes as the slices do."""

    slices: Slices

    def __len__(self) -> int:
        return len(self.slices)

    def seek(self, step: int) -> None:
        """Make ready for a training step; see :meth:`LazySlices.seek`."""
        if isinstance(self.slices, LazySlices):
            self.slices.seek(step)

    def forget(self) -> None:
        """Let go of what was read; see :meth:`LazySlices.forget`."""
        if isinstance(self.slices, LazySlices):
            self.slices.forget()


class Volume(Protocol):
    """A volume on disk, or the slices of it that belong together.

    What is wrong with its file is a ``ValueError`` that names it.
    """

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def num_slices(self) -> int:
        """Known without reading the images."""

    @property
    def slice_bytes(self) -> int:
        """Memory that a slice takes, about."""

    @property
    def whole(self) -> bool:
        """Whether reading one slice takes about as long as reading all of them."""

    def read(self, start: int, stop: int) -> Tensor:
        """Read slices ``start`` to ``stop - 1``: ``(stop - start, H, W)``, float32 or complex64."""

    def energies(self) -> Tensor | None:
        """Energy of each slice up to a common factor, ``(num_slices,)``; None if not known without them."""


class LazySlices:
    """Slices of volumes that are read when they are first drawn, and kept as far as memory allows.

    Nearly empty slices are passed over. What cannot be read is passed over too and listed in ``failed``; what
    is drawn then follows from the generator and the files alone.

    Where all volumes together need more than ``memory``, as many as have room are drawn from at a time, and
    one makes room for the next every :data:`STAY` steps, in a random order that the seed decides. Which ones
    they are at a step depends on the step alone (:meth:`seek`), so that a resumed training sees the images
    that an uninterrupted one would have seen. Whoever draws what cannot be read draws again, with the next
    volume of the order in the place of the one that it was of.

    Parameters
    ----------
    volumes
        What to read.
    stack
        Neighbouring slices a draw; 1 for single slices ``(H, W)``, else stacks ``(stack, H, W)``.
    level
        Bring each draw to this level (:func:`priors.level.image_level`; of a stack, its slices' weighted with
        their energy). None leaves values as they are, and keeps empty slices: in a physical unit, air is an
        image like others.
    prepare
        Applied to slices as they are read.
    memory
        Bytes that images in memory may take.
    seed
        Of the order of volumes.

    Raises
    ------
    PriorError
        If there is no volume with enough slices, or not even one has room in memory.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        *,
        stack: int = 1,
        level: float | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        memory: float = float("inf"),
        seed: int = 0,
    ) -> None:
        if stack < 1:
            raise PriorError(f"the number of slices in a stack must be at least 1, got {stack}")
        self.volumes = [volume for volume in volumes if volume.num_slices >= stack]
        if not self.volumes:
            few = f" of at least {stack} slices" if stack > 1 else ""
            raise PriorError(f"there is no image to train on: no volume{few}")
        self.stack, self.level, self.prepare = stack, level, prepare
        self.failed: dict[str, str] = {}
        sizes = [volume.num_slices * volume.slice_bytes for volume in self.volumes]
        self.total_bytes = sum(sizes)
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        self.held = len(sizes) if self.total_bytes <= memory else int(memory // sizes[largest])
        if self.held < 1:
            raise PriorError(
                f"{self.volumes[largest].name} needs {sizes[largest] / 2**30:.2g} GiB of memory, more than "
                f"the {memory / 2**30:.2g} GiB that images may take"
            )
        if self.held < len(sizes):
            self.order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
        else:
            self.order = list(range(len(sizes)))
        self._cache: dict[int, dict[int, tuple[Tensor, float, float]]] = {}
        self._shown: dict[int, Tensor] = {}
        self._unreadable: dict[int, set[int]] = {}
        self._pool: list[int] = []
        self.seek(0)

    def __len__(self) -> int:
        return sum(map(self._draws, range(len(self.volumes))))

    def seek(self, step: int) -> None:
        """Choose the volumes that a training step draws from, and let go of the others."""
        first = step // STAY if self.held < len(self.order) else 0
        pool = [self.order[(first + place) % len(self.order)] for place in range(self.held)]
        if pool == self._pool:
            return  # and keep what stands in for the unreadable
        self._first, self._pool, self._ends = first, pool, list(accumulate(map(self._draws, pool)))
        for gone in set(self._cache) - set(self._pool):
            del self._cache[gone]

    def forget(self) -> None:
        """Let go of all images in memory; they are read again if they are drawn again."""
        self._cache.clear()

    def pick(self, generator: torch.Generator) -> Tensor:
        """See :meth:`Slices.pick`; at the prior's level if there is one.

        Raises
        ------
        PriorError
            If nothing can be read, or every slice is empty.
        """
        pool, ends, following = self._pool, self._ends, self._first + self.held
        for _ in range(_TRIES):
            drawn = int(torch.randint(ends[-1], (1,), generator=generator))
            place = bisect_right(ends, drawn)
            number, start = pool[place], drawn - (ends[place - 1] if place else 0)
            if start not in self._unreadable.get(number, ()):
                try:
                    image = self._stack(number, start)
                except ValueError as error:
                    self._pass_over(number, start, error)
                else:
                    if image is not None:
                        return image
                    continue
            if self.held < len(self.order):
                # For this draw alone: what a volume turned out to be must not change the draws after it, or a
                # resumed training, which has yet to find out, would see other images.
                while self.order[following % len(self.order)] in pool:
                    following += 1
                pool = [*pool[:place], self.order[following % len(self.order)], *pool[place + 1 :]]
                ends = list(accumulate(map(self._draws, pool)))
        raise PriorError("there is no image to train on: every slice that was drawn is empty or unreadable")

    def _draws(self, number: int) -> int:
        """How many slices or stacks a volume has."""
        return self.volumes[number].num_slices - self.stack + 1

    def _pass_over(self, number: int, start: int, error: ValueError) -> None:
        """Remember what cannot be read; raise if that is everything."""
        volume = self.volumes[number]
        self.failed.setdefault(volume.name, str(error))
        # Slices that are read one by one are unreadable one by one, whichever of them is drawn first.
        starts = range(self._draws(number)) if volume.whole else (start,)
        self._unreadable.setdefault(number, set()).update(starts)
        if sum(map(len, self._unreadable.values())) == len(self):
            raise PriorError(f"no image can be read: {next(iter(self.failed.values()))}") from None

    def _stack(self, number: int, start: int) -> Tensor | None:
        """Slices from ``start`` on at the level; None if the middle one is nearly empty."""
        slices = [self._slice(number, start + offset) for offset in range(self.stack)]
        factor = 1.0
        if self.level is not None:
            middle = start + self.stack // 2
            if not bool(self._shown[number][middle]) or slices[self.stack // 2][2] == 0:
                return None
            energy = sum(weight for _, _, weight in slices)
            factor = self.level / (sum(level**2 * weight for _, level, weight in slices) / energy) ** 0.5
        shapes = {tuple(image.shape) for image, _, _ in slices}
        if len(shapes) > 1:
            raise PriorError(f"{self.volumes[number].name} holds neighbouring slices of the sizes {shapes}")
        images = [image for image, _, _ in slices]
        return factor * (images[0] if self.stack == 1 else torch.stack(images))

    def _slice(self, number: int, index: int) -> tuple[Tensor, float, float]:
        """One slice, its level and its energy."""
        kept = self._cache.setdefault(number, {})
        if index not in kept:
            volume = self.volumes[number]
            start, stop = (0, volume.num_slices) if volume.whole else (index, index + 1)
            read = volume.read(start, stop)
            if read.ndim != 3 or len(read) != stop - start:
                raise PriorError(
                    f"{volume.name} has slices of shape {tuple(read.shape)}, expected (slices, H, W)"
                )
            if not bool(torch.isfinite(read.abs()).all()):
                raise PriorError(f"{volume.name} holds values that are not finite")
            energies = read.abs().double().square().sum((-2, -1))
            if number not in self._shown:
                known = energies if volume.whole else volume.energies()
                # Where the others' energies are not known, a slice is empty only if it is all zero.
                self._shown[number] = (
                    torch.ones(volume.num_slices, dtype=torch.bool)
                    if known is None
                    else known > _EMPTY * known.max()
                )
            prepared = read if self.prepare is None else self.prepare(read)
            for offset, image in enumerate(prepared):
                level = 1.0 if self.level is None else float(image_level(image))
                # A copy: a view would keep the whole volume in memory for the sake of one slice.
                kept[start + offset] = (image.clone(), level, float(energies[offset]))
        return kept[index]
