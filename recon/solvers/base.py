"""What a solver is given and what it gives back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from operators.base import LinearOperator, seeded_noise
from priors.base import Contract, ScorePrior
from priors.level import image_level
from recon.errors import ReconError
from recon.solvers.cg import cg, mixed_axes

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

    def of_slice(self, index: int) -> Problem:
        """Problem of one slice of a volume, where slices are measured each on its own.

        Raises
        ------
        OperatorError
            If they are not.
        """
        return Problem(self.y[index], self.operator.of_slice(index), self.noise_std)

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
    def mixed_axes(self) -> int:
        """Last axes of the domain that the data mix: two, if slices or coils are measured each on its own."""
        return mixed_axes(self.operator)

    @cached_property
    def unfolded(self) -> Tensor:
        """Image after :data:`WARM_START_STEPS` conjugate-gradient steps on ``A^H A x = A^H y``."""
        return cg(self.operator.normal, self.adjoint_y, max_iter=WARM_START_STEPS, axes=self.mixed_axes).x

    @cached_property
    def unfolded_noise(self) -> Tensor:
        """What :attr:`unfolded` would be if the data were noise alone, which is drawn the same every time."""
        z = seeded_noise(tuple(self.y.shape), self.y.dtype, seed=0).to(self.y.device)
        level = math.sqrt(2) * self.noise_std if z.is_complex() else self.noise_std
        return replace(self, y=level * z).unfolded

    @cached_property
    def level(self) -> float:
        """Level of the unfolded image (:func:`priors.level.image_level`); of one a coil, their RMS."""
        return float(image_level(self.unfolded).square().mean().sqrt()) or 1.0

    @cached_property
    def gain(self) -> float:
        """Root mean square of the operator's singular values, by what it does to an image of white noise."""
        image = self.adjoint_y
        z = seeded_noise(tuple(image.shape), image.dtype, seed=0).to(image.device)
        return float(torch.linalg.vector_norm(self.operator(z)) / torch.linalg.vector_norm(z))


@dataclass(frozen=True)
class Solution:
    """Samples ``(B, *domain_shape)`` with the number of network evaluations each of them took."""

    samples: Tensor
    nfe: int


@dataclass(frozen=True)
class Needs:
    """What a solver cannot do without; :func:`check_needs` refuses the rest.

    Parameters
    ----------
    prior
        A score prior; classical methods need none.
    gradient
        A prior that can be differentiated (its vector-Jacobian product).
    matched_adjoint
        An operator whose adjoint is the exact one.
    noise
        A positive noise level of the measurement.
    max_norm
        Largest operator norm at which it is stable.
    projection
        An operator with ``A A^H`` a projection, so that what was measured can be replaced: Fourier
        coefficients or pixels of one coil, or of each coil on its own.
    images
        Kinds of images, ``"complex"`` and ``"real"``.
    volume
        An operator on volumes, ``(D, H, W)``.
    equal_weights
        Data that are not weighted by their noise, where that differs much from one datum to another: weights
        make the misfit flat where they are small, and a step along its gradient gets nowhere there.
    direct
        Nothing but the operator's ``direct_inverse``, which is linear: neither weights nor scale nor the
        operator's norm change the image, so that none of them has to be computed.
    """

    prior: bool = True
    gradient: bool = False
    matched_adjoint: bool = True
    noise: bool = False
    max_norm: float | None = None
    projection: bool = False
    images: tuple[str, ...] = ("complex", "real")
    volume: bool = False
    equal_weights: bool = False
    direct: bool = False


