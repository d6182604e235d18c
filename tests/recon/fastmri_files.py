"""Small files in the layout of the fastMRI data set, built from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PATIENT = "0123456789abcdef-patient"


def ifft2c(kspace: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    return np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))


def fft2c(image: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(image, axes=(-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=(-2, -1))


def root_sum_of_squares(kspace: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """RSS image of (..., C, H, W) k-space, its centre cut out as fastMRI does."""
    image = np.sqrt((np.abs(ifft2c(kspace)) ** 2).sum(axis=-3))
    top, left = (image.shape[-2] - shape[0]) // 2, (image.shape[-1] - shape[1]) // 2
    return image[..., top : top + shape[0], left : left + shape[1]]


def make_kspace(num_slices: int, num_coils: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Discs seen by smooth coils, with noise, at fastMRI's magnitudes: (S, C, H, W) complex64."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    radii = np.linspace(0.5, 0.9, num_slices)[:, None, None]
    images = 1e-4 * ((x**2 + y**2 < radii**2) + 0.5 * ((x - 0.2) ** 2 + y**2 < 0.1))
    angles = 2 * np.pi * np.arange(num_coils)[:, None, None] / num_coils
    coils = np.exp(-((x - np.cos(angles)) ** 2) - (y - np.sin(angles)) ** 2 + 1j * angles)
    kspace = fft2c(images[:, None] * coils)
    noise = rng.standard_normal((*kspace.shape, 2)) @ np.array([1, 1j])
    return (kspace + 1e-6 * noise).astype(np.complex64)


def header_xml(
    encoded: tuple[int, int], recon: tuple[int, int], center: int | str, maximum: int | str
) -> bytes:
    """An ISMRMRD header as fastMRI files carry it; ``encoded`` and ``recon`` are (x, y), readout first."""
    return f"""<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <subjectInformation><patientID>{PATIENT}</patientID></subjectInformation>
  <encoding>
    <encodedSpace>
      <matrixSize><x>{encoded[0]}</x><y>{encoded[1]}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>280</x><y>161.84</y><z>4.5</z></fieldOfView_mm>
    </encodedSpace>
    <reconSpace>
      <matrixSize><x>{recon[0]}</x><y>{recon[1]}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>140</x><y>140</y><z>4.5</z></fieldOfView_mm>
    </reconSpace>
    <encodingLimits>
      <kspace_encoding_step_0><minimum>0</minimum><maximum>0</maximum><center>0</center></kspace_encoding_step_0>
      <kspace_encoding_step_1>
        <minimum>0</minimum><maximum>{maximum}</maximum><center>{center}</center>
      </kspace_encoding_step_1>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>""".encode()


def write_file(
    path: Path, datasets: Mapping[str, Any], *, acquisition: str = "CORPD_FBK", **attributes: Any
) -> Path:
    """Write datasets as they are, with the attributes of a fastMRI file."""
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
        file.attrs.update({"acquisition": acquisition, "patient_id": PATIENT, **attributes})
    return path


def knee(folder: Path, name: str = "file1000001.h5") -> Path:
    """Multicoil, 2× readout oversampling; of 46 columns only 3:43 were encoded, the others are zero."""
    kspace = make_kspace(2, 3, 64, 46)
    kspace[..., :3] = kspace[..., 43:] = 0
    return write_file(
        folder / name,
        {
            "kspace": kspace,
            "ismrmrd_header": header_xml((64, 46), (32, 32), center=20, maximum=39),
            "reconstruction_rss": root_sum_of_squares(kspace, (32, 32)).astype(np.float32),
        },
    )


def brain(folder: Path, name: str = "file_brain_AXFLAIR_200_6002440.h5") -> Path:
    """Multicoil, of ragged shape, the image narrower than the reconstruction matrix; no target."""
    return write_file(
        folder / name,
        {
            "kspace": make_kspace(3, 2, 72, 41, seed=1),
            "ismrmrd_header": header_xml((72, 41), (48, 48), center=20, maximum=40),
        },
        acquisition="AXFLAIR",
    )


def singlecoil(folder: Path, name: str = "file1000002.h5") -> Path:
    """The emulated single coil, with both of its targets."""
    kspace = make_kspace(2, 1, 64, 40, seed=2)
    image = root_sum_of_squares(kspace, (32, 32)).astype(np.float32)
    return write_file(
        folder / name,
        {
            "kspace": kspace[:, 0],
            "ismrmrd_header": header_xml((64, 40), (32, 32), center=20, maximum=39),
            "reconstruction_esc": image,
            "reconstruction_rss": 1.1 * image,
        },
    )


def undersampled(folder: Path, name: str = "file1000003.h5") -> Path:
    """A test set's file: a mask, zeros where it does not sample, no target; columns 3:43 were encoded."""
    kspace = make_kspace(2, 3, 64, 46, seed=3)
    mask = np.zeros(46, dtype=np.float32)
    mask[1::4] = mask[21:25] = 1
    kspace *= mask
    kspace[..., :3] = kspace[..., 43:] = 0
    return write_file(
        folder / name,
        {
            "kspace": kspace,
            "mask": mask,
            "ismrmrd_header": header_xml((64, 46), (32, 32), center=20, maximum=39),
        },
        acceleration=4,
        num_low_frequency=4,
    )
