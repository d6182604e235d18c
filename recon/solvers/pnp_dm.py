"""PnP-DM: plug-and-play posterior sampling by a split Gibbs sampler (Wu et al., NeurIPS 2024)."""

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


@dataclass(frozen=True)
class PnPDM:
    """Split Gibbs sampling: by turns an image that fits the data, and one that the prior makes of it.

    Of ``p(x) exp(-|x - z|^2 / (2 rho^2)) p(y | z)`` it draws z given x, a Gaussian (likelihood step), and x
    given z (prior step): the posterior of a denoising problem of noise rho, so reverse diffusion begun at
    ``z`` and level rho does it (paper, Algorithm 1). The image is the last x. At a constant rho, and with
    exact draws, the chain goes to the posterior of ``y = A (x + rho z) + n``: more noise than there is, hence
    rho falls from large, where the chain moves fast, to small.

    Parameters
    ----------
    nfe
        Network evaluations a sample at the most; there are ``nfe // steps`` turns.
    steps
        Evaluations a prior step: ancestral steps from rho down to zero. Few of them lose spread.
    rho_max, rho_min
        First and smallest coupling; the first is cut at the prior's largest noise level. ``None`` for
        ``rho_min``: the measurement's noise level, within the prior's range.
    decay
        Factor between one turn's rho and the next one's, until ``rho_min`` is reached. ``None``: such that
        the last turn reaches it.
    cg_iterations
        Conjugate-gradient steps of a likelihood step at the most.
    cg_tolerance
        Accuracy aimed at with those steps; their number follows from it and from the condition number
        ``1 + (rho ||A|| / s)^2``. Zero: always ``cg_iterations``.
    start
        ``"warm"``: the first x is a conjugate-gradient reconstruction. ``"noise"``: noise of the first
        coupling.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(noise=True)

    nfe: int = 60
    steps: int = 2
    rho_max: float = 1.0
    rho_min: float | None = None
    decay: float | None = None
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(self, steps=1, nfe=self.steps, cg_iterations=1, cg_tolerance=0)
        for name in ("rho_max", "rho_min"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SolverError(f"PnPDM: {name} must be positive, got {value}")
        if self.rho_min is not None and self.rho_min > self.rho_max:
            raise SolverError(f"PnPDM: rho_min {self.rho_min} is above rho_max {self.rho_max}")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise SolverError(f"PnPDM: decay must lie in (0, 1], got {self.decay}")
        check_choices(self, start=("warm", "noise"))

    @classmethod
    def paper(cls, nfe: int = 10000, **changes: object) -> PnPDM:
        """Published setting: 100 turns of 100 evaluations, rho from 10 by 0.9 a turn to 0.3.

        It is meant for images in [-1, 1] with noise of 0.05. Of its chains the paper keeps the iterates after
        the fortieth; here every sample is the end of a chain of its own.
        """
        base = cls(nfe=nfe, steps=100, rho_max=10.0, rho_min=0.3, decay=0.9, start="noise")
        return replace(base, **changes)  # type: ignore[arg-type]

    def rhos(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Coupling of every turn.

        Raises
        ------
        SolverError
            If ``rho_min`` is above the prior's largest noise level.
        """
        turns, low, high = self.nfe // self.steps, self.rho_min, min(self.rho_max, prior.contract.sigma_max)
        if low is None:
            low = min(max(prior.contract.sigma_min, noise_std), high)
        elif low > high:
            raise SolverError(f"PnPDM: rho_min {low} is above the prior's largest noise level, {high}")
        decay = self.decay
        if decay is None:
            decay = (low / high) ** (1 / (turns - 1)) if turns > 1 else 1.0
        return [max(high * decay**turn, low) for turn in range(turns)]

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Run one chain for every item of ``noise``.

        Returns
        -------
        Solution
            The last x of each, ``(B, H, W)``, in the prior's units.

        Raises
        ------
        SolverError
            If the operator's adjoint is not matched, the noise level is not positive, ``rho_min`` is above
            the prior's largest, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        numbers = count()

        def draw() -> Tensor:
            return noise(next(numbers))

        rhos = self.rhos(prior, problem.noise_std)
        x = problem.unfolded if self.start == "warm" else rhos[0] * draw()
        for turn, rho in enumerate(rhos):
            z = self.likelihood_step(problem, x, rho, draw)
            x = self.prior_step(prior, z, rho, draw)
            check_finite(x, turn, "PnPDM")
            if on_step is not None:
                on_step(turn + 1, len(rhos))
        return Solution(x, len(rhos) * self.steps)

    def likelihood_step(self, problem: Problem, x: Tensor, rho: float, draw: Callable[[], Tensor]) -> Tensor:
        """Sample of ``p(z | x, y)``, of precision ``A^H A / s^2 + I / rho^2`` (Papandreou & Yuille 2010).

        ``(I + gamma A^H A) z = (x + rho e) + gamma A^H (y + s n)`` with fresh noise e and n and
        ``gamma = rho^2 / s^2``, solved for the correction to the first term.
        """
        normal, s, gamma = problem.operator.normal, problem.noise_std, (rho / problem.noise_std) ** 2
        guess = x + rho * draw()
        data = problem.adjoint_y + s * problem.operator.adjoint(data_noise(problem.operator, draw))
        misfit = gamma * (data - normal(guess))
        steps = cg_steps(1 + gamma * problem.norm**2, self.cg_tolerance, self.cg_iterations)
        correction = cg(
            lambda v: torch.add(v, normal(v), alpha=gamma), misfit, max_iter=steps, axes=problem.mixed_axes
        )
        return guess + correction.x

    def prior_step(self, prior: ScorePrior, z: Tensor, rho: float, draw: Callable[[], Tensor]) -> Tensor:
        """Sample of ``p(x | z)``, ``z = x + rho e``: reverse diffusion from level rho, begun at z."""
        x = z
        for sigma, lower in pairwise(karras_levels(self.steps, rho, min(rho, prior.contract.sigma_min))):
            denoised = prior.denoise(x, sigma)
            x = denoised + (lower / sigma) ** 2 * (x - denoised)
            if lower > 0:
                x = x + lower * math.sqrt(1 - (lower / sigma) ** 2) * draw()
        return x
