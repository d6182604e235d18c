"""Files of CT series in HU: what is read, what a path may name, and every way in which a file can be bad."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from recon.errors import ReconError
from recon.io.hu_volumes import read_hu_volumes


def write(path, **series):
    """Write series by name, each a dictionary of its data ``hu`` (absent: no dataset) and attributes."""
    with h5py.File(path, "w") as file:
        for name, facts in series.items():
            group = file.create_group(name)
            if "hu" in facts:
                group["hu"] = facts["hu"]
            group.attrs.update({key: value for key, value in facts.items() if key != "hu"})
    return path


def hu(slices=3, dtype=np.int16):
    return np.random.default_rng(0).integers(-1024, 3071, (slices, 4, 5)).astype(dtype)


@pytest.fixture
def file(tmp_path):
    facts = {
        "pixel_spacing_mm": np.array([0.7, 0.8]),
        "z_mm": np.array([0.0, 2.5, 5.0]),
        "kernel": "B",
        "licence": "CC BY 4.0",
    }
    return write(
        tmp_path / "chest.h5",
        one={"hu": hu(), "patient": "P1", **facts},
        two={"hu": hu(2, np.float64), "patient": "P2"},
        three={"hu": hu(1), "patient": "P1"},
        four={"hu": hu(1)},
    )


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_values_are_read_as_they_are(tmp_path, dtype):
    (volume,) = read_hu_volumes(write(tmp_path / "a.h5", a={"hu": hu(dtype=dtype)}))
    assert volume.hu.dtype == torch.float32
    np.testing.assert_array_equal(volume.hu, hu().astype(np.float32))
    assert (volume.patient, volume.pixel_spacing, volume.z, volume.attributes) == ("a", None, None, {})


def test_attributes(file):
    volumes = {volume.name: volume for volume in read_hu_volumes(file)}
    assert set(volumes) == {"one", "two", "three", "four"}
    one = volumes["one"]
    assert (one.patient, one.pixel_spacing, one.z) == ("P1", (0.7, 0.8), (0.0, 2.5, 5.0))
    assert one.attributes == {"kernel": "B", "licence": "CC BY 4.0"}
    assert volumes["two"].pixel_spacing is None


def test_a_path_may_name_a_series_or_a_patient(file):
    assert [volume.name for volume in read_hu_volumes(file / "two")] == ["two"]
    assert [volume.name for volume in read_hu_volumes(file / "P1")] == ["one", "three"]
    assert [volume.name for volume in read_hu_volumes(str(file / "four"))] == ["four"]
    with pytest.raises(
        ReconError, match=r"chest.h5 has no series and no patient 'P3'; its series: four, one, three, two"
    ):
        read_hu_volumes(file / "P3")


@pytest.mark.parametrize(
    ("facts", "pattern"),
    [
        ({}, "a.h5: s/hu: there is no such dataset"),
        ({"hu": hu()[0]}, r"a.h5: s/hu has shape \(4, 5\); a series is \(slices, height, width\)"),
        ({"hu": hu()[:0]}, r"a.h5: s/hu has shape \(0, 4, 5\)"),
        ({"hu": hu() + 1j}, "a.h5: s/hu is of type complex128; Hounsfield units are real numbers"),
        ({"hu": np.full((1, 2, 2), np.nan)}, "a.h5: s/hu holds values that are not finite"),
        ({"hu": np.full((1, 2, 2), 1e6)}, r"a.h5: s/hu holds 1e\+06 to 1e\+06, which are no Hounsfield"),
        (
            {"hu": hu(), "pixel_spacing_mm": [0.5]},
            r"s has the attribute 'pixel_spacing_mm' \[0.5\]; expected 2 numbers",
        ),
        (
            {"hu": hu(), "pixel_spacing_mm": [0.5, 0.0]},
            r"pixel_spacing_mm' \(0.5, 0.0\); it must be positive",
        ),
        ({"hu": hu(), "z_mm": [0.0, 1.0]}, r"s has the attribute 'z_mm' \[0. 1.\]; expected 3 numbers"),
        ({"hu": hu(), "z_mm": "all"}, "s has the attribute 'z_mm' all; expected 3 numbers"),
    ],
)
def test_bad_series(tmp_path, facts, pattern):
    with pytest.raises(ReconError, match=pattern):
        read_hu_volumes(write(tmp_path / "a.h5", s=facts))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ReconError, match=r"absent.h5: there is no such file"):
        read_hu_volumes(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no image")
    with pytest.raises(ReconError, match=r"text.h5 cannot be read as HDF5"):
        read_hu_volumes(tmp_path / "text.h5")
    with pytest.raises(ReconError, match=r"cannot be read as HDF5"):
        read_hu_volumes(tmp_path)
    with pytest.raises(ReconError, match=r"empty.h5 holds no groups; expected one a CT series"):
        read_hu_volumes(write(tmp_path / "empty.h5"))
