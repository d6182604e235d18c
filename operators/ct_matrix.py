"""The system matrix of a CT scan: sparse, with its transpose beside it, and kept on disk if asked.

Compressed rows with 32-bit indices: the product is bound by how fast the matrix is read, and 64-bit indices
make it several times slower. The transpose is stored too, for torch would convert at every product with it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from operators.base import Shape
from operators.ct_geometry import FanBeam, ParallelBeam
from operators.ct_rays import largest_entries, view_entries
from operators.ct_symmetry import Place
from operators.errors import OperatorError

# Changes with what the entries are, so that a file of an older version is not taken for one of this.
_FORMAT = 1
_LARGEST_INDEX = 2**31 - 1

# Bytes kept free behind every array of a matrix. The product of MKL, by which torch multiplies, reads whole
# registers and so beyond the last entry: where an array ends with a page of memory and the next one is not
# mapped, that ends the process.
_SLACK = 256


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix in compressed rows.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns.
    starts : Tensor
        Where each row's entries begin, and where the last ends, int32 ``(rows + 1,)``.
    columns : Tensor
        Column of each entry, int32 ``(entries,)``.
    values : Tensor
        The entries, float32 or float64.
    """

    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    values: Tensor
    _matrix: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("starts", "columns", "values"):
            object.__setattr__(self, name, _with_slack(getattr(self, name)))
        with warnings.catch_warnings():
            # Torch says once in a process that sparse rows are in beta; products with dense matrices are all
            # we use.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            matrix = torch.sparse_csr_tensor(
                self.starts, self.columns, self.values, size=self.shape, check_invariants=False
            )
        object.__setattr__(self, "_matrix", matrix)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.starts, self.columns, self.values))

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with a dense vector ``(columns,)`` or matrix ``(columns, n)``."""
        return self._matrix @ x

    def to(self, device: torch.device) -> SparseRows:
        """Return the matrix on another device."""
        return SparseRows(self.shape, *(t.to(device) for t in (self.starts, self.columns, self.values)))

    def transposed(self) -> SparseRows:
        """Make the transpose, in compressed rows too; on the CPU."""
        # scipy counts instead of sorting, which is several times as fast as what torch does.
        from scipy.sparse import csr_array

        arrays = (self.values.numpy(), self.columns.numpy(), self.starts.numpy())
        turned = csr_array(arrays, shape=self.shape).tocsc()
        parts = (turned.indptr, turned.indices, turned.data)
        return SparseRows(self.shape[::-1], *(torch.from_numpy(part) for part in parts))


def _with_slack(array: Tensor) -> Tensor:
    """The array, with `_SLACK` bytes behind it that can be read; it is copied if they are not there."""
    end = (array.storage_offset() + array.numel()) * array.element_size()
    if array.is_contiguous() and array.untyped_storage().nbytes() >= end + _SLACK:
        return array
    room = array.new_empty(array.numel() + _SLACK // array.element_size())
    return room[: array.numel()].copy_(array)


@dataclass(frozen=True)
class SystemMatrix:
    """A system matrix from pixels to rays, and its transpose."""

    forward: SparseRows
    adjoint: SparseRows

    @property
    def nbytes(self) -> int:
        """Memory that both take, in bytes."""
        return self.forward.nbytes + self.adjoint.nbytes

    def to(self, device: torch.device) -> SystemMatrix:
        """Return the matrix on another device."""
        return SystemMatrix(self.forward.to(device), self.adjoint.to(device))

    def views(self, places: Sequence[Place], pixels: Sequence[Tensor], num_detectors: int) -> SystemMatrix:
        """Take the rows of some views, without computing any entry again.

        Parameters
        ----------
        places : sequence of Place
            Where each view is found among those stored here.
        pixels : sequence of Tensor
            Pixel that each pixel is moved to, for each motion of the image; int32 ``(H W,)``.
        num_detectors : int
            Number of detector elements K.

        Returns
        -------
        SystemMatrix
            With ``len(places) K`` rows, on the same device.
        """
        device, cpu = self.forward.values.device, torch.device("cpu")
        rows = self.forward.to(cpu)
        counts, columns, values = [], [], []
        for place in places:
            first = place.stored * num_detectors
            starts = rows.starts[first : first + num_detectors + 1].long()
            begin, end = int(starts[0]), int(starts[-1])
            count, entries = starts.diff(), torch.arange(begin, end)
            if place.reversed:
                count = count.flip(0)
                begins = starts[:-1].flip(0) - count.cumsum(0) + count
                entries = begins.repeat_interleave(count) + torch.arange(end - begin)
            counts.append(count)
            columns.append(pixels[place.image][rows.columns[entries]])
            values.append(rows.values[entries])
        starts = torch.cat(
            [torch.zeros(1, dtype=torch.int32), torch.cat(counts).cumsum(0, dtype=torch.int32)]
        )
        shape = (len(places) * num_detectors, rows.shape[1])
        forward = SparseRows(shape, starts, torch.cat(columns), torch.cat(values))
        return SystemMatrix(forward, forward.transposed()).to(device)


@dataclass(frozen=True)
class MatrixRecipe:
    """All that determines a system matrix.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    image_shape : (int, int)
        Height and width in pixels.
    pixel_size : float
        Side of a pixel in mm.
    projector : {"joseph", "line"}
        Model of the line integral; see `operators.ct_rays`.
    rays_per_detector : int
        Rays over the width of a detector element, whose mean it measures.
    """

    geometry: ParallelBeam | FanBeam
    image_shape: Shape
    pixel_size: float
    projector: str = "joseph"
    rays_per_detector: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (rays) and columns (pixels)."""
        views, detectors = self.geometry.range_shape
        return (views * detectors, self.image_shape[0] * self.image_shape[1])

    def largest_entries(self) -> int:
        """Count the entries from above, without making them."""
        return largest_entries(self.geometry, self.image_shape, self.pixel_size, self.rays_per_detector)

    def build(self, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> SystemMatrix:
        """Make the matrix, or read it.

        Parameters
        ----------
        dtype : torch.dtype
            float32 or float64.
        cache : Path, optional
            Folder in which it is looked for, and put if it is not there. A file that is damaged is made anew.

        Returns
        -------
        SystemMatrix
            On the CPU.

        Raises
        ------
        OperatorError
            If it has too many entries for 32-bit indices, or the folder cannot be written.
        """
        path = None if cache is None else cache / f"ct-{self.hash(dtype)}.npz"
        matrix = None if path is None else _read(path, self.shape, dtype)
        if matrix is None:
            forward = self._build(dtype)
            matrix = SystemMatrix(forward, forward.transposed())
            if path is not None:
                _write(path, matrix)
        return matrix

    def hash(self, dtype: torch.dtype) -> str:
        """SHA-256 of the recipe, the precision and the version of the format."""
        return hashlib.sha256(f"{_FORMAT} {dtype} {self!r}".encode()).hexdigest()

    def _build(self, dtype: torch.dtype) -> SparseRows:
        room = self.largest_entries()
        if room > _LARGEST_INDEX:
            raise OperatorError(
                f"the system matrix would have {room:.3g} entries, more than 32-bit indices can count; take "
                "fewer views or pixels, or engine='astra'."
            )
        # Memory that is never written is never taken, so too much room costs nothing.
        scalar = np.float32 if dtype == torch.float32 else np.float64
        columns, values = np.empty(room, np.int32), np.empty(room, scalar)
        starts = np.zeros(self.shape[0] + 1, np.int32)
        views, detectors = self.geometry.range_shape
        used = 0
        for view in range(views):
            counts, pixels, weights = view_entries(
                self.geometry,
                view,
                self.image_shape,
                self.pixel_size,
                self.projector,
                self.rays_per_detector,
                scalar,
            )
            columns[used : used + len(pixels)] = pixels
            values[used : used + len(pixels)] = weights
            starts[view * detectors + 1 : (view + 1) * detectors + 1] = used + np.cumsum(counts)
            used += len(pixels)
        entries = []
        for array in (columns, values):
            array.resize(used + _SLACK // array.itemsize, refcheck=False)
            entries.append(torch.from_numpy(array)[:used])
        return SparseRows(self.shape, torch.from_numpy(starts), *entries)


# -- on disk -------------------------------------------------------------------------------------------------

_PARTS = ("starts", "columns", "values")


def _write(path: Path, matrix: SystemMatrix) -> None:
    """Write a matrix so that no reader ever sees half of it."""
    arrays = {
        f"{side}_{part}": getattr(getattr(matrix, side), part).numpy()
        for side in ("forward", "adjoint")
        for part in _PARTS
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OperatorError(f"the system matrix cannot be kept in {path.parent}: {error}.") from error


def _read(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> SystemMatrix | None:
    """Read a matrix; None if there is none, or what is there is not one (zip files carry checksums)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            sides = [
                SparseRows(size, *(torch.from_numpy(arrays[f"{side}_{part}"]) for part in _PARTS))
                for side, size in (("forward", shape), ("adjoint", shape[::-1]))
            ]
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, zipfile.BadZipFile):
        return None
    return SystemMatrix(*sides) if all(_is_sound(side, dtype) for side in sides) else None


def _is_sound(rows: SparseRows, dtype: torch.dtype) -> bool:
    """Whether a product stays within its arrays: an index beyond them would read foreign memory."""
    types = (rows.starts.dtype, rows.columns.dtype, rows.values.dtype)
    if types != (torch.int32, torch.int32, dtype) or rows.starts.shape != (rows.shape[0] + 1,):
        return False
    entries = rows.columns.numel()
    return (
        rows.values.shape == rows.columns.shape == (entries,)
        and int(rows.starts[0]) == 0
        and int(rows.starts[-1]) == entries
        and bool((rows.starts.diff() >= 0).all())
        and (entries == 0 or (int(rows.columns.min()) >= 0 and int(rows.columns.max()) < rows.shape[1]))
    )
