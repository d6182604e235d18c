"""MATLAB files: sinogram and angles under whatever names, and the variables behind other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, angles_in_radians


def read_variables(path: str | Path) -> dict[str, Any]:
    """Read the variables of a MATLAB file, up to version 7.2, as arrays, numbers, texts and structures.

    Raises
    ------
    ReconError
        If the file is absent, of another format, of version 7.3 (which is HDF5), or damaged.
    """
    from scipy.io import loadmat

    path = Path(path)
    if not path.is_file():
        raise ReconError(f"{path}: there is no such file")
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
    except NotImplementedError as error:
        raise ReconError(
            f"{path} is a MATLAB file of version 7.3; save it with the option -v7 to read it here"
        ) from error
    except Exception as error:  # a damaged file ends in whatever its bytes happen to mean
        raise ReconError(f"{path} cannot be read as a MATLAB file, it may be damaged ({error})") from error
    return {name: value for name, value in content.items() if not name.startswith("__")}


def read_mat_sinogram(
    path: str | Path,
    *,
    sinogram: str | None = None,
    angles: str | None = None,
    angle_unit: str | None = None,
    views_axis: int | None = None,
    detector_spacing: float | None = None,
    detector_offset: float = 0.0,
) -> CTScan:
    """Read a parallel-beam sinogram from a MATLAB file that holds a matrix and a vector of angles.

    Parameters
    ----------
    path : str or Path
        The file.
    sinogram, angles : str, optional
        Names of the variables. Without them: the only vector whose name contains ``angle`` or ``theta``, and
        the only matrix one side of which is as long.
    angle_unit : str, optional
        ``degrees`` or ``radians``. Without it the name must end in ``deg`` or ``rad``, or in ``degrees`` or
        ``radians``.
    views_axis : int, optional
        Which axis of the matrix counts the views, 0 or 1; needed only if the matrix is square.
    detector_spacing : float, optional
        Size of a detector element in mm; without it the scan's `length_unit` is ``element``.
    detector_offset : float
        Of the detector, in the same unit.

    Returns
    -------
    CTScan
        One slice of line integrals, as stored: such files do not say whether they were scaled.

    Raises
    ------
    ReconError
        Naming the file and the variable that is missing, ambiguous, misshapen or in the wrong unit.
    """
    path = Path(path)
    content = read_variables(path)
    arrays = {
        name: value
        for name, value in content.items()
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.size > 1
    }
    if angles is None:
        found = [name for name, value in arrays.items() if value.ndim == 1 and _names_angles(name)]
        angles = _only(found, path, "vector of angles", "angles")
    if angles not in arrays:
        raise ReconError(f"{path}: there is no variable '{angles}' with angles")
    where = f"{path}: variable '{angles}'"
    if arrays[angles].ndim != 1:
        raise ReconError(f"{where} must be a vector of angles, got shape {arrays[angles].shape}")
    unit = angle_unit or _unit(angles)
    if unit is None:
        raise ReconError(f"{where} does not say whether it holds degrees or radians: give the angle_unit")
    theta = angles_in_radians(arrays[angles], unit, where)
    if sinogram is None:
        found = [name for name, value in arrays.items() if value.ndim == 2 and len(theta) in value.shape]
        sinogram = _only(found, path, f"matrix with a side of {len(theta)}, one a view", "sinogram")
    matrix = arrays.get(sinogram)
    where = f"{path}: variable '{sinogram}'"
    if matrix is None or matrix.ndim != 2:
        raise ReconError(f"{where} is no matrix of real numbers")
    if views_axis is None:
        if matrix.shape[0] == matrix.shape[1]:
            raise ReconError(f"{where} is square: give the views_axis, 0 or 1")
        if len(theta) not in matrix.shape:
            raise ReconError(
                f"{where} has shape {matrix.shape}, of which no side is as long as '{angles}', {len(theta)}"
            )
        views_axis = matrix.shape.index(len(theta))
    if views_axis not in (0, 1) or matrix.shape[views_axis] != len(theta):
        raise ReconError(
            f"{where} has shape {matrix.shape}, whose axis {views_axis} is not as long as '{angles}', "
            f"{len(theta)}"
        )
    values = np.ascontiguousarray(matrix if views_axis == 0 else matrix.T, dtype=np.float32)
    geometry = ParallelBeam(
        theta, values.shape[1], 1.0 if detector_spacing is None else detector_spacing, detector_offset
    )
    return CTScan(
        torch.from_numpy(values)[None],
        "line_integrals",
        path,
        geometry,
        length_unit="element" if detector_spacing is None else "mm",
    )


def _names_angles(name: str) -> bool:
    return "angle" in name.lower() or "theta" in name.lower()


def _unit(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(("rad", "radians")):
        return "radians"
    return "degrees" if lower.endswith(("deg", "degrees")) else None


def _only(found: list[str], path: Path, what: str, option: str) -> str:
    if len(found) != 1:
        names = f"has several: {', '.join(found)}" if found else "has none"
        raise ReconError(f"{path}: a {what} is expected, and the file {names}; name it with '{option}'")
    return found[0]
