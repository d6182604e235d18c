"""``recon prior``: train a prior, and measure one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recon.cli.sample import sample

if TYPE_CHECKING:
    from priors.training import ImageSource, TrainingSettings

prior_app = typer.Typer(
    help="Train score priors, measure how well they denoise, and sample them.", no_args_is_help=True
)
prior_app.command()(sample)


class Kind(StrEnum):
    """What a prior's images are."""

    mr = "mr"
    ct = "ct"
    discs = "discs"


_UNITS = {"level": Kind.mr, "water": Kind.ct, "object": Kind.discs}
"""Kind of the images that a prior of a unit knows."""


@prior_app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="Folder of the training: state, validation curve, prior.safetensors.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What to train on: see below. None for discs, which are made.", show_default=False
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="The same, of other subjects, to validate on; repeatable.", show_default=False),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What the images are.")] = Kind.mr,
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
        str | None,
        typer.Option(
            help="Feature channels at each resolution, finest first.",
            show_default="64,128,256; discs 48,96,160,192",
        ),
    ] = None,
    blocks: Annotated[int, typer.Option(help="Residual blocks at each resolution, down and up.")] = 1,
    unshuffle: Annotated[int, typer.Option(help="Factor of the pixel-unshuffle stem; 1 for none.")] = 2,
    precision: Annotated[str, typer.Option(help="Network arithmetic: fp32 or bf16.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train a prior by denoising score matching.

    [bold]--kind mr[/bold]: complex images, from magnitude volumes in NIfTI files or in folders
    of them. Patches are rotated, flipped, zoomed and re-contrasted, and given a
    smooth random phase.

    [bold]--kind ct[/bold]: images in units of water, from HDF5 files of series in HU, a group
    each. FILE.h5/NAME is one series of a file, or all series of one patient.
    Slices are averaged over 2 x 2 pixels; patches are flipped, rotated and zoomed.

    [bold]--kind discs[/bold]: synthetic discs with holes, as in the Helsinki Tomography
    Challenge 2022, whole images at a time.

    [bold]Train, measure, use[/bold]

        recon prior train a/ b/ --validation c/ --anatomy brain --out runs/brain
        recon prior evaluate runs/brain/prior.safetensors d/
        recon mri scan.h5 --prior runs/brain/prior.safetensors --out out/

        recon prior train hu.h5/A hu.h5/B --validation hu.h5/C --kind ct --out runs/chest
        recon prior train --kind discs --out runs/discs

    [bold]Adapt the bundled prior to images of your own[/bold]

        recon prior train mine/ --validation others/ --initial brain --out runs/mine

    A training that was stopped, by Ctrl-C or by force, goes on from its last stored
    step when the same command is given again.
    """
    from dataclasses import replace

    from priors.files import load_prior, save_prior
    from priors.training import train as train_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder
    from recon.errors import ReconError

    defaults = _settings(kind)
    start = None if initial is None else load_prior(initial)
    if start is None:
        try:
            channels = defaults.network.widths if widths is None else tuple(map(int, widths.split(",")))
        except ValueError:
            raise ReconError(f"--widths takes integers with commas between them, got {widths!r}") from None
        network = replace(defaults.network, widths=channels, blocks=blocks, unshuffle=unshuffle)
    else:
        own = defaults.network
        network = replace(start.network.settings, channels=own.channels, sigma_data=own.sigma_data)
    settings = replace(
        defaults,
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
    learned, held_out = _source(kind, images), _source(kind, validation, option="--validation", seed=1)
    noun = "discs" if kind is Kind.discs else "slices"
    typer.echo(f"{len(learned)} {noun} to train on, {len(held_out)} to validate on", err=True)
    with progress_bar("steps") as bar:
        task = bar.add_task("training", total=steps)
        smooth: float | None = None

        def show(step: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if smooth is None else smooth + 0.01 * (loss - smooth)
            bar.update(task, completed=step, description=f"training, loss {smooth:.3f}")

        trained = train_prior(learned, held_out, settings, out, show, start)
    trained.contract = replace(trained.contract, name=name, anatomy=tuple(anatomy or ()))
    facts = {
        "steps": steps,
        "batch": batch,
        "patch": patch,
        "seed": seed,
        "kind": kind.value,
        "training_images": len(learned),
        "validation_images": len(held_out),
        "initial": initial or "",
    }
    save_prior(out / "prior.safetensors", trained, facts)
    typer.echo(f"written to {out / 'prior.safetensors'}")


@prior_app.command()
def evaluate(
    prior: Annotated[str, typer.Argument(help="A .safetensors file, or the name of a bundled prior.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Images the prior has not seen, as for `recon prior train`.", show_default=False),
    ] = None,
    patches: Annotated[int, typer.Option(help="Number of patches.")] = 64,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of patches and noise.")] = 0,
) -> None:
    """Print how well a prior denoises: its PSNR at every noise level.

    [bold]Example[/bold]

        recon prior evaluate brain patient19/

    It is measured on patches as a prior is trained on them: complex ones made of
    magnitude volumes, CT ones in units of water, or whole discs. Noise levels and
    errors are per real component, in the prior's units; PSNR is against a peak of
    1, for CT the step from air to water.
    """
    import math

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.files import load_prior
    from priors.training import VALIDATION_SIGMAS, denoising_errors
    from recon.errors import ReconError

    for name, value in (("--patches", patches), ("--patch", patch)):
        if value < 1:
            raise ReconError(f"{name} must be at least 1, got {value}")
    loaded = load_prior(prior)
    contract = loaded.contract
    source = _source(_UNITS[contract.unit], images, level=contract.level, seed=2)
    clean = source.draw(patches, patch, torch.Generator().manual_seed(seed))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("sigma", "noisy PSNR / dB", "denoised PSNR / dB", "rms error"):
        table.add_column(column, justify="right")
    for sigma, error in zip(
        VALIDATION_SIGMAS, denoising_errors(loaded, clean, VALIDATION_SIGMAS), strict=True
    ):
        # The error of a complex pixel has two components.
        components = math.sqrt(contract.num_channels)
        noisy, denoised = (-20 * math.log10(components * value) for value in (sigma, error))
        table.add_row(f"{sigma:g}", f"{noisy:.2f}", f"{denoised:.2f}", f"{error:.5f}")
    Console(highlight=False).print(table)


def _settings(kind: Kind) -> TrainingSettings:
    """Settings of a kind of images, but for what is asked for on the command line."""
    if kind is Kind.ct:
        from priors.ct_images import CT_SETTINGS

        return CT_SETTINGS
    if kind is Kind.discs:
        from priors.disc_images import DISC_SETTINGS

        return DISC_SETTINGS
    from priors.mr_images import MR_SETTINGS

    return MR_SETTINGS


def _source(
    kind: Kind, paths: list[Path] | None, *, option: str = "IMAGES", level: float | None = None, seed: int = 0
) -> ImageSource:
    """Images of a kind from files, or discs of a seed."""
    from recon.errors import ReconError

    if kind is Kind.discs:
        from priors.disc_images import DiscImages

        if paths:
            raise ReconError(f"discs are made, not read: {option} {paths[0]} has no use with them")
        return DiscImages(seed=seed)
    if not paths:
        raise ReconError(f"{option} is missing: no files of {kind.value.upper()} images were given")
    if kind is Kind.ct:
        from priors.ct_images import CTImages
        from recon.io.hu_volumes import read_hu_volumes

        return CTImages([volume.hu for path in paths for volume in read_hu_volumes(path)])
    from priors.mr_images import MRImages, prepare_slices
    from recon.io.nifti import read_folder

    return MRImages(prepare_slices(read_folder(paths), _settings(kind).level if level is None else level))
