"""``recon ct`` as a person meets it: what it writes, prints and answers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from scipy.io import savemat

from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, save_prior
from recon import ReconError
from recon.ct import CTSettings, reconstruct_ct_file
from recon.htc2022 import FIRST
from recon.io.ct_files import ct_format
from recon.io.ct_volume import CTVolume
from recon.io.dicom_series import read_dicom_series, write_dicom_series
from recon.io.segmentation import read_segmentation
from recon.solvers import make_solver

MU = 0.02
SIDE, PIXEL = 40, 0.5


def tiny_prior(folder, unit):
    path = folder / f"{unit}.safetensors"
    settings = NetworkSettings(channels=1, widths=(8,), embedding=8, sigma_data=0.5)
    contract = Contract(channels="real", unit=unit, name="tiny", level=0.5, size_multiple=2)
    save_prior(path, NetworkPrior(DenoisingUNet(settings), contract))
    return path


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return tiny_prior(tmp_path_factory.mktemp("prior"), "water")


def disc(side=SIDE, pixel=PIXEL):
    """A disc of 7 mm radius, off the centre."""
    y, x = (
        (((side - 1) / 2 - torch.arange(side)) * pixel)[:, None],
        (torch.arange(side) - (side - 1) / 2) * pixel,
    )
    return MU * ((x - 1) ** 2 + (y + 0.5) ** 2 < 7**2).float()


def noisy(sinogram):
    return sinogram + 0.002 * torch.randn(sinogram.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def challenge(tmp_path):
    """A file of the Helsinki Tomography Challenge, with its last view repeating the first."""
    geometry = FanBeam(equispaced_angles(72, 2 * math.pi), 60, 0.6, 80.0, 110.0)
    sinogram = noisy(CTOperator(geometry, (SIDE, SIDE), PIXEL)(disc())).numpy()
    parameters = {
        "angles": np.arange(73) * 5.0,
        "numDetectorsPost": 60,
        "distanceSourceOrigin": 80.0,
        "distanceSourceDetector": 110.0,
        "pixelSizePost": 0.6,
        "effectivePixelSizePost": 20.0 / 512,
    }
    path = tmp_path / "full.mat"
    savemat(path, {"CtDataFull": {"sinogram": np.vstack([sinogram, sinogram[:1]]), "parameters": parameters}})
    return path


@pytest.fixture
def exchange(tmp_path):
    """A Data Exchange file of two slices, counts, without the size of an element."""
    geometry = ParallelBeam(equispaced_angles(60), 48, 0.5)
    line = noisy(CTOperator(geometry, (SIDE, SIDE), PIXEL)(disc()))
    counts = 1e4 * torch.exp(-torch.stack([line, line], dim=1)).numpy()
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["exchange/data"] = (counts + 100).astype(np.float32)
        file["exchange/data_white"] = np.full((2, 2, 48), 10100, np.float32)
        file["exchange/data_dark"] = np.full((2, 2, 48), 100, np.float32)
        file["exchange/theta"] = np.arange(60) * 3.0
    return path


def test_challenge_file_with_the_default_solver(recon, challenge, prior, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = recon(
        *("ct", challenge, "--out", out, "--arc", 180, "--start", 30, "--prior", prior, "--size", SIDE),
        *("--num-samples", 2, "--nfe", 3, "--set", "eta=0", "--keep-samples", "--figures", "--seed", 4),
    )
    assert status == 0, stderr
    assert stdout == f"1 of 1 file reconstructed into {out}. Not for diagnostic use.\n"
    assert sorted(path.name for path in out.iterdir()) == ["full.h5", "full_00.png"]
    assert (out / "full_00.png").read_bytes().startswith(b"\x89PNG")
    with h5py.File(out / "full.h5") as file:
        mean, std = file["reconstruction"][()], file["reconstruction_std"][()]
        assert file["samples"].shape == (1, 2, SIDE, SIDE)
        assert file.attrs["units"] == "1/mm"
        facts = json.loads(file.attrs["provenance"])
    assert mean.shape == std.shape == (1, SIDE, SIDE)
    middle = mean[0, 15:25, 15:25]
    assert middle.mean() == pytest.approx(MU, rel=0.1)
    assert facts["format"] == "htc2022"
    assert facts["geometry"]["name"] == "FanBeam"
    assert facts["geometry"]["angles_degrees"] == [float(a) for a in range(30, 211, 5)]
    assert facts["geometry"]["views_of_the_file"] == 72
    assert facts["image"]["pixel_size"] == pytest.approx(20 / SIDE)
    assert (facts["seed"], facts["num_samples"], facts["prior"]["name"]) == (4, 2, "tiny")
    assert "37 of 72 views" in stderr


def test_the_challenge(recon, challenge, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = recon(
        *("ct", challenge, "--challenge", "htc2022", "--out", out, "--prior", tiny_prior(tmp_path, "object")),
        *("--arc", 90, "--start", 45, "--num-samples", 2, "--nfe", 2),
    )
    assert status == 0, stderr
    assert stdout == f"1 of 1 file reconstructed into {out}. Not for diagnostic use.\n"
    assert "full.mat: disc segmented from 19 views" in stderr
    segmentation, probability = read_segmentation(out / "full.h5")
    assert segmentation.shape == probability.shape == (512, 512)
    np.testing.assert_array_equal(segmentation, probability > 0.5)
    with h5py.File(out / "full.h5") as file:
        facts = json.loads(file.attrs["provenance"])
    assert facts["angles_degrees"] == [float(a) for a in range(45, 136, 5)]
    assert (facts["num_samples"], facts["prior"]["name"]) == (2, "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--challenge", "htc2023"), "unknown challenge 'htc2023': htc2022 is known"),
        (("--challenge", "htc2022", "--size", 64), "--size has no meaning for --challenge htc2022"),
        (("--challenge", "htc2022", "--figures"), "--figures has no meaning"),
        (("--challenge", "htc2022", "--rings"), "--rings has no meaning"),
        (("--challenge", "htc2022", "--also", "nifti"), "--also has no meaning"),
        (("--challenge", "htc2022", "--units", "1/mm"), "--units has no meaning"),
        (("--challenge", "htc2022", "--mu-water", 0.02), "--mu-water has no meaning"),
        (("--challenge", "htc2022", "--resolve", 10), "--resolve has no meaning"),
        (("--challenge", "htc2022", "--solver", "tv"), "searches with dds, not tv"),
        (("--challenge", "htc2022", "--set", "eta=0"), "--set has no meaning for --challenge htc2022"),
    ],
)
def test_what_the_challenge_does_not_take(recon, challenge, tmp_path, arguments, message):
    status, _, stderr = recon("ct", challenge, "--out", tmp_path / "out", *arguments)
    assert status == 1
    assert message in stderr


def test_a_prior_of_another_kind_is_refused_for_the_challenge(recon, challenge, prior, tmp_path):
    out = tmp_path / "out"
    status, _, stderr = recon("ct", challenge, "--challenge", "htc2022", "--prior", prior, "--out", out)
    assert status == 1
    assert "needs a prior of one material" in stderr
    assert list(out.iterdir()) == []


def test_demo(recon, tmp_path, monkeypatch):
    (tmp_path / "discs.safetensors").write_bytes(tiny_prior(tmp_path, "object").read_bytes())
    monkeypatch.setattr("priors.files._WEIGHTS", tmp_path)
    monkeypatch.setattr("recon.htc2022.FIRST", replace(FIRST, nfe=4))
    monkeypatch.setattr("recon.htc2022.ROUNDS", 0)
    out = tmp_path / "demo"
    status, stdout, stderr = recon("demo", "--ct", "--out", out, "--num-samples", 1)
    assert status == 0, stderr
    assert sorted(path.name for path in out.iterdir()) == ["demo_disc.h5", "demo_disc.png"]
    score = re.search(r"correlation with the reference: (-?[\d.]+), from 91 views", stdout)
    assert score is not None, stdout
    # An untrained prior knows nothing of discs, and the data alone show half of the edges.
    assert float(score[1]) > 0.5
    status, _, stderr = recon("demo", "--ct", "--acceleration", 4)
    assert status == 1
    assert "--acceleration belongs to the brain" in stderr


def test_counts_of_unknown_element_size(recon, exchange, tmp_path):
    status, _, stderr = recon(
        "ct", exchange, "--out", tmp_path / "out", "--solver", "fbp", "--size", 48, "--slice", 1
    )
    assert status == 0, stderr
    with h5py.File(tmp_path / "out" / "scan.h5") as file:
        image = file["reconstruction"][()]
        assert file.attrs["units"] == "1/element"
    assert "pixels of 1 elements" in stderr
    # Elements of 0.5 mm.
    assert image.shape == (1, 48, 48)
    assert image[0, 20:28, 20:28].mean() == pytest.approx(MU * 0.5, rel=0.05)


def test_element_size_given_and_hounsfield_units(recon, exchange, tmp_path):
    status, _, stderr = recon(
        *("ct", exchange, "--out", tmp_path / "out", "--solver", "tv", "--detector-spacing", 0.5),
        *("--detector-offset", 0, "--views", 30, "--units", "HU", "--mu-water", MU),
    )
    assert status == 0, stderr
    with h5py.File(tmp_path / "out" / "scan.h5") as file:
        image = file["reconstruction"][()]
        assert file.attrs["units"] == "HU"
    assert image.shape == (2, 48, 48)
    assert abs(image[:, 20:28, 20:28].mean()) < 60
    assert image[:, :3, :3].mean() == pytest.approx(-1000, abs=60)


def images(tmp_path, count=3):
    """A DICOM series of discs of water, 1 mm pixels, in HU."""
    hu = 1000 * (disc(48, 1.0).expand(count, 48, 48) / MU - 1)
    volume = CTVolume(hu.contiguous(), (1.0, 1.0), 2.5, (5.0, 6.0, 7.0))
    write_dicom_series(tmp_path / "series", volume)
    return tmp_path / "series"


def test_a_simulated_scan_with_its_truth_in_every_format(recon, tmp_path):
    out = tmp_path / "out"
    status, _, stderr = recon(
        *("ct", images(tmp_path), "--simulate", "--views", 90, "--photons", 1e5, "--units", "HU"),
        *("--solver", "fbp", "--set", "filter=hann", "--slice", 1, "--slice", 2),
        *("--also", "nifti", "--also", "dicom", "--out", out),
    )
    assert status == 0, stderr
    assert "2 slices from 90 of 90 views, 24 × 24 pixels of 2 mm" in stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "series.h5", "series.nii.gz", "series_dicom", "series_std.nii.gz",
    ]  # fmt: skip
    with h5py.File(out / "series.h5") as file:
        mean, truth = file["reconstruction"][()], file["reference"][()]
        facts = json.loads(file.attrs["provenance"])
    expected = 1000 * (disc(48, 1.0).reshape(24, 2, 24, 2).mean((1, 3)) / MU - 1)
    np.testing.assert_allclose(truth[0], expected, atol=1e-2)
    assert abs(mean - truth).mean() < 40
    assert facts["simulation"]["photons"] == facts["photons"] == 1e5
    assert facts["simulation"]["views"] == 90
    written: Any = nibabel.load(out / "series.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), mean.transpose(2, 1, 0))
    series = read_dicom_series(out / "series_dicom" / "mean")
    np.testing.assert_allclose(series.hu, mean, atol=0.501)
    # Half a pixel of the series from its first one, and the second of its slices.
    np.testing.assert_allclose(series.origin, (5.5, 6.5, 9.5))
    assert (series.pixel_spacing, series.slice_spacing) == ((2.0, 2.0), 2.5)


def test_a_volume_of_uneven_slices_is_not_exported(recon, tmp_path):
    path = tmp_path / "hu.h5"
    with h5py.File(path, "w") as file:
        file["a/hu"] = 1000 * (disc(24, 1.0).expand(3, 24, 24) / MU - 1)
        file["a"].attrs["pixel_spacing_mm"] = (1.0, 1.0)
        file["a"].attrs["z_mm"] = (0.0, 5.0, 11.0)
    out = tmp_path / "out"
    arguments = ("ct", path, "--simulate", "--views", 20, "--solver", "fbp", "--out", out)
    status, _, stderr = recon(*arguments, "--also", "nifti")
    assert status == 1
    assert "these lie 5 to 6 mm apart" in stderr
    assert list(out.iterdir()) == []
    status, _, stderr = recon(*arguments)
    assert status == 0, stderr
    assert [file.name for file in out.iterdir()] == ["hu.h5"]


def test_any_values_are_exported(recon, exchange, tmp_path):
    """Elements a hundred times smaller make HU a hundred times larger."""
    out = tmp_path / "out"
    arguments = (
        *("ct", exchange, "--solver", "fbp", "--detector-spacing", 5e-3, "--detector-offset", 0),
        *("--units", "HU", "--also", "nifti", "--also", "dicom", "--out", out),
    )
    status, _, stderr = recon(*arguments)
    assert status == 0, stderr
    with h5py.File(out / "scan.h5") as file:
        mean = file["reconstruction"][()]
    assert mean.max() > 5e4
    series = read_dicom_series(out / "scan_dicom" / "mean")
    np.testing.assert_allclose(series.hu, mean, atol=0.501 * abs(mean).max() / 32767)
    # What is in the way is seen before anything is written.
    (out / "scan_dicom" / "std" / "notes.txt").write_text("mine")
    (out / "scan.h5").unlink()
    status, _, stderr = recon(*arguments)
    assert status == 1
    assert "std: not overwritten, it exists" in stderr
    assert not (out / "scan.h5").exists()


def test_no_slices_are_refused(exchange, tmp_path):
    with pytest.raises(ReconError, match=r"scan\.h5: no slices are chosen, of the 2 in the file"):
        reconstruct_ct_file(exchange, tmp_path / "out.h5", None, make_solver("fbp"), CTSettings(), slices=[])


def test_corrections_are_asked_for_and_recorded(recon, exchange, tmp_path):
    (tmp_path / "water.json").write_text('{"coefficients": [2.0], "largest": 3.0}')
    plain = ("ct", exchange, "--solver", "fbp", "--size", 24, "--slice", 0, "--out")
    options = ("--rings", "--truncated", "--detector-offset", 0, "--beam-hardening", tmp_path / "water.json")
    made = []
    for number, given in enumerate(((), options)):
        status, _, stderr = recon(*plain, tmp_path / str(number), *given)
        assert status == 0, stderr
        assert "do not fall to air" not in stderr
        with h5py.File(tmp_path / str(number) / "scan.h5") as file:
            made.append((file["reconstruction"][0], json.loads(file.attrs["provenance"])))
    (before, told), (after, facts) = made
    assert told["corrections"] == {"rings": False, "beam_hardening": None, "truncated": False}
    assert facts["corrections"] == {
        "rings": True,
        "beam_hardening": {"coefficients": [2.0], "largest": 3.0},
        "truncated": True,
    }
    assert facts["geometry"]["detector_offset"] == 0
    assert told["geometry"]["detector_offset"] == pytest.approx(0, abs=0.2)
    # Twice the line integrals.
    assert after[10:14, 10:14].mean() == pytest.approx(2 * before[10:14, 10:14].mean(), rel=0.03)


def test_a_truncated_scan_is_told(recon, exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        for name in ("data", "data_white", "data_dark"):
            narrow = file[f"exchange/{name}"][..., 13:35]
            del file[f"exchange/{name}"]
            file[f"exchange/{name}"] = narrow
    arguments = ("ct", exchange, "--solver", "cgls", "--detector-offset", 0, "--slice", 0, "--out")
    status, _, stderr = recon(*arguments, tmp_path / "a")
    assert status == 0, stderr
    assert "projections do not fall to air at the ends of the detector" in stderr
    status, _, stderr = recon(*arguments, tmp_path / "b", "--truncated")
    assert status == 0, stderr
    assert "do not fall to air" not in stderr
    with h5py.File(tmp_path / "a" / "scan.h5") as one, h5py.File(tmp_path / "b" / "scan.h5") as other:
        plain, room = one["reconstruction"][0], other["reconstruction"][0]
    assert plain.shape == room.shape == (22, 22)
    inside = slice(5, 17)
    errors = [abs(image[inside, inside] - MU * 0.5).mean() for image in (plain, room)]
    assert errors[1] < 0.8 * errors[0], errors


def test_levels_of_noise_above_what_is_to_be_seen(recon, challenge, prior, tmp_path):
    arguments = (
        "ct",
        challenge,
        "--prior",
        prior,
        "--size",
        16,
        "--nfe",
        2,
        "--num-samples",
        1,
        "--views",
        9,
    )
    for number, (resolve, warned) in enumerate(((20, True), (40, False))):
        out = tmp_path / str(number)
        status, _, stderr = recon(*arguments, "--set", "sigma_min=0.03", "--resolve", resolve, "--out", out)
        assert status == 0, stderr
        assert ("the noise levels end at 30 HU, so differences of 20 HU are not" in stderr) == warned
        with h5py.File(out / "full.h5") as file:
            warnings = json.loads(file.attrs["provenance"])["warnings"]
        assert any("noise levels end" in warning for warning in warnings) == warned


def without_angles(exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        del file["exchange/theta"]
    return exchange


def angles_in_radians(exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        file["exchange/theta"][...] = np.arange(60) * math.pi / 60
    return exchange


def other_detector(exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        del file["exchange/data_white"]
        file["exchange/data_white"] = np.full((2, 2, 47), 10100, np.float32)
    return exchange


def negative_counts(exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        file["exchange/data"][3, 0, 5] = -1
    return exchange


def one_view(exchange, tmp_path):
    with h5py.File(exchange, "a") as file:
        for name in ("data", "theta"):
            first = file[f"exchange/{name}"][:1]
            del file[f"exchange/{name}"]
            file[f"exchange/{name}"] = first
    return exchange


def cut_short(exchange, tmp_path):
    exchange.write_bytes(exchange.read_bytes()[:-1000])
    return exchange


def series_of_images(exchange, tmp_path):
    return images(tmp_path)


def series_without_a_slice(exchange, tmp_path):
    (images(tmp_path, 6) / "0003.dcm").unlink()
    return tmp_path / "series"


def series_with_a_cut_file(exchange, tmp_path):
    path = images(tmp_path) / "0002.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    return tmp_path / "series"


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (without_angles, (), "there is no dataset 'exchange/theta', so no angles"),
        (angles_in_radians, (), "these look like radians"),
        (other_detector, (), r"'exchange/data_white' has slices of (2, 47), but 'exchange/data' of (2, 48)"),
        (cut_short, (), "scan.h5 cannot be read as HDF5, it may be cut short"),
        (one_view, (), "the centre of rotation is not found, give the detector's offset in mm ("),
        (negative_counts, (), "the sinogram holds negative values, which are no counts"),
        (series_of_images, (), "is a CT image, not a projection: --simulate makes a scan of such images"),
        (series_without_a_slice, ("--simulate",), "1 slices are missing between it and 0002.dcm"),
        (series_with_a_cut_file, ("--simulate",), "0002.dcm: its pixels cannot be read, it may be cut short"),
    ],
)
def test_bad_input_is_one_sentence(recon, exchange, tmp_path, spoil, options, message):
    out = tmp_path / "out"
    status, _, stderr = recon("ct", spoil(exchange, tmp_path), "--solver", "fbp", "--out", out, *options)
    assert status == 1
    (sentence,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert message in sentence
    assert str(tmp_path) in sentence
    assert list(out.iterdir()) == []


def test_a_bad_file_does_not_stop_the_others(recon, challenge, tmp_path):
    broken = tmp_path / "broken.mat"
    broken.write_bytes(challenge.read_bytes()[:300])
    status, stdout, stderr = recon(
        "ct", broken, challenge, "--out", tmp_path / "out", "--solver", "fbp", "--size", 20
    )
    assert status == 1
    assert "1 of 2 files reconstructed" in stdout
    (sentence,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert str(broken) in sentence
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full.h5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--start", 30), "--start belongs to --arc"),
        (("--arc", 400), "an arc lies between 0 and 360 degrees, got 400"),
        (("--views", 100), "100 views are asked of a geometry that has 72"),
        (("--units", "1/cm"), "not in '1/cm'"),
        (("--detector-spacing", 0.1), "the geometry is in the file"),
        (("--slice", 3), "there is no slice 3"),
        (("--size", 0), "an image has at least 1 pixel a side, not 0"),
        (("--pixel-size", 0), "the side of a pixel is a positive number of mm, not 0"),
        (("--photons", 1e4, "--noise-std", 0.1), "either the number of photons or the noise level"),
        (("--threads", 0), "threads must be at least 1, got 0"),
        (("--also", "png"), "written as nifti or dicom too, not as 'png'"),
        (("--detector-offset", "middle"), "--detector-offset is a number of mm or auto, not 'middle'"),
        (("--resolve", 0), "what is to be resolved is a positive number of HU, got 0"),
        (("--simulate",), "full.mat cannot be read as HDF5"),
        (("--simulate", "--noise-std", 0.1), "--noise-std has no meaning for --simulate"),
    ],
)
def test_impossible_requests(recon, challenge, tmp_path, arguments, message):
    status, _, stderr = recon(
        "ct", challenge, "--out", tmp_path / "out", "--solver", "fbp", "--size", 20, *arguments
    )
    assert status == 1
    assert message in stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_prior_on_complex_images_is_refused(recon, challenge, tmp_path):
    status, _, stderr = recon("ct", challenge, "--out", tmp_path / "out", "--prior", "brain", "--size", 20)
    assert status == 1
    assert "complex" in stderr


def test_formats_are_recognised(challenge, exchange, tmp_path):
    assert ct_format(challenge) == "htc2022"
    assert ct_format(exchange) == "dxchange"
    assert ct_format(tmp_path) == "dicom-ct-pd"
    with pytest.raises(ReconError, match=r"cannot be read as HDF5, it may be cut short"):
        ct_format(cut_short(exchange, tmp_path))
