"""DiffPIR with a Gaussian prior, where it is an affine map of its noise, against the paper's equations."""

import math
from itertools import pairwise

import pytest
import torch

from operators import LinearOperator, MulticoilMRI
from priors import Contract, GaussianPrior, PriorError, ScorePrior
from recon import ReconError
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.diffpir import DiffPIR
from tests.operators.helper import dense

SHAPE, N = (6, 5), 30
C128 = torch.complex128


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian_prior():
    root = randn(N, N, seed=1) / math.sqrt(N)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=0.05)


def problem(share=0.6, noise_std=0.2):
    """Random coils, a random mask that samples a share of k-space, and data of no image in particular."""
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < share
    A = MulticoilMRI(randn(3, *SHAPE, seed=4), mask)
    return Problem(mask * randn(3, *SHAPE, seed=5), A, noise_std)


def solver(**settings):
    return DiffPIR(**{"nfe": 6, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings})


def keyed(items, dtype=C128):
    return KeyedNoise(0, "", items, SHAPE, dtype, torch.device("cpu"))


class BasisNoise:
    """In place of keyed noise: item 0 has none, the others one unit vector each, at one step each."""

    def __init__(self, steps):
        self.items = 1 + steps * N

    def __call__(self, step):
        noise = torch.zeros(self.items, N, dtype=C128)
        noise[1 + step * N : 1 + (step + 1) * N] = torch.eye(N)
        return noise.reshape(self.items, *SHAPE)


def moments_of_the_code(diffpir, given, prior):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    samples = diffpir.sample(given, prior, BasisNoise(diffpir.nfe + 1)).samples.flatten(1)
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def moments_by_recursion(diffpir, given, prior):
    """The paper's Algorithm 1 on the moments, in its own variance-preserving coordinates."""
    A = dense(given.operator, SHAPE).to(C128)
    y, identity = given.y.flatten(), torch.eye(N, dtype=C128)
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    bars = [1 / (1 + sigma**2) for sigma in diffpir.levels(prior, given.noise_std)]
    start = given.unfolded.flatten() if diffpir.start == "warm" else 0 * m
    mean, covariance = math.sqrt(bars[0]) * start, (1 - bars[0]) * identity
    for bar, lower in pairwise(bars):
        # The denoised image W x / sqrt(bar) + (I - W) m.
        W = C @ torch.linalg.inv(C + (1 - bar) / bar * identity)
        # rho = lam sigma_n^2 / sigma_t^2, and argmin |y - A x|^2 + rho |x - D|^2 = P (A^H y + rho D).
        rho = diffpir.lam * given.noise_std**2 * bar / (1 - bar)
        P = torch.linalg.inv(A.mH @ A + rho * identity)
        estimate = rho * P @ W / math.sqrt(bar)
        offset = P @ (A.mH @ y + rho * (identity - W) @ m)
        # eps = (x - sqrt(bar) x̂) / sqrt(1 - bar)
        keep = math.sqrt(1 - lower) * math.sqrt(1 - diffpir.zeta) / math.sqrt(1 - bar)
        weight = math.sqrt(lower) - keep * math.sqrt(bar)
        slope = weight * estimate + keep * identity
        mean = slope @ mean + weight * offset
        covariance = slope @ covariance @ slope.mH + (1 - lower) * diffpir.zeta * identity
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.8),
        ({"zeta": 0.3}, 0.4),
        ({"zeta": 0.0, "lam": 8.0}, 0.4),
        ({"start": "noise", "zeta": 0.3, "lam": 0.5}, 0.4),
        ({"start": "noise", "schedule": "vp-linear", "zeta": 0.1}, 0.6),
    ],
)
def test_equal_to_the_paper_algorithm(settings, share):
    diffpir, given, prior = solver(**settings), problem(share), gaussian_prior()
    mean, covariance = moments_of_the_code(diffpir, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(diffpir, given, prior)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-8, atol=1e-8)
    assert float(covariance.diagonal().real.max()) > 1e-4


