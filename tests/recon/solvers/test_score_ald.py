"""Score-ALD with a Gaussian prior: an affine map of its noise, held against that map worked out densely."""

import math

import pytest
import torch

from operators import CoilwiseMRI, MulticoilMRI, SinglecoilMRI
from priors import Contract, GaussianPrior, ScorePrior
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.score_ald import ScoreALD
from tests.operators.helper import dense

SHAPE, N = (5, 4), 20
C128 = torch.complex128


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5


def gaussian_prior():
    root = randn(N, N, seed=1) / math.sqrt(N)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=0.02)


def problem(noise_std=0.2, factor=1.0):
    A = MulticoilMRI(factor * randn(3, *SHAPE, seed=4), mask())
    return Problem(factor * mask() * randn(3, *SHAPE, seed=5), A, noise_std)


def keyed(items=(0,)):
    return KeyedNoise(0, "", items, SHAPE, C128, torch.device("cpu"))


class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit vector each, at one step each."""

    def __init__(self, steps):
        self.items = 1 + steps * N

    def __call__(self, step):
        noise = torch.zeros(self.items, N, dtype=C128)
        first = 1 + step * N
        noise[first : first + N] = torch.eye(N)
        return noise.reshape(self.items, *SHAPE)


def samples_of(solver, given, prior, noise):
    """Samples from noise of any kind."""
    return solver.sample(given, prior, noise).samples


def moments_of_the_code(solver, given, prior):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    samples = samples_of(solver, given, prior, BasisNoise(1 + solver.levels * solver.steps)).flatten(1)
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra, from Eq. 3 of the paper."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    y, m = given.y.flatten(), prior.mean.flatten()
    C = (prior.basis * prior.values) @ prior.basis.mH
    sigmas = solver.sigmas(prior, given.noise_std / given.norm)
    mean = given.unfolded.flatten() if solver.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * identity
    for sigma in sigmas:
        eta = solver.step * sigma**2
        gamma_t = solver.gamma * given.norm * sigma
        precision = torch.linalg.inv(C + sigma**2 * identity)
        data = A.mH / (given.noise_std**2 + gamma_t**2)
        for _ in range(solver.steps):
            mean = mean + eta * (precision @ (m - mean) + data @ (y - A @ mean))
            slope = identity - eta * (precision + data @ A)
            covariance = slope @ covariance @ slope.mH + 2 * eta * identity
    if solver.denoise:
        gain = C @ torch.linalg.inv(C + sigmas[-1] ** 2 * identity)
        mean, covariance = m + gain @ (mean - m), gain @ covariance @ gain.mH
    return mean, covariance


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"start": "noise", "sigma_max": 8.0},
        {"denoise": False},
        {"gamma": 3.0, "step": 0.8, "steps": 1},
        {"sigma_min": 0.1, "levels": 2, "steps": 5},
    ],
)
@pytest.mark.parametrize("noise_std", [0.2, 0.0])
def test_equal_to_the_dense_recursion(settings, noise_std):
    solver = ScoreALD(**{"levels": 6, "steps": 2, **settings})
    given, prior = problem(noise_std), gaussian_prior()
    mean, covariance = moments_of_the_code(solver, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(solver, given, prior)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-9, atol=1e-9)
    assert float(covariance.diagonal().real.max()) > 1e-3


def test_balanced_gradients():
    """One Langevin step by hand, for each item by itself; the noise level plays no part."""
    solver = ScoreALD(levels=1, steps=1, step=0.3, balance=5.0, denoise=False, start="noise")
    given, prior = problem(), gaussian_prior()
    A, y = dense(given.operator, SHAPE), given.y.flatten()
    C = (prior.basis * prior.values) @ prior.basis.mH
    noise = keyed((0, 1, 2))
    samples = solver.sample(given, prior, noise).samples
    again = solver.sample(Problem(given.y, given.operator, 1e-3), prior, noise).samples
    torch.testing.assert_close(again, samples)
    sigma = solver.sigmas(prior, 0.2 / given.norm)[0]
    for item in range(3):
        x = sigma * noise(0)[item].flatten()
        score = torch.linalg.solve(C + sigma**2 * torch.eye(N, dtype=C128), prior.mean.flatten() - x)
        data = A.mH @ (y - A @ x)
        data = 5 * data * score.norm() / data.norm()
        eta = 0.3 * sigma**2
        expected = x + eta * (score + data) + math.sqrt(2 * eta) * noise(1)[item].flatten()
        torch.testing.assert_close(samples[item].flatten(), expected)


class PixelNoise:
    """As `BasisNoise`, for pixels that do not know of each other: one unit for all of them at once."""

    def __init__(self, steps):
        self.items = 1 + steps

    def __call__(self, step):
        noise = torch.zeros(self.items, *SHAPE, dtype=C128)
        noise[1 + step] = 1
        return noise


def test_without_data_the_marginal_approaches_the_prior():
    """The lag behind the falling levels halves when there are twice as many."""
    variance = torch.tensor([0.05, 0.2, 1.0, 3.0], dtype=torch.float64).expand(SHAPE)
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=variance, sigma_min=0.01)
    nothing = Problem(torch.zeros(SHAPE, dtype=C128), SinglecoilMRI(torch.zeros(SHAPE)).to(C128), 0.02)
    errors = []
    for levels in (40, 80):
        solver = ScoreALD(levels, 6, 0.4, gamma=1.0, sigma_max=20.0, start="noise")
        samples = samples_of(solver, nothing, prior, PixelNoise(1 + 6 * levels))
        errors.append(float(((samples[1:] - samples[0]).abs().square().sum(0) / variance - 1).abs().max()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.1


def test_at_one_level_the_stationary_law_is_that_of_langevin_dynamics():
    """Every coefficient measured: the posterior is known, and so is the excess variance of a finite step."""
    prior = GaussianPrior(torch.full(SHAPE, 0.5 + 0j, dtype=C128), variance=0.3, sigma_min=0.1, sigma_max=1)
    A = SinglecoilMRI(torch.ones(SHAPE)).to(C128)
    given = Problem(randn(*SHAPE, seed=6), A, 0.4)
    solver = ScoreALD(levels=1, steps=300, step=1.0, gamma=2.0, sigma_max=0.1, denoise=False)
    samples = samples_of(solver, given, prior, PixelNoise(301))
    mean, variance = samples[0], (samples[1:] - samples[0]).abs().square().sum(0)
    # Prior smoothed by sigma, likelihood by gamma_t = 0.2.
    lam, eta = 1 / (0.3 + 0.01), 0.01
    precision = lam + 1 / (0.16 + 0.04)
    expected = (lam * 0.5 + A.adjoint(given.y) / (0.16 + 0.04)) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)
    stationary = 1 / precision / (1 - eta * precision / 2)
    torch.testing.assert_close(variance, torch.full_like(variance, stationary), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_units_of_the_measurement_do_not_matter(factor):
    """gamma_t follows the operator's norm: operator, data and noise scaled together are the same problem."""
    prior, solver = gaussian_prior(), ScoreALD(levels=10)
    one = solver.sample(problem(), prior, keyed()).samples
    other = solver.sample(problem(0.2 * factor, factor), prior, keyed()).samples
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_coil_images():
    A = CoilwiseMRI(2, mask()).to(C128)
    given = Problem(mask() * randn(2, *SHAPE, seed=6), A, 0.1)
    noise = KeyedNoise(0, "", (0, 1), (2, *SHAPE), C128, torch.device("cpu"))
    for solver in (ScoreALD(levels=40), ScoreALD(levels=40, balance=5.0, step=0.05)):
        x = solver.sample(given, gaussian_prior(), noise).samples
        assert x.shape == (2, 2, *SHAPE)
        assert float((A(x) - given.y).norm()) < 0.5 * float(given.y.norm())


