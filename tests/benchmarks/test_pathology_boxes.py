"""Boxes of fastMRI+ on volumes made up here, of which every figure is known."""

from __future__ import annotations

import json
import math

import h5py
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from benchmarks.pathology import __main__ as command
from benchmarks.pathology import boxes
from recon.errors import ReconError
from recon.io.fastmri_plus import Annotations, Box

HEADER = "file,slice,study_level,x,y,width,height,label\n"


def volume(rng=None):
    """Two slices of 48 × 40: level 1 with a peak of 2, and in slice 1 a plateau of 1.5 in 10:16, 20:28."""
    truth = np.ones((2, 48, 40))
    truth[0, 0, 0] = 2
    truth[1, 10:16, 20:28] = 1.5
    if rng is not None:
        truth += 0.01 * rng.standard_normal(truth.shape)
    return truth


# The picture is upside down: rows 10:16 of 48 are rows 32:38 there.
PLATEAU = Box("Mass", 20, 32, 8, 6)


def test_figures_of_a_known_error():
    truth = volume()
    images = truth.copy()
    images[1, 10:16, 20:28] -= 0.25  # half of the contrast is lost in the box
    images[1, 30:, :] += 0.1  # and something is wrong elsewhere
    inside, outside, tissue = boxes.score_volume("a.h5", truth, images, {1: (PLATEAU,)}, (48, 40))
    assert (inside.label, inside.index, inside.pixels) == ("Mass", 1, 48)
    assert inside.psnr == pytest.approx(10 * math.log10(4 / 0.25**2))
    assert inside.nmse == pytest.approx(0.25**2 / 1.5**2)
    assert inside.planted == pytest.approx(0.5)
    assert inside.found == pytest.approx(0.25)
    similarity = structural_similarity(truth[1], images[1], data_range=2.0, full=True)[1]
    assert inside.ssim == pytest.approx(similarity[10:16, 20:28].mean())
    assert outside.label == boxes.OUTSIDE
    assert outside.pixels == 48 * 40 - 48
    assert outside.psnr == pytest.approx(10 * math.log10(4 / (0.01 * 18 * 40 / outside.pixels)))
    assert math.isnan(outside.planted)
    assert (tissue.label, tissue.pixels) == (boxes.TISSUE, outside.pixels)  # there is no air in it


def test_a_perfect_reconstruction_and_cropped_images():
    truth = volume(np.random.default_rng(0))
    cut = truth[:, 4:44]  # the target's square: rows 4 to 44
    inside, outside, _ = boxes.score_volume(
        "a", cut, cut, {1: (PLATEAU, Box("Edema", 0, 46, 3, 2))}, (48, 40)
    )
    assert inside.psnr == outside.psnr == math.inf
    assert inside.ssim == pytest.approx(1)
    assert inside.pixels == 48
    assert inside.planted == pytest.approx(0.5, abs=0.01)
    assert inside.found == inside.planted


def test_air_is_not_tissue():
    truth = volume()
    truth[1, :, 32:] = 0
    images = truth.copy()
    images[1, :, :32] += 0.1
    _, outside, tissue = boxes.score_volume("a", truth, images, {1: (PLATEAU,)}, (48, 40))
    # The object's rim is cut off by a pixel or so; in what is left the error is everywhere the same.
    assert 48 * 30 - 48 <= tissue.pixels <= 48 * 32 - 48
    assert tissue.psnr == pytest.approx(10 * math.log10(4 / 0.01))
    assert outside.psnr > tissue.psnr


def test_ring_is_as_large_as_the_box_and_in_no_box():
    covered = np.zeros((60, 60), dtype=bool)
    region = slice(20, 32), slice(24, 30)
    covered[region] = covered[20:32, 34:40] = True
    ring = boxes.ring(region, covered)
    assert not (ring & covered).any()
    assert ring[20:32, 22:24].all()
    whole = boxes.ring(region, np.zeros_like(covered) | (covered & (np.arange(60) < 30)))
    assert 72 <= whole.sum() <= 1.6 * 72


def test_contrast_kept_is_a_slope():
    def score(planted, found):
        return boxes.Score("a", 0, "Mass", 9, 30.0, 0.9, 0.1, planted, found)

    pairs = [score(0.5, 0.4), score(-0.25, -0.2), score(1e-9, 0.01), score(math.nan, math.nan)]
    assert boxes.contrast_kept(pairs) == pytest.approx(0.8)
    assert math.isnan(boxes.contrast_kept(pairs[-1:]))


def test_what_cannot_be_scored_is_named():
    truth = volume()
    with pytest.raises(ReconError, match=r"a\.h5: there is a box in slice 7, but the volume has 2"):
        boxes.score_volume("a.h5", truth, truth, {7: (PLATEAU,)}, (48, 40))
    with pytest.raises(ReconError, match="two volumes"):
        boxes.score_volume("a.h5", truth, truth[:1], {0: (PLATEAU,)}, (48, 40))
    with pytest.raises(ReconError, match="all zeros"):
        boxes.score_volume("a.h5", 0 * truth, truth, {0: (PLATEAU,)}, (48, 40))


