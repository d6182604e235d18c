from __future__ import annotations

import sys
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from recon.errors import ReconError
from recon.io.ct_nifti import write_ct_nifti
from recon.io.ct_volume import CTVolume
from recon.io.dicom_series import read_dicom_series, write_dicom_series

SHAPE = (5, 7)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def stored_values(count=4):
    return np.random.default_rng(0).integers(0, 4095, (count, *SHAPE)).astype(np.uint16)


def write_slice(path, pixels, z, number, series="1.2.3", **changes):
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.dataset.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.SeriesNumber = "CT", series, 3
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "12345", "19700101"
    data.InstanceNumber, data.AcquisitionNumber = number, 1
    data.ImagePositionPatient, data.ImageOrientationPatient = [-10.0, -20.0, z], list(AXIAL)
    data.PixelSpacing, data.SliceThickness, data.ConvolutionKernel = [0.8, 0.7], 2.5, "B30f"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = pixels.astype("<u2").tobytes()
    for key, value in changes.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, count=4, step=2.5, **changes):
    """Slices whose names, numbers and positions are in three different orders."""
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(stored_values(count)):
        write_slice(
            folder / f"{(index * 3) % count}.dcm", pixels, 100 + step * index, count - index, **changes
        )
    return folder


def edit(path, **changes):
    data = pydicom.dcmread(path)
    for key, value in changes.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    data.save_as(path)


def test_slices_are_sorted_by_position(tmp_path):
    folder = write_series(tmp_path / "series")
    (folder / "notes.txt").write_text("not an image")
    volume = read_dicom_series(folder)
    assert volume.hu.dtype == torch.float32
    np.testing.assert_array_equal(volume.hu, stored_values().astype(float) - 1024)
    assert volume.pixel_spacing == (0.8, 0.7)
    assert volume.slice_spacing == 2.5
    assert volume.origin == (-10.0, -20.0, 100.0)
    assert volume.orientation == AXIAL
    assert volume.metadata["kernel"] == "B30f"
    files = sorted(folder.glob("*.dcm"), reverse=True)
    assert torch.equal(read_dicom_series(files).hu, volume.hu)


def test_nothing_of_the_patient_is_kept(tmp_path):
    text = repr(read_dicom_series(write_series(tmp_path / "series")).metadata)
    for secret in ("Doe", "Jane", "12345", "1970"):
        assert secret not in text


def test_each_slice_has_its_own_rescaling(tmp_path):
    folder = write_series(tmp_path / "series")
    edit(folder / "3.dcm", RescaleSlope=0.5, RescaleIntercept=-10)
    volume = read_dicom_series(folder)
    np.testing.assert_allclose(volume.hu[1], stored_values()[1] * 0.5 - 10)
    np.testing.assert_allclose(volume.hu[2], stored_values()[2] - 1024.0)


def test_padding_outside_of_the_circle_is_air(tmp_path):
    pixels = stored_values(1)[0]
    pixels[0, :3] = 0
    path = write_slice(tmp_path / "a.dcm", pixels, 0, 1, PixelPaddingValue=0, RescaleIntercept=-2000)
    hu = read_dicom_series(path).hu[0]
    assert (hu[0, :3] == -1000).all()
    np.testing.assert_array_equal(hu[1:], pixels[1:].astype(float) - 2000)


def test_coronal_slices(tmp_path):
    orientation = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]
    for index, pixels in enumerate(stored_values(3)):
        write_slice(
            tmp_path / f"{index}.dcm", pixels, 0, 1,
            ImageOrientationPatient=orientation, ImagePositionPatient=[1.0, 5.0 - 2 * index, 9.0],
        )  # fmt: skip
    volume = read_dicom_series(tmp_path)
    np.testing.assert_allclose(volume.normal, [0, 1, 0])
    np.testing.assert_array_equal(volume.hu, stored_values(3)[::-1].astype(float) - 1024)
    assert volume.origin == (1.0, 1.0, 9.0)


def test_a_missing_slice_is_named(tmp_path):
    folder = write_series(tmp_path / "series", 8)
    lost = next(path for path in folder.iterdir() if pydicom.dcmread(path).ImagePositionPatient[2] == 107.5)
    lost.unlink()
    with pytest.raises(
        ReconError, match=r"\.dcm: 1 slices are missing between it and .*, which are 5 mm apart"
    ):
        read_dicom_series(folder)


def test_a_series_cut_short_is_told_by_its_header(tmp_path):
    folder = write_series(tmp_path / "series", ImagesInAcquisition=6)
    with pytest.raises(
        ReconError, match="the acquisition has 6 images, but there are 4: the series is cut short"
    ):
        read_dicom_series(folder)


