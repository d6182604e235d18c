"""Overhead over the network's own time: what a sample costs beyond its network evaluations.

Three times are held to that of the evaluations alone: the solver's, that of ``reconstruct`` (scale, moments
and residual too) and that of the whole slice (noise level, coil compression and coil maps too). Beside the
wall time stands that of the processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.report import Bar, Section, Value
from benchmarks.speed.settings import Scan, Settings, image_note, noise_of, scan_of, solver_problem
from benchmarks.speed.timing import Seconds, cpu, in_turn, wall
from recon.mri import SliceProblem
from recon.sampling import reconstruct
from recon.solvers.base import Problem
from recon.solvers.dds import DDS

TOLERANCE = 0.05
"""PSNR in dB by which a cheaper setting may fall behind the default to count."""
QUALITY_SAMPLES = 2
"""Samples whose mean square error is averaged for the PSNR."""
NORMALS = 50
"""Calls of ``A.normal`` that are timed together."""
LIMIT = {"cpu": 1.25, "cuda": 1.05}


def measure(settings: Settings) -> list[Section]:
    """Overhead for every precision and number of threads: all coils, virtual ones, and fewer steps."""
    return [_section(settings, precision) for precision in settings.precisions]


def _section(settings: Settings, precision: str) -> Section:
    network = load_network(settings.network, precision, settings.device)
    scan = scan_of(settings)
    solver = DDS()
    virtual = min(settings.virtual_coils, settings.coils)
    variants: list[tuple[str, int | None, DDS]] = [(f"{settings.coils} coils", None, solver)]
    if virtual < settings.coils:
        variants.append((f"{virtual} virtual coils", virtual, solver))
        variants.append((f"{virtual} virtual coils, DDS.fast", virtual, DDS.fast()))
    psnr = {label: quality(scan, network, coils, one) for label, coils, one in variants}
    best = psnr[variants[0][0]]
    rows: list[list[Value]] = []
    ratios = {}
    before = torch.get_num_threads()
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            for label, coils, one in variants:
                times = _times(settings, scan, network, coils, one)
                evaluations = wall(times["network"]).times(one.nfe)
                over = {
                    name: wall(times[name]).over(evaluations) for name in ("sample", "reconstruct", "slice")
                }
                processor = cpu(times["sample"]).over(cpu(times["network"]).times(one.nfe))
                rows.append(
                    [
                        threads,
                        label,
                        wall(times["network"]).times(1e3),
                        wall(times["normal"]).times(1e3),
                        wall(times["sample"]),
                        over["sample"],
                        processor,
                        over["reconstruct"],
                        over["slice"],
                        f"{psnr[label]:.2f}",
                    ]
                )
                if psnr[label] >= best - TOLERANCE:
                    ratios[threads, label] = over["sample"].median
    finally:
        torch.set_num_threads(before)
    least = min(ratios.values())
    threads, label = next(key for key, value in ratios.items() if value == least)
    return Section(
        f"overhead, {precision}",
        f"Overhead over the network ({network.description})",
        [
            "threads",
            "setting",
            "network / ms",
            "A.normal / ms",
            "sample / s",
            "sample over network",
            "the same, processor time",
            "reconstruct over network",
            "slice with maps over network",
            "PSNR / dB",
        ],
        rows,
        [
            image_note(settings),
            f"DDS, {solver.nfe} network evaluations, at most {solver.cg_iterations} conjugate-gradient "
            f"steps each; {settings.repetitions} rounds in turn, medians (minimum–maximum)",
            f"PSNR of single samples (mean square error averaged over {QUALITY_SAMPLES}) against the "
            f"truth; a setting counts for the limit if it is within {TOLERANCE} dB of the first",
        ],
        [
            Bar(
                f"wall over (NFE × network), {precision}, {label}, {threads} threads",
                least,
                LIMIT[settings.device.type],
            )
        ],
    )


def _times(
    settings: Settings, scan: Scan, network: Network, coils: int | None, solver: DDS
) -> dict[str, list[Seconds]]:
    """Times of everything that is compared, in turn."""
    ready = scan.problem(coils)
    problem = solver_problem(ready, network)
    sigma = (solver.sigma_max * network.prior.contract.sigma_min) ** 0.5
    image = noise_of(problem)(0)

    def sample() -> None:
        # A new problem: what a problem computes once belongs to every slice.
        fresh = Problem(problem.y, problem.operator, problem.noise_std)
        solver.sample(fresh, network.prior, noise_of(fresh))

    def whole(made: Callable[[], SliceProblem]) -> None:
        one = made()
        reconstruct(one.y, one.operator, network.prior, solver, noise_std=one.noise_std, micro_batch=1)

    with torch.no_grad():
        times = in_turn(
            {
                "sample": sample,
                "network": lambda: [network.prior.denoise(image, sigma) for _ in range(solver.nfe)],
                "normal": lambda: [problem.operator.normal(image) for _ in range(NORMALS)],
                "reconstruct": lambda: whole(lambda: ready),
                "slice": lambda: whole(lambda: scan.problem(coils)),
            },
            settings.repetitions,
            settings.device,
        )
    for name, calls in (("network", solver.nfe), ("normal", NORMALS)):
        times[name] = [Seconds(one.wall / calls, one.cpu / calls) for one in times[name]]
    return times


def quality(
    scan: Scan, network: Network, coils: int | None, solver: DDS, samples: int = QUALITY_SAMPLES
) -> float:
    """PSNR in dB of single samples against the truth."""
    ready = scan.problem(coils)
    posterior = reconstruct(
        ready.y,
        ready.operator,
        network.prior,
        solver,
        samples,
        noise_std=ready.noise_std,
        keep_samples=True,
        micro_batch=1,
    )
    assert posterior.samples is not None
    return psnr(posterior.samples.abs().cpu(), scan.truth)


def psnr(images: torch.Tensor, truth: torch.Tensor) -> float:
    """PSNR in dB of images ``(n, H, W)``, over their mean square error, to the maximum of the truth."""
    error = float((images.double() - truth).square().mean())
    return 10 * math.log10(float(truth.max()) ** 2 / error)
