"""What the supervised networks learn from: the prior's slices, measured as the test cases are.

Coils, image phase, noise and mask are drawn anew each time a slice is used, by the functions that make the
test cases (`benchmarks.cases.simulated_case`); slices are flipped, turned and zoomed a little, and their
contrast is varied as it is for the prior. A slice lies upright, as in the test, and its whole width is kept,
so that aliasing along the phase encoding is what it is in the test; of the readout, along which nothing
aliases, a part is enough, which is what a scanner's data cropped along the readout would be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import NOISE, NUM_COILS
from operators.errors import OperatorError
from operators.fft import ifftc
from operators.masks import Mask, make_mask
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from priors.mr_images import prepare_slices
from priors.training import stream_seed
from recon.errors import ReconError
from recon.io.nifti import read_folder

_FIRST_SEED = 2**20
"""Coils and phases of test cases are seeded by slice numbers; those of the training start above them."""


@dataclass(frozen=True)
class Simulation:
    """How an example is made.

    Attributes
    ----------
    mask : str
        Kind of mask (`operators.masks.make_mask`).
    acceleration : float
        Of the mask.
    coils : int
        Number of coils.
    noise : float
        Standard deviation per real component, of the image's maximum.
    widths : tuple of int
        Smallest and largest width an image is brought to, in pixels.
    rows : int
        Rows that are kept of it along the readout.
    whole : float
        Part of the examples of which all rows are kept, as in the test.

    Raises
    ------
    ReconError
        If a number is out of its range.
    """

    mask: str = "equispaced"
    acceleration: float = 4.0
    coils: int = NUM_COILS
    noise: float = NOISE
    widths: tuple[int, int] = (192, 288)
    rows: int = 96
    whole: float = 0.05

    def __post_init__(self) -> None:
        if not 32 <= self.widths[0] <= self.widths[1]:
            raise ReconError(f"widths must be two rising numbers of at least 32, got {self.widths}")
        if self.rows < 32:
            raise ReconError(f"rows must be at least 32, got {self.rows}")
        if not 0 <= self.whole <= 1:
            raise ReconError(f"the part of whole images must be from 0 to 1, got {self.whole}")
        if self.coils < 2:
            raise ReconError(f"there must be at least two coils, got {self.coils}")
        if not self.noise >= 0:
            raise ReconError(f"the noise must be at least 0, got {self.noise}")
        try:
            make_mask(self.mask, (self.widths[0], self.widths[0]), self.acceleration)
        except OperatorError as error:
            raise ReconError(str(error)) from None


@dataclass(frozen=True, eq=False)
class Example:
    """One undersampled slice and what a network should make of it.

    Attributes
    ----------
    kspace : Tensor
        Complex64 ``(C, H, W)``, zero where nothing is sampled.
    mask : Mask
        What is sampled.
    target : Tensor
        Root sum of squares of the coil images before noise, float32 ``(H, W)``.
    peak : float
        Largest value of the target, over all rows of the slice: the range of PSNR and SSIM.
    """

    kspace: Tensor
    mask: Mask
    target: Tensor
    peak: float

    @property
    def zero_filled(self) -> Tensor:
        """Root sum of squares of the zero-filled coil images, ``(H, W)``."""
        return ifftc(self.kspace).abs().square().sum(0).sqrt()


@dataclass(frozen=True, eq=False)
class SliceSet:
    """Magnitude slices ``(H, W)`` with maximum 1.

    Attributes
    ----------
    slices : list of Tensor
        Nearly empty ones are left out, by the same rule as for the prior.
    digest : str
        Says whether two sets are the same.
    """

    slices: list[Tensor]
    digest: str

    def __len__(self) -> int:
        return len(self.slices)


def read_slices(paths: Sequence[Path]) -> SliceSet:
    """Read NIfTI volumes, files or all in folders.

    Raises
    ------
    ReconError
        Naming what is missing or cannot be read.
    """
    slices = [image / image.max() for image in prepare_slices(read_folder(list(paths)), level=1.0)]
    digest = hashlib.sha256()
    for image in slices:
        digest.update(f"{tuple(image.shape)}".encode())
        digest.update(image.half().numpy().tobytes())
    return SliceSet(slices, digest.hexdigest()[:12])


def draw_example(slices: SliceSet, simulation: Simulation, seed: int, index: int) -> Example:
    """Draw a training example; it depends on the arguments alone.

    Parameters
    ----------
    slices : SliceSet
        Where the image is drawn from.
    simulation : Simulation
        How it is measured.
    seed, index : int
        Of the training, and the number of the example in it.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, index))
    image = _augmented(slices.slices[_integer(len(slices), generator)], simulation, generator)
    height = image.shape[0]
    rows = slice(0, height)
    if simulation.rows < height and float(torch.rand((), generator=generator)) >= simulation.whole:
        start = _integer(height - simulation.rows + 1, generator)
        rows = slice(start, start + simulation.rows)
    return measure(image, simulation, rows, _FIRST_SEED + _integer(2**30, generator))


