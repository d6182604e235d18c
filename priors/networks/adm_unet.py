"""U-Net of "Diffusion models beat GANs on image synthesis" (ADM), which DDS, DPS and DiffPIR use too.

Dhariwal & Nichol, NeurIPS 2021 (arXiv:2105.05233), Sec. 3 and App. B; the residual blocks and the modulation
of their normalisation are those of Nichol & Dhariwal, ICML 2021. Names and order of the entries of the state
dict are those of guided-diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import JSONSettings
from priors.errors import PriorError

_GROUPS = 32


@dataclass(frozen=True)
class ADMSettings(JSONSettings):
    """Shape of the network.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the image and of the output; twice as many in the output where the variance is learned.
    model_channels
        Width of the embedding's sines and cosines; the embedding has four times that.
    widths
        Feature channels at each resolution, finest first; multiples of 32.
    num_res_blocks
        Residual blocks a resolution on the way down; one more on the way up.
    attention_levels
        Resolutions with attention, 0 the finest. The middle always has it.
    num_heads, num_heads_upsample
        Heads of attention on the way down and in the middle, and on the way up.
    num_head_channels
        Channels of a head, which then replaces the numbers of heads; 0 if it does not.
    use_scale_shift_norm
        The embedding scales and shifts the normalised features, rather than being added.
    resblock_updown
        Residual blocks change the resolution, rather than layers of their own.
    conv_resample
        Those layers have a convolution.
    use_new_attention_order
        Queries, keys and values lie one after the other, and the heads inside each; before, the reverse.
    num_classes
        Classes the network is told of; 0 for none.

    Raises
    ------
    PriorError
        If there is no such network.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...] = ()
    num_heads: int = 1
    num_heads_upsample: int = 1
    num_head_channels: int = 0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    use_new_attention_order: bool = False
    num_classes: int = 0

    def __post_init__(self) -> None:
        lists = (self.widths, self.attention_levels)
        counts = (self.in_channels, self.out_channels, self.model_channels, self.num_res_blocks)
        heads = (self.num_heads, self.num_heads_upsample)
        rest = (self.num_head_channels, self.num_classes)
        flags = (self.use_scale_shift_norm, self.resblock_updown, self.conv_resample)
        if (
            not all(isinstance(value, tuple) for value in lists)
            or not all(type(n) is int for n in (*self.widths, *self.attention_levels, *counts, *heads, *rest))
            or not all(type(value) is bool for value in (*flags, self.use_new_attention_order))
        ):
            raise PriorError(f"settings of a wrong type: {self}")
        if not self.widths or min(*self.widths, *counts, *heads) < 1 or min(rest) < 0:
            raise PriorError(f"impossible network settings {self}")
        for width in self.widths:
            if width % _GROUPS:
                raise PriorError(f"widths must be multiples of {_GROUPS}, got {width}")
        if not set(self.attention_levels) <= set(range(len(self.widths))):
            raise PriorError(f"attention at levels {self.attention_levels} of {len(self.widths)}")
        divisors = [(self.widths[n], "num_heads") for n in (-1, *self.attention_levels)]
        divisors += [(self.widths[n], "num_heads_upsample") for n in self.attention_levels]
        for width, name in divisors:
            name = "num_head_channels" if self.num_head_channels else name
            if width % getattr(self, name):
                raise PriorError(
                    f"{name} {getattr(self, name)} does not divide {width} channels of attention"
                )

    def heads(self, width: int, up: bool) -> int:
        """Heads of attention over ``width`` channels."""
        if self.num_head_channels:
            return width // self.num_head_channels
        return self.num_heads_upsample if up else self.num_heads

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class ADMUNet(nn.Module):
    """The network, ``(B, in_channels, H, W)`` and ``(B,)`` time steps to ``(B, out_channels, H, W)``.

    H and W must be multiples of ``settings.size_multiple``.
    """

    def __init__(self, settings: ADMSettings) -> None:
        super().__init__()
        self.settings = settings
        embedding = 4 * settings.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(settings.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if settings.num_classes:
            self.label_emb = nn.Embedding(settings.num_classes, embedding)

        def block(width_in: int, width: int, resample: str = "") -> _ResidualBlock:
            return _ResidualBlock(width_in, width, embedding, settings.use_scale_shift_norm, resample)

        def attention(width: int, up: bool = False) -> _Attention:
            return _Attention(width, settings.heads(width, up), settings.use_new_attention_order)

        widths, last = settings.widths, len(settings.widths) - 1
        width = widths[0]
        skips = [width]
        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(settings.in_channels, width, 3, padding=1))])
        for level, target in enumerate(widths):
            for _ in range(settings.num_res_blocks):
                layers: list[nn.Module] = [block(width, target)]
                width = target
                if level in settings.attention_levels:
                    layers.append(attention(width))
                self.input_blocks.append(_Stage(*layers))
                skips.append(width)
            if level < last:
                shrink = block(width, width, "down") if settings.resblock_updown else self._shrink(width)
                self.input_blocks.append(_Stage(shrink))
                skips.append(width)
        self.middle_block = _Stage(block(width, width), attention(width), block(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(settings.num_res_blocks + 1):
                layers = [block(width + skips.pop(), widths[level])]
                width = widths[level]
                if level in settings.attention_levels:
                    layers.append(attention(width, up=True))
                if level and index == settings.num_res_blocks:
                    layers.append(
                        block(width, width, "up") if settings.resblock_updown else self._grow(width)
                    )
                self.output_blocks.append(_Stage(*layers))
        self.out = nn.Sequential(
            _GroupNorm(width), nn.SiLU(), nn.Conv2d(width, settings.out_channels, 3, padding=1)
        )

    def _shrink(self, width: int) -> nn.Module:
        return _Shrink(width) if self.settings.conv_resample else nn.AvgPool2d(2)

    def _grow(self, width: int) -> nn.Module:
        return _Grow(width) if self.settings.conv_resample else nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        x
            ``(B, in_channels, H, W)``.
        time
            ``(B,)``, index of the noise level, any number type.
        label
            ``(B,)``, int64, the class, where the network is told of one.
        """
        embedding = self.time_embed(time_features(time, self.settings.model_channels))
        if label is not None:
            embedding = embedding + self.label_emb(label)
        # The first convolution stays in float32 under autocast: rounding a nearly clean image to bfloat16
        # adds an error comparable to the noise that is to be removed.
        with torch.autocast(x.device.type, enabled=False):
            h = self.input_blocks[0](x, embedding)
        skips = [h]
        for stage in self.input_blocks[1:]:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


def time_features(time: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of ``time`` times ``10000^(-i / half)``, ``(B, width)``, float32.

    The last one is zero if the width is odd.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class _GroupNorm(nn.GroupNorm):
    """Group normalisation in float32, whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__(_GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class _Stage(nn.Sequential):
    """Layers one after the other; those that want the embedding get it."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, _ResidualBlock) else layer(x)
        return x


class _ResidualBlock(nn.Module):
    """Two convolutions, modulated by the embedding; ``resample`` halves or doubles the grid before them."""

    def __init__(self, width_in: int, width: int, embedding: int, scale_shift: bool, resample: str) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            _GroupNorm(width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift) * width))
        self.out_layers = nn.Sequential(
            _GroupNorm(width), nn.SiLU(), nn.Identity(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self._resample(act(norm(x))))
        modulation = self.emb_layers(embedding).to(h.dtype)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + modulation)
        return self.skip_connection(self._resample(x)) + conv(act(h))

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class _Shrink(nn.Module):
    """Strided convolution onto a grid half as fine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class _Grow(nn.Module):
    """Pixels repeated, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Attention(nn.Module):
    """Self-attention between all pixels, added to its input."""

    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = _GroupNorm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape[:2]
        flat = x.reshape(batch, width, -1)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            parts = qkv.reshape(batch, 3, self.heads, width // self.heads, -1).unbind(1)
        else:
            parts = qkv.reshape(batch, self.heads, 3, width // self.heads, -1).unbind(2)
        # Laid out one position after the other: then all weights need not be in memory at once.
        q, k, v = (part.transpose(-1, -2).contiguous() for part in parts)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(flat.shape)
        return x + self.proj_out(h).reshape(x.shape)
