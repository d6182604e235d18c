"""CT volumes as NIfTI (with the extra ``nifti``)."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.io.ct_volume import CTVolume


def write_ct_nifti(
    path: str | Path,
    volume: CTVolume,
    *,
    units: str = "HU",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a volume as float32 NIfTI, by way of a temporary file.

    Parameters
    ----------
    path : str or Path
        ``.nii`` or ``.nii.gz``; an earlier file of that name is replaced.
    volume : CTVolume
        Hounsfield units. Its position and orientation become the affine, turned from DICOM's coordinates to
        NIfTI's, whose x points to the right and y to the front.
    units : str
        What the values are in, if not Hounsfield units: ``1/mm``, or ``1/element`` for lengths that are not
        in mm either. The header says so.
    provenance : mapping, optional
        How the volume was made, storable as JSON; it becomes a comment among the header's extensions.

    Raises
    ------
    ReconError
        If the name has another ending, the file cannot be written, or nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise ReconError(
            "writing NIfTI needs nibabel: install the extra, pip install 'dis-recon[nifti]'"
        ) from None
    path = Path(path)
    suffix = next((s for s in (".nii.gz", ".nii") if path.name.endswith(s)), None)
    if suffix is None:
        raise ReconError(f"{path}: the name of a NIfTI file ends in .nii or .nii.gz")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.hu.numpy().transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("unknown" if units == "1/element" else "mm")
    image.header["descrip"] = f"{units}, not for diagnostic use".encode("ascii")
    if provenance is not None:
        comment = json.dumps(dict(provenance), allow_nan=False).encode()
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment))
    # nibabel tells the format, and whether to compress, by the ending.
    temporary = path.with_name(f".{uuid.uuid4().hex}.part{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, temporary)
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is none, there is nothing to remove
            temporary.unlink(missing_ok=True)
