"""``recon ct`` as a person meets it: what it writes, prints and answers."""

from __future__ import annotations

import json
import math
import re

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, save_prior
from recon.cli import main
from recon.io.ct_files import ct_format
from recon.io.segmentation import read_segmentation

MU = 0.02
SIDE, PIXEL = 40, 0.5


@pytest.fixture
def recon(capsys):
    """Run the command; gives its exit status, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return exit_.value.code, printed.out, printed.err

    return run


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
        (("--challenge", "htc2022", "--solver", "tv"), "samples the posterior, and tv has no prior"),
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
    monkeypatch.setattr("recon.htc2022.NFE", 2)
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
        (("--photons", 1e4, "--noise-std", 0.1), "either the number of photons or the noise level"),
        (("--threads", 0), "threads must be at least 1, got 0"),
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
