"""AdaDiff: rapid projected diffusion, then a prior adapted to the case (Güngör et al., MedIA 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

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
    check_positive,
)


@dataclass(frozen=True)
class AdaDiff:
    """Denoise, project onto the data, blend along the diffusion; then, on request, adapt the prior.

    The rapid phase starts from a first image with noise of ``sigma_max``. At every level the denoised
    image is made consistent with the data and blended with the noisy one into a draw of the next level,
    ``x <- (sigma'^2/sigma^2) x + (1 - sigma'^2/sigma^2) x0 + sigma' sqrt(1 - sigma'^2/sigma^2) z``. The
    adaptation phase changes the prior's weights so that the denoised rapid image fits the measurement,
    descending ``|y - A D(x)|^2``, sample by sample; afterwards the weights are what they were, also when it
    fails. No other thread may use the prior meanwhile.

    Data consistency is ``x0 <- x0 + A^H (y - A x0)``, repeated. With ``weighted`` it stops short of the
    noise: the steps are those of a gradient descent on ``|x0 - D|^2 / (2 v) + |y - A x0|^2 / (2 s^2)``, v the
    prior's error variance at the level (:meth:`ScorePrior.error_variance`), and without noise the same as
    before. For ``A A^H`` a projection a single step is the minimum.

    Parameters
    ----------
    levels
        Noise levels of the rapid phase, one network evaluation each.
    projections
        Data-consistency steps a level. The paper has one, which for one coil is all there is to do.
    weighted
        Whether they mind the measurement's noise; the paper's do not.
    adaptation_steps
        Steps of the adaptation phase; 0 for none. Each is a network evaluation with its gradient, and one
        more evaluation follows them.
    learning_rate
        Of the adaptation (Adam with the released code's betas, 0.5 and 0.9).
    sigma_max, sigma_min
        First and last noise level, within the prior's range. ``None`` for ``sigma_max``: twice the level of
        the prior's images. ``None`` for ``sigma_min``: the measurement's noise level.
    start
        First image: ``"warm"``: of a conjugate-gradient reconstruction; ``"zero-filled"``: ``A^H y``, as in
        the released code (which adds no noise to it).

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    The paper's prior is trained adversarially to take few large steps, this one is any denoiser. The
    released code descends the l1 norm of the residual.
    """

    needs: ClassVar[Needs] = Needs(max_norm=math.sqrt(2))

    levels: int = 20
    projections: int = 20
    weighted: bool = True
    adaptation_steps: int = 0
    learning_rate: float = 1e-4
    sigma_max: float | None = None
    sigma_min: float | None = None
    start: str = "warm"

    def __post_init__(self) -> None:
        check_at_least(self, levels=1, projections=1, adaptation_steps=0)
        check_positive(self, "learning_rate", "sigma_max", "sigma_min")
        check_choices(self, start=("warm", "zero-filled"))

    @classmethod
    def paper(cls, **changes: object) -> AdaDiff:
        """Published setting: eight large steps, one projection each, a thousand steps of adaptation.

        It starts at sigma = 152, where the paper's variance-preserving process does (beta from 0.1 to 20), or
        at the prior's highest level.
        """
        base = cls(
            levels=8,
            projections=1,
            weighted=False,
            adaptation_steps=1000,
            learning_rate=1e-3,
            sigma_max=152.0,
            start="zero-filled",
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @property
    def nfe(self) -> int:
        """Network evaluations a sample."""
        return self.levels + (self.adaptation_steps + 1 if self.adaptation_steps else 0)

    def sigmas(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        known = prior.contract
        high = min(known.sigma_max, 2 * known.level if self.sigma_max is None else self.sigma_max)
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
            If the operator's adjoint is not matched or its norm exceeds sqrt(2), the prior has no weights to
            adapt, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        if self.adaptation_steps and not (prior.differentiable and any(True for _ in prior.parameters())):
            raise SolverError(
                f"AdaDiff adapts the weights of a prior, and {prior.contract.name!r} has none that can be "
                "differentiated: set adaptation_steps to 0"
            )
        sigmas = self.sigmas(prior, problem.noise_std)
        x = sigmas[0] * noise(0) + (problem.unfolded if self.start == "warm" else problem.adjoint_y)
        total = self.levels + len(x) * self.adaptation_steps

        def report(done: int) -> None:
            if on_step is not None:
                on_step(done, total)

        for index, (sigma, lower) in enumerate(pairwise(sigmas)):
            estimate = self._consistent(problem, prior, prior.denoise(x, sigma), sigma)
            kept = lower**2 / sigma**2
            x = kept * x + (1 - kept) * estimate
            if lower > 0:
                x = x + lower * math.sqrt(1 - kept) * noise(index + 1)
            check_finite(x, index, "AdaDiff")
            report(index + 1)
        if self.adaptation_steps:
            # One at a time: the weights fitted to one sample are of no use to another.
            adapted = []
            for item, rapid in enumerate(x):
                first = self.levels + item * self.adaptation_steps
                adapted.append(self._adapt(problem, prior, rapid[None].detach(), sigmas[-2], first, report))
            x = torch.cat(adapted)
        return Solution(x, self.nfe)

    def _consistent(self, problem: Problem, prior: ScorePrior, denoised: Tensor, sigma: float) -> Tensor:
        """Data-consistency steps from a denoised image of that level."""
        ratio = problem.noise_std**2 / prior.error_variance(sigma) if self.weighted else 0.0
        x = denoised
        for _ in range(self.projections):
            descent = problem.adjoint_y - problem.operator.normal(x) + ratio * (denoised - x)
            x = x + descent / (1 + ratio)
        return x

    def _adapt(
        self,
        problem: Problem,
        prior: ScorePrior,
        rapid: Tensor,
        sigma: float,
        first: int,
        report: Callable[[int], None],
    ) -> Tensor:
        """Adaptation phase of one sample, a batch of one; counts its steps from ``first``."""
        with _lent_weights(prior) as weights:
            optimiser = torch.optim.Adam(weights, lr=self.learning_rate, betas=(0.5, 0.9))
            for step in range(self.adaptation_steps):
                with torch.enable_grad():
                    residual = problem.y - problem.operator(prior.denoise(rapid, sigma))
                    loss = residual.abs().square().sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                check_finite(loss.detach(), first + step, "AdaDiff")
                report(first + step + 1)
            with torch.no_grad():
                adapted = self._consistent(problem, prior, prior.denoise(rapid, sigma), sigma)
        check_finite(adapted, first + self.adaptation_steps, "AdaDiff")
        return adapted


@contextmanager
def _lent_weights(prior: ScorePrior) -> Iterator[list[nn.Parameter]]:
    """The prior's weights, free to be changed inside; afterwards they are as before, whatever happened."""
    weights = list(prior.parameters())
    before = [(weight.detach().clone(), weight.requires_grad, weight.grad) for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        yield weights
    finally:
        with torch.no_grad():
            for weight, (value, trained, gradient) in zip(weights, before, strict=True):
                weight.copy_(value)
                weight.requires_grad_(trained)
                weight.grad = gradient
