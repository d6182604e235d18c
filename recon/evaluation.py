"""The fastMRI evaluation: reconstructions against their targets, volume by volume and in all."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.io.fastmri import centre_crop, find_target, read_images
from recon.metrics import METRICS

__all__ = ["EvaluationResult", "VolumeScore", "evaluate"]

TARGET_KINDS = {
    "reconstruction_rss": "RSS, the root-sum-of-squares of the fully sampled coil images",
    "reconstruction_esc": "ESC, the fully sampled image of the emulated single coil",
}
_FORMATS = {"MSE": "{:.3g}", "NMSE": "{:.4f}", "PSNR": "{:.2f}", "SSIM": "{:.4f}"}


@dataclass(frozen=True)
class VolumeScore:
    """The metrics of one volume.

    Attributes
    ----------
    name : str
        File name.
    target : str
        The dataset compared with, ``reconstruction_rss`` or ``reconstruction_esc``.
    acquisition : str or None
        The sequence, where the target file states it.
    shape : tuple of int
        (slices, h, w) of what was compared.
    metrics : dict of str to float
        MSE, NMSE, PSNR (dB) and SSIM.
    """

    name: str
    target: str
    acquisition: str | None
    shape: tuple[int, int, int]
    metrics: dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """What :func:`evaluate` found.

    Attributes
    ----------
    volumes : list of VolumeScore
        The volumes that were scored, by name.
    missing : list of str
        Names of targets without a prediction.
    failed : dict of str to str
        Names of volumes that could not be scored, and why.
    """

    volumes: list[VolumeScore] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was scored and nothing failed; missing predictions do not count as failures."""
        return bool(self.volumes) and not self.failed

    @property
    def targets(self) -> list[str]:
        """The kinds of target that were compared with."""
        return sorted({volume.target for volume in self.volumes})

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each metric over the volumes; empty if there are none."""
        count = len(self.volumes)
        return {name: math.fsum(self._values(name)) / count for name in METRICS} if count else {}

    @property
    def std(self) -> dict[str, float]:
        """Sample standard deviation of each metric over the volumes; NaN of one, empty if there are none."""
        return {name: _sample_std(self._values(name), mean) for name, mean in self.mean.items()}

    def _values(self, metric: str) -> list[float]:
        return [volume.metrics[metric] for volume in self.volumes]

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values for JSON; a number that is not finite becomes None."""
        return {
            "targets": self.targets,
            "mean": _finite(self.mean),
            "std": _finite(self.std),
            "volumes": [
                {
                    "name": volume.name,
                    "target": volume.target,
                    "acquisition": volume.acquisition,
                    "shape": list(volume.shape),
                    "metrics": _finite(volume.metrics),
                }
                for volume in self.volumes
            ],
            "missing": list(self.missing),
            "failed": dict(self.failed),
        }

    def render(self, width: int = 110) -> str:
        """Lay the result out as text: a table, what it is against, and what is not in it.

        Parameters
        ----------
        width : int
            Columns of the terminal.

        Returns
        -------
        str
            Plain text that ends with a newline.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        text = io.StringIO()
        # soft_wrap: the sentences are not cut into lines, so that file names can be copied from them.
        console = Console(file=text, width=width, color_system=None, highlight=False, markup=False)
        if self.volumes:
            table = Table(box=box.SIMPLE_HEAD, show_footer=True)
            table.add_column("volume", footer="mean ± 2 std", overflow="fold")
            table.add_column("acquisition")
            table.add_column("target")
            table.add_column("slices", justify="right")
            for name in METRICS:
                mean, std = _FORMATS[name].format(self.mean[name]), _FORMATS[name].format(2 * self.std[name])
                footer = mean if math.isnan(self.std[name]) else f"{mean} ± {std}"
                heading = "PSNR (dB)" if name == "PSNR" else name
                table.add_column(heading, footer=footer, justify="right", no_wrap=True)
            for volume in self.volumes:
                table.add_row(
                    volume.name,
                    volume.acquisition or "–",
                    volume.target.removeprefix("reconstruction_").upper(),
                    str(volume.shape[0]),
                    *(_FORMATS[name].format(volume.metrics[name]) for name in METRICS),
                )
            console.print(table)
        for target in self.targets:
            console.print(f"Target {TARGET_KINDS[target]} ({target}).", soft_wrap=True)
        if len(self.targets) > 1:
            console.print(
                "The mean mixes both kinds of target, which are not comparable: evaluate them apart.",
                soft_wrap=True,
            )
        if self.missing:
            console.print(
                f"No prediction for {len(self.missing)}: {', '.join(self.missing)}.", soft_wrap=True
            )
        for name, reason in self.failed.items():
            where = "" if name in reason else f"{name}: "
            console.print(f"Not scored: {where}{reason}.", soft_wrap=True)
        return text.getvalue()


def evaluate(
    targets: str | Path,
    predictions: str | Path,
    *,
    acquisition: str | None = None,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> EvaluationResult:
    """Score reconstructions as the fastMRI challenge does.

    Each target is compared with the file of the same name among the predictions (dataset ``reconstruction``):
    ``reconstruction_esc`` in singlecoil files, ``reconstruction_rss`` in all others. Both are cropped to a
    square of the target's width, and the metrics of :mod:`recon.metrics` are taken over the volume (Zbontar
    et al., arXiv:1811.08839, section 5). A volume that cannot be scored does not stop the others.

    Parameters
    ----------
    targets : str or Path
        A fastMRI file with a target, or a folder of them.
    predictions : str or Path
        The folder of the reconstructions; for a single target, its file too.
    acquisition : str, optional
        Score this sequence only, such as ``CORPD_FBK``.
    progress : callable
        Called with the list of target files; what it returns is iterated over. For a progress bar.

    Returns
    -------
    EvaluationResult

    Raises
    ------
    ReconError
        If either path is absent, or if there are no target files.
    """
    targets, predictions = Path(targets), Path(predictions)
    if not targets.exists():
        raise ReconError(f"{targets}: there is no such file or folder of targets")
    paths = sorted(targets.glob("*.h5")) if targets.is_dir() else [targets]
    if not paths:
        raise ReconError(f"{targets}: there are no .h5 files in this folder of targets")
    if not predictions.exists():
        raise ReconError(f"{predictions}: there is no such folder of predictions")
    if predictions.is_file() and targets.is_dir():
        raise ReconError(f"{predictions}: for a folder of targets, predictions must be a folder too")

    result = EvaluationResult()
    for path in progress(paths):
        prediction = predictions if predictions.is_file() else predictions / path.name
        try:
            target, sequence = find_target(path)
            if acquisition is not None and sequence != acquisition:
                continue
            if prediction.exists():
                result.volumes.append(_score(path, prediction, target, sequence))
            else:
                result.missing.append(path.name)
        except ReconError as error:
            result.failed[path.name] = str(error)
    return result


def comparable_volumes(path: Path, prediction: Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a target and its prediction, both cropped to a square of the target's width.

    Parameters
    ----------
    path, prediction : Path
        The file with the target, and that with the dataset ``reconstruction``.
    target : str
        The target's dataset.

    Returns
    -------
    truth, images : numpy.ndarray
        (slices, w, w).

    Raises
    ------
    ReconError
        If either cannot be read or cropped, or their numbers of slices differ.
    """
    truth, images = read_images(path, target), read_images(prediction)
    width = truth.shape[-1]
    for file, name, volume in ((path, target, truth), (prediction, "reconstruction", images)):
        if min(volume.shape[1:]) < width:
            raise ReconError(
                f"{file}: '{name}' of shape {volume.shape} cannot be cropped to the target's width, {width}"
            )
    if len(truth) != len(images):
        raise ReconError(f"{prediction}: it has {len(images)} slices but the target has {len(truth)}")
    return centre_crop(truth, (width, width)), centre_crop(images, (width, width))


def _score(path: Path, prediction: Path, target: str, acquisition: str | None) -> VolumeScore:
    truth, images = comparable_volumes(path, prediction, target)
    try:
        metrics = {name: metric(truth, images) for name, metric in METRICS.items()}
    except ReconError as error:
        raise ReconError(f"{path}: '{target}' cannot be compared with: {error}") from error
    slices, height, width = truth.shape
    return VolumeScore(path.name, target, acquisition, (slices, height, width), metrics)


def _sample_std(values: list[float], mean: float) -> float:
    if len(values) < 2 or not math.isfinite(mean):
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
