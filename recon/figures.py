"""Pictures of a reconstruction: what was measured, what came out, and how far to trust it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.metrics import psnr, ssim

__all__ = ["posterior_figure", "reconstruction_figure", "uncertainty_grid"]

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
    _check_images(path, images)
    if mask.ndim not in (1, 2):
        raise ReconError(f"{path}: the mask must have shape (W,) or (H, W), got {mask.shape}")
    rows = _panels(images, np.atleast_2d(mask).astype(float))
    return save_figure(_draw(rows, mean.shape, title), path)


def ct_figure(
    path: str | Path,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    units: str,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Draw one slice of a CT reconstruction and its standard deviation, and save it as PNG.

    Grey goes from air to all but the brightest pixels. Standard deviation and error share one scale.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    mean, std : numpy.ndarray
        (H, W) real, in the same units.
    units : str
        Of both, such as ``"1/mm"`` or ``"HU"``.
    truth : numpy.ndarray, optional
        (H, W), in the same units; with it comes the error.
    title : str
        Printed above.

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
    images = {"mean": mean, "std": std} | ({} if truth is None else {"truth": truth})
    _check_images(path, images)
    air = -1000.0 if units == "HU" else 0.0
    window, _ = _window((mean if truth is None else truth) - air)
    maps = {"Posterior std": std}
    row = [_Panel("Posterior mean", mean - air, limit=window)]
    if truth is not None:
        maps["Absolute error"] = np.abs(mean - truth)
        row.insert(0, _Panel("Reference", truth - air, limit=window))
    scale = _colour_limit(maps.values())
    row += [_Panel(name, image, units, "inferno", scale) for name, image in maps.items()]
    return save_figure(_draw([_barred(row)], mean.shape, title), path)


def segmentation_figure(
    path: str | Path, segmentation: np.ndarray, probability: np.ndarray, reference: np.ndarray | None = None
) -> Path:
    """Draw a segmentation, the probability of every pixel and, with a reference, what is wrong.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    segmentation, reference : numpy.ndarray
        (H, W), 0 or 1.
    probability : numpy.ndarray
        (H, W) in [0, 1].

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
    images = {"mean": segmentation.astype(float), "probability": probability}
    if reference is not None:
        images["reference"] = reference.astype(float)
    _check_images(path, images)
    row = [
        _Panel("Segmentation", images["mean"]),
        _Panel("Probability of material", probability, "", "inferno", bar=True),
    ]
    if reference is not None:
        wrong = np.abs(images["mean"] - images["reference"])
        row.insert(0, _Panel("Reference", images["reference"]))
        row.insert(2, _Panel("Wrong pixels", wrong, f"{100 * wrong.mean():.2f} %"))
    return save_figure(_draw([row], segmentation.shape, ""), path)


