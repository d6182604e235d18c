"""``recon prior``: train a prior, measure, draw from, inspect and convert one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recon.cli.options import Device
from recon.cli.prior_files import convert, inspect
from recon.cli.sample import sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from priors.network import NetworkPrior
    from priors.training import ImageSource, TrainingSettings

prior_app = typer.Typer(
    help="Train score priors, measure how well they denoise, sample them, and take over those of other code.",
    no_args_is_help=True,
)
prior_app.command()(sample)
prior_app.command()(inspect)
prior_app.command()(convert)


class Kind(StrEnum):
    """What a prior's images are."""

    mr = "mr"
    ct = "ct"
    discs = "discs"
    images = "images"


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
        typer.Option(
            help="The same, of other subjects, to validate on; repeatable.",
            show_default="one subject in ten",
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What the images are.")] = Kind.mr,
    channels: Annotated[
        str | None,
        typer.Option(
            help="What the prior's images are: real or complex.", show_default="complex for mr, else real"
        ),
    ] = None,
    slices: Annotated[int, typer.Option(help="Neighbouring slices that the prior sees at once.")] = 1,
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
    batch: Annotated[int, typer.Option(help="Patches a step, of each process.")] = 8,
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
    memory: Annotated[
        float, typer.Option(help="GiB that images in memory may take; if there are more, they take turns.")
    ] = 4.0,
    device: Device = "cpu",
) -> None:
    """Train a prior by denoising score matching.

    Files are given by name or by folder: NIfTI, DICOM series, NumPy's .npy and
    .npz, TIFF, PNG, JPEG (the pictures of a folder are the slices of a volume), and
    fully sampled fastMRI files, whose coils are combined into complex images.

    [bold]--kind mr[/bold]: MR images. Patches are rotated, flipped and zoomed. Magnitudes are
    re-contrasted and, for a complex prior, given a smooth random phase; complex
    images keep their own.

    [bold]--kind ct[/bold]: images in units of water, from files in HU: DICOM, NIfTI, NumPy, or
    HDF5 with a group a series, FILE.h5/NAME being one series or all of a patient.
    Slices are averaged over 2 x 2 pixels; patches are flipped, rotated and zoomed.

    [bold]--kind images[/bold]: anything else. Patches are cut out and mirrored, no more.

    [bold]--kind discs[/bold]: synthetic discs with holes, as in the Helsinki Tomography
    Challenge 2022, whole images at a time.

    Without --validation, one subject in ten is held out. Subjects are DICOM's
    patients, or the folders (or files) in which all that was given parts; patients
    that lie in such a folder beside other formats are of its subject.

    [bold]Train, measure, use[/bold]

        recon prior train a/ b/ --validation c/ --anatomy brain --out runs/brain
        recon prior evaluate runs/brain/prior.safetensors d/
        recon mri scan.h5 --prior runs/brain/prior.safetensors --out out/

        recon prior train hu.h5/A hu.h5/B --validation hu.h5/C --kind ct --out runs/chest
        recon prior train --kind discs --out runs/discs

    [bold]Adapt the bundled prior to images of your own[/bold]

        recon prior train mine/ --validation others/ --initial brain --out runs/mine

    [bold]Several GPUs[/bold]

        torchrun --no-python --nproc-per-node 4 recon prior train ... --device cuda

    A training that was stopped, by Ctrl-C or by force, goes on from its last stored
    step when the same command is given again, --steps, --decay, --precision,
    --memory, --device and --name being as you like; another command's training is
    refused. OUT/curve.png and OUT/pictures show how it is getting on.
    """
    from dataclasses import replace

    from priors.files import prior_path, save_prior
    from priors.loading import load_prior
    from priors.network import NetworkPrior
    from priors.training import train as train_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder
    from recon.errors import ReconError
    from recon.training_sources import kind_settings

    defaults = kind_settings(kind, channels, slices)
    start = None if initial is None else load_prior(initial)
    if start is None:
        try:
            features = defaults.network.widths if widths is None else tuple(map(int, widths.split(",")))
        except ValueError:
            raise ReconError(f"--widths takes integers with commas between them, got {widths!r}") from None
        network = replace(defaults.network, widths=features, blocks=blocks, unshuffle=unshuffle)
    elif not isinstance(start, NetworkPrior):
        raise ReconError(f"{initial}: a training starts from a prior of this project's own network only")
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
    with _processes(device) as (first, place):
        if first:
            make_folder(out)
        found = _open(kind, settings, images, validation, memory, seed)
        noun = "discs" if kind is Kind.discs else "slices" if slices == 1 else f"stacks of {slices} slices"
        if first:
            for note in found.notes:
                typer.echo(note, err=True)
            counts = f"{len(found.learned)} {noun} to train on, {len(found.held_out)} to validate on"
            typer.echo(counts, err=True)
        with progress_bar("steps") as bar:
            bar.disable |= not first
            task = bar.add_task("training", total=steps)
            smooth: float | None = None

            def show(step: int, loss: float) -> None:
                nonlocal smooth
                smooth = loss if smooth is None else smooth + 0.01 * (loss - smooth)
                bar.update(task, completed=step, description=f"training, loss {smooth:.3f}")

            trained = train_prior(
                found.learned,
                found.held_out,
                settings,
                out,
                show,
                start,
                on_validation=lambda step, prior, clean: _draw(out, step, prior, clean),
                facts={
                    "kind": kind.value,
                    "anatomy": ", ".join(anatomy or ()) or "none",
                    "initial": "none" if initial is None else prior_path(initial).name,
                    **found.facts,
                },
                device=place,
            )
        if not first:
            return
        trained.contract = replace(trained.contract, name=name, anatomy=tuple(anatomy or ()))
        facts = {
            "steps": steps,
            "batch": batch,
            "patch": patch,
            "seed": seed,
            "kind": kind.value,
            "training_images": len(found.learned),
            "validation_images": len(found.held_out),
            "initial": initial or "",
        }
        save_prior(out / "prior.safetensors", trained, facts)
        for problem in found.problems():
            typer.echo(f"Not used: {problem}", err=True)
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
    kind: Annotated[
        Kind | None, typer.Option(help="What the images are.", show_default="told by the prior's unit")
    ] = None,
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
    from dataclasses import replace

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.loading import load_prior
    from priors.training import VALIDATION_SIGMAS, denoising_errors
    from recon.errors import ReconError
    from recon.training_sources import kind_settings

    for name, value in (("--patches", patches), ("--patch", patch)):
        if value < 1:
            raise ReconError(f"{name} must be at least 1, got {value}")
    loaded = load_prior(prior)
    contract = loaded.contract
    told = _UNITS[contract.unit] if kind is None else kind
    unit = kind_settings(told).unit
    if unit != contract.unit:
        raise ReconError(
            f"images of kind {told.value} are in the unit {unit!r}, but prior {contract.name!r} "
            f"knows those in {contract.unit!r}"
        )
    settings = kind_settings(told, "complex" if contract.complex_images else "real", contract.slices)
    settings = replace(settings, level=contract.level)
    source, problems = _source(told, settings, images)
    clean = source.draw(patches, patch, torch.Generator().manual_seed(seed))
    for problem in problems():
        typer.echo(f"Not used: {problem}", err=True)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("sigma", "noisy PSNR / dB", "denoised PSNR / dB", "rms error"):
        table.add_column(column, justify="right")
    for sigma, error in zip(
        VALIDATION_SIGMAS, denoising_errors(loaded, clean, VALIDATION_SIGMAS), strict=True
    ):
        # The error of a complex pixel has two components.
        components = math.sqrt(2 if contract.complex_images else 1)
        noisy, denoised = (-20 * math.log10(components * value) for value in (sigma, error))
        table.add_row(f"{sigma:g}", f"{noisy:.2f}", f"{denoised:.2f}", f"{error:.5f}")
    Console(highlight=False).print(table)


