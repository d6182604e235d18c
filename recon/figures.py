"""Pictures of a reconstruction: what was measured, what came out, and how far to trust it."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.metrics import psnr, ssim

__all__ = ["reconstruction_figure"]

BACKGROUND, TEXT, DIM = "#101216", "#f2f3f5", "#9aa1ac"
PANEL_WIDTH = 3.2  # inches
PIXELS_PER_INCH = 150


@dataclass(frozen=True)
class _Panel:
    title: str
    image: np.ndarray
    note: str = ""
    colormap: str = "gray"
    limit: float = 1.0
    bar: bool = False
    fill: bool = False  # stretch to the panel: the pixels of a mask are not the image's


def reconstruction_figure(
    path: str | Path,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    zero_filled: np.ndarray,
    mask: np.ndarray,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Draw one slice, its uncertainty and, where the truth is known, its error, and save it as PNG.

    Every image is shown with the same window. The standard deviation and the error are in percent of the
    largest value of the truth (of the mean, without one) and share one colour scale, so that they can be
    compared.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    mean, std : numpy.ndarray
        (h, w) real: the reconstruction and the standard deviation of its magnitude.
    zero_filled : numpy.ndarray
        (h, w) real: the image of the measured k-space alone.
    mask : numpy.ndarray
        (W,) or (1, W) columns, or (H, W): the sampling mask.
    truth : numpy.ndarray, optional
        (h, w) real: the target. With it come PSNR and SSIM of this slice, whose range is its largest value,
        and the error.
    title : str
        Printed above: file, slice, acceleration, number of samples.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReconError
        If an image is misshapen or holds NaN or infinities, or if the file cannot be written.
    """
    path = Path(path)
    images = {"mean": mean, "std": std, "zero_filled": zero_filled}
    if truth is not None:
        images["truth"] = truth
    for name, image in images.items():
        if image.ndim != 2 or image.shape != mean.shape or np.iscomplexobj(image):
            raise ReconError(
                f"{path}: '{name}' must be a real image like 'mean', {mean.shape}, got {image.shape}"
            )
        if not np.isfinite(image).all():
            raise ReconError(f"{path}: '{name}' holds NaN or infinite values")
    if mask.ndim not in (1, 2):
        raise ReconError(f"{path}: the mask must have shape (W,) or (H, W), got {mask.shape}")

    rows = _panels(images, np.atleast_2d(mask).astype(float))
    figure = _draw(rows, mean.shape, title)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=PIXELS_PER_INCH, facecolor=BACKGROUND)
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # not there, or no folder to be in
            temporary.unlink()
    return path


def _panels(images: dict[str, np.ndarray], mask: np.ndarray) -> list[list[_Panel]]:
    """Panels by row; with a truth, what belongs together stands in one column."""
    truth, mean = images.get("truth"), images["mean"]
    reference = mean if truth is None else truth
    peak = float(reference.max()) or 1.0
    window = float(np.quantile(reference, 0.998)) or peak
    percent_std = 100 * images["std"] / peak
    maps = [percent_std]
    if truth is not None:
        percent_error = 100 * np.abs(mean - truth) / peak
        maps.append(percent_error)
    # A few extreme pixels, at an edge or a vessel, must not darken the rest.
    scale = max(float(np.quantile(image, 0.998)) for image in maps) or 1.0

    def shown(name: str, key: str) -> _Panel:
        image = images[key]
        note = "" if truth is None or key == "truth" else _scores(truth, image)
        return _Panel(name, image, note, limit=window)

    zero_filled, reconstruction = shown("Zero-filled", "zero_filled"), shown("Posterior mean", "mean")
    spread = _Panel("Posterior std", percent_std, "% of max", "inferno", scale, bar=True)
    sampling = _Panel("Sampling mask", mask, f"{100 * mask.mean():.0f} % sampled", limit=1.3, fill=True)
    if truth is None:
        return [[sampling, zero_filled, reconstruction, spread]]
    error = _Panel("Absolute error", percent_error, "% of max", "inferno", scale, bar=True)
    return [[zero_filled, reconstruction, spread], [sampling, shown("Fully sampled", "truth"), error]]


def _scores(truth: np.ndarray, image: np.ndarray) -> str:
    if truth.max() <= 0:
        return ""
    return f"{psnr(truth[None], image[None]):.1f} dB · SSIM {ssim(truth[None], image[None]):.3f}"


def _draw(rows: list[list[_Panel]], shape: tuple[int, ...], title: str) -> Any:
    """Place panels of one size on a figure; all lengths are inches."""
    # Not pyplot: it keeps global state, and would choose a backend that needs a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_WIDTH, PANEL_WIDTH * shape[0] / shape[1]
    margin, gap, heading, foot = 0.3, 0.22, 0.38, 0.42
    bar_gap, bar_width, bar_label = 0.08, 0.12, 0.45
    top = 0.55 if title else 0.15
    columns = len(rows[0])
    total_width = 2 * margin + columns * width + (columns - 1) * gap + bar_gap + bar_width + bar_label
    total_height = top + len(rows) * (heading + height) + foot + gap * (len(rows) - 1) / 2

    figure = Figure(figsize=(total_width, total_height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def axes(left: float, bottom: float, across: float, up: float) -> Any:
        return figure.add_axes(
            (left / total_width, bottom / total_height, across / total_width, up / total_height)
        )

    for r, row in enumerate(rows):
        bottom = total_height - top - (r + 1) * (heading + height) - r * gap / 2
        for c, panel in enumerate(row):
            left = margin + c * (width + gap)
            ax = axes(left, bottom, width, height)
            drawn = ax.imshow(
                panel.image,
                cmap=panel.colormap,
                vmin=0,
                vmax=panel.limit,
                aspect="auto" if panel.fill else "equal",
                interpolation="nearest",
            )
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_visible(False)
            ax.set_title(panel.title, loc="left", color=TEXT, fontsize=11, pad=6)
            ax.set_title(panel.note, loc="right", color=DIM, fontsize=9, pad=6)
            if panel.bar:
                bar_axes = axes(left + width + bar_gap, bottom, bar_width, height)
                bar = figure.colorbar(drawn, cax=bar_axes, extend="max", extendfrac=0.03)
                bar.outline.set_visible(False)
                bar_axes.tick_params(colors=DIM, labelsize=8, length=2)
    if title:
        figure.text(
            margin / total_width,
            1 - 0.22 / total_height,
            title,
            color=TEXT,
            fontsize=13,
            va="top",
            weight="bold",
        )
    figure.text(
        1 - margin / total_width,
        0.2 / total_height,
        "Not for diagnostic use",
        color=DIM,
        fontsize=9,
        ha="right",
    )
    return figure
