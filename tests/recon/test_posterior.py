"""Streaming moments against two passes over all samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.posterior import Moments


def images(count, dtype, offset=0.0, shape=(3, 4)):
    return offset + torch.randn((count, *shape), dtype=dtype, generator=torch.Generator().manual_seed(count))


def gather(samples):
    moments = Moments()
    for sample in samples:
        moments.add(sample)
    return moments


@settings(deadline=None, max_examples=20)
@given(
    count=st.integers(2, 40),
    dtype=st.sampled_from([torch.complex64, torch.complex128, torch.float32, torch.float64]),
)
def test_equal_to_two_passes(count, dtype):
    samples = images(count, dtype)
    moments = gather(samples)
    wide = samples.to(torch.complex128 if dtype.is_complex else torch.float64)
    magnitude = wide.abs() if dtype.is_complex else wide
    assert moments.count == count
    torch.testing.assert_close(moments.mean, wide.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.std, magnitude.std(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
def test_spread_far_below_the_mean(dtype):
    # Where E[x^2] - E[x]^2 has lost every digit, and may be negative.
    samples = images(50, dtype, offset=1e9)
    magnitude = samples.abs() - 1e9
    naive = (samples.abs() ** 2).mean(0) - samples.abs().mean(0) ** 2
    assert not torch.allclose(naive, magnitude.var(0, correction=0), rtol=0.5)
    torch.testing.assert_close(gather(samples).std, magnitude.std(0), rtol=1e-5, atol=0)


def test_equal_samples_have_no_spread():
    sample = images(1, torch.complex64)[0]
    moments = gather([sample] * 7)
    assert torch.equal(moments.std, torch.zeros(3, 4, dtype=torch.float64))
    torch.testing.assert_close(moments.mean, sample.to(torch.complex128))


def test_one_sample():
    sample = images(1, torch.complex64)[0]
    moments = gather([sample])
    assert torch.equal(moments.mean, sample.to(torch.complex128))
    assert torch.equal(moments.std, torch.zeros(3, 4, dtype=torch.float64))


def test_spread_is_that_of_the_magnitude():
    # Phases that differ cancel in the mean; the magnitude does not vary.
    samples = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64)[:, None, None]
    moments = gather(samples)
    assert abs(complex(moments.mean)) < 1e-12
    assert float(moments.std) < 1e-12


def test_samples_are_neither_kept_nor_changed():
    samples = images(3, torch.complex128)
    copies = samples.clone()
    moments = gather(samples)
    assert torch.equal(samples, copies)
    mean = moments.mean.clone()
    samples.zero_()
    assert torch.equal(moments.mean, mean)
    held = [value for value in vars(moments).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 3
    assert all(value.shape == (3, 4) for value in held)
