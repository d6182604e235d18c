"""DAPS with a Gaussian prior: the paper's algorithm worked out densely; the posterior where it is exact."""

import math
from functools import partial
from itertools import count, pairwise

import pytest
import torch

from operators import LinearOperator, MulticoilMRI, SinglecoilMRI
from priors import Contract, GaussianPrior, PriorError, ScorePrior
from priors.sampling import karras_levels
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.daps import DAPS, data_noise
from tests.operators.helper import dense

SHAPE, N, COILS = (4, 3), 12, 3
C128 = torch.complex128
IDENTITY = torch.eye(N, dtype=C128)


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian_prior():
    root = randn(N, N, seed=1) / math.sqrt(N)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=0.05)


def problem(share=0.6, noise_std=0.2):
    """Random coils, a random mask that samples a share of k-space, and data of no image in particular."""
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < share
    A = MulticoilMRI(randn(COILS, *SHAPE, seed=4), mask)
    given = Problem(mask * randn(COILS, *SHAPE, seed=5), A, noise_std)
    # Langevin's step size follows from the norm, of which power iteration gives a few digits only.
    given.__dict__["norm"] = float(torch.linalg.matrix_norm(dense(A, SHAPE), 2))
    return given


def solver(**settings):
    return DAPS(
        **{"nfe": 8, "ode_steps": 2, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings}
    )


def keyed(items):
    return KeyedNoise(0, "", items, SHAPE, C128, torch.device("cpu"))


class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit vector each, at one step each."""

    def __init__(self, steps):
        self.steps, self.used = steps, []

    def __call__(self, step):
        assert step < self.steps
        assert step not in self.used
        self.used.append(step)
        noise = torch.zeros(1 + self.steps * N, N, dtype=C128)
        noise[1 + step * N : 1 + (step + 1) * N] = IDENTITY
        return noise.reshape(-1, *SHAPE)


def moments_of_the_code(daps, given, prior):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    levels = daps.nfe // daps.ode_steps
    inner = daps.langevin_steps if daps.inner == "langevin" else 1 + COILS
    noise = BasisNoise(1 + levels * (inner + 1) - 1)  # the last level puts no noise on
    samples = daps.sample(given, prior, noise).samples.flatten(1)
    assert len(noise.used) == noise.steps
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def moments_by_recursion(daps, given, prior):
    """The same by dense linear algebra, from the paper's Algorithm 1."""
    A = dense(given.operator, SHAPE).to(C128)
    right, s2 = A.mH @ given.y.flatten(), given.noise_std**2
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    sigmas = daps.levels(prior, given.noise_std)
    mean = given.unfolded.flatten() if daps.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * IDENTITY
    largest = float(torch.linalg.eigvalsh(A.mH @ A).max())
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        # The ODE by Euler steps, x' = x + (s' - s) (x - D) / s.
        ladder = karras_levels(daps.ode_steps, sigma, min(sigma, prior.contract.sigma_min))
        for s, t in pairwise(ladder):
            slope = IDENTITY + (t - s) / s * (IDENTITY - C @ torch.linalg.inv(C + s**2 * IDENTITY))
            mean, covariance = m + slope @ (mean - m), slope @ covariance @ slope.mH
        r2 = sigma**2 if daps.spread == "sigma" else prior.error_variance(sigma)
        precision = A.mH @ A / s2 + IDENTITY / r2
        if daps.inner == "exact":
            inverse = torch.linalg.inv(precision)
            slope, offset, added = inverse / r2, inverse @ right / s2, inverse
        else:
            rate = daps.langevin_rate
            rate *= 1 + (daps.langevin_decay - 1) * index / max(1, len(sigmas) - 2)
            step = rate / (largest / s2 + 1 / r2)
            slope, offset, added = IDENTITY, 0 * m, 0 * IDENTITY
            for _ in range(daps.langevin_steps):
                contraction = IDENTITY - step * precision
                slope = contraction @ slope + step / r2 * IDENTITY
                offset = contraction @ offset + step * right / s2
                added = contraction @ added @ contraction.mH + 2 * step * IDENTITY
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.mH + added + lower**2 * IDENTITY
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.4),
        ({"ode_steps": 1, "start": "noise"}, 0.8),
        ({"ode_steps": 4, "spread": "sigma"}, 0.4),
        ({"inner": "langevin", "langevin_steps": 4}, 0.4),
        ({"inner": "langevin", "langevin_steps": 3, "langevin_rate": 1.5, "langevin_decay": 0.1}, 0.4),
        ({"nfe": 9, "ode_steps": 2, "start": "noise", "sigma_min": 0.5}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    daps, given, prior = solver(**settings), problem(share), gaussian_prior()
    mean, covariance = moments_of_the_code(daps, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(daps, given, prior)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-8, atol=1e-8)
    assert float(covariance.diagonal().real.max()) > 1e-4


def posterior(given, prior):
    A = dense(given.operator, SHAPE).to(C128)
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    covariance = torch.linalg.inv(A.mH @ A / given.noise_std**2 + torch.linalg.inv(C))
    return m + covariance @ A.mH @ (given.y.flatten() - A @ m) / given.noise_std**2, covariance


def test_exact_for_white_images_however_few_the_levels():
    # p(x0 | x) = N(D, r^2 I) then, with r^2 the mean square error of D.
    given = problem(0.6, noise_std=0.3)
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=0.36 * IDENTITY, sigma_min=0.05)
    mean, covariance = posterior(given, prior)
    for nfe in (2, 7):
        daps = solver(nfe=nfe, ode_steps=1, start="noise", sigma_max=1e4)
        found_mean, found = moments_of_the_code(daps, given, prior)
        torch.testing.assert_close(found_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, covariance, rtol=1e-4, atol=1e-4)
    # With r = sigma, as published, the spread is too large.
    _, wide = moments_of_the_code(solver(nfe=7, ode_steps=1, spread="sigma", sigma_max=1e4), given, prior)
    assert float(wide.diagonal().real.mean() / covariance.diagonal().real.mean()) > 1.02


