r"""Uncertainty against acceleration: the spread of the samples, the error, and what intervals cover.

On a patient that neither the prior nor the calibration has seen, and on a measured slice::

    python -m benchmarks.uncertainty --data open_ms --measured full.cfl --cache runs/calibration

The patient is the one that `benchmarks.calibration` tests on, simulated and reduced as there, and what that
benchmark left in the cache is used. The calibration is one that lies beside the prior; it was learned on
simulated coils, so that the measured slice shows what is left of it on another scanner.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.calibration import MATRIX, NOMINAL, TESTED_ON, case_evidence, covered, reconstruct_all
from benchmarks.cases import measured_case
from benchmarks.machine import command, machine, versions
from benchmarks.pages import SIMULATED, markdown_table, write_page
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.calibration import (
    Calibration,
    Evidence,
    calibration_path,
)
from recon.errors import ReconError
from recon.figures import save_figure
from recon.solvers.base import Solver, settings_of
from recon.solvers.dds import DDS

MASKS = ("equispaced", "poisson")
ACCELERATIONS = (2.0, 4.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Point:
    """One slice through one mask, in percent of the largest value of the truth where not said otherwise.

    Attributes
    ----------
    group, case, mask : str
        What a curve stands for; slice; kind of the mask.
    asked, acceleration : float
        Asked for, and realised.
    std, error : float
        Standard deviation of the samples, and error of their mean, each as root mean square over the object.
    before, after : float or None
        Part of the object's pixels in the intervals without and with the calibration; None where the
        calibration was not learned for such an acceleration.
    """

    group: str
    case: str
    mask: str
    asked: float
    acceleration: float
    std: float
    error: float
    before: float
    after: float | None

    @classmethod
    def of(cls, group: str, case: str, evidence: Evidence, calibration: Calibration) -> Point:
        """Measure what was reconstructed."""
        region, peak = evidence.region, float(evidence.truth.max())
        try:
            after = covered(evidence, calibration)
        except ReconError:  # the acceleration is none that was learned
            after = None

        def rms(image: np.ndarray) -> float:
            return 100 * float(np.sqrt(np.mean(np.square(image[region], dtype=np.float64)))) / peak

        return cls(
            group,
            case,
            evidence.mask,
            evidence.asked,
            evidence.acceleration,
            rms(evidence.std),
            rms(evidence.mean - evidence.truth),
            covered(evidence, None),
            after,
        )


def table(points: Sequence[Point]) -> str:
    """Make the Markdown table, a line for each slice, mask and acceleration."""
    headings = ["data", "slice", "mask", "asked", "realised", "std", "error", "std / error"]
    headings += ["coverage before", "after"]
    lines = [
        [
            p.group,
            p.case,
            p.mask,
            f"×{p.asked:g}",
            f"×{p.acceleration:.2f}",
            f"{p.std:.2f}",
            f"{p.error:.2f}",
            f"{p.std / p.error:.2f}" if p.error > 0 else "–",
            f"{p.before:.1%}",
            "not learned" if p.after is None else f"{p.after:.1%}",
        ]
        for p in points
    ]
    return markdown_table(headings, lines)


def findings(points: Sequence[Point]) -> str:
    """Say whether spread and error grow with the acceleration, and what is covered."""
    sentences = []
    curves: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.group, point.case, point.mask), []).append(point)
    for quantity, name in (("std", "The spread"), ("error", "The error")):
        values = [
            [getattr(p, quantity) for p in sorted(curve, key=lambda p: p.acceleration)]
            for curve in curves.values()
        ]
        growing = sum(v == sorted(v) for v in values)
        sentences.append(
            f"{name} grows with every step of the acceleration in {growing} of {len(values)} curves."
        )
    for group in dict.fromkeys(p.group for p in points):
        here = [p for p in points if p.group == group]
        after = [p.after for p in here if p.after is not None]
        text = (
            f"{group}: intervals of {NOMINAL:.0%} cover {min(p.before for p in here):.0%} to "
            f"{max(p.before for p in here):.0%} before calibration"
        )
        if after:
            text += f", {min(after):.0%} to {max(after):.0%} after it"
        sentences.append(text + ".")
    return " ".join(sentences)


def draw(points: Sequence[Point], path: Path) -> Path:
    """Draw a column for each mask: spread and error above, coverage below; bands reach over the slices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from recon.figures import BACKGROUND, DIM, TEXT

    masks = list(dict.fromkeys(p.mask for p in points))
    groups = list(dict.fromkeys(p.group for p in points))
    colours = dict(zip(groups, ("#4c9be8", "#e8a33d", "#8bc34a", "#e0559b"), strict=False))
    figure = Figure(figsize=(1.2 + 4.4 * len(masks), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor(BACKGROUND)
    grid = figure.subplots(2, len(masks), sharex=True, sharey="row", squeeze=False)
    for column, mask in enumerate(masks):
        upper, lower = grid[:, column]
        lower.axhline(100 * NOMINAL, color=DIM, linewidth=1)
        for group in groups:
            here = [p for p in points if (p.mask, p.group) == (mask, group)]
            for axes, quantity, style, label in (
                (upper, "error", "-o", "error of the mean"),
                (upper, "std", "--s", "std of the samples"),
                (lower, "after", "-o", "calibrated"),
                (lower, "before", "--s", "before"),
            ):
                factor = 1 if axes is upper else 100
                known = [p for p in here if getattr(p, quantity) is not None]
                asked = sorted({p.asked for p in known})
                values = [[factor * getattr(p, quantity) for p in known if p.asked == a] for a in asked]
                axes.plot(
                    asked,
                    [np.mean(v) for v in values],
                    style,
                    color=colours[group],
                    label=f"{group}: {label}",
                    markersize=4,
                    linewidth=1.4,
                )
                if style == "-o" and any(len(v) > 1 for v in values):
                    low, high = [min(v) for v in values], [max(v) for v in values]
                    axes.fill_between(asked, low, high, color=colours[group], alpha=0.15, linewidth=0)
        upper.set_title(mask, color=TEXT, fontsize=11)
        upper.set_ylim(bottom=0)
        lower.set_xlabel("acceleration asked for", color=TEXT)
        lower.set_xticks(sorted({p.asked for p in points}))
        for axes in (upper, lower):
            axes.set_facecolor(BACKGROUND)
            axes.tick_params(colors=TEXT)
            axes.grid(color=DIM, alpha=0.25)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(DIM)
            if column == 0:
                axes.legend(frameon=False, labelcolor=TEXT, fontsize=8)
    grid[0, 0].set_ylabel("in the object, % of the maximum", color=TEXT)
    grid[1, 0].set_ylabel(f"pixels in {NOMINAL:.0%} intervals, %", color=TEXT)
    return save_figure(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uncertainty",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the open MS data set")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="fully sampled slice in BART's layout")
    parser.add_argument("--slices", type=int, default=1, help="slices of a volume (default: %(default)s)")
    parser.add_argument("--masks", nargs="+", default=MASKS, metavar="KIND")
    parser.add_argument("--accelerations", type=float, nargs="+", default=ACCELERATIONS)
    parser.add_argument("--calibration", default="open-ms", metavar="NAME", help="a file, or a prior's own")
    parser.add_argument("--prior", default="brain", help="a .safetensors file, or a bundled prior's name")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what was reconstructed here")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "uncertainty.md", metavar="FILE"
    )
    return parser


