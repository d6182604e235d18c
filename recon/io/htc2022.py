"""The Helsinki Tomography Challenge 2022: measured fan-beam sinograms of plexiglass discs with holes.

Meaney, Moura and Siltanen, "Helsinki Tomography Challenge 2022 (HTC 2022) open tomographic dataset", Zenodo
8041800, CC BY 4.0. A file holds a structure ``CtDataFull`` or ``CtDataLimited`` with ``sinogram`` (views ×
560), already line integrals, and ``parameters``. The detector is flat and centred; the angles are in degrees.
In this package's fan geometry the views stand at just these angles, and images come out oriented as the
challenge's references.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.ct_geometry import FanBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, angles_in_radians
from recon.io.matlab import read_variables

IMAGE_SHAPE = (512, 512)
"""Of the challenge's references and of what is submitted to it."""

_STRUCTURES = ("CtDataLimited", "CtDataFull")
_KEPT = ("projectName", "date", "voltage", "current", "exposureTime", "xRayFilter", "xRayFilterThickness")


def read_htc2022(path: str | Path) -> CTScan:
    """Read a full or limited sinogram of the challenge.

    Parameters
    ----------
    path : str or Path
        A ``.mat`` file with ``CtDataFull`` or ``CtDataLimited``.

    Returns
    -------
    CTScan
        One slice of line integrals with its fan geometry; pixels of 0.1483 mm, 512 × 512 of them. The last
        view of a full scan, which repeats the first after a whole turn, is left out.

    Raises
    ------
    ReconError
        Naming the file and what is missing or does not fit.
    """
    path = Path(path)
    content = read_variables(path)
    name = next((name for name in _STRUCTURES if name in content), None)
    if name is None:
        raise ReconError(f"{path}: there is neither {' nor '.join(_STRUCTURES)} in it")
    data = content[name]
    where = f"{path}: {name}"
    parameters = _field(data, "parameters", where)
    sinogram = np.asarray(_field(data, "sinogram", where))
    if sinogram.dtype.kind not in "iuf" or sinogram.ndim != 2:
        raise ReconError(
            f"{where}.sinogram must be real (views, detectors), got {sinogram.dtype} {sinogram.shape}"
        )
    where = f"{where}.parameters"
    angles = angles_in_radians(
        np.atleast_1d(_field(parameters, "angles", where)),
        "degrees",
        f"{where}.angles",
        expected=len(sinogram),
    )
    elements = int(_number(parameters, "numDetectorsPost", where))
    if elements != sinogram.shape[1]:
        raise ReconError(
            f"{where}.numDetectorsPost is {elements}, but the sinogram has {sinogram.shape[1]} detector "
            "elements"
        )
    source_origin = _number(parameters, "distanceSourceOrigin", where)
    source_detector = _number(parameters, "distanceSourceDetector", where)
    if source_detector <= source_origin:
        raise ReconError(
            f"{where}: the detector, {source_detector} mm from the source, must lie behind the origin at "
            f"{source_origin} mm"
        )
    if len(angles) > 1 and math.isclose(angles[-1] - angles[0], 2 * math.pi, abs_tol=1e-6):
        angles, sinogram = angles[:-1], sinogram[:-1]
    geometry = FanBeam(
        angles, elements, _number(parameters, "pixelSizePost", where), source_origin, source_detector
    )
    return CTScan(
        torch.from_numpy(np.ascontiguousarray(sinogram, dtype=np.float32))[None],
        "line_integrals",
        path,
        geometry,
        pixel_size=_number(parameters, "effectivePixelSizePost", where),
        image_shape=IMAGE_SHAPE,
        metadata={
            key: value
            for key in _KEPT
            if isinstance(value := getattr(parameters, key, None), str | int | float)
        },
    )


def read_htc2022_segmentation(path: str | Path) -> Tensor:
    """Read a reference segmentation, or a submitted one: the only two-dimensional variable of the file.

    Returns
    -------
    Tensor
        ``(512, 512)`` uint8, 1 where there is material.

    Raises
    ------
    ReconError
        Naming the file, if it holds no such image.
    """
    image = _image(Path(path))
    if not np.isin(image, (0, 1)).all():
        raise ReconError(f"{path}: a segmentation holds zeros and ones only")
    return torch.from_numpy(image.astype(np.uint8))


def read_htc2022_reconstruction(path: str | Path, pixel_size: float) -> Tensor:
    """Read a reconstruction that came with the data.

    Parameters
    ----------
    path : str or Path
        The file; its only two-dimensional variable is read.
    pixel_size : float
        Side of a pixel in mm. The challenge's images are per pixel, not per mm.

    Returns
    -------
    Tensor
        ``(512, 512)`` float32 in 1/mm.

    Raises
    ------
    ReconError
        Naming the file, if it holds no such image.
    """
    return torch.from_numpy((_image(Path(path)).astype(np.float64) / pixel_size).astype(np.float32))


def _image(path: Path) -> np.ndarray:
    content = read_variables(path)
    images = {
        name: value for name, value in content.items() if isinstance(value, np.ndarray) and value.ndim == 2
    }
    if len(images) != 1:
        raise ReconError(f"{path}: one image is expected, got the variables {', '.join(content) or 'none'}")
    ((name, image),) = images.items()
    if image.shape != IMAGE_SHAPE or image.dtype.kind not in "biuf":
        raise ReconError(f"{path}: '{name}' must be real {IMAGE_SHAPE}, got {image.dtype} {image.shape}")
    if not np.isfinite(image).all():
        raise ReconError(f"{path}: '{name}' holds NaN or infinite values")
    return image


def _field(structure: Any, name: str, where: str) -> Any:
    if not hasattr(structure, name):
        raise ReconError(f"{where} has no field '{name}'")
    return getattr(structure, name)


def _number(structure: Any, name: str, where: str) -> float:
    value = _field(structure, name, where)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ReconError(f"{where}.{name} must be a positive number, got {value!r}")
    return float(value)
