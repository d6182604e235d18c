"""NCSN++, the score network of Song et al. (ICLR 2021, App. H), as in score_sde_pytorch and Score-MRI.

Every layer stands in one flat list, ``all_modules``, in the order in which it is used; the number of a layer
is part of its weights' names, so the list is built exactly as there. A layer that has no weights still takes
its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import JSONSettings, check_fields
from priors.errors import PriorError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "swish": F.silu,
}
"""Nonlinearities under the names they have in Song's configurations."""

_CHOICES = {
    "embedding_type": ("fourier", "positional"),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "nonlinearity": tuple(ACTIVATIONS),
}
_FLAGS = ("conditional", "resamp_with_conv", "fir", "skip_rescale", "centered", "scale_by_sigma")
_LARGEST = {"channels": 2**12, "nf": 2**14, "num_res_blocks": 2**8, "num_scales": 2**24}


@dataclass(frozen=True)
class NCSNppSettings(JSONSettings):
    """Shape of the network; the names are those of the original configurations unless noted.

    Parameters
    ----------
    channels
        Image channels (``data.num_channels``).
    nf
        Feature channels at the finest resolution.
    ch_mult
        Feature channels at each resolution as multiples of ``nf``, finest first.
    num_res_blocks
        Residual blocks a resolution on the way down; one more on the way up.
    attention_levels
        Resolutions, counted from 0, the finest, that have self-attention after their blocks. The original
        names the widths of images there (``attn_resolutions``, of ``image_size``).
    embedding_type
        ``"fourier"``: random frequencies of ln sigma; the network is told sigma. ``"positional"``: sines and
        cosines of what it is told, a time or the index of a level.
    conditional
        Whether the blocks are told the noise level.
    resblock_type
        ``"biggan"``: blocks that resample themselves; ``"ddpm"``: separate layers do.
    resamp_with_conv
        Whether those layers have a convolution; without meaning for ``"biggan"``.
    fir
        Resample through ``fir_kernel`` (StyleGAN-2), or by mean and nearest neighbour.
    fir_kernel
        Taps of the separable filter; normalised to sum 1.
    skip_rescale
        Divide every sum of two branches by sqrt(2).
    nonlinearity
        ``"swish"``, ``"elu"``, ``"relu"`` or ``"lrelu"``.
    progressive
        What is made of every resolution's output: ``"none"``, ``"output_skip"`` (a sum of images) or
        ``"residual"``.
    progressive_input
        Where the image enters: ``"none"`` (at the top only), ``"input_skip"`` or ``"residual"``.
    progressive_combine
        How ``"input_skip"`` joins the image to the features: ``"sum"`` or ``"cat"``.
    centered
        The images are in [-1, 1] as they come; otherwise the network applies ``2x - 1`` itself.
    scale_by_sigma
        Divide the output by sigma.
    num_scales
        Length of the table of noise levels.

    Raises
    ------
    PriorError
        If there is no such network.
    """

    channels: int
    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...] = ()
    embedding_type: str = "fourier"
    conditional: bool = True
    resblock_type: str = "biggan"
    resamp_with_conv: bool = True
    fir: bool = True
    fir_kernel: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    skip_rescale: bool = True
    nonlinearity: str = "swish"
    progressive: str = "none"
    progressive_input: str = "residual"
    progressive_combine: str = "sum"
    centered: bool = False
    scale_by_sigma: bool = True
    num_scales: int = 1000

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            _check_count(name, getattr(self, name), largest)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise PriorError(f"{name} of an NCSN++ is {' or '.join(map(repr, choices))}, not {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise PriorError(f"{name} of an NCSN++ is true or false, not {getattr(self, name)!r}")
        if not isinstance(self.ch_mult, tuple) or not 1 <= len(self.ch_mult) <= 16:
            raise PriorError(f"ch_mult of an NCSN++ is 1 to 16 numbers, not {self.ch_mult!r}")
        for multiple in self.ch_mult:
            _check_count("ch_mult", multiple, 2**10)
        levels = self.attention_levels
        known = range(len(self.ch_mult))
        if not isinstance(levels, tuple) or not all(isinstance(n, int) and n in known for n in levels):
            raise PriorError(f"attention_levels of an NCSN++ are resolutions of {known}, not {levels!r}")
        taps = self.fir_kernel
        numbers = isinstance(taps, tuple) and all(
            isinstance(t, int | float) and math.isfinite(t) for t in taps
        )
        if not numbers or not 2 <= len(taps) <= 16 or not sum(taps) > 0:
            raise PriorError(f"fir_kernel of an NCSN++ is 2 to 16 numbers of a positive sum, not {taps!r}")
        if self.embedding_type == "positional" and self.nf < 4:
            raise PriorError(f"nf of an NCSN++ is at least 4, got {self.nf}")

    @property
    def size_multiple(self) -> int:
        """Heights and widths of images must be multiples of this."""
        return int(2 ** (len(self.ch_mult) - 1))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NCSNppSettings:
        """See :meth:`JSONSettings.from_dict`."""
        check_fields(cls, values, "network")
        for name in ("ch_mult", "attention_levels", "fir_kernel"):
            if not isinstance(values[name], list | tuple):
                raise PriorError(f"{name} of an NCSN++ is a list, not {values[name]!r}")
        return super().from_dict(values)


def _check_count(name: str, value: Any, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise PriorError(f"{name} of an NCSN++ is a whole number from 1 to {largest}, not {value!r}")


@lru_cache(maxsize=64)
def _fir_filter(taps: tuple[float, ...], gain: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The filter in two dimensions ``(1, 1, K, K)``, of sum ``gain``."""
    with torch.inference_mode(False):  # it is kept for later calls, which may need gradients
        row = torch.tensor(taps, dtype=torch.float64)
        plane = torch.outer(row, row)
        return (plane * (gain / plane.sum()))[None, None].to(device, dtype)


def _filter_of(x: Tensor, taps: tuple[float, ...], gain: float = 1.0) -> Tensor:
    # Autocast would leave a sum of bfloat16 images with a float32 filter to the convolution; it is cheap to
    # give the filter the precision of the image at once.
    return _fir_filter(taps, gain, x.device, x.dtype)


def _depthwise(x: Tensor, kernel: Tensor, stride: int, before: int, after: int) -> Tensor:
    """Convolve each channel with one kernel, zeros outside; negative padding crops."""
    x = F.pad(x, (before, after, before, after)) if (before, after) != (0, 0) else x
    weight = kernel.flip(2, 3).expand(x.shape[1], 1, -1, -1)  # conv2d correlates
    return F.conv2d(x, weight, stride=stride, groups=x.shape[1])


def fir_downsample(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Filter images ``(B, C, H, W)`` and keep every second pixel.

    Parameters
    ----------
    x
        ``(B, C, H, W)``, floating point.
    taps
        The separable filter, of K taps, K at least 2; its sum is normalised to 1.

    Returns
    -------
    Tensor
        ``(B, C, H // 2, W // 2)`` for even sizes.

    Notes
    -----
    With ``z`` the image between zeros, ``out[n] = sum_t h[t] z[2n + (K-1) - (K-1)//2 - t]`` along each axis
    (the resampling of StyleGAN-2, Karras et al., CVPR 2020).
    """
    rest = len(taps) - 2
    return _depthwise(x, _filter_of(x, taps), 2, (rest + 1) // 2, rest // 2)


def fir_upsample(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Put zeros between the pixels of ``(B, C, H, W)`` and filter, which doubles the size.

    Parameters
    ----------
    x
        ``(B, C, H, W)``, floating point.
    taps
        The separable filter, of K taps, K at least 2; its sum is normalised to 2 along each axis.

    Returns
    -------
    Tensor
        ``(B, C, 2H, 2W)``.
    """
    start = len(taps) - 2 - (len(taps) - 1) // 2
    height, width = x.shape[-2:]
    weight = _filter_of(x, taps, 4.0).expand(x.shape[1], 1, -1, -1)
    full = F.conv_transpose2d(x, weight, stride=2, padding=start, groups=x.shape[1])
    return full[..., : 2 * height, : 2 * width]


class FIRConv(nn.Module):
    """A 3x3 convolution that doubles or halves the image through a filter.

    Takes ``(B, in, H, W)``, returns ``(B, out, 2H, 2W)`` or ``(B, out, H/2, W/2)``.
    """

    def __init__(self, inner: int, outer: int, taps: tuple[float, ...], *, up: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outer))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.taps, self.up = taps, up

    def forward(self, x: Tensor) -> Tensor:
        """Resample and convolve; see the class."""
        rest = len(self.taps)
        if self.up:
            # Zeros between the pixels and a correlation with the weights, in one transposed convolution.
            weight = self.weight.flip(2, 3).transpose(0, 1)
            x = F.conv_transpose2d(x, weight, stride=2)
            rest -= 4
            x = _depthwise(x, _filter_of(x, self.taps, 4.0), 1, (rest + 1) // 2 + 1, rest // 2 + 1)
            return x + self.bias.to(x.dtype)[:, None, None]
        x = _depthwise(x, _filter_of(x, self.taps), 1, (rest + 1) // 2, rest // 2)
        return F.conv2d(x, self.weight, self.bias, stride=2)


class Resample(nn.Module):
    """Doubles or halves images, with a 3x3 convolution or without, through the filter or plainly."""

    def __init__(self, inner: int, outer: int, settings: NCSNppSettings, *, up: bool, conv: bool) -> None:
        super().__init__()
        self.up, self.conv, self.taps = up, conv, settings.fir_kernel if settings.fir else None
        if conv and self.taps is not None:
            self.Conv2d_0 = FIRConv(inner, outer, self.taps, up=up)
        elif conv:
            self.Conv_0 = nn.Conv2d(inner, outer, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, inner, H, W)``."""
        if self.taps is not None:
            return self.Conv2d_0(x) if self.conv else _resample(x, self.taps, up=self.up)
        if not self.conv:
            return _resample(x, None, up=self.up)
        if self.up:
            return self.Conv_0(_resample(x, None, up=True))
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


def _resample(x: Tensor, taps: tuple[float, ...] | None, *, up: bool) -> Tensor:
    if taps is not None:
        return fir_upsample(x, taps) if up else fir_downsample(x, taps)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)


class FourierFeatures(nn.Module):
    """Sines and cosines ``(B, 2N)`` of ``2 pi W u`` for numbers ``u`` ``(B,)``; W is random, not trained."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(count), requires_grad=False)

    def forward(self, u: Tensor) -> Tensor:
        """Apply to ``(B,)``."""
        # The order of the products is the original's: the angles are large, and float32 rounding shows.
        angles = u[:, None] * self.W[None, :] * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def positional_features(u: Tensor, width: int) -> Tensor:
    """Sines and cosines ``(B, width)`` of numbers ``u`` ``(B,)`` (Vaswani et al. 2017; Ho et al. 2020)."""
    half = width // 2
    rates = torch.arange(half, dtype=torch.float32, device=u.device) * -(math.log(10000) / (half - 1))
    angles = u.float()[:, None] * rates.exp()[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(channels // 4, 32)
    if groups < 1 or channels % groups:
        raise PriorError(f"an NCSN++ cannot have {channels} feature channels: its {groups} groups do not fit")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PixelLinear(nn.Module):
    """A linear map of the channels of each pixel, ``(B, in, H, W)`` to ``(B, out, H, W)``."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(inner, outer) / math.sqrt(inner))
        self.b = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, in, H, W)``."""
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


class SelfAttention(nn.Module):
    """One head of self-attention over the pixels of ``(B, C, H, W)``, added to its input."""

    def __init__(self, channels: int, skip_rescale: bool) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0 = PixelLinear(channels, channels)
        self.NIN_1 = PixelLinear(channels, channels)
        self.NIN_2 = PixelLinear(channels, channels)
        self.NIN_3 = PixelLinear(channels, channels)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, C, H, W)``."""
        h = self.GroupNorm_0(x)
        parts = (self.NIN_0(h), self.NIN_1(h), self.NIN_2(h))
        # Laid out one position after the other: then all weights need not be in memory at once.
        query, key, value = (part.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        h = self.NIN_3(seen.transpose(1, 2).reshape(x.shape))
        return _join(x, h, self.skip_rescale)


def _join(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    return (x + h) / math.sqrt(2) if rescale else x + h


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, shifted by the noise embedding; may double or halve the image.

    ``resample`` is ``"up"``, ``"down"`` or None. A shortcut that changes the number of channels, and every
    one of a block that resamples, is a 1x1 convolution; the DDPM variant writes it as :class:`PixelLinear`.
    """

    def __init__(self, inner: int, outer: int, settings: NCSNppSettings, resample: str | None = None) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(inner)
        self.Conv_0 = nn.Conv2d(inner, outer, 3, padding=1)
        self.Dense_0 = nn.Linear(4 * settings.nf, outer)
        self.GroupNorm_1 = _norm(outer)
        self.Conv_1 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut: str | None = None
        if settings.resblock_type == "biggan":
            if inner != outer or resample:
                self.Conv_2 = nn.Conv2d(inner, outer, 1)
                self.shortcut = "Conv_2"
        elif inner != outer:
            self.NIN_0 = PixelLinear(inner, outer)
            self.shortcut = "NIN_0"
        self.act = ACTIVATIONS[settings.nonlinearity]
        self.resample = resample
        self.taps = settings.fir_kernel if settings.fir else None
        self.skip_rescale = settings.skip_rescale

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Apply to ``(B, inner, H, W)`` and the embedding ``(B, 4 nf)``, None if there is none."""
        h = self.act(self.GroupNorm_0(x))
        if self.resample is not None:
            h = _resample(h, self.taps, up=self.resample == "up")
            x = _resample(x, self.taps, up=self.resample == "up")
        h = self.Conv_0(h)
        if embedding is not None:
            h = h + self.Dense_0(self.act(embedding))[:, :, None, None]
        h = self.Conv_1(self.act(self.GroupNorm_1(h)))
        if self.shortcut is not None:
            x = getattr(self, self.shortcut)(x)
        return _join(x, h, self.skip_rescale)


class Combine(nn.Module):
    """Joins the image pyramid ``(B, inner, H, W)`` to features ``(B, outer, H, W)`` by a 1x1 convolution."""

    def __init__(self, inner: int, outer: int, method: str) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(inner, outer, 1)
        self.method = method

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        """Sum ``(B, outer, H, W)``, or both one after the other, ``(B, 2 outer, H, W)``."""
        image = self.Conv_0(image)
        return torch.cat([image, h], dim=1) if self.method == "cat" else image + h


@dataclass
class _Level:
    """Numbers, in ``all_modules``, of the layers of one resolution on one way."""

    blocks: list[int] = field(default_factory=list)
    attention: list[int] = field(default_factory=list)
    """After each block on the way down, after the last on the way up; empty for none."""
    pyramid: list[int] = field(default_factory=list)
    resample: int | None = None


class NCSNpp(nn.Module):
    """The network ``s(x, label)``; its output is the score, or as the noise process defines it.

    Takes ``(B, channels, H, W)``, H and W multiples of ``settings.size_multiple``, and labels ``(B,)``: sigma
    for Fourier features; for positional ones a time in floating point, or the index of a level in ``sigmas``.
    Returns the shape of the image.

    Attention is where it was built. The original decides at run time by the width of the features, which
    gives the same for images as wide as those of the training and fails for all others.

    Parameters
    ----------
    settings
        Shape of the network.

    Raises
    ------
    PriorError
        If the normalisation's groups do not fit the number of feature channels.
    """

    sigmas: Tensor

    def __init__(self, settings: NCSNppSettings) -> None:
        super().__init__()
        self.settings = settings
        self.act = ACTIVATIONS[settings.nonlinearity]
        self.register_buffer("sigmas", torch.ones(settings.num_scales, dtype=torch.float64))
        self.all_modules = nn.ModuleList()
        nf = settings.nf
        fourier = settings.embedding_type == "fourier"
        self._fourier = self._add(FourierFeatures(nf)) if fourier else None
        self._dense: list[int] = []
        if settings.conditional:
            self._dense.append(self._add(nn.Linear(2 * nf if fourier else nf, 4 * nf)))
            self._dense.append(self._add(nn.Linear(4 * nf, 4 * nf)))
        self._stem = self._add(nn.Conv2d(settings.channels, nf, 3, padding=1))
        widths = [nf]
        self._down = [self._build_down(level, widths) for level in range(len(settings.ch_mult))]
        deepest = widths[-1]
        self._middle = (
            self._add(ResidualBlock(deepest, deepest, settings)),
            self._add(SelfAttention(deepest, settings.skip_rescale)),
            self._add(ResidualBlock(deepest, deepest, settings)),
        )
        width = deepest
        self._up: list[_Level] = []
        for level in reversed(range(len(settings.ch_mult))):
            self._up.append(self._build_up(level, width, widths))
            width = nf * settings.ch_mult[level]
        self._head = [] if settings.progressive == "output_skip" else self._add_head(width, settings.channels)

    def _add(self, module: nn.Module) -> int:
        self.all_modules.append(module)
        return len(self.all_modules) - 1

    def _add_head(self, inner: int, outer: int) -> list[int]:
        return [self._add(_norm(inner)), self._add(nn.Conv2d(inner, outer, 3, padding=1))]

    def _build_down(self, level: int, widths: list[int]) -> _Level:
        """Add a resolution on the way down; ``widths``, of the features kept for the way up, grows."""
        settings, built = self.settings, _Level()
        width, outer = widths[-1], settings.nf * settings.ch_mult[level]
        for _ in range(settings.num_res_blocks):
            built.blocks.append(self._add(ResidualBlock(width, outer, settings)))
            width = outer
            if level in settings.attention_levels:
                built.attention.append(self._add(SelfAttention(width, settings.skip_rescale)))
            widths.append(width)
        if level == len(settings.ch_mult) - 1:
            return built
        if settings.resblock_type == "biggan":
            built.resample = self._add(ResidualBlock(width, width, settings, "down"))
        else:
            conv = settings.resamp_with_conv
            built.resample = self._add(Resample(width, width, settings, up=False, conv=conv))
        if settings.progressive_input == "input_skip":
            combine = Combine(settings.channels, width, settings.progressive_combine)
            built.pyramid.append(self._add(combine))
            width *= 2 if settings.progressive_combine == "cat" else 1
        elif settings.progressive_input == "residual":
            inner = settings.channels if level == 0 else settings.nf * settings.ch_mult[level - 1]
            built.pyramid.append(self._add(Resample(inner, width, settings, up=False, conv=True)))
        widths.append(width)
        return built

    def _build_up(self, level: int, width: int, widths: list[int]) -> _Level:
        """Add a resolution on the way up, for features of ``width`` channels; ``widths`` is used up."""
        settings, built, inner = self.settings, _Level(), width
        outer = settings.nf * settings.ch_mult[level]
        for _ in range(settings.num_res_blocks + 1):
            built.blocks.append(self._add(ResidualBlock(width + widths.pop(), outer, settings)))
            width = outer
        if level in settings.attention_levels:
            built.attention.append(self._add(SelfAttention(width, settings.skip_rescale)))
        deepest = level == len(settings.ch_mult) - 1
        if settings.progressive == "output_skip":
            built.pyramid = self._add_head(width, settings.channels)
        elif settings.progressive == "residual" and deepest:
            built.pyramid = self._add_head(width, width)
        elif settings.progressive == "residual":
            built.pyramid.append(self._add(Resample(inner, width, settings, up=True, conv=True)))
        if level == 0:
            return built
        if settings.resblock_type == "biggan":
            built.resample = self._add(ResidualBlock(width, width, settings, "up"))
        else:
            conv = settings.resamp_with_conv
            built.resample = self._add(Resample(width, width, settings, up=True, conv=conv))
        return built

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Apply the network to ``(B, channels, H, W)`` and ``(B,)``; see the class."""
        settings, layers = self.settings, self.all_modules
        # The embedding and the first layer stay in float32 under autocast: rounding a nearly clean image to
        # bfloat16 adds an error comparable to the noise that is to be removed.
        with torch.autocast(x.device.type, enabled=False):
            embedding = self._embed(label)
            image = x if settings.centered else 2 * x - 1
            h = layers[self._stem](image)
        kept, pyramid = [h], image
        for level in self._down:
            for number, block in enumerate(level.blocks):
                h = layers[block](h, embedding)
                if level.attention:
                    h = layers[level.attention[number]](h)
                kept.append(h)
            if level.resample is not None:
                h = self._resampled(level.resample, h, embedding)
                if settings.progressive_input == "input_skip":
                    taps = settings.fir_kernel if settings.fir else None
                    pyramid = _resample(pyramid, taps, up=False)
                    h = layers[level.pyramid[0]](pyramid, h)
                elif settings.progressive_input == "residual":
                    h = pyramid = _join(layers[level.pyramid[0]](pyramid), h, settings.skip_rescale)
                kept.append(h)
        before, attention, after = self._middle
        h = layers[after](layers[attention](layers[before](h, embedding)), embedding)
        h = self._ascend(h, kept, embedding)
        return h / self._level_of(label)[:, None, None, None] if settings.scale_by_sigma else h

    def _embed(self, label: Tensor) -> Tensor | None:
        if not self._dense:
            return None
        if self._fourier is None:
            features = positional_features(label, self.settings.nf)
        else:
            features = self.all_modules[self._fourier](label.log())
        first, second = self._dense
        return self.all_modules[second](self.act(self.all_modules[first](features)))

    def _level_of(self, label: Tensor) -> Tensor:
        """Noise level ``(B,)`` that a label stands for."""
        if self._fourier is not None:
            return label
        return self.sigmas[label.long()].to(torch.float32)

    def _resampled(self, number: int, h: Tensor, embedding: Tensor | None) -> Tensor:
        """Resample, by a block or by a layer."""
        layer = self.all_modules[number]
        return layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)

    def _ascend(self, h: Tensor, kept: list[Tensor], embedding: Tensor | None) -> Tensor:
        """The way up, from the coarsest features to the image."""
        settings, layers = self.settings, self.all_modules
        taps = settings.fir_kernel if settings.fir else None
        pyramid: Tensor | None = None
        for level in self._up:
            for block in level.blocks:
                h = layers[block](torch.cat([h, kept.pop()], dim=1), embedding)
            for block in level.attention:
                h = layers[block](h)
            if len(level.pyramid) == 2:
                norm, conv = level.pyramid
                image = layers[conv](self.act(layers[norm](h)))
                pyramid = image if pyramid is None else _resample(pyramid, taps, up=True) + image
            elif level.pyramid:
                h = pyramid = _join(layers[level.pyramid[0]](pyramid), h, settings.skip_rescale)
            if level.resample is not None:
                h = self._resampled(level.resample, h, embedding)
        if not self._head:
            assert pyramid is not None  # every resolution has added to it
            return pyramid
        norm, conv = self._head
        return layers[conv](self.act(layers[norm](h)))
