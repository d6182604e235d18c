"""A posterior in numbers that a program can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.calibration import object_region
from recon.errors import ReconError
from recon.nullspace import smoothed
from recon.posterior import Posterior

NEIGHBOURHOOD = 3.0
"""Standard deviation in pixels of the window over which the magnitude beside a pixel is averaged."""

DARKEST = 0.1
"""Share of the object's mean magnitude that counts as the local magnitude where it is darker: relative to
nothing every deviation is large."""


@dataclass(frozen=True)
class SummarySettings:
    """When a result is worth a second look.

    Parameters
    ----------
    flag_above
        Relative standard deviation from which a pixel is flagged.
    min_area
        Pixels that a connected region of flagged ones must have to be reported.
    max_regions
        Regions that are listed, the largest first; all are counted.
    max_score
        Relative standard deviation, averaged over the object, above which the whole result is.
    residual_range
        Residual over noise level that is expected. Somewhat below 1, for a reconstruction takes up some of
        the noise: with n unknowns and m measurements it does not fall below ``sqrt(1 - n / m)`` unless the
        noise level is wrong. Above 1, coil maps, noise level or image do not fit the data.

    Raises
    ------
    ReconError
        If a number is out of its range.
    """

    flag_above: float = 0.2
    min_area: int = 9
    max_regions: int = 20
    max_score: float = 0.15
    residual_range: tuple[float, float] = (0.8, 1.2)

    def __post_init__(self) -> None:
        for name in ("flag_above", "max_score"):
            if not 0 < getattr(self, name) < math.inf:
                raise ReconError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("min_area", "max_regions"):
            if getattr(self, name) < 1:
                raise ReconError(f"{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.residual_range
        if not 0 <= low < high < math.inf:
            raise ReconError(f"residual_range must be two increasing numbers, got {self.residual_range}")


def summarise(
    posterior: Posterior,
    *,
    calibrated_std: Tensor | None = None,
    calibration: str | None = None,
    settings: SummarySettings | None = None,
) -> dict[str, Any]:
    """Say in JSON-ready numbers how sure a reconstruction is, where it is not, and what speaks against it.

    Parameters
    ----------
    posterior
        Of :func:`recon.reconstruct`; what was cropped is summarised with
        ``dataclasses.replace(posterior, mean=..., std=...)``.
    calibrated_std
        Standard deviation after calibration, of the posterior's shape; without it, the posterior's own is
        used, and the summary says that it was not calibrated.
    calibration
        Name of the calibration; goes with ``calibrated_std``.
    settings
        Thresholds.

    Returns
    -------
    dict
        ``status``
            ``"ok"``, or ``"check"`` if there is any of the ``reasons``.
        ``reasons``
            Sentences.
        ``score``
            Relative standard deviation averaged over the object: std over the local magnitude; ``None`` where
            there is no object.
        ``object``
            ``area`` in pixels, and share of them that is flagged.
        ``regions``
            Flagged regions, the largest first: ``rows`` and ``columns`` (first, one past last), ``area``,
            ``mean`` and ``max`` of the relative standard deviation. ``regions_in_all`` counts them all.
        ``data``
            ``residual`` and ``noise_std`` in the units of the data, their ``ratio``, the range ``expected``.
        ``uncertainty``
            Whether it is ``calibrated``, by which ``calibration``, and ``num_samples``.
        ``settings``
            The thresholds.
        ``warnings``
            Those of the posterior.

    Raises
    ------
    ReconError
        If the images are no (H, W), do not fit each other or hold NaN, or only one of ``calibrated_std`` and
        ``calibration`` is given.
    """
    from scipy import ndimage

    settings = SummarySettings() if settings is None else settings
    if (calibrated_std is None) != (calibration is None):
        raise ReconError("a calibrated standard deviation and the name of its calibration go together")
    magnitude = posterior.mean.abs().double().cpu()
    std = (posterior.std if calibrated_std is None else calibrated_std).double().cpu()
    if magnitude.ndim != 2 or std.shape != magnitude.shape:
        raise ReconError(
            f"a summary is of one image (H, W) and its standard deviation, got {tuple(magnitude.shape)} and "
            f"{tuple(std.shape)}"
        )
    if not bool(torch.isfinite(magnitude).all() & torch.isfinite(std).all()):
        raise ReconError("the image or its standard deviation holds values that are not finite")
    try:
        inside = object_region(magnitude.numpy())
        relative = _relative_std(magnitude, std, torch.from_numpy(inside))
    except ReconError:  # air, above or below the object
        inside, relative = np.zeros(magnitude.shape, dtype=bool), np.zeros(magnitude.shape)

    flagged = inside & (relative > settings.flag_above)
    labels, _ = ndimage.label(flagged, structure=np.ones((3, 3)))
    regions: list[dict[str, Any]] = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        values = relative[box][labels[box] == label]
        if values.size >= settings.min_area:
            regions.append(
                {
                    "rows": [box[0].start, box[0].stop],
                    "columns": [box[1].start, box[1].stop],
                    "area": int(values.size),
                    "mean": float(values.mean()),
                    "max": float(values.max()),
                }
            )
    regions.sort(key=lambda region: -region["area"])
    area, ratio = int(inside.sum()), posterior.residual / posterior.noise_std
    score = float(relative[inside].mean()) if area else None
    return {
        "status": "check" if (reasons := _reasons(posterior, score, ratio, regions, settings)) else "ok",
        "reasons": reasons,
        "score": score,
        "object": {"area": area, "flagged": float(flagged.sum() / max(area, 1))},
        "regions": regions[: settings.max_regions],
        "regions_in_all": len(regions),
        "data": {
            "residual": posterior.residual,
            "noise_std": posterior.noise_std,
            "ratio": ratio,
            "expected": list(settings.residual_range),
        },
        "uncertainty": {
            "calibrated": calibration is not None,
            "calibration": calibration,
            "num_samples": posterior.num_samples,
        },
        "settings": {**asdict(settings), "residual_range": list(settings.residual_range)},
        "warnings": list(posterior.warnings),
    }


def summarise_volume(slices: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Put the summaries of the slices of a volume together.

    Parameters
    ----------
    slices
        Index of a slice -> what :func:`summarise` says of it.

    Returns
    -------
    dict
        ``status`` and ``score`` of the volume (``"check"`` if any slice is to be checked; the mean over all
        pixels of the object), ``check`` (indices of those slices), ``calibrated``, and ``slices``: the
        summaries, each with its ``index``.

    Raises
    ------
    ReconError
        If there are none.
    """
    if not slices:
        raise ReconError("there is no slice to summarise")
    ordered = {index: slices[index] for index in sorted(slices)}
    check = [index for index, summary in ordered.items() if summary["status"] == "check"]
    area = sum(summary["object"]["area"] for summary in ordered.values())
    total = sum((summary["score"] or 0.0) * summary["object"]["area"] for summary in ordered.values())
    return {
        "status": "check" if check else "ok",
        "score": total / area if area else None,
        "check": check,
        "calibrated": all(summary["uncertainty"]["calibrated"] for summary in ordered.values()),
        "slices": [{"index": index, **summary} for index, summary in ordered.items()],
    }


