"""fastMRI HDF5: measured k-space in, reconstructions with their uncertainty out.

The layout is that of Zbontar et al., "fastMRI: An Open Dataset and Benchmarks for Accelerated MRI",
arXiv:1811.08839: ``kspace`` of shape (slices, coils, H, W), or (slices, H, W) for the singlecoil tracks, H
the readout and W the phase encoding; targets ``reconstruction_rss`` and, singlecoil only,
``reconstruction_esc``; in the test sets the sampling ``mask`` (W,); and the scanner's header
``ismrmrd_header`` (XML, schema of Inati et al., Magn. Reson. Med. 77, 411, 2017).

The attribute that identifies a patient is never read.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from xml.etree import ElementTree

import h5py
import numpy as np
import torch

from recon.errors import ReconError

__all__ = [
    "EmptySliceError",
    "FastMRIFile",
    "KspaceSlice",
    "ReconstructionWriter",
    "centre_crop",
    "crop_readout",
    "find_target",
    "read_images",
]

TARGETS = ("reconstruction_esc", "reconstruction_rss")
DEFAULT_WIDTH = 320
DAMAGE = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises where a file is damaged: which of them depends on the place."""

Image = TypeVar("Image", torch.Tensor, np.ndarray)


class EmptySliceError(ReconError):
    """A slice of k-space holds nothing but zeros."""


@dataclass(frozen=True)
class KspaceSlice:
    """One slice of measured k-space.

    Attributes
    ----------
    kspace : torch.Tensor
        (C, H, W) complex64; C is 1 in a singlecoil file.
    measured : torch.Tensor
        (W,) bool: the columns that hold measurements. Columns of exact zeros (zero padding, or not sampled),
        columns that the header declares as padding and columns outside the file's ``mask`` do not.
    index : int
        Which slice of the file this is.
    """

    kspace: torch.Tensor
    measured: torch.Tensor
    index: int


