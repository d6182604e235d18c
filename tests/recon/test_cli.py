"""The command ``recon`` as a person meets it: what it writes, prints and answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from operators.errors import OperatorError
from operators.masks import make_mask
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, save_prior
from priors.files import prior_hash
from recon import DDS, __version__
from recon.cli import app, main
from recon.cli.mri import MASK_KINDS
from recon.cli.progress import progress_bar
from recon.cli.run import make_folder
from recon.solvers import SOLVERS
from tests.recon import fastmri_files as files

ROOT = Path(__file__).resolve().parents[2]
UNDERSAMPLE = ("--mask", "equispaced", "--acceleration", 3, "--center-fraction", 0.2)
# An untrained prior errs by much, and drawing that error would leave little to score.
FAST = ("--num-samples", 2, "--nfe", 2, "--set", "eta=0")


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_prior(path, channels="complex", **header):
    """Write a prior that takes no time; `header` changes fields of the contract after it was checked."""
    count = {"complex": 2, "real": 1}[channels]
    settings = NetworkSettings(channels=count, widths=(8,), embedding=8, sigma_data=0.5)
    # A fresh network's head is zero: what is left, the skip connection, denoises Gaussian images exactly.
    contract = Contract(channels=channels, name="tiny", anatomy=("knee",), size_multiple=2)
    save_prior(path, NetworkPrior(DenoisingUNet(settings), contract))
    if header:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for section, values in header.items():
            metadata[section] = json.dumps({**json.loads(metadata[section]), **values})
        save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="session")
def prior(tmp_path_factory):
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sentences(stderr):
    """The errors that were printed: each must be one line."""
    return [line.removeprefix("Error: ") for line in stderr.splitlines() if line.startswith("Error: ")]


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# What goes well


def test_from_file_to_scores(recon, prior, tmp_path):
    source, out = files.knee(tmp_path), tmp_path / "out"
    command = ("mri", source, *UNDERSAMPLE, *FAST, "--seed", 1, "--prior", prior, "--out", out)
    status, stdout, stderr = recon(*command, "--keep-samples", "--figures")
    assert status == 0
    assert contents(out) == [source.name, "file1000001_00.png", "file1000001_01.png"]
    assert (out / "file1000001_00.png").read_bytes().startswith(b"\x89PNG")
    assert stdout == f"1 of 1 file reconstructed into {out}. Not for diagnostic use.\n"
    with h5py.File(out / source.name) as file:
        assert file["reconstruction"].shape == file["reconstruction_std"].shape == (2, 32, 32)
        assert file["samples"].shape == (2, 2, 32, 32)
        provenance = json.loads(file.attrs["provenance"])
    facts = {"name": "tiny", "file": prior.name, "sha256": prior_hash(prior), "precision": "fp32"}
    assert provenance["prior"] == facts
    assert (provenance["seed"], provenance["num_samples"]) == (1, 2)
    assert provenance["solver"]["nfe"] == 2
    realised = provenance["mask"]["realised_acceleration"]
    assert re.search(
        rf"^{source.name}: 2 slices, equispaced mask of acceleration {realised:.2f}, \d+ s$", stderr, re.M
    )
    for note in provenance["warnings"]:
        assert f"Note: {note}\n" in stderr
    assert files.PATIENT not in stdout + stderr
    assert files.PATIENT.encode() not in (out / source.name).read_bytes()

    scores = tmp_path / "scores.json"
    status, stdout, _ = recon("evaluate", source, out, "--json", scores)
    assert status == 0
    assert source.name in stdout
    (volume,) = json.loads(scores.read_text())["volumes"]
    assert volume["shape"] == [2, 32, 32]
    assert volume["metrics"]["PSNR"] > 13


def test_neither_company_nor_order_changes_a_bit(recon, prior, tmp_path):
    sources = [files.knee(tmp_path), files.singlecoil(tmp_path)]
    datasets = ("reconstruction", "reconstruction_std")
    results = []
    for number, given in enumerate([sources, sources[::-1], sources[:1], [tmp_path]]):
        out = tmp_path / f"out{number}"
        assert recon("mri", *given, *UNDERSAMPLE, *FAST, "--prior", prior, "--out", out)[0] == 0
        with h5py.File(out / sources[0].name) as file:
            results.append([file[name][()].tobytes() for name in datasets])
    assert results[1:] == results[:1] * 3


def test_options_reach_the_computation(recon, prior, tmp_path):
    source, out = files.knee(tmp_path), tmp_path / "out"
    options = ("--set", "gamma=3", "--set", "eta=0.5", "--noise-std", 2e-6, "--num-coils", 2, "--threads", 1)
    more = ("--anatomy", "brain", "--precision", "bf16", "--device", "cpu:0", "--num-samples", 1, "--nfe", 3)
    status, _, stderr = recon("mri", source, "--prior", prior, "--out", out, *options, *more)
    assert status == 0
    with h5py.File(out / source.name) as file:
        provenance = json.loads(file.attrs["provenance"])
    assert [provenance["solver"][name] for name in ("gamma", "eta", "nfe")] == [3.0, 0.5, 3]
    assert provenance["slices"][0]["noise_std"] == 2e-6
    assert provenance["slices"][0]["threads"] == 1
    assert provenance["num_coils"] == 2
    assert provenance["prior"]["precision"] == "bf16"
    assert provenance["device"] == "cpu:0"
    assert provenance["mask"]["name"] == "acquired"
    assert "Note: the images show a brain, but prior 'tiny' knows knee only\n" in stderr


def test_notes_of_one_file_among_many_name_it(recon, prior, tmp_path):
    knee, brain = files.knee(tmp_path), files.brain(tmp_path)
    status, _, stderr = recon("mri", knee, brain, *FAST, "--prior", prior, "--out", tmp_path / "out")
    assert status == 0
    assert f"Note: the images show a brain, but prior 'tiny' knows knee only ({brain.name})\n" in stderr
    assert stderr.count("not been calibrated") == 1


def test_a_real_prior_works_on_real_and_imaginary_part(recon, prior, tmp_path):
    source, out = files.knee(tmp_path), tmp_path / "out"
    real = write_prior(tmp_path / "real.safetensors", "real")
    images = []
    for path in (prior, real):
        assert recon("mri", source, *UNDERSAMPLE, *FAST, "--prior", path, "--out", out)[0] == 0
        with h5py.File(out / source.name) as file:
            images.append(file["reconstruction"][()])
    # Both are the same Gaussian denoiser, of Re and Im alike.
    np.testing.assert_allclose(images[1], images[0], rtol=1e-4, atol=1e-4 * images[0].max())


def test_demo(recon, prior, tmp_path, monkeypatch):
    (tmp_path / "brain.safetensors").write_bytes(prior.read_bytes())
    monkeypatch.setattr("priors.files._WEIGHTS", tmp_path)
    monkeypatch.setattr("recon.solvers.dds.DDS", partial(DDS, nfe=1, cg_iterations=2, eta=0.0))
    out = tmp_path / "demo"
    status, stdout, _ = recon("demo", "--out", out, "--num-samples", 1)
    assert status == 0
    with h5py.File(out / "demo_brain.h5") as file:
        slices = len(file["reconstruction"])
    assert contents(out) == ["demo_brain.h5", *(f"demo_brain_{index:02d}.png" for index in range(slices))]
    for method in ("zero-filled", "DDS, mean of 1"):
        scores = re.search(rf"^ *{method} +([\d.]+) +([\d.]+) +([\d.]+) *$", stdout, re.MULTILINE)
        assert scores is not None, stdout
        assert float(scores[1]) > 15
    assert "Note: " in stdout
    assert stdout.endswith(f"Results and pictures are in {out}. Not for diagnostic use.\n")


# Bad files


def knee_with(change):
    """Builder of a knee file whose contents `change` was applied to."""

    def build(path):
        files.knee(path.parent, path.name)
        with h5py.File(path, "r+") as file:
            change(file)

    return build


def kspace_with(change):
    def apply(file):
        kspace = file["kspace"][()]
        change(kspace)
        file["kspace"][...] = kspace

    return knee_with(apply)


def replaced(function):
    def apply(file):
        kspace = function(file["kspace"][()])
        del file["kspace"]
        file["kspace"] = kspace

    return knee_with(apply)


def without_kspace(file):
    del file["kspace"]


def undersampled_without_centre(path):
    files.undersampled(path.parent, path.name)
    with h5py.File(path, "r+") as file:
        mask = np.zeros(46, dtype=np.float32)
        mask[5:43:4] = 1  # 23, the centre, is left out
        mask[21:25] = 0
        file["mask"][...] = mask
        file["kspace"][...] = files.make_kspace(2, 3, 64, 46) * mask


def undersampled_with_narrow_centre(path):
    undersampled_without_centre(path)
    with h5py.File(path, "r+") as file:
        mask = file["mask"][()]
        mask[22:24] = 1
        file["mask"][...] = mask
        file["kspace"][...] = files.make_kspace(2, 3, 64, 46) * mask


def truncated(path):
    content = files.knee(path.parent, path.name).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damaged(path):
    with h5py.File(files.knee(path.parent, path.name)) as file:
        address = h5py.h5o.get_info(file["ismrmrd_header"].id).addr
    content = bytearray(path.read_bytes())
    content[address : address + 8] = bytes(8)
    path.write_bytes(content)


BAD_FILES = {
    "not HDF5": (lambda path: path.write_text("no HDF5"), "this is not an HDF5 file"),
    "empty": (lambda path: path.write_bytes(b""), "this is not an HDF5 file"),
    "truncated": (truncated, "this HDF5 file cannot be opened"),
    "damaged": (damaged, "this HDF5 file cannot be read, it may be damaged"),
    "absent": (lambda path: None, "there is no such file"),
    "no kspace": (knee_with(without_kspace), "there is no dataset 'kspace'"),
    "real": (replaced(lambda k: k.real), "dataset 'kspace' must be complex, got float32"),
    "all zero": (kspace_with(lambda k: k.fill(0)), "dataset 'kspace' is all zeros"),
    "misshapen": (replaced(lambda k: k[0, 0]), r"dataset 'kspace' must have shape .* got \(64, 46\)"),
    "five axes": (replaced(lambda k: k[None]), r"must have shape .* got \(1, 2, 3, 64, 46\)"),
    "no slice": (replaced(lambda k: k[:0]), r"dataset 'kspace' is empty: its shape is \(0, 3, 64, 46\)"),
    "other width": (replaced(lambda k: k[..., :44]), "says 46 columns were encoded, but 'kspace' has 44"),
    "NaN": (kspace_with(lambda k: k[1, 2, 3].fill(np.nan)), "slice 1 of dataset 'kspace' holds NaN"),
    "infinity": (kspace_with(lambda k: k[0, 0].fill(np.inf)), "slice 0 of dataset 'kspace' holds NaN or inf"),
    "no calibration region": (undersampled_without_centre, "no calibration region"),
    "narrow calibration region": (
        undersampled_with_narrow_centre,
        "calibration region has 2 columns, .* least 3",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_does_not_stop_the_others(recon, prior, tmp_path, kind):
    build, pattern = BAD_FILES[kind]
    bad, good, out = tmp_path / "bad.h5", files.knee(tmp_path, "good.h5"), tmp_path / "out"
    build(bad)
    status, stdout, stderr = recon("mri", bad, good, *FAST, "--prior", prior, "--out", out)
    assert status == 1
    (sentence,) = sentences(stderr)
    assert re.match(rf"{re.escape(str(bad))}: .*{pattern}", sentence), sentence
    assert sentence.count(str(bad)) == 1
    assert stdout == f"1 of 2 files reconstructed into {out}. Not for diagnostic use.\n"
    assert contents(out) == ["good.h5"]
    with h5py.File(out / "good.h5") as file:
        assert (file["reconstruction"][()].max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--mask", "equispaced", "--center-fraction", 0), "no calibration region"),
        (
            ("--mask", "random", "--acceleration", 3, "--center-fraction", 0.045),
            "has 2 columns, .* at least 3",
        ),
        (
            ("--mask", "poisson", "--acceleration", 20, "--center-fraction", 0.6),
            "center_fraction 0.6.: lower one",
        ),
    ],
)
def test_a_mask_that_leaves_no_calibration_region(recon, prior, tmp_path, options, pattern):
    source, out = files.knee(tmp_path), tmp_path / "out"
    status, _, stderr = recon("mri", source, *options, *FAST, "--prior", prior, "--out", out)
    assert status == 1
    (sentence,) = sentences(stderr)
    assert re.match(rf"{re.escape(str(source))}: .*{pattern}", sentence), sentence
    assert contents(out) == []


def test_a_mask_for_undersampled_data(recon, prior, tmp_path):
    source, out = files.undersampled(tmp_path), tmp_path / "out"
    status, stdout, stderr = recon("mri", source, "--mask", "random", *FAST, "--prior", prior, "--out", out)
    assert status == 1
    (sentence,) = sentences(stderr)
    assert sentence.startswith(f"{source}: the data are undersampled already (dataset 'mask')")
    assert stdout.startswith("0 of 1 file ")
    assert contents(out) == []


def test_running_out_of_memory_does_not_stop_the_others(recon, prior, tmp_path, monkeypatch):
    from recon import mri

    first, second, out = files.knee(tmp_path, "a.h5"), files.knee(tmp_path, "b.h5"), tmp_path / "out"
    original = mri.slice_problem

    def hungry(kspace, *arguments, **keywords):
        if not (out / "a.h5").exists() and not tried:
            tried.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")
        return original(kspace, *arguments, **keywords)

    tried: list[bool] = []
    monkeypatch.setattr(mri, "slice_problem", hungry)
    status, _, stderr = recon("mri", first, second, *FAST, "--prior", prior, "--out", out)
    assert status == 1
    assert sentences(stderr) == [f"{first}: CUDA out of memory."]
    assert "Tried" not in stderr
    assert contents(out) == ["b.h5"]


def test_measured_data_are_never_overwritten(recon, prior, tmp_path):
    source = files.knee(tmp_path)
    before = source.read_bytes()
    status, _, stderr = recon("mri", source, *FAST, "--prior", prior, "--out", tmp_path)
    assert status == 1
    assert sentences(stderr) == [f"{source}: not overwritten, it holds measured k-space"]
    assert source.read_bytes() == before
    assert contents(tmp_path) == [source.name]


# Bad priors

BAD_PRIORS: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "network of one channel": (
        "real",
        {"contract": {"channels": "complex"}},
        "network has 1 channels, its contract 2",
    ),
    "network of two channels": (
        "complex",
        {"contract": {"channels": "real"}},
        "network has 2 channels, its contract 1",
    ),
    "weights of one channel": (
        "real",
        {"contract": {"channels": "complex"}, "network": {"channels": 2}},
        r"head.bias has shape \(4,\), expected \(8,\)",
    ),
    "three channels": (
        "complex",
        {"network": {"channels": 3}},
        r"head.bias has shape \(8,\), expected \(12,\)",
    ),
    "unknown channels": (
        "complex",
        {"contract": {"channels": "cmyk"}},
        "channels are 'complex', 'real' or 'rgb', not 'cmyk'",
    ),
    "no channels": ("complex", {"network": {"channels": 0}}, "impossible network settings"),
}


@pytest.mark.parametrize("kind", BAD_PRIORS)
def test_a_prior_for_another_channel_count(recon, tmp_path, kind):
    channels, header, pattern = BAD_PRIORS[kind]
    path = write_prior(tmp_path / "bad.safetensors", channels, **header)
    status, stdout, stderr = recon("mri", files.knee(tmp_path), "--prior", path, "--out", tmp_path / "out")
    assert (status, stdout) == (1, "")
    (sentence,) = sentences(stderr)
    assert re.match(rf"{re.escape(str(path))}.*{pattern}", sentence), sentence
    assert not (tmp_path / "out").exists()


def test_a_prior_that_is_none(recon, tmp_path):
    source = files.knee(tmp_path)
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    expected = {
        "absent.safetensors": r"no prior '.*absent.safetensors': neither a file nor one of the bundled",
        "text.safetensors": "text.safetensors is not a safetensors file",
        "foreign.safetensors": "foreign.safetensors is not a prior of this project",
    }
    for name, pattern in expected.items():
        status, stdout, stderr = recon("mri", source, "--prior", tmp_path / name, "--out", tmp_path / "out")
        assert (status, stdout) == (1, "")
        (sentence,) = sentences(stderr)
        assert re.search(pattern, sentence), sentence
        assert not (tmp_path / "out").exists()


# Bad options


@pytest.mark.parametrize(
    ("options", "status", "pattern"),
    [
        (("--acelleration", 4), 2, r"No such option: --acelleration.* \(see recon mri --help\)"),
        (("--mask", "spiral"), 1, "unknown mask kind 'spiral': the kinds are random, equispaced, .*poisson"),
        (
            ("--mask", "random", "--acceleration", 0.5),
            1,
            "acceleration of a mask must be .* above 1, got 0.5",
        ),
        (("--mask", "random", "--acceleration", "fast"), 2, "Invalid value for '--acceleration'"),
        (("--acceleration", 4), 1, "--acceleration and --center-fraction belong to --mask"),
        (("--center-fraction", 0.1), 1, "--acceleration and --center-fraction belong to --mask"),
        (("--num-samples", 0), 1, "num_samples must be at least 1, got 0"),
        (("--num-samples", 2.5), 2, "Invalid value for '--num-samples'"),
        (("--nfe", 0), 1, "nfe must be at least 1, got 0"),
        (("--set", "eta=1.5"), 1, r"eta must lie in \[0, 1\], got 1.5"),
        (("--set", "eta=nan"), 1, r"eta must lie in \[0, 1\], got nan"),
        (("--set", "gamma=-1"), 1, "gamma must not be negative, got -1"),
        (("--set", "gamma=much"), 1, "setting gamma of solver dds is float or none, not 'much'"),
        (("--set", "gama=1"), 1, "solver dds has no setting 'gama': its settings are nfe,"),
        (("--set", "gamma"), 1, "--set takes NAME=VALUE, such as eta=0.5, not 'gamma'"),
        (("--set", "eta=0", "--set", "eta=1"), 1, "setting eta is given twice"),
        (("--solver", "magic"), 1, "there is no solver 'magic': the solvers are dds,"),
        (("--solver", "dds:best"), 1, "solver dds has no preset 'best'; its presets: paper, released"),
        (("--noise-std", 0), 1, "noise_std must be positive and finite, got 0"),
        (("--num-coils", 0), 1, "num_coils must be at least 1, got 0"),
        (("--device", "abacus"), 1, "unknown device 'abacus'"),
        (("--device", "meta"), 1, "there is no device 'meta' here"),
        (("--device", "cuda:99"), 1, "there is no device 'cuda:99' here"),
        (("--threads", 0), 1, "threads must be at least 1, got 0"),
        (("--precision", "fp8"), 1, "precision is 'fp32' or 'bf16', not 'fp8'"),
    ],
)
def test_options_that_make_no_sense(recon, prior, tmp_path, options, status, pattern):
    out = tmp_path / "out"
    code, stdout, stderr = recon("mri", files.knee(tmp_path), "--prior", prior, "--out", out, *options)
    assert (code, stdout) == (status, "")
    (sentence,) = stderr.splitlines()
    assert re.match(f"Error: .*{pattern}", sentence), sentence
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "pattern"),
    [
        (("frobnicate",), r"No such command 'frobnicate' \(see recon --help\)"),
        (("mri",), r"Missing argument 'files' \(see recon mri --help\)"),
        (("mri", "a.h5"), r"Missing option '--out' \(see recon mri --help\)"),
        (("evaluate", "a.h5"), r"Missing argument 'predictions' \(see recon evaluate --help\)"),
        (("prior", "train", "--epochs", "3"), r"No such option: --epochs.*\(see recon prior train --help\)"),
    ],
)
def test_commands_that_make_no_sense(recon, command, pattern):
    status, stdout, stderr = recon(*command)
    assert (status, stdout) == (2, "")
    (sentence,) = stderr.splitlines()
    assert re.match(f"Error: {pattern}", sentence), sentence


def test_mask_kinds_are_those_there_are():
    with pytest.raises(OperatorError) as error:
        make_mask("spiral", (32, 32), 4)
    assert str(error.value).endswith(f"the kinds are {', '.join(MASK_KINDS)}")


@pytest.mark.parametrize("command", [("mri",), ("demo",), ("prior", "train")])
def test_a_folder_that_cannot_be_written(recon, prior, tmp_path, monkeypatch, command):
    monkeypatch.setattr("priors.files._WEIGHTS", tmp_path)
    (tmp_path / "brain.safetensors").write_bytes(prior.read_bytes())
    (tmp_path / "file").write_text("in the way")
    inputs = {
        "mri": (files.knee(tmp_path), "--prior", prior),
        "demo": (),
        "train": (tmp_path, "--validation", tmp_path),
    }
    before = contents(tmp_path)
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        status, stdout, stderr = recon(*command, *inputs[command[-1]], "--out", out)
        assert (status, stdout) == (1, "")
        (sentence,) = stderr.splitlines()
        assert sentence.startswith(f"Error: the folder {out} cannot be written: ")
        assert contents(tmp_path) == before


def test_processes_that_make_one_folder_at_once(tmp_path, monkeypatch):
    folder, touch = tmp_path / "out", Path.touch

    def touch_while_another_starts(path):
        touch(path)
        monkeypatch.setattr(Path, "touch", touch)
        make_folder(folder)

    monkeypatch.setattr(Path, "touch", touch_while_another_starts)
    make_folder(folder)
    assert contents(folder) == []


def test_which_files_are_meant(recon, prior, tmp_path):
    empty, other, out = tmp_path / "empty", tmp_path / "other", tmp_path / "out"
    empty.mkdir()
    other.mkdir()
    first, second = files.knee(tmp_path), files.knee(other)
    expected = {
        (empty,): f"{empty}: the folder holds no .h5 file",
        (first, second): f"{first} and {second} would both be written as {first.name}",
        (first, first): f"{first} is given twice",
    }
    for given, sentence in expected.items():
        status, stdout, stderr = recon("mri", *given, "--prior", prior, "--out", out)
        assert (status, stdout, stderr) == (1, "", f"Error: {sentence}\n")
        assert not out.exists()


# recon evaluate


def test_evaluate_says_what_is_wrong(recon, tmp_path):
    source = files.knee(tmp_path)
    status, _, stderr = recon("evaluate", tmp_path / "absent", tmp_path)
    assert status == 1
    assert sentences(stderr) == [f"{tmp_path / 'absent'}: there is no such file or folder of targets"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / source.name).write_text("no HDF5")
    status, stdout, _ = recon("evaluate", source, tmp_path / "out")
    assert status == 1
    (line,) = (line for line in stdout.splitlines() if line.startswith("Not scored: "))
    assert line.count(source.name) == 1
    status, _, stderr = recon("evaluate", source, tmp_path / "out", "--acquisition", "AXT2")
    assert status == 1
    assert sentences(stderr) == [f"{source}: no volume there is of the acquisition 'AXT2'"]


def test_scores_that_cannot_be_written(recon, tmp_path):
    source, json_file = files.knee(tmp_path), tmp_path / "absent" / "scores.json"
    with h5py.File(source) as file:
        images = file["reconstruction_rss"][()]
    (tmp_path / "out").mkdir()
    with h5py.File(tmp_path / "out" / source.name, "w") as file:
        file["reconstruction"] = images
    status, stdout, stderr = recon("evaluate", source, tmp_path / "out", "--json", json_file)
    assert status == 1
    assert source.name in stdout  # the scores are shown all the same
    assert sentences(stderr) == [f"{json_file} cannot be written: No such file or directory"]


# recon prior


@pytest.fixture
def volumes(tmp_path):
    """Folders of two subjects: bright balls with inserts in 24 × 24 × 6 NIfTI volumes."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 24, 6)), indexing="ij")
    for number, name in enumerate(("train", "held_out")):
        images = 100.0 * (x**2 + y**2 + 0.3 * z**2 < 0.7) + 50 * ((x - 0.2 * number) ** 2 + y**2 < 0.1)
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(images.astype(np.float32), np.eye(4)), tmp_path / name / "a.nii.gz")
    return tmp_path / "train", tmp_path / "held_out"


