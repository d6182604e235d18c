"""U-Net of EDM in the architectures DDPM++ and NCSN++ of Song et al. (ICLR 2021).

Karras et al., NeurIPS 2022 (arXiv:2206.00364), App. F.2 and Table 7; Song et al., arXiv:2011.13456, App. H.
Names and order of the entries of the state dict are those of NVlabs/edm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import JSONSettings
from priors.errors import PriorError
from priors.networks.edm_layers import Block, Convolution, GroupNorm, check_levels, positional_features


@dataclass(frozen=True)
class SongSettings(JSONSettings):
    """Shape of the network.

    Parameters
    ----------
    img_resolution
        Side of the training images. It names the entries of the state dict and limits nothing.
    in_channels, out_channels
        Channels of the image and of the output.
    model_channels
        Width of the first features.
    widths
        Feature channels at each resolution, finest first.
    num_blocks
        Residual blocks a resolution on the way down; one more on the way up.
    attention_levels
        Resolutions with attention, 0 the finest. The middle always has it, with one head as everywhere.
    noise_channels, embedding_channels
        Widths of the noise level's sines and cosines, and of the embedding made of them.
    embedding_type
        ``"positional"``, or ``"fourier"`` with random frequencies, kept with the weights.
    encoder_type
        ``"standard"``, ``"skip"`` (the image is added to the features of each resolution) or ``"residual"``
        (so are the features of the resolution above).
    decoder_type
        ``"standard"``, or ``"skip"`` (the output is a sum over the resolutions).
    resample_filter
        Taps of the filter for resampling, up to their scale.
    label_dim, augment_dim
        Length of the vectors that tell of a class and of an augmentation; 0 for none.

    Raises
    ------
    PriorError
        If there is no such network.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    num_blocks: int
    noise_channels: int
    embedding_channels: int
    attention_levels: tuple[int, ...] = ()
    embedding_type: str = "positional"
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1.0, 1.0)
    label_dim: int = 0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        check_levels(self)
        if type(self.noise_channels) is not int or self.noise_channels < 2 or self.noise_channels % 2:
            raise PriorError(f"noise_channels must be an even number, got {self.noise_channels!r}")
        for name, choices in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "skip", "residual")),
            ("decoder_type", ("standard", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise PriorError(f"{name} is one of {choices}, not {getattr(self, name)!r}")
        taps = self.resample_filter
        if (
            not isinstance(taps, tuple)
            or not taps
            or len(taps) % 2
            or not all(isinstance(tap, int | float) and math.isfinite(tap) for tap in taps)
            or not sum(taps)
        ):
            raise PriorError(f"resample_filter must be an even number of numbers, got {taps!r}")

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class _Fourier(nn.Module):
    """Random frequencies, ``(B, width)``: cosines, then sines."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, label: Tensor) -> Tensor:
        angles = label[:, None].float() * (2 * math.pi * self.freqs.float())
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Positional(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, label: Tensor) -> Tensor:
        return positional_features(label, self.width, endpoint=True)


class SongUNet(nn.Module):
    """The raw network ``F(c_in x, c_noise)``.

    Takes ``(B, in_channels, H, W)`` and ``(B,)`` noise labels; H and W must be multiples of
    ``settings.size_multiple``.
    """

    def __init__(self, settings: SongSettings) -> None:
        super().__init__()
        self.settings = settings
        noise, embedding = settings.noise_channels, settings.embedding_channels
        taps = settings.resample_filter
        self.map_noise = _Fourier(noise) if settings.embedding_type == "fourier" else _Positional(noise)
        self.map_label = nn.Linear(settings.label_dim, noise) if settings.label_dim else None
        self.map_augment = (
            nn.Linear(settings.augment_dim, noise, bias=False) if settings.augment_dim else None
        )
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        def block(width_in: int, width: int, attention: bool = False, resample: str = "") -> Block:
            return Block(
                width_in,
                width,
                embedding,
                int(attention),
                resample=resample,
                taps=taps,
                scale_shift=False,
                project_skip=True,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
            )

        widths, last = settings.widths, len(settings.widths) - 1
        width, aux = settings.model_channels, settings.in_channels
        skips = [width]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        for level, target in enumerate(widths):
            size = _size(settings, level)
            if level == 0:
                self.enc[f"{size}_conv"] = Convolution(settings.in_channels, width, 3)
            else:
                self.enc[f"{size}_down"] = block(width, width, resample="down")
                skips.append(width)
                if settings.encoder_type == "skip":
                    self.enc[f"{size}_aux_down"] = Convolution(aux, aux, 0, "down", taps)
                    self.enc[f"{size}_aux_skip"] = Convolution(aux, width, 1)
                elif settings.encoder_type == "residual":
                    self.enc[f"{size}_aux_residual"] = Convolution(aux, width, 3, "down", taps, fused=True)
                    aux = width
            for index in range(settings.num_blocks):
                self.enc[f"{size}_block{index}"] = block(width, target, level in settings.attention_levels)
                width = target
                skips.append(width)
        for level in reversed(range(len(widths))):
            size = _size(settings, level)
            if level == last:
                self.dec[f"{size}_in0"] = block(width, width, attention=True)
                self.dec[f"{size}_in1"] = block(width, width)
            else:
                self.dec[f"{size}_up"] = block(width, width, resample="up")
            for index in range(settings.num_blocks + 1):
                attention = index == settings.num_blocks and level in settings.attention_levels
                self.dec[f"{size}_block{index}"] = block(width + skips.pop(), widths[level], attention)
                width = widths[level]
            if settings.decoder_type == "skip" or level == 0:
                if level < last and settings.decoder_type == "skip":
                    out = settings.out_channels
                    self.dec[f"{size}_aux_up"] = Convolution(out, out, 0, "up", taps)
                self.dec[f"{size}_aux_norm"] = GroupNorm(width, eps=1e-6)
                self.dec[f"{size}_aux_conv"] = Convolution(width, settings.out_channels, 3)

    def embed(self, label: Tensor, classes: Tensor | None) -> Tensor:
        """Embedding ``(B, embedding_channels)`` of noise labels ``(B,)`` and class vectors."""
        # Sines first here, though the features have them last.
        features = self.map_noise(label).unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None and classes is not None:
            features = features + self.map_label(classes * math.sqrt(self.settings.label_dim))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(features))))

    def forward(self, x: Tensor, label: Tensor, classes: Tensor | None = None) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        x
            ``(B, in_channels, H, W)``.
        label
            ``(B,)``, the noise label.
        classes
            ``(B, label_dim)`` or ``(1, label_dim)``; zeros if not given. No augmentation is told of.
        """
        if classes is None and self.settings.label_dim:
            classes = x.new_zeros(1, self.settings.label_dim)
        embedding = self.embed(label, classes)
        skips: list[Tensor] = []
        h = aux = x
        for name, layer in self.enc.items():
            if name.endswith("_conv"):
                # In float32 under autocast: rounding a nearly clean image to bfloat16 adds an error
                # comparable to the noise that is to be removed.
                with torch.autocast(x.device.type, enabled=False):
                    h = layer(h)
                skips.append(h)
            elif name.endswith("_aux_down"):
                aux = layer(aux)
            elif name.endswith("_aux_skip"):
                h = skips[-1] = h + layer(aux)
            elif name.endswith("_aux_residual"):
                h = skips[-1] = aux = (h + layer(aux)) * math.sqrt(0.5)
            else:
                h = layer(h, embedding)
                skips.append(h)
        out: Tensor | None = None
        normed = h
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                out = layer(out)
            elif name.endswith("_aux_norm"):
                normed = layer(h)
            elif name.endswith("_aux_conv"):
                part = layer(F.silu(normed))
                out = part if out is None else out + part
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding)
        assert out is not None  # the finest resolution always has an output
        return out


def _size(settings: SongSettings, level: int) -> str:
    side = settings.img_resolution >> level
    return f"{side}x{side}"
