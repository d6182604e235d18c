"""Volumes of CT: their noise, their units, and files with several slices, also from the command line."""

import json
import math
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from operators import CTOperator, ParallelBeam, SliceStack, equispaced_angles
from operators.ct_noise import simulate_transmission
from priors import GaussianPrior
from recon import DDS, DDS3D, AdjacentSlices, FilteredBackprojection, ReconError
from recon.cli import app
from recon.ct import CTSettings, CTSliceResult, ct_problem, reconstruct_ct_file, reconstruct_sinogram
from recon.solvers import make_solver

MU, SIDE, PIXEL, SLICES, PHOTONS = 0.02, 16, 6.0, 5, 2e4

SCAN = ParallelBeam(equispaced_angles(12), 24, PIXEL)
A = CTOperator(SCAN, (SIDE, SIDE), PIXEL)


def truth():
    """A cylinder of water in which a ball is denser, in 1/mm."""
    z, v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (SLICES, SIDE, SIDE)), indexing="ij")
    return MU * ((u**2 + v**2 < 0.7) + 0.5 * (u**2 + v**2 + z**2 < 0.4).float())


def sinograms():
    clean = A(truth())
    return simulate_transmission(clean, PHOTONS, torch.Generator().manual_seed(0)).line_integrals


def prior():
    mean = truth().mean(0) / MU
    v, u = torch.meshgrid(*(torch.fft.fftfreq(SIDE) for _ in range(2)), indexing="ij")
    made = GaussianPrior(mean, spectrum=0.002 / (0.02 + u**2 + v**2))
    made.contract = replace(made.contract, channels="real", unit="water")
    return made


def test_the_noise_of_every_slice_weighs_it():
    y, settings = sinograms(), CTSettings()
    whole = ct_problem(y, SliceStack(A, SLICES), settings)
    for k in range(SLICES):
        single = ct_problem(y[k], A, settings)
        # Data and operator of one problem are those of the other times a number.
        ratio = whole.noise_std / single.noise_std
        torch.testing.assert_close(whole.y[k], ratio * single.y, rtol=1e-4, atol=1e-6)
        x = truth()[k] / MU
        part = whole.operator.of_slice(k)
        torch.testing.assert_close(part(x), ratio * single.operator(x), rtol=1e-4, atol=1e-6)
    assert float(whole.operator.norm()) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("solver", [DDS(nfe=6), DDS3D(nfe=6), AdjacentSlices(nfe=6)])
def test_attenuation_of_a_volume(solver):
    result = reconstruct_sinogram(
        sinograms(), SliceStack(A, SLICES), prior(), solver, CTSettings(num_samples=2, photons=PHOTONS)
    )
    assert result.mean.shape == result.std.shape == (SLICES, SIDE, SIDE)
    assert float((result.mean - truth()).square().mean().sqrt()) < 0.12 * MU


def dxchange(path, slices=SLICES):
    """Counts of a parallel beam, whose slices are the rows of the detector."""
    counts = PHOTONS * torch.exp(-sinograms()[:slices])
    with h5py.File(path, "w") as file:
        file["exchange/data"] = counts.movedim(0, 1).round().numpy().astype(np.uint16)
        file["exchange/data_white"] = np.full((2, slices, SCAN.num_detectors), PHOTONS, dtype=np.uint16)
        file["exchange/theta"] = np.degrees(SCAN.angles)
    return path


def test_a_solver_without_a_prior_keeps_its_one_image(tmp_path):
    source, settings = dxchange(tmp_path / "scan.h5"), CTSettings(num_samples=2, keep_samples=True)
    facts = reconstruct_ct_file(
        source,
        tmp_path / "out.h5",
        None,
        FilteredBackprojection(),
        settings,
        size=SIDE,
        pixel_size=PIXEL,
        detector_spacing=PIXEL,
        slices=[1],
    )
    assert facts["num_samples"] == 1
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["samples"].shape == (1, 1, SIDE, SIDE)
        np.testing.assert_array_equal(file["samples"][0, 0], file["reconstruction"][0])


def test_a_file_is_one_volume_for_a_solver_of_volumes(tmp_path):
    source, settings = dxchange(tmp_path / "scan.h5"), CTSettings(num_samples=2, keep_samples=True)
    progress: list[Any] = []
    shown: list[CTSliceResult] = []
    solver = DDS3D(nfe=4)
    facts = reconstruct_ct_file(
        source,
        tmp_path / "out.h5",
        prior(),
        solver,
        settings,
        size=SIDE,
        pixel_size=PIXEL,
        detector_spacing=PIXEL,
        slices=range(1, 4),
        on_progress=lambda *report: progress.append(report),
        on_slice=shown.append,
    )
    assert [part["index"] for part in facts["slices"]] == [1, 2, 3]
    assert facts["solver"]["name"] == "DDS3D"
    assert progress[-1] == (3, 3)
    assert [part.index for part in shown] == [1, 2, 3]
    with h5py.File(tmp_path / "out.h5") as file:
        image, samples = file["reconstruction"][()], file["samples"][()]
    assert image.shape == (3, SIDE, SIDE)
    assert samples.shape == (3, 2, SIDE, SIDE)
    np.testing.assert_allclose(samples.mean(1), image, rtol=1e-4, atol=1e-6)
    assert float(np.abs(image - truth()[1:4].numpy()).mean()) < 0.1 * MU
    torch.testing.assert_close(shown[1].mean, torch.from_numpy(image[1]))
    with pytest.raises(
        ReconError, match="DDS3D reconstructs a volume, whose slices follow each other, not sl"
    ):
        reconstruct_ct_file(source, tmp_path / "no.h5", prior(), solver, settings, slices=[0, 2])
    assert not (tmp_path / "no.h5").exists()


def test_neighbours_have_a_say(tmp_path):
    """The volume solver sees more than one slice: without coupling the result is another one."""
    source = dxchange(tmp_path / "scan.h5", slices=3)
    images = []
    for name, lam in (("held", "none"), ("apart", "0")):
        solver = make_solver("dds-3d", None, {"nfe": "4", "lam": lam})
        reconstruct_ct_file(
            source,
            tmp_path / f"{name}.h5",
            prior(),
            solver,
            CTSettings(num_samples=1),
            size=SIDE,
            detector_spacing=PIXEL,
        )
        with h5py.File(tmp_path / f"{name}.h5") as file:
            images.append(file["reconstruction"][()])
    rough = [float(np.abs(np.diff(image, axis=0)).mean()) for image in images]
    assert rough[0] < 0.9 * rough[1]


def test_errors_name_the_slices(tmp_path):
    source = dxchange(tmp_path / "scan.h5", slices=2)
    with pytest.raises(ReconError, match=r"scan.h5: slices 0-1: DDS3D needs a prior"):
        reconstruct_ct_file(
            source, tmp_path / "out.h5", None, DDS3D(), CTSettings(), size=SIDE, detector_spacing=PIXEL
        )


def test_command_line(tmp_path):
    dxchange(tmp_path / "scan.h5", slices=2)
    words = [
        *("ct", str(tmp_path / "scan.h5"), "--solver", "adjacent-slices", "--nfe", "2", "--num-samples", "1"),
        *("--size", "16", "--detector-spacing", "6", "--out", str(tmp_path / "out")),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    with h5py.File(tmp_path / "out" / "scan.h5") as file:
        assert file["reconstruction"].shape == (2, 16, 16)
        provenance = json.loads(file.attrs["provenance"])
    assert provenance["solver"]["name"] == "AdjacentSlices"
    assert math.isfinite(provenance["slices"][1]["residual"])
