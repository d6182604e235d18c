"""NIfTI volumes (with the extra ``nifti``): magnitude images to train a prior on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError


def read_volume(path: str | Path, *, signed: bool = False) -> Tensor:
    """Read a three-dimensional volume as slices of its last axis.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``.
    signed
        Keep negative values, as of Hounsfield units; magnitudes have none, so they are set to zero.

    Returns
    -------
    Tensor
        ``(S, H, W)``, float32; rows are the volume's second axis.

    Raises
    ------
    ReconError
        Naming the file, if it is no such volume, or if nibabel is not installed.
    """
    path = Path(path)
    data = _load(path, lambda stored: np.asarray(stored, dtype=np.float32))
    if data.ndim == 4 and data.shape[3] == 1:  # one volume of a series
        data = data[..., 0]
    if data.ndim != 3 or 0 in data.shape:
        raise ReconError(f"{path} holds an array of shape {data.shape}; a volume has three axes")
    if not np.isfinite(data).all():
        raise ReconError(f"{path} holds values that are not finite")
    volume = torch.from_numpy(np.ascontiguousarray(data.transpose(2, 1, 0)))
    return volume if signed else volume.clamp_min(0)


def volume_shape(path: str | Path) -> tuple[int, int, int]:
    """Slices, height and width of what :func:`read_volume` reads, from the header alone.

    Raises
    ------
    ReconError
        Naming the file, if it is no such volume, or if nibabel is not installed.
    """
    path = Path(path)
    shape = tuple(int(side) for side in _load(path, lambda stored: stored.shape))
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or 0 in shape:
        raise ReconError(f"{path} holds an array of shape {shape}; a volume has three axes")
    return (shape[2], shape[1], shape[0])


def _load(path: Path, take: Callable[[Any], Any]) -> Any:
    """What ``take`` makes of a file's stored array."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError:
        raise ReconError(
            "reading NIfTI needs nibabel: install the extra, pip install 'dis-recon[nifti]'"
        ) from None
    if not path.exists():
        raise ReconError(f"{path}: there is no such file")
    try:
        stored = nibabel.load(path).dataobj  # type: ignore[attr-defined]
        if stored.dtype.kind not in "iuf":
            raise ReconError(f"{path} holds values of type {stored.dtype}; magnitude images are real numbers")
        return take(stored)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, OverflowError) as error:
        raise ReconError(f"{path} cannot be read as NIfTI: {error}") from None


def read_folder(paths: list[Path]) -> list[Tensor]:
    """Read files, and all ``.nii`` and ``.nii.gz`` below folders, in the order of their names.

    Raises
    ------
    ReconError
        If nothing is found, or a file cannot be used.
    """
    files: list[Path] = []
    for path in paths:
        files.extend(sorted([*path.rglob("*.nii"), *path.rglob("*.nii.gz")]) if path.is_dir() else [path])
    if not files:
        raise ReconError(f"no NIfTI file in {', '.join(map(str, paths))}")
    return [read_volume(file) for file in files]
