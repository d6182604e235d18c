"""Page and picture of the planted lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.pages import SIMULATED, markdown_table
from benchmarks.pathology.lesions import GAP
from benchmarks.pathology.planted import (
    KEPT,
    NOTICED,
    Empty,
    Found,
    Outcome,
    Pair,
    by_size_and_contrast,
)
from recon.figures import save_figure

LOST, HELD = "#ff5c5c", "#58d68d"


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Make the Markdown table: for every mask and method what is recovered, kept, and false."""
    faintest = min(abs(contrast) for _, contrast in by_size_and_contrast(outcomes))
    headings = [
        "mask",
        "realised",
        "calibration",
        "method",
        "contrast recovered",
        "spread over samples",
        "kept",
        "false, per 100 empty places",
        "error of an empty place, % of max",
    ]
    lines = []
    for mask, asked in _masks(outcomes):
        here = [o for o in outcomes if (o.mask, o.asked) == (mask, asked)]
        for method in _methods(here):
            these = [o for o in here if o.method == method]
            found = [f for o in these for f in o.lesions]
            empty = [e for o in these for e in o.empty]
            recovered = [f.recovered for f in found]
            lines.append(
                [
                    f"{mask} ×{asked:g}",
                    _span([o.acceleration for o in these], "×{:.2f}"),
                    " or ".join(dict.fromkeys("{} × {}".format(*o.calibration) for o in these)),
                    method,
                    f"{np.mean(recovered):.2f} ({min(recovered):.2f} to {max(recovered):.2f})",
                    _spread(found),
                    f"{sum(f.kept for f in found)} of {len(found)}",
                    f"{100 * _false_share(empty, faintest):.1f}",
                    f"{100 * _rms(empty):.2f}",
                ]
            )
    return markdown_table(headings, lines)


def lesion_table(outcomes: Sequence[Outcome]) -> str:
    """Make the Markdown table: for every mask, size and contrast what each method recovered and kept."""
    methods = _methods(outcomes)
    lines = []
    for mask, asked in _masks(outcomes):
        for size, contrast in by_size_and_contrast(outcomes):
            cells = [f"{mask} ×{asked:g}", f"{size:g}", f"{100 * contrast:+.0f} %"]
            for method in methods:
                found = [
                    f
                    for o in outcomes
                    if (o.mask, o.asked, o.method) == (mask, asked, method)
                    for f in o.lesions
                    if (f.size, f.contrast) == (size, contrast)
                ]
                if not found:
                    cells.append("–")
                    continue
                spread = _spread(found)
                recovered = f"{np.mean([f.recovered for f in found]):.2f}"
                recovered += "" if spread == "–" else f" ± {spread}"
                cells.append(f"{recovered}, {sum(f.kept for f in found)}/{len(found)}")
            lines.append(cells)
    return markdown_table(["mask", "semi-axis / pixels", "contrast, of max", *methods], lines)


def false_table(outcomes: Sequence[Outcome]) -> str:
    """Make the Markdown table: for every mask and size the share of empty places with a false contrast."""
    methods = _methods(outcomes)
    contrasts = sorted({abs(contrast) for _, contrast in by_size_and_contrast(outcomes)})
    lines = []
    for mask, asked in _masks(outcomes):
        for size in sorted({size for size, _ in by_size_and_contrast(outcomes)}, reverse=True):
            cells = [f"{mask} ×{asked:g}", f"{size:g}"]
            for method in methods:
                empty = [
                    e
                    for o in outcomes
                    if (o.mask, o.asked, o.method) == (mask, asked, method)
                    for e in o.empty
                    if e.size == size
                ]
                shares = [f"{100 * _false_share(empty, c):.1f}" for c in contrasts]
                cells.append(" / ".join(shares) if empty else "–")
            lines.append(cells)
    return markdown_table(["mask", "semi-axis / pixels", *methods], lines)


