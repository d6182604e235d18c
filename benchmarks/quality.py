r"""Image quality against classical methods: a table of PSNR, SSIM and NMSE for each target.

Coil maps always come from the calibration region of the undersampled data, and every method gets the same::

    python -m benchmarks.quality --measured full.cfl --cache runs/classical \
        --nifti study2_T1W.nii.gz:24 study2_FLAIR.nii.gz:25:320x256 study1_FLAIR.nii.gz:20

The volumes named here are patient 19 of the open MS data set (Lesjak et al. 2016, CC BY), which no bundled
prior was trained on. The classical methods are slow and do not depend on the prior: with ``--cache`` their
scores are kept, and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import TARGETS, Case, Scenario, make_scenario, measured_case, simulated_case
from benchmarks.classical import METHODS, Cache, Method, best_scores, score, score_one
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.errors import ReconError
from recon.sampling import reconstruct
from recon.solvers.dds import DDS

Row = dict[str, Any]
"""One method on one scenario against one target."""

MASKS = ("equispaced", "random", "poisson")
ACCELERATIONS = (4.0, 8.0)
ZERO_FILLED = "zero-filled"
METRICS = {"PSNR": ("{:.2f}", max), "SSIM": ("{:.3f}", max), "NMSE": ("{:.4f}", min)}


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The diffusion rows: a prior, and how many samples are averaged."""

    prior: ScorePrior
    num_samples: int = 8
    seed: int = 0
    device: str = "cpu"

    @property
    def names(self) -> tuple[str, str]:
        """What a table calls a single sample and the mean."""
        return "DDS, one sample", f"DDS, mean of {self.num_samples}"

    def rows(self, scenario: Scenario) -> Iterator[Row]:
        """Reconstruct once; the first sample and the mean are held against every target."""
        problem = scenario.problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anatomy or a spread is not what is judged here
            posterior = reconstruct(
                problem.y.to(self.device),
                problem.operator.to(self.device),
                self.prior,
                DDS(),
                num_samples=self.num_samples,
                seed=self.seed,
                noise_std=problem.noise_std,
                keep_samples=True,
            )
        assert posterior.samples is not None
        for name, image in zip(self.names, (posterior.samples[0], posterior.mean), strict=True):
            for target, scores in score(scenario, image.abs().cpu().numpy()).items():
                yield describe(scenario, target) | {"method": name} | scores


def describe(scenario: Scenario, target: str) -> Row:
    """What all rows of a scenario and target have in common."""
    targets = scenario.case.targets
    perfect = None
    if target != "noise-free" and scenario.case.simulated:
        perfect = score_one(targets[target].numpy(), targets["noise-free"].numpy())["PSNR"]
    return {
        "case": scenario.case.name,
        "simulated": scenario.case.simulated,
        "mask": scenario.mask.name,
        "asked": scenario.asked,
        "acceleration": scenario.mask.acceleration,
        "calibration": "{} × {}".format(*scenario.calibration),
        "target": target,
        "noise_free": perfect,
    }


def zero_filled_rows(scenario: Scenario) -> Iterator[Row]:
    """No reconstruction: for each target the zero-filled image of its own kind."""
    problem = scenario.problem
    combined = problem.operator.adjoint(problem.y).abs()
    for target, reference in scenario.case.targets.items():
        image = combined if target == "combined" else problem.zero_filled
        scores = score_one(reference.numpy(), image.numpy())
        yield describe(scenario, target) | {"method": ZERO_FILLED} | scores


