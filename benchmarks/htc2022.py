r"""Helsinki Tomography Challenge 2022: the five training objects from arcs of 90 to 30 degrees.

    python -m benchmarks.htc2022 --data FOLDER
    python -m benchmarks.htc2022 --data FOLDER --fit

The score is Matthews' correlation coefficient with the reference, as in the challenge. ``--fit`` prints the
detector's offset and the polynomial from line integrals to path lengths that `recon.htc2022` holds.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.beam_hardening import BeamHardeningCorrection
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.ct import CTSettings
from recon.errors import ReconError
from recon.htc2022 import Candidate, above_air, search, segmented
from recon.io.htc2022 import IMAGE_SHAPE, read_htc2022, read_htc2022_segmentation
from recon.metrics import matthews

OBJECTS = ("solid_disc", "ta", "tb", "tc", "td")
ARCS = (90, 80, 70, 60, 50, 40, 30)
TARGETS = {90: 0.985, 80: 0.98, 70: 0.975, 60: 0.97, 50: 0.965, 40: 0.95, 30: 0.93}
STARTS = (65, 185, 310)
"""Where the arcs begin, degrees. Settings were chosen at 20, 80, 100, 151 and 200; on these nothing was
tuned, but it was here that an unknown scale of path lengths was seen to matter."""

ROOT = Path(__file__).resolve().parents[1]

EDGE = 5  # pixels: the probabilities beside edges are what a reliability diagram is about

Row = dict[str, Any]


def files(folder: Path, name: str) -> tuple[Path, Path]:
    """Full scan and reference segmentation of an object."""
    return folder / f"htc2022_{name}_full.mat", folder / f"htc2022_{name}_full_recon_fbp_seg.mat"


def near_edges(reference: Tensor) -> Tensor:
    """Pixels within :data:`EDGE` of an edge of the reference, bool."""
    image = reference.float()[None, None]
    side = 2 * EDGE + 1
    high = torch.nn.functional.max_pool2d(image, side, 1, EDGE)
    low = -torch.nn.functional.max_pool2d(-image, side, 1, EDGE)
    return (high != low)[0, 0]


def fit(folder: Path, views: int = 36) -> tuple[float, BeamHardeningCorrection]:
    """Fit what `recon.htc2022` holds, on full scans and references.

    Returns
    -------
    float
        Detector offset in mm: where projections of the references have to be moved to lie on those measured,
        to first order, the mean over the objects.
    BeamHardeningCorrection
        Path length in mm of the line integral above air, with that offset.
    """
    offsets: list[float] = []
    for name in OBJECTS:
        measured, lengths, spacing = projections(folder, name, views, 0.0)
        error = BeamHardeningCorrection.fit(measured, lengths, degree=4)(measured) - lengths
        slope = (lengths[:, 2:] - lengths[:, :-2]) / (2 * spacing)
        offsets.append(-float((error[:, 1:-1] * slope).sum() / slope.square().sum()))
    offset = -sum(offsets) / len(offsets)
    pairs = [projections(folder, name, views, offset)[:2] for name in OBJECTS]
    measured, lengths = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return offset, BeamHardeningCorrection.fit(measured, lengths, degree=4)


def projections(folder: Path, name: str, views: int, offset: float) -> tuple[Tensor, Tensor, float]:
    """Line integrals above air, path lengths through the reference in mm, and the spacing of the detector."""
    scan_file, reference = files(folder, name)
    scan = read_htc2022(scan_file)
    assert isinstance(scan.geometry, FanBeam)
    assert scan.pixel_size is not None
    geometry = replace(scan.geometry, detector_offset=scan.geometry.detector_offset + offset)
    chosen = list(range(0, geometry.num_views, geometry.num_views // views))
    operator = CTOperator(geometry.subset(chosen), IMAGE_SHAPE, scan.pixel_size)
    lengths = operator(read_htc2022_segmentation(reference).float())
    return above_air(scan)[chosen], lengths, geometry.detector_spacing


def search_code() -> str:
    """Hash of the code that searches."""
    own = [ROOT / "recon" / "htc2022.py", ROOT / "recon" / "solvers" / "binary_dds.py"]
    files = [*sorted((ROOT / "operators").rglob("*.py")), *own]
    return hashlib.blake2b(b"".join(path.read_bytes() for path in files), digest_size=6).hexdigest()


def searched(
    folder: Path,
    prior: ScorePrior,
    identity: str,
    name: str,
    arc: int,
    start: int,
    count: int,
    cache: Path | None,
) -> tuple[list[Candidate], float]:
    """What the search finds, and its processor time; from the cache, if it has it.

    `identity` tells prior, precision and code from others.
    """
    kept = None if cache is None else cache / f"{name}_{arc}_{start}_{count}_{identity}.npz"
    if kept is not None and kept.exists():
        with np.load(kept) as file:
            images = torch.from_numpy(file["images"].astype(np.float32))
            return list(map(Candidate, images, file["misfits"].tolist())), float(file["seconds"])
    scan = read_htc2022(files(folder, name)[0])
    settings = CTSettings(arc=math.radians(arc), start=math.radians(start), num_samples=count)
    begun = time.process_time()
    found = search(scan, prior, settings=settings, key=name)
    seconds = time.process_time() - begun
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        images = torch.stack([candidate.image for candidate in found]).half()
        partial = kept.with_name(kept.name + ".part")
        with partial.open("wb") as file:
            np.savez(file, images=images, misfits=[candidate.misfit for candidate in found], seconds=seconds)
        partial.replace(kept)
    return found, seconds


def measure(folder: Path, found: Sequence[Candidate], name: str, arc: int) -> Row:
    """Score what was found for one object within one arc."""
    reference = read_htc2022_segmentation(files(folder, name)[1])
    made = segmented(found, math.radians(arc))
    near = near_edges(reference)
    # Counts of pixels and of material among them, by tenths of the probability.
    tenth = (made.probability[near] * 10).long().clamp_max(9)
    return {
        "mcc": matthews(made.segmentation.numpy(), reference.numpy()),
        "pixels": torch.bincount(tenth, minlength=10).tolist(),
        "material": torch.bincount(tenth, reference[near].double(), minlength=10).tolist(),
        "claimed": torch.bincount(tenth, made.probability[near].double(), minlength=10).tolist(),
        "misfit": made.residual,
    }


def run(
    folder: Path,
    prior: ScorePrior,
    identity: str,
    scans: Sequence[tuple[str, int, int]],
    count: int,
    cache: Path | None,
) -> Iterator[Row]:
    """Every scan: object, arc and start in degrees."""
    for name, arc, start in scans:
        found, seconds = searched(folder, prior, identity, name, arc, start, count, cache)
        yield {
            "name": name,
            "arc": arc,
            "start": start,
            "seconds": seconds,
            **measure(folder, found, name, arc),
        }


def chosen(arcs: Sequence[int], starts: Sequence[int], *, rotate: bool) -> list[tuple[str, int, int]]:
    """Scans to be scored: every start for every object and arc, or each of them at one, taken in turn."""
    scans = []
    for arc in arcs:
        for index, name in enumerate(OBJECTS):
            taken = [starts[(arc // 10 + index) % len(starts)]] if rotate else starts
            scans += [(name, arc, start) for start in taken]
    return scans


def table(rows: Sequence[Row]) -> str:
    """Markdown: the score of every object and arc, and the reliability of the probabilities."""
    arcs = list(dict.fromkeys(row["arc"] for row in rows))
    text = [
        "| arc | " + " | ".join(OBJECTS) + " | mean | aimed at | lowest |",
        "|---" * (len(OBJECTS) + 4) + "|",
    ]
    for arc in arcs:
        here = [row for row in rows if row["arc"] == arc]
        cells = []
        for name in OBJECTS:
            scores = [row["mcc"] for row in here if row["name"] == name]
            cells.append(f"{sum(scores) / len(scores):.4f}")
        scores = [row["mcc"] for row in here]
        mean = sum(scores) / len(scores)
        aim = TARGETS.get(arc)
        stars = "**" * (aim is not None and mean >= aim)
        text.append(
            f"| {arc}° | {' | '.join(cells)} | {stars}{mean:.4f}{stars} | {'–' if aim is None else aim} | "
            f"{min(scores):.4f} |"
        )
    text += ["", f"## Reliability within {EDGE} pixels of an edge", ""]
    text += [
        "| arc | " + " | ".join(f"{k / 10:.1f}–{(k + 1) / 10:.1f}" for k in range(10)) + " | expected error |"
    ]
    text.append("|---" * 12 + "|")
    for arc in (*arcs, None):
        here = [row for row in rows if arc in (row["arc"], None)]
        pixels, material, claimed = (
            [sum(row[key][k] for row in here) for k in range(10)] for key in ("pixels", "material", "claimed")
        )
        error = sum(abs(m - c) for m, c in zip(material, claimed, strict=True)) / sum(pixels)
        shares = [f"{m / n:.2f}" if n else "–" for m, n in zip(material, pixels, strict=True)]
        text.append(f"| {'all' if arc is None else f'{arc}°'} | {' | '.join(shares)} | {error:.3f} |")
    return "\n".join(text)


def main() -> None:
    """Read the command line, run, print and write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the training files")
    parser.add_argument("--fit", action="store_true", help="print the offset and the polynomial, and end")
    parser.add_argument("--prior", default="discs")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--arcs", type=int, nargs="+", default=list(ARCS))
    parser.add_argument("--starts", type=int, nargs="+", default=list(STARTS))
    parser.add_argument(
        "--rotate", action="store_true", help="each object and arc at one of the starts, in turn"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="candidates a round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what the searches find here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "htc2022.md")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if options.fit:
            print(*fit(options.data))
            return
        prior = load_prior(options.prior, precision=options.precision)
        digest = prior_hash(prior_path(options.prior))[:12]
        identity = f"{digest}_{options.precision}_{search_code()}"
        if options.cache is not None:
            print(f"kept as OBJECT_ARC_START_{options.num_samples}_{identity}.npz", file=sys.stderr)
        scans = chosen(options.arcs, options.starts, rotate=options.rotate)
        rows = []
        for row in run(options.data, prior, identity, scans, options.num_samples, options.cache):
            rows.append(row)
            print(
                f"{row['name']}, {row['arc']}° from {row['start']}°: {row['mcc']:.4f}, misfit "
                f"{row['misfit']:.2f}, {row['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    words = [word.rpartition("/")[2] if "/" in word else word for word in sys.argv[1:]]
    page = [
        "# Helsinki Tomography Challenge 2022",
        "",
        f"- date: {date.today().isoformat()}",
        f"- machine: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch",
        f"- command: `{shlex.join(['python', '-m', 'benchmarks.htc2022', *words])}`",
        f"- prior: {prior.contract.name}, SHA-256 {digest}…, {options.precision}; trained on synthetic discs",
        "- data: the five training objects, measured; arcs that begin at "
        f"{', '.join(str(start) for start in options.starts)} degrees"
        f"{', each object and arc at one of them' if options.rotate else ''}; "
        f"{options.num_samples} candidates a round",
        f"- {sum(row['seconds'] for row in rows) / len(rows):.0f} s of processor time a scan",
        "",
        "Matthews' correlation coefficient with the reference segmentation, mean over the starts:",
        "",
        table(rows),
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(page))
    print("\n".join(page))


if __name__ == "__main__":
    main()
