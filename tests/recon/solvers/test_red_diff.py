"""RED-diff against the paper's loss under torch's autograd and Adam, and against posterior modes."""

import math

import pytest
import torch

from operators import LinearOperator, MulticoilMRI
from priors import Contract, GaussianPrior, PriorError, ScorePrior
from recon import ReconError
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.red_diff import REDDiff
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


def keyed(items, dtype=C128):
    return KeyedNoise(0, "", items, SHAPE, dtype, torch.device("cpu"))


class NoNoise(KeyedNoise):
    def __call__(self, step):
        return 0 * super().__call__(step)


no_noise = NoNoise(0, "", [0], SHAPE, C128, torch.device("cpu"))


def by_autograd_and_torch_adam(solver, given, prior, noise):
    """The loss as the paper writes it, in variance-preserving coordinates, under torch's own Adam."""
    A, m = dense(given.operator, SHAPE).to(C128), prior.mean.flatten()
    C = (prior.basis * prior.values) @ prior.basis.mH
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


def posterior_mode(given, prior):
    A = dense(given.operator, SHAPE).to(C128)
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    precision = A.mH @ A / given.noise_std**2 + torch.linalg.inv(C)
    return m + torch.linalg.solve(precision, A.mH @ (given.y.flatten() - A @ m)) / given.noise_std**2


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_with_white_images_and_unit_weight_it_ends_at_the_mode_of_the_posterior(sigma):
    # (x - D) / v is the prior's own gradient then, at every level: (x - m) / tau^2.
    given = problem()
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=0.25 * torch.eye(N, dtype=C128), sigma_min=0.05)
    mode = posterior_mode(given, prior).reshape(SHAPE)
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
    C = (prior.basis * prior.values) @ prior.basis.mH
    identity = torch.eye(N, dtype=C128)
    W = 0.5 / prior.error_variance(0.4) * (identity - C @ torch.linalg.inv(C + 0.4**2 * identity))
    matrix, right = A.mH @ A / 0.2**2 + W, A.mH @ given.y.flatten() / 0.2**2 + W @ m
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


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
    prior = GaussianPrior(randn(*SHAPE, seed=2, dtype=f64), covariance=0.25 * torch.eye(N, dtype=f64))
    M = randn(20, N, seed=4, dtype=f64) / 5
    given = Problem(randn(20, seed=5, dtype=f64), Sums(M), 0.2)
    found = REDDiff(nfe=600, lr_decay=1e-3).sample(given, prior, keyed([0], f64)).samples[0]
    m = prior.mean.flatten()
    precision = M.mT @ M / 0.04 + torch.eye(N, dtype=f64) / 0.25
    mode = m + torch.linalg.solve(precision, M.mT @ (given.y - M @ m)) / 0.04
    assert float((found.flatten() - mode).norm() / mode.norm()) < 0.05


# What a run does, costs and reports


def test_an_item_does_not_depend_on_its_batch():
    given, prior = problem(), gaussian_prior()
    solver = REDDiff(nfe=12)
    together = solver.sample(given, prior, keyed(range(3))).samples
    for k in range(3):
        torch.testing.assert_close(solver.sample(given, prior, keyed([k])).samples[0], together[k])


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize("solver", [REDDiff(nfe=7), REDDiff.paper(9), REDDiff(nfe=1)])
def test_network_evaluations_and_progress(solver):
    prior, steps = Counting(), []
    solution = solver.sample(problem(), prior, keyed([0, 1]), lambda done, total: steps.append((done, total)))
    assert prior.calls == solution.nfe == solver.nfe
    assert steps == [(k + 1, solver.nfe) for k in range(solver.nfe)]
    assert solution.samples.shape == (2, *SHAPE)
    assert solution.samples.dtype == C128


@pytest.mark.parametrize("step", [0, 3])
def test_nan_names_the_step(step):
    with pytest.raises(SolverError, match=f"REDDiff produced values that are not finite at step {step}"):
        REDDiff(nfe=5).sample(problem(), Counting(nan_at=step), keyed([0]))


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


def test_what_it_cannot_work_with():
    with pytest.raises(SolverError, match=r"REDDiff needs a positive noise level, got 0\.0"):
        REDDiff().sample(problem(noise_std=0.0), gaussian_prior(), keyed([0]))
    with pytest.raises(PriorError, match=r"knows images \(4, 4\), got \(6, 5\)"):
        REDDiff(nfe=2).sample(
            problem(), GaussianPrior(torch.zeros(4, 4, dtype=C128), variance=1.0), keyed([0])
        )
    with pytest.raises(ReconError, match=r"0 < sigma_min <= sigma_max, got 0.05 and 0.01"):
        REDDiff(sigma_max=0.01).sample(problem(), gaussian_prior(), keyed([0]))
