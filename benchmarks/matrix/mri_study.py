"""Volumes of MRI: measured k-space, or coils, phase and noise simulated on magnitude images."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import (
    NOISE,
    NUM_COILS,
    TARGET_CALIBRATION,
    TARGETS,
    Case,
    Scenario,
    make_case,
    make_scenario,
    measured_case,
    simulated_case,
)
from benchmarks.matrix.configuration import Configuration, VolumeEntry
from benchmarks.matrix.study import Condition, digest_of, file_digest, targets_of
from operators.errors import OperatorError
from operators.masks import Mask, make_mask
from recon.errors import ReconError
from recon.io.fastmri import EmptySliceError, FastMRIFile, KspaceSlice, centre_crop, crop_readout
from recon.io.nifti import volume_shape
from recon.mri import calibration_region

CALIBRATION_SOURCE = "undersampled data"


@dataclass(frozen=True, eq=False)
class MRIVolume:
    """Slices of one file, which share a mask.

    Attributes
    ----------
    name : str
        What tables call it.
    key : str
        Its name by the file alone, which seeds the masks.
    path : Path
        File.
    kind : str
        ``measured``, ``nifti`` or ``fastmri``.
    slices : tuple of int
        Indices in the file.
    shape : tuple of int
        Height and width of k-space.
    crop : tuple of int, optional
        Centre that is kept of a simulated image.
    scored : tuple of int, optional
        Centre that is scored, as fastMRI does; everything if None.
    valid_columns : tuple of int, optional
        Columns that the scanner covered.
    coils : int
        Number of coils.
    subject : str
        Whom it shows.
    note : str
        What a reader has to know of it.
    """

    name: str
    key: str
    path: Path
    kind: str
    slices: tuple[int, ...]
    shape: tuple[int, int]
    coils: int
    subject: str
    note: str = ""
    crop: tuple[int, int] | None = None
    scored: tuple[int, int] | None = None
    valid_columns: tuple[int, int] | None = None

    @property
    def simulated(self) -> bool:
        """Whether coils, phase and noise were put on a processed image."""
        return self.kind == "nifti"

    @property
    def source(self) -> str:
        """Where it is from."""
        size = f"{self.shape[0]} × {self.shape[1]}, {self.coils} coils"
        if self.simulated:
            return f"magnitude images of {self.path.name}, {size} simulated"
        return f"k-space of {self.path.name}, {size} measured"

    @cached_property
    def digest(self) -> str:
        """Hash of the file."""
        return file_digest(self.path)

    def load(self, index: int) -> Case:
        """Read a slice and make its targets."""
        if self.kind == "measured":
            return replace(measured_case(self.path), name=self.key)
        if self.kind == "nifti":
            return simulated_case(self.path, index, self.crop)
        with FastMRIFile(self.path) as file:
            try:
                kspace = crop_readout(file.read_slice(index).kspace, file.readout_height)
            except EmptySliceError:  # beyond the head, say
                kspace = torch.zeros(self.coils, *self.shape, dtype=torch.complex64)
        return make_case(f"{self.key}, slice {index}", kspace)


def open_volumes(entry: VolumeEntry) -> list[MRIVolume]:
    """Find out what a file, or each file of a folder, holds.

    Raises
    ------
    ReconError
        Naming the file, if it cannot be used.
    """
    if entry.kind == "measured":
        case = measured_case(entry.path)
        coils, height, width = case.kspace.shape
        return [_volume(entry, case.name, entry.path, slices=(0,), shape=(height, width), coils=coils)]
    if entry.kind == "nifti":
        count, height, width = volume_shape(entry.path)
        slices = _checked(entry, count)
        if entry.crop is not None and (entry.crop[0] > height or entry.crop[1] > width):
            raise ReconError(
                f"{entry.where}: crop {list(entry.crop)} is larger than the slices of {entry.path}, "
                f"{height} × {width}"
            )
        stem = entry.path.name.removesuffix(".gz").removesuffix(".nii")
        shape = entry.crop or (height, width)
        return [
            _volume(entry, stem, entry.path, slices=slices, shape=shape, coils=NUM_COILS, crop=entry.crop)
        ]
    paths = sorted(entry.path.glob("*.h5")) if entry.path.is_dir() else [entry.path]
    if not paths:
        raise ReconError(f"{entry.where}: there are no .h5 files in {entry.path}")
    return [_open_fastmri(path, entry) for path in paths]


def _volume(entry: VolumeEntry, key: str, path: Path, **facts: Any) -> MRIVolume:
    name = entry.name or key
    return MRIVolume(name, key, path, entry.kind, subject=entry.subject or name, note=entry.note, **facts)


def _open_fastmri(path: Path, entry: VolumeEntry) -> MRIVolume:
    with FastMRIFile(path) as file:
        if not file.multicoil:
            raise ReconError(f"{path}: methods are given coil maps, and this file has a single coil")
        valid = file.valid_columns
        slices = _checked(entry, file.num_slices)
        first = _first_measured(file, slices)
        if file.mask is not None or not bool(first.measured[valid[0] : valid[1]].all()):
            raise ReconError(
                f"{path}: the data are undersampled already, so there is nothing to compare with"
            )
        return _volume(
            entry,
            file.stem,
            path,
            slices=slices,
            shape=(file.readout_height, file.shape[1]),
            coils=file.num_coils,
            scored=file.target_shape,
            valid_columns=valid,
        )


def _first_measured(file: FastMRIFile, slices: Sequence[int]) -> KspaceSlice:
    for index in slices:
        with contextlib.suppress(EmptySliceError):
            return file.read_slice(index)
    raise ReconError(f"{file.path}: the slices {', '.join(map(str, slices))} are all zeros")


def _checked(entry: VolumeEntry, count: int) -> tuple[int, ...]:
    slices = tuple(range(count)) if entry.slices is None else entry.slices
    for index in slices:
        if index >= count:
            raise ReconError(f"{entry.where}: {entry.path} has no slice {index}, but {count} of them")
    return slices


class MRIStudy:
    """Volumes and masks of a configuration."""

    modality = "mri"

    def __init__(self, configuration: Configuration) -> None:
        opened = [volume for entry in configuration.data for volume in open_volumes(entry)]
        self.volumes = [volume for volume in opened if targets_of(configuration.targets, volume)]
        why = f"it has none of the targets {', '.join(configuration.targets)}"
        self.left_out = {volume.name: why for volume in opened if volume not in self.volumes}
        if not self.volumes:
            raise ReconError(
                f"{configuration.path}: targets: no volume has any of {', '.join(configuration.targets)}"
            )
        self.conditions = [
            Condition(f"{mask.kind} ×{mask.acceleration:g}", mask.kind, mask.acceleration, mask.kind)
            for mask in configuration.masks
        ]
        self.meanings = {target: TARGETS[target] for target in configuration.targets}
        self._masks: dict[tuple[str, str], Mask] = {}
        for volume in self.volumes:
            for condition in self.conditions:
                self.mask(volume, condition)  # what cannot be drawn is better known at once
        # Of what was loaded last: units are run slice by slice, and mask by mask.
        self._case = lru_cache(maxsize=1)(lambda volume, index: volume.load(index))
        self._scenario = lru_cache(maxsize=1)(self._make_scenario)

    @property
    def notes(self) -> dict[str, str]:
        """What the page says about the data."""
        notes = {
            "coil maps": "ESPIRiT from the calibration region of the undersampled data, the same for all "
            "methods that take maps; its size is in the tables",
            "masks": "one for all slices of a volume, seeded by the file's name",
        }
        if any(volume.simulated for volume in self.volumes):
            notes["simulation"] = (
                f"{NUM_COILS} smooth coils, smooth phase, and noise of {NOISE:g} of the image's maximum per "
                "real component, drawn anew for every slice"
            )
        return notes

    def mask(self, volume: MRIVolume, condition: Condition) -> Mask:
        """Draw the mask of a volume."""
        key = (volume.name, condition.label)
        if key not in self._masks:
            try:
                self._masks[key] = make_mask(
                    condition.kind,
                    volume.shape,
                    condition.asked,
                    seed=volume.key,
                    valid_columns=volume.valid_columns,
                )
            except OperatorError as error:
                raise ReconError(f"{volume.name}, {condition.label}: {error}") from None
        return self._masks[key]

    def identity(self, volume: MRIVolume, index: int, condition: Condition) -> dict[str, Any]:
        """Everything that the data of a slice depend on."""
        mask = self.mask(volume, condition)
        simulation = [NUM_COILS, NOISE] if volume.simulated else None
        return {
            "file": volume.digest,
            "slice": index,
            "crop": volume.crop,
            "simulation": simulation,
            "target": TARGET_CALIBRATION,
            "mask": digest_of(np.packbits(mask.mask.numpy()).tobytes()),
            "shape": list(volume.shape),
        }

    def facts(self, volume: MRIVolume, condition: Condition) -> dict[str, Any]:
        """Realised acceleration, calibration and where the maps are from."""
        mask = self.mask(volume, condition)
        region = calibration_region(mask, volume.shape)
        size = " × ".join(str(part.stop - part.start) for part in region)
        return {
            "acceleration": mask.acceleration,
            "calibration": size,
            "calibration_source": CALIBRATION_SOURCE,
        }

    def _make_scenario(self, volume: MRIVolume, index: int, condition: Condition) -> Scenario:
        mask = self.mask(volume, condition)
        return make_scenario(self._case(volume, index), condition.kind, condition.asked, mask)

    def scenario(self, volume: MRIVolume, index: int, condition: Condition) -> Scenario:
        """Undersampled data and coil maps."""
        return self._scenario(volume, index, condition)

    def targets(self, volume: MRIVolume, index: int) -> dict[str, np.ndarray]:
        """Those of the targets asked for that this volume has."""
        found = self._case(volume, index).targets
        return {name: self.scored(volume, found[name]) for name in self.meanings if name in found}

    def is_empty(self, volume: MRIVolume, index: int) -> bool:
        """Whether k-space of a slice is all zeros."""
        return self._case(volume, index).empty

    def scored(self, volume: MRIVolume, image: Tensor) -> np.ndarray:
        """Magnitude, cropped as fastMRI does."""
        magnitude = image.detach().abs().to("cpu", torch.float32)
        return (magnitude if volume.scored is None else centre_crop(magnitude, volume.scored)).numpy()

    def data_range(self, target: np.ndarray) -> float | None:
        """Of fastMRI: the largest value of the target volume."""
        return None
