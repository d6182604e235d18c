"""From a fastMRI file to a reconstruction with its uncertainty: mask, maps, noise level, sampling, output."""

from __future__ import annotations

import math
import statistics
import warnings as python_warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.base import LinearOperator
from operators.coil_compression import compress_coils
from operators.errors import OperatorError
from operators.espirit import espirit_maps
from operators.fft import ifftc
from operators.masks import Mask, make_mask, mask_from_array, mask_from_kspace
from operators.mri import CoilwiseMRI, MulticoilMRI, SinglecoilMRI
from priors.base import ScorePrior
from priors.errors import PriorError
from recon.calibration import Calibration
from recon.errors import ReconError
from recon.io.fastmri import EmptySliceError, FastMRIFile, ReconstructionWriter, centre_crop, crop_readout
from recon.noise import kspace_noise_std, live_coils, with_noise_floor
from recon.nullspace import split_posterior
from recon.posterior import Posterior
from recon.provenance import common_facts, slice_facts
from recon.sampling import NOT_CALIBRATED, reconstruct
from recon.solvers.base import Solver
from recon.summary import summarise

CALIBRATION_ROWS = 48
"""Rows of a calibration region of whole columns that are used: the middle ones, which hold the signal."""


@dataclass(frozen=True)
class MRISettings:
    """What is asked of :func:`reconstruct_file`.

    Parameters
    ----------
    mask
        Kind of retrospective mask (:func:`operators.make_mask`); ``None`` takes the data as acquired.
    acceleration, center_fraction
        Of that mask.
    num_samples, seed
        Posterior samples a slice, and the seed of their noise. The mask does not depend on the seed but on
        the file's name: one mask a volume, the same in every run.
    noise_std
        Per real component, in the units of k-space; estimated for every slice if not given.
    num_coils
        Compress to this many virtual coils if there are more; ``None`` keeps all.
    keep_samples
        Write the samples too.
    anatomy
        What the images show; read off the file's ``acquisition`` if not given.
    coil_by_coil
        Reconstruct every coil on its own, without maps; images are then the root sum of squares.
    calibration
        Brings the standard deviation to where the data it was learned from put it; without one it is that of
        the samples.
    split
        Split the mean into what the data determine and what the prior filled in, for a figure.
    noise_floor
        Add to the image what noise adds to a root sum of squares (:func:`recon.noise.with_noise_floor`), to
        be held to targets that have it, as those of fastMRI do.

    Raises
    ------
    ReconError
        If a number is out of its range.
    """

    mask: str | None = None
    acceleration: float = 4.0
    center_fraction: float | None = None
    num_samples: int = 8
    seed: int = 0
    noise_std: float | None = None
    num_coils: int | None = None
    keep_samples: bool = False
    anatomy: str | None = None
    coil_by_coil: bool = False
    calibration: Calibration | None = None
    split: bool = False
    noise_floor: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_coils"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ReconError(f"{name} must be at least 1, got {value}")
        if self.noise_std is not None and not 0 < self.noise_std < math.inf:
            raise ReconError(f"noise_std must be positive and finite, got {self.noise_std}")
        if self.mask is not None and not 1 < self.acceleration < math.inf:
            raise ReconError(f"the acceleration of a mask must be a number above 1, got {self.acceleration}")
        if self.center_fraction is not None and not 0 <= self.center_fraction < 1:
            raise ReconError(f"center_fraction must be at least 0 and below 1, got {self.center_fraction}")


@dataclass(frozen=True)
class SliceProblem:
    """One slice, ready for a solver.

    Parameters
    ----------
    y
        Acquired k-space, ``(C, H, W)``, or ``(H, W)`` for a single coil; zero where nothing was acquired.
    operator
        Forward operator with maps from the calibration region.
    noise_std
        Per real component.
    zero_filled
        Root sum of squares of the zero-filled coil images, ``(H, W)``.
    """

    y: Tensor
    operator: LinearOperator
    noise_std: float
    zero_filled: Tensor