class Solver(Protocol):
    """Draws posterior samples; a frozen dataclass whose fields are its settings.

    ``sample`` begins with :func:`check_needs`. Noise comes from ``noise(step)`` alone, each step number used
    once, so that samples are reproducible one by one.
    """

    needs: ClassVar[Needs]

    def sample(
        self,
        problem: Problem,
        prior: Any,
        noise: KeyedNoise,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Solution:
        """Draw one sample for every item of ``noise``; call ``on_step(done, total)`` after every step."""


def check_at_least(solver: Solver, **lowest: int) -> None:
    """Refuse settings below their lowest values, and those that are NaN.

    Raises
    ------
    SolverError
        Naming the solver, the first such setting, its lowest value, and what it is.
    """
    for name, low in lowest.items():
        value = getattr(solver, name)
        if not value >= low:
            raise SolverError(f"{type(solver).__name__}: {name} must be at least {low}, got {value}")


def check_positive(solver: Solver, *names: str) -> None:
    """Refuse settings that are neither ``None`` nor positive and finite.

    Raises
    ------
    SolverError
        Naming the solver, the first such setting, and what it is.
    """
    for name in names:
        value = getattr(solver, name)
        if value is not None and not 0 < value < math.inf:
            raise SolverError(f"{type(solver).__name__}: {name} must be positive, got {value}")


def check_choices(solver: Solver, **known: tuple[str, ...]) -> None:
    """Refuse settings that are none of the known words.

    Raises
    ------
    SolverError
        Naming the solver, the first such setting, the words it may be, and what it is.
    """
    for name, words in known.items():
        value = getattr(solver, name)
        if value not in words:
            raise SolverError(f"{type(solver).__name__}: {name} is one of {', '.join(words)}, not {value!r}")


def check_needs(solver: Solver, problem: Problem, prior: ScorePrior | None) -> None:
    """Refuse a problem or a prior that a solver cannot work with.

    Raises
    ------
    SolverError
        Naming the solver, what it needs, and what it got.
    """
    name, needs, operator = type(solver).__name__, solver.needs, problem.operator
    if needs.prior and prior is None:
        raise SolverError(f"{name} needs a prior")
    if needs.gradient and prior is not None and not prior.differentiable:
        raise SolverError(f"{name} needs a prior that can be differentiated; {prior.contract.name!r} cannot")
    if needs.volume and len(operator.domain_shape) != 3:
        raise SolverError(
            f"{name} reconstructs volumes (D, H, W), and the images of {type(operator).__name__} have shape "
            f"{operator.domain_shape}"
        )
    if prior is not None and prior.contract.slices > 1:
        _check_stack(name, needs, operator, prior.contract)
    if needs.matched_adjoint and not operator.matched_adjoint:
        raise SolverError(f"{name} needs an operator with a matched adjoint")
    if needs.noise and not problem.noise_std > 0:
        raise SolverError(f"{name} needs a positive noise level, got {problem.noise_std}")
    kind = "complex" if problem.y.is_complex() else "real"
    if kind not in needs.images:
        raise SolverError(f"{name} works on {needs.images[0]} images only, and these are {kind}")
    if needs.projection and not _is_projection(problem):
        raise SolverError(
            f"{name} replaces what was measured, which needs an operator whose A A^H is a projection "
            f"(a masked Fourier transform of single coils), not {type(operator).__name__}"
        )
    # Power iteration approaches the norm from below, so the bound has a margin for rounding only.
    if needs.max_norm is not None and problem.norm > needs.max_norm * (1 + 1e-4):
        raise SolverError(
            f"{name} is stable up to an operator norm of {needs.max_norm:.4g}, and this one's is "
            f"{problem.norm:.4g}: divide operator and measurement by it"
        )


def _check_stack(name: str, needs: Needs, operator: LinearOperator, contract: Contract) -> None:
    """Refuse a prior on stacks of slices where the images are none, though a batch can have their shape."""
    if needs.volume:
        raise SolverError(
            f"{name} denoises a volume slice by slice, and prior {contract.name!r} knows stacks of "
            f"{contract.slices} slices only"
        )
    if len(operator.domain_shape) != 3 or operator.domain_shape[0] != contract.slices:
        raise SolverError(
            f"prior {contract.name!r} knows stacks of slices ({contract.slices}, H, W), and the images of "
            f"{type(operator).__name__} have shape {operator.domain_shape}"
        )


def _is_projection(problem: Problem) -> bool:
    """Whether ``A A^H A x = A x``, tried on a random image."""
    operator = problem.operator
    y = operator(seeded_noise(operator.domain_shape, operator.dtype, seed=0).to(problem.y.device))
    again = operator(operator.adjoint(y))
    return bool(torch.linalg.vector_norm(again - y) <= 1e-4 * torch.linalg.vector_norm(y))


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
        Of an item: ``(H, W)``, ``(C, H, W)`` for coil images, ``(D, H, W)`` for a volume.
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
        """Noise of a step, ``(B, *shape)``."""
        return torch.stack([self._draw(sample, step) for sample in self.samples]).to(self.device)

    def part(self, name: str, shape: tuple[int, ...]) -> KeyedNoise:
        """Noise of the same items for a part of what is reconstructed, independent of that of other parts."""
        return replace(self, key=f"{self.key}#{name}", shape=shape)

    def _draw(self, sample: int, step: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}|{self.key}|{sample}|{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        if not self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype)
        real = torch.float64 if self.dtype == torch.complex128 else torch.float32
        return torch.view_as_complex(torch.randn((*self.shape, 2), generator=generator, dtype=real))


def data_noise(operator: LinearOperator, draw: Callable[[], Tensor]) -> Tensor:
    """Standard noise of the operator's range, put together from as many draws of image noise as it takes."""
    size, image = math.prod(operator.range_shape), math.prod(operator.domain_shape)
    parts = [draw().flatten(1) for _ in range(-(-size // image))]
    return torch.cat(parts, dim=1)[:, :size].unflatten(1, operator.range_shape)


def check_finite(x: Tensor, step: int, what: str) -> None:
    """Raise :class:`SolverError` naming the step if ``x`` holds a NaN or an infinity."""
    # One reduction: a sum is finite only if every term is (overflow counts as divergence too).
    parts = torch.view_as_real(x) if x.is_complex() else x
    if not bool(torch.isfinite(parts.sum())):
        raise SolverError(
            f"{what} produced values that are not finite at step {step}: a step size too large for the "
            "operator's norm or the data's scale, or a prior beyond its range"
        )
