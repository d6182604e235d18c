"""Coil compression: fewer virtual coils that hold most of the signal (Buehrer et al., MRM 57:1131, 2007)."""

import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.masks import Region


def compression_matrix(kspace: Tensor, num_coils: int, acs: Region | None) -> tuple[Tensor, float]:
    """Find the virtual coils that hold most energy: the calibration region's singular vectors over the coils.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(..., C, H, W)``. Leading dimensions (the slices of a volume) are taken together, so that
        they share one matrix.
    num_coils : int
        Number of virtual coils, from 1 to C.
    acs : slice, tuple of slice, or None
        The fully sampled centre, as in `operators.masks.Mask`.

    Returns
    -------
    matrix : Tensor
        Complex ``(num_coils, C)`` with orthonormal rows, the strongest virtual coil first. Orthonormal rows
        leave white noise white and of the same standard deviation: prewhiten before compressing.
    energy : float
        Fraction, from 0 to 1, of the energy of the calibration region that the virtual coils keep.

    Raises
    ------
    OperatorError
        If k-space is not complex with a coil dimension, there is no calibration region or no finite signal in
        it, or the number of virtual coils is not from 1 to C.
    """
    if kspace.ndim < 3 or not kspace.is_complex():
        raise OperatorError(
            f"k-space must be complex with shape (..., C, H, W), got {kspace.dtype} {tuple(kspace.shape)}"
        )
    available = kspace.shape[-3]
    if not 1 <= num_coils <= available:
        raise OperatorError(
            f"{available} coils can be compressed to 1 to {available} coils, not to {num_coils}"
        )
    if acs is None:
        raise OperatorError("there is no calibration region: the centre of k-space is not fully sampled")
    region = (slice(None), acs) if isinstance(acs, slice) else acs
    calibration = kspace[(..., *region)].movedim(-3, 0).flatten(1)
    energy = calibration @ calibration.mH
    # The trace is NaN or infinite if any sample is.
    total = float(energy.diagonal().real.sum())
    if not 0 < total < float("inf"):
        raise OperatorError("the calibration region of k-space is empty, zero throughout, or not finite")
    values, vectors = torch.linalg.eigh(energy.to(torch.complex128))
    matrix = vectors.flip(-1)[:, :num_coils].mH
    # Singular vectors have arbitrary phases: make the largest entry of each positive.
    largest = matrix.take_along_dim(matrix.abs().argmax(dim=1, keepdim=True), dim=1)
    matrix = matrix * torch.sgn(largest.conj())
    kept = float(values.flip(-1)[:num_coils].sum() / values.sum())
    return matrix.to(kspace.dtype), min(kept, 1.0)


def compress_coils(kspace: Tensor, num_coils: int, acs: Region | None) -> tuple[Tensor, Tensor]:
    """Compress k-space to fewer virtual coils, found from the calibration region; see `compression_matrix`.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(..., C, H, W)``.
    num_coils : int
        Number of virtual coils, from 1 to C.
    acs : slice, tuple of slice, or None
        The fully sampled centre.

    Returns
    -------
    compressed : Tensor
        Complex ``(..., num_coils, H, W)``.
    matrix : Tensor
        Complex ``(num_coils, C)`` with orthonormal rows: ``compressed = matrix @ kspace`` over the coils.

    Raises
    ------
    OperatorError
        As `compression_matrix`.
    """
    matrix, _ = compression_matrix(kspace, num_coils, acs)
    return torch.einsum("dc,...chw->...dhw", matrix, kspace), matrix
