"""Images of any size with a network of one size: overlapping tiles, blended."""

from __future__ import annotations

import torch
from torch import Tensor

from priors.base import ScorePrior, padded
from priors.errors import PriorError


class TiledPrior(ScorePrior):
    """A prior that only ever sees tiles of one size, on images of any size.

    Tiles overlap by at least ``overlap`` pixels. Within an overlap the weight goes over smoothly from one to
    the other, and is zero in the outer half of the overlap, where a tile does not know what is beside it. So
    the result is exactly that on the whole image wherever the denoiser looks at most ``overlap / 4`` pixels
    far; what a network sees further away, and statistics of the whole image, are those of the tile.

    Parameters
    ----------
    prior
        The prior; it has the same contract.
    tile
        Height and width of a tile, or one number for both; a multiple of the contract's ``size_multiple``.
    overlap
        Pixels that neighbouring tiles have in common at least, at most half a tile.
    batch
        Tiles that the prior is given at once: a matter of memory.

    Raises
    ------
    PriorError
        If there are no such tiles.

    Notes
    -----
    Images smaller than a tile are extended to it by repeating their border, and cropped again.
    """

    def __init__(
        self, prior: ScorePrior, tile: int | tuple[int, int], overlap: int = 32, *, batch: int = 4
    ) -> None:
        super().__init__(prior.contract)
        size = (tile, tile) if isinstance(tile, int) else tuple(tile)
        multiple = prior.contract.size_multiple
        if len(size) != 2 or min(size) < 1 or any(length % multiple for length in size):
            raise PriorError(f"a tile has a height and a width that are multiples of {multiple}, not {tile}")
        if not 0 <= overlap <= min(size) // 2:
            raise PriorError(
                f"tiles of {size[0]} x {size[1]} overlap by 0 to {min(size) // 2}, not {overlap}"
            )
        if batch < 1:
            raise PriorError(f"batch must be at least 1, got {batch}")
        self.prior, self.tile, self.overlap, self.batch = prior, size, overlap, batch
        self.differentiable = prior.differentiable

    def error_variance(self, sigma: float) -> float:
        """See :meth:`ScorePrior.error_variance`; that of the prior."""
        return self.prior.error_variance(sigma)

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        height, width = x.shape[-2:]
        x = padded(x, smallest=self.tile)
        rows, row_weights = _places(x.shape[-2], self.tile[0], self.overlap)
        columns, column_weights = _places(x.shape[-1], self.tile[1], self.overlap)
        corners = [(r, c) for r in range(len(rows)) for c in range(len(columns))]
        # Tile by tile with the images of a batch beside each other, in an order that nothing else changes.
        jobs = [(image, r, c) for r, c in corners for image in range(len(x))]
        out = torch.zeros_like(x)
        for first in range(0, len(jobs), self.batch):
            part = jobs[first : first + self.batch]
            cuts = [
                (
                    image,
                    slice(rows[r], rows[r] + self.tile[0]),
                    slice(columns[c], columns[c] + self.tile[1]),
                )
                for image, r, c in part
            ]
            tiles = torch.stack([x[image, :, down, across] for image, down, across in cuts])
            done = self.prior.denoise_channels(tiles, sigma[[image for image, _, _ in part]])
            for result, (image, r, c), (_, down, across) in zip(done, part, cuts, strict=True):
                weight = row_weights[r][:, None] * column_weights[c]
                out[image, :, down, across] += weight.to(x) * result
        return out[..., :height, :width]


def _places(length: int, tile: int, overlap: int) -> tuple[list[int], list[Tensor]]:
    """Where tiles begin along an axis, spread evenly, and the weights ``(tile,)`` of each, which add up to 1.

    In an overlap of m pixels the weight is zero in the outer quarter, rises along half a cosine in the
    middle half, and is one in the inner quarter; where three tiles overlap, all is divided by the sum.
    """
    count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    starts = [round(k * (length - tile) / max(1, count - 1)) for k in range(count)]
    weights = [torch.ones(tile, dtype=torch.float64) for _ in starts]
    for k in range(count - 1):
        common = starts[k] + tile - starts[k + 1]
        margin = common // 4
        ramp = torch.arange(common - 2 * margin, dtype=torch.float64) + 0.5
        rise = torch.cat(
            [
                torch.zeros(margin, dtype=torch.float64),
                0.5 - 0.5 * torch.cos(torch.pi * ramp / max(1, len(ramp))),
                torch.ones(margin, dtype=torch.float64),
            ]
        )
        weights[k][tile - common :] *= 1 - rise
        weights[k + 1][:common] *= rise
    total = torch.zeros(max(length, tile), dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return starts, [w / total[start : start + tile] for start, w in zip(starts, weights, strict=True)]
