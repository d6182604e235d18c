"""What a reconstruction costs beside its network, and whether its memory grows with the number of samples.

    python -m benchmarks.overhead

One multi-coil slice with simulated coils, an equispaced mask, DDS at its defaults. Everything is timed in
turn within one process, and medians are compared, so that a machine whose speed drifts does not tilt a ratio.
The peak memory is read from fresh processes, one for each number of samples. A step of DPS, which needs the
gradient of the network, is timed beside a step of DDS, and its memory read in the same way.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from operators.masks import make_mask
from operators.mri import MulticoilMRI
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from priors.base import ScorePrior
from priors.loading import load_prior
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS

NOISE = 0.005

STEPS: dict[str, DDS | DPS] = {
    "DDS": DDS(nfe=10),
    "DPS": DPS(nfe=10),
}


def phantom(size: int) -> torch.Tensor:
    """Complex image ``(size, size)`` of nested ellipses with a smooth phase, at about the prior's level."""
    grid = torch.linspace(-1, 1, size)
    y, x = grid[:, None], grid
    image = torch.zeros(size, size)
    for radius_y, radius_x, value in (
        (0.85, 0.7, 0.5),
        (0.8, 0.65, -0.2),
        (0.5, 0.2, 0.25),
        (0.15, 0.5, 0.15),
    ):
        image += value * ((y / radius_y) ** 2 + (x / radius_x) ** 2 < 1)
    return torch.polar(image, smooth_phase((size, size), seed=0))


def setting(arguments: argparse.Namespace) -> tuple[torch.Tensor, MulticoilMRI, ScorePrior]:
    """Measurement, operator and prior of the benchmark."""
    shape = (arguments.size, arguments.size)
    maps = random_smooth_maps(arguments.coils, shape, seed=0)
    maps = maps / maps.abs().square().sum(0).sqrt()
    mask = make_mask("equispaced", shape, 4).mask
    kspace = simulate_kspace(phantom(arguments.size), maps, NOISE) * mask
    return kspace, MulticoilMRI(maps, mask), load_prior(arguments.prior, precision=arguments.precision)


def timed(function: Callable[[], object]) -> float:
    """Wall time of one call, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> None:
    """Print the overhead over the network's own time."""
    y, operator, prior = setting(arguments)
    solver = DDS()
    scale = Scale.estimate(y, operator, prior.contract.level)
    problem = Problem(scale.apply(y), operator, NOISE / scale.factor)
    shape = tuple(operator.domain_shape)
    noise = KeyedNoise(0, "benchmark", [0], shape, y.dtype, y.device)
    image = problem.operator.adjoint(problem.y)[None]
    columns: dict[str, list[float]] = {"sampler": [], "network": [], "normal": []}
    for _ in range(arguments.repetitions + 1):  # the first round warms up
        columns["sampler"].append(timed(lambda: solver.sample(problem, prior, noise)))
        columns["network"].append(
            timed(lambda: [prior.denoise(image, 0.1) for _ in range(solver.nfe)]) / solver.nfe
        )
        columns["normal"].append(timed(lambda: [operator.normal(image) for _ in range(50)]) / 50)
    median = {name: statistics.median(values[1:]) for name, values in columns.items()}
    ratios = [
        (wall - solver.nfe * network) / (solver.nfe * solver.cg_iterations * normal)
        for wall, network, normal in list(zip(*columns.values(), strict=True))[1:]
    ]
    over_network = [
        w / (solver.nfe * n) for w, n in zip(columns["sampler"][1:], columns["network"][1:], strict=True)
    ]
    print(
        f"{arguments.coils} coils, {arguments.size}², {torch.get_num_threads()} threads, "
        f"{arguments.precision} network, NFE {solver.nfe}, M at most {solver.cg_iterations}, "
        f"{arguments.repetitions} repetitions, medians (minimum–maximum)"
    )
    print(f"one sample of a slice           {median['sampler']:.2f} s")
    print(f"network, one evaluation         {1e3 * median['network']:.1f} ms")
    print(f"A.normal, one application       {1e3 * median['normal']:.2f} ms")
    for label, values in (
        ("(wall − NFE × network) / (NFE × M × A.normal)", ratios),
        ("wall / (NFE × network)", over_network),
    ):
        print(f"{label:46s} {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})")


def peak(arguments: argparse.Namespace, count: int, solver: str | None = None) -> int:
    """Peak memory in MiB of a fresh process that draws samples; of a solver, what its steps add."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--peak-of", str(count)]
    command += [] if solver is None else ["--solver", solver]
    for name in ("coils", "size", "prior", "precision"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of fresh processes that draw more and more samples."""
    for count in (1, 2, 4, 8):
        print(f"peak memory, {count} samples           {peak(arguments, count)} MiB")


@torch.no_grad()
def steps(arguments: argparse.Namespace) -> None:
    """Print time and memory of a step of DPS beside those of DDS."""
    y, operator, prior = setting(arguments)
    scale = Scale.estimate(y, operator, prior.contract.level)
    problem = Problem(scale.apply(y), operator, NOISE / scale.factor)
    noise = KeyedNoise(0, "benchmark", [0], tuple(operator.domain_shape), y.dtype, y.device)
    columns: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(arguments.repetitions + 1):  # the first round warms up
        for name, solver in STEPS.items():
            columns[name].append(timed(lambda s=solver: s.sample(problem, prior, noise)) / solver.nfe)  # type: ignore[misc]
    for name, values in columns.items():
        ratios = [own / dds for own, dds in zip(values[1:], columns["DDS"][1:], strict=True)]
        print(
            f"a step of {name:20s}          {1e3 * statistics.median(values[1:]):.0f} ms, "
            f"{statistics.median(ratios):.2f} of DDS ({min(ratios):.2f}–{max(ratios):.2f}), "
            f"peak memory {peak(arguments, 1, name)} MiB above what data and prior take"
        )


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coils", type=int, default=15)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--prior", default="brain")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--solver", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of is None:
        measure(arguments)
        memory(arguments)
        steps(arguments)
        return
    y, operator, prior = setting(arguments)
    if arguments.solver is None:
        reconstruct(y, operator, prior, DDS(nfe=4), arguments.peak_of, noise_std=NOISE)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    # Linux forgets the peak so far when it is told to, and begins anew from what is in use.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    reconstruct(
        y, operator, prior, replace(STEPS[arguments.solver], nfe=4), arguments.peak_of, noise_std=NOISE
    )
    print((resident("VmHWM") - before) // 1024)


def resident(name: str) -> int:
    """Memory of this process in KiB: ``VmRSS`` in use, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