# What a run costs and reports


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize(("denoise", "nfe"), [(True, 13), (False, 12)])
def test_network_evaluations_and_progress(denoise, nfe):
    prior, reports = Counting(), []
    solver = ScoreALD(levels=4, steps=3, denoise=denoise)
    solution = solver.sample(problem(), prior, keyed(), lambda *report: reports.append(report))
    assert prior.calls == solution.nfe == solver.nfe == nfe
    assert reports == [(k + 1, nfe) for k in range(nfe)]


@pytest.mark.parametrize("step", [0, 7, 12])
def test_nan_names_the_step(step):
    with pytest.raises(SolverError, match=f"ScoreALD produced values that are not finite at step {step}"):
        ScoreALD(levels=4, steps=3).sample(problem(), Counting(nan_at=step), keyed())


def test_levels():
    prior = Counting()  # 0.002 to 20
    assert ScoreALD(levels=3).sigmas(prior, 0.02) == pytest.approx([0.3, math.sqrt(0.3 * 0.01), 0.01])
    assert ScoreALD(levels=2).sigmas(prior, 1e-4) == pytest.approx([0.3, 0.002])
    assert ScoreALD(levels=2, sigma_max=99.0, sigma_min=0.1).sigmas(prior, 0.1) == pytest.approx([20, 0.1])
    with pytest.raises(SolverError, match=r"need sigma_min <= sigma_max in the prior's range, got 3.0, 0.3"):
        ScoreALD(sigma_min=3.0).sigmas(prior, 0.01)


def test_published_settings():
    paper, released = ScoreALD.paper(), ScoreALD.released()
    wide = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0, sigma_min=1e-3, sigma_max=1e3)
    ladder = paper.sigmas(wide, 0.1)
    assert len(ladder) == 2311
    assert ladder[::2310] == pytest.approx([232, 0.0066])
    # The released code leaves the first 1155 of these out.
    assert released.sigmas(wide, 0.1) == pytest.approx(ladder[1155:])
    assert (paper.steps, released.steps, paper.balance, released.balance) == (3, 3, None, 5.0)
    assert paper.gamma == 1.0
    assert released.step * 0.0066**2 == pytest.approx(5e-5)
    assert paper.step * 0.0066**2 == pytest.approx(9e-7)
    assert not paper.denoise
    assert paper.start == released.start == "noise"
    assert ScoreALD.released(steps=1).steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"step": 0.0}, "step must be positive, got 0.0"),
        ({"gamma": -1.0}, "gamma must be positive, got -1.0"),
        ({"balance": math.nan}, "balance must be positive, got nan"),
        ({"sigma_max": math.inf}, "sigma_max must be positive, got inf"),
        ({"step": 1.0, "gamma": 1.0}, "step 1.0 is unstable with gamma 1.0"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"ScoreALD: {message}"):
        ScoreALD(**settings)
