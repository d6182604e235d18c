"""Whether anything became slower: counts and ratios held to the bounds of ``bounds.yaml``.

Counts are the same on every machine, and tests hold them to their bounds. Ratios of times are for a person to
run, on a machine that does nothing else; their bounds are wide. Those of a slice's parts tests hold too, of
processor time and to bounds so wide that only a gross regression breaks them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.speed import imports, operator
from benchmarks.speed.counts import measure_counts
from benchmarks.speed.networks import Network, load_network
from benchmarks.speed.report import Bar, Section
from benchmarks.speed.scaling import Ranges, all_calls, fitted
from benchmarks.speed.settings import Settings, noise_of, phantom, scan, solver_problem
from benchmarks.speed.timing import Seconds, Spread, in_turn, wall
from recon.errors import ReconError
from recon.sampling import reconstruct
from recon.solvers.base import Problem
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS

BOUNDS = Path(__file__).with_name("bounds.yaml")
KINDS = ("counts", "ratios")
RANGES = Ranges(slices=(1, 2, 4), samples=(1, 2, 4), base_size=96, nfe=4)


def read_bounds(path: Path = BOUNDS) -> dict[str, dict[str, float]]:
    """Read the most that each count and ratio may be.

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReconError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReconError(f"{path} is not YAML: {next(iter(str(error).splitlines()), '')}") from None
    if not isinstance(content, dict) or set(content) != set(KINDS):
        raise ReconError(f"{path} holds two mappings, {' and '.join(KINDS)}")
    return {kind: _numbers(content[kind], kind, path) for kind in KINDS}


def _numbers(content: Any, kind: str, path: Path) -> dict[str, float]:
    if not isinstance(content, dict):
        raise ReconError(f"{path}: {kind} is a mapping of names to numbers, not {content!r}")
    for name, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not math.isfinite(value):
            raise ReconError(f"{path}: {kind} has {name!r}: {value!r}, which is no name with a number")
    return {name: float(value) for name, value in content.items()}


def held(measured: Mapping[str, float], bounds: Mapping[str, float], what: str) -> list[Bar]:
    """What was measured beside its bounds.

    Raises
    ------
    ReconError
        Naming what has no bound, or what has one and was not measured.
    """
    for names, lack in (
        (set(measured) - set(bounds), "has no bound"),
        (set(bounds) - set(measured), "has a bound and was not measured"),
    ):
        if names:
            raise ReconError(f"of the {what}, {', '.join(map(repr, sorted(names)))} {lack}")
    return [Bar(name, value, bounds[name]) for name, value in measured.items()]


def solver_ratios(
    settings: Settings, network: Network, clock: Callable[[Sequence[Seconds]], Spread] = wall
) -> dict[str, float]:
    """Ratios of times of the parts of a slice, by a clock of `benchmarks.speed.timing`."""
    device = torch.device("cpu")
    prior, solver = network.prior, DDS(nfe=10)
    one = scan(phantom((settings.size, settings.size)), settings.coils, device)
    ready = one.problem()
    problem = solver_problem(ready, network)
    image = noise_of(problem)(0)
    coil_images = torch.ones_like(ready.y)

    def fresh() -> Problem:
        return Problem(problem.y, problem.operator, problem.noise_std)

    with torch.no_grad():
        times = in_turn(
            {
                "sample": lambda: solver.sample(fresh(), prior, noise_of(problem)),
                "network": lambda: [prior.denoise(image, 0.1) for _ in range(solver.nfe)],
                "reconstruct": lambda: reconstruct(
                    ready.y, ready.operator, prior, solver, noise_std=ready.noise_std
                ),
                "maps": one.problem,
                "DPS": lambda: DPS(nfe=solver.nfe).sample(fresh(), prior, noise_of(problem)),
                "normal": lambda: [problem.operator.normal(image) for _ in range(10)],
                "FFTs": lambda: [
                    torch.fft.ifftn(torch.fft.fftn(coil_images, dim=(-2, -1))) for _ in range(10)
                ],
            },
            settings.repetitions,
            device,
        )
        found = {name: clock(values) for name, values in times.items()}
    pairs = {
        "DDS sample over its network": ("sample", "network"),
        "reconstruct over DDS sample": ("reconstruct", "sample"),
        "maps and noise over DDS sample": ("maps", "sample"),
        "DPS step over DDS step": ("DPS", "sample"),
        "normal, columns, over two FFTs": ("normal", "FFTs"),
    }
    return {name: found[own].over(found[other]).median for name, (own, other) in pairs.items()}


def ratios(settings: Settings) -> dict[str, float]:
    """Ratios of times on small problems: medians of rounds in turn."""
    torch.set_num_threads(settings.threads[0])
    device = torch.device("cpu")
    network = load_network(settings.network, settings.precision, device)
    result = solver_ratios(settings, network)
    with tempfile.TemporaryDirectory() as folder:
        calls = all_calls(network, RANGES, device, Path(folder))
        for name in ("slices", "samples"):
            result[f"exponent in {name}"] = fitted(calls[name], settings.repetitions, device).exponent.value
    times_of_import = {
        name: Spread.of([imports.seconds(imports.STATEMENTS[name]) for _ in range(settings.repetitions)])
        for name in ("torch", "recon", "a first script")
    }
    for name in ("recon", "a first script"):
        result[f"import {name} over torch"] = times_of_import[name].over(times_of_import["torch"]).median
    small = replace(settings, coils=min(settings.coils, 8))
    bar = operator.measure(small)[0].bars[0]
    result[bar.name] = bar.value
    return result


def measure(settings: Settings, bounds: Path = BOUNDS) -> list[Section]:
    """Counts and ratios beside their bounds."""
    limits = read_bounds(bounds)
    found = {"counts": measure_counts(), "ratios": ratios(settings)}
    sections = []
    for kind in KINDS:
        bars = held(found[kind], limits[kind], kind)
        sections.append(
            Section(
                kind,
                f"Regression: {kind}",
                ["what", "measured", "at most", ""],
                [[bar.name, bar.value, bar.at_most, "met" if bar.met else "**missed**"] for bar in bars],
                [],
                [bar for bar in bars if not bar.met],
            )
        )
    return sections
