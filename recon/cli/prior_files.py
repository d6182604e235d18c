"""``recon prior inspect`` and ``convert``: look at checkpoints of other code, and make them our own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from priors.base import Contract, ScorePrior

_CONTRACT = "What the prior was made for (left out, what its file says)"

Source = Annotated[
    str,
    typer.Argument(
        metavar="PRIOR",
        help="A checkpoint of other code, a folder of diffusers, a .safetensors file, or the name of a "
        "bundled prior.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with the arguments of the network's constructor, as far as the checkpoint does not "
        "tell them.",
        metavar="FILE",
    ),
]
NoEMA = Annotated[
    bool, typer.Option("--no-ema", help="Take the weights of the last step, not the averaged ones.")
]


def convert(
    source: Source,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", metavar="FILE")],
    config: Config = None,
    no_ema: NoEMA = False,
    name: Annotated[
        str | None, typer.Option(help="Name, kept with every result.", rich_help_panel=_CONTRACT)
    ] = None,
    anatomy: Annotated[
        list[str] | None,
        typer.Option(
            help="What the training images show: brain, knee, ...; repeatable.", rich_help_panel=_CONTRACT
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="What the numbers in an image mean: level, water or object.", rich_help_panel=_CONTRACT
        ),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="Level of a typical training image.", rich_help_panel=_CONTRACT)
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="complex, real or rgb.", rich_help_panel=_CONTRACT)
    ] = None,
    slices: Annotated[
        int | None, typer.Option(help="Neighbouring slices seen at once.", rich_help_panel=_CONTRACT)
    ] = None,
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="What the network calls the values 0 and 1 of our images, such as -1 1.",
            rich_help_panel=_CONTRACT,
            metavar="LOW HIGH",
        ),
    ] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="Smallest noise level it is used at.", rich_help_panel=_CONTRACT)
    ] = None,
    sigma_max: Annotated[
        float | None, typer.Option(help="Largest noise level it is used at.", rich_help_panel=_CONTRACT)
    ] = None,
) -> None:
    """Write a prior of other code as a file of this project.

    [bold]Example[/bold]

        recon prior convert checkpoint_95.pth --name knee --anatomy knee --out knee.safetensors
        recon mri scan.h5 --prior knee.safetensors --out out/

    The new file needs no --config, holds one set of weights, and gives to the last
    bit what the checkpoint gives. No code from the checkpoint is run.
    """
    from priors.files import prior_hash, prior_path, save_prior
    from priors.loading import load_prior
    from recon.cli.run import make_folder
    from recon.errors import ReconError

    if out.suffix != ".safetensors":
        raise ReconError(f"{out}: a prior is a .safetensors file")
    given = {
        "name": name,
        "anatomy": tuple(anatomy) if anatomy else None,
        "unit": unit,
        "level": level,
        "channels": channels,
        "slices": slices,
        "value_range": value_range,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    path = prior_path(source)
    loaded = load_prior(path, config=config, ema=not no_ema, **overrides)
    make_folder(out.parent)
    facts = {"converted_from": path.name, "sha256": prior_hash(path), "ema": not no_ema}
    save_prior(out, loaded, {**_training_facts(path), **facts})
    typer.echo(f"{layout(loaded)}, {_count(loaded)}: written to {out}")


def inspect(
    source: Source,
    config: Config = None,
    no_ema: NoEMA = False,
    image: Annotated[
        Path | None,
        typer.Option(
            help="An image like those the prior was trained on, for the checks that need one: .npy, .png, "
            ".nii or .nii.gz, whose middle slice is taken.",
            metavar="FILE",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise of the checks.")] = 0,
) -> None:
    """Say what a prior's file holds, and check that it denoises.

    [bold]Examples[/bold]

        recon prior inspect brain
        recon prior inspect checkpoint_95.pth --config constructor.json --image knee.npy

    No code from the file is run. The exit status is 1 if the check fails.
    """
    from priors.check import check_prior
    from priors.loading import load_prior

    loaded = load_prior(source, config=config, ema=not no_ema)
    contract = loaded.contract
    pattern = None if image is None else read_image(image, contract)
    for key, value in describe(loaded):
        typer.echo(f"{key:<14}{value}")
    typer.echo("")
    outcome = check_prior(loaded, pattern, seed=seed)
    typer.echo(f"check: {outcome}")
    if not outcome.passed:
        raise typer.Exit(1)


def describe(prior: ScorePrior) -> list[tuple[str, str]]:
    """Facts about a loaded prior, with their names."""
    contract = prior.contract
    values = contract.as_dict()
    table = values.pop("error_table")
    facts = [("layout", layout(prior)), ("parameters", f"{_count(prior)}")]
    low, high = values.pop("sigma_min"), values.pop("sigma_max")
    facts.append(("noise levels", f"{low:g} to {high:g}, per real component"))
    words = {"anatomy": ", ".join(values["anatomy"]) or "unknown"}
    words["value_range"] = "{:g} to {:g}".format(*values["value_range"])
    facts += [(key.replace("_", " "), words.get(key, str(value))) for key, value in values.items()]
    facts.append(("error table", f"{len(table)} levels" if table else "none"))
    return facts


def layout(prior: ScorePrior) -> str:
    """Family of checkpoints that a prior's network is of."""
    return "the project's own network" if prior.origin is None else str(prior.origin.family)


