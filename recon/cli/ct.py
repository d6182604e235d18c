"""``recon ct``: CT projections in, reconstructions with their uncertainty out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
    PriorConfig,
    Seed,
    SolverSettings,
    Threads,
)

_VIEWS = "Choice among the views that were measured"
_IMAGE = "Image"
_DATA = "What is known about the data (found from file and data if not given)"
_CORRECTIONS = "Corrections"


def ct(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Projections: HTC 2022 and other .mat, DXchange and LoDoPaB HDF5, a folder of DICOM-CT-PD; "
            "for --simulate, a folder with a DICOM series, or HDF5 with images in HU."
        ),
    ],
    out: Out,
    units: Annotated[
        str | None,
        typer.Option(help="Units of the images: 1/mm or HU.", rich_help_panel=OUTPUT, show_default="1/mm"),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Write mean and standard deviation as nifti (<name>.nii.gz, <name>_std.nii.gz) or dicom "
            "(<name>_dicom/mean and /std, in HU) too; repeatable.",
            rich_help_panel=OUTPUT,
            metavar="FORMAT",
        ),
    ] = None,
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
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="The files hold images in HU: simulate a fan-beam scan of them with --photons (200000 if "
            "not given), and reconstruct that. The result holds the truth too, as 'reference'.",
            rich_help_panel=_VIEWS,
        ),
    ] = False,
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
            "'segmentation' and 'probability', the prior is 'discs', --num-samples counts candidates.",
            rich_help_panel=_IMAGE,
            metavar="NAME",
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples a slice. Their mean is the image, their spread the uncertainty.",
            rich_help_panel=SAMPLING,
            show_default="8",
        ),
    ] = None,
    seed: Seed = 0,
    prior: Annotated[
        str | None,
        typer.Option(
            help="What images look like: the name of a bundled prior, a .safetensors file, or a checkpoint "
            "of other code (recon prior inspect says which).",
            rich_help_panel=SAMPLING,
            show_default="chest; discs for the challenge",
        ),
    ] = None,
    prior_config: PriorConfig = None,
    nfe: NumEvaluations = None,
    solver: Annotated[
        str,
        typer.Option(
            help="Method; recon solvers lists them with their settings. fbp, sirt, cgls and tv need no "
            "prior; dds-3d, adjacent-slices, diffusion-mbir and perpendicular take all slices as a volume.",
            rich_help_panel=SAMPLING,
            metavar="NAME",
        ),
    ] = "dds:ct",
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
        float | None,
        typer.Option(
            help="Attenuation of water in 1/mm: what HU refer to.",
            rich_help_panel=_DATA,
            show_default="0.02",
        ),
    ] = None,
    detector_spacing: Annotated[
        float | None,
        typer.Option(
            help="Distance of detector elements in mm, where the file does not tell.", rich_help_panel=_DATA
        ),
    ] = None,
    resolve: Annotated[
        float | None,
        typer.Option(
            help="Difference in HU that is to be seen: a warning says if noise levels end above it.",
            rich_help_panel=SAMPLING,
            show_default="10",
        ),
    ] = None,
    rings: Annotated[
        bool,
        typer.Option(
            "--rings",
            help="Suppress rings, which detector elements draw that respond otherwise than their neighbours.",
            rich_help_panel=_CORRECTIONS,
        ),
    ] = False,
    detector_offset: Annotated[
        str | None,
        typer.Option(
            help="Middle of the detector in mm from where the axis of rotation is seen, or 'auto', to find "
            "it from the data.",
            show_default="that of the file; auto, where the file does not tell",
            rich_help_panel=_CORRECTIONS,
            metavar="MM|auto",
        ),
    ] = None,
    truncated: Annotated[
        bool,
        typer.Option(
            "--truncated",
            help="The object is wider than the field of view: give it room beyond, so that the image within "
            "is right.",
            rich_help_panel=_CORRECTIONS,
        ),
    ] = False,
    beam_hardening: Annotated[
        Path | None,
        typer.Option(
            help='JSON {"coefficients": [c1, c2, ...], "largest": p}: the polynomial c1 p + c2 p² + ... from '
            "measured to monochromatic line integrals, and up to which p it holds.",
            rich_help_panel=_CORRECTIONS,
            metavar="FILE",
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
        recon ct SERIES/ --simulate --views 60 --photons 2e5 --units HU --out out/

    The noise of every line integral is found from the data. The result holds the
    datasets 'reconstruction' and 'reconstruction_std', (slices, H, W), and in the
    attribute 'provenance' how they were made.

    A bad file does not stop the others: it is reported at the end, and the exit
    status is then 1.
    """
    import math
    import time

    from operators.attenuation import MU_WATER
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
    from recon.ct import RESOLVE, CTSettings, reconstruct_ct_file
    from recon.ct_corrections import CTCorrections
    from recon.ct_export import check_formats
    from recon.ct_simulation import PHOTONS, CTSimulation
    from recon.errors import ReconError
    from recon.htc2022 import FIRST, segment_file
    from recon.io.beam_hardening import read_beam_hardening

    if challenge not in (None, "htc2022"):
        raise ReconError(f"unknown challenge {challenge!r}: htc2022 is known")
    if challenge is not None:
        for option, value in (
            ("--units", units),
            ("--size", size),
            ("--pixel-size", pixel_size),
            ("--slice", slices),
            ("--photons", photons),
            ("--mu-water", mu_water),
            ("--detector-spacing", detector_spacing),
            ("--resolve", resolve),
            ("--detector-offset", detector_offset),
            ("--cache", cache),
            ("--keep-samples", keep_samples or None),
            ("--figures", figures or None),
            ("--also", also),
            ("--simulate", simulate or None),
            ("--rings", rings or None),
            ("--truncated", truncated or None),
            ("--beam-hardening", beam_hardening),
        ):
            if value is not None:
                raise ReconError(f"{option} has no meaning for --challenge {challenge}")
    if simulate:
        for option, value in (
            ("--pixel-size", pixel_size),
            ("--noise-std", noise_std),
            ("--detector-spacing", detector_spacing),
        ):
            if value is not None:
                raise ReconError(f"{option} has no meaning for --simulate, which makes the scan")
    prior = prior or ("chest" if challenge is None else "discs")
    if start is not None and arc is None:
        raise ReconError("--start belongs to --arc, which says how many degrees to keep")
    chosen = solver_of(solver, settings or [], nfe)
    angles = (None if arc is None else math.radians(arc), math.radians(start or 0.0))
    mu_water = MU_WATER if mu_water is None else mu_water
    simulation = None
    if simulate:
        photons = PHOTONS if photons is None else photons
        simulation = CTSimulation(views, *angles, photons, seed, mu_water, size)
        views, angles, size = None, (None, 0.0), None
    asked = CTSettings(
        views=views,
        arc=angles[0],
        start=angles[1],
        num_samples=8 if num_samples is None else num_samples,
        seed=seed,
        photons=photons,
        noise_std=noise_std,
        mu_water=mu_water,
        units="1/mm" if units is None else units,
        keep_samples=keep_samples,
        resolve=RESOLVE if resolve is None else resolve,
    )
    corrections = CTCorrections(
        rings=rings,
        beam_hardening=None if beam_hardening is None else read_beam_hardening(beam_hardening),
        truncated=truncated,
        detector_offset=offset_of(detector_offset),
    )
    check_formats(also or [])
    set_threads(threads)
    place = choose_device(device)
    first = FIRST
    if challenge is not None:
        if solver not in ("dds", "dds:ct"):
            raise ReconError(f"--challenge {challenge} searches with dds, not {solver}")
        if settings:
            raise ReconError(f"--set has no meaning for --challenge {challenge}, which has its own")
        if nfe is not None:
            first = replace(FIRST, nfe=nfe)
    loaded, facts = None, None
    if chosen.needs.prior:
        loaded, facts = load_with_facts(prior, precision, place, prior_config)
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
                        first,
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
                        corrections=corrections,
                        simulation=simulation,
                        also=also or [],
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


def offset_of(text: str | None) -> float | Literal["auto"] | None:
    """A detector's offset in mm as it is typed, or ``"auto"``.

    Raises
    ------
    ReconError
        If it is neither.
    """
    from recon.errors import ReconError

    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ReconError(f"--detector-offset is a number of mm or auto, not {text!r}") from None


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
