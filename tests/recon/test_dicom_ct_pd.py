from __future__ import annotations

import math
import struct

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from operators.ct_geometry import FanBeam
from recon.errors import ReconError
from recon.io.dicom_ct_pd import read_dicom_ct_pd
from tests.operators.discs import OBJECT, disc_sinogram

DSO, DSD, SPACING = 60.0, 100.0, 0.5
COLUMNS, ROWS, CENTRAL = 64, 4, (31.25, 2.5)
ANGLES = np.linspace(0.3, 0.3 + 2 * math.pi, 12, endpoint=False) % (2 * math.pi)
SLOPE, INTERCEPT = 1e-4, -0.1


def projection(phi):
    """Line integrals of OBJECT, column by column, from the format's own formulae."""
    source = DSO * np.array([-math.sin(phi), math.cos(phi)])
    column = np.arange(1, COLUMNS + 1)
    gamma = (column - CENTRAL[0]) * SPACING / DSD  # counterclockwise from the central ray
    central = -source / DSO
    direction = np.stack(
        [
            central[0] * np.cos(gamma) - central[1] * np.sin(gamma),
            central[0] * np.sin(gamma) + central[1] * np.cos(gamma),
        ]
    )
    total = np.zeros(COLUMNS)
    for x, y, radius, attenuation in OBJECT:
        across = (x - source[0]) * direction[1] - (y - source[1]) * direction[0]
        total += 2 * attenuation * np.sqrt(np.clip(radius**2 - across**2, 0, None))
    return total


def write(folder, syntax=ExplicitVRLittleEndian, transposed=True, unknown=False, edit=None):
    folder.mkdir(exist_ok=True)
    for index, phi in enumerate(ANGLES):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = syntax
        data = pydicom.dataset.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Modality, data.InstanceNumber, data.PatientID = "CT", index + 1, "12345"
        tags = {
            (0x7031, 0x1001): phi,
            (0x7031, 0x1002): -100.0,
            (0x7031, 0x1003): DSO,
            (0x7031, 0x1031): DSD,
            (0x7031, 0x1033): CENTRAL,
            (0x7029, 0x1002): SPACING,
            (0x7029, 0x1006): 0.6,
            (0x7029, 0x100B): "CYLINDRICAL",
            (0x7029, 0x1010): ROWS,
            (0x7029, 0x1011): COLUMNS,
            (0x7033, 0x100B): 0.0,
            (0x7041, 0x1001): 0.0192,
        }
        values = np.round((projection(phi) - INTERCEPT) / SLOPE)
        # The plane of the source lies between rows 2 and 3; others hold something else.
        pixels = np.stack([values + 500, values - 40, values + 40, values + 900]).astype("<u2")
        pixels = pixels.T if transposed else pixels
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = str(SLOPE), str(INTERCEPT)
        data.PixelData = np.ascontiguousarray(pixels).tobytes()
        if edit is not None:
            edit(index, tags, data)
        for tag, value in tags.items():
            add(data, tag, value, unknown)
        data.save_as(folder / f"{(index * 5) % len(ANGLES)}.dcm", enforce_file_format=True)
    return folder


def add(data, tag, value, unknown):
    numbers = np.atleast_1d(value).tolist()
    if isinstance(value, str):
        vr, raw = "CS", value.encode().ljust(len(value) + len(value) % 2)
    elif isinstance(value, int):
        vr, raw = "US", struct.pack("<H", value)
    elif tag == (0x7041, 0x1001):
        vr, raw, value = "DS", f"{value} ".encode(), str(value)
    else:
        vr, raw = "FL", struct.pack(f"<{len(numbers)}f", *numbers)
        value = numbers if len(numbers) > 1 else value
    data.add_new(tag, "UN", raw) if unknown else data.add_new(tag, vr, value)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"]
)
@pytest.mark.parametrize("unknown", [False, True], ids=["typed", "bytes"])
@pytest.mark.parametrize("transposed", [False, True])
def test_axial_scan_on_a_curved_detector(tmp_path, syntax, unknown, transposed):
    scan = read_dicom_ct_pd(write(tmp_path / "pd", syntax, transposed, unknown))
    assert scan.kind == "line_integrals"
    assert scan.metadata == {"mu_water": pytest.approx(0.0192)}
    geometry = scan.geometry
    assert isinstance(geometry, FanBeam)
    assert geometry.detector == "curved"
    assert (geometry.source_origin, geometry.source_detector) == (DSO, DSD)
    # Our own fan geometry, from what was read, sees the object as the file holds it.
    expected = disc_sinogram(geometry)
    np.testing.assert_allclose(scan.sinogram[0], expected, atol=2 * SLOPE)
    assert float(expected.max()) > 0.3


