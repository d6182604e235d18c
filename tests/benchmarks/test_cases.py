"""Test cases of MRI: files, targets and what the coil maps see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import cases
from benchmarks.cases import make_case, make_scenario, measured_case, nifti_argument, read_cfl, simulated_case
from operators.fft import ifftc
from operators.masks import make_mask
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from recon.errors import ReconError
from tests.benchmarks.head_phantom import SHAPE, case, phantom, write_cfl


@pytest.fixture(scope="module")
def scenario():
    return make_scenario(case(), "equispaced", 4)


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
    with pytest.raises(ReconError, match="k-space is all zeros"):
        measured_case(write_cfl(tmp_path, np.zeros((1, 30, 26, 2)), (1, 30, 26, 2)))


def test_targets_of_nothing_are_zero():
    made = make_case("beyond the head", torch.zeros(3, *SHAPE, dtype=torch.complex64))
    assert made.empty
    assert not case().empty
    assert all(torch.equal(made.targets[name], torch.zeros(SHAPE)) for name in ("rss", "combined"))


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


def test_slices_may_share_a_mask(scenario):
    mask = make_mask("random", SHAPE, 3, seed="a volume")
    shared = [make_scenario(case(seed=seed, name=f"slice {seed}"), "random", 3, mask) for seed in (0, 1)]
    assert all(torch.equal(found.mask.mask, mask.mask) for found in shared)
    assert not torch.equal(shared[0].problem.y, shared[1].problem.y)
    acquired = mask.mask.expand_as(shared[0].problem.y)
    assert torch.equal(shared[0].problem.y[acquired], case(name="slice 0").kspace[acquired])


@pytest.mark.parametrize("text", ["a.nii", "a.nii:x", "a.nii:1:20", "a.nii:1:20x", "a:b:1:2x2"])
def test_nifti_argument_refuses(text):
    with pytest.raises(cases.argparse.ArgumentTypeError, match="FILE:SLICE"):
        nifti_argument(text)


def test_nifti_argument_is_taken_apart():
    path, index, crop = nifti_argument("dir/a.nii.gz:25:320x256")
    assert (path.name, index, crop) == ("a.nii.gz", 25, (320, 256))
    assert nifti_argument("a.nii:3")[1:] == (3, None)


def test_rss_target_holds_the_noise():
    noisy = case(noise=0.05)
    air = noisy.targets["rss"][:4, :4]
    # 2C real components of standard deviation 0.05, in orthonormal transforms.
    assert float(air.square().mean().sqrt()) == pytest.approx(0.05 * np.sqrt(2 * 5), rel=0.2)
    assert torch.equal(noisy.targets["rss"], ifftc(noisy.kspace).abs().square().sum(0).sqrt())
