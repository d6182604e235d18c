"""Time the multi-coil operator against sigpy's, side by side in one process.

``A.normal`` with a mask of columns is what every step of every solver calls; it should be at least 6 times as
fast as sigpy's. Ten calls of one alternate with ten of the other: an iterative method calls the operator
again and again, and what else the machine does falls on both alike.

Run ``python -m benchmarks.normal_operator``.
"""

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from sigpy.mri.linop import Sense
from torch import Tensor

from operators import MulticoilMRI

SHAPES = ((320, 320), (640, 368))

Pair = tuple[Callable[[], Tensor], Callable[[], np.ndarray]]


IN_A_ROW = 10
"""Calls that are timed together, as one method makes them; a single one finds cold caches and fresh pages."""


def median_seconds(calls: Pair, repetitions: int) -> tuple[float, float]:
    """Median time of a call of each; runs of calls alternate, and two rounds before do not count."""
    seconds = np.empty((repetitions + 2, len(calls)))
    for row in seconds:
        for column, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                call()
            row[column] = (time.perf_counter() - start) / IN_A_ROW
    ours, theirs = np.median(seconds[2:], axis=0)
    return float(ours), float(theirs)


def make_masks(shape: tuple[int, int], acceleration: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Make a mask of every n-th column with 24 central ones, and one of random points."""
    columns = torch.zeros(shape[1], dtype=torch.bool)
    columns[::acceleration] = True
    columns[shape[1] // 2 - 12 : shape[1] // 2 + 12] = True
    return {"columns": columns, "points": torch.rand(shape, generator=generator) < 1 / acceleration}


def make_calls(shape: tuple[int, int], coils: int, acceleration: int, seed: int) -> dict[str, Pair]:
    """Make what is timed for one matrix size: an operation by name, ours and sigpy's."""
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--coils", type=int, default=15)
    parser.add_argument("--acceleration", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=9, help="runs that the median is taken over")
    parser.add_argument("--threads", type=int, help="threads that torch uses (default: what torch chooses)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    setting = f"{options.coils} coils, x{options.acceleration}, complex64"
    load = os.getloadavg()[0]
    print(f"{setting}; {torch.get_num_threads()} threads for torch, load of the machine {load:.1f};")
    print(
        f"medians of {options.repetitions} alternating runs of {IN_A_ROW} calls, ms a call; deviation is the "
        "relative difference."
    )
    print(f"{'size':10}{'operation':20}{'ours':>9}{'sigpy':>9}{'ratio':>8}{'deviation':>12}")
    for shape in SHAPES:
        for name, pair in make_calls(shape, options.coils, options.acceleration, options.seed).items():
            ours, theirs = pair[0]().numpy(), pair[1]()
            deviation = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            fast, slow = median_seconds(pair, options.repetitions)
            size = f"{shape[0]}x{shape[1]}"
            print(f"{size:10}{name:20}{1e3 * fast:9.2f}{1e3 * slow:9.2f}{slow / fast:7.1f}x{deviation:12.1e}")


if __name__ == "__main__":
    main()
