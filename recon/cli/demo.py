"""``recon demo``: real data with the bundled priors, k-space of a brain or projections of a disc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.", metavar="FOLDER")] = Path(
        "demo"
    ),
    ct: Annotated[
        bool, typer.Option("--ct", help="The disc, measured within 90 degrees, instead of the brain.")
    ] = False,
    acceleration: Annotated[
        float | None,
        typer.Option(help="Acceleration of the equispaced mask of the brain.", show_default="4"),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Posterior samples a slice.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Reconstruct the bundled example, and compare it with the truth.

    The example is some slices of a real brain (FLAIR) seen by simulated coils,
    with noise. The bundled prior was not trained on this person's images. What
    is written is what [bold]recon mri[/bold] writes, and a picture of every slice.

    With --ct it is a plexiglass disc with holes of the Helsinki Tomography
    Challenge 2022, measured within 90 degrees; the prior was trained on synthetic
    discs. What is written is what [bold]recon ct --challenge htc2022[/bold] writes.
    """
    from recon.errors import ReconError

    if not ct:
        demo_mri(out, 4.0 if acceleration is None else acceleration, num_samples, seed)
    elif acceleration is not None:
        raise ReconError("--acceleration belongs to the brain, not to --ct")
    else:
        demo_ct(out, num_samples, seed)


def demo_ct(out: Path, num_samples: int, seed: int) -> None:
    """Segment the measured disc, write the result and a picture, and print the score."""
    import time
    from importlib.resources import as_file, files

    from rich.console import Console

    from priors.files import prior_hash, prior_path
    from priors.loading import load_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder
    from recon.ct import CTSettings
    from recon.figures import segmentation_figure
    from recon.htc2022 import FIRST, segment_file
    from recon.io.matlab import read_variables
    from recon.io.segmentation import read_segmentation
    from recon.metrics import matthews

    path = prior_path("discs")
    prior = load_prior(path)
    make_folder(out)
    started = time.monotonic()
    with as_file(files("recon") / "data" / "demo_disc.mat") as source, progress_bar("samples") as bar:
        bar.console.print(f"Segmenting {source.name}, measured within 90 degrees: this takes some minutes.")
        task = bar.add_task("sampling", total=None)
        result = out / f"{source.stem}.h5"
        provenance = segment_file(
            source,
            result,
            prior,
            FIRST,
            CTSettings(num_samples=num_samples, seed=seed),
            prior_facts={"file": path.name, "sha256": prior_hash(path)},
            on_progress=lambda done, total: bar.update(
                task, completed=num_samples * done / total, total=num_samples
            ),
        )
        reference = read_variables(source)["reference"]
    segmentation, probability = read_segmentation(result)
    picture = segmentation_figure(out / f"{source.stem}.png", segmentation, probability, reference)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Matthews' correlation with the reference: {matthews(segmentation, reference):.4f}, from "
        f"{len(provenance['angles_degrees'])} views; {time.monotonic() - started:.0f} s."
    )
    for note in provenance["warnings"]:
        console.print(f"Note: {note}.")
    console.print(f"{result.name} and {picture.name} are in {out}. Not for diagnostic use.")


def demo_mri(out: Path, acceleration: float, num_samples: int, seed: int) -> None:
    """Reconstruct the brain, write results and pictures, and print a table."""
    import time
    from importlib.resources import as_file, files

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.files import prior_hash, prior_path
    from priors.loading import load_prior
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder, slice_figure
    from recon.metrics import nmse, psnr, ssim
    from recon.mri import MRISettings, SliceResult, reconstruct_file
    from recon.solvers.dds import DDS

    settings = MRISettings("equispaced", acceleration, num_samples=num_samples, seed=seed)
    path = prior_path("brain")
    prior = load_prior(path)
    make_folder(out)
    results: list[SliceResult] = []
    started = time.monotonic()
    with as_file(files("recon") / "data" / "demo_brain.h5") as source, progress_bar("slices") as bar:
        bar.console.print(f"Reconstructing {source.name}, the bundled example: this takes a minute or two.")
        task = bar.add_task("reconstructing", total=None)
        draw = slice_figure(out, source.stem)

        def finished(result: SliceResult) -> None:
            results.append(result)
            draw(result)

        provenance = reconstruct_file(
            source,
            out / source.name,
            prior,
            DDS(),
            settings,
            prior_facts={"file": path.name, "sha256": prior_hash(path)},
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            on_slice=finished,
        )
    truth = torch.stack([result.target for result in results if result.target is not None]).numpy()
    methods = {
        "zero-filled": torch.stack([result.zero_filled for result in results]).numpy(),
        f"DDS, mean of {num_samples}": torch.stack([result.mean for result in results]).numpy(),
    }
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("method", "PSNR (dB)", "SSIM", "NMSE"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, volume in methods.items():
        table.add_row(
            name, f"{psnr(truth, volume):.2f}", f"{ssim(truth, volume):.4f}", f"{nmse(truth, volume):.4f}"
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{len(results)} slices against their fully sampled RSS; equispaced mask of acceleration "
        f"{provenance['mask']['realised_acceleration']:.2f}; {time.monotonic() - started:.0f} s."
    )
    console.print("Processed magnitude images with simulated coils: easier than a scanner's data.")
    for note in provenance["warnings"]:
        console.print(f"Note: {note}.")
    console.print(f"Results and pictures are in {out}. Not for diagnostic use.")