class FastMRIFile:
    """A fastMRI HDF5 file, read one slice at a time.

    Everything but the k-space values is checked when the file is opened; those are checked as they are read.

    Parameters
    ----------
    path : str or Path
        The file. It stays open until :meth:`close`, or to the end of a ``with`` block.

    Attributes
    ----------
    path : Path
        The file.
    stem : str
        Its name without the extension.
    multicoil : bool
        Whether ``kspace`` has a coil dimension.
    num_slices, num_coils : int
        Number of slices and coils; ``num_coils`` is 1 in a singlecoil file.
    shape : tuple of int
        (H, W) of the k-space as it is stored, with readout oversampling and padding columns.
    targets : dict of str to tuple of int
        The target volumes in the file (``reconstruction_esc``, ``reconstruction_rss``) and their (h, w).
    target : str or None
        The one that reconstructions are compared with: ``reconstruction_esc`` if the file has it (singlecoil
        files do), else ``reconstruction_rss``; None if there is neither.
    target_shape : tuple of int
        (h, w) of the image to write: that of ``target``; without one, the header's reconstruction matrix;
        without a header, (n, n) with n = min(H, W, 320). An image narrower than that is cut to (W, W), as
        fastMRI does.
    readout_height : int
        Rows left when the readout oversampling is cropped (:func:`crop_readout`): the header's reconstruction
        matrix, but never fewer than ``target_shape`` needs.
    acquisition : str or None
        The sequence, such as ``CORPD_FBK`` or ``AXT2``.
    num_low_frequencies : int or None
        Width of the fully sampled centre, in columns, where an undersampled file states it.
    mask : torch.Tensor or None
        (W,) bool sampling mask of an undersampled file.

    Raises
    ------
    ReconError
        If the file is absent or not HDF5, if ``kspace`` is missing, not complex or misshapen, or if a target,
        the mask or the header do not fit it.

    Examples
    --------
    >>> with FastMRIFile("file1000001.h5") as file:  # doctest: +SKIP
    ...     for i in range(file.num_slices):
    ...         kspace = crop_readout(file.read_slice(i).kspace, file.readout_height)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.stem = self.path.stem
        self._file = _open_hdf5(self.path)
        self._valid_columns: tuple[int, int] | None = None
        try:
            with _reading(f"{self.path}: this HDF5 file"):
                self._read_layout()
        except BaseException:
            self._file.close()
            raise

    def _read_layout(self) -> None:
        kspace = _dataset(self._file, "kspace", self.path)
        where = f"{self.path}: dataset 'kspace'"
        if kspace.dtype.kind != "c":
            raise ReconError(f"{where} must be complex, got {kspace.dtype}")
        if kspace.ndim not in (3, 4):
            raise ReconError(
                f"{where} must have shape (slices, coils, H, W), or (slices, H, W) for singlecoil data, "
                f"got {kspace.shape}"
            )
        if 0 in kspace.shape:
            raise ReconError(f"{where} is empty: its shape is {kspace.shape}")
        self.multicoil = kspace.ndim == 4
        self.num_slices = int(kspace.shape[0])
        self.num_coils = int(kspace.shape[1]) if self.multicoil else 1
        self.shape = (int(kspace.shape[-2]), int(kspace.shape[-1]))

        self.acquisition = _text_attribute(self._file, "acquisition")
        self.num_low_frequencies = _int_attribute(self._file, "num_low_frequency")
        self.mask = self._read_mask()
        self.targets = {name: self._target_shape(name) for name in TARGETS if name in self._file}
        self.target = next(iter(self.targets), None)

        header = None
        if "ismrmrd_header" in self._file:
            header = _parse_header(self._file["ismrmrd_header"], self.shape[1], self.path)
        self._header_columns = (0, self.shape[1]) if header is None else header.columns

        if self.target is not None:
            wanted = self.targets[self.target]
        elif header is not None:
            wanted = header.recon_shape
        else:
            wanted = (min(*self.shape, DEFAULT_WIDTH),) * 2
        height, width = _narrow(self.shape, wanted)
        self.target_shape = (min(height, self.shape[0]), width)
        recon_height = self.target_shape[0] if header is None else header.recon_shape[0]
        self.readout_height = min(max(recon_height, self.target_shape[0]), self.shape[0])

    def _read_mask(self) -> torch.Tensor | None:
        if "mask" not in self._file:
            return None
        stored = _dataset(self._file, "mask", self.path)
        where, width = f"{self.path}: dataset 'mask'", self.shape[1]
        if stored.dtype.kind not in "biuf":
            raise ReconError(f"{where} must be boolean or real, got {stored.dtype}")
        if stored.shape != (width,):
            raise ReconError(f"{where} must have shape ({width},) as k-space has, got {stored.shape}")
        mask = stored[()]
        if not np.isin(mask, (0, 1)).all():
            raise ReconError(f"{where} must hold zeros and ones only")
        if not mask.any():
            raise ReconError(f"{where} samples no column")
        return torch.from_numpy(mask.astype(bool))

    def _target_shape(self, name: str) -> tuple[int, int]:
        shape = _image_dataset(self._file, name, self.path).shape
        if shape[0] != self.num_slices:
            raise ReconError(
                f"{self.path}: dataset '{name}' has {shape[0]} slices but 'kspace' has {self.num_slices}"
            )
        return (int(shape[1]), int(shape[2]))

    @property
    def valid_columns(self) -> tuple[int, int]:
        """Columns ``left:right`` of k-space that the scanner covered; those outside are zero padding.

        From the header: ``left = encodedSpace.y // 2 - limits.center``,
        ``right = left + limits.maximum + 1``. In a fully sampled file, exact zeros at the edges narrow this
        further, since a measurement has noise; one slice, the middle one that is not empty, is read for that.
        In a file with a ``mask`` they may be columns left out.

        Raises
        ------
        ReconError
            If every slice is all zeros, or the centre of k-space is not among the columns.
        """
        if self._valid_columns is None:
            left, right = self._header_columns
            if self.mask is None:
                (columns,) = self._middle_slice().measured.nonzero(as_tuple=True)
                left, right = int(columns[0]), int(columns[-1]) + 1
            centre = self.shape[1] // 2
            if not left <= centre < right:
                raise ReconError(
                    f"{self.path}: the columns of 'kspace' that hold measurements, {left}:{right}, do not "
                    f"include its centre, {centre}"
                )
            self._valid_columns = (left, right)
        return self._valid_columns

    def _middle_slice(self) -> KspaceSlice:
        for index in sorted(range(self.num_slices), key=lambda i: abs(i - self.num_slices // 2)):
            with contextlib.suppress(EmptySliceError):
                return self.read_slice(index)
        raise ReconError(f"{self.path}: dataset 'kspace' is all zeros")

    def read_slice(self, index: int) -> KspaceSlice:
        """Read one slice of k-space.

        Parameters
        ----------
        index : int
            From 0 to ``num_slices - 1``.

        Returns
        -------
        KspaceSlice
            As stored: nothing is cropped, scaled or masked.

        Raises
        ------
        ReconError
            If the slice holds NaN or infinities or nothing but zeros, if it cannot be read, or if there is no
            such slice.
        """
        where = f"{self.path}: slice {index} of dataset 'kspace'"
        values = np.asarray(self._read("kspace", index), dtype=np.complex64)
        if not np.isfinite(values).all():
            raise ReconError(f"{where} holds NaN or infinite values")
        if not values.any():
            raise EmptySliceError(f"{where} is all zeros")
        values = values.reshape(self.num_coils, *self.shape)
        measured = (values != 0).any(axis=(0, 1))
        left, right = self._header_columns
        measured[:left] = measured[right:] = False
        if self.mask is not None:
            measured &= self.mask.numpy()
        if not measured.any():
            raise EmptySliceError(f"{where} is zero in every column that is sampled and not padding")
        return KspaceSlice(torch.from_numpy(values), torch.from_numpy(measured), index)

    def read_target(self, index: int) -> torch.Tensor | None:
        """Read one slice of ``target``.

        Parameters
        ----------
        index : int
            From 0 to ``num_slices - 1``.

        Returns
        -------
        torch.Tensor or None
            (h, w) float32 of ``target_shape``; None if the file has no target.

        Raises
        ------
        ReconError
            If it cannot be read or holds NaN or infinities, or if there is no such slice.
        """
        if self.target is None:
            return None
        values = np.asarray(self._read(self.target, index), dtype=np.float32)
        if not np.isfinite(values).all():
            raise ReconError(
                f"{self.path}: slice {index} of dataset '{self.target}' holds NaN or infinite values"
            )
        return centre_crop(torch.from_numpy(values), self.target_shape)

    def _read(self, name: str, index: int) -> Any:
        if not 0 <= index < self.num_slices:
            raise ReconError(f"{self.path}: there is no slice {index}, the file has {self.num_slices}")
        if not self._file:
            raise ReconError(f"{self.path}: slice {index} of dataset '{name}' was asked of a closed file")
        with _reading(f"{self.path}: slice {index} of dataset '{name}'"):
            return self._file[name][index]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> FastMRIFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Header:
    """What is used of an ISMRMRD header: recon matrix (x, y) and the columns that were encoded."""

    recon_shape: tuple[int, int]
    columns: tuple[int, int]


def _parse_header(dataset: Any, width: int, path: Path) -> _Header:
    """Read an ISMRMRD XML header; ``width`` is that of k-space."""
    where = f"{path}: dataset 'ismrmrd_header'"
    content = dataset[()] if isinstance(dataset, h5py.Dataset) and dataset.shape == () else None
    if not isinstance(content, bytes | str):
        raise ReconError(f"{where} must be a scalar text")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        # Entities, internal or external, are declared in a DOCTYPE, which no ISMRMRD header has.
        if "<!DOCTYPE" in text:
            raise ReconError(f"{where} has a document type declaration, which is not accepted")
        root = ElementTree.fromstring(text)
    except UnicodeDecodeError as error:
        raise ReconError(f"{where} is not UTF-8 text") from error
    except ElementTree.ParseError as error:
        raise ReconError(f"{where} is not well-formed XML ({error})") from error

    def number(*names: str) -> int:
        text = root.findtext("/".join(f"{{*}}{name}" for name in ("encoding", *names)))
        try:
            value = int(text) if text is not None else -1
        except ValueError:
            value = -1
        if value < 0:
            raise ReconError(f"{where} has no usable number at encoding/{'/'.join(names)}")
        return value

    encoded_width = number("encodedSpace", "matrixSize", "y")
    recon_shape = (number("reconSpace", "matrixSize", "x"), number("reconSpace", "matrixSize", "y"))
    if 0 in recon_shape:
        raise ReconError(f"{where} gives an empty reconstruction matrix, {recon_shape}")
    if encoded_width != width:
        raise ReconError(f"{where} says {encoded_width} columns were encoded, but 'kspace' has {width}")
    limits = ("encodingLimits", "kspace_encoding_step_1")
    left = width // 2 - number(*limits, "center")
    right = left + number(*limits, "maximum") + 1
    if not 0 <= left < right <= width:
        raise ReconError(
            f"{where} places the encoded columns at {left}:{right}, outside the {width} of 'kspace'"
        )
    return _Header(recon_shape, (left, right))


def _narrow(image_shape: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the crop of an image, (W, W) if the image is narrower than ``shape``."""
    width = image_shape[1]
    return (width, width) if width < shape[1] else shape


