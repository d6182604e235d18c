"""DICOM-CT-PD (with the extra ``dicom``): projections of clinical scanners, one a file, in one plane.

Chen et al., "Technical note: Development and validation of an open data format for CT projection data", Med.
Phys. 42, 6964, 2015, and its user manual; tags as listed by Moen et al., "Low-dose CT image and projection
dataset", Med. Phys. 48, 902, 2021, table IV. The source stands at ``(-ρ sin φ, ρ cos φ)``, and detector
columns follow each other counterclockwise; columns are turned round here, so that they follow the u axis of
`operators.ct_geometry.FanBeam`, whose angle is ``φ + π``.

Helical scans would have to be rebinned to planes first, which is not done here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.ct_geometry import FanBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, angles_in_radians, within_two_turns
from recon.io.dicom_series import _dicom_files, _floats, read_dicom, read_pixels

_ANGLE = (0x7031, 0x1001)
_AXIAL_POSITION = (0x7031, 0x1002)
_RADIAL_DISTANCE = (0x7031, 0x1003)
_DETECTOR_DISTANCE = (0x7031, 0x1031)
_CENTRAL_ELEMENT = (0x7031, 0x1033)
_TRANSVERSE_SPACING = (0x7029, 0x1002)
_AXIAL_SPACING = (0x7029, 0x1006)
_SHAPE = (0x7029, 0x100B)
_NUM_ROWS = (0x7029, 0x1010)
_NUM_COLUMNS = (0x7029, 0x1011)
_SHIFTS = {(0x7033, 0x100B): "angular", (0x7033, 0x100C): "axial", (0x7033, 0x100D): "radial"}
_MU_WATER = (0x7041, 0x1001)

Tag = tuple[int, int]


def read_dicom_ct_pd(paths: str | Path | Iterable[str | Path]) -> CTScan:
    """Read the projections of an axial scan in the plane of the source.

    Parameters
    ----------
    paths : str, Path, or iterable of them
        Files, or a folder of them; they are sorted by InstanceNumber.

    Returns
    -------
    CTScan
        One slice of line integrals: that of the detector row facing the source, or the mean of the two beside
        it. The metadata hold ``mu_water`` in 1/mm, if the files do.

    Raises
    ------
    ReconError
        Naming the file and the tag that is missing or not usable; if the table moved between projections
        (helical); if the focal spot flew; if projections differ in geometry; or if pydicom is not installed.
    """
    files = _dicom_files(paths)
    headers = [(path, read_dicom(path)) for path in files]
    path, first = headers[0]
    if not any(_ANGLE in header for _, header in headers) and "ImagePositionPatient" in first:
        raise ReconError(f"{path} is a CT image, not a projection: --simulate makes a scan of such images")
    headers.sort(key=lambda entry: _instance(*entry))
    path, first = headers[0]

    z = np.array([_number(header, _AXIAL_POSITION, "axial position", name) for name, header in headers])
    if float(np.ptp(z)) > 0.1 * _number(first, _AXIAL_SPACING, "axial element spacing", path):
        raise ReconError(
            f"{path.parent}: the source moves by {float(np.ptp(z)):g} mm along the axis between projections; "
            "helical scans are "
            "not supported, as they must be rebinned to planes first"
        )
    for name, header in headers:
        for tag, kind in _SHIFTS.items():
            if tag in header and _number(header, tag, f"{kind} shift of the source", name) != 0:
                raise ReconError(f"{name} has a flying focal spot ({kind} shift), which is not supported")
    angles = angles_in_radians(
        np.array([_number(header, _ANGLE, "angular position", name) for name, header in headers]),
        "radians",
        f"{path.parent}: the tag (7031,1001)",
    )
    # Files count angles modulo a whole turn; in order, they go on, for as many turns as a geometry takes.
    turned = np.unwrap(angles)
    if float(np.ptp(turned)) > 4 * math.pi:
        turned = np.asarray(angles) % (2 * math.pi)
    angles = within_two_turns(turned + math.pi)

    source_origin = _number(first, _RADIAL_DISTANCE, "distance of source and axis", path)
    source_detector = _number(first, _DETECTOR_DISTANCE, "distance of source and detector", path)
    spacing = _number(first, _TRANSVERSE_SPACING, "transverse element spacing", path)
    column, row = _numbers(first, _CENTRAL_ELEMENT, 2, "central element", path)
    detector = "flat" if _text(first, _SHAPE).upper() == "FLAT" else "curved"
    constants = (_RADIAL_DISTANCE, _DETECTOR_DISTANCE, _TRANSVERSE_SPACING, _CENTRAL_ELEMENT)
    expected = [_numbers(first, tag, None, "geometry", path) for tag in constants]
    views = []
    for name, header in headers:
        found = [_numbers(header, tag, None, "geometry", name) for tag in constants]
        if not all(np.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True)):
            raise ReconError(f"{name} differs from {path.name} in its geometry")
        views.append(_view(header, name, row))
    lengths = {len(view) for view in views}
    if len(lengths) != 1:
        raise ReconError(f"{path.parent}: projections have different numbers of columns, {sorted(lengths)}")
    (columns,) = lengths
    if not 1 <= column <= columns:
        raise ReconError(f"{path}: the central column, {column:g}, is not one of the {columns}")
    # Turned round, column `column` (counted from 1) is where u = 0.
    offset = (column - (columns + 1) / 2) * spacing
    sinogram = np.stack(views)[:, ::-1].astype(np.float32)
    metadata: dict[str, str | float] = {}
    if _MU_WATER in first:
        metadata["mu_water"] = _number(first, _MU_WATER, "attenuation of water", path)
    return CTScan(
        torch.from_numpy(np.ascontiguousarray(sinogram))[None],
        "line_integrals",
        path.parent,
        FanBeam(angles, columns, spacing, source_origin, source_detector, offset, detector),
        metadata=metadata,
    )


def _instance(path: Path, header: Any) -> int:
    value = header.get("InstanceNumber")
    if value is None:
        raise ReconError(f"{path} has no InstanceNumber, so the order of projections is not known")
    return int(_floats(header, "InstanceNumber", 1, path)[0])


def _view(header: Any, path: Path, row: float) -> np.ndarray:
    """Line integrals of the plane of the source, (columns,)."""
    slope, intercept = (_floats(header, key, 1, path)[0] for key in ("RescaleSlope", "RescaleIntercept"))
    stored = read_pixels(header, path)
    rows = int(_number(header, _NUM_ROWS, "number of detector rows", path))
    columns = int(_number(header, _NUM_COLUMNS, "number of detector columns", path))
    if stored.shape == (columns, rows):  # as the published data have it
        stored = stored.T
    elif stored.shape != (rows, columns):
        raise ReconError(
            f"{path} holds an array of shape {stored.shape}, but its tags say {rows} detector rows and "
            f"{columns} columns"
        )
    if not 1 <= row <= rows:
        raise ReconError(f"{path}: the central row, {row:g}, is not one of the {rows}")
    low = min(math.floor(row), rows)
    high = min(low + 1, rows)
    weight = row - low
    values = (1 - weight) * stored[low - 1].astype(np.float64) + weight * stored[high - 1]
    return values * slope + intercept


def _numbers(header: Any, tag: Tag, count: int | None, what: str, path: Path) -> tuple[float, ...]:
    """Values of a private tag; bytes, where its type is not recorded, are 32-bit floats, uint16 or text."""
    where = f"{path}: the tag ({tag[0]:04X},{tag[1]:04X}), {what},"
    if tag not in header:
        raise ReconError(f"{where} is missing")
    value = header[tag].value
    try:
        if isinstance(value, bytes):
            values = _decode(value)
        elif isinstance(value, str | int | float):
            values = (float(value),)
        else:
            values = tuple(float(v) for v in value)
    except (TypeError, ValueError, struct.error):
        values = ()
    if not values or (count is not None and len(values) != count) or not all(map(math.isfinite, values)):
        raise ReconError(f"{where} holds no usable number: {value!r}")
    return values


def _decode(value: bytes) -> tuple[float, ...]:
    if len(value) == 2:
        return (float(struct.unpack("<H", value)[0]),)
    text = value.strip(b" \0")
    if text and all(byte in b"0123456789+-.eE\\" for byte in text):
        return tuple(float(part) for part in text.split(b"\\"))
    return struct.unpack(f"<{len(value) // 4}f", value)


def _number(header: Any, tag: Tag, what: str, path: Path) -> float:
    return _numbers(header, tag, 1, what, path)[0]


def _text(header: Any, tag: Tag) -> str:
    value = header[tag].value if tag in header else ""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip(" \0")
