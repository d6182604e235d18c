"""``recon prior`` on CT images and on discs; on MR images, in test_cli.py."""

from __future__ import annotations

import json
import re

import h5py
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from priors.files import read_header
from priors.loading import load_prior
from priors.network import NetworkPrior
from recon.cli.prior import prior_app

SHAPE = ("--widths", "8,8", "--patch", 16, "--batch", 2, "--precision", "fp32", "--steps", 2)


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run():
    app = typer.Typer()
    app.add_typer(prior_app, name="prior")

    def command(*arguments):
        words = ["prior", *(str(word) for word in arguments)]
        return CliRunner().invoke(app, words, catch_exceptions=True)

    return command


@pytest.fixture
def series(tmp_path):
    """A file with a ball of water of two patients."""
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    with h5py.File(tmp_path / "hu.h5", "w") as file:
        for name, radius in (("a", 0.6), ("b", 0.8)):
            group = file.create_group(name)
            ball = np.where(x**2 + y**2 < radius**2, 40, -1000).astype(np.int16)
            group["hu"] = np.stack([ball, ball])
    return tmp_path / "hu.h5"


def table(printed):
    return [list(map(float, line.split())) for line in printed.splitlines() if re.match(r"\s+\d", line)]


def test_a_prior_on_ct_images(run, series, tmp_path):
    out = tmp_path / "run"
    command = ("train", series / "a", "--validation", series / "b", "--kind", "ct", "--out", out)
    result = run(*command, *SHAPE, "--name", "ball", "--anatomy", "chest")
    assert result.exit_code == 0, result.output
    assert "2 slices to train on, 2 to validate on" in result.stderr
    contract = load_prior(out / "prior.safetensors").contract
    assert (contract.unit, contract.channels, contract.sigma_min) == ("water", "real", 0.001)
    assert (contract.name, contract.anatomy) == ("ball", ("chest",))
    facts = read_header(out / "prior.safetensors")["training"]
    assert (facts["kind"], facts["training_images"]) == ("ct", 2)

    result = run("evaluate", out / "prior.safetensors", series / "b", "--patches", 4, "--patch", 16)
    assert result.exit_code == 0, result.output
    rows = table(result.stdout)
    assert len(rows) == len(contract.error_table)
    for sigma, noisy, denoised, error in rows:
        assert noisy == pytest.approx(-20 * np.log10(sigma), abs=0.01)
        assert denoised == pytest.approx(-20 * np.log10(error), abs=0.02)


def test_a_prior_on_discs(run, tmp_path):
    out = tmp_path / "run"
    result = run("train", "--kind", "discs", "--out", out, *SHAPE)
    assert result.exit_code == 0, result.output
    assert re.search(r"\d+ discs to train on, \d+ to validate on", result.stderr)
    assert load_prior(out / "prior.safetensors").contract.unit == "object"
    result = run("evaluate", out / "prior.safetensors", "--patches", 2, "--patch", 16)
    assert result.exit_code == 0, result.output
    assert table(result.stdout)


def test_the_network_of_a_kind_is_its_own(run, tmp_path):
    out = tmp_path / "run"
    small = ("--patch", 16, "--batch", 1, "--steps", 1, "--precision", "fp32")
    result = run("train", "--kind", "discs", "--out", out, *small)
    assert result.exit_code == 0, result.output
    assert read_header(out / "prior.safetensors")["network"]["widths"] == [48, 96, 160, 192]


def test_a_ct_prior_may_start_from_a_complex_one(run, series, tmp_path):
    # The bundled prior of brains has another number of image channels; everything between is taken over.
    out = tmp_path / "run"
    command = ("train", series / "a", "--validation", series / "b", "--kind", "ct", "--out", out)
    result = run(*command, "--initial", "brain", "--patch", 16, "--batch", 1, "--steps", 1)
    assert result.exit_code == 0, result.output
    first, second = load_prior("brain"), load_prior(out / "prior.safetensors")
    assert isinstance(first, NetworkPrior)
    assert isinstance(second, NetworkPrior)
    brain, chest = first.network, second.network
    assert (chest.settings.channels, chest.settings.sigma_data) == (1, 0.5)
    assert chest.settings.widths == brain.settings.widths
    name = "down.0.0.conv1.weight"
    torch.testing.assert_close(chest.state_dict()[name], brain.state_dict()[name], rtol=0, atol=1e-3)
    state = json.loads(torch.load(out / "state.pt", weights_only=True)["settings"])
    assert state["unit"] == "water"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--kind", "ct"), "IMAGES is missing: no files of CT images were given"),
        (("{}/a", "--kind", "ct"), r"all images seem to be of one subject \(a\), so none can be held out"),
        (("--kind", "mr"), "IMAGES is missing: no files of MR images were given"),
        (("{}/a", "--kind", "discs"), "discs are made, not read: IMAGES .*hu.h5/a has no use with them"),
        (("--kind", "discs", "--validation", "{}"), "discs are made, not read: --validation"),
        (("{}/c", "--kind", "ct"), "hu.h5 has no series and no patient 'c'"),
    ],
)
def test_images_that_do_not_fit_the_kind(run, series, tmp_path, arguments, pattern):
    given = [str(argument).format(series) for argument in arguments]
    result = run("train", *given, "--out", tmp_path / "run", *SHAPE)
    assert result.exit_code == 1
    assert re.search(pattern, str(result.exception)), result.exception
