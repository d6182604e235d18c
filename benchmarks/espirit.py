"""Time ESPIRiT against sigpy's and, where it is installed, BART's, and compare the maps, in one run.

One map set from a calibration region of 24 x 24 with kernels of 6 x 6. Calls of ours, which uses one thread
at all times, alternate with BART's, and stand before and after sigpy's single one, so that whatever else the
machine does falls on all alike; on a busy machine the ratio of processor time is the one to trust. BART is a
process that reads and writes files; "net" has that taken off which it needs to start and to copy the same
file. The targets on the largest case are 25 times sigpy's speed and 3 times BART's (net).

Run ``python -m benchmarks.espirit``. BART is in Debian: ``apt-get install bart``.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
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
# BART's threshold is on squared singular values: 0.02 squared.
BART_OPTIONS = ("-m1", "-k6", f"-r{ACS}:{ACS}:1", "-t0.0004", "-c0")


def make_kspace(num_coils: int, height: int, width: int) -> Tensor:
    """Simulate a textured ellipse with smooth phase and a little noise."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    texture = 1 + 0.3 * torch.sin(9 * x + 4 * y) + 0.3 * torch.sin(23 * y) * torch.cos(17 * x)
    inside = (y / 0.8) ** 2 + (x / 0.7) ** 2 < 1
    image = torch.polar(inside * texture, smooth_phase((height, width), 1))
    return simulate_kspace(image, random_smooth_maps(num_coils, (height, width), 0), noise_std=0.005)


def timed(call: Callable[[], object]) -> np.ndarray:
    """Time one call: seconds on the clock, and of the processors, in this process and in those it started."""

    def now() -> np.ndarray:
        usage = os.times()
        return np.array(
            [usage.elapsed, usage.user + usage.system + usage.children_user + usage.children_system]
        )

    start = now()
    call()
    return now() - start


def is_separated(kspace: Tensor, acs: tuple[slice, slice]) -> Tensor:
    """Find the pixels where lambda_1 > 0.95 of the largest and lambda_2 / lambda_1 < 0.7."""
    correlation = espirit._autocorrelation(espirit._patch_basis(kspace[(..., *acs)], (6, 6), 0.02, 0.0))
    along_y, along_x = (
        espirit._waves(torch.arange(size), size, taps).to(correlation)
        for size, taps in zip(kspace.shape[1:], correlation.shape, strict=False)
    )
    values = torch.stack(
        [
            torch.linalg.eigvalsh(torch.einsum("p,xq,pqij->xij", wave, along_x, correlation))[:, -2:]
            for wave in along_y
        ]
    )
    return (values[..., 1] > 0.95 * values[..., 1].max()) & (values[..., 0] < 0.7 * values[..., 1])


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
    own = [timed(ours) for _ in range(repetitions)]
    barts, copies = [], []
    bart_maps = None
    if bart is not None:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "kspace"), Path(folder, "maps")
            write_cfl(source, kspace)
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

            def run_bart(*arguments: str) -> None:
                command = [bart, *arguments, str(source), str(target)]
                subprocess.run(command, check=True, capture_output=True, env=environment)

            for _ in range(repetitions):
                own.append(timed(ours))
                copies.append(timed(lambda: run_bart("copy")))
                barts.append(timed(lambda: run_bart("ecalib", *BART_OPTIONS)))
            bart_maps = read_cfl(target, kspace.shape)
    reference: list[np.ndarray] = []
    sigpy_time = timed(lambda: reference.append(sigpys()))
    own += [timed(ours) for _ in range(repetitions)]
    exact_time = timed(lambda: espirit_maps(kspace, acs, crop=0, exact=True))

    own_time = np.median(own, axis=0)
    chosen = is_separated(kspace, acs)
    truth = torch.from_numpy(np.ascontiguousarray(reference[0]))

    def line(name: str, duration: np.ndarray, maps: Tensor | None) -> str:
        error = "" if maps is None else f"{subspace_error(maps, truth, chosen):.1e}"
        (wall, cpu), (wall_ratio, cpu_ratio) = 1e3 * duration, duration / own_time
        return f"{size:16}{name:17}{wall:8.0f}{wall_ratio:8.1f}x{cpu:10.0f}{cpu_ratio:8.1f}x{error:>12}"

    size = " x ".join(map(str, case))
    lines = [
        line("ours", own_time, ours()),
        line("ours, exact", exact_time, None),
        line("sigpy", sigpy_time, None),
    ]
    if bart_maps is not None:
        bart_time = np.median(barts, axis=0)
        lines.append(line("BART, with files", bart_time, bart_maps))
        lines.append(line("BART, net", bart_time - np.median(copies, axis=0), None))
    return lines


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--repetitions", type=int, default=3, help="timed calls before and after each of the others"
    )
    parser.add_argument("--threads", type=int, help="threads of BART (default: what torch chooses)")
    parser.add_argument("--largest", action="store_true", help="the largest case only")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bart = shutil.which("bart")
    print(f"{torch.get_num_threads()} threads for BART, load of the machine {os.getloadavg()[0]:.1f};")
    print(
        "medians in ms on the clock and of processor time, both with the ratio to ours; error is the largest"
    )
    print("1 - |<s, s_sigpy>| where lambda_1 > 0.95 of its maximum and lambda_2 < 0.7 lambda_1.")
    if bart is None:
        print("bart is not installed.")
    print(f"{'size':16}{'':17}{'clock':>8}{'':9}{'processor':>10}{'':9}{'error':>12}")
    for case in CASES[-1:] if options.largest else CASES:
        for text in run_case(case, options.repetitions, bart):
            print(text, flush=True)


if __name__ == "__main__":
    main()
