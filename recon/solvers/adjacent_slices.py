"""Slices one after the other, each given the neighbour that its own chain drew before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators.errors import OperatorError
from priors.base import ScorePrior
from recon.solvers.base import KeyedNoise, Needs, Problem, Solution, SolverError, check_at_least
from recon.solvers.dds import DDS, DataStep, DataTerm

DIFFERENCE = 0.03
"""Scale of the differences between neighbouring slices that is assumed by default, in levels of the prior.

Fitted to pixels of the body in four series of chest CT with soft kernels: 0.024 to 0.031 in units of water,
where the prior's level is 0.82, at slice distances of 1.25, 2.5 and 8 mm, with a ``tail`` of 0.8 to 1.6.
"""


@dataclass(frozen=True)
class AdjacentSlices(DDS):
    """Decomposed diffusion sampling of a volume slice by slice, each slice conditioned on its neighbour.

    A neighbour that has been drawn is a measurement of this slice whose noise is the difference between the
    two. So a slice is sampled as :class:`~recon.solvers.dds.DDS` does, from the data of its own stacked with
    that measurement. Every sample is a chain that carries its own neighbours: conditioned on their mean
    instead, the spread would come out too small.

    Parameters
    ----------
    nfe, cg_iterations, cg_tolerance, early_iterations, gamma, eta, sigma_max, sigma_min, start, noise_free,
    schedule, rho, step
        As for :class:`~recon.solvers.dds.DDS`; ``nfe`` are the evaluations of every slice in a sweep.
    difference
        Scale b of the differences between neighbours, per real component and in the units of the prior's
        images. ``None``: :data:`DIFFERENCE` times the level of the prior's images. Infinite: slice by slice.
    tail
        Degrees of freedom v of their distribution, Student's. Near 1, as in anatomy, most pixels hardly
        differ and some do much, which then are not held; infinite: the normal distribution, of standard
        deviation b.
    sweeps
        How often to go through the volume. The first time a slice knows the one before. Each further time,
        backwards and forwards in turn, it is drawn again given both neighbours.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    One sweep draws from ``p(x_1 | y_1) p(x_2 | x_1, y_2) p(x_3 | x_2, y_3) ...``: what a slice says reaches
    those after it only. With more of them this is Gibbs sampling (Geman & Geman, IEEE Trans. Pattern Anal. 6,
    1984) of the volumes whose density is that of the slices times that of the differences.

    Student's distribution is a mixture of normal ones (Andrews & Mallows, J. R. Stat. Soc. B 36, 1974), so
    the difference of a pixel has a variance of its own. At every noise level the data term holds the mean of
    its inverse given the difference e that the level's estimate has: ``(v + k) / (v b^2 + |e|^2)`` with k
    real components.

    A neighbour is weighed against the denoised image by the variance v that :meth:`ScorePrior.error_variance`
    tells of its error. The data's weight, ``sigma^2 / s^2``, trusts the denoised image less than that, which
    is right for data alone: with it, neighbours overrule what the prior knows of a slice.
    """

    needs: ClassVar[Needs] = Needs(volume=True, noise=True)

    difference: float | None = None
    tail: float = 1.0
    sweeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, sweeps=1)
        for name in ("difference", "tail"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SolverError(f"{type(self).__name__}: {name} must be positive, got {value}")

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one sample of the volume for every item of ``noise``.

        Returns
        -------
        Solution
            Samples ``(B, D, H, W)`` in the prior's units.

        Raises
        ------
        SolverError
            If the operator's domain is not a volume, its slices are not measured each on its own, its adjoint
            is not matched, the noise level is not positive, or a value stops being finite.
        """
        self.check(problem, prior)
        depth = problem.operator.domain_shape[0]
        try:
            slices = [problem.of_slice(index) for index in range(depth)]
        except OperatorError as error:
            raise SolverError(
                f"{type(self).__name__} needs slices measured each on its own: {error}"
            ) from None
        drawn: dict[int, Tensor] = {}
        turns = [(k, n if k % 2 == 0 else depth - 1 - n) for k in range(self.sweeps) for n in range(depth)]
        for turn, (sweep, index) in enumerate(turns):

            def report(done: int, steps: int, turn: int = turn) -> None:
                if on_step is not None:
                    on_step(turn * steps + done, len(turns) * steps)

            part = slices[index]
            neighbours = [drawn[k] for k in (index - 1, index + 1) if k in drawn]
            try:
                drawn[index] = self.descend(
                    part.noise_std,
                    prior,
                    noise.part(f"{sweep}/{index}", part.operator.domain_shape),
                    self.conditioned(part, prior, neighbours),
                    part.unfolded if self.start == "warm" else None,
                    report,
                )
            except SolverError as error:
                raise SolverError(f"slice {index}: {error}") from None
        return Solution(torch.stack([drawn[k] for k in range(depth)], dim=1), self.sweeps * self.nfe)

    def conditioned(self, problem: Problem, prior: ScorePrior, neighbours: Sequence[Tensor]) -> DataStep:
        """Data consistency of a slice with its data and its neighbours, ``(B, H, W)`` each."""
        term, variance = DataTerm.of(problem), problem.noise_std**2
        scale = DIFFERENCE * prior.contract.level if self.difference is None else self.difference
        if not neighbours or scale == math.inf:
            return self.data_consistency(problem, prior)
        components = 2 if problem.adjoint_y.is_complex() else 1
        # The largest there can be, and not the largest there is, so that no item depends on its batch.
        most = len(neighbours) * float(self.precision(torch.zeros(()), scale, components))

        def step(denoised: Tensor, sigma: float) -> Tensor:
            share = variance
            if not self.noise_free:
                gamma = self.weight(sigma, problem.noise_std)
                # What multiplies all of the term is gamma.
                share = prior.error_variance(sigma) / gamma if gamma > 0 else 0.0
            weights = [share * self.precision(denoised - x, scale, components) for x in neighbours]
            total = torch.stack(weights).sum(0)
            pull = sum(weight * x for weight, x in zip(weights, neighbours, strict=True))
            largest = term.largest + share * most
            both = DataTerm(lambda v: term.matrix(v) + total * v, term.right + pull, largest, term.axes)
            return self.towards(denoised, sigma, problem.noise_std, both)

        return step

    def precision(self, difference: Tensor, scale: float, components: int) -> Tensor:
        """Mean of one over the variance of each pixel's difference, given that difference."""
        if self.tail == math.inf:
            return torch.full_like(difference.real, 1 / scale**2)
        square = difference.abs().square()
        return (self.tail + components) / (self.tail * scale**2 + square)
