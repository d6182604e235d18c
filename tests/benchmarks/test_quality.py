import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import classical, quality
from benchmarks.cases import TARGETS, make_case, make_scenario, measured_case, read_cfl, simulated_case
from benchmarks.classical import EXPONENTS, METHODS, Cache, Method, best_scores, climb
from operators.fft import ifftc
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from priors.gaussian import GaussianPrior
from recon.errors import ReconError
from recon.solvers.cg import cg

SHAPE = (48, 40)


def phantom():
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    return (
        1.0 * ((x / 0.8) ** 2 + (y / 0.85) ** 2 < 1)
        - 0.5 * ((x - 0.2) ** 2 + y**2 < 0.1)
        + 0.3 * ((x + 0.3).abs() + (y - 0.2).abs() < 0.2)
    )


def case(seed=0, noise=0.01, name="phantom"):
    image = torch.polar(phantom(), smooth_phase(SHAPE, seed=1))
    maps = random_smooth_maps(5, SHAPE, seed=2)
    kspace = simulate_kspace(image, maps, noise, seed=seed)
    return make_case(name, kspace, noise_free=image.abs() * maps.abs().square().sum(0).sqrt())


@pytest.fixture(scope="module")
def scenario():
    return make_scenario(case(), "equispaced", 4)


def write_cfl(folder, array, dims):
    (folder / "full.hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + " \n# Command\nx\n")
    np.asarray(array, dtype="<c8").reshape(-1, order="F").tofile(folder / "full.cfl")
    return folder / "full.cfl"


# Cases


def test_cfl_is_column_major_and_becomes_coils_readout_phase(tmp_path):
    array = np.random.default_rng(0).standard_normal((30, 26, 3, 2)) @ np.array([1, 1j])
    path = write_cfl(tmp_path, array, (1, 30, 26, 3, 1))
    assert read_cfl(path).shape == (1, 30, 26, 3, 1)
    kspace = measured_case(path).kspace
    assert kspace.shape == (3, 30, 26)
    assert kspace[2, 7, 11].item() == np.complex64(array[7, 11, 2])


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 30, 26, 3), "2340 values|2339 values"),
        ((1, 30, 26), "no such|dimensions"),
        ((), "dimensions is missing"),
    ],
)
def test_damaged_cfl_is_one_sentence_naming_the_file(tmp_path, dims, message):
    path = write_cfl(tmp_path, np.zeros(2339), dims)
    with pytest.raises(ReconError, match=message) as error:
        measured_case(path)
    assert "full." in str(error.value)


def test_absent_cfl_and_single_coil(tmp_path):
    with pytest.raises(ReconError, match="there is no such file"):
        measured_case(tmp_path / "none.cfl")
    with pytest.raises(ReconError, match="coils in the fourth"):
        measured_case(write_cfl(tmp_path, np.ones((1, 30, 26)), (1, 30, 26)))


def test_targets_of_noiseless_data_are_the_image_seen_through_the_coils():
    image, maps = torch.polar(phantom(), smooth_phase(SHAPE, seed=1)), random_smooth_maps(5, SHAPE, seed=2)
    made = make_case("phantom", simulate_kspace(image, maps))
    truth = image.abs() * maps.abs().square().sum(0).sqrt()
    assert torch.allclose(made.targets["rss"], truth, atol=1e-5)
    # By Cauchy-Schwarz no normalised maps combine to more, and good ones combine to nearly all.
    assert bool((made.targets["combined"] <= truth + 1e-5).all())
    assert float((made.targets["combined"] - truth).norm() / truth.norm()) < 0.02


