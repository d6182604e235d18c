"""Rows of the table: metrics over the slices of a volume, and what they took."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix.methods import sample_name
from benchmarks.matrix.running import Planned
from benchmarks.matrix.store import Store, Unit, key_of
from benchmarks.matrix.study import NOISE_FREE, Study, targets_of
from recon.errors import ReconError
from recon.metrics import hfen, ms_ssim, nmse, psnr, ssim

Row = dict[str, Any]
"""One method on one volume through one mask with one seed, against one target."""

COLUMNS = (
    "modality",
    "volume",
    "subject",
    "slices",
    "simulated",
    "mask",
    "kind",
    "asked",
    "acceleration",
    "views",
    "calibration",
    "calibration_source",
    "target",
    "method",
    "registry_name",
    "seed",
    "num_samples",
    "PSNR",
    "SSIM",
    "NMSE",
    "HFEN",
    "MS-SSIM",
    "noise_free_PSNR",
    "NFE",
    "wall_s",
    "cpu_s",
    "memory_mb",
    "memory_added_mb",
    "gpu_memory_mb",
    "chosen",
)

BETTER: dict[str, Callable[..., float]] = {
    "PSNR": max,
    "SSIM": max,
    "NMSE": min,
    "HFEN": min,
    "MS-SSIM": max,
}
"""Metric -> which of several values is the best."""

SCORING = 1
"""To be raised when the definition of a metric changes, so that kept scores are not taken for new ones."""


def score(
    target: np.ndarray, image: np.ndarray, data_range: float | None, perceptual: bool
) -> dict[str, float]:
    """Metrics of a volume ``(S, h, w)``; MS-SSIM only where the slices are large enough for it."""
    made = {
        "PSNR": psnr(target, image, data_range),
        "SSIM": ssim(target, image, data_range),
        "NMSE": nmse(target, image),
    }
    if perceptual:
        made["HFEN"] = hfen(target, image)
        with contextlib.suppress(ReconError):  # of slices that are too small, which the page says
            made["MS-SSIM"] = ms_ssim(target, image, data_range)
    return made


def make_rows(study: Study, units: Sequence[Planned], store: Store, perceptual: bool) -> list[Row]:
    """Make the rows of all volumes whose slices are stored, every one of them.

    Scores are kept in the store: targets are looked at for new rows only.
    """
    groups: dict[tuple[str, str, str, int], list[Planned]] = {}
    for unit in units:
        where = (unit.volume.name, unit.condition.label, unit.entry.name, unit.seed)
        groups.setdefault(where, []).append(unit)
    targets = _Targets(study)
    rows: list[Row] = []
    for group in groups.values():
        if all(store.has(unit.key) for unit in group):
            rows += _rows_of(study, group, store, perceptual, targets)
    return rows


class _Targets:
    """Target volumes, read when a row needs them; of one volume at a time."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._held: tuple[str, dict[str, np.ndarray]] = ("", {})

    def of(self, volume: Any) -> dict[str, np.ndarray]:
        """Target -> ``(S, h, w)``."""
        if self._held[0] != volume.name:
            slices = [self._study.targets(volume, index) for index in volume.slices]
            stacked = {name: np.stack([images[name] for images in slices]) for name in slices[0]}
            self._held = (volume.name, stacked)
        return self._held[1]


def _rows_of(
    study: Study, group: Sequence[Planned], store: Store, perceptual: bool, targets: _Targets
) -> list[Row]:
    first = group[0]
    facts = [store.facts(unit.key) for unit in group]
    held: list[Unit] = []

    def images(which: str | None, target: str) -> np.ndarray:
        if not held:
            held.extend(store.read(unit.key) for unit in group)
        return np.stack([unit.image(target) if which is None else unit.images[which] for unit in held])

    shared: Row = {
        "modality": study.modality,
        "volume": first.volume.name,
        "subject": first.volume.subject,
        "slices": len(first.volume.slices),
        "simulated": first.volume.simulated,
        "mask": first.condition.label,
        "kind": first.condition.kind,
        "asked": first.condition.asked,
        **study.facts(first.volume, first.condition),
        "registry_name": first.entry.kind,
        "seed": first.seed if first.entry.method.needs_seed else None,
    }
    columns: list[tuple[str, str | None]] = [(first.entry.names[-1], None)]
    if len(first.entry.names) == 2:
        columns.insert(0, (sample_name(first.entry.name), "first_sample"))
    rows = []
    known = targets_of(study.meanings, first.volume)
    for target in known:
        for name, which in columns:
            what = {
                "units": [unit.key for unit in group],
                "finished": [fact["finished"] for fact in facts],
                "target": target,
                "image": which,
                "perceptual": perceptual,
                "scoring": SCORING,
                "scored": getattr(first.volume, "scored", None),
                "noise_free": NOISE_FREE in known,  # then the target is scored against it too
            }
            key = key_of(what)
            scores = store.score(key)
            if scores is None:
                truth = targets.of(first.volume)
                scores = score(
                    truth[target], images(which, target), study.data_range(truth[target]), perceptual
                )
                if NOISE_FREE in truth and target != NOISE_FREE:
                    scores["noise_free_PSNR"] = psnr(truth[target], truth[NOISE_FREE])
                store.keep_score(key, scores)
            rows.append({**shared, "target": target, "method": name, **scores, **_costs(facts, which)})
            chosen = [_chosen(fact["chosen"], target, study.meanings) for fact in facts]
            if any(chosen):
                rows[-1]["chosen"] = "; ".join(text or "–" for text in chosen)
    return rows


def _chosen(chosen: Mapping[str, Any], target: str, targets: Collection[str]) -> str:
    """What was chosen for a target, or for all of them alike."""
    return ", ".join(
        str(value) if key == target else f"{key} {value}"
        for key, value in chosen.items()
        if key == target or key not in (*targets, NOISE_FREE)
    )


def _costs(facts: Sequence[dict[str, Any]], which: str | None) -> Row:
    """Of a slice, on average; memory is the largest. One of several samples: its share of what all took.

    Slices of which nothing was measured took nothing, which is no merit of a method.
    """
    facts = [fact for fact in facts if not fact["empty"]]
    made: Row = {"num_samples": facts[0]["num_samples"] if which is None else 1}
    for name, column in (("nfe", "NFE"), ("wall_s", "wall_s"), ("cpu_s", "cpu_s")):
        shares = [fact[name] / (1 if which is None else fact["num_samples"]) for fact in facts]
        made[column] = float(np.mean(shares))
    for name in ("memory_mb", "memory_added_mb", "gpu_memory_mb"):
        known = [fact[name] for fact in facts if fact[name] is not None]
        made[name] = max(known) if known else None
    return made


def as_csv(rows: Sequence[Row]) -> str:
    """Comma-separated text with the columns of :data:`COLUMNS`; nothing where a row has no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return text.getvalue()


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """Write the rows as Parquet if pyarrow is installed.

    Returns
    -------
    bool
        Whether it is.
    """
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        return False
    columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
    temporary = path.with_name(path.name + ".part")
    parquet.write_table(pyarrow.table(columns), temporary)
    temporary.replace(path)
    return True
