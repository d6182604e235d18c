"""Scans of CT images: what a benchmark needs, projections whose truth is known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.attenuation import MU_WATER, hu_to_mu
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, equispaced_angles, view_indices
from operators.ct_noise import simulate_transmission
from recon.errors import ReconError
from recon.io.ct_files import CTSource, Placement
from recon.io.ct_scan import CTScan
from recon.io.ct_volume import CTVolume
from recon.io.dicom_series import read_dicom_series
from recon.io.hu_volumes import read_hu_volumes

VIEWS_OF_A_TURN = 720
"""Views of the whole scan, of which some are kept."""

SOURCE_ORIGIN, SOURCE_DETECTOR = 570.0, 1040.0
"""Of the fan beam, mm: those of a clinical scanner. Its detector is curved."""

RAYS = 2
"""Rays simulated for each detector element."""

PHOTONS = 2e5
"""Photons of a detector element through air."""

AIR = -1000.0
"""HU, below which nothing attenuates; what scanners write outside of their field of view lies there too."""


@dataclass(frozen=True)
class CTSimulation:
    """A fan-beam scan of images in Hounsfield units, which are averaged for the truth.

    The scan is that of the images' own pixels, by several rays a detector element; reconstructed are pixels
    that are larger by a whole factor, so that the simulation does not share the grid of what is made of it.

    Parameters
    ----------
    views, arc, start
        Which of the :data:`VIEWS_OF_A_TURN` are measured; see :class:`recon.ct.CTSettings`. Radians.
    photons
        Of a detector element through air.
    seed
        Of the noise, which depends on the file and the slice too.
    mu_water
        Attenuation of water in 1/mm.
    size
        Pixels a side of the truth; if not given, the most whose pixels are larger by a whole factor: half as
        many as the images have, where that is a whole number.

    Raises
    ------
    ReconError
        If the photons are no positive number.
    """

    views: int | None = None
    arc: float | None = None
    start: float = 0.0
    photons: float = PHOTONS
    seed: int = 0
    mu_water: float = MU_WATER
    size: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.photons < math.inf:
            raise ReconError(f"photons must be a positive number, got {self.photons}")

    @contextmanager
    def open(self, path: str | Path, *, even: bool = False) -> Iterator[CTSource]:
        """Read images, and give them as the slices of a scan.

        Parameters
        ----------
        path
            DICOM series, or HDF5 with series in Hounsfield units (`recon.io.hu_volumes`). Slices are counted
            from the lowest position.
        even
            Whether the slices have to lie at equal distances, so that their placement is true.

        Raises
        ------
        ReconError
            Naming the file, if it holds no such images, or their pixels are not square or do not fit the
            size.
        """
        path = Path(path)
        volume = read_images(path, even=even)
        shape = tuple(volume.hu.shape[-2:])
        where = f"{path}: the images"
        if not math.isclose(*volume.pixel_spacing, rel_tol=1e-3):
            raise ReconError(f"{where} have pixels of {volume.pixel_spacing} mm, which are not square")
        side = max(shape)
        sizes = [side // factor for factor in range(2, side) if side % factor == 0]
        if not sizes:
            raise ReconError(
                f"{where} have {side} pixels a side, which no size but 1 divides: crop or pad them"
            )
        size = sizes[0] if self.size is None else self.size
        if size not in sizes:
            raise ReconError(
                f"{where} have {side} pixels a side, which can be scanned for a size of "
                f"{', '.join(map(str, sizes))} that divides them, not for {size}"
            )
        source = _SimulatedSource(path, volume, side // size, self)
        yield CTSource(path, "simulated", len(volume.hu), source, None, source.placement)

    def facts(self) -> dict[str, Any]:
        """For provenance, JSON-ready."""
        return {**asdict(self), "views_of_a_turn": VIEWS_OF_A_TURN, "rays_per_detector": RAYS}


def read_images(path: Path, *, even: bool = False) -> CTVolume:
    """Read a volume in Hounsfield units: a DICOM series, or one series of an HDF5 file.

    Slices are sorted by position. Those of HDF5 may lie at unequal distances, if not ``even``: the spacing is
    then their mean; it is 1 mm where the file does not say the positions.

    Raises
    ------
    ReconError
        Naming the file, if it holds no such images, or distances are to be equal and are not.
    """
    if path.is_dir() or path.suffix.lower() in (".dcm", ".ima"):
        return read_dicom_series(path)
    found = read_hu_volumes(path)
    if len(found) != 1:
        raise ReconError(
            f"{path} holds {len(found)} series, of which {path}/NAME is one: "
            f"{', '.join(volume.name for volume in found)}"
        )
    (volume,) = found
    if volume.pixel_spacing is None:
        raise ReconError(f"{path}: the file does not say how large pixels are")
    if volume.z is None:
        return CTVolume(volume.hu, volume.pixel_spacing, 1.0, source=path)
    order = np.argsort(volume.z, kind="stable")
    z = np.asarray(volume.z)[order]
    steps = np.diff(z) if len(z) > 1 else np.ones(1)
    if even and not (steps[0] > 0 and np.allclose(steps, steps[0], rtol=0.02)):
        raise ReconError(
            f"{path}: the slices of a volume follow each other in equal steps, and these lie {steps.min():g} "
            f"to {steps.max():g} mm apart"
        )
    origin = (0.0, 0.0, float(z[0]))
    return CTVolume(volume.hu[order], volume.pixel_spacing, float(steps.mean()) or 1.0, origin, source=path)


class _SimulatedSource:
    """Slices of a volume, scanned when they are asked for."""

    def __init__(self, path: Path, volume: CTVolume, factor: int, simulation: CTSimulation):
        self._path = path
        self._volume = volume
        self._factor = factor
        self._simulation = simulation
        height, width = (math.ceil(n / factor) for n in volume.hu.shape[-2:])
        self._shape = (height, width)
        self._side = factor * volume.pixel_spacing[0]
        self._geometry = self._fan()
        row, column = np.asarray(volume.orientation).reshape(2, 3)
        # The centre of the first pixel, which is larger than the images' own.
        first = volume.position(0) + (factor - 1) / 2 * volume.pixel_spacing[0] * (row + column)
        self.placement = Placement(
            volume.slice_spacing, (float(first[0]), float(first[1]), float(first[2])), volume.orientation
        )

    def read_slice(self, index: int) -> CTScan:
        """Scan one image.

        Raises
        ------
        ReconError
            If there is no such image.
        """
        if not 0 <= index < len(self._volume.hu):
            raise ReconError(f"{self._path}: there is no slice {index}, the file has {len(self._volume.hu)}")
        fine = self._fine(self._volume.hu[index])
        simulation = self._simulation
        operator = CTOperator(
            self._geometry,
            tuple(fine.shape),
            self._side / self._factor,
            engine="on-the-fly",
            rays_per_detector=RAYS,
        )
        word = f"{simulation.seed}/{self._path.stem}/{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest()) >> 1
        data = simulate_transmission(
            operator(hu_to_mu(fine, simulation.mu_water)),
            simulation.photons,
            torch.Generator().manual_seed(seed),
        )
        return CTScan(
            data.line_integrals[None],
            "line_integrals",
            self._path,
            self._geometry,
            pixel_size=self._side,
            image_shape=self._shape,
            slices=(index,),
            reference=F.avg_pool2d(fine[None], self._factor),
            reference_units="HU",
            metadata={"photons": simulation.photons, "values_below_floor": data.num_floored},
        )

    def _fine(self, hu: Tensor) -> Tensor:
        """The image with air for what lacks to whole pixels of the truth."""
        missing = [size * self._factor - n for size, n in zip(self._shape, hu.shape, strict=True)]
        return F.pad(hu.clamp_min(AIR), (0, missing[1], 0, missing[0]), value=AIR)

    def _fan(self) -> FanBeam:
        """Chosen views of a fan that sees the whole image by elements as wide as the pixels of the truth."""
        radius = self._side * math.hypot(*self._shape) / 2
        if radius >= SOURCE_ORIGIN:
            raise ReconError(
                f"{self._path}: images of a radius of {radius:.0f} mm reach the source of the fan beam, "
                f"{SOURCE_ORIGIN:g} mm from the axis"
            )
        spacing = self._side * SOURCE_DETECTOR / SOURCE_ORIGIN
        length = 2 * math.asin(radius / SOURCE_ORIGIN) * SOURCE_DETECTOR
        whole = FanBeam(
            equispaced_angles(VIEWS_OF_A_TURN, 2 * math.pi),
            math.ceil(length / spacing) + 2,
            spacing,
            SOURCE_ORIGIN,
            SOURCE_DETECTOR,
            detector="curved",
        )
        simulation = self._simulation
        return whole.subset(view_indices(whole, simulation.views, simulation.arc, simulation.start))
