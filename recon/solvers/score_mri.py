"""Score-MRI: predictor-corrector sampling, data consistency on the noisy image (Chung & Ye, MedIA 2022)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

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
class ScoreMRI:
    """Variance-exploding predictor and Langevin corrector, each followed by ``x <- x + A^H (y - A x)``.

    With coil maps ``A = P F S`` (sampling, Fourier transform, maps). On coil images
    (:class:`operators.CoilwiseMRI`) every coil is sampled on its own, and the root of the sum of squares is
    taken of the result. A prior on real images sees the real and the imaginary part as two images with
    independent noise.

    Where the measurement's noise meets that of the level decides what the samples mean. The paper replaces by
    the clean measurement throughout, so what was measured carries less noise than the prior is told, and the
    measurement's own noise ends in the image. Here the last level is ``sigma = s``, where the data have just
    the noise they should, and the denoised image that follows is left as it is (unless the data are cleaner
    than the last level). ``"matched"`` gives the measurement the noise it lacks at the levels above,
    ``y + sqrt(sigma^2 - s^2) A w``: for ``A A^H`` a projection what was measured then has the noise of the
    level exactly; with coil maps ``x + A^H (y - A x)`` is a gradient step, and the match approximate. Few
    predictor steps leave too much noise, however, which the clean measurement makes up for: it is the
    default because a hundred evaluations give the better image with it. What was measured ends in any case
    as its posterior mean given the rest, without a spread of its own.

    Parameters
    ----------
    steps
        Predictor steps, one network evaluation each (the paper's N).
    corrector_steps
        Corrector steps at each noise level, one network evaluation each (the paper's M).
    snr
        Signal-to-noise ratio r of a corrector step, ``eps = 2 (r |z| / |score|)^2``, with norms over each
        image (over each coil's image for coil images).
    sigma_max, sigma_min
        First and last noise level, geometrically spaced, within the prior's range. ``None`` for
        ``sigma_max``: twice the level of the prior's images. ``None`` for ``sigma_min``: the measurement's
        noise level.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of ``sigma_max``, so the
        levels above need no visit, and where the coil maps are zero the image stays empty. ``"noise"``: noise
        alone, as in the paper.
    consistency
        ``"clean"`` or ``"matched"``, see above; ``"paper"``: clean, at the end too.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(max_norm=math.sqrt(2), equal_weights=True)

    steps: int = 40
    corrector_steps: int = 1
    snr: float = 0.16
    sigma_max: float | None = None
    sigma_min: float | None = None
    start: str = "warm"
    consistency: str = "clean"

    def __post_init__(self) -> None:
        check_at_least(self, steps=2, corrector_steps=0)
        check_positive(self, "snr", "sigma_max", "sigma_min")
        check_choices(self, start=("warm", "noise"), consistency=("clean", "matched", "paper"))

    @classmethod
    def paper(cls, **changes: object) -> ScoreMRI:
        """Published setting: 2000 levels from 378 to 0.01, one corrector step, r = 0.16, clean data.

        Levels outside the prior's range are not visited: their number is spread over the range.
        """
        base = cls(steps=2000, sigma_max=378.0, sigma_min=0.01, start="noise", consistency="paper")
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def released(cls, **changes: object) -> ScoreMRI:
        """Setting of the authors' multi-coil scripts: as published, but 500 levels."""
        return replace(cls.paper(steps=500), **changes)  # type: ignore[arg-type]

    @property
    def nfe(self) -> int:
        """Network evaluations a sample; there is no corrector at the final level, zero."""
        return self.steps + (self.steps - 1) * self.corrector_steps

    def sigmas(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero.

        Raises
        ------
        SolverError
            If nothing is left of the asked range within the prior's.
        """
        known = prior.contract
        high = min(known.sigma_max, 2 * known.level if self.sigma_max is None else self.sigma_max)
        low = max(known.sigma_min, min(noise_std, high) if self.sigma_min is None else self.sigma_min)
        if low > high:
            raise SolverError(
                f"ScoreMRI: need sigma_min <= sigma_max in the prior's range, got {low}, {high}"
            )
        levels = torch.logspace(math.log10(high), math.log10(low), self.steps, dtype=torch.float64)
        return [*levels.tolist(), 0.0]

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
            If the operator's adjoint is not matched or its norm exceeds sqrt(2), or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        draws = itertools.count()
        axes = prior.contract.image_ndim

        def z() -> Tensor:
            return noise(next(draws))

        sigmas = self.sigmas(prior, problem.noise_std)
        # Data that are cleaner than the last level have more to say; a margin keeps rounding out of it.
        cleaner = problem.noise_std < (1 - 1e-6) * sigmas[-2]
        ends_with_data = cleaner or self.consistency == "paper"
        x = sigmas[0] * z()
        if self.start == "warm":
            x = x + problem.unfolded
        for index, (sigma, lower) in enumerate(pairwise(sigmas)):
            # Predictor: one step of the reverse diffusion. The last one, to zero, ends at D(x).
            variance = sigma**2 - lower**2
            x = x + variance * prior.score(x, sigma)
            if lower > 0:
                x = x + math.sqrt(variance) * z()
            if lower > 0 or ends_with_data:
                x = self._consistent(problem, x, lower, z)
            # Corrector: Langevin steps at the level that was reached.
            for _ in range(self.corrector_steps if lower > 0 else 0):
                score, fresh = prior.score(x, lower), z()
                eps = 2 * (self.snr * vector_norm(fresh, axes) / vector_norm(score, axes)) ** 2
                x = x + eps * score + (2 * eps).sqrt() * fresh
                x = self._consistent(problem, x, lower, z)
            check_finite(x, index, "ScoreMRI")
            if on_step is not None:
                on_step(index + 1, self.steps)
        return Solution(x, self.nfe)

    def _consistent(self, problem: Problem, x: Tensor, sigma: float, z: Callable[[], Tensor]) -> Tensor:
        """Data consistency of an image of that noise level."""
        normal = problem.operator.normal
        if self.consistency != "matched":
            return x + problem.adjoint_y - normal(x)
        lacking = math.sqrt(max(sigma**2 - problem.noise_std**2, 0.0))
        return x + problem.adjoint_y - normal(x - lacking * z())
