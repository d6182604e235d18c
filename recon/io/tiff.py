"""TIFF: stacks of images, and of projections."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from operators.ct_geometry import FanBeam, ParallelBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, Kind

_SUFFIXES = (".tif", ".tiff")


def read_tiff_stack(paths: str | Path | Iterable[str | Path]) -> Tensor:
    """Read images: all pages of all files.

    Parameters
    ----------
    paths : str, Path, or iterable of them
        Files in the order given, or a folder, whose files are read in the order of the numbers in their names
        (``2.tif`` comes before ``10.tif``).

    Returns
    -------
    Tensor
        ``(pages, H, W)`` float32, as stored.

    Raises
    ------
    ReconError
        Naming the file, if one is absent, damaged, coloured or of another size, or holds NaN.
    """
    from tifffile import TiffFile, TiffFileError

    pages: list[np.ndarray] = []
    for path in _files(paths):
        if not path.is_file():
            raise ReconError(f"{path}: there is no such file")
        try:
            with TiffFile(path) as file:
                found = [page.asarray() for page in file.pages]
        except Exception as error:  # tifffile raises what a damaged file happens to lead to
            kind = "is no TIFF file" if isinstance(error, TiffFileError) else "cannot be read as TIFF"
            raise ReconError(f"{path} {kind}, it may be damaged ({error})") from error
        for number, page in enumerate(found):
            where = f"{path}: page {number}"
            if page.ndim != 2 or page.dtype.kind not in "iuf":
                raise ReconError(f"{where} must be a grey image, got {page.dtype} {page.shape}")
            if pages and page.shape != pages[0].shape:
                raise ReconError(f"{where} has shape {page.shape}, but those before it {pages[0].shape}")
            if not np.isfinite(page).all():
                raise ReconError(f"{where} holds NaN or infinite values")
            pages.append(page.astype(np.float32))
    return torch.from_numpy(np.stack(pages))


def tiff_shape(paths: str | Path | Iterable[str | Path]) -> tuple[int, int, int]:
    """Pages, height and width of what :func:`read_tiff_stack` reads, without reading the images.

    Height and width are those of the first page.

    Raises
    ------
    ReconError
        Naming the file, if one is absent or damaged.
    """
    from tifffile import TiffFile

    pages, shape = 0, (0, 0)
    for path in _files(paths):
        if not path.is_file():
            raise ReconError(f"{path}: there is no such file")
        try:
            with TiffFile(path) as file:
                pages += len(file.pages)
                shape = (int(file.pages[0].shape[0]), int(file.pages[0].shape[1]))
        except Exception as error:  # tifffile raises what a damaged file happens to lead to
            raise ReconError(f"{path} cannot be read as TIFF, it may be damaged ({error})") from error
    return (pages, *shape)


def read_tiff_projections(
    paths: str | Path | Iterable[str | Path],
    geometry: ParallelBeam | FanBeam,
    *,
    flats: str | Path | Iterable[str | Path] | None = None,
    darks: str | Path | Iterable[str | Path] | None = None,
    kind: Kind = "counts",
    slices: Sequence[int] | None = None,
) -> CTScan:
    """Read projections, one a page: rows are slices, columns detector elements.

    Parameters
    ----------
    paths : str, Path, or iterable of them
        As for `read_tiff_stack`; one page a view, in the order of the geometry's angles.
    geometry : ParallelBeam or FanBeam
        TIFF does not say how the rays run. A fan beam of several rows is a cone, of which only the middle row
        is a plane: give its number in `slices`.
    flats, darks : str, Path, or iterable of them, optional
        Exposures without object and without beam.
    kind : str
        ``counts`` or ``line_integrals``.
    slices : sequence of int, optional
        Rows to keep; all of them by default.

    Returns
    -------
    CTScan
        ``(slices, views, detectors)``.

    Raises
    ------
    ReconError
        If the projections do not fit the geometry or each other, or hold negative counts or NaN.
    """
    paths = _listed(paths)
    stack = read_tiff_stack(paths)
    where = _name(paths)
    views, rows, columns = stack.shape
    if views != len(geometry.angles):
        raise ReconError(f"{where}: there are {len(geometry.angles)} angles for {views} projections")
    if columns != geometry.num_detectors:
        raise ReconError(
            f"{where}: the geometry has {geometry.num_detectors} detector elements, but the projections "
            f"{columns} columns"
        )
    kept = list(range(rows)) if slices is None else [int(row) for row in slices]
    if not kept or min(kept) < 0 or max(kept) >= rows:
        raise ReconError(f"{where}: rows from 0 to {rows - 1} can be chosen, got {kept}")
    exposures: dict[str, Tensor | None] = {"flats": None, "darks": None}
    for name, given in (("flats", flats), ("darks", darks)):
        if given is None:
            continue
        given = _listed(given)
        values = read_tiff_stack(given)
        if values.shape[1:] != stack.shape[1:]:
            raise ReconError(
                f"{_name(given)}: the {name} have shape {tuple(values.shape[1:])}, but projections "
                f"{(rows, columns)}"
            )
        exposures[name] = values[:, kept].transpose(0, 1).contiguous()
    return CTScan(
        stack[:, kept].transpose(0, 1).contiguous(),
        kind,
        Path(where),
        geometry,
        flats=exposures["flats"],
        darks=exposures["darks"],
        slices=tuple(kept),
    )


def write_tiff_stack(path: str | Path, images: Tensor | np.ndarray, *, description: str = "") -> None:
    """Write images as the pages of one file, float32, by way of a temporary file.

    Parameters
    ----------
    path : str or Path
        The file; an earlier one of that name is replaced.
    images : Tensor or numpy.ndarray
        ``(pages, H, W)`` real.
    description : str
        What the first page says of itself, in ASCII.

    Raises
    ------
    ReconError
        If the images are misshapen or not finite, or the file cannot be written.
    """
    from tifffile import imwrite

    path = Path(path)
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iuf":
        raise ReconError(f"{path}: images must be real (pages, H, W), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ReconError(f"{path}: the images hold NaN or infinite values")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        imwrite(
            temporary,
            array.astype(np.float32),
            photometric="minisblack",
            description=description.encode("ascii", "replace"),
            metadata=None,
        )
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)


def _listed(paths: str | Path | Iterable[str | Path]) -> str | Path | list[str | Path]:
    """The paths as something that can be gone through more than once."""
    return paths if isinstance(paths, str | Path) else list(paths)


def _name(paths: str | Path | list[str | Path]) -> str:
    return str(paths if isinstance(paths, str | Path) else Path(paths[0]).parent)


def _files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES]
            files.extend(sorted(inside, key=_natural))
        else:
            files.append(path)
    if not files:
        raise ReconError(f"{', '.join(map(str, given)) or 'nothing'}: there is no TIFF file")
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
