"""The Fourier pair against its definition and its symmetries."""

import numpy as np
import pytest
import sigpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import FourierTransform, OperatorError, fftc, ifftc
from tests.operators.helper import random_complex

sizes = st.integers(1, 17)


def dft_matrix(n: int) -> torch.Tensor:
    """The definition, with exact integers in the exponent's numerator."""
    index = np.arange(n) - n // 2
    return torch.from_numpy(np.exp(-2j * np.pi * np.outer(index, index) / n) / np.sqrt(n))


@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes)
def test_is_the_centred_unitary_dft(height, width):
    x = random_complex(2, height, width, dtype=torch.complex128)
    truth = dft_matrix(height) @ x @ dft_matrix(width).T
    torch.testing.assert_close(fftc(x), truth)
    torch.testing.assert_close(ifftc(truth), x)


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (8, 5)])
def test_equals_sigpy(shape):
    x = random_complex(3, *shape, dtype=torch.complex128)
    np.testing.assert_allclose(fftc(x).numpy(), sigpy.fft(x.numpy(), axes=(-2, -1)), atol=1e-12)
    np.testing.assert_allclose(ifftc(x).numpy(), sigpy.ifft(x.numpy(), axes=(-2, -1)), atol=1e-12)


@pytest.mark.parametrize("n", [6, 7])
def test_centre_is_half_the_size_rounded_down(n):
    impulse = torch.zeros(n, n, dtype=torch.complex128)
    impulse[n // 2, n // 2] = n
    torch.testing.assert_close(fftc(impulse), torch.ones_like(impulse))


def test_chosen_dimensions_and_real_input():
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(
        fftc(x, dim=[0]), torch.einsum("kj,jab->kab", dft_matrix(4), x.to(torch.complex128))
    )
    torch.testing.assert_close(FourierTransform(x.shape)(x), fftc(fftc(x, dim=(0,))))


def test_operator_is_unitary():
    F = FourierTransform((5, 6))
    x = random_complex(2, 5, 6)
    torch.testing.assert_close(F.adjoint(F(x)), x)
    torch.testing.assert_close(F(F.adjoint(x)), x)
    assert F.norm() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(), (4, 0)])
def test_operator_needs_a_shape(shape):
    with pytest.raises(OperatorError, match="positive sizes"):
        FourierTransform(shape)
