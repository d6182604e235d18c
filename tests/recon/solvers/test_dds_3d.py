"""DDS-3D: against DDS slice by slice, against its steps worked out densely, and what it does for a volume."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from operators import CTOperator, MulticoilMRI, ParallelBeam, SliceStack, ThroughPlaneAverage
from operators.ct_geometry import equispaced_angles
from priors import GaussianPrior
from recon import DDS, DDS3D, Scale, reconstruct
from recon.solvers.base import Problem, SolverError
from recon.solvers.dds_3d import (
    LEAST_DIFFERENCE,
    PAPER_LAM,
    PAPER_RHO,
    ThroughPlaneTV,
    mean_difference,
    through_plane,
    through_plane_adjoint,
)
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    alike_slices_problem,
    keyed_noise,
    moments_of_the_code,
    randn,
    random_mask,
    samples_of,
    slicewise_covariance,
    volume_problem,
)

SLICES, SHAPE = 4, (3, 2)
VOLUME, N = (SLICES, *SHAPE), 24

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(volume_problem, SLICES, SHAPE)
keyed = partial(keyed_noise, VOLUME)


def solver(**settings):
    return DDS3D(**{"nfe": 6, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings})


def thick_problem(noise_std=0.2):
    """Thick slices, which mix two thin ones each."""
    thick = SLICES // 2
    A = SliceStack(MulticoilMRI(randn(3, *SHAPE, seed=4), random_mask(SHAPE, 0.6)), thick)
    averaged = A @ ThroughPlaneAverage(VOLUME, 2)
    return Problem(averaged(randn(*VOLUME, seed=5)), averaged, noise_std)


# Without total variation: slice by slice


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eta": 0.3, "gamma": 2.0, "start": "noise"},
        {"step": "paper", "eta": 0.5},
        {"step": "released", "schedule": "vp-linear", "start": "noise"},
        {"noise_free": True},
        {"gamma": 0.0},
    ],
)
def test_without_total_variation_it_is_dds_slice_by_slice(settings):
    # With few conjugate-gradient steps, so that every slice has to have its own.
    common = {"nfe": 5, "cg_iterations": 3, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings}
    given, prior, noise = problem(), gaussian_prior(), keyed((0, 1))
    single_slice = helper.multicoil_problem(SHAPE).operator
    together = samples_of(DDS3D(lam=0.0, **common), given, prior, noise)
    for k in range(SLICES):
        single = Problem(given.y[k], single_slice, given.noise_std)
        alone = samples_of(DDS(**common), single, prior, lambda step, k=k: noise(step)[:, k])
        torch.testing.assert_close(together[:, k], alone)


@pytest.mark.parametrize("given", [problem(), thick_problem()], ids=["slices", "thick slices"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"eta": 0.5, "gamma": 2.0, "start": "noise"}, {"step": "paper", "eta": 0.8, "start": "noise"}],
)
def test_equal_to_the_dense_recursion(given, settings):
    """Also where the data mix slices, which conjugate gradients a slice would get wrong."""
    dds, prior = solver(lam=0.0, **settings), gaussian_prior()
    A, identity = dense(given.operator, VOLUME).to(C128), torch.eye(N, dtype=C128)
    normal, right = A.mH @ A, A.mH @ given.y.flatten()
    m, C = prior.mean.flatten().repeat(SLICES), slicewise_covariance(prior, SLICES)
    sigmas = dds.levels(prior, given.noise_std)
    # Ten steps are more than the normal matrix has distinct eigenvalues: the least-squares solution.
    warm = dds.start == "warm"
    mean = torch.linalg.pinv(normal, rtol=1e-10, hermitian=True) @ right if warm else 0 * m
    covariance = sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        W = C @ torch.linalg.inv(C + sigma**2 * identity)
        gamma = sigma**2 / given.noise_std**2 if dds.gamma is None else dds.gamma
        P = torch.linalg.inv(identity + gamma * normal)
        drawn, direction, fresh = dds.eta**2 * float((sigma**2 * W).diagonal().real.mean()), 0.0, lower
        if dds.step == "paper":
            drawn, fresh = 0.0, dds.eta * lower * math.sqrt(1 - lower**2 / sigma**2)
            direction = math.sqrt(lower**2 - fresh**2)
        slope = P @ W + direction / sigma * (identity - W)
        offset = gamma * P @ right + (P - direction / sigma * identity) @ (identity - W) @ m
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.mH + drawn * P @ P.mH + fresh**2 * identity
    found = moments_of_the_code(dds, given, prior, 2 * dds.nfe + 1)
    torch.testing.assert_close(found, (mean, covariance), rtol=1e-6, atol=1e-6)


# Total variation


@pytest.mark.parametrize("shape", [(5, 3, 2), (2, 5, 4, 3), (1, 3, 2)])
def test_differences_have_their_adjoint(shape):
    x = randn(*shape)
    g = randn(*shape[:-3], shape[-3] - 1, *shape[-2:], seed=1)
    expected = torch.diff(x, dim=-3)
    assert torch.equal(through_plane(x), expected)
    torch.testing.assert_close(
        torch.vdot(g.flatten(), expected.flatten()).conj(),
        torch.vdot(x.flatten(), through_plane_adjoint(g).flatten()),
    )


@pytest.mark.parametrize("dtype", [torch.float64, C128])
def test_iterated_admm_denoises_two_slices(dtype):
    """The minimum of |x - x^|^2 / 2 + lam |x1 - x0|: each comes nearer by lam, until they are equal."""
    given, lam, rho = randn(2, 4, 3, dtype=dtype), 0.4, 1.3
    variation = ThroughPlaneTV(given)
    matrix = torch.tensor([[1 + rho, -rho], [-rho, 1 + rho]], dtype=dtype)
    for _ in range(300):
        right = given + rho * variation.pull()
        x = torch.linalg.solve(matrix, right.flatten(1)).reshape(given.shape)
        variation.update(x, lam / rho)
    apart = given[1] - given[0]
    move = 0.5 * apart * (2 * lam / apart.abs()).clamp_max(1)
    assert float((apart.abs() < 2 * lam).sum()) > 0
    assert float((apart.abs() > 2 * lam).sum()) > 0
    torch.testing.assert_close(x, given + torch.stack([move, -move]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [problem(), thick_problem()], ids=["slices", "thick slices"])
@pytest.mark.parametrize("noise_free", [False, True])
def test_equal_to_the_paper_s_steps_worked_out_densely(given, noise_free):
    """One iteration of ADMM a level, its variables kept; of an operator whose norm is not one."""
    lam, rho, prior, noise = 0.1, 0.3, gaussian_prior(), keyed((0, 1, 2))
    dds = solver(lam=lam, coupling=rho, noise_free=noise_free, start="noise")
    A, identity = dense(given.operator, VOLUME).to(C128), torch.eye(N, dtype=C128)
    square = torch.linalg.matrix_norm(A, 2) ** 2
    assert abs(square - 1) > 0.5
    m, C = prior.mean.flatten().repeat(SLICES), slicewise_covariance(prior, SLICES)
    step = torch.eye(SLICES, dtype=C128).diff(dim=0)
    D = torch.kron(step, torch.eye(N // SLICES, dtype=C128))
    sigmas = dds.levels(prior, given.noise_std)
    x = sigmas[0] * noise(0).flatten(1)
    z = w = torch.zeros(3, len(D), dtype=C128)
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        W = C @ torch.linalg.inv(C + sigma**2 * identity)
        denoised = m + (x - m) @ W.mT
        denoised = denoised + math.sqrt(float((sigma**2 * W).diagonal().real.mean())) * noise(
            dds.nfe + index + 1
        ).flatten(1)
        H = A.mH @ A + rho * square * D.mH @ D
        b = A.mH @ given.y.flatten() + rho * square * (z - w) @ D.conj()
        if noise_free:
            inverse = torch.linalg.pinv(H, rtol=1e-10, hermitian=True)
            x = denoised + (b - denoised @ H.mT) @ inverse.mT
        else:
            gamma = sigma**2 / given.noise_std**2
            x = (denoised + gamma * b) @ torch.linalg.inv(identity + gamma * H).mT
        moved = x @ D.mT + w
        z = moved * (1 - lam / rho / moved.abs()).clamp_min(0)
        w = moved - z
        x = x + lower * noise(index + 1).flatten(1)
    torch.testing.assert_close(samples_of(dds, given, prior, noise).flatten(1), x, rtol=1e-3, atol=1e-3)
    assert float((z == 0).double().mean()) not in (0.0, 1.0)


def roughness(x):
    return float(through_plane(x).abs().mean())


def test_total_variation_helps_where_slices_are_alike():
    truth, given, prior = alike_slices_problem()
    noise = keyed_noise(tuple(truth.shape), (0, 1))
    apart, together = (samples_of(DDS3D(nfe=15, lam=lam), given, prior, noise) for lam in (0.0, None))
    assert float((together - truth).norm()) < 0.7 * float((apart - truth).norm())
    assert roughness(together) < 0.4 * roughness(apart)


def test_differences_fall_with_the_weight():
    _, given, prior = alike_slices_problem()
    default, _ = DDS3D().penalty(given, prior, 0.3)
    noise = keyed_noise(given.operator.domain_shape)
    rough = [
        roughness(samples_of(DDS3D(nfe=15, lam=lam), given, prior, noise))
        for lam in (0.0, 0.01 * default, 0.1 * default, default)
    ]
    assert all(high > 1.1 * low for high, low in pairwise(rough))


@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_default_weights(sigma):
    """Beside the denoised volume the total variation weighs v / b, however much the data do."""
    given, prior, b = problem(), gaussian_prior(), 0.3
    v, square = prior.error_variance(sigma), given.norm**2
    for chosen, gamma in ((None, (sigma / given.noise_std) ** 2), (2.5, 2.5)):
        lam, rho = DDS3D(difference=b, gamma=chosen).penalty(given, prior, sigma)
        assert gamma * lam * square == pytest.approx(v / b)
        assert rho == pytest.approx(lam / b)
    assert DDS3D(gamma=0.0, difference=b).penalty(given, prior, sigma) == (0.0, 0.0)
    noise_free = DDS3D(noise_free=True, difference=b).penalty(given, prior, sigma)
    assert noise_free == pytest.approx((given.noise_std**2 / square / b, given.noise_std**2 / square / b**2))
    assert DDS3D(lam=0.2, coupling=3.0).penalty(given, prior, sigma) == (0.2, 3.0)
    assert DDS3D(lam=0.2, difference=b).penalty(given, prior, sigma)[1] == pytest.approx(0.2 / b)


@pytest.mark.parametrize("dtype", [torch.float64, C128])
@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_the_mean_difference_is_that_of_the_volume(dtype, noise_std):
    """``exp(-|d| / b)`` has the mean b for real numbers and 2 b for complex ones; noise is taken off."""
    slices, components = 60, 2 if dtype is C128 else 1
    steps = 0.4 * torch.tensor([0, 1] * (slices // 2), dtype=dtype)[:, None, None].expand(slices, 8, 9)
    identity, prior = ThroughPlaneAverage((slices, 8, 9), 1).to(dtype), gaussian_prior()
    level = math.sqrt(components) * noise_std
    noisy = steps + level * randn(*steps.shape, seed=7, dtype=dtype)
    raw = float(through_plane(noisy).abs().mean()) / components
    found = mean_difference(Problem(noisy, identity, noise_std), prior)
    # Mean magnitudes do not quite add up as standard deviations do.
    assert found == pytest.approx(0.4 / components, rel=0.2 if noise_std else 1e-6)
    assert noise_std == 0 or raw > 1.5 * found
    alike = Problem(0 * noisy, identity, noise_std)
    assert mean_difference(alike, prior) == LEAST_DIFFERENCE * prior.contract.level


def test_the_coupling_follows_the_prior_s_error(monkeypatch):
    """With the error of the prior gone, and with it what total variation could mend, it is slice by slice."""
    given, prior, noise = problem(), gaussian_prior(), keyed((0, 1))
    apart, together = (samples_of(solver(eta=0.0, lam=lam), given, prior, noise) for lam in (0.0, None))
    assert float((apart - together).norm()) > 1e-2 * float(apart.norm())
    monkeypatch.setattr(prior, "error_variance", lambda sigma: 0.0)
    surely = samples_of(solver(eta=0.0), given, prior, noise)
    torch.testing.assert_close(surely, apart, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"lam": 0.01, "coupling": 0.1}])
def test_weights_do_not_depend_on_the_units_of_the_operator(weights):
    given, prior, dds = problem(), gaussian_prior(), solver(cg_iterations=60, sigma_min=0.05, **weights)
    other = Problem(50 * given.y, 50.0 * given.operator, 50 * given.noise_std)
    one, same = (samples_of(dds, item, prior, keyed()) for item in (given, other))
    torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-6)


# Volumes


@pytest.mark.parametrize("weights", [{"lam": 0.0}, {}])
def test_a_volume_does_not_depend_on_its_batch(weights):
    given, prior, dds = problem(), gaussian_prior(), solver(cg_iterations=4, **weights)
    together = samples_of(dds, given, prior, keyed(range(3)))
    for k in range(3):
        torch.testing.assert_close(samples_of(dds, given, prior, keyed([k]))[0], together[k])


@pytest.mark.parametrize("slice_batch", [1, 3, 100])
def test_slices_the_prior_is_given_at_once_change_nothing(slice_batch):
    given, prior, noise = problem(), gaussian_prior(), keyed((0, 1))
    expected = samples_of(solver(), given, prior, noise)
    torch.testing.assert_close(samples_of(solver(slice_batch=slice_batch), given, prior, noise), expected)
    counting = Counting()
    samples_of(solver(slice_batch=slice_batch), given, counting, noise)
    assert counting.calls == 6 * math.ceil(2 * SLICES / slice_batch)


def test_posterior_of_a_volume():
    _, given, prior = alike_slices_problem(slices=3)
    draw = partial(
        reconstruct,
        given.y,
        given.operator,
        prior,
        DDS3D(nfe=4),
        num_samples=3,
        noise_std=given.noise_std,
        scale=Scale(1.0),
        keep_samples=True,
        quantiles=(0.5,),
        micro_batch=2,
    )
    result = draw()
    assert result.samples is not None
    assert result.samples.shape == (3, 3, 12, 12)
    assert result.mean.shape == result.std.shape == result.quantiles[0.5].shape == (3, 12, 12)
    torch.testing.assert_close(result.mean, result.samples.mean(0))
    assert float(result.std.min()) > 0
    assert torch.equal(draw().mean, result.mean)
    assert result.settings["name"] == "DDS3D"


def test_a_ct_volume_in_single_precision():
    """A cylinder and a ball, seen from few directions: nearer along z, and no further off in plane."""
    size, slices, noise_std = 16, 6, 0.01
    z, v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (slices, size, size)), indexing="ij")
    ball = 0.3 * (u**2 + (v - 0.2) ** 2 + z**2 < 0.3)
    truth = 0.8 * (u**2 + v**2 < 0.7) + ball
    scan = CTOperator(ParallelBeam(equispaced_angles(9), 24, 1.0), (size, size), 1.0)
    A = SliceStack((1 / scan.norm()) * scan, slices)
    y = A(truth)
    y = y + noise_std * randn(*y.shape, dtype=torch.float32)
    mean = truth.mean(0)
    prior = GaussianPrior(mean, spectrum=torch.fft.fft2(truth[0] - mean, norm="ortho").abs().square() + 0.02)
    apart, together = (
        reconstruct(y, A, prior, DDS3D(nfe=12, lam=lam), noise_std=noise_std, scale=Scale(1.0)).mean
        for lam in (0.0, None)
    )
    assert together.dtype == torch.float32
    assert float((together - truth).norm()) < float((apart - truth).norm())
    along_z = [float(through_plane(x - truth).norm()) for x in (together, apart)]
    assert along_z[0] < 0.7 * along_z[1]


def test_a_single_slice():
    given, prior = volume_problem(1, SHAPE), gaussian_prior()
    dds, noise = solver(), keyed_noise((1, *SHAPE))
    expected = samples_of(solver(lam=0.0), given, prior, noise)
    torch.testing.assert_close(samples_of(dds, given, prior, noise), expected, rtol=1e-6, atol=1e-6)


# What is published, and what cannot be done


def test_published_settings():
    paper, released = DDS3D.paper(), DDS3D.released()
    assert (paper.nfe, paper.cg_iterations, paper.step, paper.noise_free) == (49, 5, "paper", True)
    assert (paper.lam, paper.coupling) == (released.lam, released.coupling) == (PAPER_LAM, PAPER_RHO)
    assert pytest.approx(0.004) == PAPER_LAM / PAPER_RHO
    assert (released.nfe, released.eta, released.step) == (50, 0.85, "released")
    assert DDS3D.paper(lam=0.1).lam == DDS3D.released(lam=0.1).lam == 0.1
    _, given, prior = alike_slices_problem(slices=3, noise_std=0.001)
    x = samples_of(DDS3D.paper(9), given, prior, keyed_noise(given.operator.domain_shape))
    assert float((given.operator(x[0]) - given.y).norm()) < 0.3 * float(given.y.norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "DDS3D: nfe must be at least 1, got 0"),
        ({"slice_batch": 0}, "DDS3D: slice_batch must be at least 1, got 0"),
        ({"lam": -0.1}, "DDS3D: lam must not be negative, got -0.1"),
        ({"lam": math.nan}, "DDS3D: lam must not be negative, got nan"),
        ({"difference": 0.0}, "DDS3D: difference must be positive, got 0.0"),
        ({"coupling": 0.0}, r"DDS3D: coupling must be positive, got 0.0"),
        ({"coupling": math.inf}, r"DDS3D: coupling must be positive, got inf"),
        ({"step": "euler"}, "DDS3D: step is one of renoise, paper, released, not 'euler'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=message):
        DDS3D(**settings)


def test_the_noise_level_is_needed_for_the_weights():
    given = problem(noise_std=0.0)
    for settings, message in (
        ({}, "got 0.0; or set gamma or noise_free"),
        ({"noise_free": True}, "got 0.0; or set lam"),
    ):
        with pytest.raises(SolverError, match=f"DDS3D needs a positive noise level, {message}"):
            samples_of(solver(**settings), given, Counting(), keyed())
    for enough in (solver(gamma=1.0), solver(noise_free=True, lam=0.1)):
        assert torch.isfinite(samples_of(enough, given, Counting(), keyed()).abs()).all()
