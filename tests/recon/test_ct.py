"""From a sinogram to an image in physical units."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from operators.ct_noise import simulate_transmission
from operators.filtered_backprojection import fbp
from priors import GaussianPrior
from recon import DDS, ReconError
from recon.ct import (
    CTSettings,
    beyond_range,
    ct_problem,
    image_grid,
    last_noise_level,
    reconstruct_sinogram,
    unresolved,
)
from recon.io.ct_scan import CTScan
from recon.solvers import make_solver
from recon.solvers.base import Problem

MU = 0.02
SHAPE, PIXEL = (32, 32), 4.0
PHOTONS = 1e5


def geometry(kind="parallel", views=40):
    if kind == "parallel":
        return ParallelBeam(equispaced_angles(views), 48, 3.0)
    return FanBeam(equispaced_angles(views, 2 * math.pi), 64, 4.0, 300.0, 500.0)


def phantom():
    """A disc of water of 50 mm radius with a smaller one of 1.5 times its attenuation, in 1/mm."""
    y, x = ((16 - torch.arange(32) - 0.5) * PIXEL)[:, None], (torch.arange(32) - 15.5) * PIXEL
    return MU * ((x**2 + y**2 < 50**2) + 0.5 * ((x - 15) ** 2 + y**2 < 15**2).float())


def spectrum():
    v, u = torch.meshgrid(*(torch.fft.fftfreq(n) for n in SHAPE), indexing="ij")
    shape = 1 / (0.02 + u**2 + v**2)
    return 0.2 * shape / shape.mean()


def prior():
    made = GaussianPrior(torch.full(SHAPE, 0.5), spectrum=spectrum())
    made.contract = replace(made.contract, channels="real", unit="water")
    return made


def scan(kind="parallel", views=40, seed=0):
    operator = CTOperator(geometry(kind, views), SHAPE, PIXEL)
    clean = operator(phantom())
    noisy = simulate_transmission(clean, PHOTONS, torch.Generator().manual_seed(seed)).line_integrals
    return operator, noisy


def error(image):
    return float((image - phantom()).square().mean().sqrt()) / MU


@pytest.mark.parametrize("kind", ["parallel", "fan"])
@pytest.mark.parametrize(
    ("solver", "bound"), [("fbp", 0.12), ("sirt", 0.1), ("cgls", 0.1), ("tv", 0.05), ("cg-sense", 0.1)]
)
def test_attenuation_comes_out_in_units(kind, solver, bound):
    operator, y = scan(kind)
    result = reconstruct_sinogram(y, operator, None, make_solver(solver), CTSettings(photons=PHOTONS))
    assert error(result.mean) < bound
    inside = phantom() == MU
    assert float(result.mean[inside].mean()) == pytest.approx(MU, rel=0.03)


def test_dds_samples_the_posterior_of_a_gaussian_prior():
    operator, y = scan(views=12)
    settings, model, n = CTSettings(photons=PHOTONS, num_samples=8), prior(), 32 * 32
    problem = ct_problem(y, operator, settings)
    A = problem.operator(torch.eye(n).reshape(n, *SHAPE)).flatten(1).mT.double()
    F = torch.fft.fft2(torch.eye(n).reshape(n, *SHAPE).double())
    C = torch.fft.ifft2(spectrum() * F).real.flatten(1)
    gain = C @ A.mT @ torch.linalg.inv(A @ C @ A.mT + problem.noise_std**2 * torch.eye(len(A)).double())
    mean = 0.5 + gain @ (problem.y.flatten().double() - A @ torch.full((n,), 0.5).double())
    std = float((C - gain @ A @ C).diagonal().mean().sqrt())
    result = reconstruct_sinogram(y, operator, model, DDS(nfe=20), settings)
    found = (result.mean / MU).flatten().double()
    # What the mean of 8 samples is uncertain by, and a fifth more for what DDS approximates.
    assert float((found - mean).square().mean().sqrt()) < 1.2 * std / math.sqrt(8)
    assert float(result.std.square().mean().sqrt()) / MU == pytest.approx(std, rel=0.1)


def test_hounsfield_units_are_the_same_image():
    operator, y = scan(views=12)
    settings = CTSettings(photons=PHOTONS, num_samples=2, keep_samples=True)
    mu = reconstruct_sinogram(y, operator, prior(), DDS(nfe=3), settings)
    hu = reconstruct_sinogram(y, operator, prior(), DDS(nfe=3), replace(settings, units="HU"))
    torch.testing.assert_close(hu.mean, 1000 * (mu.mean / MU - 1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(hu.std, 1000 * mu.std / MU, rtol=1e-4, atol=1e-3)
    assert hu.samples is not None
    assert mu.samples is not None
    torch.testing.assert_close(hu.samples, 1000 * (mu.samples / MU - 1), rtol=1e-5, atol=1e-3)


def test_the_operator_has_unit_norm_and_the_noise_is_white():
    operator, _ = scan()
    clean = operator(phantom())
    settings = CTSettings(photons=PHOTONS)
    noisy = simulate_transmission(clean, PHOTONS, torch.Generator().manual_seed(1)).line_integrals
    problem = ct_problem(noisy, operator, settings)
    assert problem.operator.norm() == pytest.approx(1, rel=0.02)
    residual = (problem.y - problem.operator(phantom() / MU)) / problem.noise_std
    thick = clean > clean.max() / 2
    assert float(residual[thick].std()) == pytest.approx(1, rel=0.1)
    assert float(residual[~thick].std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("solver", ["dps", "dds"])
def test_data_are_weighted_unless_a_solver_cannot_have_it(solver):
    operator, y = scan(views=12)
    made, given = make_solver(solver, None, {"nfe": "2"}), []

    class Spy:
        needs = made.needs

        def sample(self, problem, *rest):
            given.append(problem)
            return made.sample(problem, *rest)

    spied: Any = Spy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recon.sampling.settings_of", lambda _: {})
        reconstruct_sinogram(y, operator, prior(), spied, CTSettings(photons=PHOTONS, num_samples=1))
    ratio = given[0].y / y
    assert bool((ratio.max() < 1.001 * ratio.min()) == (solver == "dps"))


def test_length_units_do_not_change_the_image():
    """The same scan with all lengths doubled and attenuation halved."""
    operator, y = scan(views=12)
    g = operator.geometry
    assert isinstance(g, ParallelBeam)
    double = CTOperator(replace(g, detector_spacing=2 * g.detector_spacing), SHAPE, 2 * PIXEL)
    a = reconstruct_sinogram(y, operator, prior(), DDS(nfe=5), CTSettings(photons=PHOTONS, num_samples=1))
    b = reconstruct_sinogram(
        y, double, prior(), DDS(nfe=5), CTSettings(photons=PHOTONS, num_samples=1, mu_water=MU / 2)
    )
    torch.testing.assert_close(b.mean, a.mean / 2, rtol=1e-3, atol=1e-5)


def test_views_are_chosen_within_the_arc():
    g = geometry(views=40)
    chosen = CTSettings(arc=math.pi / 2, start=math.pi / 4, views=5).chosen_views(g)
    angles = [g.angles[i] for i in chosen]
    assert len(angles) == 5
    assert all(math.pi / 4 - 1e-6 <= a <= 3 * math.pi / 4 + 1e-6 for a in angles)
    assert CTSettings().chosen_views(g) == tuple(range(40))


def test_the_grid_covers_what_is_seen():
    scans = {
        kind: CTScan(torch.zeros(1, 40, n), "line_integrals", Path("x"), geometry(kind))
        for kind, n in (("parallel", 48), ("fan", 64))
    }
    assert geometry().field_of_view == pytest.approx(48 * 3.0)
    assert geometry("fan").field_of_view == pytest.approx(2 * 300 * math.sin(math.atan(128 / 500)))
    told = replace(scans["fan"], image_shape=(20, 20), pixel_size=8.0)
    for found, expected in (
        (image_grid(scans["parallel"]), (48, 3.0)),
        (image_grid(scans["parallel"], size=96), (96, 1.5)),
        (image_grid(scans["parallel"], pixel_size=2.0), (72, 2.0)),
        (image_grid(scans["fan"], size=10, pixel_size=7.0), (10, 7.0)),
        (image_grid(told), (20, 8.0)),
        (image_grid(told, size=40), (40, 4.0)),
    ):
        assert found[0] == (expected[0], expected[0])
        assert found[1] == pytest.approx(expected[1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": 0}, "at least 1 pixel a side, not 0"),
        ({"size": -3, "pixel_size": 1.0}, "at least 1 pixel a side, not -3"),
        *(({"pixel_size": side}, "a positive number of mm") for side in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_impossible_grids(asked, message):
    with pytest.raises(ReconError, match=message):
        image_grid(CTScan(torch.zeros(1, 40, 48), "line_integrals", Path("x"), geometry()), **asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": "1/cm"}, "1/mm or HU or 1/element, not in '1/cm'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"arc": 7.0}, "an arc lies between 0 and 360 degrees, got 401.07"),
        ({"mu_water": 0.0}, "attenuation of water is a positive number of 1/mm, got 0.0"),
        ({"resolve": 0.0}, "what is to be resolved is a positive number of HU, got 0.0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ReconError, match=message):
        CTSettings(**settings)


def test_filtered_backprojection_needs_no_matrix():
    """As from the matrix, with one projection of the result for its residual and none else."""
    operator, y = scan()
    applied = []

    class Counting(CTOperator):
        def _forward(self, x):
            applied.append(tuple(x.shape))
            return super()._forward(x)

        def _adjoint(self, y):
            raise AssertionError("the adjoint is not needed")

    lazy = Counting(operator.geometry, SHAPE, PIXEL, engine="on-the-fly")
    settings = CTSettings(photons=PHOTONS)
    result = reconstruct_sinogram(y, lazy, None, make_solver("fbp"), settings)
    assert applied == [SHAPE]
    torch.testing.assert_close(result.mean, fbp(operator, y), rtol=1e-5, atol=1e-7)
    # In the units of the line integrals.
    misfit = float((y - operator(result.mean)).square().mean().sqrt())
    assert result.residual == pytest.approx(misfit, rel=1e-4)
    assert not any("raised" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("solver", "settings", "level"),
    [
        ("dds", {"sigma_min": "0.02"}, 0.02),
        ("diffpir", {"sigma_min": "0.004"}, 0.004),
        ("dds", {}, 0.05),  # the data's
        ("ula", {"sigma_min": "0.03"}, 0.03),
        ("ula", {"sigma_min": "0.0001"}, 0.002),  # the prior's
        ("ula", {}, 0.025),
        ("twisted-smc", {"sigma_min": "0.01"}, 0.01),
        ("pnp-dm", {}, 0.002),
    ],
)
def test_where_noise_levels_end(solver, settings, level):
    made = make_solver(solver, None, settings)
    operator, y = scan(views=12)
    assert last_noise_level(made, prior(), Problem(y, operator, 0.05)) == pytest.approx(level)


def test_a_schedule_that_cannot_resolve_what_is_asked_for():
    """Prior of 12 bits: 1 HU is 0.001 in units of water."""
    assert unresolved(0.01, 10.0) == ()
    (warning,) = unresolved(0.0101, 10.0)
    assert warning.startswith("the noise levels end at 10.1 HU, so differences of 10 HU are not resolved")
    operator, y = scan(views=12)
    for sigma_min, resolve, warned in ((0.02, 10.0, True), (0.02, 21.0, False), (0.002, 1.0, True)):
        settings = CTSettings(photons=PHOTONS, num_samples=1, resolve=resolve)
        result = reconstruct_sinogram(y, operator, prior(), DDS(nfe=2, sigma_min=sigma_min), settings)
        found = [warning for warning in result.warnings if "noise levels end" in warning]
        assert len(found) == warned
        assert not warned or f"end at {1000 * sigma_min:g} HU" in found[0]


def test_values_beyond_what_the_prior_has_learned_from():
    inside = torch.tensor([[-0.1, 1.0], [2.0, 4.1]])
    assert beyond_range(inside, "chest") == ()
    for value in (-0.2, 5.0):
        (warning,) = beyond_range(torch.tensor([[0.0, value]]), "chest")
        assert f"{1000 * (value - 1):.0f}" in warning
        assert "beyond -1024 to 3071 HU, which prior 'chest' has learned from" in warning
    operator, y = scan(views=12)
    for level, warned in ((0.5, False), (6.0, True)):
        # So sure of its level that data of much noise change nothing.
        model = GaussianPrior(torch.full(SHAPE, level), spectrum=1e-5 * spectrum())
        model.contract = replace(model.contract, channels="real", unit="water")
        settings = CTSettings(noise_std=10.0, num_samples=1)
        result = reconstruct_sinogram(y, operator, model, DDS(nfe=3, start="noise"), settings)
        assert any("has learned from" in warning for warning in result.warnings) == warned


def test_a_prior_of_one_material_is_refused():
    operator, y = scan(views=12)
    model = prior()
    model.contract = replace(model.contract, unit="object")
    with pytest.raises(ReconError, match="in units of its material"):
        reconstruct_sinogram(y, operator, model)


def test_data_that_do_not_fit():
    operator, y = scan()
    with pytest.raises(ReconError, match=r"shape \(39, 48\), the operator's is \(40, 48\)"):
        reconstruct_sinogram(y[1:], operator, None, make_solver("fbp"))
    y[3, 4] = math.nan
    with pytest.raises(ReconError, match="values that are not finite"):
        reconstruct_sinogram(y, operator, None, make_solver("fbp"))
