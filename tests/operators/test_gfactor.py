"""The g-factor against dense inverses, and against the closed form of aliased pixels."""

import math

import pytest
import torch

from operators import MulticoilMRI, OperatorError, birdcage_maps
from operators.gfactor import noise_amplification
from tests.operators.helper import dense, random_complex, random_mask

SHAPE = (6, 8)


def smooth_coils(num_coils=4, shape=SHAPE):
    return birdcage_maps(num_coils, shape).to(torch.complex128)


def every(step, size, offset=0):
    return torch.arange(size) % step == offset


def covariance_std(A, regularisation=0.0):
    """From the definition: the standard deviation of (AᴴA + μ I)⁻¹ Aᴴ n."""
    matrix = dense(A, SHAPE)
    normal = matrix.mH @ matrix
    gain = torch.linalg.solve(normal + regularisation * torch.eye(len(normal)), matrix.mH)
    return (gain @ gain.mH).diagonal().real.sqrt().reshape(SHAPE)


@pytest.mark.parametrize("regularisation", [0.0, 0.03])
@pytest.mark.parametrize(
    "mask",
    [
        every(2, 8),
        every(2, 8, 1),
        torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]),
        torch.ones(8),
        every(2, 6)[:, None],
    ],
)
def test_whole_columns_or_rows_against_the_dense_inverse(mask, regularisation):
    A = MulticoilMRI(smooth_coils(), mask)
    found = noise_amplification(A, regularisation=regularisation)
    assert found.num_replicas == 0
    torch.testing.assert_close(found.noise, covariance_std(A, regularisation), rtol=1e-8, atol=0)


def test_aliased_pixels_in_closed_form():
    # Every second column: pixels half a field of view apart fold onto each other, and each pair is a
    # least-squares problem of its own (Pruessmann et al. 1999, Eq. 23).
    maps = smooth_coils(3)
    found = noise_amplification(MulticoilMRI(maps, every(2, 8)))
    assert found.acceleration == 2
    for h in range(6):
        for w in range(4):
            pair = maps[:, h, [w, w + 4]]
            normal = pair.mH @ pair
            g = (torch.linalg.inv(normal).diagonal() * normal.diagonal()).real.sqrt()
            torch.testing.assert_close(found.g[h, [w, w + 4]], g, rtol=1e-8, atol=0)
    assert float(found.g.max()) > 1.05


def test_fully_sampled_g_is_one_and_never_less():
    torch.testing.assert_close(
        noise_amplification(MulticoilMRI(smooth_coils(), torch.ones(8))).g,
        torch.ones(SHAPE, dtype=torch.float64),
    )
    for seed in range(5):
        sampled = random_mask(8, seed=seed)
        sampled[3:6] = True
        g = noise_amplification(MulticoilMRI(random_complex(6, *SHAPE, seed=seed), sampled)).g
        assert float(g.min()) > 1 - 1e-5


def test_g_grows_with_acceleration():
    maps = smooth_coils(6, (4, 24))
    g = [float(noise_amplification(MulticoilMRI(maps, every(step, 24))).g.mean()) for step in (1, 2, 3, 4)]
    assert g == sorted(g)
    assert g[-1] > 1.5


@pytest.mark.parametrize("regularisation", [0.0, 0.2])
def test_replicas_agree_with_the_dense_inverse(regularisation):
    mask = random_mask(*SHAPE, seed=3)
    A = MulticoilMRI(random_complex(4, *SHAPE, seed=2, dtype=torch.complex128), mask)
    count = 800
    found = noise_amplification(A, regularisation=regularisation, num_replicas=count, tol=1e-6)
    assert found.num_replicas == count
    error = found.noise / covariance_std(A, regularisation) - 1
    assert float(error.abs().max()) < 4.5 / math.sqrt(4 * count)
    assert float(error.square().mean().sqrt()) > 0.3 / math.sqrt(4 * count)  # an estimate, not the exact way


def test_scattered_masks_take_replicas_by_themselves():
    A = MulticoilMRI(random_complex(4, *SHAPE, seed=2, dtype=torch.complex128), random_mask(*SHAPE, seed=3))
    found = noise_amplification(A, seed=1)
    assert found.num_replicas == 64
    assert float((found.noise / covariance_std(A) - 1).abs().max()) < 5 / math.sqrt(4 * 64)
    torch.testing.assert_close(found.noise, noise_amplification(A, seed=1).noise, rtol=0, atol=0)
    assert not torch.equal(found.noise, noise_amplification(A, seed=2).noise)


def test_nothing_where_no_coil_is_sensitive():
    maps = smooth_coils()
    maps[:, :2] = 0
    maps[:, :, :3] = 0
    A = MulticoilMRI(maps, every(2, 8))
    for found in (noise_amplification(A), noise_amplification(A, num_replicas=400)):
        assert float(found.noise[:2].abs().max()) == 0
        assert float(found.g[:, :3].abs().max()) == 0
        # Against the pseudo-inverse: the null space is that of the blank pixels.
        matrix = dense(A, SHAPE)
        std = torch.linalg.pinv(matrix.mH @ matrix, rtol=1e-10).diagonal().real.clamp_min(0).sqrt()
        rtol = 1e-8 if found.num_replicas == 0 else 0.15
        torch.testing.assert_close(found.noise, std.reshape(SHAPE), rtol=rtol, atol=1e-6)


def test_single_precision():
    A = MulticoilMRI(birdcage_maps(4, SHAPE), every(2, 8))
    found = noise_amplification(A)
    assert found.noise.dtype == found.g.dtype == torch.float32
    torch.testing.assert_close(
        found.noise.double(), covariance_std(A.to(torch.complex128)), rtol=1e-5, atol=0
    )


def test_what_cannot_be_done_is_said():
    one_coil = MulticoilMRI(torch.ones(1, *SHAPE, dtype=torch.complex128), every(2, 8))
    with pytest.raises(OperatorError, match=r"do not determine the image, .* give a regularisation"):
        noise_amplification(one_coil)
    torch.testing.assert_close(
        noise_amplification(one_coil, regularisation=0.1).noise, covariance_std(one_coil, 0.1)
    )
    scattered = MulticoilMRI(random_complex(4, *SHAPE, dtype=torch.complex128), random_mask(*SHAPE))
    with pytest.raises(OperatorError, match="did not converge in 2 iterations"):
        noise_amplification(scattered, max_iter=2)
    with pytest.raises(OperatorError, match=r"one operator, this one has a batch \(2,\)"):
        noise_amplification(MulticoilMRI(random_complex(2, 3, *SHAPE), torch.ones(8)))
    with pytest.raises(OperatorError, match="measures nothing"):
        noise_amplification(MulticoilMRI(random_complex(3, *SHAPE), torch.zeros(8)))
    with pytest.raises(OperatorError, match="at least 2 replicas, got 1"):
        noise_amplification(scattered, num_replicas=1)
    with pytest.raises(OperatorError, match="regularisation must be a number and not negative, got -1"):
        noise_amplification(scattered, regularisation=-1)
