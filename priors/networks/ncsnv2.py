"""NCSNv2, the score network of Song & Ermon (NeurIPS 2020), in its three depths.

A RefineNet (Lin et al., CVPR 2017) whose normalisation keeps what instance normalisation removes, the means
of the channels. The deepest one is the network of Jalal et al. (NeurIPS 2021, csgm-mri-langevin).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import JSONSettings
from priors.errors import PriorError
from priors.networks.ncsnpp import ACTIVATIONS

_Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Stage:
    """One resolution: two residual blocks on the way down, a RefineNet block on the way up."""

    name: str
    """What follows ``res`` in the names of its blocks."""
    width: int
    """Feature channels, in multiples of ngf."""
    dilation: int | None = None
    """Dilation of the convolutions; None halves the image instead, but in the first stage."""


_DEPTHS: dict[str, tuple[_Stage, ...]] = {
    "NCSNv2": (_Stage("1", 1), _Stage("2", 2), _Stage("3", 2, 2), _Stage("4", 2, 4)),
    "NCSNv2Deeper": (_Stage("1", 1), _Stage("2", 2), _Stage("3", 2), _Stage("4", 4, 2), _Stage("5", 4, 4)),
    "NCSNv2Deepest": (
        _Stage("1", 1),
        _Stage("2", 2),
        _Stage("3", 2),
        _Stage("31", 2),
        _Stage("4", 4, 2),
        _Stage("5", 4, 4),
    ),
}

# Names of the RefineNet blocks, coarsest first. That of the stage "31" is used before that of "3".
_REFINE = {
    "NCSNv2": ("1", "2", "3", "4"),
    "NCSNv2Deeper": ("1", "2", "3", "4", "5"),
    "NCSNv2Deepest": ("1", "2", "31", "3", "4", "5"),
}

# The order in which the blocks are registered, where it is not that of use.
_REGISTERED = {"NCSNv2Deepest": ("1", "2", "3", "31", "4", "5")}


@dataclass(frozen=True)
class NCSNv2Settings(JSONSettings):
    """Shape of the network.

    Parameters
    ----------
    channels
        Image channels.
    ngf
        Feature channels at the finest resolution.
    depth
        ``"NCSNv2"``, ``"NCSNv2Deeper"`` or ``"NCSNv2Deepest"``, the original's classes.
    nonlinearity
        ``"elu"``, ``"relu"``, ``"lrelu"`` or ``"swish"``.
    centered
        The images are taken as they come; otherwise the network applies ``2x - 1`` itself. The original says
        it by ``logit_transform`` or ``rescaled``.
    num_classes
        Number of noise levels.

    Raises
    ------
    PriorError
        If there is no such network.
    """

    channels: int
    ngf: int
    depth: str = "NCSNv2Deepest"
    nonlinearity: str = "elu"
    centered: bool = False
    num_classes: int = 2311

    def __post_init__(self) -> None:
        for name, largest in (("channels", 2**12), ("ngf", 2**14), ("num_classes", 2**24)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise PriorError(f"{name} of an NCSNv2 is a whole number from 1 to {largest}, not {value!r}")
        # A single channel has no spread of means, by which InstanceNorm++ divides.
        if self.ngf < 2:
            raise PriorError(f"ngf of an NCSNv2 is at least 2, not {self.ngf}")
        for name, choices in (("depth", tuple(_DEPTHS)), ("nonlinearity", tuple(ACTIVATIONS))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise PriorError(f"{name} of an NCSNv2 is {' or '.join(map(repr, choices))}, not {value!r}")
        if not isinstance(self.centered, bool):
            raise PriorError(f"centered of an NCSNv2 is true or false, not {self.centered!r}")

    @property
    def smallest(self) -> int:
        """Least height and width of images: the coarsest features need two pixels for their statistics."""
        return int(2 * 2 ** sum(stage.dilation is None for stage in _DEPTHS[self.depth][1:]))


class InstanceNormPlus(nn.Module):
    """Instance normalisation that adds back the means of the channels, standardised among themselves.

    ``gamma_k ((x_k - mu_k) / s_k + alpha_k (mu_k - m) / v) + beta_k`` for features ``(B, C, H, W)``, with
    ``mu_k`` and ``s_k`` mean and standard deviation of a channel, ``m`` and ``v`` those of the ``mu_k`` (Song
    & Ermon, NeurIPS 2019, App. A). ``s_k`` divides by the number of pixels, ``v`` by the number of channels
    less one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, C, H, W)``."""
        mean = x.mean(dim=(2, 3), dtype=torch.float32)
        spread = torch.sqrt(mean.var(dim=1, keepdim=True) + 1e-5)
        lift = self.alpha * (mean - mean.mean(dim=1, keepdim=True)) / spread
        # Means and scales of each image and channel, so that one pass over the pixels is left.
        h = F.instance_norm(x)
        shift = torch.addcmul(self.beta, self.gamma, lift)[:, :, None, None]
        return torch.addcmul(shift.to(h.dtype), h, self.gamma.to(h.dtype)[:, None, None])


class MeanPoolConv(nn.Module):
    """A convolution followed by the mean over 2x2 pixels; the last row or column of odd sizes is dropped."""

    def __init__(self, inner: int, outer: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, inner, H, W)``."""
        return F.avg_pool2d(self.conv(x), 2)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut.

    With ``down``, the block halves the image; with a dilation its convolutions reach wider instead, the
    shortcut's too.
    """

    def __init__(self, inner: int, outer: int, act: _Activation, down: bool, dilation: int | None) -> None:
        super().__init__()
        reach = dilation or 1
        middle = inner if down else outer
        self.conv1 = nn.Conv2d(inner, middle, 3, padding=reach, dilation=reach)
        self.normalize2 = InstanceNormPlus(middle)
        pools = down and dilation is None
        self.conv2 = self._conv(middle, outer, 3, pools, reach)
        self.has_shortcut = down or inner != outer
        if self.has_shortcut:
            self.shortcut = self._conv(inner, outer, 3 if dilation else 1, pools, reach)
        self.normalize1 = InstanceNormPlus(inner)
        self.act = act

    @staticmethod
    def _conv(inner: int, outer: int, size: int, pools: bool, dilation: int) -> nn.Module:
        if pools:
            return MeanPoolConv(inner, outer, size)
        return nn.Conv2d(inner, outer, size, padding=dilation * (size // 2), dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, inner, H, W)``."""
        h = self.conv1(self.act(self.normalize1(x)))
        h = self.conv2(self.act(self.normalize2(h)))
        return h + (self.shortcut(x) if self.has_shortcut else x)


