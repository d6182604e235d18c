"""The command ``recon``."""

from __future__ import annotations

import sys

import typer

from recon.cli.demo import demo
from recon.cli.evaluate import evaluate
from recon.cli.mri import mri
from recon.cli.prior import prior_app

app = typer.Typer(
    name="recon",
    help="Diffusion posterior sampling: undersampled MRI data in, an image and its uncertainty out. "
    "Research software, not for diagnostic use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(mri)
app.command()(evaluate)
app.command()(demo)
app.add_typer(prior_app, name="prior")


def main() -> None:
    """Run the command line; what a user can mend ends in one sentence and exit status 1."""
    from operators.errors import OperatorError
    from priors.errors import PriorError
    from recon.errors import ReconError

    try:
        app()
    except (ReconError, PriorError, OperatorError) as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)


__all__ = ["app", "main"]
