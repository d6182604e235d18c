"""What every solver promises, tried on each of them: chance, batches, scale, refusals, divergence."""

import inspect
import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from operators import CoilwiseMRI, MulticoilMRI, SinglecoilMRI, SliceStack, birdcage_maps
from operators.base import LinearOperator
from operators.ct import CTOperator
from operators.ct_geometry import ParallelBeam, equispaced_angles
from priors import GaussianPrior, PriorError
from recon import ReconError, reconstruct
from recon.solvers import PRESETS, SOLVERS, make_solver, solver_class
from recon.solvers.base import KeyedNoise, Problem, SolverError
from tests.operators.helper import dense
from tests.recon.solvers.helper import (
    C128,
    Counting,
    gaussian_prior,
    keyed_noise,
    multicoil_problem,
    randn,
    random_mask,
    samples_of,
    solve,
)

SHAPE = (8, 8)
NOISE = 0.05

every_solver = pytest.mark.parametrize("name", list(SOLVERS))
every_sampler = pytest.mark.parametrize("name", [n for n in SOLVERS if solver_class(n).needs.prior])


def quick(name):
    """The solver at its defaults, with fewer steps where it has many: images are tiny, budgets are not."""
    settings = {
        "twisted-smc": {"particles": "4", "steps": "20"},
        "dps": {"nfe": "50"},
        "adjacent-slices": {"nfe": "8"},  # of every slice by itself
    }
    return make_solver(name, None, settings.get(name))


def make(name, preset=None, **settings):
    """A solver with some of its settings, or a published setting with some of them changed."""
    kind: Any = solver_class(name)
    return (getattr(kind, preset) if preset else kind)(**settings)


def prior_for(solver, dtype=torch.complex64):
    if not solver.needs.prior:
        return None
    v, u = torch.meshgrid(*(torch.fft.fftfreq(n) for n in SHAPE), indexing="ij")
    spectrum = 0.3 / (0.05 + u**2 + v**2)
    mean = 0.3 * torch.ones(SHAPE, dtype=dtype)
    return GaussianPrior(mean, spectrum=0.02 * spectrum / spectrum.mean())


def problem_for(solver, dtype=torch.complex64):
    """Undersampled data of an image, or of a volume of slices like it, and the operator they belong to."""
    generator = torch.Generator().manual_seed(0)
    if type(solver).__name__ in ("FilteredBackprojection", "SIRT"):  # what these invert are line integrals
        rays = CTOperator(ParallelBeam(equispaced_angles(12), 12, 1.0), SHAPE, 1.0).to(dtype)
        y = rays(0.3 * torch.ones(SHAPE, dtype=rays.dtype))
        return Problem(y + NOISE * torch.randn(y.shape, generator=generator).to(y), rays, NOISE)
    mask = torch.rand(SHAPE, generator=generator) < 0.5
    mask[3:6, 3:6] = True
    operator: LinearOperator
    if solver.needs.projection:
        operator = SinglecoilMRI(mask, SHAPE)
    else:
        maps = birdcage_maps(3, SHAPE)
        operator = MulticoilMRI(maps / maps.abs().square().sum(0).sqrt(), mask)
    if solver.needs.volume:
        operator = SliceStack(operator, SHAPE[0])  # a cube, whose slices are of one size along all axes
    operator = operator.to(dtype)
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    image = (0.3 + 0.2 * torch.exp(-4 * (u**2 + v**2)) + 0.05j * u).to(dtype).expand(operator.domain_shape)
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
    assert both.samples.shape == (2, *problem.operator.domain_shape)
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


