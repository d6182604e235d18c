"""The truth solvers are held to: small problems whose posterior is known in closed form."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from operators.base import LinearOperator
from operators.errors import OperatorError
from operators.mri import MulticoilMRI
from operators.simulation import random_smooth_maps
from priors.errors import PriorError
from priors.gaussian import GaussianPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior
from recon.errors import ReconError
from recon.solvers.base import KeyedNoise, Problem, Solver, settings_of

GROUPS = 20
"""Groups of samples whose scatter gives the Monte-Carlo error."""

_SHAPE = (8, 8)


class MatrixOperator(LinearOperator):
    """A linear operator given by its matrix, for small problems.

    Parameters
    ----------
    matrix
        ``(M, N)``, real or complex, on images flattened row by row; ``N`` the pixels of ``domain_shape``.
    domain_shape, range_shape
        Shapes of one image and of one measurement.

    Raises
    ------
    ReconError
        If the matrix does not fit the shapes.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, domain_shape: Sequence[int], range_shape: Sequence[int]) -> None:
        super().__init__(domain_shape, range_shape)
        expected = (math.prod(self.range_shape), math.prod(self.domain_shape))
        if tuple(matrix.shape) != expected:
            raise ReconError(f"the matrix must have shape {expected}, got {tuple(matrix.shape)}")
        self.register_buffer("matrix", matrix.clone())

    def _forward(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - len(self.domain_shape)]
        return (x.reshape(*lead, -1) @ self.matrix.mT).reshape(*lead, *self.range_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        lead = y.shape[: y.ndim - len(self.range_shape)]
        return (y.reshape(*lead, -1) @ self.matrix.conj()).reshape(*lead, *self.domain_shape)


def strip_matrix(size: int, views: int, detectors: int) -> Tensor:
    """Parallel-beam projections of a square image as a matrix, by exact areas.

    View v looks along the angle ``(v + 1/2) pi / views``. An entry is the area that a pixel and the strip of
    a detector element have in common over the width of the strip, in pixels: the mean of the line integrals
    over the element. Elements are one pixel wide and the detector is centred.

    Returns
    -------
    Tensor
        Float64, ``(views * detectors, size * size)``.

    Notes
    -----
    Seen at angle t a unit pixel casts a trapezoid: the convolution of boxes of widths ``|cos t|`` and
    ``|sin t|``, whose integral is a sum of four half-parabolas.
    """
    centre = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = centre.repeat_interleave(size), centre.repeat(size)
    edges = torch.arange(detectors + 1, dtype=torch.float64) - detectors / 2
    rows = []
    for view in range(views):
        angle = (view + 0.5) * math.pi / views
        # A box of no width would be divided by; one of a millionth of a pixel changes nothing.
        a, b = (max(abs(width), 1e-6) for width in (math.cos(angle), math.sin(angle)))
        u = edges[:, None] - (math.cos(angle) * x + math.sin(angle) * y)
        area = sum(
            sign * (u + offset).clamp_min(0) ** 2 / (2 * a * b)
            for sign, offset in (
                (1, (a + b) / 2),
                (-1, (a - b) / 2),
                (-1, (b - a) / 2),
                (1, -(a + b) / 2),
            )
        )
        rows.append(torch.as_tensor(area).diff(dim=0))
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class TruthProblem:
    """A linear problem, the prior that is to be consulted, and the posterior that follows.

    Parameters
    ----------
    name
        What a table calls it.
    problem
        Measurement, operator and noise level.
    prior
        The prior, exact.
    truth
        Its posterior given the measurement.
    """

    name: str
    problem: Problem
    prior: GaussianPrior | GaussianMixturePrior
    truth: GaussianMixture


def truth_problem(
    name: str,
    prior: GaussianPrior | GaussianMixturePrior,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float,
) -> TruthProblem:
    """Work out the posterior of a linear problem under a prior of Gaussians.

    Parameters
    ----------
    name
        What a table is to call it.
    prior
        On images of the operator's ``domain_shape``, ``(H, W)``.
    operator
        Any linear operator small enough to be written out as a matrix.
    y
        Measurement, of the operator's ``range_shape``.
    noise_std
        Standard deviation of its noise per real component.

    Returns
    -------
    TruthProblem
        With the posterior in double precision.
    """
    mixture = prior if isinstance(prior, GaussianMixturePrior) else GaussianMixturePrior([1.0], [prior])
    matrix = dense_matrix(operator, y.dtype)
    return TruthProblem(
        name, Problem(y, operator, noise_std), prior, mixture.posterior(matrix, y.flatten(), noise_std)
    )


def dense_matrix(operator: LinearOperator, dtype: torch.dtype) -> Tensor:
    """Matrix of an operator, ``(M, N)``, from what it makes of every unit image."""
    pixels = math.prod(operator.domain_shape)
    units = torch.eye(pixels, dtype=dtype).reshape(pixels, *operator.domain_shape)
    return operator(units).reshape(pixels, -1).mT


def truth_problems() -> tuple[TruthProblem, ...]:
    """Make the problems of :func:`check_solver`: MRI- and CT-shaped, a Gaussian and a mixture prior each.

    Images are 8 x 8. The Gaussian prior is a bright disc plus a smooth random field. In the mixture there is
    a spot as well, at one of several places, and which one the data leave open: their noise was chosen so.
    MRI: complex images, four coils, half of the columns of k-space. CT: real images, strip integrals along
    five directions, the operator scaled to unit norm.
    """
    maps = random_smooth_maps(4, _SHAPE, seed=1)
    columns = torch.zeros(1, _SHAPE[1])
    columns[0, [2, 4, 5, 6]] = 1
    mri = MulticoilMRI(maps / maps.abs().square().sum(0).sqrt(), columns)
    strips = strip_matrix(_SHAPE[0], views=5, detectors=11)
    ct = MatrixOperator((strips / torch.linalg.matrix_norm(strips, 2)).float(), _SHAPE, (5, 11))

    disc = 0.5 * _spot(0, 0, width=2.2)
    phase = torch.polar(torch.ones(_SHAPE), 0.15 * torch.arange(_SHAPE[0])[:, None].expand(_SHAPE))
    smooth = _spectrum(std=0.2, cutoff=1.5)

    stripes = 0.3 * (-1.0) ** torch.arange(_SHAPE[1])

    def mixture(places: Sequence[tuple[float, float]], factor: Tensor) -> GaussianMixturePrior:
        # The first is the smoothest, so that the components differ in more than their means.
        return GaussianMixturePrior(
            [1.0] * len(places),
            [
                GaussianPrior(
                    (disc + stripes * _spot(*place, width=1.0)) * factor,
                    spectrum=_spectrum(std=0.15, cutoff=1.5 + 0.25 * k),
                )
                for k, place in enumerate(places)
            ],
        )

    two = mixture([(0, -1.5), (0, 1.5)], phase)
    three = mixture([(-2, -2), (2, 1), (-1, 2)], torch.ones(_SHAPE))
    return (
        _simulated("MRI, Gaussian", GaussianPrior(disc * phase, spectrum=smooth), mri, 0.1, seed=0),
        _simulated("MRI, two modes", two, mri, 0.1, seed=16),
        _simulated("CT, Gaussian", GaussianPrior(disc, spectrum=smooth), ct, 0.05, seed=0),
        _simulated("CT, three modes", three, ct, 0.05, seed=6),
    )


def _simulated(
    name: str,
    prior: GaussianPrior | GaussianMixturePrior,
    operator: LinearOperator,
    noise_std: float,
    seed: int,
) -> TruthProblem:
    """Make a problem from a draw of the prior, of a mixture's first component, and noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn_from = prior.components[0] if isinstance(prior, GaussianMixturePrior) else prior
    clean = operator(drawn_from.sample(1, generator)[0])
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    noise = noise_std * math.sqrt(2 if clean.is_complex() else 1) * noise
    mask = getattr(operator, "mask", None)
    return truth_problem(name, prior, operator, clean + (noise if mask is None else mask * noise), noise_std)


def _spot(row: float, column: float, width: float = 0.8) -> Tensor:
    """Gaussian of height 1 about a place, given from the centre of the image, ``(H, W)``."""
    y, x = (torch.arange(n) - (n - 1) / 2 for n in _SHAPE)
    return torch.exp(-((y[:, None] - row) ** 2 + (x - column) ** 2) / (2 * width**2))


def _spectrum(std: float, cutoff: float) -> Tensor:
    """Spectrum of a smooth random field with that standard deviation per real component, ``(H, W)``."""
    squared = [(n * torch.fft.fftfreq(n)) ** 2 for n in _SHAPE]
    shape = (1 + (squared[0][:, None] + squared[1]) / cutoff**2) ** -1.5
    return std**2 * shape / shape.mean()


@dataclass(frozen=True)
class Estimate:
    """A figure and its Monte-Carlo standard error.

    Parameters
    ----------
    value
        The figure.
    error
        One standard error; for figures that cannot be negative, how far up it reaches.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


_UNKNOWN = Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class TruthResult:
    """What a solver made of one problem.

    Parameters
    ----------
    problem
        Name of the problem.
    num_samples
        Samples drawn.
    nfe
        Network evaluations a sample.
    seconds
        Wall time of all samples.
    mean_error
        Root mean square over the pixels of the error of the samples' mean, in units of the posterior standard
        deviation. Cleared of what the finite number of samples contributes.
    variance_ratio
        Mean over the pixels of the samples' variance over that of the posterior.
    covariance_error
        Relative Frobenius norm of the error of the covariance matrix, cleared in the same way.
    weight_error
        Largest error of the weight of a mode; zero with one mode.
    weights
        Weights of the modes.
    refusal
        Why there are no samples: what the solver needs and the problem lacks, or where it diverged. Then the
        figures are NaN.
    """

    problem: str
    num_samples: int
    nfe: int = 0
    seconds: float = 0.0
    mean_error: Estimate = _UNKNOWN
    variance_ratio: Estimate = _UNKNOWN
    covariance_error: Estimate = _UNKNOWN
    weight_error: Estimate = _UNKNOWN
    weights: tuple[float, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class TruthReport:
    """Results of :func:`check_solver`; prints as a table.

    Parameters
    ----------
    settings
        Name and settings of the solver.
    results
        One for each problem.
    """

    settings: dict[str, Any]
    results: tuple[TruthResult, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.settings['name']}",
            f"{'':16s} mean error      variance ratio  covariance      weights",
        ]
        for result in self.results:
            if result.refusal is not None:
                lines.append(f"{result.problem:16s} {result.refusal}")
                continue
            figures = [result.mean_error, result.variance_ratio, result.covariance_error]
            figures += [result.weight_error] if len(result.weights) > 1 else []
            lines.append(
                f"{result.problem:16s} " + " ".join(f"{figure!s:15s}" for figure in figures).rstrip()
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _BatchNoise(KeyedNoise):
    """Keyed noise drawn for a whole batch at once: much faster for thousands of small images."""

    def __call__(self, step: int) -> Tensor:
        first = replace(self, shape=(len(self.samples), *self.shape))
        return first._draw(self.samples[0], step).to(self.device)


def check_solver(
    solver: Solver,
    *,
    num_samples: int = 2000,
    seed: int = 0,
    problems: Sequence[TruthProblem] | None = None,
    micro_batch: int = 500,
) -> TruthReport:
    """Hold a solver's samples against posteriors known in closed form.

    Parameters
    ----------
    solver
        The solver and its settings.
    num_samples
        Samples a problem, at least 100.
    seed
        Seed of the solver's noise.
    problems
        :func:`truth_problems` if not given; :func:`truth_problem` makes more.
    micro_batch
        Samples drawn at once.

    Returns
    -------
    TruthReport
        Errors of the mean, the covariance and the weights of the modes. A problem that the solver refuses, or
        on which it diverges, is reported with the reason.

    Raises
    ------
    ReconError
        If the numbers of samples are out of range.

    Notes
    -----
    The Monte-Carlo error comes from the scatter between groups of samples. A square, such as that of the
    error of the mean, is estimated by products of different groups only, so that its expectation is free of
    the variance that a finite number of samples has.
    """
    if num_samples < 5 * GROUPS:
        raise ReconError(f"num_samples must be at least {5 * GROUPS}, got {num_samples}")
    if micro_batch < 1:
        raise ReconError(f"micro_batch must be at least 1, got {micro_batch}")
    given = truth_problems() if problems is None else tuple(problems)
    results = tuple(_check(solver, item, num_samples, seed, micro_batch) for item in given)
    return TruthReport(settings_of(solver), results)


def _check(solver: Solver, item: TruthProblem, num_samples: int, seed: int, micro_batch: int) -> TruthResult:
    """Draw the samples of one problem and judge them."""
    problem, drawn, nfe, start = item.problem, [], 0, time.perf_counter()
    shape, dtype, device = problem.operator.domain_shape, problem.y.dtype, problem.y.device
    try:
        with torch.no_grad():
            for first in range(0, num_samples, micro_batch):
                items = range(first, min(first + micro_batch, num_samples))
                noise = _BatchNoise(seed, item.name, items, shape, dtype, device)
                solution = solver.sample(problem, item.prior, noise)
                drawn.append(solution.samples)
                nfe = solution.nfe
    except (ReconError, PriorError, OperatorError) as error:
        return TruthResult(item.name, num_samples, refusal=str(error))
    seconds = time.perf_counter() - start
    return replace(judge(torch.cat(drawn), item.truth, item.name), nfe=nfe, seconds=seconds)


def judge(samples: Tensor, truth: GaussianMixture, name: str = "") -> TruthResult:
    """Errors of independent samples ``(n, H, W)`` that should follow a mixture; see :func:`check_solver`."""
    x = samples.flatten(1).to(truth.means.dtype)
    share = 0.5 if x.is_complex() else 1.0  # of E|x|^2 that belongs to each real component
    covariance = truth.covariance
    variances = covariance.diagonal().real
    means, errors, ratios, weights = [], [], [], []
    for group in x.tensor_split(GROUPS):
        offset, centred = group.mean(0) - truth.mean.flatten(), group - group.mean(0)
        means.append(offset * (share / (variances * len(variances))).sqrt())
        sample_covariance = share * centred.mT @ centred.conj() / (len(group) - 1)
        errors.append((sample_covariance - covariance) / torch.linalg.matrix_norm(covariance))
        ratios.append((sample_covariance.diagonal().real / variances).mean())
        weights.append(truth.responsibilities(group.reshape(-1, *truth.means.shape[1:])).mean(0))
    ratio, weight = torch.stack(ratios), torch.stack(weights)
    misses, scatter = (weight.mean(0) - truth.weights).abs(), weight.std(0) / math.sqrt(GROUPS)
    worst = int(misses.argmax())
    return TruthResult(
        problem=name,
        num_samples=len(x),
        mean_error=_norm_of_mean(torch.stack(means)),
        variance_ratio=Estimate(float(ratio.mean()), float(ratio.std()) / math.sqrt(GROUPS)),
        covariance_error=_norm_of_mean(torch.stack(errors)),
        weight_error=Estimate(float(misses[worst]), float(scatter[worst])),
        weights=tuple(weight.mean(0).tolist()),
    )


def _norm_of_mean(groups: Tensor) -> Estimate:
    """Norm of what the groups ``(G, ...)`` have in common, by products of different groups."""
    groups = groups.flatten(1)

    def squared(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))

    gram = (groups @ groups.mH).real
    square = squared(gram)
    others = [[k for k in range(len(gram)) if k != left] for left in range(len(gram))]
    without = torch.stack([squared(gram[rest][:, rest]) for rest in others])
    # Jackknife (Efron & Stein 1981).
    error = ((without - without.mean()).square().sum() * (len(gram) - 1) / len(gram)).sqrt()
    value = float(square.clamp_min(0).sqrt())
    return Estimate(value, float((square.clamp_min(0) + error).sqrt()) - value)
