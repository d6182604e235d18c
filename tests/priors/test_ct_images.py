"""CT training images: units, what augmentation does, and series that cannot be used."""

import math

import pytest
import torch

from priors import PriorError
from priors.ct_images import CT_SETTINGS, CTImages, water_units
from tests.priors.training_images import rng


def body(slices=2, height=96, width=80):
    """An ellipse of water in air, in HU."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    inside = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    return torch.where(inside, 0.0, -1000.0).expand(slices, height, width).clone()


def test_water_units():
    hu = torch.tensor([-3024.0, -1024.0, -1000.0, 0.0, 1.0, 3071.0])
    expected = torch.tensor([-0.024, -0.024, 0.0, 1.0, 1.001, 4.071])
    torch.testing.assert_close(water_units(hu), expected, rtol=0, atol=1e-6)


def test_patches():
    source = CTImages([body(), body(3)])
    assert len(source) == 5
    patches = source.draw(24, 32, rng())
    assert patches.shape == (24, 32, 32)
    assert patches.dtype == torch.float32
    assert torch.equal(patches, source.draw(24, 32, rng()))
    assert not torch.equal(patches, source.draw(24, 32, rng(1)))
    # Air stays air and water stays water, to the few per cent by which scanners differ.
    for patch in patches:
        values = patch.flatten()
        pure = values[((values - 0.5).abs() > 0.3) & ((values - 0.5).abs() < 0.6)]
        assert len(pure) > 0.7 * len(values)
        near = torch.minimum((values - values.min()).abs(), (values - values.max()).abs())
        assert float((near < 0.15).float().mean()) > 0.7
    # Patches are centred on the body where a few tries find it: it fills a quarter of the picture or more.
    assert float((patches[:, 16, 16] > 0.5).float().mean()) > 0.7


def test_a_constant_slice_shows_scale_and_shift_of_the_attenuation():
    # Centred in a large slice of water, every rotation and zoom shows water.
    patches = CTImages([torch.zeros(1, 900, 900)]).draw(200, 8, rng())
    inside = patches[patches.flatten(1).amax(1) - patches.flatten(1).amin(1) < 1e-5]
    assert len(inside) > 190
    assert float(inside[:, 0, 0].mean()) == pytest.approx(1, abs=0.006)
    assert float(inside[:, 0, 0].std()) == pytest.approx(math.hypot(0.02, 0.005), rel=0.2)


def test_noise_is_that_of_averaged_pixels_whatever_the_rotation():
    noise = 50 * torch.randn(1, 600, 600, generator=rng())
    patches = CTImages([noise], reduction=2).draw(64, 32, rng(1))
    inside = patches[patches.flatten(1).amin(1) > 0.5]
    spread = inside.std((1, 2))
    # 50 HU averaged over 2 x 2 pixels; magnified, neighbours share pixels and average less.
    assert 0.017 < float(spread.min()) <= float(spread.max()) < 0.04
    assert float(CTImages([noise], reduction=1).draw(64, 32, rng(1)).std((1, 2)).median()) > 0.038


def test_flips_and_rotations_show_all_four_orientations():
    # A slice brighter towards the right and, less so, towards the top: the gradient tells the orientation.
    y, x = torch.linspace(-1, 1, 400)[:, None], torch.linspace(-1, 1, 400)
    ramp = 500 * x - 200 * y
    patches = CTImages([ramp[None]]).draw(400, 16, rng())
    across = (patches[:, :, -1] - patches[:, :, 0]).mean(1)
    down = (patches[:, -1] - patches[:, 0]).mean(1)
    for sign_x in (-1, 1):
        for sign_y in (-1, 1):
            share = ((across.sign() == sign_x) & (down.sign() == sign_y)).float().mean()
            assert 0.15 < float(share) < 0.35
    # Most are turned by up to 15 degrees: the steeper slope stays the one across (it falls short at 23).
    assert 0.7 < float((across.abs() > down.abs()).float().mean()) < 1


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        ([], "no CT series has a slice"),
        ([torch.zeros(0, 8, 8)], "no CT series has a slice"),
        ([body(), body()[0]], r"series 1 has shape \(96, 80\), expected \(slices, H, W\)"),
        ([body() * math.nan], "series 0 holds values that are not finite"),
    ],
)
def test_series_that_cannot_be_used(volumes, message):
    with pytest.raises(PriorError, match=message):
        CTImages(volumes)


def test_reduction_must_be_positive():
    with pytest.raises(PriorError, match="the reduction must be at least 1, got 0"):
        CTImages([body()], reduction=0)


def test_settings_are_those_of_a_prior_on_real_images_in_units_of_water():
    assert (CT_SETTINGS.unit, CT_SETTINGS.network.channels) == ("water", 1)
    # 5 and 1000 HU lie within two spreads of the centre.
    for sigma in (0.005, 1.0):
        assert abs(math.log(sigma / CT_SETTINGS.sigma_centre)) < 2 * CT_SETTINGS.sigma_spread
