"""The mixture prior against dense formulas, integrals worked out numerically, and its own samples."""

import math

import pytest
import torch

from priors import GaussianPrior, PriorError
from priors.level import image_level
from priors.mixture import GaussianMixture, GaussianMixturePrior

C128, F64 = torch.complex128, torch.float64
SHAPE, N = (3, 2), 6


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def covariance(n, dtype, seed):
    root = randn(n, n, seed=seed, dtype=dtype)
    return root @ root.mH / n + 0.05 * torch.eye(n)


def make(dtype, weights=(0.2, 0.5, 0.3)):
    """Components of all three kinds; the weights are given up to a factor."""
    real = dtype.to_real()
    spectrum = 0.2 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(4), dtype=real)
    spectrum = (spectrum + spectrum.flip((0, 1)).roll((1, 1), (0, 1))) / 2
    components = [
        GaussianPrior(randn(*SHAPE, seed=1, dtype=dtype), covariance=covariance(N, dtype, 2)),
        GaussianPrior(1 + randn(*SHAPE, seed=3, dtype=dtype), spectrum=spectrum),
        GaussianPrior(randn(*SHAPE, seed=5, dtype=dtype), variance=torch.rand(SHAPE, dtype=real) + 0.1),
    ]
    return GaussianMixturePrior([10 * weight for weight in weights], components)


def as_real(dense: GaussianMixture):
    """The mixture over real vectors: real and imaginary parts side by side."""
    if not dense.means.is_complex():
        return dense.weights, dense.means.flatten(1), dense.covariances
    m, C = dense.means.flatten(1), dense.covariances
    blocks = [torch.cat([C.real, -C.imag], -1), torch.cat([C.imag, C.real], -1)]
    return dense.weights, torch.cat([m.real, m.imag], -1), torch.cat(blocks, -2)


def stacked(x):
    flat = x.flatten(-2)
    return torch.cat([flat.real, flat.imag], -1) if x.is_complex() else flat


def reference(dense, sigma=0.0):
    """The same by torch's distributions."""
    weights, means, covariances = as_real(dense)
    noisy = covariances + sigma**2 * torch.eye(means.shape[1], dtype=F64)
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, noisy)
    )


every_field = pytest.mark.parametrize("dtype", [C128, F64])


@every_field
def test_dense_covariances_are_those_given(dtype):
    prior = make(dtype)
    dense = prior.dense()
    torch.testing.assert_close(dense.weights, torch.tensor([0.2, 0.5, 0.3], dtype=F64))
    torch.testing.assert_close(dense.covariances[0], covariance(N, dtype, 2))
    torch.testing.assert_close(dense.covariances[2], prior.components[2].values.flatten().diag().to(dtype))
    F = torch.kron(*(torch.fft.fft(torch.eye(n, dtype=C128), norm="ortho") for n in SHAPE))
    circulant = F.mH @ prior.components[1].values.flatten().diag().to(C128) @ F
    torch.testing.assert_close(dense.covariances[1].to(C128), circulant)
    torch.testing.assert_close(dense.means, prior.means)


@every_field
@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_log_density_is_that_of_torch(dtype, sigma):
    prior = make(dtype)
    x = 2 * randn(4, 3, *SHAPE, seed=7, dtype=dtype)
    expected = reference(prior.dense(), sigma).log_prob(stacked(x))
    torch.testing.assert_close(prior.log_density(x, sigma), expected)


@every_field
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_score_is_the_gradient_of_the_log_density(dtype, sigma):
    prior = make(dtype)
    x = (1.5 * randn(5, *SHAPE, seed=8, dtype=dtype)).requires_grad_()
    (gradient,) = torch.autograd.grad(reference(prior.dense(), sigma).log_prob(stacked(x)).sum(), x)
    torch.testing.assert_close(prior.score(x, sigma), gradient, rtol=1e-8, atol=1e-8)


def test_denoiser_of_one_pixel_is_the_integral():
    means, stds, weights, sigma = (-1.0, 0.4, 2.0), (0.3, 0.1, 0.6), (0.3, 0.5, 0.2), 0.7
    prior = GaussianMixturePrior(
        weights,
        [
            GaussianPrior(torch.full((1, 1), m, dtype=F64), variance=s**2)
            for m, s in zip(means, stds, strict=True)
        ],
    )
    x0 = torch.linspace(-8, 8, 200_001, dtype=F64)
    density = sum(
        w / s * torch.exp(-((x0 - m) ** 2) / (2 * s**2)) for m, s, w in zip(means, stds, weights, strict=True)
    )
    for x in (-2.0, 0.1, 0.9, 3.0):
        posterior = density * torch.exp(-((x - x0) ** 2) / (2 * sigma**2))
        expected = float((x0 * posterior).sum() / posterior.sum())
        assert float(prior.denoise(torch.full((1, 1), x, dtype=F64), sigma)) == pytest.approx(expected)