def measure(image: Tensor, simulation: Simulation, rows: slice, seed: int) -> Example:
    """Simulate the undersampled k-space of an image ``(H, W)`` with maximum 1, cut to some rows."""
    shape = (image.shape[0], image.shape[1])
    maps = random_smooth_maps(simulation.coils, shape, seed=seed)
    phase = smooth_phase(shape, seed=seed)
    target = image * maps.abs().square().sum(0).sqrt()
    kept = torch.polar(image[rows], phase[rows])
    kspace = simulate_kspace(kept, maps[:, rows], simulation.noise, seed=seed)
    part = (kspace.shape[-2], kspace.shape[-1])
    mask = make_mask(simulation.mask, part, simulation.acceleration, seed=seed)
    return Example(kspace * mask.mask, mask, target[rows], float(target.max()))


def validation_examples(slices: SliceSet, simulation: Simulation, count: int) -> list[Example]:
    """Whole slices at their own size, evenly spread over the set, each with its own coils, noise and mask."""
    count = min(count, len(slices))
    chosen = [round((number + 0.5) * len(slices) / count - 0.5) for number in range(count)]
    return [
        measure(slices.slices[index], simulation, slice(None), _FIRST_SEED + 2**30 + index)
        for index in chosen
    ]


def _augmented(image: Tensor, simulation: Simulation, generator: torch.Generator) -> Tensor:
    """A slice at another size, flipped, turned, zoomed, with another contrast; maximum 1, square pixels."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    low, high = simulation.widths
    # Even sizes: the unsampled columns of the mask are then where they are in the test.
    width = 2 * round(uniform(low, high) / 2)
    height = max(32, 2 * round(width * image.shape[0] / image.shape[1] / 2))
    angle = math.radians(uniform(-15, 15))
    zoom = math.exp(uniform(math.log(0.85), math.log(1.2)))
    stretch = uniform(0.95, 1.05)
    flips = [1.0 if uniform(0, 1) < 0.5 else -1.0 for _ in range(2)]
    cos, sin, aspect = math.cos(angle), math.sin(angle), height / width
    theta = torch.tensor(
        [
            [
                zoom * stretch * cos * flips[0],
                -zoom * stretch * sin * aspect * flips[1],
                uniform(-0.05, 0.05),
            ],
            [zoom / stretch * sin / aspect * flips[0], zoom / stretch * cos * flips[1], uniform(-0.05, 0.05)],
        ]
    )
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
    moved = F.grid_sample(image[None, None], grid, mode="bicubic", align_corners=False)[0, 0].clamp_min(0)
    # Contrast and brightness as `priors.mr_images.sample_patches` varies them.
    contrasted = moved ** math.exp(uniform(-0.3, 0.3))
    y = torch.linspace(-0.5, 0.5, height)[:, None]
    x = torch.linspace(-0.5, 0.5, width)
    bias = torch.zeros(height, width)
    for _ in range(6):
        along_y, along_x = (0.4 * float(torch.randn((), generator=generator)) for _ in range(2))
        bias += (2 * math.pi * (along_y * y + along_x * x) + uniform(0, 2 * math.pi)).cos() / math.sqrt(3)
    shaded = contrasted * (uniform(0, 0.4) * bias).exp()
    peak = float(shaded.max())
    return shaded / peak if peak > 0 else shaded


def _integer(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (1,), generator=generator))
