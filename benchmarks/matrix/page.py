"""The page: how it was made, tables for each target, a summary with intervals, and what it took."""

from __future__ import annotations

import statistics as stdlib_statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.matrix.document import Block, Bullets, Cell, Heading, Paragraph, Picture, Table
from benchmarks.matrix.rows import BETTER, Row
from benchmarks.matrix.statistics import Estimate, compare, subjects_of, summaries
from benchmarks.matrix.study import Condition
from recon.metrics import LOG_SIDE, LOG_SIGMA, MS_SSIM_SIDE

FORMATS = {"PSNR": "{:.2f}", "SSIM": "{:.3f}", "NMSE": "{:.4f}", "HFEN": "{:.3f}", "MS-SSIM": "{:.4f}"}
ERRORS, PERCEPTUAL = ("PSNR", "SSIM", "NMSE"), ("HFEN", "MS-SSIM")

FLATTERS = (
    "Volumes marked with * are processed magnitude images; coils, phase and noise were simulated on them. "
    "That flatters every method, since the simulation and the reconstruction share a model, and one that "
    "learned from such images more than others."
)
FLATTERS_CT = (
    "Scans are simulated of images that a scanner reconstructed. That flatters every method: these images "
    "are smoother than a patient, and only photon noise separates the simulation from the model."
)


@dataclass(frozen=True)
class Facts:
    """What the page says besides its rows.

    Attributes
    ----------
    title : str
        Of the page.
    modality : str
        ``mri`` or ``ct``.
    how : mapping
        Name -> text: date, machine, command, prior and so on.
    meanings : mapping
        Target -> what it is.
    conditions : sequence of Condition
        Masks or scans, in their order.
    columns : sequence of str
        Methods, in their order.
    settings : mapping
        Method -> settings.
    seeds : sequence of int
        Of the samples.
    draws : int
        Of the bootstrap.
    main : str
        Column that the others are compared with.
    skipped, failures : mapping
        Method or volume, and unit -> why it is not there.
    missing : int
        Rows that were not run.
    figures : sequence of (Path, str)
        Files and captions.
    """

    title: str
    modality: str
    how: Mapping[str, str]
    meanings: Mapping[str, str]
    conditions: Sequence[Condition]
    columns: Sequence[str]
    settings: Mapping[str, str]
    seeds: Sequence[int]
    draws: int
    main: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0
    figures: Sequence[tuple[Path, str]] = ()

    @property
    def masks(self) -> list[str]:
        """Labels of the conditions."""
        return [condition.label for condition in self.conditions]


def make_page(rows: Sequence[Row], facts: Facts) -> list[Block]:
    """Put the page together."""
    blocks: list[Block] = [
        Heading(facts.title, 1),
        Bullets([f"{name}: {text}" for name, text in facts.how.items()]),
    ]
    if any(row["simulated"] for row in rows):
        blocks.append(Paragraph(FLATTERS if facts.modality == "mri" else FLATTERS_CT))
    blocks += _absent(facts)
    blocks += [Picture(path, caption) for path, caption in facts.figures]
    blocks += [Heading("Summary"), Paragraph(_how_summarised(rows, facts))]
    for target in facts.meanings:
        blocks += _summary(rows, facts, target)
    for target, meaning in facts.meanings.items():
        of_target = [row for row in rows if row["target"] == target]
        if not of_target:
            continue
        blocks += [Heading(f"Target `{target}`"), Paragraph(f"{_sentence(meaning)} {_cells_mean(facts)}")]
        blocks.append(_by_volume(of_target, facts, ERRORS))
        if any(row.get("HFEN") is not None for row in of_target):
            blocks += [Paragraph(_perceptual_mean(of_target)), _by_volume(of_target, facts, PERCEPTUAL)]
    blocks += [Heading("What it took"), Paragraph(_costs_mean(facts)), _costs(rows, facts)]
    if any(row.get("chosen") for row in rows):
        blocks += [Heading("Chosen by the oracles"), Paragraph(_choices_mean(facts)), _choices(rows, facts)]
    return blocks


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _absent(facts: Facts) -> list[Block]:
    lines = [f"Left out: {name}, because {reason}." for name, reason in facts.skipped.items()]
    if facts.missing:
        lines.append(f"{facts.missing} reconstructions have not been run; their rows are missing.")
    lines += [f"Failed: {label}: {reason}" for label, reason in facts.failures.items()]
    return [Bullets(lines)] if lines else []


