from __future__ import annotations

import math

import pytest
import torch

from operators.attenuation import (
    MU_WATER,
    hu_to_mu,
    hu_to_prior,
    mu_to_hu,
    mu_to_prior,
    prior_to_hu,
    prior_to_mu,
)
from operators.errors import OperatorError

HU = torch.tensor([-1024.0, -1000.0, 0.0, 40.0, 1000.0, 3071.0], dtype=torch.float64)


def test_air_water_and_bone():
    mu = torch.tensor([-0.00048, 0.0, 0.02, 0.0208, 0.04, 0.08142], dtype=torch.float64)
    torch.testing.assert_close(hu_to_mu(HU), mu, atol=1e-12, rtol=0)
    torch.testing.assert_close(mu_to_hu(mu), HU, atol=1e-9, rtol=0)
    torch.testing.assert_close(hu_to_mu(HU, 0.0192), mu * 0.96, atol=1e-12, rtol=0)
    torch.testing.assert_close(hu_to_prior(HU), mu / 0.02, atol=1e-12, rtol=0)
    assert MU_WATER == 0.02


def test_one_hounsfield_unit_is_a_thousandth_and_nothing_is_clipped():
    x = torch.tensor([-0.5, 0.0, 1.0, 1.001, 9.0], dtype=torch.float64)
    torch.testing.assert_close(
        prior_to_hu(x), torch.tensor([-1500.0, -1000.0, 0.0, 1.0, 8000.0], dtype=torch.float64)
    )
    torch.testing.assert_close(hu_to_prior(prior_to_hu(x)), x)
    torch.testing.assert_close(mu_to_prior(prior_to_mu(x, 0.0192), 0.0192), x)


def test_what_is_refused():
    for function in (hu_to_mu, hu_to_prior, mu_to_hu, prior_to_hu, mu_to_prior, prior_to_mu):
        with pytest.raises(OperatorError, match=r"floating point here, got torch\.int16"):
            function(torch.ones(2, dtype=torch.int16))
    for value in (0.0, -0.02, math.nan, math.inf):
        with pytest.raises(OperatorError, match=f"positive number of 1/mm, got {value}"):
            hu_to_mu(HU, value)
