"""What the commands share: which files are meant, where results go, what computes, a picture a slice."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer

from operators.errors import OperatorError
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.errors import ReconError
from recon.solvers import make_solver

if TYPE_CHECKING:
    from priors.base import ScorePrior
    from recon.ct import CTSliceResult
    from recon.mri import SliceResult
    from recon.solvers.base import Solver

FILE_ERRORS = (ReconError, PriorError, OperatorError, OSError, MemoryError, RuntimeError)
"""What may go wrong with one file of many without stopping the others; torch says that memory is short by a
``RuntimeError``."""


def collect_files(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as the ``.h5`` files in them.

    Raises
    ------
    ReconError
        If a folder holds none, a file is given twice, or two would be written under the same name.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.h5")) if path.is_dir() else [path]
        if not found:
            raise ReconError(f"{path}: the folder holds no .h5 file")
        files.extend(found)
    stems: dict[str, Path] = {}
    for file in files:
        if file in stems.values():
            raise ReconError(f"{file} is given twice")
        if file.stem in stems:
            raise ReconError(f"{stems[file.stem]} and {file} would both be written as {file.stem}.h5")
        stems[file.stem] = file
    return files


def describe_failure(file: Path, error: Exception) -> str:
    """One sentence that names the file."""
    sentence = next(iter(str(error).splitlines()), type(error).__name__)
    return sentence if str(file) in sentence else f"{file}: {sentence}"


def make_folder(folder: Path) -> None:
    """Make the output folder, and find out before hours of work whether it can be written.

    Raises
    ------
    ReconError
        If it cannot.
    """
    # A name of its own: processes that share the folder must not remove one another's probe.
    probe = folder / f".recon-writable-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ReconError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def solver_of(name: str, settings: Iterable[str], nfe: int | None = None) -> Solver:
    """Make the solver that ``--solver NAME[:PRESET]``, ``--set NAME=VALUE`` and ``--nfe`` ask for.

    Raises
    ------
    ReconError
        If there is none such, or a setting does not fit it.
    """
    values = {} if nfe is None else {"nfe": str(nfe)}
    for item in settings:
        key, sign, text = item.partition("=")
        if not (key and sign and text):
            raise ReconError(f"--set takes NAME=VALUE, such as eta=0.5, not {item!r}")
        if key in values:
            raise ReconError(f"setting {key} is given twice")
        values[key] = text
    kind, _, preset = name.partition(":")
    return make_solver(kind, preset or None, values)


def set_threads(threads: int | None) -> None:
    """Compute with so many CPU threads; with as many as torch chooses, if none are given.

    Raises
    ------
    ReconError
        If there would be none.
    """
    if threads is None:
        return
    if threads < 1:
        raise ReconError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def load_with_facts(
    prior: str, precision: str, device: torch.device, config: Path | None = None
) -> tuple[ScorePrior, dict[str, str]]:
    """Load a prior, and say for provenance which file it is, and which one its configuration.

    Raises
    ------
    PriorError
        If there is no such prior, or it cannot be read.
    """
    loaded = load_prior(prior, precision=precision, device=device, config=config)
    path = prior_path(prior)
    facts = {"file": path.name, "sha256": prior_hash(path), "precision": precision}
    if config is not None:
        facts |= {"config": config.name, "config_sha256": prior_hash(config)}
    return loaded, facts


def choose_device(name: str) -> torch.device:
    """Device of that name, set up so that its results are those of a CPU within single precision.

    Raises
    ------
    ReconError
        If there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ReconError(f"unknown device {name!r}: cpu, cuda, cuda:1, ... are known") from None
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    elif device.type != "cpu":
        raise ReconError(f"there is no device {name!r} here")
    return device


def slice_figure(folder: Path, stem: str) -> Callable[[SliceResult], None]:
    """Return a function that draws a finished slice into ``folder``."""
    from recon.figures import reconstruction_figure

    def draw(result: SliceResult) -> None:
        reconstruction_figure(
            folder / f"{stem}_{result.index:02d}.png",
            result.mean.numpy(),
            result.std.numpy(),
            zero_filled=result.zero_filled.numpy(),
            mask=result.mask.numpy(),
            truth=None if result.target is None else result.target.numpy(),
            title=f"{stem}, slice {result.index}",
        )

    return draw


def posterior_picture(folder: Path, stem: str) -> Callable[[SliceResult], None]:
    """Return a function that draws a finished slice's samples, and its measured and invented part."""
    from recon.figures import posterior_figure

    def draw(result: SliceResult) -> None:
        if result.samples is None:
            return
        measured, invented = (None, None) if result.parts is None else result.parts
        posterior_figure(
            folder / f"{stem}_{result.index:02d}_posterior.png",
            result.mean.numpy(),
            result.std.numpy(),
            samples=result.samples.numpy(),
            measured=None if measured is None else measured.numpy(),
            invented=None if invented is None else invented.numpy(),
            truth=None if result.target is None else result.target.numpy(),
            title=f"{stem}, slice {result.index}",
        )

    return draw


def ct_picture(folder: Path, stem: str) -> Callable[[CTSliceResult], None]:
    """Return a function that draws a finished slice of a CT scan into ``folder``."""
    from recon.figures import ct_figure

    def draw(result: CTSliceResult) -> None:
        ct_figure(
            folder / f"{stem}_{result.index:02d}.png",
            result.mean.numpy(),
            result.std.numpy(),
            units=result.units,
            truth=None if result.reference is None else result.reference.numpy(),
            title=f"{stem}, slice {result.index}",
        )

    return draw


def close_run(total: int, out: Path, notes: Mapping[str, Sequence[str]], failed: Sequence[str]) -> None:
    """Print the notes with the files they are about, what failed, and how many files were reconstructed.

    Raises
    ------
    typer.Exit
        With status 1 if a file failed.
    """
    for note, names in notes.items():
        where = "" if len(names) == total else f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        typer.echo(f"Note: {note}{where}", err=True)
    for sentence in failed:
        typer.echo(f"Error: {sentence}", err=True)
    typer.echo(
        f"{total - len(failed)} of {total} file{'s' * (total != 1)} reconstructed into {out}. "
        "Not for diagnostic use."
    )
    if failed:
        raise typer.Exit(1)


def write_json(path: Path, content: object) -> None:
    """Write JSON through a temporary file.

    Raises
    ------
    ReconError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from None
