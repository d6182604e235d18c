"""Training images of any kind, with nothing assumed about what they show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.errors import PriorError
from priors.mr_images import random_phase
from priors.network import NetworkSettings
from priors.slices import OfSlices, SliceList, Slices
from priors.training import TrainingSettings

PLAIN_SETTINGS = TrainingSettings(network=NetworkSettings(channels=1, sigma_data=0.25))
"""Settings for images at a level, real unless the network is given two channels a slice."""


class PlainImages(OfSlices):
    """Source of squares cut at random places and mirrored left-right one time in two.

    Pixels keep their values and their neighbours: nothing is turned, zoomed or interpolated. Images smaller
    than a patch lie at a random place in it, with zeros around them.

    Parameters
    ----------
    slices
        Images ``(H, W)``, or stacks ``(K, H, W)``, at the prior's level; a list, or where to draw them from.
    channels
        ``"real"``: magnitudes are taken of complex images. ``"complex"``: real images are given a smooth
        random phase, and complex ones a random global phase.

    Raises
    ------
    PriorError
        If there are no images, or no such channels.
    """

    def __init__(self, slices: Sequence[Tensor] | Slices, channels: str = "real") -> None:
        if channels not in ("complex", "real"):
            raise PriorError(f"a prior's channels are 'complex' or 'real', not {channels!r}")
        self.slices = slices if isinstance(slices, Slices) else SliceList(slices)
        self.channels = channels

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """See :meth:`priors.training.ImageSource.draw`; ``(batch, K, size, size)`` for stacks."""

        def whole(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        patches = []
        for _ in range(batch):
            image = self.slices.pick(generator)
            if self.channels == "real" and image.is_complex():
                image = image.abs()
            spare = [side - size for side in image.shape[-2:]]
            top, left = (whole(abs(room) + 1) for room in spare)
            # What sticks out is cut off, what is missing is filled up: negative padding cuts.
            above, beside = (-t if room > 0 else t for t, room in zip((top, left), spare, strict=True))
            sides = (beside, -spare[1] - beside, above, -spare[0] - above)
            patch = F.pad(image, sides)
            patches.append(patch.flip(-1) if whole(2) else patch)
        stack = image.ndim == 3
        if self.channels == "real":
            return torch.stack(patches)
        shape = torch.Size((batch, len(image) if stack else 1, size, size))
        phase, turn = random_phase(shape, generator)
        made = []
        for patch, smooth, angle in zip(patches, phase, turn, strict=True):
            parts = patch if stack else patch[None]
            # A product, since polar() takes magnitudes and images may be negative.
            factor = angle if parts.is_complex() else smooth
            made.append(parts * torch.polar(torch.ones_like(factor), factor))
        out = torch.stack(made)
        return out if stack else out[:, 0]
