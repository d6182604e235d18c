"""LoDoPaB-CT: simulated low-dose parallel-beam scans of the chest, 128 a file.

Leuschner et al., "LoDoPaB-CT, a benchmark dataset for low-dose computed tomography reconstruction", Sci. Data
8, 109, 2021: ``observation_{train,validation,test}_NNN.hdf5`` and ``ground_truth_…`` with the dataset
``data``: 1000 views of 513 elements over half a turn, images of 362 × 362 pixels on 26 cm, both divided by
81.36 per metre. The images are stored with x along the first axis and y along the second; the geometry given
here is that of the images as they are stored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan

NUM_VIEWS, NUM_DETECTORS, IMAGE_SIZE = 1000, 513, 362
HALF_WIDTH = 130.0
"""Half of the image's side, in mm."""

MU_MAX = 81.35858e-3
"""What both datasets were divided by, in 1/mm."""

PHOTONS = 4096
"""Photons an element counts through air, before the logarithm."""


def lodopab_geometry() -> ParallelBeam:
    """Geometry of every scan.

    The angles are the middles of 1000 equal parts of half a turn, the detector is as wide as the image's
    diagonal. A quarter of a turn is taken off the angles, since x runs down the rows of the stored images.
    """
    angles = tuple(math.pi * (k + 0.5) / NUM_VIEWS - math.pi / 2 for k in range(NUM_VIEWS))
    return ParallelBeam(angles, NUM_DETECTORS, 2 * math.sqrt(2) * HALF_WIDTH / NUM_DETECTORS)


class LoDoPaBFile:
    """A file of observations with its ground truth, read one scan at a time.

    Parameters
    ----------
    path : str or Path
        ``observation_….hdf5``. It stays open until :meth:`close`, or to the end of a ``with`` block.
    ground_truth : str, Path or None
        File of the true images. Without it, the ``ground_truth_…`` beside the observations, if there is one.

    Attributes
    ----------
    path : Path
        The file.
    num_slices : int
        Number of scans in it.

    Raises
    ------
    ReconError
        If a file is absent or not HDF5, or its dataset is missing or misshapen.
    """

    def __init__(self, path: str | Path, ground_truth: str | Path | None = None):
        self.path = Path(path)
        truth = Path(ground_truth) if ground_truth is not None else None
        if truth is None and self.path.name.startswith("observation_"):
            beside = self.path.with_name(self.path.name.replace("observation_", "ground_truth_", 1))
            truth = beside if beside.is_file() else None
        self._file, self._data = _open(self.path, (NUM_VIEWS, NUM_DETECTORS))
        self.num_slices = int(self._data.shape[0])
        self._truth_path = truth
        self._truth_file, self._truth = None, None
        if truth is not None:
            try:
                self._truth_file, self._truth = _open(truth, (IMAGE_SIZE, IMAGE_SIZE))
                if self._truth.shape[0] != self.num_slices:
                    raise ReconError(
                        f"{truth}: there are {self._truth.shape[0]} images for {self.num_slices} observations"
                    )
            except BaseException:
                self.close()
                raise

    def read_slice(self, index: int) -> CTScan:
        """Read one scan.

        Returns
        -------
        CTScan
            Line integrals without units, the reference in 1/mm.

        Raises
        ------
        ReconError
            If there is no such scan, or its values are damaged or not finite.
        """
        if not 0 <= index < self.num_slices:
            raise ReconError(f"{self.path}: there is no scan {index}, the file has {self.num_slices}")
        # Lengths in metres times 1/m: the line integral has no unit, and the factor is the one per metre.
        sinogram = _read(self._data, index, self.path) * (MU_MAX * 1e3)
        reference = None
        if self._truth is not None and self._truth_path is not None:
            reference = torch.from_numpy(_read(self._truth, index, self._truth_path) * MU_MAX)[None]
            if not bool(torch.isfinite(reference).all()):
                raise ReconError(f"{self._truth_path}: image {index} holds NaN or infinite values")
        return CTScan(
            torch.from_numpy(sinogram)[None],
            "line_integrals",
            self.path,
            lodopab_geometry(),
            pixel_size=2 * HALF_WIDTH / IMAGE_SIZE,
            image_shape=(IMAGE_SIZE, IMAGE_SIZE),
            slices=(index,),
            reference=reference,
            reference_units="" if reference is None else "1/mm",
            metadata={"photons": PHOTONS},
        )

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._truth_file is not None:
            self._truth_file.close()

    def __enter__(self) -> LoDoPaBFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(path: Path, shape: tuple[int, int]) -> tuple[Any, Any]:
    if not path.is_file():
        raise ReconError(f"{path}: there is no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ReconError(f"{path} cannot be read as HDF5, it may be cut short ({error})") from error
    dataset = file.get("data")
    if not isinstance(dataset, h5py.Dataset):
        file.close()
        raise ReconError(f"{path}: there is no dataset 'data'")
    found, kind = dataset.shape, dataset.dtype
    if kind.kind != "f" or len(found) != 3 or found[1:] != shape or not found[0]:
        file.close()
        raise ReconError(
            f"{path}: dataset 'data' must be real (n, {shape[0]}, {shape[1]}), got {kind} {found}"
        )
    return file, dataset


def _read(dataset: Any, index: int, path: Path) -> np.ndarray:
    if not dataset:
        raise ReconError(f"{path}: scan {index} was asked of a closed file")
    try:
        return np.asarray(dataset[index], dtype=np.float32)
    except (OSError, RuntimeError) as error:
        raise ReconError(f"{path}: scan {index} cannot be read, the file may be damaged ({error})") from error
