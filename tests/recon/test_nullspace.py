"""Measured and invented parts against the singular value decomposition of the dense operator."""

import math
from typing import Any

import pytest
import torch

from operators import CoilwiseMRI, FourierTransform, MulticoilMRI, SinglecoilMRI
from priors import GaussianPrior
from recon import DDS, ReconError, Scale, reconstruct
from recon.nullspace import smoothed, split_image, split_posterior
from recon.posterior import Posterior
from tests.operators.helper import dense, random_complex, random_mask

SHAPE = (6, 8)
C128 = torch.complex128


def coils(mask):
    return MulticoilMRI(random_complex(3, *SHAPE, seed=1, dtype=C128), mask)


def measured_by_svd(A, x, weight):
    """Every singular component times s² / (s² + λ)."""
    _, s, Vh = torch.linalg.svd(dense(A, A.domain_shape), full_matrices=False)
    gain = (s**2 / (s**2 + weight)).to(C128)
    return ((Vh.mH * gain) @ (Vh @ x.flatten())).reshape(x.shape)


@pytest.mark.parametrize(
    "A",
    [
        SinglecoilMRI(random_mask(*SHAPE), SHAPE).to(C128),
        coils(random_mask(*SHAPE)),
        coils(torch.arange(8) % 4 == 0),
        CoilwiseMRI(2, random_mask(8), SHAPE).to(C128),
    ],
)
@pytest.mark.parametrize("noise_std", [0.3, 1e-3])
def test_against_the_svd(A, noise_std):
    x = random_complex(*A.domain_shape, seed=4, dtype=C128)
    samples = random_complex(5, *A.domain_shape, seed=5, dtype=C128)
    split = split_image(A, x, noise_std=noise_std, image_std=1.5, samples=samples, tol=1e-9)
    weight = (noise_std / 1.5) ** 2
    assert split.weight == pytest.approx(weight)
    torch.testing.assert_close(split.measured, measured_by_svd(A, x, weight), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split.measured + split.invented, x)

    phase = (x / x.abs()).conj()
    parts = torch.stack([measured_by_svd(A, sample, weight) for sample in samples])
    for found, part in ((split.measured_std, parts), (split.invented_std, samples - parts)):
        torch.testing.assert_close(found, (part * phase).real.std(dim=0), rtol=1e-5, atol=1e-6)


def test_without_noise_it_is_the_null_space():
    A = SinglecoilMRI(random_mask(*SHAPE), SHAPE).to(C128)
    x = random_complex(*SHAPE, seed=4, dtype=C128)
    split = split_image(A, x, noise_std=1e-7, image_std=1.0)
    assert float(A(split.invented).abs().max()) < 1e-9
    torch.testing.assert_close(A(split.measured), A(x))
    k = FourierTransform(SHAPE)(x).abs().square()
    mask = torch.as_tensor(A.mask)
    assert split.share() == pytest.approx(float(k[~mask].sum() / k.sum()), rel=1e-6)


def test_real_images():
    class Rows(SinglecoilMRI):
        """Real images; with a mask symmetric about the centre, AᴴA takes them to real ones."""

        def _forward(self, x):
            return super()._forward(x.to(C128))

        def _adjoint(self, y):
            return super()._adjoint(y).real

        def _normal(self, x):
            return super()._normal(x.to(C128)).real

        def _check(self, x, shape, side):
            pass

    mask = torch.zeros(8)
    mask[3:6] = 1
    A = Rows(mask, SHAPE).to(C128)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    split = split_image(A, x, noise_std=0.5, image_std=1.0, samples=torch.stack([x, -x]))
    torch.testing.assert_close(split.measured, A.normal(x) / 1.25)  # AᴴA is a projection
    assert split.measured_std is not None
    torch.testing.assert_close(split.measured_std, math.sqrt(2) * split.measured.abs())
    assert not split.measured_std.is_complex()


