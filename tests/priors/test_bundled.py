"""The bundled priors on images that each test makes itself: what they know, and that they denoise it."""

import math

import pytest
import torch

from priors import load_prior
from priors.disc_images import FIELD_MM, disc_images
from tests.priors.training_images import rng


@pytest.mark.parametrize(
    ("name", "channels", "unit", "anatomy"),
    [
        ("brain", "complex", "level", ("brain",)),
        ("chest", "real", "water", ("chest",)),
        ("discs", "real", "object", ("disc with holes",)),
    ],
)
def test_contracts(name, channels, unit, anatomy):
    contract = load_prior(name).contract
    assert (contract.channels, contract.unit, contract.anatomy) == (channels, unit, anatomy)
    sigmas = [sigma for sigma, _ in contract.error_table]
    errors = [error for _, error in contract.error_table]
    assert errors == sorted(errors)
    assert all(error < sigma for sigma, error in zip(sigmas, errors, strict=True))


def chest(size=128):
    """A body of water with two lungs and a spine, in units of water, and where it is soft tissue or lung."""
    y, x = torch.linspace(1, -1, size)[:, None], torch.linspace(-1, 1, size)
    body = (x / 0.9) ** 2 + (y / 0.65) ** 2 < 1
    lungs = ((x.abs() - 0.42) / 0.28) ** 2 + (y / 0.42) ** 2 < 1
    spine = torch.hypot(x, y + 0.45) < 0.1
    image = torch.zeros(size, size)
    image[body], image[lungs], image[spine] = 1.05, 0.15, 1.4
    tissue = (x.abs() < 0.08) & (y.abs() < 0.25)
    lung = ((x.abs() - 0.42) / 0.2) ** 2 + (y / 0.3) ** 2 < 1
    return image, tissue, lung


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_the_chest_prior_takes_noise_away_and_keeps_the_units(sigma):
    image, tissue, lung = chest()
    noisy = image + sigma * torch.randn(4, *image.shape, generator=rng())
    denoised = load_prior("chest").denoise(noisy, sigma)
    assert float((denoised - image).square().mean().sqrt()) < 0.6 * sigma
    # Hounsfield units stay what they are, but for what noise of the mean leaves: 10 HU at 20 HU of noise.
    for region in (tissue, lung):
        assert float((denoised - image)[:, region].mean()) == pytest.approx(0, abs=0.005 + 0.1 * sigma)


def test_the_disc_prior_knows_discs():
    prior, images = load_prior("discs"), disc_images(6, 128, seed=123)
    for sigma, worst in ((0.2, 0.07), (1.0, 0.15), (3.0, 0.3)):
        noisy = images + sigma * torch.randn(images.shape, generator=rng())
        assert float((prior.denoise(noisy, sigma) - images).square().mean().sqrt()) < worst
    # With nearly nothing but noise it still knows where discs are: what is left is their average.
    sigma = 20.0
    denoised = prior.denoise(images + sigma * torch.randn(6, 128, 128, generator=rng(1)), sigma).mean(0)
    axis = (torch.arange(128) - 63.5) * FIELD_MM / 128
    radius = torch.hypot(axis, axis[:, None])
    assert float(denoised[radius > 38].abs().max()) < 0.3
    assert float(denoised[radius < 30].mean()) > 0.5
    assert math.isfinite(float(denoised.sum()))
