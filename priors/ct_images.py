"""Real training images of CT in units of water, made from slices in Hounsfield units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.errors import PriorError
from priors.network import NetworkSettings
from priors.slices import OfSlices, SliceList, Slices
from priors.training import TrainingSettings

HU_OUTSIDE = -1024.0
"""Scanners fill what lies outside of their field of view with this value or with lower ones."""

_TILT, _TILTED_SHARE = math.radians(15), 0.8
"""Most patients lie straight; those patches that are not turned by up to this angle are turned by any."""

_OBJECT = 0.05
"""Water units from which a pixel counts as object (lung is about 0.15), where patches are centred."""

CT_SETTINGS = TrainingSettings(
    level=0.82,
    unit="water",
    sigma_min=0.001,  # 1 HU
    sigma_max=20.0,
    # Log-normal about 80 HU: 5 HU and 1000 HU, between which solvers spend their steps, are 2 spreads away.
    sigma_centre=0.08,
    sigma_spread=1.4,
    network=NetworkSettings(channels=1, sigma_data=0.5),
)
"""Settings for CT images: noise from 1 HU to twenty times the attenuation of water."""


class CTImages(OfSlices):
    """Source of patches of CT images.

    Slices are kept at their full resolution and averaged over ``reduction x reduction`` pixels after
    augmentation, so that noise and edges are those of an averaged image whatever its rotation. Patches are
    flipped left-right and up-down, rotated (mostly by up to 15 degrees, one in five by any angle) and
    zoomed by 0.7 to 1.4; the attenuation is scaled by about 2 % and shifted by about 5 HU, the errors that
    scanners make.

    Parameters
    ----------
    volumes
        Series ``(S, H, W)`` in Hounsfield units. Nothing is clipped but what lies below -1024 HU, outside of
        the scanner's field. Or where to draw slices ``(H, W)``, or stacks of them ``(K, H, W)``, that are in
        :func:`water_units` already.
    reduction
        Pixels of a slice, along each axis, to a pixel of an image.

    Raises
    ------
    PriorError
        If there are no slices, or a series has another number of axes or values that are not finite.
    """

    def __init__(self, volumes: Sequence[Tensor] | Slices, reduction: int = 2) -> None:
        if reduction < 1:
            raise PriorError(f"the reduction must be at least 1, got {reduction}")
        self.reduction = reduction
        if isinstance(volumes, Slices):
            self.slices = volumes
            return
        slices: list[Tensor] = []
        for number, volume in enumerate(volumes):
            if volume.ndim != 3:
                raise PriorError(f"series {number} has shape {tuple(volume.shape)}, expected (slices, H, W)")
            if not bool(torch.isfinite(volume).all()):
                raise PriorError(f"series {number} holds values that are not finite")
            slices.extend(water_units(volume.float()))
        if not slices:
            raise PriorError("there is no image to train on: no CT series has a slice")
        self.slices = SliceList(slices)

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """See :meth:`priors.training.ImageSource.draw`; float32, water units."""

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        def normal() -> float:
            return float(torch.randn((), generator=generator))

        fine = size * self.reduction
        patches = []
        for _ in range(batch):
            image = self.slices.pick(generator)
            tilt = _TILT if uniform(0, 1) < _TILTED_SHARE else math.pi
            angle, zoom = uniform(-tilt, tilt), math.exp(uniform(math.log(0.7), math.log(1.4)))
            flips = [1.0 if uniform(0, 1) < 0.5 else -1.0 for _ in range(2)]
            stack = image if image.ndim == 3 else image[None]
            centre = _pick_centre(stack[len(stack) // 2], generator)
            cut = _cut(stack, fine, centre, angle, zoom, flips)
            patches.append(cut * (1 + 0.02 * normal()) + 0.005 * normal())
        out = F.avg_pool2d(torch.stack(patches), self.reduction)
        return out if image.ndim == 3 else out[:, 0]


def water_units(hu: Tensor) -> Tensor:
    """Hounsfield units as attenuation in units of water's, ``1 + HU/1000``; below -1024 HU is -1024 HU."""
    return 1 + hu.clamp_min(HU_OUTSIDE) / 1000


def _pick_centre(image: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Row and column of a pixel of the object where a few tries find one, so that few patches are air."""
    height, width = image.shape
    row = column = 0
    for _ in range(4):
        row = int(torch.randint(height, (1,), generator=generator))
        column = int(torch.randint(width, (1,), generator=generator))
        if image[row, column] > _OBJECT:
            break
    return row, column


def _cut(
    stack: Tensor, size: int, centre: tuple[int, int], angle: float, zoom: float, flips: Sequence[float]
) -> Tensor:
    """Squares of ``size`` about a pixel of ``(K, H, W)``, turned by ``angle``, magnified by ``zoom``.

    Outside of the slices there is air.
    """
    (height, width), (row, column) = stack.shape[-2:], centre
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor(
        [
            [cos * size / width, -sin * size / width, (2 * column + 1) / width - 1],
            [sin * size / height, cos * size / height, (2 * row + 1) / height - 1],
        ]
    )
    theta[:, :2] *= torch.tensor(flips)
    grid = F.affine_grid(theta[None], [1, 1, size, size], align_corners=False)
    return F.grid_sample(stack[None], grid, mode="bicubic", align_corners=False)[0]
