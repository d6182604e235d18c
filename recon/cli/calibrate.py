"""``recon calibrate``: fully sampled fastMRI files in, a calibration of the uncertainty out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recon.cli.mri import MASK_KINDS

_UNDERSAMPLING = "Undersampling"
_SAMPLING = "Sampling of the posterior, as it will be used"
_LEARNING = "Learning"
_COMPUTER = "Computer"


def calibrate(
    files: Annotated[list[Path], typer.Argument(help="Fully sampled fastMRI files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Calibration to write, a .json file.", metavar="FILE")],
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Kind of mask, repeatable: {', '.join(MASK_KINDS)}.",
            rich_help_panel=_UNDERSAMPLING,
            metavar="KIND",
            show_default="equispaced",
        ),
    ] = None,
    acceleration: Annotated[
        list[float] | None,
        typer.Option(
            help="Acceleration asked of the masks, repeatable; between two of them is interpolated.",
            rich_help_panel=_UNDERSAMPLING,
            show_default="4",
        ),
    ] = None,
    center_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the columns in the fully sampled centre.",
            rich_help_panel=_UNDERSAMPLING,
            show_default="0.32 / acceleration; 0.12 of each side for 2-D masks",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples a slice.", rich_help_panel=_SAMPLING)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.", rich_help_panel=_SAMPLING)] = 0,
    prior: Annotated[
        str,
        typer.Option(
            help="Name of a bundled prior, or a .safetensors file.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "brain",
    solver: Annotated[
        str,
        typer.Option(
            help="Method, NAME or NAME:PRESET; recon solvers lists them.",
            rich_help_panel=_SAMPLING,
            metavar="NAME",
        ),
    ] = "dds",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the solver, such as eta=0.5; repeatable.",
            rich_help_panel=_SAMPLING,
            metavar="NAME=VALUE",
        ),
    ] = None,
    num_coils: Annotated[
        int | None,
        typer.Option(help="Compress to this many virtual coils first.", rich_help_panel=_SAMPLING),
    ] = None,
    nominal: Annotated[
        float, typer.Option(help="Coverage of the intervals.", rich_help_panel=_LEARNING)
    ] = 0.9,
    slices: Annotated[
        int,
        typer.Option(help="Slices of a file, evenly spaced over its middle half.", rich_help_panel=_LEARNING),
    ] = 4,
    patient: Annotated[
        str,
        typer.Option(
            help="What holds the data of one patient: a file, or a folder. The guarantee counts patients.",
            rich_help_panel=_LEARNING,
            metavar="file|folder",
        ),
    ] = "file",
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Keep what was reconstructed in this folder: an interrupted run resumes from it.",
            rich_help_panel=_COMPUTER,
            metavar="FOLDER",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Arithmetic of the network: fp32 or bf16.", rich_help_panel=_COMPUTER)
    ] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=_COMPUTER)] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_COMPUTER)] = None,
) -> None:
    r"""Learn from fully sampled files how wide intervals of the posterior must be.

    [bold]Example[/bold]

        recon calibrate full/ --mask equispaced --mask random \
            --acceleration 2 --acceleration 4 --acceleration 8 --out scanner-a.json

    Every file is undersampled with every mask and reconstructed, and the error of
    the object's pixels is compared with the spread of the samples. What is learned
    holds for this prior, solver and number of samples, this number of coils, share
    of the centre and precision, and for data like these.
    Use patients that the prior was not trained on, several of them: the guarantee
    is an average over exchangeable patients.
    """
    import time

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.files import prior_hash, prior_path
    from priors.loading import load_prior
    from recon.calibration import interval_factor, learn
    from recon.calibration_files import evidence_of_file
    from recon.cli.progress import progress_bar
    from recon.cli.run import choose_device, collect_files, make_folder, set_threads, solver_of
    from recon.errors import ReconError
    from recon.mri import MRISettings, calibrated_settings

    kinds, accelerations = mask or ["equispaced"], acceleration or [4.0]
    for kind in kinds:
        if kind not in MASK_KINDS:
            raise ReconError(f"unknown mask kind {kind!r}: the kinds are {', '.join(MASK_KINDS)}")
    if patient not in ("file", "folder"):
        raise ReconError(f"--patient is file or folder, not {patient!r}")
    if out.suffix != ".json":
        raise ReconError(f"{out}: a calibration is a .json file")
    if slices < 1:
        raise ReconError(f"--slices must be at least 1, got {slices}")
    interval_factor(nominal)  # raises unless it is a coverage
    requests = [
        MRISettings(
            mask=kind,
            acceleration=asked,
            center_fraction=center_fraction,
            num_samples=num_samples,
            seed=seed,
            num_coils=num_coils,
        )
        for kind in kinds
        for asked in accelerations
    ]
    chosen = solver_of(solver, settings or [])
    set_threads(threads)
    place = choose_device(device)
    loaded, identity, facts = None, None, None
    if chosen.needs.prior:
        loaded = load_prior(prior, precision=precision, device=place)
        identity = (loaded.contract.name, prior_hash(prior_path(prior)))
        facts = {"sha256": identity[1], "precision": precision}
    sources = collect_files(files)
    make_folder(out.parent)

    started = time.monotonic()
    evidence = []
    with progress_bar("reconstructions") as bar:
        task = bar.add_task("calibrating", total=len(sources) * len(requests) * slices)
        for source in sources:
            for request in requests:
                found = evidence_of_file(
                    source,
                    loaded,
                    chosen,
                    request,
                    patient=str(source.resolve().parent) if patient == "folder" else source.stem,
                    slices=slices,
                    prior_facts=facts,
                    keep=keep,
                    device=place,
                    on_slice=lambda: bar.advance(task),
                )
                bar.advance(task, slices - len(found))  # a file may have fewer
                evidence += found
    calibration = learn(
        evidence,
        name=out.stem,
        solver=chosen,
        num_samples=num_samples,
        prior=identity,
        nominal=nominal,
        settings=calibrated_settings(requests[0], facts),  # alike in all of them
    )
    calibration.save(out)

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("mask", "acceleration", "interval / std", "coverage of patients left out"):
        table.add_column(column, justify="left" if column == "mask" else "right")
    for cell in calibration.cells:
        left_out = "–" if cell.left_out is None else "{:.1%} to {:.1%}".format(*cell.left_out)
        table.add_row(cell.mask, f"{cell.acceleration:.2f}", f"{cell.factor:.2f}", left_out)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{calibration.slices} slices of {calibration.patients} patient{'s' * (calibration.patients != 1)}, "
        f"{len(evidence)} reconstructions, {time.monotonic() - started:.0f} s. Intervals of {nominal:.0%}; "
        f"for a new patient exchangeable with these, at least {calibration.guaranteed:.0%} of the pixels are "
        "covered on average, whatever the distributions."
    )
    console.print(f"Written to {out}.")
