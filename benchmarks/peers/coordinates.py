"""The problem and the prior in the terms of software for pictures: real channels whose values lie in [0, 1].

deepinv's solvers expect that, and some clip to it, while the real and imaginary parts of an MR image are of
either sign. An image ``x`` becomes ``u = a x + b``, which lies in [0, 1], and because the operator is linear,
the data ``y = A x + n`` become ``a y + A b = A u + a n``: the same operator, the same noise, the same
information. Nothing is approximated, and what comes back is mapped back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from operators.base import LinearOperator
from priors.base import ScorePrior
from recon.errors import ReconError

HEADROOM = 1.25
"""Largest magnitude that an image may have, over that of a first image by conjugate gradients."""


@dataclass(frozen=True)
class Span:
    """Which values of the prior's images are called 0 and 1.

    Parameters
    ----------
    low, high : float
        Of every channel, in the prior's units: ``u = (x - low) / (high - low)``.
    complex_images : bool
        Whether an image is complex and has two channels, real and imaginary part.

    Raises
    ------
    ReconError
        If they are not in this order.
    """

    low: float
    high: float
    complex_images: bool

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ReconError(f"a span needs low < high, got {self.low} and {self.high}")

    @classmethod
    def of(cls, image: Tensor) -> Span:
        """Span with headroom about a first image ``(H, W)``: both signs if it is complex, else from zero."""
        peak = HEADROOM * float(image.abs().max())
        return cls(-peak if image.is_complex() else 0.0, peak, image.is_complex())

    @property
    def slope(self) -> float:
        """What a difference of 1 of the prior's images becomes; also the factor of noise levels."""
        return 1 / (self.high - self.low)

    def channels(self, x: Tensor) -> Tensor:
        """Images ``(B, ..., H, W)`` of the prior's units as real channels ``(B, C, ..., H, W)`` in [0, 1]."""
        return (split(x) - self.low) * self.slope

    def image(self, u: Tensor) -> Tensor:
        """Channels ``(B, C, H, W)`` in [0, 1] as images ``(B, H, W)`` in the prior's units."""
        return joined(u / self.slope + self.low, self.complex_images)

    def data(self, y: Tensor, operator: LinearOperator) -> Tensor:
        """Data ``a y + A b`` of images in [0, 1], for data `y` in the prior's units, of the same shape."""
        offset = -self.low * self.slope
        value = complex(offset, offset) if self.complex_images else offset
        return self.slope * y + operator(torch.full(operator.domain_shape, value, dtype=y.dtype))


def split(x: Tensor) -> Tensor:
    """Complex ``(B, ..., H, W)`` as ``(B, 2, ..., H, W)``, real as ``(B, 1, ..., H, W)``."""
    return torch.view_as_real(x).movedim(-1, 1) if x.is_complex() else x.unsqueeze(1)


def joined(channels: Tensor, complex_images: bool) -> Tensor:
    """The reverse of `split`."""
    if not complex_images:
        return channels.squeeze(1)
    return torch.view_as_complex(channels.movedim(1, -1).contiguous())


class PictureDenoiser(nn.Module):
    """A prior as a denoiser ``D(u, sigma)`` of pictures, which counts how often it is asked.

    Beyond the noise levels that the prior knows its own largest or smallest one is taken: an image with more
    noise is shrunk until it has that of the largest level, at which little but the mean of all images is
    left.

    Parameters
    ----------
    prior : ScorePrior
        The prior.
    span : Span
        Between its images and pictures.

    Attributes
    ----------
    evaluations : int
        Images denoised so far.
    last : Tensor or None
        What was returned last, ``(B, C, H, W)``.
    """

    def __init__(self, prior: ScorePrior, span: Span) -> None:
        super().__init__()
        self.prior = prior
        self.span = span
        self.evaluations = 0
        self.last: Tensor | None = None

    def forward(self, u: Tensor, sigma: float | Tensor, **options: object) -> Tensor:
        """Denoise ``(B, C, H, W)`` in [0, 1] with noise of `sigma`, one number or one an image."""
        contract = self.prior.contract
        level = float(torch.as_tensor(sigma).flatten()[0]) / self.span.slope
        x = self.span.image(u)
        if level > contract.sigma_max:
            x = x * (contract.sigma_max / level)
        level = min(max(level, contract.sigma_min), contract.sigma_max)
        denoised = self.span.channels(self.prior.denoise(x, level)).to(u.dtype)
        self.evaluations += len(u)
        self.last = denoised.detach()
        return denoised
