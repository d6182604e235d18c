"""Coil compression: optimal energy, white noise stays white, and what is of low rank is kept whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.coil_compression import compress_coils, compression_matrix
from operators.errors import OperatorError
from operators.prewhitening import noise_covariance

ACS = (slice(4, 12), slice(5, 11))


def random_kspace(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=15)
@given(num_coils=st.integers(1, 7), seed=st.integers(0, 1000))
def test_keeps_the_most_energy_that_so_many_coils_can(num_coils, seed):
    kspace = random_kspace(7, 16, 15, seed=seed)
    compressed, matrix = compress_coils(kspace, num_coils, ACS)
    assert compressed.shape == (num_coils, 16, 15)
    torch.testing.assert_close(compressed, torch.einsum("dc,chw->dhw", matrix, kspace))
    torch.testing.assert_close(matrix @ matrix.mH, torch.eye(num_coils).to(matrix), atol=1e-5, rtol=0)
    # Eckart and Young: the optimum is the energy of the largest singular values.
    squared = torch.linalg.svdvals(kspace[(..., *ACS)].flatten(1)) ** 2
    kept = compressed[(..., *ACS)].abs().square().sum() / kspace[(..., *ACS)].abs().square().sum()
    assert float(kept) == pytest.approx(float(squared[:num_coils].sum() / squared.sum()), rel=1e-4)
    assert compression_matrix(kspace, num_coils, ACS)[1] == pytest.approx(float(kept), rel=1e-4)
    # The strongest comes first.
    energies = compressed[(..., *ACS)].abs().square().sum(dim=(1, 2))
    assert (energies.diff() <= 1e-4 * energies[0]).all()


def test_low_rank_data_are_kept_whole():
    mix = random_kspace(8, 3, seed=1)
    kspace = torch.einsum("cd,dhw->chw", mix, random_kspace(3, 20, 18))
    compressed, matrix = compress_coils(kspace, 3, slice(6, 12))
    assert compression_matrix(kspace, 3, slice(6, 12))[1] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        torch.einsum("dc,dhw->chw", matrix.conj(), compressed), kspace, atol=1e-4, rtol=1e-4
    )


def test_noise_stays_white():
    _, matrix = compress_coils(random_kspace(6, 16, 15), 4, ACS)
    white = random_kspace(6, 40000, seed=2)
    torch.testing.assert_close(
        noise_covariance(matrix @ white), 0.5 * torch.eye(4, dtype=white.dtype), atol=0.02, rtol=0
    )


def test_uses_the_calibration_region_only_and_shares_one_matrix_in_a_volume():
    kspace = random_kspace(5, 6, 16, 15)
    outside = torch.full_like(kspace, float("nan"))
    outside[(..., *ACS)] = kspace[(..., *ACS)]
    matrix, _ = compression_matrix(kspace, 3, ACS)
    assert torch.equal(compression_matrix(outside, 3, ACS)[0], matrix)
    compressed, same = compress_coils(kspace, 3, ACS)
    assert torch.equal(same, matrix)
    torch.testing.assert_close(compressed[2], torch.einsum("dc,chw->dhw", matrix, kspace[2]))


def test_bad_input():
    kspace = random_kspace(4, 16, 15)
    for count in (0, 5):
        with pytest.raises(OperatorError, match=f"4 coils can be compressed to 1 to 4 coils, not to {count}"):
            compress_coils(kspace, count, ACS)
    with pytest.raises(OperatorError, match="no calibration region"):
        compress_coils(kspace, 2, None)
    for bad in (0 * kspace, float("nan") * kspace):
        with pytest.raises(OperatorError, match="zero throughout, or not finite"):
            compress_coils(bad, 2, ACS)
    with pytest.raises(OperatorError, match="empty"):
        compress_coils(kspace, 2, slice(20, 30))
    with pytest.raises(OperatorError, match="complex"):
        compress_coils(kspace.real, 2, ACS)
