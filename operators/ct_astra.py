"""ASTRA's projectors on torch tensors: for scans whose matrix does not fit in memory, and for cone beams.

ASTRA [1]_ computes every ray anew at each call. On the CPU its projectors of a slice are matched to their
backprojection and run on one thread; on a GPU they are not matched. It has no projector of a volume without a
GPU, and asking for one ends the process, so `astra.use_cuda` is asked first. It is the extra ``astra``, under
the GPLv3.

References
----------
.. [1] W. van Aarle et al., "Fast and flexible X-ray tomography using the ASTRA toolbox", Opt. Express
   24:25129-25147, 2016.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.base import Shape
from operators.ct_geometry import ConeBeam, FanBeam, ParallelBeam
from operators.errors import OperatorError

# Names that ASTRA gives to the projectors of a slice on the CPU; for a fan it has no interpolating one.
_CPU_PROJECTORS = {
    (ParallelBeam, "joseph"): "linear",
    (ParallelBeam, "line"): "line",
    (FanBeam, "line"): "line_fanflat",
}


def astra_installed() -> bool:
    """Whether ASTRA is installed; it is not imported."""
    return importlib.util.find_spec("astra") is not None


def astra_has_gpu() -> bool:
    """Whether ASTRA is installed and finds a GPU it can use."""
    if not astra_installed():
        return False
    import astra

    return bool(astra.use_cuda())


def astra_projector_name(geometry: ParallelBeam | FanBeam, projector: str, rays_per_detector: int) -> str:
    """Choose the model of the line integral that ASTRA computes on the CPU.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    projector : {"auto", "joseph", "line"}
        What is asked for.
    rays_per_detector : int
        Rays over the width of a detector element.

    Returns
    -------
    str
        ``joseph`` or ``line``.

    Raises
    ------
    OperatorError
        If ASTRA is not installed or cannot compute it.
    """
    if not astra_installed():
        raise OperatorError(
            "engine='astra' needs astra-toolbox, which is not installed: pip install 'dis-recon[astra]'."
        )
    if isinstance(geometry, FanBeam) and geometry.detector != "flat":
        raise OperatorError("engine='astra' knows no curved detector; take engine='matrix'.")
    if rays_per_detector != 1:
        raise OperatorError(
            f"engine='astra' projects one ray for each detector element, not {rays_per_detector}; take "
            "engine='matrix'."
        )
    if projector == "auto":
        projector = "joseph" if isinstance(geometry, ParallelBeam) else "line"
    if (type(geometry), projector) not in _CPU_PROJECTORS:
        raise OperatorError(f"engine='astra' has no projector {projector!r} for a fan beam, only 'line'.")
    return projector


class AstraSlices:
    """ASTRA's projector of one slice, applied to each of a batch.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    image_shape : (int, int)
        Height and width in pixels.
    pixel_size : float
        Side of a pixel in mm.
    projector : {"joseph", "line"}
        Model of the line integral on the CPU; on a GPU ASTRA has one of its own.
    device : torch.device
        Where the tensors are.

    Raises
    ------
    OperatorError
        If the device is a GPU and ASTRA cannot use it.
    """

    def __init__(
        self,
        geometry: ParallelBeam | FanBeam,
        image_shape: Shape,
        pixel_size: float,
        projector: str,
        device: torch.device,
    ):
        import astra

        if device.type != "cpu" and not astra_has_gpu():
            raise OperatorError(
                f"engine='astra' cannot work on {device}: ASTRA finds no GPU that it can use."
            )
        name = _CPU_PROJECTORS[type(geometry), projector] if device.type == "cpu" else "cuda"
        height, width = (n * pixel_size / 2 for n in image_shape)
        volume = astra.create_vol_geom(*image_shape, -width, width, -height, height)
        self._projector = _kept(self, name, _slice_geometry(geometry), volume)
        self._image_shape, self._range_shape = image_shape, geometry.range_shape

    def forward(self, x: Tensor) -> Tensor:
        """``(n, H, W)`` float32 to ``(n, views, detectors)``."""
        from astra.projector import direct_FP

        y = x.new_empty(len(x), *self._range_shape)
        for image, sinogram in zip(x.detach().contiguous(), y, strict=True):
            direct_FP(self._projector, image, out=sinogram)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, views, detectors)`` float32 to ``(n, H, W)``."""
        from astra.projector import direct_BP

        x = y.new_empty(len(y), *self._image_shape)
        for sinogram, image in zip(y.detach().contiguous(), x, strict=True):
            direct_BP(self._projector, sinogram, out=image)
        return x


