"""CT projections of any format that is known: which one a file is in, and its slices one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py

from recon.errors import ReconError
from recon.io.ct_scan import CTScan
from recon.io.dicom_ct_pd import read_dicom_ct_pd
from recon.io.dxchange import DXchangeFile
from recon.io.htc2022 import read_htc2022
from recon.io.lodopab import LoDoPaBFile
from recon.io.matlab import read_mat_sinogram, read_variables

FORMATS = ("htc2022", "mat", "dxchange", "lodopab", "dicom-ct-pd")


def ct_format(path: str | Path) -> str:
    """Name of the format of a file or folder, one of :data:`FORMATS`, by what is in it.

    Raises
    ------
    ReconError
        If it is absent, damaged, or in none of them.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in (".dcm", ".ima"):
        return "dicom-ct-pd"
    if not path.is_file():
        raise ReconError(f"{path}: there is no such file")
    if path.suffix.lower() == ".mat":
        known = {"CtDataFull", "CtDataLimited"} & set(read_variables(path))
        return "htc2022" if known else "mat"
    if h5py.is_hdf5(path):
        try:
            with h5py.File(path, "r") as file:
                if "exchange" in file:
                    return "dxchange"
                if "data" in file:
                    return "lodopab"
        except OSError as error:
            raise ReconError(f"{path} cannot be read as HDF5, it may be cut short ({error})") from error
    raise ReconError(f"{path}: holds CT projections in none of the formats {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Placement:
    """Where the slices of a file lie, in DICOM's coordinates; see `recon.io.ct_volume.CTVolume`.

    Attributes
    ----------
    slice_spacing : float
        Distance of slices in mm.
    origin : tuple of float
        Position of the centre of the first pixel of the first slice.
    orientation : tuple of float
        Six direction cosines.
    """

    slice_spacing: float
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class SliceReader(Protocol):
    """What reads a file slice by slice."""

    def read_slice(self, index: int) -> CTScan:
        """Scan of one slice."""


class CTSource:
    """The slices of one file, read when they are asked for.

    Attributes
    ----------
    path : Path
        File or folder.
    format : str
        One of :data:`FORMATS`, or ``simulated``.
    num_slices : int
        Slices in it.
    placement : Placement or None
        Where they lie, if the file says.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        num_slices: int,
        file: SliceReader | None,
        scan: CTScan | None,
        placement: Placement | None = None,
    ):
        self.path = path
        self.format = kind
        self.num_slices = num_slices
        self.placement = placement
        self._file = file
        self._scan = scan

    def read_slice(self, index: int) -> CTScan:
        """Scan of one slice."""
        if self._file is not None:
            return self._file.read_slice(index)
        if self._scan is None or index != 0:
            raise ReconError(f"{self.path}: there is no slice {index}, the file has {self.num_slices}")
        return self._scan


@contextmanager
def open_ct(
    path: str | Path, *, detector_spacing: float | None = None, detector_offset: float = 0.0
) -> Iterator[CTSource]:
    """Open CT projections of any known format for the length of a ``with`` block.

    Parameters
    ----------
    path
        File, or folder of DICOM projections.
    detector_spacing, detector_offset
        In mm, for formats that do not tell (``"mat"`` and ``"dxchange"``).

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it.
    """
    path = Path(path)
    kind = ct_format(path)
    tells = kind not in ("mat", "dxchange")
    if tells and (detector_spacing is not None or detector_offset):
        raise ReconError(f"{path}: the geometry is in the file, so the detector's cannot be given")
    if kind == "dxchange":
        with DXchangeFile(path, detector_spacing=detector_spacing, detector_offset=detector_offset) as file:
            # Detector elements are as high as wide, and rows of them are slices.
            placement = Placement(file.geometry.detector_spacing)
            yield CTSource(path, kind, file.num_slices, file, None, placement)
    elif kind == "lodopab":
        with LoDoPaBFile(path) as observations:
            yield CTSource(path, kind, observations.num_slices, observations, None)
    elif kind == "htc2022":
        yield CTSource(path, kind, 1, None, read_htc2022(path))
    elif kind == "mat":
        scan = read_mat_sinogram(path, detector_spacing=detector_spacing, detector_offset=detector_offset)
        yield CTSource(path, kind, 1, None, scan)
    else:
        yield CTSource(path, kind, 1, None, read_dicom_ct_pd(path))
