"""DICOM CT series (with the extra ``dicom``): image volumes in Hounsfield units, in and out."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recon.errors import ReconError
from recon.io.ct_volume import CTVolume

_AIR = -1000.0
_NOT_DIAGNOSTIC = "not for diagnostic use"
_KEPT = {
    "Manufacturer": "manufacturer",
    "ManufacturerModelName": "model",
    "ConvolutionKernel": "kernel",
    "KVP": "kvp",
    "Exposure": "exposure_mas",
    "SliceThickness": "slice_thickness_mm",
    "BodyPartExamined": "body_part",
    "PatientPosition": "patient_position",
}


def read_dicom_series(
    paths: str | Path | Iterable[str | Path], *, series: str | int | None = None
) -> CTVolume:
    """Read a CT series, one file a slice, sorted by position.

    Parameters
    ----------
    paths : str, Path, or iterable of them
        Files, or a folder whose DICOM files are read; other files in the folder are passed over.
    series : str or int, optional
        Series instance UID or series number, where there are several.

    Returns
    -------
    CTVolume
        In Hounsfield units by each slice's own RescaleSlope and RescaleIntercept. Pixels outside of the
        reconstructed circle, which the files mark by PixelPaddingValue, are air.

    Raises
    ------
    ReconError
        Naming the file, if one is absent, cut short or no CT image; if there are several series; if slices
        differ in size, spacing or orientation; if one is missing between its neighbours, or fewer are there
        than the header says the acquisition has; or if pydicom is not installed.
    """
    files = _dicom_files(paths)
    headers = [(path, read_dicom(path)) for path in files]
    headers = [(path, header) for path, header in headers if header.get("Modality") == "CT"]
    if not headers:
        raise ReconError(f"{files[0]}: it and the files beside it are no CT images")
    chosen = _one_series(headers, series)
    for path, header in chosen:
        if int(header.get("NumberOfFrames", 1) or 1) != 1:
            raise ReconError(
                f"{path} holds several frames (enhanced CT), which is not supported: one slice a file"
            )
    first_path, first = chosen[0]
    shape = (_int(first, "Rows", first_path), _int(first, "Columns", first_path))
    orientation = _floats(first, "ImageOrientationPatient", 6, first_path)
    spacing = _floats(first, "PixelSpacing", 2, first_path)
    row, column = np.asarray(orientation).reshape(2, 3)
    normal = np.cross(row, column)

    slices = []
    for path, header in chosen:
        same = {
            "Rows and Columns": (_int(header, "Rows", path), _int(header, "Columns", path)) == shape,
            "PixelSpacing": np.allclose(_floats(header, "PixelSpacing", 2, path), spacing, rtol=1e-4),
            "ImageOrientationPatient": np.allclose(
                _floats(header, "ImageOrientationPatient", 6, path), orientation, atol=1e-3
            ),
        }
        for what, fits in same.items():
            if not fits:
                raise ReconError(f"{path} differs from {first_path.name} in {what}")
        position = np.asarray(_floats(header, "ImagePositionPatient", 3, path))
        slices.append((float(position @ normal), position, path, header))
    slices.sort(key=lambda entry: entry[0])
    thickness = 1.0
    if _plain(first.get("SliceThickness")):  # neither absent nor empty nor zero
        (thickness,) = _floats(first, "SliceThickness", 1, first_path)
    step = _slice_spacing([(z, path) for z, _, path, _ in slices], thickness)
    _check_positions([(position, path) for _, position, path, _ in slices], normal)
    _check_complete(chosen)
    volume = np.stack([_hounsfield(header, path, shape) for _, _, path, header in slices])
    origin = slices[0][1]
    return CTVolume(
        torch.from_numpy(volume),
        (spacing[0], spacing[1]),
        step,
        (float(origin[0]), float(origin[1]), float(origin[2])),
        tuple(float(v) for v in orientation),  # type: ignore[arg-type]
        first_path.parent,
        {name: value for key, name in _KEPT.items() if (value := _plain(first.get(key))) is not None},
    )


def write_dicom_series(
    folder: str | Path,
    volume: CTVolume,
    *,
    description: str = "reconstruction",
    derivation: str = "",
    series_number: int = 1,
    slope: float = 1.0,
    study_uid: str | None = None,
    frame_of_reference_uid: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a volume as a derived CT series, one file a slice.

    The files carry new UIDs and nothing that identifies a patient, and say that they are not for diagnostic
    use. They are written into a temporary folder beside, which is given its name when all of them are there.

    Parameters
    ----------
    folder : str or Path
        The folder to make, with ``0001.dcm`` and so on.
    volume : CTVolume
        Hounsfield units, or their standard deviation.
    description : str
        Beginning of the series description.
    derivation : str
        How the images were made.
    series_number : int
        Number of the series.
    slope : float
        Hounsfield units per stored step; 1 for images, 0.1 keeps more of a standard deviation. Steps are
        larger if values do not fit 16 bits otherwise.
    study_uid, frame_of_reference_uid : str, optional
        Of the study and the frame of reference, for several series that belong together; new ones otherwise.
    overwrite : bool
        Replace the folder, if it holds nothing but files ``*.dcm``.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ReconError
        If the folder exists, the slope is not positive, it cannot be written, or pydicom is not installed.
    """
    _pydicom()
    from pydicom.uid import generate_uid

    folder = Path(folder)
    check_folder(folder, overwrite=overwrite)
    if not (math.isfinite(slope) and slope > 0):
        raise ReconError(f"{folder}: the slope of stored values must be positive, got {slope}")
    stored = torch.round(volume.hu.double() / slope)
    if float(stored.min()) < -32768 or float(stored.max()) > 32767:
        slope = float(volume.hu.abs().max()) / 32767
        stored = torch.round(volume.hu.double() / slope)
    pixels = stored.numpy().astype(np.int16)
    shared = {
        "StudyInstanceUID": study_uid or generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": frame_of_reference_uid or generate_uid(),
        "SeriesDescription": f"{description[: 64 - len(_NOT_DIAGNOSTIC) - 2]}, {_NOT_DIAGNOSTIC}",
        "DerivationDescription": derivation[:1024] or "posterior reconstruction from projections",
        "SeriesNumber": series_number,
    }
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    names = [f"{index + 1:04d}.dcm" for index in range(len(pixels))]
    try:
        temporary.mkdir(parents=True)
        for index, name in enumerate(names):
            dataset = _slice_dataset(volume, pixels[index], index, slope, shared)
            dataset.save_as(temporary / name, enforce_file_format=True)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except OSError as error:
        raise ReconError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name for name in names]


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that `write_dicom_series` would not make or replace.

    Raises
    ------
    ReconError
        If it exists, and is not to be overwritten or holds something else than files ``*.dcm``.
    """
    if folder.exists() and not (overwrite and _only_dicom(folder)):
        raise ReconError(f"{folder}: not overwritten, it exists")


def new_uid() -> str:
    """A unique identifier that stands for nothing yet, for a study or a frame of reference.

    Raises
    ------
    ReconError
        If pydicom is not installed.
    """
    _pydicom()
    from pydicom.uid import generate_uid

    return str(generate_uid())


def read_dicom(path: str | Path) -> Any:
    """Read one DICOM file whole, with its pixels.

    Raises
    ------
    ReconError
        If it is absent, no DICOM file or cut short, or pydicom is not installed.
    """
    pydicom = _pydicom()
    path = Path(path)
    try:
        return pydicom.dcmread(path)
    except FileNotFoundError as error:
        raise ReconError(f"{path}: there is no such file") from error
    except (pydicom.errors.InvalidDicomError, EOFError) as error:
        raise ReconError(f"{path} is no DICOM file, or is cut short ({error})") from error
    except Exception as error:  # a damaged file ends in whatever its bytes happen to mean
        raise ReconError(f"{path} cannot be read as DICOM, it may be damaged ({error})") from error


def read_pixels(header: Any, path: Path) -> np.ndarray:
    """Stored values of a file's only frame, as they are.

    Raises
    ------
    ReconError
        If there are none, fewer than there should be, or they are compressed in a way that pydicom cannot
        undo here.
    """
    if "PixelData" not in header:
        raise ReconError(f"{path} has no pixels, it may be cut short")
    try:
        return header.pixel_array
    except Exception as error:  # by what is missing: ValueError, RuntimeError, AttributeError, …
        raise ReconError(f"{path}: its pixels cannot be read, it may be cut short ({error})") from error


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.errors
    except ImportError:
        raise ReconError("DICOM needs pydicom: install the extra, pip install 'dis-recon[dicom]'") from None
    return pydicom


def _dicom_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files as they are given; in a folder, those that are DICOM or are called so."""
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file())
            files.extend(file for file in inside if file.suffix.lower() == ".dcm" or _is_dicom(file))
        else:
            files.append(path)
    if not files:
        raise ReconError(f"{', '.join(map(str, given)) or 'nothing'}: there is no DICOM file")
    return files


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _one_series(headers: list[tuple[Path, Any]], series: str | int | None) -> list[tuple[Path, Any]]:
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for path, header in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    if series is not None:
        groups = {
            uid: members
            for uid, members in groups.items()
            if str(series) in (uid, str(members[0][1].get("SeriesNumber")))
        }
        if not groups:
            raise ReconError(f"{headers[0][0].parent}: there is no series {series!r}")
    if len(groups) > 1:
        listed = "; ".join(
            f"number {members[0][1].get('SeriesNumber')}: {len(members)} files, first {members[0][0].name}"
            for members in groups.values()
        )
        raise ReconError(f"{headers[0][0].parent}: there are {len(groups)} series ({listed}); choose one")
    return next(iter(groups.values()))


