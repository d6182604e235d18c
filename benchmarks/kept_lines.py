"""Results on disk as lines of JSON, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recon.errors import ReconError


def read_lines(path: Path, field: str) -> dict[str, Any]:
    """Read a file that `append_line` wrote: key -> what `field` holds; nothing, if there is no file.

    The last line is dropped, in the file too, if a run was stopped while it wrote it.

    Raises
    ------
    ReconError
        Naming the file and the line, if another line is damaged.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    found = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = entry[field]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ReconError(f"{path}: line {number} is damaged; remove it or the file") from None
    return found


def append_line(path: Path, key: str, **fields: Any) -> None:
    """Append a line.

    Raises
    ------
    ReconError
        Naming the file, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"key": key, **fields}) + "\n")
    except OSError as error:
        raise ReconError(f"{path}: the cache cannot be written: {error}") from None
