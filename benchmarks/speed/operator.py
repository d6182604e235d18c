"""The multi-coil operator against sigpy's, side by side in one process.

``A.normal`` with a mask of columns is what every step of every solver calls; it should be at least 6 times as
fast as sigpy's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.report import Bar, Section, Value
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import in_turn, wall
from operators.mri import MulticoilMRI

SHAPES = ((320, 320), (640, 368))
IN_A_ROW = 10
"""Calls that are timed together, as one method makes them; a single one finds cold caches and fresh pages."""
ACCELERATION = 4
LIMIT = 1 / 6

Pair = tuple[Callable[[], Tensor], Callable[[], np.ndarray]]


def make_masks(shape: tuple[int, int], acceleration: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Make a mask of every n-th column with 24 central ones, and one of random points."""
    columns = torch.zeros(shape[1], dtype=torch.bool)
    columns[::acceleration] = True
    columns[shape[1] // 2 - 12 : shape[1] // 2 + 12] = True
    return {"columns": columns, "points": torch.rand(shape, generator=generator) < 1 / acceleration}


def make_calls(shape: tuple[int, int], coils: int, acceleration: int, seed: int) -> dict[str, Pair]:
    """Make what is timed for one matrix size: an operation by name, ours and sigpy's."""
    from sigpy.mri.linop import Sense

    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(coils, *shape, dtype=torch.complex64, generator=generator)
    maps /= torch.linalg.vector_norm(maps, dim=0)
    x = torch.randn(shape, dtype=torch.complex64, generator=generator)

    def calls(ours: MulticoilMRI, theirs: Sense) -> tuple[Pair, Pair, Pair]:
        y = ours(x)
        adjoint, normal = theirs.H, theirs.N
        return (
            (lambda: ours.normal(x), lambda: normal(x.numpy())),
            (lambda: ours(x), lambda: theirs(x.numpy())),
            (lambda: ours.adjoint(y), lambda: adjoint(y.numpy())),
        )

    result: dict[str, Pair] = {}
    for name, mask in make_masks(shape, acceleration, generator).items():
        weights = mask.expand(shape).numpy().astype(np.float32)
        pairs = calls(MulticoilMRI(maps, mask), Sense(maps.numpy(), weights=weights))
        result |= {
            f"{op}, {name}": pair for op, pair in zip(("normal", "forward", "adjoint"), pairs, strict=True)
        }
    return result


def measure(settings: Settings) -> list[Section]:
    """Times and deviation of every operation at both sizes; always on the CPU, which is where sigpy runs."""
    torch.set_num_threads(settings.threads[0])
    cpu = torch.device("cpu")
    rows: list[list[Value]] = []
    slowest = 0.0
    with torch.no_grad():
        for shape in SHAPES:
            for name, (ours, theirs) in make_calls(shape, settings.coils, ACCELERATION, 0).items():
                expected = theirs()
                deviation = np.linalg.norm(ours().numpy() - expected) / np.linalg.norm(expected)
                times = in_turn({"ours": ours, "sigpy": theirs}, settings.repetitions, cpu, in_a_row=IN_A_ROW)
                own, others = wall(times["ours"]), wall(times["sigpy"])
                ratio = own.over(others)
                if name == "normal, columns":
                    slowest = max(slowest, ratio.median)
                size = f"{shape[0]}×{shape[1]}"
                rows.append([size, name, own.times(1e3), others.times(1e3), ratio, f"{deviation:.1e}"])
    return [
        Section(
            "operator",
            "The multi-coil operator against sigpy's",
            ["size", "operation", "ours / ms", "sigpy / ms", "ours over sigpy", "relative difference"],
            rows,
            [
                f"{settings.coils} coils, ×{ACCELERATION}, complex64, {settings.threads[0]} threads for "
                f"torch; {settings.repetitions} alternating runs of {IN_A_ROW} calls each"
            ],
            [Bar("normal, columns: ours over sigpy", slowest, LIMIT)],
        )
    ]
