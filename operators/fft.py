"""Centred, orthonormal Fourier transforms.

The zero of space and of frequency lies at index ``n // 2``, for even and odd ``n``, and both transforms are
unitary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from operators.base import LinearOperator
from operators.errors import OperatorError


def fftc(x: Tensor, dim: Sequence[int] = (-2, -1)) -> Tensor:
    """Centred orthonormal Fourier transform, image to k-space.

    Parameters
    ----------
    x : Tensor
        Of any shape, real or complex.
    dim : sequence of int
        Dimensions to transform; the last two by default.

    Returns
    -------
    Tensor
        Complex, of the same shape: ``X[k] = n^(-1/2) Σ_j x[j] exp(-2πi (j - n//2)(k - n//2) / n)`` along each
        of the dimensions.
    """
    return _centred(torch.fft.fftn, x, dim)


def ifftc(x: Tensor, dim: Sequence[int] = (-2, -1)) -> Tensor:
    """Centred orthonormal inverse Fourier transform, k-space to image: inverse and adjoint of `fftc`.

    Parameters
    ----------
    x : Tensor
        Of any shape, real or complex.
    dim : sequence of int
        Dimensions to transform; the last two by default.

    Returns
    -------
    Tensor
        Complex, of the same shape.
    """
    return _centred(torch.fft.ifftn, x, dim)


def _centred(transform, x: Tensor, dim: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
    dim = tuple(dim)
    return torch.fft.fftshift(transform(torch.fft.ifftshift(x, dim=dim), dim=dim, norm="ortho"), dim=dim)


class FourierTransform(LinearOperator):
    """Centred orthonormal Fourier transform over all dimensions of an object.

    Unitary: the adjoint is the inverse, and ``AᴴA`` the identity.

    Parameters
    ----------
    shape : sequence of int
        Shape of the object, ``(H, W)`` or ``(D, H, W)``; domain and range.

    Raises
    ------
    OperatorError
        If the shape is empty or not positive.
    """

    def __init__(self, shape: Sequence[int]):
        if not shape or min(shape) < 1:
            raise OperatorError(f"FourierTransform needs a shape of positive sizes, got {tuple(shape)}.")
        super().__init__(shape, shape)
        self._dim = tuple(range(-len(self.domain_shape), 0))

    def _forward(self, x: Tensor) -> Tensor:
        return fftc(x, self._dim)

    def _adjoint(self, y: Tensor) -> Tensor:
        return ifftc(y, self._dim)

    def _normal(self, x: Tensor) -> Tensor:
        return x.clone()
