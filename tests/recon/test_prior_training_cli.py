"""``recon prior train`` on other people's data: sources, splits, pictures, and being killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import recon.cli.prior
from priors.files import read_header
from priors.loading import load_prior
from priors.network import NetworkPrior
from priors.training import VALIDATION_SIGMAS
from recon.errors import ReconError
from recon.training_figures import curve_figure
from tests.recon import fastmri_files

ROOT = Path(__file__).parents[2]
SHAPE = ("--widths", "4", "--patch", "8", "--batch", "2", "--precision", "fp32")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(recon.cli.prior, "_draw", lambda *arguments: None)


def run(*arguments):
    app = typer.Typer()
    app.add_typer(recon.cli.prior.prior_app, name="prior")
    result = CliRunner().invoke(app, ["prior", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit | ValueError):
        raise result.exception
    return result


def ball(radius, slices=4, size=24):
    z, y, x = np.meshgrid(np.linspace(-0.5, 0.5, slices), *[np.linspace(-1, 1, size)] * 2, indexing="ij")
    return (100 * (x**2 + y**2 + z**2 < radius) + 30 * (x**2 + (y - 0.2) ** 2 < 0.1)).astype(np.float32)


def write_subjects(data):
    """Write a folder of three subjects, with a volume each."""
    for number in range(3):
        folder = data / f"sub-{number}"
        folder.mkdir(parents=True)
        np.save(folder / "t1.npy", ball(0.4 + 0.2 * number))
    return data


@pytest.fixture
def subjects(tmp_path):
    return write_subjects(tmp_path / "data")


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


# Sources


def test_a_folder_of_subjects_and_the_pictures_of_a_training(subjects, tmp_path):
    (subjects / "sub-1" / "broken.npy").write_text("no array")
    out = tmp_path / "run"
    result = run("train", subjects, "--out", out, *SHAPE, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert re.search(r"^1 of 3 subjects held out for validation: sub-[012]$", result.stderr, re.MULTILINE)
    assert "8 slices to train on, 4 to validate on" in result.stderr
    assert re.search(r"^Not used: .*broken.npy cannot be read as NumPy's", result.stderr, re.MULTILINE)
    assert sorted(path.name for path in out.iterdir()) == [
        "curve.jsonl", "curve.png", "pictures", "prior.safetensors", "state.pt",
    ]  # fmt: skip
    for picture in (out / "curve.png", out / "pictures" / "step_000003.png"):
        pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
        assert pixels.std() > 10
    facts = read_header(out / "prior.safetensors")["training"]
    assert (facts["training_images"], facts["validation_images"]) == (8, 4)


@pytest.mark.parametrize(
    ("kind", "options", "channels", "unit", "shape"),
    [
        ("mr", (), "complex", "level", 2),
        ("mr", ("--channels", "real"), "real", "level", 1),
        ("mr", ("--slices", 3), "complex", "level", 6),
        ("images", ("--slices", 2), "real", "level", 2),
        ("images", ("--channels", "complex"), "complex", "level", 2),
        ("ct", ("--slices", 3), "real", "water", 3),
    ],
)
def test_channels_and_slices(subjects, tmp_path, no_pictures, kind, options, channels, unit, shape):
    if kind == "ct":
        for number in range(3):
            np.save(subjects / f"sub-{number}" / "t1.npy", 10 * ball(0.5) - 1000)
    out = tmp_path / "run"
    result = run("train", subjects, "--kind", kind, "--out", out, *SHAPE, "--steps", 1, *options)
    assert result.exit_code == 0, result.output
    prior = load_prior(out / "prior.safetensors")
    assert isinstance(prior, NetworkPrior)
    slices = options[1] if "--slices" in options else 1
    assert (prior.contract.channels, prior.contract.unit, prior.contract.slices) == (channels, unit, slices)
    assert prior.network.settings.channels == shape
    noun = "slices" if slices == 1 else f"stacks of {slices} slices"
    assert f"{2 * (5 - slices)} {noun} to train on, {5 - slices} to validate on" in result.stderr
    given = ("evaluate", out / "prior.safetensors", subjects, "--patches", 2, "--patch", 8, "--kind", kind)
    assert run(*given).exit_code == 0


def test_kspace_pictures_and_complex_arrays_together(tmp_path, no_pictures):
    data = tmp_path / "data"
    for name in ("knee", "png", "complex"):
        (data / name).mkdir(parents=True)
    fastmri_files.knee(data / "knee")
    fastmri_files.undersampled(data / "knee")
    for index, image in enumerate(ball(0.5)):
        Image.fromarray(image.astype(np.uint8)).save(data / "png" / f"{index}.png")
    np.savez(data / "complex" / "a.npz", image=ball(0.7) * np.exp(0.3j))
    result = run("train", data, "--out", tmp_path / "run", *SHAPE, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "1 of 3 subjects held out" in result.stderr
    assert re.search(r"^Not used: .*file1000003.h5 is undersampled", result.stderr, re.MULTILINE)


def test_images_that_do_not_fit_into_memory(subjects, tmp_path, no_pictures):
    volume = 4 * 4 * 24 * 24 / 2**30
    command = ("train", subjects, "--out", tmp_path / "run", *SHAPE, "--steps", 1, "--memory")
    result = run(*command, 1.5 * volume)
    assert result.exit_code == 0, result.output
    note = r"all images need .* GiB of memory, more than the .* GiB of --memory: 1 of 2 volumes are held"
    assert re.search(note, result.stderr)
    assert re.search(r"t1.npy needs .* GiB of memory, more than", str(run(*command, 0.5 * volume).exception))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--channels", "rgb"), "--channels is real or complex, not 'rgb'"),
        (("--slices", 0), "--slices must be at least 1, got 0"),
        (("--slices", 5), "no volume of at least 5 slices"),
        (("--memory", 0), "--memory must be positive, got 0"),
        (("--kind", "ct", "--channels", "complex"), "images of kind ct are real"),
        (("--kind", "discs", "--slices", 2), "discs are single images"),
        (("--device", "abacus"), "unknown device 'abacus'"),
    ],
)
def test_options_that_make_no_sense(subjects, tmp_path, options, pattern):
    given = () if "discs" in options else (subjects,)
    result = run("train", *given, "--out", tmp_path / "run", *SHAPE, "--steps", 1, *options)
    assert result.exit_code == 1
    assert re.search(pattern, str(result.exception)), result.exception


def test_one_subject_cannot_be_split(subjects, tmp_path):
    result = run("train", subjects / "sub-0", "--out", tmp_path / "run", *SHAPE)
    assert re.search(r"one subject \(t1.npy\), so none can be held out", str(result.exception))


def test_a_prior_is_measured_on_images_of_its_unit(subjects, tmp_path, no_pictures):
    assert run("train", subjects, "--out", tmp_path / "run", *SHAPE, "--steps", 1).exit_code == 0
    result = run("evaluate", tmp_path / "run" / "prior.safetensors", subjects, "--kind", "ct")
    assert re.search("images of kind ct are in the unit 'water', but prior 'prior'", str(result.exception))


def test_curves_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ReconError, match="there is no curve to draw"):
        curve_figure(tmp_path / "a.png", [], VALIDATION_SIGMAS)
    with pytest.raises(ReconError, match="has not one error for each of 10 levels"):
        curve_figure(tmp_path / "a.png", [{"step": 1, "rmse": [0.1]}], VALIDATION_SIGMAS)


def test_the_training_of_another_command_is_refused(subjects, tmp_path, no_pictures):
    out = tmp_path / "run"
    shape = ("--channels", "real", *SHAPE, "--out", out)
    command = ("train", subjects, *shape, "--anatomy", "brain")
    assert run(*command, "--steps", 4).exit_code == 0
    before = (out / "prior.safetensors").read_bytes()
    for other, told in (
        ((*command, "--kind", "images"), "kind mr there, images here"),
        ((*command, "--anatomy", "knee"), "anatomy brain there, brain, knee here"),
        ((*command, "--seed", 1), "seed 0 there, 1 here; training images 2 volumes"),
        ((*command, "--validation", subjects / "sub-0"), "training images 2 volumes .* there, 3 volumes"),
        (("train", subjects / "sub-0", subjects / "sub-1", *shape, "--anatomy", "brain"), "2 volumes"),
        ((*command, "--steps", 3), "is at step 4 already"),
    ):
        result = run(*other) if "--steps" in other else run(*other, "--steps", 4)
        assert result.exit_code == 1
        assert re.search(rf"state.pt holds a(nother)? training .*{told}", str(result.exception)), other
        assert (out / "prior.safetensors").read_bytes() == before
    # More steps, and a disk of another name, are no other training.
    (tmp_path / "disk").mkdir()
    subjects.rename(tmp_path / "disk" / "data")
    more = ("--steps", 6, "--decay", 1, "--precision", "bf16", "--name", "late", "--memory", 1)
    result = run("train", tmp_path / "disk" / "data", *shape, "--anatomy", "brain", *more)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in curve(out)] == [4, 6]


# Killed and resumed

LONG = (*SHAPE, "--batch", "1", "--steps", "510")  # stored at 250, 500 and 510, validated at 500 and 510

KILLED_WHILE_WRITING = """
import io, os, signal, sys, torch
save = torch.save
def torn(state, file):
    whole = io.BytesIO()
    save(state, whole)
    half = whole.getvalue()[: len(whole.getvalue()) // (2 if state["step"] == 500 else 1)]
    file.write(half)
    file.flush()
    if state["step"] == 500:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
"""
PROGRAM = """
import sys
import recon.cli, recon.cli.prior
recon.cli.prior._draw = lambda *arguments: None
recon.cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The images of a training, and what it ends with if it is left alone."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recon.cli.prior, "_draw", lambda *arguments: None)
        result = run("train", write_subjects(folder / "data"), *LONG, "--out", folder / "run")
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return folder / "data", folder / "run"


@pytest.mark.parametrize("while_writing", [True, False])
def test_a_killed_training_ends_as_one_that_was_left_alone(whole, tmp_path, no_pictures, while_writing):
    images, left_alone = whole
    command = ["train", str(images), *LONG, "--out"]
    killed = tmp_path / "killed"
    program = [sys.executable, "-c", (KILLED_WHILE_WRITING if while_writing else "") + PROGRAM, "prior"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*program, *command, str(killed)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while not while_writing and process.poll() is None and not (killed / "state.pt").exists():
            time.sleep(0.005)
        if not while_writing:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
    stored = torch.load(killed / "state.pt", weights_only=True)["step"]
    assert stored in ((250,) if while_writing else (250, 500))
    assert not (killed / "prior.safetensors").exists()
    if while_writing:
        assert (killed / "state.tmp").exists()  # half a state
        assert [line["step"] for line in curve(killed)] == [500]  # to be validated again

    assert run(*command, killed).exit_code == 0
    files = [folder / "prior.safetensors" for folder in (killed, left_alone)]
    resumed, expected = map(load_file, files)
    assert resumed.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(resumed[name], weights), name
    assert read_header(files[0]) == read_header(files[1])  # with the table of errors
    for one, other in zip(curve(killed), curve(left_alone), strict=True):
        assert (one["step"], one["rmse"]) == (other["step"], other["rmse"])


# The guide


def test_the_guide_uses_options_that_exist():
    text = (ROOT / "examples" / "train_a_prior.md").read_text()
    blocks = re.findall(r"^((?:    .*\n)+)", text, re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split() for line in lines if re.match(r"\s+(recon|torchrun)\b", line)]
    assert len(commands) >= 5
    for words in commands:
        words = words[words.index("recon") + 1 :]
        names = [word for word in words if word.startswith("--")]
        path = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        group = path if path[0] == "prior" else path[:1]
        result = help_of(group)
        for name in names:
            assert re.search(rf"{name}\b", result), (group, name)


def help_of(group):
    """Help of a command, wide enough that no option is cut off."""
    from recon.cli import app

    result = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output
