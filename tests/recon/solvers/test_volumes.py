"""Solvers that know nothing of volumes on data that mix slices, against dense solves."""

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch

from operators import CoilwiseMRI, CTOperator, MulticoilMRI, ParallelBeam, SliceStack, ThroughPlaneAverage
from operators.ct_geometry import equispaced_angles
from recon import CGLS, DAPS, DDS, DiffPIR, PiGDM, PnPDM, Scale, Tikhonov
from recon.nullspace import split_image
from recon.solvers.base import Problem
from recon.solvers.cg import cg, mixed_axes
from tests.operators.helper import dense
from tests.recon.solvers.helper import (
    C128,
    gaussian_prior,
    keyed_noise,
    moments_of_the_code,
    randn,
    random_mask,
    samples_of,
    slicewise_covariance,
    solve,
    volume_problem,
)

SLICES, SHAPE = 4, (3, 2)
VOLUME, N = (SLICES, *SHAPE), 24

EXACT: dict[str, Any] = {"cg_iterations": 200, "cg_tolerance": 0.0, "sigma_max": 3.0}


def thick_operator(coils=True):
    """Thick slices that overlap, so that every slice is mixed with every other one; alone or scanned."""
    mean = ThroughPlaneAverage(VOLUME, 2, step=1, profile=[0.7, 0.3]).to(C128)
    scan = MulticoilMRI(randn(3, *SHAPE, seed=4), random_mask(SHAPE, 0.6))
    return SliceStack(scan, SLICES - 1) @ mean if coils else mean


def thick_problem(coils=True, noise_std=0.2):
    A = thick_operator(coils)
    return Problem(A(randn(*VOLUME, seed=5)) + 0.1 * randn(*A.range_shape, seed=6), A, noise_std)


thick = pytest.mark.parametrize("coils", [True, False], ids=["scanned", "averaged"])


def test_which_axes_are_mixed():
    A = volume_problem(SLICES, SHAPE).operator
    assert mixed_axes(A) == 2
    assert mixed_axes(A.of_slice(0)) == 2
    assert mixed_axes(CoilwiseMRI(3, random_mask(SHAPE))) == 2
    assert mixed_axes(thick_operator()) == 3
    rays = CTOperator(ParallelBeam(equispaced_angles(5), 9, 1.0), (6, 5), 1.0)
    assert mixed_axes(0.3 * SliceStack(rays, 4)) == 2
    assert mixed_axes(SliceStack(SliceStack(rays, 4), 2)) == 2
    assert mixed_axes(SliceStack(SliceStack(rays, 2) @ ThroughPlaneAverage((4, 6, 5), 2), 3)) == 4


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("start", [False, True])
def test_conjugate_gradients_on_items_of_any_number_of_axes(axes, start):
    """As many matrices as there are items, whose scales lie far apart."""
    shape = (2, 3, 4)
    items, size = shape[: 3 - axes], torch.Size(shape[3 - axes :]).numel()
    root = randn(2, *items, size, size + 3)
    scale = torch.logspace(-3, 3, root[..., 0, 0].numel(), dtype=torch.float64).reshape(2, *items)
    H = scale[..., None, None] * root @ root.mH
    b, x0 = randn(2, *shape, seed=1), randn(2, *shape, seed=2) if start else None

    def matrix(x):
        return (H @ x.flatten(-axes)[..., None]).reshape(x.shape)

    result = cg(matrix, b, x0, max_iter=300, axes=axes)
    expected = torch.linalg.solve(H, b.flatten(-axes)[..., None]).reshape(b.shape)
    torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert result.iterations.shape == result.residual.shape == (2, *items)


def test_axes_that_an_item_cannot_have():
    for axes in (0, 4):
        with pytest.raises(ValueError, match=f"an item of conjugate gradients has 1 to 3 axes, not {axes}"):
            cg(lambda x: x, randn(2, 3, 4), axes=axes)


@thick
@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_tikhonov(coils, weight):
    given = thick_problem(coils)
    A = dense(given.operator, VOLUME).to(C128)
    matrix = A.mH @ A + weight * torch.eye(N, dtype=C128)
    expected = torch.linalg.solve(matrix, A.mH @ given.y.flatten()).reshape(VOLUME)
    x = solve(Tikhonov(weight=weight, iterations=200), given).samples[0]
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


