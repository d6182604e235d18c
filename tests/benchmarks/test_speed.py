import json
import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import linregress, t

from benchmarks.speed import __main__ as command
from benchmarks.speed import imports, memory, overhead, regression
from benchmarks.speed.counts import (
    OperationCounter,
    TensorKeeper,
    count_normal,
    count_sampler,
    example,
    measure_counts,
    memory_growth,
    transform_pair,
)
from benchmarks.speed.kspace_files import write_volume
from benchmarks.speed.networks import PUBLISHED, load_network, parameter_count, random_network
from benchmarks.speed.operator import make_calls
from benchmarks.speed.overhead import psnr
from benchmarks.speed.quality import Run, fastest
from benchmarks.speed.report import Bar, Section
from benchmarks.speed.settings import Settings, nifti_image, phantom, scan
from benchmarks.speed.throughput import Trial, doublings, out_of_memory
from benchmarks.speed.timing import (
    DATA,
    NETWORK,
    NOISE,
    OPERATOR,
    Parts,
    Seconds,
    Spread,
    cpu,
    fit_exponent,
    in_turn,
    short,
    watched,
)
from operators.fft import ifftc
from recon.errors import ReconError
from recon.io.fastmri import FastMRIFile
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.cg import cg
from recon.solvers.dds import DDS

CPU = torch.device("cpu")


# Numbers


def test_ratios_are_taken_round_by_round():
    # The machine slows down to half: no ratio changes, though the medians of both do.
    own, other = Spread.of([3, 6, 6]), Spread.of([2, 4, 4])
    assert own.over(other).values == (1.5, 1.5, 1.5)
    assert str(Spread.of([0.01234, 0.2, 1])) == "0.200 (0.0123–1.00)"
    assert Spread.of([4, 1, 2]).times(10).as_dict() == {"median": 20, "min": 10, "max": 40, "n": 3}
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (12.34, "12.3"), (0.00123, "0.00123"), (math.inf, "inf")],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert short(value) == text


def test_exponent_of_an_exact_power_law():
    sizes = [1, 2, 4, 8]
    found = fit_exponent(sizes, [3 * n**1.3 for n in sizes])
    assert (found.value, found.low, found.high) == pytest.approx((1.3, 1.3, 1.3))


def test_exponent_and_interval_are_those_of_linear_regression():
    generator = np.random.default_rng(0)
    sizes = np.repeat([1, 2, 4, 8, 16], 3)
    seconds = 0.2 * sizes**0.9 * np.exp(0.1 * generator.standard_normal(sizes.size))
    expected = linregress(np.log(sizes), np.log(seconds))
    half = t.ppf(0.975, sizes.size - 2) * expected.stderr
    found = fit_exponent(sizes.tolist(), seconds.tolist())
    assert found.value == pytest.approx(expected.slope)
    assert (found.low, found.high) == pytest.approx((expected.slope - half, expected.slope + half))


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([1, 2], [1, 2]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 4], [1, 0, 2])]
)
def test_an_exponent_that_cannot_be_fitted_is_an_error(sizes, seconds):
    with pytest.raises(ValueError, match="exponent"):
        fit_exponent(sizes, seconds)


# Clocks


def test_calls_take_turns_and_the_first_rounds_do_not_count():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    times = in_turn(calls, 2, CPU, in_a_row=2, warmups=1)
    assert "".join(made) == "aabb" * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert all(isinstance(one, Seconds) for one in times["a"])


def test_time_belongs_to_the_innermost_part():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    parts = Parts(CPU, lambda: next(now))
    operator = parts.wrap("operator", lambda: None)
    data = parts.wrap("data", operator)
    with parts("rest"):  # 0
        data()  # 1, of which the operator has 3 to 6; to 10
        operator()  # 15 to 21
    assert parts.seconds == {"rest": 1 + 5 + 7, "data": 2 + 4, "operator": 3 + 6}
    assert parts.entries == {"rest": 1, "data": 1, "operator": 2}


def test_watching_changes_no_sample_and_leaves_nothing_behind():
    _, ready, prior = example()
    problem = Problem(ready.y, ready.operator, ready.noise_std)
    noise = KeyedNoise(0, "", [0], ready.operator.domain_shape, ready.y.dtype, CPU)
    solver, parts = DDS(nfe=3), Parts(CPU)
    before = KeyedNoise.__call__
    with torch.no_grad():
        expected = solver.sample(problem, prior, noise).samples
        with watched(parts, solver, prior, ready.operator):
            found = solver.sample(Problem(ready.y, ready.operator, ready.noise_std), prior, noise).samples
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert parts.entries[NETWORK] == parts.entries[DATA] == 3
    assert parts.entries[OPERATOR] > 3
    assert parts.entries[NOISE] >= 3
    assert KeyedNoise.__call__ is before
    for thing, name in ((prior, "denoise"), (ready.operator, "normal"), (solver, "data_consistency")):
        assert name not in vars(thing)


