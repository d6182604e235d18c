"""Volumes to train a prior on: what folders hold, which subject each is of, and how it is read.

Formats are told apart by names and contents, and a folder may hold several. Nothing but headers is read
before an image is needed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from recon.errors import ReconError

KINDS = ("mr", "ct", "images")
"""``mr``: magnitudes or complex images; ``ct``: Hounsfield units; ``images``: any numbers."""

HELD_OUT = 0.1
"""Share of the subjects that is held out for validation, of at least one."""

_REAL, _COMPLEX = 4, 8  # bytes a pixel


@dataclass(frozen=True)
class ImageVolume:
    """A volume on disk; see :class:`priors.slices.Volume`.

    Attributes
    ----------
    name : str
        For messages: its file, and what of it.
    path : Path
        Its file, or the folder of its files.
    subject : str
        Whom it shows: volumes of one subject are never parted.
    num_slices, slice_bytes, whole
        See :class:`priors.slices.Volume`.
    """

    name: str
    path: Path
    subject: str
    num_slices: int
    slice_bytes: int
    whole: bool
    reader: Callable[[int, int], Tensor]
    energy: Callable[[], Tensor] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Read slices ``start`` to ``stop - 1``: ``(stop - start, H, W)``, float32 or complex64.

        Raises
        ------
        ReconError
            Naming the file, if it cannot be read.
        """
        try:
            return self.reader(start, stop)
        except OSError as error:
            raise ReconError(f"{self.path} cannot be read: {error}") from None

    def energies(self) -> Tensor | None:
        """Energy of each slice up to a common factor, ``(num_slices,)``, where that is quickly known."""
        return None if self.energy is None else self.energy()


def find_volumes(paths: Sequence[Path], kind: str) -> tuple[list[ImageVolume], list[str]]:
    """Find all volumes in files and below folders.

    NIfTI, NumPy's ``.npy`` and ``.npz``, DICOM series, fastMRI files, HDF5 files of CT series, TIFF, PNG and
    JPEG are known. PNG, JPEG and TIFF files of one page that lie in one folder are the slices of one volume,
    in the order of the numbers in their names.

    Parameters
    ----------
    paths : sequence of Path
        Files and folders; ``FILE.h5/NAME`` is a CT series, or all of a patient.
    kind : str
        One of :data:`KINDS`; formats without Hounsfield units are no ``ct``, CT series nothing else.

    Returns
    -------
    volumes : list of ImageVolume
        In the order of the paths and of names.
    problems : list of str
        A sentence for each file that cannot be used.

    Raises
    ------
    ReconError
        If a path leads nowhere, or no volume is found.
    """
    if kind not in KINDS:
        raise ReconError(f"there are no images of kind {kind!r}: the kinds are {', '.join(KINDS)}")
    search = _Search(kind)
    for path in paths:
        search.add(path)
    search.finish()
    if not search.volumes:
        where = ", ".join(map(str, paths))
        raise ReconError(
            search.problems[0] if search.problems else f"there is no image of a known format in {where}"
        )
    return _with_subjects(search.volumes), search.problems


def split_subjects(
    volumes: Sequence[ImageVolume], seed: int = 0
) -> tuple[list[ImageVolume], list[ImageVolume], str]:
    """Hold out one subject in ten, at least one, for validation.

    Returns
    -------
    learned, held_out : list of ImageVolume
        No subject is in both. Which ones are held out depends on their names and the seed alone.
    sentence : str
        Which ones they are.

    Raises
    ------
    ReconError
        If there is one subject only.
    """
    subjects = sorted({volume.subject for volume in volumes})
    if len(subjects) < 2:
        raise ReconError(
            f"all images seem to be of one subject ({subjects[0]}), so none can be held out: put each "
            "subject into a folder of its own, or give other images by --validation"
        )

    def rank(subject: str) -> bytes:
        return hashlib.blake2b(f"{seed}|{subject}".encode()).digest()

    chosen = sorted(subjects, key=rank)[: max(1, round(HELD_OUT * len(subjects)))]
    parts = [[v for v in volumes if (v.subject in chosen) is wanted] for wanted in (False, True)]
    shown = ", ".join(sorted(chosen)[:5]) + ", ..." * (len(chosen) > 5)
    sentence = f"{len(chosen)} of {len(subjects)} subjects held out for validation: {shown}"
    return parts[0], parts[1], sentence


def describe_volumes(volumes: Sequence[ImageVolume], paths: Sequence[Path]) -> str:
    """Tell volumes from others in a few words: their number, and a digest of their names and sizes.

    Names count from the paths in which the volumes were found, so that a folder may be moved as a whole.
    """
    roots = {path.absolute().parent for path in paths}
    lines = []
    for volume in volumes:
        path = volume.path.absolute()
        below = [path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)]
        part = volume.name.removeprefix(str(volume.path))
        lines.append(f"{min(below, key=len)}{part} {volume.num_slices} {volume.slice_bytes}")
    digest = hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=4).hexdigest()
    return f"{len(lines)} volume{'s' * (len(lines) != 1)} ({digest})"


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorting key by which ``2.png`` comes before ``10.png``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


