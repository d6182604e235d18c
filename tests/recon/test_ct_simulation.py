"""Simulated scans of images: against closed forms, and where the images lay."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import torch

from operators.ct_geometry import FanBeam
from recon import ReconError
from recon.ct_simulation import CTSimulation, read_images
from recon.io.ct_volume import CTVolume
from recon.io.dicom_series import write_dicom_series
from tests.operators.discs import disc_sinogram

SIDE, PIXEL = 48, 2.0
CENTRE, RADIUS = (6.0, -8.0), 30.0


def images(depth=3, side=SIDE):
    """Discs of water and 1000 HU in air, the second slice's twice as dense, as DICOM stores air and less."""
    axis = (torch.arange(side) - (side - 1) / 2) * PIXEL
    inside = (axis - CENTRE[0]) ** 2 + (-axis[:, None] - CENTRE[1]) ** 2 < RADIUS**2
    hu = torch.stack([torch.where(inside, 1000.0 * k, -1000.0) for k in range(depth)])
    hu[:, 0, 0] = -2000.0  # what scanners write outside of their field of view
    return hu


@pytest.fixture
def series(tmp_path):
    volume = CTVolume(images(), (PIXEL, PIXEL), 5.0, (-10.0, 20.0, 30.0), (0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    write_dicom_series(tmp_path / "series", volume)
    return tmp_path / "series"


def test_a_scan_of_a_series(series):
    with CTSimulation(views=12, photons=1e7).open(series) as file:
        assert (file.num_slices, file.format) == (3, "simulated")
        scan, twice = file.read_slice(0), file.read_slice(1)
        assert file.read_slice(0).sinogram.equal(scan.sinogram)
        with pytest.raises(ReconError, match="there is no slice 3, the file has 3"):
            file.read_slice(3)
        placement = file.placement
    geometry = scan.geometry
    assert isinstance(geometry, FanBeam)
    np.testing.assert_allclose(geometry.angles, np.arange(12) * math.pi / 6)
    truth = disc_sinogram(geometry, ((*CENTRE, RADIUS, 0.02),))
    assert float((scan.sinogram[0] - truth).norm() / truth.norm()) < 0.04
    assert float((twice.sinogram[0] - 2 * truth).norm() / truth.norm()) < 0.08
    # The truth is the mean of 2 × 2 pixels, air where there was less than air.
    assert scan.reference is not None
    expected = images().clamp_min(-1000).reshape(3, 24, 2, 24, 2).mean((2, 4))
    torch.testing.assert_close(scan.reference[0], expected[0])
    assert (scan.reference_units, scan.pixel_size, scan.image_shape) == ("HU", 4.0, (24, 24))
    # The first pixel's centre is half a pixel of the series further along rows and columns.
    assert placement is not None
    np.testing.assert_allclose(placement.origin, (-10.0, 20.0 + 1.0, 30.0 - 1.0))
    assert placement.slice_spacing == 5.0


def test_noise_is_that_of_the_photons(series):
    made = {}
    for photons in (1e4, 1e8):
        for seed in (0, 1):
            with CTSimulation(views=40, photons=photons, seed=seed).open(series) as file:
                made[photons, seed] = file.read_slice(0).sinogram[0]
    difference = made[1e4, 0] - made[1e8, 0]
    expected = (made[1e8, 0].exp() / 1e4).sqrt()
    assert float((difference / expected).std()) == pytest.approx(1, abs=0.06)
    again = made[1e4, 1] - made[1e8, 0]
    assert abs(float((difference / expected * again / expected).mean())) < 0.1


def test_views_within_an_arc(series):
    with CTSimulation(views=6, arc=math.pi / 2, start=math.pi / 4).open(series) as file:
        geometry = file.read_slice(2).geometry
    assert geometry is not None
    assert len(geometry.angles) == 6
    assert math.pi / 4 - 1e-6 <= min(geometry.angles) < max(geometry.angles) <= 3 * math.pi / 4 + 1e-6


def test_images_of_hdf5_and_other_sizes(tmp_path):
    path = tmp_path / "hu.h5"
    with h5py.File(path, "w") as file:
        for name in ("a", "b"):
            file[f"{name}/hu"] = images(2, 45)
            file[name].attrs["pixel_spacing_mm"] = (PIXEL, PIXEL)
            file[name].attrs["z_mm"] = (0.0, -3.0)
    assert read_images(path / "a").slice_spacing == 3.0
    with CTSimulation(views=3, size=15).open(path / "b") as source:
        scan = source.read_slice(0)
    assert (scan.image_shape, scan.pixel_size) == ((15, 15), 6.0)
    with pytest.raises(ReconError, match=r"hu\.h5 holds 2 series, of which .*/NAME is one: a, b"):
        read_images(path)
    for size in (16, 45, 0):
        with (
            pytest.raises(ReconError, match=r"have 45 pixels a side, .*that divides them, not for"),
            CTSimulation(size=size).open(path / "a"),
        ):
            pass


def hdf5(path, z, side=SIDE):
    with h5py.File(path, "w") as file:
        file["a/hu"] = images(len(z), side)
        file["a"].attrs["pixel_spacing_mm"] = (PIXEL, PIXEL)
        file["a"].attrs["z_mm"] = z
    return path


def test_slices_of_hdf5_lie_where_the_file_says(tmp_path):
    expected = images(4).clamp_min(-1000).reshape(4, 24, 2, 24, 2).mean((2, 4))
    for z, order in (((2.0, 7.0, 12.0, 17.0), (0, 1, 2, 3)), ((17.0, 12.0, 7.0, 2.0), (3, 2, 1, 0))):
        with CTSimulation(views=3).open(hdf5(tmp_path / "hu.h5", z), even=True) as file:
            placement = file.placement
            for index, stored in enumerate(order):
                torch.testing.assert_close(file.read_slice(index).reference, expected[stored][None])
        assert placement is not None
        assert (placement.slice_spacing, placement.origin) == (5.0, (1.0, 1.0, 2.0))
    for positions, steps in (((0.0, 5.0, 10.0, 16.0), "5 to 6"), ((1.0, 1.0), "0 to 0")):
        path = hdf5(tmp_path / "hu.h5", positions)
        assert read_images(path).hu.equal(images(len(positions)))
        with pytest.raises(ReconError, match=rf"hu\.h5: .* in equal steps, and these lie {steps} mm apart"):
            read_images(path, even=True)


def test_sizes_that_divide_the_images(tmp_path):
    with CTSimulation(views=1).open(hdf5(tmp_path / "hu.h5", (0.0,), 65)) as file:
        assert file.read_slice(0).image_shape == (13, 13)
    with (
        pytest.raises(ReconError, match="for a size of 13, 5 that divides them, not for 32"),
        CTSimulation(size=32).open(tmp_path / "hu.h5"),
    ):
        pass
    with (
        pytest.raises(ReconError, match="have 67 pixels a side, which no size but 1 divides: crop or pad"),
        CTSimulation().open(hdf5(tmp_path / "prime.h5", (0.0,), 67)),
    ):
        pass


def test_images_that_cannot_be_scanned(tmp_path):
    for name, spacing, message in (
        ("oblong", (1.0, 2.0), "which are not square"),
        ("huge", (30.0, 30.0), "reach the source of the fan beam"),
    ):
        write_dicom_series(tmp_path / name, CTVolume(images(1), spacing, 5.0))
        with pytest.raises(ReconError, match=message), CTSimulation().open(tmp_path / name):
            pass
    with pytest.raises(ReconError, match="photons must be a positive number, got 0"):
        CTSimulation(photons=0)
