"""fastMRI+: boxes that radiologists drew around findings in fastMRI's volumes.

Zhao et al., Scientific Data 9, 152, 2022. The tables ``knee.csv`` and ``brain.csv`` have the columns ``file,
slice, study_level, x, y, width, height, label``; a line is one box, or, where ``study_level`` is ``Yes``, a
finding of the whole study without a place. The boxes were drawn on pictures of ``reconstruction_rss`` that
had been turned upside down, uncropped; x runs to the right and y downwards from their upper left corner.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recon.errors import ReconError

__all__ = ["Annotations", "Box", "read_annotations"]

COLUMNS = ("file", "slice", "study_level", "x", "y", "width", "height", "label")
_STUDY_LEVEL = {"yes": True, "no": False}


@dataclass(frozen=True)
class Box:
    """A finding and the rectangle around it, in pixels of the published picture.

    Attributes
    ----------
    label : str
        The finding.
    x, y : int
        Left column and upper row in the picture, which shows the image upside down; -1 occurs.
    width, height : int
        Columns and rows, at least 1.
    """

    label: str
    x: int
    y: int
    width: int
    height: int

    def region(
        self, picture: tuple[int, int], shape: tuple[int, int] | None = None
    ) -> tuple[slice, slice] | None:
        """Rows and columns of the box in an image as fastMRI's files hold it.

        Parameters
        ----------
        picture : tuple of int
            Height and width of the target that the picture was made of, as the file holds it.
        shape : tuple of int, optional
            Height and width of the image that is wanted, which is the target or its centre cut out as fastMRI
            does; the target's own if not given.

        Returns
        -------
        tuple of slice, or None
            The part of the box that lies in the image; None if there is none.

        Raises
        ------
        ReconError
            If the image is larger than the target.
        """
        shape = picture if shape is None else shape
        if shape[0] > picture[0] or shape[1] > picture[1]:
            raise ReconError(f"an image of {shape} is no part of a target of {picture}")
        # Upside down: the picture's row r is the image's row H - 1 - r, so the box ends where it began.
        starts = picture[0] - self.y - self.height, self.x
        parts = []
        for start, length, whole, kept in zip(starts, (self.height, self.width), picture, shape, strict=True):
            first = start - (whole - kept) // 2
            low, high = max(first, 0), min(first + length, kept)
            if low >= high:
                return None
            parts.append(slice(low, high))
        return parts[0], parts[1]


@dataclass(frozen=True)
class Annotations:
    """What one of the tables says.

    Attributes
    ----------
    boxes : dict
        Name of a file without its ending -> slice -> boxes, in the table's order.
    study : dict
        Name of a file without its ending -> findings of the whole study.
    repeated, empty : int
        Lines that were passed over: those that say what an earlier one said, and boxes without any area.
        There are a few of both in the published tables.
    """

    boxes: dict[str, dict[int, tuple[Box, ...]]] = field(default_factory=dict)
    study: dict[str, tuple[str, ...]] = field(default_factory=dict)
    repeated: int = 0
    empty: int = 0

    def of(self, name: str) -> dict[int, tuple[Box, ...]]:
        """Boxes of every annotated slice of a file, whose name may have its ending ``.h5``."""
        return self.boxes.get(name.removesuffix(".h5"), {})

    @property
    def labels(self) -> list[str]:
        """Findings that have a box, sorted."""
        return sorted({box.label for _, _, box in self})

    def __iter__(self) -> Iterator[tuple[str, int, Box]]:
        """File, slice and box, for every box."""
        for name, slices in self.boxes.items():
            for index, boxes in slices.items():
                for box in boxes:
                    yield name, index, box


def read_annotations(path: str | Path) -> Annotations:
    """Read ``knee.csv`` or ``brain.csv`` of fastMRI+.

    Parameters
    ----------
    path : str or Path
        The table. Labels lose blanks at their ends, which some of the published ones have.

    Returns
    -------
    Annotations

    Raises
    ------
    ReconError
        Naming the file, and the line where there is one: if it is absent, no text, lacks a column, or a value
        is missing or no whole number.
    """
    path = Path(path)
    boxes: dict[str, dict[int, list[Box]]] = {}
    study: dict[str, list[str]] = {}
    repeated = empty = 0
    for number, row in _rows(path):
        name, label = row["file"].removesuffix(".h5"), row["label"]
        level = _STUDY_LEVEL.get(row["study_level"].lower())
        if not name or not label or level is None:
            raise ReconError(
                f"{path}: line {number} needs a file, a label, and Yes or No for study_level, "
                f"got {row['file']!r}, {row['label']!r}, {row['study_level']!r}"
            )
        if level:
            findings = study.setdefault(name, [])
            if label in findings:
                repeated += 1
            else:
                findings.append(label)
            continue
        index, x, y, width, height = (
            _whole(path, number, row, key) for key in ("slice", "x", "y", "width", "height")
        )
        if index < 0:
            raise ReconError(f"{path}: line {number}: there is no slice {index}")
        if width < 1 or height < 1:
            empty += 1
            continue
        here = boxes.setdefault(name, {}).setdefault(index, [])
        box = Box(label, x, y, width, height)
        if box in here:
            repeated += 1
        else:
            here.append(box)
    return Annotations(
        {name: {index: tuple(found) for index, found in sorted(s.items())} for name, s in boxes.items()},
        {name: tuple(findings) for name, findings in study.items()},
        repeated,
        empty,
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values of every line, stripped."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ReconError(f"{path}: the column {missing[0]!r} of a fastMRI+ table is missing")
            for row in reader:
                if "" in row or any(row[name] is None for name in COLUMNS):
                    raise ReconError(
                        f"{path}: line {reader.line_num} has not as many values as there are columns"
                    )
                yield reader.line_num, {name: row[name].strip() for name in COLUMNS}
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReconError(f"{path}: this is no table that can be read: {error}") from None


def _whole(path: Path, number: int, row: dict[str, str], key: str) -> int:
    try:
        value = float(row[key])  # some programs write 12.0 where a column has gaps
        if not value.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ReconError(f"{path}: line {number}: {key} is no whole number: {row[key]!r}") from None
    return int(value)
