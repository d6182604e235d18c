"""Twisted SMC: exact where its Gaussian model is exact, close to the posterior where it is not."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from operators import CoilwiseMRI
from priors import Contract, GaussianPrior
from priors.mixture import GaussianMixturePrior
from recon.solvers import twisted_smc
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.twisted_smc import TwistedSMC, _Diagonalised, _Iterative, _uniform
from recon.truth import MatrixOperator, TruthProblem, check_solver, truth_problem
from tests.operators.helper import dense
from tests.recon.solvers.helper import C128, Counting, keyed_noise, multicoil_problem, randn

SHAPE, N = (4, 3), 12
F64 = torch.float64

keyed = partial(keyed_noise, SHAPE)


def mri_problem(noise_std=0.3, dtype=C128):
    return multicoil_problem(SHAPE, 0.5, noise_std, coils=2, dtype=dtype)


def ct_problem(noise_std=0.3, dtype=F64):
    A = MatrixOperator(randn(7, N, seed=4, dtype=dtype) / 2, SHAPE, (7,))
    return Problem(randn(7, seed=5, dtype=dtype), A, noise_std)


PROBLEMS = {"mri": (mri_problem, C128), "ct": (ct_problem, F64)}
every_problem = pytest.mark.parametrize("kind", PROBLEMS)


def data_models(problem):
    accurate = TwistedSMC(cg_iterations=500, cg_tolerance=1e-14)
    return {"diagonalised": _Diagonalised(problem, accurate), "iterative": _Iterative(problem, accurate)}


# What the data say


@every_problem
@pytest.mark.parametrize("model", ["diagonalised", "iterative"])
def test_likelihood_of_a_mean_and_a_variance(kind, model):
    make, dtype = PROBLEMS[kind]
    problem = make()
    A = dense(problem.operator, SHAPE, dtype)
    means = randn(2, 3, *SHAPE, seed=6, dtype=dtype)
    for variance in (1e-4, 0.5, 20.0):
        S = problem.noise_std**2 * torch.eye(len(A), dtype=dtype) + variance * A @ A.mH
        residual = problem.y.flatten() - means.flatten(2) @ A.mT
        expected = -(residual.conj() * torch.linalg.solve(S, residual[..., None])[..., 0]).real.sum(-1) / 2
        result = data_models(problem)[model].log_likelihood(means, variance)
        # Up to what is the same for all means.
        torch.testing.assert_close(result - result[0, 0], expected - expected[0, 0], rtol=1e-6, atol=1e-6)


@every_problem
@pytest.mark.parametrize("model", ["diagonalised", "iterative"])
def test_draws_are_conditioned_on_the_data(kind, model):
    make, dtype = PROBLEMS[kind]
    problem, variance = make(), 0.7
    mean = randn(*SHAPE, seed=6, dtype=dtype)
    prior = GaussianMixturePrior([1.0], [GaussianPrior(mean, variance=variance)])
    A = dense(problem.operator, SHAPE, dtype)
    truth = prior.posterior(A, problem.y.flatten(), problem.noise_std)
    data = data_models(problem)[model]
    sizes = [math.prod(shape) for shape in data.noise_shapes]
    # One unit of noise at a time: the draw is an affine map of its noise.
    units = torch.cat([torch.zeros(1, sum(sizes)), torch.eye(sum(sizes))]).to(dtype)
    noise = [
        part.reshape(1, -1, *shape)
        for part, shape in zip(units.split(sizes, dim=1), data.noise_shapes, strict=True)
    ]
    drawn = data.conditioned(mean.expand(1, len(units), *SHAPE), variance, *noise)[0].flatten(1)
    gains = (drawn[1:] - drawn[0]).mT
    torch.testing.assert_close(drawn[0], truth.mean.flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gains @ gains.mH, truth.covariance, rtol=1e-6, atol=1e-6)


def test_precise_data_change_nothing_they_do_not_see():
    problem = ct_problem(noise_std=1e-5, dtype=torch.float32)
    A, mean = dense(problem.operator, SHAPE, torch.float32).double(), randn(1, 1, *SHAPE, dtype=torch.float32)
    drawn = _Diagonalised(problem, TwistedSMC()).conditioned(mean, 0.5, torch.zeros_like(mean))
    change = (drawn - mean).flatten().double()
    seen = torch.linalg.pinv(A) @ A @ change
    assert float((change - seen).norm()) < 1e-4 * float(seen.norm())
    assert float((A @ drawn.flatten().double() - problem.y).norm()) < 1e-4 * float(problem.y.norm())


def test_conjugate_gradients_as_far_as_asked():
    calls = []
    problem = mri_problem()
    normal = problem.operator._normal

    def counted(x):
        calls.append(1)
        return normal(x)

    problem.operator._normal = counted
    mean = randn(1, 1, *SHAPE)
    _ = problem.norm
    for tolerance, most in ((0.5, 50), (0.05, 50), (1e-4, 5)):
        calls.clear()
        root = math.sqrt(1 + 1.0 * problem.norm**2)
        bound = math.ceil(math.log(2 / tolerance) / math.log((root + 1) / (root - 1)))
        settings = TwistedSMC(cg_iterations=most, cg_tolerance=tolerance)
        _Iterative(problem, settings).log_likelihood(mean, problem.noise_std**2)
        assert len(calls) == min(most, bound)


# The sampler where its model of p(x0 | x_t) is exact: images of independent pixels of one variance


@dataclass(frozen=True)
class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit of it each."""

    total: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    used: dict[int, slice] = field(default_factory=dict)

    def __call__(self, step):
        size = math.prod(self.shape)
        noise = torch.zeros(1 + self.total, size, dtype=self.dtype)
        if size > 1:  # not the uniform numbers
            assert step not in self.used, "noise was used twice"
            first = 1 + sum(part.stop - part.start for part in self.used.values())
            self.used[step] = slice(first, first + size)
            noise[self.used[step]] = torch.eye(size, dtype=self.dtype)[: self.total + 1 - first]
        return noise.reshape(-1, *self.shape)


