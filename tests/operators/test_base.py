"""Composition, norm, precision, and the errors of the base class and of `check_adjoint`."""

import copy
from operator import add, matmul, mul, sub

import pytest
import torch
from torch import nn

from operators import (
    FourierTransform,
    LinearOperator,
    MulticoilMRI,
    OperatorError,
    SinglecoilMRI,
    Weighting,
    check_adjoint,
    stack,
)
from operators.base import seeded_noise, vector_norm
from tests.operators.helper import dense, multicoil, random_complex, random_mask


class Matrix(LinearOperator):
    """A dense matrix, with the adjoint that is asked for."""

    def __init__(self, matrix, adjoint=None):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)
        self.register_buffer("adjoint_matrix", matrix.mH.clone() if adjoint is None else adjoint)

    def _forward(self, x):
        return x @ self.matrix.T

    def _adjoint(self, y):
        return y @ self.adjoint_matrix.T


@pytest.fixture
def matrices():
    return [random_complex(4, 3, seed=s, dtype=torch.complex128) for s in (1, 2)]


def test_composites_are_those_of_the_matrices(matrices):
    a, b = matrices
    A, B = Matrix(a), Matrix(b)
    C = Matrix(a.mH.clone())
    for operator, truth in (
        (A @ C, a @ a.mH),
        (A @ A.H, a @ a.mH),
        (A + B, a + b),
        (A - B, a - b),
        (-A, -a),
        (3 * A, 3 * a),
        (A * (1 - 2j), (1 - 2j) * a),
        (((1 + 1j) * A).H, ((1 + 1j) * a).mH),
        ((A @ C).H, a @ a.mH),
    ):
        torch.testing.assert_close(dense(operator, operator.domain_shape), truth)
        check_adjoint(operator)
    stacked = stack([A, B])
    assert stacked.range_shape == (2, 4)
    torch.testing.assert_close(dense(stacked, (3,)), torch.cat([a, b]))


def test_adjoint_of_the_adjoint_is_the_operator(matrices):
    A = Matrix(matrices[0])
    assert A.H.H is A
    assert (A.H.domain_shape, A.H.range_shape) == (A.range_shape, A.domain_shape)


def test_real_operators_stay_real():
    A = Matrix(torch.randn(4, 3))
    x = torch.randn(2, 3)
    assert (2.0 * A)(x).dtype == torch.float32
    assert (complex(2) * A)(x).dtype == torch.float32
    check_adjoint(-A)
    assert A.to(torch.complex128)(x.double()).dtype == torch.float64


def test_shapes_that_do_not_fit_together():
    a, b = FourierTransform((4, 5)), FourierTransform((5, 4))
    for build in (lambda: a @ b, lambda: a + b, lambda: stack([a, b])):
        with pytest.raises(OperatorError) as error:
            build()
        assert "(4, 5)" in str(error.value)
        assert "(5, 4)" in str(error.value)
    with pytest.raises(OperatorError, match="at least one"):
        stack([])
    with pytest.raises(OperatorError, match=r"\(2,\).*\(3,\)"):
        multicoil((4, 4), random_mask(4), 2) + multicoil((4, 4), random_mask(4), 3)
    for combine, other in ((matmul, 3), (add, 3), (sub, 3), (mul, "3"), (mul, a)):
        with pytest.raises(TypeError):
            combine(a, other)


def test_batch_of_a_composite():
    two = multicoil((4, 4), random_mask(4), 2)
    assert (two @ FourierTransform((4, 4))).batch_shape == (2,)
    assert (two + multicoil((4, 4), random_mask(4), 5, 1)).batch_shape == (5, 2)
    with pytest.raises(OperatorError, match=r"\(3,\).*\(2,\)"):
        two(random_complex(3, 4, 4))


def test_matched_adjoint_is_handed_on(matrices):
    A, B = (Matrix(m) for m in matrices)
    B.matched_adjoint = False
    assert A.matched_adjoint
    for operator in (B.H, A @ B.H, A + B, 2 * B, stack([A, B])):
        assert not operator.matched_adjoint


def test_matched_adjoint_is_that_of_the_parts_as_they_are(matrices):
    A, B = (Matrix(m) for m in matrices)
    composites = (B.H, A @ B.H, A + B, 2 * B, stack([A, B]), (2 * (A + B)).H)
    for matched in (False, True):
        B.matched_adjoint = matched
        assert [operator.matched_adjoint for operator in composites] == [matched] * len(composites)


