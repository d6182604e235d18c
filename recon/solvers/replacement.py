"""Inpainting by replacement: at every noise level what was measured is put in its place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

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
    check_finite,
    check_needs,
    check_positive,
)


@dataclass(frozen=True)
class Replacement:
    """Unconditional sampling in which the measured part is replaced by the data, noised to the level.

    ``x <- x + A^H (y + sqrt(sigma^2 - s^2) A w - A x)``, then a DDIM step, for an operator with ``A A^H`` a
    projection: pixels, or Fourier coefficients of one coil or of each coil on its own. Every sample has its
    own noise w. The last level is that of the measurement's noise, where the data are of the level as they
    are; the denoised image that follows is the result. Data cleaner than the last level are put in once
    more at the end.

    Replacement conditions each level on the data noised to that level, and not on the data themselves, which
    is exact only where the rest does not depend on what was measured; visiting a level repeatedly (RePaint)
    brings the two closer to agreement. What was measured ends as its posterior mean given the rest.

    ``problem.y`` may have a leading dimension of the batch: each sample is then conditioned on data of its
    own, such as the neighbouring slice that the same chain has drawn. Conditioning every chain on one mean
    slice would understate the spread.

    Parameters
    ----------
    levels
        Noise levels.
    visits
        Times each level is visited: all but the last are followed by diffusing back up to it. One network
        evaluation each.
    eta
        Share of fresh noise in a step: 0 is deterministic (DDIM), 1 ancestral (DDPM).
    sigma_max, sigma_min
        First and last noise level, within the prior's range. ``None`` for ``sigma_max``: the prior's.
        ``None`` for ``sigma_min``: the measurement's noise level.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    Song et al. 2021, appendix I.2 (replacement); Lugmayr et al. 2022, Algorithm 1 (RePaint, with
    jumps of one level).
    """

    needs: ClassVar[Needs] = Needs(projection=True)

    levels: int = 50
    visits: int = 2
    eta: float = 1.0
    sigma_max: float | None = None
    sigma_min: float | None = None

    def __post_init__(self) -> None:
        check_at_least(self, levels=1, visits=1)
        if not 0 <= self.eta <= 1:
            raise SolverError(f"Replacement: eta must lie in [0, 1], got {self.eta}")
        check_positive(self, "sigma_max", "sigma_min")

    @classmethod
    def paper(cls, **changes: object) -> Replacement:
        """Setting of RePaint: 250 levels, each visited ten times, ancestral steps."""
        return replace(cls(levels=250, visits=10), **changes)  # type: ignore[arg-type]

    @property
    def nfe(self) -> int:
        """Network evaluations a sample."""
        return self.levels * self.visits

    def sigmas(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        known = prior.contract
        high = min(known.sigma_max, self.sigma_max or math.inf)
        low = max(known.sigma_min, min(noise_std, high) if self.sigma_min is None else self.sigma_min)
        return karras_levels(self.levels, high, low)

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
            If ``A A^H`` is not a projection, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        draws = itertools.count()

        def z() -> Tensor:
            return noise(next(draws))

        sigmas = self.sigmas(prior, problem.noise_std)
        x = sigmas[0] * z()
        for index, (sigma, lower) in enumerate(pairwise(sigmas)):
            ancestral = lower * math.sqrt(sigma**2 - lower**2) / sigma
            fresh = self.eta * ancestral
            for visit in range(self.visits):
                if visit > 0:
                    x = x + math.sqrt(sigma**2 - lower**2) * z()
                x = _replaced(problem, x, sigma, z)
                denoised = prior.denoise(x, sigma)
                x = denoised + math.sqrt(lower**2 - fresh**2) / sigma * (x - denoised)
                if fresh > 0:
                    x = x + fresh * z()
            check_finite(x, index, "Replacement")
            if on_step is not None:
                on_step(index + 1, self.levels)
        # A margin keeps rounding out of the decision.
        if problem.noise_std < (1 - 1e-6) * sigmas[-2]:
            x = x + problem.adjoint_y - problem.operator.normal(x)
        return Solution(x, self.nfe)


def _replaced(problem: Problem, x: Tensor, sigma: float, z: Callable[[], Tensor]) -> Tensor:
    """Image of a noise level with what was measured noised to that level, as far as it is not noisier."""
    lacking = math.sqrt(max(sigma**2 - problem.noise_std**2, 0.0))
    return x + problem.adjoint_y - problem.operator.normal(x - lacking * z())