def centre_crop(image: Image, shape: tuple[int, int]) -> Image:
    """Cut the centre out of images, as fastMRI does.

    The first of n rows kept out of N is (N - n) // 2. Some brain images are narrower than the reconstruction
    matrix; from those the centre (W, W) is cut.

    Parameters
    ----------
    image : torch.Tensor or numpy.ndarray
        (..., H, W), any type.
    shape : tuple of int
        (h, w).

    Returns
    -------
    torch.Tensor or numpy.ndarray
        A view of (..., h, w), or of (..., W, W) where W < w.

    Raises
    ------
    ReconError
        If the image has fewer rows than are asked for.
    """
    size = (int(image.shape[-2]), int(image.shape[-1]))
    height, width = _narrow(size, shape)
    if min(height, width) < 1 or height > size[0]:
        raise ReconError(f"an image of {size[0]} × {size[1]} cannot be cropped to {height} × {width}")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[..., top : top + height, left : left + width]


def crop_readout(kspace: torch.Tensor, height: int) -> torch.Tensor:
    """Crop the field of view along the readout, which removes the readout oversampling.

    Goes to image space along H, cuts the centre out, and goes back. This is exact for masks that act along W:
    columns stay columns, images of the result are the centre of the images of ``kspace``, and white noise
    stays white with the same variance a sample, the transforms being orthonormal.

    Parameters
    ----------
    kspace : torch.Tensor
        (..., H, W) complex.
    height : int
        Rows to keep, 1 to H.

    Returns
    -------
    torch.Tensor
        (..., height, W), of the same type.

    Raises
    ------
    ReconError
        If ``height`` is not between 1 and H.
    """
    rows, columns = kspace.shape[-2:]
    if not 1 <= height <= rows:
        raise ReconError(f"k-space with {rows} rows cannot be cropped to {height} along the readout")
    if height == rows:
        return kspace
    hybrid = torch.fft.ifftshift(kspace, dim=-2)
    hybrid = torch.fft.fftshift(torch.fft.ifft(hybrid, dim=-2, norm="ortho"), dim=-2)
    hybrid = torch.fft.ifftshift(centre_crop(hybrid, (height, columns)), dim=-2)
    return torch.fft.fftshift(torch.fft.fft(hybrid, dim=-2, norm="ortho"), dim=-2)


