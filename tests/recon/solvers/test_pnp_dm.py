"""PnP-DM with a Gaussian prior: the paper's algorithm worked out densely, and the law its chains go to."""

import math
from itertools import pairwise

import pytest
import torch

from operators import MulticoilMRI
from priors import Contract, GaussianPrior, PriorError, ScorePrior
from priors.sampling import karras_levels
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.pnp_dm import PnPDM
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
    return Problem(mask * randn(COILS, *SHAPE, seed=5), A, noise_std)


def solver(**settings):
    return PnPDM(**{"nfe": 8, "cg_iterations": 400, "cg_tolerance": 0.0, **settings})


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


def moments_of_the_code(pnp, given, prior):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    turns = pnp.nfe // pnp.steps
    # A likelihood step takes one image and the data's noise, a prior step one image less than evaluations.
    noise = BasisNoise(turns * (1 + COILS + pnp.steps - 1) + (pnp.start == "noise"))
    samples = pnp.sample(given, prior, noise).samples.flatten(1)
    assert len(noise.used) == noise.steps
    gains = (samples[1:] - samples[0]).mT
    return samples[0], gains @ gains.mH


def moments_by_recursion(pnp, given, prior):
    """The same by dense linear algebra, from the paper's Algorithm 1."""
    A = dense(given.operator, SHAPE).to(C128)
    s2 = given.noise_std**2
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    rhos = pnp.rhos(prior, given.noise_std)
    mean, covariance = given.unfolded.flatten(), 0 * IDENTITY
    if pnp.start == "noise":
        mean, covariance = 0 * m, rhos[0] ** 2 * IDENTITY
    reverse: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
    for rho in rhos:
        inverse = torch.linalg.inv(A.mH @ A / s2 + IDENTITY / rho**2)
        mean = inverse @ (A.mH @ given.y.flatten() / s2 + mean / rho**2)
        covariance = inverse @ covariance @ inverse.mH / rho**4 + inverse
        if rho not in reverse:
            slope, added = IDENTITY, 0 * IDENTITY
            for sigma, lower in pairwise(karras_levels(pnp.steps, rho, min(rho, prior.contract.sigma_min))):
                # The ancestral step: x' given x and x0 = D, for p(x' | x0) of level lower.
                share = (lower / sigma) ** 2
                step = share * IDENTITY + (1 - share) * C @ torch.linalg.inv(C + sigma**2 * IDENTITY)
                slope = step @ slope
                added = step @ added @ step.mH + lower**2 * (1 - share) * IDENTITY
            reverse[rho] = slope, added
        slope, added = reverse[rho]
        mean, covariance = m + slope @ (mean - m), slope @ covariance @ slope.mH + added
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.4),
        ({"steps": 1, "rho_max": 3.0}, 0.8),
        ({"steps": 4, "start": "noise", "rho_min": 0.3, "decay": 0.5}, 0.4),
        ({"nfe": 9, "steps": 2, "start": "noise", "decay": 1.0}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    pnp, given, prior = solver(**settings), problem(share), gaussian_prior()
    mean, covariance = moments_of_the_code(pnp, given, prior)
    expected_mean, expected_covariance = moments_by_recursion(pnp, given, prior)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-8, atol=1e-8)
    assert float(covariance.diagonal().real.max()) > 1e-4


def posterior(given, prior, rho=0.0):
    """Posterior of ``y = A (x + rho z) + n``, whose noise has the covariance ``s^2 I + rho^2 A A^H``."""
    A = dense(given.operator, SHAPE).to(C128)
    m, C = prior.mean.flatten(), (prior.basis * prior.values) @ prior.basis.mH
    noise = given.noise_std**2 * torch.eye(len(A), dtype=C128) + rho**2 * A @ A.mH
    gain = C @ A.mH @ torch.linalg.inv(A @ C @ A.mH + noise)
    return m + gain @ (given.y.flatten() - A @ m), C - gain @ A @ C


def test_chains_of_one_coupling_go_to_the_posterior_under_more_noise():
    given = problem(0.7, noise_std=0.3)
    root = randn(N, N, seed=1) / math.sqrt(N)
    # A prior that knows small levels, as the last level of a prior step is taken for none.
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=1e-3)
    rho = 0.5
    mean, covariance = posterior(given, prior, rho)
    errors = []
    for steps in (50, 100, 200):
        pnp = solver(nfe=60 * steps, steps=steps, rho_max=rho, decay=1.0)
        found_mean, found = moments_by_recursion(pnp, given, prior)
        errors.append(float((found - covariance).norm() / covariance.norm()))
        assert float((found_mean - mean).norm() / mean.norm()) < 2 / steps
    # Of first order in the steps of the reverse diffusion.
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3
    assert errors[-1] < 0.04
    # And that is not the posterior itself.
    assert float((covariance - posterior(given, prior)[1]).norm() / covariance.norm()) > 0.1


