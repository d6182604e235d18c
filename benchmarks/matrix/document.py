"""A page as a list of blocks, in Markdown and as HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A heading, 1 the largest."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text, in which `backticks` mark code."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """Text of a table whose parts stand between slashes; the parts in bold are the best of their row."""

    parts: Sequence[str]
    bold: Sequence[bool]

    @property
    def markdown(self) -> str:
        """With asterisks."""
        pairs = zip(self.parts, self.bold, strict=True)
        return " / ".join(f"**{part}**" if bold else part for part, bold in pairs)

    @property
    def html(self) -> str:
        """With tags."""
        pairs = zip(self.parts, self.bold, strict=True)
        return " / ".join(f"<b>{_inline(part)}</b>" if bold else _inline(part) for part, bold in pairs)


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG file that lies beside the page."""

    path: Path
    caption: str


Block = Heading | Paragraph | Bullets | Table | Picture


def as_markdown(blocks: Sequence[Block]) -> str:
    """Make the Markdown page; pictures are named by their files."""
    text: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            lines = ["#" * block.level + " " + block.text]
        elif isinstance(block, Paragraph):
            lines = [block.text]
        elif isinstance(block, Bullets):
            lines = [f"- {item}" for item in block.items]
        elif isinstance(block, Picture):
            lines = [f"![{block.caption}]({block.path.name})"]
        else:
            lines = ["| " + " | ".join(block.headings) + " |", "|" + "---|" * len(block.headings)]
            for row in block.rows:
                cells = [cell.markdown if isinstance(cell, Cell) else cell for cell in row]
                lines.append("| " + " | ".join(cells) + " |")
        text += [*lines, ""]
    return "\n".join(text)


STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #ffffff; --line: #d0d0d0; --band: #f4f4f4;
  --quiet: #555; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #16181b; --line: #3a3d42; --band: #1f2226; --quiet: #a8a8a8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 90rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; }
p, ul { max-width: 62rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); }
tr:nth-child(even) td { background: var(--band); }
code { background: var(--band); padding: 0 .25em; border-radius: 3px; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--quiet); font-size: .85rem; }
"""


def as_html(blocks: Sequence[Block], title: str) -> str:
    """Make one HTML file: style and pictures are in it.

    Raises
    ------
    OSError
        If a picture cannot be read.
    """
    body: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            body.append(f"<h{block.level}>{_inline(block.text)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            body.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Bullets):
            body.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>")
        elif isinstance(block, Picture):
            data = base64.b64encode(block.path.read_bytes()).decode()
            caption = _inline(block.caption)
            body.append(
                f'<figure><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        else:
            head = "".join(f"<th>{_inline(text)}</th>" for text in block.headings)
            lines = []
            for row in block.rows:
                cells = (cell.html if isinstance(cell, Cell) else _inline(cell) for cell in row)
                lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
            body.append(
                f'<div class="table"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{''.join(lines)}</tbody></table></div>"
            )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _inline(text: str) -> str:
    """Escape text, and make code of what stands in backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))
