"""Annealed unadjusted Langevin dynamics (ULA) on the posterior itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

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
class AnnealedLangevin:
    """Langevin steps at falling noise levels, the last of them on the posterior as it is.

    ``x <- x + (g/2) score(x, sigma) - g / (2 s^2) (A^H A x - A^H y) + sqrt(g) z``. The last level samples
    ``p_sigma_min(x) exp(-|y - A x|^2 / (2 s^2))``, the posterior under the prior smoothed by ``sigma_min``,
    and exactly so in the limit of small steps and many of them; the limit ``sigma_min -> 0`` (an error of
    order ``sigma_min^2``: a Gaussian prior's covariance C counts as ``C + sigma_min^2 I``) is the posterior
    itself. At a finite step the samples of a Gaussian posterior of precision H have the right mean and
    covariance ``H^-1 (I - g H / 4)^-1``, so at most ``1 / (1 - last_step / 4)`` times too large a variance.

    The levels above only find the last one's start. There the likelihood's variance is raised to ``s^2 +
    (gamma ||A|| sigma)^2``, because the exact one would allow no step larger than ``s^2 / ||A||^2``, with
    which nothing that was not measured moves; and steps may be larger, because nothing is claimed of them.

    Parameters
    ----------
    levels
        Noise levels, geometrically spaced.
    steps
        Langevin steps at each level but the last, one network evaluation each.
    step
        Their size in terms of the largest curvature there can be, ``g = step / (1/sigma^2 + ||A||^2/s^2)``
        with the raised variance in place of ``s^2``; below 4, where it would diverge.
    gamma
        Share of the image's noise in the raised variance.
    last_steps
        Langevin steps at the last level.
    last_step
        Their size, likewise.
    sigma_max, sigma_min
        First and last noise level, within the prior's range. ``None`` for ``sigma_max``: the level of the
        prior's images; from far above it, Langevin steps forget the first image where nothing was measured.
        ``None`` for ``sigma_min``: half the measurement's noise level ``s / ||A||``.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of ``sigma_max``.
        ``"noise"``: noise alone.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    Roberts & Tweedie 1996 for the unadjusted algorithm, Song & Ermon 2019 for the annealing. The score's
    weight is one at every level.
    """

    needs: ClassVar[Needs] = Needs(noise=True)

    levels: int = 50
    steps: int = 3
    step: float = 2.4
    gamma: float = 0.5
    last_steps: int = 50
    last_step: float = 0.4
    sigma_max: float | None = None
    sigma_min: float | None = None
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(self, levels=1, steps=1, last_steps=1)
        for name in ("step", "last_step"):
            if not 0 < getattr(self, name) < 4:
                raise SolverError(
                    f"AnnealedLangevin: {name} must lie between 0 and 4, got {getattr(self, name)}"
                )
        check_positive(self, "gamma", "sigma_max", "sigma_min")
        check_choices(self, start=("warm", "noise"))

    @property
    def nfe(self) -> int:
        """Network evaluations a sample."""
        return (self.levels - 1) * self.steps + self.last_steps

    def sigmas(self, prior: ScorePrior, noise: float) -> list[float]:
        """Noise levels for that noise of the measurement, ``s / ||A||``; with one level, the last alone.

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
                f"AnnealedLangevin: need sigma_min <= sigma_max in the prior's range, got {low}, {high}"
            )
        # From the last level up, so that a single level is that one.
        levels = torch.logspace(math.log10(low), math.log10(high), self.levels, dtype=torch.float64)
        return levels.flip(0).tolist()

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
            If the operator's adjoint is not matched, the noise level is not positive, or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        norm = problem.norm
        sigmas = self.sigmas(prior, problem.noise_std / norm if norm > 0 else 0.0)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        index = 0
        for level, sigma in enumerate(sigmas):
            last = level == self.levels - 1
            s2 = problem.noise_std**2 + (0.0 if last else (self.gamma * norm * sigma) ** 2)
            g = (self.last_step if last else self.step) / (1 / sigma**2 + norm**2 / s2)
            for _ in range(self.last_steps if last else self.steps):
                misfit = problem.operator.normal(x) - problem.adjoint_y
                drift = g / 2 * prior.score(x, sigma) - g / (2 * s2) * misfit
                x = x + drift + math.sqrt(g) * noise(index + 1)
                check_finite(x, index, "AnnealedLangevin")
                index += 1
                if on_step is not None:
                    on_step(index, self.nfe)
        return Solution(x, self.nfe)
