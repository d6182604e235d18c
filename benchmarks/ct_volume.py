r"""CT of a volume from few views, slice by slice and with slices held together, on a patient left out.

Contiguous slices are scanned on pixels half as wide as those reconstructed, with photon noise, and
reconstructed from what was counted::

    python -m benchmarks.ct_volume --data chest_hu.h5 --series Lung_Dx-A0001_3 --slices 30 45 \
        --cache runs/ct_volume

What each method made of each scan is kept with ``--cache``: an interrupted run resumes, and measures are
computed anew. The images of a method are known by its settings; empty the folder after a change to its code.
Writes a Markdown page and a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ct_cases import (
    FINENESS,
    SOURCE_DETECTOR,
    SOURCE_ORIGIN,
    Scan,
    read_series,
    scanned,
    source_of,
)
from benchmarks.ct_quality import PHOTONS, Cache, Solved
from operators.attenuation import MU_WATER
from operators.ct import CTOperator
from operators.ct_volume import SliceStack
from operators.errors import OperatorError
from priors.base import ScorePrior
from priors.ct_images import HU_OUTSIDE
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.ct import CTProblem, CTSettings, ct_problem, in_units
from recon.errors import ReconError
from recon.metrics import psnr
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.adjacent_slices import AdjacentSlices
from recon.solvers.base import Solver, settings_of
from recon.solvers.dds import DDS
from recon.solvers.dds_3d import DDS3D
from recon.solvers.diffusion_mbir import DiffusionMBIR
from recon.solvers.perpendicular import Perpendicular

APART = "DDS, slice by slice"
"""What the others are compared with."""

METHODS: dict[str, tuple[str, Solver]] = {
    "dds": (APART, DDS.ct()),
    "dds-3d": ("DDS-3D", DDS3D.ct()),
    "adjacent-slices": ("adjacent slices", AdjacentSlices.ct()),
    "perpendicular": ("perpendicular", Perpendicular.ct()),
    "diffusion-mbir-apart": ("DiffusionMBIR, λ = 0", DiffusionMBIR(lam=0.0)),
    "diffusion-mbir": ("DiffusionMBIR", DiffusionMBIR()),
}
"""Name on the command line -> what a table calls it, and the solver."""

STRIPE_SIZE = 10.0
"""Standard deviation in mm of the window over which stripes are averaged in plane."""

WINDOW, ERROR_WINDOW = (-1000.0, 300.0), 150.0
"""Of the picture, HU: of volumes, and the largest error."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Contiguous slices of a patient, HU.

    Attributes
    ----------
    name : str
        Series and slices.
    source : str
        Series and licence.
    fine : Tensor
        What is scanned, ``(D, 2H, 2W)``, float32.
    pixel_size, spacing : float
        Of the pixels that are reconstructed, and of the slices, mm.
    """

    name: str
    source: str
    fine: Tensor
    pixel_size: float
    spacing: float

    @cached_property
    def truth(self) -> np.ndarray:
        """Means of 2 × 2 pixels ``(D, H, W)``, float64."""
        return F.avg_pool2d(self.fine.double(), FINENESS).numpy()

    @cached_property
    def data_range(self) -> float:
        """Largest minus smallest value of the truth, HU."""
        return float(np.ptp(self.truth))

    @cached_property
    def digest(self) -> str:
        """Hash of what is scanned and its pixel size."""
        content = self.fine.numpy().tobytes() + repr((self.pixel_size, self.spacing)).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_volume(path: Path, series: str, first: int, last: int, size: int | None = None) -> Volume:
    """Read slices of a series.

    Parameters
    ----------
    path, series
        File, and name of the series in it.
    first, last
        Slices, both included.
    size
        Pixels a side that are to be reconstructed; half of those of the series if not given.

    Raises
    ------
    ReconError
        Naming the file and the series, if there is none, it does not say how large its pixels are and where
        its slices, they are not square or not evenly spaced, or there are no such slices.
    """
    volume, pixel = read_series(path, series)
    where = f"{path}: {volume.name}"
    if not 0 <= first < last < len(volume.hu):
        raise ReconError(f"{where}: there are no slices {first} to {last}, the series has {len(volume.hu)}")
    if volume.z is None:
        raise ReconError(f"{where}: it does not say where its slices are")
    steps = np.diff(volume.z[first : last + 1])
    if not np.allclose(steps, steps[0], rtol=1e-3):
        raise ReconError(f"{where}: its slices are not evenly spaced")
    side = volume.hu.shape[-1]
    wanted = FINENESS * (side // FINENESS if size is None else size)
    if volume.hu.shape[-2] != side or side % wanted:
        raise ReconError(f"{where}: {wanted} × {wanted} pixels cannot be made of {tuple(volume.hu.shape)}")
    hu = volume.hu[first : last + 1].clamp_min(HU_OUTSIDE)  # what scanners write outside of their field
    return Volume(
        f"slices {first} to {last}",
        source_of(volume),
        F.avg_pool2d(hu, side // wanted).contiguous(),
        pixel * side / wanted * FINENESS,
        abs(float(steps[0])),
    )


def simulate(volume: Volume, scan: Scan, photons: float, seed: int = 0) -> tuple[Tensor, CTOperator]:
    """Line integrals ``(D, views, detectors)`` with photon noise, and the operator of a slice."""
    made = scanned(volume.fine, volume.pixel_size, scan, photons, f"{seed}/{volume.name}")
    return made.sinogram, made.operator


@dataclass(frozen=True, eq=False)
class Task:
    """A scan to be reconstructed; it is simulated when something asks for its data."""

    volume: Volume
    scan: Scan
    photons: float = PHOTONS
    seed: int = 0
    device: str = "cpu"

    @property
    def settings(self) -> CTSettings:
        """What `recon.ct` is told: the number of photons, and that images are wanted in HU."""
        return CTSettings(photons=self.photons, units="HU")

    @cached_property
    def measurement(self) -> tuple[Tensor, SliceStack]:
        """The simulated scan, and the operator of the volume."""
        sinogram, operator = simulate(self.volume, self.scan, self.photons, self.seed)
        stack = SliceStack(operator, len(sinogram))
        stack.to(self.device)
        return sinogram.to(self.device), stack

    @cached_property
    def weighted(self) -> CTProblem:
        """Data weighted by their noise, images in units of water."""
        return ct_problem(*self.measurement, self.settings)

    @cached_property
    def unweighted(self) -> CTProblem:
        """All data as if they had the mean noise."""
        return ct_problem(*self.measurement, self.settings, weighted=False)

    def solve(self, solver: Solver, prior: ScorePrior, num_samples: int) -> Solved:
        """Posterior samples of the volume."""
        problem = self.unweighted if solver.needs.equal_weights else self.weighted
        begun = time.process_time()
        posterior = reconstruct(
            problem.y,
            problem.operator,
            prior,
            solver,
            num_samples,
            self.seed,
            noise_std=problem.noise_std,
            scale=Scale(1.0),
            key=f"{self.volume.name}/{self.scan}",
            keep_samples=True,
        )
        seconds = (time.process_time() - begun) / num_samples
        return Solved.of(in_units(posterior, self.settings), "", seconds)


# -- measures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What one volume is worth.

    Attributes
    ----------
    psnr : float
        Mean over the slices, dB, with the range of the truth as the peak.
    along_z : float
        Root mean square error of the differences between neighbouring slices, HU.
    stripes : float
        The same of slices averaged over a window of `STRIPE_SIZE`: what shows as stripes across the axis.
    step : float
        Root mean square of the differences between neighbouring slices, HU.
    """

    psnr: float
    along_z: float
    stripes: float
    step: float