LOOSE = {"cg_iterations": 3, "cg_tolerance": 1e-3}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dds", {"nfe": 6, "sigma_max": 3.0, **LOOSE}),
        ("diffpir", {"nfe": 6, "sigma_max": 3.0, **LOOSE}),
        ("pigdm", {"nfe": 6, "sigma_max": 3.0, **LOOSE}),
        ("daps", {"nfe": 8, "ode_steps": 2, "sigma_max": 3.0, **LOOSE}),
        (
            "daps",
            {"nfe": 8, "ode_steps": 2, "sigma_max": 3.0, "inner": "langevin", "langevin_steps": 3, **LOOSE},
        ),
        ("pnp-dm", {"nfe": 8, **LOOSE}),
        ("red-diff", {"nfe": 12}),
    ],
)
def test_an_item_does_not_depend_on_its_batch(name, settings):
    """To many digits, also where each item stops its conjugate gradients by itself."""
    shape = (6, 5)
    given, prior, solver = multicoil_problem(shape), gaussian_prior(shape), make(name, **settings)
    together = solver.sample(given, prior, keyed_noise(shape, range(3))).samples
    for k in range(3):
        alone = solver.sample(given, prior, keyed_noise(shape, [k])).samples
        torch.testing.assert_close(alone[0], together[k])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adadiff", {"levels": 4}),
        ("replacement", {"levels": 4}),
        ("ula", {"levels": 3, "last_steps": 10}),
    ],
)
def test_coil_images_one_by_one(name, settings):
    """Each is what its coil gives on its own, with its part of the noise."""
    shape, solver = (5, 4), make(name, **settings)
    mask, prior = random_mask(shape), gaussian_prior(shape, 0.02)
    y, noise = mask * randn(2, *shape, seed=6), keyed_noise((2, *shape), (0, 1))
    both = solver.sample(Problem(y, CoilwiseMRI(2, mask).to(C128), 0.1), prior, noise).samples
    for coil in range(2):
        single = Problem(y[coil], SinglecoilMRI(mask).to(C128), 0.1)
        alone = samples_of(solver, single, prior, lambda step, coil=coil: noise(step)[:, coil])
        torch.testing.assert_close(both[:, coil], alone)


@pytest.mark.parametrize(
    ("name", "preset", "settings", "nfe", "steps"),
    [
        ("dds", None, {"nfe": 7}, 7, 7),
        ("dds", "paper", {"nfe": 19}, 19, 19),
        ("dds", "released", {"nfe": 9}, 9, 9),
        ("dds", "ct", {"nfe": 5}, 5, 5),
        ("dds", None, {"nfe": 1, "noise_free": True}, 1, 1),
        ("score-mri", None, {"steps": 2, "corrector_steps": 0}, 2, 2),
        ("score-mri", None, {"steps": 5, "corrector_steps": 1}, 9, 5),
        ("score-mri", None, {"steps": 4, "corrector_steps": 3}, 13, 4),
        ("score-ald", None, {"levels": 4, "steps": 3}, 13, 13),
        ("score-ald", None, {"levels": 4, "steps": 3, "denoise": False}, 12, 12),
        ("ula", None, {"levels": 4, "steps": 3, "last_steps": 5}, 14, 14),
        ("adadiff", None, {"levels": 4}, 4, 4),
        ("replacement", None, {"levels": 4, "visits": 3}, 12, 4),
        ("dds-3d", None, {"nfe": 3, "slice_batch": 16}, 3, 3),
        ("diffusion-mbir", None, {"steps": 3, "corrector_steps": 2, "slice_batch": 16}, 7, 3),
        ("perpendicular", None, {"nfe": 3, "slice_batch": 16}, 3, 3),
        ("dps", None, {"nfe": 7}, 7, 7),
        ("dps", "paper", {"nfe": 9}, 9, 9),
        ("dps", "released", {"nfe": 4}, 4, 4),
        ("dps", None, {"nfe": 1}, 1, 1),
        ("pigdm", None, {"nfe": 7}, 7, 7),
        ("pigdm", "paper", {"nfe": 9}, 9, 9),
        ("pigdm", None, {"nfe": 1}, 1, 1),
        ("diffpir", None, {"nfe": 7}, 7, 7),
        ("diffpir", "paper", {"nfe": 9}, 9, 9),
        ("diffpir", None, {"nfe": 1}, 1, 1),
        ("daps", None, {"nfe": 7, "ode_steps": 1}, 7, 7),
        ("daps", None, {"nfe": 7, "ode_steps": 3}, 6, 2),
        ("daps", None, {"nfe": 1, "ode_steps": 1}, 1, 1),
        ("daps", "paper", {"nfe": 10, "langevin_steps": 2}, 10, 2),
        ("red-diff", None, {"nfe": 7}, 7, 7),
        ("red-diff", "paper", {"nfe": 9}, 9, 9),
        ("red-diff", None, {"nfe": 1}, 1, 1),
        ("pnp-dm", None, {"nfe": 7, "steps": 1}, 7, 7),
        ("pnp-dm", None, {"nfe": 7, "steps": 3}, 6, 2),
        ("pnp-dm", None, {"nfe": 1, "steps": 1}, 1, 1),
        ("pnp-dm", "paper", {"nfe": 200}, 200, 2),
        ("twisted-smc", None, {"particles": 3, "steps": 5}, 15, 5),
        ("zero-filled", None, {}, 0, 1),
        ("tv", None, {"iterations": 5}, 0, 5),
        ("l1-wavelet", None, {"iterations": 5}, 0, 5),
    ],
)
def test_network_evaluations_and_progress(name, preset, settings, nfe, steps):
    solver = make(name, preset, **settings)
    problem, prior, reports = problem_for(solver, C128), Counting(), []
    solution = solver.sample(
        problem, prior, noise_for(problem, [0, 1]), lambda *report: reports.append(report)
    )
    assert prior.calls == solution.nfe == nfe
    # A setting called nfe is what may be spent at most.
    assert "nfe" in settings or getattr(solver, "nfe", nfe) == nfe
    assert reports == [(k + 1, steps) for k in range(steps)]
    assert solution.samples.shape == (2, *problem.operator.domain_shape)
    assert solution.samples.dtype == C128
    assert not solution.samples.requires_grad


