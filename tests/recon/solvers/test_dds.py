"""DDS with a Gaussian prior, where it is an affine map of its noise, against that map worked out densely."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from operators import SinglecoilMRI
from priors import GaussianPrior, PriorError
from recon import DDS, ReconError, Scale, reconstruct
from recon.solvers.base import WARM_START_STEPS, Problem, SolverError
from recon.solvers.cg import cg
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    multicoil_problem,
)

SHAPE, N = (6, 5), 30

gaussian_prior = partial(helper.gaussian_prior, SHAPE)
problem = partial(multicoil_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


def solver(**settings):
    return DDS(**{"nfe": 6, "cg_iterations": 400, "cg_tolerance": 0.0, "sigma_max": 3.0, **settings})


def krylov(matrix, right, steps):
    """The best approximation in the Krylov space, which is what conjugate gradients compute."""
    basis = [right / right.norm()]
    for _ in range(steps - 1):
        new = matrix @ basis[-1]
        for _ in range(2):  # orthogonalised twice, for accuracy
            for vector in basis:
                new = new - torch.vdot(vector, new) * vector
        basis.append(new / new.norm())
    V = torch.stack(basis, dim=1)
    return V @ torch.linalg.solve(V.mH @ matrix @ V, V.mH @ right)


def moments_by_recursion(dds, given, prior):
    """The same by dense linear algebra, from the paper's equations."""
    A = dense(given.operator, SHAPE).to(C128)
    normal, right, identity = A.mH @ A, A.mH @ given.y.flatten(), torch.eye(N, dtype=C128)
    m, C = prior.mean.flatten(), covariance_of(prior)
    sigmas = dds.levels(prior, given.noise_std)
    mean = krylov(normal, right, WARM_START_STEPS) if dds.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        # Tweedie: D(x) = W x + (I - W) m.
        W = C @ torch.linalg.inv(C + sigma**2 * identity)
        # Data consistency: x̂ = P D(x) + c.
        if dds.noise_free:
            inverse = torch.linalg.pinv(normal, rtol=1e-10, hermitian=True)
            P, c = identity - inverse @ normal, inverse @ right
        else:
            gamma = sigma**2 / given.noise_std**2 if dds.gamma is None else dds.gamma
            P = torch.linalg.inv(identity + gamma * normal)
            c = gamma * P @ right
        # x' = x̂ + direction (x - D(x)) / sigma + fresh z, where x̂ comes of D(x) + drawn z.
        drawn = 0.0
        if dds.step == "renoise":
            fresh, direction = lower, 0.0
            drawn = dds.eta**2 * float((sigma**2 * W).diagonal().real.mean())
        elif dds.step == "released":
            fresh, direction = dds.eta * lower, math.sqrt(1 - dds.eta**2) * lower
        else:
            fresh = dds.eta * lower * math.sqrt(1 - lower**2 / sigma**2)
            direction = math.sqrt(lower**2 - fresh**2)
        slope = P @ W + direction / sigma * (identity - W)
        offset = c + (P - direction / sigma * identity) @ (identity - W) @ m
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.mH + drawn * P @ P.mH + fresh**2 * identity
    return mean, covariance


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"gamma": 2.0, "start": "noise"}, 0.4),
        ({"gamma": 2.0, "start": "noise", "eta": 0.0}, 0.4),
        ({"gamma": 2.0, "start": "noise", "eta": 0.5}, 0.4),
        ({"gamma": 2.0, "start": "noise", "step": "paper"}, 0.4),
        ({"gamma": 2.0, "start": "noise", "step": "paper", "eta": 0.0}, 0.4),
        ({"gamma": 2.0, "start": "noise", "step": "paper", "eta": 0.8, "schedule": "vp-linear"}, 0.4),
        ({"gamma": 2.0, "start": "noise", "step": "released", "eta": 0.85}, 0.4),
        ({"gamma": 0.5, "start": "warm"}, 0.8),
        ({"gamma": None, "start": "warm"}, 0.8),
        ({"noise_free": True, "start": "noise"}, 0.1),
        ({"noise_free": True, "start": "warm", "step": "paper"}, 0.1),
        ({"gamma": 0.0, "start": "noise"}, 0.4),
    ],
)
def test_equal_to_the_dense_recursion(settings, share):
    dds, given, prior = solver(**settings), problem(share), gaussian_prior()
    found = moments_of_the_code(dds, given, prior, 2 * dds.nfe + 1)
    torch.testing.assert_close(found, moments_by_recursion(dds, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-4


def test_samples_from_keyed_noise_have_these_moments():
    dds, given, prior = solver(gamma=2.0, start="noise", cg_iterations=40), problem(), gaussian_prior()
    mean, covariance = moments_by_recursion(dds, given, prior)
    count = 1400
    noise = keyed(range(count))
    x = dds.sample(given, prior, noise).samples.flatten(1) - mean
    # E|z|^2 = 2: the covariance of the complex numbers is twice that per real component.
    tolerance = 6 * 2 * float(covariance.abs().max()) / math.sqrt(count)
    assert float((x.mT @ x.conj() / count - 2 * covariance).abs().max()) < tolerance
    assert float(x.mean(0).abs().max()) < 6 * math.sqrt(2 * float(covariance.abs().max()) / count)


# Without data

VARIANCE = torch.tensor([[0.01, 0.1], [1.0, 4.0]], dtype=torch.float64)


def final_variances(dds, variance=VARIANCE):
    prior = GaussianPrior(torch.zeros(2, 2, dtype=C128), variance=variance, sigma_max=1e3)
    A = SinglecoilMRI(torch.ones(2, 2)).to(C128)
    given = Problem(torch.zeros(2, 2, dtype=C128), A, 1.0)
    _, covariance = moments_of_the_code(dds, given, prior, 2 * dds.nfe + 1)
    return covariance.diagonal().real.reshape(2, 2)


@pytest.mark.parametrize("nfe", [1, 3, 20])
def test_without_data_the_marginal_is_the_prior(nfe):
    # Exact whatever the number of steps, up to what the start leaves out: the image below the first noise.
    dds = solver(nfe=nfe, gamma=0.0, start="noise", sigma_max=1000.0, sigma_min=0.05)
    assert dds.step == "renoise"
    left = final_variances(dds, torch.full((2, 2), 0.7, dtype=torch.float64))
    torch.testing.assert_close(left, torch.full((2, 2), 0.7, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_without_data_the_paper_s_marginal_approaches_the_prior(eta):
    errors = []
    for nfe in (20, 40, 80, 160):
        settings = {"gamma": 0.0, "eta": eta, "step": "paper", "sigma_max": 40.0, "sigma_min": 0.002}
        dds = solver(nfe=nfe, start="noise", **settings)
        errors.append(float((final_variances(dds) / VARIANCE - 1).abs().max()))
    # The error of the discretisation is of first order in the step.
    for coarse, fine in pairwise(errors[1:]):
        assert 1.6 < coarse / fine < 2.2
    assert errors[-1] < 0.1


@pytest.mark.parametrize(("eta", "share"), [(0.85, 0.7634), (1.0, 0.5)])
def test_the_released_step_loses_variance(eta, share):
    # In the limit of many steps and a small sigma: eta^2 / (2 - 2 sqrt(1 - eta^2)) of it is left.
    assert share == pytest.approx(eta**2 / (2 - 2 * math.sqrt(1 - eta**2)), abs=1e-4)
    left = final_variances(DDS.released(250, gamma=0.0, eta=eta))[1, 0]
    assert float(left) == pytest.approx(share, abs=0.025)
    kept = final_variances(DDS.paper(250, gamma=0.0, eta=eta))[1, 0]
    assert float(kept) > 0.96


# Data


def test_noise_free_form_reaches_the_data():
    given, prior = problem(0.1), gaussian_prior()
    truth = prior.sample(1, torch.Generator().manual_seed(7))[0]
    given = Problem(given.operator(truth), given.operator, 0.0)
    noise = keyed(range(3))
    x = solver(noise_free=True, nfe=10, gamma=None).sample(given, prior, noise).samples
    assert float((given.operator(x) - given.y).norm() / given.y.norm()) < 1e-10
    # Where nothing was measured, the samples are free to differ.
    assert float((x[0] - x[1]).norm()) > 0.1 * float(truth.norm())


# What a run costs and reports


def test_the_exponent_of_the_levels_and_the_setting_for_ct():
    prior = gaussian_prior()
    # sigma^(1/rho) falls evenly (Karras et al. 2022, Eq. 5); for rho of 1 sigma itself.
    assert DDS(nfe=3, sigma_max=2.0, sigma_min=1.0, rho=1.0).levels(prior, 0.1) == [2.0, 1.5, 1.0, 0.0]
    even = DDS(nfe=3, sigma_max=4.0, sigma_min=1.0, rho=2.0).levels(prior, 0.1)
    assert even == pytest.approx([4.0, 2.25, 1.0, 0.0])
    many = [sum(level > 0.5 for level in made.levels(prior, 0.02)) for made in (DDS.ct(), DDS())]
    assert many[0] > many[1]
    assert DDS.ct(nfe=7).nfe == 7
    with pytest.raises(SolverError, match="DDS: rho must be positive, got 0"):
        DDS(rho=0.0)


def test_early_iterations_hold_above_sixteen_noise_levels_alone(monkeypatch):
    given, prior = problem(noise_std=0.02), gaussian_prior()
    taken = []

    def noted(matrix, b, x0=None, *, max_iter, axes):
        taken.append(max_iter)
        return cg(matrix, b, x0, max_iter=max_iter, axes=axes)

    monkeypatch.setattr("recon.solvers.dds.cg", noted)
    for noise_free in (False, True):
        solver = DDS(nfe=12, cg_iterations=9, cg_tolerance=0.0, early_iterations=3, noise_free=noise_free)
        taken.clear()
        solver.sample(given, prior, keyed([0]))
        assert taken == [3 if sigma > 0.32 else 9 for sigma in solver.levels(prior, 0.02)[:-1]]
        assert {3, 9} == set(taken)
    with pytest.raises(SolverError, match="DDS: early_iterations must be at least 1, got 0"):
        DDS(early_iterations=0)


def test_the_fast_setting_applies_the_operator_half_as_often_and_stays_near(monkeypatch):
    given, prior = problem(noise_std=0.02), gaussian_prior()
    normal, calls = given.operator.normal, []

    def counted(x):
        calls.append(1)
        return normal(x)

    monkeypatch.setattr(given.operator, "normal", counted)
    images, applied = [], []
    for made in (DDS(), DDS.fast()):
        calls.clear()
        images.append(made.sample(given, prior, keyed([0])).samples)
        applied.append(len(calls))
    assert applied[1] < 0.5 * applied[0]
    assert float((images[1] - images[0]).norm() / images[0].norm()) < 0.1
    assert DDS.fast(nfe=7).nfe == 7


def test_published_settings():
    assert [DDS.paper(nfe).eta for nfe in (19, 49, 99)] == [0.15, 0.5, 0.8]
    paper, released = DDS.paper(), DDS.released()
    assert (paper.nfe, paper.cg_iterations, paper.gamma, paper.step) == (49, 5, 1.0, "paper")
    assert (paper.schedule, paper.start) == (released.schedule, released.start) == ("vp-linear", "noise")
    assert (released.nfe, released.eta, released.step, released.gamma) == (50, 0.85, "released", 1.0)
    assert DDS.paper(49, eta=0.3).eta == DDS.released(49, eta=0.3).eta == 0.3
    unknown: dict[str, Any] = {"steps": 3}
    for make in (DDS, DDS.paper, DDS.released):
        with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
            make(**unknown)


# What cannot be done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe must be at least 1, got 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1, got 0"),
        ({"cg_tolerance": -0.1}, "cg_tolerance must be at least 0, got -0.1"),
        ({"cg_tolerance": math.nan}, "cg_tolerance must be at least 0, got nan"),
        ({"gamma": -1.0}, "gamma must not be negative, got -1.0"),
        ({"gamma": math.nan}, "gamma must not be negative, got nan"),
        ({"eta": 1.1}, r"eta must lie in \[0, 1\], got 1.1"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\], got -0.1"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
        ({"schedule": "cosine"}, "schedule is one of karras, vp-linear, not 'cosine'"),
        ({"step": "euler"}, "step is one of renoise, paper, released, not 'euler'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"DDS: {message}"):
        DDS(**settings)


def run(dds, given):
    return dds.sample(given, Counting(), keyed())


def test_the_last_level_is_that_of_the_measurement():
    prior = Counting()
    assert DDS().levels(prior, 0.05)[-2:] == [pytest.approx(0.05), 0.0]
    assert DDS().levels(prior, 1e-6)[-2:] == [pytest.approx(prior.contract.sigma_min), 0.0]
    assert DDS(sigma_min=0.01).levels(prior, 0.05)[-2:] == [pytest.approx(0.01), 0.0]


def test_impossible_noise_levels():
    with pytest.raises(PriorError, match=r"0 < sigma_min <= sigma_max, got 0.002 and 0.001"):
        run(DDS(sigma_max=0.001), problem())
    with pytest.raises(ReconError, match=r"must lie in 1..1000, got 1001"):
        run(DDS(nfe=1001, schedule="vp-linear"), problem())


@pytest.mark.parametrize("noise_std", [0.0, -1.0, math.nan])
def test_the_noise_level_is_needed_for_the_weight(noise_std):
    with pytest.raises(SolverError, match=f"needs a positive noise level, got {noise_std}"):
        run(DDS(nfe=2), problem(noise_std=noise_std))
    for dds in (DDS(nfe=2, gamma=1.0), DDS(nfe=2, noise_free=True)):
        assert torch.isfinite(run(dds, problem(noise_std=noise_std)).samples.abs()).all()


@pytest.mark.parametrize("c", [1e-3, 0.999, 7e5])
def test_scaled_data_give_the_scaled_image_at_the_defaults(c):
    # Few coils and a broad prior: badly conditioned, where a stopping rule that rounding tips would show.
    A, prior = (
        problem(0.3).operator.to(torch.complex64),
        GaussianPrior(torch.zeros(SHAPE, dtype=torch.complex64), variance=1.0),
    )
    y = A(prior.sample(1, torch.Generator().manual_seed(3))[0])
    one, other = (
        reconstruct(a * y, A, prior, DDS(nfe=5), 2, noise_std=a * 0.01, scale=Scale(a)) for a in (1.0, c)
    )
    torch.testing.assert_close(other.mean / c, one.mean, rtol=0, atol=1e-4 * float(one.mean.abs().max()))
