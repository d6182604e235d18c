r"""Samples of every solver against posteriors known in closed form: the table solver × problem.

    python -m benchmarks.posterior_truth

Small images under Gaussian and mixture priors (`recon.truth`), for which the posterior's mean, covariance and
weights of modes are known. The bias of approximate solvers is reported. Those that claim exactness in a limit
are held to bounds, and the exit status is 1 if one is exceeded.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recon.solvers import solver_class
from recon.solvers.base import Solver
from recon.truth import TruthProblem, TruthReport, TruthResult, check_solver, truth_problems

MEAN_BOUND = 0.05
"""RMS error of the mean, in posterior standard deviations."""

VARIANCE_BOUND = 0.03
"""Distance of the variance ratio from 1."""

WEIGHT_BOUND = 0.02
"""Error of the weight of a mode."""

EVALUATIONS = 100_000
"""Network evaluations for a problem at the most, where nothing is bounded; at least 200 samples are drawn."""

PARTICLES = 16_000
"""Images worked on at once."""


@dataclass(frozen=True)
class Row:
    """A solver with settings, and what it claims.

    Parameters
    ----------
    solver
        Its name in :data:`recon.solvers.SOLVERS`.
    settings
        Fields that differ from the defaults or from the preset.
    preset
        Name of a published setting.
    bounded
        Part of the names of the problems whose posterior it claims to reach; empty: all. ``None``: it claims
        nothing.
    weights
        Whether the claim includes the weights of the modes.
    samples
        Samples a problem, if not as many as :data:`EVALUATIONS` allow.
    """

    solver: str
    settings: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    bounded: str | None = None
    weights: bool = False
    samples: int | None = None

    @property
    def label(self) -> str:
        """Settings as the table shows them."""
        words = [self.preset] if self.preset else []
        words += [f"{name} {value}" for name, value in self.settings.items()]
        return ", ".join(words) or "defaults"

    def make(self) -> Solver:
        """Make the solver."""
        kind: Any = solver_class(self.solver)
        return (getattr(kind, self.preset) if self.preset else kind)(**self.settings)

    def bounds(self, problem: str) -> bool:
        """Whether the claim covers that problem."""
        return self.bounded is not None and self.bounded in problem


ROWS = (
    Row("twisted-smc", {"particles": 32, "steps": 100}, bounded="", weights=True),
    Row("ula", {"sigma_min": 0.01, "last_step": 1.0, "last_steps": 2000}, bounded="Gaussian"),
    Row("twisted-smc", samples=1000),
    Row("twisted-smc", {"particles": 4}),
    Row("dds"),
    Row("dds", {"nfe": 10}),
    Row("dds", {"nfe": 100}),
    Row("dds", {"eta": 0.5}),
    Row("dds", {"eta": 0.0}),
    Row("dds", {"gamma": 0.1}),
    Row("dds", {"gamma": 1.0}),
    Row("dds", {"gamma": 10.0}),
    Row("dds", {"gamma": 10.0, "cg_iterations": 1, "cg_tolerance": 0.0}),
    Row("dds", {"gamma": 10.0, "cg_iterations": 5, "cg_tolerance": 0.0}),
    Row("dds", preset="paper"),
    Row("dds", preset="released"),
    Row("dps"),
    Row("dps", {"zeta": 0.01}),
    Row("dps", {"zeta": 0.03}),
    Row("dps", {"zeta": 0.1}),
    Row("dps", {"zeta": 0.3}),
    Row("dps", preset="released"),
    Row("pigdm"),
    Row("pigdm", preset="paper"),
    Row("diffpir"),
    Row("diffpir", preset="paper"),
    Row("daps"),
    Row("pnp-dm"),
    Row("red-diff"),
    Row("ula"),
    Row("score-ald"),
    Row("score-mri"),
    Row("adadiff"),
    Row("replacement"),
)


def verdicts(row: Row, report: TruthReport) -> list[tuple[str, bool]]:
    """The bounds that a row is held to: what was found, and whether it lies within."""
    found = []
    for result in report.results:
        if not row.bounds(result.problem):
            continue
        name = f"{report.settings['name']}, {result.problem}"
        if result.refusal is not None:
            found.append((f"{name}: {result.refusal}", False))
            continue
        mean, ratio = result.mean_error, result.variance_ratio
        # With its standard error on top, so that chance does not pass it.
        worst = mean.value + mean.error
        found.append((f"{name}: error of the mean {mean}, bound {MEAN_BOUND}", worst <= MEAN_BOUND))
        inside = abs(ratio.value - 1) <= VARIANCE_BOUND
        found.append((f"{name}: variance ratio {ratio}, bound 1 ± {VARIANCE_BOUND}", inside))
        if row.weights and len(result.weights) > 1:
            weight = result.weight_error
            inside = weight.value <= WEIGHT_BOUND
            found.append((f"{name}: error of the weights {weight}, bound {WEIGHT_BOUND}", inside))
    return found


def samples_for(row: Row, solver: Solver, problem: TruthProblem, asked: int, bounded: int) -> int:
    """Samples of a problem: many where a bound is to be shown, fewer where a sample is costly."""
    if row.bounds(problem.name):
        # A weight of 0.3 known from n samples is uncertain by 0.46 / sqrt(n); a mean over pixels by less.
        return bounded if len(problem.truth.weights) > 1 else max(100, bounded // 5)
    if row.samples is not None:
        return row.samples
    return max(200, min(asked, EVALUATIONS // max(1, getattr(solver, "nfe", 1))))


def run(
    rows: Sequence[Row], problems: Sequence[TruthProblem], *, asked: int, bounded: int, seed: int
) -> list[tuple[Row, TruthReport]]:
    """Check every solver; a line for each on standard error."""
    reports = []
    for row in rows:
        solver, start = row.make(), time.process_time()
        batch = PARTICLES // max(16, getattr(solver, "particles", 16))
        parts = [
            check_solver(
                solver,
                num_samples=samples_for(row, solver, problem, asked, bounded),
                seed=seed,
                problems=[problem],
                micro_batch=batch,
            )
            for problem in problems
        ]
        report = TruthReport(parts[0].settings, tuple(part.results[0] for part in parts))
        reports.append((row, report))
        seconds = time.process_time() - start
        cells = " | ".join(_short(result) for result in report.results)
        print(
            f"{report.settings['name']}, {row.label}: {cells}, {seconds:.0f} s", file=sys.stderr, flush=True
        )
    return reports


def summary(reports: Sequence[tuple[Row, TruthReport]], problems: Sequence[TruthProblem]) -> str:
    """Make the table solver × problem."""
    names = [problem.name for problem in problems]
    text = [
        "| solver | settings | NFE | " + " | ".join(names) + " |",
        "|" + " --- |" * (3 + len(names)),
    ]
    for row, report in reports:
        nfe = max(result.nfe for result in report.results)
        cells = [report.settings["name"], row.label, str(nfe) if nfe else "–"]
        cells += [_short(result) for result in report.results]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _short(result: TruthResult) -> str:
    if result.refusal is not None:
        return "refused"
    parts = [f"{result.mean_error.value:.2f}", f"{result.variance_ratio.value:.2f}"]
    if len(result.weights) > 1:
        parts.append(f"{result.weight_error.value:.2f}")
    return " / ".join(parts)


def details(reports: Sequence[tuple[Row, TruthReport]], index: int) -> str:
    """All figures of one problem, with their Monte-Carlo errors."""
    several = any(len(report.results[index].weights) > 1 for _, report in reports)
    head = ["solver", "settings", "NFE", "samples", "error of the mean", "variance ratio", "covariance error"]
    head += ["error of the weights"] if several else []
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row, report in reports:
        result = report.results[index]
        cells = [report.settings["name"], row.label]
        if result.refusal is not None:
            cells += ["–", "–", result.refusal] + ["–"] * (len(head) - 5)
        else:
            figures = [result.mean_error, result.variance_ratio, result.covariance_error]
            figures += [result.weight_error] if several else []
            cells += [str(result.nfe), str(result.num_samples), *map(str, figures)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def page(
    reports: Sequence[tuple[Row, TruthReport]],
    problems: Sequence[TruthProblem],
    *,
    command: str,
    seconds: float,
) -> str:
    """Make the whole page."""
    weights = {
        item.name: ", ".join(f"{float(weight):.2f}" for weight in item.truth.weights) for item in problems
    }
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch; "
        f"{seconds:.0f} s of processor time in all",
        "command": f"`{command}`",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "dis-recon")),
        "weights of the modes": "; ".join(f"{name}: {text}" for name, text in weights.items() if "," in text),
    }
    text = [
        "# Posterior truth",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "Images of 8 × 8 under priors whose posterior is known in closed form (`recon.truth`); every solver "
        "is given the prior's exact denoiser, so what is measured is the solver alone.",
        "",
        "Cells: RMS error of the mean over the pixels, in posterior standard deviations / mean over the "
        "pixels of the samples' variance over the posterior's / for mixtures, largest error of the weight of "
        "a mode. A perfect sampler has 0.00 / 1.00 / 0.00. Solvers that claim exactness in a limit are held "
        "to bounds, below.",
        "",
        summary(reports, problems),
        "",
        "## Bounds",
        "",
    ]
    for row, report in reports:
        for found, inside in verdicts(row, report):
            text.append(f"- {'within' if inside else '**exceeded**'}: {found}")
    for index, problem in enumerate(problems):
        text += [
            "",
            f"## {problem.name}",
            "",
            "With one Monte-Carlo standard error. Errors of mean and covariance are cleared of what a finite "
            "number of samples contributes.",
            "",
            details(reports, index),
        ]
    return "\n".join([*text, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the page and write it; exit status 1 if a bound is exceeded."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posterior_truth", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--samples", type=int, default=400, help="samples a problem at the most (default: 400)"
    )
    parser.add_argument(
        "--bounded",
        type=int,
        default=5000,
        help="samples where the weights of modes have a bound; a fifth of it for other bounds "
        "(default: 5000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--only", nargs="+", metavar="SOLVER", help="these solvers only")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "posterior_truth.md",
        help="default: %(default)s",
    )
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    known = {row.solver for row in ROWS}
    unknown = set(options.only or ()) - known
    if unknown:
        parser.error(f"no rows of {', '.join(sorted(unknown))}; there are rows of {', '.join(sorted(known))}")
    rows = [row for row in ROWS if options.only is None or row.solver in options.only]
    start = time.process_time()
    problems = truth_problems()
    reports = run(rows, problems, asked=options.samples, bounded=options.bounded, seed=options.seed)
    shown = [word.rpartition("/")[2] if "/" in word else word for word in words]
    text = page(
        reports,
        problems,
        command=shlex.join(["python", "-m", "benchmarks.posterior_truth", *shown]),
        seconds=time.process_time() - start,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".part")
    partial.write_text(text)
    partial.replace(options.out)
    print(text)
    if not all(inside for row, report in reports for _, inside in verdicts(row, report)):
        sys.exit(1)


if __name__ == "__main__":
    main()
