"""A head made of ellipses, seen by smooth coils."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.cases import make_case
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase

SHAPE = (48, 40)


def phantom():
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    return (
        1.0 * ((x / 0.8) ** 2 + (y / 0.85) ** 2 < 1)
        - 0.5 * ((x - 0.2) ** 2 + y**2 < 0.1)
        + 0.3 * ((x + 0.3).abs() + (y - 0.2).abs() < 0.2)
    )


def case(seed=0, noise=0.01, name="phantom"):
    image = torch.polar(phantom(), smooth_phase(SHAPE, seed=1))
    maps = random_smooth_maps(5, SHAPE, seed=2)
    kspace = simulate_kspace(image, maps, noise, seed=seed)
    return make_case(name, kspace, noise_free=image.abs() * maps.abs().square().sum(0).sqrt())


def write_cfl(folder, array, dims, name="full"):
    (folder / f"{name}.hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + " \n# Command\nx\n")
    np.asarray(array, dtype="<c8").reshape(-1, order="F").tofile(folder / f"{name}.cfl")
    return folder / f"{name}.cfl"
