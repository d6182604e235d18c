"""Weights on measurements."""

import math

import pytest
import torch

from operators import DirectionWhitening, OperatorError, Weighting, check_adjoint
from recon.truth import MatrixOperator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(dtype):
    A = Weighting(torch.rand(4, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert check_adjoint(A) <= (1e-5 if dtype == torch.float32 else 1e-10)


def test_weighted_least_squares():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    w = torch.rand(7, dtype=torch.float64, generator=generator)
    y = torch.randn(7, dtype=torch.float64, generator=generator)
    A = Weighting(w) @ MatrixOperator(matrix, (3,), (7,))
    normal = torch.stack([A.normal(e) for e in torch.eye(3, dtype=torch.float64)])
    x = torch.linalg.solve(normal, A.adjoint(w * y))
    expected = torch.linalg.lstsq(w[:, None] * matrix, w * y).solution
    torch.testing.assert_close(x, expected)


def test_direct_inverse_undoes_weights_and_factors():
    w = torch.tensor([0.5, 0.0, 2.0])
    y = torch.tensor([1.0, 7.0, 3.0])
    torch.testing.assert_close((4 * Weighting(w)).direct_inverse(y), torch.tensor([0.5, 0.0, 0.375]))
    twice = Weighting(w) @ Weighting(torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(twice.direct_inverse(y), torch.tensor([1.0, 0.0, 1.5]))
    with pytest.raises(OperatorError, match="MatrixOperator has no direct inversion formula"):
        MatrixOperator(torch.eye(3), (3,), (3,)).direct_inverse(y)


def test_one_weight_a_row():
    torch.testing.assert_close(
        Weighting(torch.tensor([[1.0], [2.0]]), (2, 3))(torch.ones(2, 3)),
        torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]),
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([1, 2]), "real floating-point numbers, got torch.int64"),
        (torch.tensor([1.0, -1.0]), "finite, not negative"),
        (torch.tensor([1.0, math.nan]), "finite, not negative"),
        (torch.zeros(2), "not all zero"),
        (torch.ones(3), r"shape \(3,\) do not broadcast to \(2, 2\)"),
    ],
)
def test_impossible_weights(weights, message):
    with pytest.raises(OperatorError, match=message):
        Weighting(weights, (2, 2) if len(weights) == 3 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint_of_a_direction(dtype):
    direction = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    A = DirectionWhitening(direction, 3.0).to(dtype)
    assert check_adjoint(A) <= (1e-5 if dtype == torch.float32 else 1e-10)


def test_noise_along_a_direction_becomes_white():
    """``P (s^2 I + t^2 d d^T) P^T = s^2 I``."""
    d = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    s, t = 0.3, 1.7
    P = DirectionWhitening(d, t * float(torch.linalg.vector_norm(d)) / s)
    matrix = P(torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)).reshape(6, 6)
    flat = d.flatten()
    covariance = s**2 * torch.eye(6, dtype=torch.float64) + t**2 * torch.outer(flat, flat)
    torch.testing.assert_close(matrix @ covariance @ matrix.T, s**2 * torch.eye(6, dtype=torch.float64))
    y = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(DirectionWhitening(d, 0.0)(y), y)


def test_what_is_no_direction():
    for direction in (torch.zeros(3), torch.tensor([1, 2]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(OperatorError, match="a direction is real, finite and not all zero"):
            DirectionWhitening(direction, 1.0)
    with pytest.raises(OperatorError, match="the ratio must be finite and not negative, got -1"):
        DirectionWhitening(torch.ones(3), -1.0)
