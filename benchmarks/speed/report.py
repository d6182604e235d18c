"""What a section of the benchmark of speed gives back, as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.timing import Exponent, Spread, short

Value = str | int | float | Spread | Exponent | None


@dataclass(frozen=True)
class Bar:
    """A figure with the limit that it is held to."""

    name: str
    value: float
    at_most: float

    @property
    def met(self) -> bool:
        """Whether it keeps the limit; a NaN does not."""
        return self.value <= self.at_most

    def __str__(self) -> str:
        verdict = "met" if self.met else "missed"
        return f"{self.name}: {short(self.value)}, at most {self.at_most:g} wanted: {verdict}"


@dataclass(frozen=True)
class Section:
    """A table with what it was measured on, and the limits its figures are held to.

    Parameters
    ----------
    name
        By which the command line knows it.
    title
        One line.
    columns, rows
        The table.
    notes
        Sentences below it: what was timed, and what a reader has to know.
    bars
        Figures with their limits.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = ()
    bars: Sequence[Bar] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: a row of {len(row)} under {len(self.columns)} columns")

    def markdown(self) -> str:
        """Title, table, limits and notes."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in self.rows]
        items = [f"- {text}" for text in (*map(str, self.bars), *self.notes)]
        return "\n".join([*lines, *([""] if items else []), *items, ""])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "title": self.title,
            "rows": [
                {name: _plain(value) for name, value in zip(self.columns, row, strict=True)}
                for row in self.rows
            ],
            "notes": list(self.notes),
            "bars": [
                {"name": bar.name, "value": bar.value, "at_most": bar.at_most, "met": bar.met}
                for bar in self.bars
            ],
        }


def _cell(value: Value) -> str:
    if value is None:
        return "–"
    return short(value) if isinstance(value, float) else str(value)


def _plain(value: Value) -> Any:
    return value.as_dict() if isinstance(value, Spread | Exponent) else value
