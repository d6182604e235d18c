"""DDS-3D: volumes with a prior of slices and total variation across them (Chung, Lee & Ye, ICLR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from priors.base import ScorePrior
from recon.solvers.base import Needs, Problem, SolverError, check_at_least, check_positive
from recon.solvers.dds import DDS, DataStep, DataTerm

LEAST_DIFFERENCE = 0.003
"""Least mean difference between neighbouring slices that is assumed, in levels of the prior.

Slices that are all alike have none, and then nothing would bound the weight of the total variation.
"""

PAPER_RHO = 10 / 390
PAPER_LAM = 0.04 / 390
"""The paper's weights for 8 views of images from 0 to 1, brought to an operator of unit norm.

The released projector's normal operator has a norm of 390: 8 views of 256 x 256 pixels of unit side, and an
adjoint that is scaled by ``pi / (2 * 8)``.
"""


@dataclass(frozen=True)
class DDS3D(DDS):
    """Decomposed diffusion sampling of a volume ``(D, H, W)`` with a prior that knows its slices.

    As :class:`DDS`, but for what the data are given to: the prior denoises every slice, and then one
    iteration of ADMM brings the denoised volume ``x^`` towards the minimum of
    ``|x - x^|^2 / 2 + gamma (|A x - y|^2 / 2 + lam |A|^2 sum |Dz x|)``, where ``Dz x`` are the differences
    between neighbouring slices and ``|A|`` is the norm of the operator. ADMM's variables are kept from one
    noise level to the next, so that one iteration a level is enough.

    By default the total variation is the prior ``exp(-|Dz x| / b)`` of differences, whose scale b is that of
    a first image, and it stands beside a denoised volume whose error has the variance v that
    :meth:`ScorePrior.error_variance` tells: its weight is ``v / b``. The data's, ``sigma^2 / s^2``, trusts
    the denoised volume ``sigma^2 / v`` times less, tenfold and more, which serves data well. A total
    variation that is weighted alike overrules what the prior knows of a slice. See
    ``docs/what-matters.md``.

    Parameters
    ----------
    nfe, gamma, eta, sigma_max, sigma_min, start, schedule, rho, step
        As for :class:`DDS`. An ``nfe`` of 30 is 30 evaluations of every slice.
    cg_iterations, cg_tolerance, early_iterations
        As for :class:`DDS`; the condition number is ``1 + gamma |A|^2 (1 + 4 coupling)``.
    noise_free
        Conjugate gradients on ``(A^H A + c |A|^2 Dz^H Dz) x = A^H y + c |A|^2 Dz^H (z - w)`` from the
        denoised volume instead, as in the paper, for data without noise; c is the coupling, z and w are
        ADMM's variables.
    lam
        Weight of the total variation beside the data term of an operator of unit norm, the same at all noise
        levels. ``None``: ``v / (gamma |A|^2 b)``, and with ``noise_free`` ``s^2 / (|A|^2 b)``, where s is the
        measurement's noise level. Zero: the slices are reconstructed one by one, as DDS does.
    coupling
        Weight of ADMM's coupling (the paper's rho), likewise. It has no part in what is minimised, only in
        the way there. ``None``: ``lam / b``, so that differences below b become zero.
    difference
        Scale b of the differences between neighbouring slices, their mean for real images, in the units of
        the prior's images. ``None``: that of a conjugate-gradient image, less what noise has in it
        (:func:`mean_difference`), :data:`LEAST_DIFFERENCE` times the level of the prior's images at the
        least. So it follows the distance of the slices.
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
    coupling: float | None = None
    difference: float | None = None
    slice_batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "difference")
        check_penalty(self, self.lam, self.coupling)
        check_at_least(self, slice_batch=1)

    @classmethod
    def paper(cls, nfe: int = 49, **changes: object) -> DDS3D:
        """Published setting for 8 views: that of DDS, without noise; see :data:`PAPER_LAM`."""
        published = {"noise_free": True, "lam": PAPER_LAM, "coupling": PAPER_RHO}
        made = super().paper(nfe, **{**published, **changes})
        assert isinstance(made, cls)
        return made

    @classmethod
    def released(cls, nfe: int = 50, **changes: object) -> DDS3D:
        """Setting of the authors' code: as published, with the step of :meth:`DDS.released`."""
        made = super().released(nfe, **changes)
        assert isinstance(made, cls)
        return made

    def penalty(self, problem: Problem, prior: ScorePrior, sigma: float) -> tuple[float, float]:
        """Weights of the total variation and of ADMM's coupling at a noise level, for a norm of one.

        Raises
        ------
        SolverError
            If the first is to follow from a measurement's noise level that is not positive.
        """
        b = mean_difference(problem, prior) if self.difference is None else self.difference
        lam = self.lam
        if lam is None and self.noise_free:
            if not problem.noise_std > 0:
                raise SolverError(
                    f"{type(self).__name__} needs a positive noise level, got {problem.noise_std}; or set lam"
                )
            lam = problem.noise_std**2 / (problem.norm**2 * b)
        elif lam is None:
            gamma = self.weight(sigma, problem.noise_std)
            lam = prior.error_variance(sigma) / (gamma * problem.norm**2 * b) if gamma > 0 else 0.0
        return lam, lam / b if self.coupling is None else self.coupling

    def denoise(self, prior: ScorePrior, x: Tensor, sigma: float, index: int) -> tuple[Tensor, float]:
        """Denoised volume, and the mean square error that is left in it."""
        return denoise_slices(prior, x, sigma, self.slice_batch), prior.error_variance(sigma)

    def data_consistency(self, problem: Problem, prior: ScorePrior) -> DataStep:
        """One iteration of ADMM a noise level."""
        if self.lam == 0 or problem.operator.domain_shape[0] == 1:
            return super().data_consistency(problem, prior)
        variation = ThroughPlaneTV(problem.adjoint_y)

        def step(denoised: Tensor, sigma: float) -> Tensor:
            lam, rho = self.penalty(problem, prior, sigma)
            x = self.towards(
                denoised, sigma, problem.noise_std, coupled(problem, variation, rho * problem.norm**2)
            )
            if rho > 0:
                variation.update(x, lam / rho)
            return x

        return step


