"""The calibration benchmark on volumes made up here, with a prior that takes no time."""

from __future__ import annotations

import re

import nibabel
import numpy as np
import pytest
import torch

from benchmarks import calibration as benchmark
from recon.calibration import Calibration, Evidence

pytestmark = pytest.mark.filterwarnings("ignore::operators.espirit.CalibrationWarning")


def wave(rows, columns, periods=3):
    """A band-limited image, the same function on every grid."""
    y = torch.arange(rows)[:, None] / rows - 0.5
    x = torch.arange(columns) / columns - 0.5
    return 2 + torch.cos(2 * torch.pi * periods * y) * torch.cos(2 * torch.pi * x)


@pytest.mark.parametrize(("width", "margin"), [(20, 0), (24, 2), (16, -2)])
def test_reducing_a_band_limited_image_samples_it(width, margin):
    found = benchmark.reduced(wave(48, 40), (24, width))
    expected = 2 * wave(24, 20)  # an orthonormal transform keeps the energy: √(48 · 40 / 24 / 20)
    expected = (
        torch.nn.functional.pad(expected, (margin, margin)) if margin >= 0 else expected[:, -margin:margin]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def evidence(patient="a", mask="random", asked=4.0, inflation=1.0, index=0, std=1.0):
    rng = np.random.default_rng([ord(patient), int(asked), index])
    mean = np.full((80, 80), 50.0)
    noise = inflation * std * rng.standard_normal((80, 80))
    return Evidence(
        patient=patient,
        volume="v",
        index=index,
        mask=mask,
        acceleration=asked,
        asked=asked,
        noise_std=1e-3,
        truth=mean + noise,
        mean=mean,
        std=np.full((80, 80), std),
        region=np.ones((80, 80), dtype=bool),
    )


def results(patient, inflation=2.0, factor=1.0):
    return [
        benchmark.Result(
            evidence(patient, asked=a, inflation=inflation, std=a),
            evidence(patient, asked=a, inflation=factor * inflation, std=a).truth,
        )
        for a in (2.0, 4.0)
    ]


def test_tables():
    def calibrated(target):
        return benchmark.learn(
            (r.against(target) for p in "ab" for r in results(p)),
            name=target,
            solver=benchmark.DDS(),
            num_samples=8,
            prior=None,
        )

    calibrations = {target: calibrated(target) for target in benchmark.TARGETS}
    tested = results("c", factor=1.5)  # its noise-free error is 1.5 times what was learned
    table = benchmark.coverage_table(tested, calibrations)
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| c v, slice 0")]
    assert len(lines) == 2
    for line in lines:
        before, after, before_free, after_free = (float(cell.strip("*%")) for cell in line[4:8])
        assert before == pytest.approx(59, abs=2)  # ±1.645 of twice the std
        assert after == pytest.approx(90, abs=2)
        assert before_free == pytest.approx(42, abs=2)
        assert after_free == pytest.approx(73, abs=2)
        assert line[7].startswith("**")
    assert "Against the fully sampled image 2 of 2 lie within 85% to 95%." in table
    assert "Against the noise-free image 0 of 2 lie within 85% to 95%; outside: c v, slice 0, random" in table
    assert re.search(
        r"\| c v, slice 0 \| random \| 3\.\d+ \| 4\.\d+ \| yes \|", benchmark.growth_table(tested)
    )
    assert "**no**" in benchmark.growth_table(
        [benchmark.Result(evidence(asked=a, std=1 / a), np.zeros((80, 80))) for a in (2.0, 4.0)]
    )
    factors = benchmark.factor_table(calibrations).splitlines()[2:]
    assert [line.split(" | ")[1] for line in factors] == ["×2.00", "×4.00"]
    assert float(factors[0].split(" | ")[2]) == pytest.approx(2 * 1.645, rel=0.03)


def test_from_volumes_to_the_page(tmp_path, monkeypatch, capsys):
    from tests.recon.test_calibrate_cli import tiny_prior

    data, prior = tmp_path / "data", tiny_prior(tmp_path / "tiny.safetensors")
    for volume in ("p1/a.nii.gz", "p2/a.nii.gz", "p3/a.nii.gz"):
        (data / volume).parent.mkdir(parents=True)
        head = (wave(64, 48) * (wave(64, 48, 1) > 2)).numpy()
        affine = np.eye(4)
        nibabel.save(nibabel.Nifti1Image(np.stack([head] * 4, axis=-1), affine), data / volume)
    monkeypatch.setattr(benchmark, "CALIBRATED_ON", ("p1/a.nii.gz", "p2/a.nii.gz"))
    monkeypatch.setattr(benchmark, "TESTED_ON", ("p3/a.nii.gz",))
    monkeypatch.setattr(benchmark, "MATRIX", (40, 36))
    out, saved, cache = tmp_path / "results" / "page.md", tmp_path / "c.json", tmp_path / "cache"
    words = ["--data", data, "--prior", prior, "--masks", "equispaced", "--accelerations", 2, 3]
    words += ["--num-samples", 2, "--precision", "fp32", "--cache", cache, "--out", out]
    words += ["--save", saved, "--figure", tmp_path / "grid.png"]
    benchmark.main([str(word) for word in words])
    page = out.read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in page
    assert "2 slices of 2 patients" in page
    assert "at least 60%" in page
    assert page.count("| p3 a, slice") == 3  # two lines of coverage, one of growth
    assert Calibration.load(saved).patients == 2
    assert (tmp_path / "grid.png").stat().st_size > 10_000

    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 6
    benchmark.main([str(word) for word in words])
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert out.read_text() == page
