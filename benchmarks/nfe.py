r"""Quality against network evaluations: DDS beside the published setting of itself, Score-MRI and DPS.

Every solver sees the same data, maps, noise level and prior::

    python -m benchmarks.nfe --nifti study2_T1W.nii.gz:24 --cache runs/nfe

PSNR is that of single samples, as published figures are, against the coil-combined image; of several samples
the mean square error is averaged. Rows are kept with ``--cache``, and an interrupted run resumes. Writes a
Markdown table and a figure.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import (
    Scenario,
    make_scenario,
    mask_argument,
    measured_case,
    nifti_argument,
    simulated_case,
)
from benchmarks.kept_lines import append_line, read_lines
from benchmarks.machine import command, machine
from benchmarks.matrix.store import code_digest
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.calibration import kspace_digest
from recon.errors import ReconError
from recon.sampling import reconstruct
from recon.solvers.base import Solver
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS
from recon.solvers.score_mri import ScoreMRI

Row = dict[str, Any]

SCENARIOS = (("equispaced", 4.0), ("poisson", 8.0))


def contenders(longest: int) -> list[tuple[str, Solver]]:
    """Solvers with rising budgets; those with a published number of steps up to ``longest`` evaluations."""
    runs: list[tuple[str, Solver]] = [("DDS", DDS(nfe=nfe)) for nfe in (5, 10, 15, 20, 30, 49)]
    runs += [("DDS, eta = 0", DDS(nfe=nfe, eta=0.0)) for nfe in (5, 10, 15, 20, 30, 49)]
    runs += [("DDS, published setting", DDS.paper(nfe)) for nfe in (19, 49, 99)]
    runs += [("DPS", DPS(nfe=nfe)) for nfe in (50, 100, 200, 1000) if nfe <= longest]
    # Half of the evaluations are the predictor's, half the corrector's.
    runs += [("Score-MRI", ScoreMRI(steps=nfe // 2)) for nfe in (100, 200, 400, 800) if nfe <= longest]
    if longest >= ScoreMRI.paper().nfe:
        runs.append(("Score-MRI, published setting", ScoreMRI.paper()))
    return runs


def measure(scenario: Scenario, prior: ScorePrior, solver: Solver, num_samples: int, seed: int) -> Row:
    """PSNR of single samples against the coil-combined image, and the time each took."""
    problem = scenario.problem
    target = scenario.case.targets["combined"].numpy()
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an anatomy or a spread is not what is judged here
        posterior = reconstruct(
            problem.y,
            problem.operator,
            prior,
            solver,
            num_samples,
            seed,
            noise_std=problem.noise_std,
            keep_samples=True,
        )
    seconds = (time.monotonic() - started) / num_samples
    assert posterior.samples is not None
    errors = [float(np.mean((sample.abs().numpy() - target) ** 2)) for sample in posterior.samples]
    psnr = 10 * math.log10(float(target.max()) ** 2 / float(np.mean(errors)))
    return {"nfe": posterior.nfe, "psnr": psnr, "seconds": seconds}


def run(
    scenarios: Sequence[Scenario],
    prior: ScorePrior,
    identity: str,
    *,
    num_samples: int,
    seed: int,
    longest: int,
    cache: Path | None,
) -> Iterator[Row]:
    """Every solver on every scenario; rows that the cache holds are not computed again.

    `identity` tells prior and precision from others.
    """
    known: dict[str, Row] = {} if cache is None else read_lines(cache, "row")
    for scenario in scenarios:
        where = f"{scenario.case.name}, {scenario.mask.name} ×{scenario.asked:g}"
        # All of k-space, which the target is made of, and what of it was sampled.
        data = " ".join(kspace_digest(k) for k in (scenario.case.kspace, scenario.problem.y))
        for name, solver in contenders(longest):
            key = f"{data} | {solver} | {num_samples} | {seed} | {identity} | {code_digest()}"
            if key not in known:
                row = measure(scenario, prior, solver, num_samples, seed)
                known[key] = {"where": where, "name": name, **row}
                if cache is not None:
                    append_line(cache, key, row=known[key])
            yield known[key]


def table(rows: Sequence[Row]) -> str:
    """One Markdown line for each scenario and solver: PSNR at each budget; below, the comparisons."""
    text = ["| data | solver | PSNR in dB (network evaluations) | seconds a sample |", "|---|---|---|---|"]
    for where in dict.fromkeys(row["where"] for row in rows):
        here = [row for row in rows if row["where"] == where]
        for name in dict.fromkeys(row["name"] for row in here):
            found = [row for row in here if row["name"] == name]
            quality = ", ".join(f"{row['psnr']:.2f} ({row['nfe']})" for row in found)
            seconds = " – ".join(f"{time:.1f}" for time in (found[0]["seconds"], found[-1]["seconds"]))
            text.append(f"| {where} | {name} | {quality} | {seconds} |")
    text.append("")
    for where in dict.fromkeys(row["where"] for row in rows):
        text.append(f"- {where}: {compared([row for row in rows if row['where'] == where])}")
    return "\n".join(text)


def compared(rows: Sequence[Row]) -> str:
    """What DDS reaches with 20 evaluations, and the fewest with which it is as good as Score-MRI."""
    psnr = {(row["name"], row["nfe"]): row["psnr"] for row in rows}
    own = psnr["DDS", 20] - psnr["DDS", 49]
    sharpest = psnr["DDS, eta = 0", 20] - psnr["DDS, eta = 0", 49]
    published = psnr["DDS", 20] - psnr["DDS, published setting", 49]
    sentence = (
        f"DDS with 20 evaluations is {own:+.2f} dB ({sharpest:+.2f} with eta = 0) from itself with 49, and "
        f"{published:+.2f} dB from the published setting with 49"
    )
    ours = [row for row in rows if row["name"] in ("DDS", "DDS, eta = 0")]
    for name in ("Score-MRI", "DPS"):
        theirs = [row for row in rows if row["name"] == name]
        if not theirs:  # all of its runs are longer than was asked for
            continue
        best, longest = (max(theirs, key=itemgetter(by)) for by in ("psnr", "nfe"))
        for which, row in (("at best", best), ("with its longest run", longest)):
            enough = min((r["nfe"] for r in ours if r["psnr"] >= row["psnr"]), default=None)
            sentence += f"; {name} reaches {row['psnr']:.2f} dB {which} ({row['nfe']}), " + (
                f"DDS as much with {enough}, 1/{row['nfe'] / enough:.0f} of them"
                if enough
                else f"DDS {max(r['psnr'] for r in ours):.2f} dB"
            )
    return sentence + "."


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw PSNR against network evaluations, one panel a scenario."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(row["where"] for row in rows))
    columns = min(len(places), 2)
    lines = -(-len(places) // columns)
    drawing = Figure(figsize=(5.2 * columns, 4 * lines), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(lines, columns, squeeze=False).ravel()
    for unused in grid[len(places) :]:
        unused.set_axis_off()
    for axes, where in zip(grid, places, strict=False):
        for name in dict.fromkeys(row["name"] for row in rows):
            found = [row for row in rows if row["where"] == where and row["name"] == name]
            axes.plot([r["nfe"] for r in found], [r["psnr"] for r in found], "o-", label=name, markersize=4)
        axes.set_xscale("log")
        axes.set_xlabel("network evaluations a sample")
        axes.set_ylabel("PSNR of a sample / dB")
        axes.set_title(where, fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=150)


def main() -> None:
    """Read the command line, run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="fully sampled slice in BART's layout")
    parser.add_argument("--nifti", type=nifti_argument, nargs="+", default=[], metavar="FILE:SLICE[:HxW]")
    parser.add_argument(
        "--masks",
        type=mask_argument,
        nargs="+",
        default=SCENARIOS,
        metavar="KIND:ACCELERATION",
        help="default: equispaced:4 poisson:8",
    )
    parser.add_argument("--prior", default="brain")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--num-samples", type=int, default=2, help="samples whose error is averaged")
    parser.add_argument("--longest", type=int, default=4000, help="leave out runs of more evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nfe.md")
    options = parser.parse_args()
    if options.measured is None and not options.nifti:
        parser.error("nothing to reconstruct: give --measured, --nifti, or both")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        prior = load_prior(options.prior, precision=options.precision)
        digest = prior_hash(prior_path(options.prior))[:12]
        cases = [] if options.measured is None else [measured_case(options.measured)]
        cases += [simulated_case(*which) for which in options.nifti]
        scenarios = [make_scenario(case, *which) for case in cases for which in options.masks]
        rows = []
        for row in run(
            scenarios,
            prior,
            f"{digest} {options.precision}",
            num_samples=options.num_samples,
            seed=options.seed,
            longest=options.longest,
            cache=None if options.cache is None else options.cache / "nfe.jsonl",
        ):
            rows.append(row)
            shown = f"{row['where']}, {row['name']}, {row['nfe']}: {row['psnr']:.2f} dB"
            print(shown, file=sys.stderr, flush=True)
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    page = [
        "# Quality against network evaluations",
        "",
        f"- date: {date.today().isoformat()}",
        f"- machine: {machine()}; a shared machine",
        f"- command: `{command('benchmarks.nfe', sys.argv[1:])}`",
        f"- prior: {prior.contract.name}, SHA-256 {digest}…, {options.precision}",
        f"- PSNR of single samples (mean square error averaged over {options.num_samples}) against the "
        "coil-combined image; simulated coils and noise on processed magnitude images, where not measured, "
        "which flatters every solver",
        "- realised acceleration and calibration region, from which the coil maps are: "
        + "; ".join(
            f"{s.case.name}, {s.mask.name} ×{s.asked:g}: ×{s.mask.acceleration:.2f}, {s.calibration[0]} × "
            f"{s.calibration[1]}"
            for s in scenarios
        ),
        "",
        table(rows),
        "",
        f"![PSNR against network evaluations]({options.out.with_suffix('.png').name})",
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, options.out.with_suffix(".png"))
    options.out.write_text("\n".join(page))
    print("\n".join(page))


if __name__ == "__main__":
    main()
