from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from recon.errors import ReconError
from recon.io.dxchange import DXchangeFile

VIEWS, SLICES, DETECTORS = 10, 3, 8
THETA = np.linspace(0, 180, VIEWS, endpoint=False)


def datasets():
    generator = np.random.default_rng(0)
    return {
        "data": generator.integers(200, 3000, (VIEWS, SLICES, DETECTORS)).astype(np.uint16),
        "data_white": generator.integers(3000, 3100, (4, SLICES, DETECTORS)).astype(np.uint16),
        "data_dark": generator.integers(90, 110, (2, SLICES, DETECTORS)).astype(np.uint16),
        "theta": THETA,
    }


def write(path, pixel=None, theta_units=None, **changes):
    with h5py.File(path, "w") as file:
        for name, value in (datasets() | changes).items():
            if value is not None:
                file[f"exchange/{name}"] = value
        if theta_units:
            file["exchange/theta"].attrs["units"] = theta_units
        if pixel:
            file["measurement/instrument/detector/pixel_size_x"] = pixel[0]
            file["measurement/instrument/detector/pixel_size_x"].attrs["units"] = pixel[1]
    return path


def test_slices_with_their_flats_and_darks(tmp_path):
    with DXchangeFile(write(tmp_path / "a.h5")) as file:
        assert (file.num_slices, file.num_views, file.num_detectors) == (SLICES, VIEWS, DETECTORS)
        scan = file.read_slice(1)
        both = file.read_slices([2, 0])
    given = datasets()
    assert scan.flats is not None
    assert scan.darks is not None
    assert scan.geometry is not None
    for name, values in (("data", scan.sinogram), ("data_white", scan.flats), ("data_dark", scan.darks)):
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values[0], given[name][:, 1])
    assert scan.kind == "counts"
    assert scan.slices == (1,)
    np.testing.assert_allclose(scan.geometry.angles, np.deg2rad(THETA))
    assert both.slices == (2, 0)
    np.testing.assert_array_equal(both.sinogram, given["data"].transpose(1, 0, 2)[[2, 0]])
    dark, white = (given[name][:, 1].mean(0) for name in ("data_dark", "data_white"))
    expected = -np.log((given["data"][:, 1] - dark) / (white - dark))
    np.testing.assert_allclose(scan.to_line_integrals().sinogram[0], expected, atol=1e-5)


def test_units_of_theta_and_of_the_detector(tmp_path):
    with DXchangeFile(write(tmp_path / "a.h5", theta=np.deg2rad(THETA), theta_units="radians")) as file:
        np.testing.assert_allclose(file.geometry.angles, np.deg2rad(THETA))
        assert (file.geometry.detector_spacing, file.length_unit) == (1.0, "element")
        assert file.read_slice(0).length_unit == "element"
    with DXchangeFile(write(tmp_path / "b.h5", pixel=(6.5, "um"))) as file:
        assert file.geometry.detector_spacing == pytest.approx(0.0065)
        assert file.read_slice(0).length_unit == "mm"
    with DXchangeFile(tmp_path / "b.h5", detector_spacing=0.2, detector_offset=0.1) as file:
        assert (file.geometry.detector_spacing, file.geometry.detector_offset) == (0.2, 0.1)
    with pytest.raises(ReconError, match=r"6\.5 furlong, cannot be used"):
        DXchangeFile(write(tmp_path / "c.h5", pixel=(6.5, "furlong")))


def test_darks_are_optional(tmp_path):
    with DXchangeFile(write(tmp_path / "a.h5", data_dark=None)) as file:
        assert file.read_slice(0).darks is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "no dataset 'exchange/data'"),
        ({"data_white": None}, "no dataset 'exchange/data_white'"),
        ({"theta": None}, "no dataset 'exchange/theta', so no angles"),
        ({"theta": np.deg2rad(THETA)}, "theta' holds 10 angles that span 2.827 degrees only.*radians"),
        ({"theta": THETA, "theta_units": "radians"}, "theta' spans 162 radians.*degrees"),
        ({"theta": THETA[:4]}, "holds 4 angles for 10 views"),
        ({"data": np.ones((4, 5))}, r"real \(views, slices, detectors\), got float64 \(4, 5\)"),
        ({"data_dark": np.ones((1, 3, 7))}, r"'exchange/data_dark' has slices of \(3, 7\), but .* \(3, 8\)"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path, changes, message):
    path = write(tmp_path / "a.h5", **changes)
    with pytest.raises(ReconError, match=message) as error:
        DXchangeFile(path)
    assert str(error.value).startswith(str(path))


def test_slices_that_cannot_be_read(tmp_path):
    data = datasets()["data"].astype(np.float32)
    data[0, 1, 0], data[0, 2, 0] = -5, np.nan
    with DXchangeFile(write(tmp_path / "a.h5", data=data)) as file:
        assert file.read_slice(0).num_slices == 1
        with pytest.raises(ReconError, match="the sinogram holds negative values, which are no counts"):
            file.read_slice(1)
        with pytest.raises(ReconError, match="the sinogram holds NaN"):
            file.read_slice(2)
        for index in (-1, 3):
            with pytest.raises(ReconError, match=f"no slice {index}, the file has 3"):
                file.read_slice(index)
    with pytest.raises(ReconError, match="closed file"):
        file.read_slice(0)


def test_what_is_no_file_of_this_format(tmp_path):
    with pytest.raises(ReconError, match="there is no such file"):
        DXchangeFile(tmp_path / "none.h5")
    whole = write(tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReconError, match=r"cut\.h5 cannot be read as HDF5, it may be cut short"):
        DXchangeFile(tmp_path / "cut.h5")
