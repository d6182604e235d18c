"""Hermitian conjugate gradients on a batch, every item with its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.base import LinearOperator, seeded_noise
from recon.errors import ReconError


@dataclass(frozen=True)
class CGResult:
    """Result of :func:`cg`.

    Parameters
    ----------
    x
        Solution, the shape of ``b``.
    iterations
        Iterations each item took, ``(B,)`` of the batch shape.
    residual
        ``||b - H x|| / ||b||`` of each item, by the recursion; zero where nothing is left to do.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor


def cg_steps(condition: float, tolerance: float, most: int) -> int:
    """Conjugate-gradient steps that bring the error below a tolerance, by the bound for a condition number.

    The error falls at least by ``2 ((sqrt(k) - 1) / (sqrt(k) + 1))^m`` in m steps at condition number k (Saad
    2003, Eq. 6.128). A count that is known beforehand, unlike one from the residual as it comes, cannot be
    tipped by rounding, so that it keeps results scale equivariant.

    Parameters
    ----------
    condition
        Condition number, or a bound of it.
    tolerance
        Relative accuracy; zero asks for ``most`` steps.
    most
        Upper limit.
    """
    if tolerance == 0:
        return most
    root = math.sqrt(condition)
    if root <= 1:
        return 1
    needed = math.log(2 / tolerance) / math.log((root + 1) / (root - 1))
    return max(1, min(most, math.ceil(needed)))


def mixed_axes(operator: LinearOperator) -> int:
    """Trailing axes of the domain that ``A^H A`` mixes, which are those of an item of :func:`cg`.

    Two, if the images of a domain with more axes, such as slices or coil images, are measured each on its
    own: then each deserves step sizes of its own. Tried on random images, of which ``A^H A`` is to keep a
    factor each.
    """
    shape = operator.domain_shape
    if len(shape) <= 2:
        return len(shape)
    x = seeded_noise(shape, operator.dtype, seed=0).to(operator.device)
    factors = torch.linspace(1, 2, math.prod(shape[:-2]), dtype=x.real.dtype, device=x.device)
    factors = factors.reshape(*shape[:-2], 1, 1)
    kept = factors * operator.normal(x)
    difference = torch.linalg.vector_norm(operator.normal(factors * x) - kept)
    return 2 if bool(difference <= 1e-4 * torch.linalg.vector_norm(kept)) else len(shape)


def _dot(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """Real part of the inner product over the last axes, which are kept with length 1."""
    kept = (..., *[None] * axes)
    if a.is_complex():
        a, b = torch.view_as_real(a).flatten(-2), torch.view_as_real(b).flatten(-2)
    return torch.linalg.vecdot(a.flatten(-axes), b.flatten(-axes))[kept]


def cg(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    x0: Tensor | None = None,
    *,
    max_iter: int = 10,
    tol: float = 0.0,
    axes: int = 2,
) -> CGResult:
    """Solve ``H x = b`` for a Hermitian positive semi-definite ``H``.

    Inner products conjugate their first factor, and every item of the batch has its own step sizes and stops
    on its own: an item's result does not depend on what else is in the batch. An item whose right-hand side
    is zero, or whose residual is down to rounding, is done.

    Parameters
    ----------
    matrix
        ``H``, acting on ``(..., H, W)``, or ``(..., D, H, W)`` and so on.
    b
        Right-hand side, ``(..., H, W)``; for a singular ``H`` in its range, as ``A^H y`` is for ``A^H A``.
    x0
        Start; zero if not given (which saves one application of ``H``).
    max_iter
        Iterations at the most.
    tol
        An item stops once ``||b - H x|| <= tol ||b||``.
    axes
        How many of the last axes are an item: 2 for images, 3 for volumes whose slices ``H`` mixes;
        :func:`mixed_axes` tells. With fewer than ``H`` mixes the result is wrong.

    Returns
    -------
    CGResult
        Solution, iterations and relative residual of each item.

    Raises
    ------
    ReconError
        If ``max_iter`` is negative, ``b`` has fewer axes than an item, or ``H`` shows a negative curvature,
        so is not what it has to be.

    Notes
    -----
    Hestenes & Stiefel 1952. Step sizes are real because ``p^H H p`` is, for a Hermitian ``H``.
    """
    if max_iter < 0:
        raise ReconError(f"max_iter must not be negative, got {max_iter}")
    if not 1 <= axes <= b.ndim:
        raise ReconError(f"an item of conjugate gradients has 1 to {b.ndim} axes, not {axes}")

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return _dot(a, c, axes)

    if x0 is None:
        x, r = torch.zeros_like(b), b
        largest = bb = dot(b, b)
    else:
        hx = matrix(x0)
        x, r = x0, b - hx
        bb = dot(b, b)
        largest = torch.maximum(bb, dot(hx, hx))
    p = r
    rr = dot(r, r)
    # Below rounding the residual is noise. Part of it may lie in the null space of H, where steps would grow.
    limits = torch.finfo(rr.dtype)
    goal = torch.maximum(tol**2 * bb, (10 * limits.eps) ** 2 * largest).clamp_min(limits.tiny)
    done = rr <= goal
    iterations = torch.zeros_like(rr, dtype=torch.long)
    negative = torch.zeros_like(done)
    # A GPU would wait for each look at what it has computed, which costs more than steps that change nothing.
    looks = tol > 0 or b.device.type == "cpu"
    for _ in range(max_iter):
        if looks and bool((done | negative).all()):
            break
        hp = matrix(p)
        curvature = dot(p, hp)
        negative = negative | ((curvature < 0) & ~done)
        # A direction in the null space cannot be improved along; that item is done.
        done = done | (curvature == 0)
        alpha = torch.where(done, 0.0, rr / curvature)
        x = torch.addcmul(x, alpha, p)
        r = torch.addcmul(r, alpha, hp, value=-1)
        fresh = dot(r, r)
        beta = torch.where(done, 0.0, fresh / rr)
        iterations += ~done
        rr = torch.where(done, rr, fresh)
        done = done | (rr <= goal)
        p = torch.addcmul(r, beta, p)
    if bool(negative.any()):
        raise ReconError(
            "conjugate gradients met a negative curvature: the operator is not A^H A of anything"
        )
    residual = torch.where(rr == 0, 0.0, (rr / bb).sqrt())
    return CGResult(x, iterations.flatten(-axes)[..., 0], residual.flatten(-axes)[..., 0])
