"""What every solver promises, tried on each of them: chance, batches, scale, refusals, divergence."""

import inspect
import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from operators import MulticoilMRI, SinglecoilMRI, birdcage_maps
from operators.base import LinearOperator
from priors import GaussianPrior
from recon import ReconError, reconstruct
from recon.solvers import SOLVERS, make_solver, solver_class
from recon.solvers.base import KeyedNoise, Problem, SolverError

SHAPE = (8, 8)
NOISE = 0.05

every_solver = pytest.mark.parametrize("name", list(SOLVERS))


def quick(name):
    """The solver at its defaults, with fewer steps where it has many: images are tiny, budgets are not."""
    settings = {"twisted-smc": {"particles": "4", "steps": "20"}, "dps": {"nfe": "50"}}
    return make_solver(name, None, settings.get(name))


def prior_for(solver, dtype=torch.complex64):
    if not solver.needs.prior:
        return None
    v, u = torch.meshgrid(*(torch.fft.fftfreq(n) for n in SHAPE), indexing="ij")
    spectrum = 0.3 / (0.05 + u**2 + v**2)
    mean = 0.3 * torch.ones(SHAPE, dtype=dtype)
    return GaussianPrior(mean, spectrum=0.02 * spectrum / spectrum.mean())


def problem_for(solver, dtype=torch.complex64):
    """Undersampled data of an image drawn from the prior, and the operator they belong to."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(SHAPE, generator=generator) < 0.5
    mask[3:6, 3:6] = True
    operator: LinearOperator
    if solver.needs.projection:
        operator = SinglecoilMRI(mask, SHAPE)
    else:
        maps = birdcage_maps(3, SHAPE)
        operator = MulticoilMRI(maps / maps.abs().square().sum(0).sqrt(), mask)
    operator = operator.to(dtype)
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    image = (0.3 + 0.2 * torch.exp(-4 * (u**2 + v**2)) + 0.05j * u).to(dtype)
    y = operator(image)
    noise = torch.randn(y.shape, generator=generator, dtype=torch.complex64).to(dtype) * math.sqrt(2)
    return Problem(y + NOISE * noise * mask, operator, NOISE)


def noise_for(problem, items, seed=0):
    y = problem.y
    return KeyedNoise(seed, "key", items, problem.operator.domain_shape, y.dtype, y.device)


@every_solver
def test_a_solver_is_a_documented_set_of_settings(name):
    kind: Any = solver_class(name)
    assert is_dataclass(kind)
    assert getattr(kind, "__dataclass_params__").frozen  # noqa: B009
    document = inspect.getdoc(kind) or ""
    assert len(document.splitlines()) > 1
    for item in fields(kind):
        assert item.name in document, f"setting {item.name} is not explained"


@every_solver
@torch.no_grad()
def test_chance_and_batches(name):
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    steps = []
    both = solver.sample(problem, prior, noise_for(problem, [0, 1]), lambda *step: steps.append(step))
    assert both.samples.shape == (2, *SHAPE)
    done, total = steps[-1]
    assert done == total, "the last report says that all steps are done"
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    again = solver.sample(problem, prior, noise_for(problem, [0, 1]))
    assert torch.equal(both.samples, again.samples)
    alone = solver.sample(problem, prior, noise_for(problem, [1]))
    torch.testing.assert_close(alone.samples[0], both.samples[1], rtol=1e-4, atol=1e-4)
    if solver.needs.prior:
        assert both.nfe >= 1
        assert not torch.allclose(both.samples[0], both.samples[1], atol=1e-4)
        other = solver.sample(problem, prior, noise_for(problem, [0], seed=1))
        assert not torch.allclose(other.samples[0], both.samples[0], atol=1e-4)


@every_solver
def test_the_data_are_used(name):
    """Closer to the data than the prior's mean, and not a gross outlier of the posterior."""
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    posterior = reconstruct(
        problem.y, problem.operator, prior, solver, num_samples=2, noise_std=NOISE, micro_batch=2
    )
    start = problem.y - problem.operator(0.3 * torch.ones(SHAPE, dtype=problem.y.dtype))
    components = 2 * problem.y.numel() * problem.operator.mask.float().mean()
    assert posterior.residual < float((start.abs().square().sum() / components).sqrt())