def test_several_series_must_be_chosen_from(tmp_path):
    folder = write_series(tmp_path / "series")
    write_slice(folder / "scout.dcm", stored_values(1)[0], 5, 1, series="9.9", SeriesNumber=1)
    with pytest.raises(ReconError, match=r"there are 2 series \(number 3: 4 files.*number 1: 1 files"):
        read_dicom_series(folder)
    for series in ("1.2.3", 3):
        assert len(read_dicom_series(folder, series=series).hu) == 4
    with pytest.raises(ReconError, match="there is no series 7"):
        read_dicom_series(folder, series=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PixelSpacing": [0.8, 0.9]}, r"differs from 0\.dcm in PixelSpacing"),
        ({"ImageOrientationPatient": [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]}, "in ImageOrientationPatient"),
        ({"ImagePositionPatient": [-10.0, -20.0, 103.4]}, "mm apart"),
        ({"ImagePositionPatient": [-10.0, -20.0, 100.0]}, "at the same position"),
        ({"ImagePositionPatient": [-10.0, -19.0, 102.5]}, "shifted by 1 mm within its plane"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient must be 3 numbers, got None"),
        ({"RescaleSlope": None}, "no RescaleSlope or no RescaleIntercept, so no Hounsfield units"),
        ({"NumberOfFrames": 3}, "several frames"),
        ({"PixelData": b"\0" * 40}, "its pixels cannot be read, it may be cut short"),
        ({"PixelData": None}, "has no pixels"),
    ],
)
def test_a_slice_that_does_not_fit(tmp_path, changes, message):
    folder = write_series(tmp_path / "series")
    edit(folder / "3.dcm", **changes)
    with pytest.raises(ReconError, match=message):
        read_dicom_series(folder)


def test_a_damaged_thickness(tmp_path):
    path = write_slice(tmp_path / "a.dcm", stored_values(1)[0], 0, 1)
    thickness = b"\x18\x00\x50\x00DS\x04\x00"
    path.write_bytes(path.read_bytes().replace(thickness + b"2.5 ", thickness + b"xxxx"))
    with pytest.raises(ReconError, match=r"a\.dcm: SliceThickness must be 1 numbers, got xxxx"):
        read_dicom_series(path)


def test_files_that_are_no_ct_images(tmp_path):
    with pytest.raises(ReconError, match="there is no DICOM file"):
        read_dicom_series(tmp_path)
    with pytest.raises(ReconError, match=r"none\.dcm: there is no such file"):
        read_dicom_series(tmp_path / "none.dcm")
    (tmp_path / "text.dcm").write_text("hello")
    with pytest.raises(ReconError, match=r"text\.dcm is no DICOM file, or is cut short"):
        read_dicom_series(tmp_path)
    (tmp_path / "text.dcm").unlink()
    write_slice(tmp_path / "mr.dcm", stored_values(1)[0], 0, 1, Modality="MR")
    with pytest.raises(ReconError, match=r"mr\.dcm: it and the files beside it are no CT images"):
        read_dicom_series(tmp_path)


def test_files_cut_short(tmp_path):
    whole = write_slice(tmp_path / "a.dcm", stored_values(1)[0], 0, 1).read_bytes()
    for size in (len(whole) - 20, len(whole) - 400, 200, 100):
        (tmp_path / "a.dcm").write_bytes(whole[:size])
        with pytest.raises(ReconError, match=r"a\.dcm"):
            read_dicom_series(tmp_path)


def test_without_pydicom(tmp_path, monkeypatch):
    path = write_slice(tmp_path / "a.dcm", stored_values(1)[0], 0, 1)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ReconError, match=r"pip install 'dis-recon\[dicom\]'"):
        read_dicom_series(path)


# Out


