"""Test cases of CT: slices of a patient with planted discs, and the scans that are simulated of them.

A scan is simulated on pixels half as wide as those that are reconstructed, with detector elements that
measure the mean over several rays and count photons; the truth is the mean of 2 × 2 pixels.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ct_measures import (
    LEAST_PLACES,
    NPS_SIDE,
    RING,
    Disc,
    away_from,
    noise_squares,
    place,
    room,
    tissue,
)
from operators.attenuation import MU_WATER, hu_to_mu
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from operators.ct_noise import simulate_transmission
from priors.ct_images import HU_OUTSIDE
from recon.errors import ReconError
from recon.io.hu_volumes import HUVolume, read_hu_volumes

FINENESS = 2
"""Pixels simulated for each one reconstructed, along each axis."""

CONTRASTS, INSERT_RADIUS = (20.0, 40.0, 80.0), 6.0
"""Inserts of low contrast: HU above their surroundings, and radius in mm."""

EDGE_CONTRAST, EDGE_RADIUS, EDGE_REACH = 800.0, 12.0, 8.0
"""Disc in the lung at whose edge resolution is measured: HU, mm, and how far from the edge that looks, mm."""

OFF_GRID = (0.5, 0.25)
"""Of its centre from a pixel's: about a pixel, symmetry leaves few distances of pixels from the edge."""

SOFT, LUNG = (-20.0, 110.0), (-950.0, -700.0)
"""Between which values in HU tissue is taken for soft tissue and for lung."""

MARGIN = 3.0
"""Distance in mm that regions keep from the edge of their tissue and from what was planted."""

SOURCE_ORIGIN, SOURCE_DETECTOR = 570.0, 1040.0
"""Of the fan beam, mm: those of a clinical scanner. Its detector is curved."""

RAYS, BLOCK = 2, 10
"""Rays simulated for each detector element, and views whose matrix is in memory at a time."""


@dataclass(frozen=True, eq=False)
class Case:
    """A slice with what was planted, HU.

    Attributes
    ----------
    name : str
        What a table calls it.
    source : str
        Series and licence.
    fine : ndarray
        Image that is scanned, ``(2H, 2W)``.
    truth, background : ndarray
        Means of 2 × 2 pixels ``(H, W)``: of the image that is scanned, and without what was planted.
    pixel_size : float
        Of the truth, mm.
    inserts : tuple of Disc
        Of low contrast, in soft tissue.
    edge : Disc
        Of high contrast, in the lung.
    """

    name: str
    source: str
    fine: np.ndarray
    truth: np.ndarray
    background: np.ndarray
    pixel_size: float
    inserts: tuple[Disc, ...]
    edge: Disc

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the truth."""
        return self.truth.shape[0], self.truth.shape[1]

    @property
    def data_range(self) -> float:
        """Largest minus smallest value of the truth, HU."""
        return float(np.ptp(self.truth))

    @cached_property
    def soft(self) -> np.ndarray:
        """Soft tissue, a margin from its edges and from what was planted."""
        return self._region(SOFT)

    @cached_property
    def lung(self) -> np.ndarray:
        """Lung, a margin from its edges, its vessels and from what was planted."""
        return self._region(LUNG)

    @cached_property
    def flat(self) -> np.ndarray:
        """Soft tissue up to its edges, inserts included: where noise texture is measured."""
        return tissue(self.background, *SOFT)

    @cached_property
    def empty_places(self) -> np.ndarray:
        """Pixels about which the observer's template fits into soft tissue and sees no insert."""
        reach = RING[1] * INSERT_RADIUS / self.pixel_size
        taken = [(d.row, d.column, reach + d.radius / self.pixel_size) for d in self.inserts]
        return (room(self.flat) > reach) & away_from(self.shape, taken)

    @cached_property
    def digest(self) -> str:
        """Hash of the image that is scanned and its pixel size."""
        content = self.fine.astype(np.float32).tobytes() + repr(self.pixel_size).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _region(self, values: tuple[float, float]) -> np.ndarray:
        planted = [
            (d.row, d.column, (d.radius + MARGIN) / self.pixel_size) for d in (*self.inserts, self.edge)
        ]
        inner = room(tissue(self.background, *values)) > MARGIN / self.pixel_size
        region = inner & away_from(self.shape, planted)
        if not region.any():
            raise ReconError(f"{self.name}: no tissue between {values[0]:g} and {values[1]:g} HU is left")
        return region


