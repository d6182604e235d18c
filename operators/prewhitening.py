"""Noise covariance of a coil array, and prewhitening with it (Pruessmann et al., MRM 46:638, 2001).

Covariances are *per real component*, ``Psi_ij = E[n_i conj(n_j)] / 2``. Prewhitened data have white noise of
standard deviation 1 per real component, ``E|n|^2 = 2``.
"""

import torch
from torch import Tensor

from operators.errors import OperatorError


def noise_covariance(samples: Tensor) -> Tensor:
    """Estimate the noise covariance of the coils from samples without signal.

    Parameters
    ----------
    samples : Tensor
        Complex ``(C, N)``, N > C noise samples of every coil, of mean zero: a noise scan with bandwidth and
        transform scaling of the data, or what `noise_from_kspace_edge` or `noise_from_image_corners` find.

    Returns
    -------
    Tensor
        Complex ``(C, C)``, Hermitian, per real component: ``samples samples^H / (2 N)``.

    Raises
    ------
    OperatorError
        If the samples are not complex of shape (C, N) with N > C, or not finite.
    """
    if samples.ndim != 2 or not samples.is_complex():
        raise OperatorError(
            f"noise samples must be complex of shape (C, N), got {samples.dtype} {tuple(samples.shape)}"
        )
    num_coils, count = samples.shape
    if count <= num_coils:
        raise OperatorError(f"{count} noise samples are too few for the covariance of {num_coils} coils")
    if not bool(samples.isfinite().all()):
        raise OperatorError("the noise samples contain NaN or infinite values")
    return samples @ samples.mH / (2 * count)


def noise_from_kspace_edge(kspace: Tensor, *, fraction: float = 0.05) -> Tensor:
    """Take noise samples from where k-space has least signal: its first and last readout samples.

    There is some signal even there, so that the covariance comes out slightly too large. Samples that are
    zero in every coil were not acquired and are left out; zeros around the acquired readout are not counted
    as its edge.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(C, H, W)``, centred, H the readout.
    fraction : float
        Fraction of the acquired readout to take from either end.

    Returns
    -------
    Tensor
        Complex ``(C, N)``.

    Raises
    ------
    OperatorError
        If k-space is not complex of shape (C, H, W), is zero throughout, or the fraction is not in (0, 0.5].
    """
    _check(kspace, "k-space", fraction)
    acquired = (kspace != 0).any(dim=0)
    rows = acquired.any(dim=1).nonzero()[:, 0]
    if len(rows) == 0:
        raise OperatorError("k-space is zero everywhere: it has no samples to estimate noise from")
    first, last = int(rows[0]), int(rows[-1]) + 1
    count = max(1, round(fraction * (last - first)))
    edge = torch.zeros_like(acquired)
    edge[first : first + count] = True
    edge[last - count : last] = True
    return kspace[:, edge & acquired]


def noise_from_image_corners(images: Tensor, *, fraction: float = 0.05) -> Tensor:
    """Take noise samples from the four corners of coil images, which an object rarely fills.

    Only for fully sampled k-space, of which every sample is noisy: in the image of undersampled or
    zero-filled k-space the noise is weaker and correlated between pixels.

    Parameters
    ----------
    images : Tensor
        Complex ``(C, H, W)``, the orthonormal transform of k-space.
    fraction : float
        Sides of each corner as a fraction of H and W.

    Returns
    -------
    Tensor
        Complex ``(C, N)``.

    Raises
    ------
    OperatorError
        If the images are not complex of shape (C, H, W), or the fraction is not in (0, 0.5].
    """
    _check(images, "coil images", fraction)
    inside = []
    for size in images.shape[1:]:
        count = max(1, round(fraction * size))
        near_edge = torch.zeros(size, dtype=torch.bool, device=images.device)
        near_edge[:count] = True
        near_edge[size - count :] = True
        inside.append(near_edge)
    return images[:, inside[0][:, None] & inside[1]]


def prewhiten(kspace: Tensor, covariance: Tensor) -> Tensor:
    """Mix the coils such that their noise is white, with standard deviation 1 per real component.

    With ``covariance = L L^H`` (Cholesky) the mixed coils are ``L^-1 y``; coil sensitivities measured or
    estimated for the coils as they were have to be mixed in the same way.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(..., C, H, W)``; coil images and maps work as well. What is zero stays zero.
    covariance : Tensor
        Complex ``(C, C)``, Hermitian, per real component, from `noise_covariance`.

    Returns
    -------
    Tensor
        Complex ``(..., C, H, W)``.

    Raises
    ------
    OperatorError
        If the covariance is not a finite Hermitian matrix of the number of coils, or is singular: a coil
        without noise, or one that is a combination of others.
    """
    if kspace.ndim < 3 or not kspace.is_complex():
        raise OperatorError(
            f"k-space must be complex with shape (..., C, H, W), got {kspace.dtype} {tuple(kspace.shape)}"
        )
    num_coils = kspace.shape[-3]
    if covariance.shape != (num_coils, num_coils):
        raise OperatorError(
            f"the noise covariance of {num_coils} coils must have shape {(num_coils, num_coils)}, "
            f"got {tuple(covariance.shape)}"
        )
    # A few coils only: double costs nothing and leaves singularity to the data, not to rounding.
    matrix = covariance.to(torch.complex128)
    if not bool(matrix.isfinite().all()):
        raise OperatorError("the noise covariance contains NaN or infinite values")
    if float((matrix - matrix.mH).abs().max()) > 1e-5 * float(matrix.abs().max()):
        raise OperatorError("the noise covariance is not Hermitian")
    variance = matrix.diagonal().real
    if bool((variance <= 0).any()):
        raise OperatorError(f"the noise covariance is singular: coil {int(variance.argmin())} has no noise")
    # Judge dependence between coils by their correlation: gains may differ by orders of magnitude.
    scale = variance.rsqrt()
    if float(torch.linalg.eigvalsh(scale[:, None] * matrix * scale)[0]) < 1e-6:
        raise OperatorError(
            "the noise covariance is singular: a coil is a combination of others, compress the coils first"
        )
    factor = torch.linalg.cholesky(matrix)
    identity = torch.eye(num_coils, dtype=matrix.dtype, device=matrix.device)
    whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.einsum("dc,...chw->...dhw", whitening.to(kspace.dtype), kspace)


def _check(data: Tensor, name: str, fraction: float) -> None:
    if data.ndim != 3 or not data.is_complex():
        raise OperatorError(
            f"{name} must be complex of shape (C, H, W), got {data.dtype} {tuple(data.shape)}"
        )
    if not 0 < fraction <= 0.5:
        raise OperatorError(f"fraction must be above 0 and at most 0.5, got {fraction}")
