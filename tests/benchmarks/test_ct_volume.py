"""The benchmark of CT volumes on slices made up here, with a prior that takes no time."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from benchmarks import ct_volume as benchmark
from benchmarks.ct_cases import Scan
from benchmarks.ct_quality import Cache, Solved
from benchmarks.ct_volume import APART, Measures, Row, Task, measure, read_volume, run, simulate
from operators.attenuation import MU_WATER, hu_to_mu
from priors import Contract, DenoisingUNet, GaussianPrior, NetworkPrior, NetworkSettings, save_prior
from recon.errors import ReconError
from recon.solvers.dds import DDS
from recon.solvers.dds_3d import DDS3D
from recon.solvers.diffusion_mbir import DiffusionMBIR

SIDE, SLICES = 16, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A cylinder with a ball in it, 20 pixels a side to spare."""
    z, v, u = np.meshgrid(*(np.linspace(-1, 1, n) for n in (SLICES + 2, 2 * SIDE, 2 * SIDE)), indexing="ij")
    hu = -1000 + 1000 * (u**2 + v**2 < 0.6) + 300 * (u**2 + v**2 + z**2 < 0.3)
    made = tmp_path_factory.mktemp("data") / "series.h5"
    with h5py.File(made, "w") as file:
        group = file.create_group("made_up_1")
        group["hu"] = hu.astype(np.int16)
        group.attrs["pixel_spacing_mm"] = [6.0, 6.0]
        group.attrs["z_mm"] = 5.0 * np.arange(len(hu))
        group.attrs["licence"] = "CC0"
    return made


@pytest.fixture(scope="module")
def volume(path):
    return read_volume(path, "made_up_1", 1, SLICES)


@pytest.fixture(scope="module")
def prior():
    v, u = torch.meshgrid(*(torch.fft.fftfreq(SIDE),) * 2, indexing="ij")
    made = GaussianPrior(torch.full((SIDE, SIDE), 0.5), spectrum=0.02 / (0.02 + u**2 + v**2))
    made.contract = replace(made.contract, channels="real", unit="water")
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, solver in (("dds", DDS(nfe=3)), ("dds-3d", DDS3D(nfe=3))):
        monkeypatch.setitem(benchmark.METHODS, name, (benchmark.METHODS[name][0], solver))
    mbir = (benchmark.METHODS["diffusion-mbir"][0], DiffusionMBIR(steps=3))
    monkeypatch.setitem(benchmark.METHODS, "diffusion-mbir", mbir)


def test_a_volume_is_read(path, volume):
    assert volume.truth.shape == (SLICES, SIDE, SIDE)
    assert (volume.pixel_size, volume.spacing) == (12.0, 5.0)
    with h5py.File(path) as file:
        hu = file["made_up_1/hu"][1:5].astype(float)
    np.testing.assert_allclose(volume.truth, hu.reshape(SLICES, SIDE, 2, SIDE, 2).mean((2, 4)))
    coarse = read_volume(path, "made_up_1", 1, SLICES, size=SIDE // 2)
    assert coarse.pixel_size == 24.0
    np.testing.assert_allclose(coarse.fine, volume.truth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("made_up_1", 2, 6), "there are no slices 2 to 6, the series has 6"),
        (("made_up_1", 2, 2), "there are no slices 2 to 2"),
        (("made_up_1", 0, 2, 12), r"24 × 24 pixels cannot be made of \(6, 32, 32\)"),
        (("other", 0, 2), "has no series and no patient 'other'"),
    ],
)
def test_volumes_that_are_not_there(path, arguments, message):
    with pytest.raises(ReconError, match=message):
        read_volume(path, *arguments)


def test_slices_that_are_not_evenly_spaced(path, tmp_path):
    other = tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        file["made_up_1"].attrs["z_mm"] = [0.0, 5.0, 10.0, 16.0, 20.0, 25.0]
    with pytest.raises(ReconError, match="its slices are not evenly spaced"):
        read_volume(other, "made_up_1", 1, 4)


def test_a_scan_is_that_of_its_slices(volume):
    scan = Scan("fan", 12)
    y, operator = simulate(volume, scan, 1e9)
    assert y.shape == (SLICES, *operator.range_shape)
    clean = operator(hu_to_mu(torch.from_numpy(volume.truth).float(), MU_WATER))
    assert float((y - clean).norm()) < 0.05 * float(clean.norm())
    noisy, _ = simulate(volume, scan, 1e4)
    again, _ = simulate(volume, scan, 1e4)
    assert torch.equal(noisy, again)
    assert float((noisy - y).norm()) > 0.005 * float(y.norm())
    task = Task(volume, scan)
    for problem in (task.weighted, task.unweighted):
        assert problem.operator.domain_shape == (SLICES, SIDE, SIDE)
        assert problem.operator.norm() == pytest.approx(1, rel=1e-2)


