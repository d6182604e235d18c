"""Beam hardening: twice the water shows less than twice the line integral.

The softer part of a polychromatic beam is absorbed first, so what is left of it penetrates better.

The polynomial (water) correction maps measured line integrals to those of one energy. It is exact for an
object of one material, and good for tissue, which attenuates as water does; streaks between bones or metal
need more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators.errors import OperatorError


@dataclass(frozen=True)
class BeamHardeningCorrection:
    """The polynomial ``q = c₁ p + c₂ p² + …`` from measured to monochromatic line integrals.

    There is no constant: where nothing is in the beam, nothing is corrected.

    Attributes
    ----------
    coefficients : tuple of float
        ``(c₁, c₂, …)``.
    largest : float
        Largest line integral that the polynomial was fitted on. Beyond, it goes on along its tangent, as a
        polynomial itself may turn down there.

    Notes
    -----
    Herman, "Correction for beam hardening in computed tomography", Phys. Med. Biol. 24, 81, 1979.
    """

    coefficients: tuple[float, ...]
    largest: float

    def __post_init__(self) -> None:
        values = torch.tensor([*self.coefficients, self.largest], dtype=torch.float64)
        if not self.coefficients or not bool(torch.isfinite(values).all()) or not self.largest > 0:
            raise OperatorError(
                "a beam-hardening correction needs finite coefficients and a positive largest line integral, "
                "got "
                f"{self.coefficients} and {self.largest}"
            )

    @classmethod
    def fit(cls, measured: Tensor, ideal: Tensor, *, degree: int = 4) -> BeamHardeningCorrection:
        """Fit the polynomial to a scan of a known object.

        Parameters
        ----------
        measured : Tensor
            Line integrals as measured, any shape.
        ideal : Tensor
            Those that one energy would give, of the same shape: attenuation times path length of the object,
            or the forward projection of its image.
        degree : int
            Highest power, 1 to 8.

        Returns
        -------
        BeamHardeningCorrection
            The least-squares fit.

        Raises
        ------
        OperatorError
            If shapes differ, values are not finite, there are too few of them, or the polynomial does not
            rise all the way from 0 to the largest measured value.
        """
        if measured.shape != ideal.shape:
            raise OperatorError(
                f"measured and ideal line integrals must have one shape, got {tuple(measured.shape)} and "
                f"{tuple(ideal.shape)}"
            )
        if not 1 <= degree <= 8:
            raise OperatorError(f"the degree of the correction is from 1 to 8, got {degree}")
        p, q = measured.double().flatten(), ideal.double().flatten()
        if not bool(torch.isfinite(p).all() and torch.isfinite(q).all()):
            raise OperatorError("the line integrals to fit to hold NaN or infinite values")
        largest = float(p.max()) if p.numel() else 0.0
        if p.numel() < degree or not largest > 0:
            raise OperatorError(
                f"a fit of degree {degree} needs as many line integrals, some of them positive"
            )
        # In p / p_max, which keeps the powers of one order of magnitude.
        powers = torch.arange(1, degree + 1, dtype=torch.float64)
        columns = (p / largest)[:, None] ** powers
        solution = torch.linalg.lstsq(columns, q[:, None], driver="gelsd").solution[:, 0]
        correction = cls(tuple(float(c) for c in solution / largest**powers), largest)
        if float(correction.slope(torch.linspace(0, largest, 257, dtype=torch.float64)).min()) <= 0:
            raise OperatorError(
                f"the correction of degree {degree} does not rise all the way to {largest:g}: fit a lower "
                "degree, or "
                "to more path lengths"
            )
        return correction

    def __call__(self, line_integrals: Tensor) -> Tensor:
        """Correct line integrals.

        Parameters
        ----------
        line_integrals : Tensor
            Floating point, any shape. Negative ones (noise) and those beyond `largest` are corrected along
            the tangents at 0 and at `largest`.

        Returns
        -------
        Tensor
            Like `line_integrals`.

        Raises
        ------
        OperatorError
            If they are not floating point.
        """
        if not line_integrals.is_floating_point():
            raise OperatorError(f"line integrals must be floating point, got {line_integrals.dtype}")
        inside = line_integrals.clamp(0, self.largest)
        result = torch.zeros_like(inside)
        for c in reversed(self.coefficients):
            result = (result + c) * inside
        return result + self.slope(inside) * (line_integrals - inside)

    def slope(self, line_integrals: Tensor) -> Tensor:
        """Derivative of the polynomial, like `line_integrals`."""
        result = torch.zeros_like(line_integrals)
        for power in range(len(self.coefficients), 0, -1):
            result = result * line_integrals + power * self.coefficients[power - 1]
        return result
