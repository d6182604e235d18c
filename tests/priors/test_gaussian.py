"""The Gaussian prior against dense linear algebra and the moments of its own samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import GaussianPrior, PriorError
from priors.level import image_level


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mean(shape, dtype, seed=0):
    return torch.randn(shape, dtype=dtype, generator=rng(seed))


def random_covariance(n, dtype, seed=0):
    root = torch.randn((n, n), dtype=dtype, generator=rng(seed + 1))
    return root @ root.mH / n


def fourier(shape):
    """Matrix of the uncentred orthonormal two-dimensional Fourier transform on flattened images."""
    rows, columns = (torch.fft.fft(torch.eye(n, dtype=torch.complex128), norm="ortho") for n in shape)
    return torch.kron(rows, columns)


def make(kind, shape, dtype, seed=0):
    """A prior, and its covariance per real component as a dense matrix."""
    mean, n = random_mean(shape, dtype, seed), math.prod(shape)
    real = mean.abs().dtype
    if kind == "covariance":
        dense = random_covariance(n, dtype, seed)
        return GaussianPrior(mean, covariance=dense), dense
    values = torch.rand(shape, generator=rng(seed + 2), dtype=real)
    if kind == "variance":
        return GaussianPrior(mean, variance=values), values.flatten().diag().to(dtype)
    if not dtype.is_complex:
        values = (values + values.flip((0, 1)).roll((1, 1), (0, 1))) / 2
    F = fourier(shape)
    dense = F.mH @ values.flatten().diag().to(F.dtype) @ F
    return GaussianPrior(mean, spectrum=values), (dense if dtype.is_complex else dense.real).to(dtype)


KINDS = ("variance", "spectrum", "covariance")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_field = pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.complex128, torch.float64]),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sigma=st.floats(1e-3, 1e3),
)
def test_denoiser_is_the_dense_formula(kind, dtype, shape, sigma):
    prior, C = make(kind, shape, dtype)
    x = random_mean((3, *shape), dtype, seed=9)
    mean, flat = prior.mean.flatten(), x.flatten(1).mT
    identity = torch.eye(len(C), dtype=dtype)
    gain = C @ torch.linalg.inv(C + sigma**2 * identity)
    expected = (mean[:, None] + gain @ (flat - mean[:, None])).mT.reshape(x.shape)
    torch.testing.assert_close(prior.denoise(x, sigma), expected, rtol=1e-9, atol=1e-9)
    # The posterior covariance is sigma^2 times the gain.
    assert prior.error_variance(sigma) == pytest.approx(sigma**2 * float(gain.diagonal().real.mean()))


@every_kind
@every_field
def test_single_precision_and_a_sigma_for_each_image(kind, dtype):
    prior, _ = make(kind, (5, 6), dtype)
    x = random_mean((3, 5, 6), dtype, seed=4)
    sigmas = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = prior.denoise(x, sigmas)
    for item, sigma, result in zip(x, sigmas, together, strict=True):
        torch.testing.assert_close(prior.denoise(item, float(sigma)), result)
    small = torch.complex64 if dtype.is_complex else torch.float32
    torch.testing.assert_close(prior.denoise(x.to(small), sigmas), together.to(small), rtol=1e-4, atol=1e-5)


@every_kind
@every_field
def test_moments_of_the_samples(kind, dtype):
    prior, C = make(kind, (3, 2), dtype)
    n = 200_000
    x = prior.sample(n, rng(5)).flatten(1)
    centred = x - prior.mean.flatten()
    # E|z|^2 = 2 for complex images: the covariance of the complex numbers is twice that per component.
    factor = 2 if dtype.is_complex else 1
    tolerance = 6 * factor * float(C.abs().max()) / math.sqrt(n)
    assert float((centred.mT @ centred.conj() / n - factor * C).abs().max()) < tolerance
    assert float(centred.mean(0).abs().max()) < tolerance
    if dtype.is_complex:  # circular: no correlation without conjugation
        assert float((centred.mT @ centred / n).abs().max()) < tolerance


@every_kind
@every_field
def test_denoising_its_own_samples_leaves_the_error_variance(kind, dtype):
    prior, _ = make(kind, (4, 5), dtype)
    x, sigma = prior.sample(4000, rng(6)), 0.6
    noise = torch.randn(x.shape, dtype=dtype, generator=rng(7)) * (math.sqrt(2) if dtype.is_complex else 1)
    error = (prior.denoise(x + sigma * noise, sigma) - x).abs().square().mean()
    per_component = float(error) / (2 if dtype.is_complex else 1)
    assert per_component == pytest.approx(prior.error_variance(sigma), rel=0.03)


@every_kind
@every_field
def test_level_is_that_of_the_samples(kind, dtype):
    prior, _ = make(kind, (4, 5), dtype)
    drawn = image_level(prior.sample(5000, rng(8)))
    assert prior.contract.level == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 8)


@every_kind
def test_real_prior_on_a_complex_image_is_applied_to_both_parts(kind):
    prior, _ = make(kind, (4, 3), torch.float64)
    assert prior.contract.channels == "real"
    x, sigma = random_mean((2, 4, 3), torch.complex128, seed=3), torch.tensor([0.3, 2.0])
    expected = torch.complex(prior.denoise(x.real, sigma), prior.denoise(x.imag, sigma))
    torch.testing.assert_close(prior.denoise(x, sigma), expected)


def test_a_number_is_the_variance_of_every_pixel():
    prior = GaussianPrior(torch.zeros(2, 3, dtype=torch.complex64), variance=4.0)
    x = random_mean((2, 3), torch.complex64)
    torch.testing.assert_close(prior.denoise(x, 2.0), x / 2)
    assert prior.error_variance(2.0) == pytest.approx(2.0)


def test_pixels_without_variance_are_known():
    prior = GaussianPrior(torch.full((2, 2), 3.0), variance=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert prior.denoise(torch.zeros(2, 2), 1e-4)[0, 0] == 3


MEAN = torch.zeros(2, 3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("mean", "arguments", "message"),
    [
        (MEAN, {}, "exactly one of variance, spectrum and covariance"),
        (MEAN, {"variance": 1.0, "spectrum": torch.ones(2, 3)}, "exactly one of"),
        (torch.zeros(3), {"variance": 1.0}, r"an image \(H, W\), got shape \(3,\)"),
        (MEAN, {"variance": -1.0}, "variance must not be negative"),
        (MEAN, {"variance": math.nan}, "variance must not be negative or NaN"),
        (MEAN, {"variance": torch.ones(3, 2)}, r"the mean's shape \(2, 3\), got \(3, 2\)"),
        (MEAN, {"variance": 0.0}, "knows no image but zero"),
        (MEAN, {"spectrum": torch.full((2, 3), -1.0)}, "spectrum must not be negative"),
        (MEAN.real, {"spectrum": torch.arange(6.0).reshape(2, 3)}, "must be symmetric"),
        (MEAN, {"covariance": torch.eye(5)}, r"covariance must have shape \(6, 6\), got \(5, 5\)"),
        (MEAN, {"covariance": 1e-9 * torch.ones(6, 6).triu()}, "must be Hermitian"),
        (MEAN, {"covariance": torch.eye(6) * math.nan}, "must be Hermitian"),
        (MEAN, {"covariance": torch.eye(6) - 0.5 * torch.ones(6, 6)}, "negative eigenvalues"),
        (MEAN.real, {"covariance": torch.eye(6, dtype=torch.complex64)}, "of real images must be real"),
    ],
)
def test_no_covariance(mean, arguments, message):
    with pytest.raises(PriorError, match=message):
        GaussianPrior(mean, **arguments)


def test_image_of_another_size():
    with pytest.raises(PriorError, match=r"knows images \(2, 3\), got \(3, 2\)"):
        GaussianPrior(MEAN, variance=1.0).denoise(MEAN.mT, 1.0)