@dataclass(frozen=True)
class _Found:
    """Images of a training."""

    learned: ImageSource
    held_out: ImageSource
    notes: list[str]
    problems: Callable[[], list[str]]
    facts: dict[str, str]


def _open(
    kind: Kind,
    settings: TrainingSettings,
    images: list[Path] | None,
    validation: list[Path] | None,
    memory: float,
    seed: int,
) -> _Found:
    """Find the images of a training, and those to validate on, which may have to be parted from them."""
    from recon.errors import ReconError
    from recon.image_folders import describe_volumes
    from recon.training_sources import GIB, FileImages

    if kind is Kind.discs:
        learned, _ = _source(kind, settings, images)
        held_out, _ = _source(kind, settings, validation, option="--validation", seed=1)
        return _Found(learned, held_out, [], list, {})
    _require(kind, images, "IMAGES")
    if not memory > 0:
        raise ReconError(f"--memory must be positive, got {memory:g}")
    files = FileImages(kind, settings, memory * GIB, seed)
    own, notes = files.find(images or []), []
    if validation:
        other = files.find(validation)
    else:
        own, other, sentence = files.split(own)
        notes.append(sentence)
    learned, note = files.source(own)
    held_out, _ = files.source(other)
    facts = {
        "training_images": describe_volumes(own, images or []),
        "validation_images": describe_volumes(other, validation or images or []),
    }
    notes += [note] if note is not None else []
    return _Found(learned, held_out, notes, lambda: files.problems, facts)


def _source(
    kind: Kind,
    settings: TrainingSettings,
    paths: list[Path] | None,
    *,
    option: str = "IMAGES",
    seed: int = 0,
) -> tuple[ImageSource, Callable[[], list[str]]]:
    """Images of a kind from files, or discs of a seed; and what could not be used, once they were drawn."""
    from recon.errors import ReconError

    if kind is Kind.discs:
        from priors.disc_images import DiscImages

        if paths:
            raise ReconError(f"discs are made, not read: {option} {paths[0]} has no use with them")
        return DiscImages(seed=seed), list
    _require(kind, paths, option)
    from recon.training_sources import FileImages

    files = FileImages(kind, settings, float("inf"))
    source, _ = files.source(files.find(paths or []))
    return source, lambda: files.problems


def _require(kind: Kind, paths: list[Path] | None, option: str) -> None:
    """Raise if no files were given."""
    from recon.errors import ReconError

    if not paths:
        what = "images" if kind is Kind.images else f"{kind.value.upper()} images"
        raise ReconError(f"{option} is missing: no files of {what} were given")


@contextmanager
def _processes(device: str) -> Iterator[tuple[bool, torch.device]]:
    """Join the processes that torchrun started, if any: is this the first, and where does it compute."""
    import torch.distributed as distributed

    from recon.cli.run import choose_device

    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together and device == "cuda":  # each process of a machine has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = choose_device(device)
    if not together:
        yield True, place
        return
    if place.type == "cuda":
        import torch

        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank() == 0, place
    finally:
        distributed.destroy_process_group()


def _draw(out: Path, step: int, prior: NetworkPrior, clean: Tensor) -> None:
    """Draw the curve so far, and what the prior does to validation images."""
    from priors.training import VALIDATION_SIGMAS, read_curve
    from recon.training_figures import curve_figure, training_figure

    curve_figure(out / "curve.png", read_curve(out / "curve.jsonl"), VALIDATION_SIGMAS)
    training_figure(out / "pictures" / f"step_{step:06d}.png", prior, clean, title=f"step {step}")