@dataclass(frozen=True)
class SliceResult:
    """What a figure needs of one slice; everything cropped to the file's target shape.

    Parameters
    ----------
    index
        Slice of the file.
    mean, std, zero_filled
        ``(h, w)``, real.
    mask
        ``(1, W)`` or ``(H, W)``.
    target
        ``(h, w)``, or ``None`` where the file has none.
    summary
        Of :func:`recon.summary.summarise`.
    samples
        Magnitudes ``(n, h, w)``, where they were kept or the split was asked for.
    parts
        Magnitudes ``(h, w)`` of the measured and the invented part of the mean, where the split was asked for
        and the operator is of one image.
    """

    index: int
    mean: Tensor
    std: Tensor
    zero_filled: Tensor
    mask: Tensor
    target: Tensor | None
    summary: dict[str, Any]
    samples: Tensor | None
    parts: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Sampling:
    """What of its k-space a file holds, and what of that is used.

    Parameters
    ----------
    mask
        Sampling mask of the volume: what any of its slices holds, or a retrospective one.
    measured
        For every slice what of it holds measurements, bool: columns ``(W,)``, or, where whole columns were
        not sampled, samples ``(H, W)``; ``None`` for an empty slice.
    height
        Rows that are left of k-space when the readout oversampling is cropped.
    """

    mask: Mask
    measured: tuple[Tensor | None, ...]
    height: int


def find_sampling(file: FastMRIFile, settings: MRISettings) -> Sampling:
    """Find the mask of a volume: the acquired one, or the one asked for, which the file's name seeds.

    Reads the file through once, so that a NaN in the last slice is found before the first is reconstructed.

    Raises
    ------
    ReconError
        If a slice holds NaN, or all of them nothing; if a retrospective mask is asked for on data that are
        undersampled already, or cannot be drawn.
    """
    measured: list[Tensor | None] = []
    for index in range(file.num_slices):
        try:
            read = file.read_slice(index)
            measured.append((read.kspace != 0).any(0) & read.measured)
        except EmptySliceError:
            measured.append(None)
    held = [samples for samples in measured if samples is not None]
    if not held:
        raise ReconError(f"{file.path}: dataset 'kspace' is all zeros")
    valid = file.valid_columns
    try:
        acquired = mask_from_kspace(torch.stack(held), name="acquired", valid_columns=valid)
        # Masks of samples that differ between slices may together fill whole columns, and in a slice that
        # hardly shows anything samples of whole columns may be zero: what most slices look like counts.
        whole = [len(mask_from_kspace(samples).mask) == 1 for samples in held]
        in_columns = len(acquired.mask) == 1 and 2 * sum(whole) >= len(whole)
        if in_columns:
            measured = [None if samples is None else samples.any(0) for samples in measured]
        if settings.mask is None:
            # Cropping the readout mixes the rows of k-space, so it needs every row of a sampled column.
            height = file.readout_height if in_columns else file.shape[0]
            return Sampling(acquired, tuple(measured), height)
        if file.mask is not None or acquired.acceleration > 1 or not in_columns:
            found = "dataset 'mask'" if file.mask is not None else "samples of 'kspace' are zero"
            raise ReconError(f"{file.path}: the data are undersampled already ({found}): leave out the mask")
        drawn = make_mask(
            settings.mask,
            (file.readout_height, file.shape[1]),
            settings.acceleration,
            center_fraction=settings.center_fraction,
            seed=file.stem,
            valid_columns=valid,
        )
    except OperatorError as error:
        raise ReconError(f"{file.path}: {error}") from None
    return Sampling(drawn, tuple(measured), file.readout_height)


