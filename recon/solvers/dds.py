"""DDS: decomposed diffusion sampling (Chung, Lee & Ye, ICLR 2024)."""

from __future__ import annotations

import math
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
    check_positive,
)
from recon.solvers.cg import cg, cg_steps
from recon.solvers.schedule import noise_levels

EARLY = 16.0
"""Noise levels, over the measurement's, above which :attr:`DDS.early_iterations` holds."""

DataStep = Callable[[Tensor, float], Tensor]
"""What brings denoised images ``(B, ...)`` of a noise level towards the data."""


@dataclass(frozen=True)
class DataTerm:
    """A quadratic term ``x^H H x / 2 - Re x^H b``, such as ``|A x - y|^2 / 2``.

    Parameters
    ----------
    matrix
        ``H``, Hermitian and positive semi-definite.
    right
        ``b``, ``domain_shape`` or a batch of them.
    largest
        Bound of the eigenvalues of ``H``.
    axes
        Last axes that ``H`` mixes.
    """

    matrix: Callable[[Tensor], Tensor]
    right: Tensor
    largest: float
    axes: int

    @classmethod
    def of(cls, problem: Problem) -> DataTerm:
        """Misfit of a problem."""
        return cls(problem.operator.normal, problem.adjoint_y, problem.norm**2, problem.mixed_axes)