def test_measures(volume):
    exact = measure(volume, volume.truth)
    assert exact.psnr == np.inf
    assert (exact.along_z, exact.stripes) == (0, 0)
    noise = np.random.default_rng(0).standard_normal(volume.truth.shape)
    grain, stripes = 20 * noise, 20 * noise[:, :1, :1] * np.ones_like(noise)
    fine, coarse = measure(volume, volume.truth + grain), measure(volume, volume.truth + stripes)
    assert fine.along_z == pytest.approx(20 * np.sqrt(2), rel=0.1)
    assert fine.stripes < 0.6 * fine.along_z  # a pixel of 12 mm is not much smaller than the window
    assert coarse.stripes == pytest.approx(coarse.along_z)
    apart = np.diff(volume.truth + stripes, axis=0)
    assert coarse.step == pytest.approx(float(np.sqrt(np.mean(apart**2))))


def test_a_run_resumes_and_is_told_of(volume, prior, tmp_path, monkeypatch):
    methods, cache = ["dds", "dds-3d", "diffusion-mbir"], Cache(tmp_path)
    rows = run(volume, [Scan("fan", 12)], methods, prior, "digest", num_samples=2, cache=cache)
    assert [(row.name, row.kind) for row in rows][:3] == [
        (APART, "sample"),
        (APART, "mean"),
        ("DDS-3D", "sample"),
    ]
    assert len(list(tmp_path.glob("*.npz"))) == 3
    monkeypatch.setattr(Task, "solve", lambda *a: pytest.fail("was there already"))
    again = run(volume, [Scan("fan", 12)], methods, prior, "digest", num_samples=2, cache=cache)
    assert [row.measures for row in again] == [row.measures for row in rows]
    text = benchmark.table(rows)
    assert text.count("\n") == 1 + len(rows)
    held = next(row for row in rows if row.name == "DDS-3D")
    assert f"({held.measures.psnr - rows[0].measures.psnr:+.2f})" in text
    assert "- DDS-3D: the error along z is below that of slice by slice in " in benchmark.verdicts(rows)


@pytest.mark.parametrize(
    ("psnr", "along_z", "stripes", "counts"),
    [(29.9, 49.0, 5.0, (1, 1, 1)), (29.7, 50.0, 5.1, (0, 0, 0)), (31.0, 60.0, 4.0, (0, 1, 1))],
)
def test_what_is_said_of_a_method(volume, psnr, along_z, stripes, counts):
    def row(name, *measures):
        image = volume.truth
        return Row(
            Scan("fan", 12),
            name,
            "sample",
            image,
            Solved(image, image, image, "", 3, 1.0),
            Measures(*measures),
        )

    rows = [row(APART, 30.0, 50.0, 5.0, 80.0), row("DDS-3D", psnr, along_z, stripes, 80.0)]
    below, plain, kept = counts
    assert benchmark.verdicts(rows) == (
        f"- DDS-3D: the error along z is below that of slice by slice in {below} of 1 comparisons, stripes "
        f"are no stronger in {plain}, and less than 0.2 dB is lost in plane in {kept}."
    )


def test_command_line(path, tmp_path, capsys):
    made = tmp_path / "tiny.safetensors"
    settings = NetworkSettings(channels=1, widths=(8,), embedding=8, sigma_data=0.5)
    save_prior(made, NetworkPrior(DenoisingUNet(settings), Contract(channels="real", unit="water")))
    words = ["--data", str(path), "--series", "made_up_1", "--slices", "1", "3", "--views", "10"]
    words += ["--methods", "dds", "dds-3d", "--prior", str(made), "--out", str(tmp_path / "page.md")]
    benchmark.main(words)
    page = (tmp_path / "page.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "made_up_1, CC0, slices 1 to 3: 3 × 16 × 16 voxels of 5 × 12.000 × 12.000 mm" in page
    assert str(tmp_path) not in page
    assert (tmp_path / "page.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"error: .*there are no slices 4 to 9"):
        benchmark.main([*words[:5], "4", "9", *words[7:]])
