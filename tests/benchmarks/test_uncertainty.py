"""Uncertainty against acceleration, on evidence made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import uncertainty as benchmark
from priors.files import prior_hash, prior_path
from recon.calibration import Calibration, Evidence, calibration_path, learn
from recon.solvers.dds import DDS


def evidence(patient="a", asked=4.0, inflation=2.0, size=80):
    """Gaussian errors whose standard deviation is `asked`, and a spread that is too small by `inflation`."""
    rng = np.random.default_rng([ord(patient[0]), int(asked)])
    mean = np.full((size, size), 50.0)
    return Evidence(
        patient=patient,
        volume="v",
        index=0,
        mask="random",
        acceleration=asked,
        asked=asked,
        noise_std=1e-3,
        truth=mean + asked * rng.standard_normal((size, size)),
        mean=mean,
        std=np.full((size, size), asked / inflation),
        region=np.ones((size, size), dtype=bool),
    )


@pytest.fixture(scope="module")
def calibration():
    cases = [evidence(p, a) for p in "ab" for a in (2.0, 4.0)]
    return learn(cases, name="made up", solver=DDS(), num_samples=8, prior=None)


def test_a_point_holds_what_was_put_in(calibration):
    found = benchmark.Point.of("group", "case", evidence("c"), calibration)
    peak = evidence("c").truth.max()
    assert found.std == pytest.approx(100 * 2 / peak)
    assert found.error == pytest.approx(100 * 4 / peak, rel=0.03)
    assert found.before == pytest.approx(0.589, abs=0.02)  # ±1.645 of half of the error's deviation
    assert found.after == pytest.approx(0.9, abs=0.02)


def test_what_was_not_learned_is_said(calibration):
    beyond = benchmark.Point.of("group", "case", evidence("c", asked=40.0), calibration)
    assert beyond.after is None
    assert "not learned" in benchmark.table([beyond])


def test_only_the_object_counts(calibration):
    given = evidence("c")
    region = np.zeros_like(given.region)
    region[:40] = True
    std = np.where(region, given.std, 1000.0)
    found = benchmark.Point.of("g", "c", replace(given, region=region, std=std), calibration)
    assert found.std == pytest.approx(100 * 2 / given.truth.max())


def test_findings_and_figure(calibration, tmp_path):
    points = [benchmark.Point.of("patient", "a", evidence("c", a), calibration) for a in (2.0, 4.0)]
    points += [benchmark.Point.of("measured", "b", evidence("d", a), calibration) for a in (2.0, 4.0, 40.0)]
    text = benchmark.findings(points)
    assert "The spread grows with every step of the acceleration in 2 of 2 curves" in text
    assert "patient: intervals of 90% cover" in text
    shrinking = [replace(p, std=-p.std) for p in points]
    assert "The spread grows with every step of the acceleration in 0 of 2" in benchmark.findings(shrinking)
    assert benchmark.draw(points, tmp_path / "a.png").stat().st_size > 20_000


def test_the_bundled_calibration_belongs_to_the_bundled_prior_and_the_default_solver():
    path = prior_path("brain")
    bundled = Calibration.load(calibration_path("open-ms", path))
    bundled.check(prior_hash(path), DDS(), bundled.num_samples)


def test_from_a_measured_slice_to_the_page(tmp_path, monkeypatch, capsys):
    from benchmarks import cases
    from operators.simulation import random_smooth_maps, simulate_kspace
    from tests.benchmarks.test_calibration_benchmark import wave
    from tests.recon.test_calibrate_cli import tiny_prior

    prior = tiny_prior(tmp_path / "tiny.safetensors")
    image = wave(40, 36) * (wave(40, 36, 1) > 2)
    kspace = simulate_kspace(image / image.max() + 0j, random_smooth_maps(3, (40, 36), seed=0), 0.005, seed=0)
    monkeypatch.setattr(benchmark, "measured_case", lambda path: cases.make_case(path.stem, kspace))
    monkeypatch.setattr(benchmark, "DDS", lambda: DDS(nfe=3))
    learned = learn(
        [replace(evidence(p, a), mask="equispaced") for p in "ab" for a in (2.0, 3.0)],
        name="tiny",
        solver=DDS(nfe=3),
        num_samples=2,
        prior=("tiny", prior_hash(prior)),
    )
    learned.save(tmp_path / "tiny.made.json")
    out, cache = tmp_path / "results" / "u.md", tmp_path / "cache"
    words = ["--measured", tmp_path / "full.cfl", "--prior", prior, "--calibration", "made"]
    words += ["--masks", "equispaced", "--accelerations", 2, 3, "--precision", "fp32"]
    words = [str(word) for word in [*words, "--cache", cache, "--out", out]]
    benchmark.main(words)
    page = out.read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in page
    assert page.count("| measured slice | full | equispaced | ×") == 2
    assert "Patient 19" not in page  # no simulated data took part
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2
    benchmark.main(words)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept


def test_nothing_to_do_is_said(capsys):
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "give --data, --measured, or both" in capsys.readouterr().err
