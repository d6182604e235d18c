"""What a solver is given and what it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.base import LinearOperator
from priors.base import ScorePrior
from recon.errors import ReconError
from recon.solvers.cg import cg

WARM_START_STEPS = 10
"""Conjugate-gradient steps of a first image: enough to unfold it, too few to fit the noise."""


class SolverError(ReconError):
    """A solver cannot start, or has diverged; the message names the step."""


@dataclass(frozen=True)
class Problem:
    """A linear inverse problem ``y = A x + n`` in the units of the prior.

    Parameters
    ----------
    y
        Measurement, of the operator's ``range_shape``.
    operator
        Forward operator with a matched adjoint.
    noise_std
        Standard deviation of ``n`` per real component.
    """

    y: Tensor
    operator: LinearOperator
    noise_std: float

    # What follows is the same for every sample, and computed when the first one asks for it.

    @cached_property
    def adjoint_y(self) -> Tensor:
        """``A^H y``, of the operator's ``domain_shape``."""
        return self.operator.adjoint(self.y)

    @cached_property
    def norm(self) -> float:
        """Norm of the operator by ten power iterations, near enough for a bound."""
        return self.operator.norm(max_iterations=10)

    @cached_property
    def unfolded(self) -> Tensor:
        """Image after :data:`WARM_START_STEPS` conjugate-gradient steps on ``A^H A x = A^H y``."""
        return cg(self.operator.normal, self.adjoint_y, max_iter=WARM_START_STEPS).x


@dataclass(frozen=True)
class Solution:
    """Samples ``(B, H, W)`` with the number of network evaluations each of them took."""

    samples: Tensor
    nfe: int


class Solver(Protocol):
    """Draws posterior samples; a frozen dataclass whose fields are its settings."""

    def sample(
        self,
        problem: Problem,
        prior: ScorePrior,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one sample for every item of ``noise``; call ``on_step(done, total)`` after every step."""


def settings_of(solver: Any) -> dict[str, Any]:
    """Name and settings of a solver, JSON-ready, for provenance."""
    return {"name": type(solver).__name__, **{f.name: getattr(solver, f.name) for f in fields(solver)}}


@dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise that depends on nothing but a seed, a key, the sample's index and the step.

    Drawn on the CPU item by item, so neither the batch it is drawn in nor the device changes it.

    Parameters
    ----------
    seed
        The user's seed.
    key
        What is reconstructed, such as ``"file_stem/slice"``.
    samples
        Index of each item of the batch.
    shape
        ``(H, W)``.
    dtype, device
        Of the result; complex noise has ``E|z|^2 = 2``.
    """

    seed: int
    key: str
    samples: Sequence[int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, step: int) -> Tensor:
        """Noise of a step, ``(B, H, W)``."""
        return torch.stack([self._draw(sample, step) for sample in self.samples]).to(self.device)

    def _draw(self, sample: int, step: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}|{self.key}|{sample}|{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        if not self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype)
        real = torch.float64 if self.dtype == torch.complex128 else torch.float32
        return torch.view_as_complex(torch.randn((*self.shape, 2), generator=generator, dtype=real))


def check_finite(x: Tensor, step: int, what: str) -> None:
    """Raise :class:`SolverError` naming the step if ``x`` holds a NaN or an infinity."""
    # One reduction: a sum is finite only if every term is (overflow counts as divergence too).
    if not bool(torch.isfinite(x.abs().sum())):
        raise SolverError(
            f"{what} produced values that are not finite at step {step}; the operator's norm or the "
            "data's scale is likely wrong"
        )
