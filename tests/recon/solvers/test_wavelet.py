"""Sparse wavelets against PyWavelets, the closed form for unitary operators, and sigpy's FISTA."""

import cmath
import math

import numpy as np
import pytest
import pywt
import torch

from operators import CoilwiseMRI, FourierTransform, MulticoilMRI
from recon import reconstruct
from recon.solvers import make_solver
from recon.solvers.base import Problem, SolverError
from recon.solvers.wavelet import L1Wavelet, WaveletTransform
from tests.operators.helper import dense, relative_error
from tests.recon.solvers.helper import C128, Matrix, in_other_units, randn, random_mask, solve

# PyWavelets would have larger images for as many levels; the transform is orthogonal all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Level value of:UserWarning")

SHAPE, LEVELS = (32, 16), 2


def analysis(x, levels=LEVELS):
    """PyWavelets' coefficients in one array."""
    return pywt.coeffs_to_array(pywt.wavedec2(x, "db4", "periodization", levels, axes=(-2, -1)))[0]


def synthesis(c, levels=LEVELS):
    slices = pywt.coeffs_to_array(pywt.wavedec2(np.zeros(c.shape), "db4", "periodization", levels))[1]
    coefficients = pywt.array_to_coeffs(c, slices, output_format="wavedec2")
    return pywt.waverec2(coefficients, "db4", "periodization", axes=(-2, -1))


def truth(shape=SHAPE):
    image = torch.ones(shape, dtype=C128)
    image[shape[0] // 4 : shape[0] // 2, shape[1] // 3 :] += 1
    return image * cmath.exp(0.6j)


def multicoil(shape=SHAPE):
    mask = random_mask(shape)
    A = MulticoilMRI(randn(3, *shape, seed=4), mask)
    return Problem(A(truth(shape)) + mask * 0.05 * randn(3, *shape, seed=5), A, 0.035)


def tomography():
    """Real, of norm 9, and of a size that no power of two divides."""
    A = Matrix(randn(80, 63, seed=1, dtype=torch.float64) * 0.6, (9, 7))
    return Problem(A(truth((9, 7)).abs()) + 0.1 * randn(80, seed=2, dtype=torch.float64), A, 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, C128])
def test_transform_equal_to_pywavelets(dtype):
    x = randn(*SHAPE, dtype=dtype)
    W = WaveletTransform(SHAPE, LEVELS, torch.float64)
    np.testing.assert_allclose(W(x).numpy(), analysis(x.numpy()), atol=1e-12)
    np.testing.assert_allclose(W.adjoint(x).numpy(), synthesis(x.numpy()), atol=1e-12)
    stack = torch.stack([x, 2 * x])
    torch.testing.assert_close(W(stack)[1], 2 * W(x))


@pytest.mark.parametrize(("shape", "levels"), [(SHAPE, 3), ((16, 16), 4), ((2, 4), 1), ((8, 16), 3)])
def test_transform_is_orthogonal(shape, levels):
    # Also where the filter is longer than the axis.
    W = WaveletTransform(shape, levels, torch.float64)
    matrix = dense(W, shape, torch.float64)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(math.prod(shape), dtype=torch.float64))
    torch.testing.assert_close(dense(W.adjoint, shape, torch.float64), matrix.mT)


def test_polynomials_have_no_detail_inside():
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).pow(3).expand(2, 64)
    c = WaveletTransform((2, 64), 1, torch.float64)(x)
    detail = c[0, 32:]
    assert float(detail[4:-4].abs().max()) < 1e-9  # four moments vanish
    assert float(detail.abs().max()) > 0.1  # at the border, where the image is wrapped around


@pytest.mark.parametrize("c", [1.0, 2.5])
def test_unitary_operator_in_closed_form(c):
    x, weight = randn(*SHAPE), 1.2 * c**2
    A = c * FourierTransform(SHAPE).to(C128)
    result = solve(L1Wavelet(weight, 400, LEVELS, shifts=False), Problem(A(x), A, 0.1)).samples[0]
    coefficients = analysis(x.numpy())
    kept = coefficients * np.maximum(1 - weight / c**2 / np.abs(coefficients), 0)
    assert 0.05 < float((kept == 0).mean()) < 0.95
    np.testing.assert_allclose(result.numpy(), synthesis(kept), atol=1e-6)