def report(outcomes: Sequence[Outcome], *, facts: Mapping[str, str], picture: str) -> str:
    """Make the whole page.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of `benchmarks.pathology.planted.run`.
    facts : mapping of str to str
        How it was made.
    picture : str
        File name of the picture.
    """
    contrasts = sorted({abs(contrast) for _, contrast in by_size_and_contrast(outcomes)})
    thresholds = " / ".join(f"{100 * KEPT * contrast:g} %" for contrast in contrasts)
    text = [
        "# Planted lesions: kept, lost, false",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    text += [
        "",
        f"{SIMULATED} Elliptical lesions were planted into the magnitude image before. Every slice is "
        "reconstructed with and without them, with the same coils, phase, noise, mask and random numbers. "
        "The truth is the image behind the simulation, without noise.",
        "",
        "- contrast: mean of a lesion's pixels less the mean of a ring around it, "
        f"which begins {GAP:g} pixels outside of it",
        "- recovered: what the lesion adds to its contrast in the reconstruction, over what it adds in the "
        "truth; 1 is faithful. ±: standard deviation of the same over samples",
        f"- kept: its contrast in the reconstruction, less the true one without it, is at least {KEPT:.0%} "
        f"of what it adds in the truth, and {NOTICED:g} times the error (root mean square) that the method "
        "makes in the contrast of empty places of the same size",
        "- false: empty places of a lesion's size and shape, drawn inside of the object, where the contrast "
        f"in the reconstruction is off by {KEPT:.0%} of a planted contrast or more",
        "",
        "## In short",
        "",
        f"False: of the faintest contrast planted, {100 * contrasts[0]:g} % of the maximum; all sizes.",
        "",
        summary_table(outcomes),
        "",
        "## By size and contrast",
        "",
        "Recovered, and how many were kept.",
        "",
        lesion_table(outcomes),
        "",
        "## False lesions",
        "",
        f"Per 100 empty places, off by {thresholds} of the maximum, which would count for a lesion of "
        f"{' / '.join(f'{100 * contrast:g} %' for contrast in contrasts)} as kept.",
        "",
        false_table(outcomes),
        "",
        f"![Reconstructions with lesions, what they made of the lesions, and their errors]({picture})",
        "",
        "Picture: lesions outlined, green where kept and red where lost. What was made of them is the "
        "difference of the reconstructions with and without lesions. The colours end at half of the "
        "strongest contrast planted.",
        "",
    ]
    return "\n".join(text)


def draw(outcomes: Sequence[Outcome], pair: Pair, where: str, path: Path) -> Path:
    """Draw one slice through one mask: images, what was made of the lesions, and errors, a method a column.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Those of `where` are drawn.
    pair : Pair
        The slice.
    where : str
        `Outcome.where` of what is drawn.
    path : Path
        The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from benchmarks.cases import simulate
    from benchmarks.pathology.lesions import plant
    from recon.figures import BACKGROUND, DIM, TEXT

    here = [outcome for outcome in outcomes if outcome.where == where]
    truths = [_truth(simulate, pair, image) for image in (pair.image, plant(pair.image, pair.lesions))]
    peak = float(truths[0].max())
    rows, columns = _brain(truths[0] / peak)
    top = float(np.quantile(truths[1][rows, columns], 0.97)) / peak
    limit = max(abs(lesion.contrast) for lesion in pair.lesions) / 2
    truth = Outcome(pair.name, "", 1, 1, (0, 0), "truth", [], [], truths[0], truths[1])
    panels = [truth, *here]
    shape = truths[0][rows, columns].shape
    width = 2.4  # inches
    figure = Figure(
        figsize=(width * len(panels) + 1.2, 3 * width * shape[0] / shape[1] + 1.1), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.set_facecolor(BACKGROUND)
    grid = figure.subplots(3, len(panels), squeeze=False)
    labels = ("with lesions", "made of the lesions", "error, with lesions")
    shown = None
    for column, outcome in enumerate(panels):
        images = (
            outcome.planted / peak,
            (outcome.planted - outcome.clean) / peak,
            (outcome.planted - truths[1]) / peak,
        )
        for row, image in enumerate(images):
            axes = grid[row, column]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_facecolor(BACKGROUND)
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.imshow(image[rows, columns], cmap="gray", vmin=0, vmax=top, interpolation="nearest")
                axes.set_title(outcome.method, color=TEXT, fontsize=10)
                kept = sum(found.kept for found in outcome.lesions)
                note = f"{kept} of {len(outcome.lesions)} kept" if outcome.lesions else ""
                axes.set_xlabel(note, color=DIM, fontsize=9)
            elif row == 1 or outcome is not truth:
                shown = axes.imshow(
                    image[rows, columns],
                    cmap="RdBu_r",
                    vmin=-limit,
                    vmax=limit,
                    interpolation="nearest",
                )
            if column == 0:
                axes.set_ylabel(labels[row] if row < 2 else "", color=TEXT, fontsize=10)
            if column == 1 and row == 2:
                axes.set_ylabel(labels[2], color=TEXT, fontsize=10)
            if row == 0 and outcome.lesions:
                _outline(axes, pair, outcome.lesions, rows.start, columns.start)
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid[1:, :].ravel().tolist(), shrink=0.6, pad=0.01, extend="both")
        bar.ax.tick_params(colors=DIM, labelsize=8)
        bar.set_label("of the image's maximum", color=DIM, fontsize=9)
        bar.outline.set_visible(False)
    figure.suptitle(where, color=TEXT, fontsize=12)
    return save_figure(figure, path)


def _truth(simulate, pair: Pair, image: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    import torch

    return simulate(pair.name, torch.from_numpy(image), pair.seed).targets["noise-free"].numpy()


def _outline(axes: object, pair: Pair, found: Sequence[Found], top: int, left: int) -> None:
    from matplotlib.patches import Ellipse

    from benchmarks.pathology.lesions import ASPECT

    for lesion, result in zip(pair.lesions, found, strict=True):
        axes.add_patch(  # type: ignore[attr-defined]
            Ellipse(
                (lesion.column - left, lesion.row - top),
                2 * (lesion.size + 2),
                2 * (ASPECT * lesion.size + 2),
                angle=math.degrees(lesion.angle),
                fill=False,
                edgecolor=HELD if result.kept else LOST,
                linewidth=1,
            )
        )


def _brain(image: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the object, with a margin."""
    from recon.calibration import object_region

    region = object_region(image)
    parts = []
    for axis in (1, 0):
        where = np.flatnonzero(region.any(axis=axis))
        parts.append(slice(max(int(where[0]) - 4, 0), int(where[-1]) + 5))
    return parts[0], parts[1]


def _masks(outcomes: Sequence[Outcome]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((o.mask, o.asked) for o in outcomes))


def _methods(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(o.method for o in outcomes))


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _spread(found: Sequence[Found]) -> str:
    """Root mean square over lesions of the spread over samples."""
    spreads = [f.spread for f in found if not math.isnan(f.spread)]
    return f"{math.sqrt(float(np.mean(np.square(spreads)))):.2f}" if spreads else "–"


def _false_share(empty: Sequence[Empty], contrast: float) -> float:
    weights = [len(e.errors) for e in empty]
    return float(np.average([e.false_share(contrast) for e in empty], weights=weights)) if empty else math.nan


def _rms(empty: Sequence[Empty]) -> float:
    return math.sqrt(float(np.mean([error**2 for e in empty for error in e.errors])))