def _slice_spacing(slices: list[tuple[float, Path]], thickness: float) -> float:
    """Common distance of sorted positions."""
    if len(slices) == 1:
        return thickness
    gaps = np.diff([z for z, _ in slices])
    # Files are lost more often than added: most distances are right, so their median is.
    step = float(np.median(gaps))
    tolerance = max(0.02 * step, 0.01)
    for gap, (_, before), (_, after) in zip(gaps, slices, slices[1:], strict=False):
        if gap < 1e-3:
            raise ReconError(f"{after} lies at the same position as {before.name}")
        if gap > step + tolerance and abs(gap - round(gap / step) * step) <= tolerance * round(gap / step):
            raise ReconError(
                f"{after}: {round(gap / step) - 1} slices are missing between it and {before.name}, which "
                "are "
                f"{gap:g} mm apart where others are {step:g} mm"
            )
        if abs(gap - step) > tolerance:
            raise ReconError(
                f"{after} lies {gap:g} mm from {before.name}, but other slices are {step:g} mm apart"
            )
    return step


def _check_positions(slices: list[tuple[np.ndarray, Path]], normal: np.ndarray) -> None:
    first = slices[0][0]
    for position, path in slices[1:]:
        aside = (position - first) - ((position - first) @ normal) * normal
        if float(np.linalg.norm(aside)) > 0.1:
            raise ReconError(
                f"{path} is shifted by {float(np.linalg.norm(aside)):.3g} mm within its plane (a tilted "
                "gantry?), which "
                "is not supported"
            )