def test_equal_to_fista_of_sigpy():
    import sigpy

    given, weight = multicoil(), 0.3
    mask, maps = given.operator.mask.numpy(), given.operator.maps.numpy()
    A = sigpy.linop.Multiply(maps.shape, mask) * sigpy.linop.FFT(maps.shape, axes=(-2, -1))
    A = A * sigpy.linop.Multiply(SHAPE, maps)

    class Transform(sigpy.linop.Linop):
        def __init__(self, forward, backward):
            super().__init__(SHAPE, SHAPE)
            self.forward, self.backward = forward, backward

        def _apply(self, x):
            return self.forward(x)

        def _adjoint_linop(self):
            return Transform(self.backward, self.forward)

    penalty = sigpy.prox.UnitaryTransform(sigpy.prox.L1Reg(SHAPE, weight), Transform(analysis, synthesis))
    expected = sigpy.app.LinearLeastSquares(
        A, given.y.numpy(), proxg=penalty, max_iter=300, show_pbar=False
    ).run()
    x = solve(L1Wavelet(weight, 300, LEVELS, shifts=False), given).samples[0]
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    assert relative_error(x, given.unfolded) > 0.01


def optimality(given, x, weight, levels, padded):
    """``W A^H (y - A x) / weight`` at the minimum a subgradient of the absolute value."""
    W = WaveletTransform(padded, levels, torch.float64)
    height, width = x.shape[-2:]
    residual = torch.zeros(padded, dtype=x.dtype)
    residual[:height, :width] = given.operator.adjoint(given.y - given.operator(x))
    return W(residual) / weight


@pytest.mark.parametrize("make", [lambda: multicoil((20, 13)), tomography])
def test_sizes_that_are_no_multiple(make):
    given, weight = make(), 0.5
    padded = tuple(-(-n // 4) * 4 for n in given.operator.domain_shape)
    x = solve(L1Wavelet(weight, 2000, 2, shifts=False), given).samples[0]
    dual = optimality(given, x, weight, 2, padded).abs()
    # At the minimum every coefficient of the gradient is at most the weight, and equal to it where the
    # image has a coefficient.
    assert float(dual.max()) < 1.01
    assert float((dual > 0.98).double().mean()) > 0.05


def test_every_coil_on_its_own():
    mask = random_mask(SHAPE, 0.6)
    A = CoilwiseMRI(2, mask, SHAPE).to(C128)
    y = A(torch.stack([truth(), truth().flip(0)])) + mask * 0.05 * randn(2, *SHAPE)
    both = solve(L1Wavelet(0.1), Problem(y, A, 0.05)).samples[0]
    single = CoilwiseMRI(1, mask, SHAPE).to(C128)
    for coil in (0, 1):
        one = solve(L1Wavelet(0.1), Problem(y[coil : coil + 1], single, 0.05)).samples[0, 0]
        assert relative_error(both[coil], one) < 1e-3


def test_shifts_are_fixed_and_better():
    v, u = torch.linspace(-1, 1, 64)[:, None], torch.linspace(-1, 1, 64)
    discs = (v**2 + 1.4 * u**2 < 0.7).to(C128) + 0.6 * ((v - 0.1) ** 2 + (u + 0.2) ** 2 < 0.1)
    mask = random_mask((64, 64), 0.4)
    A = MulticoilMRI(randn(3, 64, 64, seed=4), mask)
    given = Problem(A(discs) + mask * 0.4 * randn(3, 64, 64, seed=5), A, 0.3)
    error = {}
    for shifts in (False, True):
        x = solve(L1Wavelet(shifts=shifts), given).samples
        assert torch.equal(solve(L1Wavelet(shifts=shifts), given).samples, x)
        error[shifts] = relative_error(x[0], discs)
    assert error[True] < 0.95 * error[False]


@pytest.mark.parametrize("make", [multicoil, tomography])
@pytest.mark.parametrize("shifts", [False, True])
def test_default_does_not_depend_on_units(make, shifts):
    given, solver = make(), L1Wavelet(shifts=shifts)
    x = solve(solver, given).samples
    for factor, other in in_other_units(given):
        torch.testing.assert_close(solve(solver, other).samples, factor * x, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("c", [1e-4, 3e5])
def test_scaled_data_give_the_scaled_image(c):
    given = multicoil()
    one, other = (
        reconstruct(
            a * given.y, given.operator, None, make_solver("l1-wavelet"), noise_std=a * given.noise_std
        )
        for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean, rtol=1e-6, atol=1e-9)
    # Closer to the truth than what conjugate gradients make of the data.
    assert relative_error(one.mean, truth()) < 0.8 * relative_error(given.unfolded, truth())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight must be positive, got 0.0"),
        ({"weight": math.nan}, "weight must be positive, got nan"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"L1Wavelet: {message}"):
        L1Wavelet(**settings)