@every_solver
def test_the_data_are_used(name):
    """Closer to the data than the prior's mean, and not a gross outlier of the posterior."""
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    posterior = reconstruct(
        problem.y, problem.operator, prior, solver, num_samples=2, noise_std=NOISE, micro_batch=2
    )
    shape = problem.operator.domain_shape
    start = problem.y - problem.operator(0.3 * torch.ones(shape, dtype=problem.y.dtype))
    if isinstance(problem.operator, CTOperator):
        assert posterior.residual < 0.5 * float(problem.y.square().mean().sqrt())
        return
    mask = getattr(problem.operator, "mask", None)
    components = 2 * problem.y.numel() * (1 if mask is None else mask.float().mean())
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


@every_sampler
@torch.no_grad()
def test_a_nan_names_the_step(name):
    solver = quick(name)
    problem, prior = problem_for(solver), prior_for(solver)
    broken = Broken(prior.mean, spectrum=torch.full(SHAPE, 0.02))
    with pytest.raises(SolverError, match=r"not finite at step \d+"):
        solver.sample(problem, broken, noise_for(problem, [0]))


@pytest.mark.parametrize(
    ("name", "settings", "evaluation", "step"),
    [
        *(
            (name, {"nfe": 5}, k, k)
            for name in ("dds", "dps", "pigdm", "diffpir", "red-diff")
            for k in (0, 3)
        ),
        *(("daps", {"nfe": 10, "ode_steps": 2}, 2 * k, k) for k in (0, 3)),
        *(("pnp-dm", {"nfe": 10, "steps": 2}, 2 * k, k) for k in (0, 3)),
        *(("score-ald", {"levels": 4, "steps": 3}, k, k) for k in (0, 7, 12)),
        *(("ula", {"levels": 3, "steps": 3, "last_steps": 5}, k, k) for k in (0, 8)),
        ("score-mri", {"steps": 5}, 4, 2),
        *(
            (name, {"nfe": 5, "slice_batch": 16}, k, k)
            for name in ("dds-3d", "perpendicular")
            for k in (0, 3)
        ),
        ("diffusion-mbir", {"steps": 5, "slice_batch": 16}, 4, 2),
        ("adadiff", {"levels": 5}, 3, 3),
        ("replacement", {"levels": 5, "visits": 2}, 4, 2),
        ("twisted-smc", {"particles": 3, "steps": 5}, 6, 2),
    ],
)
def test_a_nan_names_the_step_of_its_evaluation(name, settings, evaluation, step):
    solver = make(name, **settings)
    problem, kind = problem_for(solver, C128), type(solver).__name__
    with pytest.raises(SolverError, match=f"{kind} produced values that are not finite at step {step}:"):
        solver.sample(problem, Counting(nan_at=evaluation), noise_for(problem, [0, 1]))


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
    for noise_std in (0.0, -1.0, math.nan) if solver.needs.noise else ():
        with pytest.raises(SolverError, match=f"{kind} needs a positive noise level, got {noise_std}"):
            solver.sample(Problem(problem.y, problem.operator, noise_std), prior, noise)
    if solver.needs.max_norm is not None:
        large = Problem(10 * problem.y, 10 * problem.operator, NOISE)
        with pytest.raises(SolverError, match=f"{kind} is stable up to an operator norm of"):
            solver.sample(large, prior, noise)
    if solver.needs.projection:
        scaled = Problem(2 * problem.y, 2 * problem.operator, NOISE)
        with pytest.raises(SolverError, match=f"{kind} replaces what was measured"):
            solver.sample(scaled, prior, noise)
    if solver.needs.volume:
        image = Problem(problem.y[0], problem.operator.operator, NOISE)
        with pytest.raises(SolverError, match=rf"{kind} reconstructs volumes \(D, H, W\), .* shape \(8, 8\)"):
            solver.sample(image, prior, noise)
    if solver.needs.gradient:
        prior.differentiable = False
        with pytest.raises(
            SolverError, match=f"{kind} needs a prior that can be differentiated; 'gaussian' cannot"
        ):
            solver.sample(problem, prior, noise)