def _relative_std(magnitude: Tensor, std: Tensor, inside: Tensor) -> np.ndarray:
    """Standard deviation over the magnitude round about, of the object alone: its edge is not dark."""
    area = inside.double()
    local = smoothed(magnitude * area, NEIGHBOURHOOD) / smoothed(area, NEIGHBOURHOOD).clamp_min(1e-9)
    return (std / local.clamp_min(DARKEST * float(magnitude[inside].mean()))).numpy()


def _reasons(
    posterior: Posterior,
    score: float | None,
    ratio: float,
    regions: list[dict[str, Any]],
    settings: SummarySettings,
) -> list[str]:
    reasons = []
    low, high = settings.residual_range
    if ratio > high:
        reasons.append(
            f"the residual is {ratio:.2f} times the noise level: image, coil maps or noise level do not fit "
            "the data"
        )
    if ratio < low:
        reasons.append(
            f"the residual is {ratio:.2f} times the noise level: noise was fitted, or its level is too high"
        )
    if posterior.num_samples < 2:
        reasons.append("one sample has no spread: nothing is known about the uncertainty")
    if score is None:
        reasons.append("the image shows no object")
    elif score > settings.max_score:
        reasons.append(f"the standard deviation is {score:.0%} of the image on average")
    if regions:
        area = sum(region["area"] for region in regions)
        reasons.append(
            f"{len(regions)} region{'s' * (len(regions) != 1)}, {area} pixels in all, with a standard "
            f"deviation above {settings.flag_above:.0%} of the image"
        )
    return reasons
