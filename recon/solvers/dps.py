"""DPS: diffusion posterior sampling (Chung, Kim, Mccann, Klasky & Ye, ICLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
)
from recon.solvers.schedule import noise_levels


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling: an ancestral step, then a step down the gradient of the misfit's norm.

    ``x' = ancestral(x) - zeta sqrt((1 + sigma^2)(1 + sigma'^2)) grad_x ||y - A D(x)||`` (paper, Algorithm 1,
    in coordinates without the variance-preserving scaling). The gradient is that at the old ``x`` and goes
    through the network. It does not know the noise level of the measurement, so how closely the data are
    fitted and how far the samples spread depend on ``zeta`` and ``nfe``: too little leaves the prior's
    spread, too much fits the noise and leaves none.

    Parameters
    ----------
    nfe
        Network evaluations a sample, each with its vector-Jacobian product (about as long again).
    zeta
        Length of a step of guidance, in the prior's units. ``None``: ``travel`` image norms in all, shared
        out evenly among the steps.
    travel
        What ``zeta = None`` stands for: ``zeta = travel ||y|| / (||A|| nfe)``, with which sizes, scales and
        numbers of steps are comparable.
    schedule
        ``"karras"`` or ``"vp-linear"``, the paper's, whose levels are fixed by ``nfe`` alone.
    sigma_max, sigma_min
        First and last noise level of ``"karras"``; the first is cut at the prior's largest. ``None`` for
        ``sigma_min``: the measurement's noise level, below which the data say no more, within the prior's
        range.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of the first level.
        ``"noise"``: noise alone.
    checkpoint
        Keep nothing of the network for the backward pass but run it again there, one image of the batch
        after the other, so that one image's activations are held at a time. A batch of one image has nothing
        to gain and is run as without.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(gradient=True, equal_weights=True)

    nfe: int = 100
    zeta: float | None = None
    travel: float = 6.0
    schedule: str = "karras"
    sigma_max: float = 2.0
    sigma_min: float | None = None
    start: str = "warm"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1)
        for name in ("zeta", "travel"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise SolverError(f"DPS: {name} must not be negative, got {value}")
        check_choices(self, start=("warm", "noise"), schedule=("karras", "vp-linear"))

    @classmethod
    def paper(cls, nfe: int = 1000, **changes: object) -> DPS:
        """Published setting: 1000 ancestral steps from noise, step size 1 on the *squared* norm.

        The paper's ``1 / ||r|| grad ||r||^2`` is ``2 grad ||r||``, hence ``zeta = 2`` here. It is meant for
        images in [-1, 1].
        """
        base = cls(nfe=nfe, zeta=2.0, schedule="vp-linear", start="noise")
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def released(cls, nfe: int = 1000, **changes: object) -> DPS:
        """Setting of the authors' code: the gradient of the norm itself, with 0.3 (0.5 for inpainting)."""
        return replace(cls.paper(nfe, zeta=0.3), **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        return noise_levels(
            self.schedule, self.nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std
        )

    def step_size(self, problem: Problem) -> float:
        """Length of a step of guidance, in the prior's units."""
        if self.zeta is not None:
            return self.zeta
        if problem.norm == 0:
            return 0.0
        return self.travel * float(torch.linalg.vector_norm(problem.y)) / (problem.norm * self.nfe)

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
            If the prior cannot be differentiated, the operator's adjoint is not matched, or a value stops
            being finite (a step too large).
        """
        check_needs(self, problem, prior)
        sigmas = self.levels(prior, problem.noise_std)
        zeta = self.step_size(problem)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + problem.unfolded
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised, gradient = self.guidance(problem, prior, x, sigma)
            # The ancestral step: towards D(x), with fresh noise for what is left of the old one.
            x = denoised + (lower / sigma) ** 2 * (x - denoised)
            fresh = lower * math.sqrt(1 - (lower / sigma) ** 2)
            if fresh > 0:
                x = x + fresh * noise(index + 1)
            x = x - zeta * math.sqrt((1 + sigma**2) * (1 + lower**2)) * gradient
            check_finite(x, index, "DPS")
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(x, self.nfe)

    def guidance(self, problem: Problem, prior: ScorePrior, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Denoised image ``D(x)`` and ``grad_x ||y - A D(x)||``, the norm that of each item.

        By hand as far as the operator goes, ``-(dD/dx)^H A^H r / ||r||``, so that only the network is
        differentiated automatically.
        """
        operator = problem.operator
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            if self.checkpoint and len(x) > 1:
                images = x.split(1)
                denoised = torch.cat(
                    [checkpoint(prior.denoise, x, sigma, use_reentrant=False) for x in images]
                )
            else:
                denoised = prior.denoise(x, sigma)
        r = problem.y - operator(denoised.detach())
        length = vector_norm(r, len(operator.range_shape))
        # At a misfit of zero the norm has no gradient; zero is one of its subgradients.
        direction = operator.adjoint(r / length.clamp_min(torch.finfo(length.dtype).tiny))
        (gradient,) = torch.autograd.grad(denoised, x, -direction)
        return denoised.detach(), gradient