def measure(volume: Volume, image: np.ndarray) -> Measures:
    """Hold a volume ``(D, H, W)`` in HU against the truth."""
    from scipy.ndimage import gaussian_filter

    image = image.astype(np.float64)
    error = image - volume.truth
    radius = STRIPE_SIZE / volume.pixel_size
    coarse = gaussian_filter(error, (0, radius, radius))

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x))))

    return Measures(
        psnr=float(
            np.mean(
                [psnr(t[None], x[None], volume.data_range) for t, x in zip(volume.truth, image, strict=True)]
            )
        ),
        along_z=rms(np.diff(error, axis=0)),
        stripes=rms(np.diff(coarse, axis=0)),
        step=rms(np.diff(image, axis=0)),
    )


@dataclass(frozen=True, eq=False)
class Row:
    """One volume of one scan: what a table calls it, where it is from, and what it is worth."""

    scan: Scan
    name: str
    kind: str
    image: np.ndarray
    solved: Solved
    measures: Measures


def run(
    volume: Volume,
    scans: Sequence[Scan],
    methods: Sequence[str],
    prior: ScorePrior,
    digest: str,
    *,
    num_samples: int = 1,
    photons: float = PHOTONS,
    seed: int = 0,
    device: str = "cpu",
    cache: Cache | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Reconstruct every scan with every method, and measure the volumes."""
    cache = Cache(None) if cache is None else cache
    rows = []
    for scan in scans:
        task = Task(volume, scan, photons, seed, device)
        shape = (volume.truth.shape[1], volume.truth.shape[2])
        for method in methods:
            name, solver = METHODS[method]
            what = {
                "volume": [volume.name, volume.digest],
                "scan": asdict(scan),
                "geometry": scan.geometry(shape, volume.pixel_size).hash(),
                "photons": photons,
                "seed": seed,
                "solver": settings_of(solver),
                "weighted": not solver.needs.equal_weights,
                "samples": num_samples,
                "prior": digest,
            }
            try:
                solved = cache.solved(
                    what,
                    lambda s=solver, t=task: t.solve(s, prior, num_samples),  # type: ignore[misc]
                )
            except (OperatorError, PriorError, ReconError) as error:
                raise ReconError(f"{scan.beam}, {scan.name}, {name}: {error}") from None
            kinds = {"sample": solved.sample} | ({"mean": solved.mean} if num_samples > 1 else {})
            for kind, image in kinds.items():
                rows.append(Row(scan, name, kind, image, solved, measure(volume, image)))
                on_row(rows[-1])
    return rows


# -- the page ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Measures of every row, and how they compare with slice by slice."""
    text = [
        "| scan | method | image | PSNR in plane / dB | RMSE along z / HU | stripes / HU | NFE | time / s |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        m, apart = row.measures, _apart(rows, row)
        cells = [f"{m.psnr:.2f}", f"{m.along_z:.1f}", f"{m.stripes:.1f}"]
        if apart is not None and row.name != APART:
            cells[0] += f" ({m.psnr - apart.psnr:+.2f})"
            cells[1] += f" ({m.along_z / apart.along_z - 1:+.0%})"
            cells[2] += f" ({m.stripes / apart.stripes - 1:+.0%})"
        where = [f"{row.scan.beam}, {row.scan.name}", row.name, row.kind]
        text.append(
            "| " + " | ".join([*where, *cells, str(row.solved.nfe), f"{row.solved.seconds:.0f}"]) + " |"
        )
    return "\n".join(text)


def _apart(rows: Sequence[Row], row: Row) -> Measures | None:
    """Measures of the same scan and kind of image, slice by slice."""
    return next((r.measures for r in rows if (r.scan, r.kind, r.name) == (row.scan, row.kind, APART)), None)


def verdicts(rows: Sequence[Row]) -> str:
    """Say of each method whether it errs less along z, shows no more stripes, and costs less than 0.2 dB."""
    text = []
    for name in dict.fromkeys(row.name for row in rows if row.name != APART):
        pairs = [(row.measures, _apart(rows, row)) for row in rows if row.name == name]
        known = [(m, apart) for m, apart in pairs if apart is not None]
        if not known:
            continue
        better = sum(m.along_z < apart.along_z for m, apart in known)
        plain = sum(m.stripes <= apart.stripes for m, apart in known)
        kept = sum(m.psnr > apart.psnr - 0.2 for m, apart in known)
        text.append(
            f"- {name}: the error along z is below that of slice by slice in {better} of {len(known)} "
            f"comparisons, stripes are no stronger in {plain}, and less than 0.2 dB is lost in plane in "
            f"{kept}."
        )
    return "\n".join(text)


def report(
    rows: Sequence[Row], volume: Volume, *, command: str, prior: str, photons: float, picture: str
) -> str:
    """Make the whole page."""
    depth, height, width = volume.truth.shape
    change = float(np.sqrt(np.mean(np.square(np.diff(volume.truth, axis=0)))))
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch",
        "command": f"`{command}`",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "dis-recon")),
        "prior": f"{prior}. It knows axial slices; `perpendicular` asks the same one for coronal slices too, "
        "although voxels are no cubes",
        "data": f"{volume.source}, {volume.name}: {depth} × {height} × {width} voxels of "
        f"{volume.spacing:.3g} × {volume.pixel_size:.3f} × {volume.pixel_size:.3f} mm are "
        f"reconstructed. Neighbouring slices of the truth differ by {change:.0f} HU, root mean square",
        "scans": f"simulated on {height * FINENESS} × {width * FINENESS} pixels, {photons:.3g} photons an "
        f"element through air, water {MU_WATER} /mm; fan beam over a whole turn, {SOURCE_ORIGIN:g} mm from "
        f"source to axis, {SOURCE_DETECTOR:g} mm to a curved detector; all slices see the same views",
        "methods": "the setting for CT (`ct`) of those that have one, the defaults of DiffusionMBIR; chosen "
        "on other patients (docs/what-matters.md), but for the two weights of DiffusionMBIR, which were "
        "chosen on this one. Data are weighted by their noise, but for DiffusionMBIR, which steps along the "
        "gradient and is given data of equal weight",
    }
    return "\n".join(
        [
            "# CT of a volume from few views",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            f"![Coronal slices and their errors]({picture})",
            "",
            "PSNR: mean over the slices, the peak is the range of the truth "
            f"({volume.data_range:.0f} HU). RMSE along z: of the differences between neighbouring slices. "
            f"Stripes: the same after averaging in plane over a Gaussian window of {STRIPE_SIZE:g} mm. In "
            "parentheses: against slice by slice. NFE: network evaluations of a slice; time: processor time "
            "of a sample of the volume.",
            "",
            table(rows),
            "",
            verdicts(rows),
            "",
        ]
    )


