"""DAPS: decoupled annealing posterior sampling (Zhang et al., CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, pairwise
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
    SolverError,
    check_at_least,
    check_choices,
    check_finite,
    check_needs,
    data_noise,
)
from recon.solvers.cg import cg, cg_steps
from recon.solvers.schedule import noise_levels


@dataclass(frozen=True)
class DAPS:
    """Decoupled annealing: a clean image, made to fit the data, and noise anew, level after level.

    At each level (paper, Algorithm 1): follow the probability-flow ODE from ``x`` to an image ``x̂``; draw
    ``x0`` from ``N(x̂, r^2 I)`` times the likelihood, which stands for ``p(x0 | x, y)``; put noise of the next
    level on it. One level's errors do not travel to the next, as the noise is new.

    Parameters
    ----------
    nfe
        Network evaluations a sample at the most; ``nfe // ode_steps`` noise levels are visited.
    ode_steps
        Euler steps of an ODE, one evaluation each. With one, ``x̂`` is the denoised image, the mean of
        ``p(x0 | x)``, to which the spread ``"prior"`` belongs; with more it is itself like a sample.
    spread
        The standard deviation r of the clean image. ``"prior"``: the prior's error at that level
        (:meth:`ScorePrior.error_variance`), ``"sigma"``: the noise level itself, the paper's choice.
    inner
        How x0 is drawn. ``"exact"``: its Gaussian has the precision ``A^H A / s^2 + I / r^2``, and the
        solution of that system for a perturbed right-hand side is a sample (Papandreou & Yuille 2010); by
        conjugate gradients. ``"langevin"``: the paper's chain, begun at ``x̂``, whose steps are too few for
        directions that the data leave free.
    langevin_steps
        Steps of a chain.
    langevin_rate
        Step size of the first chain in units of the inverse of the largest precision,
        ``1 / (||A||^2 / s^2 + 1 / r^2)``; the variance in that direction is too large by
        ``1 / (1 - rate / 2)``, and 2 diverges.
    langevin_decay
        Ratio of the last chain's step size to the first one's, in between linear.
    cg_iterations
        Conjugate-gradient steps of an exact draw at the most.
    cg_tolerance
        Accuracy aimed at with those steps; their number follows from it and from the condition number
        ``1 + (r ||A|| / s)^2``. Zero: always ``cg_iterations``.
    sigma_max, sigma_min
        First and last noise level; the first is cut at the prior's largest. ``None`` for ``sigma_min``: the
        measurement's noise level, below which the data say no more, within the prior's range.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of the first level.
        ``"noise"``: noise alone.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(noise=True)

    nfe: int = 50
    ode_steps: int = 1
    spread: str = "prior"
    inner: str = "exact"
    langevin_steps: int = 100
    langevin_rate: float = 0.5
    langevin_decay: float = 1.0
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    sigma_max: float = 2.0
    sigma_min: float | None = None
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(
            self, ode_steps=1, nfe=self.ode_steps, langevin_steps=1, cg_iterations=1, cg_tolerance=0
        )
        if not 0 < self.langevin_rate < 2:
            raise SolverError(f"DAPS: langevin_rate must lie between 0 and 2, got {self.langevin_rate}")
        if not 0 < self.langevin_decay <= 1:
            raise SolverError(f"DAPS: langevin_decay must lie in (0, 1], got {self.langevin_decay}")
        check_choices(self, spread=("prior", "sigma"), inner=("exact", "langevin"), start=("warm", "noise"))

    @classmethod
    def paper(cls, nfe: int = 1000, **changes: object) -> DAPS:
        """Published setting: 200 levels from 100 to 0.1, 5 ODE steps, 100 Langevin steps, r = sigma.

        The published step size 1e-4, decaying to a hundredth, belongs to a likelihood of standard deviation
        0.01 whatever the noise; its product with that precision is the rate here.
        """
        base = cls(
            nfe=nfe,
            ode_steps=5,
            spread="sigma",
            inner="langevin",
            langevin_steps=100,
            langevin_rate=1.0,
            langevin_decay=0.01,
            sigma_max=100.0,
            sigma_min=0.1,
            start="noise",
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        nfe = self.nfe // self.ode_steps
        return noise_levels("karras", nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std)

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
        numbers = count()

        def draw() -> Tensor:
            return noise(next(numbers))

        sigmas = self.levels(prior, problem.noise_std)
        total = len(sigmas) - 1
        x = sigmas[0] * draw()
        if self.start == "warm":
            x = x + problem.unfolded
        for index, (sigma, lower) in enumerate(pairwise(sigmas)):
            center = self.flow(prior, x, sigma)
            r = sigma if self.spread == "sigma" else math.sqrt(prior.error_variance(sigma))
            if self.inner == "exact":
                x = self.exact_draw(problem, center, r, draw)
            else:
                decay = 1 + (self.langevin_decay - 1) * index / max(1, total - 1)
                x = self.langevin(problem, center, r, self.langevin_rate * decay, draw)
            if lower > 0:
                x = x + lower * draw()
            check_finite(x, index, "DAPS")
            if on_step is not None:
                on_step(index + 1, total)
        return Solution(x, total * self.ode_steps)

    def flow(self, prior: ScorePrior, x: Tensor, sigma: float) -> Tensor:
        """Euler steps of the probability-flow ODE from ``sigma`` to zero, ``dx/dsigma = (x - D) / sigma``."""
        for upper, lower in pairwise(
            karras_levels(self.ode_steps, sigma, min(sigma, prior.contract.sigma_min))
        ):
            denoised = prior.denoise(x, upper)
            x = denoised + lower / upper * (x - denoised)
        return x

    def exact_draw(self, problem: Problem, center: Tensor, r: float, draw: Callable[[], Tensor]) -> Tensor:
        """Sample of ``N(center, r^2 I)`` times the likelihood: the precision times it is the perturbed sum.

        ``(I + gamma A^H A) x0 = (center + r z) + gamma A^H (y + s n)``, ``gamma = r^2 / s^2``, solved for the
        correction to the first term.
        """
        normal, s, gamma = problem.operator.normal, problem.noise_std, (r / problem.noise_std) ** 2
        guess = center + r * draw()
        data = problem.adjoint_y + s * problem.operator.adjoint(data_noise(problem.operator, draw))
        misfit = gamma * (data - normal(guess))
        steps = cg_steps(1 + gamma * problem.norm**2, self.cg_tolerance, self.cg_iterations)
        correction = cg(
            lambda v: torch.add(v, normal(v), alpha=gamma), misfit, max_iter=steps, axes=problem.mixed_axes
        )
        return guess + correction.x

    def langevin(
        self, problem: Problem, center: Tensor, r: float, rate: float, draw: Callable[[], Tensor]
    ) -> Tensor:
        """Unadjusted Langevin chain with the same target, begun at its prior's centre."""
        normal, s2 = problem.operator.normal, problem.noise_std**2
        step = rate / (problem.norm**2 / s2 + 1 / r**2)
        x = center
        for _ in range(self.langevin_steps):
            score = (problem.adjoint_y - normal(x)) / s2 + (center - x) / r**2
            x = x + step * score + math.sqrt(2 * step) * draw()
        return x
