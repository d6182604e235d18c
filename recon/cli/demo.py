"""``recon demo``: real anatomy from undersampled multi-coil k-space with the bundled prior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.", metavar="FOLDER")] = Path("demo"),
    acceleration: Annotated[float, typer.Option(help="Acceleration of the equispaced mask.")] = 4.0,
    num_samples: Annotated[int, typer.Option(help="Posterior samples a slice.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples' noise.")] = 0,
) -> None:
    """Reconstruct the bundled example, and compare it with the truth.

    The example is some slices of a real brain (FLAIR) seen by simulated coils, with noise. No bundled prior was
    trained on this person's images. What is written is what recon mri writes, with a picture of every slice.
    """
    import time
    from importlib.resources import as_file, files

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from priors.files import load_prior, prior_hash, prior_path
    from recon.cli.progress import progress_bar
    from recon.cli.run import make_folder, slice_figure
    from recon.metrics import METRICS
    from recon.mri import MRISettings, SliceResult, reconstruct_file
    from recon.solvers.dds import DDS

    make_folder(out)
    settings = MRISettings("equispaced", acceleration, num_samples=num_samples, seed=seed)
    results: list[SliceResult] = []
    started = time.monotonic()
    with as_file(files("recon") / "data" / "demo_brain.h5") as source, progress_bar("slices") as bar:
        draw = slice_figure(out, source.stem)
        task = bar.add_task("reconstructing", total=1)

        def finished(result: SliceResult) -> None:
            results.append(result)
            draw(result)

        provenance = reconstruct_file(
            source,
            out / source.name,
            load_prior("brain"),
            DDS(),
            settings,
            prior_facts={"file": "brain.safetensors", "sha256": prior_hash(prior_path("brain"))},
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            on_slice=finished,
        )
    truth = torch.stack([result.target for result in results if result.target is not None]).numpy()
    methods = {
        "zero-filled": torch.stack([result.zero_filled for result in results]).numpy(),
        f"DDS, mean of {num_samples}": torch.stack([result.mean for result in results]).numpy(),
    }
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{len(results)} slices, against the fully sampled RSS", title_style=""
    )
    for column in ("method", *METRICS):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, volume in methods.items():
        table.add_row(name, *(f"{metric(truth, volume):.4g}" for metric in METRICS.values()))
    console = Console(highlight=False)
    console.print(table)
    mask = provenance["mask"]
    console.print(
        f"equispaced mask, realised acceleration {mask['realised_acceleration']:.2f}; "
        f"{time.monotonic() - started:.0f} s. Processed magnitude images with simulated coils: easier than a scanner's data."
    )
    console.print(f"Results and pictures are in {out}/. Not for diagnostic use.")
