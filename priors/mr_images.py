"""Training images of MRI, complex or real, made from magnitude slices or from complex ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.errors import PriorError
from priors.level import image_level
from priors.slices import OfSlices, SliceList, Slices
from priors.training import TrainingSettings

MR_SETTINGS = TrainingSettings()
"""Settings for complex images at a level: what :class:`TrainingSettings` has of itself."""


class MRImages(OfSlices):
    """Source of patches, :func:`sample_patches` of slices.

    Parameters
    ----------
    slices
        Images ``(H, W)``, or stacks ``(K, H, W)``, of any sizes and at the prior's level: magnitudes, as from
        :func:`prepare_slices`, or complex ones; a list, or where to draw them from.
    channels
        ``"complex"`` or ``"real"``: what the prior's images are.

    Raises
    ------
    PriorError
        If there are none, or there are no such channels.
    """

    def __init__(self, slices: Sequence[Tensor] | Slices, channels: str = "complex") -> None:
        if channels not in ("complex", "real"):
            raise PriorError(f"a prior's channels are 'complex' or 'real', not {channels!r}")
        self.slices: Slices = slices if isinstance(slices, Slices) else SliceList(slices)
        self.channels = channels

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """See :meth:`priors.training.ImageSource.draw`; complex64, or float32 magnitudes for real priors."""
        return sample_patches(self.slices, batch, size, generator, self.channels)


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


def sample_patches(
    slices: Sequence[Tensor] | Slices,
    batch: int,
    patch: int,
    generator: torch.Generator,
    channels: str = "complex",
) -> Tensor:
    """Draw augmented patches from slices.

    All are rotated by any angle, flipped and zoomed by 0.65-1.5 (anisotropic by up to 10 %), and vary in
    brightness. Magnitudes vary in contrast (gamma and a smooth bias field) too, and for complex priors they
    are given a smooth random phase with a random global one. Complex images keep their own contrast and phase
    but for a random global phase; for real priors their magnitude is taken.

    Parameters
    ----------
    slices
        As for :class:`MRImages`, magnitudes and complex ones mixed at will, all of one number K.
    batch, patch
        Number of patches, and their height and width.
    generator
        Where all randomness comes from.
    channels
        ``"complex"`` or ``"real"``.

    Returns
    -------
    Tensor
        ``(batch, patch, patch)``, or ``(batch, K, patch, patch)`` for stacks; complex64, or float32 for
        ``"real"``.
    """
    source = slices if isinstance(slices, Slices) else SliceList(slices)

    def uniform(low: float, high: float, size: int = batch) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-math.pi, math.pi)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zoom = torch.exp(uniform(math.log(0.65), math.log(1.5)))
    stretch = uniform(0.95, 1.05)
    cut, own_phase = [], []
    for item in range(batch):
        image = source.pick(generator)
        if channels == "real":
            image = image.abs()
        own_phase.append(image.is_complex())
        stack = image if image.ndim == 3 else image[None]
        height, width = stack.shape[-2:]
        # Centre the patch on a pixel of the object where a few tries find one, so that few patches are air.
        object_of = stack[len(stack) // 2].reshape(-1)
        pixel = int(torch.randint(height * width, (1,), generator=generator))
        for _ in range(4):
            if object_of[pixel].abs() > 0.05:
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
        parts = torch.cat([stack.real, stack.imag]) if stack.is_complex() else stack
        moved = F.grid_sample(parts[None], grid, mode="bicubic", align_corners=False)[0]
        cut.append(torch.complex(*moved.chunk(2)) if stack.is_complex() else moved)
    own_item = torch.tensor(own_phase)[:, None, None, None]
    magnitude = torch.stack([moved.abs() if moved.is_complex() else moved.clamp_min(0) for moved in cut])
    gamma = torch.exp(uniform(-0.3, 0.3))[:, None, None, None]
    contrasted = 0.5 * (magnitude / 0.5) ** gamma
    brightness = torch.exp(0.25 * torch.randn(batch, generator=generator))[:, None, None, None]
    shape = (batch, patch, patch)
    bias = torch.exp(uniform(0, 0.4)[:, None, None] * _smooth_field(shape, 0.4, generator))[:, None]
    out = contrasted * brightness * bias
    if channels == "complex":
        phase, turn = random_phase(magnitude.shape, generator)
        own = torch.stack([moved.to(torch.complex64) for moved in cut])
        turned = own * torch.polar(brightness, turn[:, None, None, None])
        out = torch.where(own_item, turned, torch.polar(out, phase))
    return out if image.ndim == 3 else out[:, 0]


def random_phase(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw smooth phases of images, each with a random global one.

    Parameters
    ----------
    shape
        ``(B, K, n, n)``: of neighbouring slices the phases differ a little.
    generator
        Where all randomness comes from.

    Returns
    -------
    phase : Tensor
        ``(B, K, n, n)``, radians.
    turn : Tensor
        ``(B,)``, radians: the global phase in it, uniform.
    """
    batch, stack, height, width = shape
    plane = (batch, height, width)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    phase = uniform(0, 2.5)[:, None, None] * _smooth_field(plane, 0.6, generator)
    turn = uniform(-math.pi, math.pi)
    phase = (phase + turn[:, None, None])[:, None].expand(shape)
    if stack > 1:
        drift = uniform(0, 0.3)[:, None, None] * _smooth_field(plane, 0.6, generator)
        place = torch.arange(stack) - stack // 2
        phase = phase + place[:, None, None] * drift[:, None]
    return phase, turn