@pytest.fixture
def files(tmp_path):
    targets, predictions, table = tmp_path / "targets", tmp_path / "out", tmp_path / "brain.csv"
    targets.mkdir()
    predictions.mkdir()
    truth = volume(np.random.default_rng(1))
    for name, error in (("file1", 0.05), ("file2", 0.2), ("file3", 0.0), ("file5", 0.0)):
        with h5py.File(targets / f"{name}.h5", "w") as file:
            file["reconstruction_rss"] = truth.astype(np.float32)
        if name != "file3":
            with h5py.File(predictions / f"{name}.h5", "w") as file:
                # One slice too few in file5.
                file["reconstruction"] = (truth + error)[: 1 if name == "file5" else 2].astype(np.float32)
                if name == "file1":  # file2 is another program's, which does not say
                    mask = {"name": "equispaced", "realised_acceleration": 3.456, "calibration": [[13, 27]]}
                    maps = "ESPIRiT from the calibration region"
                    file.attrs["provenance"] = json.dumps({"mask": mask, "coil_maps": maps})
    lines = [f"{name},1,No,20,32,8,6,Mass" for name in ("file1", "file2", "file3", "file5", "file9")]
    lines += ["file2,0,No,5,5,9,9,Edema ", "file2,0,No,5,5,9,9,Edema", "file2,0,Yes,,,,,Normal for age"]
    table.write_text(HEADER + "".join(line + "\n" for line in lines))
    return targets, predictions, table


def test_from_files_to_the_page(files, tmp_path, capsys):
    targets, predictions, table = files
    out, scores = tmp_path / "page.md", tmp_path / "scores.json"
    words = ["boxes", "--csv", table, "--targets", targets, "--reconstructions", predictions]
    with pytest.raises(SystemExit) as status:  # one volume could not be scored
        command.main([str(word) for word in [*words, "--out", out, "--json", scores]])
    assert status.value.code == 1
    page = out.read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.splitlines() if "|" in line}
    assert lines["Mass"][1:3] == ["2", "2"]
    assert lines["Edema"][1:3] == ["1", "1"]
    assert lines["**all boxes**"][1] == "3"
    assert lines[boxes.OUTSIDE][1] == "3 slices"
    assert lines["Mass"][-1].strip(" |") == "1.00"  # a constant error changes no contrast
    assert "- acceleration: equispaced, realised ×3.46 (1 volume)\n" in page
    assert "- coil maps: ESPIRiT from the calibration region; calibration region: 14 (1 volume)\n" in page
    assert "- acceleration and calibration: not stated by the files of 1 volume\n" in page
    assert "1 repeated lines" in page
    assert "Findings of a whole study, without a box (1 volume): Normal for age." in page
    assert "No reconstruction of 1: file3.h5." in page
    assert "file5.h5" in page
    assert "it has 1 slices but the target has 2" in page
    found = json.loads(scores.read_text())["scores"]
    assert {score["volume"] for score in found} == {"file1.h5", "file2.h5"}
    wrong = {score["volume"]: score["psnr"] for score in found if score["label"] == "Mass"}
    assert wrong["file1.h5"] - wrong["file2.h5"] == pytest.approx(20 * math.log10(4), abs=1e-3)
    assert all(score["found"] is None for score in found if score["label"] in boxes.REST)


def test_labels_that_are_asked_for(files):
    targets, predictions, _ = files
    annotations = Annotations({"file1": {0: (Box("Mass", 20, 32, 8, 6), Box("Edema", 1, 5, 6, 6))}})
    found = boxes.score_files(annotations, targets / "file1.h5", predictions, ["Edema"])
    assert [score.label for score in found.scores] == ["Edema", boxes.OUTSIDE, boxes.TISSUE]
    # What is outside is outside of every box, asked for or not: 40 x 40 without 48 and 36 pixels.
    assert found.scores[1].pixels == 1600 - 48 - 36
    with pytest.raises(ReconError, match="no box has the label 'Cyst'; there are: Edema; Mass"):
        boxes.score_files(annotations, targets, predictions, ["Cyst"])


def test_folders_that_are_not_there(files, tmp_path):
    targets, predictions, _ = files
    with pytest.raises(ReconError, match="no such file or folder of targets"):
        boxes.score_files(Annotations(), tmp_path / "absent", predictions)
    with pytest.raises(ReconError, match="no such folder of reconstructions"):
        boxes.score_files(Annotations(), targets, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReconError, match=r"there are no \.h5 files"):
        boxes.score_files(Annotations(), tmp_path / "empty", predictions)
    assert boxes.score_files(Annotations(), targets, predictions).unmarked == [
        f"file{n}.h5" for n in (1, 2, 3, 5)
    ]