def test_simulated_case_is_the_slice_it_names(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = np.zeros((*SHAPE[::-1], 3), dtype=np.float32)
    volume[..., 1] = 7 * phantom().numpy().T
    path = tmp_path / "head.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    made = simulated_case(path, 1, crop=(40, 32))
    assert made.name == "head, slice 1"
    assert made.kspace.shape == (12, 40, 32)
    image = phantom()[4:44, 4:36]
    coils = random_smooth_maps(12, (40, 32), seed=1).abs().square().sum(0).sqrt()
    assert torch.allclose(made.targets["noise-free"], image * coils / image.max(), atol=1e-6)
    assert np.corrcoef(made.targets["rss"].flatten(), image.flatten())[0, 1] > 0.95
    for arguments, message in (((3,), "no slice 3"), ((0,), "empty"), ((1, (64, 8)), "cropped")):
        with pytest.raises(ReconError, match=message):
            simulated_case(path, *arguments)


def test_maps_see_the_calibration_region_only(scenario):
    changed = case()
    outside = torch.ones(SHAPE[1], dtype=torch.bool)
    outside[scenario.mask.acs] = False
    kspace = torch.where(outside, -changed.kspace, changed.kspace)  # the noise level stays
    again = make_scenario(replace(changed, kspace=kspace), "equispaced", 4)
    assert torch.equal(again.maps, scenario.maps)
    assert scenario.calibration == (48, scenario.mask.acs.stop - scenario.mask.acs.start)
    kept = scenario.cropped_maps != 0
    assert torch.equal(scenario.cropped_maps[kept], scenario.maps[kept])
    assert 0.3 < float(kept[0].double().mean()) < 1  # the phantom fills 0.53 of the field of view


# The search for λ


@settings(deadline=None, max_examples=30)
@given(
    peaks=st.lists(st.floats(EXPONENTS[0] - 3, EXPONENTS[1] + 3), min_size=1, max_size=2),
    start=st.sets(st.integers(*EXPONENTS), min_size=1, max_size=3),
)
def test_climb_finds_the_argmax_of_the_whole_grid(peaks, start):
    def evaluate(k):
        return {str(i): {"PSNR": -((k - peak) ** 2)} for i, peak in enumerate(peaks)}

    tried = climb(evaluate, start)
    for target in evaluate(0):
        everywhere = max(range(EXPONENTS[0], EXPONENTS[1] + 1), key=lambda k: evaluate(k)[target]["PSNR"])
        assert evaluate(classical.best(tried, target)) == evaluate(everywhere)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_best_scores_are_those_of_the_best_weight(scenario, method):
    quick = Method(method.name, method.solve, (-8,), method.settings)
    cache = Cache(None)
    found = best_scores(quick, scenario, cache)
    entries = list(cache._entries.values())
    assert (
        len({(entry["what"]["cropped"], entry["what"]["exponent"]) for entry in entries}) == len(entries) > 2
    )

    problem = scenario.problem
    scale = float(problem.operator.adjoint(problem.y).abs().max())
    weights = scenario.mask.mask.expand(SHAPE).numpy().astype(np.float32)
    for target, chosen in found.items():
        reference = scenario.case.targets[target].numpy()[None]
        assert chosen["PSNR"] == max(entry["scores"][target]["PSNR"] for entry in entries)
        # Neither half nor twice the weight is better, by the method itself on the same maps.
        maps = scenario.cropped_maps if chosen["cropped"] else scenario.maps
        psnrs = []
        for factor in (0.5, 1, 2):
            image = method.solve(
                (problem.y / scale).numpy(), maps.numpy(), weights, factor * chosen["lambda"]
            )
            psnrs.append(classical.psnr(reference, scale * np.abs(image)[None]))
        assert psnrs[1] == pytest.approx(chosen["PSNR"], abs=1e-6)
        assert max(psnrs) == psnrs[1]


def test_cg_sense_solves_its_normal_equations(scenario):
    problem = scenario.problem
    scale = float(problem.operator.adjoint(problem.y).abs().max())
    weights = scenario.mask.mask.expand(SHAPE).numpy().astype(np.float32)
    theirs = classical.cg_sense((problem.y / scale).numpy(), scenario.cropped_maps.numpy(), weights, 0.05)
    ours = cg(
        lambda x: problem.operator.normal(x) + 0.05 * x,
        problem.operator.adjoint(problem.y / scale),
        max_iter=200,
        tol=1e-7,
    ).x
    assert np.linalg.norm(theirs - ours.numpy()) < 1e-3 * np.linalg.norm(theirs)


# The cache


def counting(calls):
    def solve(y, maps, weights, weight):
        calls.append(weight)
        return classical.cg_sense(y, maps, weights, weight)

    return Method("CG-SENSE", solve, (-6,), "test")


def test_a_second_run_computes_and_writes_nothing(tmp_path, scenario):
    calls: list[float] = []
    first = best_scores(counting(calls), scenario, Cache(tmp_path))
    written, made = (tmp_path / "classical.jsonl").read_bytes(), len(calls)
    assert made == len(written.splitlines())
    assert best_scores(counting(calls), scenario, Cache(tmp_path)) == first
    assert len(calls) == made
    assert (tmp_path / "classical.jsonl").read_bytes() == written


def test_an_interrupted_run_resumes(tmp_path, scenario):
    calls: list[float] = []
    first = best_scores(counting(calls), scenario, Cache(tmp_path))
    lines = (tmp_path / "classical.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "classical.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    resumed: list[float] = []
    assert best_scores(counting(resumed), scenario, Cache(tmp_path)) == first
    assert len(resumed) == len(calls) - 2


def test_other_data_under_the_same_name_are_not_taken_for_these(tmp_path, scenario):
    calls: list[float] = []
    first = best_scores(counting(calls), scenario, Cache(tmp_path))
    made = len(calls)
    other = make_scenario(case(seed=9, noise=0.03), "equispaced", 4)
    assert best_scores(counting(calls), other, Cache(tmp_path)) != first
    assert len(calls) > made


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "classical.jsonl").write_text('{"key": "a", "looks": {}}\n{"key": \n')
    with pytest.raises(ReconError, match=r"classical\.jsonl: line 2"):
        Cache(tmp_path)


# The table


@pytest.fixture(scope="module")
def diffusion():
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=torch.complex64), variance=0.1)
    return quality.Diffusion(prior, num_samples=2)


