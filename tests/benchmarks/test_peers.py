"""Other software beside ours: what is around it with fakes, agreement where it is installed."""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.cases import make_case, make_scenario, read_cfl
from benchmarks.peers import __main__ as command
from benchmarks.peers import bart_programs, environment, interleaving
from benchmarks.peers.coordinates import PictureDenoiser, Span, joined, split
from benchmarks.peers.ct_programs import astra_run, iradon, iradon_sart
from benchmarks.peers.deepinv_solvers import (
    DENOISED,
    RETURNED,
    Adjointness,
    DivergedError,
    Picture,
    Setting,
    detectors_of,
    from_views,
    mri_physics,
    mri_picture,
    tomography,
)
from benchmarks.peers.interleaving import Contestant, Spread, compete
from benchmarks.peers.methods import CLASSICAL, BartMethod, DeepinvMethod, Posed, pose_mri, trimmed
from benchmarks.peers.page import page, verdict
from benchmarks.peers.search import search
from benchmarks.peers.sections import (
    Rules,
    Store,
    ct_scenario,
    diffusion,
    odd_size,
    rows_of,
    single_coil,
    unexplained,
)
from operators.ct import CTOperator
from operators.ct_geometry import ParallelBeam, equispaced_angles
from operators.fft import fftc
from operators.masks import make_mask
from operators.mri import MulticoilMRI, SinglecoilMRI
from operators.simulation import random_smooth_maps, simulate_kspace
from priors.gaussian import GaussianPrior
from recon.errors import ReconError
from recon.metrics import psnr
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.sirt import SIRT
from recon.solvers.tikhonov import Tikhonov
from recon.solvers.total_variation import TotalVariation

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (33, 24)

needs_bart = pytest.mark.skipif(environment.bart() is None, reason="BART is not installed")


