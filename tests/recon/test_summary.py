"""Summaries of made-up posteriors, of which every number is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from recon.errors import ReconError
from recon.posterior import Posterior
from recon.scale import Scale
from recon.summary import SummarySettings, summarise, summarise_volume

INSIDE = (slice(8, 52), slice(6, 34))


def posterior(scale=1.0, **changes):
    """A flat object of magnitude 3 with a relative deviation of 5 %."""
    mean = torch.zeros(60, 40, dtype=torch.complex64)
    mean[INSIDE] = 3j * scale
    made = Posterior(
        mean=mean,
        std=torch.full((60, 40), 0.15 * scale),
        num_samples=8,
        residual=0.95 * scale,
        noise_std=1.0 * scale,
        nfe=30,
        scale=Scale(scale),
        seed=0,
        key="",
        micro_batch=1,
        threads=1,
        settings={},
        warnings=("the spread has not been calibrated against fully sampled cases",),
    )
    return replace(made, **changes)


def test_an_unsuspicious_result():
    given = posterior()
    summary = summarise(given)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["status"], summary["reasons"], summary["regions"]) == ("ok", [], [])
    assert summary["score"] == pytest.approx(0.05, rel=0.01)
    assert summary["object"]["flagged"] == 0
    assert summary["object"]["area"] == pytest.approx(44 * 28, rel=0.01)
    assert summary["data"] == {
        "residual": 0.95, "noise_std": 1.0, "ratio": 0.95, "expected": [0.8, 1.2]
    }  # fmt: skip
    assert summary["uncertainty"] == {"calibrated": False, "calibration": None, "num_samples": 8}
    assert summary["warnings"] == list(given.warnings)
    assert summary["settings"]["flag_above"] == 0.2


def test_regions_are_found_where_they_are():
    std = posterior().std.clone()
    std[15:20, 10:16] = 1.2  # 40 %, 30 pixels
    std[30:33, 20:23] = 0.9  # 30 %, 9 pixels
    std[33, 23] = 0.9  # touches it at a corner
    std[40, 15:20] = 3.0  # too small to be reported
    std[0:5] = 9.0  # air
    summary = summarise(posterior(std=std))
    first, second = summary["regions"]
    assert first == {
        "rows": [15, 20], "columns": [10, 16], "area": 30, "mean": first["mean"], "max": first["max"]
    }  # fmt: skip
    assert first["mean"] == pytest.approx(0.4, rel=0.05)
    assert second["rows"] == [30, 34]
    assert second["columns"] == [20, 24]
    assert second["area"] == 10
    assert summary["object"]["flagged"] == pytest.approx(45 / summary["object"]["area"])
    assert summary["status"] == "check"
    assert summary["reasons"] == [
        "2 regions, 40 pixels in all, with a standard deviation above 20% of the image"
    ]

    settings = SummarySettings(min_area=5, max_regions=1)
    assert summarise(posterior(std=std), settings=settings)["regions_in_all"] == 3
    assert len(summarise(posterior(std=std), settings=settings)["regions"]) == 1
    bolder = SummarySettings(flag_above=0.35)
    assert [region["area"] for region in summarise(posterior(std=std), settings=bolder)["regions"]] == [30]


def test_a_slice_of_air():
    given = posterior()
    summary = summarise(replace(given, mean=torch.zeros_like(given.mean)))
    assert (summary["score"], summary["object"]) == (None, {"area": 0, "flagged": 0.0})
    assert (summary["status"], summary["reasons"]) == ("check", ["the image shows no object"])
    volume = summarise_volume({0: summary, 1: summarise(given)})
    assert volume["score"] == summarise(given)["score"]
    assert summarise_volume({0: summary})["score"] is None


def test_units_do_not_matter():
    first, second = summarise(posterior()), summarise(posterior(scale=1e-5))
    assert second["score"] == pytest.approx(first["score"])
    assert second["data"]["ratio"] == pytest.approx(first["data"]["ratio"])


def test_the_calibrated_std_is_what_counts():
    given = posterior()
    summary = summarise(given, calibrated_std=3.6 * given.std, calibration="brain-8")
    assert summary["score"] == pytest.approx(3.6 * summarise(given)["score"])
    assert summary["uncertainty"] == {"calibrated": True, "calibration": "brain-8", "num_samples": 8}
    assert summary["reasons"] == ["the standard deviation is 18% of the image on average"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"residual": 1.9}, "the residual is 1.90 times the noise level: image, coil maps or noise level do"),
        ({"residual": 0.5}, "the residual is 0.50 times the noise level: noise was fitted"),
        ({"num_samples": 1}, "one sample has no spread"),
    ],
)
def test_reasons(changes, reason):
    summary = summarise(posterior(**changes))
    assert summary["status"] == "check"
    assert summary["reasons"][0].startswith(reason)
    assert len(summary["reasons"]) == 1


def test_dark_parts_of_the_object_are_not_flagged_for_their_darkness():
    given = posterior()
    mean = given.mean.clone()
    mean[24:36, 14:26] = 0  # a ventricle whose std is 5 % of what is around it
    summary = summarise(replace(given, mean=mean), settings=SummarySettings(flag_above=0.7))
    assert summary["regions"] == []
    assert summarise(replace(given, mean=mean))["regions"][0]["rows"][0] >= 24


def test_what_cannot_be_done_is_said():
    given = posterior()
    with pytest.raises(ReconError, match="go together"):
        summarise(given, calibrated_std=given.std)
    with pytest.raises(ReconError, match=r"one image \(H, W\).* got \(60, 40\) and \(60, 39\)"):
        summarise(given, calibrated_std=given.std[:, :39], calibration="x")
    with pytest.raises(ReconError, match="not finite"):
        summarise(replace(given, std=given.std * float("nan")))
    for changes, sentence in (
        ({"flag_above": 0.0}, "flag_above must be positive"),
        ({"min_area": 0}, "min_area must be at least 1"),
        ({"residual_range": (1.2, 0.8)}, "residual_range must be two increasing numbers"),
    ):
        with pytest.raises(ReconError, match=sentence):
            SummarySettings(**changes)


def test_a_volume():
    good, bad = posterior(), posterior(residual=1.9, std=3 * posterior().std)
    slices = {7: summarise(bad), 2: summarise(good, calibrated_std=good.std, calibration="c")}
    volume = summarise_volume(slices)
    assert (volume["status"], volume["check"], volume["calibrated"]) == ("check", [7], False)
    assert volume["score"] == pytest.approx((slices[7]["score"] + slices[2]["score"]) / 2)
    assert [item["index"] for item in volume["slices"]] == [2, 7]
    assert volume["slices"][1] == {"index": 7, **slices[7]}
    assert summarise_volume({2: slices[2]})["status"] == "ok"
    assert summarise_volume({2: slices[2]})["calibrated"]
    with pytest.raises(ReconError, match="no slice to summarise"):
        summarise_volume({})