@pytest.fixture(scope="module")
def rows(diffusion):
    return quality.run([case()], masks=["equispaced", "poisson"], accelerations=[3.0], diffusion=diffusion)


def test_rows_hold_every_method_for_every_target(rows, diffusion):
    names = ["zero-filled", "CG-SENSE", "TV", "L1-wavelet", *diffusion.names]
    groups = {(row["mask"], row["target"], row["method"]): row for row in rows}
    assert set(groups) == {(m, t, n) for m in ("equispaced", "poisson") for t in TARGETS for n in names}
    assert len(groups) == len(rows)
    for mask in ("equispaced", "poisson"):
        for target in TARGETS:
            for name in ("CG-SENSE", "TV", "L1-wavelet"):
                better, worse = groups[mask, target, name], groups[mask, target, "zero-filled"]
                assert better["PSNR"] > worse["PSNR"] + 1
                assert better["NMSE"] < worse["NMSE"]


def test_diffusion_rows_are_those_of_reconstruct(rows, diffusion):
    scenario = make_scenario(case(), "poisson", 3.0)
    problem = scenario.problem
    posterior = quality.reconstruct(
        problem.y, problem.operator, diffusion.prior, num_samples=2, seed=0, noise_std=problem.noise_std
    )
    for row in rows:
        if row["mask"] == "poisson" and row["method"] == diffusion.names[1]:
            target = scenario.case.targets[row["target"]]
            assert row["PSNR"] == pytest.approx(
                classical.psnr(target[None].numpy(), posterior.mean.abs()[None].numpy()), abs=1e-6
            )


