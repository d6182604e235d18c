"""Weights on measurements: the square root of a weighted least-squares data term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from operators.base import LinearOperator, check_slice
from operators.errors import OperatorError


class Weighting(LinearOperator):
    """Multiplication by real weights, ``y -> w y``.

    With ``w = 1 / std`` of every datum, ``Weighting(w) @ A`` is the operator of data whose noise is white and
    of unit standard deviation: least squares with it is weighted least squares with ``w^2``.

    Parameters
    ----------
    weights : Tensor
        Real, finite, not negative and not all zero; of a shape that broadcasts to ``shape``. A weight of zero
        leaves a datum out.
    shape : sequence of int, optional
        Shape of one measurement; that of the weights if not given.

    Raises
    ------
    OperatorError
        If the weights are not such, or do not broadcast.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, shape: Sequence[int] | None = None):
        shape = tuple(weights.shape if shape is None else shape)
        super().__init__(shape, shape)
        if not weights.is_floating_point():
            raise OperatorError(f"weights are real floating-point numbers, got {weights.dtype}.")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.any()):
            raise OperatorError("weights must be finite, not negative, and not all zero.")
        try:
            weights = torch.broadcast_to(weights, shape)
        except RuntimeError:
            raise OperatorError(
                f"weights of shape {tuple(weights.shape)} do not broadcast to {shape}."
            ) from None
        self.register_buffer("weights", weights.clone())

    def _forward(self, x: Tensor) -> Tensor:
        return self.weights * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.weights * y

    def of_slice(self, index: int) -> LinearOperator:
        """See `LinearOperator.of_slice`."""
        check_slice(self, index)
        return Weighting(self.weights[index])

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        return torch.where(self.weights > 0, y / self.weights, torch.zeros_like(y))


class DirectionWhitening(LinearOperator):
    """Whitens noise that is white but for one direction, of which an unknown amount is added.

    For noise ``e + a d`` with white ``e`` of standard deviation ``s`` and ``a`` of ``t``, its covariance is
    ``s^2 (1 + r^2 q q^T)`` with ``q = d / |d|`` and ``r = t |d| / s``. The inverse square root of the bracket
    is applied, so that white noise of ``s`` is left: what the data say along ``d`` is taken for uncertain.

    Parameters
    ----------
    direction : Tensor
        ``d``, real, of the shape of a measurement, not all zero.
    ratio : float
        ``r``, not negative.

    Raises
    ------
    OperatorError
        If they are not such.
    """

    unit: Tensor

    def __init__(self, direction: Tensor, ratio: float):
        shape = tuple(direction.shape)
        super().__init__(shape, shape)
        norm = float(torch.linalg.vector_norm(direction)) if direction.is_floating_point() else 0.0
        if not 0 < norm < math.inf:
            raise OperatorError("a direction is real, finite and not all zero.")
        if not 0 <= ratio < math.inf:
            raise OperatorError(f"the ratio must be finite and not negative, got {ratio}.")
        self.register_buffer("unit", direction / norm)
        self.share = 1 - 1 / math.sqrt(1 + ratio**2)

    def _forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(-self.unit.ndim, 0))
        along = (x * self.unit).sum(dim=axes, keepdim=True)
        return x - self.share * along * self.unit

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)
