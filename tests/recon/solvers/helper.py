"""Small problems, priors and noise for the tests of solvers, and what dense linear algebra says of them.

With a Gaussian prior most samplers are affine maps of their noise. `BasisNoise` gives them one unit of it at
a time, `moments_of_the_code` reads mean and covariance off the samples, and a test compares both with the
same worked out in matrices. Everything is in double precision, and of a size at which a matrix is cheap.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from operators import MulticoilMRI, SliceStack
from operators.base import LinearOperator
from priors import Contract, GaussianPrior, ScorePrior
from recon.solvers.base import KeyedNoise, Problem, Solution
from tests.operators.helper import dense

C128 = torch.complex128

Shape = tuple[int, ...]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = C128) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# Problems


def random_mask(shape: Shape, share: float = 0.5) -> Tensor:
    """Mask that samples about a share of k-space; a larger share adds to what a smaller one samples."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share


def multicoil_problem(
    shape: Shape, share: float = 0.6, noise_std: float = 0.2, coils: int = 3, dtype: torch.dtype = C128
) -> Problem:
    """Random coils, a random mask that samples a share of k-space, and data of no image in particular."""
    mask = random_mask(shape, share)
    A = MulticoilMRI(randn(coils, *shape, seed=4, dtype=dtype), mask)
    return Problem(mask * randn(coils, *shape, seed=5, dtype=dtype), A, noise_std)


def normalised_coils_problem(shape: Shape, noise_std: float = 0.2, norm: float = 1.0) -> Problem:
    """As `multicoil_problem` at a share of a half, with maps whose squares add up to ``norm`` squared."""
    mask, maps = random_mask(shape), randn(3, *shape, seed=4)
    A = MulticoilMRI(norm * maps / maps.abs().square().sum(0).sqrt(), mask)
    return Problem(mask * randn(3, *shape, seed=5), A, noise_std)


def volume_problem(
    slices: int, shape: Shape, share: float = 0.6, noise_std: float = 0.2, dtype: torch.dtype = C128
) -> Problem:
    """As `multicoil_problem`, with data of every slice of a volume."""
    single = multicoil_problem(shape, share, noise_std, dtype=dtype)
    A = SliceStack(single.operator, slices)
    y = randn(*A.range_shape, seed=5, dtype=dtype)
    return Problem(random_mask(shape, share) * y, A, noise_std)


def in_other_units(given: Problem) -> Iterator[tuple[float, Problem]]:
    """The same problem with data and operator in other units, and the factor of its image."""
    for of_data, of_operator in ((1e3, 1.0), (1.0, 50.0), (1e-3, 1e-3)):
        other = Problem(of_data * given.y, of_operator * given.operator, of_data * given.noise_std)
        yield of_data / of_operator, other


class Matrix(LinearOperator):
    """A real matrix on real images, of any norm; with another one for its adjoint it is not matched."""

    matrix: Tensor
    other: Tensor

    def __init__(self, matrix: Tensor, shape: Shape, other: Tensor | None = None) -> None:
        super().__init__(shape, (len(matrix),))
        self.register_buffer("matrix", matrix)
        self.register_buffer("other", matrix if other is None else other)
        self.matched_adjoint = other is None

    def _forward(self, x: Tensor) -> Tensor:
        return x.flatten(-2) @ self.matrix.mT

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.other).unflatten(-1, self.domain_shape)


# Priors


def gaussian_prior(shape: Shape, sigma_min: float = 0.05, dtype: torch.dtype = C128) -> GaussianPrior:
    """A random mean, and a random covariance in which every pixel knows of every other."""
    n = math.prod(shape)
    root = randn(n, n, seed=1, dtype=dtype) / math.sqrt(n)
    mean = randn(*shape, seed=2, dtype=dtype)
    return GaussianPrior(mean, covariance=root @ root.mH, sigma_min=sigma_min)


def covariance_of(prior: GaussianPrior) -> Tensor:
    """Covariance matrix of a prior that was made from one, ``(N, N)``."""
    assert prior.basis is not None
    return (prior.basis * prior.values) @ prior.basis.mH


def slicewise_covariance(prior: GaussianPrior, slices: int) -> Tensor:
    """Covariance of volumes whose slices a prior knows, and which know nothing of each other."""
    return torch.kron(torch.eye(slices, dtype=C128), covariance_of(prior))


