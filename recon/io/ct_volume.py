"""A CT image volume in Hounsfield units, with where it lies in the patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError


@dataclass(frozen=True, eq=False)
class CTVolume:
    """Slices in Hounsfield units.

    Coordinates are DICOM's: x to the patient's left, y to the back, z to the head, in mm.

    Attributes
    ----------
    hu : Tensor
        ``(D, H, W)`` float32, slices in the order of their positions along `normal`.
    pixel_spacing : tuple of float
        Distance in mm of rows and of columns.
    slice_spacing : float
        Distance in mm of slices; of a single slice, its thickness.
    origin : tuple of float
        Position of the centre of the first pixel of the first slice.
    orientation : tuple of float
        Direction of the rows (in which columns are counted), then of the columns: six direction cosines.
    source : Path or None
        Where it was read from.
    metadata : mapping
        Kernel, voltage and the like. Never what identifies a patient.

    Raises
    ------
    ReconError
        If the shape, a spacing or the orientation is not usable, or values are not finite.
    """

    hu: Tensor
    pixel_spacing: tuple[float, float]
    slice_spacing: float
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    source: Path | None = None
    metadata: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "the volume" if self.source is None else f"{self.source}: the volume"
        if self.hu.ndim != 3 or 0 in self.hu.shape or self.hu.dtype != torch.float32:
            raise ReconError(
                f"{where} must be float32 (slices, height, width), got {self.hu.dtype} {tuple(self.hu.shape)}"
            )
        if not bool(torch.isfinite(self.hu).all()):
            raise ReconError(f"{where} holds NaN or infinite values")
        lengths = (*self.pixel_spacing, self.slice_spacing)
        if not all(np.isfinite(lengths)) or min(lengths) <= 0:
            raise ReconError(f"{where} has the spacings {lengths}, which must be positive")
        row, column = np.asarray(self.orientation).reshape(2, 3)
        if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
            raise ReconError(
                f"{where} has the orientation {self.orientation}, which is not two orthogonal directions"
            )

    @property
    def normal(self) -> np.ndarray:
        """Direction in which the slices follow each other, (3,)."""
        row, column = np.asarray(self.orientation).reshape(2, 3)
        return np.cross(row, column)

    def position(self, index: int) -> np.ndarray:
        """Centre of the first pixel of a slice, (3,), mm."""
        return np.asarray(self.origin) + index * self.slice_spacing * self.normal

    @property
    def affine(self) -> np.ndarray:
        """From (column, row, slice) to mm, (4, 4), in DICOM's coordinates."""
        row, column = np.asarray(self.orientation).reshape(2, 3)
        matrix = np.eye(4)
        matrix[:3, 0] = row * self.pixel_spacing[1]
        matrix[:3, 1] = column * self.pixel_spacing[0]
        matrix[:3, 2] = self.normal * self.slice_spacing
        matrix[:3, 3] = self.origin
        return matrix
