"""Images that trainings are tested on."""

import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def disks(number=3, height=40, width=36):
    """A volume of smooth disks of different sizes, ``(number, height, width)``."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    radius = torch.linspace(0.5, 0.8, number)[:, None, None]
    return 700 * torch.sigmoid(20 * (radius - torch.hypot(y, x))) * (1 + 0.3 * torch.cos(9 * x))
