"""Progress bars on standard error, so that standard output holds results alone."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(unit: str) -> Progress:
    """Bar with a description, a count of ``unit``, time spent and time left, which vanishes at the end.

    Where standard error is no terminal it shows nothing; its console still prints.
    """
    # soft_wrap: a file name is never cut in two, so that it can be copied and searched for.
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
