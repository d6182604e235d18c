"""The project's own denoising network: a small noise-conditional U-Net, fully convolutional.

Two choices make it cheap on a CPU. A pixel-unshuffle stem works on a grid half as fine with four times the
channels, and there is no normalisation layer: statistics over the whole image would tie the output to the
size of the field of view, and the preconditioning already keeps activations at unit scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import Contract, JSONSettings, ScorePrior, padded
from priors.errors import PriorError


@dataclass(frozen=True)
class NetworkSettings(JSONSettings):
    """Shape of the network.

    Parameters
    ----------
    channels
        Image channels (2 for complex images).
    widths
        Feature channels at each resolution, finest first.
    blocks
        Residual blocks a resolution, on the way down and again on the way up.
    unshuffle
        Factor of the pixel-unshuffle stem; 1 for none.
    embedding
        Width of the noise-level embedding.
    sigma_data
        Standard deviation per channel of the training images (the EDM preconditioning's constant).

    Raises
    ------
    PriorError
        If there is no such network.
    """

    channels: int = 2
    widths: tuple[int, ...] = (64, 128, 256)
    blocks: int = 1
    unshuffle: int = 2
    embedding: int = 128
    sigma_data: float = 0.2

    def __post_init__(self) -> None:
        counts = (self.channels, *self.widths, self.blocks, self.unshuffle)
        if not self.widths or min(counts) < 1 or self.embedding < 2 or self.embedding % 2:
            raise PriorError(f"impossible network settings {self}")
        if not self.sigma_data > 0:
            raise PriorError(f"sigma_data must be positive, got {self.sigma_data}")

    @property
    def size_multiple(self) -> int:
        """Heights and widths are padded to a multiple of this inside the network."""
        return int(self.unshuffle * 2 ** (len(self.widths) - 1))


class _Block(nn.Module):
    """Residual block, modulated by the noise level (scale and shift a channel)."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width)
        with torch.no_grad():  # start close to the identity
            self.conv2.weight.mul_(0.1)
            self.modulation.weight.mul_(0.1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(x))
        return x + self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))


class DenoisingUNet(nn.Module):
    """The raw network ``F(c_in x, c_noise)`` of the preconditioned denoiser.

    Takes ``(B, channels, H, W)`` of any size and ``(B,)`` noise labels, returns the shape of the image.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        widths, width_e = settings.widths, settings.embedding
        packed = settings.channels * settings.unshuffle**2
        self.embed = nn.Sequential(
            nn.Linear(width_e, width_e), nn.SiLU(), nn.Linear(width_e, width_e), nn.SiLU()
        )
        self.stem = nn.Conv2d(packed, widths[0], 3, padding=1)
        self.head = nn.Conv2d(widths[0], packed, 3, padding=1)
        self.down = nn.ModuleList(self._stage(w) for w in widths)
        self.up = nn.ModuleList(self._stage(w) for w in widths)
        pairs = list(pairwise(widths))
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def _stage(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(_Block(width, self.settings.embedding) for _ in range(self.settings.blocks))

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """Apply the network to ``(B, channels, H, W)`` and ``(B,)``; see the class."""
        height, width = x.shape[-2:]
        x = padded(x, self.settings.size_multiple)
        embedding = self.embed(_fourier_features(noise_label, self.settings.embedding))
        # The stem stays in float32 under autocast: rounding a nearly clean image to bfloat16 adds an error
        # comparable to the noise that is to be removed.
        with torch.autocast(x.device.type, enabled=False):
            h = self.stem(F.pixel_unshuffle(x, self.settings.unshuffle))
        skips = []
        for level, stage in enumerate(self.down):
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, embedding)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:  # type: ignore[attr-defined]
                h = block(h, embedding)
            if level:
                h = self.grow[level - 1](h) + skips[level - 1]
        return F.pixel_shuffle(self.head(h), self.settings.unshuffle)[..., :height, :width]


def _fourier_features(label: Tensor, width: int) -> Tensor:
    """Sines and cosines of the label at geometrically spaced frequencies, ``(B, width)``."""
    frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(64.0), width // 2, device=label.device))
    angles = label[:, None].float() * frequencies.to(label.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NetworkPrior(ScorePrior):
    """A :class:`DenoisingUNet` with EDM preconditioning, as a prior.

    ``D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma)/4)`` (Karras et al. 2022, Eq. 7 and Table 1).

    Parameters
    ----------
    network
        The raw network.
    contract
        What it was trained for.
    precision
        ``"fp32"`` (default), or ``"bf16"`` to run the network, and nothing else, under autocast.
    """

    def __init__(self, network: DenoisingUNet, contract: Contract, precision: str = "fp32") -> None:
        super().__init__(contract)
        if precision not in ("fp32", "bf16"):
            raise PriorError(f"precision is 'fp32' or 'bf16', not {precision!r}")
        if network.settings.channels != contract.num_channels:
            raise PriorError(
                f"the network has {network.settings.channels} channels, its contract {contract.num_channels}"
            )
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        self.check_channels(x)
        dtype = x.dtype
        x = x.to(torch.float32, memory_format=torch.channels_last)
        sigma = sigma.to(torch.float32)
        s = sigma[:, None, None, None]
        data = self.network.settings.sigma_data
        total = s**2 + data**2
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            raw = self.network(x * total.rsqrt(), sigma.log() / 4)
        return ((data**2 / total) * x + (s * data * total.rsqrt()) * raw.float()).to(dtype)
