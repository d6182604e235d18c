"""Conjugate gradients on the normal equations (Hestenes & Stiefel 1952), regularised by stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from priors.base import ScorePrior
from recon.solvers.base import (
    KeyedNoise,
    Needs,
    Problem,
    Solution,
    check_at_least,
    check_finite,
    check_needs,
)
from recon.solvers.cg import cg


@dataclass(frozen=True)
class CGLS:
    """Least squares ``min |A x - y|^2`` by conjugate gradients from zero, stopped before noise is fitted.

    :class:`recon.solvers.tikhonov.Tikhonov` is the same with a penalty in place of the early stop.

    Parameters
    ----------
    iterations
        Steps; fewer are smoother.

    Raises
    ------
    SolverError
        If there is no step.
    """

    needs: ClassVar[Needs] = Needs(prior=False)

    iterations: int = 15

    def __post_init__(self) -> None:
        check_at_least(self, iterations=1)

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
            If the operator's adjoint is not matched or a value is not finite.
        """
        check_needs(self, problem, prior)
        done = 0

        def normal(v: Tensor) -> Tensor:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, self.iterations)
            return problem.operator.normal(v)

        x = cg(normal, problem.adjoint_y, max_iter=self.iterations, axes=problem.mixed_axes).x
        check_finite(x, done, "CGLS")
        if on_step is not None and done < self.iterations:
            on_step(self.iterations, self.iterations)
        return Solution(x.expand(len(noise.samples), *x.shape), 0)