def test_the_variance_of_a_chain_in_its_stiffest_direction():
    """One pixel, measured: the stationary variance of a chain is too large by ``1 / (1 - rate / 2)``."""
    A = SinglecoilMRI(torch.ones(1, 1), (1, 1)).to(C128)
    given, daps, steps = (
        Problem(torch.ones(1, 1, dtype=C128), A, 0.3),
        solver(langevin_steps=60),
        iter(range(60)),
    )

    def unit():  # item 0 has no noise, the others one unit each, at one step each
        noise = torch.zeros(61, 1, 1, dtype=C128)
        noise[1 + next(steps)] = 1
        return noise

    x = daps.langevin(given, torch.zeros(61, 1, 1, dtype=C128), 0.7, 0.5, unit).flatten()
    precision = 1 / 0.3**2 + 1 / 0.7**2
    assert complex(x[0]) == pytest.approx(1 / 0.3**2 / precision)
    variance = float((x[1:] - x[0]).abs().square().sum())
    assert variance == pytest.approx(1 / precision / (1 - 0.5 / 2))


def test_data_noise_is_made_of_different_numbers():
    class Shape(LinearOperator):
        def __init__(self, range_shape):
            super().__init__(SHAPE, range_shape)

    noise = keyed([0, 4])
    for range_shape, draws in (((3, 4, 3), 3), ((13,), 2), ((2, 4), 1)):
        numbers = count()
        drawn = data_noise(Shape(range_shape), partial(draw_next, noise, numbers))
        assert drawn.shape == (2, *range_shape)
        assert next(numbers) == draws
        assert len(set(drawn.flatten().tolist())) == drawn.numel()


def draw_next(noise, numbers):
    return noise(next(numbers))


# What a run does, costs and reports


@pytest.mark.parametrize("inner", ["exact", "langevin"])
def test_an_item_does_not_depend_on_its_batch(inner):
    given, prior = problem(), gaussian_prior()
    daps = solver(cg_iterations=3, cg_tolerance=1e-3, inner=inner, langevin_steps=3)
    together = daps.sample(given, prior, keyed(range(3))).samples
    for k in range(3):
        torch.testing.assert_close(daps.sample(given, prior, keyed([k])).samples[0], together[k])


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize(
    ("daps", "nfe", "levels"),
    [
        (DAPS(nfe=7, ode_steps=1), 7, 7),
        (DAPS(nfe=7, ode_steps=3), 6, 2),
        (DAPS(nfe=1, ode_steps=1), 1, 1),
        (DAPS.paper(10, langevin_steps=2), 10, 2),
    ],
)
def test_network_evaluations_and_progress(daps, nfe, levels):
    prior, steps = Counting(), []
    solution = daps.sample(problem(), prior, keyed([0, 1]), lambda done, total: steps.append((done, total)))
    assert prior.calls == solution.nfe == nfe
    assert steps == [(k + 1, levels) for k in range(levels)]
    assert solution.samples.shape == (2, *SHAPE)
    assert solution.samples.dtype == C128


@pytest.mark.parametrize("step", [0, 3])
def test_nan_names_the_step(step):
    with pytest.raises(SolverError, match=f"DAPS produced values that are not finite at step {step}"):
        DAPS(nfe=10, ode_steps=2).sample(problem(), Counting(nan_at=2 * step), keyed([0]))


def test_published_setting():
    paper = DAPS.paper()
    assert (paper.nfe // paper.ode_steps, paper.ode_steps, paper.langevin_steps) == (200, 5, 100)
    assert (paper.inner, paper.spread, paper.sigma_max, paper.sigma_min) == ("langevin", "sigma", 100.0, 0.1)
    # 1e-4 for a likelihood of standard deviation 0.01 and a unitary operator.
    assert paper.langevin_rate == pytest.approx(1e-4 / 0.01**2)
    assert DAPS.paper(4000, ode_steps=10).nfe == 4000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ode_steps": 0}, "ode_steps must be at least 1, got 0"),
        ({"nfe": 4, "ode_steps": 5}, "nfe must be at least 5, got 4"),
        ({"langevin_steps": 0}, "langevin_steps must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"langevin_rate": 2.0}, "langevin_rate must lie between 0 and 2, got 2.0"),
        ({"langevin_decay": 0.0}, r"langevin_decay must lie in \(0, 1\], got 0.0"),
        ({"spread": "wide"}, "spread is one of prior, sigma, not 'wide'"),
        ({"inner": "hmc"}, "inner is one of exact, langevin, not 'hmc'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DAPS: {message}"):
        DAPS(**settings)


def test_what_it_cannot_work_with():
    with pytest.raises(SolverError, match=r"DAPS needs a positive noise level, got 0\.0"):
        DAPS().sample(problem(noise_std=0.0), gaussian_prior(), keyed([0]))
    with pytest.raises(PriorError, match=r"knows images \(4, 4\), got \(4, 3\)"):
        DAPS(nfe=2).sample(problem(), GaussianPrior(torch.zeros(4, 4, dtype=C128), variance=1.0), keyed([0]))
    with pytest.raises(PriorError, match=r"0 < sigma_min <= sigma_max, got 0.05 and 0.01"):
        DAPS(sigma_max=0.01).sample(problem(), gaussian_prior(), keyed([0]))
