"""BART's ``pics`` and ``ecalib`` (Uecker et al. 2015), which are programs: files in, files out."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.cases import read_cfl
from benchmarks.peers.environment import NO_BART, bart
from recon.errors import ReconError

REGULARISATIONS = {
    "l2": ("-l2", "-r"),
    "wavelet": ("-l1", "-r"),
    "tv": (),
}
"""What ``pics`` penalises: the square, sparse wavelets with random shifts, total variation."""

ITERATIONS = {"l2": 100, "wavelet": 100, "tv": 1000}
"""Of ``pics`` at the most. Of total variation, which is by ADMM, the steps of conjugate gradients in all."""

RHO = 0.1
"""Of that ADMM (``-u``): of the powers of ten the one that comes closest to the minimum on a measured slice.
After 1000 steps PSNR is within 0.01 dB of that at 0.01, while at 0.001 or BART's own 0.5 it is 0.1 dB off."""


def write_cfl(path: Path, array: np.ndarray) -> None:
    """Write a complex array as BART's ``.cfl`` and ``.hdr``, first dimension fastest."""
    dims = " ".join(map(str, array.shape))
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{dims}\n")
    array.astype("<c8").ravel(order="F").tofile(path.with_suffix(".cfl"))


def to_bart(coils: np.ndarray) -> np.ndarray:
    """``(C, H, W)`` as BART's dimensions ``(H, W, 1, C)``."""
    return coils.transpose(1, 2, 0)[:, :, None, :]


def run_bart(arguments: list[str], folder: Path, threads: int) -> None:
    """Run a tool of BART in a folder.

    Raises
    ------
    ReconError
        If BART is not installed, or the tool fails.
    """
    program = bart()
    if program is None:
        raise ReconError(NO_BART)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ReconError(f"bart {' '.join(arguments)} failed: {said}")


def pics(
    y: np.ndarray,
    maps: np.ndarray,
    weight: float,
    kind: str,
    iterations: int | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Reconstruct with ``bart pics``.

    Parameters
    ----------
    y, maps : ndarray
        k-space, zero where nothing was sampled, and coil maps, complex64 ``(C, H, W)``.
    weight : float
        Weight of the penalty, for data scaled such that the zero-filled image is about 1; BART's own scaling
        is turned off.
    kind : str
        One of `REGULARISATIONS`.
    iterations : int, optional
        Steps at the most; `ITERATIONS` if not given.
    threads : int
        It may use.

    Returns
    -------
    ndarray
        Complex64 ``(H, W)``.

    Raises
    ------
    ReconError
        If there is no such penalty, BART is not installed, or it fails.
    """
    if kind not in REGULARISATIONS:
        raise ReconError(f"bart pics penalises {', '.join(REGULARISATIONS)}, not {kind!r}")
    number = f"{weight:.6g}"
    tv = ["-R", f"T:3:0:{number}", "-u", f"{RHO:g}"]
    penalty = tv if kind == "tv" else [*REGULARISATIONS[kind], number]
    steps = str(iterations or ITERATIONS[kind])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cfl(folder / "kspace", to_bart(y))
        write_cfl(folder / "maps", to_bart(maps))
        run_bart(["pics", *penalty, "-w", "1", "-i", steps, "kspace", "maps", "image"], folder, threads)
        return np.ascontiguousarray(read_cfl(folder / "image.cfl").reshape(y.shape[-2:], order="F"))


def ecalib(y: np.ndarray, calibration: tuple[int, int], threads: int = 1) -> np.ndarray:
    """Estimate one set of coil maps with ``bart ecalib``, uncropped.

    Parameters
    ----------
    y : ndarray
        k-space, complex64 ``(C, H, W)``.
    calibration : tuple of int
        Rows and columns of the fully sampled centre.
    threads : int
        It may use.

    Returns
    -------
    ndarray
        Complex64 ``(C, H, W)``.

    Raises
    ------
    ReconError
        If BART is not installed, or it fails.
    """
    size = f"{calibration[0]}:{calibration[1]}:1"
    # A kernel of 6, as ours and sigpy's has, where the region leaves it some places.
    kernel = ":".join(str(min(6, length // 2)) for length in calibration) + ":1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cfl(folder / "kspace", to_bart(y))
        run_bart(
            ["ecalib", "-m", "1", "-c", "0", "-k", kernel, "-r", size, "kspace", "maps"], folder, threads
        )
        maps = read_cfl(folder / "maps.cfl")
        return np.ascontiguousarray(maps.reshape(*y.shape[-2:], len(y), order="F").transpose(2, 0, 1))
