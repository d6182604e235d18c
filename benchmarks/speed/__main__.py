r"""How fast a reconstruction is, and what its time goes to.

    python -m benchmarks.speed                            # everything, on this machine's CPU
    python -m benchmarks.speed overhead quality --nifti study2_T1W.nii.gz:24
    python -m benchmarks.speed throughput --device cuda --network ncsnpp    # bf16, 36 slices of 640×368
    python -m benchmarks.speed --regression               # counts and ratios against bounds.yaml

Sections:
  overhead    a sample over its network evaluations: all coils, virtual coils, fewer steps
  quality     PSNR against seconds a slice, and the fastest way to a PSNR
  scaling     exponents of cost in slices, samples, coils, pixels
  memory      peak memory against samples; a step of DPS beside one of DDS
  operator    the multi-coil operator against sigpy's
  throughput  largest batch, ms by part, a whole volume
  imports     time to import over that of torch

Every table is printed with medians and minimum–maximum of rounds that take turns within one process. Limits
are judged, never enforced, but by --regression, which exits 1 when a bound is broken. The memory of a process
is read from /proc, so on Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.cases import nifti_argument
from benchmarks.speed import imports, memory, operator, overhead, quality, regression, scaling, throughput
from benchmarks.speed.report import Section
from benchmarks.speed.settings import Settings
from operators.errors import OperatorError
from priors.errors import PriorError
from recon.errors import ReconError

SECTIONS: dict[str, Callable[[Settings], list[Section]]] = {
    "overhead": overhead.measure,
    "quality": quality.measure,
    "scaling": scaling.measure,
    "memory": memory.measure,
    "operator": operator.measure,
    "throughput": throughput.measure,
    "imports": imports.measure,
}
VOLUME = {"cpu": (4, 6, 192, 160), "cuda": (36, 15, 640, 368)}
MOST = {"cpu": 4, "cuda": 256}
REGRESSION = {"coils": 6, "size": 160, "repetitions": 5}
"""Settings of the quick version, whose bounds were made for them."""


def volume_argument(text: str) -> tuple[int, int, int, int]:
    """Take ``SLICESxCOILSxHEIGHTxWIDTH`` apart."""
    try:
        slices, coils, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SLICESxCOILSxHEIGHTxWIDTH") from None
    if min(slices, coils, height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return slices, coils, height, width


def positive(text: str) -> int:
    """Read a whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return value


def device_argument(text: str) -> torch.device:
    """Read a device: the CPU, or a GPU that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; cpu and cuda are") from None
    if device.type not in VOLUME:
        raise argparse.ArgumentTypeError(f"only cpu and cuda are timed, not {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds no CUDA device on this machine")
    return device


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__ or ""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=text.partition("\n")[0],
        epilog=text.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("sections", nargs="*", metavar="SECTION", help="which sections (default: all)")
    result.add_argument("--device", type=device_argument, default=torch.device("cpu"), help="cpu or cuda")
    result.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        help="CPU threads; overhead goes through all (default: 1 2)",
    )
    result.add_argument("--coils", type=positive, help="coils of the slice (default: 15)")
    result.add_argument("--virtual-coils", type=positive, default=6, help="to how many they are compressed")
    result.add_argument("--size", type=positive, help="height and width of the slice (default: 320)")
    result.add_argument(
        "--network",
        default="brain",
        help="a prior's name or file, or ncsnpp or adm: published architectures with random weights",
    )
    result.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        nargs="+",
        help="of the network; overhead goes through all (default: bf16 on a GPU, else fp32)",
    )
    result.add_argument("--repetitions", type=positive, help="rounds that are counted (default: 5)")
    result.add_argument(
        "--nifti",
        type=nifti_argument,
        metavar="FILE:SLICE",
        help="scan a slice of magnitudes in overhead and quality, instead of nested ellipses",
    )
    result.add_argument("--psnr", type=float, nargs="+", default=(), help="what quality is to reach, in dB")
    result.add_argument(
        "--volume", type=volume_argument, metavar="SxCxHxW", help="slices, coils, height, width of throughput"
    )
    result.add_argument("--samples", type=positive, default=4, help="samples a slice of that volume")
    result.add_argument(
        "--largest-batch", type=positive, help="where the search for one ends (default: 256 on a GPU, else 4)"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the tables as a Markdown page")
    result.add_argument(
        "--regression",
        action="store_true",
        help="quick version, against bounds; exits 1 if one is broken",
    )
    result.add_argument("--bounds", type=Path, default=regression.BOUNDS, metavar="FILE", help="other bounds")
    return result


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings of the options, with what suits the device where none was given."""
    kind = options.device.type
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    several = (1, 2) if available > 1 and not options.regression else (1,)
    quick = REGRESSION if options.regression else {}
    return Settings(
        device=options.device,
        threads=tuple(options.threads or several),
        coils=options.coils or quick.get("coils", 15),
        virtual_coils=options.virtual_coils,
        size=options.size or quick.get("size", 320),
        network=options.network,
        precisions=tuple(options.precision or (["bf16"] if kind == "cuda" else ["fp32"])),
        repetitions=options.repetitions or quick.get("repetitions", 5),
        nifti=options.nifti,
        volume=options.volume or VOLUME[kind],
        samples=options.samples,
        most=options.largest_batch or MOST[kind],
        psnr=tuple(options.psnr),
    )


def facts(arguments: Sequence[str]) -> dict[str, str]:
    """When, where and by what command it was measured."""
    words = [word.rpartition("/")[2] if "/" in word else word for word in arguments]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}",
        "load of the machine before (1, 5, 15 minutes)": load,
        "command": f"`{shlex.join(['python', '-m', 'benchmarks.speed', *words])}`",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    reader = parser()
    options = reader.parse_args(given)
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        reader.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.regression and options.sections:
        reader.error("--regression has sections of its own: leave them out")
    if options.regression and options.device.type != "cpu":
        reader.error("the bounds of --regression are for a CPU: leave out --device")
    settings = settings_of(options)
    about = facts(given)
    done: list[Section] = []
    print("\n".join(f"{name}: {value}" for name, value in about.items()), end="\n\n", flush=True)
    try:
        for measure in _wanted(options):
            for section in measure(settings):
                done.append(section)
                print(section.markdown(), flush=True)
                _write(options, about, done)  # what is done is kept, whatever becomes of the rest
    except (OperatorError, PriorError, ReconError) as error:
        sys.exit(f"error: {error}")
    if options.regression and any(section.bars for section in done):
        broken = [bar.name for section in done for bar in section.bars]
        sys.exit(f"slower than its bound: {', '.join(broken)}")


def _wanted(options: argparse.Namespace) -> list[Callable[[Settings], list[Section]]]:
    if options.regression:
        return [lambda settings: regression.measure(settings, options.bounds)]
    return [measure for name, measure in SECTIONS.items() if not options.sections or name in options.sections]


def _write(options: argparse.Namespace, about: dict[str, str], done: Sequence[Section]) -> None:
    if options.json is not None:
        content = {**about, "sections": {section.name: section.as_dict() for section in done}}
        _replace(options.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if options.out is not None:
        head = ["# Speed", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
        _replace(options.out, "\n".join([*head, *(section.markdown() for section in done)]))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