def _check_complete(chosen: list[tuple[Path, Any]]) -> None:
    acquisitions = {header.get("AcquisitionNumber") for _, header in chosen}
    path, first = chosen[0]
    said = _plain(first.get("ImagesInAcquisition"))
    if len(acquisitions) == 1 and isinstance(said, float) and said > len(chosen):
        raise ReconError(
            f"{path}: its header says that the acquisition has {said:g} images, but there are {len(chosen)}: "
            "the series is cut "
            "short"
        )


def _hounsfield(header: Any, path: Path, shape: tuple[int, int]) -> np.ndarray:
    if "RescaleSlope" not in header or "RescaleIntercept" not in header:
        raise ReconError(f"{path} has no RescaleSlope or no RescaleIntercept, so no Hounsfield units")
    slope, intercept = (_floats(header, key, 1, path)[0] for key in ("RescaleSlope", "RescaleIntercept"))
    stored = read_pixels(header, path)
    if stored.shape != shape:
        raise ReconError(f"{path} holds an array of shape {stored.shape}, but its header says {shape}")
    values = stored.astype(np.float64) * slope + intercept
    padding = header.get("PixelPaddingValue")
    if padding is not None:
        # By the standard, both ends of a range, if there is one, are padding too.
        limit = header.get("PixelPaddingRangeLimit", padding)
        low, high = sorted((float(padding), float(limit)))
        values[(stored >= low) & (stored <= high)] = _AIR
    return values.astype(np.float32)


def _floats(header: Any, key: str, count: int, path: Path) -> tuple[float, ...]:
    value = header.get(key)
    try:
        values = tuple(float(v) for v in (value if count > 1 else (value,)))
    except (TypeError, ValueError):
        values = ()
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise ReconError(f"{path}: {key} must be {count} numbers, got {value}")
    return values


def _int(header: Any, key: str, path: Path) -> int:
    value = header.get(key)
    if not isinstance(value, int) or value < 1:
        raise ReconError(f"{path}: {key} must be a positive number, got {value}")
    return int(value)


def _plain(value: Any) -> str | float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _only_dicom(folder: Path) -> bool:
    return folder.is_dir() and all(file.is_file() and file.suffix == ".dcm" for file in folder.iterdir())


def _slice_dataset(
    volume: CTVolume, pixels: np.ndarray, index: int, slope: float, shared: dict[str, Any]
) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    from pydicom.valuerep import DSfloat

    def decimal(value: float) -> DSfloat:
        return DSfloat(float(value), auto_format=True)

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    # What the standard requires of a CT image (PS3.3 A.3) and we do not know, or must not tell, is there but
    # empty.
    for key in (
        "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientName", "PatientID",
        "PatientBirthDate", "PatientSex", "StudyID", "Manufacturer", "PositionReferenceIndicator", "KVP",
        "AcquisitionNumber",
    ):  # fmt: skip
        setattr(dataset, key, None)
    for key, value in shared.items():
        setattr(dataset, key, value)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    dataset.Modality = "CT"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "nothing of the patient was taken over"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.InstanceNumber = index + 1
    dataset.ImagePositionPatient = [decimal(v) for v in volume.position(index)]
    dataset.ImageOrientationPatient = [decimal(v) for v in volume.orientation]
    dataset.PixelSpacing = [decimal(v) for v in volume.pixel_spacing]
    dataset.SliceThickness = decimal(volume.slice_spacing)
    dataset.SpacingBetweenSlices = decimal(volume.slice_spacing)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope = decimal(slope)
    dataset.RescaleIntercept = decimal(0.0)
    dataset.RescaleType = "HU"
    dataset.PixelData = np.ascontiguousarray(pixels, dtype="<i2").tobytes()
    return dataset
