"""Noise levels: their ends, their order, known values."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import Contract
from priors.errors import PriorError
from priors.sampling import karras_levels
from recon import ReconError
from recon.solvers.schedule import noise_levels, vp_linear_sigmas


@settings(deadline=None, max_examples=30)
@given(nfe=st.integers(2, 200), low=st.floats(1e-4, 0.5), ratio=st.floats(1.01, 1e5), rho=st.floats(1, 10))
def test_karras_levels(nfe, low, ratio, rho):
    high = low * ratio
    levels = karras_levels(nfe, high, low, rho)
    assert len(levels) == nfe + 1
    assert levels[0] == pytest.approx(high)
    assert levels[-2] == pytest.approx(low)
    assert levels[-1] == 0
    assert all(a > b for a, b in pairwise(levels))
    roots = [level ** (1 / rho) for level in levels[:-1]]
    steps = [a - b for a, b in pairwise(roots)]
    assert steps == pytest.approx([(roots[0] - roots[-1]) / (nfe - 1)] * (nfe - 1), rel=1e-6)


def test_karras_levels_of_the_paper():
    # Eq. 5 of Karras et al. 2022 worked by hand for its own settings, sigma 80 to 0.002, rho 7.
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert karras_levels(3, 80, 0.002) == pytest.approx([80, middle, 0.002, 0])
    assert middle == pytest.approx(2.5152, rel=1e-4)


@pytest.mark.parametrize("levels", [karras_levels(1, 2.0, 0.1), karras_levels(1, 2.0, 2.0)])
def test_a_single_level_is_the_first(levels):
    assert levels == [pytest.approx(2.0), 0.0]


def test_levels_stay_within_the_prior_s():
    narrow = Contract(sigma_min=0.05, sigma_max=0.2)
    assert noise_levels("karras", 5, 1.0, None, narrow, 0.1) == karras_levels(5, 0.2, 0.1)
    assert noise_levels("karras", 5, 1.0, None, narrow, 0.7) == pytest.approx([*[0.2] * 5, 0.0])
    assert noise_levels("karras", 5, 1.0, None, Contract(), 0.1) == karras_levels(5, 1.0, 0.1)


@settings(deadline=None, max_examples=30)
@given(nfe=st.integers(1, 1000))
def test_vp_levels(nfe):
    levels = vp_linear_sigmas(nfe)
    assert len(levels) == nfe + 1
    assert all(a > b for a, b in pairwise(levels))
    assert levels[0] == pytest.approx(157.4, rel=1e-3)
    assert levels[-1] == 0
    if nfe > 1:  # after the first of the thousand steps, alpha-bar is 1 - 1e-4
        assert levels[-2] == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)))


def test_vp_levels_are_those_of_ddpm():
    # alpha-bar by plain multiplication, in the order in which the process is run.
    product, expected = 1.0, []
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        expected.append(math.sqrt((1 - product) / product))
    assert vp_linear_sigmas(1000) == pytest.approx([*reversed(expected), 0.0])
    assert vp_linear_sigmas(3) == pytest.approx([expected[999], expected[500], expected[0], 0.0])
    assert expected[999] == pytest.approx(157.407, rel=1e-4)


@pytest.mark.parametrize("nfe", [0, -3])
def test_too_few_evaluations(nfe):
    with pytest.raises(PriorError, match=f"number of steps must .*got {nfe}"):
        karras_levels(nfe, 2.0, 0.1)
    with pytest.raises(ReconError, match=f"number of network evaluations must .*got {nfe}"):
        vp_linear_sigmas(nfe)


def test_more_levels_than_the_process_has():
    with pytest.raises(ReconError, match=r"must lie in 1..1000, got 1001"):
        vp_linear_sigmas(1001)


@pytest.mark.parametrize(
    ("high", "low"), [(1.0, 2.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 0.1), (1.0, math.nan)]
)
def test_impossible_ends(high, low):
    with pytest.raises(PriorError, match="need 0 < sigma_min <= sigma_max"):
        karras_levels(5, high, low)
