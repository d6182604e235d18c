"""The adjoint alone: what the measurement shows before anything is reconstructed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from priors.base import ScorePrior
from recon.solvers.base import KeyedNoise, Needs, Problem, Solution, check_finite, check_needs


@dataclass(frozen=True)
class ZeroFilled:
    """Zero-filled image, ``a A^H y`` with the factor ``a`` that fits the data best.

    ``a = Re <A b, y> / |A b|^2`` for ``b = A^H y`` minimises ``|y - a A b|``: the first step of steepest
    descent. For the masked Fourier transform of a single coil it is 1, and the image the usual zero-filled
    one; with coil maps or on a trajectory it makes up for the norm of the operator, so that the image has the
    units of a reconstruction. It is the same whatever the scale of operator and data.
    """

    needs: ClassVar[Needs] = Needs(prior=False, matched_adjoint=False)

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior | None,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Reconstruct; nothing is random, so every item of ``noise`` gets the same image.

        Returns
        -------
        Solution
            Samples ``(B, *domain_shape)``, without network evaluations.

        Raises
        ------
        SolverError
            If a value is not finite.
        """
        check_needs(self, problem, prior)
        b = problem.adjoint_y
        predicted = problem.operator(b)
        energy = predicted.abs().square().sum()
        fit = (predicted.conj() * problem.y).sum().real
        # Without energy there is nothing to fit, and b is as good as any multiple of it.
        x = b * torch.where(energy > 0, fit / energy, 1.0)
        check_finite(x, 0, "ZeroFilled")
        if on_step is not None:
            on_step(1, 1)
        return Solution(x.expand(len(noise.samples), *x.shape), 0)
