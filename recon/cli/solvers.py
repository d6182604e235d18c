"""``recon solvers``: what methods there are, and their settings."""

from __future__ import annotations

from typing import Annotated

import typer


def solvers(
    name: Annotated[str | None, typer.Argument(help="One solver, for its settings explained.")] = None,
) -> None:
    """List the solvers with their settings, or explain one.

    [bold]Examples[/bold]

        recon solvers
        recon solvers dps
        recon mri scan.h5 --solver dps:paper --set nfe=500 --out out/
    """
    import inspect
    from dataclasses import fields

    from recon.solvers import PRESETS, SOLVERS, solver_class

    for key in SOLVERS if name is None else [name]:
        kind = solver_class(key)
        document = inspect.getdoc(kind) or ""
        presets = [preset for preset in PRESETS if hasattr(kind, preset)]
        typer.echo(f"{key} ({kind.__name__}): {document.partition(chr(10))[0]}")
        settings = ", ".join(f"{item.name}={item.default}" for item in fields(kind))  # type: ignore[arg-type]
        typer.echo(f"    settings: {settings or 'none'}")
        if presets:
            typer.echo(f"    presets: {', '.join(f'{key}:{preset}' for preset in presets)}")
        if name is not None:
            typer.echo("\n" + document)
