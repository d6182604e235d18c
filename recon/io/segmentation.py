"""Segmentations with the probability of every pixel, in HDF5."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from recon.errors import ReconError


def write_segmentation(
    path: str | Path, segmentation: np.ndarray, probability: np.ndarray, provenance: Mapping[str, Any]
) -> None:
    """Write a segmentation through a temporary file.

    Parameters
    ----------
    path : str or Path
        The file, with datasets ``segmentation`` and ``probability`` and the attribute ``provenance`` (JSON).
        An earlier segmentation of that name is replaced, other HDF5 is not.
    segmentation : numpy.ndarray
        ``(H, W)`` uint8, 1 where there is material.
    probability : numpy.ndarray
        ``(H, W)`` float32 in [0, 1], that of material.
    provenance : mapping
        How it was made, storable as JSON.

    Raises
    ------
    ReconError
        If the arrays are not such, or the file cannot be written.
    """
    path = Path(path)
    if segmentation.dtype != np.uint8 or probability.dtype != np.float32 or segmentation.ndim != 2:
        raise ReconError(f"{path}: a segmentation is uint8 (H, W), its probability float32")
    if segmentation.shape != probability.shape or not np.isin(segmentation, (0, 1)).all():
        raise ReconError(f"{path}: segmentation and probability must have one shape, the former be 0 or 1")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ReconError(f"{path}: probabilities lie in [0, 1]")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        if path.is_file() and h5py.is_hdf5(path):
            with h5py.File(path, "r") as earlier:
                if "segmentation" not in earlier:
                    raise ReconError(f"{path}: not overwritten, it is HDF5 and no earlier segmentation")
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "x") as file:
            file.create_dataset("segmentation", data=segmentation, compression="gzip")
            file.create_dataset("probability", data=probability, compression="gzip")
            file.attrs["provenance"] = json.dumps(dict(provenance), allow_nan=False)
            file.attrs["not_for_diagnostic_use"] = True
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)


def read_segmentation(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a segmentation and the probability of every pixel.

    Returns
    -------
    segmentation, probability : numpy.ndarray
        ``(H, W)`` uint8 and float32.

    Raises
    ------
    ReconError
        If the file cannot be read or lacks a dataset.
    """
    try:
        with h5py.File(path, "r") as file:
            return file["segmentation"][()], file["probability"][()]
    except OSError as error:
        raise ReconError(f"{path}: cannot be read ({error})") from None
    except KeyError as error:
        raise ReconError(f"{path}: {error.args[0]}") from None
