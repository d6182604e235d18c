"""Score-ALD: annealed Langevin dynamics with an annealed likelihood (Jalal et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from operators.base import vector_norm
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
    check_positive,
)


@dataclass(frozen=True)
class ScoreALD:
    """Langevin steps at falling noise levels, the likelihood's score taken at the noisy image.

    ``x <- x + eta (score(x, sigma) + A^H (y - A x) / (s^2 + gamma_t^2)) + sqrt(2 eta) z`` (Eq. 3), with
    ``gamma_t`` falling along with ``sigma``: the residual of a noisy image holds the noise of the image too.

    Parameters
    ----------
    levels
        Noise levels, geometrically spaced.
    steps
        Langevin steps a level, one network evaluation each.
    step
        ``eta / sigma^2``.
    gamma
        ``gamma_t / (||A|| sigma)``. The iteration is stable for ``step (1 + 1 / gamma^2) < 2``.
    balance
        Instead of by ``s^2 + gamma_t^2``, scale the likelihood's gradient of each sample to this many times
        the norm of the prior's score: the heuristic of the released code, with which the noise level of the
        measurement plays no role. ``None``: as the formula has it.
    sigma_max, sigma_min
        First and last noise level, within the prior's range. ``None`` for ``sigma_max``: the level of the
        prior's images; from far above it, Langevin steps forget the first image where nothing was measured.
        ``None`` for ``sigma_min``: half the measurement's noise level ``s / ||A||``, where
        ``gamma_t`` has all but vanished beside ``s``.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of ``sigma_max``.
        ``"noise"``: noise alone.
    denoise
        End with the denoised image (one more evaluation) and not with one that has noise of ``sigma_min``.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(equal_weights=True)

    levels: int = 50
    steps: int = 3
    step: float = 0.35
    gamma: float = 0.5
    balance: float | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None
    start: str = "warm"
    denoise: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, levels=1, steps=1)
        check_positive(self, "step", "gamma", "balance", "sigma_max", "sigma_min")
        if self.balance is None and not self.step * (1 + 1 / self.gamma**2) < 2:
            raise SolverError(
                f"ScoreALD: step {self.step} is unstable with gamma {self.gamma}: "
                "step (1 + 1 / gamma^2) must be below 2"
            )
        check_choices(self, start=("warm", "noise"))

    @classmethod
    def paper(cls, **changes: object) -> ScoreALD:
        """The paper's iteration with the levels and steps of the authors' first code.

        2311 levels from 232 to 0.0066, three steps each of ``eta = 9e-7 (sigma / 0.0066)^2``, and no
        denoised image at the end. The paper leaves ``gamma_t`` open; that code has ``gamma_t = sigma``.
        """
        base = cls(
            levels=2311,
            steps=3,
            step=9e-7 / 0.0066**2,
            sigma_max=232.0,
            sigma_min=0.0066,
            gamma=1.0,
            start="noise",
            denoise=False,
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def released(cls, **changes: object) -> ScoreALD:
        """Setting of the released code: the lower half of the levels, larger steps, balanced gradients.

        The first 1155 levels are left out, so that it starts at ``sqrt(232 * 0.0066)``; ``eta = 5e-5 (sigma /
        0.0066)^2``, and the likelihood's gradient has five times the norm of the score.
        """
        base = cls.paper(levels=1156, sigma_max=math.sqrt(232 * 0.0066), step=5e-5 / 0.0066**2, balance=5.0)
        return replace(base, **changes)  # type: ignore[arg-type]

    @property
    def nfe(self) -> int:
        """Network evaluations a sample."""
        return self.levels * self.steps + self.denoise

    def sigmas(self, prior: ScorePrior, noise: float) -> list[float]:
        """Noise levels for that noise of the measurement, ``s / ||A||``.

        Raises
        ------
        SolverError
            If nothing is left of the asked range within the prior's.
        """
        known = prior.contract
        high = min(known.sigma_max, known.level if self.sigma_max is None else self.sigma_max)
        low = max(known.sigma_min, min(noise / 2, high) if self.sigma_min is None else self.sigma_min)
        if low > high:
            raise SolverError(
                f"ScoreALD: need sigma_min <= sigma_max in the prior's range, got {low}, {high}"
            )
        return torch.logspace(math.log10(high), math.log10(low), self.levels, dtype=torch.float64).tolist()

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
            Samples ``(B, *domain_shape)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's adjoint is not matched, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        norm = problem.norm
        axes = len(problem.operator.domain_shape)
        sigmas = self.sigmas(prior, problem.noise_std / norm if norm > 0 else 0.0)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        for level, sigma in enumerate(sigmas):
            eta = self.step * sigma**2
            gamma_t = self.gamma * norm * sigma
            for inner in range(self.steps):
                index = level * self.steps + inner
                score = prior.score(x, sigma)
                likelihood = problem.adjoint_y - problem.operator.normal(x)
                if self.balance is None:
                    likelihood = likelihood / (problem.noise_std**2 + gamma_t**2)
                else:
                    ratio = vector_norm(score, axes) / vector_norm(likelihood, axes).clamp_min(1e-30)
                    likelihood = self.balance * ratio * likelihood
                x = x + eta * (score + likelihood) + math.sqrt(2 * eta) * noise(index + 1)
                check_finite(x, index, "ScoreALD")
                if on_step is not None:
                    on_step(index + 1, self.nfe)
        if self.denoise:
            x = prior.denoise(x, sigmas[-1])
            check_finite(x, self.nfe - 1, "ScoreALD")
            if on_step is not None:
                on_step(self.nfe, self.nfe)
        return Solution(x, self.nfe)