def read_series(path: Path, series: str) -> tuple[HUVolume, float]:
    """Read one series of a file, and the side of its pixels in mm.

    Raises
    ------
    ReconError
        Naming the file and the series, if there is none, it does not say how large its pixels are, or they
        are not square.
    """
    found = read_hu_volumes(path / series)
    if len(found) != 1:
        raise ReconError(f"{path}: {series} are {len(found)} series; name one of them")
    spacing = found[0].pixel_spacing
    if spacing is None or not math.isclose(*spacing, rel_tol=1e-4):
        where = f"{path}: {found[0].name}"
        raise ReconError(f"{where}: square pixels of a known size are needed, got {spacing}")
    return found[0], spacing[0]


def source_of(volume: HUVolume) -> str:
    """Name and licence of a series."""
    return f"{volume.name}, {volume.attributes.get('licence', 'licence unknown')}"


def read_cases(path: Path, series: str, slices: list[int]) -> list[Case]:
    """Read slices of a series and plant discs in them.

    Raises
    ------
    ReconError
        Naming the file and the series, if there is none, it does not say how large its pixels are, they are
        not square, there is no such slice, or the discs do not fit.
    """
    volume, side = read_series(path, series)
    where = f"{path}: {volume.name}"
    cases = []
    for index in slices:
        if not 0 <= index < len(volume.hu):
            raise ReconError(f"{where}: there is no slice {index}, the series has {len(volume.hu)}")
        try:
            cases.append(
                make_case(
                    f"slice {index}",
                    volume.hu[index].numpy(),
                    FINENESS * side,
                    source_of(volume),
                )
            )
        except ReconError as error:
            raise ReconError(f"{where}, slice {index}: {error}") from None
    return cases


def make_case(name: str, hu: np.ndarray, pixel_size: float, source: str = "") -> Case:
    """Plant discs in an image in HU ``(2H, 2W)``; `pixel_size` is that of the reconstruction, mm.

    Inserts go where soft tissue has most room, each with its observer's ring, the strongest where there is
    least; the disc for the edge into the roomiest place of the lung.

    Raises
    ------
    ReconError
        If the image has an odd side, the discs do not fit, or nothing is left to measure noise in.
    """
    if hu.ndim != 2 or hu.shape[0] % FINENESS or hu.shape[1] % FINENESS:
        raise ReconError(f"an image of even sides is needed, got {hu.shape}")
    fine = hu.astype(np.float64).clip(HU_OUTSIDE)  # what scanners write outside of their field
    background = reduced(fine)
    try:
        soft_room = [RING[1] * INSERT_RADIUS / pixel_size] * len(CONTRASTS)
        insert_places = place(tissue(background, *SOFT), soft_room)
        (edge_place,) = place(tissue(background, *LUNG), [(EDGE_RADIUS + EDGE_REACH) / pixel_size + 1])
    except ReconError as error:
        raise ReconError(f"what is to be planted does not fit: {error}") from None
    inserts = tuple(
        Disc(row, column, INSERT_RADIUS, contrast)
        for (row, column), contrast in zip(insert_places, CONTRASTS, strict=True)
    )
    edge = Disc(edge_place[0] + OFF_GRID[0], edge_place[1] + OFF_GRID[1], EDGE_RADIUS, EDGE_CONTRAST)
    for disc in (*inserts, edge):
        fine = fine + disc.contrast * disc.coverage(
            (background.shape[0], background.shape[1]), pixel_size, FINENESS
        )
    case = Case(name, source, fine, reduced(fine), background, pixel_size, inserts, edge)
    if not noise_squares(case.flat):
        raise ReconError(f"no square of {NPS_SIDE} × {NPS_SIDE} pixels for noise fits into soft tissue")
    if np.count_nonzero(case.empty_places) < LEAST_PLACES:
        raise ReconError(f"there are fewer than {LEAST_PLACES} empty places to compare an insert with")
    return case