class ResidualConvUnits(nn.Module):
    """RefineNet's units of an activation and a 3x3 convolution, two in a row beside an identity, repeated."""

    def __init__(self, channels: int, count: int, act: _Activation) -> None:
        super().__init__()
        for unit in range(count):
            for stage in range(2):
                conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                self.add_module(f"{unit + 1}_{stage + 1}_conv", conv)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, channels, H, W)``."""
        convs = list(self.children())
        for first, second in zip(convs[::2], convs[1::2], strict=True):
            x = x + second(self.act(first(self.act(x))))
        return x


class ChainedPooling(nn.Module):
    """RefineNet's chained residual pooling: wide maxima, each convolved, added up."""

    def __init__(self, channels: int, act: _Activation) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, channels, H, W)``."""
        total = path = self.act(x)
        for conv in self.convs:
            path = conv(F.max_pool2d(path, 5, stride=1, padding=2))
            total = total + path
        return total


class Fusion(nn.Module):
    """RefineNet's fusion of resolutions: each convolved, brought to one size by interpolation, added up."""

    def __init__(self, inner: Sequence[int], outer: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, outer, 3, padding=1) for width in inner)

    def forward(self, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Apply to images ``(B, inner[k], H_k, W_k)``; returns ``(B, outer, *size)``."""
        total: Tensor | None = None
        for conv, x in zip(self.convs, inputs, strict=True):
            h = conv(x)
            if h.shape[-2:] != size:
                h = F.interpolate(h, size=size, mode="bilinear", align_corners=True)
            total = h if total is None else total + h
        assert total is not None  # there are always two
        return total


class RefineBlock(nn.Module):
    """One block of RefineNet, of one input (the coarsest) or of two."""

    def __init__(self, inner: Sequence[int], outer: int, act: _Activation, last: bool) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualConvUnits(width, 2, act) for width in inner)
        self.output_convs = ResidualConvUnits(outer, 3 if last else 1, act)
        self.fuses = len(inner) > 1
        if self.fuses:
            self.msf = Fusion(inner, outer)
        self.crp = ChainedPooling(outer, act)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Apply to images ``(B, inner[k], H_k, W_k)``; returns the size of the first."""
        adapted = [convs(x) for convs, x in zip(self.adapt_convs, inputs, strict=True)]
        height, width = inputs[0].shape[-2:]
        h = self.msf(adapted, (height, width)) if self.fuses else adapted[0]
        return self.output_convs(self.crp(h))


class NCSNv2(nn.Module):
    """The network ``s(x, index)``: the score at a level of ``sigmas``, the largest first.

    Takes ``(B, channels, H, W)``, H and W at least ``settings.smallest``, and indices ``(B,)``, returns the
    shape of the image. The level enters by a division alone, ``s(x, k) = raw(x) / sigmas[k]`` (Song & Ermon
    2020, Technique 3).

    Parameters
    ----------
    settings
        Shape of the network.
    """

    sigmas: Tensor

    def __init__(self, settings: NCSNv2Settings) -> None:
        super().__init__()
        self.settings = settings
        self.act = act = ACTIVATIONS[settings.nonlinearity]
        ngf, stages = settings.ngf, _DEPTHS[settings.depth]
        self.register_buffer("sigmas", torch.ones(settings.num_classes))
        self.begin_conv = nn.Conv2d(settings.channels, ngf, 3, padding=1)
        self.normalizer = InstanceNormPlus(ngf)
        self.end_conv = nn.Conv2d(ngf, settings.channels, 3, padding=1)
        width = ngf
        for number, stage in enumerate(stages):
            outer = stage.width * ngf
            blocks = (
                ResidualBlock(width, outer, act, number > 0, stage.dilation),
                ResidualBlock(outer, outer, act, False, stage.dilation),
            )
            self.add_module(f"res{stage.name}", nn.ModuleList(blocks))
            width = outer
        refine = self._refine_blocks(stages)
        self._refine_names = [f"refine{name}" for name in _REFINE[settings.depth]]
        for name in _REGISTERED.get(settings.depth, _REFINE[settings.depth]):
            self.add_module(f"refine{name}", refine[f"refine{name}"])

    def _refine_blocks(self, stages: tuple[_Stage, ...]) -> dict[str, RefineBlock]:
        """Blocks of the way up, in the order of use; each ends in the width of the next finer stage."""
        blocks, ngf = {}, self.settings.ngf
        width: int | None = None
        for number, name in enumerate(_REFINE[self.settings.depth]):
            here = len(stages) - 1 - number
            own = stages[here].width * ngf
            inner = [own] if width is None else [own, width]
            width = own if width is None else stages[max(here - 1, 0)].width * ngf
            blocks[f"refine{name}"] = RefineBlock(inner, width, self.act, here == 0)
        return blocks

    def raw(self, x: Tensor) -> Tensor:
        """Sigma times the score, ``(B, channels, H, W)`` from the same: minus the noise, at variance 1."""
        # The first layer stays in float32 under autocast: rounding a nearly clean image to bfloat16 adds an
        # error comparable to the noise that is to be removed.
        with torch.autocast(x.device.type, enabled=False):
            h = self.begin_conv(x if self.settings.centered else 2 * x - 1)
        features = []
        for stage in _DEPTHS[self.settings.depth]:
            for block in getattr(self, f"res{stage.name}"):
                h = block(h)
            features.append(h)
        h = getattr(self, self._refine_names[0])([features.pop()])
        for name in self._refine_names[1:]:
            h = getattr(self, name)([features.pop(), h])
        return self.end_conv(self.act(self.normalizer(h)))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Apply the network to ``(B, channels, H, W)`` and ``(B,)``; see the class."""
        return self.raw(x) / self.sigmas[index][:, None, None, None]
