"""Planted lesions, on images made up here and with reconstructions whose faults are known."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import nibabel
import numpy as np
import pytest
import torch

from benchmarks.cases import mask_argument
from benchmarks.pathology import __main__ as command
from benchmarks.pathology import lesions, page, planted
from benchmarks.pathology.lesions import ASPECT, Lesion
from recon.errors import ReconError

pytestmark = pytest.mark.filterwarnings("ignore::operators.espirit.CalibrationWarning")


def head(rows=96, columns=88):
    """A disc of grey 0.4 with a bright rim of 1, a little texture on it."""
    y, x = np.mgrid[:rows, :columns]
    radius = np.hypot((y - rows / 2) / (0.45 * rows), (x - columns / 2) / (0.45 * columns))
    texture = 0.01 * np.sin(x / 5) * np.cos(y / 7)
    image = np.where(radius < 0.9, 0.4 + texture, np.where(radius < 1, 0.999, 0))
    image[rows // 2, int(columns / 2 + 0.43 * columns)] = 1
    return image.astype(np.float32)


def test_coverage_has_the_area_and_the_place_of_an_ellipse():
    lesion = Lesion(20.3, 31.6, 7.0, 0.5, 0.1)
    whole = lesion.coverage((48, 60))
    assert whole.sum() == pytest.approx(math.pi * 7 * 7 * ASPECT, rel=0.01)
    rows, columns = np.indices(whole.shape)
    assert (whole * rows).sum() / whole.sum() == pytest.approx(20.3, abs=0.02)
    assert (whole * columns).sum() / whole.sum() == pytest.approx(31.6, abs=0.02)
    # The long axis points along the angle: second moments of an ellipse are a² / 4 and b² / 4.
    down, right = rows - 20.3, columns - 31.6
    along = math.cos(0.5) * right + math.sin(0.5) * down
    assert (whole * along**2).sum() / whole.sum() == pytest.approx(49 / 4, rel=0.03)
    assert lesion.coverage((48, 60), 2).sum() == pytest.approx(math.pi * 9 * (7 * ASPECT + 2), rel=0.01)


def test_contrast_is_inside_less_ring():
    lesion = Lesion(24, 24, 4.0, 0.0, 0.1)
    site = lesion.site((48, 48))
    assert not set(site.inside) & set(site.ring)
    image = np.full((48, 48), 3.0)
    image.ravel()[site.inside] += 0.5
    image.ravel()[site.ring] -= 0.25
    assert site.contrast(image) == pytest.approx(0.75)
    assert site.contrast(np.fromfunction(lambda y, x: y + 2 * x, (48, 48))) == pytest.approx(0, abs=1e-9)
    touched = np.flatnonzero(lesion.coverage((48, 48)))
    assert not set(site.ring) & set(touched)  # the ring is free of what the edge covers in part


def test_lesions_are_apart_and_keep_the_scale():
    image = head()
    sizes, contrasts = (1.5, 4.0), (0.05, 0.2, -0.1)
    found = lesions.choose_lesions(image, sizes, contrasts, seed=3)
    assert sorted((each.size, each.contrast) for each in found) == sorted(
        (s, c) for s in sizes for c in contrasts
    )
    for a in found:
        for b in found:
            if a is not b:
                distance = math.hypot(a.row - b.row, a.column - b.column)
                assert distance > lesions.footprint(a.size) + lesions.footprint(b.size)
    with_lesions = lesions.plant(image, found)
    assert with_lesions.dtype == image.dtype
    assert with_lesions.max() == image.max()
    for each in found:
        site = each.site(image.shape)
        made = site.contrast(with_lesions) - site.contrast(image)
        assert 0.75 * abs(each.contrast) < math.copysign(made, made * each.contrast) <= abs(each.contrast)
    assert lesions.choose_lesions(image, sizes, contrasts, seed=3) == found
    assert lesions.choose_lesions(image, sizes, contrasts, seed=4) != found


def test_empty_places_touch_no_lesion():
    image = head()
    found = lesions.choose_lesions(image, (4.0,), (0.1,), seed=0)
    changed = lesions.plant(image, found) != image
    sites = lesions.empty_sites(image, found, 4.0, 50, seed=0)
    assert len(sites) == 50
    for site in sites:
        assert not changed.ravel()[site.inside].any()
        assert not changed.ravel()[site.ring].any()
        assert (image.ravel()[site.ring] > 0).all()


@pytest.mark.parametrize(
    ("sizes", "contrasts", "message"),
    [
        ((0.5,), (0.1,), "sizes of lesions are numbers of pixels from 1"),
        ((2.0,), (0.0,), "contrasts of lesions lie between"),
        ((2.0,), (1.5,), "contrasts of lesions lie between"),
        ((2.0,), (0.9,), "there is no room for a lesion of 2 pixels and contrast 0.9"),
        ((40.0,), (0.1,), "there is no room for a lesion of 40 pixels"),
    ],
)
def test_lesions_that_cannot_be(sizes, contrasts, message):
    with pytest.raises(ReconError, match=message):
        lesions.choose_lesions(head(), sizes, contrasts, seed=0)


def test_a_lesion_may_not_change_the_scale():
    with pytest.raises(ReconError, match="outside of"):
        lesions.plant(head(), [Lesion(48, 44, 3.0, 0.0, 0.7)])


@pytest.fixture(autouse=True)
def few_coils(monkeypatch):
    monkeypatch.setattr("benchmarks.cases.NUM_COILS", 3)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "head.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.stack([head().T] * 2, axis=-1), np.eye(4)), path)
    return path


@pytest.fixture(scope="module")
def pair(volume):
    return planted.Pair.make(volume, 1, None, (2.0, 4.0), (0.1, -0.2), empty_places=40)


def images(array, samples=()):
    return planted.Images(array, np.array(samples) if len(samples) else np.empty((0, *array.shape)))


def truths(pair):
    return pair.image.astype(float), lesions.plant(pair.image, pair.lesions).astype(float)


def test_the_truth_is_judged_as_faithful(pair):
    clean, with_lesions = truths(pair)
    found, empty = planted.judge(pair, (clean, with_lesions), images(clean), images(with_lesions))
    assert all(each.recovered == pytest.approx(1) and each.kept and each.noise == 0 for each in found)
    assert all(math.isnan(each.spread) for each in found)
    assert all(each.false_share(0.01) == 0 for each in empty)


def test_a_method_that_keeps_a_third_has_lost_them(pair):
    clean, with_lesions = truths(pair)
    found, _ = planted.judge(
        pair, (clean, with_lesions), images(clean), images(clean + (with_lesions - clean) / 3)
    )
    assert all(each.recovered == pytest.approx(1 / 3) and not each.kept for each in found)


def test_a_method_that_draws_what_it_likes_is_found_out(pair):
    """The same picture whatever is measured, with lesions of its own: nothing is recovered, much is false."""
    clean, with_lesions = truths(pair)
    rng = np.random.default_rng(0)
    speckle = clean.copy()
    for row, column in rng.integers(10, 80, size=(60, 2)):
        speckle += Lesion(row, column, 3.0, 0.0, 0.3).coverage(clean.shape) * 0.3
    found, empty = planted.judge(pair, (clean, with_lesions), images(speckle), images(speckle))
    assert all(each.recovered == pytest.approx(0, abs=1e-6) and not each.kept for each in found)
    shares = [each.false_share(0.1) for each in empty]
    assert min(shares) > 0.2
    sites = pair.empty[2.0]
    errors = [site.contrast(speckle) - site.contrast(with_lesions) for site in sites]
    assert empty[0].errors == pytest.approx(errors)
    assert empty[0].false_share(0.1) == np.mean(np.abs(errors) >= 0.05)


def test_a_lesion_below_the_noise_is_not_kept(pair):
    clean, with_lesions = truths(pair)
    noise = 0.3 * np.random.default_rng(1).standard_normal(clean.shape)
    found, _ = planted.judge(pair, (clean, with_lesions), images(clean + noise), images(with_lesions + noise))
    small = [each for each in found if each.size == 2 and each.contrast == 0.1]
    assert small[0].recovered == pytest.approx(1)
    assert small[0].noise > 0.5
    assert not small[0].kept


def test_spread_over_samples_is_that_of_their_own_ratio(pair):
    clean, with_lesions = truths(pair)
    gains = np.array([0.6, 1.0, 1.1])
    made = [clean + gain * (with_lesions - clean) for gain in gains]
    found, _ = planted.judge(
        pair,
        (clean, with_lesions),
        images(clean, [clean] * 3),
        images(np.mean(made, axis=0), made),
    )
    for each in found:
        assert each.spread == pytest.approx(gains.std(ddof=1))
        assert each.recovered == pytest.approx(gains.mean())


def test_pair_of_scenarios_differs_by_the_lesions_alone(pair):
    clean, with_lesions = pair.scenarios("random", 2)
    assert torch.equal(clean.mask.mask, with_lesions.mask.mask)
    difference = with_lesions.case.targets["noise-free"] - clean.case.targets["noise-free"]
    added = lesions.plant(pair.image, pair.lesions) - pair.image
    assert (difference[torch.from_numpy(added == 0)] == 0).all()
    # Same noise, coils and phase: what was measured differs by the lesions' spectrum, which is small.
    measured = (with_lesions.case.kspace - clean.case.kspace).norm()
    assert 0 < float(measured) < 0.2 * float(clean.case.kspace.norm())


@dataclass(frozen=True)
class Counted:
    """Zero-filled, which counts how often it ran."""

    calls: list
    name: str = "counted"
    how: str = "counts"

    @property
    def facts(self):
        return {"name": self.name}

    def pair(self, clean, with_lesions):
        self.calls.append(clean.case.name)
        return planted.ZeroFilled().pair(clean, with_lesions)


def test_what_is_in_the_cache_is_not_made_again(pair, tmp_path):
    calls: list[str] = []
    first = planted.run([pair], [("random", 2.0)], [Counted(calls)], cache=tmp_path)
    second = planted.run([pair], [("random", 2.0)], [Counted(calls)], cache=tmp_path)
    assert calls == ["head, slice 1"]
    assert [o.lesions for o in first] == [o.lesions for o in second]
    planted.run([pair], [("random", 2.0)], [Counted(calls, name="other")], cache=tmp_path)
    planted.run([pair], [("random", 4.0)], [Counted(calls)], cache=tmp_path)
    assert len(calls) == 3
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ReconError, match="is damaged, remove it"):
        planted.run([pair], [("random", 2.0)], [Counted(calls)], cache=tmp_path)


@dataclass
class Network:
    """A method of the matrix, as a supervised network is one."""

    name: str = "network"
    settings: str = "none"
    needs_seed: bool = False
    by_target: bool = False

    def reconstruct(self, case, seed):
        from benchmarks.matrix.base import Reconstruction

        image = case.problem.operator.adjoint(case.problem.y)
        if self.by_target:
            return Reconstruction(torch.ones_like(image), per_target={planted.TARGET: image})
        return Reconstruction(image)


@pytest.mark.parametrize("by_target", [False, True])
def test_methods_of_the_matrix_take_part_with_their_image_for_the_target(pair, by_target):
    (found,) = planted.run([pair], [("random", 2.0)], [planted.Wrapped(Network(by_target=by_target))])
    (zero_filled,) = planted.run([pair], [("random", 2.0)], [planted.ZeroFilled()])
    assert found.method == "network"
    assert [f.recovered for f in found.lesions] == [f.recovered for f in zero_filled.lesions]
    assert found.empty == zero_filled.empty


def test_the_command_writes_page_and_picture(volume, tmp_path, capsys):
    from tests.recon.test_calibrate_cli import tiny_prior

    prior = tiny_prior(tmp_path / "tiny.safetensors")
    out = tmp_path / "results" / "pathology.md"
    words = ["lesions", "--nifti", f"{volume}:1", "--masks", "equispaced:2", "poisson:3", "--prior", prior]
    words += ["--methods", "zero-filled", "DDS", "--sizes", 4, "--contrasts", 0.1, -0.1]
    words += ["--num-samples", 2, "--nfe", 4, "--cache", tmp_path / "cache", "--out", out]
    command.main([str(word) for word in words])
    text = out.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in text
    assert out.with_suffix(".png").stat().st_size > 30_000
    assert "simulated coils" in text
    assert text.count("| equispaced ×2 | ×") == 2
    line = next(line for line in text.splitlines() if line.startswith("| poisson ×3 | 4 | -10 %"))
    cells = line.strip("| ").split(" | ")
    assert "±" not in cells[3]  # zero-filling has no samples
    assert "±" in cells[4]
    with pytest.raises(SystemExit, match="poisson:9 is none of the masks"):
        command.main([str(word) for word in [*words, "--picture", "poisson:9"]])


def test_summary_counts_lesions_and_places(pair):
    outcomes = planted.run([pair], [("random", 2.0)], [planted.ZeroFilled()])
    (line,) = page.summary_table(outcomes).splitlines()[2:]
    kept = sum(found.kept for found in outcomes[0].lesions)
    assert f"| {kept} of 4 |" in line
    wrong = [abs(error) >= 0.05 for each in outcomes[0].empty for error in each.errors]
    assert f"| {100 * np.mean(wrong):.1f} |" in line


@pytest.mark.parametrize("text", ["poisson", ":8", "poisson:", "poisson:x", "poisson:0.5", "poisson:nan"])
def test_masks_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not KIND:ACCELERATION"):
        mask_argument(text)


def test_mask_argument_is_taken_apart():
    assert mask_argument("gaussian2d:7.5") == ("gaussian2d", 7.5)