@every_field
def test_denoiser_is_the_dense_formula_with_a_sigma_for_each_image(dtype):
    prior = make(dtype)
    x, sigmas = randn(3, *SHAPE, seed=9, dtype=dtype), torch.tensor([0.1, 0.8, 6.0], dtype=F64)
    dense = prior.dense()
    expected = []
    for item, sigma in zip(x.flatten(1), sigmas, strict=True):
        noisy = GaussianMixture(
            dense.weights, dense.means, dense.covariances + sigma**2 * torch.eye(N, dtype=dtype)
        )
        shares = noisy.responsibilities(item.reshape(SHAPE))
        estimates = [
            m + C @ torch.linalg.solve(C + sigma**2 * torch.eye(N), item - m)
            for m, C in zip(dense.means.flatten(1), dense.covariances, strict=True)
        ]
        expected.append(sum(share * estimate for share, estimate in zip(shares, estimates, strict=True)))
    result = prior.denoise(x, sigmas)
    torch.testing.assert_close(result, torch.stack(expected).reshape(x.shape))
    small = torch.complex64 if dtype.is_complex else torch.float32
    torch.testing.assert_close(prior.denoise(x.to(small), sigmas), result.to(small), rtol=1e-4, atol=1e-5)


@every_field
def test_gradients_flow_through_the_denoiser(dtype):
    prior = make(dtype)
    x = randn(2, *SHAPE, seed=10, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: prior.denoise(z, 0.6), (x,))


def test_one_component_is_the_gaussian_prior():
    gaussian = GaussianPrior(randn(*SHAPE), covariance=covariance(N, C128, 1))
    mixture, x = GaussianMixturePrior([3.0], [gaussian]), randn(4, *SHAPE, seed=2)
    torch.testing.assert_close(mixture.denoise(x, 0.4), gaussian.denoise(x, 0.4))
    for sigma in (0.002, 0.03, 0.7, 4.0):
        assert mixture.error_variance(sigma) == pytest.approx(gaussian.error_variance(sigma), rel=0.01)


@every_field
def test_moments_and_weights_of_the_samples(dtype):
    prior, n = make(dtype), 60_000
    dense = prior.dense()
    x = prior.sample(n, torch.Generator().manual_seed(1))
    flat = x.flatten(1) - dense.mean.flatten()
    factor = 2 if dtype.is_complex else 1
    bound = 6 * factor * float(dense.covariance.abs().max()) / math.sqrt(n)
    assert float((flat.mT @ flat.conj() / n - factor * dense.covariance).abs().max()) < bound
    assert float(flat.mean(0).abs().max()) < bound
    shares = dense.responsibilities(x).mean(0)
    torch.testing.assert_close(shares, dense.weights, atol=4 * 0.5 / math.sqrt(n), rtol=0)


@every_field
def test_error_variance_is_the_error_of_the_denoiser(dtype):
    prior, factor = make(dtype), 2 if dtype.is_complex else 1
    x = prior.sample(20_000, torch.Generator().manual_seed(3))
    for sigma in (0.1, 0.9, 4.0):
        noisy = x + sigma * math.sqrt(factor) * randn(*x.shape, seed=4, dtype=dtype)
        error = float((prior.denoise(noisy, sigma) - x).abs().square().mean()) / factor
        assert prior.error_variance(sigma) == pytest.approx(error, rel=0.04)


def test_level_is_that_of_the_samples():
    prior = make(C128)
    drawn = image_level(prior.sample(4000, torch.Generator().manual_seed(5)))
    assert prior.contract.level == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 8)


def test_noise_range_is_what_all_components_declare():
    mean = torch.zeros(2, 2)
    wide = GaussianPrior(mean, variance=1.0, sigma_min=0.01, sigma_max=50.0)
    narrow = GaussianPrior(mean, variance=1.0, sigma_min=0.02, sigma_max=30.0)
    for components in ([wide, narrow], [narrow, wide]):
        contract = GaussianMixturePrior([1, 1], components).contract
        assert (contract.sigma_min, contract.sigma_max, contract.channels) == (0.02, 30.0, "real")
        assert contract.error_table[0][0] == 0.02
        assert contract.error_table[-1][0] == pytest.approx(30.0)


def test_a_real_mixture_is_applied_to_both_parts_of_a_complex_image():
    prior, x = make(F64), randn(2, *SHAPE, seed=6)
    expected = torch.complex(prior.denoise(x.real, 0.5), prior.denoise(x.imag, 0.5))
    torch.testing.assert_close(prior.denoise(x, 0.5), expected)


# Posterior