def posterior(given: Problem, prior: GaussianPrior, rho: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean ``(N,)`` and covariance of the posterior of ``y = A (x + rho z) + n``.

    The noise then has the covariance ``s^2 I + rho^2 A A^H``.
    """
    A = dense(given.operator, given.operator.domain_shape).to(C128)
    m, C = prior.mean.flatten(), covariance_of(prior)
    noise = given.noise_std**2 * torch.eye(len(A), dtype=C128) + rho**2 * A @ A.mH
    gain = C @ A.mH @ torch.linalg.inv(A @ C @ A.mH + noise)
    return m + gain @ (given.y.flatten() - A @ m), C - gain @ A @ C


class Counting(ScorePrior):
    """White images of variance one, which counts evaluations and gives NaN at one of them, from 0 on."""

    def __init__(self, nan_at: int | None = None, contract: Contract | None = None) -> None:
        super().__init__(contract or Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


def alike_slices_problem(slices: int = 8, noise_std: float = 0.1) -> tuple[Tensor, Problem, GaussianPrior]:
    """A disc, the same in every slice, noisy and undersampled data, and a prior that knows its spectrum."""
    shape = (12, 12)
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij")
    truth = (0.4 * (v**2 + u**2 < 0.5)).to(C128).expand(slices, *shape)
    A = volume_problem(slices, shape).operator
    A = (1 / A.norm()) * A
    y = A(truth)
    noisy = y + noise_std * math.sqrt(2) * randn(*y.shape, seed=8) * (y != 0)
    spectrum = torch.fft.fft2(truth[0], norm="ortho").abs().square().clamp_min(1e-3) / 2
    return truth, Problem(noisy, A, noise_std), GaussianPrior(0 * truth[0], spectrum=spectrum)


# Noise


def keyed_noise(shape: Shape, items: Sequence[int] = (0,), dtype: torch.dtype = C128) -> KeyedNoise:
    return KeyedNoise(0, "", items, shape, dtype, torch.device("cpu"))


class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit vector each, at one step each."""

    def __init__(self, shape: Shape, steps: int) -> None:
        self.shape, self.steps = shape, steps
        self.used: list[int] = []

    def __call__(self, step: int) -> Tensor:
        assert 0 <= step < self.steps
        assert step not in self.used, "noise was used twice"
        self.used.append(step)
        n = math.prod(self.shape)
        noise = torch.zeros(1 + self.steps * n, n, dtype=C128)
        noise[1 + step * n : 1 + (step + 1) * n] = torch.eye(n)
        return noise.reshape(-1, *self.shape)


class SimultaneousNoise:
    """As `BasisNoise`, for coefficients that do not know of each other: a unit of each of them at once.

    Item ``1 + k`` has ``units``, ``(H, W)``, at step ``k``.
    """

    def __init__(self, units: Tensor, steps: int) -> None:
        self.units, self.steps = units, steps

    def __call__(self, step: int) -> Tensor:
        assert 0 <= step < self.steps
        noise = torch.zeros(1 + self.steps, *self.units.shape, dtype=self.units.dtype)
        noise[1 + step] = self.units
        return noise


# Runs


def samples_of(solver: Any, given: Problem, prior: ScorePrior, noise: Any) -> Tensor:
    """Samples from noise of any kind."""
    samples: Tensor = solver.sample(given, prior, noise).samples
    return samples


def moments_of_the_code(
    solver: Any, given: Problem, prior: ScorePrior, steps: int, all_used: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean ``(N,)`` and covariance per real component, from what the code makes of every unit of noise.

    The code may take noise at so many steps, and with ``all_used`` it has to at every one of them.
    """
    noise = BasisNoise(given.operator.domain_shape, steps)
    samples = samples_of(solver, given, prior, noise).flatten(1)
    if all_used:
        assert len(noise.used) == steps
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def solve(solver: Any, given: Problem, items: int = 1, on_step: Any = None) -> Solution:
    """Solution of a method that needs no prior."""
    noise = keyed_noise(given.operator.domain_shape, range(items), given.y.dtype)
    solution: Solution = solver.sample(given, None, noise, on_step)
    return solution
