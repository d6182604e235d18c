"""Checks that an operator keeps what `operators.base.LinearOperator` promises; for your own operators too."""

import torch
from torch import Tensor

from operators.base import LinearOperator, Shape, seeded_noise
from operators.errors import OperatorError

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest relative error of the adjoint for each precision."""


def check_adjoint(
    A: LinearOperator,
    *,
    batch: tuple[int, ...] = (2,),
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> float:
    """Check that the adjoint of an operator is one, and that shapes and ``AᴴA`` are what they should be.

    With random ``x`` and ``y``, the relative error is ``|⟨A x, y⟩ - ⟨x, Aᴴ y⟩| / (‖A x‖ ‖y‖)``, summed in
    double precision over the whole batch.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    batch : tuple of int
        Batch dimensions of ``x`` and ``y``, put before those of the operator itself.
    dtype : torch.dtype, optional
        Data type of ``x``; that of the operator by default.
    tolerance : float, optional
        Largest relative error; by default 1e-5 in single and 1e-10 in double precision.
    seed : int
        Seed of ``x`` and ``y``.

    Returns
    -------
    float
        The relative error.

    Raises
    ------
    OperatorError
        If the error is larger than the tolerance, if a result has the wrong shape or is not finite, or if
        ``A.normal(x)`` is not ``A.adjoint(A(x))`` within the tolerance.
    """
    name = type(A).__name__
    dtype = A.dtype if dtype is None else dtype
    tolerance = TOLERANCES[dtype.to_real()] if tolerance is None else tolerance
    batch = (*batch, *A.batch_shape)

    with torch.no_grad():
        x = seeded_noise(batch + A.domain_shape, dtype, seed).to(A.device)
        Ax = _checked(A(x), batch + A.range_shape, f"{name}(x)")
        y = seeded_noise(batch + A.range_shape, Ax.dtype, seed + 1).to(A.device)
        AHy = _checked(A.adjoint(y), batch + A.domain_shape, f"{name}.adjoint(y)")
        AHAx = _checked(A.normal(x), batch + A.domain_shape, f"{name}.normal(x)")
        x, y, Ax, AHy, AHAx, composed = (_vector(v) for v in (x, y, Ax, AHy, AHAx, A.adjoint(Ax)))

    difference = float((torch.vdot(y, Ax) - torch.vdot(AHy, x)).abs())
    error = _ratio(difference, float(Ax.norm() * y.norm()))
    if not error <= tolerance:
        raise OperatorError(
            f"the adjoint of {name} does not match: relative error {error:.2e}, tolerance {tolerance:.0e}."
        )
    deviation = _ratio(float((AHAx - composed).norm()), float(composed.norm()))
    if not deviation <= tolerance:
        raise OperatorError(
            f"{name}.normal(x) is not {name}.adjoint({name}(x)): relative error {deviation:.2e}, "
            f"tolerance {tolerance:.0e}."
        )
    return error


def _checked(result: Tensor, shape: Shape, what: str) -> Tensor:
    if tuple(result.shape) != shape:
        raise OperatorError(f"{what} should have shape {shape}, got {tuple(result.shape)}.")
    if not torch.isfinite(result).all():
        raise OperatorError(f"{what} has NaN or infinite values.")
    return result


def _vector(x: Tensor) -> Tensor:
    """Flatten to complex128, in which the sums are taken."""
    return x.resolve_conj().reshape(-1).to(torch.complex128)


def _ratio(error: float, size: float) -> float:
    """Relative error; an operator that is zero everywhere is right as long as there is no error at all."""
    return error / size if size else error
