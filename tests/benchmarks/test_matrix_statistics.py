"""Intervals and comparisons of the matrix against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.matrix.statistics import bootstrap, compare, summary, tabulate


def test_interval_of_two_volumes_is_exact():
    # The mean of two draws is a, (a + b) / 2 or b with probabilities 1/4, 1/2, 1/4.
    found = bootstrap(np.array([[1.0], [3.0]]), 500)
    assert (found.mean, found.low, found.high) == (2, 1, 3)
    assert bootstrap(np.array([[1.0, 3.0]]), 500).low == 1  # seeds are drawn like volumes


def test_interval_of_many_volumes_is_that_of_the_central_limit():
    values = np.random.default_rng(3).normal(30, 2, size=(200, 1))
    found = bootstrap(values, 10_000)
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04 * half)


def test_seeds_and_volumes_both_count():
    # value = volume's effect + seed's effect: the variances of the two means add up.
    rng = np.random.default_rng(0)
    volumes, seeds = rng.normal(0, 1, (60, 1)), rng.normal(0, 2, (1, 50))
    found = bootstrap(volumes + seeds, 10_000)
    std = math.sqrt(volumes.var() / 60 + seeds.var() / 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * std, rel=0.05)


def test_one_value_has_no_interval():
    found = bootstrap(np.array([[4.0]]), 100)
    assert found.mean == 4
    assert not found.known


def rows(method, values, seed=None):
    """``{(volume, mask): PSNR}`` as rows."""
    return [
        {"method": method, "volume": volume, "mask": mask, "seed": seed, "PSNR": value}
        for (volume, mask), value in values.items()
    ]


def test_incomplete_volumes_are_left_out_and_a_method_without_seeds_has_all_of_them():
    found = tabulate(
        rows("a", {("u", "m"): 1.0, ("u", "n"): 2.0, ("v", "m"): 3.0}), "PSNR", ["m", "n"], [0, 1]
    )
    assert list(found) == ["u"]
    assert found["u"].tolist() == [[1, 1], [2, 2]]
    assert summary([], "PSNR", ["m"], [0], 10) is None


def test_comparison_is_volume_for_volume():
    ours = rows("a", {("u", "m"): 31.0, ("v", "m"): 41.0}, seed=0) + rows(
        "a", {("u", "m"): 33.0, ("v", "m"): 41.0}, seed=1
    )
    theirs = rows("b", {("u", "m"): 30.0, ("v", "m"): 41.5, ("w", "m"): 99.0})
    found = compare(ours, theirs, "PSNR", ["m"], [0, 1], 400)
    assert found is not None
    assert found.difference.mean == pytest.approx(0.75)  # 2 and -0.5
    assert (found.led, found.rows) == (1, 2)
    assert found.behind == ("v, m (-0.50)",)
    # Means of two volumes and two seeds: the extremes are those of one volume and one seed alone.
    assert found.difference.low == pytest.approx(-0.5)
    assert found.difference.high == pytest.approx(3, abs=0.6)
    assert compare(ours, rows("c", {("w", "m"): 1.0}), "PSNR", ["m"], [0, 1], 10) is None