def test_train_resume_measure_and_use_a_prior(recon, volumes, tmp_path):
    images, held_out = volumes
    run = tmp_path / "run"
    shape = ("--widths", "8", "--unshuffle", 1, "--patch", 16, "--batch", 2, "--precision", "fp32")
    named = ("--name", "ball", "--anatomy", "ball", "--anatomy", "knee")
    command = ("prior", "train", images, "--validation", held_out, "--out", run, *shape, *named)
    for steps in (3, 5):
        status, stdout, stderr = recon(*command, "--steps", steps)
        assert status == 0
        assert stdout == f"written to {run / 'prior.safetensors'}\n"
        assert stderr.startswith("6 slices to train on, 6 to validate on")
    assert contents(run) == ["curve.jsonl", "curve.png", "pictures", "prior.safetensors", "state.pt"]
    curve = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [3, 5]  # the second training went on with the first
    with safe_open(run / "prior.safetensors", framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["contract"])["name"] == "ball"
    assert json.loads(header["contract"])["anatomy"] == ["ball", "knee"]
    assert json.loads(header["training"])["steps"] == 5

    status, stdout, _ = recon(
        "prior", "evaluate", run / "prior.safetensors", held_out, "--patches", 4, "--patch", 16
    )
    assert status == 0
    rows = [line.split() for line in stdout.splitlines() if re.match(r"\s+\d", line)]
    table = json.loads(header["contract"])["error_table"]
    assert [float(row[0]) for row in rows] == [sigma for sigma, _ in table]
    for row in rows:
        sigma, noisy, denoised, error = map(float, row)
        assert noisy == pytest.approx(-20 * np.log10(np.sqrt(2) * sigma), abs=0.01)
        assert denoised == pytest.approx(-20 * np.log10(np.sqrt(2) * error), abs=0.02)

    source = files.knee(tmp_path)
    status, _, stderr = recon(
        "mri", source, *FAST, "--prior", run / "prior.safetensors", "--out", tmp_path / "out"
    )
    assert status == 0
    assert "knows" not in stderr  # a knee, as declared


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--widths", "8,x"), "--widths takes integers with commas between them, got '8,x'"),
        (("--blocks", 0), "impossible network settings"),
        (("--steps", 0), "training setting steps must be positive, got 0"),
        (("--patch", 15), "patch 15 is no multiple of 8"),
        (("--precision", "fp8"), "precision is 'fp32' or 'bf16', not 'fp8'"),
    ],
)
def test_training_that_makes_no_sense(recon, volumes, tmp_path, options, pattern):
    images, held_out = volumes
    status, stdout, stderr = recon(
        "prior", "train", images, "--validation", held_out, "--out", tmp_path / "run", *options
    )
    assert (status, stdout) == (1, "")
    (sentence,) = sentences(stderr)
    assert re.search(pattern, sentence), sentence


