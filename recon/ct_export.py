"""A CT result in the formats of viewers, beside the HDF5 that holds it whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.attenuation import mu_to_hu
from recon.errors import ReconError
from recon.io.ct_files import Placement
from recon.io.ct_nifti import write_ct_nifti
from recon.io.ct_results import read_ct_result
from recon.io.ct_volume import CTVolume
from recon.io.dicom_series import new_uid, write_dicom_series

FORMATS = {"nifti": "nibabel", "dicom": "pydicom"}
"""Formats, and the library that each needs."""

STD_STEP = 0.1
"""HU per stored step of a standard deviation in DICOM; images are stored in steps of 1 HU."""


def check_formats(formats: Iterable[str]) -> None:
    """Refuse formats that there are not, or that cannot be written here, before anything is computed.

    Raises
    ------
    ReconError
        Naming the format, and the extra that it needs.
    """
    for name in formats:
        if name not in FORMATS:
            raise ReconError(f"results are written as {' or '.join(FORMATS)} too, not as {name!r}")
        if importlib.util.find_spec(FORMATS[name]) is None:
            raise ReconError(
                f"{name} needs {FORMATS[name]}: install the extra, pip install 'dis-recon[{name}]'"
            )


def check_exportable(formats: Iterable[str], units: str, slices: Sequence[int], source: Path) -> None:
    """Refuse what a format cannot say.

    Raises
    ------
    ReconError
        Naming the source, if slices are not of equal distance, or Hounsfield units are not known.
    """
    if "dicom" in formats and units == "1/element":
        raise ReconError(
            f"{source}: DICOM holds Hounsfield units, and the size of a detector element, which gives them, "
            "is not known"
        )
    steps = {after - before for before, after in pairwise(slices)}
    if list(formats) and (len(steps) > 1 or min(steps, default=1) < 1):
        raise ReconError(
            f"{source}: the slices of a volume follow each other in equal steps, and {list(slices)} do not"
        )


def export(
    result: Path,
    formats: Iterable[str],
    provenance: Mapping[str, Any],
    placement: Placement | None = None,
) -> list[Path]:
    """Write mean and standard deviation of a result in other formats.

    Parameters
    ----------
    result
        HDF5 that :func:`recon.ct.reconstruct_ct_file` wrote. The others are ``<name>.nii.gz`` and
        ``<name>_std.nii.gz``, in the units of the result and with the provenance as a comment in the header,
        and the series ``<name>_dicom/mean`` and ``<name>_dicom/std`` in Hounsfield units.
    formats
        Of :data:`FORMATS`.
    provenance
        How the result was made.
    placement
        Where the slices of the source lie; around the origin, and a pixel apart, if it does not say.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ReconError
        If the result cannot be read, or something cannot be written.
    """
    mean, std, units = read_ct_result(result)
    chosen = [entry["index"] for entry in provenance["slices"]]
    side = float(provenance["image"]["pixel_size"])
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1

    def volume(images: np.ndarray) -> CTVolume:
        values = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        if placement is None:
            return CTVolume(values, (side, side), side * step)
        # A volume begins at the first slice that was reconstructed.
        where = CTVolume(
            values, (side, side), placement.slice_spacing, placement.origin, placement.orientation
        )
        x, y, z = (float(v) for v in where.position(chosen[0]))
        return CTVolume(
            values, (side, side), placement.slice_spacing * step, (x, y, z), placement.orientation
        )

    written: list[Path] = []
    stem = result.with_suffix("")
    for name in dict.fromkeys(formats):
        if name == "nifti":
            for images, path in (
                (mean, stem.with_name(f"{stem.name}.nii.gz")),
                (std, stem.with_name(f"{stem.name}_std.nii.gz")),
            ):
                write_ct_nifti(path, volume(images), units=units, provenance=provenance)
                written.append(path)
        else:
            written += _write_dicom(
                stem.with_name(f"{stem.name}_dicom"), volume, mean, std, units, provenance
            )
    return written


def _write_dicom(
    folder: Path, volume: Any, mean: np.ndarray, std: np.ndarray, units: str, provenance: Mapping[str, Any]
) -> list[Path]:
    if units == "1/mm":
        mu_water = float(provenance["mu_water"])
        mean = mu_to_hu(torch.from_numpy(mean), mu_water).numpy()
        std = std * np.float32(1000 / mu_water)
    study, frame = new_uid(), new_uid()
    solver = provenance["solver"]["name"]
    count = int(provenance["num_samples"])
    what = f"{solver}, {count} sample{'s' * (count != 1)}"
    for number, (part, images, step) in enumerate((("mean", mean, 1.0), ("std", std, STD_STEP))):
        write_dicom_series(
            folder / part,
            volume(images),
            description=f"{part}, {what}",
            derivation=summary(provenance),
            series_number=number + 1,
            slope=step,
            study_uid=study,
            frame_of_reference_uid=frame,
            overwrite=True,
        )
    return [folder / "mean", folder / "std"]


def summary(provenance: Mapping[str, Any]) -> str:
    """How a result was made, in as few words as a DICOM header has room for."""
    solver, prior, geometry = provenance["solver"], provenance["prior"], provenance["geometry"]
    settings = ", ".join(f"{key}={value}" for key, value in solver.items() if key != "name")
    made = [
        str(provenance["notice"]),
        f"dis-recon {provenance['versions']['dis-recon']}, {solver['name']} ({settings})",
        "no prior" if prior is None else f"prior {prior['name']} sha256 {prior.get('sha256', 'unknown')}",
        f"seed {provenance['seed']}, {provenance['num_samples']} samples",
        f"{geometry['name']}, {len(geometry['angles_degrees'])} of {geometry['views_of_the_file']} views",
        f"water {provenance['mu_water']} 1/mm",
    ]
    return "; ".join(made)
