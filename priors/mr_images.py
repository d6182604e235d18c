"""Complex training images of MRI, made from magnitude slices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.errors import PriorError
from priors.level import image_level
from priors.training import TrainingSettings

MR_SETTINGS = TrainingSettings()
"""Settings for complex images at a level: what :class:`TrainingSettings` has of itself."""


class MRImages:
    """Source of complex patches, :func:`sample_patches` of magnitude slices.

    Parameters
    ----------
    slices
        Magnitude images ``(H, W)`` from :func:`prepare_slices`, of any sizes.

    Raises
    ------
    PriorError
        If there are none.
    """

    def __init__(self, slices: Sequence[Tensor]) -> None:
        if not slices:
            raise PriorError("there is no image to train on")
        self.slices = list(slices)

    def __len__(self) -> int:
        return len(self.slices)

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """See :meth:`priors.training.ImageSource.draw`; ``(batch, size, size)``, complex64."""
        return sample_patches(self.slices, batch, size, generator)


def prepare_slices(volumes: Sequence[Tensor], level: float) -> list[Tensor]:
    """Cut magnitude volumes ``(S, H, W)`` into slices at the prior's level, leaving out nearly empty ones.

    Raises
    ------
    PriorError
        If a volume has another number of axes or values that are not finite, or every slice is empty.
    """
    slices = []
    for number, volume in enumerate(volumes):
        if volume.ndim != 3:
            raise PriorError(f"volume {number} has shape {tuple(volume.shape)}, expected (slices, H, W)")
        if not bool(torch.isfinite(volume).all()):
            raise PriorError(f"volume {number} holds values that are not finite")
        energy = (volume.double() ** 2).sum((-2, -1))
        for index in torch.nonzero(energy > 0.05 * energy.max()).flatten().tolist():
            image = volume[index].float()
            slices.append(image * (level / float(image_level(image))))
    if not slices:
        raise PriorError("there is no image to train on: every slice is empty")
    return slices


def _smooth_field(shape: tuple[int, int, int], cycles: float, generator: torch.Generator) -> Tensor:
    """Random smooth fields ``(B, n, n)`` of unit variance made of a few plane waves."""
    batch, height, width = shape
    waves = 6
    frequency = cycles * torch.randn((2, batch, waves, 1, 1), generator=generator)
    phase = 2 * math.pi * torch.rand((batch, waves, 1, 1), generator=generator)
    y = torch.linspace(-0.5, 0.5, height)[:, None]
    x = torch.linspace(-0.5, 0.5, width)
    arguments = 2 * math.pi * (frequency[0] * y + frequency[1] * x) + phase
    return arguments.cos().sum(1) * math.sqrt(2 / waves)


def sample_patches(slices: Sequence[Tensor], batch: int, patch: int, generator: torch.Generator) -> Tensor:
    """Draw augmented complex patches from magnitude slices.

    Rotation by any angle, flips, zoom 0.65-1.5 (anisotropic by up to 10 %), gamma, brightness, a smooth bias
    field, and a smooth random phase with a random global one.

    Returns
    -------
    Tensor
        ``(batch, patch, patch)``, complex64.
    """

    def uniform(low: float, high: float, size: int = batch) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-math.pi, math.pi)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zoom = torch.exp(uniform(math.log(0.65), math.log(1.5)))
    stretch = uniform(0.95, 1.05)
    out = torch.empty(batch, patch, patch)
    for item in range(batch):
        image = slices[int(torch.randint(len(slices), (1,), generator=generator))]
        height, width = image.shape
        # Centre the patch on a pixel of the object where a few tries find one, so that few patches are air.
        pixel = int(torch.randint(height * width, (1,), generator=generator))
        for _ in range(4):
            if image.view(-1)[pixel] > 0.05:
                break
            pixel = int(torch.randint(height * width, (1,), generator=generator))
        row, column = divmod(pixel, width)
        centre = torch.tensor([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1])
        cos, sin = math.cos(float(angle[item])), math.sin(float(angle[item]))
        sx, sy = float(zoom[item] * stretch[item]), float(zoom[item] / stretch[item])
        rotation = torch.tensor(
            [
                [cos * sx * patch / width, -sin * sy * patch / width],
                [sin * sx * patch / height, cos * sy * patch / height],
            ]
        )
        rotation[:, 0] *= flip[item]
        theta = torch.cat([rotation, centre[:, None]], dim=1)[None]
        grid = F.affine_grid(theta, [1, 1, patch, patch], align_corners=False)
        out[item] = F.grid_sample(image[None, None], grid, mode="bicubic", align_corners=False)[0, 0]
    magnitude = out.clamp_min(0)
    gamma = torch.exp(uniform(-0.3, 0.3))[:, None, None]
    magnitude = 0.5 * (magnitude / 0.5) ** gamma
    brightness = torch.exp(0.25 * torch.randn(batch, generator=generator))[:, None, None]
    shape = (batch, patch, patch)
    bias = torch.exp(uniform(0, 0.4)[:, None, None] * _smooth_field(shape, 0.4, generator))
    phase = uniform(0, 2.5)[:, None, None] * _smooth_field(shape, 0.6, generator)
    phase = phase + uniform(-math.pi, math.pi)[:, None, None]
    return torch.polar(magnitude * brightness * bias, phase)