# -- the summary ---------------------------------------------------------------------------------------------


def _how_summarised(rows: Sequence[Row], facts: Facts) -> str:
    text = (
        f"PSNR in dB / SSIM: mean over volumes, each counting once whatever the number of its slices, and "
        f"{counted(len(facts.seeds), 'seed')}; the best in bold. The means of a line are over the volumes "
        "that every method has which is in it."
    )
    if len(set(subjects_of(rows).values())) * len(facts.seeds) == 1:
        return text
    return (
        f"{text} In brackets 95 % intervals of {facts.draws} bootstrap draws over subjects and seeds: "
        "volumes of one subject go together."
    )


def counted(number: int, what: str) -> str:
    """As in ``1 volume`` and ``3 volumes``."""
    return f"{number} {what}{'s' * (number != 1)}"


def means_over(used: Sequence[Collection[str]], subjects: Mapping[str, str], seeds: int) -> str:
    """Say how many volumes and subjects the means of a table are over, and what their intervals are worth.

    Parameters
    ----------
    used : sequence
        For each line the volumes that its means are over.
    subjects : mapping
        Volume -> subject.
    seeds : int
        How many there are.
    """
    counts = sorted(
        {(len(volumes), len({subjects[name] for name in volumes})) for volumes in used if volumes}
    )
    if not counts:
        return "There are no means."
    shown = [f"{counted(volumes, 'volume')} of {counted(people, 'subject')}" for volumes, people in counts]
    text = f"Means over {' or '.join(shown)}."
    volumes, least = counts[0][0], min(people for _, people in counts)
    if least * seeds == 1:
        text += f" Of one {'volume' if volumes == 1 else 'subject'} and one seed there is no interval."
    elif least == 1:
        text += (
            " With a single subject the intervals hold the chance of the seeds, and say nothing about other "
            "patients."
        )
    elif least < 10:
        text += f" Of {least} subjects the intervals are rough, and most likely too narrow."
    return text


def left_out(used: Mapping[str, Collection[str]], volumes: Sequence[str]) -> list[str]:
    """Say which of the volumes the means of a line leave out; nothing if they are over all of them.

    Parameters
    ----------
    used : mapping
        Line -> volumes that its means are over.
    volumes : sequence of str
        All of them.
    """
    lines: dict[str, list[str]] = {}
    for label, kept in used.items():
        dropped = [name for name in volumes if name not in kept]
        if dropped:
            text = f"without {', '.join(dropped)}, which not every method has"
            lines.setdefault(text if kept else "there is no volume that every method has", []).append(label)
    return [f"{', '.join(labels)}: {text}." for text, labels in lines.items()]


def source_of_maps(rows: Iterable[Mapping[str, Any]]) -> str:
    """Say where the coil maps behind a table come from."""
    sources = dict.fromkeys(row["calibration_source"] for row in rows if row["calibration_source"])
    if not sources:
        return ""
    return f"Coil maps, for methods that take them: from the calibration region of {', or '.join(sources)}."


def _interval(estimate: Estimate, form: str, sign: bool = False) -> str:
    shown = (form.replace("{:", "{:+") if sign else form).format
    if not estimate.known:
        return shown(estimate.mean)
    return f"{shown(estimate.mean)} [{shown(estimate.low)}, {shown(estimate.high)}]"


