"""The Cartesian operators against the plain formula, another library, and bad input."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigpy.mri.linop import Sense

import operators.mri
from operators import CoilwiseMRI, MulticoilMRI, OperatorError, SinglecoilMRI, fftc, ifftc
from tests.operators.helper import random_complex, random_mask, relative_error

MASKS = {
    "points": lambda h, w: random_mask(h, w),
    "columns": lambda h, w: random_mask(w),
    "columns, two dimensions": lambda h, w: random_mask(1, w),
    "columns, written out": lambda h, w: random_mask(1, w).expand(h, w),
    "rows": lambda h, w: random_mask(h, 1),
    "everything": lambda h, w: torch.ones(h, w),
    "nothing": lambda h, w: torch.zeros(h, w, dtype=torch.int64),
}
every_mask = pytest.mark.parametrize("kind", MASKS)


def plain(maps, mask, x):
    return mask * fftc(maps * x.unsqueeze(-3))


def plain_adjoint(maps, mask, y):
    return (maps.conj() * ifftc(mask * y)).sum(dim=-3)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Small images are done at once; here they are cut as large ones are."""
    if request.param == "blocks":
        # Two coils at a time of five leave a smaller last block.
        monkeypatch.setattr(operators.mri, "_BLOCK", 2 * 9 * 9 // torch.get_num_threads())


@every_mask
@pytest.mark.parametrize("shape", [(8, 8), (8, 9), (9, 8), (9, 9), (6, 10), (3, 1)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
@pytest.mark.parametrize("maps_batch", [(), (2,)])
@pytest.mark.usefixtures("blocks")
def test_folded_is_plain(kind, shape, batch, maps_batch):
    mask = MASKS[kind](*shape)
    for dtype, tolerance in ((torch.complex64, 1e-5), (torch.complex128, 1e-13)):
        maps = random_complex(*maps_batch, 5, *shape, seed=1, dtype=dtype)
        x, y = random_complex(*batch, *shape, dtype=dtype), random_complex(*batch, 5, *shape, dtype=dtype)
        A = MulticoilMRI(maps, mask)
        kspace = plain(maps, mask, x)
        assert A(x).shape == kspace.shape
        assert relative_error(A(x), kspace) <= tolerance
        assert relative_error(A.adjoint(y), plain_adjoint(maps, mask, y)) <= tolerance
        assert relative_error(A.normal(x), plain_adjoint(maps, mask, kspace)) <= tolerance


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    kind=st.sampled_from(list(MASKS)),
    seed=st.integers(0, 2**16),
)
def test_folded_is_plain_at_any_size(shape, kind, seed):
    mask = MASKS[kind](*shape)
    x, y = random_complex(*shape, seed=seed), random_complex(3, *shape, seed=seed + 1)
    maps = random_complex(3, *shape, seed=seed + 2)
    ones = torch.ones(1, *shape, dtype=torch.complex64)
    A, C, S = MulticoilMRI(maps, mask), CoilwiseMRI(3, mask, shape), SinglecoilMRI(mask, shape)
    for result, truth in (
        (A(x), plain(maps, mask, x)),
        (A.adjoint(y), plain_adjoint(maps, mask, y)),
        (A.normal(x), plain_adjoint(maps, mask, plain(maps, mask, x))),
        (C(y), mask * fftc(y)),
        (C.adjoint(y), ifftc(mask * y)),
        (C.normal(y), ifftc(mask * fftc(y))),
        (S(x), plain(ones, mask, x)[0]),
        (S.adjoint(x), plain_adjoint(ones, mask, x[None])),
        (S.normal(x), ifftc(mask * fftc(x))),
    ):
        assert relative_error(result, truth) <= 1e-5


@pytest.mark.parametrize("shape", [(12, 10), (11, 13)])
@pytest.mark.parametrize("kind", ["points", "columns"])
def test_equals_sigpy(shape, kind):
    maps, mask = random_complex(4, *shape, seed=1), MASKS[kind](*shape)
    ours = MulticoilMRI(maps, mask)
    theirs = Sense(maps.numpy(), weights=mask.expand(shape).numpy().astype(np.float32))
    x, y = random_complex(*shape), random_complex(4, *shape)
    np.testing.assert_allclose(ours(x).numpy(), theirs(x.numpy()), atol=1e-5)
    np.testing.assert_allclose(ours.adjoint(y).numpy(), theirs.H(y.numpy()), atol=1e-5)
    np.testing.assert_allclose(ours.normal(x).numpy(), theirs.N(x.numpy()), atol=3e-5)


@pytest.mark.usefixtures("blocks")
def test_one_set_of_maps_a_slice():
    maps, mask = random_complex(3, 5, 8, 9, seed=1), random_mask(9)
    x = random_complex(3, 8, 9)
    A = MulticoilMRI(maps, mask)
    for result, apply in ((A(x), "__call__"), (A.normal(x), "normal")):
        expected = [getattr(MulticoilMRI(maps[i], mask), apply)(x[i]) for i in range(3)]
        torch.testing.assert_close(result, torch.stack(expected))


@every_mask
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("sensitive", [slice(2, 6), slice(7, 8), slice(0)])
def test_rows_that_no_coil_sees_are_zero_in_the_normal_operator(kind, sensitive):
    maps = torch.zeros(2, 3, 8, 7, dtype=torch.complex64)
    maps[1, :, sensitive] = random_complex(3, 8, 7, seed=1)[:, sensitive]
    maps[0, 0, 3] = 1 if sensitive.stop == 6 else 0  # another item of the batch sees other rows
    A, x = MulticoilMRI(maps, MASKS[kind](8, 7)), random_complex(2, 8, 7)
    torch.testing.assert_close(A.normal(x), A.adjoint(A(x)))


@every_mask
def test_what_was_not_sampled_is_zero_and_disregarded(kind):
    mask = MASKS[kind](6, 7)
    maps, y = random_complex(3, 6, 7), random_complex(3, 6, 7, seed=1)
    away = ~mask.bool().expand(6, 7)
    for A in (MulticoilMRI(maps, mask), CoilwiseMRI(3, mask, (6, 7))):
        x = random_complex(*A.domain_shape)
        assert (A(x)[..., away] == 0).all()
        torch.testing.assert_close(A.adjoint(y), A.adjoint(y.masked_fill(away, 1e3)))


def test_without_maps_the_normal_operator_is_a_projection():
    for A in (SinglecoilMRI(random_mask(6, 7)), CoilwiseMRI(2, random_mask(7), (6, 7))):
        x = random_complex(*A.domain_shape)
        torch.testing.assert_close(A.normal(A.normal(x)), A.normal(x))
        assert A.norm() == pytest.approx(1, rel=1e-4)


def test_maps_and_mask_are_copied():
    maps, mask = random_complex(3, 6, 7), random_mask(6, 7)
    A, x = MulticoilMRI(maps, mask), random_complex(6, 7)
    before = A(x)
    maps.zero_()
    mask.zero_()
    assert torch.equal(A(x), before)
    assert A.num_coils == 3


def test_no_gradient_reaches_the_maps():
    maps = random_complex(3, 6, 7).requires_grad_()
    assert not MulticoilMRI(maps, random_mask(7))(random_complex(6, 7)).requires_grad


def test_double_precision_loses_nothing():
    maps, mask = random_complex(3, 7, 9), random_mask(7, 9)
    A = MulticoilMRI(maps, mask).to(torch.complex128)
    x = random_complex(7, 9, dtype=torch.complex128)
    # The maps were rounded, but the ramps are made anew.
    assert relative_error(A(x), plain(maps.to(torch.complex128), mask, x)) <= 1e-13
    assert relative_error(A.normal(x), A.adjoint(A(x))) <= 1e-13
    inside = torch.nn.Sequential(SinglecoilMRI(mask))
    with warnings.catch_warnings():
        # What torch says of complex modules in general.
        warnings.simplefilter("ignore")
        inside.to(torch.complex128)
    assert relative_error(inside(x), mask * fftc(x)) <= 1e-13


@pytest.mark.parametrize("make", [lambda m, s: SinglecoilMRI(m, s), lambda m, s: CoilwiseMRI(3, m, s)])
def test_shape_comes_from_the_mask_or_from_the_caller(make):
    assert make(random_mask(6, 7), None).image_shape == (6, 7)
    assert make(random_mask(7), (6, 7)).image_shape == (6, 7)
    for mask in (random_mask(7), random_mask(1, 7), random_mask(7, 1)):
        with pytest.raises(OperatorError, match="open"):
            make(mask, None)
    for shape in ((6,), (6, 0), (2, 6, 7)):
        with pytest.raises(OperatorError, match=r"\(H, W\)"):
            make(random_mask(7), shape)


@pytest.mark.parametrize("shape", [(6,), (2, 7), (7, 6), (1, 6, 7), (3, 6, 7), ()])
def test_mask_of_the_wrong_shape(shape):
    mask = torch.ones(shape)
    for make in (
        lambda: MulticoilMRI(random_complex(3, 6, 7), mask),
        lambda: SinglecoilMRI(mask, (6, 7)),
        lambda: CoilwiseMRI(3, mask, (6, 7)),
    ):
        with pytest.raises(OperatorError) as error:
            make()
        assert str(shape) in str(error.value)
        assert "(6, 7)" in str(error.value)


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan"), 1j])
def test_mask_with_other_values(value):
    mask = torch.tensor([1, 0, 1, value, 1, 0, 0])
    with pytest.raises(OperatorError, match="0 and 1"):
        MulticoilMRI(random_complex(3, 6, 7), mask)


def test_maps_that_are_none():
    mask = torch.ones(7)
    with pytest.raises(OperatorError, match=r"complex coil maps, got torch\.float32"):
        MulticoilMRI(torch.ones(3, 6, 7), mask)
    with pytest.raises(OperatorError, match=r"\(\.\.\., C, H, W\), got \(6, 7\)"):
        MulticoilMRI(random_complex(6, 7), mask)
    with pytest.raises(OperatorError, match=r"got \(0, 6, 7\)"):
        MulticoilMRI(random_complex(0, 6, 7), mask)
    maps = random_complex(3, 6, 7)
    maps[1, 2, 3] = torch.tensor(complex("nan"))
    with pytest.raises(OperatorError, match="NaN"):
        MulticoilMRI(maps, mask)
    with pytest.raises(OperatorError, match="at least one coil"):
        CoilwiseMRI(0, mask, (6, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_dtype_that_does_not_fit(dtype):
    A = MulticoilMRI(random_complex(3, 6, 7), torch.ones(7))
    with pytest.raises(OperatorError, match=f"complex64, got a tensor of {dtype}"):
        A(torch.ones(6, 7, dtype=dtype))
