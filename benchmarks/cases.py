"""Test cases: fully sampled k-space, retrospective masks, and what a reconstruction is held against."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.espirit import CalibrationWarning, espirit_maps
from operators.fft import ifftc
from operators.masks import Mask, make_mask
from operators.mri import MulticoilMRI
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from recon.errors import ReconError
from recon.io.nifti import read_volume
from recon.mri import SliceProblem, calibration_region, slice_problem

NUM_COILS = 12
NOISE = 0.005  # standard deviation of simulated noise per real component, of the image's maximum
TARGET_CALIBRATION = 24  # side of the central square that the maps of the combined target come from
TARGETS = {
    "rss": "root sum of squares of the fully sampled coil images, noise and all (the target of fastMRI)",
    "combined": "magnitude of the fully sampled coil images combined with ESPIRiT maps, |Σ conj(s) x|; these "
    "maps come from the central 24 × 24 of the fully sampled data and serve the target only",
    "noise-free": "root sum of squares of the simulated coil images before noise was added; it exists for "
    "simulated cases only",
}


@dataclass(frozen=True, eq=False)
class Case:
    """One slice with fully sampled k-space.

    Attributes
    ----------
    name : str
        What a table calls it; also the seed of its masks.
    kspace : Tensor
        Complex64 ``(C, H, W)``, centred.
    targets : dict of str to Tensor
        Magnitude images ``(H, W)`` in the units of `kspace`, by the names in `TARGETS`; ``noise-free`` for
        simulated cases only.
    """

    name: str
    kspace: Tensor
    targets: dict[str, Tensor]

    @property
    def simulated(self) -> bool:
        """Whether coils, phase and noise were put on a processed magnitude image."""
        return "noise-free" in self.targets

    @property
    def empty(self) -> bool:
        """Whether nothing was measured: targets are zero, and so is what any method makes of it."""
        return not bool(self.kspace.any())


@dataclass(frozen=True, eq=False)
class Scenario:
    """A case seen through a mask: what every method is given, and nothing else.

    Attributes
    ----------
    case : Case
        Where the targets are.
    mask : Mask
        With its realised acceleration.
    asked : float
        Acceleration that was asked for.
    problem : SliceProblem
        Undersampled data, and an operator whose maps come from the calibration region.
    maps : Tensor
        The same maps before they are cropped, complex64 ``(C, H, W)``, nowhere zero.
    cropped_maps : Tensor
        Those of the operator: zero where ESPIRiT's eigenvalue is low.
    calibration : tuple of int
        Rows and columns of the calibration region.
    """

    case: Case
    mask: Mask
    asked: float
    problem: SliceProblem
    maps: Tensor
    cropped_maps: Tensor
    calibration: tuple[int, int]


def make_case(name: str, kspace: Tensor, noise_free: Tensor | None = None) -> Case:
    """Compute the targets of fully sampled k-space ``(C, H, W)``; `noise_free` is the image behind them.

    Of k-space that is all zeros, as some slices of fastMRI's volumes are, they are zero.

    Raises
    ------
    ReconError
        If k-space is too small for the maps of the combined target.
    """
    height, width = kspace.shape[-2:]
    if min(height, width) < TARGET_CALIBRATION:
        raise ReconError(
            f"{name}: k-space is {height} × {width}, at least {TARGET_CALIBRATION} each way are needed"
        )
    images = ifftc(kspace)
    top, left = height // 2 - TARGET_CALIBRATION // 2, width // 2 - TARGET_CALIBRATION // 2
    centre = (slice(top, top + TARGET_CALIBRATION), slice(left, left + TARGET_CALIBRATION))
    rss = images.abs().square().sum(0).sqrt()
    # Zeros have no maps.
    maps = espirit_maps(kspace, centre, crop=0.0) if bool(kspace.any()) else torch.zeros_like(kspace)
    targets = {"rss": rss, "combined": (maps.conj() * images).sum(0).abs()}
    return Case(name, kspace, targets if noise_free is None else targets | {"noise-free": noise_free})


def measured_case(path: Path) -> Case:
    """Read a fully sampled Cartesian slice in BART's layout (dimensions 0 read, 1 and 2 phase, 3 coil).

    One of the first three dimensions is 1; the next is the readout H, the last one the phase encoding W.

    Raises
    ------
    ReconError
        Naming the file, if it is missing, damaged, or no multi-coil slice.
    """
    array = read_cfl(path)
    dims = array.shape
    encoded = [axis for axis in range(3) if dims[axis] > 1]
    if len(encoded) != 2 or dims[3] < 2 or max(dims[4:], default=1) > 1:
        raise ReconError(
            f"{path}: a multi-coil slice has two image dimensions and coils in the fourth, got {dims}"
        )
    if not array.any():
        raise ReconError(f"{path}: k-space is all zeros")
    kspace = np.ascontiguousarray(
        array.reshape(*(dims[axis] for axis in encoded), dims[3]).transpose(2, 0, 1)
    )
    return make_case(f"{path.stem}, measured, {dims[3]} coils", torch.from_numpy(kspace))


def read_cfl(path: Path) -> np.ndarray:
    """Read BART's ``.cfl`` with its ``.hdr``: text dimensions, then complex64 in column-major order.

    Returns
    -------
    ndarray
        Complex64 with the dimensions of the header, at least four.

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it.
    """
    header, data = path.with_suffix(".hdr"), path.with_suffix(".cfl")
    try:
        lines = header.read_text().splitlines()
        values = np.fromfile(data, dtype="<c8")
    except FileNotFoundError as error:
        raise ReconError(f"{error.filename}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReconError(f"{path}: cannot be read: {error}") from None
    texts = [line for line in lines if line.strip() and not line.startswith("#")]
    try:
        dims = tuple(int(text) for text in texts[0].split())
    except (IndexError, ValueError):
        raise ReconError(f"{header}: a line with the dimensions is missing") from None
    if values.size != np.prod(dims, dtype=np.int64) or not dims:
        raise ReconError(f"{data}: {values.size} values, but the header's dimensions are {dims}")
    return values.reshape(dims + (1,) * (4 - len(dims)), order="F")


def simulated_case(path: Path, index: int, crop: tuple[int, int] | None = None) -> Case:
    """Make k-space of one slice of a NIfTI volume of magnitudes: coils, smooth phase and noise are simulated.

    Parameters
    ----------
    path : Path
        Volume, as `recon.io.nifti.read_volume` reads it.
    index : int
        Slice, which also seeds coils, phase and noise.
    crop : tuple of int, optional
        Height and width of the centre that is kept.

    Raises
    ------
    ReconError
        Naming the file, if there is no such slice, it is empty, or smaller than the crop.
    """
    return simulate(nifti_name(path, index), nifti_slice(path, index, crop), seed=index)


def nifti_name(path: Path, index: int) -> str:
    """What a table calls a slice of a NIfTI volume."""
    return f"{path.name.removesuffix('.gz').removesuffix('.nii')}, slice {index}"


def nifti_slice(path: Path, index: int, crop: tuple[int, int] | None = None) -> Tensor:
    """Read a slice of a NIfTI volume as magnitudes ``(H, W)`` of maximum 1; arguments of `simulated_case`.

    Raises
    ------
    ReconError
        Naming the file, if there is no such slice, it is empty, or smaller than the crop.
    """
    volume = read_volume(path)
    if not 0 <= index < len(volume):
        raise ReconError(f"{path}: there is no slice {index}, the volume has {len(volume)}")
    image = volume[index]
    if crop is not None:
        if crop[0] > image.shape[0] or crop[1] > image.shape[1]:
            raise ReconError(f"{path}: slices of {tuple(image.shape)} cannot be cropped to {crop}")
        top, left = ((size - part) // 2 for size, part in zip(image.shape, crop, strict=True))
        image = image[top : top + crop[0], left : left + crop[1]]
    if not float(image.max()) > 0:
        raise ReconError(f"{path}: slice {index} is empty")
    return image / image.max()


def simulate(name: str, image: Tensor, seed: int) -> Case:
    """Put coils, smooth phase and noise on an image ``(H, W)`` of magnitudes whose maximum is 1."""
    shape = (image.shape[0], image.shape[1])
    maps = random_smooth_maps(NUM_COILS, shape, seed=seed)
    kspace = simulate_kspace(torch.polar(image, smooth_phase(shape, seed=seed)), maps, NOISE, seed=seed)
    return make_case(name, kspace, noise_free=image * maps.abs().square().sum(0).sqrt())


def nifti_argument(text: str) -> tuple[Path, int, tuple[int, int] | None]:
    """Take ``FILE:SLICE`` or ``FILE:SLICE:HEIGHTxWIDTH`` apart: the arguments of `simulated_case`."""
    parts = text.split(":")
    try:
        if len(parts) == 3:
            height, width = (int(size) for size in parts.pop().split("x"))
            crop: tuple[int, int] | None = (height, width)
        else:
            crop = None
        file, index = parts
        return Path(file), int(index), crop
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE:SLICE or FILE:SLICE:HEIGHTxWIDTH") from None


def mask_argument(text: str) -> tuple[str, float]:
    """Take ``KIND:ACCELERATION`` apart, such as ``poisson:8``."""
    kind, _, acceleration = text.partition(":")
    try:
        if not kind or not float(acceleration) >= 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:ACCELERATION, such as poisson:8") from None
    return kind, float(acceleration)


def make_scenario(case: Case, kind: str, acceleration: float, mask: Mask | None = None) -> Scenario:
    """Undersample a case; the maps see its calibration region only.

    Parameters
    ----------
    case : Case
        Fully sampled slice.
    kind, acceleration : str, float
        Of the mask.
    mask : Mask, optional
        That mask, where several slices share it; else it is drawn, seeded by the case's name.

    Raises
    ------
    ReconError
        Naming the case and the mask, if the mask cannot be drawn or leaves no calibration region.
    """
    shape = (case.kspace.shape[-2], case.kspace.shape[-1])
    try:
        if mask is None:
            mask = make_mask(kind, shape, acceleration, seed=case.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # the table shows the size of the region
            problem = slice_problem(case.kspace, mask)
            region = calibration_region(mask, shape)
            full = espirit_maps(problem.y, region, noise_std=problem.noise_std, crop=0.0)
    except (OperatorError, ReconError) as error:
        raise ReconError(f"{case.name}, {kind} ×{acceleration:g}: {error}") from None
    assert isinstance(problem.operator, MulticoilMRI)
    calibration = (region[0].stop - region[0].start, region[1].stop - region[1].start)
    return Scenario(case, mask, acceleration, problem, full, problem.operator.maps, calibration)