def volume(**changes):
    hu = 500 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {
        "hu": hu,
        "pixel_spacing": (0.8, 0.7),
        "slice_spacing": 2.0,
        "origin": (-3.0, 4.0, 100.0),
        "orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    }
    return CTVolume(**(given | changes))


def test_written_series_is_read_back(tmp_path):
    files = write_dicom_series(tmp_path / "out" / "series", volume(), description="mean of 8 samples")
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm", "0003.dcm"]
    found = read_dicom_series(tmp_path / "out" / "series")
    np.testing.assert_allclose(found.hu, volume().hu, atol=0.5 + 1e-3)
    assert torch.equal(found.hu, volume().hu.round())
    for name in ("pixel_spacing", "slice_spacing", "origin", "orientation"):
        assert getattr(found, name) == pytest.approx(getattr(volume(), name))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["series"]


def test_written_series_says_what_it_is_and_nothing_of_the_patient(tmp_path):
    files = write_dicom_series(
        tmp_path / "series", volume(), description="x" * 80, derivation="dds, 8 samples"
    )
    slices = [pydicom.dcmread(file) for file in files]
    for data in slices:
        assert data.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert data.SeriesDescription.endswith("x, not for diagnostic use")
        assert len(data.SeriesDescription) == 64
        assert data.DerivationDescription == "dds, 8 samples"
        assert data.PatientIdentityRemoved == "YES"
        for key in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AccessionNumber"):
            assert not data[key].value
        assert (data.RescaleType, data.BitsStored, data.PixelRepresentation) == ("HU", 16, 1)
    assert len({data.SOPInstanceUID for data in slices}) == 3
    assert len({data.SeriesInstanceUID for data in slices}) == 1
    again = write_dicom_series(tmp_path / "again", volume(), study_uid=slices[0].StudyInstanceUID)
    other = pydicom.dcmread(again[0])
    assert other.StudyInstanceUID == slices[0].StudyInstanceUID
    assert other.SeriesInstanceUID != slices[0].SeriesInstanceUID


def test_fine_steps_for_a_standard_deviation(tmp_path):
    std = volume(hu=volume().hu.abs() / 100)
    write_dicom_series(tmp_path / "std", std, slope=0.01)
    np.testing.assert_allclose(read_dicom_series(tmp_path / "std").hu, std.hu, atol=0.005 + 1e-5)


def test_folders_that_exist(tmp_path):
    folder = tmp_path / "series"
    write_dicom_series(folder, volume())
    with pytest.raises(ReconError, match="series: not overwritten, it exists"):
        write_dicom_series(folder, volume())
    half = volume(hu=volume().hu[:2])
    write_dicom_series(folder, half, overwrite=True)
    assert len(read_dicom_series(folder).hu) == 2
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ReconError, match="not overwritten"):
        write_dicom_series(folder, half, overwrite=True)
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("high", [4e4, -7e6, 3276.8])
def test_values_beyond_16_bits_are_stored_in_larger_steps(tmp_path, high):
    hu = torch.linspace(0, high, 8).reshape(2, 2, 2)
    write_dicom_series(tmp_path / "series", volume(hu=hu), slope=0.1)
    np.testing.assert_allclose(read_dicom_series(tmp_path / "series").hu, hu, atol=0.501 * abs(high) / 32767)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ReconError, match="slope of stored values must be positive, got 0"):
        write_dicom_series(tmp_path / "series", volume(), slope=0)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ReconError, match="cannot be written"):
        write_dicom_series(blocked / "series", volume())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hu": torch.ones(5, 7)}, r"float32 \(slices, height, width\), got torch\.float32 \(5, 7\)"),
        ({"hu": torch.ones(1, 5, 7).double()}, r"got torch\.float64"),
        ({"hu": torch.ones(1, 5, 7) / 0}, "NaN or infinite"),
        ({"pixel_spacing": (0.0, 1.0)}, "must be positive"),
        ({"slice_spacing": float("nan")}, "must be positive"),
        ({"orientation": (1.0, 0, 0, 1.0, 0, 0)}, "not two orthogonal directions"),
    ],
)
def test_what_is_no_volume(changes, message):
    with pytest.raises(ReconError, match=message):
        volume(**changes)


# NIfTI


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_has_values_and_positions(tmp_path, name):
    write_ct_nifti(tmp_path / "out" / name, volume())
    image: Any = nibabel.load(tmp_path / "out" / name)
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume().hu.numpy().transpose(2, 1, 0))
    # Rows run along y, columns along -z, slices along -x; NIfTI's x and y are the opposite of DICOM's.
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [3, -4, 100, 1])
    np.testing.assert_allclose(image.affine @ [1, 0, 0, 0], [0, -0.7, 0, 0], atol=1e-6)
    np.testing.assert_allclose(image.affine @ [0, 1, 0, 0], [0, 0, -0.8, 0], atol=1e-6)
    np.testing.assert_allclose(image.affine @ [0, 0, 1, 0], [2, 0, 0, 0], atol=1e-6)
    assert b"not for diagnostic use" in image.header["descrip"].item()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_nifti_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ReconError, match=r"ends in \.nii or \.nii\.gz"):
        write_ct_nifti(tmp_path / "a.hdr", volume())
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ReconError, match="cannot be written"):
        write_ct_nifti(blocked / "a.nii", volume())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ReconError, match=r"dis-recon\[nifti\]"):
        write_ct_nifti(tmp_path / "a.nii", volume())
