from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.record_fastmri_metrics import write_evaluation_files
from recon.errors import ReconError
from recon.evaluation import evaluate
from recon.io.fastmri import ReconstructionWriter, read_images
from recon.metrics import METRICS
from tests.recon import fastmri_files as files

# What fastmri.evaluate.evaluate of the package fastmri 0.3.0 gave on the files of `write_evaluation_files`;
# printed by benchmarks/record_fastmri_metrics.py.
RECORDED_EVALUATION = {
    "mean": {
        "MSE": 2.5385414488080887e-10,
        "NMSE": 0.012182453802476328,
        "PSNR": 25.341227670298963,
        "SSIM": 0.9803252888019872,
    },
    "std": {
        "MSE": 2.2204327328630426e-10,
        "NMSE": 0.010613846403790917,
        "PSNR": 4.840563282760847,
        "SSIM": 0.01736206583997254,
    },
}


@pytest.fixture
def folders(tmp_path):
    targets, predictions = tmp_path / "targets", tmp_path / "predictions"
    targets.mkdir()
    predictions.mkdir()
    return targets, predictions


def predict(path, images):
    with ReconstructionWriter(path, len(images), images.shape[1:], {}) as writer:
        for i, image in enumerate(images):
            writer.write_slice(i, image, 0 * image)


def test_equal_to_fastmri(folders):
    write_evaluation_files(*folders)
    result = evaluate(*folders)
    assert [volume.shape for volume in result.volumes] == [(2, 36, 36), (3, 32, 32), (2, 48, 48)]
    for name in METRICS:
        assert result.mean[name] == pytest.approx(RECORDED_EVALUATION["mean"][name], rel=1e-6, abs=0)
        assert result.std[name] == pytest.approx(RECORDED_EVALUATION["std"][name], rel=1e-6, abs=0)
    assert result.ok


def test_singlecoil_is_against_its_own_target(folders):
    targets, predictions = folders
    path = files.singlecoil(targets)
    predict(predictions / path.name, read_images(path, "reconstruction_esc"))
    result = evaluate(*folders)
    assert result.targets == ["reconstruction_esc"]
    assert result.mean["NMSE"] == 0
    assert "Target ESC" in result.render()
    assert "Target RSS" not in result.render()


def test_single_file(folders):
    targets, predictions = folders
    path = files.knee(targets)
    prediction = predictions / "other_name.h5"
    images = read_images(path, "reconstruction_rss")
    predict(prediction, 0.9 * images)
    result = evaluate(path, prediction)
    assert result.mean["NMSE"] == pytest.approx(0.01, rel=1e-5)
    assert math.isnan(result.std["NMSE"])
    text = result.render()
    assert "Target RSS, the root-sum-of-squares" in text
    assert "0.0100" in text
    assert "nan" not in text
    assert evaluate(path, predictions).missing == [path.name]


def test_a_bad_volume_does_not_stop_the_others(folders):
    targets, predictions = folders
    names = ["a.h5", "b.h5", "c.h5", "d.h5", "e.h5", "f.h5", "g.h5"]
    for name in names:
        files.knee(targets, name)
    images = read_images(targets / "a.h5", "reconstruction_rss")
    predict(predictions / "a.h5", images)
    predict(predictions / "b.h5", images[:, :30])
    predict(predictions / "c.h5", images[:1])
    (predictions / "d.h5").write_text("not HDF5")
    files.brain(targets, "e.h5")  # no target in it
    files.write_file(
        targets / "f.h5", {"reconstruction_rss": np.zeros((2, 32, 32)), "kspace": np.ones((2, 1, 8, 8))}
    )
    predict(predictions / "f.h5", images)

    result = evaluate(*folders)
    assert [volume.name for volume in result.volumes] == ["a.h5"]
    assert result.missing == ["g.h5"]
    assert not result.ok
    messages = {
        "b.h5": r"'reconstruction' of shape \(2, 30, 32\) cannot be cropped to the target's width, 32",
        "c.h5": "it has 1 slices but the target has 2",
        "d.h5": "this is not an HDF5 file",
        "e.h5": "there is no target in it",
        "f.h5": "all zeros",
    }
    assert set(result.failed) == set(messages)
    text = result.render()
    for name, message in messages.items():
        with pytest.raises(ReconError, match=message):
            raise ReconError(result.failed[name])
        assert f"Not scored: {result.failed[name]}." in text.splitlines()  # which names the file itself
    assert "No prediction for 1: g.h5." in text.splitlines()


def test_one_sequence_only(folders):
    write_evaluation_files(*folders)
    targets, predictions = folders
    path = files.knee(targets)
    predict(predictions / path.name, read_images(path, "reconstruction_rss"))
    assert [volume.name for volume in evaluate(*folders, acquisition="CORPD_FBK").volumes] == [path.name]
    assert len(evaluate(*folders, acquisition="AXT2").volumes) == 3
    assert not evaluate(*folders, acquisition="AXT1").ok


def test_mixed_targets_are_pointed_out(folders):
    targets, predictions = folders
    for path, name in ((files.knee(targets), "rss"), (files.singlecoil(targets), "esc")):
        predict(predictions / path.name, read_images(path, f"reconstruction_{name}"))
    result = evaluate(*folders)
    assert "not comparable" in result.render()
    table = [line.split() for line in result.render().splitlines() if line.strip().startswith("file")]
    assert [row[2] for row in table] == ["RSS", "ESC"]


def test_json(folders):
    targets, predictions = folders
    path = files.knee(targets)
    predict(predictions / path.name, read_images(path, "reconstruction_rss"))
    content = json.loads(json.dumps(evaluate(*folders).to_dict(), allow_nan=False))
    assert content["targets"] == ["reconstruction_rss"]
    assert content["mean"]["PSNR"] is None  # infinite
    assert content["std"]["SSIM"] is None  # of one volume
    assert content["volumes"][0]["acquisition"] == "CORPD_FBK"
    assert content["volumes"][0]["shape"] == [2, 32, 32]
    assert content["volumes"][0]["metrics"]["SSIM"] == pytest.approx(1)


def test_progress_sees_every_target(folders):
    write_evaluation_files(*folders)
    seen = []

    def progress(paths):
        for path in paths:
            seen.append(path.name)
            yield path

    assert len(evaluate(*folders, progress=progress).volumes) == 3
    assert seen == ["file1.h5", "file2.h5", "file3.h5"]


def test_folders_that_are_not_there(folders, tmp_path):
    targets, predictions = folders
    with pytest.raises(ReconError, match="absent: there is no such file or folder of targets"):
        evaluate(tmp_path / "absent", predictions)
    with pytest.raises(ReconError, match=r"targets: there are no .h5 files"):
        evaluate(targets, predictions)
    path = files.knee(targets)
    with pytest.raises(ReconError, match="absent: there is no such folder of predictions"):
        evaluate(targets, tmp_path / "absent")
    with pytest.raises(ReconError, match="predictions must be a folder too"):
        evaluate(targets, path)
