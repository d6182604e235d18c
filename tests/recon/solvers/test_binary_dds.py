"""Sampling of images of two values: its linear algebra done densely, and a posterior known in closed form."""

import math
from dataclasses import replace

import pytest
import torch

from operators.ct import CTOperator
from operators.ct_geometry import ParallelBeam, equispaced_angles
from operators.weighting import Weighting
from priors.base import Contract, ScorePrior
from recon.solvers.base import KeyedNoise, Problem, SolverError
from recon.solvers.binary_dds import UNCERTAIN, BinaryDDS
from tests.operators.helper import dense

SIDE = 6
SHAPE = (SIDE, SIDE)
EVEN = 0.3 + 0.4 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


class Coins(ScorePrior):
    """Pixels that are one with probability ``chance``, each on its own: ``D`` is the chance given ``x``."""

    differentiable = False

    def __init__(self, chance):
        super().__init__(Contract(name="coins", channels="real", unit="object", level=0.5, sigma_min=1e-3))
        self.logit = torch.logit(chance)

    def denoise_channels(self, x, sigma):
        return torch.sigmoid(self.logit + (x - 0.5) / sigma.reshape(-1, 1, 1, 1) ** 2)


class Undecided(Coins):
    """Says the same whatever it is shown."""

    def denoise_channels(self, x, sigma):
        return torch.sigmoid(self.logit).expand_as(x)


def silence(count):
    return lambda _step: torch.zeros(count, *SHAPE)


def keyed(count, seed=0, first=0):
    return KeyedNoise(seed, "x", range(first, first + count), SHAPE, torch.float32, torch.device("cpu"))


def tomography(noise_std=0.3):
    operator = CTOperator(ParallelBeam(equispaced_angles(3), 7, 1.0), SHAPE, 1.0)
    y = torch.rand(operator.range_shape, generator=torch.Generator().manual_seed(1)) * SIDE / 2
    return Problem(y, operator, noise_std)


def covariance(denoised, sigma, solver):
    """Worked out pixel by pixel."""
    share = 1 - math.exp(-sigma / solver.doubt)
    deviation = (share * (denoised * (1 - denoised) + UNCERTAIN)).sqrt().flatten().double()
    row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(SIDE),) * 2, indexing="ij"))

    def apart(a):
        d = (a[:, None] - a[None]).abs()
        return torch.minimum(d, SIDE - d).double()

    distance = torch.hypot(apart(row), apart(column))
    correlation = torch.exp(-((distance / (solver.reach * math.sqrt(sigma))) ** 1.5))
    return deviation[:, None] * correlation * deviation[None]


def test_the_root_is_that_of_the_covariance():
    solver = BinaryDDS(reach=1.3)
    root = solver.error_root(EVEN[None], 0.7)
    eye = torch.eye(SIDE**2).reshape(-1, *SHAPE)
    B = root(eye).flatten(1).T.double()
    torch.testing.assert_close(B @ B.T, covariance(EVEN, 0.7, solver), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(root.transposed(eye).flatten(1).double(), B, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_a_step_without_chance_is_the_gaussian_correction(sigma):
    """``D + C A^T (A C A^T + s^2)^-1 (y - A D)``, densely."""
    solver = BinaryDDS(nfe=1, cg_iterations=100, sigma_max=sigma, sigma_min=sigma / 2, reach=1.3)
    given = tomography()
    found = solver.draw(given, Undecided(EVEN), silence(1), torch.zeros(1, *SHAPE))[0]
    A = dense(given.operator, SHAPE, torch.float32).double()
    C = covariance(EVEN, sigma, solver)
    D = EVEN.flatten().double()
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + given.noise_std**2 * torch.eye(len(A)))
    expected = D + gain @ (given.y.flatten().double() - A @ D)
    torch.testing.assert_close(found.flatten().double(), expected, atol=1e-4, rtol=1e-4)
    # What the prior is sure of stays.
    sure = EVEN.clone()
    sure[:, :3] = 1e-9
    kept = solver.draw(given, Undecided(sure), silence(1), torch.zeros(1, *SHAPE))[0]
    assert float(kept[:, :3].abs().max()) < 0.05 * float((kept - sure)[:, 3:].abs().max())


def test_the_posterior_of_coins():
    """Measured one by one: the chance of a one is known, and samples are zeros and ones."""
    s = 0.6
    y = torch.tensor([-0.2, 0.2, 0.5, 0.7, 1.0, 1.4]).expand(SHAPE).contiguous()
    chance = EVEN
    problem = Problem(y, Weighting(torch.ones(SHAPE)), s)
    solver = BinaryDDS(nfe=60, sigma_max=5.0, sigma_min=0.05, doubt=1e-3, reach=1e-3)
    samples = solver.sample(problem, Coins(chance), keyed(600)).samples
    assert float((samples - samples.round()).abs().mean()) < 0.02
    expected = torch.sigmoid(torch.logit(chance) + (y - 0.5) / s**2)
    # 600 draws have a standard error of 0.02; the Gaussian step is an approximation on top.
    assert float(((samples > 0.5).float().mean(0) - expected).abs().max()) < 0.12
    assert float(((samples > 0.5).float().mean(0) - expected).mean().abs()) < 0.03


def test_images_do_not_depend_on_the_batch():
    solver, given = BinaryDDS(nfe=4), tomography()
    together = solver.draw(given, Coins(EVEN), keyed(3))
    alone = torch.cat([solver.draw(given, Coins(EVEN), keyed(1, first=index)) for index in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.equal(solver.draw(given, Coins(EVEN), keyed(3, seed=1)), together)
    begun = solver.draw(given, Coins(EVEN), keyed(3), torch.ones(3, *SHAPE))
    assert not torch.equal(begun, together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"nfe": 0}, "nfe must be at least 1"), ({"reach": 0.0}, "reach must be positive")],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SolverError, match=f"BinaryDDS: {message}"):
        BinaryDDS(**settings)


def test_what_it_needs():
    given = tomography()
    with pytest.raises(SolverError, match="needs a positive noise level"):
        BinaryDDS().sample(replace(given, noise_std=0.0), Coins(EVEN), keyed(1))
    with pytest.raises(SolverError, match="not finite at step 0"):
        BinaryDDS(nfe=2).draw(replace(given, y=given.y * math.nan), Coins(EVEN), keyed(1))