@pytest.mark.parametrize(
    ("need", "names"),
    [
        ("noise", ("ula", "pigdm", "diffpir", "daps", "red-diff", "pnp-dm", "adjacent-slices")),
        ("noise", ("twisted-smc",)),
        ("gradient", ("dps", "pigdm")),
        ("projection", ("replacement",)),
        ("volume", ("dds-3d", "diffusion-mbir", "perpendicular", "adjacent-slices")),
        ("matched_adjoint", ("dds", "dps", "twisted-smc", "cg-sense", "tv", "l1-wavelet")),
    ],
)
def test_what_these_cannot_do_without(need, names):
    for name in names:
        assert getattr(solver_class(name).needs, need), name


@every_sampler
def test_a_prior_on_images_of_another_size(name):
    solver = quick(name)
    problem = problem_for(solver)
    prior = GaussianPrior(torch.zeros(5, 4, dtype=torch.complex64), variance=1.0)
    with pytest.raises(PriorError, match=r"knows images \(5, 4\), got \(8, 8\)"):
        solver.sample(problem, prior, noise_for(problem, [0]))


@pytest.mark.parametrize("name", ["dps", "pigdm", "diffpir", "daps", "red-diff"])
def test_noise_levels_that_cross(name):
    solver = make(name, sigma_max=0.01)
    problem = problem_for(solver, C128)
    with pytest.raises(PriorError, match=r"0 < sigma_min <= sigma_max, got 0.05 and 0.01"):
        solver.sample(problem, gaussian_prior(SHAPE), noise_for(problem, [0]))


@every_sampler
@torch.no_grad()
def test_no_level_beyond_the_prior_s_is_asked_for(name):
    class Recording(GaussianPrior):
        def denoise_channels(self, x, sigma):
            asked.append(float(sigma.max()))
            return super().denoise_channels(x, sigma)

    solver = quick(name)
    asked: list[float] = []
    problem, prior = problem_for(solver), prior_for(solver)
    narrow = Recording(prior.mean, spectrum=torch.full(SHAPE, 0.02), sigma_min=0.01, sigma_max=0.2)
    solver.sample(problem, narrow, noise_for(problem, [0]))
    assert max(asked) == pytest.approx(0.2)