@every_problem
@pytest.mark.parametrize("limit", [0, 512])
def test_one_particle_is_exact_on_independent_pixels(kind, limit, monkeypatch):
    monkeypatch.setattr(twisted_smc, "DENSE_LIMIT", limit)
    make, dtype = PROBLEMS[kind]
    problem, steps = make(), 4
    mean = randn(*SHAPE, seed=7, dtype=dtype)
    prior = GaussianPrior(mean, variance=0.6)
    truth = truth_problem("", prior, problem.operator, problem.y, problem.noise_std).truth
    solver = TwistedSMC(
        particles=1, steps=steps, sigma_max=1e4, sigma_min=0.5, cg_iterations=500, cg_tolerance=1e-13
    )
    # The start, and for each step x0 given the data and the bridge.
    drawn = N if limit else N + problem.y.numel()
    total = N + steps * drawn + (steps - 1) * N
    noise = BasisNoise(total, SHAPE, dtype)
    x = solver.sample(problem, prior, noise).samples.flatten(1)  # type: ignore[arg-type]
    assert sum(part.stop - part.start for part in noise.used.values()) == total
    gains = (x[1:] - x[0]).mT
    torch.testing.assert_close(x[0], truth.mean.flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gains @ gains.mH, truth.covariance, rtol=1e-5, atol=1e-5)


@every_problem
def test_weights_stay_equal_on_independent_pixels(kind, monkeypatch):
    make, dtype = PROBLEMS[kind]
    problem, seen = make(), []
    resampled = TwistedSMC._resampled

    def spy(self, log_weights, uniform, count):
        seen.append(log_weights)
        return resampled(self, log_weights, uniform, count)

    monkeypatch.setattr(TwistedSMC, "_resampled", spy)
    solver = TwistedSMC(particles=5, steps=6, sigma_max=1e3)
    prior = GaussianPrior(randn(*SHAPE, seed=7, dtype=dtype), variance=0.6)
    solver.sample(problem, prior, keyed(range(3), dtype=dtype))
    assert len(seen) == 6
    for log_weights in seen[1:]:
        torch.testing.assert_close(log_weights, seen[0], rtol=0, atol=1e-6)
    # For another prior they do not.
    seen.clear()
    uneven = GaussianPrior(randn(*SHAPE, seed=7, dtype=dtype), variance=torch.rand(SHAPE) + 0.1)
    solver.sample(problem, uneven, keyed(range(3), dtype=dtype))
    assert float((seen[2] - seen[0]).abs().max()) > 1e-2


# The sampler where it is not


