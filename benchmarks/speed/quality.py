"""Seconds a slice to reach a given PSNR: against network evaluations and settings.

A slow network flatters the overhead over it; what a user waits for is an image of some quality.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.overhead import psnr
from benchmarks.speed.report import Section
from benchmarks.speed.settings import Scan, Settings, image_note, scan_of
from benchmarks.speed.timing import Spread, synchronise
from recon.sampling import reconstruct
from recon.solvers.base import Solver
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS
from recon.solvers.tikhonov import Tikhonov

EVALUATIONS = (3, 5, 8, 12, 20, 30)
DISTANCES = (3.0, 1.0, 0.5, 0.2, 0.0)
"""Distances in dB from the best, where no PSNR is asked for."""


@dataclass(frozen=True)
class Run:
    """A setting with what it reached."""

    label: str
    evaluations: int
    seconds: Spread
    psnr: float


def candidates(settings: Settings) -> list[tuple[str, Solver, int, int | None]]:
    """Settings to try: label, solver, samples that are averaged, virtual coils."""
    virtual = settings.virtual_coils if settings.virtual_coils < settings.coils else None
    default = DDS()
    runs: list[tuple[str, Solver, int, int | None]] = [("CG-SENSE", Tikhonov(), 1, None)]
    for nfe in EVALUATIONS:
        some = replace(default, nfe=nfe)
        runs.append((f"DDS, NFE {nfe}", some, 1, None))
        runs.append((f"DDS, NFE {nfe}, eta 0", replace(some, eta=0.0), 1, None))
        if virtual is not None:
            cheap = DDS.fast(nfe=nfe, eta=0.0)
            runs.append((f"DDS.fast, NFE {nfe}, eta 0, {virtual} virtual coils", cheap, 1, virtual))
    runs += [(f"DDS, NFE {nfe}, mean of 4", replace(default, nfe=nfe), 4, None) for nfe in (8, 20)]
    runs.append(("DPS, NFE 50", DPS(nfe=50), 1, None))
    return runs


def measure(settings: Settings) -> list[Section]:
    """PSNR and time of every setting, and of each PSNR the fastest way there."""
    torch.set_num_threads(settings.threads[0])
    network = load_network(settings.network, settings.precision, settings.device)
    scan = scan_of(settings)
    # The first slice of a process is slower than those that follow.
    run(scan, network, replace(settings, repetitions=1), "", DDS(nfe=2), 1, None)
    runs = [run(scan, network, settings, *candidate) for candidate in candidates(settings)]
    best = max(one.psnr for one in runs)
    wanted = settings.psnr or tuple(best - distance for distance in DISTANCES)
    notes = [
        image_note(settings),
        "seconds of a slice from k-space to image: noise level, coil maps, scale, samples, on "
        f"{settings.threads[0]} threads; {settings.repetitions} rounds; PSNR of the image (the mean where "
        "several samples are drawn) against the truth",
    ]
    return [
        Section(
            "quality",
            f"Seconds a slice and PSNR ({network.description})",
            ["setting", "network evaluations", "seconds a slice", "PSNR / dB"],
            [[one.label, one.evaluations, one.seconds, f"{one.psnr:.2f}"] for one in runs],
            notes,
        ),
        Section(
            "quality-reached",
            "The fastest way to a PSNR",
            ["PSNR / dB", "setting", "network evaluations", "seconds a slice"],
            [_row(level, fastest(runs, level)) for level in wanted],
        ),
    ]


def fastest(runs: Sequence[Run], level: float) -> Run | None:
    """The run of the least median time among those that reach a PSNR."""
    enough = [one for one in runs if one.psnr >= level]
    return min(enough, key=lambda one: one.seconds.median, default=None)


def _row(level: float, found: Run | None) -> list[str | int | Spread | None]:
    if found is None:
        return [f"{level:.2f}", "none of these", None, None]
    return [f"{level:.2f}", found.label, found.evaluations, found.seconds]


def run(
    scan: Scan,
    network: Network,
    settings: Settings,
    label: str,
    solver: Solver,
    samples: int,
    virtual: int | None,
) -> Run:
    """Time one setting, from k-space to image, and judge its image."""
    seconds = []
    for _ in range(settings.repetitions):
        synchronise(settings.device)
        started = time.perf_counter()
        ready = scan.problem(virtual)
        posterior = reconstruct(
            ready.y,
            ready.operator,
            network.prior if solver.needs.prior else None,
            solver,
            samples,
            noise_std=ready.noise_std,
        )
        image = posterior.mean.abs().cpu()
        seconds.append(time.perf_counter() - started)
    nfe = posterior.nfe * samples if solver.needs.prior else 0
    return Run(label, nfe, Spread.of(seconds), psnr(image[None], scan.truth))
