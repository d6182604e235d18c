r"""Reconstruct what a YAML file describes with every method it names, and write tables and figures.

    python -m benchmarks benchmarks/mri.yaml --data /data
    python -m benchmarks benchmarks/ct.yaml --data /data --threads 1

Writes rows.csv, page.md, page.html (which needs no other file) and figures. Every reconstruction is kept in
the cache: an interrupted run goes on where it was, and a second one computes nothing. What was changed in the
file is computed anew, and nothing else. A change to the code is not noticed but said in the page: --fresh
computes again what other code made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.machine import command
from benchmarks.matrix.configuration import read_configuration
from benchmarks.matrix.methods import described
from benchmarks.matrix.results import Benchmark, prepare, write_results
from benchmarks.matrix.rows import make_rows
from benchmarks.matrix.running import Planned, outstanding, run_units
from benchmarks.matrix.store import Store
from operators.errors import OperatorError
from priors.errors import PriorError
from recon.cli.progress import progress_bar
from recon.cli.run import choose_device
from recon.errors import ReconError

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run what is not stored, and write the results.

    Returns
    -------
    int
        Exit status: 0, 1 if a reconstruction failed, 2 if nothing could be run, 130 if it was interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.list_methods:
        print(described())
        return 0
    if options.file is None:
        parser.error("give a YAML file")
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise ReconError(f"--threads is a whole number from 1, not {options.threads}")
            torch.set_num_threads(options.threads)
        choose_device(options.device)
        return _run(options, words)
    except (OperatorError, PriorError, ReconError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    configuration = read_configuration(options.file, options.data)
    stem = options.file.stem
    store = Store(options.cache or HERE.parent / "runs" / "matrix" / stem)
    benchmark = prepare(configuration, store, options.device, options.methods)
    wanted = _restricted(benchmark.units, options.methods, options.only)
    if not wanted:
        raise ReconError(f"{options.file}: nothing is left to reconstruct")
    todo = outstanding(wanted, store, [unit.entry.name for unit in wanted] if options.fresh else ())
    for name, reason in benchmark.skipped.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    print(f"{len(wanted) - len(todo)} of {len(wanted)} reconstructions are there already", file=sys.stderr)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    try:
        failures = _with_progress(benchmark, todo, count)
        rows = make_rows(benchmark.study, benchmark.units, store, configuration.perceptual)
    except KeyboardInterrupt:
        print(
            f"stopped after {done} of {len(todo)} reconstructions; the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    out = options.out or HERE / "results" / stem
    if rows:
        written = write_results(benchmark, rows, failures, out, command("benchmarks", words))
        if "rows.parquet" not in written:
            print("rows.parquet is not written, since pyarrow is not installed", file=sys.stderr)
        print(f"wrote {', '.join(written)} to {out}", file=sys.stderr)
    for label, reason in failures.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _restricted(
    units: Sequence[Planned], methods: Sequence[str] | None, only: Sequence[str] | None
) -> list[Planned]:
    kept = []
    for unit in units:
        if methods is not None and not {unit.entry.name, *unit.entry.names} & set(methods):
            continue
        where = f"{unit.volume.name}, slice {unit.index}, {unit.condition.label}"
        if only is not None and not any(text in where for text in only):
            continue
        kept.append(unit)
    return kept


def _with_progress(
    benchmark: Benchmark, units: Sequence[Planned], on_done: Callable[[], None]
) -> dict[str, str]:
    """Run with a bar on a terminal, and with a line for each unit elsewhere; give what failed."""
    bar = progress_bar("reconstructions")
    started = time.monotonic()
    with bar:
        task = bar.add_task("", total=len(units))

        def begin(unit: Planned) -> None:
            bar.update(task, description=unit.label)

        def end(unit: Planned, failure: str | None) -> None:
            bar.advance(task)
            on_done()
            if bar.disable or failure is not None:
                seconds = time.monotonic() - started
                text = f"[{seconds:.0f} s] {unit.label}" + ("" if failure is None else f": failed: {failure}")
                bar.console.print(text)

        return run_units(
            benchmark.study,
            units,
            benchmark.store,
            device=benchmark.shared.device,
            on_unit=begin,
            on_done=end,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE.yaml", help="what to reconstruct, and how"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where the data lie; default: beside the YAML file"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for tables and figures; default: benchmarks/results/FILE"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="for reconstructions; default: runs/matrix/FILE"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="run these methods only; the page keeps what is stored"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="run only where volume, slice and mask, as in 'scan, slice 3, poisson ×8', contain one of these",
    )
    parser.add_argument("--fresh", action="store_true", help="compute again what earlier code made")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    parser.add_argument("--device", default="cpu", help="where networks and operators run; default: cpu")
    parser.add_argument("--list-methods", action="store_true", help="list what `methods` may name, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
