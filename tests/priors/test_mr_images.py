"""Complex training images: level, patches, and volumes that cannot be used."""

import math

import pytest
import torch

from priors import PriorError
from priors.level import image_level
from priors.mr_images import MR_SETTINGS, MRImages, prepare_slices, sample_patches
from tests.priors.training_images import disks, rng

SLICES = prepare_slices([disks()], MR_SETTINGS.level)


def test_slices_are_brought_to_the_level():
    slices = prepare_slices([disks(), 1e-6 * disks(2)], MR_SETTINGS.level)
    assert [tuple(image.shape) for image in slices] == 5 * [(40, 36)]
    for image in slices:
        assert float(image_level(image)) == pytest.approx(MR_SETTINGS.level, rel=1e-5)


def test_nearly_empty_slices_are_left_out():
    volume = disks()
    volume[1] *= 0.1
    assert len(prepare_slices([volume], 0.5)) == 2


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        ([], "no image to train on"),
        ([torch.zeros(3, 8, 8)], "every slice is empty"),
        ([disks(), disks()[0]], r"volume 1 has shape \(40, 36\), expected \(slices, H, W\)"),
        ([disks() * math.nan], "volume 0 holds values that are not finite"),
    ],
)
def test_volumes_that_cannot_be_used(volumes, message):
    with pytest.raises(PriorError, match=message):
        prepare_slices(volumes, 0.5)


def test_patches():
    patches = sample_patches(SLICES, 64, 16, rng())
    assert patches.shape == (64, 16, 16)
    assert patches.dtype == torch.complex64
    assert torch.isfinite(patches.abs()).all()
    assert 0.15 < float(image_level(patches).median()) < 0.8
    # The global phase is uniform: no direction is preferred.
    direction = patches.sum((1, 2))
    assert float((direction / direction.abs()).mean().abs()) < 0.4
    # Phase and magnitude vary smoothly, but they do vary.
    phases = (patches[:, 1:] * patches[:, :-1].conj()).sum((1, 2)).angle().abs()
    assert 0 < float(phases.median()) < 0.5
    assert torch.equal(patches, sample_patches(SLICES, 64, 16, rng()))
    assert not torch.equal(patches, sample_patches(SLICES, 64, 16, rng(1)))


def test_patches_of_a_constant_image_show_the_intensity_changes_only():
    # Centred in a large constant image, every rotation and zoom shows the constant.
    magnitude = sample_patches([torch.full((400, 400), 0.5)], 32, 8, rng()).abs()
    inside = magnitude.flatten(1).min(1).values > 0.1
    assert inside.float().mean() > 0.9
    spread = magnitude[inside].std((1, 2)) / magnitude[inside].mean((1, 2))
    assert float(spread.median()) < 0.2


def test_a_source_draws_patches_of_its_slices():
    source = MRImages(SLICES)
    assert len(source) == 3
    assert torch.equal(source.draw(4, 16, rng()), sample_patches(SLICES, 4, 16, rng()))
    with pytest.raises(PriorError, match="there is no image to train on"):
        MRImages([])