def test_chains_of_a_falling_coupling_come_near_the_posterior():
    given = problem(0.7, noise_std=0.3)
    root = randn(N, N, seed=1) / math.sqrt(N)
    prior = GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_min=1e-3)
    mean, covariance = posterior(given, prior)
    errors = []
    for turns in (30, 120):
        pnp = solver(nfe=turns * 60, steps=60, rho_max=2.0, rho_min=0.1, start="noise")
        found_mean, found = moments_by_recursion(pnp, given, prior)
        errors.append(float((found_mean - mean).norm() / mean.norm()))
        errors.append(float((found - covariance).norm() / covariance.norm()))
    assert errors[-2] < 0.07
    assert errors[-1] < 0.08
    assert errors[2] < 0.75 * errors[0]
    assert errors[3] < 0.75 * errors[1]


# What a run does, costs and reports


def test_couplings():
    prior = Counting()
    assert solver(nfe=6, steps=2, rho_max=1.0, rho_min=0.01).rhos(prior, 0.5) == pytest.approx([1, 0.1, 0.01])
    assert solver(nfe=6, steps=2, decay=0.5, rho_min=0.3).rhos(prior, 0.5) == pytest.approx([1, 0.5, 0.3])
    assert solver(nfe=6, steps=2).rhos(prior, 0.01)[-1] == pytest.approx(0.01)
    assert solver(nfe=6, steps=2).rhos(prior, 1e-9)[-1] == pytest.approx(prior.contract.sigma_min)
    assert solver(nfe=6, steps=2).rhos(prior, 7.0) == [1.0, 1.0, 1.0]
    assert solver(nfe=2, steps=2).rhos(prior, 0.01) == [1.0]


def test_an_item_does_not_depend_on_its_batch():
    given, prior = problem(), gaussian_prior()
    pnp = solver(cg_iterations=3, cg_tolerance=1e-3)
    together = pnp.sample(given, prior, keyed(range(3))).samples
    for k in range(3):
        torch.testing.assert_close(pnp.sample(given, prior, keyed([k])).samples[0], together[k])


class Counting(ScorePrior):
    def __init__(self, nan_at=None):
        super().__init__(Contract())
        self.calls, self.nan_at = 0, nan_at

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls - 1 == self.nan_at else x / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize(
    ("pnp", "nfe", "turns"),
    [
        (PnPDM(nfe=7, steps=1), 7, 7),
        (PnPDM(nfe=7, steps=3), 6, 2),
        (PnPDM(nfe=1, steps=1), 1, 1),
        (PnPDM.paper(200), 200, 2),
    ],
)
def test_network_evaluations_and_progress(pnp, nfe, turns):
    prior, steps = Counting(), []
    solution = pnp.sample(problem(), prior, keyed([0, 1]), lambda done, total: steps.append((done, total)))
    assert prior.calls == solution.nfe == nfe
    assert steps == [(k + 1, turns) for k in range(turns)]
    assert solution.samples.shape == (2, *SHAPE)
    assert solution.samples.dtype == C128


@pytest.mark.parametrize("step", [0, 3])
def test_nan_names_the_step(step):
    with pytest.raises(SolverError, match=f"PnPDM produced values that are not finite at step {step}"):
        PnPDM(nfe=10, steps=2).sample(problem(), Counting(nan_at=2 * step), keyed([0]))


def test_published_setting():
    paper = PnPDM.paper()
    assert (paper.nfe, paper.steps, paper.rho_max, paper.rho_min, paper.decay) == (10000, 100, 10.0, 0.3, 0.9)
    assert PnPDM.paper(rho_min=0.1).rho_min == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"nfe": 4, "steps": 5}, "nfe must be at least 5, got 4"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"rho_max": 0.0}, "rho_max must be positive, got 0.0"),
        ({"rho_min": math.nan}, "rho_min must be positive, got nan"),
        ({"rho_min": 2.0}, "rho_min 2.0 is above rho_max 1.0"),
        ({"decay": 1.1}, r"decay must lie in \(0, 1\], got 1.1"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"PnPDM: {message}"):
        PnPDM(**settings)


def test_what_it_cannot_work_with():
    with pytest.raises(SolverError, match=r"PnPDM needs a positive noise level, got 0\.0"):
        PnPDM().sample(problem(noise_std=0.0), gaussian_prior(), keyed([0]))
    with pytest.raises(PriorError, match=r"knows images \(5, 4\), got \(4, 3\)"):
        PnPDM(nfe=2).sample(problem(), GaussianPrior(torch.zeros(5, 4, dtype=C128), variance=1.0), keyed([0]))
