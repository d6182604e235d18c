"""Sampling of images of two values: DDS with the covariance that two values imply.

Not among the solvers that are called by name: it needs a prior on images of zeros and ones, and is what the
challenge of discs (:mod:`recon.htc2022`) draws with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from priors.base import ScorePrior
from priors.sampling import karras_levels
from recon.solvers.base import (
    KeyedNoise,
    Needs,
    Problem,
    Solution,
    check_at_least,
    check_finite,
    check_needs,
    check_positive,
)
from recon.solvers.cg import cg

UNCERTAIN = 1e-4
"""Least variance of a pixel, of a network that says zero or one."""


@dataclass(frozen=True)
class BinaryDDS:
    """Decomposed diffusion sampling of images whose pixels are zero or one, or a mixture on edges.

    Where a pixel is one of two values, the denoised image ``D`` is the probability of a one, and tells its
    own error: ``D (1 - D)``, large on edges that are in doubt and next to nothing elsewhere. So what the data
    ask for is given where the prior is in doubt, and not by bending what it is sure of. Neighbours err
    together. The covariance of the error of the denoised image is taken to be

        C = S R S,    S^2 = a D (1 - D),    R = exp(-(d / (l sqrt(sigma)))^1.5)

    with ``d`` the distance of two pixels, and ``a = 1 - exp(-sigma / sigma_a)``, less than one since a pixel
    that an edge runs through has a value between zero and one that is known, not in doubt.

    Parameters
    ----------
    nfe
        Network evaluations a sample.
    cg_iterations
        Conjugate-gradient steps a noise level.
    sigma_max, sigma_min, rho
        Karras levels. From noise alone, the first of them is the prior's largest instead.
    doubt
        ``sigma_a``: noise level at which two thirds of ``D (1 - D)`` are doubt.
    reach
        ``l``: distance in pixels over which errors go together at a noise level of 1.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    One step: the denoised image, an error drawn from ``N(0, C)``, the correction ``C A^T (A C A^T + s^2)^-1``
    towards data of noise ``s``, and fresh noise of the next level. It is the step ``"renoise"`` of
    :class:`recon.solvers.dds.DDS` (DiffPIR's, Zhu et al. 2023) with ``C`` instead of ``sigma^2``, in the
    spirit of Boys et al. 2023, who take the covariance from the network's derivatives.

    ``reach`` was measured on 24 discs that the bundled prior was not trained on: errors over
    ``sqrt(D (1 - D))`` have that correlation, within a few hundredths from sigma 0.1 to 5. Their ``doubt`` is
    2.8; twice as much is assumed, for what is not Gaussian about them: samples come nearer to the data.
    """

    needs: ClassVar[Needs] = Needs(noise=True, images=("real",))

    nfe: int = 80
    cg_iterations: int = 20
    sigma_max: float = 3.0
    sigma_min: float = 0.05
    rho: float = 1.5
    doubt: float = 1.6
    reach: float = 2.7

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1, cg_iterations=1)
        check_positive(self, "sigma_max", "sigma_min", "rho", "doubt", "reach")

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one sample for every item of ``noise``, from noise alone.

        Raises
        ------
        SolverError
            If problem or prior do not suit, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        return Solution(self.draw(problem, prior, noise, on_step=on_step), self.nfe)

    @torch.no_grad()
    def draw(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        start: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw one image ``(H, W)`` for every item of ``noise``.

        Parameters
        ----------
        problem
            Real, of images ``(H, W)``, with a matched adjoint and a positive noise level.
        prior
            On images of zeros and ones.
        noise
            Of the samples.
        start
            Images ``(B, H, W)`` to begin at; without them the first level is noise alone.
        on_step
            Called with ``(levels done, levels)``.

        Raises
        ------
        SolverError
            If a value stops being finite.
        """
        operator, data_weight = problem.operator, 1 / problem.noise_std**2
        sigmas = karras_levels(self.nfe, self.sigma_max, self.sigma_min, self.rho)
        if start is None:
            # Noise that hides everything. That of a lower level would be taken for a noisy image of zeros.
            sigmas = [max(prior.contract.sigma_max, sigmas[0]), *sigmas[1:]]
        x = sigmas[0] * noise(0)
        if start is not None:
            x = x + start
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised = prior.denoise(x, sigma)
            root = self.error_root(denoised, sigma)
            drawn = denoised + root(noise(2 * index + 1))
            # In z of x = drawn + root z, whose prior is white: (1 + root^T A^T A root / s^2) z = root^T r.
            misfit = data_weight * root.transposed(problem.adjoint_y - operator.normal(drawn))
            z = cg(root.normal_plus_one(operator.normal, data_weight), misfit, max_iter=self.cg_iterations).x
            x = drawn + root(z)
            if lower > 0:
                x = x + lower * noise(2 * index + 2)
            check_finite(x, index, type(self).__name__)
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return x

    def error_root(self, denoised: Tensor, sigma: float) -> ErrorRoot:
        """Square root of the covariance ``C`` of the error of denoised images ``(B, H, W)``."""
        share = 1 - math.exp(-sigma / self.doubt)
        deviation = (share * ((denoised * (1 - denoised)).clamp_min(0) + UNCERTAIN)).sqrt()
        size = (denoised.shape[-2], denoised.shape[-1])
        spectrum = correlation_root(size, self.reach * math.sqrt(sigma))
        return ErrorRoot(deviation, spectrum.to(denoised.device))


@dataclass(frozen=True, eq=False)
class ErrorRoot:
    """``B`` with ``B B^T = C``: a stationary correlation, then the deviation of every pixel."""

    deviation: Tensor
    spectrum: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """``B z``."""
        return self.deviation * self._correlated(z)

    def transposed(self, x: Tensor) -> Tensor:
        """``B^T x``."""
        return self._correlated(self.deviation * x)

    def normal_plus_one(
        self, normal: Callable[[Tensor], Tensor], weight: float
    ) -> Callable[[Tensor], Tensor]:
        """``z + weight B^T A^T A B z``."""
        return lambda z: torch.add(z, self.transposed(normal(self(z))), alpha=weight)

    def _correlated(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(self.spectrum * torch.fft.rfft2(x), s=x.shape[-2:])


@lru_cache(maxsize=256)
def correlation_root(size: tuple[int, int], reach: float) -> Tensor:
    """Square root of the spectrum (of ``rfft2``) of the correlation ``exp(-(d / reach)^1.5)``, periodic."""
    rows, columns = (torch.fft.fftfreq(side, 1 / side, dtype=torch.float64) for side in size)
    distance = torch.hypot(rows[:, None], columns[None])
    # Rounding alone, and the wrapping of long reaches, can make it negative.
    spectrum = torch.fft.rfft2(torch.exp(-((distance / reach) ** 1.5))).real.clamp_min(0)
    return spectrum.sqrt().float()
