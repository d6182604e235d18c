"""RED-diff against the paper's loss under torch's autograd and Adam, and against posterior modes."""

import math
from functools import partial

import pytest
import torch

from priors import GaussianPrior
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.red_diff import REDDiff
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Matrix,
    covariance_of,
    keyed_noise,
    multicoil_problem,
    posterior,
    randn,
)

SHAPE, N = (6, 5), 30

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


class NoNoise(KeyedNoise):
    def __call__(self, step):
        return 0 * super().__call__(step)


no_noise = NoNoise(0, "", [0], SHAPE, C128, torch.device("cpu"))


def by_autograd_and_torch_adam(solver, given, prior, noise):
    """The loss as the paper writes it, in variance-preserving coordinates, under torch's own Adam."""
    A, m = dense(given.operator, SHAPE).to(C128), prior.mean.flatten()
    C = covariance_of(prior)
    mu = given.unfolded.flatten().clone().requires_grad_()
    adam = torch.optim.Adam(
        [mu], lr=solver.lr * prior.contract.level, betas=(solver.beta1, solver.beta2), eps=1e-8
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, solver.lr_decay ** (1 / max(1, solver.nfe - 1)))
    for index, sigma in enumerate(solver.levels(prior, given.noise_std)[:-1]):
        eps, bar = noise(index)[0].flatten(), 1 / (1 + sigma**2)
        x = math.sqrt(bar) * mu + math.sqrt(1 - bar) * eps
        denoised = m + C @ torch.linalg.solve(C + sigma**2 * torch.eye(N, dtype=C128), x / math.sqrt(bar) - m)
        eps_hat = (x - math.sqrt(bar) * denoised) / math.sqrt(1 - bar)
        misfit = (given.y.flatten() - A @ mu).abs().square().sum()
        regulariser = ((eps_hat - eps).detach().conj() * mu).real.sum() * math.sqrt((1 - bar) / bar)
        if solver.weight == "paper":
            loss = misfit / 2 + solver.lam * regulariser
        else:
            loss = misfit / (2 * given.noise_std**2) + solver.lam / prior.error_variance(sigma) * regulariser
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    return mu.detach().reshape(SHAPE)


@pytest.mark.parametrize(
    "solver",
    [
        REDDiff(nfe=30),
        REDDiff.paper(40),
        REDDiff(nfe=20, lam=0.3, lr_decay=1.0, beta1=0.5, beta2=0.9),
        REDDiff(nfe=1),
    ],
)
def test_equal_to_autograd_and_adam_of_torch(solver):
    given, prior = problem(), gaussian_prior()
    expected = by_autograd_and_torch_adam(solver, given, prior, keyed([0]))
    result = solver.sample(given, prior, keyed([0])).samples[0]
    # Adam divides by the size of the gradient, so its guard of 1e-8 shows where the loss has other units.
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert float((result - given.unfolded).abs().max()) > 0.01


# Where it goes


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_with_white_images_and_unit_weight_it_ends_at_the_mode_of_the_posterior(sigma):
    # (x - D) / v is the prior's own gradient then, at every level: (x - m) / tau^2.
    given = problem()
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=0.25 * torch.eye(N, dtype=C128), sigma_min=0.05)
    mode = posterior(given, prior)[0].reshape(SHAPE)
    solver = REDDiff(nfe=600, sigma_max=sigma, sigma_min=sigma, lr_decay=1e-3)
    found = solver.sample(given, prior, no_noise).samples[0]
    torch.testing.assert_close(found, mode, rtol=1e-3, atol=1e-3)
    # The noise on the way is without bias, and what is left of it goes with the step size.
    found = REDDiff(nfe=600, lr_decay=1e-3).sample(given, prior, keyed(range(4))).samples
    assert float((found - mode).norm() / mode.norm()) < 0.05


def test_it_is_no_sampler():
    given = problem()
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=0.25 * torch.eye(N, dtype=C128), sigma_min=0.05)
    A = dense(given.operator, SHAPE).to(C128)
    covariance = torch.linalg.inv(A.mH @ A / given.noise_std**2 + torch.eye(N, dtype=C128) / 0.25)
    truth = float(covariance.diagonal().real.mean())
    found = REDDiff(nfe=500, lr_decay=1e-3).sample(given, prior, keyed(range(16))).samples
    spread = float((found - found.mean(0)).abs().square().sum(0).mean()) / 15 / 2
    assert spread < 0.1 * truth


def test_the_fixed_point_at_one_level():
    given, prior = problem(), gaussian_prior()
    solver = REDDiff(nfe=1000, lam=0.5, sigma_max=0.4, sigma_min=0.4, lr_decay=1e-3)
    found = solver.sample(given, prior, no_noise).samples[0].flatten()
    # A^H (A mu - y) / s^2 + w (I - J) (mu - m) = 0
    A, m = dense(given.operator, SHAPE).to(C128), prior.mean.flatten()
    C = covariance_of(prior)
    identity = torch.eye(N, dtype=C128)
    W = 0.5 / prior.error_variance(0.4) * (identity - C @ torch.linalg.inv(C + 0.4**2 * identity))
    matrix, right = A.mH @ A / 0.2**2 + W, A.mH @ given.y.flatten() / 0.2**2 + W @ m
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_real_images():
    f64 = torch.float64
    prior = GaussianPrior(randn(*SHAPE, seed=2, dtype=f64), covariance=0.25 * torch.eye(N, dtype=f64))
    M = randn(20, N, seed=4, dtype=f64) / 5
    given = Problem(randn(20, seed=5, dtype=f64), Matrix(M, SHAPE), 0.2)
    found = REDDiff(nfe=600, lr_decay=1e-3).sample(given, prior, keyed([0], f64)).samples[0]
    m = prior.mean.flatten()
    precision = M.mT @ M / 0.04 + torch.eye(N, dtype=f64) / 0.25
    mode = m + torch.linalg.solve(precision, M.mT @ (given.y - M @ m)) / 0.04
    assert float((found.flatten() - mode).norm() / mode.norm()) < 0.05


# What a run does, costs and reports


def test_published_setting():
    paper = REDDiff.paper()
    assert (paper.nfe, paper.lam, paper.lr, paper.lr_decay) == (1000, 0.25, 0.1, 1.0)
    assert (paper.beta1, paper.beta2, paper.weight, paper.schedule) == (0.9, 0.99, "paper", "vp-linear")
    assert REDDiff.paper(20, lam=8.0).lam == 8.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"lam": -1.0}, "lam must not be negative, got -1.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"lr_decay": 1.5}, r"lr_decay must lie in \(0, 1\], got 1.5"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta2 must lie in \[0, 1\), got -0.1"),
        ({"weight": "none"}, "weight is one of prior, paper, not 'none'"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"REDDiff: {message}"):
        REDDiff(**settings)