def test_table_shows_the_realised_acceleration_and_the_best_in_bold(rows, diffusion):
    text = quality.table(rows, "rss", diffusion.names[1])
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    headings = [cell.strip() for cell in head.strip("|").split("|")]
    assert len(lines) == 2
    for line, kind in zip(lines, ("equispaced", "poisson"), strict=True):
        cells = dict(zip(headings, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        mask = make_scenario(case(), kind, 3.0).mask
        sampled = float(mask.mask.expand(SHAPE).double().mean())
        assert cells["realised"] == f"×{1 / sampled:.2f}"
        assert cells["asked"] == "×3"
        here = {r["method"]: r for r in rows if r["mask"] == kind and r["target"] == "rss"}
        top = max(row["PSNR"] for row in here.values())
        for name, row in here.items():
            assert cells[name].startswith("**") == (f"{row['PSNR']:.2f}" == f"{top:.2f}")
        classical_best = max(here[name]["PSNR"] for name in ("CG-SENSE", "TV", "L1-wavelet"))
        lead = here[diffusion.names[1]]["PSNR"] - classical_best
        assert cells["mean over best classical"] == f"{lead:+.2f} dB"
        assert (f"phantom, {kind} ×3 (" in text) == (lead <= 0)
        perfect = classical.psnr(*(case().targets[name][None].numpy() for name in ("rss", "noise-free")))
        assert cells["noise-free image"] == f"{perfect:.2f}"
    assert "noise-free image" not in quality.table(rows, "noise-free", diffusion.names[1])


def made_up_row(method, psnr, **more):
    where = {
        "case": "a",
        "simulated": True,
        "mask": "random",
        "asked": 4.0,
        "acceleration": 3.9,
        "noise_free": None,
    }
    scores = {"PSNR": psnr, "SSIM": 0.9, "NMSE": 0.01}
    return {**where, "calibration": "48 × 10", "target": "rss", "method": method, **scores, **more}


def test_table_says_where_the_mean_leads_and_where_not():
    rows = [made_up_row("TV", 30.0, **{"lambda": 0.5, "cropped": True}), made_up_row("mean", 31.5)]
    assert "| +1.50 dB |" in quality.table(rows, "rss", "mean")
    assert quality.table(rows, "rss", "mean").endswith("The mean leads on every row.")
    rows[1]["PSNR"] = 29.0
    assert quality.table(rows, "rss", "mean").endswith("does not lead on: a, random ×4 (-1.00 dB).")
    assert "| 0.5 c |" in quality.choices(rows)


def test_command_writes_the_page_without_paths(tmp_path, capsys, scenario):
    array = case().kspace.numpy().transpose(1, 2, 0)
    path = write_cfl(tmp_path, array, (1, *array.shape))
    out = tmp_path / "new" / "quality.md"
    arguments = ["--skip-dds", "--measured", str(path), "--masks", "poisson", "--accelerations", "3"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(out)]
    quality.main(arguments)
    page = out.read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in page
    assert "--measured full.cfl" in page
    assert "simulated coils flatter" not in page  # these were measured
    assert page.count("| full, measured, 5 coils | poisson |") == 3
    entries = [json.loads(line) for line in (tmp_path / "cache" / "classical.jsonl").read_text().splitlines()]
    assert {entry["what"]["method"] for entry in entries} == {method.name for method in METHODS}


def test_bad_input_ends_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.cfl|none\.hdr"):
        quality.main(
            ["--skip-dds", "--measured", str(tmp_path / "none.cfl"), "--out", str(tmp_path / "q.md")]
        )
    assert not (tmp_path / "q.md").exists()
    with pytest.raises(SystemExit, match="none"):
        quality.main(["--prior", str(tmp_path / "none.safetensors"), "--measured", "full.cfl"])


@pytest.mark.parametrize("text", ["a.nii", "a.nii:x", "a.nii:1:20", "a.nii:1:20x", "a:b:1:2x2"])
def test_nifti_argument_refuses(text):
    with pytest.raises(quality.argparse.ArgumentTypeError, match="FILE:SLICE"):
        quality.nifti_argument(text)


def test_nifti_argument_is_taken_apart():
    path, index, crop = quality.nifti_argument("dir/a.nii.gz:25:320x256")
    assert (path.name, index, crop) == ("a.nii.gz", 25, (320, 256))
    assert quality.nifti_argument("a.nii:3")[1:] == (3, None)


def test_rss_target_holds_the_noise():
    noisy = case(noise=0.05)
    air = noisy.targets["rss"][:4, :4]
    # 2C real components of standard deviation 0.05, in orthonormal transforms.
    assert float(air.square().mean().sqrt()) == pytest.approx(0.05 * np.sqrt(2 * 5), rel=0.2)
    assert torch.equal(noisy.targets["rss"], ifftc(noisy.kspace).abs().square().sum(0).sqrt())