class _Search:
    """What was found so far; formats whose files belong together wait for :meth:`finish`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.volumes: list[ImageVolume] = []
        self.problems: list[str] = []
        self._pictures: dict[Path, list[Path]] = {}
        self._pages: dict[Path, list[Path]] = {}
        self._dicom: list[Path] = []
        self._seen: set[Path] = set()

    def add(self, path: Path) -> None:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)]
            for file in sorted(inside, key=natural_order):
                self._file(file, given=False)
        elif path.is_file() or any(parent.is_file() for parent in path.parents):
            self._file(path, given=True)
        else:
            raise ReconError(f"{path}: there is no such file")

    def _file(self, path: Path, given: bool) -> None:
        if path.resolve() in self._seen:
            return
        self._seen.add(path.resolve())
        name = path.name.lower()
        try:
            if name.endswith((".nii", ".nii.gz")):
                self._nifti(path)
            elif name.endswith((".npy", ".npz")):
                self._numpy(path)
            elif name.endswith((".png", ".jpg", ".jpeg")):
                self._pictures.setdefault(path.parent, []).append(path)
            elif name.endswith((".tif", ".tiff")):
                self._tiff(path)
            elif name.endswith((".h5", ".hdf5")) or not path.exists():
                self._hdf5(path)
            elif name.endswith(".dcm") or _begins_as_dicom(path):
                self._dicom.append(path)
            elif given:
                raise ReconError(f"{path} is of no format that images are read from")
        except ReconError as error:
            self.problems.append(str(error))

    def finish(self) -> None:
        """Make volumes of slices that came in files of their own."""
        for folder, files in self._pictures.items():
            self._collect(lambda folder=folder, files=files: self._picture_folder(folder, files))  # type: ignore[misc]
        for folder, files in self._pages.items():
            self._collect(lambda folder=folder, files=files: self._tiff_folder(folder, files))  # type: ignore[misc]
        if self._dicom:
            self._collect(self._series)

    def _collect(self, step: Callable[[], None]) -> None:
        try:
            step()
        except ReconError as error:
            self.problems.append(str(error))

    def _keep(
        self,
        path: Path,
        shape: tuple[int, int, int],
        reader: Callable[[int, int], Tensor],
        *,
        part: str = "",
        subject: str = "",
        whole: bool = True,
        pixel: int = _REAL,
        energy: Callable[[], Tensor] | None = None,
    ) -> None:
        name = f"{path}: {part}" if part else str(path)
        size = pixel * shape[1] * shape[2]
        self.volumes.append(ImageVolume(name, path, subject, shape[0], size, whole, reader, energy))

    def _nifti(self, path: Path) -> None:
        from recon.io.nifti import read_volume, volume_shape

        signed = self.kind == "ct"

        def read(start: int, stop: int) -> Tensor:
            volume = read_volume(path, signed=signed)
            return (_hounsfield(path, volume) if signed else volume)[start:stop]

        self._keep(path, volume_shape(path), read)

    def _numpy(self, path: Path) -> None:
        from recon.io.numpy_files import check_array, numpy_shapes, read_numpy

        for name, (shape, dtype) in numpy_shapes(path).items():
            try:
                check_array(f"{path}: array '{name}'" if name else str(path), shape, dtype)
                if self.kind == "ct" and dtype.kind == "c":
                    raise ReconError(f"{path} holds complex numbers, which are no Hounsfield units")
            except ReconError as error:
                self.problems.append(str(error))
                continue

            def read(start: int, stop: int, name: str = name) -> Tensor:
                volume = read_numpy(path, name)
                return (_hounsfield(path, volume) if self.kind == "ct" else volume)[start:stop]

            stack = (1, *shape)[-3:]
            pixel = _COMPLEX if dtype.kind == "c" else _REAL
            self._keep(path, (stack[0], stack[1], stack[2]), read, part=name, pixel=pixel)

    def _hdf5(self, path: Path) -> None:
        if path.exists() and _holds_kspace(path):
            self._fastmri(path)
            return
        if self.kind != "ct":
            raise ReconError(f"{path} holds no k-space; HDF5 files of CT series need --kind ct")
        from recon.io.hu_volumes import hu_series, read_hu_volumes

        file = next(p for p in (path, *path.parents) if p.is_file())
        for name, patient, shape in hu_series(path):

            def read(start: int, stop: int, name: str = name) -> Tensor:
                found = [volume for volume in read_hu_volumes(file / name) if volume.name == name]
                return found[0].hu[start:stop]

            self._keep(file, shape, read, part=name, subject=patient)

    def _fastmri(self, path: Path) -> None:
        from recon.io.fastmri_images import image_shape, read_combined, slice_energies

        if self.kind == "ct":
            raise ReconError(f"{path} holds k-space, not Hounsfield units")
        self._keep(
            path,
            image_shape(path),
            lambda start, stop: read_combined(path, start, stop),
            whole=False,
            pixel=_COMPLEX,
            energy=lambda: slice_energies(path),
        )

    def _picture_folder(self, folder: Path, files: list[Path]) -> None:
        from recon.io.pictures import picture_size, read_picture

        self._no_hounsfield_units(folder, "PNG and JPEG")
        good, shapes = [], []
        for file in files:
            try:
                shapes.append(picture_size(file))
                good.append(file)
            except ReconError as error:
                self.problems.append(str(error))
        if not good:
            return

        def read(start: int, stop: int) -> Tensor:
            pictures = [read_picture(file) for file in good[start:stop]]
            if len({picture.shape for picture in pictures}) > 1:
                raise ReconError(
                    f"{folder}: neighbouring pictures differ in size, so they are no slices of a volume"
                )
            return torch.stack(pictures)

        largest = max(shapes, key=math.prod)
        # A single picture is its own subject: it may lie beside those of others.
        self._keep(good[0] if len(good) == 1 else folder, (len(good), *largest), read, whole=False)

    def _tiff(self, path: Path) -> None:
        from recon.io.tiff import read_tiff_stack, tiff_shape

        self._no_hounsfield_units(path, "TIFF")
        shape = tiff_shape(path)
        if shape[0] == 1:
            self._pages.setdefault(path.parent, []).append(path)
        else:
            self._keep(path, shape, lambda start, stop: read_tiff_stack(path)[start:stop])

    def _tiff_folder(self, folder: Path, files: list[Path]) -> None:
        from recon.io.tiff import read_tiff_stack, tiff_shape

        self._keep(
            files[0] if len(files) == 1 else folder,
            tiff_shape(files),
            lambda start, stop: read_tiff_stack(files[start:stop]),
            whole=False,
        )

    def _series(self) -> None:
        from recon.io.dicom_images import find_series, read_dicom_slice

        found, problems = find_series(self._dicom)
        self.problems += problems
        for series in found:
            first = series.files[0]
            if (series.modality == "CT") is not (self.kind == "ct"):
                other = f"{first}: its series is of {series.modality} images"
                self.problems.append(f"{other}, which --kind {self.kind} does not take")
                continue

            def read(start: int, stop: int, files: tuple[Path, ...] = series.files) -> Tensor:
                return torch.stack([read_dicom_slice(file) for file in files[start:stop]])

            where = first if len(series.files) == 1 else first.parent
            part = "" if len(series.files) == 1 else f"series of {first.name}"
            shape = (len(series.files), *series.shape)
            self._keep(where, shape, read, part=part, subject=f"patient {series.patient}")

    def _no_hounsfield_units(self, path: Path, what: str) -> None:
        if self.kind == "ct":
            raise ReconError(f"{path}: {what} pictures hold no Hounsfield units")


def _with_subjects(volumes: list[ImageVolume]) -> list[ImageVolume]:
    """Name the subject of each volume that does not say: the folders in which all volumes part.

    The subject is the first folder, or the file, below the folder that all of them have in common. Patients
    with volumes in such a folder are the same subject as it, and so are all folders with the same patient.
    """
    if all(volume.subject for volume in volumes):
        return volumes
    paths = [volume.path.resolve() for volume in volumes]
    top = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))
    folders = [(*path.relative_to(top).parts, top.name)[0] for path in paths]
    # Folders with nothing but patients do not matter: one may hold the series of many.
    named = {folder for folder, volume in zip(folders, volumes, strict=True) if not volume.subject}
    same: dict[str, str] = {}

    def first(subject: str) -> str:
        while subject in same:
            subject = same[subject]
        return subject

    for folder, volume in zip(folders, volumes, strict=True):
        if folder in named:
            # Called by the first folder's name, whatever the order.
            ends = {first(folder), first(volume.subject or folder)}
            kept, *merged = sorted(ends, key=lambda subject: (subject not in named, subject))
            same.update(dict.fromkeys(merged, kept))
    return [
        replace(volume, subject=first(volume.subject or folder))
        for folder, volume in zip(folders, volumes, strict=True)
    ]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _begins_as_dicom(path: Path) -> bool:
    from recon.io.dicom_images import is_dicom

    return is_dicom(path)


def _holds_kspace(path: Path) -> bool:
    from recon.io.fastmri import holds_kspace

    return holds_kspace(path)


def _hounsfield(path: Path, volume: Tensor) -> Tensor:
    """Refuse what cannot be Hounsfield units: air has -1000 of them, and 16 bits hold them all."""
    low, high = float(volume.min()), float(volume.max())
    if not -32768 <= low < 0 or high > 32767:
        raise ReconError(f"{path} holds values from {low:g} to {high:g}, which are no Hounsfield units")
    return volume
