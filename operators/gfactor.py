"""Noise amplification of parallel imaging: what undersampling does to the noise, pixel by pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.base import seeded_noise
from operators.errors import OperatorError
from operators.mri import MulticoilMRI

DEFAULT_REPLICAS = 64
_BATCH = 8  # replicas solved at once: they share the coil maps' way through the cache


@dataclass(frozen=True, eq=False)
class NoiseAmplification:
    """Noise of a SENSE image.

    Attributes
    ----------
    noise : Tensor
        Standard deviation of the image per real component for k-space noise of standard deviation 1 per real
        component, real ``(H, W)``; zero where no coil is sensitive.
    g : Tensor
        Geometry factor, real ``(H, W)``: `noise` over that of the fully sampled image and over
        ``sqrt(acceleration)``. At least 1 without regularisation, whatever the mask; zero where no coil is
        sensitive.
    acceleration : float
        Entries of k-space over entries sampled.
    num_replicas : int
        Replicas that `noise` was estimated from, with a relative error of ``1 / sqrt(4 num_replicas)``; zero
        where it was computed exactly.
    """

    noise: Tensor
    g: Tensor
    acceleration: float
    num_replicas: int


def noise_amplification(
    operator: MulticoilMRI,
    *,
    regularisation: float = 0.0,
    num_replicas: int | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
    seed: int = 0,
) -> NoiseAmplification:
    """Compute the noise amplification and the g-factor of a SENSE reconstruction, for any Cartesian mask.

    The reconstruction is ``x = (AᴴA + μ I)⁻¹ Aᴴ y`` with ``μ = regularisation``. The diagonal of its noise
    covariance ``(AᴴA + μ I)⁻¹ AᴴA (AᴴA + μ I)⁻¹`` is computed exactly where the mask consists of whole
    columns or whole rows: then every line of the image is an inverse problem of its own, small enough for a
    dense inverse. For other masks it is estimated from pseudo replicas: noise alone is reconstructed by
    conjugate gradients, again and again, and the standard deviation taken over the results.

    Parameters
    ----------
    operator : MulticoilMRI
        Without batch dimensions. Its maps belong to prewhitened k-space, so that the noise is white.
    regularisation : float
        μ, in units of ``‖A‖²`` = 1 for maps of unit sum of squares. Zero is SENSE; with a positive one the
        noise is that of a Tikhonov-regularised image, whose g-factor may fall below 1.
    num_replicas : int, optional
        Estimate from this many replicas whatever the mask. Left out: exactly if possible, else from
        `DEFAULT_REPLICAS`.
    max_iter, tol : int, float
        Of the conjugate gradients: iterations at the most, and the residual, relative to the right-hand side,
        that they must reach.
    seed : int
        Seed of the replicas.

    Returns
    -------
    NoiseAmplification

    Raises
    ------
    OperatorError
        If the operator has batch dimensions or samples nothing, a number is out of its range, or the mask and
        the coils do not determine the image, so that its noise has no bound.

    Notes
    -----
    Pruessmann et al., Magn Reson Med 42:952 (1999), Eq. 23 (g-factor); Robson et al., Magn Reson Med 60:895
    (2008) (pseudo multiple replica).
    """
    if operator.batch_shape:
        raise OperatorError(
            f"noise_amplification takes one operator, this one has a batch {operator.batch_shape}."
        )
    if not 0 <= regularisation < math.inf:
        raise OperatorError(f"the regularisation must be a number and not negative, got {regularisation}.")
    if num_replicas is not None and num_replicas < 2:
        raise OperatorError(f"a standard deviation needs at least 2 replicas, got {num_replicas}.")
    mask, support = operator.mask, operator.support
    if not bool(mask.any()) or not bool(support.any()):
        raise OperatorError("the operator measures nothing: its mask or its coil maps are all zero.")
    columns, rows = bool((mask == mask[:1]).all()), bool((mask == mask[:, :1]).all())
    if num_replicas is None and columns:
        noise, count = _exact(operator.maps, mask[0], regularisation), 0
    elif num_replicas is None and rows:
        noise, count = _exact(operator.maps.mT, mask[:, 0], regularisation).mT, 0
    else:
        count = DEFAULT_REPLICAS if num_replicas is None else num_replicas
        noise = _from_replicas(operator, regularisation, count, max_iter, tol, seed)
    noise = torch.where(support, noise, 0.0)
    acceleration = mask.numel() / int(mask.sum())
    # Fully sampled, AᴴA is diagonal: the noise of a pixel is 1 / rss of its sensitivities.
    rss = torch.linalg.vector_norm(operator.maps, dim=0)
    return NoiseAmplification(noise, noise * rss / math.sqrt(acceleration), acceleration, count)


def _exact(maps: Tensor, sampled: Tensor, regularisation: float) -> Tensor:
    """Square root of the covariance's diagonal where whole columns are sampled, line by line of the image."""
    height, width = maps.shape[-2:]
    position = torch.arange(width, device=maps.device)
    # AᴴA of one line: the point-spread function of the sampled columns, weighted by the coils at both ends.
    spread = torch.fft.ifft(torch.fft.ifftshift(sampled.double()))
    spread = spread[(position[:, None] - position) % width]
    identity = torch.eye(width, dtype=torch.complex128, device=maps.device)
    noise = torch.zeros(height, width, dtype=maps.real.dtype, device=maps.device)
    for line in range(height):
        seen = maps[:, line].to(torch.complex128)
        inside = (seen != 0).any(0)
        if not bool(inside.any()):
            continue
        normal = ((seen.mH @ seen) * spread)[inside][:, inside]
        factor, failed = torch.linalg.cholesky_ex(normal + regularisation * identity[inside][:, inside])
        # A pivot down at the rounding of the matrix is a direction that was not measured.
        pivots = factor.diagonal().real ** 2
        if int(failed) or bool(pivots.min() <= 1e-12 * normal.diagonal().real.max()):
            raise _undetermined()
        inverse = torch.cholesky_inverse(factor)
        variance = inverse.diagonal().real
        if regularisation > 0:  # X N X = X - μ X² for X = (N + μ I)⁻¹
            variance = variance - regularisation * inverse.abs().square().sum(0)
        noise[line, inside] = variance.clamp_min(0).sqrt().to(noise.dtype)
    return noise


