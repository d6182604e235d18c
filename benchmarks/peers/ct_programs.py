"""Parallel-beam reconstruction by scikit-image and ASTRA, on the data that our own solvers get.

Everything here takes line integrals ``(views, detectors)`` of a `ParallelBeam` with elements as wide as
pixels and returns attenuation ``(N, N)`` in 1/mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.peers.environment import peer
from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError


def _checked(geometry: ParallelBeam, size: int, pixel_size: float) -> None:
    """scikit-image turns about pixel N // 2, which is the middle of an odd number of pixels only."""
    odd = size % 2 == 1 and geometry.num_detectors % 2 == 1
    if not odd or geometry.detector_offset != 0 or not np.isclose(geometry.detector_spacing, pixel_size):
        raise ReconError(
            "scikit-image and our images have one centre only where the numbers of pixels and of detector "
            f"elements are odd and these are as wide as pixels, not for {size} pixels and "
            f"{geometry.num_detectors} elements"
        )


def iradon(
    sinogram: np.ndarray, geometry: ParallelBeam, size: int, pixel_size: float, window: str = "ramp"
) -> np.ndarray:
    """Filtered back-projection by scikit-image; `window` is one of its filters.

    Raises
    ------
    ReconError
        If it cannot have that geometry.
    """
    from skimage.transform import iradon as inverse

    _checked(geometry, size, pixel_size)
    degrees = np.rad2deg(geometry.angles)
    image = inverse(sinogram.T, degrees, output_size=size, filter_name=window, circle=False)
    # It takes the views it is given for half a turn, and pixels for the unit of length.
    return image.astype(np.float32) / pixel_size


def iradon_sart(
    sinogram: np.ndarray, geometry: ParallelBeam, size: int, pixel_size: float, sweeps: int = 1
) -> np.ndarray:
    """Algebraic reconstruction by scikit-image, so many sweeps over all views.

    It reconstructs the circle inside a square as wide as the detector, so it is given the middle of the
    detector: what lies in the corners of the image must be air.

    Raises
    ------
    ReconError
        If it cannot have that geometry.
    """
    from skimage.transform import iradon_sart as sweep

    _checked(geometry, size, pixel_size)
    edge = (geometry.num_detectors - size) // 2
    middle = np.ascontiguousarray(sinogram[:, edge : edge + size].T, dtype=np.float64) / pixel_size
    degrees = np.rad2deg(geometry.angles)
    image = None
    for _ in range(sweeps):
        image = sweep(middle, degrees, image=image, clip=(0.0, np.inf))
    assert image is not None
    return image.astype(np.float32)


@contextmanager
def _astra_data(
    sinogram: np.ndarray, geometry: ParallelBeam, size: int, pixel_size: float
) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """ASTRA with data and geometry loaded: the module, a configuration, and the number of the image."""
    astra = peer("astra")
    scan = astra.create_proj_geom(
        "parallel", geometry.detector_spacing, geometry.num_detectors, np.array(geometry.angles)
    )
    half = size * pixel_size / 2
    volume = astra.create_vol_geom(size, size, -half, half, -half, half)
    projector = astra.create_projector("linear", scan, volume)
    data = astra.data2d.create("-sino", scan, np.ascontiguousarray(sinogram, dtype=np.float32))
    image = astra.data2d.create("-vol", volume, 0.0)
    try:
        yield (
            astra,
            {"ProjectorId": projector, "ProjectionDataId": data, "ReconstructionDataId": image},
            image,
        )
    finally:
        astra.data2d.delete([data, image])
        astra.projector.delete(projector)


def astra_run(
    algorithm: str,
    sinogram: np.ndarray,
    geometry: ParallelBeam,
    size: int,
    pixel_size: float,
    *,
    iterations: int = 1,
    window: str = "ram-lak",
) -> np.ndarray:
    """Run ``FBP`` or ``SIRT`` of ASTRA on the CPU.

    Parameters
    ----------
    algorithm : str
        ``FBP`` or ``SIRT``.
    sinogram : ndarray
        Line integrals ``(views, detectors)``.
    geometry : ParallelBeam
        The scan.
    size, pixel_size : int, float
        Pixels of a square image, and their side in mm.
    iterations : int
        Of SIRT, which keeps the image from becoming negative.
    window : str
        Of FBP.

    Raises
    ------
    ReconError
        If ASTRA is not installed, or there is no such algorithm.
    """
    if algorithm not in ("FBP", "SIRT"):
        raise ReconError(f"of ASTRA there are FBP and SIRT here, not {algorithm!r}")
    with _astra_data(sinogram, geometry, size, pixel_size) as (astra, loaded, image):
        configuration = astra.astra_dict(algorithm) | loaded
        if algorithm == "FBP":
            configuration["FilterType"] = window
        else:
            configuration["option"] = {"MinConstraint": 0.0}
        number = astra.algorithm.create(configuration)
        try:
            astra.algorithm.run(number, iterations)
            return np.array(astra.data2d.get(image))
        finally:
            astra.algorithm.delete(number)