@thick
def test_cgls_ends_at_least_squares(coils):
    given = thick_problem(coils)
    A = dense(given.operator, VOLUME).to(C128)
    expected = (torch.linalg.pinv(A, rtol=1e-10) @ given.y.flatten()).reshape(VOLUME)
    x = solve(CGLS(iterations=100), given).samples[0]
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@thick
def test_cgls_steps_are_those_of_the_whole_volume(coils):
    """After k steps the image is the best of its Krylov space, which with steps of slices it is not."""
    given, k = thick_problem(coils), 3
    A = dense(given.operator, VOLUME).to(C128)
    vectors = [A.mH @ given.y.flatten()]
    while len(vectors) < k:
        vectors.append(A.mH @ (A @ vectors[-1]))
    basis = torch.linalg.qr(torch.stack(vectors, 1)).Q
    best = basis @ torch.linalg.lstsq(A @ basis, given.y.flatten()[:, None]).solution[:, 0]
    x = solve(CGLS(iterations=k), given).samples[0]
    torch.testing.assert_close(x.flatten(), best, rtol=1e-8, atol=1e-8)


@thick
def test_dds(coils):
    """Mean and covariance of the recursion, whose data consistency is a dense solve of the whole volume."""
    given, prior, dds = thick_problem(coils), gaussian_prior(SHAPE), DDS(nfe=5, start="noise", **EXACT)
    A, identity = dense(given.operator, VOLUME).to(C128), torch.eye(N, dtype=C128)
    m, C = prior.mean.flatten().repeat(SLICES), slicewise_covariance(prior, SLICES)
    sigmas = dds.levels(prior, given.noise_std)
    mean, covariance = 0 * m, sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        W, gamma = C @ torch.linalg.inv(C + sigma**2 * identity), (sigma / given.noise_std) ** 2
        P = torch.linalg.inv(identity + gamma * A.mH @ A)
        drawn = float((sigma**2 * W).diagonal().real.mean())
        mean = P @ (W @ mean + m - W @ m + gamma * A.mH @ given.y.flatten())
        covariance = P @ W @ covariance @ W.mH @ P.mH + drawn * P @ P.mH + lower**2 * identity
    found = moments_of_the_code(dds, given, prior, 2 * dds.nfe + 1)
    torch.testing.assert_close(found, (mean, covariance), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "solver",
    [
        DDS(nfe=4, **EXACT),
        DiffPIR(nfe=4, **EXACT),
        PiGDM(nfe=4, **EXACT),
        PnPDM(nfe=8, steps=2, cg_iterations=200, cg_tolerance=0.0),
        DAPS(nfe=8, ode_steps=2, **EXACT),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_what_is_solved_for_is_solved(solver, monkeypatch):
    """Every system of equations is solved to rounding, which conjugate gradients a slice would not do."""
    checked = []

    def checking(matrix, b, x0=None, **settings):
        result = cg(matrix, b, x0, **settings)
        left = torch.linalg.vector_norm(matrix(result.x) - b) / torch.linalg.vector_norm(b)
        checked.append(float(left))
        return result

    monkeypatch.setattr(sys.modules[type(solver).__module__], "cg", checking)
    given = thick_problem()
    samples_of(solver, given, gaussian_prior(SHAPE), keyed_noise(VOLUME, (0, 1)))
    assert len(checked) >= 4
    assert max(checked) < 1e-8


def test_the_scale_is_that_of_the_volume():
    """The image it is estimated from is the one that a dense matrix gives."""
    given = thick_problem(coils=False)
    A = dense(given.operator, VOLUME).to(C128)
    x = (torch.linalg.pinv(A, rtol=1e-10) @ given.y.flatten()).reshape(VOLUME)
    identity = ThroughPlaneAverage(VOLUME, 1).to(C128)
    expected = Scale.estimate(x, identity, 1.0, iterations=50)
    found = Scale.estimate(given.y, given.operator, 1.0, iterations=50)
    assert found.factor == pytest.approx(expected.factor, rel=1e-2)
    assert found.phase == pytest.approx(expected.phase, abs=1e-2)


def test_the_measured_part_of_a_volume():
    given, x = thick_problem(), randn(*VOLUME, seed=9)
    A, weight = dense(given.operator, VOLUME).to(C128), (0.3 / 0.5) ** 2
    expected = torch.linalg.solve(A.mH @ A + weight * torch.eye(N, dtype=C128), A.mH @ A @ x.flatten())
    found = split_image(given.operator, x, noise_std=0.3, image_std=0.5, tol=1e-10)
    torch.testing.assert_close(found.measured.flatten(), expected, rtol=1e-8, atol=1e-8)
