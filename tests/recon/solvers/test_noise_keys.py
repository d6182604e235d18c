"""Keyed noise: it depends on seed, key, sample and step, and on nothing else."""

import math
from dataclasses import replace

import pytest
import torch

from recon.solvers.base import KeyedNoise

NOISE = KeyedNoise(3, "file/7", (0, 1, 2), (8, 6), torch.complex64, torch.device("cpu"))


def test_shape_and_dtype():
    assert NOISE(0).shape == (3, 8, 6)
    for dtype in (torch.complex64, torch.complex128, torch.float32, torch.float64):
        assert replace(NOISE, dtype=dtype)(0).dtype == dtype
    assert replace(NOISE, shape=(2, 8, 6))(0).shape == (3, 2, 8, 6)


def test_repeatable_whatever_happens_around_it():
    first = NOISE(4)
    torch.manual_seed(99)
    NOISE(3)
    assert torch.equal(NOISE(4), first)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    NOISE(4)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("samples", [(0,), (1,), (2, 0), (2, 1, 0, 7), range(3)])
def test_an_item_does_not_depend_on_its_batch(samples):
    batch = replace(NOISE, samples=samples)(5)
    for item, sample in zip(batch, samples, strict=True):
        assert torch.equal(item, replace(NOISE, samples=(sample,))(5)[0])


def test_everything_in_the_key_counts():
    one = replace(NOISE, samples=(1,))
    draws = [
        one(2),
        one(3),
        one(-2),
        replace(one, samples=(2,))(2),
        replace(one, samples=(2,))(1),
        replace(one, samples=(12,))(3),
        replace(one, samples=(1,))(23),
        replace(one, seed=4)(2),
        replace(one, seed=-3)(2),
        replace(one, seed=3 + 2**64)(2),
        replace(one, key="")(2),
        replace(one, key="file/8")(2),
        replace(one, key="file|7")(2),
        replace(one, key="file/7|1", samples=(2,))(3),
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            # Independent: not equal, nor correlated beyond chance.
            correlation = float((a * b.conj()).mean().abs()) / 2
            assert correlation < 5 / math.sqrt(a.numel())


def test_unit_variance_for_each_component():
    z = replace(NOISE, shape=(300, 300))(0)
    assert float(z.real.var()) == pytest.approx(1, abs=0.01)
    assert float(z.imag.var()) == pytest.approx(1, abs=0.01)
    assert abs(float((z.real * z.imag).mean())) < 0.01
    assert abs(float(z.real.mean())) < 0.01
    real = replace(NOISE, shape=(300, 300), dtype=torch.float32)(0)
    assert float(real.var()) == pytest.approx(1, abs=0.01)


def test_recorded_values():
    # What a seed means may never change from release to release: results are to be reproduced years later.
    z = KeyedNoise(1, "slice", (0,), (1, 2), torch.complex64, torch.device("cpu"))(0)
    recorded = torch.tensor([[[-1.23997 + 0.41344j, -0.100115 + 0.041267j]]])
    torch.testing.assert_close(z, recorded, rtol=0, atol=1e-5)
