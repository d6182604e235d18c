"""The scale contract between a scanner and a prior."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.base import LinearOperator
from priors.level import image_level
from recon.errors import ReconError
from recon.solvers.cg import cg, mixed_axes


@dataclass(frozen=True)
class Scale:
    """Factor and global phase between the scanner's images and the prior's.

    ``image_of_the_prior = image_of_the_scanner * exp(-i phase) / factor``; the same for the measurement,
    because the operator is linear, and for the noise level without the phase.

    Parameters
    ----------
    factor
        Positive.
    phase
        Radians; zero for real data.

    Raises
    ------
    ReconError
        If the factor is not positive or the phase not finite.
    """

    factor: float
    phase: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf or not math.isfinite(self.phase):
            raise ReconError(f"a scale needs a positive factor and a finite phase, got {self}")

    @classmethod
    def estimate(cls, y: Tensor, operator: LinearOperator, level: float, iterations: int = 10) -> Scale:
        """Estimate the scale from acquired data only.

        A few conjugate-gradient steps on ``A^H A x = A^H y`` give an image that is free of most aliasing; its
        :func:`priors.level.image_level`, which depends on coarse structure alone and so hardly on the
        sampling, is brought to the prior's ``level``, and the phase of ``sum x |x|`` to zero.

        Parameters
        ----------
        y
            Measurement of the operator's ``range_shape``.
        operator
            Forward operator.
        level
            The level that the prior's contract declares.
        iterations
            Conjugate-gradient steps.

        Raises
        ------
        ReconError
            If the measurement is all zero where the operator samples.
        """
        right = operator.adjoint(y)
        # Divided by the maximum first, so that fourth powers of 1e-4-sized fastMRI data do not underflow.
        peak = float(right.abs().max())
        if not peak > 0:
            raise ReconError("the measurement is all zero: there is nothing to reconstruct")
        axes = mixed_axes(operator)
        image = cg(operator.normal, right / peak, max_iter=iterations, tol=1e-3, axes=axes).x
        wide = image.to(torch.complex128 if image.is_complex() else torch.float64)
        levels = image_level(wide)  # one, or one a coil
        factor = peak * float(levels.square().mean().sqrt()) / level
        phase = float((wide * wide.abs()).sum().angle()) if image.is_complex() else 0.0
        return cls(factor, phase)

    def apply(self, y: Tensor) -> Tensor:
        """Bring a measurement (or an image) into the prior's units."""
        return y * self._rotation(y, -1) / self.factor

    def undo(self, x: Tensor) -> Tensor:
        """Bring an image back into the scanner's units."""
        return x * self._rotation(x, 1) * self.factor

    def _rotation(self, x: Tensor, sign: int) -> Tensor | float:
        if not x.is_complex():
            return 1.0
        turn = torch.tensor(cmath.rect(1.0, sign * self.phase), dtype=x.dtype)
        return turn.to(x.device)
