"""Corrections of a scan: rings, beam hardening, the axis of rotation, a field of view that is too small."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from operators.attenuation import MU_WATER
from operators.beam_hardening import BeamHardeningCorrection
from operators.centre_of_rotation import find_detector_offset
from operators.ct_geometry import FanBeam, ParallelBeam
from operators.errors import OperatorError
from operators.rings import suppress_rings
from operators.truncation import pad_truncated
from recon.errors import ReconError
from recon.io.ct_scan import CTScan

Geometry = ParallelBeam | FanBeam

BEYOND = 0.25
"""How far a truncated scan is continued on either side, as a fraction of the detector's width."""

RING_WIDTH = 21
"""Detector elements of the median that finds stripes, at most: an eighth of the detector, where that is less,
as the median must not see the shape of the object."""


@dataclass(frozen=True)
class CTCorrections:
    """Which corrections are made.

    Parameters
    ----------
    rings
        Suppress what detector elements add of their own (:func:`operators.rings.suppress_rings`).
    beam_hardening
        Polynomial from measured to monochromatic line integrals; none if not given.
    truncated
        The object is wider than the field of view: it is given room beyond, and filtered back-projection,
        which needs whole projections, gets them continued (:func:`operators.truncation.pad_truncated`).
    detector_offset
        Middle of the detector in mm from where the axis of rotation is seen; ``"auto"``: found from the data;
        ``None``: what the file says, and found from the data if it says nothing.

    Raises
    ------
    ReconError
        If the offset is another word, or not finite.
    """

    rings: bool = False
    beam_hardening: BeamHardeningCorrection | None = None
    truncated: bool = False
    detector_offset: float | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        offset = self.detector_offset
        if offset is None or offset == "auto":
            return
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise ReconError(f"the detector's offset is a number of mm or 'auto', not {offset!r}")

    def facts(self) -> dict[str, Any]:
        """For provenance, JSON-ready."""
        polynomial = self.beam_hardening
        return {
            "rings": self.rings,
            "beam_hardening": None if polynomial is None else asdict(polynomial),
            "truncated": self.truncated,
        }

    def apply(self, scan: CTScan) -> CTScan:
        """Correct line integrals of all views: first rings, which the detector makes, then the beam.

        Raises
        ------
        ReconError
            Naming the file, if that is not possible.
        """
        sinogram = scan.sinogram
        try:
            if self.rings:
                eighth = sinogram.shape[-1] // 8
                sinogram = suppress_rings(sinogram, size=max(3, min(RING_WIDTH, eighth - 1 + eighth % 2)))
            if self.beam_hardening is not None:
                sinogram = self.beam_hardening(sinogram)
        except OperatorError as error:
            raise ReconError(f"{scan.source}: {error}") from None
        return scan if sinogram is scan.sinogram else replace(scan, sinogram=sinogram)

    def centred(self, scan: CTScan, geometry: Geometry, *, told: bool) -> Geometry:
        """Geometry with the offset that was asked for.

        Parameters
        ----------
        scan
            With the data, if the offset is to be found.
        geometry
            Of the scan.
        told
            Whether the file says where the axis of rotation is.

        Raises
        ------
        ReconError
            Naming the file, if the offset cannot be found.
        """
        offset = self.detector_offset
        if offset is None and told:
            return geometry
        if offset is None or offset == "auto":
            try:
                offset = find_detector_offset(scan.sinogram[0], geometry)
            except OperatorError as error:
                raise ReconError(
                    f"{scan.source}: the centre of rotation is not found, give the detector's offset in mm "
                    f"({str(error).rstrip('.')})"
                ) from None
        return replace(geometry, detector_offset=float(offset))


@dataclass(frozen=True)
class Room:
    """Room around an image for what lies beyond the field of view.

    Parameters
    ----------
    image_shape
        ``(H, W)`` of the image that is wanted.
    margin
        Pixels on every side of it.
    pad
        Detector elements added to the projections at either end; 0 for solvers that take them as they are.
    """

    image_shape: tuple[int, int]
    margin: int = 0
    pad: int = 0

    @classmethod
    def around(
        cls, image_shape: tuple[int, int], geometry: Geometry, *, truncated: bool, continued: bool
    ) -> Room:
        """Room by :data:`BEYOND`, if the scan is truncated."""
        if not truncated:
            return cls(image_shape)
        pad = math.ceil(BEYOND * geometry.num_detectors) if continued else 0
        return cls(image_shape, math.ceil(BEYOND * max(image_shape)), pad)

    @property
    def shape(self) -> tuple[int, int]:
        """``(H, W)`` with the margin."""
        return self.image_shape[0] + 2 * self.margin, self.image_shape[1] + 2 * self.margin

    def geometry(self, geometry: Geometry) -> Geometry:
        """Geometry of the continued projections."""
        return replace(geometry, num_detectors=geometry.num_detectors + 2 * self.pad)

    def continued(self, sinogram: Tensor, geometry: Geometry, mu_water: float | None) -> Tensor:
        """Projections ``(views, detectors)``, continued beyond the ends of the detector.

        By a cylinder of water, where its attenuation is known in the units of the scan, else by mirroring.
        """
        if not self.pad:
            return sinogram
        method = "mirror" if mu_water is None else "water"
        return pad_truncated(
            sinogram, geometry, self.pad, method=method, mu_water=MU_WATER if mu_water is None else mu_water
        )[0]

    def cropped(self, image: Tensor) -> Tensor:
        """The image ``(..., H, W)`` that is wanted, without the margin."""
        height, width = self.image_shape
        return image[..., self.margin : self.margin + height, self.margin : self.margin + width]
