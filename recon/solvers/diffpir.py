"""DiffPIR: denoising diffusion for plug-and-play image restoration (Zhu et al., CVPR workshops 2023)."""

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
class DiffPIR:
    """Half-quadratic splitting along the noise levels: denoise, solve the proximal data problem, add noise.

    At each level ``x̂ = argmin |y - A x|^2 + rho |x - D|^2`` with ``rho = lam s^2 / sigma^2``, ``s`` the
    measurement's noise, so that the denoised image counts as known to ``sigma / sqrt(lam)``. The noise that
    carries over is what separates ``x`` from ``x̂``, not from ``D``: ``eps = (x - x̂) / sigma``, and
    ``x' = x̂ + sigma' (sqrt(1 - zeta) eps + sqrt(zeta) z)`` (paper, Algorithm 1).

    Parameters
    ----------
    nfe
        Network evaluations a sample.
    lam
        Weight of the denoised image against the data (the paper's lambda).
    zeta
        Share of fresh noise in a step, in variance: 0 carries all of the old over, 1 replaces all of it.
    cg_iterations
        Conjugate-gradient steps of a proximal problem at the most.
    cg_tolerance
        Accuracy aimed at with those steps, relative to the correction they compute; their number follows
        from it and from the condition number ``1 + ||A||^2 / rho``. Zero: always ``cg_iterations``.
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

    needs: ClassVar[Needs] = Needs(noise=True)

    nfe: int = 30
    lam: float = 1.0
    zeta: float = 1.0
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    schedule: str = "karras"
    sigma_max: float = 2.0
    sigma_min: float | None = None
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1, cg_iterations=1, cg_tolerance=0)
        if not self.lam > 0:
            raise SolverError(f"DiffPIR: lam must be positive, got {self.lam}")
        if not 0 <= self.zeta <= 1:
            raise SolverError(f"DiffPIR: zeta must lie in [0, 1], got {self.zeta}")
        check_choices(self, start=("warm", "noise"), schedule=("karras", "vp-linear"))

    @classmethod
    def paper(cls, nfe: int = 100, **changes: object) -> DiffPIR:
        """Published setting: 100 evaluations from noise along the VP levels, exact proximal steps.

        The paper chooses lam between 1 and 25 and zeta between 0.1 and 1 by the task; lam = 1 and zeta = 0.1
        are the authors' configuration for deblurring at a noise of 0.05 of [0, 1].
        """
        base = cls(
            nfe=nfe,
            lam=1.0,
            zeta=0.1,
            cg_iterations=100,
            cg_tolerance=1e-6,
            schedule="vp-linear",
            start="noise",
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        return noise_levels(
            self.schedule, self.nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std
        )

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
            If the operator's adjoint is not matched, the noise level is not positive, or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        sigmas = self.levels(prior, problem.noise_std)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            rho = self.lam * problem.noise_std**2 / sigma**2
            estimate = self.proximal(problem, prior.denoise(x, sigma), rho)
            eps = (x - estimate) / sigma
            x = estimate
            if lower > 0:
                x = x + lower * math.sqrt(1 - self.zeta) * eps
                if self.zeta > 0:
                    x = x + lower * math.sqrt(self.zeta) * noise(index + 1)
            check_finite(x, index, "DiffPIR")
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(x, self.nfe)

    def proximal(self, problem: Problem, denoised: Tensor, rho: float) -> Tensor:
        """``argmin |y - A x|^2 + rho |x - D|^2``, solved for the correction to ``D``."""
        normal, gamma = problem.operator.normal, 1 / rho
        misfit = gamma * (problem.adjoint_y - normal(denoised))
        steps = cg_steps(1 + gamma * problem.norm**2, self.cg_tolerance, self.cg_iterations)
        correction = cg(
            lambda v: torch.add(v, normal(v), alpha=gamma), misfit, max_iter=steps, axes=problem.mixed_axes
        )
        return denoised + correction.x