class ThroughPlaneTV:
    """ADMM's variables for ``lam sum |Dz x|``, zero at first: the differences z, and the scaled dual w.

    Parameters
    ----------
    like
        A volume ``(D, H, W)``.
    """

    def __init__(self, like: Tensor) -> None:
        self.difference = self.dual = torch.zeros_like(like[1:])

    def pull(self) -> Tensor:
        """``Dz^H (z - w)``."""
        return through_plane_adjoint(self.difference - self.dual)

    def update(self, x: Tensor, threshold: float) -> None:
        """``z <- S(Dz x + w)``, the soft threshold of ``lam / rho``, and ``w <- w + Dz x - z``.

        Where both weights change from one noise level to the next and their ratio does not, as by default,
        the scaled dual keeps its share of the largest that it can be.
        """
        moved = through_plane(x) + self.dual
        length = moved.abs()
        shrunk = (length - threshold).clamp_min(0) / length.clamp_min(torch.finfo(length.dtype).tiny)
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


def mean_difference(problem: Problem, prior: ScorePrior) -> float:
    """Scale b of ``exp(-|Dz x| / b)`` for which ``|Dz x|`` has the mean of a first image, less its noise.

    The image is :attr:`Problem.unfolded`. What noise alone makes of it is tried with noise that is the same
    every time, and taken off as variances are.
    """
    found = float(through_plane(problem.unfolded).abs().mean())
    if problem.noise_std > 0:
        found = math.sqrt(max(found**2 - float(through_plane(problem.unfolded_noise).abs().mean()) ** 2, 0))
    # A number with this density has the mean b, a complex one, whose magnitude counts, 2 b.
    components = 2 if problem.unfolded.is_complex() else 1
    return max(found / components, LEAST_DIFFERENCE * prior.contract.level)


def coupled(problem: Problem, variation: ThroughPlaneTV | None, rho: float) -> DataTerm:
    """``A^H A + rho Dz^H Dz`` and ``A^H y + rho Dz^H (z - w)``, of ADMM's update of x."""
    data = DataTerm.of(problem)
    if variation is None:
        return data
    return DataTerm(
        lambda v: torch.add(data.matrix(v), through_plane_adjoint(through_plane(v)), alpha=rho),
        data.right + rho * variation.pull(),
        data.largest + 4 * rho,
        3,
    )


def denoise_slices(prior: ScorePrior, x: Tensor, sigma: float, at_once: int) -> Tensor:
    """Denoise the slices of volumes ``(B, D, H, W)``, so many at once."""
    parts = x.flatten(0, -3).split(at_once)
    return torch.cat([prior.denoise(part, sigma) for part in parts]).reshape(x.shape)


def check_penalty(solver: object, lam: float | None, coupling: float | None) -> None:
    """Refuse a negative weight of the total variation, and a coupling that is not positive.

    Raises
    ------
    SolverError
        Naming the solver, the setting, and what it is.
    """
    name = type(solver).__name__
    if lam is not None and not 0 <= lam < math.inf:
        raise SolverError(f"{name}: lam must not be negative, got {lam}")
    if coupling is not None and not 0 < coupling < math.inf:
        raise SolverError(f"{name}: coupling must be positive, got {coupling}")
