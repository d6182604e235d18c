"""Measures of CT images against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from benchmarks.ct_measures import (
    NPS_SIDE,
    Disc,
    away_from,
    bias,
    body,
    detect,
    edge_mtf,
    first_below,
    noise_squares,
    noise_texture,
    observer,
    place,
    room,
    tissue,
)
from recon.errors import ReconError

PIXEL = 1.7


def white(shape=(160, 160), std=10.0, seed=0):
    return std * np.random.default_rng(seed).standard_normal(shape)


# Discs and bias


def test_a_disc_covers_its_area_and_pixels_are_means_of_finer_ones():
    disc = Disc(19.3, 30.8, 9.0, 1.0)
    covered = disc.coverage((40, 60), 1.5)
    assert covered.shape == (40, 60)
    assert covered.sum() * 1.5**2 == pytest.approx(math.pi * 9**2, rel=1e-3)
    rows, columns = (np.arange(n) * 1.5 for n in covered.shape)
    distance = np.hypot(rows[:, None] - 19.3 * 1.5, columns - 30.8 * 1.5)
    assert (covered[distance < 9 - 1.1] == 1).all()
    assert (covered[distance > 9 + 1.1] == 0).all()
    fine = disc.coverage((40, 60), 1.5, 2)
    assert np.allclose(fine.reshape(40, 2, 60, 2).mean((1, 3)), covered)
    assert not Disc(-20.0, 5.0, 9.0, 1.0).coverage((40, 60), 1.5).any()
    # One that the border cuts through the middle.
    assert Disc(-0.5, 30.0, 9.0, 1.0).coverage((40, 60), 1.5).sum() * 1.5**2 == pytest.approx(
        math.pi * 9**2 / 2, rel=1e-3
    )


def test_bias_of_a_shifted_image_is_the_shift():
    truth, region = white((20, 30)), np.zeros((20, 30), dtype=bool)
    region[3:9, 4:20] = True
    image = truth + np.where(region, 7.5, -100)
    assert bias(image, truth, region) == pytest.approx(7.5)
    with pytest.raises(ReconError, match="without pixels"):
        bias(image, truth, np.zeros_like(region))


# Resolution


def pixel_transfer(k):
    """Of the mean over a square pixel, averaged over all directions; k in periods a pixel."""
    angle = np.linspace(0, np.pi / 2, 400)[:, None]
    return (np.sinc(k * np.cos(angle)) * np.sinc(k * np.sin(angle))).mean(0)


@pytest.mark.parametrize("where", [(64.5, 63.25), (63.1, 64.4)])
@pytest.mark.parametrize("blur", [0.0, 0.7, 1.2])
def test_transfer_of_a_known_blur(blur, where):
    row, column = where
    disc = Disc(row, column, 14.0, 300.0)
    image = disc.contrast * disc.coverage((128, 128), PIXEL, 8)
    if blur:
        image = gaussian_filter(image, 8 * blur, truncate=6)
    image = image.reshape(128, 8, 128, 8).mean((1, 3))
    f, transfer = edge_mtf(image, disc, PIXEL)
    k = f * PIXEL
    truth = pixel_transfer(k) * np.exp(-2 * np.pi**2 * blur**2 * k**2)
    assert f[0] == 0
    assert f[-1] == pytest.approx(1 / PIXEL)
    resolved = k <= 0.5
    assert np.abs(transfer - truth)[resolved].max() < 0.02
    assert first_below(f, transfer, 0.5) == pytest.approx(np.interp(0.5, truth[::-1], f[::-1]), rel=0.03)


def test_transfer_does_not_depend_on_contrast_and_needs_an_edge():
    disc = Disc(40.5, 40.25, 14.0, 300.0)
    image = disc.coverage((80, 80), PIXEL)
    assert np.allclose(edge_mtf(image, disc, PIXEL)[1], edge_mtf(40 * image + 3, disc, PIXEL)[1])
    for nothing in (np.zeros((80, 80)), -image):
        with pytest.raises(ReconError, match="no edge"):
            edge_mtf(nothing, disc, PIXEL)


def test_first_below_is_where_a_line_crosses():
    f = np.linspace(0, 2, 11)
    assert first_below(f, 1 - f / 2, 0.37) == pytest.approx(1.26)
    assert math.isnan(first_below(f, 1 - f / 4, 0.37))
    # Of an oscillating transfer, the first time.
    assert first_below(f, np.cos(2 * np.pi * f), 0.5) < 0.25


# Noise texture


def test_texture_of_white_noise():
    found = noise_texture(white() + 40, np.ones((160, 160), dtype=bool), PIXEL)
    highest = 1 / (2 * PIXEL)
    assert found.squares == 37**2
    assert found.std == pytest.approx(10, rel=0.03)
    assert np.allclose(found.power, 10**2 * PIXEL**2, rtol=0.15)
    assert found.mean_frequency == pytest.approx(highest / 2, rel=0.02)
    assert found.frequencies[-1] == pytest.approx(highest)


def test_texture_of_filtered_noise_is_its_transfer_squared():
    u = np.hypot(np.fft.fftfreq(160)[:, None], np.fft.fftfreq(160))  # periods a pixel
    transfer = 1 / (1 + (u / 0.3) ** 2)
    noise = [np.fft.ifft2(np.fft.fft2(white(seed=s)) * transfer).real for s in range(6)]
    regions = np.ones((160, 160), dtype=bool)
    textures = [noise_texture(image, regions, PIXEL) for image in noise]
    power = np.mean([t.power for t in textures], axis=0)
    k = textures[0].frequencies * PIXEL
    truth = 10**2 * PIXEL**2 / (1 + (k / 0.3) ** 2) ** 2
    # Squares of 16 pixels smear the spectrum a little.
    assert np.allclose(power, truth, rtol=0.2)
    f = np.linspace(0, 0.5, 500)
    density = 1 / (1 + (f / 0.3) ** 2) ** 2
    mean = (f * density).sum() / density.sum() / PIXEL
    assert np.mean([t.mean_frequency for t in textures]) == pytest.approx(mean, rel=0.1)
    assert mean < 0.7 / (4 * PIXEL)
    doubled = noise_texture(2 * noise[0], regions, PIXEL)
    assert np.allclose(doubled.power, 4 * textures[0].power)
    assert doubled.std == pytest.approx(2 * textures[0].std)
    assert doubled.mean_frequency == pytest.approx(textures[0].mean_frequency)


def test_power_integrates_to_the_variance():
    """The sum over all frequencies of one square is Parseval's; the rings hold the disc within them."""
    error = np.zeros((NPS_SIDE, NPS_SIDE))
    error[:] = 10 * np.cos(2 * np.pi * 3 * np.arange(NPS_SIDE) / NPS_SIDE)
    found = noise_texture(error, np.ones(error.shape, dtype=bool), PIXEL)
    assert found.std == pytest.approx(10 / math.sqrt(2))
    assert found.power.argmax() == 2
    assert np.delete(found.power, 2).max() < 1e-9 * found.power[2]
    members = np.rint(np.hypot(*np.meshgrid(*[np.fft.fftfreq(NPS_SIDE) * NPS_SIDE] * 2))) == 3
    cell = (1 / (NPS_SIDE * PIXEL)) ** 2
    assert found.power[2] * members.sum() * cell == pytest.approx(50)