def small_problem() -> TruthProblem:
    """Twelve real pixels, two modes of unlike covariance; the data leave open which."""
    smooth, stripes = torch.eye(N) + 0.8 * torch.ones(N, N), (-1.0) ** torch.arange(N)
    components = [
        GaussianPrior(torch.zeros(SHAPE), covariance=0.3 * smooth),
        GaussianPrior(stripes.reshape(SHAPE), covariance=0.2 * torch.eye(N)),
    ]
    # Pairs of unlike neighbours are added up.
    A = torch.zeros(6, N)
    A[torch.arange(6), 2 * torch.arange(6)] = 0.8
    A[torch.arange(6), 2 * torch.arange(6) + 1] = 0.6
    prior = GaussianMixturePrior([0.6, 0.4], components)
    y = 0.3 + 0.6 * randn(6, seed=1, dtype=torch.float32)
    return truth_problem("small", prior, MatrixOperator(A, SHAPE, (6,)), y, 0.5)


def test_means_covariances_and_weights_of_a_mixture():
    item = small_problem()
    assert 0.2 < float(item.truth.weights[0]) < 0.8
    report = check_solver(TwistedSMC(particles=32, steps=30), num_samples=1000, problems=[item])
    (result,) = report.results
    assert result.nfe == 960
    assert result.mean_error.value < 0.05
    assert result.variance_ratio.value == pytest.approx(1, abs=0.03 + 3 * result.variance_ratio.error)
    assert result.weight_error.value < 0.02 + 3 * result.weight_error.error
    assert result.covariance_error.value < 0.1


def test_more_particles_come_closer():
    item = small_problem()
    errors = []
    for particles in (1, 4, 32):
        solver = TwistedSMC(particles=particles, steps=15)
        (result,) = check_solver(solver, num_samples=1000, problems=[item], micro_batch=1000).results
        errors.append(result.weight_error)
    assert errors[0].value - errors[1].value > 2 * (errors[0].error + errors[1].error)
    assert errors[2].value < errors[1].value


# Resampling


def test_systematic_resampling():
    solver = TwistedSMC(particles=8, resample_below=1.0)
    weights = torch.rand(40, 8, generator=torch.Generator().manual_seed(0), dtype=F64) ** 4
    weights = weights / weights.sum(1, keepdim=True)
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=F64)
    ancestors, after = solver._resampled(weights.log() - 700, uniform, 8)
    for row, share in zip(ancestors, 8 * weights, strict=True):
        copies = torch.bincount(row, minlength=8)
        assert ((copies - share).abs() < 1 + 1e-9).all()
    assert not after.any()
    # On average exactly in proportion.
    many = torch.arange(2000, dtype=F64)[:, None].add(0.5).div(2000)[:, 0]
    ancestors, _ = solver._resampled(weights[:1].log().expand(2000, 8), many, 8)
    torch.testing.assert_close(
        torch.bincount(ancestors.flatten()) / 2000.0, (8 * weights[0]).float(), atol=2e-3, rtol=0
    )
    # Not even rounding leads beyond the last.
    ancestors, _ = solver._resampled(weights.log(), torch.ones(40, dtype=F64), 8)
    assert int(ancestors.max()) == 7
    # The last choice is of one particle.
    ancestors, _ = solver._resampled(weights[:1].log().expand(2000, 8), many, 1)
    torch.testing.assert_close(
        torch.bincount(ancestors.flatten(), minlength=8) / 2000.0, weights[0].float(), atol=2e-3, rtol=0
    )


def test_resampled_only_where_few_particles_count():
    solver, uniform = TwistedSMC(particles=4, resample_below=0.5), torch.full((3,), 0.5, dtype=F64)
    weights = torch.tensor(
        [[0.25, 0.25, 0.25, 0.25], [0.4, 0.4, 0.1, 0.1], [0.9, 0.1, 1e-9, 1e-9]], dtype=F64
    )
    ancestors, after = solver._resampled(weights.log(), uniform, 4)
    assert ancestors.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
    torch.testing.assert_close(after[:2], weights.log()[:2])
    assert not after[2].any()
    ancestors, _ = TwistedSMC(particles=4, resample_below=0.0)._resampled(weights.log(), uniform, 4)
    assert ancestors.tolist() == [[0, 1, 2, 3]] * 3


def test_uniform_numbers():
    u = _uniform(keyed(range(4000)), 3)
    assert u.shape == (4000,)
    assert bool(((u > 0) & (u < 1)).all())
    ordered = u.sort().values
    distance = (ordered - (torch.arange(4000) + 0.5) / 4000).abs().max()
    assert float(distance) < 1.6 / math.sqrt(4000)  # Kolmogorov–Smirnov


# Any operator, any prior