def reduced(fine: np.ndarray) -> np.ndarray:
    """Mean of 2 × 2 pixels."""
    height, width = (n // FINENESS for n in fine.shape)
    return fine.reshape(height, FINENESS, width, FINENESS).mean(axis=(1, 3))


# -- scans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """Which rays are measured.

    Attributes
    ----------
    beam : str
        ``"parallel"`` or ``"fan"``.
    views : int
        Number of views.
    arc : float, optional
        Arc in degrees that they cover, vertical rays in its middle; else half a turn of parallel rays, a
        whole turn of a fan.
    """

    beam: str
    views: int
    arc: float | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.views} views" if self.arc is None else f"{self.arc:g}°, {self.views} views"

    def geometry(self, shape: tuple[int, int], pixel_size: float) -> ParallelBeam | FanBeam:
        """Geometry in which all of an image of that size is seen, by elements as wide as its pixels.

        Raises
        ------
        ReconError
            If there is no such beam, or the image reaches the source of the fan.
        """
        if self.beam not in ("parallel", "fan"):
            raise ReconError(f"a beam is parallel or fan, not {self.beam!r}")
        turn = math.pi if self.beam == "parallel" else 2 * math.pi
        arc = turn if self.arc is None else math.radians(self.arc)
        angles = equispaced_angles(self.views, arc, 0.0 if self.arc is None else -arc / 2)
        radius = pixel_size * math.hypot(*shape) / 2
        if self.beam == "parallel":
            return ParallelBeam(angles, math.ceil(2 * radius / pixel_size) + 2, pixel_size)
        if radius >= SOURCE_ORIGIN:
            raise ReconError(f"an image of radius {radius:.0f} mm reaches the source of the fan beam")
        spacing = pixel_size * SOURCE_DETECTOR / SOURCE_ORIGIN
        length = 2 * math.asin(radius / SOURCE_ORIGIN) * SOURCE_DETECTOR
        return FanBeam(
            angles,
            math.ceil(length / spacing) + 2,
            spacing,
            SOURCE_ORIGIN,
            SOURCE_DETECTOR,
            detector="curved",
        )


@dataclass(frozen=True, eq=False)
class Measurement:
    """A simulated scan.

    Attributes
    ----------
    sinogram : Tensor
        Noisy line integrals ``(views, detectors)``, float32.
    operator : CTOperator
        On the pixels to be reconstructed.
    starved : float
        Part of the data that fewer than one photon made.
    """

    sinogram: Tensor
    operator: CTOperator
    starved: float


def simulate(case: Case, scan: Scan, photons: float, seed: int = 0) -> Measurement:
    """Scan a case with so many photons an element through air; the noise depends on seed, case and scan."""
    return scanned(torch.from_numpy(case.fine).float(), case.pixel_size, scan, photons, f"{seed}/{case.name}")


def scanned(fine: Tensor, pixel_size: float, scan: Scan, photons: float, key: str) -> Measurement:
    """Scan HU ``(..., 2H, 2W)`` on pixels half as wide as those of `pixel_size` mm that are reconstructed.

    The noise of the ``(..., views, detectors)`` depends on the key and the scan.
    """
    shape = (fine.shape[-2] // FINENESS, fine.shape[-1] // FINENESS)
    geometry = scan.geometry(shape, pixel_size)
    mu = hu_to_mu(fine, MU_WATER)
    parts = []
    for first in range(0, geometry.num_views, BLOCK):
        views = range(first, min(first + BLOCK, geometry.num_views))
        part = CTOperator(
            geometry.subset(views), mu.shape[-2:], pixel_size / FINENESS, rays_per_detector=RAYS
        )
        parts.append(part(mu))
    digest = hashlib.blake2b(f"{key}/{scan}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) % 2**63)
    data = simulate_transmission(torch.cat(parts, dim=-2), photons, generator)
    return Measurement(data.line_integrals, CTOperator(geometry, shape, pixel_size), data.fraction_floored)
