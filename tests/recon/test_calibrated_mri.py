"""Calibration, summary and posterior pictures where files are reconstructed."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from priors.files import prior_hash
from priors.loading import load_prior
from recon import DDS, ReconError
from recon.calibration import Calibration, learn
from recon.calibration_files import evidence_of_file
from recon.cli import main
from recon.io.fastmri import FastMRIFile
from recon.mri import MRISettings, SliceResult, calibrated_settings, reconstruct_file
from tests.recon import fastmri_files as files
from tests.recon.test_calibrate_cli import tiny_prior

SETTINGS = MRISettings("equispaced", 2.0, center_fraction=0.3, num_samples=2)
FAST = DDS(nfe=2)

pytestmark = pytest.mark.filterwarnings("ignore::operators.espirit.CalibrationWarning")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return tiny_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, prior):
    source = files.knee(tmp_path_factory.mktemp("full"))
    evidence = evidence_of_file(source, load_prior(prior), FAST, SETTINGS, patient="p", slices=1)
    identity = ("tiny", prior_hash(prior))
    settings = calibrated_settings(SETTINGS, None)
    return learn(evidence, name="site", solver=FAST, num_samples=2, prior=identity, settings=settings)


def run(source, out, prior, settings, **options):
    facts = {"sha256": prior_hash(prior)}
    provenance = reconstruct_file(
        source, out, load_prior(prior), FAST, settings, prior_facts=facts, **options
    )
    with h5py.File(out) as file:
        return provenance, {name: file[name][()] for name in file}


def test_the_calibrated_std_is_written(tmp_path, prior, calibration):
    source = files.knee(tmp_path)
    results: list[SliceResult] = []
    plain, raw = run(source, tmp_path / "raw.h5", prior, SETTINGS)
    asked = replace(SETTINGS, calibration=calibration)
    given, data = run(source, tmp_path / "out.h5", prior, asked, on_slice=results.append)
    assert plain["calibrated_uncertainty"] is False
    assert given["calibrated_uncertainty"] == calibration.facts
    assert any("not been calibrated" in note for note in plain["warnings"])
    assert not any("not been calibrated" in note for note in given["warnings"])
    np.testing.assert_array_equal(data["reconstruction"], raw["reconstruction"])
    # The object fills the image, so what is cropped away hardly reaches into it by the smoothing.
    mask = given["mask"]
    for index, facts in enumerate(given["slices"]):
        std = torch.from_numpy(raw["reconstruction_std"][index])
        expected = calibration.apply(
            std, facts["noise_std"], mask="equispaced", acceleration=mask["realised_acceleration"]
        )
        inside = (slice(6, -6), slice(6, -6))
        np.testing.assert_allclose(data["reconstruction_std"][index][inside], expected[inside], rtol=1e-4)
    assert [result.summary["uncertainty"]["calibration"] for result in results] == ["site", "site"]
    assert all(not any("not been" in w for w in result.summary["warnings"]) for result in results)


def test_another_prior_solver_or_mask_is_refused_at_once(tmp_path, prior, calibration):
    source, out = files.knee(tmp_path), tmp_path / "out.h5"
    for changes, sentence in (
        ({"num_samples": 3}, "2 samples a slice, not 3"),
        (
            {"acceleration": 4.0, "center_fraction": 0.1, "calibration": replace(calibration, settings={})},
            "learned for accelerations from",
        ),
        ({"center_fraction": 0.2}, "learned with center_fraction=0.3 and not 0.2"),
        ({"num_coils": 2}, "learned with num_coils=None and not 2"),
        ({"coil_by_coil": True}, "learned with coil_by_coil=False and not True"),
    ):
        with pytest.raises(ReconError, match=sentence):
            run(source, out, prior, replace(SETTINGS, **{"calibration": calibration, **changes}))
    with pytest.raises(ReconError, match="another prior file"):
        reconstruct_file(source, out, load_prior(prior), FAST, replace(SETTINGS, calibration=calibration))
    assert not out.exists()


def test_what_a_calibration_depends_on():
    facts = {"sha256": "ab", "precision": "bf16", "config": "a.yaml", "config_sha256": "cd"}
    coils = {"num_coils": 4, "coil_by_coil": False}
    assert calibrated_settings(replace(SETTINGS, num_coils=4), facts) == {
        **coils, "center_fraction": 0.3, "precision": "bf16", "prior_config": "cd"
    }  # fmt: skip
    # The centre of acquired data is not asked for, and nothing is known of a prior that nobody names.
    assert calibrated_settings(MRISettings(num_coils=4), None) == coils


def test_parts_add_up(tmp_path, prior):
    source = files.knee(tmp_path)
    results: list[SliceResult] = []
    _, data = run(source, tmp_path / "out.h5", prior, replace(SETTINGS, split=True), on_slice=results.append)
    assert set(data) == {"reconstruction", "reconstruction_std"}
    with FastMRIFile(source) as file:
        shape = file.target_shape
    for result in results:
        assert result.samples is not None
        assert result.samples.shape == (2, *shape)
        assert result.parts is not None
        measured, invented = result.parts
        assert bool((measured + invented >= result.mean * (1 - 1e-4)).all())  # triangle inequality
        assert float(invented.max()) < float(measured.max())
    _, _ = run(
        source,
        tmp_path / "coils.h5",
        prior,
        replace(SETTINGS, split=True, coil_by_coil=True),
        on_slice=results.append,
    )
    assert results[-1].parts is None


def test_command_line(tmp_path, prior, calibration, capsys):
    source, out = files.knee(tmp_path), tmp_path / "out"
    calibration.save(prior.with_name("tiny.site.json"))
    words = [source, "--out", out, "--prior", prior, "--mask", "equispaced", "--acceleration", 2]
    words += ["--center-fraction", 0.3, "--num-samples", 2, "--nfe", 2, "--calibration", "site"]
    with pytest.raises(SystemExit) as exit_:
        main(["mri", *(str(word) for word in words), "--summary", "--posterior-figures"])
    assert exit_.value.code == 0, capsys.readouterr().err
    stem = source.stem
    assert sorted(path.name for path in out.iterdir()) == [
        f"{stem}.h5", f"{stem}.json", f"{stem}_00_posterior.png", f"{stem}_01_posterior.png"
    ]  # fmt: skip
    summary = json.loads((out / f"{stem}.json").read_text())
    assert summary["calibrated"]
    assert [item["index"] for item in summary["slices"]] == [0, 1]
    assert isinstance(Calibration.load(prior.with_name("tiny.site.json")), Calibration)