@pytest.mark.parametrize("limit", [0, 512])
@pytest.mark.parametrize("dtype", [torch.complex64, C128])
def test_an_item_does_not_depend_on_its_batch(limit, dtype, monkeypatch):
    monkeypatch.setattr(twisted_smc, "DENSE_LIMIT", limit)
    problem = mri_problem(dtype=dtype)
    prior = GaussianPrior(randn(*SHAPE, dtype=dtype), variance=torch.rand(SHAPE) + 0.1)
    solver = TwistedSMC(particles=6, steps=10)
    together = solver.sample(problem, prior, keyed(range(3), dtype=dtype)).samples
    assert together.dtype == dtype
    for k in range(3):
        alone = solver.sample(problem, prior, keyed((k,), dtype=dtype)).samples[0]
        torch.testing.assert_close(alone, together[k], rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 0.01


def test_coil_images_and_a_real_prior():
    mask = torch.tensor([True, False, True])
    A = CoilwiseMRI(2, mask, SHAPE)
    problem = Problem(A(randn(2, *SHAPE, dtype=torch.complex64)), A, 0.1)
    prior = GaussianPrior(torch.zeros(SHAPE), variance=0.5)
    noise = keyed_noise((2, *SHAPE), range(2), torch.complex64)
    x = TwistedSMC(particles=3, steps=8).sample(problem, prior, noise).samples
    assert x.shape == (2, 2, *SHAPE)
    residual = (A(x) - problem.y).abs().square().sum() / (2 * 2 * 2 * A.mask.sum())
    assert float(residual) < 4 * 0.1**2


class CountingPairs(Counting):
    """Evaluated for two images at once, as many as samples."""

    def __init__(self):
        super().__init__(contract=Contract(level=0.4, sigma_max=10.0))

    def denoise_channels(self, x, sigma):
        assert len(x) == 2
        return super().denoise_channels(x, sigma)


@dataclass(frozen=True)
class Recording(KeyedNoise):
    used: list[int] = field(default_factory=list)

    def __call__(self, step):
        self.used.append(step)
        return super().__call__(step)


@pytest.mark.parametrize(("limit", "a_step"), [(0, 4), (512, 3)])
def test_each_step_number_of_the_noise_is_used_once(limit, a_step, monkeypatch):
    monkeypatch.setattr(twisted_smc, "DENSE_LIMIT", limit)
    noise = Recording(0, "", (0, 1), SHAPE, C128, torch.device("cpu"))
    TwistedSMC(particles=3, steps=5).sample(mri_problem(), CountingPairs(), noise)
    # The start; uniform numbers, the draw and the bridge; no bridge at the end.
    assert len(noise.used) == len(set(noise.used)) == 1 + 5 * a_step - 1


def test_noise_levels():
    prior = CountingPairs()
    problem = mri_problem(noise_std=0.1)
    levels = TwistedSMC(steps=4).levels(problem, prior)
    # 20 times the level of the prior, and a quarter of the noise, seen through the operator's norm.
    assert levels[0] == pytest.approx(8.0)
    assert levels[3] == pytest.approx(0.1 / 4 / problem.norm)
    assert levels[1] / levels[0] == pytest.approx(levels[2] / levels[1])
    assert levels[4] == 0
    assert TwistedSMC(steps=3, sigma_max=2.0, sigma_min=0.5).levels(problem, prior) == pytest.approx(
        [2.0, 1.0, 0.5, 0.0]
    )
    assert TwistedSMC(steps=2).levels(mri_problem(1e-9), prior)[1] == pytest.approx(prior.contract.sigma_min)
    assert TwistedSMC(steps=1).levels(problem, prior) == pytest.approx([8.0, 0.0])
    wide = CountingPairs()
    wide.contract = replace(wide.contract, level=3.0)
    assert TwistedSMC().levels(problem, wide)[0] == 10.0


# What cannot be done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 0}, "particles must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"sigma_max": math.inf}, "sigma_max must be positive, got inf"),
        ({"sigma_min": 0.0}, r"sigma_min must be positive, got 0\.0"),
        ({"cg_tolerance": 0.0}, r"cg_tolerance must be positive, got 0\.0"),
        ({"resample_below": 1.1}, r"resample_below must lie in \[0, 1\], got 1\.1"),
        ({"resample_below": math.nan}, r"resample_below must lie in \[0, 1\], got nan"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"TwistedSMC: {message}"):
        TwistedSMC(**settings)


def test_levels_that_cross():
    with pytest.raises(SolverError, match="need sigma_min < sigma_max, got 3 and 2"):
        TwistedSMC(sigma_min=3.0, sigma_max=2.0).sample(mri_problem(), CountingPairs(), keyed(range(2)))