# What is measured on


def test_scan_is_the_truth_seen_through_coils_of_unit_sum(tmp_path):
    truth = phantom((48, 40))
    assert truth.max() == 1
    one = scan(truth, 5, CPU)
    away = ~one.mask.mask.expand(48, 40)
    assert (one.kspace[:, away] == 0).all()
    assert (one.kspace[:, ~away] != 0).all()
    # Cells that are sampled fully hold the root sum of squares, up to noise.
    full = replace(one.mask, mask=torch.ones(1, 40, dtype=torch.bool))
    path = write_volume(tmp_path / "volume.h5", 2, 5, (48, 40))
    with FastMRIFile(path) as file:
        assert (file.num_slices, file.num_coils, file.shape) == (2, 5, (48, 40))
        first, second = (file.read_slice(index).kspace for index in range(2))
    assert full.mask.all()
    assert 0 < float((first - second).abs().max()) < 0.1 * float(first.abs().max())
    image = ifftc(first).abs().square().sum(0).sqrt()
    outside = truth == 0
    assert image[~outside].mean() > 20 * image[outside].mean()


def test_nifti_slices_are_cut_or_filled_around_their_centre(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    values = np.zeros((40, 32, 2), dtype=np.float32)
    values[8:32, 8:24, :] = np.random.default_rng(0).uniform(0.5, 1, (24, 16, 2))
    path = tmp_path / "volume.nii"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    small, same, large = (nifti_image((path, 1, None), (side, side)) for side in (24, 40, 56))
    assert large.shape == (56, 56)
    assert float(large.max()) == 1
    torch.testing.assert_close(large[8:48, 8:48], same)
    torch.testing.assert_close(small * same[8:32, 8:32].max(), same[8:32, 8:32])


@pytest.mark.parametrize(("name", "millions"), [("ncsnpp", 61.433473), ("adm", 361.428228)])
def test_published_networks_have_the_published_size(name, millions):
    prior = random_network(name, device="meta")
    assert parameter_count(prior) == round(millions * 1e6)
    assert PUBLISHED[name].source


def test_a_network_is_described_by_name_hash_size_and_precision():
    network = load_network("brain", "bf16", "cpu")
    assert network.prior.precision == "bf16"
    parts = network.description.split(", ")
    assert parts[0] == network.prior.contract.name
    assert parts[1].startswith("SHA-256 ")
    assert parts[-1] == "bf16"


# Throughput


def trial(batch):
    return Trial(batch, Spread.of([1.0]), None)


def test_the_search_for_the_largest_batch_ends_where_memory_does():
    def attempt(batch):
        if batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return trial(batch)

    assert [one.batch for one in doublings(attempt, 64)] == [1, 2, 4]
    assert [one.batch for one in doublings(trial, 6)] == [1, 2, 4]


def test_what_else_goes_wrong_in_the_search_is_not_hidden():
    def attempt(batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(doublings(attempt, 4))


def test_a_device_without_room_for_one_is_an_error():
    def attempt(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(ReconError, match="not even a batch of one"):
        list(doublings(attempt, 4))


def test_the_allocator_of_the_cpu_says_so_in_its_own_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert out_of_memory(caught.value)
    assert not out_of_memory(ValueError("out of memory"))


def test_the_fastest_way_to_a_quality():
    runs = [
        Run("slow", 30, Spread.of([9.0]), 36.0),
        Run("fast", 5, Spread.of([1.0]), 33.0),
        Run("fair", 10, Spread.of([2.0]), 35.0),
    ]
    found = [fastest(runs, level) for level in (30, 34, 35.5, 37)]
    assert [one and one.label for one in found] == ["fast", "fair", "slow", None]


def test_psnr_of_a_known_error():
    truth = torch.full((4, 4), 2.0)
    assert psnr(truth[None] + torch.tensor([0.2, -0.2])[:, None, None], truth) == pytest.approx(20.0)


def test_sigpys_operator_is_the_same_as_ours():
    for ours, theirs in make_calls((24, 20), 3, 4, 0).values():
        np.testing.assert_allclose(ours().numpy(), theirs(), rtol=1e-4, atol=1e-4)


# Counts


def test_fft_work_is_counted_by_its_length():
    x = torch.zeros(3, 8, 4, dtype=torch.complex64)
    with OperationCounter() as counter:
        torch.fft.fftn(x, dim=(-2, -1))
        torch.fft.ifft(x, dim=-2, out=torch.empty_like(x))
        x.transpose(1, 2)  # a view costs nothing
        bool(x.abs().sum() > 0)
    assert counter.fft_work == 96 * 5 + 96 * 3
    assert counter.waits == 1
    # Both FFTs, the empty tensor, magnitude, sum, comparison.
    assert counter.operations == 6


def test_the_normal_operator_of_columns_needs_transforms_along_one_axis_only():
    _, columns, _ = example()
    _, points, _ = example(points=True)
    assert transform_pair(4, 64, 64) == 2 * 4 * 64 * 64 * 12
    assert count_normal(columns) == 0.5
    assert count_normal(points) == 1


@dataclass(frozen=True)
class Wasteful(DDS):
    """Solves every system twice."""

    def data_consistency(self, problem, prior):
        once = super().data_consistency(problem, prior)

        def twice(denoised, sigma):
            once(denoised, sigma)
            return once(denoised, sigma)

        return twice


def test_wasted_work_shows_in_the_counts():
    _, ready, prior = example()
    plain, wasteful = (count_sampler(kind(nfe=10), ready, prior, 10) for kind in (DDS, Wasteful))
    assert plain.evaluations == wasteful.evaluations == 10
    assert wasteful.fft > 1.7 * plain.fft
    assert wasteful.operations > 1.7 * plain.operations


def test_steps_of_conjugate_gradients_are_counted_one_by_one():
    _, ready, _ = example()
    right = ready.operator.adjoint(ready.y)
    work = {}
    for steps in (3, 7):
        with OperationCounter() as counter:
            cg(ready.operator.normal, right, max_iter=steps)
        work[steps] = counter.fft_work / transform_pair(*ready.operator.range_shape)
    assert work == {3: 1.5, 7: 3.5}


def test_memory_that_grows_with_the_samples_is_seen():
    _, ready, prior = example()
    assert memory_growth(ready, prior, DDS(nfe=2)) == 0
    # Each of them is kept, and all are stacked at the end.
    assert 6 <= memory_growth(ready, prior, DDS(nfe=2), keep_samples=True) <= 13


def test_shared_storage_is_counted_once_and_what_is_gone_not_at_all():
    with TensorKeeper() as keeper:
        x = torch.zeros(1000)
        views = [x[:10], x[10:]]
        assert keeper.held() == 4000
        gone = torch.ones(50)
        assert keeper.held() == 4200
        del gone, x
        assert keeper.held() == 4000
    assert len(views) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_kept_samples_would_break_the_bar_of_memory():
    settings = Settings(coils=2, size=96)
    two = memory.peak(settings, 2)
    bars = [
        memory.growth({2: two, 32: memory.peak(settings, 32, keep_samples=kept)}) for kept in (False, True)
    ]
    assert [bar.name for bar in bars] == ["memory, 32 samples over 2"] * 2
    assert [bar.met for bar in bars] == [True, False]


# Imports


def test_an_import_that_loads_another_package_is_seen():
    modules = imports.imported("import recon, yaml")
    assert "recon" in imports.ours_of(modules)
    assert "yaml" in imports.others_of(modules)
    assert not imports.imported("import recon", given="import recon")


def test_slow_modules_are_named():
    assert any("json" in name for name, _ in imports.slowest("import json", count=1000))


# Regression


def test_counts_keep_their_bounds():
    """The regression check of speed in continuous integration: counts, which are the same everywhere."""
    bars = regression.held(measure_counts(), regression.read_bounds()["counts"], "counts")
    assert [str(bar) for bar in bars if not bar.met] == []


GROSS = {
    "DDS sample over its network": 5.5,
    "reconstruct over DDS sample": 3.2,
    "maps and noise over DDS sample": 0.3,
    "DPS step over DDS step": 4.0,
    "normal, columns, over two FFTs": 5.0,
}
"""Three or more times what is usual (1.8, 1.04, 0.08, 1.3, 1.6): no other work on a machine reaches them."""


def test_ratios_of_times_show_no_gross_regression():
    """The ratios that hold on a quiet machine are in `bounds.yaml`; these hold on any, by processor time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = Settings(coils=6, size=96, repetitions=3)
        found = regression.solver_ratios(settings, load_network("brain", "fp32", "cpu"), cpu)
    finally:
        torch.set_num_threads(before)
    assert [str(bar) for bar in regression.held(found, GROSS, "ratios") if not bar.met] == []


def test_a_count_above_its_bound_is_missed(monkeypatch):
    assert not Bar("x", 2.0, 1.9).met
    assert not Bar("x", math.nan, 1.9).met
    bars = regression.held({"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 2.5}, "counts")
    assert [bar.met for bar in bars] == [True, False]


@pytest.mark.parametrize(
    ("measured", "bounds", "match"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "'b' has no bound"),
        ({"a": 1.0}, {"a": 1.0, "c": 1.0}, "'c' has a bound and was not measured"),
    ],
)
def test_every_count_has_a_bound_and_every_bound_a_count(measured, bounds, match):
    with pytest.raises(ReconError, match=match):
        regression.held(measured, bounds, "counts")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("counts: {}", "two mappings"),
        ("counts: {a: many}\nratios: {}", "'a'"),
        ("counts: {a: .nan}\nratios: {}", "'a'"),
        ("counts: []\nratios: {}", "mapping of names"),
        ("counts: {", "not YAML"),
    ],
)
def test_bounds_that_cannot_be_read_are_an_error(tmp_path, text, match):
    path = tmp_path / "bounds.yaml"
    path.write_text(text)
    with pytest.raises(ReconError, match=match):
        regression.read_bounds(path)


# The command


def fake_section(name, bars=()):
    return Section(
        name, f"Title of {name}", ["what", "time"], [["x", Spread.of([1.0, 2.0, 4.0])]], ["note"], bars
    )


@pytest.fixture
def sections(monkeypatch):
    asked = {}

    def measure(name):
        def run(settings):
            asked[name] = settings
            return [fake_section(name, [Bar("ratio", 2.0, 1.5)])]

        return run

    monkeypatch.setattr(command, "SECTIONS", {name: measure(name) for name in ("overhead", "imports")})
    return asked


def test_sections_are_chosen_printed_and_written(sections, tmp_path, capsys):
    words = ["imports", "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.md")]
    command.main([*words, "--coils", "3", "--threads", "1", "2", "--volume", "2x3x40x30"])
    assert list(sections) == ["imports"]
    assert (sections["imports"].coils, sections["imports"].threads) == (3, (1, 2))
    assert sections["imports"].volume == (2, 3, 40, 30)
    printed = capsys.readouterr().out
    assert "| x | 2.00 (1.00–4.00) |" in printed
    assert "ratio: 2.00, at most 1.5 wanted: missed" in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["sections"]["imports"]["rows"] == [
        {"what": "x", "time": {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}}
    ]
    assert content["sections"]["imports"]["bars"][0]["met"] is False
    page = (tmp_path / "a.md").read_text()
    assert "## Title of imports" in page
    assert str(tmp_path) not in page  # the command is shown without the folders of this machine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]


def test_overhead_goes_through_all_precisions(monkeypatch):
    options = command.parser().parse_args(["overhead", "--precision", "fp32", "bf16", "--threads", "1"])
    settings = replace(command.settings_of(options), coils=2, size=32, repetitions=1)
    assert settings.precision == "fp32"  # of the other sections
    assert command.settings_of(command.parser().parse_args([])).precisions == ("fp32",)
    monkeypatch.setattr(overhead, "quality", lambda *arguments: 30.0)
    monkeypatch.setattr(overhead, "NORMALS", 1)
    found = overhead.measure(settings)
    assert [section.name for section in found] == ["overhead, fp32", "overhead, bf16"]
    for section, precision in zip(found, settings.precisions, strict=True):
        assert section.title.endswith(f", {precision})")
        assert precision in section.bars[0].name


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["speeed"], "no section speeed"),
        (["--regression", "imports"], "sections of its own"),
        (["--device", "toaster"], "no device"),
        (["--device", "meta"], "only cpu and cuda"),
        (["--volume", "3x4"], "SLICESxCOILSxHEIGHTxWIDTH"),
        (["--threads", "0"], "above zero"),
        (["--faster"], "unrecognized"),
    ],
)
def test_what_the_command_does_not_know_is_refused(sections, capsys, words, match):
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    assert match in capsys.readouterr().err
    assert not sections


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(sections, capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_broken_bound_fails_the_command(monkeypatch, capsys, tmp_path):
    path = tmp_path / "bounds.yaml"
    path.write_text("counts: {a: 2.0}\nratios: {b: 3.0}")
    monkeypatch.setattr(regression, "measure_counts", lambda: {"a": 1.0})
    seen = []

    def ratios(settings):
        seen.append(settings)
        return {"b": 2.0}

    monkeypatch.setattr(regression, "ratios", ratios)
    command.main(["--regression", "--bounds", str(path)])
    assert seen[0].size == command.REGRESSION["size"]
    assert "missed" not in capsys.readouterr().out
    monkeypatch.setattr(regression, "ratios", lambda settings: {"b": 4.0})
    with pytest.raises(SystemExit) as caught:
        command.main(["--regression", "--bounds", str(path)])
    assert caught.value.code == "slower than its bound: b"


def test_errors_end_the_command_in_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as caught:
        command.main(["--regression", "--bounds", str(tmp_path / "none.yaml")])
    assert "none.yaml cannot be read" in str(caught.value.code)
