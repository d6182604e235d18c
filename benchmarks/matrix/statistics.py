"""Means over volumes with intervals by bootstrap, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.matrix.rows import Row

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over volumes and seeds.

    Attributes
    ----------
    mean : float
        The mean.
    low, high : float
        95 % interval; NaN where draws would all be alike: of a single subject, with seeds that make no
        difference.
    volumes, seeds : int
        What it is over.
    """

    mean: float
    low: float
    high: float
    volumes: int
    seeds: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)


def bootstrap(
    values: np.ndarray, draws: int, subjects: Sequence[str] | None = None, seed: int = 0
) -> Estimate:
    """Mean and percentile interval of a table (volumes, seeds).

    Subjects are drawn with replacement, each with all of its volumes, and seeds independently of them, the
    same for every volume (Owen, Annals of Applied Statistics 1, 386, 2007): a seed's chance and a patient's
    are both chance, and two volumes of one patient are not two patients. Every volume drawn counts once.

    Parameters
    ----------
    values : ndarray
        ``(V, S)``, finite.
    draws : int
        Draws with replacement.
    subjects : sequence of str, optional
        Of the volumes; each its own if not given.
    seed : int
        Of the draws.
    """
    volumes, seeds = values.shape
    mean = float(values.mean())
    found, which = np.unique(np.arange(volumes) if subjects is None else subjects, return_inverse=True)
    if len(found) == 1 and bool((values == values[:, :1]).all()):
        return Estimate(mean, math.nan, math.nan, volumes, seeds)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=draws)[:, which]
    by_volume = counts / counts.sum(axis=1, keepdims=True)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = np.einsum("bv,vs,bs->b", by_volume, values, by_seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), volumes, seeds)


def tabulate(
    rows: Iterable[Row], metric: str, masks: Sequence[str], seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Volume -> (masks, seeds) of one method and target; volumes of which a row is missing are left out.

    A method that draws nothing has the same value for every seed.
    """
    found: dict[str, np.ndarray] = {}
    for row in rows:
        if row["mask"] not in masks or row.get(metric) is None:
            continue
        table = found.setdefault(row["volume"], np.full((len(masks), len(seeds)), np.nan))
        columns = slice(None) if row["seed"] is None else seeds.index(row["seed"])
        table[masks.index(row["mask"]), columns] = row[metric]
    return {volume: table for volume, table in found.items() if np.isfinite(table).all()}


def subjects_of(rows: Iterable[Row]) -> dict[str, str]:
    """Volume -> whom it shows."""
    return {row["volume"]: row["subject"] for row in rows}


def shared(found: Iterable[Collection[str]]) -> list[str]:
    """Volumes that all of some methods have; those that have none at all have no say.

    Means over other volumes cannot be held against each other.
    """
    some = [volumes for volumes in found if volumes]
    return [volume for volume in some[0] if all(volume in volumes for volumes in some)] if some else []


def summaries(
    by_method: Mapping[str, Sequence[Row]],
    metric: str,
    masks: Sequence[str],
    seeds: Sequence[int],
    draws: int,
) -> tuple[dict[str, Estimate | None], list[str]]:
    """Mean over volumes, and over masks within a volume, of every method.

    Returns
    -------
    estimates : dict
        Method -> mean; None for one without a complete volume.
    volumes : list of str
        What all of them are over (:func:`shared`); if it is empty, there are no means.
    """
    tables = {name: tabulate(rows, metric, masks, seeds) for name, rows in by_method.items()}
    volumes = shared(tables.values())
    subjects = subjects_of(row for rows in by_method.values() for row in rows)
    drawn = [subjects[volume] for volume in volumes]
    made: dict[str, Estimate | None] = {}
    for name, table in tables.items():
        means = [table[volume].mean(axis=0) for volume in volumes if volume in table]
        made[name] = bootstrap(np.stack(means), draws, drawn) if means else None
    return made, volumes


@dataclass(frozen=True)
class Comparison:
    """By how much one method's metric exceeds another's, volume for volume and seed for seed.

    Attributes
    ----------
    difference : Estimate
        Mean and interval.
    led, rows : int
        Pairs of a volume and a mask, each the mean over seeds, that it leads, and all of them.
    behind : tuple of str
        Those on which it does not lead.
    """

    difference: Estimate
    led: int
    rows: int
    behind: tuple[str, ...]


def compare(
    ours: Sequence[Row],
    theirs: Sequence[Row],
    metric: str,
    masks: Sequence[str],
    seeds: Sequence[int],
    draws: int,
) -> Comparison | None:
    """Compare two methods on the volumes that both have; None if there are none."""
    a, b = (tabulate(rows, metric, masks, seeds) for rows in (ours, theirs))
    both = [volume for volume in a if volume in b]
    if not both:
        return None
    differences = np.stack([a[volume] - b[volume] for volume in both])
    means = differences.mean(axis=2)
    behind = tuple(
        f"{volume}, {mask} ({means[i, j]:+.2f})"
        for i, volume in enumerate(both)
        for j, mask in enumerate(masks)
        if not means[i, j] > 0
    )
    subjects = subjects_of(ours)
    estimate = bootstrap(differences.mean(axis=1), draws, [subjects[volume] for volume in both])
    return Comparison(estimate, means.size - len(behind), means.size, behind)
