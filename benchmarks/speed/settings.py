"""What is measured on: the machine's side of it, and one slice with simulated coils."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import simulated_case
from benchmarks.speed.networks import Network
from operators.espirit import CalibrationWarning
from operators.masks import Mask, make_mask
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from recon.mri import SliceProblem, slice_problem
from recon.scale import Scale
from recon.solvers.base import KeyedNoise, Problem

NOISE = 0.005
"""Standard deviation of the simulated noise per real component, of the image's maximum."""

NiftiSlice = tuple[Path, int, tuple[int, int] | None]


@dataclass(frozen=True)
class Settings:
    """What the command line says, for all sections.

    Parameters
    ----------
    device
        Where it is computed.
    threads
        Numbers of threads; the first is that of every section but the overhead's, which goes through all.
    coils, virtual_coils
        Coils, and to how many they are compressed where that is compared.
    size
        Height and width of the slice.
    network
        Name or file.
    precisions
        Of the network; the first is that of every section but the overhead's, which goes through all.
    repetitions
        Rounds.
    nifti
        Slice that is scanned instead of nested ellipses.
    volume
        Slices, coils, height, width.
    samples
        Samples a slice of that volume.
    most
        Largest batch that is tried.
    psnr
        Quality in dB that is to be reached; none for distances from the best.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: tuple[int, ...] = (1,)
    coils: int = 15
    virtual_coils: int = 6
    size: int = 320
    network: str = "brain"
    precisions: tuple[str, ...] = ("fp32",)
    repetitions: int = 5
    nifti: NiftiSlice | None = None
    volume: tuple[int, int, int, int] = (4, 6, 192, 160)
    samples: int = 4
    most: int = 4
    psnr: tuple[float, ...] = ()

    @property
    def precision(self) -> str:
        """Of the network, in every section but the overhead's."""
        return self.precisions[0]


@dataclass(frozen=True, eq=False)
class Scan:
    """One slice as a scanner gives it, with the truth behind it.

    Attributes
    ----------
    truth : Tensor
        Magnitude ``(H, W)``, of a maximum of 1.
    kspace : Tensor
        ``(C, H, W)``, zero where the mask does not sample.
    mask : Mask
        Sampling mask.
    """

    truth: Tensor
    kspace: Tensor
    mask: Mask

    def problem(self, num_coils: int | None = None) -> SliceProblem:
        """The problem of the acquired data alone: maps from its calibration region, noise from its edge."""
        return quiet_problem(self.kspace, self.mask, num_coils)


def quiet_problem(kspace: Tensor, mask: Mask, num_coils: int | None = None) -> SliceProblem:
    """The problem of a slice, without a word on calibration regions, which are narrow in small images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return slice_problem(kspace, mask, num_coils=num_coils)


def phantom(shape: tuple[int, int]) -> Tensor:
    """Magnitude image ``(H, W)`` of nested ellipses, of a maximum of 1."""
    y, x = (torch.linspace(-1, 1, length) for length in shape)
    image = torch.zeros(shape)
    for radius_y, radius_x, value in (
        (0.85, 0.7, 0.5),
        (0.8, 0.65, -0.2),
        (0.5, 0.2, 0.25),
        (0.15, 0.5, 0.15),
    ):
        image += value * ((y[:, None] / radius_y) ** 2 + (x / radius_x) ** 2 < 1)
    return image / image.max()


def nifti_image(source: NiftiSlice, shape: tuple[int, int]) -> Tensor:
    """Magnitude image ``(H, W)`` of a slice of a NIfTI volume, cut or filled with zeros around its centre."""
    image = simulated_case(*source).targets["noise-free"]
    for axis in (0, 1):
        lacking = shape[axis] - image.shape[axis]
        before, after = lacking // 2, lacking - lacking // 2  # negative ones cut
        image = F.pad(image, (0, 0, before, after) if axis == 0 else (before, after))
    return image / image.max()


def scan(
    truth: Tensor, coils: int, device: torch.device, *, center_fraction: float | None = None, seed: int = 0
) -> Scan:
    """Scan a magnitude image: coils, phase and noise simulated, every fourth column and the central ones."""
    shape = (truth.shape[-2], truth.shape[-1])
    maps = random_smooth_maps(coils, shape, seed=seed)
    maps = maps / maps.abs().square().sum(0).sqrt()
    mask = make_mask("equispaced", shape, 4, center_fraction=center_fraction, seed=seed)
    image = torch.polar(truth, smooth_phase(shape, seed=seed))
    kspace = simulate_kspace(image, maps, NOISE, seed=seed) * mask.mask
    return Scan(truth, kspace.to(device), mask)


def scan_of(settings: Settings) -> Scan:
    """The slice that the settings name."""
    shape = (settings.size, settings.size)
    truth = phantom(shape) if settings.nifti is None else nifti_image(settings.nifti, shape)
    return scan(truth, settings.coils, settings.device)


def image_note(settings: Settings) -> str:
    """What was scanned, in words."""
    if settings.nifti is None:
        what = "nested ellipses"
    else:
        path, index, _ = settings.nifti
        what = f"slice {index} of {path.name}, a processed magnitude image"
    how = "equispaced columns, ×4 asked for"
    return f"scanned: {what}, {settings.size}², {settings.coils} simulated coils, {how}"


def solver_problem(problem: SliceProblem, network: Network) -> Problem:
    """The problem as a solver gets it: in the units of the prior."""
    scale = Scale.estimate(problem.y, problem.operator, network.prior.contract.level)
    return Problem(scale.apply(problem.y), problem.operator, problem.noise_std / scale.factor)


def noise_of(problem: Problem, batch: int = 1) -> KeyedNoise:
    """Noise of the first samples."""
    y = problem.y
    shape = tuple(problem.operator.domain_shape)
    return KeyedNoise(0, "benchmark", range(batch), shape, y.dtype, y.device)
