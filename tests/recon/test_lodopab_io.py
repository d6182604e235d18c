from __future__ import annotations

import math

import h5py
import numpy as np
import pytest

from recon.errors import ReconError
from recon.io.lodopab import MU_MAX, LoDoPaBFile, lodopab_geometry
from tests.operators.discs import disc_sinogram


def write(path, shape, seed=0, data=None):
    with h5py.File(path, "w") as file:
        values = np.random.default_rng(seed).random(shape) if data is None else data
        file["data"] = values.astype(np.float32)
    return path


def write_both(folder, count=2):
    observation = write(folder / "observation_test_000.hdf5", (count, 1000, 513))
    write(folder / "ground_truth_test_000.hdf5", (count, 362, 362), 1)
    return observation


def test_scans_with_their_images(tmp_path):
    path = write_both(tmp_path)
    with LoDoPaBFile(path) as file:
        assert file.num_slices == 2
        scan = file.read_slice(1)
    with h5py.File(path) as file:
        np.testing.assert_allclose(scan.sinogram[0], file["data"][1] * 81.35858, rtol=1e-5)
    assert scan.reference is not None
    with h5py.File(tmp_path / "ground_truth_test_000.hdf5") as file:
        np.testing.assert_allclose(scan.reference[0], file["data"][1] * 0.08135858, rtol=1e-5)
    assert scan.reference_units == "1/mm"
    assert scan.pixel_size == pytest.approx(260 / 362)
    assert scan.image_shape == (362, 362)
    assert scan.slices == (1,)
    assert scan.geometry == lodopab_geometry()


def test_observations_alone(tmp_path):
    with LoDoPaBFile(write(tmp_path / "observation_test_000.hdf5", (1, 1000, 513))) as file:
        scan = file.read_slice(0)
    assert scan.reference is None
    other = write(tmp_path / "truth.hdf5", (1, 362, 362))
    with LoDoPaBFile(tmp_path / "observation_test_000.hdf5", other) as file:
        assert file.read_slice(0).reference is not None


def test_geometry_is_that_of_the_stored_images():
    """x runs down the rows and y along the columns; view k is at (k + 1/2)/1000 of half a turn."""
    geometry = lodopab_geometry()
    x, y = 30.0, -55.0
    row, column = 180.5 + x / (260 / 362), 180.5 + y / (260 / 362)
    ours = ((column - 180.5) * 260 / 362, (180.5 - row) * 260 / 362)
    views = [0, 250, 700]
    projected = disc_sinogram(geometry.subset(views), ((*ours, 15.0, 1.0),)).numpy()
    middle = (projected * geometry.detector_positions).sum(1) / projected.sum(1)
    angle = (np.array(views) + 0.5) / 1000 * math.pi
    np.testing.assert_allclose(middle, x * np.cos(angle) + y * np.sin(angle), atol=0.05)
    half = 130 * math.sqrt(2)
    assert geometry.detector_positions[-1] + geometry.detector_spacing / 2 == pytest.approx(half)


def test_line_integrals_have_no_unit(tmp_path):
    """A disc of the largest attenuation, 5 cm across: stored as its chord in metres."""
    geometry = lodopab_geometry()
    stored = disc_sinogram(geometry, ((0.0, 0.0, 25.0, 1.0),)).numpy() / 1000
    path = write(tmp_path / "observation_test_000.hdf5", None, data=stored[None])
    with LoDoPaBFile(path) as file:
        peak = float(file.read_slice(0).sinogram.max())
    assert peak == pytest.approx(50 * MU_MAX, rel=1e-3)


def test_what_cannot_be_read(tmp_path):
    path = write_both(tmp_path)
    with LoDoPaBFile(path) as file, pytest.raises(ReconError, match="there is no scan 2, the file has 2"):
        file.read_slice(2)
    with pytest.raises(ReconError, match="closed file"):
        file.read_slice(0)
    with pytest.raises(ReconError, match="there is no such file"):
        LoDoPaBFile(tmp_path / "observation_none.hdf5")
    write(tmp_path / "ground_truth_test_000.hdf5", (3, 362, 362))
    with pytest.raises(ReconError, match="there are 3 images for 2 observations"):
        LoDoPaBFile(path)
    with pytest.raises(ReconError, match=r"real \(n, 1000, 513\), got float32 \(2, 100, 513\)"):
        LoDoPaBFile(write(tmp_path / "a.hdf5", (2, 100, 513)))
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["other"] = 1
    with pytest.raises(ReconError, match="no dataset 'data'"):
        LoDoPaBFile(tmp_path / "b.hdf5")
    whole = path.read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[:1000])
    with pytest.raises(ReconError, match="cut short"):
        LoDoPaBFile(tmp_path / "cut.hdf5")
    nan = np.zeros((1, 1000, 513))
    nan[0, 3, 4] = np.nan
    damaged = write(tmp_path / "nan.hdf5", None, data=nan)
    with LoDoPaBFile(damaged) as file, pytest.raises(ReconError, match="the sinogram holds NaN"):
        file.read_slice(0)
