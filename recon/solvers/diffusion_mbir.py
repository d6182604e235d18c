"""DiffusionMBIR: predictor and corrector, total variation across slices (Chung et al., CVPR 2023)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from operators.base import vector_norm
from priors.base import ScorePrior
from recon.solvers.base import (
    KeyedNoise,
    Needs,
    Problem,
    Solution,
    check_at_least,
    check_choices,
    check_finite,
    check_needs,
    check_positive,
)
from recon.solvers.cg import cg
from recon.solvers.dds_3d import (
    PAPER_LAM,
    PAPER_RHO,
    ThroughPlaneTV,
    check_penalty,
    coupled,
    denoise_slices,
)
from recon.solvers.score_mri import ScoreMRI

THRESHOLD = 0.03
"""Difference between slices below which the default weights make it zero, in levels of the prior.

Tried on a simulated fan-beam scan of a chest, 60 views, six slices of 5 mm, 128 x 128 pixels, with the
bundled prior and noise levels down to that of the data. With five iterations of conjugate gradients, a
coupling of 0.01 and this threshold: 33.1 dB, and an error along z of 32 HU; with a coupling of 0.03: 32.7 dB;
with a threshold of 0.1: 32.5 dB. Slice by slice: 31.2 dB and 53 HU; 27.3 dB with the one iteration of the
paper, and 30.5 dB with ten, which let in the noise of the data. That patient is the one of
``benchmarks.ct_volume``, whose table flatters these two weights; on others see ``docs/what-matters.md``.
"""


@dataclass(frozen=True)
class DiffusionMBIR:
    """Predictor and Langevin corrector on every slice of a volume, then one step of ADMM on the noisy volume.

    The step of ADMM is towards the minimum of ``|A x - y|^2 / 2 + lam |A|^2 sum |Dz x|``, where ``Dz x`` are
    the differences between neighbouring slices and ``|A|`` is the norm of the operator: a few iterations of
    conjugate gradients from the noisy volume, and the soft threshold. ADMM's variables are kept from one
    noise level to the next. The denoised volume at the end is left as it is, unless the data are cleaner than
    the last level.

    Parameters
    ----------
    steps
        Predictor steps, one network evaluation of every slice each.
    corrector_steps
        Corrector steps at each noise level, one network evaluation of every slice each.
    snr
        Signal-to-noise ratio r of a corrector step, ``eps = 2 (r |z| / |score|)^2``, with norms over slices.
    sigma_max, sigma_min
        First and last noise level, geometrically spaced, within the prior's range. ``None`` for
        ``sigma_max``: twice the level of the prior's images. ``None`` for ``sigma_min``: that of the noise
        which the data leave in a conjugate-gradient image. Further down the prior takes no more of it away,
        and every level lets in more.
    start
        ``"warm"``: the first volume is a conjugate-gradient reconstruction plus noise of ``sigma_max``.
        ``"noise"``: noise alone, as in the paper.
    cg_iterations
        Iterations of conjugate gradients in a step of ADMM.
    lam
        Weight of the total variation beside the data term of an operator of unit norm. ``None``: ``coupling``
        times :data:`THRESHOLD` times the level of the prior's images. Zero: slice by slice.
    coupling
        Weight of ADMM's coupling (the paper's rho), likewise; its part in few steps is large. From 0.3 on,
        with a low ``lam``, a single step is more along the differences than towards the data, and oscillates.
    slice_batch
        Slices that the prior is given at once: a matter of memory.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    Algorithm 2 of the paper, with its variables shared between noise levels. Its ``Dz`` wraps around; here
    the volume ends where it ends. One iteration of conjugate gradients is a step along the gradient of the
    length that is best for the volume, so it needs no bound of the operator's norm. It is towards the data as
    they are, so that their noise ends in the image: where it is strong,
    :class:`~recon.solvers.dds_3d.DDS3D`, which weighs it, is the better choice.
    """

    needs: ClassVar[Needs] = Needs(volume=True, equal_weights=True)

    steps: int = 40
    corrector_steps: int = 1
    snr: float = 0.16
    sigma_max: float | None = None
    sigma_min: float | None = None
    start: str = "warm"
    cg_iterations: int = 5
    lam: float | None = None
    coupling: float = 0.01
    slice_batch: int = 8

    def __post_init__(self) -> None:
        check_at_least(self, steps=2, corrector_steps=0, cg_iterations=1, slice_batch=1)
        check_positive(self, "snr", "sigma_max", "sigma_min")
        check_choices(self, start=("warm", "noise"))
        check_penalty(self, self.lam, self.coupling)

    @classmethod
    def paper(cls, **changes: object) -> DiffusionMBIR:
        """Published setting for 8 views: 2000 levels from 378 to 0.01, r = 0.16.

        Levels outside the prior's range are not visited: their number is spread over the range.
        """
        base = cls(
            steps=2000,
            sigma_max=378.0,
            sigma_min=0.01,
            start="noise",
            cg_iterations=1,
            lam=PAPER_LAM,
            coupling=PAPER_RHO,
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @property
    def nfe(self) -> int:
        """Network evaluations of a slice; there is no corrector at the final level, zero."""
        return self._sampler().nfe

    def sigmas(self, prior: ScorePrior, image_noise: float) -> list[float]:
        """Noise levels where the data leave that noise in the image, the last one zero.

        Raises
        ------
        SolverError
            If nothing is left of the asked range within the prior's.
        """
        return self._sampler().sigmas(prior, image_noise)

    def _sampler(self) -> ScoreMRI:
        """What samples the slices."""
        return ScoreMRI(
            self.steps, self.corrector_steps, self.snr, self.sigma_max, self.sigma_min, self.start
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
            Samples ``(B, D, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's domain is not a volume or its adjoint not matched, or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        lam = self.coupling * THRESHOLD * prior.contract.level if self.lam is None else self.lam
        variation = ThroughPlaneTV(problem.adjoint_y) if lam > 0 else None
        rho = self.coupling * problem.norm**2
        draws = itertools.count()

        def z() -> Tensor:
            return noise(next(draws))

        def score(x: Tensor, sigma: float) -> Tensor:
            return (denoise_slices(prior, x, sigma, self.slice_batch) - x) / sigma**2

        image_noise = 0.0
        if problem.noise_std > 0:
            left = problem.unfolded_noise
            components = 2 if left.is_complex() else 1
            image_noise = float(left.abs().square().mean() / components) ** 0.5
        sigmas = self.sigmas(prior, image_noise)
        # Data that are cleaner than the last level have more to say; a margin keeps rounding out of it.
        ends_with_data = image_noise < (1 - 1e-6) * sigmas[-2]
        x = sigmas[0] * z()
        if self.start == "warm":
            x = x + problem.unfolded
        for index, (sigma, lower) in enumerate(pairwise(sigmas)):
            # Predictor: one step of the reverse diffusion. The last one, to zero, ends at D(x).
            variance = sigma**2 - lower**2
            x = x + variance * score(x, sigma)
            if lower > 0:
                x = x + math.sqrt(variance) * z()
            # Corrector: Langevin steps at the level that was reached.
            for _ in range(self.corrector_steps if lower > 0 else 0):
                slope, fresh = score(x, lower), z()
                eps = 2 * (self.snr * vector_norm(fresh, 2) / vector_norm(slope, 2)) ** 2
                x = x + eps * slope + (2 * eps).sqrt() * fresh
            # ADMM: x by conjugate gradients, then the differences and their dual.
            if lower > 0 or ends_with_data:
                term = coupled(problem, variation, rho)
                x = cg(term.matrix, term.right.expand_as(x), x, max_iter=self.cg_iterations, axes=term.axes).x
                if variation is not None:
                    variation.update(x, lam / self.coupling)
            check_finite(x, index, "DiffusionMBIR")
            if on_step is not None:
                on_step(index + 1, self.steps)
        return Solution(x, self.nfe)