def posterior_figure(
    path: str | Path,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    samples: np.ndarray,
    measured: np.ndarray | None = None,
    invented: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Draw what the samples of one slice say together and one by one, and save it as PNG.

    The first row holds the truth, where it is known, the mean, the standard deviation and the error; the
    second the first samples and, where the mean was split, what the data determine of it and what the prior
    filled in. Windows and colour scales are those of :func:`reconstruction_figure`.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    mean, std : numpy.ndarray
        (h, w) real: the reconstruction and the standard deviation of its magnitude.
    samples : numpy.ndarray
        (n, h, w) real: magnitudes of samples, of which as many are shown as there is room for (2 to 4).
    measured, invented : numpy.ndarray, optional
        (h, w) real: magnitudes of the two parts of the mean (:class:`recon.nullspace.Split`); both or none.
    truth : numpy.ndarray, optional
        (h, w) real: the target.
    title : str
        Printed above.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReconError
        If an image is misshapen or holds NaN or infinities, only one of both parts is given, or the file
        cannot be written.
    """
    path = Path(path)
    if (measured is None) != (invented is None):
        raise ReconError(f"{path}: the measured and the invented part are drawn together or not at all")
    if samples.ndim != 3 or not len(samples):
        raise ReconError(f"{path}: 'samples' must have shape (n, h, w), n at least 1, got {samples.shape}")
    images = {"mean": mean, "std": std, **{f"sample {i + 1}": s for i, s in enumerate(samples)}}
    given = {"truth": truth, "measured": measured, "invented": invented}
    images |= {name: image for name, image in given.items() if image is not None}
    _check_images(path, images)

    window, peak = _window(mean if truth is None else truth)
    maps = {"Posterior std": 100 * std / peak}
    if truth is not None:
        maps["Absolute error"] = 100 * np.abs(mean - truth) / peak
    scale = _colour_limit(maps.values())

    def shown(name: str, image: np.ndarray) -> _Panel:
        note = "" if truth is None or image is truth else _scores(truth, image)
        return _Panel(name, image, note, limit=window)

    first = [shown("Posterior mean", mean)]
    if truth is not None:
        first.insert(0, shown("Fully sampled", truth))
    first += [_Panel(name, image, "% of max", "inferno", scale) for name, image in maps.items()]
    second = []
    if measured is not None and invented is not None:
        share = (invented**2).sum() / max((measured**2).sum() + (invented**2).sum(), 1e-300)
        percent = 100 * invented / peak
        second = [
            _Panel("Measured part", measured, "", limit=window),
            _Panel(
                "Invented part",
                percent,
                f"% of max · {100 * share:.2g} % of energy",
                "inferno",
                _colour_limit([percent]),
            ),
        ]
    # Without a truth there is room for a third column only if the mean was split.
    columns = max(len(first), len(second) + 1)
    while len(first) < columns:
        first.insert(0, shown("Sample 1", samples[0]))
    start = sum(panel.title.startswith("Sample") for panel in first)
    drawn = range(start, min(len(samples), start + columns - len(second)))
    second = [shown(f"Sample {i + 1}", samples[i]) for i in drawn] + second
    return save_figure(_draw([_barred(first), _barred(second)], mean.shape, title), path)


def uncertainty_grid(
    path: str | Path,
    results: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    region: np.ndarray,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Draw how mean and standard deviation change, from one acceleration to the next, and save it as PNG.

    One column for each result: the mean, the standard deviation and, where the truth is known, the error. All
    maps share one colour scale, in percent of the largest value of the truth (of the first mean, without
    one); their averages over the region are printed beside their titles.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    results : mapping of str to tuple of numpy.ndarray
        Heading, such as ``"×4"`` -> mean and standard deviation, (h, w) real.
    region : numpy.ndarray
        (h, w) bool: the object.
    truth : numpy.ndarray, optional
        (h, w) real.
    title : str
        Printed above.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReconError
        If there are no results, an image is misshapen or holds NaN or infinities, the region is not bool or
        empty, or the file cannot be written.
    """
    path = Path(path)
    if not results:
        raise ReconError(f"{path}: there are no results to draw")
    (first_mean, _), *_ = results.values()
    images = {"mean": first_mean}
    for name, (mean, std) in results.items():
        images |= {f"mean {name}": mean, f"std {name}": std}
    if truth is not None:
        images["truth"] = truth
    _check_images(path, images)
    if region.shape != first_mean.shape or region.dtype != bool or not region.any():
        raise ReconError(f"{path}: the region must be bool of shape {first_mean.shape}, and not empty")

    window, peak = _window(first_mean if truth is None else truth)
    stds = {name: 100 * std / peak for name, (_, std) in results.items()}
    errors = {}
    if truth is not None:
        errors = {name: 100 * np.abs(mean - truth) / peak for name, (mean, _) in results.items()}
    scale = _colour_limit([*stds.values(), *errors.values()])

    def row(kind: str, maps: Mapping[str, np.ndarray]) -> list[_Panel]:
        notes = {name: f"mean {image[region].mean():.2f} % of max" for name, image in maps.items()}
        return _barred(
            [_Panel(f"{kind} {name}", image, notes[name], "inferno", scale) for name, image in maps.items()]
        )

    means = []
    for name, (mean, _) in results.items():
        note = "" if truth is None else _scores(truth, mean)
        means.append(_Panel(f"Mean {name}", mean, note, limit=window))
    rows = [means, row("Std", stds)]
    if errors:
        rows.append(row("Error", errors))
    return save_figure(_draw(rows, first_mean.shape, title), path)


def _check_images(path: Path, images: Mapping[str, np.ndarray]) -> None:
    """Raise unless all are real and finite images of the shape of ``mean``."""
    shape = images["mean"].shape
    for name, image in images.items():
        if image.ndim != 2 or image.shape != shape or np.iscomplexobj(image):
            raise ReconError(f"{path}: '{name}' must be a real image like 'mean', {shape}, got {image.shape}")
        if not np.isfinite(image).all():
            raise ReconError(f"{path}: '{name}' holds NaN or infinite values")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG under a temporary name, and put it in place."""
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


def _window(reference: np.ndarray) -> tuple[float, float]:
    """Upper end of the grey window, and the largest value, of the image that the others are held against."""
    peak = float(reference.max()) or 1.0
    return float(np.quantile(reference, 0.998)) or peak, peak


def _colour_limit(maps: Iterable[np.ndarray]) -> float:
    """Upper end of a colour scale: a few extreme pixels, at an edge or a vessel, must not darken the rest."""
    return max(float(np.quantile(image, 0.998)) for image in maps) or 1.0


def _barred(row: Sequence[_Panel]) -> list[_Panel]:
    """The row with a colour bar beside its last panel, if that is a map; there is no room beside others."""
    *others, last = row
    return [*others, replace(last, bar=last.colormap != "gray")]


def _panels(images: dict[str, np.ndarray], mask: np.ndarray) -> list[list[_Panel]]:
    """Panels by row; with a truth, what belongs together stands in one column."""
    truth, mean = images.get("truth"), images["mean"]
    window, peak = _window(mean if truth is None else truth)
    percent_std = 100 * images["std"] / peak
    maps = [percent_std]
    if truth is not None:
        percent_error = 100 * np.abs(mean - truth) / peak
        maps.append(percent_error)
    scale = _colour_limit(maps)

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
            ax.set_facecolor(BACKGROUND)  # rounding may leave a line of it beside the image
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
