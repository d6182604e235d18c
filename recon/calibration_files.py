"""What a calibration is learned from: fully sampled fastMRI files, undersampled and reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.errors import OperatorError
from priors.base import ScorePrior
from priors.errors import PriorError
from recon.calibration import Evidence, fully_sampled_image, gather, kspace_digest, stored_evidence
from recon.errors import ReconError
from recon.io.fastmri import FastMRIFile, crop_readout
from recon.mri import MRISettings, find_sampling, slice_problem
from recon.solvers.base import Solver, settings_of


def evidence_of_file(
    source: Path,
    prior: ScorePrior | None,
    solver: Solver,
    settings: MRISettings,
    *,
    patient: str,
    slices: int,
    prior_facts: dict[str, Any] | None = None,
    keep: Path | None = None,
    device: str | torch.device = "cpu",
    on_slice: Callable[[], None] | None = None,
) -> list[Evidence]:
    """Undersample a fully sampled file with one mask, and hold reconstructions of some slices against it.

    The mask is the one that :func:`recon.mri.reconstruct_file` draws for this file.

    Parameters
    ----------
    source
        Fully sampled fastMRI file.
    prior, solver, settings
        With what, and how; the settings must name a mask.
    patient
        Whose data these are.
    slices
        Slices at the most, evenly spaced over the middle half of the volume.
    prior_facts
        File and hash of the prior: with them the evidence that is kept is told from that of another prior.
    keep
        Folder to take evidence from and to put it in.
    device
        Where to compute.
    on_slice
        Called after every slice.

    Returns
    -------
    list of Evidence

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it: undersampled already, damaged, without an object.
    """
    if settings.mask is None:
        raise ReconError("a calibration needs a mask to undersample with")
    found = []
    with FastMRIFile(source) as file:
        sampling = find_sampling(file, settings)
        mask = sampling.mask
        # Slices that hold every column that was acquired: the truth is made of all, not of the mask's alone.
        left, right = file.valid_columns
        usable = [
            index
            for index, columns in enumerate(sampling.measured)
            if columns is not None and bool(columns[left:right].all())
        ]
        for index in middle_slices(usable, slices):
            kspace = crop_readout(file.read_slice(index).kspace, sampling.height).to(device)
            facts = {
                "kspace": kspace_digest(kspace),
                "slice": [patient, file.stem, index],
                "settings": {name: str(value) for name, value in vars(settings).items()},
                "solver": settings_of(solver),
                "prior": prior_facts,
            }

            def make(kspace: torch.Tensor = kspace, index: int = index) -> Evidence:
                problem = slice_problem(
                    kspace,
                    mask,
                    multicoil=file.multicoil,
                    noise_std=settings.noise_std,
                    num_coils=settings.num_coils,
                )
                return gather(
                    problem,
                    mask,
                    fully_sampled_image(kspace),
                    prior,
                    solver,
                    patient=patient,
                    volume=file.stem,
                    index=index,
                    asked=settings.acceleration,
                    num_samples=settings.num_samples,
                    seed=settings.seed,
                )

            try:
                found.append(stored_evidence(keep, facts, make))
            except (OperatorError, PriorError, ReconError) as error:
                raise ReconError(f"{source}: slice {index}: {error}") from None
            if on_slice is not None:
                on_slice()
    if not found:
        raise ReconError(f"{source}: no slice holds every column that its volume has")
    return found


def middle_slices(usable: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the slices, evenly spaced over the middle half of the volume."""
    quarter = len(usable) // 4
    middle = usable[quarter : len(usable) - quarter]
    count = min(count, len(middle))
    return [middle[round(float(place))] for place in np.linspace(0, len(middle) - 1, 2 * count + 1)[1::2]]
