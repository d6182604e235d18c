"""Throughput of a device: the largest batch that fits, a whole volume, and what the milliseconds go to.

The batch is one of samples of a slice. It is doubled until the device has no more memory, or until the limit
that was given; a CPU has no such end short of its process being killed, so there the limit decides.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.speed.kspace_files import write_volume
from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.report import Bar, Section, Value
from benchmarks.speed.settings import Settings, noise_of, phantom, quiet_problem, scan, solver_problem
from benchmarks.speed.timing import (
    DATA,
    NETWORK,
    NOISE,
    OPERATOR,
    REST,
    Parts,
    Spread,
    in_turn,
    synchronise,
    wall,
    watched,
)
from recon.errors import ReconError
from recon.io.fastmri import FastMRIFile
from recon.mri import MRISettings, find_sampling, reconstruct_file
from recon.sampling import reconstruct
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.dds import DDS

STEPS_OF_A_TRIAL = 2
"""Network evaluations with which a batch is tried and timed."""
LIMIT = {"cpu": 1.25, "cuda": 1.05}


@dataclass(frozen=True)
class Trial:
    """A batch that fitted: its size, the time of an evaluation and its data step, and the peak memory."""

    batch: int
    seconds: Spread
    peak: int | None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def doublings(attempt: Callable[[int], Trial], most: int) -> Iterator[Trial]:
    """Try batches of 1, 2, 4, ..., up to a limit or the end of memory; what else goes wrong is raised.

    Raises
    ------
    ReconError
        If not even one fits.
    """
    batch = 1
    while batch <= most:
        try:
            trial = attempt(batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise ReconError(f"not even a batch of one fits into memory: {error}") from None
            return
        yield trial
        batch *= 2


def measure(settings: Settings) -> list[Section]:
    """Batches, parts and a volume."""
    torch.set_num_threads(settings.threads[0])
    device = settings.device
    network = load_network(settings.network, settings.precision, device)
    _, coils, height, width = settings.volume
    one = scan(phantom((height, width)), coils, device)
    problem = solver_problem(one.problem(), network)
    where = f"{coils} coils, {height}×{width}, {network.description}, {device_name(device)}"
    with torch.no_grad():
        trials = list(doublings(lambda batch: _trial(settings, network, problem, batch), settings.most))
        largest = trials[-1].batch
        batch = min(settings.samples, largest)
        parts, total = by_parts(DDS(), problem, network, device, batch)
    trial_rows: list[list[Value]] = [
        [
            trial.batch,
            trial.seconds.times(1e3 / trial.batch),
            trial.batch / trial.seconds.median,
            None if trial.peak is None else f"{trial.peak / 2**30:.2f}",
        ]
        for trial in trials
    ]
    why = "the next one does not fit" if largest * 2 <= settings.most else "the limit that was given"
    return [
        Section(
            "batch",
            f"Batches of samples ({where})",
            ["batch", "ms a sample and network evaluation", "evaluations / s", "peak memory / GiB"],
            trial_rows,
            [f"largest batch: {largest}, {why}; every evaluation with its step of data consistency"],
        ),
        _parts_section(settings, where, network, problem, parts, total, batch),
        _volume_section(settings, where, network, batch),
    ]


def device_name(device: torch.device) -> str:
    """What the device calls itself; of a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _trial(settings: Settings, network: Network, problem: Problem, batch: int) -> Trial:
    device = settings.device
    solver = DDS(nfe=STEPS_OF_A_TRIAL)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    noise = noise_of(problem, batch)
    call = {"sample": lambda: solver.sample(problem, network.prior, noise)}
    times = in_turn(call, settings.repetitions, device)["sample"]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Trial(batch, wall(times).times(1 / solver.nfe), peak)


