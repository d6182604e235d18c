"""Filtered back-projection, or whatever other formula inverts an operator without iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from priors.base import ScorePrior
from recon.solvers.base import KeyedNoise, Needs, Problem, Solution, check_finite, check_needs


@dataclass(frozen=True)
class FilteredBackprojection:
    """The operator's own inversion formula (:meth:`operators.base.LinearOperator.direct_inverse`).

    For tomography that is filtered back-projection. It weighs all data alike.

    Parameters
    ----------
    filter
        Window of the ramp filter: ``"ram-lak"`` (none), ``"shepp-logan"``, ``"cosine"``, ``"hamming"`` or
        ``"hann"``, from sharp and noisy to smooth.
    """

    needs: ClassVar[Needs] = Needs(prior=False, matched_adjoint=False, direct=True)

    filter: str = "ram-lak"

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
        OperatorError
            If the operator has no inversion formula, or there is no such filter.
        """
        check_needs(self, problem, prior)
        x = problem.operator.direct_inverse(problem.y, self.filter)
        check_finite(x, 0, "FilteredBackprojection")
        if on_step is not None:
            on_step(1, 1)
        return Solution(x.expand(len(noise.samples), *x.shape), 0)
