"""``recon mri``: fastMRI files in, reconstructions with their uncertainty out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from recon.mri import SliceResult

# As `operators.make_mask` knows them; written out here, so that --help need not load torch.
MASK_KINDS = (
    "random",
    "equispaced",
    "equispaced-fraction",
    "magic",
    "gaussian-1d",
    "gaussian-2d",
    "uniform-2d",
    "poisson",
)

_UNDERSAMPLING = "Undersampling of fully sampled data"
_DATA = "What is known about the data (all of it is found from the data if not given)"


def mri(
    files: Annotated[list[Path], typer.Argument(help="fastMRI HDF5 files, or folders of them.")],
    out: Out,
    keep_samples: KeepSamples = False,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures", help="Write a picture of every slice, <name>_<slice>.png.", rich_help_panel=OUTPUT
        ),
    ] = False,
    posterior_figures: Annotated[
        bool,
        typer.Option(
            "--posterior-figures",
            help="Write a second picture of every slice, <name>_<slice>_posterior.png: samples, and what of "
            "the mean was measured and what the prior filled in.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    summary: Annotated[
        bool,
        typer.Option(
            "--summary",
            help="Write <name>.json: how sure the result is, where it is not, and whether to check it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    mask: Annotated[
        str | None,
        typer.Option(
            help=f"Kind of mask: {', '.join(MASK_KINDS)}. Its seed is the file's name. "
            "Left out, the data are used as acquired.",
            rich_help_panel=_UNDERSAMPLING,
            metavar="KIND",
        ),
    ] = None,
    acceleration: Annotated[
        float | None,
        typer.Option(
            help="Acceleration asked of the mask; the realised one is reported.",
            rich_help_panel=_UNDERSAMPLING,
            show_default="4",
        ),
    ] = None,
    center_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the columns in the fully sampled centre, on which the coil maps are calibrated.",
            rich_help_panel=_UNDERSAMPLING,
            show_default="0.32 / acceleration; 0.12 of each side for 2-D masks",
        ),
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option(
            help="Samples a slice. Their mean is the image, their spread the uncertainty. "
            "Time grows in proportion.",
            rich_help_panel=SAMPLING,
        ),
    ] = 8,
    seed: Seed = 0,
    prior: Annotated[
        str,
        typer.Option(
            help="What images look like: the name of a bundled prior, a .safetensors file (recon prior train "
            "makes one), or a checkpoint of other code (recon prior inspect says which).",
            rich_help_panel=SAMPLING,
        ),
    ] = "brain",
    prior_config: PriorConfig = None,
    nfe: NumEvaluations = None,
    solver: Annotated[
        str,
        typer.Option(
            help="Method; recon solvers lists them with their settings. NAME:PRESET takes a published "
            "setting, such as dds:paper.",
            rich_help_panel=SAMPLING,
            metavar="NAME",
        ),
    ] = "dds",
    settings: SolverSettings = None,
    coil_by_coil: Annotated[
        bool,
        typer.Option(
            "--coil-by-coil",
            help="Reconstruct every coil on its own, without coil maps, and combine by root sum of squares.",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration of the standard deviation (recon calibrate learns one): a .json file, or the "
            "name of one beside the prior.",
            rich_help_panel=SAMPLING,
            metavar="NAME",
        ),
    ] = None,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor",
            help="Add to the images what noise adds to a root sum of squares, as fastMRI's targets have it: "
            "for recon evaluate, not for reading.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    noise_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise of k-space, per real component, in its units.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    anatomy: Annotated[
        str | None,
        typer.Option(
            help="What the images show: brain, knee, ... A prior that does not know it warns.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    num_coils: Annotated[
        int | None,
        typer.Option(
            help="Compress to this many virtual coils first: faster, at some loss. Left out, all are kept.",
            rich_help_panel=COMPUTER,
        ),
    ] = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Reconstruct fastMRI files: posterior mean and standard deviation.

    [bold]Fully sampled data[/bold], 4× undersampled first:

        recon mri file1000001.h5 --mask equispaced --acceleration 4 --out out/
        recon evaluate file1000001.h5 out/

    [bold]Data acquired undersampled[/bold] (with a dataset 'mask', or zeros where nothing was
    measured):

        recon mri multicoil_test/ --out out/

    Coil maps, noise level, scale and the weight of the data are found from the
    acquired data alone. The result holds the datasets 'reconstruction' and
    'reconstruction_std', (slices, h, w) in the units of the data, and in the
    attribute 'provenance' how they were made.

    A bad file does not stop the others: it is reported at the end, and the exit
    status is then 1.
    """
    import time

    from priors.files import prior_path
    from recon.calibration import Calibration, calibration_path
    from recon.cli.progress import progress_bar
    from recon.cli.run import (
        FILE_ERRORS,
        choose_device,
        close_run,
        collect_files,
        describe_failure,
        load_with_facts,
        make_folder,
        posterior_picture,
        set_threads,
        slice_figure,
        solver_of,
        write_json,
    )
    from recon.errors import ReconError
    from recon.mri import MRISettings, reconstruct_file
    from recon.summary import summarise_volume

    if mask is None and (acceleration is not None or center_fraction is not None):
        raise ReconError(
            "--acceleration and --center-fraction belong to --mask, which says how to undersample the data"
        )
    if mask is not None and mask not in MASK_KINDS:
        raise ReconError(f"unknown mask kind {mask!r}: the kinds are {', '.join(MASK_KINDS)}")
    chosen = solver_of(solver, settings or [], nfe)
    calibrated = None
    if calibration is not None:
        calibrated = Calibration.load(
            calibration_path(calibration, prior_path(prior) if chosen.needs.prior else None)
        )
    asked = MRISettings(
        mask=mask,
        acceleration=4.0 if acceleration is None else acceleration,
        center_fraction=center_fraction,
        num_samples=num_samples,
        seed=seed,
        noise_std=noise_std,
        num_coils=num_coils,
        keep_samples=keep_samples,
        anatomy=anatomy,
        coil_by_coil=coil_by_coil,
        calibration=calibrated,
        split=posterior_figures,
        noise_floor=noise_floor,
    )
    set_threads(threads)
    place = choose_device(device)
    loaded, facts = None, None
    if chosen.needs.prior:
        loaded, facts = load_with_facts(prior, precision, place, prior_config)
    sources = collect_files(files)
    make_folder(out)

    failed: list[str] = []
    notes: dict[str, list[str]] = {}
    with progress_bar("slices") as bar:
        for number, source in enumerate(sources):
            started = time.monotonic()
            position = f" ({number + 1} of {len(sources)})" if len(sources) > 1 else ""
            task = bar.add_task(source.name + position, total=None)
            draw = [slice_figure(out, source.stem)] if figures else []
            draw += [posterior_picture(out, source.stem)] if posterior_figures else []
            found: dict[int, dict[str, Any]] = {}

            def finished(
                result: SliceResult,
                draw: list[Callable[[SliceResult], None]] = draw,
                found: dict[int, dict[str, Any]] = found,
            ) -> None:
                found[result.index] = result.summary
                for picture in draw:
                    picture(result)

            try:
                provenance = reconstruct_file(
                    source,
                    out / f"{source.stem}.h5",
                    loaded,
                    chosen,
                    asked,
                    prior_facts=facts,
                    device=place,
                    on_progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                    on_slice=finished if draw or summary else None,
                )
                if summary:
                    write_json(out / f"{source.stem}.json", summarise_volume(found))
            except FILE_ERRORS as error:
                failed.append(describe_failure(source, error))
                continue
            finally:
                bar.remove_task(task)
            sampling, slices = provenance["mask"], provenance["slices"]
            bar.console.print(
                f"{source.name}: {len(slices)} slice{'s' * (len(slices) != 1)}, {sampling['name']} mask of "
                f"acceleration {sampling['realised_acceleration']:.2f}, {time.monotonic() - started:.0f} s"
            )
            for note in provenance["warnings"]:
                notes.setdefault(note, []).append(source.name)
    close_run(len(sources), out, notes, failed)
