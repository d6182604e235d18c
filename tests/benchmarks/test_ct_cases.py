"""Cases of CT: what is planted, and scans of it against closed forms."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import torch

from benchmarks import ct_cases
from benchmarks.ct_cases import Case, Scan, make_case, read_cases, reduced, simulate
from benchmarks.ct_measures import Disc
from operators.attenuation import MU_WATER
from operators.ct_geometry import FanBeam, ParallelBeam
from recon.errors import ReconError
from tests.benchmarks.chest_phantom import PIXEL, SIDE, chest


@pytest.fixture(scope="module")
def case():
    return make_case("phantom", chest(), PIXEL)


# What is planted


def test_truth_is_the_mean_of_what_is_scanned(case):
    assert case.fine.shape == (2 * SIDE, 2 * SIDE)
    assert np.allclose(case.truth, case.fine.reshape(SIDE, 2, SIDE, 2).mean((1, 3)))
    assert np.allclose(case.background, reduced(chest().clip(-1024)))
    assert case.data_range == case.truth.max() - case.truth.min()


def test_discs_lie_in_their_tissue_and_add_their_contrast(case):
    planted = case.truth - case.background
    assert [disc.contrast for disc in case.inserts] == [20, 40, 80]
    for disc, tissue in [*((insert, 40) for insert in case.inserts), (case.edge, -850)]:
        row, column = round(disc.row), round(disc.column)
        assert planted[row, column] == pytest.approx(disc.contrast)
        near = case.background[row - 2 : row + 3, column - 2 : column + 3]
        assert near.mean() == pytest.approx(tissue, abs=10)
    total = sum(d.contrast * math.pi * d.radius**2 for d in (*case.inserts, case.edge))
    assert planted.sum() * PIXEL**2 == pytest.approx(total, rel=0.01)


def test_regions_keep_away_from_edges_and_discs(case):
    touched = case.truth != case.background
    for region, value in ((case.soft, 40), (case.lung, -850)):
        assert region.sum() > 100
        assert not (region & touched).any()
        assert np.abs(case.background[region] - value).max() < 30
    # The observer's template, a square about its ring, sees no insert and no other tissue.
    reach = math.ceil(1.7 * 6 / PIXEL) - 1
    for row, column in np.argwhere(case.empty_places):
        window = np.s_[row - reach : row + reach + 1, column]
        assert not touched[window].any()
        assert np.abs(case.background[window] - 40).max() < 40


def test_the_digest_tells_images_apart(case):
    assert case.digest == make_case("other name", chest(), PIXEL).digest
    assert case.digest != make_case("phantom", chest(seed=1), PIXEL).digest
    assert case.digest != make_case("phantom", chest(), 1.1 * PIXEL).digest


def test_the_padding_of_a_scanner_is_air():
    padded = chest()
    padded[:20] = -2000
    assert make_case("padded", padded, PIXEL).truth.min() == -1024


def test_what_does_not_fit_is_said():
    with pytest.raises(ReconError, match="even sides"):
        make_case("odd", chest()[1:], PIXEL)
    with pytest.raises(ReconError, match="does not fit: only 0 of 1"):
        make_case("no lungs", np.maximum(chest(), 40), PIXEL)
    with pytest.raises(ReconError, match=r"does not fit: only \d of [13]"):
        make_case("small", chest(), PIXEL / 4)


def write(path, **attributes):
    with h5py.File(path, "w") as file:
        for name in ("a_0", "a_1"):
            group = file.create_group(name)
            group["hu"] = np.stack([np.full((2 * SIDE, 2 * SIDE), -1000), chest()]).astype(np.int16)
            group.attrs.update({"patient": "a", "pixel_spacing_mm": [2.0, 2.0], "licence": "CC BY"})
            group.attrs.update(attributes)
    return path


def test_slices_are_read_with_their_licence(tmp_path):
    (found,) = read_cases(write(tmp_path / "hu.h5"), "a_1", [1])
    assert (found.name, found.source, found.pixel_size) == ("slice 1", "a_1, CC BY", 4.0)
    assert np.array_equal(found.background, reduced(chest().astype(np.int16).clip(-1024)))


@pytest.mark.parametrize(
    ("series", "slices", "attributes", "message"),
    [
        ("a_0", [2], {}, "no slice 2, the series has 2"),
        ("a_0", [1, 0], {}, "a_0, slice 0: .*does not fit"),
        ("a", [1], {}, "a are 2 series"),
        ("b", [1], {}, "no series and no patient 'b'"),
        ("a_0", [1], {"pixel_spacing_mm": [2.0, 2.5]}, "square pixels"),
    ],
)
def test_bad_requests_name_the_file(tmp_path, series, slices, attributes, message):
    path = write(tmp_path / "hu.h5", **attributes)
    with pytest.raises(ReconError, match=message) as error:
        read_cases(path, series, slices)
    assert "hu.h5" in str(error.value)


# Scans


@pytest.mark.parametrize("scan", [Scan("parallel", 7), Scan("fan", 7), Scan("fan", 30, 90.0)])
def test_the_detector_sees_the_corners_by_elements_as_wide_as_pixels(scan):
    shape, pixel = (40, 52), 5.0
    geometry = scan.geometry(shape, pixel)
    corners = np.array([[sx * 26 * pixel, sy * 20 * pixel] for sx in (-1, 1) for sy in (-1, 1)])
    angles = np.array(geometry.angles)[:, None]
    across = corners[:, 0] * np.cos(angles) + corners[:, 1] * np.sin(angles)
    edges = geometry.detector_positions[[0, -1]]
    if isinstance(geometry, ParallelBeam):
        seen, width = across, geometry.detector_spacing
    else:
        depth = ct_cases.SOURCE_ORIGIN - corners[:, 0] * np.sin(angles) + corners[:, 1] * np.cos(angles)
        seen = np.arctan2(across, depth) * geometry.source_detector
        width = geometry.detector_spacing / geometry.magnification
        assert geometry.detector == "curved"
    assert edges[0] < seen.min()
    assert seen.max() < edges[1]
    assert width == pytest.approx(pixel)


def test_angles_of_views_and_arcs():
    def degrees(scan):
        return np.rad2deg(scan.geometry((20, 20), 5.0).angles)

    assert np.allclose(degrees(Scan("parallel", 4)), [0, 45, 90, 135])
    assert np.allclose(degrees(Scan("fan", 4)), [0, 90, 180, 270])
    assert np.allclose(degrees(Scan("parallel", 4, 120.0)), [-60, -30, 0, 30])
    assert Scan("fan", 8).name == "8 views"
    assert Scan("fan", 90, 90.0).name == "90°, 90 views"
    with pytest.raises(ReconError, match="parallel or fan"):
        Scan("cone", 8).geometry((20, 20), 5.0)
    with pytest.raises(ReconError, match="reaches the source"):
        Scan("fan", 8).geometry((200, 200), 5.0)


def water_disc(radius=80.0):
    disc = Disc((SIDE - 1) / 2, (SIDE - 1) / 2, radius, 1000.0)
    fine = -1000 + 1000 * disc.coverage((SIDE, SIDE), PIXEL, 2)
    truth = reduced(fine)
    return Case("disc", "", fine, truth, truth, PIXEL, (), disc)


@pytest.mark.parametrize("beam", ["parallel", "fan"])
def test_scan_of_a_disc_of_water_is_its_chords(beam):
    found = simulate(water_disc(), Scan(beam, 12), photons=1e12)
    geometry = found.operator.geometry
    assert tuple(found.sinogram.shape) == found.operator.range_shape == geometry.range_shape
    assert found.operator.pixel_size == PIXEL
    u = geometry.detector_positions
    if isinstance(geometry, FanBeam):
        u = ct_cases.SOURCE_ORIGIN * np.sin(u / ct_cases.SOURCE_DETECTOR)
    chords = 2 * MU_WATER * np.sqrt(np.clip(80**2 - u**2, 0, None))
    away = np.abs(np.abs(u) - 80) > 8  # elements across the edge see a mean of chords
    error = found.sinogram.numpy()[:, away] - chords[away]
    assert np.abs(error).max() < 0.02 * chords.max()
    # The mean over rays and angles is better than any one of them.
    assert abs(error[:, np.abs(u[away]) < 60].mean()) < 2e-3 * chords.max()


def test_noise_is_that_of_the_photons_counted():
    case, scan, photons = water_disc(), Scan("parallel", 40), 1e4
    clean = simulate(case, scan, 1e12).sinogram
    noisy = simulate(case, scan, photons)
    scaled = (noisy.sinogram - clean) * torch.sqrt(photons * torch.exp(-clean))
    assert float(scaled.std()) == pytest.approx(1, abs=0.05)
    assert float(scaled.mean()) == pytest.approx(0, abs=0.05)
    assert noisy.starved == 0
    assert torch.equal(simulate(case, scan, photons).sinogram, noisy.sinogram)
    assert not torch.equal(simulate(case, scan, photons, seed=1).sinogram, noisy.sinogram)
    assert simulate(case, scan, 3.0).starved > 0.1


def test_blocks_of_views_make_no_difference(monkeypatch):
    """But for rounding; with so many photons that there is next to no noise, whose draws rounding can tip."""
    whole = simulate(water_disc(), Scan("fan", 7), 1e12).sinogram
    monkeypatch.setattr(ct_cases, "BLOCK", 3)
    blocks = simulate(water_disc(), Scan("fan", 7), 1e12).sinogram
    assert float(whole.max()) > 1
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-3)
