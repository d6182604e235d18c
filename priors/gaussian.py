"""Gaussian images: the prior whose every question has a closed-form answer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.level import image_level


class GaussianPrior(ScorePrior):
    """Images ``x0 ~ N(mean, C)`` with an exact denoiser, for tests and for checking solvers.

    ``C`` is the covariance per real component: a complex image is ``mean + L z`` with ``L L^H = C`` and
    ``E|z|^2 = 2``. Then ``D(x, sigma) = mean + C (C + sigma^2 I)^-1 (x - mean)``.

    Parameters
    ----------
    mean
        ``(H, W)``; complex for complex images, real for real ones.
    variance
        Independent pixels: non-negative, ``(H, W)`` or a number.
    spectrum
        Stationary images: variance of each coefficient of the uncentred orthonormal Fourier transform,
        ``(H, W)``; that of real images is symmetric, ``spectrum[k] = spectrum[-k]``.
    covariance
        Any covariance: Hermitian (real symmetric for real images) non-negative, ``(H*W, H*W)``.
    sigma_min, sigma_max
        Declared noise range.

    Raises
    ------
    PriorError
        Unless exactly one of the three is given, and it is a covariance.
    """

    mean: Tensor
    values: Tensor
    basis: Tensor | None

    def __init__(
        self,
        mean: Tensor,
        *,
        variance: Tensor | float | None = None,
        spectrum: Tensor | None = None,
        covariance: Tensor | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 20.0,
    ) -> None:
        if sum(item is not None for item in (variance, spectrum, covariance)) != 1:
            raise PriorError("give exactly one of variance, spectrum and covariance")
        if mean.ndim != 2:
            raise PriorError(f"the mean is an image (H, W), got shape {tuple(mean.shape)}")
        real = mean.abs().dtype
        basis: Tensor | None = None
        if covariance is not None:
            values, basis = _eigenvalues(covariance, mean)
        elif spectrum is not None:
            values = _non_negative(spectrum, "spectrum", mean.shape, real)
            mirrored = values.flip((0, 1)).roll((1, 1), (0, 1))
            if not mean.is_complex() and not torch.allclose(values, mirrored, rtol=1e-5, atol=0):
                raise PriorError("the spectrum of a real image must be symmetric, spectrum[k] = spectrum[-k]")
        else:
            values = _non_negative(variance, "variance", mean.shape, real)
        super().__init__(
            Contract(
                channels="complex" if mean.is_complex() else "real",
                sigma_min=sigma_min,
                sigma_max=sigma_max,
                name="gaussian",
            )
        )
        self.stationary = spectrum is not None
        self.register_buffer("mean", mean.clone())
        self.register_buffer("values", values)
        self.register_buffer("basis", basis)
        drawn = self.sample(64, torch.Generator().manual_seed(0))
        level = float(image_level(drawn).mean())
        if not level > 0:
            raise PriorError("a prior of mean zero and variance zero knows no image but zero")
        self.contract = replace(self.contract, level=level)

    def _filter(self, x: Tensor, gains: Tensor) -> Tensor:
        """Apply a function of the covariance, given by its eigenvalues ``gains``, to ``(..., H, W)``."""
        if self.basis is not None:
            basis = self.basis.to(x.dtype)
            coefficients = x.flatten(-2) @ basis.conj()
            return ((coefficients * gains) @ basis.mT).reshape(x.shape)
        if self.stationary:
            filtered = torch.fft.ifft2(torch.fft.fft2(x, norm="ortho") * gains, norm="ortho")
            return filtered if x.is_complex() else filtered.real
        return x * gains

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        if x.shape[-2:] != self.mean.shape:
            raise PriorError(f"this prior knows images {tuple(self.mean.shape)}, got {tuple(x.shape[-2:])}")
        values = self.values.to(x.real.dtype if x.is_complex() else x.dtype)
        s2 = sigma.reshape(-1, *([1] * values.ndim)) if self.basis is None else sigma.reshape(-1, 1)
        mean = self.mean.to(x.dtype)
        return mean + self._filter(x - mean, values / (values + s2**2))

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        if self.contract.channels == "real":
            return self._denoise(x[:, 0], sigma)[:, None]
        image = torch.view_as_complex(x.permute(0, 2, 3, 1).contiguous())
        return torch.view_as_real(self._denoise(image, sigma)).permute(0, 3, 1, 2)

    def error_variance(self, sigma: float) -> float:
        """Mean over pixels of the posterior variance per real component, exact."""
        return float((self.values * sigma**2 / (self.values + sigma**2)).mean())

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw images ``(num, H, W)`` from the prior."""
        z = torch.randn(
            (num, *self.mean.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        # Torch's complex normal numbers have E|z|^2 = 1, those of this project 2.
        root = (self.values * (2 if z.is_complex() else 1)).sqrt()
        return self.mean + self._filter(z, root)


def _non_negative(given: Tensor | float | None, what: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    values = torch.as_tensor(given, dtype=dtype)
    if values.ndim and values.shape != shape:
        raise PriorError(
            f"{what} must be a number or of the mean's shape {tuple(shape)}, got {tuple(values.shape)}"
        )
    if not bool((values >= 0).all()):
        raise PriorError(f"{what} must not be negative or NaN")
    return values.expand(shape).clone()


def _eigenvalues(covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    n = mean.numel()
    if covariance.shape != (n, n):
        raise PriorError(f"covariance must have shape ({n}, {n}), got {tuple(covariance.shape)}")
    if covariance.is_complex() and not mean.is_complex():
        raise PriorError("the covariance of real images must be real")
    if not bool((covariance - covariance.mH).abs().max() <= 1e-5 * covariance.abs().max()):
        raise PriorError("covariance must be Hermitian")
    values, basis = torch.linalg.eigh(covariance.to(mean.dtype))
    if float(values.min()) < -1e-5 * float(values.abs().max()):
        raise PriorError("covariance has negative eigenvalues")
    return values.clamp_min(0), basis