def by_parts(
    solver: DDS, problem: Problem, network: Network, device: torch.device, batch: int
) -> tuple[dict[str, float], float]:
    """Seconds by part of one batch of samples, and in all without the stopwatch; a first run warms up."""

    def sample(noise: KeyedNoise) -> None:
        solver.sample(Problem(problem.y, problem.operator, problem.noise_std), network.prior, noise)

    noise = noise_of(problem, batch)
    sample(noise)
    synchronise(device)
    started = time.perf_counter()
    sample(noise)
    synchronise(device)
    total = time.perf_counter() - started
    parts = Parts(device)
    with watched(parts, solver, network.prior, problem.operator), parts(REST):
        sample(noise)
    return parts.seconds, total


def _parts_section(
    settings: Settings,
    where: str,
    network: Network,
    problem: Problem,
    parts: dict[str, float],
    total: float,
    batch: int,
) -> Section:
    solver = DDS()
    image = noise_of(problem, batch)(0)
    with torch.no_grad():
        alone = in_turn(
            {"network": lambda: [network.prior.denoise(image, 0.1) for _ in range(solver.nfe)]},
            settings.repetitions,
            settings.device,
        )["network"]
    names = {
        NETWORK: "network",
        OPERATOR: "data consistency: operator",
        DATA: "data consistency: conjugate gradients beside it",
        NOISE: "drawing noise",
        REST: "rest",
    }
    watched_total = sum(parts.values())
    rows: list[list[Value]] = [
        [label, 1e3 * parts.get(name, 0.0) / solver.nfe, f"{parts.get(name, 0.0) / watched_total:.1%}"]
        for name, label in names.items()
    ]
    rows.append(["all, under the stopwatch", 1e3 * watched_total / solver.nfe, "100.0%"])
    rows.append(["all, without it", 1e3 * total / solver.nfe, None])
    return Section(
        "parts",
        f"Where the time of a network evaluation goes ({where})",
        ["part", f"ms, batch of {batch}", "share"],
        rows,
        [
            f"DDS with {solver.nfe} network evaluations; the stopwatch waits for the device at each change "
            "of part, which costs time by itself"
        ],
        [Bar("wall over (NFE × network)", total / wall(alone).median, LIMIT[settings.device.type])],
    )


def _volume_section(settings: Settings, where: str, network: Network, batch: int) -> Section:
    slices, coils, height, width = settings.volume
    device, solver = settings.device, DDS()
    mri = MRISettings(mask="equispaced", acceleration=4, num_samples=settings.samples)
    rows: list[list[Value]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = write_volume(Path(folder) / "volume.h5", slices, coils, (height, width))
        result = Path(folder) / "result.h5"

        def from_file_to_file() -> None:
            reconstruct_file(source, result, network.prior, solver, mri, device=device)

        def slice_by_slice() -> None:
            with FastMRIFile(source) as file:
                mask = find_sampling(file, mri).mask
                for index in range(slices):
                    kspace = file.read_slice(index).kspace.to(device)
                    ready = quiet_problem(kspace, mask)
                    reconstruct(
                        ready.y,
                        ready.operator,
                        network.prior,
                        solver,
                        settings.samples,
                        noise_std=ready.noise_std,
                        key=str(index),
                        micro_batch=batch,
                    )

        # The first slice of a process is slower than those that follow.
        warm = scan(phantom((height, width)), coils, device).problem()
        reconstruct(
            warm.y, warm.operator, network.prior, replace(solver, nfe=2), noise_std=1e-3, micro_batch=batch
        )
        for label, call in (
            ("reconstruct_file, as `recon mri` runs it", from_file_to_file),
            (f"slice by slice, batches of {batch} samples", slice_by_slice),
        ):
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            seconds = time.perf_counter() - started
            rows.append([label, seconds, seconds / slices, slices / seconds])
    return Section(
        "volume",
        f"A volume of {slices} slices, {settings.samples} samples each ({where})",
        ["how", "seconds", "seconds a slice", "slices / s"],
        rows,
        [f"DDS with {solver.nfe} network evaluations a sample, noise levels and coil maps included; one run"],
    )