def _count(prior: ScorePrior) -> str:
    return f"{sum(parameter.numel() for parameter in prior.parameters()):,} parameters"


def _training_facts(path: Path) -> dict[str, Any]:
    """Facts that the source keeps about its training, if it is a file of this project."""
    from priors.errors import PriorError
    from priors.files import read_header

    try:
        return dict(read_header(path)["training"])
    except PriorError:
        return {}


def read_image(path: Path, contract: Contract) -> Tensor:
    """Read an image, in the units of a prior's images.

    Magnitude images are brought to the level of a prior whose images have one, and made complex for a
    complex prior; images in a physical unit are taken as they are.

    Returns
    -------
    Tensor
        ``(H, W)``, complex64 or float32; the same ``slices`` times for a prior on stacks.

    Raises
    ------
    ReconError
        If there is no such image.
    """
    import numpy as np
    import torch

    from priors.level import image_level
    from recon.errors import ReconError

    try:
        if path.suffix == ".npy":
            from recon.io.numpy_files import load_array

            values = load_array(path)
        elif path.suffix == ".png":
            from matplotlib.image import imread

            values = imread(path)
            values = values[..., :3].mean(-1) if values.ndim == 3 else values
        elif path.name.endswith((".nii", ".nii.gz")):
            from recon.io.nifti import read_volume

            volume = read_volume(path)
            values = volume[len(volume) // 2].numpy()
        else:
            raise ReconError(f"{path}: an image is a .npy, .png, .nii or .nii.gz file")
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is what a broken PNG raises
        if isinstance(error, ReconError):
            raise
        raise ReconError(f"{path} cannot be read as an image: {error}") from None
    if values.ndim != 2 or values.dtype.kind not in "iufc" or 0 in values.shape:
        raise ReconError(f"{path} holds {values.dtype} of shape {values.shape}; an image is (H, W), numbers")
    if not np.isfinite(values).all():
        raise ReconError(f"{path} holds values that are not finite")
    found = torch.from_numpy(values.astype(np.complex64 if values.dtype.kind == "c" else np.float32))
    if contract.unit == "level":
        level = float(image_level(found))
        if not level > 0:
            raise ReconError(f"{path} is empty: all its values are zero")
        found = found * (contract.level / level)
    found = found.to(torch.complex64) if contract.complex_images else found
    return found if contract.slices == 1 else found.expand(contract.slices, -1, -1)