def test_images_of_a_prior_that_are_none(recon, prior, volumes, tmp_path):
    images, _ = volumes
    (tmp_path / "text.nii").write_text("no image")
    status, _, stderr = recon("prior", "evaluate", prior, tmp_path / "text.nii")
    assert status == 1
    assert sentences(stderr)[0].startswith(f"{tmp_path / 'text.nii'} cannot be read as NIfTI")
    for option in ("--patches", "--patch"):
        status, _, stderr = recon("prior", "evaluate", prior, images, option, 0)
        assert status == 1
        assert sentences(stderr) == [f"{option} must be at least 1, got 0"]


# The program


def test_version_and_help(recon):
    assert recon("--version") == (0, f"recon {__version__}\n", "")
    status, stdout, _ = recon()
    assert status == 2
    assert "recon mri scan.h5 --out out/" in stdout
    for command in (["mri"], ["evaluate"], ["demo"], ["prior"], ["prior", "train"], ["prior", "evaluate"]):
        status, stdout, stderr = recon(*command, "-h")
        assert (status, stderr) == (0, "")
        assert f"Usage: recon {' '.join(command)} " in stdout


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom recon.cli import main\n"
        "try:\n    main(['mri', '--help'])\nexcept SystemExit as exit_:\n    assert exit_.code == 0\n"
        "heavy = {'torch', 'numpy', 'h5py', 'matplotlib', 'operators', 'priors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # In time for OpenMP, which comes with torch: threads that spin stall each other on a busy machine.
        "import os\nassert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)


