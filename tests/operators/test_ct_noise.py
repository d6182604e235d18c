from __future__ import annotations

import math

import pytest
import torch

from operators.ct_noise import (
    log_transform,
    log_variance,
    simulate_counts,
    simulate_transmission,
    wls_weights,
)
from operators.errors import OperatorError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_counts_have_the_mean_and_the_variance_of_the_model():
    p = torch.full((200_000,), 2.0, dtype=torch.float64)
    expected = 1000 * math.exp(-2)
    counts = simulate_counts(p, 1000.0, seeded())
    assert torch.equal(counts, counts.round())
    assert float(counts.mean()) == pytest.approx(expected, abs=5 * math.sqrt(expected / len(p)))
    assert float(counts.var()) == pytest.approx(expected, rel=0.02)
    noisy = simulate_counts(p, 1000.0, seeded(), electronic_std=8.0)
    assert float(noisy.var()) == pytest.approx(expected + 64, rel=0.02)
    assert not torch.equal(noisy, noisy.round())


def test_the_seed_decides():
    p = torch.rand(5, 7, generator=seeded(1))
    first, again, other = (simulate_counts(p, 1e4, seeded(s), electronic_std=3.0) for s in (0, 0, 1))
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_photons_of_each_element():
    photons = torch.tensor([1e3, 1e6])
    counts = simulate_counts(torch.zeros(20_000, 2), photons, seeded())
    torch.testing.assert_close(counts.mean(0), photons, rtol=5e-3, atol=0)
    torch.testing.assert_close(
        log_transform(counts, photons).line_integrals.mean(0), torch.zeros(2), atol=1e-3, rtol=0
    )


def test_many_photons_are_not_rounded():
    # 1e9 is beyond the whole numbers of float32, where neighbours are 64 apart.
    counts = simulate_counts(torch.zeros(50_000, dtype=torch.float64), 1e9, seeded())
    assert float(counts.var()) == pytest.approx(1e9, rel=0.03)


def test_logarithm_of_expected_counts_gives_the_line_integrals():
    p = torch.linspace(-0.1, 9.0, 50, dtype=torch.float64)
    data = log_transform(1e5 * torch.exp(-p), 1e5)
    torch.testing.assert_close(data.line_integrals, p)
    assert data.num_floored == 0
    assert data.fraction_floored == 0.0


def test_starved_rays_are_floored_and_told():
    counts = torch.tensor([[100.0, 1.0, 0.5], [0.0, -4.0, 2.0]])
    data = log_transform(counts, 100.0)
    top = math.log(100)
    expected = torch.tensor([[0.0, top, top], [top, top, math.log(50)]])
    torch.testing.assert_close(data.line_integrals, expected)
    assert data.floored.tolist() == [[False, False, True], [True, True, False]]
    assert data.num_floored == 3
    assert data.fraction_floored == 0.5
    assert float(log_transform(counts, 100.0, floor=10.0).line_integrals.max()) == pytest.approx(math.log(10))


@pytest.mark.parametrize("electronic", [0.0, 10.0])
def test_variance_of_the_logarithm(electronic):
    p = torch.full((100_000,), 1.0, dtype=torch.float64)
    data = simulate_transmission(p, 2000.0, seeded(), electronic_std=electronic)
    expected = 2000 * math.exp(-1)
    variance = log_variance(torch.tensor([expected]), electronic_std=electronic)
    assert float(variance) == pytest.approx((expected + electronic**2) / expected**2, rel=1e-6)
    assert float(data.line_integrals.var()) == pytest.approx(float(variance), rel=0.03)
    # With the bias of second order.
    bias = float(data.line_integrals.mean()) - 1
    assert bias == pytest.approx(float(variance) / 2, abs=5e-4)


def test_weights_are_one_over_the_variance_and_stay_positive():
    counts = torch.tensor([1e4, 100.0, 0.0, -7.0, 1e25], dtype=torch.float32)
    weights = wls_weights(counts, electronic_std=5.0)
    torch.testing.assert_close(weights, 1 / log_variance(counts, electronic_std=5.0))
    torch.testing.assert_close(weights[1], torch.tensor(100.0**2 / 125))
    torch.testing.assert_close(weights[2:4], torch.full((2,), 1 / 26.0))
    assert bool(torch.isfinite(weights).all())
    torch.testing.assert_close(wls_weights(counts[:2]), counts[:2])


def test_weighted_mean_is_the_better_one():
    """Averaging many views of one ray with few and with many photons: the weights are worth their name."""
    photons = torch.cat([torch.full((500,), 50.0), torch.full((500,), 5000.0)]).double()
    p = torch.full((400, 1000), 0.5, dtype=torch.float64)
    data = simulate_transmission(p, photons, seeded()).line_integrals
    weights = wls_weights(photons * math.exp(-0.5))
    weighted = (data * weights).sum(-1) / weights.sum()
    assert float(weighted.var()) == pytest.approx(1 / float(weights.sum()), rel=0.2)
    assert float(weighted.var()) < 0.1 * float(data.mean(-1).var())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate_counts(torch.ones(2, dtype=torch.int64), 1.0, seeded()), r"got torch\.int64"),
        (lambda: simulate_counts(torch.tensor([math.nan]), 1.0, seeded()), "line integrals hold NaN"),
        (lambda: simulate_counts(torch.zeros(2), 0.0, seeded()), "must be positive"),
        (lambda: simulate_counts(torch.zeros(2), torch.ones(3), seeded()), r"\(3,\) do not broadcast"),
        (lambda: simulate_counts(torch.zeros(1), torch.ones(3), seeded()), r"\(3,\) do not broadcast"),
        (lambda: simulate_counts(torch.zeros(2), 1.0, seeded(), electronic_std=-1), "photons >= 0, got -1"),
        (lambda: log_transform(torch.zeros(2), 1.0, floor=0.0), "positive number, got 0.0"),
        (lambda: log_transform(torch.zeros(2) / 0, 1.0), "counts hold NaN"),
        (lambda: wls_weights(torch.zeros(2), floor=math.nan), "positive number, got nan"),
        (lambda: log_variance(torch.zeros(2), electronic_std=math.inf), "photons >= 0, got inf"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(OperatorError, match=message):
        call()