@every_solver
@pytest.mark.parametrize("factor", [1e-5, 3e4])
def test_scale_equivariance(name, factor):
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    images = []
    for c in (1.0, factor):
        result = reconstruct(
            c * problem.y, problem.operator, prior, solver, noise_std=c * NOISE, num_samples=1
        )
        images.append(result.mean / c)
    torch.testing.assert_close(images[1], images[0], rtol=2e-3, atol=2e-3)


class Broken(GaussianPrior):
    """Denoises to NaN from the third evaluation on."""

    calls = 0

    def denoise_channels(self, x, sigma):
        self.calls += 1
        out = super().denoise_channels(x, sigma)
        return out * math.nan if self.calls >= 3 else out


@every_solver
@torch.no_grad()
def test_a_nan_names_the_step(name):
    solver = quick(name)
    if not solver.needs.prior:
        pytest.skip("no prior that could break")
    problem, prior = problem_for(solver), prior_for(solver)
    broken = Broken(prior.mean, spectrum=torch.full(SHAPE, 0.02))
    with pytest.raises(SolverError, match=r"not finite at step \d+"):
        solver.sample(problem, broken, noise_for(problem, [0]))


class Unmatched(LinearOperator):
    """An operator that says its adjoint is not the exact one."""

    matched_adjoint = False

    def __init__(self, operator):
        super().__init__(operator.domain_shape, operator.range_shape)
        self.operator = operator

    def _forward(self, x):
        return self.operator(x)

    def _adjoint(self, y):
        return 0.9 * self.operator.adjoint(y)


@every_solver
def test_refusals(name):
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    noise = noise_for(problem, [0])
    kind = type(solver).__name__
    if solver.needs.matched_adjoint:
        unmatched = Problem(problem.y, Unmatched(problem.operator), NOISE)
        with pytest.raises(SolverError, match=f"{kind} needs an operator with a matched adjoint"):
            solver.sample(unmatched, prior, noise)
    if solver.needs.prior:
        with pytest.raises(SolverError, match=f"{kind} needs a prior"):
            solver.sample(problem, None, noise)
    if solver.needs.noise:
        with pytest.raises(SolverError, match=f"{kind} needs a positive noise level, got 0"):
            solver.sample(Problem(problem.y, problem.operator, 0.0), prior, noise)
    if solver.needs.max_norm is not None:
        large = Problem(10 * problem.y, 10 * problem.operator, NOISE)
        with pytest.raises(SolverError, match=f"{kind} is stable up to an operator norm of"):
            solver.sample(large, prior, noise)
    if solver.needs.projection:
        scaled = Problem(2 * problem.y, 2 * problem.operator, NOISE)
        with pytest.raises(SolverError, match=f"{kind} replaces what was measured"):
            solver.sample(scaled, prior, noise)
    if solver.needs.gradient:
        prior.differentiable = False
        with pytest.raises(SolverError, match=f"{kind} needs a prior that can be differentiated"):
            solver.sample(problem, prior, noise)


def test_names_presets_and_settings_that_are_none():
    with pytest.raises(ReconError, match="there is no solver 'dss': the solvers are dds, "):
        make_solver("dss")
    with pytest.raises(ReconError, match="solver tv has no preset 'paper'; its presets: none"):
        make_solver("tv", "paper")
    with pytest.raises(ReconError, match="solver dds has no setting 'x': its settings are nfe, "):
        make_solver("dds", None, {"x": "1"})
    with pytest.raises(ReconError, match=r"setting nfe of solver dds is int, not .1\.5."):
        make_solver("dds", None, {"nfe": "1.5"})
    with pytest.raises(ReconError, match="setting noise_free of solver dds is bool, not '1'"):
        make_solver("dds", None, {"noise_free": "1"})
    solver: Any = make_solver("dds", "paper", {"nfe": "19", "gamma": "none", "noise_free": "true"})
    assert (solver.nfe, solver.gamma, solver.noise_free, solver.eta) == (19, None, True, 0.15)


@pytest.mark.parametrize("name", [name for name in SOLVERS if hasattr(solver_class(name), "paper")])
def test_presets_exist_as_methods(name):
    kind = solver_class(name)
    for preset in ("paper", "released"):
        if hasattr(kind, preset):
            assert isinstance(getattr(kind, preset)(), kind)
