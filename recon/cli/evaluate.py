"""``recon evaluate``: the fastMRI metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    targets: Annotated[Path, typer.Argument(help="Fully sampled fastMRI file, or a folder of them.")],
    predictions: Annotated[Path, typer.Argument(help="Folder of reconstructions of the same names (or one file).")],
    acquisition: Annotated[str | None, typer.Option(help="Only volumes of this sequence, such as CORPD_FBK.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON too.")] = None,
) -> None:
    """Score reconstructions as fastMRI does: NMSE, PSNR and SSIM of each volume, then mean ± 2 std.

        recon evaluate multicoil_val/ out/

    Both images are cropped to the target's size; PSNR and SSIM use the largest value of the target volume.
    """
    import json

    from recon.cli.progress import progress_bar
    from recon.errors import ReconError
    from recon.evaluation import evaluate as evaluate_files

    with progress_bar() as bar:
        result = evaluate_files(
            targets, predictions, acquisition=acquisition, progress=lambda paths: bar.track(paths, description="volumes")
        )
    typer.echo(result.render(), nl=False)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ReconError(f"{json_file} cannot be written: {error.strerror}") from None
    if not result.ok:
        raise typer.Exit(1)