@dataclass(frozen=True)
class DDS:
    """Decomposed diffusion sampling: Tweedie, a few conjugate-gradient steps towards the data, DDIM.

    Parameters
    ----------
    nfe
        Network evaluations a sample.
    cg_iterations
        Conjugate-gradient steps a noise level at the most (the paper's M).
    cg_tolerance
        Accuracy aimed at with those steps, relative to the correction they compute. Their number follows from
        it and from the condition number ``1 + gamma ||A||^2`` by the convergence bound of the method, and not
        from the residual as it comes: a threshold that rounding can tip would break the scale equivariance.
        Zero: always ``cg_iterations``.
    early_iterations
        Steps at the most above 16 noise levels of the measurement. What is left undone there is made up for
        later, unless the gaps between samples are so wide that it is decided there what fills them. ``None``:
        ``cg_iterations``.
    gamma
        Weight of the data term. ``None``: ``sigma^2 / noise_std^2``, the squares of the current noise level
        and of the measurement's, so that the denoised image is trusted no further than the noise that was
        taken off.
    eta
        Share of chance in a step, from 0 to 1. In ``"renoise"``, how much of the prior's error is drawn: 0
        gives the sharpest single images, 1 the spread of the posterior. In the two DDIM steps, the share of
        fresh noise: 0 is deterministic, 1 ancestral (DDPM).
    sigma_max, sigma_min
        First and last noise level; the first is cut at the prior's largest. ``None`` for ``sigma_min``: the
        measurement's noise level, below which the data say no more, within the prior's range.
    start
        ``"warm"``: the first image is a conjugate-gradient reconstruction plus noise of ``sigma_max``, so the
        levels above need no visit (come-closer-diffuse-faster, Chung et al. 2022). ``"noise"``: noise alone.
    noise_free
        Conjugate gradients on ``A^H A x = A^H y`` instead, for data without noise.
    schedule
        ``"karras"``, or ``"vp-linear"``, whose levels are fixed by ``nfe`` alone.
    rho
        Exponent of the Karras levels: the larger, the more of them are small (7 in the paper). Where the data
        leave open which of many images it is, that is decided at high levels, and a smaller one is better.
    step
        How the next noise level is reached. ``"renoise"``: the prior's error, of which
        :meth:`ScorePrior.error_variance` tells the size, is drawn and added before data consistency, and
        fresh noise after it. ``"paper"``: the DDIM step. ``"released"``: that of the released code, which
        loses variance.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    The paper's step goes on in the direction of the network's own noise estimate, ``x - D``, from an image
    that has been drawn to the data. What the data said is then said again at every level: with an exact
    Gaussian prior the mean ends 0.7 posterior standard deviations off, and more steps make it worse. To
    forget the old noise instead, as DiffPIR does (Zhu et al. 2023), avoids that. Without data both keep the
    prior's marginals: ``D`` plus an error of its variance is a sample of ``x0`` given ``x``, and fresh noise
    makes it one of the next level. ``docs/what-matters.md`` has the measurements.
    """

    needs: ClassVar[Needs] = Needs()

    nfe: int = 30
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    early_iterations: int | None = None
    gamma: float | None = None
    eta: float = 1.0
    sigma_max: float = 1.0
    sigma_min: float | None = None
    start: str = "warm"
    noise_free: bool = False
    schedule: str = "karras"
    step: str = "renoise"
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_at_least(self, nfe=1, cg_iterations=1, cg_tolerance=0)
        check_positive(self, "rho")
        if self.early_iterations is not None:
            check_at_least(self, early_iterations=1)
        if self.gamma is not None and not self.gamma >= 0:
            raise SolverError(f"{type(self).__name__}: gamma must not be negative, got {self.gamma}")
        if not 0 <= self.eta <= 1:
            raise SolverError(f"{type(self).__name__}: eta must lie in [0, 1], got {self.eta}")
        check_choices(
            self,
            start=("warm", "noise"),
            schedule=("karras", "vp-linear"),
            step=("renoise", "paper", "released"),
        )

    @classmethod
    def paper(cls, nfe: int = 49, **changes: object) -> DDS:
        """Published setting: M = 5, gamma = 1, VP noise levels, started from noise alone.

        eta is 0.15, 0.5 and 0.8 for 19, 49 and 99 network evaluations.
        """
        eta = 0.15 if nfe <= 19 else 0.5 if nfe <= 49 else 0.8
        base = cls(
            nfe=nfe,
            cg_iterations=5,
            cg_tolerance=0.0,
            gamma=1.0,
            eta=eta,
            start="noise",
            schedule="vp-linear",
            step="paper",
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    @classmethod
    def released(cls, nfe: int = 50, **changes: object) -> DDS:
        """Setting of the authors' code: as published, but eta = 0.85 in a step that shrinks the variance."""
        return replace(cls.paper(nfe, eta=0.85, step="released"), **changes)  # type: ignore[arg-type]

    @classmethod
    def ct(cls, **changes: object) -> DDS:
        """Setting for CT: more of the steps at high noise levels (``rho`` 2), and M up to 40.

        What few views or an arc leave open is decided at high levels, and takes conjugate gradients longer to
        propagate than what undersampled k-space does. See ``docs/what-matters.md``.
        """
        return replace(cls(cg_iterations=40, rho=2.0), **changes)  # type: ignore[arg-type]

    @classmethod
    def fast(cls, **changes: object) -> DDS:
        """Setting whose time is the network's: M up to 12 and mostly fewer, 2 at high noise levels.

        Together with coil compression it costs next to no quality where the gaps between samples are regular
        or small (equispaced and Gaussian columns at x4, Poisson discs up to x8), and more the larger the gaps
        are: 0.1 dB with random columns at x4, 1 dB with equispaced ones at x8. See ``docs/what-matters.md``.
        """
        base = cls(cg_iterations=12, cg_tolerance=0.3, early_iterations=2)
        return replace(base, **changes)  # type: ignore[arg-type]

    def levels(self, prior: ScorePrior, noise_std: float) -> list[float]:
        """Noise levels for a measurement of that noise, the last one zero."""
        return noise_levels(
            self.schedule, self.nfe, self.sigma_max, self.sigma_min, prior.contract, noise_std, self.rho
        )

    def weight(self, sigma: float, noise_std: float) -> float:
        """Weight of the data term at a noise level."""
        return sigma**2 / noise_std**2 if self.gamma is None else self.gamma

    def next_level(self, sigma: float, lower: float) -> tuple[float, float]:
        """Shares of the estimated noise and of fresh noise that lead from one noise level to the next."""
        if self.step == "renoise":
            return 0.0, lower
        if self.step == "released":
            return lower * math.sqrt(1 - self.eta**2), lower * self.eta
        fresh = self.eta * lower * math.sqrt(sigma**2 - lower**2) / sigma
        return math.sqrt(lower**2 - fresh**2), fresh

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one posterior sample for every item of ``noise``.

        Returns
        -------
        Solution
            Samples ``(B, *domain_shape)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator is none that the solver can work with, a noise level is needed and not positive,
            or a value stops being finite.
        """
        self.check(problem, prior)
        start = problem.unfolded if self.start == "warm" else None
        step = self.data_consistency(problem, prior)
        return Solution(self.descend(problem.noise_std, prior, noise, step, start, on_step), self.nfe)

    def check(self, problem: Problem, prior: ScorePrior) -> None:
        """Refuse what the solver cannot work with, and a noise level that is needed and not positive."""
        check_needs(self, problem, prior)
        if self.gamma is None and not self.noise_free and not problem.noise_std > 0:
            raise SolverError(
                f"{type(self).__name__} needs a positive noise level, got {problem.noise_std}; or set gamma "
                "or noise_free"
            )

    def descend(
        self,
        noise_std: float,
        prior: ScorePrior,
        noise: Callable[[int], Tensor],
        towards_data: DataStep,
        start: Tensor | None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Go down all noise levels (paper, Algorithm 1).

        Parameters
        ----------
        noise_std
            Noise level of the measurement.
        prior, noise, on_step
            As for :meth:`sample`.
        towards_data
            Data consistency, as :meth:`data_consistency` makes it.
        start
            First image, to which noise is added; ``None`` for noise alone.

        Returns
        -------
        Tensor
            Samples of the shape of the noise.
        """
        sigmas = self.levels(prior, noise_std)
        x = sigmas[0] * noise(0)
        if start is not None:
            x = x + start
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised, error_variance = self.denoise(prior, x, sigma, index)
            eps = (x - denoised) / sigma
            if self.step == "renoise" and self.eta > 0:
                error = self.eta * math.sqrt(error_variance)
                denoised = denoised + error * noise(self.nfe + index + 1)
            x = towards_data(denoised, sigma)
            direction, fresh = self.next_level(sigma, lower)
            if direction > 0:
                x = x + direction * eps
            if fresh > 0:
                x = x + fresh * noise(index + 1)
            check_finite(x, index, type(self).__name__)
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return x

    # What solvers that go down the same levels do in their own way.

    def denoise(self, prior: ScorePrior, x: Tensor, sigma: float, index: int) -> tuple[Tensor, float]:
        """Denoised image of the noise level of that index, and the mean square error that is left in it."""
        return prior.denoise(x, sigma), prior.error_variance(sigma)

    def data_consistency(self, problem: Problem, prior: ScorePrior) -> DataStep:
        """What brings denoised images towards the data; made once a run, so that it may keep variables."""
        term = DataTerm.of(problem)
        return lambda denoised, sigma: self.towards(denoised, sigma, problem.noise_std, term)

    def towards(self, denoised: Tensor, sigma: float, noise_std: float, term: DataTerm) -> Tensor:
        """M conjugate-gradient steps from the denoised image towards the minimum of a data term."""
        matrix, right = term.matrix, term.right
        most = self.cg_iterations
        if self.early_iterations is not None and sigma > EARLY * noise_std:
            most = min(most, self.early_iterations)
        if self.noise_free:
            return cg(matrix, right.expand_as(denoised), denoised, max_iter=most, axes=term.axes).x
        gamma = self.weight(sigma, noise_std)
        if gamma == 0:
            return denoised
        steps = cg_steps(1 + gamma * term.largest, self.cg_tolerance, most)
        # Solved for the correction to the denoised image: the same iterates, from a start at zero.
        misfit = gamma * (right - matrix(denoised))
        correction = cg(
            lambda v: torch.add(v, matrix(v), alpha=gamma), misfit, max_iter=steps, axes=term.axes
        )
        return denoised + correction.x
