"""U-Net of EDM in the architecture of ADM.

Dhariwal & Nichol, NeurIPS 2021, as Karras et al., NeurIPS 2022 (arXiv:2206.00364, App. F.2 and Table 7) build
it. Names and order of the entries of the state dict are those of NVlabs/edm and InverseBench.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import JSONSettings
from priors.errors import PriorError
from priors.networks.edm_layers import Block, Convolution, GroupNorm, check_levels, positional_features


@dataclass(frozen=True)
class DhariwalSettings(JSONSettings):
    """Shape of the network.

    Parameters
    ----------
    img_resolution
        Side of the training images. It names the entries of the state dict and limits nothing.
    in_channels, out_channels
        Channels of the image and of the output.
    model_channels
        Width of the noise level's sines and cosines.
    widths
        Feature channels at each resolution, finest first.
    num_blocks
        Residual blocks a resolution on the way down; one more on the way up.
    embedding_channels
        Width of the embedding.
    attention_levels
        Resolutions with attention, 0 the finest; the middle has it too.
    channels_per_head
        Channels of a head of attention. Features of fewer channels have no attention.
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
    embedding_channels: int
    attention_levels: tuple[int, ...] = ()
    channels_per_head: int = 64
    label_dim: int = 0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        check_levels(self)
        if self.model_channels % 2:
            raise PriorError(f"model_channels must be even, got {self.model_channels}")
        if type(self.channels_per_head) is not int or self.channels_per_head < 1:
            raise PriorError(f"channels_per_head must be a positive number, got {self.channels_per_head!r}")

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class DhariwalUNet(nn.Module):
    """The raw network ``F(c_in x, c_noise)``.

    Takes ``(B, in_channels, H, W)`` and ``(B,)`` noise labels; H and W must be multiples of
    ``settings.size_multiple``.
    """

    def __init__(self, settings: DhariwalSettings) -> None:
        super().__init__()
        self.settings = settings
        features, embedding = settings.model_channels, settings.embedding_channels
        self.map_augment = (
            nn.Linear(settings.augment_dim, features, bias=False) if settings.augment_dim else None
        )
        self.map_layer0 = nn.Linear(features, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(settings.label_dim, embedding, bias=False) if settings.label_dim else None

        def block(width_in: int, width: int, attention: bool = False, resample: str = "") -> Block:
            return Block(
                width_in,
                width,
                embedding,
                width // settings.channels_per_head if attention else 0,
                resample=resample,
                scale_shift=True,
                project_skip=False,
                skip_scale=1.0,
                eps=1e-5,
            )

        widths, last = settings.widths, len(settings.widths) - 1
        width = widths[0]
        skips = [width]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        for level, target in enumerate(widths):
            side = settings.img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Convolution(settings.in_channels, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(width, width, resample="down")
                skips.append(width)
            for index in range(settings.num_blocks):
                name = f"{side}x{side}_block{index}"
                self.enc[name] = block(width, target, level in settings.attention_levels)
                width = target
                skips.append(width)
        for level in reversed(range(len(widths))):
            side = settings.img_resolution >> level
            if level == last:
                self.dec[f"{side}x{side}_in0"] = block(width, width, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, resample="up")
            for index in range(settings.num_blocks + 1):
                name = f"{side}x{side}_block{index}"
                self.dec[name] = block(width + skips.pop(), widths[level], level in settings.attention_levels)
                width = widths[level]
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Convolution(width, settings.out_channels, 3)

    def embed(self, label: Tensor, classes: Tensor | None) -> Tensor:
        """Embedding ``(B, embedding_channels)`` of noise labels ``(B,)`` and class vectors."""
        features = positional_features(label, self.settings.model_channels, endpoint=False)
        embedding = self.map_layer1(F.silu(self.map_layer0(features)))
        if self.map_label is not None and classes is not None:
            embedding = embedding + self.map_label(classes)
        return F.silu(embedding)

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
        embedding = self.embed(label, classes)
        skips: list[Tensor] = []
        h = x
        for name, layer in self.enc.items():
            if name.endswith("_conv"):
                # In float32 under autocast: rounding a nearly clean image to bfloat16 adds an error
                # comparable to the noise that is to be removed.
                with torch.autocast(x.device.type, enabled=False):
                    h = layer(h)
            else:
                h = layer(h, embedding)
            skips.append(h)
        for name, layer in self.dec.items():
            h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding)
        return self.out_conv(F.silu(self.out_norm(h)))
