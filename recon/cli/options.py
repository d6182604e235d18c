"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SAMPLING = "Sampling of the posterior"
OUTPUT = "Output"
COMPUTER = "Computer"

Out = Annotated[
    Path,
    typer.Option(
        help="Folder for the results, <same name>.h5 for each file.",
        rich_help_panel=OUTPUT,
        metavar="FOLDER",
    ),
]

KeepSamples = Annotated[
    bool, typer.Option("--keep-samples", help="Write every sample too.", rich_help_panel=OUTPUT)
]

Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the samples. The same seed gives the same result, to the last bit on the same CPU.",
        rich_help_panel=SAMPLING,
    ),
]

NumEvaluations = Annotated[
    int | None,
    typer.Option(
        help="Network evaluations a sample: fewer are faster, and coarser. Left out, the solver's own.",
        rich_help_panel=SAMPLING,
    ),
]

SolverSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of the solver, such as eta=0.5; repeatable. Left out, its own defaults.",
        rich_help_panel=SAMPLING,
        metavar="NAME=VALUE",
    ),
]

PriorConfig = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with the arguments of the network's constructor, as far as a checkpoint of other "
        "code does not tell them.",
        rich_help_panel=SAMPLING,
        metavar="FILE",
    ),
]

Precision = Annotated[
    str, typer.Option(help="Arithmetic of the network: fp32 or bf16.", rich_help_panel=COMPUTER)
]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=COMPUTER)]

Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads. The last bits of a result depend on their number, which is recorded with it.",
        rich_help_panel=COMPUTER,
    ),
]
