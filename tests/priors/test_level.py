"""The level of an image: a closed form, and what it must not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F

from priors.level import image_level


def blob(shape=(64, 80), width=6.0, centre=(30, 41)):
    y, x = (torch.arange(n) - c for n, c in zip(shape, centre, strict=True))
    return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * width**2))


def head(shape=(96, 80)):
    """A dull disk in a thin bright shell."""
    y, x = (torch.linspace(-1, 1, n) for n in shape)
    radius = torch.hypot(y[:, None], x)
    return 0.4 * (radius < 0.7) + 2.0 * ((radius > 0.74) & (radius < 0.78))


def test_a_gaussian_blob_in_closed_form():
    # |x|^2 has the standard deviation a / sqrt(2), the blur b a quarter of that, so b^2 = a^2 / 32; the
    # blurred blob has the peak a^2 / (a^2 + b^2) = 32/33, and the energy-weighted magnitude of a Gaussian is
    # its peak / sqrt(2).
    assert float(image_level(3 * blob())) == pytest.approx(3 * 32 / 33 / math.sqrt(2), rel=1e-5)


def test_batches_and_complex_images():
    images = torch.stack([blob(), 2 * blob(centre=(33, 35)), torch.zeros(64, 80)])
    turned = torch.polar(images, torch.linspace(0, 3, 80).expand(3, 64, 80))
    level = image_level(turned)
    torch.testing.assert_close(level, image_level(images))
    torch.testing.assert_close(level[1], 2 * level[0])
    assert float(level[2]) == 0


@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1e12])
def test_it_is_homogeneous(factor):
    image = head().double()
    assert float(image_level(factor * image)) == pytest.approx(factor * float(image_level(image)), rel=1e-9)


def test_air_and_pixel_size_do_not_matter():
    image = head()
    level = float(image_level(image))
    assert float(image_level(F.pad(image, (50, 10, 3, 90)))) == pytest.approx(level, rel=0.01)
    fine = F.interpolate(image[None, None], scale_factor=2, mode="nearest")[0, 0]
    assert float(image_level(fine)) == pytest.approx(level, rel=0.01)


def test_seven_columns_of_kspace_are_enough():
    image = head()
    spectrum = torch.fft.fftshift(torch.fft.fft2(image))
    spectrum[:, :37] = spectrum[:, 44:] = 0
    coarse = torch.fft.ifft2(torch.fft.ifftshift(spectrum)).abs()
    assert float(image_level(coarse)) == pytest.approx(float(image_level(image)), rel=0.03)
    # The energy-weighted magnitude without the blur is not.
    plain = [float((x.double() ** 4).sum() / (x.double() ** 2).sum()) ** 0.5 for x in (coarse, image)]
    assert plain[0] < 0.85 * plain[1]
