"""What is reconstructed: volumes of slices, each seen through every mask or scan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

NOISE_FREE = "noise-free"


@dataclass(frozen=True)
class Condition:
    """A mask or a scan.

    Attributes
    ----------
    label : str
        What tables call it.
    kind : str
        Kind of the mask, or beam.
    asked : float
        Acceleration asked for, number of views, or arc in degrees.
    family : str
        Conditions of one family differ in `asked` alone.
    """

    label: str
    kind: str
    asked: float
    family: str


class Study(Protocol):
    """Everything about the data of one modality that the runner and the tables need.

    A volume is what has a `name` for tables, the indices of its `slices` in the file, whether it was
    `simulated` from processed images, in a few words its `source`, the `subject` that it shows, and a `note`.

    Attributes
    ----------
    modality : str
        ``mri`` or ``ct``.
    conditions : list of Condition
        How volumes are seen.
    meanings : dict of str to str
        Target -> what it is.
    left_out : dict of str to str
        Volume that the file names and that is not reconstructed -> why.
    """

    modality: str
    conditions: list[Condition]
    meanings: dict[str, str]
    left_out: dict[str, str]

    @property
    def volumes(self) -> Sequence[Any]:
        """What is reconstructed."""
        ...

    @property
    def notes(self) -> dict[str, str]:
        """What the page says about data and simulation."""
        ...

    def identity(self, volume: Any, index: int, condition: Condition) -> dict[str, Any]:
        """JSON-ready: everything that the data of a slice depend on."""
        ...

    def facts(self, volume: Any, condition: Condition) -> dict[str, Any]:
        """Columns of a table: realised acceleration, calibration and where the maps are from."""
        ...

    def scenario(self, volume: Any, index: int, condition: Condition) -> Any:
        """What methods are given."""
        ...

    def targets(self, volume: Any, index: int) -> dict[str, np.ndarray]:
        """Target -> image ``(h, w)``, as it is scored."""
        ...

    def is_empty(self, volume: Any, index: int) -> bool:
        """Whether nothing was measured of a slice: it has targets of zeros, and no scenario."""
        ...

    def scored(self, volume: Any, image: Tensor) -> np.ndarray:
        """Image ``(h, w)``, float32, as it is scored, of what a method gave."""
        ...

    def data_range(self, target: np.ndarray) -> float | None:
        """Peak of PSNR and SSIM for a volume ``(S, h, w)``; None for its largest value."""
        ...


def targets_of(targets: Iterable[str], volume: Any) -> list[str]:
    """Those that a volume has: only a simulated one has an image before noise was added."""
    return [name for name in targets if name != NOISE_FREE or volume.simulated]


def file_digest(path: Path) -> str:
    """Hash of a file's content; of a ``.cfl`` with its header."""
    files = [path.with_suffix(s) for s in (".hdr", ".cfl")] if path.suffix in (".cfl", ".hdr") else [path]
    return _digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files, which is looked up while neither their time nor their size changes."""
    digest = hashlib.blake2b(digest_size=16)
    for file, _, _ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def digest_of(what: bytes) -> str:
    """Short hash."""
    return hashlib.blake2b(what, digest_size=16).hexdigest()
