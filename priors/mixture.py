"""Mixtures of Gaussian images: several modes, and still every question has a closed-form answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.gaussian import GaussianPrior
from priors.level import image_level

_TABLE_SIZE = 33
"""Noise levels of the error table, spaced evenly in their logarithm."""

_TABLE_IMAGES, _TABLE_PIXELS = 512, 2**15
"""Images, and pixels at the most, that are drawn from each component for an entry of the error table."""


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of K Gaussians over images, written out densely.

    Parameters
    ----------
    weights
        ``(K,)``, float64, their sum 1.
    means
        ``(K, H, W)``, float64 or complex128.
    covariances
        Per real component, ``(K, H*W, H*W)``: a complex image of component k is ``means[k] + L z`` with
        ``L L^H = covariances[k]`` and ``E|z|^2 = 2``.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean of the whole mixture, ``(H, W)``."""
        return torch.tensordot(self.weights.to(self.means.dtype), self.means, dims=1)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the whole mixture per real component, ``(H*W, H*W)``."""
        offsets = (self.means - self.mean).flatten(1)
        # Half of E[x x^H] of a complex image belongs to each of its two real components.
        share = 0.5 if offsets.is_complex() else 1.0
        between = share * offsets[:, :, None] * offsets[:, None, :].conj()
        return torch.einsum(
            "k,kij->ij", self.weights.to(offsets.dtype), self.covariances.to(offsets.dtype) + between
        )

    def log_densities(self, x: Tensor) -> Tensor:
        """``log(weights[k] N(x; means[k], covariances[k]))`` of images ``(..., H, W)``: ``(..., K)``."""
        complex_images = self.means.is_complex()
        columns = []
        for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True):
            root = torch.linalg.cholesky(covariance)
            offset = (x.to(mean.dtype) - mean).flatten(-2)
            white = torch.linalg.solve_triangular(root, offset.reshape(-1, offset.shape[-1]).mT, upper=False)
            quadratic = white.abs().square().sum(0).reshape(offset.shape[:-1])
            log_det = 2 * root.diagonal().real.log().sum()
            columns.append(_log_normal(quadratic, log_det, mean.numel(), complex_images) + weight.log())
        return torch.stack(columns, dim=-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability of each component given images ``(..., H, W)``: ``(..., K)``, float64."""
        return self.log_densities(x).softmax(-1)


