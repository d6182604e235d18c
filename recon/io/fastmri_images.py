"""Complex images of fully sampled fastMRI k-space: coils combined, readout cropped."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.espirit import CalibrationWarning, espirit_maps
from operators.fft import ifftc
from operators.masks import mask_from_kspace
from recon.errors import ReconError
from recon.io.fastmri import DAMAGE, EmptySliceError, FastMRIFile, centre_crop, crop_readout

_CALIBRATION = 24
"""Rows and columns in the middle of k-space that coil maps are made from."""


def image_shape(path: str | Path) -> tuple[int, int, int]:
    """Slices, height and width of the images that :func:`read_combined` makes of a file.

    Raises
    ------
    ReconError
        Naming the file, if it is no fastMRI file, or undersampled, as far as its middle slice tells: then it
        holds no clean image.
    """
    with FastMRIFile(path) as file:
        if file.mask is not None:
            raise ReconError(f"{file.path} is undersampled (it has a mask), so it holds no clean image")
        with contextlib.suppress(EmptySliceError):
            _read_clean(file, file.num_slices // 2)
        return (file.num_slices, *file.target_shape)


def read_combined(path: str | Path, start: int, stop: int) -> Tensor:
    """Read slices as complex images.

    Multicoil slices are combined with ESPIRiT's coil maps S of the central 24 x 24 samples, ``S^H F^H y``:
    the image is zero outside of the maps' support. Single-coil ones are transformed. Both are cropped to the
    shape of the file's target.

    Parameters
    ----------
    path : str or Path
        A fully sampled fastMRI file.
    start, stop : int
        First slice, and that after the last one.

    Returns
    -------
    Tensor
        ``(stop - start, h, w)`` complex64; a slice of zeros for one without data.

    Raises
    ------
    ReconError
        Naming the file, if it is undersampled, damaged, or its coil maps cannot be made.
    """
    images = []
    with FastMRIFile(path) as file:
        if file.mask is not None:
            raise ReconError(f"{file.path} is undersampled (it has a mask), so it holds no clean image")
        for index in range(start, stop):
            try:
                kspace = crop_readout(_read_clean(file, index), file.readout_height)
            except EmptySliceError:
                images.append(torch.zeros(file.target_shape, dtype=torch.complex64))
                continue
            image = ifftc(kspace)
            if file.multicoil:
                try:
                    with warnings.catch_warnings():
                        # Slices at a volume's end show nothing, and are passed over as empty.
                        warnings.simplefilter("ignore", CalibrationWarning)
                        maps = espirit_maps(kspace, _centre(kspace))
                except OperatorError as error:
                    raise ReconError(f"{file.path}: slice {index}: {error}") from None
                image = (maps.conj() * image).sum(0, keepdim=True)
            images.append(centre_crop(image[0], file.target_shape))
    return torch.stack(images)


def _read_clean(file: FastMRIFile, index: int) -> Tensor:
    """Read a slice of k-space ``(C, H, W)``; ReconError if samples are missing from it."""
    read = file.read_slice(index)
    sampled = (read.kspace != 0).any(0) & read.measured
    try:
        complete = mask_from_kspace(sampled, valid_columns=file.valid_columns).acceleration == 1
    except OperatorError as error:
        raise ReconError(f"{file.path}: slice {index}: {error}") from None
    if not complete:
        raise ReconError(
            f"{file.path} is undersampled (samples of slice {index} are zero), so it holds no clean image"
        )
    return read.kspace


def slice_energies(path: str | Path) -> Tensor:
    """Energy of the central 24 x 24 samples of each slice's k-space, which is most of that of its image.

    Returns
    -------
    Tensor
        ``(slices,)`` float64.

    Raises
    ------
    ReconError
        Naming the file, if it cannot be read.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            kspace = file["kspace"]
            rows, columns = _centre(kspace)
            energies = [
                np.square(np.abs(kspace[index, ..., rows, columns])).sum(dtype=np.float64)
                for index in range(len(kspace))
            ]
    except DAMAGE as error:
        raise ReconError(f"{path}: dataset 'kspace' cannot be read, it may be damaged ({error})") from None
    return torch.tensor(energies)


def _centre(kspace: Tensor | h5py.Dataset) -> tuple[slice, slice]:
    """Rows and columns of the calibration region."""
    region = []
    for size in kspace.shape[-2:]:
        width = min(_CALIBRATION, size)
        region.append(slice(size // 2 - width // 2, size // 2 - width // 2 + width))
    return region[0], region[1]