def test_squares_lie_in_the_region():
    region = np.zeros((40, 60), dtype=bool)
    region[4:24, 8:32] = True
    assert noise_squares(region) == [(i, j) for i in (4, 8) for j in (8, 12, 16)]
    # What is outside of them does not matter.
    error = np.where(region, white((40, 60)), 1e6)
    assert noise_texture(error, region, PIXEL).std < 20
    region[14, 20] = False
    with pytest.raises(ReconError, match="no square of 16"):
        noise_texture(error, region, PIXEL)
    assert math.isnan(noise_texture(0 * error, region | True, PIXEL).mean_frequency)


# Detection


@pytest.fixture
def places():
    region = np.ones((160, 160), dtype=bool)
    return (room(region) > 8) & away_from(region.shape, [(80, 70, 12)])


def test_the_observer_tells_contrast_and_sees_no_background():
    disc, template = Disc(80, 70, 6.0, 40.0), observer(6.0, PIXEL)
    assert template.sum() == pytest.approx(0, abs=1e-12)
    assert np.allclose(template, template[::-1, ::-1])
    assert np.allclose(template, template.T)
    places = away_from((160, 160), [(80, 70, 12)])
    response = 40 * disc.coverage((160, 160), PIXEL)
    slope = 5 + 0.2 * np.arange(160)
    found = detect(response + slope, white() + slope, disc, places, PIXEL)
    assert found.contrast == pytest.approx(40)


