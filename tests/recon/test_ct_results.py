from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import torch

from recon.errors import ReconError
from recon.io.ct_results import CTReconstructionWriter, read_ct_result


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def write(path, units="HU", slices=2):
    with CTReconstructionWriter(path, slices, (4, 5), {"seed": 1}, units=units) as writer:
        for index in range(slices):
            writer.write_slice(index, images(4, 5) + index, images(4, 5).abs())
    return path


@pytest.mark.parametrize("units", ["HU", "1/mm", "1/element"])
def test_images_with_units_and_provenance(tmp_path, units):
    path = write(tmp_path / "out" / "a.h5", units)
    mean, std, found = read_ct_result(path)
    np.testing.assert_array_equal(mean[1], images(4, 5) + 1)
    np.testing.assert_array_equal(std[0], images(4, 5).abs())
    assert found == units
    with h5py.File(path) as file:
        assert file["reconstruction"].dtype == np.float32
        assert json.loads(file.attrs["provenance"]) == {"seed": 1}
        assert file.attrs["not_for_diagnostic_use"]
        assert "samples" not in file
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["a.h5"]


def test_samples_are_real(tmp_path):
    samples = images(3, 4, 5)
    with CTReconstructionWriter(tmp_path / "a.h5", 1, (4, 5), {}, units="HU", num_samples=3) as writer:
        with pytest.raises(ReconError, match="'samples' must be real, got complex64"):
            writer.write_slice(0, samples.mean(0), samples.std(0), samples * 1j)
        writer.write_slice(0, samples.mean(0), samples.std(0), samples)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["samples"].dtype == np.float32
        np.testing.assert_array_equal(file["samples"][0], samples)


def test_earlier_results_are_replaced_and_data_are_not(tmp_path):
    path = write(tmp_path / "a.h5")
    write(path, "1/mm", slices=1)
    assert read_ct_result(path)[0].shape == (1, 4, 5)
    for name in ("exchange/data", "data", "kspace"):
        with h5py.File(tmp_path / "data.h5", "w") as file:
            file[name] = np.ones(3)
        before = (tmp_path / "data.h5").read_bytes()
        with pytest.raises(ReconError, match="not overwritten, it is HDF5 and no earlier reconstruction"):
            write(tmp_path / "data.h5")
        assert (tmp_path / "data.h5").read_bytes() == before


def write_half(path):
    with CTReconstructionWriter(path, 2, (4, 5), {}, units="HU") as writer:
        writer.write_slice(0, images(4, 5), images(4, 5))


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(ReconError, match=r"slices \[1\] were not written"):
        write_half(tmp_path / "a.h5")
    with pytest.raises(ReconError, match=r"units are one of 1/mm, HU, 1/element, not '1/cm'"):
        write(tmp_path / "a.h5", "1/cm")
    assert list(tmp_path.iterdir()) == []


def test_results_without_units(tmp_path):
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file.attrs["units"]
    with pytest.raises(ReconError, match="'units' is None, not one of"):
        read_ct_result(path)