def test_flat_detector(tmp_path):
    def flat(index, tags, data):
        tags[(0x7029, 0x100B)] = "FLAT"

    geometry = read_dicom_ct_pd(write(tmp_path / "pd", edit=flat)).geometry
    assert isinstance(geometry, FanBeam)
    assert geometry.detector == "flat"


def test_three_turns(tmp_path):
    def turning(index, tags, data):
        tags[(0x7031, 0x1001)] = 1.7 * index % (2 * math.pi)

    geometry = read_dicom_ct_pd(write(tmp_path / "pd", edit=turning)).geometry
    assert geometry is not None
    expected = np.exp(1j * (1.7 * np.arange(len(ANGLES)) + math.pi))
    np.testing.assert_allclose(np.exp(1j * np.array(geometry.angles)), expected, atol=1e-6)


def change(tag, value, only=None):
    def edit(index, tags, data):
        if only in (None, index):
            tags.pop(tag) if value is None else tags.__setitem__(tag, value)

    return edit


def helical(index, tags, data):
    tags[(0x7031, 0x1002)] = -100.0 + 0.2 * index


def cut(index, tags, data):
    if index == 4:
        data.PixelData = data.PixelData[:100]


def unnumbered(index, tags, data):
    if index == 4:
        del data.InstanceNumber


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (helical, r"moves by 2\.2 mm along the axis between projections; helical scans are not supported"),
        (change((0x7033, 0x100B), 0.001, 4), r"flying focal spot \(angular shift\), which is not supported"),
        (change((0x7033, 0x100C), 0.5), r"flying focal spot \(axial shift\)"),
        (change((0x7031, 0x1001), None, 4), r"the tag \(7031,1001\), angular position, is missing"),
        (change((0x7031, 0x1003), None), r"the tag \(7031,1003\), distance of source and axis, is missing"),
        (change((0x7031, 0x1003), math.nan), "holds no usable number"),
        (change((0x7031, 0x1031), 101.0, 4), "in its geometry"),
        (change((0x7031, 0x1033), (70.0, 2.5)), "central column, 70, is not one of the 64"),
        (change((0x7031, 0x1033), (31.0, 9.0)), "central row, 9, is not one of the 4"),
        (change((0x7029, 0x1011), 65), r"array of shape \(64, 4\), but its tags say 4 detector rows and 65"),
        (change((0x7031, 0x1001), 45.0, 4), "these look like degrees"),
        (cut, "its pixels cannot be read, it may be cut short"),
        (unnumbered, "has no InstanceNumber"),
    ],
)
def test_what_cannot_be_read(tmp_path, edit, message):
    with pytest.raises(ReconError, match=message) as error:
        read_dicom_ct_pd(write(tmp_path / "pd", edit=edit))
    assert str(error.value).startswith(str(tmp_path / "pd"))


def test_no_files(tmp_path):
    with pytest.raises(ReconError, match="there is no DICOM file"):
        read_dicom_ct_pd(tmp_path)
    (tmp_path / "a.dcm").write_text("hello")
    with pytest.raises(ReconError, match=r"a\.dcm is no DICOM file"):
        read_dicom_ct_pd(tmp_path)