def _from_replicas(
    operator: MulticoilMRI, regularisation: float, count: int, max_iter: int, tol: float, seed: int
) -> Tensor:
    """Root mean square per real component over reconstructions of noise, whose mean is known to be zero."""
    total = torch.zeros(operator.domain_shape, dtype=torch.float64, device=operator.device)
    for first in range(0, count, _BATCH):
        items = range(first, min(first + _BATCH, count))
        # Torch's complex normal numbers have E|n|² = 1, those of this project 2.
        noise = torch.stack(
            [seeded_noise(operator.range_shape, operator.dtype, seed=seed * count + i) for i in items]
        )
        right = operator.adjoint(noise.to(operator.device) * math.sqrt(2))
        total += _solve(operator, regularisation, right, max_iter, tol).abs().double().square().sum(0)
    return (total / (2 * count)).sqrt().to(operator.maps.real.dtype)


def _solve(operator: MulticoilMRI, regularisation: float, b: Tensor, max_iter: int, tol: float) -> Tensor:
    """Conjugate gradients (Hestenes & Stiefel 1952) on a batch ``(B, H, W)``, step sizes item by item."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u.conj() * v).sum((-2, -1), keepdim=True).real

    x, residual, direction = torch.zeros_like(b), b, b
    square = start = dot(b, b)
    for _ in range(max_iter):
        done = square <= tol**2 * start
        if bool(done.all()):
            return x
        image = operator.normal(direction) + regularisation * direction
        curvature = dot(direction, image)
        step = torch.where(done | (curvature <= 0), 0.0, square / curvature)
        x, residual = x + step * direction, residual - step * image
        previous, square = square, dot(residual, residual)
        direction = residual + torch.where(done, 0.0, square / previous) * direction
    if bool((square > tol**2 * start).any()):
        raise _undetermined(f" (conjugate gradients did not converge in {max_iter} iterations)")
    return x


def _undetermined(detail: str = "") -> OperatorError:
    return OperatorError(
        f"the sampled k-space and the coils do not determine the image, so its noise has no bound{detail}: "
        "give a regularisation."
    )
