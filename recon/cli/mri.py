"""``recon mri``: fastMRI files in, reconstructions with their uncertainty out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def mri(
    files: Annotated[list[Path], typer.Argument(help="fastMRI HDF5 files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, one <same name>.h5 each.")],
    mask: Annotated[
        str | None,
        typer.Option(
            help="Undersample fully sampled data: random, equispaced, equispaced-fraction, magic, gaussian-1d, "
            "gaussian-2d, uniform-2d or poisson. Left out: use the data as acquired."
        ),
    ] = None,
    acceleration: Annotated[float, typer.Option(help="Acceleration of that mask; the realised one is reported.")] = 4.0,
    center_fraction: Annotated[
        float | None, typer.Option(help="Share of columns in the fully sampled centre; 0.08 at ×4, 0.04 at ×8.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Posterior samples a slice. Time is proportional to it.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples' noise.")] = 0,
    prior: Annotated[str, typer.Option(help="Prior: a .safetensors file, or the name of a bundled one.")] = "brain",
    nfe: Annotated[int | None, typer.Option(help="Network evaluations a sample.")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Constant weight of the data term; left out, it follows the noise level.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Share of fresh noise in a step, 0 to 1.")] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="Noise of k-space per real component; left out, it is estimated.")
    ] = None,
    coils: Annotated[int | None, typer.Option(help="Compress to this many virtual coils first.")] = None,
    anatomy: Annotated[
        str | None, typer.Option(help="What the images show (brain, knee, ...), if the file does not say it.")
    ] = None,
    keep_samples: Annotated[bool, typer.Option("--keep-samples", help="Write every sample too.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Write a picture of every slice, <name>_<slice>.png.")] = False,
    precision: Annotated[str, typer.Option(help="Network arithmetic: fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; the last bits of a result depend on it.")] = None,
) -> None:
    """Reconstruct fastMRI files: posterior mean and standard deviation of every slice.

    [bold]Fully sampled data, 4x undersampled by recon:[/bold]

        recon mri file1000001.h5 --mask equispaced --acceleration 4 --num-samples 8 --seed 1 --out out/

    [bold]Data that were acquired undersampled[/bold] (with the dataset 'mask', or columns of zeros):

        recon mri multicoil_test/ --out out/

    The noise level, the coil maps, the scale of the prior and the weight of the data are found from the acquired data.
    A bad file does not stop the others; it is reported at the end, and the exit status is then 1.
    """
    from dataclasses import replace

    import torch

    from priors.errors import PriorError
    from priors.files import load_prior, prior_hash, prior_path
    from recon.cli.progress import progress_bar
    from recon.cli.run import collect_files, make_folder, slice_figure
    from recon.errors import ReconError
    from recon.mri import MRISettings, reconstruct_file
    from recon.solvers.dds import DDS

    settings = MRISettings(
        mask=mask,
        acceleration=acceleration,
        center_fraction=center_fraction,
        num_samples=num_samples,
        seed=seed,
        noise_std=noise_std,
        num_coils=coils,
        keep_samples=keep_samples,
        anatomy=anatomy,
    )
    chosen = {"nfe": nfe, "gamma": gamma, "eta": eta}
    solver = replace(DDS(), **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    if threads is not None:
        if threads < 1:
            raise ReconError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ReconError(f"there is no device {device!r} here")
    loaded = load_prior(prior, precision=precision, device=device)
    facts = {"file": prior_path(prior).name, "sha256": prior_hash(prior_path(prior)), "precision": precision}
    sources = collect_files(files)
    make_folder(out)

    failed: list[str] = []
    with progress_bar() as bar:
        for source in sources:
            task = bar.add_task(source.name, total=None)
            try:
                provenance = reconstruct_file(
                    source,
                    out / f"{source.stem}.h5",
                    loaded,
                    solver,
                    settings,
                    prior_facts=facts,
                    device=device,
                    on_progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                    on_slice=slice_figure(out, source.stem) if figures else None,
                )
            except (ReconError, PriorError, OSError) as error:
                failed.append(str(error) if str(source) in str(error) else f"{source}: {error}")
                bar.remove_task(task)
                continue
            bar.console.print(
                f"{source.name}: mask {provenance['mask']['name']}, realised acceleration "
                f"{provenance['mask']['realised_acceleration']:.2f}, {len(provenance['slices'])} slices",
                highlight=False,
            )
            for note in provenance["warnings"]:
                bar.console.print(f"  note: {note}", highlight=False, markup=False)
    for sentence in failed:
        typer.echo(f"Error: {sentence}", err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(sources)} files could not be reconstructed", err=True)
        raise typer.Exit(1)
