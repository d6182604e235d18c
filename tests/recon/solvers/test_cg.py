"""Conjugate gradients against dense solves, item by item."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import MulticoilMRI
from recon import ReconError, cg
from recon.solvers.cg import cg_steps


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def hermitian(batch, n, dtype, seed=0, condition=50.0):
    """Random Hermitian positive definite matrices of a known condition number, ``(batch, n, n)``."""
    basis = torch.linalg.qr(torch.randn((batch, n, n), dtype=dtype, generator=rng(seed))).Q
    values = torch.logspace(0, math.log10(condition), n, dtype=basis.abs().dtype)
    return (basis * values) @ basis.mH


def acting_on_images(H, shape):
    return lambda x: (H @ x.reshape(*x.shape[:-2], -1, 1)).reshape(*x.shape[:-2], *shape)


def relative(x, truth):
    return float((x - truth).norm() / truth.norm())


@settings(deadline=None, max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.complex128, torch.float64]),
    start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equal_to_a_dense_solve(shape, batch, dtype, start, seed):
    n = math.prod(shape)
    H = hermitian(batch, n, dtype, seed)
    b = torch.randn((batch, *shape), dtype=dtype, generator=rng(seed + 1))
    x0 = torch.randn((batch, *shape), dtype=dtype, generator=rng(seed + 2)) if start else None
    result = cg(acting_on_images(H, shape), b, x0, max_iter=4 * n + 20)
    truth = torch.linalg.solve(H, b.reshape(batch, n, 1)).reshape(b.shape)
    assert result.x.dtype == dtype
    assert relative(result.x, truth) < 1e-10
    assert result.iterations.shape == result.residual.shape == (batch,)
    assert float(result.residual.max()) < 1e-13


def test_exact_after_as_many_iterations_as_there_are_eigenvalues():
    basis = torch.linalg.qr(torch.randn((12, 12), dtype=torch.complex128, generator=rng())).Q
    H = (basis * torch.tensor([1.0, 2.0, 7.0]).repeat(4)) @ basis.mH
    b = torch.randn((3, 4), dtype=torch.complex128, generator=rng(1))
    result = cg(acting_on_images(H, (3, 4)), b, max_iter=50, tol=1e-10)
    assert result.iterations.item() == 3
    assert relative(result.x.flatten(), torch.linalg.solve(H, b.flatten())) < 1e-12


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("start", [False, True])
def test_every_item_has_its_own_step_sizes(iterations, start):
    # Problems whose scales lie far apart; one step size for all would fit none of them.
    H = hermitian(4, 6, torch.complex128) * torch.tensor([1.0, 1e-4, 1e5, 30.0])[:, None, None]
    b = torch.randn((4, 2, 3), dtype=torch.complex128, generator=rng(1))
    b = b * torch.tensor([1.0, 1e6, 1e-7, 1e-2])[:, None, None]
    x0 = torch.randn((4, 2, 3), dtype=torch.complex128, generator=rng(2)) if start else None
    together = cg(acting_on_images(H, (2, 3)), b, x0, max_iter=iterations)
    for k in range(4):
        alone = cg(acting_on_images(H[k], (2, 3)), b[k], None if x0 is None else x0[k], max_iter=iterations)
        assert relative(together.x[k], alone.x) < 1e-12
        assert together.iterations[k] == alone.iterations
        assert float(together.residual[k]) == pytest.approx(float(alone.residual))


def test_the_residual_is_what_is_left_and_its_energy_norm_falls():
    H = hermitian(2, 12, torch.complex128, condition=1e4)
    apply = acting_on_images(H, (3, 4))
    b = torch.randn((2, 3, 4), dtype=torch.complex128, generator=rng(1))
    truth = torch.linalg.solve(H, b.reshape(2, 12, 1)).reshape(b.shape)
    before = torch.full((2,), math.inf, dtype=torch.float64)
    for iterations in range(12):
        result = cg(apply, b, max_iter=iterations)
        left = (b - apply(result.x)).norm(dim=(-2, -1)) / b.norm(dim=(-2, -1))
        torch.testing.assert_close(result.residual, left, rtol=1e-8, atol=1e-10)
        error = truth - result.x
        energy = (error.conj() * apply(error)).sum((-2, -1)).real
        assert bool((energy < before).all())
        before = energy


def test_items_stop_on_their_own():
    # The identity is solved in one step, the other after six; a zero right-hand side needs none.
    H = hermitian(3, 6, torch.complex128)
    H[0] = torch.eye(6)
    b = torch.randn((3, 2, 3), dtype=torch.complex128, generator=rng(1))
    b[2] = 0
    result = cg(acting_on_images(H, (2, 3)), b, max_iter=50, tol=1e-6)
    assert result.iterations.tolist()[::2] == [1, 0]
    assert 2 <= result.iterations[1] <= 6
    assert bool((result.residual <= 1e-6).all())
    assert torch.equal(result.x[2], torch.zeros(2, 3, dtype=torch.complex128))
    alone = cg(acting_on_images(H[1], (2, 3)), b[1], max_iter=50, tol=1e-6)
    assert relative(result.x[1], alone.x) < 1e-12


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5])
def test_tolerance(tol):
    H = hermitian(1, 30, torch.complex128, condition=1e3)
    b = torch.randn((1, 5, 6), dtype=torch.complex128, generator=rng(1))
    apply = acting_on_images(H, (5, 6))
    result = cg(apply, b, max_iter=100, tol=tol)
    assert float(result.residual) <= tol
    one_less = cg(apply, b, max_iter=int(result.iterations) - 1)
    assert float(one_less.residual) > tol


def test_a_batch_of_zeros_never_asks_the_operator():
    def never(x):
        raise AssertionError("there is nothing to solve")

    result = cg(never, torch.zeros(2, 3, 4), max_iter=5)
    assert torch.equal(result.x, torch.zeros(2, 3, 4))
    assert (result.residual.tolist(), result.iterations.tolist()) == ([0, 0], [0, 0])


def test_zero_right_hand_side_from_a_start_that_is_not():
    H = hermitian(1, 6, torch.complex128)
    x0 = torch.randn((1, 2, 3), dtype=torch.complex128, generator=rng(1))
    result = cg(acting_on_images(H, (2, 3)), torch.zeros_like(x0), x0, max_iter=30)
    assert relative(result.x + x0, x0) < 1e-12


def test_start_at_the_solution():
    H = hermitian(1, 6, torch.complex128)
    x = torch.randn((1, 2, 3), dtype=torch.complex128, generator=rng(1))
    apply = acting_on_images(H, (2, 3))
    result = cg(apply, apply(x), x, max_iter=30)
    assert torch.equal(result.x, x)
    assert result.iterations.item() == 0


def test_no_iterations():
    b = torch.randn((2, 3, 4), generator=rng())
    result = cg(lambda x: 2 * x, b, max_iter=0)
    assert torch.equal(result.x, torch.zeros_like(b))
    torch.testing.assert_close(result.residual, torch.ones(2))


def test_arguments_are_left_alone():
    b, x0 = (torch.randn((2, 3, 4), generator=rng(seed)) for seed in (0, 1))
    copies = b.clone(), x0.clone()
    weight = torch.rand(3, 4, generator=rng(2)) + 0.5
    cg(lambda x: weight * x, b, max_iter=3)
    cg(lambda x: weight * x, b, x0, max_iter=3)
    assert torch.equal(b, copies[0])
    assert torch.equal(x0, copies[1])


def test_null_space_is_left_as_it_was():
    weight = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    b = weight * torch.randn((2, 3), dtype=torch.float64, generator=rng())
    x0 = torch.randn((2, 3), dtype=torch.float64, generator=rng(1))
    result = cg(lambda x: weight * x, b, x0, max_iter=50)
    torch.testing.assert_close(result.x[:, 1:], (b / weight)[:, 1:])
    assert torch.equal(result.x[:, 0], x0[:, 0])
    # What lies in the null space altogether cannot be improved, and says so.
    hopeless = cg(lambda x: weight * x, (weight == 0).double(), max_iter=50)
    assert torch.equal(hopeless.x, torch.zeros(2, 3, dtype=torch.float64))
    assert float(hopeless.residual) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_many_iterations_on_a_singular_operator_stay_put(dtype):
    # Most of k-space is missing. Rounding has a part in the null space, along which steps must not grow.
    maps = torch.randn((2, 16, 12), dtype=dtype, generator=rng())
    maps[..., :4] = 0  # nor do the coils see every pixel
    A = MulticoilMRI(maps, torch.arange(12) % 4 == 0)
    y = A(torch.randn((3, 16, 12), dtype=dtype, generator=rng(1)))
    x0 = torch.randn((3, 16, 12), dtype=dtype, generator=rng(2))
    eps = torch.finfo(dtype).eps
    for start in (None, x0):
        result = cg(A.normal, A.adjoint(y), start, max_iter=1000)
        assert relative(A(result.x), y) < 1e4 * eps
        # What no coil sees stays as it was.
        expected = torch.zeros_like(x0) if start is None else x0
        torch.testing.assert_close(result.x[..., :4], expected[..., :4])
        assert float(result.x.norm()) < 10 * float(x0.norm())


def test_negative_curvature_is_an_error():
    sign = torch.tensor([1.0, 1.0, -1.0])[:, None, None]
    b = torch.ones(3, 2, 2)
    with pytest.raises(ReconError, match="negative curvature: the operator is not A\\^H A"):
        cg(lambda x: sign * x, b)
    # Not so in an item that has nothing to solve.
    b[2] = 0
    torch.testing.assert_close(cg(lambda x: sign * x, b).x, b)


def test_negative_number_of_iterations():
    with pytest.raises(ReconError, match="max_iter must not be negative, got -1"):
        cg(lambda x: x, torch.ones(2, 2), max_iter=-1)


def test_nan_shows():
    b = torch.ones(2, 2, 2)
    b[0, 0, 0] = math.nan
    result = cg(lambda x: 2 * x, b, max_iter=3)
    assert bool(result.x[0].isnan().any())
    assert bool(result.residual[0].isnan())
    torch.testing.assert_close(result.x[1], torch.full((2, 2), 0.5))


def test_steps_follow_from_the_condition_number():
    assert cg_steps(1.0, 1e-3, 20) == 1
    assert cg_steps(1e6, 1e-3, 20) == 20
    # At condition number 4 the bound is 2 / 3^m: 2 / 3^6 is still above 1e-3, 2 / 3^7 is not.
    assert cg_steps(4.0, 1e-3, 20) == 7
    assert cg_steps(1.0, 0.0, 13) == 13
