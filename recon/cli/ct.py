"""``recon ct``: CT projections in, reconstructions with their uncertainty out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recon.cli.options import (
    COMPUTER,
    OUTPUT,
    SAMPLING,
    Device,
    KeepSamples,
    NumEvaluations,
    Out,
    Precision,
    Seed,
    SolverSettings,
    Threads,
)

_VIEWS = "Choice among the views that were measured"
_IMAGE = "Image"
_DATA = "What is known about the data (found from file and data if not given)"


def ct(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Projections: HTC 2022 and other .mat, DXchange and LoDoPaB HDF5, a folder of DICOM-CT-PD."
        ),
    ],
    out: Out,
    units: Annotated[
        str, typer.Option(help="Units of the images: 1/mm or HU.", rich_help_panel=OUTPUT)
    ] = "1/mm",
    keep_samples: KeepSamples = False,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures", help="Write a picture of every slice, <name>_<slice>.png.", rich_help_panel=OUTPUT
        ),
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(help="Keep this many views, evenly spread: sparse-view CT.", rich_help_panel=_VIEWS),
    ] = None,
    arc: Annotated[
        float | None,
        typer.Option(help="Keep the views within so many degrees: limited-angle CT.", rich_help_panel=_VIEWS),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            help="Angle in degrees at which the arc begins.", rich_help_panel=_VIEWS, show_default="0"
        ),
    ] = None,
    slices: Annotated[
        list[int] | None,
        typer.Option(
            "--slice",
            help="Slice of the file, counted from 0; repeatable.",
            show_default="all",
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side.",
            rich_help_panel=_IMAGE,
            show_default="that of the file, or the detector's elements",
        ),
    ] = None,
    pixel_size: Annotated[
        float | None,
        typer.Option(
            help="Side of a pixel in mm.",
            rich_help_panel=_IMAGE,
            show_default="that of the file, or such that all is in view",
        ),
    ] = None,
    challenge: Annotated[
        str | None,
        typer.Option(
            help="htc2022: segment the disc of the Helsinki Tomography Challenge's files; the result holds "
            "'segmentation' and 'probability', the prior is 'discs', and dds takes 120 steps from 3.",
            rich_help_panel=_IMAGE,
            metavar="NAME",
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples a slice. Their mean is the image, their spread the uncertainty.",
            rich_help_panel=SAMPLING,
            show_default="8; 16 for the challenge",
        ),
    ] = None,
    seed: Seed = 0,
    prior: Annotated[
        str | None,
        typer.Option(
            help="What images look like: the name of a bundled prior, or a .safetensors file.",
            rich_help_panel=SAMPLING,
            show_default="chest; discs for the challenge",
        ),
    ] = None,
    nfe: NumEvaluations = None,
    solver: Annotated[
        str,
        typer.Option(
            help="Method; recon solvers lists them with their settings. fbp, sirt, cgls and tv need no "
            "prior.",
            rich_help_panel=SAMPLING,
            metavar="NAME",
        ),
    ] = "dds",
    settings: SolverSettings = None,
    photons: Annotated[
        float | None,
        typer.Option(help="Incident photons of a detector element.", rich_help_panel=_DATA),
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise of line integrals, the same for all, instead.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    mu_water: Annotated[
        float, typer.Option(help="Attenuation of water in 1/mm: what HU refer to.", rich_help_panel=_DATA)
    ] = 0.02,
    detector_spacing: Annotated[
        float | None,
        typer.Option(
            help="Distance of detector elements in mm, where the file does not tell.", rich_help_panel=_DATA
        ),
    ] = None,
    detector_offset: Annotated[
        float | None,
        typer.Option(
            help="Middle of the detector in mm from where the axis of rotation is seen, where the file does "
            "not tell.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    precision: Precision = "fp32",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep system matrices in this folder for the next time.",
            rich_help_panel=COMPUTER,
            metavar="FOLDER",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Reconstruct CT projections: posterior mean and standard deviation.

    [bold]Sparse views, limited angle, or all there is[/bold]

        recon ct scan.h5 --views 60 --out out/
        recon ct scan.mat --arc 90 --num-samples 8 --out out/
        recon ct scan.h5 --solver fbp --out fbp/
        recon ct limited.mat --challenge htc2022 --out out/

    The noise of every line integral is found from the data. The result holds the
    datasets 'reconstruction' and 'reconstruction_std', (slices, H, W), and in the
    attribute 'provenance' how they were made.

    A bad file does not stop the others: it is reported at the end, and the exit
    status is then 1.
    """
    import math
    import time

    from recon.cli.progress import progress_bar
    from recon.cli.run import (
        FILE_ERRORS,
        choose_device,
        close_run,
        ct_picture,
        describe_failure,
        load_with_facts,
        make_folder,
        set_threads,
        solver_of,
    )
    from recon.ct import CTSettings, reconstruct_ct_file
    from recon.errors import ReconError
    from recon.htc2022 import challenge_solver, segment_file

    if challenge not in (None, "htc2022"):
        raise ReconError(f"unknown challenge {challenge!r}: htc2022 is known")
    if challenge is not None:
        for option, value in (
            ("--size", size),
            ("--pixel-size", pixel_size),
            ("--slice", slices),
            ("--photons", photons),
            ("--detector-spacing", detector_spacing),
            ("--detector-offset", detector_offset),
            ("--cache", cache),
            ("--keep-samples", keep_samples or None),
            ("--figures", figures or None),
        ):
            if value is not None:
                raise ReconError(f"{option} has no meaning for --challenge {challenge}")
    prior = prior or ("chest" if challenge is None else "discs")
    if start is not None and arc is None:
        raise ReconError("--start belongs to --arc, which says how many degrees to keep")
    chosen = solver_of(solver, settings or [], nfe)
    asked = CTSettings(
        views=views,
        arc=None if arc is None else math.radians(arc),
        start=math.radians(start or 0.0),
        num_samples=(8 if challenge is None else 16) if num_samples is None else num_samples,
        seed=seed,
        photons=photons,
        noise_std=noise_std,
        mu_water=mu_water,
        units=units,
        keep_samples=keep_samples,
    )
    set_threads(threads)
    place = choose_device(device)
    if challenge is not None and solver == "dds" and not settings and nfe is None:
        chosen = challenge_solver()
    if challenge is not None and not chosen.needs.prior:
        raise ReconError(f"--challenge {challenge} samples the posterior, and {solver} has no prior")
    loaded, facts = None, None
    if chosen.needs.prior:
        loaded, facts = load_with_facts(prior, precision, place)
    stems = [file.stem for file in files]
    for file in files:
        if stems.count(file.stem) > 1:
            raise ReconError(f"two of the files would be written as {file.stem}.h5")
    make_folder(out)

    failed: list[str] = []
    notes: dict[str, list[str]] = {}
    with progress_bar("slices") as bar:
        for number, source in enumerate(files):
            started = time.monotonic()
            position = f" ({number + 1} of {len(files)})" if len(files) > 1 else ""
            task = bar.add_task(source.name + position, total=None)
            try:
                if challenge is not None:
                    assert loaded is not None
                    provenance = segment_file(
                        source,
                        out / f"{source.stem}.h5",
                        loaded,
                        chosen,
                        asked,
                        prior_facts=facts,
                        device=place,
                        on_progress=lambda done, total, task=task: bar.update(  # type: ignore[misc]
                            task, completed=done / total, total=1
                        ),
                    )
                    made = f"disc segmented from {len(provenance['angles_degrees'])} views"
                else:
                    provenance = reconstruct_ct_file(
                        source,
                        out / f"{source.stem}.h5",
                        loaded,
                        chosen,
                        asked,
                        size=size,
                        pixel_size=pixel_size,
                        slices=slices,
                        detector_spacing=detector_spacing,
                        detector_offset=detector_offset,
                        prior_facts=facts,
                        cache=cache,
                        device=place,
                        on_progress=lambda done, total, task=task: bar.update(  # type: ignore[misc]
                            task, completed=done, total=total
                        ),
                        on_slice=ct_picture(out, source.stem) if figures else None,
                    )
                    made = what_was_made(provenance)
            except FILE_ERRORS as error:
                failed.append(describe_failure(source, error))
                continue
            finally:
                bar.remove_task(task)
            bar.console.print(f"{source.name}: {made}, {time.monotonic() - started:.0f} s")
            for note in provenance["warnings"]:
                notes.setdefault(note, []).append(source.name)
    close_run(len(files), out, notes, failed)


def what_was_made(provenance: dict[str, Any]) -> str:
    """Slices, views and pixels of a reconstruction, for the line that is printed of it."""
    geometry, image = provenance["geometry"], provenance["image"]
    length = "elements" if provenance["units"] == "1/element" else "mm"
    count = len(provenance["slices"])
    return (
        f"{count} slice{'s' * (count != 1)} from {len(geometry['angles_degrees'])} of "
        f"{geometry['views_of_the_file']} views, {image['shape'][0]} × {image['shape'][1]} pixels of "
        f"{image['pixel_size']:.4g} {length}"
    )
