"""The judge of solvers is judged: with exact samples, with samples that are wrong in known ways."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from operators import check_adjoint
from priors import GaussianPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior
from recon import DDS, ReconError
from recon.solvers.base import Needs, Solution, SolverError, check_needs
from recon.truth import (
    GROUPS,
    MatrixOperator,
    check_solver,
    dense_matrix,
    judge,
    strip_matrix,
    truth_problem,
    truth_problems,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def problems():
    return {item.name: item for item in truth_problems()}


def draw(truth: GaussianMixture, num, seed=0, weights=None):
    """Exact samples of a mixture."""
    generator, (modes, *shape) = rng(seed), truth.means.shape
    chosen = torch.multinomial(truth.weights if weights is None else weights, num, True, generator=generator)
    z = torch.randn((num, math.prod(shape)), dtype=truth.means.dtype, generator=generator)
    z = z * math.sqrt(2 if z.is_complex() else 1)
    roots = torch.linalg.cholesky(truth.covariances)
    x = torch.stack([truth.means[k].flatten() + z @ roots[k].mT for k in range(modes)])
    return x[chosen, torch.arange(num)].reshape(num, *shape)


# The problems


def test_strips_are_areas():
    size, views, detectors, fine = 5, 3, 9, 300
    matrix = strip_matrix(size, views, detectors)
    inside = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine - 0.5
    centre = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    for view in range(views):
        angle = (view + 0.5) * math.pi / views
        for row in range(size):
            for column in range(size):
                x, y = centre[column] + inside, centre[row] + inside
                u = math.cos(angle) * x + math.sin(angle) * y[:, None]
                share = torch.histc(u, detectors, -detectors / 2, detectors / 2) / fine**2
                mine = matrix[view * detectors : (view + 1) * detectors, row * size + column]
                torch.testing.assert_close(mine, share, rtol=0, atol=5e-3)


def test_matrix_operator_has_its_matrix():
    matrix = torch.randn(6, 8, dtype=torch.complex128, generator=rng())
    operator = MatrixOperator(matrix, (2, 4), (3, 2))
    check_adjoint(operator)
    torch.testing.assert_close(dense_matrix(operator, torch.complex128), matrix)
    assert operator(torch.zeros(5, 7, 2, 4, dtype=torch.complex128)).shape == (5, 7, 3, 2)
    with pytest.raises(ReconError, match=r"must have shape \(6, 8\), got \(8, 6\)"):
        MatrixOperator(matrix.mT, (2, 4), (3, 2))


def test_problems_are_neither_trivial_nor_decided(problems):
    assert [item.problem.y.is_complex() for item in problems.values()] == [True, True, False, False]
    for item in problems.values():
        check_adjoint(item.problem.operator)
        assert item.problem.norm == pytest.approx(1, abs=0.03)
        mixture = isinstance(item.prior, GaussianMixturePrior)
        prior = (item.prior if mixture else GaussianMixturePrior([1.0], [item.prior])).dense()
        variance = item.truth.covariance.diagonal().real
        # Data and prior both matter: the spread is well below the prior's ...
        assert float((variance / prior.covariance.diagonal().real).max()) < 0.8
        # ... and the data alone would leave much more.
        A = dense_matrix(item.problem.operator, item.problem.y.dtype).to(prior.means.dtype)
        weak = torch.linalg.eigvalsh(A.mH @ A) < item.problem.noise_std**2 / float(variance.mean())
        assert int(weak.sum()) >= 16
        for i in range(len(item.truth.weights)):
            assert 0.1 < float(item.truth.weights[i]) < 0.9 or not mixture
            for j in range(i):
                apart = (item.truth.means[i] - item.truth.means[j]).flatten()
                within = (item.truth.covariances[i] + item.truth.covariances[j]) / 2
                distance = (apart.conj() @ torch.linalg.solve(within, apart)).real.sqrt()
                assert float(distance) > 5


def test_truth_is_the_regularised_least_squares_solution(problems):
    item = problems["MRI, Gaussian"]
    operator = item.problem.operator
    assert isinstance(item.prior, GaussianPrior)
    precision = item.problem.noise_std**-2
    spectrum, offset = item.prior.values, item.truth.mean.to(torch.complex64) - item.prior.mean
    inverse = torch.fft.ifft2(torch.fft.fft2(offset, norm="ortho") / spectrum, norm="ortho")
    gradient = inverse + precision * operator.adjoint(
        operator(item.truth.mean.to(torch.complex64)) - item.problem.y
    )
    assert float(gradient.norm()) < 1e-4 * float((precision * item.problem.adjoint_y).norm())


# The judge


@pytest.mark.parametrize("name", ["MRI, two modes", "CT, three modes"])
def test_exact_samples_pass_within_the_errors_stated(problems, name):
    truth = problems[name].truth
    scores: dict[str, list[float]] = {"variance_ratio": [], "weights": []}
    for seed in range(8):
        result = judge(draw(truth, 2000, seed), truth)
        assert result.mean_error.value < 0.015
        assert result.covariance_error.value < 0.08
        scores["variance_ratio"].append((result.variance_ratio.value - 1) / result.variance_ratio.error)
        scores["weights"].append(result.weight_error.value / result.weight_error.error)
    for values in scores.values():
        # Standard normal but for the few degrees of freedom of the errors; no one is 5 out.
        assert 0.3 < (sum(v**2 for v in values) / len(values)) ** 0.5 < 2.2
        assert max(map(abs, values)) < 5


def test_squared_errors_are_free_of_the_noise_of_few_samples(problems):
    # With 100 samples the mean is off by a tenth of a standard deviation; on average that is no bias.
    truth = problems["MRI, Gaussian"].truth
    results = [judge(draw(truth, 5 * GROUPS, seed), truth) for seed in range(20)]
    means = [result.mean_error for result in results]
    assert sum(m.value < 2 * m.error for m in means) > 15
    assert sum(m.value == 0 for m in means) > 3
    assert max(m.value for m in means) < 0.08


@pytest.mark.parametrize("name", ["MRI, Gaussian", "CT, Gaussian"])
def test_known_faults_are_measured(problems, name):
    truth = problems[name].truth
    x, mean = draw(truth, 4000), truth.mean
    scale = math.sqrt(2) if x.is_complex() else 1
    shifted = judge(x + 0.2 * scale * truth.covariance.diagonal().real.sqrt().reshape(mean.shape), truth)
    assert shifted.mean_error.value == pytest.approx(0.2, abs=4 * shifted.mean_error.error)
    assert shifted.mean_error.error < 0.02
    wide = judge(mean + 1.1 * (x - mean), truth)
    assert wide.variance_ratio.value == pytest.approx(1.21, abs=4 * wide.variance_ratio.error)
    assert wide.variance_ratio.error < 0.02
    assert wide.covariance_error.value == pytest.approx(0.21, abs=4 * wide.covariance_error.error)
    # Right variances, but no correlation.
    white = torch.randn(x.shape, dtype=x.dtype, generator=rng(1)) * scale
    white = mean + white * truth.covariance.diagonal().real.sqrt().reshape(mean.shape)
    result = judge(white, truth)
    C = truth.covariance
    expected = float((C - C.diagonal().diag()).norm() / C.norm())
    assert result.covariance_error.value == pytest.approx(expected, abs=0.05)
    assert expected > 0.3
    assert result.variance_ratio.value == pytest.approx(1, abs=4 * result.variance_ratio.error)


def test_errors_of_squares_are_those_of_repeated_runs(problems):
    truth = problems["MRI, Gaussian"].truth
    shift = 0.2 * math.sqrt(2) * truth.covariance.diagonal().real.sqrt().reshape(truth.mean.shape)
    results = [judge(truth.mean + 1.1 * (draw(truth, 600, k) - truth.mean) + shift, truth) for k in range(12)]
    for expected, figures in (
        (0.2, [result.mean_error for result in results]),
        (0.21, [result.covariance_error for result in results]),
    ):
        scores = torch.tensor([(figure.value - expected) / figure.error for figure in figures])
        assert 0.4 < float(scores.square().mean().sqrt()) < 1.8


def test_a_lost_mode_is_noticed(problems):
    truth = problems["CT, three modes"].truth
    result = judge(draw(truth, 3000, weights=torch.tensor([0.5, 0.5, 0.0])), truth)
    assert result.weights == pytest.approx((0.5, 0.5, 0.0), abs=0.05)
    assert result.weight_error.value == pytest.approx(float(truth.weights[2]), abs=0.01)


# Solvers


@dataclass(frozen=True)
class Exact:
    """Draws from the posterior of a Gaussian problem, whose truth it is told."""

    truth: GaussianMixture
    needs: ClassVar[Needs] = Needs()

    def sample(self, problem, prior, noise, on_step=None):
        check_needs(self, problem, prior)
        root = torch.linalg.cholesky(self.truth.covariances[0]).to(noise.dtype)
        z = noise(0)
        return Solution(
            (self.truth.mean.flatten() + z.flatten(1) @ root.mT).reshape(z.shape).to(noise.dtype), 7
        )


@dataclass(frozen=True)
class Refusing:
    needs: ClassVar[Needs] = Needs(images=("real",))

    def sample(self, problem, prior, noise, on_step=None):
        check_needs(self, problem, prior)
        raise SolverError("Refusing produced values that are not finite at step 3")


@pytest.mark.parametrize("name", ["MRI, Gaussian", "CT, Gaussian"])
def test_an_exact_solver_passes(problems, name):
    item = problems[name]
    report = check_solver(Exact(item.truth), num_samples=1100, problems=[item], micro_batch=250)
    (result,) = report.results
    assert (result.problem, result.num_samples, result.nfe, result.refusal) == (name, 1100, 7, None)
    assert result.mean_error.value < 0.02
    assert result.variance_ratio.value == pytest.approx(1, abs=4 * result.variance_ratio.error)
    assert (result.weight_error.value, result.weights) == (0, (1.0,))
    again = check_solver(Exact(item.truth), num_samples=1100, problems=[item], micro_batch=250)
    assert again.results[0].variance_ratio == result.variance_ratio
    other = check_solver(Exact(item.truth), num_samples=1100, problems=[item], micro_batch=250, seed=1)
    assert other.results[0].variance_ratio != result.variance_ratio


def test_an_approximate_solver_does_not(problems):
    report = check_solver(DDS(nfe=8), num_samples=200)
    assert [result.problem for result in report.results] == list(problems)
    for result in report.results:
        assert result.mean_error.value > 10 * result.mean_error.error
        assert result.nfe == 8
    assert report.settings["name"] == "DDS"


def test_refusals_and_divergence_are_reported():
    report = check_solver(Refusing(), num_samples=100)
    refusals = [result.refusal for result in report.results]
    assert refusals[0] == refusals[1] == "Refusing works on real images only, and these are complex"
    assert refusals[2] == refusals[3] == "Refusing produced values that are not finite at step 3"
    assert all(math.isnan(result.mean_error.value) for result in report.results)
    assert not any(result.variance_ratio.value < 9 for result in report.results)
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert "real images only" in lines[2]


def test_the_report_prints_as_a_table(problems):
    item = problems["CT, three modes"]
    text = str(check_solver(DDS(nfe=2), num_samples=100, problems=[item]))
    assert text.splitlines()[0] == "DDS"
    assert text.splitlines()[2].startswith("CT, three modes")
    assert text.splitlines()[2].count("±") == 4


def test_a_problem_of_ones_own():
    operator = MatrixOperator(torch.eye(4), (2, 2), (2, 2))
    prior = GaussianPrior(torch.zeros(2, 2), variance=3.0)
    item = truth_problem("denoising", prior, operator, torch.full((2, 2), 2.0), 1.0)
    torch.testing.assert_close(item.truth.mean, torch.full((2, 2), 1.5, dtype=torch.float64))
    torch.testing.assert_close(item.truth.covariance, 0.75 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 99}, "num_samples must be at least 100, got 99"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ReconError, match=message):
        check_solver(DDS(), **arguments)
