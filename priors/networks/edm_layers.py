"""Layers that both U-Nets of EDM share: Karras et al., NeurIPS 2022 (arXiv:2206.00364), App. F.2, Table 7."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.errors import PriorError


class Convolution(nn.Module):
    """Convolution, resampling by a factor of two with a separable filter, or both.

    Parameters
    ----------
    width_in, width
        Channels.
    kernel
        Side of the convolution's kernel; 0 for none.
    resample
        ``"down"`` or ``"up"``, before the convolution; empty for neither.
    taps
        The filter in one dimension, any scale.
    fused
        Convolve first and then filter and downsample, with nothing of the first result lost at the border.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int,
        resample: str = "",
        taps: tuple[float, ...] = (1.0, 1.0),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.fused = fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            bound = 1 / math.sqrt(width_in * kernel**2)
            self.weight = nn.Parameter(torch.empty(width, width_in, kernel, kernel).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(width))
        row = torch.tensor(taps, dtype=torch.float32) if resample else None
        self.register_buffer(
            "resample_filter", None if row is None else torch.outer(row, row)[None, None] / row.sum() ** 2
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, width_in, H, W)``."""
        margin = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.resample_filter is not None:
            border = (self.resample_filter.shape[-1] - 1) // 2
            if self.fused and self.weight is not None:
                x = F.conv2d(x, self.weight, padding=margin + border)
                x = self._filter(x, 0)
                return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
            x = self._filter(x, border)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=margin)

    def _filter(self, x: Tensor, border: int) -> Tensor:
        assert self.resample_filter is not None
        width = x.shape[1]
        kernel = self.resample_filter.to(x.dtype).expand(width, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, kernel, stride=2, padding=border, groups=width)
        # Only every fourth pixel of the fine grid holds a value.
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=border, groups=width)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32: groups of four channels, and no more than 32 of them."""

    def __init__(self, width: int, eps: float) -> None:
        groups = min(32, width // 4)
        if not groups or width % groups:
            raise PriorError(f"{width} channels cannot be normalised in {groups} groups")
        super().__init__(groups, width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, width, H, W)``."""
        return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    """Residual block, modulated by the embedding, with self-attention between all pixels if it has heads.

    Parameters
    ----------
    width_in, width
        Channels.
    embedding
        Width of the embedding.
    heads
        Heads of attention; 0 for no attention.
    resample, taps
        See :class:`Convolution`.
    scale_shift
        The embedding scales and shifts the normalised features, rather than being added before.
    project_skip
        The skip connection has a convolution wherever the resolution changes, not only where the width does.
    skip_scale
        Factor after each addition.
    eps
        Of the normalisations.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        heads: int,
        *,
        resample: str = "",
        taps: tuple[float, ...] = (1.0, 1.0),
        scale_shift: bool,
        project_skip: bool,
        skip_scale: float,
        eps: float,
    ) -> None:
        super().__init__()
        if heads and width % heads:
            raise PriorError(f"{heads} heads of attention do not divide {width} channels")
        self.heads = heads
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        self.norm0 = GroupNorm(width_in, eps)
        self.conv0 = Convolution(width_in, width, 3, resample, taps)
        self.affine = nn.Linear(embedding, (1 + scale_shift) * width)
        self.norm1 = GroupNorm(width, eps)
        self.conv1 = Convolution(width, width, 3)
        self.skip: Convolution | None = None
        if width_in != width or resample:
            kernel = 1 if project_skip or width_in != width else 0
            self.skip = Convolution(width_in, width, kernel, resample, taps)
        if heads:
            self.norm2 = GroupNorm(width, eps)
            self.qkv = Convolution(width, 3 * width, 1)
            self.proj = Convolution(width, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply to ``(B, width_in, H, W)`` and ``(B, embedding)``."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(embedding).to(h.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(F.silu(h))
        h = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (h + self._attend(h)) * self.skip_scale if self.heads else h

    def _attend(self, x: Tensor) -> Tensor:
        batch, width = x.shape[:2]
        # Of a head's features, query, key and value lie beside each other.
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, width // self.heads, 3, -1)
        # Laid out one position after the other: then all weights need not be in memory at once.
        q, k, v = (part.transpose(-1, -2).contiguous() for part in qkv.unbind(3))
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return self.proj(h.reshape(x.shape))


def positional_features(label: Tensor, width: int, endpoint: bool) -> Tensor:
    """Cosines, then sines, of ``label`` at frequencies from 1 to 1/10000, ``(B, width)``, float32.

    With ``endpoint`` the last frequency is 1/10000, else the one that would follow it.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=label.device) / max(half - endpoint, 1)
    angles = label[:, None].float() * (1 / 10000) ** exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def check_levels(settings: Any) -> None:
    """Check what the settings of both U-Nets of EDM have in common.

    Raises
    ------
    PriorError
        If there is no such network.
    """
    widths, attention = settings.widths, settings.attention_levels
    if not isinstance(widths, tuple) or not isinstance(attention, tuple):
        raise PriorError("widths and attention_levels must be lists of whole numbers")
    names = ("img_resolution", "in_channels", "out_channels", "model_channels", "num_blocks")
    counts = [*widths, settings.embedding_channels, *(getattr(settings, name) for name in names)]
    rest = [*attention, settings.label_dim, settings.augment_dim]
    if not all(type(value) is int for value in counts + rest):
        raise PriorError(f"settings of a wrong type: {settings}")
    if not widths or min(counts) < 1 or min(rest) < 0:
        raise PriorError(f"impossible network settings {settings}")
    if not set(attention) <= set(range(len(widths))):
        raise PriorError(f"attention at levels {attention} of {len(widths)}")
    if settings.img_resolution >> (len(widths) - 1) < 1:
        raise PriorError(f"{settings.img_resolution} pixels cannot be halved {len(widths) - 1} times")
