"""Simultaneous iterative reconstruction (Gilbert 1972; van der Sluis & van der Vorst 1990)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
)


@dataclass(frozen=True)
class SIRT:
    """``x <- x + C A^T R (y - A x)``, with the inverse row sums ``R`` and column sums ``C`` of ``A``.

    Regularised by stopping early. Gilbert, J. Theor. Biol. 36, 1972; with these weights it converges for any
    matrix without negative entries (van der Sluis and van der Vorst, Linear Algebra Appl. 130, 1990).

    Parameters
    ----------
    iterations
        Steps.
    nonnegative
        Set negative values to zero after every step: attenuation has none.

    Raises
    ------
    SolverError
        If there is no step.
    """

    needs: ClassVar[Needs] = Needs(prior=False, images=("real",))

    iterations: int = 200
    nonnegative: bool = True

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
            If the images are complex, the operator's adjoint is not matched, row or column sums are negative,
            or a value stops being finite.
        """
        check_needs(self, problem, prior)
        operator, y = problem.operator, problem.y
        x = torch.zeros_like(problem.adjoint_y)
        rows = operator(torch.ones_like(x))
        columns = operator.adjoint(torch.ones_like(y))
        if float(rows.min()) < 0 or float(columns.min()) < 0:
            raise SolverError(
                f"SIRT needs an operator without negative entries, such as line integrals, not "
                f"{type(operator).__name__}"
            )
        R, C = inverse(rows), inverse(columns)
        for index in range(self.iterations):
            x = x + C * operator.adjoint(R * (y - operator(x)))
            if self.nonnegative:
                x = x.clamp_min(0)
            check_finite(x, index, "SIRT")
            if on_step is not None:
                on_step(index + 1, self.iterations)
        return Solution(x.expand(len(noise.samples), *x.shape), 0)


def inverse(sums: Tensor) -> Tensor:
    """``1 / sums``; zero for rays that miss the image and pixels that no ray meets."""
    negligible = sums <= 1e-6 * sums.max()
    return torch.where(negligible, 0.0, 1 / sums.masked_fill(negligible, 1.0))
