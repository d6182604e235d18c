"""Cartesian sampling masks: which k-space samples a scan acquires.

One-dimensional masks choose columns along W (phase encode) and have shape ``(1, W)``; two-dimensional ones
choose samples and have shape ``(H, W)``. Every mask has a fully sampled centre, the autocalibration signal
(ACS).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from operators.errors import OperatorError

Region = slice | tuple[slice, slice]
"""A part of k-space: a slice of columns, all rows of which are meant, or slices ``(rows, columns)``."""

# Standard deviation of the Gaussian sampling densities, as a fraction of the matrix size: the edge lies at 3
# sigma.
_GAUSSIAN_WIDTH = 1 / 6
# In the Poisson disc masks the minimum distance grows from r at the centre to (1 + _POISSON_SLOPE) r in the
# corners.
_POISSON_SLOPE = 2.0
# A fully sampled rectangle with both sides of this length is enough for coil calibration: beyond it, area
# counts.
_ENOUGH = 24
# The Poisson disc pattern is drawn slightly too dense and thinned to the exact count, which keeps all
# distances.
_POISSON_EXCESS = 1.02


@dataclass(frozen=True, eq=False)
class Mask:
    """A sampling mask and what is known about it.

    Attributes
    ----------
    mask : Tensor
        Bool, ``(1, W)`` for a mask of columns, ``(H, W)`` otherwise; True where k-space is sampled.
    acs : slice, tuple of slice, or None
        The fully sampled centre: a slice of columns (all rows are sampled), or slices ``(rows, columns)``.
        None where there is none.
    acceleration : float
        Realised acceleration: samples that could have been acquired over samples that are.
    name : str
        The kind of mask.
    """

    mask: Tensor
    acs: Region | None
    acceleration: float
    name: str


def make_mask(
    kind: str,
    shape: tuple[int, int],
    acceleration: float,
    *,
    center_fraction: float | None = None,
    seed: int | str = 0,
    valid_columns: tuple[int, int] | None = None,
) -> Mask:
    """Draw a sampling mask.

    Sampling is without replacement and depends on the arguments alone, not on any global random state. With
    the name of a file as the seed, ``random``, ``equispaced``, ``equispaced-fraction`` and ``magic`` are,
    column for column, the masks that the ``fastmri`` package draws for that file.

    Parameters
    ----------
    kind : str
        Masks of columns:

        - ``random``: each column with the probability that makes the expected acceleration the one asked for.
        - ``equispaced``: every ``acceleration``-th column from a random offset, with the centre on top: the
          realised acceleration is lower than the one asked for.
        - ``equispaced-fraction``: equispaced, with the spacing widened so that the total including the centre
          is what was asked for.
        - ``magic``: equispaced on either side of the centre with offsets chosen so that the two sides
          interleave under conjugate symmetry [1]_, with the centre on top as in ``equispaced``.
        - ``gaussian-1d``: columns with a Gaussian density, standard deviation W/6.

        Masks of samples:

        - ``gaussian-2d``: a Gaussian density, standard deviations H/6 and W/6.
        - ``uniform-2d``: a constant density.
        - ``poisson``: variable-density Poisson disc [2]_: samples keep a distance from each other that grows
          threefold from the centre to the corners.

        All of ``gaussian-1d``, ``gaussian-2d``, ``uniform-2d`` and ``poisson`` have exactly the number of
        samples asked for, rounded.
    shape : tuple of int
        ``(H, W)`` of k-space.
    acceleration : float
        Acceleration asked for, above 1.
    center_fraction : float, optional
        Size of the fully sampled centre as a fraction of W, ``round(W * center_fraction)`` columns; for a
        mask of samples as a fraction of each side. By default ``0.32 / acceleration`` (0.08 at 4, 0.04 at 8)
        for columns, and 0.12 for samples, whose rectangular centre costs little at any acceleration.
    seed : int or str
        A number or, to have one mask a volume, the name of its file.
    valid_columns : tuple of int, optional
        ``(start, stop)`` of the columns that are measured at all. Zero-padded columns outside are never
        sampled and count neither as sampled nor as skipped; the centre is cut to this range.

    Returns
    -------
    Mask

    Raises
    ------
    OperatorError
        If the kind is unknown, the acceleration is not above 1, or the centre alone needs more samples than
        the acceleration allows.

    References
    ----------
    .. [1] A. Defazio, "Offset sampling improves deep learning based accelerated MRI reconstructions by
       exploiting symmetry", arXiv:1912.01101, 2019.
    .. [2] R. Bridson, "Fast Poisson disk sampling in arbitrary dimensions", SIGGRAPH sketches, 2007.
    """
    if kind not in _COLUMN_KINDS and kind not in _SAMPLE_KINDS:
        raise OperatorError(
            f"unknown mask kind {kind!r}; the kinds are {', '.join([*_COLUMN_KINDS, *_SAMPLE_KINDS])}"
        )
    height, width = _check_shape(shape)
    if not (math.isfinite(acceleration) and acceleration > 1):
        raise OperatorError(f"the acceleration of a {kind} mask must be a number above 1, got {acceleration}")
    two_dimensional = kind in _SAMPLE_KINDS
    if center_fraction is None:
        center_fraction = 0.12 if two_dimensional else 0.32 / acceleration
    if not 0 <= center_fraction < 1:
        raise OperatorError(f"center_fraction must be at least 0 and below 1, got {center_fraction}")
    valid = _check_valid_columns(valid_columns, width)
    columns = _centre(width, round(width * center_fraction))
    columns = slice(max(columns.start, valid.start), min(columns.stop, valid.stop))
    rng = _generator(seed)

    available = np.zeros((height, width) if two_dimensional else (width,), dtype=bool)
    available[..., valid] = True
    centre = np.zeros_like(available)
    acs: Region | None = (
        (_centre(height, round(height * center_fraction)), columns) if two_dimensional else columns
    )
    centre[acs] = True
    if not centre.any():
        acs = None
    budget = available.sum() / acceleration
    if kind not in _CENTRE_ON_TOP and centre.sum() > budget:
        raise OperatorError(
            f"a {kind} mask of acceleration {acceleration:g} has {budget:.0f} of {available.sum()} "
            f"{'samples' if two_dimensional else 'columns'}, fewer than the {centre.sum()} of its fully "
            f"sampled centre (center_fraction {center_fraction:g}): lower one of the two"
        )
    draw = (_SAMPLE_KINDS if two_dimensional else _COLUMN_KINDS)[kind]
    sampled = (draw(available, centre, float(acceleration), rng) & available) | centre
    return Mask(
        mask=torch.from_numpy(sampled if two_dimensional else sampled[None]),
        acs=acs,
        acceleration=_realised(available, sampled, kind),
        name=kind,
    )


def mask_from_array(
    array: Tensor | np.ndarray, *, name: str = "given", valid_columns: tuple[int, int] | None = None
) -> Mask:
    """Wrap a given mask, and find its fully sampled centre.

    Parameters
    ----------
    array : Tensor or ndarray
        ``(W,)``, ``(1, W)`` or ``(H, W)``; nonzero where k-space is sampled. A mask of samples in which whole
        columns are sampled is reduced to a mask of columns.
    name : str
        Name of the mask.
    valid_columns : tuple of int, optional
        ``(start, stop)`` of the columns that are measured at all, as in `make_mask`.

    Returns
    -------
    Mask
        Its ``acs`` is the largest block around the centre ``(H // 2, W // 2)`` that is sampled without a gap
        and as far to one side as to the other, to one sample; for a mask of samples the largest rectangle,
        its shorter side being 24 or, if there is none such, as long as possible. None where the centre itself
        is not sampled.

    Raises
    ------
    OperatorError
        If the array has another shape, contains NaN, or samples nothing.
    """
    given = torch.as_tensor(array).detach().cpu()
    if given.ndim == 1:
        given = given[None]
    if given.ndim != 2 or given.numel() == 0:
        raise OperatorError(
            f"a mask must have shape (W,), (1, W) or (H, W), got {tuple(torch.as_tensor(array).shape)}"
        )
    if given.is_floating_point() and bool(given.isnan().any()):
        raise OperatorError("the mask contains NaN")
    sampled = (given != 0).numpy()
    valid = _check_valid_columns(valid_columns, sampled.shape[1])
    available = np.zeros_like(sampled)
    available[:, valid] = True
    sampled = sampled & available
    if not sampled.any():
        raise OperatorError("the mask samples nothing")
    if (sampled == sampled[:1]).all():
        sampled, available = sampled[:1], available[:1]
        run = _run_around_centre(sampled[0])
        acs: Region | None = run
    else:
        acs = _block_around_centre(sampled)
    return Mask(torch.from_numpy(sampled), acs, _realised(available, sampled, name), name)


def mask_from_kspace(
    kspace: Tensor, *, name: str = "acquired", valid_columns: tuple[int, int] | None = None
) -> Mask:
    """Read the sampling mask off k-space in which everything that was not acquired is exactly zero.

    Parameters
    ----------
    kspace : Tensor
        ``(..., H, W)``; leading dimensions (slices, coils) are taken together.
    name : str
        Name of the mask.
    valid_columns : tuple of int, optional
        ``(start, stop)`` of the columns that are measured at all, as in `make_mask`.

    Returns
    -------
    Mask
        A mask of columns where whole columns are sampled. See `mask_from_array`.

    Raises
    ------
    OperatorError
        If k-space has fewer than two dimensions or is zero throughout.
    """
    if kspace.ndim < 2 or kspace.numel() == 0:
        raise OperatorError(f"k-space must have shape (..., H, W), got {tuple(kspace.shape)}")
    sampled = (kspace != 0).reshape(-1, *kspace.shape[-2:]).any(dim=0)
    if not bool(sampled.any()):
        raise OperatorError("k-space is zero everywhere: it has no samples to read a mask from")
    separable = sampled.any(dim=1, keepdim=True) & sampled.any(dim=0, keepdim=True)
    # A measured sample may be zero by accident (integers, underflow): a few holes are no sampling pattern.
    if sampled.sum() > 0.98 * separable.sum():
        sampled = separable
    return mask_from_array(sampled, name=name, valid_columns=valid_columns)


def _random(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    total, fixed = int(available.sum()), int(centre.sum())
    return rng.uniform(size=available.size) < (total / acceleration - fixed) / (total - fixed)


def _equispaced(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    return _every(available.size, rng.randint(round(acceleration)), acceleration, available.size)


def _equispaced_fraction(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    total, fixed = int(available.sum()), int(centre.sum())
    if total / acceleration <= fixed:
        return np.zeros_like(available)  # the centre has used up the budget to the last column
    # Of the columns, total/spacing are on the grid; (total - fixed)/spacing of these are outside the centre.
    spacing = (total - fixed) / (total / acceleration - fixed)
    # The last column is never reached, as in fastmri.
    return _every(available.size, rng.randint(round(spacing)), spacing, available.size - 1)


def _magic(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    width, spacing = available.size, round(acceleration)
    offset = rng.randint(spacing)
    # Frequencies f >= 0 start at `right`, f < 0 at -1 - `left`: both are odd, so that a sample and the mirror
    # image of another never coincide for an even spacing.
    right, left = (offset + 1, offset + 2) if offset % 2 == 0 else (offset + 2, offset - 1)
    positive = _every((width + 1) // 2, right, spacing, width)
    negative = _every(width // 2, left, spacing, width)
    return np.concatenate([negative[::-1], positive])


def _gaussian(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    squared = np.zeros(available.shape)
    for axis, size in enumerate(available.shape):
        distance = (np.arange(size) - size // 2) / (size * _GAUSSIAN_WIDTH)
        squared = squared + (distance**2).reshape([-1 if a == axis else 1 for a in range(available.ndim)])
    return _weighted(-squared / 2, available, centre, acceleration, rng)


def _uniform(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    return _weighted(np.zeros(available.shape), available, centre, acceleration, rng)


def _poisson(
    available: np.ndarray, centre: np.ndarray, acceleration: float, rng: np.random.RandomState
) -> np.ndarray:
    wanted = round(available.sum() / acceleration)
    # The fraction of samples that fit depends on the radius at a *relative* position, hardly on the matrix
    # size: find the radius on a small matrix by bisection, then draw once at full size.
    step = max(1, math.ceil(math.sqrt(available.size / 10_000)))
    offset = tuple((size // 2) % step for size in available.shape)
    small = (slice(offset[0], None, step), slice(offset[1], None, step))
    target = _POISSON_EXCESS * wanted / available.sum() * available[small].sum()
    low, high = 0.3, 2.0 * math.sqrt(acceleration)
    for _ in range(8):
        radius = math.sqrt(low * high)
        count = (_poisson_disc(available[small], radius, rng) | centre[small]).sum()
        low, high = (radius, high) if count > target else (low, radius)
    while True:
        disc = _poisson_disc(available, low, rng) & ~centre
        excess = disc.sum() + centre.sum() - wanted
        if excess >= 0:
            drop = rng.permutation(np.flatnonzero(disc))[:excess]
            disc.flat[drop] = False
            return disc
        low *= 0.97


def _poisson_disc(available: np.ndarray, radius: float, rng: np.random.RandomState) -> np.ndarray:
    """Take the samples in random order, leaving out those within the radius of an earlier one."""
    height, width = available.shape
    y = (np.arange(height) - height // 2) / (height / 2)
    x = (np.arange(width) - width // 2) / (width / 2)
    distance = np.sqrt((y[:, None] ** 2 + x**2) / 2)
    # Squared distances on the grid are integers, and a radius that is rounded to them makes the density fall
    # in steps (to 0.36 and 0.19 after the fully sampled part): round at random. Samples at |d|^2 <= reach
    # conflict.
    squared_radius = (radius * (1 + _POISSON_SLOPE * distance)) ** 2
    reach = np.maximum(np.floor(squared_radius - rng.uniform(size=available.shape)), 0).astype(np.int64)
    margin = math.isqrt(int(reach.max())) + 1
    padded_width = width + 2 * margin
    blocked = bytearray(np.pad(~available, margin, constant_values=True).tobytes())
    view = np.frombuffer(blocked, dtype=np.bool_)
    steps = np.arange(-margin, margin + 1)
    squared = steps[:, None] ** 2 + steps**2
    flat = steps[:, None] * padded_width + steps
    neighbours = [flat[squared <= level] for level in range(int(reach.max()) + 1)]
    order = rng.permutation(available.size)
    places = (order // width + margin) * padded_width + order % width + margin
    taken = np.zeros(available.size, dtype=bool)
    accepted = []
    for index, place, level in zip(order.tolist(), places.tolist(), reach.flat[order].tolist(), strict=True):
        if not blocked[place]:
            accepted.append(index)
            if level:
                view[neighbours[level] + place] = True
    taken[accepted] = True
    return taken.reshape(available.shape)


_Draw = Callable[[np.ndarray, np.ndarray, float, np.random.RandomState], np.ndarray]
_COLUMN_KINDS: dict[str, _Draw] = {
    "random": _random,
    "equispaced": _equispaced,
    "equispaced-fraction": _equispaced_fraction,
    "magic": _magic,
    "gaussian-1d": _gaussian,
}
_SAMPLE_KINDS: dict[str, _Draw] = {
    "gaussian-2d": _gaussian,
    "uniform-2d": _uniform,
    "poisson": _poisson,
}
_CENTRE_ON_TOP = ("equispaced", "magic")


def _every(size: int, offset: int, spacing: float, stop: int) -> np.ndarray:
    """Mark every spacing-th of `size` positions from the offset on, before `stop`."""
    sampled = np.zeros(size, dtype=bool)
    index = np.around(np.arange(offset, stop, spacing)).astype(np.int64)
    sampled[index[index < size]] = True
    return sampled


def _weighted(
    log_weight: np.ndarray,
    available: np.ndarray,
    centre: np.ndarray,
    acceleration: float,
    rng: np.random.RandomState,
) -> np.ndarray:
    """Draw without replacement: the largest of log weight + Gumbel noise (Efraimidis and Spirakis 2006)."""
    key = log_weight + rng.gumbel(size=available.shape)
    key[~available | centre] = -np.inf
    count = round(available.sum() / acceleration) - int(centre.sum())
    sampled = np.zeros(available.shape, dtype=bool)
    sampled.flat[np.argsort(-key, axis=None, kind="stable")[:count]] = True
    return sampled


def _generator(seed: int | str) -> np.random.RandomState:
    """Make a generator of our own; numpy guarantees that this kind's streams never change."""
    if isinstance(seed, str) and seed:
        return np.random.RandomState([ord(letter) for letter in seed])
    if isinstance(seed, int) and 0 <= seed < 2**32:
        return np.random.RandomState(seed)
    raise OperatorError(
        f"the seed of a mask must be a non-empty string or an integer from 0 to 2^32 - 1, got {seed!r}"
    )


def _check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise OperatorError(f"the shape of a mask must be (H, W), both positive, got {tuple(shape)}")
    return int(shape[0]), int(shape[1])


def _check_valid_columns(valid: tuple[int, int] | None, width: int) -> slice:
    if valid is None:
        return slice(0, width)
    start, stop = valid
    if not 0 <= start <= width // 2 < stop <= width:
        raise OperatorError(
            f"valid_columns must be (start, stop) within 0 to {width} and contain the centre {width // 2}, "
            f"got {tuple(valid)}"
        )
    return slice(int(start), int(stop))


def _centre(size: int, count: int) -> slice:
    """Place the centre as fastMRI does."""
    start = (size - count + 1) // 2
    return slice(start, start + count)


def _realised(available: np.ndarray, sampled: np.ndarray, name: str) -> float:
    if not sampled.any():
        raise OperatorError(f"the {name} mask samples nothing: lower its acceleration or give it a centre")
    return float(available.sum() / sampled.sum())


def _run_around_centre(sampled: np.ndarray) -> slice | None:
    centre = sampled.size // 2
    if not sampled[centre]:
        return None
    gaps = np.flatnonzero(~sampled)
    before = gaps[gaps < centre].max(initial=-1)
    after = gaps[gaps > centre].min(initial=sampled.size)
    left, right = centre - before - 1, after - centre - 1
    # One sample more on one side is the rule: to the left for an even count, to the right where fastMRI puts
    # an even count into an odd matrix.
    return slice(int(centre - min(left, right + 1)), int(centre + min(right, left + 1) + 1))


def _block_around_centre(sampled: np.ndarray) -> tuple[slice, slice] | None:
    centre = sampled.shape[0] // 2
    best: tuple[tuple[int, int], tuple[slice, slice]] | None = None
    middle: np.ndarray = sampled[:, sampled.shape[1] // 2]
    full = _run_around_centre(middle)
    if full is None:
        return None
    for start in range(full.start, centre + 1):
        for stop in {2 * centre - start, 2 * centre - start + 1, 2 * centre - start + 2}:
            if not centre < stop <= full.stop:
                continue
            columns = _run_around_centre(np.asarray(sampled[start:stop].all(axis=0)))
            if columns is None:
                continue
            sides = (stop - start, columns.stop - columns.start)
            rank = (min(*sides, _ENOUGH), sides[0] * sides[1])
            if best is None or rank > best[0]:
                best = (rank, (slice(start, stop), columns))
    return None if best is None else best[1]