def test_real_weights_and_complex_operators():
    weights = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    A, w = multicoil((4, 5), random_mask(5)), Weighting(weights)
    B, v = w @ A, Weighting(weights[0])
    for operator in (B, A @ v, 2 * B, B + A, v + v + A.H @ A, B.H, stack([B, A])):
        assert operator.dtype == torch.complex64
        check_adjoint(operator)
    matrix = dense(copy.deepcopy(B).to(torch.complex128), (4, 5))
    assert B.norm() == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-3)
    # What is real throughout stays so.
    assert [operator.dtype for operator in (v @ v, 2 * v, v + v, v.H, stack([v]))] == [torch.float32] * 5


def test_norm_is_seeded_and_per_item(matrices):
    A = Matrix(matrices[0])
    assert A.norm(seed=3) == A.norm(seed=3)
    assert A.norm(seed=3, max_iterations=2) != A.norm(seed=4, max_iterations=2)
    assert Matrix(torch.zeros(3, 3)).norm() == 0
    maps = torch.stack([torch.full((2, 4, 4), scale, dtype=torch.complex64) for scale in (1.0, 3.0)])
    assert MulticoilMRI(maps, torch.ones(4)).norm() == pytest.approx(3 * 2**0.5, rel=1e-5)


def test_to_keeps_complex_complex_inside_modules_too():
    A = 2 * SinglecoilMRI(random_mask(4, 5))
    assert A.to(torch.float64) is A
    assert A.dtype == torch.complex128
    assert A.to(torch.zeros(1)).dtype == torch.complex64
    assert A.to("cpu", torch.complex128).dtype == torch.complex128
    assert A.to("cpu").dtype == torch.complex128
    with pytest.raises(OperatorError, match="int32"):
        A.to(torch.int32)


def test_is_a_module():
    A = multicoil((4, 5), random_mask(5))
    model = nn.Sequential(A, A.H)
    x = random_complex(2, 4, 5)
    torch.testing.assert_close(model(x), A.normal(x))
    assert set(A.state_dict()) == {"maps", "mask"}
    assert not list(A.parameters())
    assert repr(A) == "MulticoilMRI((4, 5) -> (3, 4, 5))"
    assert "batch (2,)" in repr(multicoil((4, 5), random_mask(5), 2))


def test_only_tensors_are_taken():
    with pytest.raises(OperatorError, match="ndarray"):
        FourierTransform((4, 5)).forward(torch.zeros(4, 5).numpy())  # type: ignore[arg-type]


def test_check_adjoint_finds_what_is_wrong(matrices):
    a, _ = matrices
    assert check_adjoint(Matrix(a)) < 1e-14
    with pytest.raises(OperatorError, match="adjoint of Matrix does not match"):
        check_adjoint(Matrix(a, a.T.clone()))
    with pytest.raises(OperatorError, match="does not match"):
        check_adjoint(Matrix(a, a.mH * (1 + 1e-8)))
    assert check_adjoint(Matrix(a, a.mH * (1 + 1e-8)), tolerance=1e-6) > 1e-10
    with pytest.raises(OperatorError, match="NaN"):
        check_adjoint(Matrix(a, a.mH * float("nan")))

    class WrongNormal(Matrix):
        def _normal(self, x):
            return 2 * super()._normal(x)

    class WrongShape(Matrix):
        def _adjoint(self, y):
            return super()._adjoint(y)[..., None]

    with pytest.raises(OperatorError, match=r"normal\(x\) is not"):
        check_adjoint(WrongNormal(a))
    with pytest.raises(OperatorError, match=r"should have shape \(2, 3\), got \(2, 3, 1\)"):
        check_adjoint(WrongShape(a))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_vector_norm_is_torchs_for_every_item(dtype):
    x = seeded_noise((2, 3, 4, 5), dtype, 0)
    for axes in (1, 2, 3):
        expected = torch.linalg.vector_norm(x, dim=tuple(range(-axes, 0)), keepdim=True)
        assert vector_norm(x, axes).shape == expected.shape
        assert torch.allclose(vector_norm(x, axes), expected, rtol=1e-14)
        assert torch.equal(vector_norm(x.conj(), axes), vector_norm(x, axes))