class AstraCone:
    """ASTRA's cone-beam projector of a volume, on a GPU.

    Parameters
    ----------
    geometry : ConeBeam
        The scan.
    volume_shape : (int, int, int)
        Slices, height and width in voxels.
    voxel_size : float
        Side of a voxel in mm.

    Raises
    ------
    OperatorError
        If ASTRA is not installed or finds no GPU.
    """

    def __init__(self, geometry: ConeBeam, volume_shape: Shape, voxel_size: float):
        # Without a GPU the next calls would end the process, not raise.
        if not astra_has_gpu():
            raise OperatorError(
                "a cone beam needs astra-toolbox and a GPU that ASTRA can use; one is missing here."
            )
        import astra

        depth, height, width = (n * voxel_size / 2 for n in volume_shape)
        slices, rows, columns = volume_shape
        volume = astra.create_vol_geom(rows, columns, slices, -width, width, -height, height, -depth, depth)
        self._projector = _kept(self, "cuda3d", _cone_geometry(geometry), volume)
        self._volume_shape, self._range_shape = volume_shape, geometry.range_shape

    def forward(self, x: Tensor) -> Tensor:
        """``(n, D, H, W)`` float32 to ``(n, rows, views, columns)``."""
        from astra.projector3d import direct_FP

        y = x.new_empty(len(x), *self._range_shape)
        for volume, sinograms in zip(x.detach().contiguous(), y, strict=True):
            direct_FP(self._projector, volume, out=sinograms)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, rows, views, columns)`` float32 to ``(n, D, H, W)``."""
        from astra.projector3d import direct_BP

        x = y.new_empty(len(y), *self._volume_shape)
        for sinograms, volume in zip(y.detach().contiguous(), x, strict=True):
            direct_BP(self._projector, sinograms, out=volume)
        return x


def _kept(owner: object, name: str, scan: dict[str, Any], volume: dict[str, Any]) -> int:
    """Make a projector that lives in ASTRA's memory as long as its owner."""
    import astra

    projector = astra.create_projector(name, scan, volume)
    weakref.finalize(owner, astra.projector.delete, projector)
    return projector


def _slice_geometry(geometry: ParallelBeam | FanBeam) -> dict[str, Any]:
    """The scan as ASTRA's vectors: a row a view: rays or source, middle of the detector, and its step."""
    import astra

    angles = np.array(geometry.angles)
    along = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    towards_source = np.stack([np.sin(angles), -np.cos(angles)], axis=1)
    middle = geometry.detector_offset * along
    step = geometry.detector_spacing * along
    if isinstance(geometry, ParallelBeam):
        vectors = np.hstack([towards_source, middle, step])
        return astra.create_proj_geom("parallel_vec", geometry.num_detectors, vectors)
    middle = middle - (geometry.source_detector - geometry.source_origin) * towards_source
    vectors = np.hstack([geometry.source_origin * towards_source, middle, step])
    return astra.create_proj_geom("fanflat_vec", geometry.num_detectors, vectors)


def _cone_geometry(geometry: ConeBeam) -> dict[str, Any]:
    """The scan as ASTRA's vectors; in volumes its y grows with the index of the row, so opposite to ours."""
    import astra

    angles = np.array(geometry.angles)
    level = np.zeros_like(angles)
    along = np.stack([np.cos(angles), -np.sin(angles), level], axis=1)
    towards_source = np.stack([np.sin(angles), np.cos(angles), level], axis=1)
    upwards = np.broadcast_to([0.0, 0.0, 1.0], along.shape)
    offset_z, offset_u = geometry.detector_offset
    spacing_z, spacing_u = geometry.detector_spacing
    behind = geometry.source_detector - geometry.source_origin
    middle = offset_u * along + offset_z * upwards - behind * towards_source
    source = geometry.source_origin * towards_source
    vectors = np.hstack([source, middle, spacing_u * along, spacing_z * upwards])
    return astra.create_proj_geom("cone_vec", *geometry.detector_shape, vectors)


def check_outside(geometry: FanBeam | ConeBeam, image_shape: Shape, pixel_size: float) -> None:
    """Raise if the source would pass through the image.

    Raises
    ------
    OperatorError
        If the distance to the source is less than half the diagonal of a slice.
    """
    reach = math.hypot(*image_shape[-2:]) * pixel_size / 2
    if geometry.source_origin <= reach:
        raise OperatorError(
            f"the source, {geometry.source_origin:.5g} mm from the axis, would be within the image, which "
            f"reaches {reach:.5g} mm from it."
        )
