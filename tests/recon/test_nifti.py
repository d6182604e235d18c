from __future__ import annotations

import gzip
import sys

import nibabel
import numpy as np
import pytest
import torch

from recon.errors import ReconError
from recon.io.nifti import read_folder, read_volume


def write(path, data, dtype=None):
    data = np.asarray(data, dtype=dtype)
    path.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    return path


def volume(shape=(6, 5, 4)):
    return np.random.default_rng(0).uniform(0, 100, shape).astype(np.float32)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_slices_rows_and_columns(tmp_path, name, dtype):
    data = volume().astype(dtype)
    images = read_volume(write(tmp_path / name, data))
    assert images.dtype == torch.float32
    assert images.shape == (4, 5, 6)
    for index in range(4):
        np.testing.assert_array_equal(images[index], data[:, :, index].T.astype(np.float32))


def test_scaled_integers(tmp_path):
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -1)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii")[3, 2, 1] == 0.5 * 23 - 1


def test_negative_values_and_a_series_of_one(tmp_path):
    data = volume()[..., None] - 50
    images = read_volume(write(tmp_path / "a.nii", data))
    np.testing.assert_array_equal(images, data[..., 0].transpose(2, 1, 0).clip(0))


def test_folders_are_read_by_name(tmp_path):
    for number, name in enumerate(["p2/b.nii", "p2/a.nii.gz", "p1/sub/c.nii"]):
        write(tmp_path / name, np.full((2, 2, 2), number), np.int16)
    (tmp_path / "p2" / "notes.txt").write_text("not an image")
    single = write(tmp_path / "z.nii", np.full((2, 2, 2), 9), np.int16)
    volumes = read_folder([single, tmp_path / "p1", tmp_path / "p2"])
    assert [int(images[0, 0, 0]) for images in volumes] == [9, 2, 1, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReconError, match=r"no NIfTI file in .*empty"):
        read_folder([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("data", "dtype", "pattern"),
    [
        (np.ones((3, 3)), np.float32, r"a.nii holds an array of shape \(3, 3\); a volume has three axes"),
        (np.ones((3, 3, 3, 2)), np.float32, r"a.nii holds an array of shape \(3, 3, 3, 2\)"),
        (np.full((2, 2, 2), np.nan), np.float32, "a.nii holds values that are not finite"),
        (np.ones((2, 2, 2)), np.complex64, "a.nii holds values of type complex64; magnitude images are real"),
        (np.zeros((2, 2, 2)), [("R", "u1"), ("G", "u1"), ("B", "u1")], "a.nii holds values of type"),
    ],
)
def test_arrays_that_are_no_magnitude_volume(tmp_path, data, dtype, pattern):
    with pytest.raises(ReconError, match=pattern):
        read_volume(write(tmp_path / "a.nii", data, dtype))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ReconError, match=r"absent.nii: there is no such file"):
        read_volume(tmp_path / "absent.nii")
    whole = write(tmp_path / "whole.nii", volume((20, 20, 20))).read_bytes()
    packed = gzip.compress(whole)
    damaged = {
        "text.nii": b"this is no image",
        "empty.nii": b"",
        "short.nii": whole[:-1000],
        "header.nii": whole[:300],
        "type.nii": whole[:70] + b"\xff\x7f" + whole[72:],
        "short.nii.gz": packed[:-1000],
        "block.nii.gz": packed[:10] + b"\xff" * 1000,
        "text.nii.gz": b"this is no image",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ReconError, match=f"{name} cannot be read as NIfTI"):
            read_volume(tmp_path / name)


def test_without_nibabel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ReconError, match=r"needs nibabel: .*dis-recon\[nifti\]"):
        read_volume(write(tmp_path / "a.nii", volume()))
