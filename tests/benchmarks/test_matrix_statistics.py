"""Intervals and comparisons of the matrix against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.matrix.statistics import bootstrap, compare, summaries, tabulate


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


def test_volumes_of_a_subject_are_drawn_together():
    # Two draws of p, with 1 and 3, and q, with 8: both p, one of each, both q.
    found = bootstrap(np.array([[1.0], [8.0], [3.0]]), 500, ["p", "q", "p"])
    assert (found.mean, found.low, found.high, found.volumes) == (4, 2, 8, 3)
    assert not bootstrap(np.array([[1.0], [3.0]]), 500, ["p", "p"]).known
    assert not bootstrap(np.array([[1.0, 1.0], [3.0, 3.0]]), 500, ["p", "p"]).known  # draws nothing
    assert bootstrap(np.array([[1.0, 2.0], [3.0, 4.0]]), 500, ["p", "p"]).low == 2  # of the seeds


def rows(method, values, seed=None, subject=None):
    """``{(volume, mask): PSNR}`` as rows."""
    return [
        {
            "method": method,
            "volume": volume,
            "subject": subject or volume,
            "mask": mask,
            "seed": seed,
            "PSNR": value,
        }
        for (volume, mask), value in values.items()
    ]


def test_incomplete_volumes_are_left_out_and_a_method_without_seeds_has_all_of_them():
    found = tabulate(
        rows("a", {("u", "m"): 1.0, ("u", "n"): 2.0, ("v", "m"): 3.0}), "PSNR", ["m", "n"], [0, 1]
    )
    assert list(found) == ["u"]
    assert found["u"].tolist() == [[1, 1], [2, 2]]
    assert summaries({"a": []}, "PSNR", ["m"], [0], 10) == ({"a": None}, [])


def test_means_are_over_the_volumes_that_all_methods_have():
    easy, hard = ("easy", "m"), ("hard", "m")
    by_method = {"a": rows("a", {easy: 40.0, hard: 20.0}), "b": rows("b", {easy: 39.0}), "c": []}
    found, volumes = summaries(by_method, "PSNR", ["m"], [0], 10)
    assert volumes == ["easy"]
    assert {name: each and each.mean for name, each in found.items()} == {"a": 40, "b": 39, "c": None}
    by_method["c"] = rows("c", {hard: 30.0})
    assert summaries(by_method, "PSNR", ["m"], [0], 10) == (dict.fromkeys("abc"), [])


def test_intervals_of_means_and_differences_draw_subjects():
    values = {(name, "m"): value for name, value in (("u", 1.0), ("v", 3.0))}
    ours = rows("a", values, subject="p")
    mean = summaries({"a": ours}, "PSNR", ["m"], [0], 10)[0]["a"]
    lead = compare(ours, rows("b", values, subject="p"), "PSNR", ["m"], [0], 10)
    assert mean is not None
    assert lead is not None
    assert not mean.known
    assert not lead.difference.known


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
