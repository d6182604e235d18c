"""Cost against slices, samples, coils and size: exponents of a fitted power law.

An exponent of 1 is cost in proportion. Slices are those of a file, from the file to the written result;
everything else is one slice, maps and all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed.kspace_files import write_volume
from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.report import Bar, Section, Value
from benchmarks.speed.settings import Settings, phantom, scan
from benchmarks.speed.timing import Exponent, Spread, fit_exponent, in_turn, wall
from recon.mri import MRISettings, reconstruct_file
from recon.sampling import reconstruct
from recon.solvers.dds import DDS

LIMIT = 1.05
LIMITED = ("slices", "samples")
Calls = Mapping[int, Callable[[], object]]


@dataclass(frozen=True)
class Ranges:
    """What is varied, and from what it starts."""

    slices: tuple[int, ...] = (1, 2, 4, 8)
    samples: tuple[int, ...] = (1, 2, 4, 8)
    coils: tuple[int, ...] = (4, 8, 16, 32)
    sizes: tuple[int, ...] = (96, 128, 192, 256)
    base_coils: int = 6
    base_size: int = 128
    nfe: int = 6


@dataclass(frozen=True)
class Scaling:
    """How a cost grows: the exponent, and the time at each size."""

    exponent: Exponent
    seconds: Mapping[int, Spread]


def fitted(calls: Calls, repetitions: int, device: torch.device) -> Scaling:
    """Time calls of rising size in turn, and fit the exponent of their cost."""
    named = {str(size): call for size, call in calls.items()}
    times = in_turn(named, repetitions, device)
    sizes = [size for size in calls for _ in times[str(size)]]
    seconds = [one.wall for size in calls for one in times[str(size)]]
    return Scaling(fit_exponent(sizes, seconds), {size: wall(times[str(size)]) for size in calls})


def slice_call(
    network: Network, ranges: Ranges, device: torch.device, *, coils: int, size: int, samples: int
) -> Callable[[], object]:
    """Reconstruction of one slice, from k-space."""
    one = scan(phantom((size, size)), coils, device)
    solver = DDS(nfe=ranges.nfe)

    def call() -> None:
        ready = one.problem()
        reconstruct(
            ready.y,
            ready.operator,
            network.prior,
            solver,
            samples,
            noise_std=ready.noise_std,
            # One at a time everywhere, so that the number of samples is all that varies.
            micro_batch=1,
        )

    return call


def file_call(
    network: Network, ranges: Ranges, device: torch.device, folder: Path, slices: int
) -> Callable[[], object]:
    """Reconstruction of a file, from the file to the written result."""
    side = ranges.base_size
    source = write_volume(folder / f"volume{slices}.h5", slices, ranges.base_coils, (side, side))
    settings = MRISettings(mask="equispaced", acceleration=4, num_samples=1)
    solver = DDS(nfe=ranges.nfe)
    out = folder / f"result{slices}.h5"
    return lambda: reconstruct_file(source, out, network.prior, solver, settings, device=device)


def all_calls(network: Network, ranges: Ranges, device: torch.device, folder: Path) -> dict[str, Calls]:
    """What is timed: by what is varied, by its value."""

    def one(coils: int = ranges.base_coils, size: int = ranges.base_size, samples: int = 1) -> Callable:
        return slice_call(network, ranges, device, coils=coils, size=size, samples=samples)

    return {
        "slices": {n: file_call(network, ranges, device, folder, n) for n in ranges.slices},
        "samples": {n: one(samples=n) for n in ranges.samples},
        "coils": {n: one(coils=n) for n in ranges.coils},
        "pixels": {n * n: one(size=n) for n in ranges.sizes},
    }


def measure(settings: Settings, ranges: Ranges | None = None) -> list[Section]:
    """Fit the exponents."""
    ranges = ranges or Ranges()
    torch.set_num_threads(settings.threads[0])
    network = load_network(settings.network, settings.precision, settings.device)
    with tempfile.TemporaryDirectory() as folder:
        calls = all_calls(network, ranges, settings.device, Path(folder))
        found = {name: fitted(some, settings.repetitions, settings.device) for name, some in calls.items()}
    rows: list[list[Value]] = [
        [name, ", ".join(map(str, one.seconds)), _times(list(one.seconds.values())), one.exponent]
        for name, one in found.items()
    ]
    return [
        Section(
            "scaling",
            f"Cost against slices, samples, coils and pixels ({network.description})",
            ["varied", "values", "seconds (medians)", "exponent (95 % interval)"],
            rows,
            [
                f"DDS with {ranges.nfe} network evaluations, {ranges.base_coils} coils, {ranges.base_size}² "
                "where they are not varied; slices: those of a file, from the file to the written result; "
                "all else: one slice from k-space to image, coil maps too",
                f"least squares on logarithms of {settings.repetitions} rounds in turn, "
                f"{settings.threads[0]} threads",
            ],
            [Bar(f"exponent in {name}", found[name].exponent.value, LIMIT) for name in LIMITED],
        )
    ]


def _times(spreads: Sequence[Spread]) -> str:
    return ", ".join(f"{spread.median:.2f}" for spread in spreads)