def run(
    cases: Iterable[Case],
    *,
    methods: Sequence[Method] = METHODS,
    masks: Sequence[str] = MASKS,
    accelerations: Sequence[float] = ACCELERATIONS,
    cache: Cache | None = None,
    diffusion: Diffusion | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Reconstruct every case through every mask with every method.

    Parameters
    ----------
    cases : iterable of Case
        Test cases.
    methods : sequence of Method
        Classical methods.
    masks, accelerations : sequence
        Kinds of masks, and the accelerations asked of each.
    cache : Cache, optional
        Scores of the classical methods.
    diffusion : Diffusion, optional
        Prior and number of samples; without it the rows of DDS are left out.
    on_row : callable
        Called with every row as it is made.

    Returns
    -------
    list of dict
        ``case``, ``simulated``, ``mask``, ``asked``, ``acceleration`` (realised), ``calibration`` (rows ×
        columns), ``target``, ``noise_free`` (PSNR that the image before noise has against this target; None
        where it is not known), ``method``, ``PSNR``, ``SSIM``, ``NMSE``; classical rows have ``lambda`` and
        ``cropped`` too.
    """
    cache = Cache(None) if cache is None else cache
    rows: list[Row] = []

    def add(made: Iterable[Row]) -> None:
        for row in made:
            rows.append(row)
            on_row(row)

    for case in cases:
        for kind in masks:
            for acceleration in accelerations:
                scenario = make_scenario(case, kind, acceleration)
                add(zero_filled_rows(scenario))
                for method in methods:
                    found = best_scores(method, scenario, cache)
                    add(describe(scenario, t) | {"method": method.name} | s for t, s in found.items())
                if diffusion is not None:
                    add(diffusion.rows(scenario))
    return rows


def table(rows: Sequence[Row], target: str, mean_name: str | None = None) -> str:
    """Make the Markdown table of one target.

    Parameters
    ----------
    rows : sequence of dict
        Of `run`.
    target : str
        Name of the target.
    mean_name : str, optional
        Method whose lead over the best classical one the last column shows.

    Returns
    -------
    str
        One line for every case, mask and acceleration; the best of each metric in bold; below it a sentence
        naming the lines on which the mean does not lead.
    """
    lines = grouped(row for row in rows if row["target"] == target)
    names = list(dict.fromkeys(row["method"] for row in rows))
    headings = ["case", "mask", "asked", "realised", "calibration", *names]
    if mean_name is not None:
        headings.append("mean over best classical")
    perfect = any(row["noise_free"] is not None for line in lines for row in line.values())
    if perfect:
        headings.append("noise-free image")
    text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    behind = []
    for line in lines:
        first = next(iter(line.values()))
        cells = [first["case"], first["mask"], f"×{first['asked']:g}", f"×{first['acceleration']:.2f}"]
        cells += [first["calibration"], *(_cell(line, name) for name in names)]
        if mean_name is not None:
            classical = max(
                row["PSNR"] for name, row in line.items() if "lambda" in row or name == ZERO_FILLED
            )
            lead = line[mean_name]["PSNR"] - classical
            cells.append(f"{lead:+.2f} dB")
            if lead <= 0:
                behind.append(f"{first['case']}, {first['mask']} ×{first['asked']:g} ({lead:+.2f} dB)")
        if perfect:
            cells.append("–" if first["noise_free"] is None else f"{first['noise_free']:.2f}")
        text.append("| " + " | ".join(cells) + " |")
    if mean_name is not None:
        text += [
            "",
            f"The mean does not lead on: {'; '.join(behind)}." if behind else "The mean leads on every row.",
        ]
    return "\n".join(text)


def choices(rows: Sequence[Row]) -> str:
    """Make the Markdown table of what suited the classical methods: λ, and ``c`` where cropped maps won."""
    names = list(dict.fromkeys(row["method"] for row in rows if "lambda" in row))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    headings = ["case", "mask", "asked", *(f"{name}, {target}" for target in targets for name in names)]
    text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines: dict[tuple[str, str, float], dict[tuple[str, str], str]] = {}
    for row in rows:
        if "lambda" in row:
            line = lines.setdefault((row["case"], row["mask"], row["asked"]), {})
            line[row["target"], row["method"]] = f"{row['lambda']:.2g}" + (" c" if row["cropped"] else "")
    for (case, mask, asked), line in lines.items():
        cells = [case, mask, f"×{asked:g}"]
        cells += [line.get((target, name), "–") for target in targets for name in names]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def grouped(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Gather the rows of one case, mask and acceleration: method -> row, in the order of appearance."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["mask"], row["asked"]), {})[row["method"]] = row
    return list(groups.values())


def _cell(line: dict[str, Row], name: str) -> str:
    parts = []
    for metric, (form, better) in METRICS.items():
        text = form.format(line[name][metric])
        # What is printed alike is equally good.
        top = form.format(better(row[metric] for row in line.values()))
        parts.append(f"**{text}**" if text == top else text)
    return " / ".join(parts)


def report(rows: Sequence[Row], *, command: str, prior: str | None, mean_name: str | None) -> str:
    """Make the whole page: how it was made, a table for each target, and the weights that were chosen."""
    packages = ("torch", "numpy", "sigpy", "scikit-image", "dis-recon")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch",
        "command": f"`{command}`",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "prior": prior or "none: the rows of DDS were left out",
        "coil maps": "ESPIRiT from the calibration region of the undersampled data, the same for all methods",
        "DDS": "its defaults; `docs/what-matters.md` says on which of these slices they were chosen",
        "classical methods": "; ".join(f"{m.name}: {m.settings}" for m in METHODS)
        + ". λ from the powers of two, and maps cropped or not, chosen for each row and target by PSNR "
        "against the target itself: an oracle, which flatters these methods",
    }
    text = ["# Image quality", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    if any(row["simulated"] for row in rows):
        text += [
            "Tables made from processed magnitude images with simulated coils flatter every method on them.",
            "",
        ]
    text += [
        "Cells are PSNR in dB / SSIM / NMSE as fastMRI defines them, of one slice; the best of each in bold. "
        "The targets `rss` and `combined` hold the noise of the measurement; in air, the root sum of squares "
        "of C coils has the floor σ√(2C). A method that removes noise perfectly scores no more against them "
        "than the noise-free image does, whose PSNR the last column shows where it is known; one that scores "
        "more has reproduced noise.",
    ]
    for target, meaning in TARGETS.items():
        if not any(row["target"] == target for row in rows):
            continue
        text += ["", f"## Target `{target}`", "", f"The {meaning}.", "", table(rows, target, mean_name)]
    text += [
        "",
        "## Weights chosen",
        "",
        "λ for data scaled to a zero-filled image of maximum 1; c: cropped maps.",
    ]
    return "\n".join([*text, "", choices(rows), ""])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def nifti_argument(text: str) -> tuple[Path, int, tuple[int, int] | None]:
    """Take ``FILE:SLICE`` or ``FILE:SLICE:HEIGHTxWIDTH`` apart."""
    parts = text.split(":")
    try:
        if len(parts) == 3:
            height, width = (int(size) for size in parts.pop().split("x"))
            crop: tuple[int, int] | None = (height, width)
        else:
            crop = None
        file, index = parts
        return Path(file), int(index), crop
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE:SLICE or FILE:SLICE:HEIGHTxWIDTH") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="fully sampled slice in BART's layout")
    parser.add_argument(
        "--nifti",
        type=nifti_argument,
        nargs="+",
        default=[],
        metavar="FILE:SLICE[:HxW]",
        help="slices of NIfTI volumes, cropped to the central H × W; coils, phase and noise are simulated",
    )
    parser.add_argument(
        "--masks", nargs="+", default=MASKS, metavar="KIND", help=f"default: {' '.join(MASKS)}"
    )
    parser.add_argument("--accelerations", type=float, nargs="+", default=ACCELERATIONS, help="default: 4 8")
    parser.add_argument(
        "--prior", default="brain", help="prior: a .safetensors file, or the name of a bundled one"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--num-samples", type=int, default=8, help="samples that are averaged")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument(
        "--device", default="cpu", help="where DDS runs; the classical methods run on the CPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of DDS")
    parser.add_argument("--skip-dds", action="store_true", help="the classical methods only")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep the classical methods' scores here"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "quality.md",
        help="default: %(default)s",
    )
    return parser


def _shown(arguments: Sequence[str]) -> str:
    """The command as typed, with file names for paths."""
    shown = [word.rpartition("/")[2] if "/" in word else word for word in arguments]
    return shlex.join(["python", "-m", "benchmarks.quality", *shown])


def _print_row(row: Row) -> None:
    print(
        f"{row['case']}, {row['mask']} ×{row['asked']:g}, {row['target']}, {row['method']}: "
        f"{row['PSNR']:.2f} dB",
        file=sys.stderr,
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the page and write it."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.measured is None and not options.nifti:
        parser.error("nothing to reconstruct: give --measured, --nifti, or both")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        prior, diffusion = None, None
        if not options.skip_dds:
            network = load_prior(options.prior, precision=options.precision, device=options.device)
            diffusion = Diffusion(network, options.num_samples, options.seed, options.device)
            digest = prior_hash(prior_path(options.prior))[:12]
            prior = (
                f"{network.contract.name or Path(options.prior).name}, SHA-256 {digest}…, {options.precision}"
            )
        cases = [] if options.measured is None else [measured_case(options.measured)]
        cases += [simulated_case(*which) for which in options.nifti]
        rows = run(
            cases,
            masks=options.masks,
            accelerations=options.accelerations,
            cache=Cache(options.cache),
            diffusion=diffusion,
            on_row=_print_row,
        )
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    page = report(
        rows, command=_shown(words), prior=prior, mean_name=diffusion.names[1] if diffusion else None
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".part")
    partial.write_text(page)
    partial.replace(options.out)
    print(page)


if __name__ == "__main__":
    main()
