"""Cone-beam CT of a volume, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from operators.base import LinearOperator, Shape, linear_function
from operators.ct_astra import AstraCone, check_outside
from operators.ct_geometry import ConeBeam
from operators.errors import OperatorError


class ConeBeamOperator(LinearOperator):
    """Cone-beam CT by ASTRA, ``(D, H, W)`` to ``(rows, views, columns)``.

    Parameters
    ----------
    geometry : ConeBeam
        The scan.
    volume_shape : (int, int, int)
        Slices D, height H and width W in voxels.
    voxel_size : float
        Side of a voxel in mm.

    Raises
    ------
    OperatorError
        If ASTRA is not installed or there is no GPU for it, or the source would be within the volume.

    Notes
    -----
    Real volumes in float32. ASTRA's projector and backprojector of the GPU are not matched.
    """

    matched_adjoint = False

    _unit: Tensor

    def __init__(self, geometry: ConeBeam, volume_shape: Iterable[int], voxel_size: float):
        shape: Shape = tuple(int(n) for n in volume_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise OperatorError(f"ConeBeamOperator needs a volume (D, H, W), all positive, got {shape}.")
        if not voxel_size > 0:
            raise OperatorError(
                f"voxel_size of ConeBeamOperator is a positive number of mm, got {voxel_size!r}."
            )
        check_outside(geometry, shape, voxel_size)
        super().__init__(shape, geometry.range_shape)
        self.geometry = geometry
        self.voxel_size = float(voxel_size)
        self.register_buffer("_unit", torch.ones(()), persistent=False)
        # At once, so that a GPU that is not there is found out here.
        self._made = [AstraCone(geometry, shape, self.voxel_size)]

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._project, self._backproject)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._backproject, self._project)

    def _project(self, x: Tensor) -> Tensor:
        y = self._projector.forward(x.reshape(-1, *self.domain_shape))
        return y.reshape(*x.shape[:-3], *self.range_shape)

    def _backproject(self, y: Tensor) -> Tensor:
        x = self._projector.adjoint(y.reshape(-1, *self.range_shape))
        return x.reshape(*y.shape[:-3], *self.domain_shape)

    @property
    def _projector(self) -> AstraCone:
        if not self._made:
            self._made.append(AstraCone(self.geometry, self.domain_shape, self.voxel_size))
        return self._made[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> ConeBeamOperator:
        before = self._unit
        super()._apply(fn, recurse)
        if self._unit.dtype != torch.float32:
            dtype, self._unit = self._unit.dtype, before
            raise OperatorError(f"ConeBeamOperator computes in float32, not in {dtype}.")
        return self

    def __getstate__(self) -> dict[str, Any]:
        # ASTRA's objects live outside of Python.
        return {**self.__dict__, "_made": []}

    def _check(self, x: Tensor, shape: Shape, side: str) -> None:
        super()._check(x, shape, side)
        if x.dtype != torch.float32:
            raise OperatorError(f"ConeBeamOperator works in float32, got a tensor of {x.dtype}.")
