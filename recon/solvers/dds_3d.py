"""DDS-3D: volumes with a prior of slices and total variation across them (Chung, Lee & Ye, ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators.base import seeded_noise
from priors.base import ScorePrior
from recon.solvers.base import (
    WARM_START_STEPS,
    KeyedNoise,
    Needs,
    Problem,
    Solution,
    SolverError,
    check_at_least,
    check_finite,
    check_needs,
)
from recon.solvers.cg import cg, cg_steps
from recon.solvers.dds import DDS

DIFFERENCE = 0.03
"""Mean difference between neighbouring slices that the default weight assumes, in levels of the prior.

That of chest CT at a slice spacing of 2.5 mm; it is 0.02 at 1.25 mm and 0.07 at 8 mm. In simulated
parallel-beam scans of such volumes, 64 x 64 pixels and a stationary Gaussian prior, it gave the best image of
0.01, 0.03, 0.1 and 0.3, at 12 views and at 48, with a noise of 1 %. At 5 %, 0.1 was 0.3 dB better.
"""

PAPER_RHO = 10 / 390
PAPER_LAM = 0.04 / 390
"""The paper's weights for 8 views of images from 0 to 1, brought to an operator of unit norm.

The released projector's normal operator has a norm of 390: 8 views of 256 x 256 pixels of unit side, and an
adjoint that is scaled by ``pi / (2 * 8)``.
"""

Matrix = Callable[[Tensor], Tensor]

Solve = Callable[[Matrix, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class DDS3D(DDS):
    """Decomposed diffusion sampling of a volume ``(D, H, W)`` with a prior that knows its slices.

    As :class:`DDS`, but for what the data are given to: the prior denoises every slice, and then one
    iteration of ADMM brings the denoised volume ``x^`` towards the minimum of
    ``|x - x^|^2 / 2 + gamma (|A x - y|^2 / 2 + lam |A|^2 sum |Dz x|)``, where ``Dz x`` are the differences
    between neighbouring slices and ``|A|`` is the norm of the operator. ADMM's variables are kept from one
    noise level to the next, so that one iteration a level is enough.

    Parameters
    ----------
    nfe, gamma, eta, sigma_max, sigma_min, start, schedule, step
        As for :class:`DDS`. An ``nfe`` of 30 is 30 evaluations of every slice.
    cg_iterations, cg_tolerance
        As for :class:`DDS`; the condition number is ``1 + gamma |A|^2 (1 + 4 rho)``.
    noise_free
        Conjugate gradients on ``(A^H A + rho |A|^2 Dz^H Dz) x = A^H y + rho |A|^2 Dz^H (z - w)`` from the
        denoised volume instead, as in the paper, for data without noise; z and w are ADMM's variables.
    lam
        Weight of the total variation beside the data term of an operator of unit norm. ``None``:
        ``s^2 / (|A|^2 b)`` with the measurement's noise level s, which is the prior ``exp(-|Dz x| / b)`` of
        differences with a mean of ``b``, :data:`DIFFERENCE` times the level of the prior's images. Zero: the
        slices are reconstructed one by one, as DDS does.
    rho
        Weight of ADMM's coupling, likewise. It has no part in what is minimised, only in the way there.
        ``None``: ``lam / b``, so that differences below b become zero.
    slice_batch
        Slices that the prior is given at once: a matter of memory.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    Section 3.3 of the paper, which minimises ``|A x - y|^2 / 2 + lam |Dz x|_1``. Its ``Dz`` wraps around, so
    that the first slice is drawn to the last; here the volume ends where it ends. For complex images the
    threshold is on the magnitude of a difference. ADMM: Boyd et al., Found. Trends Mach. Learn. 3, 2011.
    """

    needs: ClassVar[Needs] = Needs(volume=True)

    lam: float | None = None
    rho: float | None = None
    slice_batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_penalty(self, self.lam, self.rho)
        check_at_least(self, slice_batch=1)

    @classmethod
    def paper(cls, nfe: int = 49, **changes: object) -> DDS3D:
        """Published setting for 8 views: that of DDS, without noise; see :data:`PAPER_LAM`."""
        published = {"noise_free": True, "lam": PAPER_LAM, "rho": PAPER_RHO}
        made = super().paper(nfe, **{**published, **changes})
        assert isinstance(made, cls)
        return made

    @classmethod
    def released(cls, nfe: int = 50, **changes: object) -> DDS3D:
        """Setting of the authors' code: as published, with the step of :meth:`DDS.released`."""
        made = super().released(nfe, **changes)
        assert isinstance(made, cls)
        return made

    def penalty(self, problem: Problem, prior: ScorePrior) -> tuple[float, float]:
        """Weights of the total variation and of ADMM's coupling, for an operator of unit norm.

        Raises
        ------
        SolverError
            If the first is to follow from a noise level that is not positive.
        """
        difference = DIFFERENCE * prior.contract.level
        lam = self.lam
        if lam is None:
            if not problem.noise_std > 0:
                raise SolverError(
                    f"{type(self).__name__} needs a positive noise level, got {problem.noise_std}; or set lam"
                )
            lam = problem.noise_std**2 / (problem.norm**2 * difference)
        return lam, lam / difference if self.rho is None else self.rho

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
            Samples ``(B, D, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's domain is not a volume or its adjoint not matched, a noise level is needed and
            not positive, or a value stops being finite.
        """
        check_needs(self, problem, prior)
        name = type(self).__name__
        if self.gamma is None and not self.noise_free and not problem.noise_std > 0:
            raise SolverError(
                f"{name} needs a positive noise level, got {problem.noise_std}; or set gamma or noise_free"
            )
        lam, rho = self.penalty(problem, prior)
        variation = ThroughPlaneTV(lam / rho, problem.adjoint_y) if lam > 0 else None
        rho *= problem.norm**2
        solve = cg_of_slices if lam == 0 and slices_apart(problem) else cg_of_volumes
        sigmas = self.levels(prior, problem.noise_std)
        x = sigmas[0] * noise(0)
        if self.start == "warm":
            x = x + unfolded_volume(problem)
        for index in range(self.nfe):
            sigma, lower = sigmas[index], sigmas[index + 1]
            denoised, error_variance = self._denoise(prior, x, sigma, index)
            eps = (x - denoised) / sigma
            if self.step == "renoise" and self.eta > 0:
                error = self.eta * math.sqrt(error_variance)
                denoised = denoised + error * noise(self.nfe + index + 1)
            # The x-update of ADMM, by conjugate gradients.
            normal, right = coupled(problem, variation, rho)
            if self.noise_free:
                x = solve(normal, right.expand_as(denoised), denoised, self.cg_iterations)
            else:
                gamma = self.weight(sigma, problem.noise_std)
                condition = 1 + gamma * (problem.norm**2 + (0 if variation is None else 4 * rho))
                steps = cg_steps(condition, self.cg_tolerance, self.cg_iterations)
                x = _towards(denoised, normal, right, gamma, steps, solve)
            if variation is not None:
                variation.update(x)
            direction, fresh = self.next_level(sigma, lower)
            if direction > 0:
                x = x + direction * eps
            if fresh > 0:
                x = x + fresh * noise(index + 1)
            check_finite(x, index, name)
            if on_step is not None:
                on_step(index + 1, self.nfe)
        return Solution(x, self.nfe)

    def _denoise(self, prior: ScorePrior, x: Tensor, sigma: float, index: int) -> tuple[Tensor, float]:
        """Denoised volume, and the mean square error that is left in it."""
        return denoise_slices(prior, x, sigma, self.slice_batch), prior.error_variance(sigma)


class ThroughPlaneTV:
    """ADMM's variables for ``lam sum |Dz x|``, zero at first: the differences z, and the scaled dual w.

    Parameters
    ----------
    threshold
        ``lam / rho``, in the units of the image.
    like
        A volume ``(D, H, W)``.
    """

    def __init__(self, threshold: float, like: Tensor) -> None:
        self.threshold = threshold
        self.difference = self.dual = torch.zeros_like(like[1:])

    def pull(self) -> Tensor:
        """``Dz^H (z - w)``."""
        return through_plane_adjoint(self.difference - self.dual)

    def update(self, x: Tensor) -> None:
        """``z <- S(Dz x + w)``, the soft threshold, and ``w <- w + Dz x - z``."""
        moved = through_plane(x) + self.dual
        length = moved.abs()
        shrunk = (length - self.threshold).clamp_min(0) / length.clamp_min(torch.finfo(length.dtype).tiny)
        self.difference = shrunk * moved
        self.dual = moved - self.difference


def through_plane(x: Tensor) -> Tensor:
    """Differences between neighbouring slices, ``(..., D, H, W)`` to ``(..., D - 1, H, W)``."""
    return x[..., 1:, :, :] - x[..., :-1, :, :]


def through_plane_adjoint(g: Tensor) -> Tensor:
    """Adjoint of :func:`through_plane`."""
    x = g.new_zeros(*g.shape[:-3], g.shape[-3] + 1, *g.shape[-2:])
    x[..., 1:, :, :] += g
    x[..., :-1, :, :] -= g
    return x


def coupled(problem: Problem, variation: ThroughPlaneTV | None, rho: float) -> tuple[Matrix, Tensor]:
    """``A^H A + rho Dz^H Dz`` and ``A^H y + rho Dz^H (z - w)``, of ADMM's update of x."""
    data = problem.operator.normal
    if variation is None:
        return data, problem.adjoint_y
    return (
        lambda v: torch.add(data(v), through_plane_adjoint(through_plane(v)), alpha=rho),
        problem.adjoint_y + rho * variation.pull(),
    )


def _towards(
    denoised: Tensor, normal: Matrix, right: Tensor, gamma: float, steps: int, solve: Solve
) -> Tensor:
    """Conjugate gradients on ``(I + gamma H) x = denoised + gamma b`` from the denoised volume."""
    if gamma == 0:
        return denoised
    # Solved for the correction to the denoised volume: the same iterates, from a start at zero.
    misfit = gamma * (right - normal(denoised))
    return denoised + solve(lambda v: torch.add(v, normal(v), alpha=gamma), misfit, None, steps)


def cg_of_slices(matrix: Matrix, b: Tensor, x0: Tensor | None, steps: int) -> Tensor:
    """Conjugate gradients with step sizes of its own for every slice, for a matrix that keeps them apart."""
    return cg(matrix, b, x0, max_iter=steps).x


def cg_of_volumes(matrix: Matrix, b: Tensor, x0: Tensor | None, steps: int) -> Tensor:
    """Conjugate gradients with step sizes of its own for every volume of the batch."""
    size = b.shape[-3:-1]

    def flat(v: Tensor) -> Tensor:
        return matrix(v.unflatten(-2, size)).flatten(-3, -2)

    start = None if x0 is None else x0.flatten(-3, -2)
    return cg(flat, b.flatten(-3, -2), start, max_iter=steps).x.unflatten(-2, size)


def slices_apart(problem: Problem) -> bool:
    """Whether the data of a slice know of no other slice: ``A^H A`` commutes with a factor a slice."""
    normal, like = problem.operator.normal, problem.adjoint_y
    x = seeded_noise(tuple(like.shape), like.dtype, seed=0).to(like.device)
    factors = torch.linspace(1, 2, len(like), dtype=x.real.dtype, device=x.device)[:, None, None]
    scaled = factors * normal(x)
    difference = torch.linalg.vector_norm(normal(factors * x) - scaled)
    return bool(difference <= 1e-4 * torch.linalg.vector_norm(scaled))


def unfolded_volume(problem: Problem) -> Tensor:
    """:attr:`Problem.unfolded`, for operators that mix slices too."""
    if slices_apart(problem):
        return problem.unfolded
    return cg_of_volumes(problem.operator.normal, problem.adjoint_y, None, WARM_START_STEPS)


def denoise_slices(prior: ScorePrior, x: Tensor, sigma: float, at_once: int) -> Tensor:
    """Denoise the slices of volumes ``(B, D, H, W)``, so many at once."""
    parts = x.flatten(0, -3).split(at_once)
    return torch.cat([prior.denoise(part, sigma) for part in parts]).reshape(x.shape)


def check_penalty(solver: object, lam: float | None, rho: float | None) -> None:
    """Refuse a negative weight of the total variation, and a coupling that is not positive.

    Raises
    ------
    SolverError
        Naming the solver, the setting, and what it is.
    """
    name = type(solver).__name__
    if lam is not None and not 0 <= lam < math.inf:
        raise SolverError(f"{name}: lam must not be negative, got {lam}")
    if rho is not None and not 0 < rho < math.inf:
        raise SolverError(f"{name}: rho must be positive, got {rho}")