@pytest.fixture
def deepinv():
    """The package, imported as the benchmark imports it."""
    if not __import__("importlib.util").util.find_spec("deepinv"):
        pytest.skip("deepinv is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return environment.peer("deepinv")


def coil_maps(num_coils=4, shape=SHAPE):
    maps = random_smooth_maps(num_coils, shape, seed=0)
    return maps / maps.abs().square().sum(0).sqrt()


def head(shape=SHAPE):
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    image = 0.6 * ((y / 0.8) ** 2 + (x / 0.65) ** 2 < 1) + 0.4 * ((y - 0.2) ** 2 + (x + 0.1) ** 2 < 0.05)
    return torch.polar(image.float(), 0.5 * y)


def kspace(shape=SHAPE, noise=0.003):
    return simulate_kspace(head(shape), coil_maps(shape=shape), noise, seed=0)


def problem(shape=SHAPE, noise=0.003, kind="gaussian-2d"):
    mask = make_mask(kind, shape, 2.5, seed=0).mask
    operator = MulticoilMRI(coil_maps(shape=shape), mask)
    return Problem(kspace(shape, noise) * operator.mask, operator, noise)


def prior(shape=SHAPE, variance=0.05):
    return GaussianPrior(
        torch.zeros(shape, dtype=torch.complex64),
        variance=variance * torch.ones(shape),
        sigma_min=0.001,
        sigma_max=10.0,
    )


def relative(result, truth):
    return float(np.linalg.norm(np.asarray(result) - np.asarray(truth)) / np.linalg.norm(np.asarray(truth)))


# -- coordinates ---------------------------------------------------------------------------------------------


def test_images_go_to_pictures_and_back():
    image = head()[None]
    span = Span.of(image[0])
    u = span.channels(image)
    assert u.shape == (1, 2, *SHAPE)
    assert float(u.min()) >= 0
    assert float(u.max()) <= 1
    assert torch.allclose(span.image(u), image, atol=1e-6)
    real = Span(0.0, 2.0, False)
    assert torch.allclose(real.channels(image.real), image.real.unsqueeze(1) / 2)


def test_data_of_pictures_are_those_of_the_same_operator():
    p = problem(noise=0.0)
    span = Span(-1.5, 1.5, True)
    picture = joined(span.channels(head()[None]), True)[0]
    clean = p.operator(head())
    assert torch.allclose(span.data(clean, p.operator), p.operator(picture), atol=1e-5)


def test_a_span_is_not_empty():
    with pytest.raises(ReconError, match="low < high"):
        Span(1.0, 1.0, False)


def test_pictures_are_denoised_as_the_prior_denoises_images():
    p, span = prior(), Span(-2.0, 2.0, True)
    denoiser = PictureDenoiser(p, span)
    x = head()[None]
    made = denoiser(span.channels(x), torch.tensor(0.1))
    # A noise of 0.1 of a picture is one of 0.4 of an image.
    assert torch.allclose(span.image(made), p.denoise(x, 0.4), atol=1e-6)
    assert denoiser.evaluations == 1
    assert denoiser.last is not None
    assert torch.equal(denoiser.last, made)
    denoiser(torch.cat([made, made]), 0.0)  # below the smallest level that the prior knows
    assert denoiser.evaluations == 3


def test_noise_beyond_the_prior_leaves_the_mean():
    p, span = prior(), Span(-2.0, 2.0, True)
    noise = 100 * torch.randn(1, *SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    made = span.image(PictureDenoiser(p, span)(span.channels(noise), 100 * span.slope))
    # The exact posterior mean is zero but for var / (var + 100²) of the noise.
    assert float(made.abs().max()) < 0.05


# -- the oracle ----------------------------------------------------------------------------------------------


def test_the_oracle_finds_the_best_setting_and_image():
    truth = torch.zeros(4, 4)

    def run(setting, seed):
        distance = abs(math.log2(setting.options["lambda_"]) + 2) + 3 * abs(setting.options["zeta"] - 0.5)
        image = truth + 0.1 + distance
        return Picture(image, image - 0.05, setting.nfe)

    choice = search("DiffPIR", 7, [0], run, lambda image: -float(image.abs().max()))
    assert dict(choice.setting.options) == {"lambda_": 0.25, "zeta": 0.5}
    assert choice.setting.nfe == 7
    assert choice.output == DENOISED
    assert choice.psnr == pytest.approx(-0.05)


def test_the_oracle_passes_over_what_is_no_number_and_tries_both_guidances():
    tried = []

    def run(setting, seed):
        weight, guidance = setting.options["weight"], setting.options["guidance"]
        tried.append((guidance, weight))
        # The longer the better, until it is not finite any more; with the other guidance best at 1/4.
        value = 1 / weight if guidance == "norm" else 0.05 + abs(math.log2(weight) + 2)
        bad = guidance == "norm" and weight > 16
        return Picture(torch.full((2, 2), math.nan if bad else value), torch.zeros(0), 3)

    def score(image):
        return -float(image.max()) if image.numel() else -math.inf

    choice = search("DPS", 3, [0], run, score)
    assert dict(choice.setting.options) == {"weight": 0.25, "guidance": "annealed"}
    assert choice.output == RETURNED
    assert choice.text == "weight 0.25, guidance annealed"
    assert ("norm", 32.0) in tried
    assert ("norm", 64.0) not in tried
    assert len(tried) == len(set(tried))


def test_the_oracle_passes_over_what_diverges():
    def run(setting, seed):
        if setting.options["largest"] > 2:
            raise DivergedError("not finite")
        image = torch.full((2, 2), setting.options["largest"])
        return Picture(image, image, 3)

    choice = search("DDRM", 3, [0], run, lambda image: float(image.max()))
    assert choice.setting.options["largest"] == 2

    def never(setting, seed):
        raise DivergedError("not finite")

    with pytest.raises(DivergedError, match="no setting"):
        search("DDRM", 3, [0], never, lambda image: 0.0)


def test_the_oracle_judges_a_setting_by_the_mean_over_the_seeds_that_are_scored():
    def run(setting, seed):
        # With seed 5 the network's last image fails at λ = 8, with which the other seeds do best.
        fails = seed == 5 and setting.options["lambda_"] == 8
        distance = abs(math.log2(setting.options["lambda_"]) - 3) + setting.options["zeta"]
        return Picture(torch.full((2, 2), 30.0), torch.full((2, 2), distance + 10 * fails), 3)

    def score(image):
        return -float(image.max())

    chosen = {seeds: search("DiffPIR", 3, seeds, run, score) for seeds in ((4,), (4, 5, 6), (5,))}
    assert [choice.setting.options["lambda_"] for choice in chosen.values()] == [8, 4, 4]


def test_the_oracle_draws_with_the_seeds_of_all_rounds(monkeypatch):
    drawn = []

    def run(setting, picture, prior, seed):
        drawn.append(seed)
        return Picture(torch.ones(2, 2), torch.ones(2, 2), 3)

    monkeypatch.setattr(Setting, "run", run)
    posed = Posed(None, lambda image: image, lambda image: float(image.max()))  # type: ignore[arg-type]
    ours = Contestant("DDS here", lambda seed: np.ones((2, 2)))
    diffusion(posed, [ours], prior(), ("DPS",), 3, Rules(3, seed=7), {"section": "mri"})
    assert drawn[:6] == [7, 8, 9, 7, 8, 9]  # two settings


def test_there_are_three_solvers_and_two_evaluations_at_least():
    with pytest.raises(ReconError, match="DPS, DiffPIR, DDRM, not 'MCG'"):
        Setting("MCG", 10)
    with pytest.raises(ReconError, match="at least 2 network evaluations, got 1"):
        Setting("DPS", 1)


# -- competing -----------------------------------------------------------------------------------------------


def test_contestants_take_turns_with_the_seed_of_the_round(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("benchmarks.peers.interleaving.now", lambda clock: float(next(ticks)))
    seen = []

    def runner(name):
        def run(seed):
            seen.append((name, seed))
            return np.full(2, float(seed))

        return Contestant(name, run)

    first, second = compete([runner("a"), runner("b")], lambda image: image.sum(), 2, seed=5, warm_up=True)
    assert seen == [("a", 5), ("b", 5), ("a", 5), ("b", 5), ("a", 6), ("b", 6)]
    assert first.scores == (10.0, 12.0)
    assert first.seconds == (1.0, 1.0)
    assert first.time_ratio(second) == Spread(1.0, 1.0, 1.0)


def test_ratios_are_taken_round_by_round():
    a, b = Contestant("a", lambda seed: np.zeros(1)), Contestant("b", lambda seed: np.zeros(1))
    from benchmarks.peers.interleaving import Outcome

    ours, theirs = Outcome(a, (1.0, 4.0, 9.0), (1.0, 2.0, 3.0)), Outcome(b, (2.0, 4.0, 3.0), (3.0, 2.0, 0.0))
    # The ratio of the medians would be 4 / 3.
    assert ours.time_ratio(theirs) == Spread(1.0, 0.5, 3.0)
    (_, row) = rows_of([ours, theirs], {"section": "mri"})
    assert row["ratio"] == [1.0, 0.5, 3.0]
    assert row["difference"] == [0.0, -2.0, 3.0]


def test_the_clock_of_processors_counts_programs_that_were_run(monkeypatch):
    monkeypatch.setattr(interleaving.time, "process_time", lambda: 1.5)
    children = SimpleNamespace(ru_utime=2.0, ru_stime=0.25)
    monkeypatch.setattr(interleaving.resource, "getrusage", lambda who: children)
    assert interleaving.now("cpu") == 3.75


def test_short_calls_are_repeated(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interleaving, "now", lambda name: clock[0])
    calls = []

    def run(seed):
        calls.append(seed)
        clock[0] += 0.01
        return np.zeros(1)

    _, seconds = interleaving.timed(Contestant("a", run), 7, "cpu")
    assert seconds == pytest.approx(0.01)
    assert calls == [7] * 6  # once for the image, and five times for 0.05 seconds


def test_rows_are_kept_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert Store(path).rows({"a": 1}, lambda: [{"x": 1.5}]) == [{"x": 1.5}]
    with path.open("a") as file:
        file.write('{"key": "torn')
    again = Store(path)
    assert again.rows({"a": 1}, lambda: pytest.fail("computed twice")) == [{"x": 1.5}]
    assert again.rows({"a": 2}, list) == []
    path.write_text("nonsense\n")
    with pytest.raises(ReconError, match="line 1 is damaged"):
        Store(path)


# -- the page ------------------------------------------------------------------------------------------------


def group(name, ratio, difference, case="slice 1"):
    place = {
        "section": "mri",
        "case": case,
        "mask": "equispaced",
        "asked": 4.0,
        "acceleration": 3.4,
        "calibration": "48 × 20",
        "nfe": 30,
        "simulated": True,
        "remark": "weight 8",
    }
    ours = place | {"name": "DDS here", "scores": [30.0, 31.0], "seconds": [2.0, 3.0]}
    theirs = place | {
        "name": name,
        "scores": [30.0 - difference, 31.0 - difference],
        "seconds": [2.0 / ratio, 3.0 / ratio],
        "ratio": [ratio, ratio - 0.1, ratio + 0.1],
        "difference": [difference, difference - 0.2, difference + 0.2],
    }
    return [ours, theirs]


def test_the_verdict_names_what_misses_a_bar():
    good = group("deepinv DPS, best setting", 0.5, 0.3)
    said = verdict(good)
    assert "**DDS here**: at least as good as the peer's best diffusion solver in all 1" in said
    assert "At most 0.7 of its time" in said
    said = verdict([*good, *group("deepinv DiffPIR, best setting", 0.9, -0.25, case="slice 2")])
    assert "behind the peer's best diffusion solver in 1 of 2: mri, slice 2" in said
    assert "-0.25 dB" in said
    assert "0.90 of its time" in said


def test_only_the_best_peer_is_judged():
    ours, slow = group("deepinv DPS, best setting", 0.9, 3.0)
    _, best = group("deepinv DiffPIR, best setting", 0.4, 0.1)
    assert "At most 0.7" in verdict([ours, slow, best])


def test_each_setting_of_ours_is_judged():
    ours, theirs = group("deepinv DPS, best setting", 0.5, -1.0)
    sharp = ours | {"name": "DDS here, eta 0", "scores": [33.0, 33.0]}
    first, second = verdict([ours, sharp, theirs]).splitlines()
    assert "behind" in first
    assert "at least as good" in second


def test_the_page_states_what_a_table_must_state():
    made = page(group("deepinv DPS, best setting", 0.5, 0.3), {"date": "today"}, clock="cpu", repetitions=2)
    assert "seeds differ by" not in made
    for part in (
        "- date: today",
        "realised ×3.40",
        "calibration 48 × 20",
        "target `combined`",
        "flatters every method",
        "0.50 (0.40–0.60)",
        "+0.30 (+0.10 to +0.50)",
        "over the very seeds that are scored, an oracle",
    ):
        assert part in made


def test_a_row_says_that_its_seeds_differ():
    ours, theirs = group("deepinv DiffPIR, best setting", 0.5, 0.3)
    made = page([ours, theirs | {"scores": [33.3, 23.4]}], {}, clock="cpu", repetitions=2)
    assert "| weight 8 |" in made
    assert "| weight 8; **seeds differ by 9.9 dB** |" in made


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to reconstruct"),
        (["--ct", "chest.h5"], "--ct needs --series"),
        (["--measured", "a.cfl", "--repetitions", "0"], "--repetitions must be at least 1, got 0"),
        (["--measured", "a.cfl", "--nfe", "1"], "--nfe must be at least 2"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(words, message):
    options = command.build_parser().parse_args(words)
    with pytest.raises(ReconError, match=message):
        command.check(options)


def test_rows_are_kept_for_the_code_and_the_precision_that_made_them(monkeypatch, tmp_path):
    made = []

    def make():
        made.append(1)
        return [{"section": "mri", "case": "a", "name": "DDS here", "scores": [30.0]}]

    monkeypatch.setattr(command, "mri_groups", lambda options, rules, facts: [({"section": "mri"}, make)])

    def run(code, *words):
        monkeypatch.setattr(command, "code_digest", lambda: code)
        command.run(command.build_parser().parse_args(["--cache", str(tmp_path), *words]))
        return len(made)

    assert [run("a"), run("a"), run("b"), run("b", "--precision", "bf16"), run("a")] == [1, 1, 2, 3, 3]


def test_a_missing_package_says_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReconError, match=r"deepinv is not installed: `make peers` makes .*\.venv-peers"):
        environment.peer("deepinv.sampling")
    with pytest.raises(ReconError, match="make peers"):
        DeepinvMethod("a", "DPS", prior())


def test_without_bart_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(bart_programs, "bart", lambda: None)
    monkeypatch.setattr("benchmarks.peers.methods.bart", lambda: None)
    with pytest.raises(ReconError, match="BART is not installed"):
        bart_programs.pics(np.zeros((1, 4, 4), "c8"), np.zeros((1, 4, 4), "c8"), 0.1, "l2")
    with pytest.raises(ReconError, match="BART is not installed"):
        BartMethod("a")


def test_penalties_of_bart_are_known():
    with pytest.raises(ReconError, match="l2, tv, wavelet, not 'llr'"):
        BartMethod("a", "llr")
    with pytest.raises(ReconError, match="not 'llr'"):
        bart_programs.pics(np.zeros((1, 4, 4), "c8"), np.zeros((1, 4, 4), "c8"), 0.1, "llr")


def test_the_modules_import_no_peer():
    code = (
        "import sys, benchmarks.peers.__main__; "
        "names = ('deepinv', 'torchvision', 'fastmri', 'astra', 'sigpy'); "
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_script_makes_no_other_torch():
    text = (ROOT / "benchmarks" / "peers" / "make_environment.sh").read_text()
    (line,) = [line for line in text.splitlines() if "deepinv==" in line]
    assert "--no-deps" in line
    subprocess.run(
        ["sh", "-n", str(ROOT / "benchmarks" / "peers" / "make_environment.sh")],
        check=True,
        capture_output=True,
    )


# -- BART ----------------------------------------------------------------------------------------------------


def test_files_of_bart_are_read_as_they_were_written(tmp_path):
    array = (np.arange(24) + 1j).astype("c8").reshape(2, 3, 4)
    bart_programs.write_cfl(tmp_path / "a", bart_programs.to_bart(array))
    read = read_cfl(tmp_path / "a.cfl")
    assert read.shape == (3, 4, 1, 2)
    assert np.array_equal(read[:, :, 0].transpose(2, 0, 1), array)


@needs_bart
def test_bart_solves_the_same_problems():
    p = problem((48, 40))
    y, maps = p.y.numpy(), p.operator.maps.numpy()
    noise = KeyedNoise(0, "", [0], (48, 40), torch.complex64, p.y.device)
    ours = Tikhonov(0.01, 100).sample(p, None, noise).samples[0].numpy()
    assert relative(bart_programs.pics(y, maps, 0.01, "l2"), ours) < 1e-3
    ours = TotalVariation(0.003, 300).sample(p, None, noise).samples[0].numpy()
    assert relative(bart_programs.pics(y, maps, 0.003, "tv", 300), ours) < 0.03


@needs_bart
def test_total_variation_of_bart_is_at_its_minimum():
    p = problem((48, 40))
    y, maps = p.y.numpy(), p.operator.maps.numpy()
    made, longer = (bart_programs.pics(y, maps, 0.0003, "tv", steps) for steps in (None, 3000))
    # With BART's own -u, 1000 steps are 4e-5 away, and 100 steps 0.05.
    assert relative(made, longer) < 1e-5


@needs_bart
def test_maps_of_bart_span_the_same_coil_images():
    shape = (48, 40)
    full = fftc(coil_maps(shape=shape) * head(shape))
    maps = torch.from_numpy(bart_programs.ecalib(full.numpy(), (24, 24)))
    object_ = head(shape).abs() > 0.1
    overlap = (maps.conj() * coil_maps(shape=shape)).sum(0).abs()[object_]
    assert float(overlap.min()) > 0.995


@needs_bart
def test_a_failure_of_bart_is_a_sentence(tmp_path):
    with pytest.raises(ReconError, match="bart pics failed"):
        bart_programs.run_bart(["pics"], tmp_path, 1)


def test_sigpy_and_ours_solve_the_same_problem():
    p = problem((48, 40))
    arguments = (p.y.numpy(), p.operator.maps.numpy(), p.operator.mask.numpy().astype("f4"), 0.01)
    ours, theirs = (CLASSICAL["CG-SENSE"][who].solve(*arguments) for who in ("ours", "sigpy"))
    assert relative(theirs, ours) < 5e-3


# -- maps and single coils -----------------------------------------------------------------------------------


def test_what_maps_cannot_explain():
    maps = coil_maps()
    images = maps * head()
    orthogonal = torch.zeros_like(images)
    # Orthogonal to the maps at every pixel, of a tenth of the amplitude.
    orthogonal[0], orthogonal[1] = -maps[1].conj(), maps[0].conj()
    orthogonal = orthogonal / orthogonal.abs().square().sum(0).sqrt() * 0.1 * head().abs()
    expected = 10 * math.log10((1 + 0.01) / 0.01)
    assert unexplained(maps, images + orthogonal) == pytest.approx(expected, abs=1e-3)
    assert unexplained(2 * maps, images + orthogonal) == pytest.approx(expected, abs=1e-3)


def test_a_single_coil_sees_the_combined_image():
    case = make_case("a", kspace((48, 40)))
    scenario = make_scenario(case, "gaussian-2d", 3.0)
    found, target = single_coil(scenario)
    assert isinstance(found.operator, SinglecoilMRI)
    assert target.shape == (48, 40)
    assert psnr(target[None], case.targets["combined"].numpy()[None]) > 30
    assert torch.equal(found.y != 0, found.operator.mask & (found.y != 0))
    # The least-squares image of all data would be the target.
    assert relative(found.operator.adjoint(found.y).abs(), target) < 0.6


# -- CT ------------------------------------------------------------------------------------------------------


def blobs(size):
    axis = torch.arange(size) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return 0.02 * torch.exp(-((x - 9) ** 2 + (y + 6) ** 2) / 40) + 0.01 * torch.exp(
        -((x + 10) ** 2 + (y - 8) ** 2) / 80
    )


@pytest.fixture(scope="module")
def scan():
    size = odd_size(58)
    operator = CTOperator(ParallelBeam(equispaced_angles(60), detectors_of(size), 1.5), (size, size), 1.5)
    return size, operator, operator(blobs(size)).contiguous()


def test_sizes_at_which_all_centres_agree():
    assert odd_size(256) == 255
    assert (odd_size(128), detectors_of(125)) == (125, 177)
    with pytest.raises(ReconError, match="too small"):
        odd_size(2)


def test_scikit_image_reconstructs_the_same_image(scan):
    size, operator, sinogram = scan
    ours = operator.direct_inverse(sinogram, "ram-lak").numpy()
    assert relative(iradon(sinogram.numpy(), operator.geometry, size, 1.5), ours) < 1e-5
    assert relative(iradon_sart(sinogram.numpy(), operator.geometry, size, 1.5, 2), blobs(size)) < 0.06


def test_scikit_image_with_another_centre_is_refused(scan):
    _, operator, sinogram = scan
    with pytest.raises(ReconError, match="odd"):
        iradon(sinogram.numpy(), operator.geometry, 58, 1.5)


def test_astra_reconstructs_the_same_image(scan):
    pytest.importorskip("astra")
    size, operator, sinogram = scan
    noise = KeyedNoise(0, "", [0], (size, size), torch.float32, sinogram.device)
    ours = SIRT(20).sample(Problem(sinogram, operator, 0.1), None, noise).samples[0]
    theirs = astra_run("SIRT", sinogram.numpy(), operator.geometry, size, 1.5, iterations=20)
    assert relative(theirs, ours) < 1e-4
    fbp = astra_run("FBP", sinogram.numpy(), operator.geometry, size, 1.5)
    assert relative(fbp, blobs(size)) < 0.05
    with pytest.raises(ReconError, match="FBP and SIRT here, not 'ART'"):
        astra_run("ART", sinogram.numpy(), operator.geometry, size, 1.5)


def test_a_detector_is_trimmed_at_both_ends():
    geometry = ParallelBeam(equispaced_angles(4), 183 - 6 + 2, 1.0)  # 125 pixels need 177
    operator = CTOperator(geometry, (125, 125), 1.0)
    image = torch.zeros(125, 125)
    image[40:60, 70:90] = 1
    sinogram, shorter = trimmed(operator(image), operator)
    assert sinogram.shape == (4, 177)
    assert torch.allclose(shorter(image), sinogram, atol=1e-4)


def test_a_scan_of_a_slice_is_in_hu():
    hu = np.full((72, 72), -1000.0)
    hu[20:50, 20:50] = 40.0
    made = ct_scenario("square", hu, 1.0, 90, photons=1e7)
    assert made.truth.shape == (33, 33)
    image = made.operator.direct_inverse(made.sinogram, "ram-lak").numpy()
    middle = made.hu(image)[13:18, 13:18]
    assert abs(float(middle.mean()) - 40) < 30
    with pytest.raises(ReconError, match="square slice"):
        ct_scenario("a", hu[:50], 1.0, 9)


# -- deepinv -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deepinv")
@pytest.mark.parametrize("single", [False, True])
def test_mri_of_deepinv_is_our_operator(single):
    p = problem()
    operator = SinglecoilMRI(p.operator.mask, SHAPE) if single else p.operator
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, dtype=torch.complex64, generator=generator)
    y = torch.randn(operator.range_shape, dtype=torch.complex64, generator=generator)
    both = Adjointness(operator, mri_physics(operator, 0.1))
    assert both.forward_difference(x) < 1e-5
    assert both.adjoint_difference(y * operator.mask) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("deepinv")
def test_tomography_of_deepinv_sees_the_same_rays(scan):
    size, operator, sinogram = scan
    physics = tomography(operator.geometry, size, 0.1)
    theirs = (physics.A(blobs(size)[None, None]) * physics.operator_norm * 1.5)[0, 0].T
    assert relative(theirs, sinogram) < 5e-3
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 1, size, size, generator=generator), torch.rand(from_views(sinogram).shape)
    forward, backward = float((physics.A(x) * y).sum()), float((x * physics.A_adjoint(y)).sum())
    assert forward == pytest.approx(backward, rel=1e-4)


@pytest.mark.usefixtures("deepinv")
def test_tomography_with_another_centre_is_refused():
    geometry = ParallelBeam(equispaced_angles(4), detectors_of(256), 1.0)
    with pytest.raises(ReconError, match="odd or both even"):
        tomography(geometry, 256, 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("deepinv")
@pytest.mark.parametrize(
    ("solver", "options", "gain"),
    [("DPS", {"weight": 30.0}, 6), ("DiffPIR", {"lambda_": 1.0}, 15), ("DDRM", {"largest": 0.125}, 10)],
)
def test_solvers_of_deepinv_come_closer_to_the_image(solver, options, gain):
    p = problem()
    if solver == "DDRM":
        operator = SinglecoilMRI(p.operator.mask, SHAPE)
        p = Problem(operator(head()), operator, 0.003)
    # A prior that knows how much energy each frequency of the image has.
    spectrum = torch.fft.fft2(head(), norm="ortho").abs().square() / 2 + 1e-5
    known = GaussianPrior(torch.zeros(SHAPE, dtype=torch.complex64), spectrum=spectrum, sigma_min=0.001)
    posed = pose_mri(p, known, head().abs().numpy())
    made = Setting(solver, 20, options).run(posed.picture, known, 3)
    assert made.nfe == 20
    again = Setting(solver, 20, options).run(posed.picture, known, 3)
    assert torch.equal(made.image, again.image)
    nothing = posed.psnr(torch.zeros(SHAPE, dtype=torch.complex64))
    assert posed.psnr(made.image) > nothing + gain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("deepinv")
def test_diffpir_of_deepinv_solves_the_data_step_as_we_do():
    """At a weight of zero for the prior nothing but the data count: least squares, as our CG-SENSE has it."""
    p = problem(noise=0.003)
    picture = mri_picture(p)
    from benchmarks.peers.environment import peer

    gamma = 50.0
    z = torch.zeros(picture.shape)
    theirs = peer("deepinv.optim").L2().prox(z, picture.y, picture.physics, gamma=gamma)
    noise = KeyedNoise(0, "", [0], SHAPE, torch.complex64, p.y.device)
    same = Problem(joined(picture.y, True)[0], p.operator, 0.003)
    ours = Tikhonov(1 / gamma, 200).sample(same, None, noise).samples[0]
    assert relative(joined(theirs, True)[0], ours) < 2e-3


@pytest.mark.usefixtures("deepinv")
def test_ddrm_of_several_coils_is_refused_by_the_solver():
    posed = pose_mri(problem(), prior(), head().abs().numpy())
    with pytest.raises(ReconError, match="one coil, not several"):
        Setting("DDRM", 5).run(posed.picture, prior(), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("deepinv")
@pytest.mark.parametrize("solver", ["DPS", "DDRM"])
def test_a_solver_of_deepinv_is_a_method_of_the_benchmark(solver):
    case = make_case("a", kspace((32, 28)))
    scenario = make_scenario(case, "gaussian-2d", 2.5)
    method = DeepinvMethod("theirs", solver, prior((32, 28)), nfe=4, oracle=False, num_samples=2)
    made = method.reconstruct(scenario, 0)
    assert made.image.shape == (32, 28)
    assert not made.image.is_complex()
    # DDRM reconstructs each of the four coils.
    assert made.nfe == 2 * 4 * (4 if solver == "DDRM" else 1)
    assert "deepinv" in method.settings
    assert "defaults" in method.settings
    if solver == "DPS":
        assert made.std is not None
        assert float(made.std.max()) > 0


def test_split_and_join():
    x = head()[None]
    assert split(x).shape == (1, 2, *SHAPE)
    assert torch.equal(joined(split(x), True), x)
    assert torch.equal(joined(split(x.real), False), x.real)


def test_help_is_readable():
    text = command.build_parser().format_help()
    assert "python -m benchmarks.peers" in text
    assert "--series" in text
    with pytest.raises(argparse.ArgumentTypeError):
        command.mask_argument("poisson")