@every_field
def test_posterior_is_bayes_rule(dtype):
    # p(x | y) p(y) = p(x) p(y | x) at any x; the evidence is then a constant.
    prior, noise_std = make(dtype), 0.4
    A = randn(4, N, seed=11, dtype=dtype)
    y = randn(4, seed=12, dtype=dtype)
    posterior = prior.posterior(A, y, noise_std)
    x = randn(50, *SHAPE, seed=13, dtype=dtype)
    misfit = (y - x.flatten(1) @ A.mT).abs().square().sum(1)
    joint = reference(prior.dense()).log_prob(stacked(x)) - misfit / (2 * noise_std**2)
    evidence = joint - reference(posterior).log_prob(stacked(x))
    assert float(evidence.std()) < 1e-8
    torch.testing.assert_close(posterior.weights.sum(), torch.ones((), dtype=F64))
    assert 0.01 < float(posterior.weights.max()) < 0.99


def test_posterior_of_one_gaussian_is_the_regularised_solution():
    C, A, y = covariance(N, C128, 1), randn(4, N, seed=2), randn(4, seed=3)
    prior = GaussianMixturePrior([1.0], [GaussianPrior(randn(*SHAPE), covariance=C)])
    posterior = prior.posterior(A, y, 0.3)
    precision = torch.linalg.inv(C) + A.mH @ A / 0.09
    m = randn(*SHAPE).flatten()
    expected = torch.linalg.solve(precision, torch.linalg.solve(C, m) + A.mH @ y / 0.09)
    torch.testing.assert_close(posterior.mean.flatten(), expected)
    torch.testing.assert_close(posterior.covariance, torch.linalg.inv(precision))


@every_field
def test_moments_of_a_whole_mixture(dtype):
    dense = make(dtype).dense()
    weights, means, covariances = as_real(dense)
    mean = weights @ means
    second = torch.einsum(
        "k,kij->ij", weights, covariances + means[:, :, None] * means[:, None]
    ) - torch.outer(mean, mean)
    torch.testing.assert_close(stacked(dense.mean), mean)
    if dtype.is_complex:  # E[x x^H] / 2 per real component
        real, imag = second[:N, :N] + second[N:, N:], second[N:, :N] - second[:N, N:]
        second = torch.complex(real, imag) / 2
    torch.testing.assert_close(dense.covariance, second)


def test_responsibilities_are_shares_of_the_density():
    dense = make(F64).dense()
    x = randn(7, *SHAPE, seed=3, dtype=F64)
    density = reference(dense)
    shares = density.component_distribution.log_prob(stacked(x)[:, None]) + dense.weights.log()
    torch.testing.assert_close(dense.log_densities(x), shares)
    torch.testing.assert_close(dense.responsibilities(x).sum(-1), torch.ones(7, dtype=F64))


# What cannot be done

ZERO = GaussianPrior(torch.zeros(2, 2, dtype=C128), variance=1.0)


@pytest.mark.parametrize(
    ("weights", "components", "message"),
    [
        ([], [], "at least one component"),
        ([1.0, 1.0], [ZERO], r"a mixture of 1 components needs as many weights, got shape \(2,\)"),
        ([1.0, 0.0], [ZERO, ZERO], r"must be positive, got \[1.0, 0.0\]"),
        ([math.nan], [ZERO], "must be positive"),
        ([1, 1], [ZERO, GaussianPrior(torch.zeros(2, 3, dtype=C128), variance=1.0)], "of one size"),
        ([1, 1], [ZERO, GaussianPrior(torch.zeros(2, 2), variance=1.0)], "all complex or all real"),
    ],
)
def test_no_mixture(weights, components, message):
    with pytest.raises(PriorError, match=message):
        GaussianMixturePrior(weights, components)


def test_what_does_not_fit_the_mixture():
    prior = GaussianMixturePrior([1.0], [ZERO])
    with pytest.raises(PriorError, match=r"knows images \(2, 2\), got \(2, 3\)"):
        prior.denoise(torch.zeros(2, 3, dtype=C128), 1.0)
    with pytest.raises(PriorError, match="density of complex images was asked for a real one"):
        prior.log_density(torch.zeros(2, 2), 1.0)
    with pytest.raises(PriorError, match=r"matrix must have shape \(3, 4\), got \(3, 5\)"):
        prior.posterior(torch.zeros(3, 5), torch.zeros(3), 1.0)
    with pytest.raises(PriorError, match=r"noise level must be positive, got 0.0"):
        prior.posterior(torch.zeros(3, 4), torch.zeros(3), 0.0)
    real = GaussianMixturePrior([1.0], [GaussianPrior(torch.zeros(2, 2), variance=1.0)])
    with pytest.raises(PriorError, match="real measurements only"):
        real.posterior(torch.zeros(3, 4, dtype=C128), torch.zeros(3), 1.0)
