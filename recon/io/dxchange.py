"""Data Exchange, the HDF5 of synchrotron tomography: counts with flats and darks.

De Carlo et al., "Scientific data exchange: a schema for HDF5-based storage of raw and analyzed data", J.
Synchrotron Rad. 21, 1224, 2014: ``exchange/data`` (views, slices, detectors), ``exchange/data_white``,
``exchange/data_dark``, and ``exchange/theta`` in degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, angles_in_radians

_TO_MM = {
    "mm": 1.0,
    "millimeter": 1.0,
    "um": 1e-3,
    "µm": 1e-3,
    "micron": 1e-3,
    "microns": 1e-3,
    "m": 1e3,
    "meter": 1e3,
}


class DXchangeFile:
    """A Data Exchange file, read one slice at a time.

    Parameters
    ----------
    path : str or Path
        The file. It stays open until :meth:`close`, or to the end of a ``with`` block.
    detector_spacing : float, optional
        Size of a detector element in mm. Without it, the file's
        ``measurement/instrument/detector/pixel_size_x`` with its units; without that, scans have the
        `length_unit` ``element``.
    detector_offset : float
        Of the detector, in the same unit; see `operators.centre_of_rotation`.

    Attributes
    ----------
    path : Path
        The file.
    num_slices, num_views, num_detectors : int
        Size of the scan.
    geometry : ParallelBeam
        Of every slice.
    length_unit : str
        ``mm`` or ``element``.

    Raises
    ------
    ReconError
        If the file is absent or not HDF5, a dataset is missing or misshapen, or the angles are not in degrees
        as said.
    """

    def __init__(
        self, path: str | Path, *, detector_spacing: float | None = None, detector_offset: float = 0.0
    ):
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            data = self._dataset("data")
            self.num_views, self.num_slices, self.num_detectors = (int(n) for n in data.shape)
            self._flats = self._exposures("data_white")
            self._darks = self._exposures("data_dark")
            if self._flats is None:
                raise ReconError(f"{self.path}: there is no dataset 'exchange/data_white'")
            theta = self._file.get("exchange/theta")
            if not isinstance(theta, h5py.Dataset):
                raise ReconError(f"{self.path}: there is no dataset 'exchange/theta', so no angles")
            unit = theta.attrs.get("units", "degrees")
            unit = unit.decode() if isinstance(unit, bytes) else str(unit)
            angles = angles_in_radians(
                np.atleast_1d(theta[()]),
                "radians" if unit.lower().startswith("rad") else "degrees",
                f"{self.path}: dataset 'exchange/theta'",
                expected=self.num_views,
            )
            spacing = detector_spacing if detector_spacing is not None else self._spacing()
            self.length_unit = "element" if spacing is None else "mm"
            self.geometry = ParallelBeam(
                angles, self.num_detectors, 1.0 if spacing is None else spacing, detector_offset
            )
        except BaseException:
            self._file.close()
            raise

    def read_slice(self, index: int) -> CTScan:
        """Read one slice of counts with its flats and darks.

        Raises
        ------
        ReconError
            If there is no such slice, or its values are damaged, negative or not finite.
        """
        return self.read_slices([index])

    def read_slices(self, indices: Sequence[int]) -> CTScan:
        """Read some slices, in the order given; as `read_slice`."""
        for index in indices:
            if not 0 <= index < self.num_slices:
                raise ReconError(f"{self.path}: there is no slice {index}, the file has {self.num_slices}")
        return CTScan(
            self._read("data", indices),
            "counts",
            self.path,
            self.geometry,
            flats=self._read("data_white", indices),
            darks=None if self._darks is None else self._read("data_dark", indices),
            length_unit="element" if self.length_unit == "element" else "mm",
            slices=tuple(indices),
        )

    def _read(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        if not self._file:
            raise ReconError(f"{self.path}: slices were asked of a closed file")
        dataset = self._file[f"exchange/{name}"]
        try:
            parts = [np.asarray(dataset[:, index], dtype=np.float32) for index in indices]
        except (OSError, RuntimeError) as error:
            raise ReconError(
                f"{self.path}: dataset 'exchange/{name}' cannot be read, the file may be damaged ({error})"
            ) from error
        return torch.from_numpy(np.stack(parts))

    def _dataset(self, name: str) -> Any:
        dataset = self._file.get(f"exchange/{name}")
        where = f"{self.path}: dataset 'exchange/{name}'"
        if not isinstance(dataset, h5py.Dataset):
            raise ReconError(f"{self.path}: there is no dataset 'exchange/{name}'")
        if dataset.dtype.kind not in "iuf" or dataset.ndim != 3 or 0 in dataset.shape:
            raise ReconError(
                f"{where} must be real (views, slices, detectors), got {dataset.dtype} {dataset.shape}"
            )
        return dataset

    def _exposures(self, name: str) -> Any:
        if f"exchange/{name}" not in self._file:
            return None
        dataset = self._dataset(name)
        if dataset.shape[1:] != (self.num_slices, self.num_detectors):
            raise ReconError(
                f"{self.path}: dataset 'exchange/{name}' has slices of {dataset.shape[1:]}, but "
                "'exchange/data' of "
                f"{(self.num_slices, self.num_detectors)}"
            )
        return dataset

    def _spacing(self) -> float | None:
        dataset = self._file.get("measurement/instrument/detector/pixel_size_x")
        if not isinstance(dataset, h5py.Dataset) or dataset.size != 1:
            return None
        unit = dataset.attrs.get("units", "")
        unit = unit.decode() if isinstance(unit, bytes) else str(unit)
        value = float(np.asarray(dataset[()]).ravel()[0])
        if unit.lower() not in _TO_MM or not 0 < value < np.inf:
            raise ReconError(
                f"{self.path}: the size of a detector element, {value:g} {unit or 'without a unit'}, cannot "
                "be used; "
                "give the detector_spacing in mm"
            )
        return value * _TO_MM[unit.lower()]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> DXchangeFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ReconError(f"{path}: there is no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ReconError(f"{path} cannot be read as HDF5, it may be cut short ({error})") from error