class GaussianMixturePrior(ScorePrior):
    """Images ``x0 ~ sum_k weights[k] N(mean_k, C_k)`` with an exact denoiser.

    The noisy image is a mixture too, of components with covariance ``C_k + sigma^2 I``. The denoiser weighs
    those of the components with the probability of each::

        D(x, sigma) = sum_k r_k(x) (mean_k + C_k (C_k + sigma^2 I)^-1 (x - mean_k)),
        r_k(x) proportional to weights[k] N(x; mean_k, C_k + sigma^2 I).

    Its contract carries an error table, as that of a network does.

    Parameters
    ----------
    weights
        Positive numbers, one a component; divided by their sum.
    components
        Gaussian priors on images of one size, all complex or all real.

    Raises
    ------
    PriorError
        If there is no component, the weights do not fit, or the components do not fit each other.

    Notes
    -----
    Covariances are per real component, as everywhere: a complex image of component k is ``mean_k + L z`` with
    ``L L^H = C_k`` and ``E|z|^2 = 2``. A mixture of real images is applied to the real and the imaginary part
    of a complex image independently.
    """

    weights: Tensor
    components: Sequence[GaussianPrior]

    def __init__(self, weights: Sequence[float] | Tensor, components: Sequence[GaussianPrior]) -> None:
        components = list(components)
        if not components:
            raise PriorError("a mixture needs at least one component, got none")
        values = torch.as_tensor(weights, dtype=torch.float64)
        if values.shape != (len(components),):
            raise PriorError(
                f"a mixture of {len(components)} components needs as many weights, "
                f"got shape {tuple(values.shape)}"
            )
        if not bool(((values > 0) & values.isfinite()).all()):
            raise PriorError(f"the weights of a mixture must be positive, got {values.tolist()}")
        first = components[0]
        for component in components[1:]:
            if component.mean.shape != first.mean.shape:
                raise PriorError(
                    "the components of a mixture must be of one size, "
                    f"got {tuple(first.mean.shape)} and {tuple(component.mean.shape)}"
                )
            if component.contract.channels != first.contract.channels:
                raise PriorError("the components of a mixture must be all complex or all real")
        super().__init__(
            Contract(
                channels=first.contract.channels,
                sigma_min=max(component.contract.sigma_min for component in components),
                sigma_max=min(component.contract.sigma_max for component in components),
                name="gaussian-mixture",
            )
        )
        self.register_buffer("weights", values / values.sum())
        self.components = nn.ModuleList(components)  # type: ignore[assignment]
        level = float(image_level(self.sample(64, torch.Generator().manual_seed(0))).mean())
        self.contract = replace(self.contract, level=level, error_table=self._error_table())

    @property
    def complex_images(self) -> bool:
        """Whether the images are complex."""
        return self.contract.channels == "complex"

    @property
    def means(self) -> Tensor:
        """Means of the components, ``(K, H, W)``."""
        return torch.stack([component.mean for component in self.components])

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        if not self.complex_images:
            return self._denoise(x[:, 0], sigma)[:, None]
        image = torch.view_as_complex(x.permute(0, 2, 3, 1).contiguous())
        return torch.view_as_real(self._denoise(image, sigma)).permute(0, 3, 1, 2)

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        estimates, log_densities = zip(*self._components(x, sigma), strict=True)
        shares = torch.stack(log_densities).softmax(0)
        total = torch.zeros_like(x)
        for share, estimate in zip(shares, estimates, strict=True):
            total = total + share[:, None, None].to(x.real.dtype) * estimate
        return total

    def _components(self, x: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Denoised images ``(B, H, W)`` and log densities ``(B,)``, the weight included, by component."""
        size = self.components[0].mean.shape
        if x.shape[-2:] != size:
            raise PriorError(f"this prior knows images {tuple(size)}, got {tuple(x.shape[-2:])}")
        levels, which = sigma.unique(return_inverse=True)  # most batches are of one noise level
        for weight, component in zip(self.weights, self.components, strict=True):
            values = component.values.to(x.real.dtype)
            s2 = sigma.reshape(-1, *([1] * values.ndim)) ** 2
            offset = x - component.mean.to(x.dtype)
            # (C + sigma^2 I)^-1 (x - mean) gives both the density and the estimate, D = x - sigma^2 of it.
            white = component._filter(offset, 1 / (values + s2))
            quadratic = (offset.conj() * white).real.double().sum((-2, -1))
            noisy = component.values.double().flatten() + levels.double()[:, None] ** 2
            log_det = noisy.log().sum(1)[which]
            log_density = _log_normal(quadratic, log_det, offset[0].numel(), x.is_complex()) + weight.log()
            yield x - sigma[:, None, None] ** 2 * white, log_density

    def log_density(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Log density of noisy images ``x = x0 + sigma z``.

        Parameters
        ----------
        x
            ``(..., H, W)``, complex or real as the components are.
        sigma
            Noise level, or a tensor of the leading shape of ``x``; zero for images without noise.

        Returns
        -------
        Tensor
            ``(...)``, float64.

        Raises
        ------
        PriorError
            If the image is of another kind or size.
        """
        if x.is_complex() != self.complex_images:
            known, given = (("real", "complex")[kind] for kind in (self.complex_images, x.is_complex()))
            raise PriorError(f"a density of {known} images was asked for a {given} one")
        lead = x.shape[:-2]
        sigmas = torch.as_tensor(sigma, dtype=x.real.dtype, device=x.device).expand(lead).reshape(-1)
        flat = x.reshape(-1, *x.shape[-2:])
        return torch.stack([log for _, log in self._components(flat, sigmas)]).logsumexp(0).reshape(lead)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw images ``(num, H, W)`` from the prior."""
        chosen = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        drawn = torch.stack([component.sample(num, generator) for component in self.components])
        return drawn[chosen, torch.arange(num, device=drawn.device)]

    def dense(self) -> GaussianMixture:
        """Write the prior itself out with dense covariances."""
        means = self.means.to(torch.complex128 if self.complex_images else torch.float64)
        units = torch.eye(means[0].numel(), dtype=means.dtype, device=means.device)
        units = units.reshape(-1, *means.shape[1:])
        covariances = [
            component._filter(units, component.values.double()).flatten(1).mT for component in self.components
        ]
        return GaussianMixture(self.weights.clone(), means, torch.stack(covariances))

    def posterior(self, matrix: Tensor, y: Tensor, noise_std: float) -> GaussianMixture:
        """Exact posterior given a measurement ``y = A x0 + n``.

        Parameters
        ----------
        matrix
            ``A``, ``(M, H*W)``, for images flattened row by row.
        y
            ``(M,)``.
        noise_std
            Standard deviation of ``n`` per real component, positive.

        Returns
        -------
        GaussianMixture
            With ``G_k = C_k A^H S_k^-1`` and ``S_k = A C_k A^H + noise_std^2 I``: means
            ``mean_k + G_k (y - A mean_k)``, covariances ``(I - G_k A) C_k`` and weights in proportion to
            ``weights[k] N(y; A mean_k, S_k)``.

        Raises
        ------
        PriorError
            If the shapes do not fit or the noise level is not positive.
        """
        prior = self.dense()
        dtype = prior.means.dtype
        pixels = prior.means[0].numel()
        if matrix.shape != (y.numel(), pixels):
            raise PriorError(f"the matrix must have shape ({y.numel()}, {pixels}), got {tuple(matrix.shape)}")
        if not 0 < noise_std < math.inf:
            raise PriorError(f"the noise level must be positive, got {noise_std}")
        if not self.complex_images and (matrix.is_complex() or y.is_complex()):
            raise PriorError("a prior on real images has a closed-form posterior for real measurements only")
        A, data = matrix.to(dtype), y.flatten().to(dtype)
        noise = noise_std**2 * torch.eye(len(A), dtype=dtype, device=A.device)
        means, covariances, log_weights = [], [], []
        for weight, mean, C in zip(prior.weights, prior.means, prior.covariances, strict=True):
            residual = data - A @ mean.flatten()
            root = torch.linalg.cholesky(A @ C @ A.mH + noise)
            gain = torch.cholesky_solve(A @ C, root).mH
            means.append((mean.flatten() + gain @ residual).reshape(mean.shape))
            # Joseph's form stays Hermitian and positive definite.
            rest = torch.eye(pixels, dtype=dtype, device=A.device) - gain @ A
            covariances.append(rest @ C @ rest.mH + noise_std**2 * gain @ gain.mH)
            white = torch.linalg.solve_triangular(root, residual[:, None], upper=False)
            log_det = 2 * root.diagonal().real.log().sum()
            evidence = _log_normal(white.abs().square().sum(), log_det, len(A), self.complex_images)
            log_weights.append(weight.log() + evidence)
        weights = torch.stack(log_weights).softmax(0)
        return GaussianMixture(weights, torch.stack(means), torch.stack(covariances))

    @torch.no_grad()
    def _error_table(self) -> tuple[tuple[float, float], ...]:
        """Root mean square error of the denoiser per real component, at levels over the declared range.

        The mean of the posterior variance: its part within the components is exact, that between them an
        average over images drawn with a fixed seed, as many from each component.
        """
        low, high = self.contract.sigma_min, self.contract.sigma_max
        ratio = (high / low) ** (1 / (_TABLE_SIZE - 1))
        generator = torch.Generator().manual_seed(1)
        first = self.components[0].mean
        num = min(_TABLE_IMAGES, max(8, _TABLE_PIXELS // first.numel()))
        factor = 2 if self.complex_images else 1
        images = torch.cat([component.sample(num, generator) for component in self.components])
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype) * math.sqrt(factor)
        share = (self.weights / num).repeat_interleave(num)
        table = []
        for step in range(_TABLE_SIZE):
            sigma = low * ratio**step
            within = sum(
                float(weight * (values * sigma**2 / (values + sigma**2)).mean())
                for weight, values in zip(
                    self.weights, (component.values for component in self.components), strict=True
                )
            )
            levels = torch.full((len(images),), sigma, dtype=images.real.dtype)
            estimates, logs = zip(*self._components(images + sigma * noise, levels), strict=True)
            shares, denoised = torch.stack(logs).softmax(0), torch.stack(estimates)
            mean = (shares[..., None, None].to(denoised.dtype) * denoised).sum(0)
            spread = (shares * (denoised - mean).abs().square().mean((-2, -1))).sum(0) / factor
            table.append((sigma, math.sqrt(within + float((share * spread).sum()))))
        return tuple(table)


def _log_normal(quadratic: Tensor, log_det: Tensor, size: int, complex_values: bool) -> Tensor:
    """Log density of ``size`` jointly normal values whose covariance per real component is C.

    ``quadratic`` is ``x^H C^-1 x`` and ``log_det`` the logarithm of the determinant of C; a complex value
    counts as two real ones of covariance C.
    """
    components = 2 if complex_values else 1
    return -quadratic / 2 - components * (log_det + size * math.log(2 * math.pi)) / 2
