"""Finished units on disk, one file each: an interrupted run goes on, and a second one does nothing."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept_lines import append_line, read_lines
from recon.errors import ReconError

ROOT = Path(__file__).resolve().parents[2]

RECONSTRUCTING = (
    "operators",
    "priors",
    "recon",
    "benchmarks/cases.py",
    "benchmarks/classical.py",
    "benchmarks/ct_cases.py",
    "benchmarks/ct_measures.py",
    "benchmarks/ct_quality.py",
    "benchmarks/matrix/ct_study.py",
    "benchmarks/matrix/methods.py",
    "benchmarks/matrix/mri_study.py",
    "benchmarks/matrix/running.py",
    "benchmarks/peers",
    "benchmarks/supervised",
)
"""Code that makes data and images."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What a method made of one slice.

    Attributes
    ----------
    images : dict of str to ndarray
        As they are scored, float32 ``(h, w)``: ``image`` or ``image of TARGET``, ``first_sample``, ``std``.
    facts : dict
        JSON-ready: ``nfe``, ``num_samples``, ``wall_s``, ``cpu_s``, ``memory_mb``, ``memory_added_mb``,
        ``gpu_memory_mb``, ``chosen``, ``empty``, ``code``, ``finished``, ``device``, ``machine``,
        ``versions``.
    """

    images: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    def image(self, target: str) -> np.ndarray:
        """The image that is held against a target."""
        return self.images.get(f"image of {target}", self.images["image"])


def key_of(what: Mapping[str, Any]) -> str:
    """Hash of something JSON-ready."""
    text = json.dumps(what, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def code_digest() -> str:
    """Hash of the code that reconstructs, so that a page can say whether it stands as it is now."""
    digest = hashlib.blake2b(digest_size=8)
    for part in RECONSTRUCTING:
        for path in sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Store:
    """Units and scores of one benchmark.

    Parameters
    ----------
    folder : Path
        Where they lie: ``units/<key>.npz`` and ``scores.jsonl``.

    Raises
    ------
    ReconError
        Naming the file, if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scores: dict[str, dict[str, float]] | None = None
        try:
            (folder / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReconError(f"{folder}: the cache cannot be written: {error}") from None

    def path(self, key: str) -> Path:
        """File of a unit."""
        return self.folder / "units" / f"{key}.npz"

    def has(self, key: str) -> bool:
        """Whether a unit is finished."""
        return self.path(key).exists()

    def write(self, key: str, what: Mapping[str, Any], unit: Unit) -> None:
        """Store a unit in one piece."""
        path = self.path(key)
        temporary = path.with_suffix(".tmp")
        texts = {"what": np.array(json.dumps(what)), "facts": np.array(json.dumps(unit.facts))}
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **texts, **{f"/{k}": v for k, v in unit.images.items()})
            temporary.replace(path)
        except OSError as error:
            raise ReconError(f"{path}: the cache cannot be written: {error}") from None

    def read(self, key: str) -> Unit:
        """Read a unit.

        Raises
        ------
        ReconError
            Naming the file, if it is damaged.
        """
        path = self.path(key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                images = {name[1:]: stored[name] for name in stored.files if name.startswith("/")}
                facts = json.loads(str(stored["facts"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise ReconError(f"{path} is damaged; remove it") from None
        return Unit(images, facts)

    def facts(self, key: str) -> dict[str, Any]:
        """Only what a unit says of itself, without its images."""
        path = self.path(key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return json.loads(str(stored["facts"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise ReconError(f"{path} is damaged; remove it") from None

    # Scores take time too, and follow from the units.

    def score(self, key: str) -> dict[str, float] | None:
        """Scores that were kept, if they were."""
        return self._known().get(key)

    def keep_score(self, key: str, scores: dict[str, float]) -> None:
        """Append scores."""
        self._known()[key] = scores
        append_line(self.folder / "scores.jsonl", key, scores=scores)

    def _known(self) -> dict[str, dict[str, float]]:
        if self._scores is None:
            self._scores = read_lines(self.folder / "scores.jsonl", "scores")
        return self._scores
