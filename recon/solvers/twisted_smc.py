"""Twisted sequential Monte Carlo: exact in the limit of many particles and steps.

The field's name for it is TDS (twisted diffusion sampler, Wu et al., NeurIPS 2023); MCGDiff (Cardoso et al.,
ICLR 2024) and FPS (Dou & Song, ICLR 2024) differ in the twisting function.

**The target.** Reverse diffusion without data goes from level t to a lower level s by drawing x0 from
``N(D(x_t, t), v_t I)``, the Gaussian of the denoiser's mean and mean error variance, and x_s from the bridge
``N((s²/t²) x_t + h x0, s² h I)`` with ``h = 1 - s²/t²``. So

    p(x_s | x_t) = N(D + (s²/t²)(x_t - D), (s² h + h² v_t) I).

The term ``h² v_t``, which ancestral sampling leaves out, removes the loss of variance of first order in the
step. The target is this chain times ``p(y | x0)``.

**The twist.** ``p̂(y | x_t) = N(y; A D(x_t, t), σ_y² I + v_t A Aᴴ)`` is what the same Gaussian says of the
data; at level zero it is the likelihood.

**The proposal** is the reverse step given y, in closed form: x0 is drawn from ``N(D, v_t I)`` conditioned on
``y = A x0 + n``, and x_s from the bridge as before.

**The weights.** Target over proposal leaves one quotient a step,

    w = p̂(y | x_s) / N(y; A μ, σ_y² I + v' A Aᴴ),    1/v' = 1/v_t + h/s²,
    μ = v' (D/v_t + (x_s - (s²/t²) x_t)/s²),

because x0 given x_t and x_s is ``N(μ, v' I)``: what the network says of the data at x_s, over what the
Gaussian at x_t foretold of it. The covariances are the same for all particles, so their determinants cancel,
and only quadratic forms remain. At the last step the quotient is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
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
    check_finite,
    check_needs,
    check_positive,
)
from recon.solvers.cg import cg

DENSE_LIMIT = 512
"""Largest number of unknowns for which ``AᴴA`` is diagonalised instead of inverted step by step."""


@dataclass(frozen=True)
class TwistedSMC:
    """Twisted sequential Monte Carlo: particles follow the reverse diffusion given the data, by weight.

    Every sample is drawn from a set of particles of its own, so samples are independent. The error falls as
    one over the number of particles and one over the number of steps. How many particles are enough grows
    with how much the weights vary, and that with the number of measured values: a few dozen for a hundred of
    them. On an image of real size a single particle carries all the weight at every step, and other solvers
    are better. This one tells the truth about small problems for which there is no closed form.

    Parameters
    ----------
    particles
        Particles a sample.
    steps
        Network evaluations a particle; a sample takes ``particles * steps``.
    resample_below
        Particles are resampled (systematically) when the effective sample size falls below this share of
        their number; 0: never.
    sigma_max, sigma_min
        First and last noise level; those between are spaced evenly in their logarithm. ``None``: 20 times the
        level of the prior's images, and a quarter of the noise that the data leave in the direction they
        know best; both within the prior's range.
    cg_iterations, cg_tolerance
        Conjugate-gradient steps at the most, and the accuracy aimed at with them; their number follows from
        the condition number by the convergence bound. Operators on up to :data:`DENSE_LIMIT` values are
        diagonalised instead.

    Raises
    ------
    SolverError
        If a setting is out of its range.
    """

    needs: ClassVar[Needs] = Needs(noise=True)

    particles: int = 16
    steps: int = 50
    resample_below: float = 0.5
    sigma_max: float | None = None
    sigma_min: float | None = None
    cg_iterations: int = 50
    cg_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_at_least(self, particles=1, steps=1, cg_iterations=1)
        check_positive(self, "sigma_max", "sigma_min", "cg_tolerance")
        if not 0 <= self.resample_below <= 1:
            raise SolverError(f"TwistedSMC: resample_below must lie in [0, 1], got {self.resample_below}")

    @property
    def nfe(self) -> int:
        """Network evaluations a sample."""
        return self.particles * self.steps

    def levels(self, problem: Problem, prior: ScorePrior) -> list[float]:
        """Noise levels, the last one zero."""
        contract = prior.contract
        high, low = self.sigma_max, self.sigma_min
        if high is None:
            high = min(20 * contract.level, contract.sigma_max)
        if low is None:
            low = min(max(problem.noise_std / (4 * max(problem.norm, 1e-30)), contract.sigma_min), high / 2)
        if not low < high:
            raise SolverError(f"TwistedSMC: need sigma_min < sigma_max, got {low:.4g} and {high:.4g}")
        ratio = (low / high) ** (1 / max(self.steps - 1, 1))
        return [*(high * ratio**step for step in range(self.steps)), 0.0]

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
            If the operator's adjoint is not matched, the noise level is not positive, or a value stops being
            finite.
        """
        check_needs(self, problem, prior)
        operator = problem.operator
        small = math.prod(operator.domain_shape) <= DENSE_LIMIT
        data: _GaussianData = (_Diagonalised if small else _Iterative)(problem, self)
        levels = self.levels(problem, prior)
        count = self.particles

        def draw(step: int, shape: tuple[int, ...]) -> Tensor:
            """Noise of that shape for every particle, ``(B, particles, *shape)``."""
            return replace(noise, shape=(count, *shape))(step)

        # At the first level the image hardly matters: zero, with the variance of the prior's level.
        x = math.hypot(levels[0], prior.contract.level / math.sqrt(2)) * draw(0, operator.domain_shape)
        log_weights = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        foretold = torch.zeros_like(log_weights)
        for index, (sigma, lower) in enumerate(pairwise(levels)):
            # Particle by particle, so that the network sees no more images at once than in other solvers.
            denoised = torch.stack([prior.denoise(particle, sigma) for particle in x.unbind(1)], dim=1)
            variance = prior.error_variance(sigma)
            log_weights = log_weights + data.log_likelihood(denoised, variance) - foretold

            # The weights change no more after the last level: one particle, drawn by weight, goes on.
            count = 1 if lower == 0 else self.particles
            uniform = _uniform(noise, 4 * index + 1)
            ancestors, log_weights = self._resampled(log_weights, uniform, count)
            x, denoised = _pick(x, ancestors), _pick(denoised, ancestors)

            fresh = [draw(4 * index + 2 + k, shape) for k, shape in enumerate(data.noise_shapes)]
            x0 = data.conditioned(denoised, variance, *fresh)
            share = 1 - (lower / sigma) ** 2
            if lower == 0:
                x = x0
            else:
                bridge = draw(4 * index + 4, operator.domain_shape)
                step = share * x0 + lower * math.sqrt(share) * bridge  # x_s - (s²/t²) x_t
                x = step + (1 - share) * x
                remaining = 1 / (1 / variance + share / lower**2)
                estimate = remaining * (denoised / variance + step / lower**2)
                foretold = data.log_likelihood(estimate, remaining)
            check_finite(x, index, "TwistedSMC")
            if on_step is not None:
                on_step(index + 1, self.steps)
        return Solution(x[:, 0], self.nfe)

    def _resampled(self, log_weights: Tensor, uniform: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Ancestors ``(B, count)`` by systematic resampling, where it is due, and the weights after it."""
        weights = log_weights.softmax(1)
        positions = (torch.arange(count, device=weights.device) + uniform[:, None]) / count
        drawn = torch.searchsorted(weights.cumsum(1), positions)
        drawn = drawn.clamp_max(weights.shape[1] - 1)  # rounding may leave the sum of the weights below 1
        if count < weights.shape[1]:
            return drawn, torch.zeros_like(positions)
        effective = 1 / weights.square().sum(1, keepdim=True)
        due = effective < self.resample_below * count
        stay = torch.arange(count, device=weights.device).expand_as(drawn)
        return torch.where(due, drawn, stay), torch.where(due, 0.0, log_weights)


def _uniform(noise: KeyedNoise, step: int) -> Tensor:
    """A number in [0, 1] for every item, ``(B,)``, float64."""
    normal = replace(noise, shape=(1,), dtype=torch.float64)(step)[:, 0]
    return torch.erfc(-normal / math.sqrt(2)) / 2


def _pick(x: Tensor, ancestors: Tensor) -> Tensor:
    """Particles ``(B, count, ...)`` of ``x`` ``(B, K, ...)``, each item's by its own indices."""
    return x[torch.arange(len(x), device=x.device)[:, None], ancestors]


def _squared(x: Tensor) -> Tensor:
    """``|x|^2`` of every value; much faster than by way of the modulus."""
    return torch.view_as_real(x).square().sum(-1) if x.is_complex() else x.square()


class _GaussianData:
    """What the data say of an image of which a mean and a variance are known."""

    noise_shapes: tuple[tuple[int, ...], ...]

    def log_likelihood(self, mean: Tensor, variance: float) -> Tensor:
        """``log N(y; A mean, σ_y² I + variance A Aᴴ)`` up to what is the same for all means: ``(B, K)``."""
        raise NotImplementedError

    def conditioned(self, mean: Tensor, variance: float, *noise: Tensor) -> Tensor:
        """Draw from ``N(mean, variance I)`` given the data; noise of the declared shapes."""
        raise NotImplementedError


class _Diagonalised(_GaussianData):
    """With the eigenvectors of ``AᴴA``, in whose coordinates everything is a division."""

    def __init__(self, problem: Problem, settings: TwistedSMC) -> None:
        operator = problem.operator
        shape = operator.domain_shape
        self.noise_shapes = (shape,)
        size = math.prod(shape)
        units = torch.eye(size, dtype=problem.y.dtype, device=problem.y.device).reshape(size, *shape)
        normal = operator.normal(units).reshape(size, size).mT
        wide = torch.complex128 if normal.is_complex() else torch.float64
        values, vectors = torch.linalg.eigh(normal.to(wide))
        # Where an eigenvalue is no more than rounding the data say nothing, and weak noise would make much
        # of what rounding leaves there of A^H y.
        known = values > 10 * torch.finfo(problem.y.dtype).eps * values.max()
        values = torch.where(known, values, 0.0)
        self.values = values.to(problem.y.abs().dtype)
        self.vectors = vectors.to(problem.y.dtype)
        target = problem.adjoint_y.flatten().to(wide) @ vectors.conj()
        self.target = torch.where(known, target, 0.0).to(problem.y.dtype)
        self.noise_variance = problem.noise_std**2

    def _misfit(self, mean: Tensor) -> Tensor:
        """``Vᴴ Aᴴ (y - A mean)``."""
        return self.target - self.values * (mean.flatten(2) @ self.vectors.conj())

    def log_likelihood(self, mean: Tensor, variance: float) -> Tensor:
        scale = self.values * (self.noise_variance + variance * self.values)
        gain = torch.where(self.values > 0, 1 / scale, 0.0)
        return -(_squared(self._misfit(mean)) * gain).sum(-1, dtype=torch.float64) / 2

    def conditioned(self, mean: Tensor, variance: float, *noise: Tensor) -> Tensor:
        gain = variance / (self.noise_variance + variance * self.values)
        root = (self.noise_variance * gain).sqrt()
        change = gain * self._misfit(mean) + root * noise[0].flatten(2)
        return mean + (change @ self.vectors.mT).reshape(mean.shape)


class _Iterative(_GaussianData):
    """With conjugate gradients; a draw is the solution of a perturbed problem (Papandreou & Yuille 2010)."""

    def __init__(self, problem: Problem, settings: TwistedSMC) -> None:
        self.y, self.operator, self.norm = problem.y, problem.operator, problem.norm
        self.noise_variance = problem.noise_std**2
        self.mixed_axes = problem.mixed_axes
        self.noise_shapes = (self.operator.domain_shape, self.operator.range_shape)
        self.iterations, self.tolerance = settings.cg_iterations, settings.cg_tolerance

    def _fitted(self, mean: Tensor, y: Tensor, variance: float) -> Tensor:
        """Minimiser of ``|y - A x|² / σ_y² + |x - mean|² / variance``."""
        weight = variance / self.noise_variance
        right = weight * self.operator.adjoint(y - self.operator(mean))
        root = math.sqrt(1 + weight * self.norm**2)
        steps = 1
        if root > 1:
            # The error falls at least by 2 ((root - 1) / (root + 1))^m in m steps (Saad 2003, Eq. 6.128).
            steps = math.ceil(math.log(2 / self.tolerance) / math.log((root + 1) / (root - 1)))
        normal, steps = self.operator.normal, max(1, min(steps, self.iterations))
        correction = cg(
            lambda v: torch.add(v, normal(v), alpha=weight), right, max_iter=steps, axes=self.mixed_axes
        )
        return mean + correction.x

    def log_likelihood(self, mean: Tensor, variance: float) -> Tensor:
        # The least value of that sum is the quadratic form; as a minimum it forgives an inexact minimiser.
        fitted = self._fitted(mean, self.y, variance)
        misfit = _squared(self.y - self.operator(fitted)).flatten(2).sum(-1, dtype=torch.float64)
        change = _squared(fitted - mean).flatten(2).sum(-1, dtype=torch.float64)
        return -(misfit / self.noise_variance + change / variance) / 2

    def conditioned(self, mean: Tensor, variance: float, *noise: Tensor) -> Tensor:
        image, measurement = noise
        start = mean + math.sqrt(variance) * image
        return self._fitted(start, self.y + math.sqrt(self.noise_variance) * measurement, variance)