class ReconstructionWriter:
    """Write a reconstruction slice by slice, and put it in place only when it is whole.

    The file holds ``reconstruction`` and ``reconstruction_std`` (slices, h, w) float32, ``samples`` (slices,
    num_samples, h, w) complex64 if they are kept, and the attributes ``provenance`` (JSON) and
    ``not_for_diagnostic_use`` (true). It is written under a temporary name beside ``path``, which it is given
    at the end of a ``with`` block that went well. After an exception, or if slices are missing, the temporary
    file is removed and whatever stood at ``path`` stays.

    Parameters
    ----------
    path : str or Path
        The file to write; its folder is made if need be. An earlier reconstruction of that name is replaced,
        a file with measured k-space is not.
    num_slices : int
        Number of slices.
    shape : tuple of int
        (h, w) of an image.
    provenance : mapping
        How the reconstruction was made, storable as JSON. It is kept as the attribute ``provenance``, a dict
        that may be added to until the block ends.
    num_samples : int
        Posterior samples to store for each slice; 0 for none.

    Raises
    ------
    ReconError
        If ``path`` cannot be written or holds measured k-space, if the provenance cannot be stored as JSON,
        or if slices are missing at the end.

    Examples
    --------
    >>> with ReconstructionWriter("out/file1000001.h5", 2, (320, 320), {"seed": 1}) as writer:  # doctest:
    +SKIP
    ...     for i in range(2):
    ...         writer.write_slice(i, mean[i], std[i])
    """

    def __init__(
        self,
        path: str | Path,
        num_slices: int,
        shape: tuple[int, int],
        provenance: Mapping[str, Any],
        *,
        num_samples: int = 0,
    ):
        self.path = Path(path)
        self.shape = shape
        self.num_samples = num_samples
        self.provenance = dict(provenance)
        self._provenance_json()
        self._missing = set(range(num_slices))
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        try:
            if self.path.is_dir():
                raise ReconError(f"{self.path}: cannot be written, it is a folder")
            if self.path.is_file() and holds_kspace(self.path):
                raise ReconError(f"{self.path}: not overwritten, it holds measured k-space")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self._temporary, "x")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._create("reconstruction", (num_slices, *shape), np.float32)
            self._create("reconstruction_std", (num_slices, *shape), np.float32)
            if num_samples:
                self._create("samples", (num_slices, num_samples, *shape), np.complex64)
        except BaseException:
            self._discard()
            raise

    def write_slice(
        self,
        index: int,
        reconstruction: torch.Tensor | np.ndarray,
        std: torch.Tensor | np.ndarray,
        samples: torch.Tensor | np.ndarray | None = None,
    ) -> None:
        """Write one slice.

        Parameters
        ----------
        index : int
            From 0 to ``num_slices - 1``; slices may come in any order.
        reconstruction, std : torch.Tensor or numpy.ndarray
            (h, w) real: the magnitude image, in the units of the data's root-sum-of-squares, and the standard
            deviation of the magnitude.
        samples : torch.Tensor or numpy.ndarray, optional
            (num_samples, h, w) complex; needed exactly if ``num_samples`` is not 0.

        Raises
        ------
        ReconError
            If an array is misshapen or not finite, if samples are missing or were not announced, if there is
            no such slice, or if the disk refuses.
        """
        if not 0 <= index < self._file["reconstruction"].shape[0]:
            raise ReconError(f"{self.path}: there is no slice {index} to write")
        if (samples is not None) != (self.num_samples > 0):
            got = "none" if samples is None else "some"
            raise ReconError(
                f"{self.path}: {self.num_samples} samples a slice were announced, but slice {index} has {got}"
            )
        values = {"reconstruction": reconstruction, "reconstruction_std": std}
        if samples is not None:
            values["samples"] = samples
        for name, value in values.items():
            dataset = self._file[name]
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            where = f"{self.path}: slice {index} of '{name}'"
            if array.shape != dataset.shape[1:]:
                raise ReconError(f"{where} must have shape {dataset.shape[1:]}, got {array.shape}")
            if np.iscomplexobj(array) and dataset.dtype.kind != "c":
                raise ReconError(f"{where} must be real, got {array.dtype}")
            if not np.isfinite(array).all():
                raise ReconError(f"{where} holds NaN or infinite values")
            try:
                dataset[index] = array
            except OSError as error:
                raise self._unwritable(error) from error
        self._missing.discard(index)

    def _create(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        try:
            self._file.create_dataset(name, shape, dtype=dtype)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def _provenance_json(self) -> str:
        try:
            return json.dumps(self.provenance, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ReconError(f"{self.path}: the provenance cannot be stored as JSON ({error})") from error

    def _unwritable(self, error: Exception) -> ReconError:
        return ReconError(f"{self.path}: cannot be written ({error})")

    def _commit(self) -> None:
        if self._missing:
            raise ReconError(f"{self.path}: slices {sorted(self._missing)} were not written")
        provenance = self._provenance_json()
        try:
            self._file.attrs["provenance"] = provenance
            self._file.attrs["not_for_diagnostic_use"] = True
            self._file.close()
            self._temporary.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise self._unwritable(error) from error

    def _discard(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # a full disk refuses the last flush too
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._commit()
        except BaseException:
            self._discard()
            raise


def find_target(path: str | Path) -> tuple[str, str | None]:
    """Say which target volume a file holds, without looking at its k-space.

    Parameters
    ----------
    path : str or Path
        A fastMRI file.

    Returns
    -------
    target : str
        ``reconstruction_esc`` if the file has it (singlecoil files do), else ``reconstruction_rss``.
    acquisition : str or None
        The sequence, where the file states it.

    Raises
    ------
    ReconError
        If the file is absent, not HDF5, or has no target.
    """
    path = Path(path)
    with _open_hdf5(path) as file, _reading(f"{path}: this HDF5 file"):
        for name in TARGETS:
            if name in file:
                return name, _text_attribute(file, "acquisition")
    raise ReconError(f"{path}: there is no target in it, neither {' nor '.join(TARGETS)}")


def read_images(path: str | Path, name: str = "reconstruction") -> np.ndarray:
    """Read a whole volume of images: a reconstruction, its standard deviation, or a target.

    Parameters
    ----------
    path : str or Path
        A fastMRI file or a reconstruction, ours or another program's.
    name : str
        The dataset.

    Returns
    -------
    numpy.ndarray
        (slices, h, w), real, of the type stored.

    Raises
    ------
    ReconError
        If the file or the dataset is absent, cannot be read, is not of real images, or holds NaN or
        infinities.
    """
    path = Path(path)
    with _open_hdf5(path) as file, _reading(f"{path}: dataset '{name}'"):
        images = _image_dataset(file, name, path)[()]
    if not np.isfinite(images).all():
        raise ReconError(f"{path}: dataset '{name}' holds NaN or infinite values")
    return images


def _open_hdf5(path: Path) -> Any:
    """Open a file for reading; ReconError if it is absent or not HDF5."""
    try:
        if path.is_dir():
            raise ReconError(f"{path}: this is a folder, not a file")
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise ReconError(f"{path}: there is no such file") from error
    except PermissionError as error:
        raise ReconError(f"{path}: this file may not be read") from error
    except OSError as error:
        hdf5 = h5py.is_hdf5(path)
        problem = f"this HDF5 file cannot be opened ({error})" if hdf5 else "this is not an HDF5 file"
        raise ReconError(f"{path}: {problem}") from error


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Make a ReconError of whatever h5py raises where a file is damaged."""
    try:
        yield
    except ReconError:
        raise
    except DAMAGE as error:
        raise ReconError(f"{what} cannot be read, it may be damaged ({error})") from error


def _dataset(file: Any, name: str, path: Path) -> Any:
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        raise ReconError(f"{path}: there is no dataset '{name}'")
    return item


def _image_dataset(file: Any, name: str, path: Path) -> Any:
    dataset = _dataset(file, name, path)
    if dataset.dtype.kind not in "iuf":
        raise ReconError(f"{path}: dataset '{name}' must be real, got {dataset.dtype}")
    if dataset.ndim != 3 or 0 in dataset.shape:
        raise ReconError(f"{path}: dataset '{name}' must have shape (slices, h, w), got {dataset.shape}")
    return dataset


def _text_attribute(file: Any, name: str) -> str | None:
    value = file.attrs.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _int_attribute(file: Any, name: str) -> int | None:
    value = file.attrs.get(name)
    return int(value) if isinstance(value, int | np.integer) and value > 0 else None


def holds_kspace(path: Path) -> bool:
    """Whether a file is HDF5 with a dataset of that name."""
    try:
        with h5py.File(path, "r") as file:
            return "kspace" in file
    except DAMAGE:
        return False  # not HDF5, or a damaged result
