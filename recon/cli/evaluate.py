"""``recon evaluate``: the fastMRI metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    targets: Annotated[Path, typer.Argument(help="Fully sampled fastMRI file, or a folder of them.")],
    predictions: Annotated[
        Path, typer.Argument(help="Folder of reconstructions of the same names (or one file).")
    ],
    acquisition: Annotated[
        str | None, typer.Option(help="Only volumes of this sequence, such as CORPD_FBK.", metavar="NAME")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file as JSON too.", metavar="FILE")
    ] = None,
) -> None:
    """Score reconstructions as fastMRI does: NMSE, PSNR, SSIM of every volume.

    [bold]Examples[/bold]

        recon evaluate multicoil_val/ out/
        recon evaluate file1000001.h5 out/ --json scores.json

    The dataset 'reconstruction' of a file is compared with the target in the file
    of the same name: 'reconstruction_esc' where it has one (singlecoil), else
    'reconstruction_rss'. Both are cropped to a square of the target's width; PSNR
    and SSIM use the largest value of the target volume. Below the volumes stands
    their mean ± 2 std. These targets hold the noise of the measurement, added up over
    the coils: let recon mri --noise-floor add as much to its images.

    A target without a prediction is listed. If a volume cannot be scored, the
    exit status is 1.
    """
    import json

    from recon.cli.progress import progress_bar
    from recon.errors import ReconError
    from recon.evaluation import evaluate as evaluate_files

    with progress_bar("volumes") as bar:
        result = evaluate_files(
            targets,
            predictions,
            acquisition=acquisition,
            progress=lambda paths: bar.track(paths, description="scoring"),
        )
    if acquisition is not None and not (result.volumes or result.missing or result.failed):
        raise ReconError(f"{targets}: no volume there is of the acquisition {acquisition!r}")
    typer.echo(result.render(), nl=False)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ReconError(f"{json_file} cannot be written: {error.strerror}") from None
    if not result.ok:
        raise typer.Exit(1)
