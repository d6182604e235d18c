"""NumPy's ``.npy`` and ``.npz``: images and volumes as arrays."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError

SUFFIXES = (".npy", ".npz")


def numpy_shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of a file, without reading the arrays.

    Parameters
    ----------
    path : str or Path
        ``.npy``, whose only array is called ``""`` here, or ``.npz``.

    Returns
    -------
    dict
        Name -> shape, dtype.

    Raises
    ------
    ReconError
        Naming the file, if it is absent, damaged or of another kind.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                shape, dtype = _header(file)
                if (
                    not dtype.hasobject
                    and file.tell() + math.prod(shape) * dtype.itemsize > path.stat().st_size
                ):
                    raise ValueError("it ends before its array does")
                return {"": (shape, dtype)}
        with zipfile.ZipFile(path) as archive:
            found = {}
            for member in archive.namelist():
                with archive.open(member) as stream:
                    found[member.removesuffix(".npy")] = _header(stream)
            return found
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged file ends in whatever its bytes happen to mean
        raise _unreadable(path, error) from None


def read_numpy(path: str | Path, name: str = "") -> Tensor:
    """Read an array as slices.

    Parameters
    ----------
    path : str or Path
        ``.npy`` or ``.npz``; no code in it is run.
    name : str
        Of the array in an ``.npz``.

    Returns
    -------
    Tensor
        ``(S, H, W)``, complex64 if the array is complex, else float32; an array ``(H, W)`` is one slice.

    Raises
    ------
    ReconError
        Naming the file, if the array is absent, damaged, or not two- or three-dimensional and of numbers, or
        has values that are not finite.
    """
    path = Path(path)
    where = f"{path}: array '{name}'" if name else str(path)
    values = load_array(path, name)
    check_array(where, values.shape, values.dtype)
    values = values.astype(np.complex64 if values.dtype.kind == "c" else np.float32)
    if not np.isfinite(values).all():
        raise ReconError(f"{where} holds values that are not finite")
    return torch.from_numpy(values if values.ndim == 3 else values[None])


def load_array(path: str | Path, name: str = "") -> np.ndarray:
    """Read an array as it is; see :func:`read_numpy`.

    Raises
    ------
    ReconError
        Naming the file, if the array is absent or damaged.
    """
    path = Path(path)
    archive = path.suffix.lower() == ".npz"
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray) is archive:
            raise ValueError(f"it holds {'one array (.npy)' if archive else 'an archive of arrays (.npz)'}")
        return loaded[name] if archive else loaded
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except KeyError:
        raise ReconError(f"{path}: array '{name}': there is none such") from None
    except Exception as error:  # a damaged file ends in whatever its bytes happen to mean
        raise _unreadable(path, error) from None


def check_array(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise unless an array is an image or a volume of numbers.

    Raises
    ------
    ReconError
        Beginning with ``where``.
    """
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "iufc":
        raise ReconError(f"{where} holds {dtype} {shape}; expected numbers of shape (H, W) or (slices, H, W)")


def _unreadable(path: Path, error: Exception) -> ReconError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ReconError(f"{path} cannot be read as NumPy's {path.suffix}: {reason}")


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return tuple(shape), dtype
