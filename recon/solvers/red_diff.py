"""RED-diff: regularisation by denoising diffusion, a variational method (Mardani et al., ICLR 2024)."""

from __future__ import annotations

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
from recon.solvers.schedule import noise_levels

EPSILON = 1e-8
"""Adam's guard against a division by zero."""


@dataclass(frozen=True)
class REDDiff:
    """Optimise an image by Adam, with what the prior would change at falling noise levels as regulariser.

    This is an optimiser, not a sampler: the posterior is approximated by a single point, so its "samples" are
    modes that differ by the noise they saw on the way, and their spread says nothing about the posterior's.

    At each level (paper, Algorithm 1) one Adam step on
    ``|y - A mu|^2 / (2 s^2) + w <stop_gradient(sigma (eps_hat - eps)), mu>`` with ``x = mu + sigma eps``. As
    ``sigma (eps_hat - eps) = mu - D(x)``, the gradient is
    ``A^H (A mu - y) / s^2 + w (mu - D(mu + sigma eps))``, and the network is not differentiated.

    Parameters
    ----------
    nfe
        Network evaluations, which is also the number of Adam steps.
    lam
        Weight of the regulariser (the paper's lambda).
    weight
        How it enters. ``"prior"``: ``w = lam / v`` with v the prior's error variance at the noise level
        (:meth:`ScorePrior.error_variance`), under which lam = 1 makes both terms of the loss the log
        probabilities they stand for. ``"paper"``: ``w = lam / s^2``, which is the published loss
        ``|y - A mu|^2 / 2 + lam sigma <stop_gradient(eps_hat - eps), mu>`` in units of s^2: it does not know
        the noise level.
    lr
        Adam's step size at the beginning, in units of the prior's image level.
    lr_decay
        Ratio of the last step size to the first, in between geometric; 1 keeps it.
    beta1, beta2
        Adam's memories of gradient and squared gradient.
    schedule
        ``"karras"``, or ``"vp-linear"``, whose levels are fixed by ``nfe`` alone.
    sigma_max, sigma_min
        First and last noise level of ``"karras"``; the first is cut at the prior's largest. ``None`` for
        ``sigma_min``: the measurement's noise level, below which the data say no more, within the prior's
        range.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(noise=True)

    nfe: int = 60
    lam: float = 1.0
    weight: str = "prior"
    lr: float = 0.07
    lr_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.99
    schedule: str = "karras"
    sigma_max: float = 2.0
    sigma_min: float | None = None

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1)
        if not self.lam >= 0:
            raise SolverError(f"REDDiff: lam must not be negative, got {self.lam}")
        if not self.lr > 0:
            raise SolverError(f"REDDiff: lr must be positive, got {self.lr}")
        if not 0 < self.lr_decay <= 1:
            raise SolverError(f"REDDiff: lr_decay must lie in (0, 1], got {self.lr_decay}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SolverError(f"REDDiff: {name} must lie in [0, 1), got {getattr(self, name)}")
        check_choices(self, weight=("prior", "paper"), schedule=("karras", "vp-linear"))

    @classmethod
    def paper(cls, nfe: int = 1000, **changes: object) -> REDDiff:
        """Published setting: every level of the VP process, lambda = 0.25, Adam at a constant 0.1.

        The step size is for images in [-1, 1], hence in units of the prior's level here.
        """
        base = cls(nfe=nfe, lam=0.25, weight="paper", lr=0.1, lr_decay=1.0, schedule="vp-linear")
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
        """Find one mode for every item of ``noise``, begun at a conjugate-gradient reconstruction.

        Returns
        -------
        Solution
            Images ``(B, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's adjoint is not matched, the noise level is not positive, or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        sigmas, s2 = self.levels(prior, problem.noise_std), problem.noise_std**2
        mu = problem.unfolded
        first = second = torch.zeros(())  # Adam's moments
        for index, sigma in enumerate(sigmas[:-1]):
            denoised = prior.denoise(mu + sigma * noise(index), sigma)
            w = self.lam / (s2 if self.weight == "paper" else prior.error_variance(sigma))
            gradient = (problem.operator.normal(mu) - problem.adjoint_y) / s2 + w * (mu - denoised)
            # Adam (Kingma & Ba 2015), for real and imaginary parts on their own.
            g = _components(gradient)
            first = self.beta1 * first + (1 - self.beta1) * g
            second = self.beta2 * second + (1 - self.beta2) * g**2
            mean = first / (1 - self.beta1 ** (index + 1))
            scale = (second / (1 - self.beta2 ** (index + 1))).sqrt()
            lr = self.lr * prior.contract.level * self.lr_decay ** (index / max(1, self.nfe - 1))
            step = lr * mean / (scale + EPSILON)
            mu = mu - (torch.view_as_complex(step) if gradient.is_complex() else step)
            check_finite(mu, index, "REDDiff")
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(mu, self.nfe)


def _components(x: Tensor) -> Tensor:
    """Real components, in a last dimension of their own if there are two to an entry."""
    return torch.view_as_real(x) if x.is_complex() else x
