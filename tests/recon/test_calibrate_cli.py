"""``recon calibrate`` on small files."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import pytest
import torch
import typer
from typer.testing import CliRunner

from operators.masks import make_mask
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, save_prior
from priors.files import prior_hash
from priors.loading import load_prior
from recon import DDS, ReconError
from recon.calibration import Calibration, Evidence, fully_sampled_image
from recon.calibration_files import evidence_of_file, middle_slices
from recon.cli.calibrate import calibrate
from recon.io.fastmri import FastMRIFile, crop_readout
from recon.mri import MRISettings, find_sampling
from tests.recon import fastmri_files as files

app = typer.Typer()
app.command()(calibrate)

SETTINGS = MRISettings("equispaced", 2.0, center_fraction=0.3, num_samples=2)
FAST = DDS(nfe=2)
OPTIONS = ("--center-fraction", 0.3, "--num-samples", 2, "--set", "nfe=2", "--slices", 1)

pytestmark = pytest.mark.filterwarnings("ignore::operators.espirit.CalibrationWarning")


def tiny_prior(path):
    settings = NetworkSettings(channels=2, widths=(8,), embedding=8, sigma_data=0.5)
    save_prior(path, NetworkPrior(DenoisingUNet(settings), Contract(name="tiny", size_multiple=2)))
    return path


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return tiny_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


@pytest.fixture
def run(prior):
    def command(*arguments):
        words = [str(word) for word in (*arguments, "--prior", prior, *OPTIONS)]
        return CliRunner().invoke(app, words, catch_exceptions=True)

    return command


def test_files_in_a_calibration_out(tmp_path, prior, run):
    folder = tmp_path / "full"
    folder.mkdir()
    files.knee(folder, "a.h5")
    files.knee(folder, "b.h5")
    out, keep = tmp_path / "new" / "scanner.json", tmp_path / "keep"
    options = ("--acceleration", 2, "--acceleration", 2.4, "--mask", "equispaced", "--mask", "random")
    result = run(folder, "--out", out, *options, "--keep", keep)
    assert result.exit_code == 0, result.output
    calibration = Calibration.load(out)
    assert (calibration.name, calibration.patients, calibration.slices) == ("scanner", 2, 2)
    assert calibration.prior == {"name": "tiny", "sha256": prior_hash(prior)}
    calibration.check(prior_hash(prior), FAST, 2)
    assert calibration.settings == {
        "num_coils": None,
        "coil_by_coil": False,
        "center_fraction": 0.3,
        "precision": "fp32",
        "prior_config": None,
    }
    assert [cell.mask for cell in calibration.cells] == ["equispaced"] * 2 + ["random"] * 2
    drawn = [
        make_mask("random", (32, 46), 2.4, center_fraction=0.3, seed=name, valid_columns=(3, 43))
        for name in "ab"
    ]
    accelerations = [mask.acceleration for mask in drawn]
    assert calibration.cells[3].acceleration == pytest.approx((accelerations[0] * accelerations[1]) ** 0.5)
    assert "2 slices of 2 patients, 8 reconstructions" in result.output
    assert "at least 60% of the pixels" in result.output

    # What was kept is not reconstructed again, and gives the same.
    kept = {path: path.stat().st_mtime_ns for path in keep.iterdir()}
    assert len(kept) == 8
    again = tmp_path / "again.json"
    assert run(folder, "--out", again, *options, "--keep", keep).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in keep.iterdir()} == kept
    assert replace(Calibration.load(again), name="scanner") == calibration
    # Files of one folder may be one patient's.
    assert run(folder, "--out", again, "--patient", "folder").exit_code == 0
    assert Calibration.load(again).patients == 1
    # Folders of one name are not one folder.
    for name in "ab":
        (tmp_path / name / "scan").mkdir(parents=True)
        files.knee(tmp_path / name / "scan", f"{name}.h5")
    scans = (tmp_path / "a" / "scan", tmp_path / "b" / "scan")
    assert run(*scans, "--out", again, "--patient", "folder").exit_code == 0
    assert Calibration.load(again).patients == 2


def test_evidence_of_a_file(tmp_path, prior):
    source, loaded = files.knee(tmp_path), load_prior(prior)
    (found,) = evidence_of_file(source, loaded, FAST, SETTINGS, patient="p", slices=1)
    with FastMRIFile(source) as file:
        kspace = crop_readout(file.read_slice(found.index).kspace, file.readout_height)
    torch.testing.assert_close(torch.from_numpy(found.truth), fully_sampled_image(kspace))
    assert found.mean.shape == (32, 46)
    assert (found.patient, found.volume, found.mask, found.asked) == ("p", source.stem, "equispaced", 2)
    other = evidence_of_file(source, loaded, FAST, replace(SETTINGS, seed=1), patient="p", slices=1)
    assert not (other[0].mean == found.mean).all()


def test_the_truth_needs_every_column(tmp_path, prior):
    source, loaded = files.knee(tmp_path), load_prior(prior)
    with FastMRIFile(source) as file:
        left_out = (~find_sampling(file, SETTINGS).mask.mask[0, 3:43]).nonzero()[:, 0] + 3
    for index, columns in ((1, left_out[:3]), (0, left_out[3:6])):
        with h5py.File(source, "r+") as file:
            for column in columns:
                file["kspace"][index, ..., int(column)] = 0
        if index == 1:
            found = evidence_of_file(source, loaded, FAST, SETTINGS, patient="p", slices=4)
            assert [evidence.index for evidence in found] == [0]
    with pytest.raises(ReconError, match=r"file1000001.h5: no slice holds every column that its volume has"):
        evidence_of_file(source, loaded, FAST, SETTINGS, patient="p", slices=4)


def test_kept_evidence_belongs_to_its_settings(tmp_path, prior):
    source, loaded, keep = files.knee(tmp_path), load_prior(prior), tmp_path / "keep"
    variants = [
        (SETTINGS, FAST, {"sha256": "a"}),
        (replace(SETTINGS, acceleration=2.4), FAST, {"sha256": "a"}),
        (SETTINGS, DDS(nfe=3), {"sha256": "a"}),
        (SETTINGS, FAST, {"sha256": "b"}),
    ]
    for count, (settings, solver, facts) in enumerate(variants, start=1):
        for _ in range(2):
            evidence_of_file(
                source, loaded, solver, settings, patient="p", slices=1, prior_facts=facts, keep=keep
            )
        assert len(list(keep.iterdir())) == count
    assert isinstance(Evidence.load(next(keep.iterdir())), Evidence)


def test_middle_slices():
    assert middle_slices(range(20), 4) == [6, 8, 11, 13]
    assert middle_slices([3, 7, 9], 1) == [7]
    assert middle_slices([5], 4) == [5]
    assert middle_slices(range(100, 104), 9) == [101, 102]


def test_what_cannot_be_done_is_said(tmp_path, prior, run):
    source, out = files.knee(tmp_path), tmp_path / "c.json"
    for words, sentence in (
        ((source, "--out", tmp_path / "c.txt"), "a calibration is a .json file"),
        ((source, "--out", out, "--mask", "spiral"), "unknown mask kind 'spiral'"),
        ((source, "--out", out, "--patient", "slice"), "--patient is file or folder, not 'slice'"),
        ((source, "--out", out, "--nominal", 1), "a coverage lies between 0 and 1"),
        ((files.undersampled(tmp_path), "--out", out), "the data are undersampled already"),
    ):
        result = run(*words)
        assert isinstance(result.exception, ReconError)
        assert sentence in str(result.exception)
    assert not out.exists()
    with pytest.raises(ReconError, match="needs a mask"):
        evidence_of_file(source, load_prior(prior), FAST, MRISettings(), patient="p", slices=1)


def test_nothing_of_the_patient_is_stored(tmp_path, run):
    folder = tmp_path / "Doe Jane"
    folder.mkdir()
    out = tmp_path / "c.json"
    assert run(files.knee(folder), "--out", out, "--acceleration", 2).exit_code == 0
    content = out.read_text()
    assert "Jane" not in content
    assert "file1000001" not in content
    assert json.loads(content)["patients"] == 1
