"""Volumes of simulated k-space in the layout of the fastMRI data, to be reconstructed and thrown away."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.speed.settings import NOISE, phantom
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase

_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <encoding>
    <encodedSpace><matrixSize><x>{height}</x><y>{width}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>220</x><y>220</y><z>5</z></fieldOfView_mm></encodedSpace>
    <reconSpace><matrixSize><x>{height}</x><y>{width}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>220</x><y>220</y><z>5</z></fieldOfView_mm></reconSpace>
    <encodingLimits><kspace_encoding_step_1>
      <minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center>
    </kspace_encoding_step_1></encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>"""


def write_volume(path: Path, slices: int, coils: int, shape: tuple[int, int], seed: int = 0) -> Path:
    """Write fully sampled k-space ``(slices, coils, H, W)`` of nested ellipses, each with other noise."""
    height, width = shape
    maps = random_smooth_maps(coils, shape, seed=seed)
    image = torch.polar(phantom(shape), smooth_phase(shape, seed=seed))
    with h5py.File(path, "w") as file:
        data = file.create_dataset("kspace", (slices, coils, height, width), dtype=np.complex64)
        for index in range(slices):
            data[index] = simulate_kspace(image, maps, NOISE, seed=seed + index).numpy()
        file["ismrmrd_header"] = _HEADER.format(
            height=height, width=width, last=width - 1, centre=width // 2
        ).encode()
        file.attrs.update({"acquisition": "AXT1", "patient_id": "simulated"})
    return path