def test_exit_status_and_streams_of_the_process(prior, tmp_path):
    good, bad, out = files.knee(tmp_path), tmp_path / "absent.h5", tmp_path / "out"
    arguments = ["mri", good, bad, *FAST, "--prior", prior, "--out", out]
    command = [sys.executable, "-c", "from recon.cli import main; main()", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == f"1 of 2 files reconstructed into {out}. Not for diagnostic use.\n"
    # In a pipe nothing of a progress bar: no escape sequence, no line that is drawn over.
    assert not set("\x1b\r━╸") & set(result.stderr)
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"{good.name}: 2 slices, ")
    assert lines[-1] == f"Error: {bad}: there is no such file"


def test_interruption(recon, prior, tmp_path, monkeypatch):
    from recon import mri

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(mri, "slice_problem", interrupted)
    out = tmp_path / "out"
    status, stdout, stderr = recon("mri", files.knee(tmp_path), *FAST, "--prior", prior, "--out", out)
    assert (status, stdout) == (130, "")
    assert stderr == "Interrupted; what was finished is kept.\n"
    assert contents(out) == []


def test_faults_of_the_program_are_not_hidden(prior, tmp_path, monkeypatch):
    from recon import mri

    def faulty(*arguments, **keywords):
        raise ValueError("a fault")

    monkeypatch.setattr(mri, "slice_problem", faulty)
    with pytest.raises(ValueError, match="a fault"):
        main(["mri", str(files.knee(tmp_path)), "--prior", str(prior), "--out", str(tmp_path / "out")])


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("slices") as bar:
        task = bar.add_task("file[1].h5", total=4)
        bar.update(task, completed=2.7)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "file[1].h5" in printed
    assert "2/4 slices" in printed


def test_solvers_are_listed_with_their_classes_and_settings():
    listed = CliRunner().invoke(app, ["solvers"]).output
    for key, path in SOLVERS.items():
        assert f"{key} ({path.rpartition('.')[2]}): " in listed
    one = CliRunner().invoke(app, ["solvers", "ula"]).output
    assert one.startswith("ula (AnnealedLangevin): ")
    assert "sigma_min=" in one
