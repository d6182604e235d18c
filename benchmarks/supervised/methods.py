"""The supervised networks as methods of the benchmark.

As published, both give root-sum-of-squares images, of fastMRI's kind. Against a target without the noise of
all coils that is a handicap, which no training takes from a VarNet (see `VarNetOutput.combined`); so for such
targets its coil images are combined with its own sensitivities. The U-Net learns what its target is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Scenario
from benchmarks.matrix.base import Reconstruction
from benchmarks.supervised.networks import (
    UNetConfiguration,
    VarNetConfiguration,
    Weights,
    load_network,
    read_weights,
)
from operators.fft import ifftc
from operators.masks import Mask
from recon.errors import ReconError

CALIBRATIONS = ("block", "columns")
PUBLISHED_LIMIT = 6.0
"""Published U-Nets take normalised images that are cut at this many standard deviations."""


class VarNetMethod:
    """E2E-VarNet.

    Parameters
    ----------
    weights : Path
        File that `read_weights` reads: this package's trainer's, or a published one.
    name : str
        What a table calls it.
    calibration : str
        What coil sensitivities are estimated from under a mask of samples, which is fully sampled in a block
        only: this ``block``, or all rows of its ``columns``, most of which are undersampled. Under a mask of
        columns there is no difference.
    device : str
        Where the network runs.

    Raises
    ------
    ReconError
        If the file cannot be read, is another network's, or `fastmri` is not installed.
    """

    needs_seed = False

    def __init__(
        self, weights: Path, name: str = "varnet", calibration: str = "block", device: str = "cpu"
    ) -> None:
        if calibration not in CALIBRATIONS:
            raise ReconError(f"calibration is {' or '.join(CALIBRATIONS)}, not {calibration!r}")
        read = read_weights(weights)
        if not isinstance(read.configuration, VarNetConfiguration):
            raise ReconError(f"{weights} holds a U-Net, not a VarNet")
        self.name, self.calibration, self.device = name, calibration, device
        self.network = load_network(read, weights).to(device)
        size = read.configuration
        part = "the sampled block" if calibration == "block" else "all rows of the sampled block's columns"
        self.settings = (
            f"fastmri VarNet, {size.num_cascades} cascades of {size.chans} channels and {size.pools} levels, "
            f"sensitivities {size.sens_chans} and {size.sens_pools}; {_origin(read)}; num_low_frequencies "
            f"from the mask, under masks of samples sensitivities from {part}; its root sum of squares "
            "for the target rss, for others its coil images combined with its own sensitivities"
        )

    def reconstruct(self, case: Scenario, seed: int) -> Reconstruction:
        """Run the network once."""
        with torch.no_grad():
            y = case.problem.y.to(self.device)
            output = run_varnet(self.network, y, case.mask, self.calibration)
        rss, combined = output.rss.cpu(), output.combined.cpu()
        images = {target: rss if target == "rss" else combined for target in case.case.targets}
        return Reconstruction(rss, nfe=1, per_target=images)


class UNetMethod:
    """U-Net of the zero-filled root-sum-of-squares image.

    Parameters
    ----------
    weights : Path
        File that `read_weights` reads: this package's trainer's, or a published one.
    name : str
        What a table calls it.
    device : str
        Where the network runs.

    Raises
    ------
    ReconError
        If the file cannot be read, is another network's, or `fastmri` is not installed.
    """

    needs_seed = False

    def __init__(self, weights: Path, name: str = "unet", device: str = "cpu") -> None:
        read = read_weights(weights)
        if not isinstance(read.configuration, UNetConfiguration):
            raise ReconError(f"{weights} holds a VarNet, not a U-Net")
        self.name, self.device = name, device
        self.network = load_network(read, weights).to(device)
        self.limit = None if read.training else PUBLISHED_LIMIT
        size = read.configuration
        cut = "" if self.limit is None else f", cut at {self.limit:g} standard deviations"
        self.settings = (
            f"fastmri U-Net, {size.chans} channels, {size.num_pool_layers} levels; {_origin(read)}; of the "
            f"zero-filled root sum of squares{cut}, whatever the target"
        )

    def reconstruct(self, case: Scenario, seed: int) -> Reconstruction:
        """Run the network once."""
        with torch.no_grad():
            image = unet_image(self.network, case.problem.zero_filled.to(self.device), self.limit)
        return Reconstruction(image.clamp_min(0).cpu(), nfe=1)


def _origin(weights: Weights) -> str:
    """Where weights are from; of what is published, print that a comparison with it is not fair."""
    training: Any = weights.training
    if training:
        simulation = training["simulation"]
        return (
            f"weights {weights.digest}, trained {_steps(training)} of "
            f"{training['batch']} on {training['slices']} slices with {simulation['coils']} simulated coils, "
            f"{simulation['mask']} ×{simulation['acceleration']:g}, {training['loss']} against the "
            f"{training['target']}"
        )
    if not weights.published:
        return f"weights {weights.digest}, of unknown training"
    if isinstance(weights.configuration, VarNetConfiguration):
        warning = (
            "the released VarNet was trained on fastMRI's training AND validation sets: its scores on the "
            "latter check the pipeline and are no fair comparison"
        )
    else:
        warning = (
            "what the released U-Net was trained on is not in the file: its scores on fastMRI's training and "
            "validation sets may be no fair comparison"
        )
    print(f"warning: {warning}", file=sys.stderr)
    return f"weights {weights.digest}, of the published size; {warning}"


def _steps(training: Mapping[str, Any]) -> str:
    """How long a network was trained, and one that it started from before."""
    done, asked = training["step"], training["steps"]
    text = f"{done} steps" if done == asked else f"{done} of {asked} steps"
    before = training.get("initial", {})
    return f"{_steps(before)} and then {text}" if "step" in before else text


def unet_image(network: nn.Module, zero_filled: Tensor, limit: float | None = None) -> Tensor:
    """U-Net of a magnitude image, normalised to mean 0 and standard deviation 1 and back.

    Parameters
    ----------
    network : nn.Module
        ``fastmri.models.Unet`` of one channel.
    zero_filled : Tensor
        Root sum of squares of the zero-filled coil images, float32 ``(H, W)``.
    limit : float, optional
        Largest magnitude of normalised values; what is beyond is cut, as for the published networks.

    Returns
    -------
    Tensor
        Float32 ``(H, W)`` in the units of the input; zeros for an image of one value, zeros for example.
    """
    mean, std = zero_filled.mean(), zero_filled.std()
    if not std > 0:
        return torch.zeros_like(zero_filled)
    normalised = (zero_filled - mean) / std
    if limit is not None:
        normalised = normalised.clamp(-limit, limit)
    return network(normalised[None, None])[0, 0].float() * std + mean


@dataclass(frozen=True, eq=False)
class VarNetOutput:
    """What a VarNet makes of a slice, in the units of k-space.

    Attributes
    ----------
    coil_images : Tensor
        Complex64 ``(C, H, W)``.
    maps : Tensor
        The network's coil sensitivities, complex64 ``(C, H, W)``; their root sum of squares is 1.
    """

    coil_images: Tensor
    maps: Tensor

    @property
    def rss(self) -> Tensor:
        """Root sum of squares of the coil images ``(H, W)``: the output of `fastmri.models.VarNet`."""
        return self.coil_images.abs().square().sum(0).sqrt()

    @property
    def combined(self) -> Tensor:
        """Coil images combined with the maps, ``|Σ conj(s) x|``, ``(H, W)``.

        The cascades correct along the maps only. What noise the acquired samples have besides stays in the
        coil images, is a floor under their root sum of squares, and is left out here.
        """
        return (self.maps.conj() * self.coil_images).sum(0).abs()


def run_varnet(network: nn.Module, kspace: Tensor, mask: Mask, calibration: str = "block") -> VarNetOutput:
    """Run a VarNet on undersampled k-space.

    The steps of ``fastmri.models.VarNet.forward``, but that coil sensitivities can be estimated from a block.
    For a mask of columns the root sum of squares is what `forward` gives with the mask's number of low
    frequencies. The soft data consistency of a cascade takes any mask.

    Parameters
    ----------
    network : nn.Module
        ``fastmri.models.VarNet``.
    kspace : Tensor
        Complex64 ``(C, H, W)``, zero where nothing was sampled.
    mask : Mask
        What was sampled.
    calibration : str
        See `VarNetMethod`.

    Returns
    -------
    VarNetOutput
        Coils without any signal are left out; if there is none with, one of zeros is returned.

    Raises
    ------
    ReconError
        If the mask has no fully sampled centre.
    """
    # Of a coil without a signal the network would make NaN, as it divides by the standard deviation.
    kept = kspace[kspace.abs().amax((-2, -1)) > 0]
    if len(kept) == 0:
        return VarNetOutput(torch.zeros_like(kspace[:1]), torch.zeros_like(kspace[:1]))
    samples = mask.mask[None, None, :, :, None].to(kspace.device)
    measured = torch.view_as_real(kept)[None].contiguous()
    count, _ = low_frequencies(mask, kspace.shape[-1])
    region = torch.view_as_real(calibration_data(kept, mask, calibration))[None].contiguous()
    maps = network.sens_net(region, samples, count)  # type: ignore[operator]
    current = measured.clone()
    for cascade in network.cascades:  # type: ignore[union-attr]
        current = cascade(current, measured, samples, maps)
    images = ifftc(torch.view_as_complex(current[0].contiguous()))
    return VarNetOutput(images, torch.view_as_complex(maps[0].contiguous()))


def calibration_data(kspace: Tensor, mask: Mask, calibration: str = "block") -> Tensor:
    """K-space ``(C, H, W)`` that sensitivities are estimated from, zero elsewhere; see `VarNetMethod`."""
    count, rows = low_frequencies(mask, kspace.shape[-1])
    start = (kspace.shape[-1] - count + 1) // 2
    # Above and below a block the same columns are undersampled and would alias.
    part = (
        ...,
        slice(None) if rows is None or calibration == "columns" else rows,
        slice(start, start + count),
    )
    region = torch.zeros_like(kspace)
    region[part] = kspace[part]
    return region


def low_frequencies(mask: Mask, width: int) -> tuple[int, slice | None]:
    """Number of columns about the centre that are fully sampled, as fastMRI counts them, and in which rows.

    Returns
    -------
    columns : int
        The network takes ``[(W − n + 1) // 2, (W − n + 1) // 2 + n)``; the largest n for which these are all
        in the mask's calibration region.
    rows : slice or None
        ``None`` for all of them.

    Raises
    ------
    ReconError
        If there is no such region.
    """
    rows, region = mask.acs if isinstance(mask.acs, tuple) else (None, mask.acs)
    if region is not None:
        for count in range(region.stop - region.start, 0, -1):
            start = (width - count + 1) // 2
            if region.start <= start and start + count <= region.stop:
                return count, rows
    raise ReconError(f"the {mask.name} mask has no fully sampled centre, from which VarNet takes the coils")
