"""What a file with CT projections holds, whatever its format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from operators.ct_geometry import FanBeam, ParallelBeam, checked_indices
from operators.ct_noise import log_transform
from operators.errors import OperatorError
from operators.flat_field import flat_dark_correction
from recon.errors import ReconError

Kind = Literal["line_integrals", "counts"]


@dataclass(frozen=True, eq=False)
class CTScan:
    """Slices of a scan, with what the file says of how they were measured.

    Attributes
    ----------
    sinogram : Tensor
        ``(slices, views, detectors)`` float32: line integrals without units, or counts.
    kind : str
        ``line_integrals`` or ``counts``.
    source : Path
        The file or folder it was read from.
    geometry : ParallelBeam, FanBeam or None
        How the rays run; None if the file does not tell.
    flats, darks : Tensor or None
        ``(slices, n, detectors)`` float32: exposures without object and without beam, for counts.
    pixel_size : float or None
        Side in mm of the pixels of the image that the file's makers expect.
    image_shape : tuple of int or None
        ``(H, W)`` of that image.
    length_unit : str
        ``mm``; or ``element``, where neither the file nor the reader's caller gave the size of a detector
        element: the geometry then has elements of size 1, and attenuation comes out per element.
    slices : tuple of int
        Which slices of the file these are.
    reference : Tensor or None
        ``(slices, H, W)`` float32, an image that came with the data, in `reference_units`.
    reference_units : str
        ``1/mm``, ``HU`` or ``label``; empty without a reference.
    metadata : mapping
        What else is worth keeping: voltage, date, licence. Never what identifies a patient.

    Raises
    ------
    ReconError
        Naming `source`, if shapes do not fit each other or the geometry, or values are not finite or, being
        counts, negative.
    """

    sinogram: Tensor
    kind: Kind
    source: Path
    geometry: ParallelBeam | FanBeam | None = None
    flats: Tensor | None = None
    darks: Tensor | None = None
    pixel_size: float | None = None
    image_shape: tuple[int, int] | None = None
    length_unit: Literal["mm", "element"] = "mm"
    slices: tuple[int, ...] = (0,)
    reference: Tensor | None = None
    reference_units: str = ""
    metadata: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.sinogram.shape)
        if len(shape) != 3 or 0 in shape:
            raise ReconError(
                f"{self.source}: the sinogram must have shape (slices, views, detectors), got {shape}"
            )
        if len(self.slices) != shape[0]:
            raise ReconError(f"{self.source}: {shape[0]} slices were read, but {len(self.slices)} are named")
        if self.geometry is not None:
            views, detectors = len(self.geometry.angles), self.geometry.num_detectors
            if views != shape[1]:
                raise ReconError(f"{self.source}: there are {views} angles for {shape[1]} views")
            if detectors != shape[2]:
                raise ReconError(
                    f"{self.source}: the geometry has {detectors} detector elements, but the sinogram "
                    f"{shape[2]}"
                )
        named = {"sinogram": self.sinogram, "flats": self.flats, "darks": self.darks}
        for name, values in named.items():
            if values is None:
                continue
            if values.dtype != torch.float32:
                raise ReconError(f"{self.source}: the {name} must be float32, got {values.dtype}")
            if values.ndim != 3 or (values.shape[0], values.shape[2]) != (shape[0], shape[2]):
                raise ReconError(
                    f"{self.source}: the {name} must have shape ({shape[0]}, n, {shape[2]}) as the sinogram "
                    "has, got "
                    f"{tuple(values.shape)}"
                )
            check_values(values, f"{self.source}: the {name}", counts=self.kind == "counts")

    @property
    def num_slices(self) -> int:
        """Number of slices that were read."""
        return self.sinogram.shape[0]

    def subset(self, indices: Sequence[int]) -> CTScan:
        """The same scan with some of its views, data and geometry alike.

        Parameters
        ----------
        indices : sequence of int
            Views to keep, as `operators.ct_geometry.view_indices` gives them.

        Raises
        ------
        ReconError
            If the scan has no geometry, or no such view.
        """
        if self.geometry is None:
            raise ReconError(f"{self.source}: views cannot be chosen, the scan has no geometry")
        views = self.sinogram.shape[1]
        refused = f"{self.source}: views from 0 to {views - 1} can be chosen, got {list(indices)}"
        try:
            chosen = checked_indices(indices, views)
        except OperatorError as error:
            raise ReconError(f"{refused} ({error})") from error
        if chosen != list(indices):  # a negative one
            raise ReconError(refused)
        return dataclasses.replace(
            self, sinogram=self.sinogram[:, chosen], geometry=self.geometry.subset(chosen)
        )

    def to_line_integrals(self, *, photons: float | None = None, floor: float = 1e-5) -> CTScan:
        """Line integrals of counts: flat and dark correction, then the logarithm.

        Parameters
        ----------
        photons : float, optional
            Counts of the incident beam; needed if there are no flats.
        floor : float
            Smallest transmission taken at its word.

        Returns
        -------
        CTScan
            The same scan with `kind` ``line_integrals``; the metadata say how many values were below the
            floor. A scan that holds line integrals is returned as it is.

        Raises
        ------
        ReconError
            If there are neither flats nor positive `photons`, or the correction is not possible.
        """
        if self.kind == "line_integrals":
            return self
        try:
            if self.flats is not None:
                transmission = flat_dark_correction(self.sinogram, self.flats, self.darks)
            elif photons is not None:
                if not 0 < photons < math.inf:
                    raise ReconError(
                        f"{self.source}: the photons of the incident beam must be a positive number, got "
                        f"{photons:g}"
                    )
                dark = 0.0 if self.darks is None else self.darks.mean(1, keepdim=True)
                transmission = (self.sinogram - dark) / photons
            else:
                raise ReconError(
                    f"{self.source}: counts without flats become line integrals only if the photons of the "
                    "incident "
                    "beam are given"
                )
            result = log_transform(transmission, 1.0, floor=floor)
        except ReconError:
            raise
        except ValueError as error:
            raise ReconError(f"{self.source}: {error}") from error
        return dataclasses.replace(
            self,
            sinogram=result.line_integrals,
            kind="line_integrals",
            flats=None,
            darks=None,
            metadata={**self.metadata, "values_below_floor": result.num_floored},
        )


def angles_in_radians(
    values: np.ndarray, unit: str, where: str, *, expected: int | None = None
) -> tuple[float, ...]:
    """Check the angles of a file, and give them in radians.

    Parameters
    ----------
    values : numpy.ndarray
        Angles, one a view.
    unit : str
        ``degrees`` or ``radians``: what the file, or the person, says they are.
    where : str
        How messages begin: file and dataset.
    expected : int, optional
        Number of views.

    Returns
    -------
    tuple of float
        Radians, within two turns of 0.

    Raises
    ------
    ReconError
        If there are none, or not as many as views; if they are not finite numbers; if they are said to be
        radians and span more than two turns, as degrees would; or said to be degrees and eight or more of
        them span less than 6.4°, as radians of a turn would.
    """
    angles = np.asarray(values)
    if unit not in ("degrees", "radians"):
        raise ReconError(f"{where}: the unit of angles is degrees or radians, not {unit!r}")
    if angles.dtype.kind not in "iuf":
        raise ReconError(f"{where} must be real numbers, got {angles.dtype}")
    angles = angles.astype(np.float64).ravel()
    if not angles.size:
        raise ReconError(f"{where} holds no angles")
    if expected is not None and angles.size != expected:
        raise ReconError(f"{where} holds {angles.size} angles for {expected} views")
    if not np.isfinite(angles).all():
        raise ReconError(f"{where} holds NaN or infinite angles")
    span = float(np.ptp(angles))
    if unit == "radians" and span > 4 * math.pi + 1e-6:
        raise ReconError(
            f"{where} spans {span:.4g} radians, {span / (2 * math.pi):.1f} turns: these look like degrees"
        )
    if unit == "degrees" and angles.size >= 8 and span < 6.4:
        raise ReconError(
            f"{where} holds {angles.size} angles that span {span:.4g} degrees only: these look like radians"
        )
    return within_two_turns(np.deg2rad(angles) if unit == "degrees" else angles)


def within_two_turns(radians: np.ndarray) -> tuple[float, ...]:
    """Take whole turns off angles, all alike, until they lie within two turns of 0.

    A rotation stage counts on from scan to scan.
    """
    if np.abs(radians).max() > 4 * math.pi:
        radians = radians - 2 * math.pi * math.floor(float(radians.min()) / (2 * math.pi))
        if radians.max() > 4 * math.pi:
            radians = radians - 2 * math.pi
    return tuple(float(angle) for angle in radians)


def check_values(values: Tensor, where: str, *, counts: bool = False) -> None:
    """Raise unless values are finite and, being counts, not negative; `where` names file and dataset."""
    if not bool(torch.isfinite(values).all()):
        raise ReconError(f"{where} holds NaN or infinite values")
    if counts and bool((values < 0).any()):
        raise ReconError(f"{where} holds negative values, which are no counts")
