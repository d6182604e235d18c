"""Results of CT in the formats of viewers: read back, they are the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch

from recon import ReconError
from recon.ct_export import check_exportable, check_formats, export
from recon.io.ct_files import Placement
from recon.io.ct_results import CTReconstructionWriter
from recon.io.dicom_series import read_dicom_series

MU = 0.02
SHAPE = (6, 5)


def provenance(indices=(2, 4)):
    return {
        "notice": "not for diagnostic use",
        "solver": {"name": "DDS", "nfe": 30, "eta": 1.0},
        "prior": {"name": "chest", "sha256": "abc123"},
        "versions": {"dis-recon": "0.1.0"},
        "seed": 7,
        "num_samples": 8,
        "geometry": {"name": "FanBeam", "angles_degrees": [0.0, 90.0], "views_of_the_file": 720},
        "image": {"shape": list(SHAPE), "pixel_size": 1.5},
        "mu_water": MU,
        "slices": [{"index": index} for index in indices],
    }


def images(seed):
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def result(folder, units):
    """A result of two slices; mean and standard deviation in HU are ``300 z`` and ``20 |z|``."""
    mean, std = 300 * images(0), 20 * images(1).abs()
    if units == "1/mm":
        mean, std = MU * (1 + mean / 1000), MU * std / 1000
    path = folder / "scan.h5"
    with CTReconstructionWriter(path, 2, SHAPE, provenance(), units=units) as writer:
        for index in range(2):
            writer.write_slice(index, mean[index], std[index])
    return path, mean.numpy(), std.numpy()


PLACEMENT = Placement(2.0, (-3.0, 4.0, 100.0), (0.0, 1.0, 0.0, 0.0, 0.0, -1.0))


@pytest.mark.parametrize("units", ["HU", "1/mm", "1/element"])
def test_nifti_holds_the_same_numbers(tmp_path, units):
    path, mean, std = result(tmp_path, units)
    files = export(path, ["nifti"], provenance(), PLACEMENT)
    assert [file.name for file in files] == ["scan.nii.gz", "scan_std.nii.gz"]
    for file, values in zip(files, (mean, std), strict=True):
        found: Any = nibabel.load(file)
        np.testing.assert_array_equal(np.asarray(found.dataobj), values.transpose(2, 1, 0))
        assert found.header["descrip"].item().decode() == f"{units}, not for diagnostic use"
        (comment,) = found.header.extensions
        assert json.loads(comment.get_content()) == provenance()
        assert found.header.get_xyzt_units()[0] == ("unknown" if units == "1/element" else "mm")
        # Slices 2 and 4 of the source, whose slices are 2 mm apart along -x: turned to NIfTI, along x.
        np.testing.assert_allclose(found.affine @ [0, 0, 0, 1], [3 + 2 * 2.0, -4, 100, 1])
        np.testing.assert_allclose(found.affine @ [0, 0, 1, 0], [4, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("units", ["HU", "1/mm"])
def test_dicom_holds_hounsfield_units(tmp_path, units):
    path, _, _ = result(tmp_path, units)
    folders = export(path, ["dicom"], provenance(), PLACEMENT)
    assert folders == [tmp_path / "scan_dicom" / "mean", tmp_path / "scan_dicom" / "std"]
    mean, std = (read_dicom_series(folder) for folder in folders)
    np.testing.assert_allclose(mean.hu, 300 * images(0), atol=0.501)
    np.testing.assert_allclose(std.hu, 20 * images(1).abs(), atol=0.0501)
    assert mean.pixel_spacing == std.pixel_spacing == (1.5, 1.5)
    assert mean.slice_spacing == 4.0
    np.testing.assert_allclose(mean.origin, np.array([-3.0, 4.0, 100.0]) + 4.0 * mean.normal)
    slices = [pydicom.dcmread(folder / "0001.dcm") for folder in folders]
    assert len({data.StudyInstanceUID for data in slices}) == 1
    assert len({data.FrameOfReferenceUID for data in slices}) == 1
    assert len({data.SeriesInstanceUID for data in slices}) == 2
    assert slices[0].SeriesDescription == "mean, DDS, 8 samples, not for diagnostic use"
    text = slices[1].DerivationDescription
    for fact in ("DDS (nfe=30, eta=1.0)", "prior chest sha256 abc123", "seed 7", "2 of 720 views"):
        assert fact in text
    # Earlier files of a result are replaced.
    export(path, ["dicom"], provenance(), PLACEMENT)
    assert len(list(folders[0].iterdir())) == 2


def test_without_a_placement_slices_are_a_pixel_apart(tmp_path):
    path, _, _ = result(tmp_path, "HU")
    (file, _) = export(path, ["nifti"], provenance((3, 4)))
    found: Any = nibabel.load(file)
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), 1.5)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ReconError, match="written as nifti or dicom too, not as 'png'"):
        check_formats(["nifti", "png"])
    monkeypatch.setattr("recon.ct_export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReconError, match=r"dicom needs pydicom: .*'dis-recon\[dicom\]'"):
        check_formats(["dicom"])
    source = Path("scan.h5")
    with pytest.raises(ReconError, match=r"scan\.h5: DICOM holds Hounsfield units, and the size"):
        check_exportable(["dicom"], "1/element", [0], source)
    for slices in ([0, 1, 3], [2, 1], [1, 1]):
        with pytest.raises(ReconError, match=r"scan\.h5: the slices of a volume follow each other"):
            check_exportable(["nifti"], "HU", slices, source)
        check_exportable([], "HU", slices, source)
    check_exportable(["nifti", "dicom"], "HU", [1, 3, 5], source)
    check_exportable(["nifti"], "1/element", [4], source)