def test_the_published_setting_is_the_paper_algorithm():
    given, prior = problem(), gaussian_prior()
    diffpir = DiffPIR.paper(10)
    mean, covariance = moments_of_the_code(diffpir, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(diffpir, given, prior)
    # Its proximal problems are solved to 1e-6.
    torch.testing.assert_close(mean, expected_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-4, atol=1e-4)


def test_real_images():
    class Sums(LinearOperator):
        """Some sums of pixels."""

        matrix: torch.Tensor

        def __init__(self, matrix):
            super().__init__(SHAPE, (len(matrix),))
            self.register_buffer("matrix", matrix)

        def _forward(self, x):
            return x.flatten(-2) @ self.matrix.mT

        def _adjoint(self, y):
            return (y @ self.matrix).unflatten(-1, SHAPE)

    f64 = torch.float64
    root = randn(N, N, seed=1, dtype=f64) / math.sqrt(N)
    prior = GaussianPrior(randn(*SHAPE, seed=2, dtype=f64), covariance=root @ root.mT)
    M = randn(20, N, seed=4, dtype=f64) / 5
    given = Problem(randn(20, seed=5, dtype=f64), Sums(M), 0.2)
    x = solver(nfe=1, start="noise", lam=2.0).sample(given, prior, keyed([0], f64)).samples[0]
    # One step: argmin |y - A x|^2 + rho |x - D|^2 by least squares on the stacked system.
    rho = 2.0 * 0.2**2 / 3.0**2
    denoised = prior.denoise(3.0 * keyed([0], f64)(0)[0], 3.0).flatten()
    stacked = torch.cat([M, math.sqrt(rho) * torch.eye(N, dtype=f64)])
    right = torch.cat([given.y, math.sqrt(rho) * denoised])
    expected = torch.linalg.lstsq(stacked, right[:, None]).solution[:, 0]
    torch.testing.assert_close(x.flatten(), expected, rtol=1e-8, atol=1e-8)


# What a run does, costs and reports


def test_strong_data_are_followed_weak_ones_are_not():
    given, prior = problem(1.1), gaussian_prior()
    A = dense(given.operator, SHAPE)
    least_squares = torch.linalg.lstsq(A, given.y.flatten()[:, None]).solution.reshape(SHAPE)
    weak, strong = (
        solver(lam=lam, nfe=20).sample(given, prior, keyed([0])).samples[0] for lam in (1e9, 1e-9)
    )
    torch.testing.assert_close(strong, least_squares, rtol=1e-6, atol=1e-6)
    assert float((weak - least_squares).norm()) > 0.5 * float(least_squares.norm())


def test_an_item_does_not_depend_on_its_batch():
    given, prior = problem(), gaussian_prior()
    diffpir = solver(cg_iterations=3, cg_tolerance=1e-3)
    together = diffpir.sample(given, prior, keyed(range(3))).samples
    for k in range(3):
        torch.testing.assert_close(diffpir.sample(given, prior, keyed([k])).samples[0], together[k])


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize("diffpir", [DiffPIR(nfe=7), DiffPIR.paper(9), DiffPIR(nfe=1)])
def test_network_evaluations_and_progress(diffpir):
    prior, steps = Counting(), []
    solution = diffpir.sample(
        problem(), prior, keyed([0, 1]), lambda done, total: steps.append((done, total))
    )
    assert prior.calls == solution.nfe == diffpir.nfe
    assert steps == [(k + 1, diffpir.nfe) for k in range(diffpir.nfe)]
    assert solution.samples.shape == (2, *SHAPE)
    assert solution.samples.dtype == C128


@pytest.mark.parametrize("step", [0, 3])
def test_nan_names_the_step(step):
    with pytest.raises(SolverError, match=f"DiffPIR produced values that are not finite at step {step}"):
        DiffPIR(nfe=5).sample(problem(), Counting(nan_at=step), keyed([0]))


def test_published_setting():
    paper = DiffPIR.paper()
    assert (paper.nfe, paper.lam, paper.zeta, paper.schedule, paper.start) == (
        100,
        1.0,
        0.1,
        "vp-linear",
        "noise",
    )
    assert DiffPIR.paper(20, lam=8.0).lam == 8.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": -0.1}, "cg_tolerance must be at least 0, got -0.1"),
        ({"lam": 0.0}, "lam must be positive, got 0.0"),
        ({"lam": math.nan}, "lam must be positive, got nan"),
        ({"zeta": 1.1}, r"zeta must lie in \[0, 1\], got 1.1"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DiffPIR: {message}"):
        DiffPIR(**settings)


def test_what_it_cannot_work_with():
    with pytest.raises(SolverError, match=r"DiffPIR needs a positive noise level, got 0\.0"):
        DiffPIR().sample(problem(noise_std=0.0), gaussian_prior(), keyed([0]))
    with pytest.raises(PriorError, match=r"knows images \(4, 4\), got \(6, 5\)"):
        DiffPIR(nfe=2).sample(
            problem(), GaussianPrior(torch.zeros(4, 4, dtype=C128), variance=1.0), keyed([0])
        )
    with pytest.raises(ReconError, match=r"0 < sigma_min <= sigma_max, got 0.05 and 0.01"):
        DiffPIR(sigma_max=0.01).sample(problem(), gaussian_prior(), keyed([0]))
