"""Shift of the sampling pattern: networks trained on one kind of mask, tested on others, beside the rest.

Reads the rows that the matrix wrote and draws them; nothing is reconstructed here::

    python -m benchmarks benchmarks/mri.yaml --out runs/mri
    python -m benchmarks.sampling_shift --rows runs/mri/rows.csv

Which methods are supervised the rows themselves say. Writes a Markdown page and a figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import TARGETS
from benchmarks.machine import command
from benchmarks.matrix.page import left_out, means_over, source_of_maps
from benchmarks.matrix.statistics import Estimate, bootstrap, shared, subjects_of
from benchmarks.pages import SIMULATED, markdown_table, write_page
from recon.errors import ReconError
from recon.figures import save_figure

Row = dict[str, Any]

SUPERVISED = ("unet", "varnet")
"""Names of the registry of methods that were trained on one kind of mask."""

COLUMNS = (
    "volume",
    "subject",
    "mask",
    "target",
    "method",
    "registry_name",
    "seed",
    "simulated",
    "acceleration",
    "calibration_source",
    "PSNR",
)
COLOURS = ("#4c9be8", "#e8a33d", "#8bc34a", "#e0559b", "#9b7fe6", "#3fc1b0", "#c9c9c9", "#d96c4a")
DRAWS = 2000


def read_rows(path: Path) -> list[Row]:
    """Read rows of the matrix, with PSNR and realised acceleration as numbers.

    Raises
    ------
    ReconError
        Naming the file, if it cannot be read, has no rows or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ReconError(f"{path}: the column {missing[0]!r} of the matrix's rows is missing")
            rows: list[Row] = list(reader)
        for row in rows:
            row["PSNR"], row["acceleration"] = float(row["PSNR"]), float(row["acceleration"])
    except ReconError:
        raise
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ReconError(f"{path}: these are no rows of the matrix: {error}") from None
    if not rows:
        raise ReconError(f"{path}: there are no rows in it")
    return rows


@dataclass(frozen=True, eq=False)
class Shift:
    """Rows of one target, sorted out.

    Attributes
    ----------
    masks, methods : list of str
        In the order of the rows; the mask of the training first.
    psnr : dict
        (mask, method) -> volume -> seed -> PSNR in dB; the seed is empty for what draws nothing.
    supervised : list of str
        Methods that were trained on the first mask.
    subjects : dict of str to str
        Volume -> whom it shows.
    """

    masks: list[str]
    methods: list[str]
    psnr: dict[tuple[str, str], dict[str, dict[str, float]]]
    supervised: list[str]
    subjects: dict[str, str]

    @classmethod
    def of(cls, rows: Sequence[Row], target: str, own: str) -> Shift:
        """Sort the rows of a target.

        Raises
        ------
        ReconError
            If there are none, or none with the mask of the training.
        """
        here = [row for row in rows if row["target"] == target]
        masks = list(dict.fromkeys(row["mask"] for row in here))
        if own not in masks:
            raise ReconError(
                f"no row against the target {target!r} has the mask {own!r}; there are: "
                f"{'; '.join(masks) or 'none'}"
            )
        psnr: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for row in here:
            volumes = psnr.setdefault((row["mask"], row["method"]), {})
            volumes.setdefault(row["volume"], {})[row["seed"]] = row["PSNR"]
        return cls(
            [own, *(mask for mask in masks if mask != own)],
            list(dict.fromkeys(row["method"] for row in here)),
            psnr,
            list(dict.fromkeys(row["method"] for row in here if row["registry_name"] in SUPERVISED)),
            subjects_of(here),
        )

    def volumes(self, mask: str) -> list[str]:
        """Volumes that every method has which has that mask: what means are over."""
        return shared(self.psnr.get((mask, method), {}) for method in self.methods)

    def estimate(self, mask: str, method: str) -> Estimate | None:
        """Mean over the volumes of a mask and seeds, with its interval; None without such a volume."""
        found = self.psnr.get((mask, method))
        names = self.volumes(mask)
        if found is None or not names:
            return None
        seeds = {seed for name in names for seed in found[name]}
        return self._bootstrap(
            {name: np.array(_of_seeds(found[name], seeds, f"{name}, {mask}, {method}")) for name in names}
        )

    def _bootstrap(self, values: dict[str, np.ndarray]) -> Estimate:
        subjects = [self.subjects[name] for name in values]
        return bootstrap(np.array(list(values.values())), DRAWS, subjects)

    def lead(self, mask: str, main: str, other: str) -> Estimate | None:
        """By how much `main` exceeds `other`, volume and seed for each; None without a volume that both have.

        Raises
        ------
        ReconError
            If both draw random numbers, and not with the same seeds.
        """
        differences = self._differences(mask, main, other)
        return self._bootstrap(differences) if differences else None

    def leads(self, mask: str, main: str, other: str) -> dict[str, float]:
        """By how much `main` exceeds `other` for each volume that both have, mean over seeds."""
        differences = self._differences(mask, main, other)
        return {volume: float(values.mean()) for volume, values in differences.items()}

    def _differences(self, mask: str, main: str, other: str) -> dict[str, np.ndarray]:
        ours, theirs = self.psnr.get((mask, main), {}), self.psnr.get((mask, other), {})
        both = [volume for volume in ours if volume in theirs]
        seeds = {seed for volume in both for seed in (*ours[volume], *theirs[volume])} - {""} or {""}
        return {
            volume: np.array(_of_seeds(ours[volume], seeds, f"{volume}, {mask}, {main}"))
            - np.array(_of_seeds(theirs[volume], seeds, f"{volume}, {mask}, {other}"))
            for volume in both
        }