def run(
    options: argparse.Namespace,
    prior: ScorePrior,
    digest: str,
    calibration: Calibration,
    solver: Solver,
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Reconstruct what the options name, or take it from the cache."""
    identity = f"{digest} {options.precision}"
    num_samples = calibration.num_samples
    points: list[Point] = []

    def add(group: str, case: str, evidence: Evidence) -> None:
        points.append(Point.of(group, case, evidence, calibration))
        on_point(points[-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an anatomy or a narrow calibration region is not judged here
        if options.data is not None:
            reconstruct_all(
                options.data,
                TESTED_ON,
                prior,
                identity,
                solver,
                slices=options.slices,
                matrix=MATRIX,
                masks=options.masks,
                accelerations=options.accelerations,
                num_samples=num_samples,
                device=options.device,
                cache=options.cache,
                on_result=lambda r: add(
                    f"{r.evidence.patient}, simulated coils",
                    f"{r.evidence.volume}, slice {r.evidence.index}",
                    r.evidence,
                ),
            )
        if options.measured is not None:
            case = measured_case(options.measured)
            for kind in options.masks:
                for asked in options.accelerations:
                    evidence = case_evidence(
                        case,
                        kind,
                        asked,
                        prior,
                        identity,
                        solver,
                        patient="measured",
                        volume=case.name,
                        index=0,
                        num_samples=num_samples,
                        device=options.device,
                        cache=options.cache,
                    )
                    add("measured slice", case.name, evidence)
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, draw, print and write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.data is None and options.measured is None:
        parser.error("nothing to reconstruct: give --data, --measured, or both")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def show(point: Point) -> None:
        print(
            f"{point.case}, {point.mask} ×{point.asked:g}: std {point.std:.2f}, error {point.error:.2f}",
            file=sys.stderr,
            flush=True,
        )

    solver = DDS()
    try:
        path = prior_path(options.prior)
        digest = prior_hash(path)
        prior = load_prior(options.prior, precision=options.precision, device=options.device)
        calibration = Calibration.load(calibration_path(options.calibration, path))
        calibration.check(digest, solver, calibration.num_samples)
        points = run(options, prior, digest, calibration, solver, show)
        picture = options.out.with_suffix(".png")
        draw(points, picture)
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    settings = ", ".join(f"{k}={v}" for k, v in settings_of(solver).items() if k != "name")
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(options.device),
        "command": f"`{command('benchmarks.uncertainty', words)}`",
        "versions": versions(("torch", "numpy", "dis-recon")),
        "prior": f"{prior.contract.name}, SHA-256 {digest[:12]}…, {options.precision}",
        "solver": f"DDS ({settings}), {calibration.num_samples} samples",
        "calibration": f"{calibration.name}, learned on {calibration.slices} slices of "
        f"{calibration.patients} other patients with simulated coils, {calibration.date}",
        "target": "coil-combined image of the fully sampled k-space, noise and all",
        "coil maps": "ESPIRiT from the calibration region of the undersampled data",
    }
    text = ["# Uncertainty against acceleration", "", *(f"- {key}: {value}" for key, value in facts.items())]
    text += [
        "",
        *([f"Patient 19: {SIMULATED[0].lower()}{SIMULATED[1:]}", ""] if options.data is not None else []),
        "Standard deviation of the magnitude over samples, and error of the magnitude of their mean: root "
        "mean square over the object, in percent of the largest value of the target, whose noise is part of "
        f"the error. Coverage: part of the object's pixels in intervals of {NOMINAL:.0%}, mean ± 1.645 std "
        "before calibration.",
        "",
        findings(points),
        "",
        f"![Spread, error and coverage against acceleration]({picture.name})",
        "",
        table(points),
        "",
    ]
    page = "\n".join(text)
    write_page(options.out, page)
    print(page)


if __name__ == "__main__":
    main()
