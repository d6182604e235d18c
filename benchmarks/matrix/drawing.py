"""Figures: PSNR for each mask, PSNR against acceleration or views, and one case as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix.rows import Row
from benchmarks.matrix.statistics import summaries, tabulate
from benchmarks.matrix.study import Condition

AMPLIFIED = 5
"""Factor by which errors are shown."""

WINDOWS = {"ct": (0.5, 1.3)}
"""Of pictures, in the units of scored images; of MRI from zero to nearly the brightest pixel."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One method in the picture of a case.

    Attributes
    ----------
    name : str
        Of the column.
    image : ndarray
        ``(h, w)``.
    std : ndarray, optional
        Standard deviation over samples.
    psnr : float
        Of this slice alone, dB.
    """

    name: str
    image: np.ndarray
    std: np.ndarray | None
    psnr: float


def colours(methods: Sequence[str]) -> dict[str, Any]:
    """Colour of each method, the same in all figures."""
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    return {name: palette(index % palette.N) for index, name in enumerate(methods)}


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def _save(drawing: Any, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    drawing.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    temporary.replace(path)


def _by_method(rows: Sequence[Row], target: str, methods: Sequence[str]) -> dict[str, list[Row]]:
    of_target = [row for row in rows if row["target"] == target]
    return {name: [row for row in of_target if row["method"] == name] for name in methods}


def dots(
    rows: Sequence[Row],
    path: Path,
    *,
    targets: Sequence[str],
    conditions: Sequence[Condition],
    methods: Sequence[str],
    seeds: Sequence[int],
    draws: int,
) -> None:
    """PSNR of every method for each mask: mean over volumes with its interval, and the single volumes."""
    shades = colours(methods)
    masks = [condition.label for condition in conditions]
    height = 1.4 + len(masks) * (0.22 + 0.13 * len(methods))
    drawing = _canvas(1.6 + 4.2 * len(targets), height)
    panels = drawing.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for panel, target in zip(panels, targets, strict=True):
        by_method = _by_method(rows, target, methods)
        for i, mask in enumerate(masks):
            if i % 2:
                panel.axhspan(i - 0.5, i + 0.5, color="0.94", zorder=0)
            estimates, _ = summaries(by_method, "PSNR", [mask], seeds, draws)
            for j, (name, own) in enumerate(by_method.items()):
                found = estimates[name]
                if found is None:
                    continue
                y = i + 0.8 * ((j + 0.5) / len(methods) - 0.5)
                singles = [float(table.mean()) for table in tabulate(own, "PSNR", [mask], seeds).values()]
                if len(singles) > 1:
                    panel.plot(singles, [y] * len(singles), "|", color=shades[name], alpha=0.5, markersize=6)
                if found.known:
                    panel.plot([found.low, found.high], [y, y], color=shades[name], linewidth=1.6)
                panel.plot(found.mean, y, "o", color=shades[name], markersize=5, label=name if i == 0 else "")
        panel.set_title(f"target {target}", fontsize=10)
        panel.set_xlabel("PSNR / dB")
        panel.set_ylim(len(masks) - 0.5, -0.5)
        panel.set_yticks(range(len(masks)), masks)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", color="0.85", linewidth=0.6)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    _legend(drawing, panels, len(methods))
    _save(drawing, path)


def _legend(drawing: Any, panels: Sequence[Any], count: int) -> None:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    drawing.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(4, count),
        frameon=False,
        fontsize=8,
    )


def families(conditions: Sequence[Condition]) -> dict[str, list[Condition]]:
    """Masks that differ in acceleration alone, scans in views, where there are at least three."""
    found: dict[str, list[Condition]] = {}
    for condition in conditions:
        found.setdefault(condition.family, []).append(condition)
    return {name: sorted(group, key=lambda c: c.asked) for name, group in found.items() if len(group) >= 3}


def curves(
    rows: Sequence[Row],
    path: Path,
    *,
    target: str,
    conditions: Sequence[Condition],
    methods: Sequence[str],
    seeds: Sequence[int],
    draws: int,
    label: str,
) -> bool:
    """PSNR against acceleration, or views; nothing is drawn where no kind has three of them.

    Returns
    -------
    bool
        Whether there was something to draw.
    """
    groups = families(conditions)
    if not groups:
        return False
    shades = colours(methods)
    drawing = _canvas(1.2 + 4.2 * len(groups), 4.4)
    panels = drawing.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    by_method = _by_method(rows, target, methods)
    for panel, (family, group) in zip(panels, groups.items(), strict=True):
        found = [(c.asked, summaries(by_method, "PSNR", [c.label], seeds, draws)[0]) for c in group]
        for name in methods:
            known = [(asked, e) for asked, each in found if (e := each[name]) is not None]
            if not known:
                continue
            x = [asked for asked, _ in known]
            panel.plot(x, [e.mean for _, e in known], "o-", color=shades[name], markersize=4, label=name)
            if all(estimate.known for _, estimate in known):
                low, high = ([getattr(e, side) for _, e in known] for side in ("low", "high"))
                panel.fill_between(x, low, high, color=shades[name], alpha=0.12, linewidth=0)
        panel.set_xscale("log")
        panel.set_xticks([c.asked for c in group], [f"{c.asked:g}" for c in group])
        panel.minorticks_off()
        panel.set_title(family, fontsize=10)
        panel.set_xlabel(label)
        panel.grid(color="0.88", linewidth=0.6)
    panels[0].set_ylabel(f"PSNR / dB, target {target}")
    _legend(drawing, panels, len(methods))
    _save(drawing, path)
    return True


def pictures(truth: np.ndarray, panels: Sequence[Panel], path: Path, *, modality: str) -> None:
    """Truth and reconstructions; below them the errors, five times amplified, and the spread of samples."""
    low, high = WINDOWS.get(modality, (0.0, float(np.quantile(truth, 0.999))))
    spread = any(panel.std is not None for panel in panels)
    columns, lines = 1 + len(panels), 2 + spread
    ratio = truth.shape[0] / truth.shape[1]
    drawing = _canvas(1.75 * columns + 0.7, (1.75 * ratio + 0.12) * lines + 0.35)
    grid = drawing.subplots(lines, columns, squeeze=False)
    top = max((float(np.quantile(p.std, 0.995)) for p in panels if p.std is not None), default=1.0) or 1.0
    for axes in grid:
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
    grid[0][0].imshow(truth, cmap="gray", vmin=low, vmax=high)
    grid[0][0].set_title("truth", fontsize=8)
    errors = spreads = None
    for column, panel in enumerate(panels, start=1):
        grid[0][column].imshow(panel.image, cmap="gray", vmin=low, vmax=high)
        grid[0][column].set_title(f"{panel.name}\n{panel.psnr:.1f} dB", fontsize=8)
        error = AMPLIFIED * np.abs(panel.image - truth)
        errors = grid[1][column].imshow(error, cmap="inferno", vmin=0, vmax=high - low)
        if panel.std is not None:
            spreads = grid[2][column].imshow(panel.std, cmap="viridis", vmin=0, vmax=top)
    for line, drawn, text in ((1, errors, f"error × {AMPLIFIED}"), (2, spreads, "standard deviation")):
        if line < lines and drawn is not None:
            drawing.colorbar(drawn, ax=list(grid[line]), shrink=0.8, aspect=18).ax.tick_params(labelsize=7)
            grid[line][0].text(
                0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=grid[line][0].transAxes
            )
    _save(drawing, path)
