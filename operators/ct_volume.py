"""CT of volumes: the same scan of each slice, and slices thicker than one wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from operators.base import Compound, LinearOperator, Shape, check_slice, linear_function
from operators.errors import OperatorError


class SliceStack(Compound):
    """An operator applied to each slice of a volume, ``(D, *domain)`` to ``(D, *range)``.

    All slices go through the operator at once, as a batch, and a system matrix is read once for all of them.

    Parameters
    ----------
    operator : LinearOperator
        What maps a slice, without batch dimensions of its own; e.g. a `CTOperator`, which makes of a volume
        ``(D, H, W)`` the sinograms ``(D, views, detectors)``.
    num_slices : int
        Number of slices D.

    Raises
    ------
    OperatorError
        If the operator has batch dimensions, or the number is not positive.
    """

    def __init__(self, operator: LinearOperator, num_slices: int):
        if operator.batch_shape:
            raise OperatorError(
                f"SliceStack needs one operator for all slices, and {type(operator).__name__} has batch "
                f"dimensions {operator.batch_shape}."
            )
        if num_slices < 1:
            raise OperatorError(f"num_slices of SliceStack is positive, got {num_slices}.")
        super().__init__((num_slices, *operator.domain_shape), (num_slices, *operator.range_shape))
        self.operator = operator

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        return self.operator.normal(x)

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        return self.operator.direct_inverse(y, filter)

    def of_slice(self, index: int) -> LinearOperator:
        """See `LinearOperator.of_slice`."""
        check_slice(self, index)
        return self.operator


class ThroughPlaneAverage(LinearOperator):
    """Thick slices as means of thin ones, ``(D, H, W)`` to ``(slices, H, W)``.

    Thick slice n is the weighted mean of the thin slices ``n * step`` to ``n * step + thickness - 1``. Alone
    it is the forward model of super-resolution along z; before a scan, ``SliceStack(A, slices) @
    ThroughPlaneAverage(...)``, that of thick slices measured as sinograms, since projection and averaging
    commute.

    Parameters
    ----------
    volume_shape : (int, int, int)
        Thin slices D, height and width.
    thickness : int
        How many thin slices a thick one is thick.
    step : int, optional
        How many thin slices further the next thick one begins; `thickness` by default: no gap, no overlap.
    profile : sequence of float, optional
        Slice sensitivity profile, `thickness` weights, not negative; they are divided by their sum. By
        default a box.

    Raises
    ------
    OperatorError
        If the thick slices do not end where the volume does, or the profile is not one.
    """

    profile: Tensor

    def __init__(
        self,
        volume_shape: Sequence[int],
        thickness: int,
        *,
        step: int | None = None,
        profile: Sequence[float] | Tensor | None = None,
    ):
        shape: Shape = tuple(int(n) for n in volume_shape)
        step = thickness if step is None else step
        if len(shape) != 3 or min(shape) < 1:
            raise OperatorError(f"ThroughPlaneAverage needs a volume (D, H, W), all positive, got {shape}.")
        if thickness < 1 or step < 1:
            raise OperatorError(
                f"thickness and step of ThroughPlaneAverage are positive, got {thickness} and {step}."
            )
        slices, rest = divmod(shape[0] - thickness, step)
        if shape[0] < thickness or rest:
            raise OperatorError(
                f"{shape[0]} slices are no whole number of slices of thickness {thickness} every {step}."
            )
        super().__init__(shape, (slices + 1, *shape[1:]))
        weights = torch.ones(thickness) if profile is None else torch.as_tensor(profile).float()
        if (
            weights.shape != (thickness,)
            or not bool((weights >= 0).all())
            or not 0 < weights.sum() < torch.inf
        ):
            raise OperatorError(
                f"profile of ThroughPlaneAverage has {thickness} weights, not negative and not all 0, got "
                f"{weights.tolist()}."
            )
        self.thickness, self.step = thickness, step
        self.register_buffer("profile", weights / weights.sum())

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._average, self._spread)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._spread, self._average)

    def _average(self, x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-3], *self.range_shape)
        for offset, weight in enumerate(self.profile):
            y.add_(x[..., self._slices(offset), :, :] * weight)
        return y

    def _spread(self, y: Tensor) -> Tensor:
        x = y.new_zeros(*y.shape[:-3], *self.domain_shape)
        for offset, weight in enumerate(self.profile):
            x[..., self._slices(offset), :, :] += y * weight
        return x

    def _slices(self, offset: int) -> slice:
        """The thin slice at this offset in each thick one."""
        return slice(offset, offset + (self.range_shape[0] - 1) * self.step + 1, self.step)