def _of_seeds(values: dict[str, float], seeds: set[str], where: str) -> list[float]:
    """Values in the order of the seeds; what draws nothing has the same for all of them."""
    if "" in values:
        return [values[""]] * len(seeds)
    missing = sorted(seeds - values.keys())
    if missing:
        raise ReconError(f"{where}: there is no row with the seed {missing[0]}")
    return [values[seed] for seed in sorted(seeds)]


def table(shift: Shift, main: str) -> str:
    """Make the Markdown table: PSNR for every mask and method, best in bold, and what `main` leads by."""
    others = [name for name in shift.methods if name != main]
    headings = ["mask", *shift.methods, *(f"{main} over {name}" for name in others)]
    lines = []
    for number, mask in enumerate(shift.masks):
        found = {name: shift.estimate(mask, name) for name in shift.methods}
        best = max((each.mean for each in found.values() if each is not None), default=np.nan)
        cells = [f"{mask} (trained on)" if number == 0 and shift.supervised else mask]
        for each in found.values():
            text = "–" if each is None else f"{each.mean:.2f}"
            cells.append(f"**{text}**" if each is not None and text == f"{best:.2f}" else text)
        for name in others:
            lead = shift.lead(mask, main, name)
            cells.append("–" if lead is None else _with_interval(lead))
        lines.append(cells)
    return markdown_table(headings, lines)


def _with_interval(lead: Estimate) -> str:
    return f"{lead.mean:+.2f}" + (f" ({lead.low:+.2f} to {lead.high:+.2f})" if lead.known else "")


def verdict(shift: Shift, main: str) -> str:
    """Say who leads on the mask of the training, and on which volumes `main` leads on the others."""
    own, *others = shift.masks
    rivals = [name for name in shift.methods if name != main]
    sentences = []
    if shift.supervised:
        leads = {name: shift.lead(own, main, name) for name in shift.supervised}
        known = {name: lead.mean for name, lead in leads.items() if lead is not None}
        if known:
            best = min(known, key=lambda name: known[name])
            sentences.append(
                f"On {own}, which they were trained on, the best supervised network is {best}, "
                f"{-known[best]:+.2f} dB from {main}."
            )
    behind, count = [], 0
    for mask in others:
        for name in rivals:
            for volume, lead in shift.leads(mask, main, name).items():
                count += 1
                if lead <= 0:
                    behind.append(f"{name} on {mask}, {volume} ({lead:+.2f} dB)")
    if count:
        sentences.append(
            f"On the other masks {main} does not lead in {len(behind)} of {count} comparisons of a volume: "
            f"{'; '.join(behind)}."
            if behind
            else f"On the other masks {main} leads over every other method on every volume."
        )
    return " ".join(sentences)


