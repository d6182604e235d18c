"""Noise covariance and prewhitening: known covariances come back, whitened noise has unit variance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import OperatorError
from operators.fft import ifftc
from operators.prewhitening import (
    noise_covariance,
    noise_from_image_corners,
    noise_from_kspace_edge,
    prewhiten,
)
from operators.simulation import birdcage_maps, simulate_kspace


def noise(num_coils, *shape, seed=0):
    """Correlated noise (C, *shape), and its covariance per real component."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_coils, num_coils, dtype=torch.complex64, generator=generator)
    mix = mix * torch.logspace(-1, 1, num_coils)[:, None]  # gains differ a hundredfold
    white = torch.randn(num_coils, *shape, dtype=torch.complex64, generator=generator)  # E|n|^2 = 1
    return torch.tensordot(mix, white, dims=1), mix @ mix.mH / 2


def relative_error(estimate, covariance):
    scale = covariance.diagonal().real.sqrt()
    return ((estimate - covariance).abs() / (scale[:, None] * scale)).max()


def test_covariance_is_per_real_component():
    samples = 3 * torch.view_as_complex(torch.randn(1, 40000, 2, generator=torch.Generator().manual_seed(0)))
    assert noise_covariance(samples).real.item() == pytest.approx(9, rel=0.03)


@settings(deadline=None, max_examples=10)
@given(num_coils=st.integers(1, 6), seed=st.integers(0, 1000))
def test_whitened_noise_is_white_with_unit_variance(num_coils, seed):
    samples, covariance = noise(num_coils, 40, 500, seed=seed)
    estimate = noise_covariance(samples.flatten(1))
    assert relative_error(estimate, covariance) < 0.05
    white = prewhiten(samples, estimate)
    torch.testing.assert_close(
        noise_covariance(white.flatten(1)), torch.eye(num_coils, dtype=white.dtype), atol=2e-3, rtol=0
    )
    # With the true covariance up to the sampling error of 20000 samples.
    other = noise_covariance(prewhiten(samples, covariance).flatten(1))
    torch.testing.assert_close(other, torch.eye(num_coils, dtype=white.dtype), atol=0.05, rtol=0)


def test_cholesky_factor_against_the_inverse():
    _, covariance = noise(4, 10)
    kspace = torch.randn(2, 4, 5, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    white = prewhiten(kspace, covariance)
    assert white.dtype == kspace.dtype
    # |L^-1 y|^2 = y^H Psi^-1 y, whatever the factor.
    inverse = torch.linalg.inv(covariance.to(torch.complex128))
    expected = torch.einsum("bchw,cd,bdhw->bhw", kspace.conj(), inverse, kspace).real
    torch.testing.assert_close(white.abs().square().sum(dim=1), expected, rtol=1e-6, atol=0)
    # L is lower triangular: the first coil is only scaled.
    torch.testing.assert_close(white[:, 0], kspace[:, 0] / covariance[0, 0].real.double().sqrt())


def test_noise_from_the_edge_of_kspace():
    image = torch.zeros(200, 120)
    image[60:140, 30:90] = 1
    samples, covariance = noise(3, 200, 120, seed=4)
    kspace = simulate_kspace(image, birdcage_maps(3, (200, 120))) * 0.1 + samples
    mask = torch.arange(120) % 3 == 0
    edge = noise_from_kspace_edge(kspace * mask, fraction=0.1)
    assert edge.shape == (3, 2 * 20 * 40)
    assert relative_error(noise_covariance(edge), covariance) < 0.15
    padded = torch.zeros(3, 240, 120, dtype=torch.complex64)
    padded[:, 20:220] = kspace * mask  # a zero-padded readout changes nothing
    assert torch.equal(noise_from_kspace_edge(padded, fraction=0.1), edge)


def test_noise_from_the_corners_of_images():
    image = torch.zeros(200, 120)
    image[40:160, 20:100] = 100
    samples, covariance = noise(3, 200, 120, seed=4)
    images = ifftc(simulate_kspace(image, birdcage_maps(3, (200, 120))) + samples)
    corners = noise_from_image_corners(images, fraction=0.1)
    assert corners.shape == (3, 4 * 20 * 12)
    assert relative_error(noise_covariance(corners), covariance) < 0.15


def test_singular_covariances():
    _, covariance = noise(4, 10)
    dead = covariance.clone()
    dead[2], dead[:, 2] = 0, 0
    with pytest.raises(OperatorError, match="singular: coil 2 has no noise"):
        prewhiten(torch.ones(4, 2, 2, dtype=torch.complex64), dead)
    dependent = torch.zeros(5, 4)
    dependent[:4] = torch.eye(4)
    dependent[4, :2] = 1  # the fifth coil is the sum of the first two
    mixed = dependent.to(covariance) @ covariance @ dependent.T.to(covariance)
    with pytest.raises(OperatorError, match="combination of others"):
        prewhiten(torch.ones(5, 2, 2, dtype=torch.complex64), mixed)


def test_bad_input():
    ones = torch.ones(2, 4, 4, dtype=torch.complex64)
    with pytest.raises(OperatorError, match=r"shape \(2, 2\), got \(3, 3\)"):
        prewhiten(ones, torch.eye(3, dtype=torch.complex64))
    with pytest.raises(OperatorError, match="not Hermitian"):
        prewhiten(ones, torch.tensor([[1, 0.5], [0, 1]], dtype=torch.complex64))
    with pytest.raises(OperatorError, match="NaN"):
        prewhiten(ones, torch.full((2, 2), float("nan"), dtype=torch.complex64))
    with pytest.raises(OperatorError, match="complex"):
        prewhiten(ones.real, torch.eye(2, dtype=torch.complex64))
    with pytest.raises(OperatorError, match="too few"):
        noise_covariance(ones[:, 0, :2])
    with pytest.raises(OperatorError, match=r"\(C, N\)"):
        noise_covariance(ones)
    with pytest.raises(OperatorError, match="NaN"):
        noise_covariance(ones[0].reshape(2, 8) * float("nan"))
    with pytest.raises(OperatorError, match="zero everywhere"):
        noise_from_kspace_edge(0 * ones)
    for function in (noise_from_kspace_edge, noise_from_image_corners):
        with pytest.raises(OperatorError, match="fraction"):
            function(ones, fraction=0.6)
        with pytest.raises(OperatorError, match=r"\(C, H, W\)"):
            function(ones[0])