def _summary(rows: Sequence[Row], facts: Facts, target: str) -> list[Block]:
    of_target = [row for row in rows if row["target"] == target]
    if not of_target:
        return []
    by_method = {name: [row for row in of_target if row["method"] == name] for name in facts.columns}
    by_method = {name: own for name, own in by_method.items() if own}
    lines: list[list[str | Cell]] = []
    used: dict[str, list[str]] = {}
    groups = [[mask] for mask in facts.masks]
    if len(facts.masks) > 1:
        groups.append(facts.masks)
    for masks in groups:
        name = masks[0] if len(masks) == 1 else "all"
        psnr, used[name] = summaries(by_method, "PSNR", masks, facts.seeds, facts.draws)
        ssim, _ = summaries(by_method, "SSIM", masks, facts.seeds, facts.draws)
        label: list[str | Cell] = [name]
        if facts.modality == "mri":
            label.append(_realised(of_target, masks))
        found = {method: {"PSNR": psnr[method], "SSIM": ssim[method]} for method in by_method}
        lines.append([*label, *_best_in_bold(found, ("PSNR", "SSIM"))])
    what = ["mask", "realised"] if facts.modality == "mri" else ["scan"]
    subjects = subjects_of(of_target)
    below = [*left_out(used, list(subjects)), source_of_maps(of_target)]
    blocks: list[Block] = [
        Heading(f"Target `{target}`, all volumes", 3),
        Paragraph(means_over(list(used.values()), subjects, len(facts.seeds))),
        Table([*what, *by_method], lines),
    ]
    blocks += [Paragraph(text) for text in below if text]
    comparison = _comparison(by_method, facts)
    if comparison is not None:
        blocks.append(comparison)
        if facts.modality == "mri":
            realised = _realised(of_target, facts.masks)
            text = f"All masks, realised acceleration {realised}. {source_of_maps(of_target)}"
            blocks.append(Paragraph(text))
    return blocks


def _realised(rows: Sequence[Row], masks: Sequence[str]) -> str:
    """Least and largest realised acceleration."""
    values = [row["acceleration"] for row in rows if row["mask"] in masks]
    if not values:
        return "–"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"×{low}" if low == high else f"×{low} – {high}"


def _best_in_bold(
    found: Mapping[str, Mapping[str, Estimate | None]], metrics: Sequence[str]
) -> list[str | Cell]:
    """Cells of a line: the best of each metric in bold, and what is printed alike is equally good."""
    tops = {}
    for metric in metrics:
        known = [e.mean for e in (by_metric[metric] for by_metric in found.values()) if e is not None]
        tops[metric] = FORMATS[metric].format(BETTER[metric](known)) if known else ""
    cells: list[str | Cell] = []
    for by_metric in found.values():
        parts, bold = [], []
        for metric in metrics:
            estimate = by_metric[metric]
            parts.append("–" if estimate is None else _interval(estimate, FORMATS[metric]))
            bold.append(estimate is not None and FORMATS[metric].format(estimate.mean) == tops[metric])
        cells.append(Cell(parts, bold))
    return cells


def _comparison(by_method: Mapping[str, Sequence[Row]], facts: Facts) -> Table | None:
    """By how much the main method leads each of the others."""
    if facts.main not in by_method or len(by_method) == 1:
        return None
    lines: list[list[str | Cell]] = []
    for name, theirs in by_method.items():
        if name == facts.main:
            continue
        cells: list[str | Cell] = [f"{facts.main} – {name}"]
        behind: tuple[str, ...] = ()
        for metric in ("PSNR", "SSIM"):
            found = compare(by_method[facts.main], theirs, metric, facts.masks, facts.seeds, facts.draws)
            if found is None:
                cells += ["–", "–"]
                continue
            form = FORMATS[metric]
            cells += [_interval(found.difference, form, sign=True), f"{found.led} of {found.rows}"]
            if metric == "PSNR":
                behind = found.behind
        cells.append("; ".join(behind) if behind else "–")
        lines.append(cells)
    headings = ["difference", "PSNR / dB", "rows led", "SSIM", "rows led", "behind in PSNR on"]
    return Table(headings, lines)


# -- tables by volume ----------------------------------------------------------------------------------------


def _cells_mean(facts: Facts) -> str:
    text = "Cells are PSNR in dB / SSIM / NMSE over the slices of a volume that were run"
    text += (
        ", as fastMRI defines them" if facts.modality == "mri" else ", the peak being the range of the truth"
    )
    text += ", means over seeds" if len(facts.seeds) > 1 else ""
    return f"{text}; the best of each in bold."


def _perceptual_mean(rows: Sequence[Row]) -> str:
    text = (
        f"HFEN, the error behind a Laplacian of a Gaussian ({LOG_SIDE} × {LOG_SIDE}, σ {LOG_SIGMA:g}) over "
        "the target behind it (Ravishankar & Bresler 2011), smaller is better / MS-SSIM of five scales (Wang "
        "et al. 2003)."
    )
    if any(row.get("MS-SSIM") is None for row in rows):
        text += f" –: slices smaller than {MS_SSIM_SIDE * 16} pixels have no five scales."
    return text


