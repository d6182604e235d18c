"""Measured or invented: what of an image the data determine, and what the prior filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.base import LinearOperator
from recon.errors import ReconError
from recon.posterior import Posterior
from recon.solvers.cg import cg, mixed_axes

MAX_ITERATIONS = 300
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Split:
    """An image in two parts that add up to it.

    Parameters
    ----------
    measured
        ``P x``: what the data determine, of the operator's ``domain_shape``.
    invented
        ``x - P x``: what the prior filled in.
    measured_std, invented_std
        Standard deviation over the samples of both parts, real, along the phase of the image, so that to
        first order they are those of the magnitude; ``None`` where no samples were given.
    weight
        λ of the split.
    """

    measured: Tensor
    invented: Tensor
    measured_std: Tensor | None
    invented_std: Tensor | None
    weight: float

    def share(self, region: Tensor | None = None) -> float:
        """Share of the invented part in the energy of both, over a region ``(H, W)`` bool or everywhere.

        Raises
        ------
        ReconError
            If the region does not fit the image or holds nothing.
        """
        return _share(self.measured, self.invented, region, "energy")

    def variance_share(self, region: Tensor | None = None) -> float:
        """Share of the invented part in the variance of both over the samples.

        Raises
        ------
        ReconError
            If there were no samples, or the region does not fit the image or holds nothing.
        """
        if self.measured_std is None or self.invented_std is None:
            raise ReconError("the variance of both parts needs samples, and none were given")
        return _share(self.measured_std, self.invented_std, region, "variance")

    def share_map(self, radius: float = 2.0) -> Tensor:
        """Share of the invented part pixel by pixel, real ``(H, W)``, in [0, 1].

        Parameters
        ----------
        radius
            Standard deviation in pixels of the Gaussian window over which the energies are averaged: pixel by
            pixel their ratio is noise wherever one of the parts crosses zero.
        """
        measured = smoothed(self.measured.abs().square(), radius)
        invented = smoothed(self.invented.abs().square(), radius)
        total = measured + invented
        return invented / torch.where(total > 0, total, 1.0)


def split_image(
    operator: LinearOperator,
    image: Tensor,
    *,
    noise_std: float,
    image_std: float,
    samples: Tensor | None = None,
    max_iter: int = MAX_ITERATIONS,
    tol: float = TOLERANCE,
) -> Split:
    """Split an image, and its spread, into what the data determine and what they leave to the prior.

    The data-determined part is ``P x`` with ``P = (AᴴA + λ I)⁻¹ AᴴA`` and ``λ = (noise_std / image_std)²``:
    what a linear reconstruction of noise-free data ``A x`` gives back if it knows no more of the image than
    its variance. In the basis of the singular vectors of ``A`` it multiplies by ``s² / (s² + λ)``, so a
    component counts as measured in so far as the signal it leaves in the data, ``s image_std``, exceeds the
    noise. Without noise, P projects onto the orthogonal complement of the null space of A.

    Parameters
    ----------
    operator
        Forward operator with a matched adjoint.
    image
        The image, of the operator's ``domain_shape``.
    noise_std
        Noise of the measurement per real component.
    image_std
        Standard deviation of an image per real component, in the same units. :func:`split_posterior` takes
        it from the prior's level.
    samples
        Posterior samples ``(N, *domain_shape)`` for the spread of both parts.
    max_iter, tol
        Of the conjugate gradients: iterations at the most, and the relative residual at which they stop.

    Returns
    -------
    Split

    Raises
    ------
    ReconError
        If the adjoint is not matched, a shape does not fit, a number is not positive, or the conjugate
        gradients do not reach ``tol``.

    Notes
    -----
    P is the resolution matrix (averaging kernel) of the linear Bayesian inverse problem: Tarantola, *Inverse
    Problem Theory* (2005), section 7; Rodgers, *Inverse Methods for Atmospheric Sounding* (2000), section
    2.4.
    """
    if not operator.matched_adjoint:
        raise ReconError("measured and invented parts need an operator with a matched adjoint")
    for name, value in (("noise_std", noise_std), ("image_std", image_std)):
        if not 0 < value < math.inf:
            raise ReconError(f"{name} must be positive and finite, got {value}")
    if tuple(image.shape) != operator.domain_shape:
        raise ReconError(
            f"the image has shape {tuple(image.shape)}, the operator's is {operator.domain_shape}"
        )
    if samples is not None and (samples.ndim == 0 or tuple(samples.shape[1:]) != operator.domain_shape):
        raise ReconError(
            f"samples of shape {operator.domain_shape} are needed, got {tuple(samples.shape)} with "
            "their number in front (those of an operator without coil maps are combined images, which cannot "
            "be split)"
        )
    if samples is not None and len(samples) < 2:
        raise ReconError(f"the spread of both parts needs at least 2 samples, got {len(samples)}")
    weight = (noise_std / image_std) ** 2
    measured = _measured_part(operator, image, weight, max_iter, tol)
    measured_std = invented_std = None
    if samples is not None:
        parts = _measured_part(operator, samples, weight, max_iter, tol)
        measured_std = _std_along(parts, image)
        invented_std = _std_along(samples - parts, image)
    return Split(measured, image - measured, measured_std, invented_std, weight)


def split_posterior(posterior: Posterior, operator: LinearOperator, level: float) -> Split:
    """Split a posterior's mean, and its spread if samples were kept.

    Parameters
    ----------
    posterior
        Of :func:`recon.reconstruct`.
    operator
        The operator it was reconstructed with.
    level
        The level of the prior's contract: an image of that level has, per real component, a standard
        deviation of ``level / sqrt(2)`` in the prior's units (as in :meth:`ScorePrior.error_variance`).

    Raises
    ------
    ReconError
        As :func:`split_image` does.
    """
    return split_image(
        operator,
        posterior.mean,
        noise_std=posterior.noise_std,
        image_std=level * posterior.scale.factor / math.sqrt(2 if posterior.mean.is_complex() else 1),
        samples=posterior.samples if posterior.num_samples > 1 else None,
    )


def smoothed(image: Tensor, radius: float) -> Tensor:
    """Average real ``(..., H, W)`` over a Gaussian window of that standard deviation in pixels.

    At the borders the average is over what lies inside; a radius of zero changes nothing.
    """
    if radius == 0:
        return image
    for dim in (-2, -1):
        size = image.shape[dim]
        position = torch.arange(size, dtype=image.dtype, device=image.device)
        window = torch.exp(-(((position[:, None] - position) / radius) ** 2) / 2)
        window = window / window.sum(1, keepdim=True)
        image = window @ image if dim == -2 else image @ window.mT
    return image


def _measured_part(operator: LinearOperator, x: Tensor, weight: float, max_iter: int, tol: float) -> Tensor:
    """``(AᴴA + λ I)⁻¹ AᴴA x``."""
    solution = cg(
        lambda v: torch.add(operator.normal(v), v, alpha=weight),
        operator.normal(x),
        max_iter=max_iter,
        tol=tol,
        axes=mixed_axes(operator),
    )
    # Single precision cannot do better than this, whatever was asked for.
    attainable = max(tol, 1e4 * torch.finfo(x.dtype).eps)
    if bool((solution.residual > attainable).any()):
        raise ReconError(
            f"the measured part is not found to {tol:g} in {max_iter} conjugate-gradient iterations, only to "
            f"{float(solution.residual.max()):.2g}: the noise is very small for this operator"
        )
    return solution.x


def _std_along(parts: Tensor, image: Tensor) -> Tensor:
    """Standard deviation over the first dimension of the component along the phase of the image."""
    if image.is_complex():
        parts = (parts * torch.sgn(image).conj()).real
    return parts.double().std(dim=0).to(parts.dtype)


def _share(measured: Tensor, invented: Tensor, region: Tensor | None, what: str) -> float:
    energies = [part.abs().double().square() for part in (measured, invented)]
    if region is not None:
        if tuple(region.shape) != tuple(measured.shape[-2:]) or region.dtype != torch.bool:
            raise ReconError(
                f"a region is bool {tuple(measured.shape[-2:])}, got {region.dtype} {tuple(region.shape)}"
            )
        energies = [energy[..., region] for energy in energies]
    kept, filled = (float(energy.sum()) for energy in energies)
    if not kept + filled > 0:
        raise ReconError(f"the region holds no {what} to share out")
    return filled / (kept + filled)
