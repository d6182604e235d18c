"""Volumes of CT: slices in HU with discs planted, scanned on finer pixels with photon noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ct_cases import (
    FINENESS,
    RAYS,
    SOURCE_DETECTOR,
    SOURCE_ORIGIN,
    Case,
    Scan,
    read_cases,
    read_series,
    source_of,
)
from benchmarks.ct_quality import Task
from benchmarks.matrix.configuration import CT_TARGET, Configuration, VolumeEntry
from benchmarks.matrix.study import Condition
from operators.attenuation import MU_WATER
from recon.errors import ReconError


@dataclass(frozen=True, eq=False)
class CTVolume:
    """Slices of one series.

    Attributes
    ----------
    name : str
        What tables call it.
    path, series : Path, str
        File and series in it.
    slices : tuple of int
        Indices in the series.
    source : str
        Name and licence.
    subject : str
        Whom it shows.
    note : str
        What a reader has to know of it.
    """

    name: str
    path: Path
    series: str
    slices: tuple[int, ...]
    source: str
    subject: str
    note: str = ""
    simulated: bool = True

    @cached_property
    def cases(self) -> dict[int, Case]:
        """Slices with what is planted in them."""
        read = read_cases(self.path, self.series, list(self.slices))
        return dict(zip(self.slices, read, strict=True))


def open_volume(entry: VolumeEntry) -> CTVolume:
    """Find a series.

    Raises
    ------
    ReconError
        Naming the file, if there is no such series or slice.
    """
    assert entry.series is not None
    volume, _ = read_series(entry.path, entry.series)
    slices = tuple(range(len(volume.hu))) if entry.slices is None else entry.slices
    for index in slices:
        if index >= len(volume.hu):
            raise ReconError(
                f"{entry.where}: {entry.path}: {volume.name} has no slice {index}; it has {len(volume.hu)}"
            )
    name = entry.name or entry.series
    subject = entry.subject or name
    return CTVolume(name, entry.path, entry.series, slices, source_of(volume), subject, entry.note)


class CTStudy:
    """Volumes and scans of a configuration; images are scored in units of water, ``1 + HU / 1000``."""

    modality = "ct"

    def __init__(self, configuration: Configuration, device: str = "cpu") -> None:
        self.volumes = [open_volume(entry) for entry in configuration.data]
        self.left_out: dict[str, str] = {}
        self.photons, self.device = configuration.photons, device
        self._scans: dict[str, Scan] = {}
        self.conditions: list[Condition] = []
        for entry in configuration.scans:
            scan = Scan(entry.beam, entry.views, entry.arc)
            label = f"{scan.beam}, {scan.name}"
            family = f"{scan.beam}, {'views' if scan.arc is None else 'arc in degrees'}"
            asked = float(scan.views if scan.arc is None else scan.arc)
            self._scans[label] = scan
            self.conditions.append(Condition(label, scan.beam, asked, family))
        self.meanings = {
            CT_TARGET: "mean over 2 × 2 pixels of what was scanned, in units of water, 1 + HU / 1000"
        }
        self._task = lru_cache(maxsize=1)(self._make_task)

    @property
    def notes(self) -> dict[str, str]:
        """What the page says about the scans."""
        case = next(iter(self.volumes[0].cases.values()))
        height, width = case.shape
        return {
            "scans": "simulated on pixels half as wide as those that are reconstructed, "
            f"{height} × {width} of {case.pixel_size:.3f} mm; {self.photons:.3g} photons an element through "
            f"air, water {MU_WATER} /mm. Parallel beam over half a turn; fan beam over a whole turn, "
            f"{SOURCE_ORIGIN:g} mm from source to axis, {SOURCE_DETECTOR:g} mm to a curved detector. Arcs "
            "have one view a degree. The noise of a scan does not depend on the seeds, which are of the "
            "samples",
            "data": "weighted by their noise, but of equal weight for solvers that follow the gradient; the "
            "peak of PSNR and SSIM is the range of the truth",
        }

    def identity(self, volume: CTVolume, index: int, condition: Condition) -> dict[str, Any]:
        """Everything that the data of a slice depend on."""
        case, scan = volume.cases[index], self._scans[condition.label]
        return {
            "case": [case.name, case.digest],
            "scan": asdict(scan),
            "geometry": scan.geometry(case.shape, case.pixel_size).hash(),
            "photons": self.photons,
            "simulation": [FINENESS, RAYS],
        }

    def facts(self, volume: CTVolume, condition: Condition) -> dict[str, Any]:
        """There are no coils; the number of views stands for the acceleration."""
        scan = self._scans[condition.label]
        return {"acceleration": None, "calibration": None, "calibration_source": None, "views": scan.views}

    def _make_task(self, volume: CTVolume, index: int, condition: Condition) -> Task:
        scan = self._scans[condition.label]
        task = Task(volume.cases[index], scan, self.photons, seed=0, device=self.device)
        task.prepare()  # lazily, the first method of a scan would be charged with it
        return task

    def scenario(self, volume: CTVolume, index: int, condition: Condition) -> Task:
        """Simulated scan, with its operator."""
        return self._task(volume, index, condition)

    def targets(self, volume: CTVolume, index: int) -> dict[str, np.ndarray]:
        """The truth."""
        return {CT_TARGET: in_water(volume.cases[index].truth)}

    def is_empty(self, volume: CTVolume, index: int) -> bool:
        """Scans are simulated, so there always is something."""
        return False

    def scored(self, volume: CTVolume, image: Tensor) -> np.ndarray:
        """Attenuation in units of water of an image in HU."""
        return in_water(image.detach().to("cpu", torch.float64).numpy())

    def data_range(self, target: np.ndarray) -> float | None:
        """Largest minus smallest value of the truth."""
        return float(np.ptp(target))


def in_water(hu: np.ndarray) -> np.ndarray:
    """Attenuation in units of water, float32, of Hounsfield units."""
    return (1 + hu / 1000).astype(np.float32)
