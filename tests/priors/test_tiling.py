"""Tiles: exact for denoisers that do not look far, and never more than one size."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from priors import Contract, PriorError, ScorePrior, TiledPrior
from priors.tiling import _places


class Local(ScorePrior):
    """A small smoothing filter, nonlinear and of the given reach; insists on its size."""

    def __init__(self, reach, tile=None, **contract):
        super().__init__(Contract(channels="real", **contract))
        self.reach, self.tile = reach, tile
        self.batches = []

    def denoise_channels(self, x, sigma):
        self.batches.append(len(x))
        assert self.tile is None or tuple(x.shape[-2:]) == self.tile
        near = F.pad(x, [self.reach] * 4, mode="replicate")
        mean = F.avg_pool2d(near, 2 * self.reach + 1, 1)
        return mean + (x - mean).tanh() / (1 + sigma[:, None, None, None])


def image(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("reach", "overlap"), [(0, 0), (0, 3), (1, 4), (2, 8), (3, 14)])
@pytest.mark.parametrize("size", [(32, 48), (75, 61), (33, 100), (20, 30), (32, 33), (51, 48)])
def test_exact_for_a_denoiser_that_looks_less_far_than_the_overlap(size, reach, overlap):
    x, sigma = image(2, *size), torch.tensor([0.3, 2.0])
    whole = Local(reach)
    tiled = TiledPrior(Local(reach, (32, 48)), (32, 48), overlap)
    torch.testing.assert_close(tiled.denoise(x, sigma), whole.denoise(x, sigma), rtol=1e-5, atol=1e-6)


def test_a_denoiser_that_looks_further_differs_but_without_seams():
    x = image(40, 100)
    whole, tiled = Local(12).denoise(x, 1.0), TiledPrior(Local(12), (40, 40), 16).denoise(x, 1.0)
    difference = tiled - whole
    assert float(difference.abs().max()) > 1e-3
    # Where tiles go over into each other, the difference does not jump: compare with a hard seam.
    hard = TiledPrior(Local(12), (40, 40), 0).denoise(x, 1.0) - whole
    assert float(difference.diff(dim=1).abs().max()) < 0.5 * float(hard.diff(dim=1).abs().max())


@settings(deadline=None, max_examples=100)
@given(length=st.integers(1, 200), tile=st.integers(2, 40), share=st.floats(0, 0.5))
@example(length=98, tile=64, share=0.5)  # three tiles overlap
def test_weights_add_up_to_one_and_tiles_overlap_enough(length, tile, share):
    overlap = int(share * tile)
    length = max(length, tile)
    starts, weights = _places(length, tile, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        assert start >= 0
        assert float(weight.min()) >= 0
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    assert starts[-1] + tile == length
    assert all(a + tile - b >= overlap for a, b in pairwise(starts))


def test_the_batch_is_limited_and_changes_nothing():
    x, sigma = image(3, 50, 50), torch.tensor([0.1, 0.5, 2.0])
    results = []
    for batch in (1, 4, 100):
        local = Local(1, (24, 24))
        results.append(TiledPrior(local, 24, 8, batch=batch).denoise(x, sigma))
        tiles = 3 * 3 * 3
        assert sum(local.batches) == tiles
        assert max(local.batches) == min(batch, tiles)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    one = TiledPrior(Local(1, (24, 24)), 24, 8).denoise(x[1], 0.5)
    assert torch.equal(one, results[0][1])


def test_complex_images_and_gradients():
    x = image(2, 30, 40, dtype=torch.complex64).requires_grad_()
    tiled, whole = (prior.denoise(x, 0.5) for prior in (TiledPrior(Local(1), 20, 8), Local(1)))
    torch.testing.assert_close(tiled, whole)
    gradients = [torch.autograd.grad(out.abs().sum(), x)[0] for out in (tiled, whole)]
    torch.testing.assert_close(*gradients)


def test_it_is_a_prior_like_the_one_within():
    local = Local(1, name="small", size_multiple=4, error_table=((0.1, 0.05), (1.0, 0.2)))
    local.differentiable = False
    tiled = TiledPrior(local, 16, 4)
    assert tiled.contract == local.contract
    assert not tiled.differentiable
    assert tiled.error_variance(0.1) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("tile", "options", "message"),
    [
        (18, {}, "multiples of 4, not 18"),
        ((16, 16, 16), {}, r"multiples of 4, not \(16, 16, 16\)"),
        (0, {}, "multiples of 4, not 0"),
        (16, {"overlap": 9}, "tiles of 16 x 16 overlap by 0 to 8, not 9"),
        (16, {"overlap": -1}, "overlap by 0 to 8, not -1"),
        (16, {"overlap": 4, "batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_impossible_tiles(tile, options, message):
    with pytest.raises(PriorError, match=message):
        TiledPrior(Local(1, size_multiple=4), tile, **options)