@pytest.mark.parametrize(("ratio", "detected"), [(-6, False), (0, False), (1, False), (5, True), (12, True)])
def test_ratio_in_white_noise_is_that_of_the_template(ratio, detected, places):
    """The answer to white noise has the standard deviation of the noise times the norm of the template."""
    unit = 10 * np.linalg.norm(observer(6.0, PIXEL))
    disc = Disc(80, 70, 6.0, ratio * unit)
    error = white()
    found = detect(error + disc.contrast * disc.coverage(error.shape, PIXEL), error, disc, places, PIXEL)
    # The noise at the place itself adds what it does without a disc.
    alone = detect(error, error, disc, places, PIXEL).snr
    assert abs(alone) < 2
    assert found.snr - alone == pytest.approx(ratio, rel=0.1)
    assert found.detected == detected
    # Noise twice as strong, half the ratio: exactly, if the disc's own grows with it.
    again = detect(
        2 * error + disc.contrast * disc.coverage(error.shape, PIXEL), 2 * error, disc, places, PIXEL
    )
    assert again.snr - alone == pytest.approx((found.snr - alone) / 2)


def test_hallucinations_at_empty_places_are_noise(places):
    disc = Disc(80, 70, 6.0, 60.0)
    response = disc.contrast * disc.coverage((160, 160), PIXEL)
    made_up = sum(
        90 * Disc(row, column, 6.0, 90.0).coverage((160, 160), PIXEL)
        for row in range(15, 150, 11)
        for column in range(15, 150, 11)
        if places[row, column]
    )
    assert detect(response, white(std=1), disc, places, PIXEL).detected
    assert not detect(response, made_up + white(std=1), disc, places, PIXEL).detected


def test_without_noise_anything_is_detected_and_nothing_is_not(places):
    disc = Disc(80, 70, 6.0, 1.0)
    nothing = np.zeros((160, 160))
    assert detect(disc.coverage((160, 160), PIXEL), nothing, disc, places, PIXEL).snr == math.inf
    assert not detect(nothing, nothing, disc, places, PIXEL).detected
    with pytest.raises(ReconError, match="empty places"):
        detect(nothing, nothing, disc, nothing > 0, PIXEL)


# Regions


def test_body_and_tissue():
    image = np.full((60, 80), -1000.0)
    image[50:53] = 200  # the table
    image[5:45, 10:70] = 40
    image[15:35, 20:50] = -850
    image[20, 30] = 50  # a vessel in the lung
    inside = body(image)
    # The median rounds corners.
    assert inside[6:44, 11:69].all()
    assert not inside[46:].any()
    lung = tissue(image, -950, -700)
    assert lung[16:34, 21:49].all()
    assert lung.sum() <= 20 * 30
    soft = tissue(image, -20, 110)
    assert soft[6:14, 11:69].all()
    assert not (soft & lung).any()
    with pytest.raises(ReconError, match="nothing but air"):
        body(np.full((10, 10), -1000.0))


def test_places_fit_and_do_not_overlap():
    region = np.zeros((50, 90), dtype=bool)
    region[5:45, 5:85] = True
    radii = [9.0, 9.0, 6.0, 9.0]
    found = place(region, radii)
    for (row, column), radius in zip(found, radii, strict=True):
        rows, columns = np.nonzero(~away_from(region.shape, [(row, column, radius)]))
        assert region[rows, columns].all()
    for i, (a, b) in enumerate(found):
        for j in range(i):
            assert math.hypot(a - found[j][0], b - found[j][1]) >= radii[i] + radii[j]
    with pytest.raises(ReconError, match="only 1 of 2 discs"):
        place(region, [15.0, 15.1 + 5])


def test_room_ends_at_the_border():
    assert room(np.ones((5, 9), dtype=bool)).max() == 3
    assert room(np.ones((5, 9), dtype=bool))[0, 4] == 1
