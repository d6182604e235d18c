"""Uncertainty metrics against closed forms, and calibrations on made-up posteriors whose truth is known."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from operators import MulticoilMRI, birdcage_maps, ifftc, make_mask, simulate_kspace
from priors import GaussianPrior
from recon import DDS, reconstruct
from recon.calibration import (
    Calibration,
    Evidence,
    calibration_path,
    coverage,
    crps,
    error_auroc,
    error_correlation,
    expected_spread,
    flatness,
    fully_sampled_image,
    gather,
    gaussian_interval,
    interval_factor,
    learn,
    object_region,
    pooled_quantile,
    rank_histogram,
    sample_interval,
)
from recon.errors import ReconError
from recon.mri import slice_problem
from recon.nullspace import smoothed

SHAPE = (200, 150)
PIXELS = SHAPE[0] * SHAPE[1]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def cumulative(z):
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


# Metrics


@pytest.mark.parametrize("nominal", [0.5, 0.9])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_coverage_of_gaussian_intervals(nominal, spread):
    scale = np.linspace(1, 3, SHAPE[1])
    truth = 7 + scale * normal(*SHAPE)
    bounds = gaussian_interval(np.full(SHAPE, 7.0), spread * np.broadcast_to(scale, SHAPE), nominal)
    expected = 2 * cumulative(spread * interval_factor(nominal)) - 1
    error = math.sqrt(expected * (1 - expected) / PIXELS)
    assert coverage(truth, *bounds) == pytest.approx(float(expected), abs=4 * error)


def test_interval_factor():
    assert interval_factor(0.9) == pytest.approx(1.6448536, abs=1e-6)
    assert float(2 * cumulative(np.array(interval_factor(0.37))) - 1) == pytest.approx(0.37)


@pytest.mark.parametrize(("count", "nominal"), [(19, 0.9), (39, 0.9), (7, 0.5)])
def test_coverage_of_sample_intervals(count, nominal):
    # Of any distribution: here a lopsided one.
    samples, truth = np.exp(normal(count, *SHAPE)), np.exp(normal(*SHAPE, seed=1))
    error = math.sqrt(nominal * (1 - nominal) / PIXELS)
    assert coverage(truth, *sample_interval(samples, nominal)) == pytest.approx(nominal, abs=4 * error)


def test_sample_intervals_need_samples():
    with pytest.raises(ReconError, match=r"coverage 0.9 need 19 samples or more, got 18"):
        sample_interval(np.zeros((18, 2)), 0.9)
    sample_interval(np.zeros((19, 2)), 0.9)


def test_coverage_within_a_region():
    truth, region = np.zeros((2, 2)), np.array([[True, False], [True, True]])
    lower = np.array([[-1.0, 1.0], [0.5, 0.0]])
    assert coverage(truth, lower, lower + 1, region) == pytest.approx(2 / 3)
    assert coverage(truth, lower, lower + 1) == pytest.approx(2 / 4)


def test_ranks_are_uniform_for_a_right_posterior():
    counts = rank_histogram(normal(*SHAPE), normal(9, *SHAPE, seed=1))
    assert counts.sum() == PIXELS
    assert len(counts) == 10
    statistic, p = flatness(counts)
    assert 0.001 < p < 0.999
    assert statistic < 30


@pytest.mark.parametrize(("spread", "shift"), [(0.6, 0.0), (1.6, 0.0), (1.0, 0.5)])
def test_ranks_follow_the_closed_form_of_a_wrong_posterior(spread, shift):
    # The rank of a truth t is binomial with the probability of a sample below it, averaged over t.
    count = 5
    truth = normal(*SHAPE)
    counts = rank_histogram(truth, shift + spread * normal(count, *SHAPE, seed=1))
    t = np.linspace(-8, 8, 4001)
    density = np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    below = cumulative((t - shift) / spread)
    expected = [
        float((density * math.comb(count, k) * below**k * (1 - below) ** (count - k)).sum())
        for k in range(count + 1)
    ]
    np.testing.assert_allclose(counts / PIXELS, expected, atol=4 * 0.5 / math.sqrt(PIXELS))
    assert flatness(counts)[1] < 1e-6


def test_ties_are_broken_at_random():
    truth, samples = np.zeros(30000), np.zeros((4, 30000))
    counts = rank_histogram(truth, samples)
    assert flatness(counts)[1] > 0.001
    np.testing.assert_array_equal(counts, rank_histogram(truth, samples))
    assert not np.array_equal(counts, rank_histogram(truth, samples, seed=1))


def test_chi_square_in_closed_form():
    # With two degrees of freedom the upper tail is exp(-x / 2).
    statistic, p = flatness(np.array([10, 20, 30]))
    assert statistic == pytest.approx((100 + 0 + 100) / 20)
    assert p == pytest.approx(math.exp(-statistic / 2))
    with pytest.raises(ReconError, match="at least two bins"):
        flatness(np.zeros(4))


@pytest.mark.parametrize("count", [2, 8])
def test_crps_of_a_gaussian_ensemble(count):
    """Gneiting & Raftery 2007, Eq. 5, whose expectation the fair score has whatever the number of samples."""
    truth, spread = normal(*SHAPE), 1.5
    z = (truth - 0.3) / spread
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    expected = spread * (z * (2 * cumulative(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    found = crps(truth, 0.3 + spread * normal(count, *SHAPE, seed=1))
    assert found == pytest.approx(float(expected.mean()), abs=4 * 1.5 / math.sqrt(PIXELS))


def test_crps_against_the_sum_over_pairs():
    truth, samples = normal(30, seed=2), normal(6, 30, seed=3)
    region = np.arange(30) < 20
    pairs = np.abs(samples[:, None] - samples[None]).sum((0, 1)) / (6 * 5)
    expected = (np.abs(samples - truth).mean(0) - pairs / 2)[region].mean()
    assert crps(truth, samples, region) == pytest.approx(float(expected))
    with pytest.raises(ReconError, match="at least 2 samples, got 1"):
        crps(truth, samples[:1])


def test_correlation_of_gaussian_errors():
    std = np.exp(0.5 * normal(*SHAPE, seed=1))
    truth = std * normal(*SHAPE)
    pearson, spearman = error_correlation(truth, np.zeros(SHAPE), std)
    c2 = math.exp(0.25) - 1
    expected = math.sqrt(c2 / (c2 + (math.pi / 2 - 1) * (1 + c2)))
    assert pearson == pytest.approx(expected, abs=0.03)
    # Ranks know nothing of a monotonic change of the std.
    assert error_correlation(truth, np.zeros(SHAPE), std**3)[1] == pytest.approx(spearman)
    assert error_correlation(np.arange(5.0), np.zeros(5), np.arange(5.0) ** 2)[1] == pytest.approx(1)
    assert math.isnan(error_correlation(truth, np.zeros(SHAPE), np.ones(SHAPE))[0])


def test_auroc_by_brute_force():
    rng = np.random.default_rng(0)
    truth, std = rng.standard_normal(200), rng.integers(0, 12, 200).astype(float)  # with ties
    truth *= 1 + std
    error = np.abs(truth)
    large = error > np.quantile(error, 0.8)
    pairs = std[large][:, None] - std[~large]
    expected = float(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert error_auroc(truth, np.zeros(200), std, top=0.2) == pytest.approx(expected)
    assert expected > 0.6
    assert error_auroc(truth, np.zeros(200), error) == 1
    assert error_auroc(truth, np.zeros(200), -error) == 0
    assert error_auroc(truth, np.zeros(200), np.ones(200)) == 0.5
    with pytest.raises(ReconError, match="errors are all alike"):
        error_auroc(np.ones(9), np.zeros(9), np.ones(9))


def test_bad_arrays_are_named():
    good = np.ones((4, 5))
    with pytest.raises(ReconError, match=r"'std' must be real of shape \(4, 5\), got float64 \(4, 4\)"):
        error_correlation(good, good, good[:, :4])
    with pytest.raises(ReconError, match="'mean' must be real"):
        error_correlation(good, 1j * good, good)
    with pytest.raises(ReconError, match="'sample 1' holds NaN"):
        crps(good, np.stack([good, good * np.nan]))
    with pytest.raises(ReconError, match=r"region must be bool of shape \(4, 5\)"):
        coverage(good, good, good, np.ones((4, 5)))
    with pytest.raises(ReconError, match="region is empty"):
        coverage(good, good, good, np.zeros((4, 5), dtype=bool))
    with pytest.raises(ReconError, match="a coverage lies between 0 and 1, got 1"):
        interval_factor(1.0)
    with pytest.raises(ReconError, match="share of large errors lies between 0 and 1, got 0"):
        error_auroc(good, good, good, top=0)


def test_object_region():
    y, x = np.mgrid[:80, :60]
    head = (y - 40) ** 2 / 30**2 + (x - 30) ** 2 / 22**2 < 1
    ventricle = (y - 40) ** 2 + (x - 30) ** 2 < 36
    image = 3e-4 * (head & ~ventricle) + 1e-5 * np.abs(normal(80, 60))
    image[2:5, 2:5] = 3e-4  # a speck outside
    found = object_region(image)
    assert found[ventricle].all()
    assert not found[:7].any()
    assert (found != head).mean() < 0.02
    np.testing.assert_array_equal(object_region(1e6 * image), found)
    with pytest.raises(ReconError, match="image of zeros"):
        object_region(np.zeros((8, 8)))
    with pytest.raises(ReconError, match="magnitude image"):
        object_region(image[0])


# The spread of real samples


@pytest.mark.parametrize("kind", ["equispaced", "random", "poisson"])
def test_std_grows_with_acceleration(kind):
    shape = (24, 96)
    frequency = torch.fft.fftfreq(shape[0])[:, None] ** 2 + torch.fft.fftfreq(shape[1]) ** 2
    # Far from zero, where the magnitude of a wide spread would be cut off.
    mean = torch.full(shape, 5.0, dtype=torch.complex64)
    prior = GaussianPrior(mean, spectrum=1 / (1 + 20 * frequency))
    image = prior.sample(1, torch.Generator().manual_seed(1))[0]
    maps = birdcage_maps(8, shape)
    y = simulate_kspace(image, maps, 0.02, seed=2)
    spreads = []
    for acceleration in (2, 4, 6, 8):
        mask = make_mask(kind, shape, acceleration, center_fraction=0.05, seed=3).mask
        A = MulticoilMRI(maps, mask)
        posterior = reconstruct(y * mask, A, prior, DDS(nfe=6), num_samples=6, noise_std=0.02)
        spreads.append(float(posterior.std.mean()))
    assert all(later > 1.05 * earlier for earlier, later in pairwise(spreads)), spreads


# Learning


SOLVER = DDS(nfe=7)
PRIOR = ("brain", "ab" * 32)


def case(patient="a", index=0, mask="random", asked=4.0, acceleration=None, inflation=1.0, side=60):
    """A slice whose errors are Gaussian with `inflation` times the standard deviation that is claimed."""
    rng = np.random.default_rng([ord(c) for c in patient + mask] + [index, int(asked)])
    std = np.ones((side, side)) * (0.5 + rng.random())
    mean = 10 + rng.random((side, side))
    truth = mean + inflation * std * rng.standard_normal((side, side))
    region = np.zeros((side, side), dtype=bool)
    region[5:-5, 5:-5] = True
    truth[~region] += 1e3  # what is outside does not count
    return Evidence(
        patient=patient,
        volume=f"{patient}.h5",
        index=index,
        mask=mask,
        acceleration=asked if acceleration is None else acceleration,
        asked=asked,
        noise_std=1e-6,
        truth=truth,
        mean=mean,
        std=std,
        region=region,
    )


def learned(evidence, **changes):
    options = {"name": "test", "solver": SOLVER, "num_samples": 8, "prior": PRIOR, **changes}
    return learn(evidence, **options)


@pytest.mark.parametrize("nominal", [0.5, 0.9])
@pytest.mark.parametrize("inflation", [0.3, 1.0, 2.5])
def test_learned_intervals_cover_what_they_claim(nominal, inflation):
    calibration = learned([case(index=i, inflation=inflation) for i in range(20)], nominal=nominal)
    expected = inflation * interval_factor(nominal)
    (cell,) = calibration.cells
    assert cell.factor == pytest.approx(expected, rel=0.02)
    fresh = case("b", inflation=inflation, side=300)
    half = calibration.half_width(torch.from_numpy(fresh.std), 1e-6, mask="random", acceleration=4.0).numpy()
    covered = coverage(fresh.truth, fresh.mean - half, fresh.mean + half, fresh.region)
    assert covered == pytest.approx(nominal, abs=0.01)
    std = calibration.apply(torch.from_numpy(fresh.std), 1e-6, mask="random", acceleration=4.0)
    assert float(std.mean()) == pytest.approx(inflation * fresh.std.mean(), rel=0.02)


def test_coverage_over_exchangeable_patients_is_at_least_the_guaranteed_one():
    # Patients differ in how far their spread is wrong: a few of them say little of the next.
    rng = np.random.default_rng(0)
    for count in (2, 5):
        covered = []
        for trial in range(60):
            inflations = np.exp(0.5 * rng.standard_normal(count + 1))
            cases = [case(f"{trial}-{i}", inflation=x, side=30) for i, x in enumerate(inflations)]
            calibration = learned(cases[:-1])
            scores = cases[-1].scores(calibration.smoothing, calibration.floor)
            covered.append((scores <= calibration.cells[0].factor).mean())
        assert calibration.guaranteed == pytest.approx(0.9 * count / (count + 1))
        assert calibration.guaranteed < np.mean(covered) < 0.9


def test_patients_count_alike():
    # One patient with 9 slices, one with a single one whose spread is 3 times too small.
    cases = [case("a", index=i, side=110) for i in range(9)] + [case("b", inflation=3.0, side=110)]
    factor = learned(cases).cells[0].factor
    mixture = float(np.mean([2 * cumulative(factor / inflation) - 1 for inflation in (1.0, 3.0)]))
    assert mixture == pytest.approx(0.9, abs=0.01)
    left_out = learned(cases).cells[0].left_out
    assert left_out is not None
    low, high = left_out
    assert low == pytest.approx(float(2 * cumulative(1.645 / 3) - 1), abs=0.01)
    assert high == pytest.approx(float(2 * cumulative(1.645 * 3) - 1), abs=0.01)
    assert learned(cases[:9]).cells[0].left_out is None


def test_pooled_quantile():
    scores = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0])]
    assert pooled_quantile(scores, [1, 1], 0.5) == 4
    assert pooled_quantile(scores, [1, 1], 0.51) == 10
    assert pooled_quantile(scores, [4, 1], 0.8) == 4
    assert pooled_quantile(scores, [1, 0.0], 1.0) == 4
    values = normal(1000)
    assert pooled_quantile([values], [7], 0.9) == np.quantile(values, 0.9, method="inverted_cdf")


def test_every_mask_and_acceleration_has_its_factor():
    truth = {("random", 2.0): 0.8, ("random", 8.0): 2.0, ("poisson", 2.0): 1.0, ("poisson", 4.0): 1.5}
    calibration = learned(
        [
            case(patient, mask=mask, asked=asked, acceleration=asked * part, inflation=inflation, side=110)
            for (mask, asked), inflation in truth.items()
            for patient, part in (("a", 0.9), ("b", 1 / 0.9))
        ]
    )
    z = interval_factor(0.9)
    for (mask, asked), inflation in truth.items():
        assert calibration.factor(mask, asked) == pytest.approx(z * inflation, rel=0.02)
    # Half-way between ×2 and ×8 on a logarithmic scale.
    halfway = calibration.factor("random", 4.0)
    assert halfway == pytest.approx(z * math.sqrt(0.8 * 2.0), rel=0.02)
    # A kind that was not learned: the largest factor, so as not to promise too much.
    assert calibration.factor("acquired", 2.0) == calibration.factor("poisson", 2.0)
    assert calibration.factor("acquired", 4.0) == max(halfway, calibration.factor("poisson", 4.0))
    assert calibration.factor("acquired", 8.0) == calibration.factor("random", 8.0)
    assert calibration.factor("random", 12.5) == calibration.factor("random", 8.0)
    with pytest.raises(
        ReconError, match=r"learned for accelerations from 2\.00 to 8\.00, .* random .* 14\.00"
    ):
        calibration.factor("random", 14.0)
    with pytest.raises(ReconError, match=r"this poisson mask has 7\.00"):
        calibration.factor("poisson", 7.0)


def test_the_spread_is_smoothed_and_has_a_floor():
    std = torch.from_numpy(np.abs(normal(40, 30)))
    spread = expected_spread(std, 0.3, 2.0, 1.5)
    torch.testing.assert_close(spread, (smoothed(std**2, 2.0) + 0.45**2).sqrt())
    torch.testing.assert_close(expected_spread(std, 0.3, 0.0, 0.0), std)
    assert float(expected_spread(0 * std, 0.3, 2.0, 1.5).min()) == pytest.approx(0.45)
    assert expected_spread(std.float(), 0.3, 2.0, 1.5).dtype == torch.float32


def test_gather_holds_a_reconstruction_against_the_fully_sampled_image(tmp_path):
    shape = (40, 36)
    y, x = (torch.arange(n) - n // 2 for n in shape)
    image = (1.0 + 0.2 * torch.sin(x / 2.0)) * ((y[:, None] / 15.0) ** 2 + (x / 13.0) ** 2 < 1)
    kspace = simulate_kspace(image, birdcage_maps(6, shape), 0.01, seed=1)
    mask = make_mask("equispaced", shape, 2, center_fraction=0.45, seed=0)
    truth = fully_sampled_image(kspace)
    rss = ifftc(kspace).abs().square().sum(0).sqrt()
    object_ = image > 0
    assert float((truth - rss)[object_].abs().max()) < 0.05
    assert float(truth[~object_].mean()) < 0.6 * float(rss[~object_].mean())  # no floor of noise

    prior = GaussianPrior(torch.zeros(shape, dtype=torch.complex64), variance=1.0)
    problem = slice_problem(kspace, mask, noise_std=0.01)
    options: dict[str, Any] = {"patient": "p", "volume": "v", "index": 3, "asked": 2, "num_samples": 4}
    found = gather(problem, mask, truth, prior, DDS(nfe=4), **options)
    posterior = reconstruct(problem.y, problem.operator, prior, DDS(nfe=4), 4, noise_std=0.01, key="v/3")
    np.testing.assert_array_equal(found.mean, posterior.mean.abs().numpy())
    np.testing.assert_array_equal(found.std, posterior.std.numpy())
    np.testing.assert_array_equal(found.truth, truth.numpy())
    np.testing.assert_array_equal(found.region, object_region(truth.numpy()))
    assert (found.mask, found.acceleration, found.noise_std) == ("equispaced", mask.acceleration, 0.01)

    found.save(tmp_path / "evidence.npz")
    again = Evidence.load(tmp_path / "evidence.npz")
    assert [item.name for item in tmp_path.iterdir()] == ["evidence.npz"]
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert type(again.index) is int
    content = (tmp_path / "evidence.npz").read_bytes()
    garbled = content[:1000] + bytes(200) + content[1200:]
    for damaged in (content[:300], b"", garbled):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(ReconError, match=r"damaged.npz: this is no stored evidence"):
            Evidence.load(tmp_path / "damaged.npz")
    with pytest.raises(ReconError, match="at least 2 samples, got 1"):
        gather(problem, mask, truth, prior, DDS(nfe=4), **{**options, "num_samples": 1})


def test_stored_and_read(tmp_path):
    calibration = learned([case("a"), case("b"), case("a", mask="poisson")])
    path = tmp_path / "new" / "brain.scanner.json"
    calibration.save(path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert Calibration.load(path) == calibration
    assert calibration.prior == {"name": "brain", "sha256": "ab" * 32}
    assert calibration.solver["name"] == "DDS"
    assert (calibration.patients, calibration.slices) == (2, 2)
    assert calibration.facts["guaranteed"] == pytest.approx(0.6)
    assert json.dumps(calibration.facts)
    # Files of earlier releases do not say with how many coils: that is not compared then.
    content = json.loads(path.read_text())
    assert content.pop("settings") == {}
    path.write_text(json.dumps(content))
    Calibration.load(path).check(PRIOR[1], SOLVER, 8, {"num_coils": 4, "coil_by_coil": False})


def test_found_by_name_beside_the_prior(tmp_path):
    prior, path = tmp_path / "brain.safetensors", tmp_path / "brain.scanner-a.json"
    learned([case()]).save(path)
    assert calibration_path("scanner-a", prior) == path
    assert calibration_path(str(path), None) == path
    with pytest.raises(ReconError, match=r"no calibration 'other' of prior 'brain': .* \(scanner-a\)"):
        calibration_path("other", prior)
    with pytest.raises(ReconError, match="without a prior, give the path"):
        calibration_path("scanner-a", None)
    with pytest.raises(ReconError, match=r"missing.json: there is no such calibration"):
        calibration_path(str(tmp_path / "missing.json"), prior)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(format="other"), "this is no calibration of this project"),
        (lambda c: c.update(version=2), "format version 2; this release reads 1"),
        (lambda c: c.pop("floor"), r"the calibration has missing fields \['floor'\]"),
        (lambda c: c.update(colour=1), r"the calibration has unknown fields \['colour'\]"),
        (lambda c: c.update(nominal=1.5), "nominal of a calibration must lie between 0 and 1, got 1.5"),
        (lambda c: c.update(patients=0), "patients of a calibration must be a number from 1, got 0"),
        (lambda c: c.update(floor=-1), "floor of a calibration must be a number from 0, got -1"),
        (lambda c: c.update(cells=[]), "a calibration needs at least one mask"),
        (lambda c: c.update(cells={}), "'cells' must be a list"),
        (lambda c: c["cells"][0].update(factor="x"), "factor of a calibration must be positive"),
        (lambda c: c["cells"][0].pop("mask"), r"the cell has missing fields \['mask'\]"),
        (lambda c: c.update(solver="DDS"), "'solver' must be an object"),
        (lambda c: c.update(settings=None), "'settings' must be an object"),
        (lambda c: c["cells"][0].update(left_out=0.8), "'float' object is not iterable"),
        (lambda c: c.update(prior={}), "'prior' must hold 'name' and 'sha256'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, change, sentence):
    path = tmp_path / "bad.json"
    learned([case()]).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ReconError, match=rf"bad\.json: {sentence}"):
        Calibration.load(path)


def test_no_file_or_no_json(tmp_path):
    path = tmp_path / "bad.json"
    with pytest.raises(ReconError, match="there is no such calibration"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(ReconError, match=r"bad.json: this is no JSON"):
        Calibration.load(path)


def test_what_it_was_not_learned_with_is_refused():
    calibration = learned([case()])
    calibration.check(PRIOR[1], DDS(nfe=7), 8)
    with pytest.raises(ReconError, match="another prior file: brain, SHA-256 abababababab and not cdcd"):
        calibration.check("cd" * 32, SOLVER, 8)
    with pytest.raises(ReconError, match=r"'test' was learned with nfe=7 and not 9$"):
        calibration.check(PRIOR[1], DDS(nfe=9), 8)
    with pytest.raises(ReconError, match="8 samples a slice, not 4"):
        calibration.check(PRIOR[1], SOLVER, 4)
    with pytest.raises(ReconError, match="learned with coil_by_coil=False and not True, prior_config=None"):
        calibration.check(PRIOR[1], SOLVER, 8, {"coil_by_coil": True, "prior_config": "ab", "num_coils": 4})
    whole = learned([case()], settings={"num_coils": None, "precision": "fp32"})
    whole.check(PRIOR[1], SOLVER, 8, {"num_coils": None, "precision": "fp32"})
    with pytest.raises(
        ReconError, match="learned with num_coils=None and not 4, precision=fp32 and not bf16"
    ):
        whole.check(PRIOR[1], SOLVER, 8, {"num_coils": 4, "precision": "bf16"})
    with pytest.raises(ReconError, match="noise_std must be positive"):
        calibration.apply(torch.ones(4, 4), 0.0, mask="random", acceleration=4.0)
    with pytest.raises(ReconError, match="cannot be learned from nothing"):
        learned([])
    with pytest.raises(ReconError, match="a coverage lies between 0 and 1, got 1"):
        learned([case()], nominal=1)
