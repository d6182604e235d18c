"""Time the CT operator against the projectors of ASTRA and skimage, side by side in one process.

Parallel beam, 1.5 N detectors of the size of a pixel. On the CPU the operator should be at least 6 times as
fast as ASTRA's ``linear`` for one image, 12 times for each of four, and 10 times as fast as skimage's
``radon`` and ``iradon`` (without filter; on the 1.42 N detectors that they choose). Some calls of one
alternate with some of the others: an iterative method calls the operator again and again, and what else the
machine does falls on all alike.

Run ``python -m benchmarks.ct_operator``.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import astra
import numpy as np
import torch
from astra.projector import direct_BP, direct_FP
from skimage.transform import iradon, radon

from operators import CTOperator, ParallelBeam, equispaced_angles

IN_A_ROW = 5
"""Calls that are timed together, as one method makes them; a single one finds cold caches and fresh pages."""

Call = Callable[[], Any]


def median_seconds(calls: Sequence[Call], repetitions: int) -> list[float]:
    """Median time of a call of each; runs of calls alternate, and the first round does not count."""
    seconds = np.empty((repetitions + 1, len(calls)))
    for row in seconds:
        for column, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                call()
            row[column] = (time.perf_counter() - start) / IN_A_ROW
    return np.median(seconds[1:], axis=0).tolist()


def relative(result: np.ndarray, truth: np.ndarray) -> float:
    """Relative difference."""
    return float(np.linalg.norm(result - truth) / np.linalg.norm(truth))


def compare(size: int, views: int, repetitions: int, seed: int) -> None:
    """Print the lines of one size and number of views."""
    detectors = 3 * size // 2
    angles = np.array(equispaced_angles(views))
    start = time.perf_counter()
    A = CTOperator(ParallelBeam(angles.tolist(), detectors, 1.0), (size, size), 1.0, memory_limit=2**35)
    megabytes = A.matrix.nbytes / 1e6
    built = time.perf_counter() - start
    case = f"{size}x{size}, {views} views"
    print(f"{case:20}matrix and transpose: {megabytes:.0f} MB, made in {built:.2f} s")

    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, size, size, generator=generator)
    y = torch.rand(4, views, detectors, generator=generator)
    one_x, one_y = x[0].numpy(), y[0].numpy()
    out_x, out_y = np.empty_like(one_x), np.empty_like(one_y)
    projector = astra.create_projector(
        "linear",
        astra.create_proj_geom("parallel", 1.0, detectors, angles),
        astra.create_vol_geom(size, size),
    )
    degrees = np.rad2deg(angles)
    sinogram = radon(one_x, degrees, circle=False)
    rows: list[tuple[str, tuple[Call, Call, Call, Call]]] = [
        (
            "forward",
            (
                lambda: A(x[0]),
                lambda: A(x),
                lambda: direct_FP(projector, one_x, out=out_y),
                lambda: radon(one_x, degrees, circle=False),
            ),
        ),
        (
            "adjoint",
            (
                lambda: A.adjoint(y[0]),
                lambda: A.adjoint(y),
                lambda: direct_BP(projector, one_y, out=out_x),
                lambda: iradon(sinogram, degrees, filter_name=None, circle=False, output_size=size),
            ),
        ),
    ]
    for name, calls in rows:
        deviation = relative(calls[0]().numpy(), calls[2]())
        one, four, theirs, skimage = median_seconds(calls, repetitions)
        times = "".join(f"{1e3 * t:10.2f}" for t in (one, four / 4, theirs, skimage))
        ratios = "".join(f"{ratio:9.1f}x" for ratio in (theirs / one, 4 * theirs / four, skimage / one))
        print(f"{case:20}{name:9}{times}{ratios}{deviation:10.1e}")
    astra.projector.delete(projector)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--views", type=int, nargs="+", default=[60, 180])
    parser.add_argument("--repetitions", type=int, default=9, help="runs that the median is taken over")
    parser.add_argument("--threads", type=int, help="threads that torch uses (default: what torch chooses)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"float32; {threads} threads for torch, load of the machine {load:.1f}; medians of", end=" ")
    print(f"{options.repetitions} alternating runs of {IN_A_ROW} calls,")
    print(
        "ms an image; then how much slower ASTRA is than ours for one image and for each of four, and skimage"
    )
    print("for one; deviation is the relative difference from ASTRA.")
    columns = ("ours", "of four", "ASTRA", "skimage", "ASTRA", "of four", "skimage", "deviation")
    print(" " * 29 + "".join(f"{name:>10}" for name in columns))
    for size in options.sizes:
        for views in options.views:
            compare(size, views, options.repetitions, options.seed)


if __name__ == "__main__":
    main()
