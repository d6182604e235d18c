"""Time to import, over that of torch: fresh processes, one after the other in turn.

``import recon`` loads nothing but itself, so that the first script's imports stand beside it: what is needed
before a reconstruction can begin, from an operator to the prior.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.speed.report import Bar, Section
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Spread

ROOT = Path(__file__).resolve().parents[2]
OURS = ("operators", "priors", "recon")
LIMIT = 1.3
STATEMENTS = {
    "torch": "import torch",
    "recon": "import recon",
    "a first script": "import torch; from operators import MulticoilMRI, espirit_maps, make_mask; "
    "from priors import load_prior; from recon import DDS, reconstruct",
    "the command line": "import recon.cli",
}
"""What is imported, by the name it has in the table."""


def output(code: str) -> str:
    """What a fresh process prints that runs some code in the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def seconds(statement: str) -> float:
    """Time of an import in a fresh process, without that of starting the interpreter."""
    return float(
        output(f"import time; begun = time.perf_counter(); {statement}; print(time.perf_counter() - begun)")
    )


def imported(statement: str, given: str = "pass") -> frozenset[str]:
    """Modules that an import loads in a fresh process, beside those of what is imported before."""
    text = output(
        f"import sys; {given}; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    )
    return frozenset(text.split())


def ours_of(modules: Iterable[str]) -> list[str]:
    """Those of this project."""
    return sorted(name for name in modules if name.partition(".")[0] in OURS)


def others_of(modules: Iterable[str]) -> list[str]:
    """Packages of theirs that are neither ours nor Python's."""
    known = {*OURS, *sys.stdlib_module_names, "__mp_main__"}  # the last is Python's name for a script
    return sorted({name.partition(".")[0] for name in modules} - known)


def slowest(statement: str, count: int = 8) -> list[tuple[str, float]]:
    """Modules outside of torch that take longest by themselves, with milliseconds, as Python counts them."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stderr
    found: list[tuple[str, float]] = []
    for line in text.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[0].strip().isdigit():
            found.append((fields[2].strip(), int(fields[0]) / 1000))
    return sorted(found, key=lambda one: -one[1])[:count]


def measure(settings: Settings) -> list[Section]:
    """Medians of fresh processes in turn, and what is slow where the limit is missed."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for turn in range(settings.repetitions + 1):  # the first round fills the disk's cache
        for name, statement in STATEMENTS.items():
            one = seconds(statement)
            if turn:
                times[name].append(one)
    spreads = {name: Spread.of(values) for name, values in times.items()}
    ratios = {name: spread.over(spreads["torch"]) for name, spread in spreads.items()}
    bars = [Bar(f"import {name} over import torch", ratios[name].median, LIMIT) for name in list(ratios)[1:]]
    notes = [f"{name}: `{statement}`" for name, statement in STATEMENTS.items()]
    notes.append("fresh processes in turn, the start of the interpreter not counted")
    for bar, name in zip(bars, list(ratios)[1:], strict=True):
        if not bar.met:
            worst = ", ".join(f"{module} {ms:.0f} ms" for module, ms in slowest(STATEMENTS[name]))
            notes.append(f"slowest by themselves for {name}: {worst}")
    return [
        Section(
            "imports",
            "Import time over that of torch",
            ["imported", "seconds", "over torch", "packages of others that it loads"],
            [
                [name, spreads[name], ratios[name], ", ".join(others_of(imported(statement))) or None]
                for name, statement in STATEMENTS.items()
            ],
            notes,
            bars,
        )
    ]
