"""DDS: decomposed diffusion sampling (Chung, Lee & Ye, ICLR 2024)."""

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
    check_finite,
    check_needs,
)
from recon.solvers.cg import cg, cg_steps
from recon.solvers.schedule import noise_levels


@dataclass(frozen=True)
class DDS:
    """Decomposed diffusion sampling: Tweedie, a few conjugate-gradient steps towards the data, DDIM.

    Parameters
    ----------
    nfe
        Network evaluations a sample.
    cg_iterations
        Conjugate-gradient steps a noise level at the most (the paper's M).
    cg_tolerance
        Accuracy aimed at with those steps, relative to the correction they compute. Their number follows from
        it and from the condition number ``1 + gamma ||A||^2`` by the convergence bound of the method, and not
        from the residual as it comes: a threshold that rounding can tip would break the scale equivariance.
        Zero: always ``cg_iterations``.
    gamma
        Weight of the data term. ``None``: the ratio of the prior's error variance at the current noise level
        (:meth:`ScorePrior.error_variance`) to the measurement's noise variance, which is the proximal weight
        under which both terms of ``|x - D|^2 / (2 v) + |y - A x|^2 / (2 s^2)`` are the variances they stand
        for. Every step applies this weight anew, so more steps trust the data more: with 80 steps instead of
        30 the noise of a measured slice begins to be fitted.
    eta
        Share of fresh noise in a step: 0 is deterministic (DDIM), 1 ancestral (DDPM).
    sigma_max, sigma_min
        First and last noise level. ``None`` for ``sigma_min``: the measurement's noise level, below which the
        data say no more, within the prior's range.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of ``sigma_max``, so the
        levels above need no visit (come-closer-diffuse-faster, Chung et al. 2022). ``"noise"``: noise alone.
    noise_free
        Conjugate gradients on ``A^H A x = A^H y`` instead, for data without noise.
    schedule
        ``"karras"``, or ``"vp-linear"``, whose levels are fixed by ``nfe`` alone.
    step
        ``"paper"``: the DDIM step, which keeps the marginals. ``"released"``: the step of the released code,
        which loses variance.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs()

    nfe: int = 30
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    gamma: float | None = None
    eta: float = 1.0
    sigma_max: float = 2.0
    sigma_min: float | None = None
    start: str = "warm"
    noise_free: bool = False
    schedule: str = "karras"
    step: str = "paper"

    def __post_init__(self) -> None:
        for name, low in (("nfe", 1), ("cg_iterations", 1), ("cg_tolerance", 0)):
            if not getattr(self, name) >= low:
                raise SolverError(f"DDS: {name} must be at least {low}, got {getattr(self, name)}")
        if self.gamma is not None and not self.gamma >= 0:
            raise SolverError(f"DDS: gamma must not be negative, got {self.gamma}")
        if not 0 <= self.eta <= 1:
            raise SolverError(f"DDS: eta must lie in [0, 1], got {self.eta}")
        for name, known in (
            ("start", ("warm", "noise")),
            ("schedule", ("karras", "vp-linear")),
            ("step", ("paper", "released")),
        ):
            if getattr(self, name) not in known:
                raise SolverError(f"DDS: {name} is one of {', '.join(known)}, not {getattr(self, name)!r}")

    @classmethod
    def paper(cls, nfe: int = 49, **changes: object) -> DDS:
        """Published setting: M = 5, gamma = 1, VP noise levels, started from noise alone.

        eta is 0.15, 0.5 and 0.8 for 19, 49 and 99 network evaluations.
        """
        eta = 0.15 if nfe <= 19 else 0.5 if nfe <= 49 else 0.8
        base = cls(
            nfe=nfe,
            cg_iterations=5,
            cg_tolerance=0.0,
            gamma=1.0,
            eta=eta,
            start="noise",
            schedule="vp-linear",
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def released(cls, nfe: int = 50, **changes: object) -> DDS:
        """Setting of the authors' code: as published, but eta = 0.85 in a step that shrinks the variance."""
        return replace(cls.paper(nfe, eta=0.85, step="released"), **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        return noise_levels(
            self.schedule, self.nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std
        )

    def weight(self, prior: ScorePrior, sigma: float, noise_std: float) -> float:
        """Weight of the data term at a noise level."""
        if self.gamma is not None:
            return self.gamma
        return prior.error_variance(sigma) / noise_std**2

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one posterior sample for every item of ``noise``.

        Returns
        -------
        Solution
            Samples ``(B, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's adjoint is not matched, a noise level is needed and not positive, or a value
            stops being finite.
        """
        check_needs(self, problem, prior)
        operator = problem.operator
        if self.gamma is None and not self.noise_free and not problem.noise_std > 0:
            raise SolverError(
                f"DDS needs a positive noise level, got {problem.noise_std}; or set gamma or noise_free"
            )
        sigmas = self.levels(prior, problem.noise_std)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised = prior.denoise(x, sigma)
            gamma = 0.0 if self.noise_free else self.weight(prior, sigma, problem.noise_std)
            steps = (
                self.cg_iterations
                if self.noise_free
                else cg_steps(1 + gamma * problem.norm**2, self.cg_tolerance, self.cg_iterations)
            )
            estimate = self._towards_data(denoised, problem.adjoint_y, operator.normal, gamma, steps)
            if lower == 0:
                x = estimate
            else:
                eps = (x - denoised) / sigma
                if self.step == "released":
                    direction, fresh = lower * math.sqrt(1 - self.eta**2), lower * self.eta
                else:
                    ancestral = lower * math.sqrt(sigma**2 - lower**2) / sigma
                    fresh = self.eta * ancestral
                    direction = math.sqrt(lower**2 - fresh**2)
                x = estimate + direction * eps
                if fresh > 0:
                    x = x + fresh * noise(index + 1)
            check_finite(x, index, "DDS")
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(x, self.nfe)

    def _towards_data(
        self,
        denoised: Tensor,
        adjoint_y: Tensor,
        normal: Callable[[Tensor], Tensor],
        gamma: float,
        steps: int,
    ) -> Tensor:
        """M conjugate-gradient steps from the denoised image (paper, Algorithm 1)."""
        if self.noise_free:
            return cg(normal, adjoint_y.expand_as(denoised), denoised, max_iter=steps).x
        if gamma == 0:
            return denoised
        # Solved for the correction to the denoised image: the same iterates, from a start at zero.
        misfit = gamma * (adjoint_y - normal(denoised))
        return denoised + cg(lambda v: torch.add(v, normal(v), alpha=gamma), misfit, max_iter=steps).x
