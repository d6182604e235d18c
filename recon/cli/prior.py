"""``recon prior``: train a prior, and measure one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recon.cli.sample import sample

prior_app = typer.Typer(
    help="Train score priors, measure how well they denoise, and sample them.", no_args_is_help=True
)
prior_app.command()(sample)


@prior_app.command()
def train(
    images: Annotated[list[Path], typer.Argument(help="NIfTI volumes, or folders of them, to train on.")],
    validation: Annotated[
        list[Path], typer.Option(help="The same, of other subjects, to validate on; repeatable.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the training: state, validation curve, prior.safetensors.")
    ],
    name: Annotated[str, typer.Option(help="Name of the prior, kept in its contract.")] = "prior",
    anatomy: Annotated[list[str] | None, typer.Option(help="What the images show; repeatable.")] = None,
    steps: Annotated[
        int, typer.Option(help="Training steps in all; more than stored goes on with a finished one.")
    ] = 12000,
    decay: Annotated[
        int | None,
        typer.Option(
            help="Steps over which the learning rate falls to zero at the end.",
            show_default="a quarter of the steps",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Patches a step.")] = 8,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the plateau.")] = 1e-3,
    initial: Annotated[
        str | None,
        typer.Option(help="Prior to start from, a file or a bundled name; gives the network's shape too."),
    ] = None,
    widths: Annotated[
        str, typer.Option(help="Feature channels at each resolution, finest first.")
    ] = "64,128,256",
    blocks: Annotated[int, typer.Option(help="Residual blocks at each resolution, down and up.")] = 1,
    unshuffle: Annotated[int, typer.Option(help="Factor of the pixel-unshuffle stem; 1 for none.")] = 2,
    precision: Annotated[str, typer.Option(help="Network arithmetic: fp32 or bf16.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train a complex prior on magnitude volumes by denoising score matching.

    [bold]Train, measure, use[/bold]

        recon prior train a/ b/ --validation c/ --anatomy brain --out runs/brain
        recon prior evaluate runs/brain/prior.safetensors d/
        recon mri scan.h5 --prior runs/brain/prior.safetensors --out out/

    [bold]Adapt the bundled prior to images of your own[/bold]

        recon prior train mine/ --validation others/ --initial brain --out runs/mine

    Patches are rotated, flipped, zoomed and re-contrasted, and given a smooth
    random phase. A training that was stopped, by Ctrl-C or by force, goes on from
    its last stored step when the same command is given again.
    """
    from dataclasses import replace

    from priors.files import load_prior, save_prior
    from priors.network import NetworkSettings
    from priors.training import TrainingSettings, prepare_slices
    from priors.training import train as train_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder
    from recon.errors import ReconError
    from recon.io.nifti import read_folder

    try:
        channels = tuple(int(width) for width in widths.split(","))
    except ValueError:
        raise ReconError(f"--widths takes integers with commas between them, got {widths!r}") from None
    start = None if initial is None else load_prior(initial)
    if start is None:
        network = NetworkSettings(widths=channels, blocks=blocks, unshuffle=unshuffle)
    else:
        network = start.network.settings
    settings = TrainingSettings(
        steps=steps,
        decay=steps // 4 if decay is None else decay,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
        network=network,
    )
    make_folder(out)
    slices = prepare_slices(read_folder(images), settings.level)
    held_out = prepare_slices(read_folder(validation), settings.level)
    typer.echo(f"{len(slices)} slices to train on, {len(held_out)} to validate on", err=True)
    with progress_bar("steps") as bar:
        task = bar.add_task("training", total=steps)
        smooth: float | None = None

        def show(step: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if smooth is None else smooth + 0.01 * (loss - smooth)
            bar.update(task, completed=step, description=f"training, loss {smooth:.3f}")

        trained = train_prior(slices, held_out, settings, out, show, start)
    trained.contract = replace(trained.contract, name=name, anatomy=tuple(anatomy or ()))
    facts = {
        "steps": steps,
        "batch": batch,
        "patch": patch,
        "seed": seed,
        "training_slices": len(slices),
        "validation_slices": len(held_out),
        "initial": initial or "",
    }
    save_prior(out / "prior.safetensors", trained, facts)
    typer.echo(f"written to {out / 'prior.safetensors'}")


@prior_app.command()
def evaluate(
    prior: Annotated[str, typer.Argument(help="A .safetensors file, or the name of a bundled prior.")],
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI volumes, or folders of them, the prior has not seen.")
    ],
    patches: Annotated[int, typer.Option(help="Number of patches.")] = 64,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of patches and noise.")] = 0,
) -> None:
    """Print how well a prior denoises: its PSNR at every noise level.

    [bold]Example[/bold]

        recon prior evaluate brain patient19/

    It is measured on complex patches made of magnitude volumes. Noise levels and
    errors are per real component, in the prior's units; PSNR is against a peak
    of 1.
    """
    import math

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.files import load_prior
    from priors.training import VALIDATION_SIGMAS, denoising_errors, prepare_slices, sample_patches
    from recon.errors import ReconError
    from recon.io.nifti import read_folder

    for name, value in (("--patches", patches), ("--patch", patch)):
        if value < 1:
            raise ReconError(f"{name} must be at least 1, got {value}")
    loaded = load_prior(prior)
    slices = prepare_slices(read_folder(images), loaded.contract.level)
    clean = sample_patches(slices, patches, patch, torch.Generator().manual_seed(seed))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("sigma", "noisy PSNR / dB", "denoised PSNR / dB", "rms error"):
        table.add_column(column, justify="right")
    for sigma, error in zip(
        VALIDATION_SIGMAS, denoising_errors(loaded, clean, VALIDATION_SIGMAS), strict=True
    ):
        # The error of a complex pixel has two components.
        noisy, denoised = (-20 * math.log10(math.sqrt(2) * value) for value in (sigma, error))
        table.add_row(f"{sigma:g}", f"{noisy:.2f}", f"{denoised:.2f}", f"{error:.5f}")
    Console(highlight=False).print(table)
