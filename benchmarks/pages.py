"""What the pages of the benchmarks have in common: tables, and how a file is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SIMULATED = "Processed magnitude images with simulated coils, phase and noise, which flatters every method."


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table of cells that are text already."""
    rows = [list(headings), ["---"] * len(headings), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_page(path: Path, text: str) -> None:
    """Write a page under a temporary name, and put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)
