"""Time ESPIRiT against sigpy's and, where it is installed, BART's, and compare the maps, in one run.

One map set from a calibration region of 24 x 24 with kernels of 6 x 6. Calls of ours alternate with BART's, and
stand before and after sigpy's single one, so that whatever else the machine does falls on all alike. BART is a
process that reads and writes files; "net" has the time taken off that BART needs to start and copy the same file.
The targets on the largest case are 25 times sigpy's speed and 3 times BART's (net).

Run ``python -m benchmarks.espirit``. BART is in Debian: ``apt-get install bart``.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sigpy.mri
import torch
from torch import Tensor

from operators import espirit
from operators.espirit import espirit_maps
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase

CASES = ((8, 320, 320), (15, 320, 320), (15, 640, 368))
ACS = 24


def make_kspace(num_coils: int, height: int, width: int) -> Tensor:
    """Simulate a textured ellipse with smooth phase and a little noise."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    texture = 1 + 0.3 * torch.sin(9 * x + 4 * y) + 0.3 * torch.sin(23 * y) * torch.cos(17 * x)
    inside = (y / 0.8) ** 2 + (x / 0.7) ** 2 < 1
    image = torch.polar(inside * texture, smooth_phase((height, width), 1))
    return simulate_kspace(image, random_smooth_maps(num_coils, (height, width), 0), noise_std=0.005)


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_separated(kspace: Tensor, acs: tuple[slice, slice]) -> Tensor:
    """Find the pixels where lambda_1 > 0.95 of the largest and lambda_2 / lambda_1 < 0.7."""
    basis = espirit._patch_basis(kspace[(..., *acs)], (6, 6), 0.02, 0.0)
    padded = torch.zeros(len(basis), kspace.shape[0], *kspace.shape[1:], dtype=kspace.dtype)
    padded[..., :6, :6] = basis
    rows = []
    spectrum = torch.fft.fftshift(torch.fft.ifft2(padded), dim=(-2, -1)).permute(2, 3, 0, 1)
    for row in spectrum:  # eigenvalues of G as squared singular values, a row at a time to save memory
        rows.append(torch.linalg.eigvalsh(row.mH @ row))
    values = torch.stack(rows)
    return (values[..., -1] > 0.95 * values[..., -1].max()) & (values[..., -2] < 0.7 * values[..., -1])


def subspace_error(maps: Tensor, reference: Tensor, chosen: Tensor) -> float:
    """Largest 1 - |<a, b>| of unit coil vectors over the chosen pixels."""
    a, b = (x[:, chosen].to(torch.complex128) for x in (maps, reference))
    return float((1 - (a.conj() * b).sum(0).abs() / (a.norm(dim=0) * b.norm(dim=0))).max())


def write_cfl(path: Path, kspace: Tensor) -> None:
    """Write (C, H, W) as BART's (H, W, 1, C)."""
    num_coils, height, width = kspace.shape
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{height} {width} 1 {num_coils}\n")
    kspace.numpy().transpose(1, 2, 0).ravel(order="F").astype(np.complex64).tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path, shape: torch.Size) -> Tensor:
    """Read BART's (H, W, 1, C) as (C, H, W)."""
    num_coils, height, width = shape
    values = np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(height, width, num_coils, order="F")
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def run_case(case: tuple[int, int, int], repetitions: int, bart: str | None) -> list[str]:
    """Time one matrix size and return its lines of the table."""
    kspace = make_kspace(*case)
    centre = [slice((n - ACS) // 2, (n + ACS) // 2) for n in case[1:]]
    acs = (centre[0], centre[1])

    def ours() -> Tensor:
        return espirit_maps(kspace, acs, crop=0)

    def sigpys() -> np.ndarray:
        return sigpy.mri.app.EspiritCalib(kspace.numpy(), calib_width=ACS, crop=0, show_pbar=False).run()

    ours()
    own, barts, copies = [], [], []
    bart_maps = None
    if bart is None:
        own += [seconds(ours) for _ in range(repetitions)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "kspace"), Path(folder, "maps")
            write_cfl(source, kspace)
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

            def run_bart(*arguments: str) -> None:
                command = [bart, *arguments, str(source), str(target)]
                subprocess.run(command, check=True, capture_output=True, env=environment)

            for _ in range(repetitions):
                own.append(seconds(ours))
                copies.append(seconds(lambda: run_bart("copy")))
                barts.append(
                    seconds(lambda: run_bart("ecalib", "-m1", "-k6", f"-r{ACS}:{ACS}:1", "-t0.0004", "-c0"))
                )
            bart_maps = read_cfl(target, kspace.shape)
    reference: list[np.ndarray] = []
    sigpy_time = seconds(lambda: reference.append(sigpys()))
    own += [seconds(ours) for _ in range(repetitions)]
    exact = seconds(lambda: espirit_maps(kspace, acs, crop=0, exact=True))

    own_time = float(np.median(own))
    chosen = is_separated(kspace, acs)
    truth = torch.from_numpy(np.ascontiguousarray(reference[0]))

    def line(name: str, duration: float, maps: Tensor | None) -> str:
        error = "" if maps is None else f"{subspace_error(maps, truth, chosen):.1e}"
        return f"{size:>14}  {name:<18} {1e3 * duration:>8.0f} {duration / own_time:>9.1f} {error:>16}"

    size = " x ".join(map(str, case))
    lines = [
        line("ours", own_time, ours()),
        line("ours, exact", exact, None),
        line("sigpy", sigpy_time, truth),
    ]
    if bart_maps is not None:
        lines.append(line("BART, with files", float(np.median(barts)), bart_maps))
        lines.append(line("BART, net", float(np.median(barts) - np.median(copies)), None))
    lines.append(f"{'':>14}  error over {int(chosen.sum())} of {chosen.numel()} pixels")
    return lines


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls on either side of sigpy's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and BART")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bart = shutil.which("bart")
    print(f"{os.cpu_count()} processors, {arguments.threads} threads, torch {torch.__version__}")
    print("BART: " + ("not installed" if bart is None else bart))
    print(f"{'C x H x W':>14}  {'':<18} {'ms':>8} {'to ours':>9} {'1 - |<s, sigpy>|':>16}")
    for case in CASES:
        for text in run_case(case, arguments.repetitions, bart):
            print(text, flush=True)


if __name__ == "__main__":
    main()
