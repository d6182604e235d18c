"""CT reconstructions with their uncertainty, in HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from recon.errors import ReconError
from recon.io.fastmri import ReconstructionWriter

UNITS = ("1/mm", "HU", "1/element")
"""What images may be in; the last where the size of a detector element is not known."""


class CTReconstructionWriter(ReconstructionWriter):
    """Write a CT reconstruction slice by slice, and put it in place only when it is whole.

    The file has the layout that MRI results have: ``reconstruction`` and ``reconstruction_std`` (slices, H,
    W) float32, ``samples`` (slices, num_samples, H, W) float32 if they are kept, ``reference`` (slices, H, W)
    float32 if the data came with one, and the attributes ``provenance`` (JSON) and
    ``not_for_diagnostic_use``. The attribute ``units`` says what the images are in.

    Parameters
    ----------
    path : str or Path
        The file to write. An earlier reconstruction of that name is replaced, other HDF5 is not: it may be
        measured data.
    num_slices : int
        Number of slices.
    shape : tuple of int
        ``(H, W)`` of an image.
    provenance : mapping
        How the reconstruction was made, storable as JSON.
    units : str
        ``1/mm``, ``HU``, or ``1/element``.
    num_samples : int
        Posterior samples to store for each slice; 0 for none.

    Raises
    ------
    ReconError
        As `recon.io.fastmri.ReconstructionWriter`; and if the units are none of these.
    """

    def __init__(
        self,
        path: str | Path,
        num_slices: int,
        shape: tuple[int, int],
        provenance: Mapping[str, Any],
        *,
        units: str,
        num_samples: int = 0,
    ):
        if units not in UNITS:
            raise ReconError(f"{path}: units are one of {', '.join(UNITS)}, not {units!r}")
        self.units = units
        path = Path(path)
        if path.is_file() and h5py.is_hdf5(path) and not _is_result(path):
            raise ReconError(f"{path}: not overwritten, it is HDF5 and no earlier reconstruction")
        super().__init__(path, num_slices, shape, provenance, num_samples=num_samples)

    def write_reference(self, index: int, image: torch.Tensor) -> None:
        """Write the image of a slice that came with the data, ``(H, W)`` in the units of the file.

        Raises
        ------
        ReconError
            If it is misshapen or not finite, there is no such slice, or the disk refuses.
        """
        slices = self._file["reconstruction"].shape[0]
        if not 0 <= index < slices:
            raise ReconError(f"{self.path}: there is no slice {index} to write")
        if tuple(image.shape) != self.shape or not bool(torch.isfinite(image).all()):
            raise ReconError(
                f"{self.path}: the reference of slice {index} must be finite and of shape {self.shape}, got "
                f"{tuple(image.shape)}"
            )
        if "reference" not in self._file:
            self._create("reference", (slices, *self.shape), np.float32)
        try:
            self._file["reference"][index] = image.cpu().numpy()
        except OSError as error:
            raise self._unwritable(error) from error

    def _create(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        # Images of attenuation are real, and so are their samples.
        super()._create(name, shape, np.float32)

    def _commit(self) -> None:
        self._file.attrs["units"] = self.units
        super()._commit()


def read_ct_result(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Read a reconstruction, its standard deviation and their units.

    Returns
    -------
    reconstruction, std : numpy.ndarray
        ``(slices, H, W)`` float32.
    units : str
        One of `UNITS`.

    Raises
    ------
    ReconError
        If the file or a dataset is absent, or it does not say its units.
    """
    from recon.io.fastmri import read_images

    images = read_images(path), read_images(path, "reconstruction_std")
    with h5py.File(path, "r") as file:
        units = file.attrs.get("units")
    if units not in UNITS:
        raise ReconError(f"{path}: its attribute 'units' is {units!r}, not one of {', '.join(UNITS)}")
    return *images, str(units)


def _is_result(path: Path) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return "reconstruction" in file
    except OSError:
        return True  # a damaged result, which is_hdf5 takes by its first bytes
