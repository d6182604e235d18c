"""CT series in Hounsfield units in one HDF5 file, a group each: images to train a prior on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError

_RANGE = (-32768.0, 32767.0)
"""Numbers that a 16-bit scanner file can hold; others are no Hounsfield units."""


@dataclass(frozen=True)
class HUVolume:
    """One series.

    Parameters
    ----------
    name
        Of its group in the file.
    hu
        ``(S, H, W)``, float32, Hounsfield units as stored, the first row on top.
    patient
        The group's attribute, or its name where there is none.
    pixel_spacing
        Distance in mm of rows and of columns; None where the file does not say.
    z
        Positions of the slices in mm, as stored; None where the file does not say.
    attributes
        The other attributes of the group, as text.
    """

    name: str
    hu: Tensor
    patient: str
    pixel_spacing: tuple[float, float] | None
    z: tuple[float, ...] | None
    attributes: dict[str, str]


def read_hu_volumes(path: str | Path) -> list[HUVolume]:
    """Read series of a file in the order of their names.

    Parameters
    ----------
    path
        An HDF5 file with one group a series: dataset ``hu``, ``(S, H, W)`` of integers or floating-point
        numbers, and the attributes ``patient``, ``pixel_spacing_mm`` and ``z_mm`` where they are known.
        ``FILE.h5/NAME`` reads one series, or all series of one patient.

    Raises
    ------
    ReconError
        Naming the file and the group or dataset at fault.
    """
    path, name = _split(Path(path))
    try:
        with h5py.File(path, "r") as file:
            groups = {key: value for key, value in file.items() if isinstance(value, h5py.Group)}
            if not groups:
                raise ReconError(f"{path} holds no groups; expected one a CT series, with a dataset 'hu'")
            chosen = [key for key in groups if name in (None, key, _text(groups[key].attrs.get("patient")))]
            if not chosen:
                raise ReconError(
                    f"{path} has no series and no patient {name!r}; its series: {', '.join(groups)}"
                )
            return [_read_group(path, key, groups[key]) for key in chosen]
    except OSError as error:
        raise ReconError(f"{path} cannot be read as HDF5: {error}") from None


def hu_series(path: str | Path) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Name, patient and shape of the series that :func:`read_hu_volumes` reads, without reading them.

    Raises
    ------
    ReconError
        Naming the file, if it has no such series.
    """
    path, name = _split(Path(path))
    found = []
    try:
        with h5py.File(path, "r") as file:
            for key, group in file.items():
                stored = group.get("hu") if isinstance(group, h5py.Group) else None
                patient = _text(group.attrs.get("patient", key))
                if name in (None, key, patient) and isinstance(stored, h5py.Dataset) and stored.ndim == 3:
                    found.append((key, patient, tuple(stored.shape)))
    except OSError as error:
        raise ReconError(f"{path} cannot be read as HDF5: {error}") from None
    if not found and name is None:
        raise ReconError(f"{path} holds no groups with a dataset 'hu', which CT series would be")
    if not found:
        raise ReconError(f"{path} has no series and no patient {name!r}")
    return found


def _split(path: Path) -> tuple[Path, str | None]:
    """Part of a path that is a file, and the name below it."""
    if path.exists():
        return path, None
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    raise ReconError(f"{path}: there is no such file")


def _read_group(path: Path, name: str, group: h5py.Group) -> HUVolume:
    where = f"{path}: {name}/hu"
    stored = group.get("hu")
    if not isinstance(stored, h5py.Dataset):
        raise ReconError(f"{where}: there is no such dataset")
    if stored.dtype.kind not in "iuf":
        raise ReconError(f"{where} is of type {stored.dtype}; Hounsfield units are real numbers")
    if stored.ndim != 3 or 0 in stored.shape:
        raise ReconError(f"{where} has shape {stored.shape}; a series is (slices, height, width)")
    data = np.asarray(stored, dtype=np.float32)
    if not np.isfinite(data).all():
        raise ReconError(f"{where} holds values that are not finite")
    if data.min() < _RANGE[0] or data.max() > _RANGE[1]:
        raise ReconError(f"{where} holds {data.min():g} to {data.max():g}, which are no Hounsfield units")
    spacing = _numbers(path, name, group, "pixel_spacing_mm", 2)
    if spacing is not None and not min(spacing) > 0:
        raise ReconError(
            f"{path}: {name} has the attribute 'pixel_spacing_mm' {spacing}; it must be positive"
        )
    known = ("patient", "pixel_spacing_mm", "z_mm")
    return HUVolume(
        name=name,
        hu=torch.from_numpy(data),
        patient=_text(group.attrs.get("patient", name)),
        pixel_spacing=None if spacing is None else (spacing[0], spacing[1]),
        z=_numbers(path, name, group, "z_mm", data.shape[0]),
        attributes={key: _text(value) for key, value in group.attrs.items() if key not in known},
    )


def _numbers(path: Path, name: str, group: h5py.Group, key: str, count: int) -> tuple[float, ...] | None:
    if key not in group.attrs:
        return None
    values = np.asarray(group.attrs[key])
    if values.dtype.kind not in "iuf" or values.shape != (count,) or not np.isfinite(values).all():
        raise ReconError(f"{path}: {name} has the attribute {key!r} {values}; expected {count} numbers")
    return tuple(float(value) for value in values)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
