"""Means over volumes with intervals by bootstrap, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
        95 % interval; NaN where there is a single value.
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


def bootstrap(values: np.ndarray, draws: int, seed: int = 0) -> Estimate:
    """Mean and percentile interval of a table (volumes, seeds).

    Volumes are drawn with replacement, and seeds independently of them, the same for every volume (Owen,
    Annals of Applied Statistics 1, 386, 2007): a seed's chance and a patient's are both chance.

    Parameters
    ----------
    values : ndarray
        ``(V, S)``, finite.
    draws : int
        Draws with replacement.
    seed : int
        Of the draws.
    """
    volumes, seeds = values.shape
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, math.nan, math.nan, volumes, seeds)
    rng = np.random.default_rng(seed)
    by_volume = rng.multinomial(volumes, np.full(volumes, 1 / volumes), size=draws) / volumes
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


def summary(
    rows: Sequence[Row], metric: str, masks: Sequence[str], seeds: Sequence[int], draws: int
) -> Estimate | None:
    """Mean over volumes, and over masks within a volume; None without a complete volume."""
    tables = tabulate(rows, metric, masks, seeds)
    if not tables:
        return None
    return bootstrap(np.stack([table.mean(axis=0) for table in tables.values()]), draws)


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
    shared = [volume for volume in a if volume in b]
    if not shared:
        return None
    differences = np.stack([a[volume] - b[volume] for volume in shared])
    means = differences.mean(axis=2)
    behind = tuple(
        f"{volume}, {mask} ({means[i, j]:+.2f})"
        for i, volume in enumerate(shared)
        for j, mask in enumerate(masks)
        if not means[i, j] > 0
    )
    estimate = bootstrap(differences.mean(axis=1), draws)
    return Comparison(estimate, means.size - len(behind), means.size, behind)
