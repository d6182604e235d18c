"""Discs with holes: their size and place, the share of a pixel that is material, and determinism."""

import math

import pytest
import torch

import priors.disc_images as module
from priors import PriorError
from priors.disc_images import DISC_SETTINGS, FIELD_MM, DiscImages, disc_images, random_disc
from tests.priors.training_images import rng

FAMILIES = [family.__name__.lstrip("_") for family in module._FAMILIES]


@pytest.fixture
def only(monkeypatch):
    """Make every disc one of a single family."""

    def choose(name):
        monkeypatch.setattr(module, "_FAMILIES", (module._FAMILIES[FAMILIES.index(name)],))
        monkeypatch.setattr(module, "_SHARES", (1.0,))

    return choose


def outline(image):
    """Area and centre (x, y) in mm of all that a disc's outermost pixels enclose, row by row."""
    size = image.shape[0]
    pixel = FIELD_MM / size
    position = (torch.arange(size) - (size - 1) / 2) * pixel
    area, moments = 0.0, torch.zeros(2)
    for row, y in zip(image, -position, strict=True):
        material = torch.nonzero(row > 0).flatten()
        if len(material):
            filled = row.clone()
            first, last = material[0], material[-1]
            # Next to the outline there is solid rim, so only the two end pixels are partly filled.
            filled[first + 1 : last] = 1
            area += float(filled.sum())
            moments += torch.stack([(filled * position).sum(), filled.sum() * y])
    return area * pixel**2, *(moments / area).tolist()


def test_values_shape_and_type():
    images = disc_images(40, 64)
    assert images.shape == (40, 64, 64)
    assert images.dtype == torch.float32
    assert float(images.min()) == 0
    assert float(images.max()) == 1
    # Nearly all pixels are air or material; those between lie on edges.
    assert float(((images > 0) & (images < 1)).float().mean()) < 0.15


@pytest.mark.parametrize("size", [64, 97, 128])
def test_a_solid_disc_has_the_area_of_a_circle(only, size):
    only("none")
    areas = []
    for seed in range(12):
        image = random_disc(size, rng(seed))
        areas.append(float(image.sum()) * (FIELD_MM / size) ** 2)
        radius = math.sqrt(areas[-1] / math.pi)
        assert 34.87 * 0.9895 < radius < 34.87 * 1.0105
    assert max(areas) / min(areas) > 1.01  # radii differ


@pytest.mark.parametrize("family", FAMILIES)
def test_holes_leave_the_outline_whole(only, family):
    only(family)
    fractions = []
    for image in torch.stack([random_disc(128, rng(seed)) for seed in range(12)]):
        area, x, y = outline(image)
        radius = math.sqrt(area / math.pi)
        assert 34.87 * 0.985 < radius < 34.87 * 1.015
        assert max(abs(x), abs(y)) < 1.9
        fractions.append(float(image.sum()) * (FIELD_MM / 128) ** 2 / area)
    assert max(fractions) <= 1.001
    if family != "none":
        assert min(fractions) < 0.97  # there are holes
        assert min(fractions) > 0.1


def test_a_pixel_holds_the_share_of_its_area_that_is_material():
    # The same discs on a grid four times as fine, averaged: what is left is the error at corners.
    for seed in range(25):
        coarse, fine = random_disc(64, rng(seed)), random_disc(256, rng(seed))
        averaged = fine.reshape(64, 4, 64, 4).mean((1, 3))
        error = (coarse - averaged).abs()
        assert float(error.mean()) < 0.004
        assert float(error.max()) < 0.35
        assert float(coarse.sum()) == pytest.approx(float(averaged.sum()), rel=5e-3)


def test_centres_are_spread_over_the_square(only):
    only("none")
    centres = torch.tensor([outline(random_disc(64, rng(seed)))[1:] for seed in range(150)])
    assert float(centres.abs().max()) < 1.9
    assert centres.std(0).tolist() == pytest.approx([1.8 / math.sqrt(3)] * 2, rel=0.15)


def test_the_seed_decides():
    images = disc_images(3, 32, seed=5)
    assert torch.equal(images, disc_images(3, 32, seed=5))
    assert torch.equal(images[:2], disc_images(2, 32, seed=5))
    assert not torch.equal(images, disc_images(3, 32, seed=6))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    disc_images(2, 32)
    assert torch.equal(torch.rand(2), expected)


def test_every_family_is_drawn():
    shares = torch.tensor(module._SHARES)
    assert len(module._FAMILIES) == len(shares)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares.min()) > 0


def test_a_source_draws_its_own_discs_in_eight_orientations():
    source = DiscImages(number=1, seed=3)
    assert len(source) == 1
    images = source.draw(100, 32, rng())
    assert images.dtype == torch.float32
    assert torch.equal(images, DiscImages(number=1, seed=3).draw(100, 32, rng()))
    assert len(images.flatten(1).unique(dim=0)) == 8
    counts = {tuple(sorted(image.flatten().tolist())) for image in images}
    assert len(counts) == 1  # of one disc
    assert not torch.equal(DiscImages(number=1, seed=4).draw(100, 32, rng()), images)
    assert len(DiscImages(number=50).draw(50, 16, rng()).flatten(1).sum(1).unique()) > 20


def test_impossible_numbers():
    for number, size in ((0, 8), (1, 0)):
        with pytest.raises(PriorError, match=f"must be positive, got {number} and {size}"):
            disc_images(number, size)
    with pytest.raises(PriorError, match="the number of discs must be positive, got 0"):
        DiscImages(0)


def test_settings_are_those_of_a_network_that_sees_the_whole_disc():
    assert (DISC_SETTINGS.unit, DISC_SETTINGS.network.channels) == ("object", 1)
    assert DISC_SETTINGS.patch // DISC_SETTINGS.network.size_multiple == 8
