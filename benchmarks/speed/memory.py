"""Peak memory: against the number of samples, and of a step that needs the network's gradient.

Read from fresh processes, one a figure, on Linux: by how much memory in use rises while samples are drawn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.report import Bar, Section, Value
from benchmarks.speed.settings import Settings, image_note, noise_of, phantom, scan, solver_problem
from benchmarks.speed.timing import in_turn, wall
from recon.sampling import reconstruct
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS

SAMPLES = (1, 2, 8, 32)
STEPS: dict[str, DDS | DPS] = {"DDS": DDS(nfe=8), "DPS": DPS(nfe=8)}
GROWTH = 1.02
"""Memory added by most samples over that of two: they are summarised as they come. Kept ones add a fifth."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What glibc frees goes back to the system at once, so that figures are the same in every run."""


def measure(settings: Settings) -> list[Section]:
    """Peak memory of fresh processes, and steps of DPS beside those of DDS."""
    torch.set_num_threads(settings.threads[0])
    network = load_network(settings.network, settings.precision, settings.device)
    peaks = {count: peak(settings, count) for count in SAMPLES}
    problem = solver_problem(
        scan(phantom((settings.size, settings.size)), settings.coils, settings.device).problem(), network
    )
    with torch.no_grad():
        times = in_turn(
            {
                name: lambda solver=solver: solver.sample(problem, network.prior, noise_of(problem))  # type: ignore[misc]
                for name, solver in STEPS.items()
            },
            settings.repetitions,
            settings.device,
        )
    spreads = {name: wall(values).times(1 / STEPS[name].nfe) for name, values in times.items()}
    rows: list[list[Value]] = [
        [name, value.times(1e3), value.over(spreads["DDS"]), peak(settings, 1, name)]
        for name, value in spreads.items()
    ]
    return [
        Section(
            "memory",
            f"Peak memory against samples ({network.description})",
            ["samples", "memory above data and prior / MiB"],
            [[count, value] for count, value in peaks.items()],
            [image_note(replace(settings, nifti=None)), "fresh processes; DDS"],
            [growth(peaks)],
        ),
        Section(
            "steps",
            "A step with the network's gradient beside one without",
            ["solver", "ms a step", "over DDS", "memory above data and prior / MiB"],
            rows,
            ["a step: one network evaluation and what belongs to it"],
        ),
    ]


def growth(peaks: Mapping[int, float]) -> Bar:
    """Memory of most samples over that of two, with its limit."""
    most = max(peaks)
    return Bar(f"memory, {most} samples over 2", peaks[most] / peaks[2], GROWTH)


def peak(settings: Settings, samples: int, solver: str = "DDS", *, keep_samples: bool = False) -> float:
    """Memory in MiB that drawing samples adds at the most to a fresh process that has data and prior."""
    words = [
        samples,
        settings.coils,
        settings.size,
        settings.network,
        settings.precision,
        settings.threads[0],
        solver,
        *(["--keep-samples"] if keep_samples else []),
    ]
    command = [sys.executable, "-m", "benchmarks.speed.memory", *map(str, words)]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | ALLOCATOR
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    return float(done.stdout)


def resident(name: str) -> int:
    """Memory of this process in KiB: ``VmRSS`` in use, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def _draw(
    network: Network, samples: int, coils: int, size: int, solver: DDS | DPS, keep_samples: bool
) -> float:
    """Draw samples, and tell by how many MiB the memory in use rose meanwhile at the most."""
    ready = scan(phantom((size, size)), coils, torch.device("cpu")).problem()
    # Linux forgets the peak so far when it is told to, and begins anew from what is in use.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    reconstruct(
        ready.y,
        ready.operator,
        network.prior,
        solver,
        samples,
        noise_std=ready.noise_std,
        keep_samples=keep_samples,
    )
    return (resident("VmHWM") - before) / 1024


def main() -> None:
    """Print the figure of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("samples", "coils", "size"):
        parser.add_argument(name, type=int)
    parser.add_argument("network")
    parser.add_argument("precision")
    parser.add_argument("threads", type=int)
    parser.add_argument("solver", choices=STEPS)
    parser.add_argument("--keep-samples", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = load_network(options.network, options.precision, "cpu")
    solver = replace(STEPS[options.solver], nfe=2)
    print(_draw(network, options.samples, options.coils, options.size, solver, options.keep_samples))


if __name__ == "__main__":
    main()