# Weights of the data


@pytest.mark.parametrize(
    ("name", "settings", "weight", "weak", "strong"),
    [
        ("dds", {"step": "renoise"}, "gamma", 1e-9, 1e9),
        ("dds", {"step": "paper"}, "gamma", 1e-9, 1e9),
        ("dds", {"step": "released"}, "gamma", 1e-9, 1e9),
        ("diffpir", {}, "lam", 1e9, 1e-9),
    ],
)
def test_strong_data_are_followed_weak_ones_are_not(name, settings, weight, weak, strong):
    shape = (6, 5)
    given, prior = multicoil_problem(shape, 1.1), gaussian_prior(shape)
    A = dense(given.operator, shape)
    least_squares = torch.linalg.lstsq(A, given.y.flatten()[:, None]).solution.reshape(shape)
    exact = {"nfe": 20, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings}
    free, bound = (
        make(name, **exact, **{weight: value}).sample(given, prior, keyed_noise(shape)).samples[0]
        for value in (weak, strong)
    )
    torch.testing.assert_close(bound, least_squares, rtol=1e-6, atol=1e-6)
    assert float((free - least_squares).norm()) > 0.5 * float(least_squares.norm())


# Methods without a prior

without_prior = pytest.mark.parametrize("name", [n for n in SOLVERS if not solver_class(n).needs.prior])
penalised = pytest.mark.parametrize("name", ["cg-sense", "tv", "l1-wavelet"])


@without_prior
def test_every_item_gets_the_image_without_the_network(name):
    solver = make(name)
    solution = solve(solver, problem_for(solver, C128), 3)
    assert solution.nfe == 0
    assert solution.samples.shape == (3, *SHAPE)
    assert torch.equal(solution.samples[0], solution.samples[1])
    assert torch.equal(solution.samples[0], solution.samples[2])


@pytest.mark.parametrize(
    ("name", "settings", "step"),
    [
        ("zero-filled", {}, 0),
        ("fbp", {}, 0),
        ("sirt", {}, 0),
        ("cgls", {"iterations": 12}, 12),
        ("cg-sense", {"weight": 0.1, "iterations": 12}, 12),  # looked at when all iterations are done
        ("tv", {"weight": 0.1}, 0),
        ("l1-wavelet", {"weight": 0.1}, 0),
    ],
)
def test_data_that_are_not_finite_are_noticed(name, settings, step):
    solver = make(name, **settings)
    given, kind = problem_for(solver, C128), type(solver).__name__
    with pytest.raises(SolverError, match=f"{kind} produced values that are not finite at step {step}:"):
        solve(solver, Problem(given.y * math.nan, given.operator, 0.1))


@penalised
def test_default_weight_is_used_and_grows_with_the_noise(name):
    solver = make(name)
    given = problem_for(solver, C128)
    weight = solver.default_weight(given)
    louder = Problem(given.y, given.operator, 4 * given.noise_std)
    assert solver.default_weight(louder) == pytest.approx(8 * weight)
    x, expected = (solve(make(name, weight=w), given).samples for w in (None, weight))
    assert torch.equal(x, expected)
    assert not torch.equal(solve(solver, louder).samples, x)


@penalised
def test_default_weight_needs_the_noise(name):
    solver = make(name)
    given = problem_for(solver, C128)
    silent = Problem(given.y, given.operator, 0.0)
    with pytest.raises(SolverError, match=r"needs a positive noise level, got 0\.0; or set its weight"):
        solve(solver, silent)
    assert torch.isfinite(solve(make(name, weight=0.1), silent).samples.abs()).all()


# By name


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
    for preset in PRESETS:
        if hasattr(kind, preset):
            assert isinstance(getattr(kind, preset)(), kind)
