"""Every operator × every promise of `LinearOperator`."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import LinearOperator, OperatorError, check_adjoint
from tests.operators.helper import REGISTRY, SIZES, dense, random_complex, relative_error

every_operator = pytest.mark.parametrize("name", REGISTRY)
without_batch = pytest.mark.parametrize("name", [n for n in REGISTRY if not REGISTRY[n]((4, 4)).batch_shape])


@every_operator
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.complex128, 1e-10)])
@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(2, 12)),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_adjoint_and_normal(name, dtype, tolerance, shape, batch, seed):
    A = REGISTRY[name](shape).to(dtype)
    assert check_adjoint(A, batch=tuple(batch), dtype=dtype, seed=seed, tolerance=tolerance) <= tolerance


@without_batch
@pytest.mark.parametrize("shape", SIZES)
def test_dense_matrices(name, shape):
    A = REGISTRY[name](shape).to(torch.complex128)
    matrix = dense(A, A.domain_shape)
    torch.testing.assert_close(dense(A.adjoint, A.range_shape), matrix.mH)
    torch.testing.assert_close(dense(A.normal, A.domain_shape), matrix.mH @ matrix)


@without_batch
def test_norm_is_the_largest_singular_value(name):
    A = REGISTRY[name]((5, 6)).to(torch.complex128)
    truth = float(torch.linalg.matrix_norm(dense(A, A.domain_shape), 2))
    assert A.norm(max_iterations=2000, tolerance=1e-9) == pytest.approx(truth, rel=1e-4, abs=1e-12)


@every_operator
def test_is_linear_over_the_complex_numbers(name):
    A = REGISTRY[name]((6, 7)).to(torch.complex128)
    x, z = (random_complex(*A.batch_shape, *A.domain_shape, seed=s, dtype=torch.complex128) for s in (1, 2))
    torch.testing.assert_close(A((2 - 1j) * x + z), (2 - 1j) * A(x) + A(z))


@every_operator
def test_batches_are_items(name):
    A = REGISTRY[name]((6, 7)).to(torch.complex128)
    batch = (3, *A.batch_shape)
    for apply, shape in ((A, A.domain_shape), (A.adjoint, A.range_shape), (A.normal, A.domain_shape)):
        x = random_complex(*batch, *shape, dtype=torch.complex128)
        torch.testing.assert_close(apply(x), torch.stack([apply(item) for item in x]))


@every_operator
def test_does_not_write_into_its_argument(name):
    A = REGISTRY[name]((6, 7))
    for apply, shape in ((A, A.domain_shape), (A.adjoint, A.range_shape), (A.normal, A.domain_shape)):
        x = random_complex(2, *A.batch_shape, *shape)
        before = x.clone()
        apply(x).zero_()
        assert torch.equal(x, before)


@every_operator
def test_any_memory_layout(name):
    A = REGISTRY[name]((6, 7))
    for apply, shape in ((A, A.domain_shape), (A.adjoint, A.range_shape), (A.normal, A.domain_shape)):
        x = random_complex(2, *A.batch_shape, *shape)
        expected = apply(x)
        torch.testing.assert_close(apply(x.mT.contiguous().mT), expected)
        torch.testing.assert_close(apply(x.conj().resolve_conj().conj()), expected)
        torch.testing.assert_close(
            apply(random_complex(1).expand(x.shape)), apply(random_complex(1).repeat(x.shape))
        )


@every_operator
def test_gradient_is_the_adjoint(name):
    A = REGISTRY[name]((4, 5)).to(torch.complex128)
    for apply, adjoint, shape in (
        (A, A.adjoint, A.domain_shape),
        (A.adjoint, A, A.range_shape),
        (A.normal, A.normal, A.domain_shape),
    ):
        x = random_complex(*A.batch_shape, *shape, dtype=torch.complex128).requires_grad_()
        y = apply(x)
        v = random_complex(*y.shape, seed=3, dtype=torch.complex128)
        (gradient,) = torch.autograd.grad(y, x, v)
        torch.testing.assert_close(gradient, adjoint(v))


@every_operator
def test_derivatives_against_finite_differences(name):
    A = REGISTRY[name]((2, 3)).to(torch.complex128)
    # Without the operator's batch, so that the gradient has to sum over it.
    for apply, shape in ((A, A.domain_shape), (A.adjoint, A.range_shape)):
        x = random_complex(*shape, dtype=torch.complex128).requires_grad_()

        def energy(x, apply=apply):
            return apply(x).abs().square().sum()

        assert torch.autograd.gradcheck(apply, x, check_forward_ad=True)
        assert torch.autograd.gradcheck(energy, x)
        assert torch.autograd.gradgradcheck(energy, x)


@every_operator
def test_precision_there_and_back(name):
    A = REGISTRY[name]((6, 7))
    x = random_complex(*A.batch_shape, *A.domain_shape)
    single = A(x)
    double = A.to(torch.float64)(x.to(torch.complex128))
    assert double.dtype == torch.complex128
    assert relative_error(single, double) < 1e-6
    assert relative_error(A.to(torch.complex64)(x), single) < 1e-6
    assert A(x).dtype == torch.complex64


@every_operator
def test_survives_pickle(name):
    A = REGISTRY[name]((6, 7))
    x = random_complex(*A.batch_shape, *A.domain_shape)
    assert torch.equal(pickle.loads(pickle.dumps(A))(x), A(x))


@every_operator
def test_wrong_shapes_are_named(name):
    A: LinearOperator = REGISTRY[name]((6, 7))
    for apply, shape in ((A, A.domain_shape), (A.adjoint, A.range_shape), (A.normal, A.domain_shape)):
        wrong = (2, *shape[:-1], shape[-1] + 1)
        with pytest.raises(OperatorError) as error:
            apply(random_complex(*wrong))
        assert ", ".join(map(str, shape)) in str(error.value)
        assert str(wrong) in str(error.value)
        with pytest.raises(OperatorError, match=r"\(7,\)"):
            apply(random_complex(7))