def draw(shift: Shift, main: str, path: Path, target: str) -> Path:
    """Draw PSNR for every mask, and by how much every method lags behind `main`, with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from recon.figures import BACKGROUND, DIM, TEXT

    figure = Figure(figsize=(2.2 + 1.55 * len(shift.masks), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor(BACKGROUND)
    upper, lower = figure.subplots(2, 1, sharex=True)
    offsets = np.linspace(-0.32, 0.32, len(shift.methods)) if len(shift.methods) > 1 else [0.0]
    for number, (name, offset) in enumerate(zip(shift.methods, offsets, strict=True)):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": "s" if name in shift.supervised else "D" if name == main else "o",
            "markersize": 6 if name == main else 5,
            "linestyle": "none",
            "capsize": 2,
            "elinewidth": 1,
        }
        for axes, estimates in (
            (upper, [shift.estimate(mask, name) for mask in shift.masks]),
            (lower, [None if name == main else shift.lead(mask, main, name) for mask in shift.masks]),
        ):
            known = [(x, e) for x, e in enumerate(estimates) if e is not None]
            if known:
                axes.errorbar(
                    [x + offset for x, _ in known],
                    [e.mean for _, e in known],
                    yerr=np.array([_bars(e) for _, e in known]).T,
                    label=name,
                    **style,
                )
    lower.axhline(0, color=DIM, linewidth=1)
    upper.set_ylabel(f"PSNR / dB, against {target}", color=TEXT)
    lower.set_ylabel(f"{main} leads by / dB", color=TEXT)
    labels = [mask.replace(" ×", "\n×") for mask in shift.masks]
    if shift.supervised:
        labels[0] += "\n(trained on)"
        for axes in (upper, lower):
            axes.axvspan(-0.5, 0.5, color="white", alpha=0.07, linewidth=0)
    lower.set_xticks(range(len(labels)), labels)
    for axes in (upper, lower):
        axes.set_facecolor(BACKGROUND)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.tick_params(colors=TEXT)
        axes.grid(axis="y", color=DIM, alpha=0.25)
        for x in range(1, len(labels)):
            axes.axvline(x - 0.5, color=DIM, alpha=0.25, linewidth=0.8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(DIM)
    figure.legend(
        *upper.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4,
        frameon=False,
        labelcolor=TEXT,
        fontsize=9,
    )
    return save_figure(figure, path)


def _bars(estimate: Estimate) -> tuple[float, float]:
    """Lengths of the error bars below and above; rounding must not make them negative."""
    if not estimate.known:
        return 0.0, 0.0
    return max(estimate.mean - estimate.low, 0.0), max(estimate.high - estimate.mean, 0.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling_shift",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="rows.csv of the matrix")
    parser.add_argument(
        "--own", default="equispaced ×4", metavar="MASK", help="of the training (default: %(default)s)"
    )
    parser.add_argument(
        "--main",
        metavar="METHOD",
        help="held against all others (default: the last one that is no network's)",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these only, in this order")
    parser.add_argument(
        "--target",
        default="rss",
        help="of the figure (default: %(default)s, which the supervised networks are trained for)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "sampling_shift.md", metavar="FILE"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, print and write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    try:
        rows = read_rows(options.rows)
        names = list(dict.fromkeys(row["method"] for row in rows))
        for name in [*(options.methods or ()), *([options.main] if options.main else ())]:
            if name not in names:
                raise ReconError(f"{options.rows}: there is no method {name!r}, but {'; '.join(names)}")
        if options.methods:
            rows = [row for name in options.methods for row in rows if row["method"] == name]
        free = [row["method"] for row in rows if row["registry_name"] not in SUPERVISED]
        chosen = options.main or (free[-1] if free else rows[-1]["method"])
        targets = list(dict.fromkeys(row["target"] for row in rows))
        shifts = {target: Shift.of(rows, target, options.own) for target in targets}
        if options.target not in shifts:
            raise ReconError(
                f"{options.rows}: there is no target {options.target!r}, but {'; '.join(targets)}"
            )
        for target, shift in shifts.items():
            if chosen not in shift.methods:
                raise ReconError(f"{options.rows}: {chosen} has no row against the target {target!r}")
        picture = options.out.with_suffix(".png")
        draw(shifts[options.target], chosen, picture, options.target)
    except ReconError as error:
        sys.exit(f"error: {error}")
    realised: dict[str, set[float]] = {}
    for row in rows:
        realised.setdefault(row["mask"], set()).add(row["acceleration"])
    spans = {mask: (min(values), max(values)) for mask, values in realised.items()}
    text = [
        "# Shift of the sampling pattern",
        "",
        f"- date: {date.today().isoformat()}",
        f"- command: `{command('benchmarks.sampling_shift', words)}`, from the rows of the matrix, whose "
        "page names machine, prior, weights and calibration",
        f"- supervised: {', '.join(shifts[options.target].supervised) or 'none'}, trained on {options.own}",
        "- realised acceleration: "
        + "; ".join(
            f"{mask}: ×{low:.2f}" + (f" to ×{high:.2f}" if f"{high:.2f}" != f"{low:.2f}" else "")
            for mask, (low, high) in spans.items()
        ),
        "- PSNR in dB, mean over the volumes that all methods of a line have, of a lead over those that both "
        "have, and over seeds; brackets: 95 % bootstrap interval over subjects, whose volumes go together, "
        "and seeds",
        "",
    ]
    if any(row["simulated"].lower() in ("true", "1") for row in rows):
        text += [SIMULATED, ""]
    for target, shift in shifts.items():
        meaning = TARGETS.get(target, "")
        text += [
            f"## Against {target}",
            "",
            *([f"{meaning[:1].upper()}{meaning[1:]}.", ""] if meaning else []),
        ]
        used = {mask: shift.volumes(mask) for mask in shift.masks}
        here = [row for row in rows if row["target"] == target]
        seeds = {row["seed"] for row in here} - {""}
        text += [means_over(list(used.values()), shift.subjects, len(seeds) or 1), ""]
        below = [*left_out(used, list(shift.subjects)), source_of_maps(here)]
        text += [table(shift, chosen), "", *(line for each in below if each for line in (each, ""))]
        text += [verdict(shift, chosen), ""]
    text += [f"![PSNR for every mask, and the lead over each method]({picture.name})", ""]
    page = "\n".join(text)
    write_page(options.out, page)
    print(page)


if __name__ == "__main__":
    main()
