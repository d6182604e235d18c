"""ΠGDM: pseudoinverse-guided diffusion models (Song, Vahdat, Mardani & Kautz, ICLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from priors.base import ScorePrior
from recon.solvers.base import (
    KeyedNoise,
    Needs,
    Problem,
    Solution,
    SolverError,
    check_at_least,
    check_choices,
    check_finite,
    check_needs,
)
from recon.solvers.cg import cg, cg_steps
from recon.solvers.schedule import noise_levels


@dataclass(frozen=True)
class PiGDM:
    """Pseudoinverse guidance: DDIM with the score of a Gaussian approximation to the likelihood.

    With ``x0 | x ~ N(D, r^2 I)`` the likelihood is ``y | x ~ N(A D, r^2 A A^H + s^2 I)``, whose score
    ``g = (dD/dx)^H A^H (r^2 A A^H + s^2 I)^-1 (y - A D)`` (paper, Eq. 7) goes through the network. The
    inverse is worked out in image space, ``(r^2 A^H A + s^2 I)^-1 A^H``, by conjugate gradients.

    Parameters
    ----------
    nfe
        Network evaluations a sample, each with its vector-Jacobian product (about as long again).
    spread
        Variance r^2 of the image about its denoised version. ``"sigma"``: sigma^2, that in directions which
        the prior leaves free; an upper bound, and stable. ``"unit"``: sigma^2 / (1 + sigma^2), the paper's,
        for images of unit variance. ``"prior"``: the measured mean over the image
        (:meth:`ScorePrior.error_variance`), exact where that is the same in all directions, and divergent
        where it is far smaller than the largest, as it is for photographs and anatomies.
    eta
        Share of fresh noise in a step: 0 is deterministic (DDIM), 1 ancestral (DDPM).
    guidance
        ``"score"``: g is added to the prior's score, so that it corrects ``D`` by ``sigma^2 g`` and the noise
        estimate by ``-sigma g``. ``"paper"``: ``r^2 g`` is added to the next image, in variance-preserving
        coordinates with the weight sqrt(alpha_bar) (paper, Algorithm 1), whatever the length of the step.
    cg_iterations
        Conjugate-gradient steps a noise level at the most.
    cg_tolerance
        Accuracy aimed at with those steps; their number follows from it and from the condition number
        ``1 + (r ||A|| / s)^2``. Zero: always ``cg_iterations``.
    schedule
        ``"karras"``, or ``"vp-linear"``, whose levels are fixed by ``nfe`` alone.
    sigma_max, sigma_min
        First and last noise level of ``"karras"``; the first is cut at the prior's largest. ``None`` for
        ``sigma_min``: the measurement's noise level, below which the data say no more, within the prior's
        range.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of the first level.
        ``"noise"``: noise alone.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(gradient=True, noise=True)

    nfe: int = 30
    spread: str = "sigma"
    eta: float = 1.0
    guidance: str = "score"
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    schedule: str = "karras"
    sigma_max: float = 2.0
    sigma_min: float | None = None
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1, cg_iterations=1, cg_tolerance=0)
        if not 0 <= self.eta <= 1:
            raise SolverError(f"PiGDM: eta must lie in [0, 1], got {self.eta}")
        check_choices(
            self,
            spread=("sigma", "unit", "prior"),
            guidance=("score", "paper"),
            schedule=("karras", "vp-linear"),
            start=("warm", "noise"),
        )

    @classmethod
    def paper(cls, nfe: int = 100, **changes: object) -> PiGDM:
        """Published setting: 100 ancestral steps from noise along the VP levels, for images in [-1, 1]."""
        base = cls(nfe=nfe, spread="unit", guidance="paper", schedule="vp-linear", start="noise")
        return replace(base, **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        return noise_levels(
            self.schedule, self.nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std
        )

    def variance(self, prior: ScorePrior, sigma: float) -> float:
        """Variance r^2 per real component at a noise level."""
        if self.spread == "prior":
            return prior.error_variance(sigma)
        return sigma**2 if self.spread == "sigma" else sigma**2 / (1 + sigma**2)

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one sample for every item of ``noise``.

        Returns
        -------
        Solution
            Samples ``(B, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the prior cannot be differentiated, the operator's adjoint is not matched, the noise level is
            not positive, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        sigmas = self.levels(prior, problem.noise_std)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised, g = self.likelihood_score(problem, prior, x, sigma)
            eps = (x - denoised) / sigma
            fresh = self.eta * lower * math.sqrt(1 - (lower / sigma) ** 2)
            direction = math.sqrt(lower**2 - fresh**2)
            if self.guidance == "score":
                x = (denoised + sigma**2 * g) + direction * (eps - sigma * g)
            else:
                weight = self.variance(prior, sigma) * math.sqrt(1 + lower**2)
                x = denoised + direction * eps + weight * g
            if fresh > 0:
                x = x + fresh * noise(index + 1)
            check_finite(x, index, "PiGDM")
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(x, self.nfe)

    def likelihood_score(
        self, problem: Problem, prior: ScorePrior, x: Tensor, sigma: float
    ) -> tuple[Tensor, Tensor]:
        """Denoised image ``D(x)`` and the score ``g`` of the approximate likelihood of ``x``."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = prior.denoise(x, sigma)
        normal, s2 = problem.operator.normal, problem.noise_std**2
        gamma = self.variance(prior, sigma) / s2
        misfit = (problem.adjoint_y - normal(denoised.detach())) / s2
        steps = cg_steps(1 + gamma * problem.norm**2, self.cg_tolerance, self.cg_iterations)
        v = cg(
            lambda u: torch.add(u, normal(u), alpha=gamma), misfit, max_iter=steps, axes=problem.mixed_axes
        ).x
        (g,) = torch.autograd.grad(denoised, x, v)
        return denoised.detach(), g