def test_shares_of_regions_and_pixels():
    # The left half fully determined, the right half not at all: each coil map is zero there.
    maps = random_complex(3, *SHAPE, seed=1, dtype=C128)
    maps[..., 4:] = 0
    A = MulticoilMRI(maps, torch.ones(8))
    x = random_complex(*SHAPE, seed=4, dtype=C128)
    samples = random_complex(20, *SHAPE, seed=5, dtype=C128)
    split = split_image(A, x, noise_std=1e-4, image_std=1.0, samples=samples)
    left = torch.zeros(SHAPE, dtype=torch.bool)
    left[:, :4] = True
    for share in (split.share, split.variance_share):
        assert share(left) < 1e-6
        assert share(~left) == pytest.approx(1)
    energy = x.abs().square()
    assert split.share() == pytest.approx(float(energy[~left].sum() / energy.sum()), rel=1e-5)
    torch.testing.assert_close(split.share_map(0), (~left).double(), atol=1e-6, rtol=0)
    blurred = split.share_map(1.0)
    assert float(blurred[:, 0].max()) < float(blurred[:, 3].min()) < float(blurred[:, 7].min())
    assert float(blurred.min()) >= 0
    assert float(blurred.max()) <= 1


def test_smoothing_averages():
    flat = torch.full((5, 9), 3.0, dtype=torch.float64)
    torch.testing.assert_close(smoothed(flat, 1.7), flat)
    point = torch.zeros(41, 41, dtype=torch.float64)
    point[20, 20] = 1
    blurred = smoothed(point, 2.0)
    position = torch.arange(41.0) - 20
    assert float(blurred.sum()) == pytest.approx(1)
    assert float((blurred.sum(0) * position**2).sum()) == pytest.approx(4, rel=1e-3)
    torch.testing.assert_close(blurred, blurred.mT)


def test_split_of_a_posterior_scales_with_the_data():
    A = coils(torch.arange(8) % 2 == 0)
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0)
    y = A(random_complex(*SHAPE, seed=7, dtype=C128))
    splits = []
    for factor in (1.0, 1e-4):
        posterior = reconstruct(
            factor * y, A, prior, DDS(nfe=4), 3, noise_std=0.1 * factor, keep_samples=True
        )
        splits.append(split_posterior(posterior, A, prior.contract.level))
    torch.testing.assert_close(splits[1].measured, 1e-4 * splits[0].measured)
    stds = [split.invented_std for split in splits]
    assert stds[0] is not None
    torch.testing.assert_close(stds[1], 1e-4 * stds[0])
    image_std = prior.contract.level * posterior.scale.factor / math.sqrt(2)
    assert splits[1].weight == pytest.approx((0.1e-4 / image_std) ** 2)


def test_one_sample_has_no_spread():
    posterior = Posterior(
        mean=random_complex(*SHAPE, dtype=C128),
        std=torch.zeros(SHAPE),
        num_samples=1,
        residual=1.0,
        noise_std=1.0,
        nfe=1,
        scale=Scale(1.0),
        seed=0,
        key="",
        micro_batch=1,
        threads=1,
        settings={},
        samples=random_complex(1, *SHAPE, dtype=C128),
    )
    split = split_posterior(posterior, coils(torch.ones(8)), 1.0)
    assert split.measured_std is None
    with pytest.raises(ReconError, match="needs samples"):
        split.variance_share()


def test_what_cannot_be_done_is_said():
    A = coils(torch.arange(8) % 2 == 0)
    x = random_complex(*SHAPE, seed=4, dtype=C128)
    good: dict[str, Any] = {"noise_std": 0.1, "image_std": 1.0}
    with pytest.raises(ReconError, match="noise_std must be positive and finite, got 0"):
        split_image(A, x, noise_std=0, image_std=1.0)
    with pytest.raises(ReconError, match=r"the image has shape \(6, 7\), the operator's is \(6, 8\)"):
        split_image(A, x[:, :7], **good)
    with pytest.raises(ReconError, match=r"got \(6, 8\) with their number in front"):
        split_image(A, x, **good, samples=x)
    with pytest.raises(ReconError, match="at least 2 samples, got 1"):
        split_image(A, x, **good, samples=x[None])
    with pytest.raises(ReconError, match=r"not found to 0\.0001 in 2 conjugate-gradient iterations"):
        split_image(A, x, **good, max_iter=2)
    split = split_image(A, x, **good)
    with pytest.raises(ReconError, match="a region is bool"):
        split.share(torch.ones(6, 7, dtype=torch.bool))
    with pytest.raises(ReconError, match="holds no energy"):
        split.share(torch.zeros(SHAPE, dtype=torch.bool))
    A.matched_adjoint = False
    with pytest.raises(ReconError, match="matched adjoint"):
        split_image(A, x, **good)
