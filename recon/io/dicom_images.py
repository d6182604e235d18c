"""DICOM series (with the extra ``dicom``) as training images: CT in Hounsfield units, MR magnitudes.

Other than :mod:`recon.io.dicom_series`, which reads one series to be worked on, this finds all series below a
folder, is content with gaps between slices, and keeps no geometry.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError
from recon.io.dicom_series import read_dicom, read_pixels

_NEEDED = [
    "Modality", "SeriesInstanceUID", "PatientID", "Rows", "Columns", "ImageOrientationPatient",
    "ImagePositionPatient", "InstanceNumber", "EchoNumbers", "TemporalPositionIdentifier", "NumberOfFrames",
    "ImageType", "SamplesPerPixel",
]  # fmt: skip
_AIR = -1000.0


@dataclass(frozen=True)
class DicomSeries:
    """Files of a series, in the order of their positions.

    Attributes
    ----------
    files : tuple of Path
        One a slice.
    modality : str
        ``CT`` or ``MR``.
    patient : str
        A digest of what identifies the patient in the files: equal for one patient's series, and nothing else
        can be learned from it.
    shape : tuple of int
        (H, W) of a slice.
    """

    files: tuple[Path, ...]
    modality: str
    patient: str
    shape: tuple[int, int]


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(files: Iterable[Path]) -> tuple[list[DicomSeries], list[str]]:
    """Sort files into series of CT and MR images; files of other modalities are passed over.

    A series is parted by size, orientation, echo and time point, since the slices of a volume share them; of
    MR series, images of the phase are left out.

    Parameters
    ----------
    files : iterable of Path
        DICOM files.

    Returns
    -------
    series : list of DicomSeries
        In the order of their first files.
    problems : list of str
        A sentence for each file that could not be used.
    """
    groups: dict[tuple[Any, ...], list[tuple[float, int, Path]]] = {}
    patients: dict[tuple[Any, ...], str] = {}
    problems = []
    for path in files:
        try:
            header = _header(path)
            modality = str(header.get("Modality", ""))
            parts = {str(part).upper() for part in header.get("ImageType", None) or ()}
            if modality not in ("CT", "MR") or (modality == "MR" and parts & {"P", "PHASE", "PHASE MAP"}):
                continue
            if int(header.get("NumberOfFrames", 1) or 1) != 1 or int(header.get("SamplesPerPixel", 1)) != 1:
                raise ReconError(f"{path} holds several frames or colours, which are not supported")
            shape = (int(header.get("Rows", 0) or 0), int(header.get("Columns", 0) or 0))
            if 0 in shape:
                raise ReconError(f"{path} does not say how many rows and columns it has")
            numbers = [
                [float(value) for value in header.get(key, None) or ()]
                for key in ("ImageOrientationPatient", "ImagePositionPatient")
            ]
            instance = int(header.get("InstanceNumber", 0) or 0)
        except (TypeError, ValueError) as error:  # ReconError is one
            problems.append(
                str(error) if isinstance(error, ReconError) else f"{path} has a damaged header: {error}"
            )
            continue
        orientation, position = numbers
        along = 0.0
        if len(orientation) == 6 and len(position) == 3:
            along = float(np.cross(orientation[:3], orientation[3:]) @ np.asarray(position))
        key = (
            str(header.get("SeriesInstanceUID", path.parent)),
            modality,
            shape,
            tuple(round(value, 2) for value in orientation),
            str(header.get("EchoNumbers", "")),
            str(header.get("TemporalPositionIdentifier", "")),
        )
        who = header.get("PatientID") or path.parent
        patients.setdefault(key, hashlib.blake2b(str(who).encode(), digest_size=8).hexdigest())
        groups.setdefault(key, []).append((along, instance, path))
    series = [
        DicomSeries(tuple(path for *_, path in sorted(members)), key[1], patients[key], key[2])
        for key, members in groups.items()
    ]
    return series, problems


def read_dicom_slice(path: Path) -> Tensor:
    """Read one image: CT in Hounsfield units, others as stored but for their rescaling, never below zero.

    Returns
    -------
    Tensor
        ``(H, W)`` float32.

    Raises
    ------
    ReconError
        Naming the file, if it is damaged, has no pixels or, for CT, no rescaling.
    """
    header = read_dicom(path)
    stored = read_pixels(header, path)
    if stored.ndim != 2:
        raise ReconError(f"{path} holds an array of shape {stored.shape}; an image has two axes")
    scale = []
    for key, plain in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = header.get(key)
        if value is None and header.get("Modality") == "CT":
            raise ReconError(f"{path} has no {key}, so no Hounsfield units")
        try:
            number = plain if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ReconError(f"{path}: {key} must be a number, got {value}")
        scale.append(number)
    values = stored.astype(np.float64) * scale[0] + scale[1]
    padding = header.get("PixelPaddingValue")
    if header.get("Modality") != "CT":
        values = values.clip(0)
    elif isinstance(padding, int):
        limit = header.get("PixelPaddingRangeLimit", padding)
        low, high = sorted((padding, limit if isinstance(limit, int) else padding))
        values[(stored >= low) & (stored <= high)] = _AIR
    return torch.from_numpy(values.astype(np.float32))


def _header(path: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise ReconError("DICOM needs pydicom: install the extra, pip install 'dis-recon[dicom]'") from None
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_NEEDED))
    except Exception as error:  # a damaged file ends in whatever its bytes happen to mean
        raise ReconError(f"{path} cannot be read as DICOM, it may be damaged ({error})") from None
