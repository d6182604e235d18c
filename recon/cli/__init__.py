"""The command ``recon``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from recon.cli.calibrate import calibrate
from recon.cli.ct import ct
from recon.cli.demo import demo
from recon.cli.evaluate import evaluate
from recon.cli.mri import mri
from recon.cli.prior import prior_app
from recon.cli.solvers import solvers

# Threads that wait for each other by spinning bring a busy machine to a crawl: beside two other computations
# on two cores the demo took more than ten minutes instead of two. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130  # the shells' exit status of a program that Ctrl-C ended

# Typer used to depend on click and now carries it inside: its public class leads to the right one of the two.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="recon",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(mri)
app.command()(ct)
app.command()(evaluate)
app.command()(demo)
app.command()(calibrate)
app.command()(solvers)
app.add_typer(prior_app, name="prior")


def _print_version(wanted: bool) -> None:
    if wanted:
        from recon import __version__

        typer.echo(f"recon {__version__}")
        raise typer.Exit


@app.callback()
def recon(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Diffusion posterior sampling: undersampled MRI or CT data in, an image and its uncertainty out.

    Research software, not for diagnostic use.

    [bold]To begin with[/bold]

        recon demo                      the bundled example, into demo/
        recon mri scan.h5 --out out/    your own data, in the layout of fastMRI
        recon ct scan.mat --out out/    CT projections
        recon mri --help                masks, samples, priors
        recon solvers                   the methods and their settings
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend ends in one sentence and an exit status that is not 0.

    Parameters
    ----------
    arguments
        Of the command; those of the process if not given.

    Raises
    ------
    SystemExit
        Always: with status 0 if all went well, 1 if something could not be done, 2 if the command was not
        understood, 130 if it was interrupted.
    """
    try:
        status = app(None if arguments is None else list(arguments), prog_name="recon", standalone_mode=False)
    except _UsageError as error:
        if message := error.format_message():  # none where the help was printed instead
            command = error.ctx.command_path if error.ctx else "recon"
            _fail(f"{message.rstrip('.')} (see {command} --help)")
        sys.exit(error.exit_code)
    except ValueError as error:
        # Imported only here: they bring torch with them, for which --help should not have to wait.
        from operators.errors import OperatorError
        from priors.errors import PriorError
        from recon.errors import ReconError

        if not isinstance(error, OperatorError | PriorError | ReconError):
            raise
        _fail(str(error))
        sys.exit(1)
    except typer.Abort:
        status = INTERRUPTED
    if status == INTERRUPTED:
        sys.stderr.write("Interrupted; what was finished is kept.\n")
    sys.exit(status or 0)


def _fail(sentence: str) -> None:
    sys.stderr.write(f"Error: {sentence}\n")


__all__ = ["app", "main"]
