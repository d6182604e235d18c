"""The benchmark of CT on an image made up here, with a prior that takes no time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import h5py
import numpy as np
import pytest
import torch

from benchmarks import ct_quality as benchmark
from benchmarks.ct_cases import Scan, make_case
from benchmarks.ct_measures import Detection
from benchmarks.ct_quality import Cache, Measures, Row, Solved, Task, contenders, measure, run
from priors import Contract, DenoisingUNet, GaussianPrior, NetworkPrior, NetworkSettings, save_prior
from recon.ct import reconstruct_sinogram
from recon.errors import ReconError
from recon.solvers.dds import DDS
from recon.solvers.filtered_backprojection import FilteredBackprojection
from recon.solvers.total_variation import TotalVariation
from tests.benchmarks.chest_phantom import PIXEL, SIDE, chest

SCAN = Scan("parallel", 20)


@pytest.fixture(scope="module")
def case():
    return make_case("phantom", chest(), PIXEL)


@pytest.fixture(scope="module")
def task(case):
    return Task(case, SCAN)


@pytest.fixture(scope="module")
def prior():
    v, u = torch.meshgrid(*(torch.fft.fftfreq(SIDE),) * 2, indexing="ij")
    shape = 1 / (0.02 + u**2 + v**2)
    made = GaussianPrior(torch.full((SIDE, SIDE), 0.5), spectrum=0.2 * shape / shape.mean())
    made.contract = replace(made.contract, channels="real", unit="water")
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "TV_ITERATIONS", 30)
    monkeypatch.setitem(benchmark.DIFFUSION, "DDS", DDS(nfe=3))


# Measures of an image


def test_the_truth_is_worth_everything(case):
    found = measure(case, case.truth)
    assert found.psnr == math.inf
    assert (found.soft, found.lung, found.std) == (0, 0, 0)
    for contrast, seen in found.inserts:
        assert seen.contrast == pytest.approx(contrast, abs=0.1)
        assert seen.detected
    # A pixel averages: its transfer is a half at 0.61 periods a pixel.
    assert found.half * PIXEL / 10 == pytest.approx(0.61, rel=0.05)


def test_an_image_of_another_level_is_biased_and_nothing_else(case):
    found = measure(case, case.truth + 12)
    assert found.soft == pytest.approx(12)
    assert found.lung == pytest.approx(12)
    assert found.std == pytest.approx(0, abs=1e-9)
    assert found.psnr == pytest.approx(20 * math.log10(case.data_range / 12))
    assert [seen.contrast for _, seen in found.inserts] == pytest.approx([20, 40, 80], abs=0.1)


def test_an_image_without_what_was_planted_shows_none_of_it(case):
    noise = 5 * np.random.default_rng(1).standard_normal(case.shape)
    found = measure(case, case.background + noise)
    for contrast, seen in found.inserts:
        assert abs(seen.contrast) < contrast / 2
        assert not seen.detected
    kept = measure(case, case.truth + noise).inserts
    assert [detection.detected for _, detection in kept] == [True, True, True]
    assert measure(case, case.truth + noise).std == pytest.approx(5, rel=0.1)
    # Of a disc that is not there at all, there is no edge.
    absent = case.truth - 2 * case.edge.contrast * case.edge.coverage(case.shape, PIXEL)
    assert math.isnan(measure(case, absent).half)


# Methods


def test_every_solver_gets_what_recon_ct_would_give_it(task):
    made = task.measurement
    theirs = reconstruct_sinogram(
        made.sinogram, made.operator, None, FilteredBackprojection("hann"), task.settings
    )
    ours = task.reconstruct(FilteredBackprojection("hann"))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=0.5)


def test_solvers_along_the_gradient_get_data_of_equal_weight(task, prior):
    for problem, equal in ((task.unweighted, True), (task.weighted, False)):
        ratio = problem.y / task.measurement.sinogram
        ratio = ratio[task.measurement.sinogram.abs() > 0.1]
        assert (float(ratio.std() / ratio.mean()) < 1e-4) == equal
    # The same noise on the whole: an unweighted datum has the mean square of all.
    clean = replace(task, photons=1e13).measurement.sinogram
    noise = (task.measurement.sinogram - clean).square().mean().sqrt()
    scale = task.unweighted.y.norm() / task.measurement.sinogram.norm()
    assert task.unweighted.noise_std / float(scale) == pytest.approx(float(noise), rel=0.05)
    given = []

    @dataclass(frozen=True)
    class Watched(benchmark.DPS):
        def sample(self, problem, *arguments):
            given.append(problem.y)
            return super().sample(problem, *arguments)

    task.reconstruct(Watched(nfe=2), prior)
    assert torch.equal(given[0], task.unweighted.y)


def test_the_best_window_and_weight_are_best(task, monkeypatch):
    monkeypatch.setattr(benchmark, "TV_ITERATIONS", 300)
    fbp = benchmark.best_fbp(task)
    tried = {
        name: task.psnr(task.reconstruct(FilteredBackprojection(name)).mean.numpy())
        for name in benchmark.FILTERS
    }
    assert tried[fbp.setting] == max(tried.values())
    assert task.psnr(fbp.mean) == pytest.approx(max(tried.values()), abs=1e-3)
    tv = benchmark.best_tv(task)
    exponent = int(tv.setting.removeprefix("2^"))
    near = [
        task.psnr(task.reconstruct(TotalVariation(2.0 ** (exponent + k), 300)).mean.numpy())
        for k in (-1, 0, 1)
    ]
    assert near[1] == max(near)
    assert task.psnr(tv.mean) == pytest.approx(near[1], abs=1e-3)
    assert near[1] > max(tried.values()) + 1
    assert tv.nfe == 0
    assert not tv.std.any()


def test_samples_and_their_mean(task, prior):
    (dds,) = contenders(["DDS"], prior, "gaussian", 3)
    assert dds.rows == (("DDS, one sample", "sample"), ("DDS, mean of 3", "mean"))
    solved = dds.solve(task)
    posterior = task.reconstruct(DDS(nfe=3), prior, 3)
    assert posterior.samples is not None
    assert np.array_equal(solved.sample, posterior.samples[0].numpy())
    assert np.allclose(solved.mean, posterior.samples.mean(0).numpy(), atol=0.1)
    assert np.allclose(solved.std, posterior.samples.std(0).numpy(), atol=0.1)
    assert solved.nfe == 3
    assert task.psnr(solved.mean) > task.psnr(solved.sample)
    with pytest.raises(ReconError, match="needs a prior"):
        contenders(["DPS"])
    with pytest.raises(ReconError, match=r"methods are .* not 'magic'"):
        contenders(["magic"])


# The cache


def test_a_second_run_computes_nothing_and_an_interrupted_one_resumes(case, prior, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "kept")
    methods = contenders(["FBP", "DDS"], prior, "gaussian", 2)
    first = run([case], [SCAN], methods, cache=cache)
    assert [row.name for row in first] == ["FBP", "DDS, one sample", "DDS, mean of 2"]
    made: list[str] = []

    def counting(method):
        def solve(task):
            made.append(method.name)
            return method.solve(task)

        return replace(method, solve=solve)

    counted = [counting(method) for method in methods]
    again = run([case], [SCAN], counted, cache=cache)
    assert made == []
    for a, b in zip(first, again, strict=True):
        assert repr(a.measures) == repr(b.measures)  # NaN is not equal to itself
        assert np.array_equal(a.image, b.image)
    assert not list((tmp_path / "kept").glob("*.tmp"))

    newest = max((tmp_path / "kept").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    resumed = run([case], [SCAN], counted, cache=cache)
    assert made == ["DDS"]
    assert [repr(row.measures) for row in resumed] == [repr(row.measures) for row in first]
    # Anything else is another reconstruction.
    for changed in ({"photons": 1e4}, {"seed": 1}):
        made.clear()
        run([case], [SCAN], counted, cache=cache, **changed)
        assert made == ["FBP", "DDS"]
    made.clear()
    run([make_case("phantom", chest(seed=1), PIXEL)], [SCAN], counted[:1], cache=cache)
    assert made == ["FBP"]


def test_a_damaged_file_of_the_cache_is_named(tmp_path):
    image = np.zeros((3, 3), dtype=np.float32)
    solved, cache = Solved(image, image, image, "x", 1, 2.0), Cache(tmp_path)
    assert cache.solved({"a": 1}, lambda: solved) is solved
    kept = cache.solved({"a": 1}, lambda: pytest.fail("computed again"))
    assert (kept.setting, kept.nfe, kept.seconds) == ("x", 1, 2.0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ReconError, match=rf"{path.name} is damaged"):
        cache.solved({"a": 1}, lambda: solved)


def test_an_error_names_the_scan_and_the_method(case):
    (method,) = contenders(["FBP"])

    def fail(task):
        raise ReconError("it broke")

    with pytest.raises(ReconError, match="phantom, parallel, 20 views, FBP: it broke"):
        run([case], [SCAN], [replace(method, solve=fail)])


# The page


def row(case, method, name, psnr, snr=4.0):
    image = np.zeros(case.shape, dtype=np.float32)
    seen = tuple((c, Detection(c / 2, snr * c / 40)) for c in (20.0, 40.0, 80.0))
    measures = Measures(psnr, -1.26, 2.0, 2.5, math.nan, 9.04, 0.5, seen)
    return Row(case, SCAN, method, name, image, Solved(image, image, image, "2^-16", 3, 12.3), measures)


def test_tables(case):
    rows = [row(case, "TV", "TV", 30.0), row(case, "DDS", "one", 29.0), row(case, "DDS", "mean", 31.5)]
    text = benchmark.biases(rows)
    assert "| slice | beam | scan | TV | one | mean |" in text
    assert "| phantom | parallel | 20 views | -1.3 / +2.0 |" in text
    assert "| -1.3 / +2.0 |" in benchmark.biases(rows)
    assert "| 2.50 / – |" in benchmark.resolution(rows)
    assert "| 9.0 / 0.50 |" in benchmark.noise(rows)
    assert "10 (2.0), **20 (4.0)**, **40 (8.0)**" in benchmark.inserts(rows)
    assert "Detected: TV 2 of 3; one 2 of 3; mean 2 of 3." in benchmark.inserts(rows)
    assert "| 2^-16, 12 s | 2^-16, 12 s |" in benchmark.choices(rows)


def files(folder):
    with h5py.File(folder / "hu.h5", "w") as file:
        group = file.create_group("left_out")
        group["hu"] = chest()[None].astype(np.int16)
        group.attrs.update({"pixel_spacing_mm": [PIXEL / 2] * 2, "licence": "CC BY 4.0"})
    settings = NetworkSettings(channels=1, widths=(8,), embedding=8, sigma_data=0.5)
    contract = Contract(channels="real", unit="water", name="tiny", level=0.5, size_multiple=2)
    save_prior(folder / "tiny.safetensors", NetworkPrior(DenoisingUNet(settings), contract))
    return ["--data", str(folder / "hu.h5"), "--series", "left_out", "--slices", "0"]


def test_from_the_series_to_the_page(tmp_path, capsys):
    words = files(tmp_path)
    words += [
        "--prior",
        str(tmp_path / "tiny.safetensors"),
        "--num-samples",
        "2",
        "--methods",
        "FBP",
        "TV",
        "DDS",
    ]
    words += ["--views", "12", "--arcs", "90", "--beams", "fan", "--cache", str(tmp_path / "cache")]
    words += ["--out", str(tmp_path / "new" / "ct.md")]
    benchmark.main(words)
    page = (tmp_path / "new" / "ct.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in page
    assert "--data hu.h5" in page
    assert "left_out, CC BY 4.0" in page
    assert "2e+05 photons" in page
    assert page.count("| slice 0 | fan | 12 views |") == page.count("| slice 0 | fan | 90°, 90 views |") == 5
    assert "](ct.png)" in page
    picture = (tmp_path / "new" / "ct.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_bad_input_ends_in_one_sentence_and_leaves_nothing(tmp_path):
    words = [*files(tmp_path), "--out", str(tmp_path / "ct.md")]
    for changes, message in (
        (["--methods", "FBP", "--series", "unknown"], "no series and no patient 'unknown'"),
        (["--methods", "FBP", "--slices", "3"], "no slice 3"),
        (["--methods", "FBP", "--views", "--arcs"], "nothing to scan"),
        (["--methods", "FBP", "--views", "0"], "positive"),
        (["--methods", "FBP", "--photons", "-1"], "positive"),
        (["--prior", str(tmp_path / "none.safetensors")], "none.safetensors"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            benchmark.main([*words, *changes])
        assert str(error.value).startswith("error: ")
    assert not (tmp_path / "ct.md").exists()
