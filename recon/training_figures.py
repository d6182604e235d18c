"""Pictures of a training: how the error falls, and what the denoiser does to images it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError
from recon.figures import BACKGROUND, DIM, TEXT, save_figure

if TYPE_CHECKING:
    from torch import Tensor

    from priors.base import ScorePrior

SHOWN_SIGMAS = (0.05, 0.2, 0.5, 2.0)
"""Noise levels of the pictures, from where only texture is lost to where little but the place is left."""

PATCHES = 3
SAMPLES = 6
SAMPLING_STEPS = 18  # as few as Karras et al. (2022) use for small images: a glance, no measure of quality


def curve_figure(path: str | Path, curve: Sequence[Mapping[str, Any]], sigmas: Sequence[float]) -> Path:
    """Draw the validation curve of a training, and save it as PNG.

    Left, the error that is left of a noise level, as a share of it; right, by how much it has fallen since
    the first validation. A line that still falls learns; one that rises for long has begun to know its
    training images by heart.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    curve : sequence of mapping
        Lines of ``curve.jsonl``: ``step``, and ``rmse`` for each of `sigmas`.
    sigmas : sequence of float
        Noise levels.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReconError
        If there is no curve, its lines have another number of levels, or the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if not curve:
        raise ReconError(f"{path}: there is no curve to draw")
    if any(len(record["rmse"]) != len(sigmas) for record in curve):
        raise ReconError(f"{path}: a line of the curve has not one error for each of {len(sigmas)} levels")
    steps = np.array([record["step"] for record in curve])
    errors = np.array([record["rmse"] for record in curve], dtype=float)
    figure = Figure(figsize=(11, 4.4), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, sigma in enumerate(sigmas):
        colour = colormaps["plasma"](0.3 + 0.65 * index / max(len(sigmas) - 1, 1))
        shape = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 2.5}
        left.plot(steps, errors[:, index] / sigma, label=f"σ = {sigma:g}", **shape)
        right.plot(steps, 100 * (errors[:, index] / errors[0, index] - 1), **shape)
    left.set_yscale("log")
    left.set_title("Error left of the noise, rms / σ", loc="left", color=TEXT, fontsize=11)
    right.set_title("Change since the first validation, %", loc="left", color=TEXT, fontsize=11)
    for axes in (left, right):
        axes.set_facecolor(BACKGROUND)
        axes.set_xlabel("step", color=DIM)
        axes.tick_params(colors=DIM, which="both", labelsize=8)
        axes.grid(color=DIM, alpha=0.2, which="both")
        for spine in axes.spines.values():
            spine.set_color(DIM)
    handles, labels = left.get_legend_handles_labels()
    figure.subplots_adjust(left=0.06, right=0.88, bottom=0.12, top=0.91, wspace=0.16)
    legend = figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(TEXT)
    return save_figure(figure, Path(path))


def training_figure(path: str | Path, prior: ScorePrior, patches: Tensor, *, title: str = "") -> Path:
    """Draw validation images with noise, what the prior makes of them, and images it makes of noise alone.

    Magnitudes are shown, of stacks the middle slice's, with one grey window.

    Parameters
    ----------
    path : str or Path
        The PNG to write; an earlier one is replaced.
    prior : ScorePrior
        On any device.
    patches : Tensor
        ``(N, n, n)``, or ``(N, K, n, n)`` for priors of K slices: clean images, of which the first are shown.
    title : str
        Printed above.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReconError
        If the file cannot be written.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from priors.sampling import heun, karras_levels

    contract = prior.contract
    device = next((parameter.device for parameter in prior.parameters()), torch.device("cpu"))

    def noise_like(shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(shape, generator=generator) for _ in range(1 + patches.is_complex())]
        return torch.complex(parts[0], parts[1]) if patches.is_complex() else parts[0]

    def shown(images: Tensor) -> list[np.ndarray]:
        images = images.cpu()
        flat = images[:, images.shape[1] // 2] if images.ndim == 4 else images
        return list((flat.abs() if flat.is_complex() else flat).float().numpy())

    clean = patches[:PATCHES]
    rows: list[tuple[str, list[np.ndarray]]] = []
    with torch.no_grad():
        for sigma in (s for s in SHOWN_SIGMAS if contract.sigma_min <= s <= contract.sigma_max):
            noisy = clean + sigma * noise_like(clean.shape, 0)
            denoised = prior.denoise(noisy.to(device), sigma)
            both = zip(shown(noisy), shown(denoised), shown(clean), strict=True)
            rows.append((f"σ = {sigma:g}", [image for triple in both for image in triple]))
        shape = (SAMPLES, *patches.shape[1:])
        levels = karras_levels(SAMPLING_STEPS, contract.sigma_max, contract.sigma_min)
        made = heun(prior, lambda step: noise_like(shape, step).to(device), levels)
    rows.append(("of noise alone", shown(made)))
    window = float(np.quantile(np.stack(shown(patches)), 0.998)) or 1.0

    columns, side, margin = 3 * len(clean), 1.25, 0.08
    width, height = 0.95 + columns * (side + margin), 0.75 + len(rows) * (side + margin)
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    names = ("noisy", "denoised", "clean")
    for r, (label, images) in enumerate(rows):
        bottom = height - 0.7 - (r + 1) * (side + margin)
        figure.text(0.12 / width, (bottom + side / 2) / height, label, color=TEXT, fontsize=8, va="center")
        for c, image in enumerate(images[:columns]):
            place = (0.95 + c * (side + margin), bottom, side, side)
            axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
            axes.imshow(image, cmap="gray", vmin=0, vmax=window, interpolation="nearest")
            axes.set_axis_off()
            if r == 0:
                axes.set_title(names[c % 3], color=DIM, fontsize=8, pad=3)
    figure.text(0.12 / width, 1 - 0.25 / height, title, color=TEXT, fontsize=11, va="center")
    return save_figure(figure, Path(path))