def calibration_region(mask: Mask, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that the coil maps are calibrated on.

    Raises
    ------
    ReconError
        If the mask leaves no fully sampled centre.
    """
    height, width = shape
    if mask.acs is None:
        raise ReconError(
            "no calibration region: the centre of k-space is not fully sampled, so there are no coil maps"
        )
    if isinstance(mask.acs, slice):
        rows = min(CALIBRATION_ROWS, height)
        top = height // 2 - rows // 2
        row_slice, column_slice = slice(top, top + rows), mask.acs
    else:
        row_slice, column_slice = mask.acs
    columns = column_slice.stop - column_slice.start
    if columns > CALIBRATION_ROWS:  # fully sampled data: the middle is enough
        left = width // 2 - CALIBRATION_ROWS // 2
        left = min(max(left, column_slice.start), column_slice.stop - CALIBRATION_ROWS)
        column_slice = slice(left, left + CALIBRATION_ROWS)
    return row_slice, column_slice


def slice_problem(
    kspace: Tensor,
    mask: Mask,
    *,
    multicoil: bool = True,
    noise_std: float | None = None,
    num_coils: int | None = None,
    coil_by_coil: bool = False,
) -> SliceProblem:
    """Make the inverse problem of one slice from its k-space; nothing outside the mask is looked at.

    Parameters
    ----------
    kspace
        ``(C, H, W)``, complex.
    mask
        Sampling mask.
    multicoil
        Estimate coil maps (ESPIRiT); otherwise ``C`` is 1 and there are none.
    noise_std
        Per real component; estimated if not given.
    num_coils
        Compress to this many virtual coils.
    coil_by_coil
        No maps: the operator's images are those of the coils.

    Raises
    ------
    ReconError
        If there is no calibration region, or it is too narrow.
    """
    y = kspace * mask.mask.to(kspace.device)
    if noise_std is None:
        noise_std = kspace_noise_std(y, mask.mask)
    zero_filled = ifftc(y).abs().square().sum(0).sqrt()
    if not multicoil:
        return SliceProblem(y[0], SinglecoilMRI(mask.mask.to(y.device), y.shape[-2:]), noise_std, zero_filled)
    shape = (y.shape[-2], y.shape[-1])
    try:
        if num_coils is not None and num_coils < len(y):
            y = compress_coils(y, num_coils, calibration_region(mask, shape))[0]
        if coil_by_coil:
            coilwise = CoilwiseMRI(len(y), mask.mask.to(y.device), shape)
            return SliceProblem(y, coilwise, noise_std, zero_filled)
        maps = espirit_maps(y, calibration_region(mask, shape), noise_std=noise_std)
    except OperatorError as error:
        raise ReconError(str(error)) from None
    return SliceProblem(y, MulticoilMRI(maps, mask.mask.to(y.device)), noise_std, zero_filled)


def anatomy_of(acquisition: str | None) -> str | None:
    """Anatomy of a fastMRI acquisition: ``AX...`` sequences are brains, ``COR...`` ones knees."""
    if acquisition is None:
        return None
    if acquisition.upper().startswith("AX"):
        return "brain"
    return "knee" if acquisition.upper().startswith("COR") else None


def calibrated_settings(settings: MRISettings, prior_facts: dict[str, Any] | None) -> dict[str, Any]:
    """What a calibration depends on besides prior, solver and number of samples, as far as it is known."""
    found: dict[str, Any] = {"num_coils": settings.num_coils, "coil_by_coil": settings.coil_by_coil}
    if settings.mask is not None:
        found["center_fraction"] = settings.center_fraction
    if prior_facts is not None and "precision" in prior_facts:
        found["precision"] = prior_facts["precision"]
        found["prior_config"] = prior_facts.get("config_sha256")
    return found


def reconstruct_file(
    source: Path,
    out: Path,
    prior: ScorePrior | None,
    solver: Solver,
    settings: MRISettings,
    *,
    prior_facts: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    on_progress: Callable[[float, int], None] | None = None,
    on_slice: Callable[[SliceResult], None] | None = None,
) -> dict[str, Any]:
    """Reconstruct every slice of a fastMRI file and write ``out`` in one piece.

    Parameters
    ----------
    source, out
        Input and output file.
    prior, solver, settings
        With what, and how.
    prior_facts
        Name and hash of the prior, for provenance.
    device
        Where to compute.
    on_progress
        Called with ``(slices done, slices in all)``, the first with its fraction.
    on_slice
        Called with every finished slice that is not empty.

    Returns
    -------
    dict
        The provenance that was written.

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it; nothing is written then.
    """
    if prior is not None and prior.contract.unit != "level":
        raise ReconError(
            f"prior {prior.contract.name!r} knows images in the unit {prior.contract.unit!r}, which MR "
            "images do not have"
        )
    with FastMRIFile(source) as file:
        sampling = find_sampling(file, settings)
        mask, masks = sampling.mask, _masks_of_slices(file, sampling)
        if file.multicoil and not (settings.coil_by_coil and settings.num_coils is None):
            try:
                calibration_region(mask, (sampling.height, file.shape[1]))
            except ReconError as error:
                raise ReconError(f"{source}: {error}") from None
        if settings.calibration is not None:
            sha256 = None if prior_facts is None else prior_facts.get("sha256")
            asked = calibrated_settings(settings, prior_facts)
            settings.calibration.check(sha256, solver, settings.num_samples, asked)
            for item in filter(None, masks):  # before hours of work
                settings.calibration.factor(item.name, item.acceleration)
        notes = _anatomy_notes(file, prior, settings)
        num_samples = settings.num_samples if solver.needs.prior else 1
        provenance = {
            **common_facts(solver, prior, prior_facts, device),
            **_provenance(file, settings, mask, [item for item in masks if item is not None]),
            "num_samples": num_samples,
        }
        kept = num_samples if settings.keep_samples else 0
        with ReconstructionWriter(
            out, file.num_slices, file.target_shape, provenance, num_samples=kept
        ) as writer:
            slices = []
            for index, (measured, slice_mask) in enumerate(zip(sampling.measured, masks, strict=True)):

                def report(done: int, total: int, index: int = index) -> None:
                    if on_progress is not None:
                        on_progress(index + done / total, file.num_slices)

                if measured is None or slice_mask is None:
                    notes.append(f"slice {index} holds no measurement: its reconstruction is zero")
                    blank = torch.zeros(file.target_shape)
                    samples = torch.zeros(kept, *file.target_shape, dtype=torch.complex64) if kept else None
                    writer.write_slice(index, blank, blank, samples)
                    report(1, 1)
                    continue
                if slice_mask is not mask:
                    notes.append(
                        f"slice {index} lacks columns that its volume has: they are not used for it"
                        if measured.ndim == 1
                        else "the samples differ between slices: each slice is reconstructed from its own"
                    )
                try:
                    kspace = crop_readout(file.read_slice(index).kspace, sampling.height)
                    with python_warnings.catch_warnings(record=True) as caught:
                        python_warnings.simplefilter("always")
                        problem = slice_problem(
                            kspace.to(device),
                            slice_mask,
                            multicoil=file.multicoil,
                            noise_std=settings.noise_std,
                            num_coils=settings.num_coils,
                            coil_by_coil=settings.coil_by_coil,
                        )
                        posterior = reconstruct(
                            problem.y,
                            problem.operator,
                            prior,
                            solver,
                            settings.num_samples,
                            settings.seed,
                            noise_std=problem.noise_std,
                            key=f"{file.stem}/{index}",
                            keep_samples=settings.keep_samples or settings.split,
                            on_progress=report,
                        )
                        posterior = _calibrated(posterior, settings.calibration, slice_mask)
                except (OperatorError, PriorError, ReconError) as error:
                    where = "" if str(error).startswith(str(source)) else f"{source}: slice {index}: "
                    raise ReconError(f"{where}{error}") from None
                notes.extend(str(item.message) for item in caught)
                notes.extend(posterior.warnings)
                facts = {**slice_facts(index, posterior), "phase": posterior.scale.phase}
                slices.append(facts if slice_mask is mask else {**facts, **_mask_facts(slice_mask)})

                def crop(image: Tensor) -> Tensor:
                    return centre_crop(image.cpu(), file.target_shape)

                mean, std = crop(posterior.mean.abs()), crop(posterior.std)
                if settings.noise_floor:
                    coils = int(live_coils(kspace * slice_mask.mask).sum())
                    # Columns that only pad k-space bring no noise into an image.
                    share = (file.valid_columns[1] - file.valid_columns[0]) / file.shape[1]
                    mean = with_noise_floor(mean, problem.noise_std * math.sqrt(share), coils)
                drawn = crop(posterior.samples) if posterior.samples is not None else None
                writer.write_slice(index, mean, std, drawn if kept else None)
                if on_slice is not None:
                    parts = None
                    if settings.split and tuple(posterior.mean.shape) == problem.operator.domain_shape:
                        level = 1.0 if prior is None else prior.contract.level
                        split = split_posterior(replace(posterior, samples=None), problem.operator, level)
                        parts = crop(split.measured.abs()), crop(split.invented.abs())
                    on_slice(
                        SliceResult(
                            index,
                            mean,
                            std,
                            crop(problem.zero_filled),
                            slice_mask.mask,
                            file.read_target(index),
                            _summary(posterior, mean, std, settings.calibration),
                            None if drawn is None else drawn.abs(),
                            parts,
                        )
                    )
            writer.provenance["slices"] = slices
            writer.provenance["warnings"] = list(dict.fromkeys(notes))
        return dict(writer.provenance)


def _calibrated(posterior: Posterior, calibration: Calibration | None, mask: Mask) -> Posterior:
    """The posterior with a calibrated standard deviation, and without the note that it is not."""
    if calibration is None:
        return posterior
    std = calibration.apply(
        posterior.std, posterior.noise_std, mask=mask.name, acceleration=mask.acceleration
    )
    notes = tuple(note for note in posterior.warnings if note != NOT_CALIBRATED)
    return replace(posterior, std=std, warnings=notes)


def _summary(
    posterior: Posterior, mean: Tensor, std: Tensor, calibration: Calibration | None
) -> dict[str, Any]:
    """Summary of what was cropped."""
    cropped = replace(posterior, mean=mean, std=std)
    if calibration is None:
        return summarise(cropped)
    return summarise(cropped, calibrated_std=std, calibration=calibration.name)


def _masks_of_slices(file: FastMRIFile, sampling: Sampling) -> list[Mask | None]:
    """Mask of the volume for every slice, or one without what the slice lacks; ``None`` for an empty one."""
    masks: list[Mask | None] = []
    for index, measured in enumerate(sampling.measured):
        mask = sampling.mask
        if measured is None:
            masks.append(None)
        elif not bool((mask.mask & ~measured).any()):
            masks.append(mask)
        else:
            try:
                masks.append(
                    mask_from_array(mask.mask & measured, name=mask.name, valid_columns=file.valid_columns)
                )
            except OperatorError as error:
                raise ReconError(f"{file.path}: slice {index}: {error}") from None
    return masks


def _anatomy_notes(file: FastMRIFile, prior: ScorePrior | None, settings: MRISettings) -> list[str]:
    if prior is None:
        return []
    known = prior.contract.anatomy
    anatomy = settings.anatomy or anatomy_of(file.acquisition)
    if not known or anatomy in known:
        return []
    if anatomy is None:
        return [f"the anatomy is not stated; prior {prior.contract.name!r} knows {', '.join(known)} only"]
    return [f"the images show a {anatomy}, but prior {prior.contract.name!r} knows {', '.join(known)} only"]


def _provenance(
    file: FastMRIFile, settings: MRISettings, mask: Mask, masks: Sequence[Mask]
) -> dict[str, Any]:
    return {
        "units": "root sum of squares of the coil images of the input",
        "seed": settings.seed,
        "mask": {
            "name": mask.name,
            "asked_acceleration": settings.acceleration if settings.mask else None,
            "asked_center_fraction": settings.center_fraction if settings.mask else None,
            **_mask_facts(mask),
            # On average over the slices: the mask of the volume may be of more than any of them holds.
            "realised_acceleration": statistics.fmean(item.acceleration for item in masks),
        },
        "coil_maps": _coil_maps(file, settings),
        "num_coils": min(settings.num_coils or file.num_coils, file.num_coils),
        "noise_std": "estimated" if settings.noise_std is None else "given",
        "noise_floor": settings.noise_floor,
        "calibrated_uncertainty": False if settings.calibration is None else settings.calibration.facts,
    }


def _mask_facts(mask: Mask) -> dict[str, Any]:
    acs = mask.acs if isinstance(mask.acs, tuple) else (mask.acs,)
    return {
        "realised_acceleration": mask.acceleration,
        "calibration": [None if s is None else [s.start, s.stop] for s in acs],
    }


def _coil_maps(file: FastMRIFile, settings: MRISettings) -> str | None:
    if not file.multicoil:
        return None
    if settings.coil_by_coil:
        return "none: coil by coil, root sum of squares"
    return "ESPIRiT from the calibration region"
