"""``recon prior sample``: images that a prior makes of noise alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

# As `priors.sampling` knows them; written out here, so that --help need not load torch.
SAMPLERS = ("heun", "ddim", "ddpm", "predictor-corrector")

COLUMNS = 8
GAP = 4  # pixels between the images of a sheet
FORMATS = (".png", ".npy")


def sample(
    prior: Annotated[str, typer.Argument(help="A .safetensors file, or the name of a bundled prior.")],
    out: Annotated[
        list[Path],
        typer.Option(
            help="File to write, repeatable: .png for a sheet of magnitudes with the phases below them, "
            ".npy for the images themselves, (num, height, width). Of stacks, .png shows the middle slice, "
            ".npy holds all: (num, slices, height, width).",
            metavar="FILE",
        ),
    ],
    size: Annotated[str, typer.Option(help="Height and width in pixels.", metavar="HxW")] = "256x256",
    num: Annotated[int, typer.Option(help="Images to draw.")] = 4,
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.", metavar="NAME")] = "heun",
    steps: Annotated[
        int,
        typer.Option(
            help="Noise levels. heun and predictor-corrector evaluate the network twice at each, the others "
            "once; predictor-corrector wants hundreds."
        ),
    ] = 40,
    sigma_max: Annotated[
        float | None, typer.Option(help="First noise level.", show_default="the prior's largest")
    ] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="Last noise level.", show_default="the prior's smallest")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; image k depends on it and on k alone.")] = 0,
    precision: Annotated[str, typer.Option(help="Arithmetic of the network: fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Draw images from a prior: what it takes for likely, without any data.

    [bold]Examples[/bold]

        recon prior sample brain --out samples.png
        recon prior sample brain --num 16 --sampler ddpm --steps 200 --out s.npy --out s.png

    They show what a prior has learned, and what it has not. They are nobody's
    images, and are in the prior's units.
    """
    import time

    from priors.files import prior_hash, prior_path
    from priors.loading import load_prior
    from priors.sampling import sample_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import choose_device, make_folder, set_threads
    from recon.errors import ReconError

    height, sign, width = size.partition("x")
    if not (sign and height.isdecimal() and width.isdecimal()):
        raise ReconError(f"--size takes HEIGHTxWIDTH, such as 256x256, not {size!r}")
    for path in out:
        if path.suffix not in FORMATS:
            raise ReconError(f"{path}: samples are written as {' or '.join(FORMATS)}")
    set_threads(threads)
    place = choose_device(device)
    loaded = load_prior(prior, precision=precision, device=place)
    for path in out:
        make_folder(path.parent)
    started = time.monotonic()
    with progress_bar("steps") as bar:
        task = bar.add_task(f"sampling, {sampler}", total=None)
        images = sample_prior(
            loaded,
            (int(height), int(width)),
            num,
            sampler=sampler,
            steps=steps,
            seed=seed,
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            device=place,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        ).numpy()
    facts = (
        f"prior {loaded.contract.name}, SHA-256 {prior_hash(prior_path(prior))}, {precision}; {sampler}, "
        f"{steps} steps, seed {seed}"
    )
    for path in out:
        write_samples(path, images, facts)
    middle = ""
    if images.ndim == 4 and any(path.suffix == ".png" for path in out):
        middle = f" Of the {images.shape[1]} slices of each, .png shows the middle one."
    typer.echo(
        f"{num} image{'s' * (num != 1)} of {height} × {width} in {time.monotonic() - started:.0f} s, written "
        f"to {', '.join(map(str, out))}.{middle} Made of noise: nobody's images, not for diagnostic use."
    )


def write_samples(path: Path, images: np.ndarray, facts: str) -> None:
    """Write images ``(num, H, W)`` in the format that the name ends in, through a temporary file.

    Of stacks ``(num, slices, H, W)`` pictures show the middle slice.

    Raises
    ------
    ReconError
        If the file cannot be written.
    """
    import contextlib
    import uuid

    import numpy as np

    from recon.errors import ReconError

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            if path.suffix == ".npy":
                np.save(file, images)
            else:
                from matplotlib.image import imsave

                notes = {"Title": "Samples of a prior, not for diagnostic use", "Description": facts}
                shown = images if images.ndim == 3 else images[:, images.shape[1] // 2]
                imsave(file, contact_sheet(shown), format="png", metadata=notes)
        temporary.replace(path)
    except OSError as error:
        raise ReconError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):  # not there, or no folder to be in
            temporary.unlink()


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Tile magnitudes, and below each row of them, for complex images, their phases.

    All magnitudes share one window, from zero to the 99.8th percentile. The phase is a hue, as bright as the
    magnitude but never less than half where there is an object: that of air means nothing.

    Parameters
    ----------
    images : numpy.ndarray
        (num, H, W), complex or real.

    Returns
    -------
    numpy.ndarray
        (rows, columns, 3) uint8.
    """
    import numpy as np
    from matplotlib import colormaps

    num, height, width = images.shape
    magnitude = np.abs(images)
    peak = float(np.quantile(magnitude, 0.998)) or 1.0
    gray = np.clip(magnitude / peak, 0, 1)
    kinds = [np.repeat(gray[..., None], 3, axis=-1)]
    if np.iscomplexobj(images):
        hue = colormaps["twilight"](np.angle(images) / (2 * np.pi) + 0.5)[..., :3]
        kinds.append(hue * np.clip(gray / 0.05, 0, 1)[..., None])
    columns = min(num, COLUMNS)
    rows = -(-num // columns)
    sheet = np.zeros(
        (rows * len(kinds) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), dtype=np.uint8
    )
    for index in range(num):
        row, column = divmod(index, columns)
        for below, kind in enumerate(kinds):
            top, left = (row * len(kinds) + below) * (height + GAP), column * (width + GAP)
            sheet[top : top + height, left : left + width] = np.round(255 * kind[index])
    return sheet