def _mean_over_seeds(rows: Sequence[Row], metric: str) -> Estimate | None:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    nan = float("nan")
    return Estimate(stdlib_statistics.fmean(values), nan, nan, 1, len(values)) if values else None


def _by_volume(rows: Sequence[Row], facts: Facts, metrics: Sequence[str]) -> Table:
    """One line for each volume and mask."""
    lines: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        lines.setdefault((row["volume"], row["mask"]), {}).setdefault(row["method"], []).append(row)
    columns = [name for name in facts.columns if any(name in line for line in lines.values())]
    mri = facts.modality == "mri"
    perfect = metrics == ERRORS and any(row.get("noise_free_PSNR") is not None for row in rows)
    headings = ["volume", "slices", *(("mask", "realised", "calibration") if mri else ("scan",)), *columns]
    if perfect:
        headings.append("noise-free image")
    made: list[list[str | Cell]] = []
    for (volume, mask), line in lines.items():
        first = next(iter(line.values()))[0]
        cells: list[str | Cell] = [
            f"{volume}{' *' * (mri and first['simulated'])}",
            str(first["slices"]),
            mask,
        ]
        if mri:
            cells += [
                f"×{first['acceleration']:.2f}",
                f"{first['calibration']}, {first['calibration_source']}",
            ]
        found = {
            name: {metric: _mean_over_seeds(line.get(name, []), metric) for metric in metrics}
            for name in columns
        }
        cells += _best_in_bold(found, metrics)
        if perfect:
            known = first.get("noise_free_PSNR")
            cells.append("–" if known is None else f"{known:.2f}")
        made.append(cells)
    return Table(headings, made)


# -- costs and choices ---------------------------------------------------------------------------------------


def _costs_mean(facts: Facts) -> str:
    return (
        "Of one slice, median (least – most) over volumes and masks: network evaluations over all samples, "
        "seconds on the clock, of the processor over all its threads, largest resident memory of the process "
        "while the method ran, network and libraries included, sampled every 10 ms, and how much of that it "
        "added. Loading a network and making coil maps or operators is not counted; searching the best "
        "weight is. A single sample of several is charged its share."
    )


def _costs(rows: Sequence[Row], facts: Facts) -> Table:
    numbers: dict[str, tuple[str, Callable[[float], str]]] = {
        "NFE": ("NFE", lambda value: f"{value:.0f}"),
        "wall_s": ("seconds", _seconds),
        "cpu_s": ("processor seconds", _seconds),
        "memory_mb": ("memory / MB", lambda value: f"{value:.0f}"),
        "memory_added_mb": ("added / MB", lambda value: f"{value:.0f}"),
        "gpu_memory_mb": ("GPU memory / MB", lambda value: f"{value:.0f}"),
    }
    shown = {key: pair for key, pair in numbers.items() if any(row.get(key) is not None for row in rows)}
    lines: list[list[str | Cell]] = []
    for name in facts.columns:
        own = [row for row in rows if row["method"] == name]
        if not own:
            continue
        cells: list[str | Cell] = [name]
        for key, (_, form) in shown.items():
            values = [row[key] for row in own if row.get(key) is not None]
            cells.append(_spread(values, form))
        cells.append(facts.settings.get(name, ""))
        lines.append(cells)
    return Table(["method", *(heading for heading, _ in shown.values()), "settings"], lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return "–"
    middle, low, high = form(stdlib_statistics.median(values)), form(min(values)), form(max(values))
    return middle if low == high else f"{middle} ({low} – {high})"


def _choices_mean(facts: Facts) -> str:
    if facts.modality == "ct":
        return "What suited each scan best, slice by slice."
    return "λ for data scaled to a zero-filled image of maximum 1, slice by slice; c: cropped maps."


def _choices(rows: Sequence[Row], facts: Facts) -> Table:
    chosen = [row for row in rows if row.get("chosen")]
    columns = list(dict.fromkeys((row["method"], row["target"]) for row in chosen))
    lines: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in chosen:
        lines.setdefault((row["volume"], row["mask"]), {})[row["method"], row["target"]] = row["chosen"]
    what = "mask" if facts.modality == "mri" else "scan"
    headings = ["volume", what, *(f"{method}, {target}" for method, target in columns)]
    made: list[list[str | Cell]] = [
        [*where, *(line.get(column, "–") for column in columns)] for where, line in lines.items()
    ]
    return Table(headings, made)