def figure(rows: Sequence[Row], volume: Volume, path: Path) -> None:
    """Draw a coronal slice of the first scan's samples, and its error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.scan == rows[0].scan and row.kind == "sample"]
    depth, height, width = volume.truth.shape
    across = height // 2
    aspect = volume.spacing / volume.pixel_size
    panel_height = 3.6 * depth * aspect / width
    drawing = Figure(figsize=(7.6, (panel_height + 0.25) * (1 + len(shown)) + 0.3), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(1 + len(shown), 2, squeeze=False)
    truth = volume.truth[:, across]
    axes = [panel for line in grid for panel in line]
    look = {"aspect": aspect, "interpolation": "nearest"}
    axes[0].imshow(truth, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], **look)
    axes[0].set_title(f"truth, {WINDOW[0]:g} to {WINDOW[1]:g} HU", fontsize=8)
    drawing.suptitle(f"{shown[0].scan.beam} beam, {shown[0].scan.name}", fontsize=9)
    for row, (left, right) in zip(shown, grid[1:], strict=True):
        image = row.image[:, across]
        left.imshow(image, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], **look)
        left.set_title(f"{row.name}, {row.measures.psnr:.1f} dB", fontsize=8)
        right.imshow(image - truth, cmap="RdBu_r", vmin=-ERROR_WINDOW, vmax=ERROR_WINDOW, **look)
        right.set_title(f"error, ±{ERROR_WINDOW:g} HU; {row.measures.along_z:.1f} HU along z", fontsize=8)
    for panel in axes:
        panel.set_axis_off()
    drawing.savefig(path, dpi=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ct_volume",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="CT series in HU, HDF5")
    parser.add_argument("--series", required=True, metavar="NAME", help="the series of the file")
    parser.add_argument(
        "--slices", type=int, nargs=2, default=(30, 45), metavar=("FIRST", "LAST"), help="both included"
    )
    parser.add_argument("--size", type=int, help="pixels a side; default: half of those of the series")
    parser.add_argument("--views", type=int, nargs="+", default=(60, 30), metavar="N")
    parser.add_argument("--photons", type=float, default=PHOTONS, help="of an element through air")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument(
        "--prior", default="chest", help="prior: a .safetensors file, or the name of a bundled one"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--num-samples", type=int, default=1, help="samples of each, which are averaged")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the samples")
    parser.add_argument("--device", default="cpu", help="where to reconstruct")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the reconstructions here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ct_volume.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, print and write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def show(row: Row) -> None:
        m = row.measures
        print(
            f"{row.scan.beam}, {row.scan.name}, {row.name}, {row.kind}: {m.psnr:.2f} dB, {m.along_z:.1f} HU "
            "along z",
            file=sys.stderr,
            flush=True,
        )

    try:
        prior = load_prior(options.prior, precision=options.precision, device=options.device)
        digest = f"{prior_hash(prior_path(options.prior))} {options.precision}"
        first, last = options.slices
        volume = read_volume(options.data, options.series, first, last, options.size)
        rows = run(
            volume,
            [Scan("fan", views) for views in options.views],
            options.methods,
            prior,
            digest,
            num_samples=options.num_samples,
            photons=options.photons,
            seed=options.seed,
            device=options.device,
            cache=Cache(options.cache),
            on_row=show,
        )
    except (OperatorError, PriorError, ReconError) as error:
        sys.exit(f"error: {error}")
    # Where files lie on this machine is nobody's concern.
    command = shlex.join(
        ["python", "-m", "benchmarks.ct_volume", *(w.rpartition("/")[2] if "/" in w else w for w in words)]
    )
    picture = options.out.with_suffix(".png")
    page = report(
        rows,
        volume,
        command=command,
        prior=f"{prior.contract.name}, SHA-256 {digest[:12]}…, {options.precision}",
        photons=options.photons,
        picture=picture.name,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, volume, picture)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(options.out)
    print(page)


if __name__ == "__main__":
    main()
