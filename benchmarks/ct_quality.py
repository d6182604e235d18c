r"""Bias, resolution, noise and low contrast of CT from few views or a limited arc, on a patient left out.

Slices get discs planted, are scanned on pixels half as wide as those reconstructed, with photon noise, and
reconstructed from what was counted::

    python -m benchmarks.ct_quality --data chest_hu.h5 --series Lung_Dx-A0001_3 --slices 24 34 \
        --cache runs/ct_quality

What each method made of each scan is kept with ``--cache``: an interrupted run resumes, and measures are
computed anew. The images of a method are known by its settings; empty the folder after a change to its code.
Writes a Markdown page and a picture. PSNR, SSIM and their like are the business of
``python -m benchmarks benchmarks/ct.yaml``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.classical import best, climb
from benchmarks.ct_cases import (
    EDGE_CONTRAST,
    EDGE_RADIUS,
    INSERT_RADIUS,
    LUNG,
    SOFT,
    SOURCE_DETECTOR,
    SOURCE_ORIGIN,
    Case,
    Measurement,
    Scan,
    read_cases,
    simulate,
)
from benchmarks.ct_measures import (
    NPS_SIDE,
    RING,
    THRESHOLD,
    Detection,
    bias,
    detect,
    edge_mtf,
    first_below,
    noise_texture,
)
from operators.attenuation import MU_WATER
from operators.errors import OperatorError
from operators.filtered_backprojection import FILTERS
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.ct import CTProblem, CTSettings, ct_problem, in_units
from recon.errors import ReconError
from recon.metrics import psnr
from recon.posterior import Posterior
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.base import Problem, Solver, settings_of
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS
from recon.solvers.filtered_backprojection import FilteredBackprojection
from recon.solvers.score_ald import ScoreALD
from recon.solvers.score_mri import ScoreMRI
from recon.solvers.total_variation import TotalVariation

VIEWS, ARCS = (60, 30, 18, 8), (120, 90)
BEAMS = ("parallel", "fan")
PHOTONS = 2e5
TV_ITERATIONS = 1000
"""Primal-dual steps. With noise weights few are not enough: some decibels are gained after the first 200."""

CLASSICAL = ("FBP", "TV")
DIFFUSION: dict[str, Solver] = {
    "DDS": DDS.ct(),
    "DPS": DPS(),
    "Score-ALD": ScoreALD(),
    "Score-MRI": ScoreMRI(),
}
METHODS = (*CLASSICAL, *DIFFUSION)

WINDOW = (-500.0, 300.0)
"""Of the picture, HU."""

PICTURED = 4
"""Scans in the picture."""


def scans(beams: Sequence[str], views: Sequence[int], arcs: Sequence[int]) -> list[Scan]:
    """Sparse views, and arcs with one view a degree, of every beam."""
    return [
        scan
        for beam in beams
        for scan in (*(Scan(beam, n) for n in views), *(Scan(beam, arc, float(arc)) for arc in arcs))
    ]


# -- reconstructions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """A scan to be reconstructed; it is simulated when something asks for its data.

    Attributes
    ----------
    case, scan : Case, Scan
        What is scanned, and how.
    photons : float
        Photons an element through air, which methods know.
    seed : int
        Of the noise of the scan and of the samples.
    device : str
        Where to reconstruct.
    """

    case: Case
    scan: Scan
    photons: float = PHOTONS
    seed: int = 0
    device: str = "cpu"

    @cached_property
    def measurement(self) -> Measurement:
        """The simulated scan."""
        return simulate(self.case, self.scan, self.photons, self.seed)

    @property
    def settings(self) -> CTSettings:
        """What `recon.ct` is told: the number of photons, and that images are wanted in HU."""
        return CTSettings(photons=self.photons, units="HU")

    @cached_property
    def weighted(self) -> CTProblem:
        """Data weighted by their noise, images in units of water."""
        return self._problem(weighted=True)

    @cached_property
    def unweighted(self) -> CTProblem:
        """All data as if they had the mean noise."""
        return self._problem(weighted=False)

    def prepare(self) -> None:
        """Simulate the scan and bring its data to both weightings, so that no method is charged with that."""
        _ = self.weighted, self.unweighted

    def _problem(self, weighted: bool) -> CTProblem:
        made = self.measurement
        found = ct_problem(made.sinogram, made.operator, self.settings, weighted=weighted)
        return replace(found, y=found.y.to(self.device), operator=found.operator.to(self.device))

    def reconstruct(self, solver: Solver, prior: ScorePrior | None = None, num_samples: int = 1) -> Posterior:
        """Reconstruct, in HU; what images are worth in attenuation is known and not estimated."""
        problem = self.unweighted if solver.needs.equal_weights else self.weighted
        posterior = reconstruct(
            problem.y,
            problem.operator,
            prior,
            solver,
            num_samples,
            self.seed,
            noise_std=problem.noise_std,
            scale=Scale(1.0),
            key=f"{self.case.name}/{self.scan}",
            keep_samples=True,
        )
        return in_units(posterior, self.settings)

    def psnr(self, image: np.ndarray) -> float:
        """PSNR of an image in HU, dB."""
        return psnr(self.case.truth[None], image[None], self.case.data_range)


@dataclass(frozen=True, eq=False)
class Solved:
    """What a method made of a scan: float32 images ``(H, W)`` in HU.

    Attributes
    ----------
    sample, mean, std : ndarray
        The first sample, and mean and standard deviation of all.
    setting : str
        What was chosen by PSNR against the truth; empty if nothing was.
    nfe : int
        Network evaluations a sample.
    seconds : float
        Processor time of a sample, of a classical method with everything that was tried.
    """

    sample: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    setting: str
    nfe: int
    seconds: float

    @classmethod
    def of(cls, posterior: Posterior, setting: str, seconds: float) -> Solved:
        """Take the images from a posterior in HU."""
        assert posterior.samples is not None
        images = (posterior.samples[0], posterior.mean, posterior.std)
        sample, mean, std = (image.cpu().numpy().astype(np.float32) for image in images)
        return cls(sample, mean, std, setting, posterior.nfe, seconds)


@dataclass(frozen=True, eq=False)
class Contender:
    """A method.

    Attributes
    ----------
    name : str
        What it is called.
    identity : dict
        JSON-ready: everything besides the data that its images depend on.
    rows : tuple of (str, str)
        Name in a table, and which image that is: ``"sample"`` or ``"mean"``.
    solve : callable
        Makes the images.
    """

    name: str
    identity: dict[str, Any]
    rows: tuple[tuple[str, str], ...]
    solve: Callable[[Task], Solved]


def best_fbp(task: Task) -> Solved:
    """Filtered backprojection with the window that has the highest PSNR."""
    begun = time.process_time()
    tried = {name: task.reconstruct(FilteredBackprojection(name)) for name in FILTERS}
    chosen = max(tried, key=lambda name: task.psnr(tried[name].mean.cpu().numpy()))
    return Solved.of(tried[chosen], chosen, time.process_time() - begun)


def best_tv(task: Task) -> Solved:
    """Total variation with the weight ``2^k`` of the highest PSNR, climbed to from the default weight."""
    begun = time.process_time()
    problem = Problem(task.weighted.y, task.weighted.operator, task.weighted.noise_std)
    start = round(math.log2(TotalVariation().default_weight(problem)))
    tried: dict[int, Posterior] = {}

    def evaluate(exponent: int) -> dict[str, dict[str, float]]:
        solver = TotalVariation(2.0**exponent, TV_ITERATIONS)
        tried[exponent] = task.reconstruct(solver)
        return {"truth": {"PSNR": task.psnr(tried[exponent].mean.cpu().numpy())}}

    chosen = best(climb(evaluate, (start,)), "truth")
    return Solved.of(tried[chosen], f"2^{chosen}", time.process_time() - begun)


def sampled(task: Task, solver: Solver, prior: ScorePrior, num_samples: int) -> Solved:
    """Posterior samples."""
    begun = time.process_time()
    posterior = task.reconstruct(solver, prior, num_samples)
    return Solved.of(posterior, "", (time.process_time() - begun) / num_samples)


def contenders(
    methods: Iterable[str], prior: ScorePrior | None = None, digest: str = "", num_samples: int = 8
) -> list[Contender]:
    """Methods by name; those that sample need the prior, and `digest` tells it from others.

    Raises
    ------
    ReconError
        If there is no such method, or it needs a prior and there is none.
    """
    made = []
    for name in methods:
        if name == "FBP":
            made.append(Contender(name, {"filters": FILTERS}, ((name, "mean"),), best_fbp))
        elif name == "TV":
            identity: dict[str, Any] = {"iterations": TV_ITERATIONS}
            made.append(Contender(name, identity, ((name, "mean"),), best_tv))
        elif name not in DIFFUSION:
            raise ReconError(f"methods are {', '.join(METHODS)}, not {name!r}")
        elif prior is None:
            raise ReconError(f"{name} needs a prior")
        else:
            solver = DIFFUSION[name]
            count = num_samples if name == "DDS" else 1
            identity = {
                "solver": settings_of(solver),
                "weighted": not solver.needs.equal_weights,
                "samples": count,
                "prior": digest,
            }
            rows: tuple[tuple[str, str], ...] = ((name, "sample"),)
            if count > 1:
                rows = ((f"{name}, one sample", "sample"), (f"{name}, mean of {count}", "mean"))

            def solve(task: Task, solver: Solver = solver, count: int = count) -> Solved:
                assert prior is not None
                return sampled(task, solver, prior, count)

            made.append(Contender(name, identity, rows, solve))
    return made


class Cache:
    """Reconstructions on disk, one file each; in memory only if `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def solved(self, what: dict[str, Any], make: Callable[[], Solved]) -> Solved:
        """Look up what was made, or make and store it.

        Parameters
        ----------
        what : dict
            What of what, JSON-ready; its hash names the file.
        make : callable
            Makes it.

        Raises
        ------
        ReconError
            Naming the file, if it is damaged or cannot be written.
        """
        if self.folder is None:
            return make()
        text = json.dumps(what, sort_keys=True)
        path = self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.npz"
        if path.exists():
            return self._read(path)
        made = make()
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, what=np.array(text), **asdict(made))
            temporary.replace(path)
        except OSError as error:
            raise ReconError(f"{path}: the cache cannot be written: {error}") from None
        return made

    @staticmethod
    def _read(path: Path) -> Solved:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                images = (stored["sample"], stored["mean"], stored["std"])
                return Solved(*images, str(stored["setting"]), int(stored["nfe"]), float(stored["seconds"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise ReconError(f"{path} is damaged; remove it") from None


# -- measures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What one image is worth.

    Attributes
    ----------
    psnr : float
        dB, with the range of the truth as the peak: which image this is, in the picture.
    soft, lung : float
        Bias in HU.
    half, tenth : float
        Frequency in 1/cm where the modulation transfer at the edge falls to a half and to a tenth; NaN where
        it does not, or there is no edge.
    std, texture : float
        Standard deviation in HU of the error in flat soft tissue, and mean frequency of its spectrum, 1/cm.
    inserts : tuple of (float, Detection)
        True contrast of each insert, and what is seen of it.
    """

    psnr: float
    soft: float
    lung: float
    half: float
    tenth: float
    std: float
    texture: float
    inserts: tuple[tuple[float, Detection], ...]


def measure(case: Case, image: np.ndarray) -> Measures:
    """Hold an image ``(H, W)`` in HU against its case."""
    image = image.astype(np.float64)
    error, response = image - case.truth, image - case.background
    half = tenth = math.nan
    at_edge = error + case.edge.contrast * case.edge.coverage(case.shape, case.pixel_size)
    try:
        frequencies, transfer = edge_mtf(at_edge, case.edge, case.pixel_size)
        half, tenth = (10 * first_below(frequencies, transfer, level) for level in (0.5, 0.1))
    except ReconError:
        pass  # an image may be so bad that it has no edge there
    noise = noise_texture(error, case.flat, case.pixel_size)
    return Measures(
        psnr=psnr(case.truth[None], image[None], case.data_range),
        soft=bias(image, case.truth, case.soft),
        lung=bias(image, case.truth, case.lung),
        half=half,
        tenth=tenth,
        std=noise.std,
        texture=10 * noise.mean_frequency,
        inserts=tuple(
            (disc.contrast, detect(response, error, disc, case.empty_places, case.pixel_size))
            for disc in case.inserts
        ),
    )


@dataclass(frozen=True, eq=False)
class Row:
    """One image of one scan.

    Attributes
    ----------
    case, scan : Case, Scan
        Of what.
    method, name : str
        The method, and what a table calls the image.
    image : ndarray
        In HU.
    solved : Solved
        Where it is from.
    measures : Measures
        What it is worth.
    """

    case: Case
    scan: Scan
    method: str
    name: str
    image: np.ndarray
    solved: Solved
    measures: Measures

    @property
    def where(self) -> tuple[str, str, str]:
        """Slice, beam and views, as a table calls them."""
        return self.case.name, self.scan.beam, self.scan.name


def run(
    cases: Sequence[Case],
    which: Sequence[Scan],
    methods: Sequence[Contender],
    *,
    photons: float = PHOTONS,
    seed: int = 0,
    device: str = "cpu",
    cache: Cache | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Reconstruct every scan of every case with every method, and measure the images."""
    cache = Cache(None) if cache is None else cache
    rows = []
    for case in cases:
        for scan in which:
            task = Task(case, scan, photons, seed, device)
            data = {
                "case": [case.name, case.digest],
                "scan": asdict(scan),
                "geometry": scan.geometry(case.shape, case.pixel_size).hash(),
                "photons": photons,
                "seed": seed,
            }
            for method in methods:
                what = data | {"method": method.name} | method.identity
                try:
                    solved = cache.solved(what, lambda m=method, t=task: m.solve(t))  # type: ignore[misc]
                except (OperatorError, ReconError) as error:
                    raise ReconError(
                        f"{case.name}, {scan.beam}, {scan.name}, {method.name}: {error}"
                    ) from None
                for name, kind in method.rows:
                    image = getattr(solved, kind)
                    row = Row(case, scan, method.name, name, image, solved, measure(case, image))
                    rows.append(row)
                    on_row(row)
    return rows


# -- the page ------------------------------------------------------------------------------------------------


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows of each scan: name -> row, in the order of appearance."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.where, {})[row.name] = row
    return groups


def table(rows: Sequence[Row], cells: Callable[[dict[str, Row]], dict[str, str]]) -> str:
    """Make a Markdown table with a line for each scan, whose further cells are what `cells` makes of it."""
    text: list[str] = []
    for where, line in grouped(rows).items():
        made = cells(line)
        if not text:
            headings = ["slice", "beam", "scan", *made]
            text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        text.append("| " + " | ".join([*where, *made.values()]) + " |")
    return "\n".join(text)


def biases(rows: Sequence[Row]) -> str:
    """Bias in soft tissue and lung."""
    return table(
        rows, lambda line: {n: f"{r.measures.soft:+.1f} / {r.measures.lung:+.1f}" for n, r in line.items()}
    )


def resolution(rows: Sequence[Row]) -> str:
    """Frequencies at which the modulation transfer is a half and a tenth; first those of the truth."""

    def cell(measures: Measures) -> str:
        return " / ".join("–" if math.isnan(f) else f"{f:.2f}" for f in (measures.half, measures.tenth))

    def cells(line: dict[str, Row]) -> dict[str, str]:
        case = next(iter(line.values())).case
        return {"truth": cell(measure(case, case.truth))} | {n: cell(r.measures) for n, r in line.items()}

    return table(rows, cells)


def noise(rows: Sequence[Row]) -> str:
    """Standard deviation and mean frequency of the error in flat soft tissue."""
    return table(
        rows, lambda line: {n: f"{r.measures.std:.1f} / {r.measures.texture:.2f}" for n, r in line.items()}
    )


def inserts(rows: Sequence[Row]) -> str:
    """Contrast found and its ratio to the observer's noise; in bold where the insert is detected."""

    def cell(row: Row) -> str:
        parts = []
        for _, seen in row.measures.inserts:
            text = f"{seen.contrast:.0f} ({seen.snr:.1f})"
            parts.append(f"**{text}**" if seen.detected else text)
        return ", ".join(parts)

    text = table(rows, lambda line: {name: cell(row) for name, row in line.items()})
    counts = []
    for name in dict.fromkeys(row.name for row in rows):
        seen = [found.detected for row in rows if row.name == name for _, found in row.measures.inserts]
        counts.append(f"{name} {sum(seen)} of {len(seen)}")
    return f"{text}\n\nDetected: {'; '.join(counts)}."


def choices(rows: Sequence[Row]) -> str:
    """What was chosen for the classical methods, and the processor time of all."""

    def cells(line: dict[str, Row]) -> dict[str, str]:
        by_method = {row.method: row.solved for row in line.values()}
        return {
            method: ", ".join(filter(None, [solved.setting, f"{solved.seconds:.0f} s"]))
            for method, solved in by_method.items()
        }

    return table(rows, cells)


def weighting(rows: Sequence[Row]) -> str:
    """Which of the methods in the rows were given data weighted by their noise."""
    shown = {row.method.partition(",")[0] for row in rows}
    equal = [name for name, solver in DIFFUSION.items() if name in shown and solver.needs.equal_weights]
    if not equal:
        return "Data are weighted by their noise"
    return f"{', '.join(equal)} are given data of equal weight, the others weighted by their noise"


def report(rows: Sequence[Row], *, command: str, prior: str, photons: float, picture: str) -> str:
    """Make the whole page."""
    cases = list({row.case.name: row.case for row in rows}.values())
    case = cases[0]
    contrasts = ", ".join(f"+{disc.contrast:g}" for disc in case.inserts)
    height, width = case.shape
    packages = ("torch", "numpy", "scipy", "scikit-image", "dis-recon")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch",
        "command": f"`{command}`",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "prior": prior,
        "data": f"{case.source}; {height} × {width} pixels of {case.pixel_size:.3f} mm are reconstructed",
        "scans": f"simulated on {case.fine.shape[0]} × {case.fine.shape[1]} pixels, {photons:.3g} photons an "
        f"element through air, water {MU_WATER} /mm. Parallel beam over half a turn; fan beam over a whole "
        f"turn, {SOURCE_ORIGIN:g} mm from source to axis, {SOURCE_DETECTOR:g} mm to a curved detector. Arcs "
        "have one view a degree and their middle where the central ray is vertical",
        "classical methods": "the window of FBP, and λ of TV among the powers of two, are chosen for each "
        "scan by PSNR against the truth: an oracle, which flatters them. TV takes "
        f"{TV_ITERATIONS} primal-dual steps",
        "other methods": f"their defaults; one sample each, of DDS also the mean. {weighting(rows)}",
        "truth": "mean over 2 × 2 pixels of what was scanned",
    }
    text = [
        "# CT from few views and limited arcs",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    text += ["", f"![Truth, reconstructions and spread, {WINDOW[0]:g} to {WINDOW[1]:g} HU]({picture})"]
    sections = {
        "Bias": (
            "Mean error in HU in soft tissue / lung: pixels of the body whose truth lies between "
            f"{SOFT[0]:g} and {SOFT[1]:g} HU / {LUNG[0]:g} and {LUNG[1]:g} HU, away from edges and from what "
            "was planted.",
            biases,
        ),
        "Resolution": (
            "Line pairs per cm at which the modulation transfer falls to 50 % / 10 %, all around a disc of "
            f"{EDGE_CONTRAST:+g} HU and {EDGE_RADIUS:g} mm radius in the lung; –: above one period a pixel, "
            "or no edge to be seen. Pixels included, hence the truth's own.",
            resolution,
        ),
        "Noise texture": (
            "Standard deviation in HU / mean frequency in 1/cm of the error's power spectrum, over squares "
            f"of {NPS_SIDE} × {NPS_SIDE} pixels of soft tissue. Of one image: noise and artefacts alike.",
            noise,
        ),
        "Low contrast": (
            f"Discs of {contrasts} HU and {INSERT_RADIUS:g} mm radius in soft tissue: contrast found in HU "
            "(in standard deviations of the same measurement at empty places in soft tissue). In bold: "
            f"detected, by a ratio of at least {THRESHOLD:g}. The observer is a matched filter that does not "
            "whiten and knows background and place: mean over the disc minus mean over a ring of "
            f"{RING[0]:g} to {RING[1]:g} radii.",
            inserts,
        ),
        "Choices and time": (
            "Chosen by the oracle; processor time of a sample, or of all that was tried.",
            choices,
        ),
    }
    for title, (meaning, make) in sections.items():
        text += ["", f"## {title}", "", meaning, "", make(rows)]
    return "\n".join([*text, ""])


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw truth, FBP, TV, the mean of DDS and its spread for some scans of the first case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for where, line in grouped(rows).items() if where[0] == rows[0].case.name]
    if len(lines) > PICTURED:
        lines = [lines[round(k * (len(lines) - 1) / (PICTURED - 1))] for k in range(PICTURED)]
    # Of a method with two images the last one, which is the mean.
    shown = list({row.method: row.name for row in rows if row.method in (*CLASSICAL, "DDS")}.values())
    spread = any(row.method == "DDS" and bool(row.solved.std.any()) for row in rows)
    columns = 1 + len(shown) + spread
    drawing = Figure(figsize=(2.6 * columns + 0.8, 2.75 * len(lines)), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(len(lines), columns, squeeze=False)
    for axes, line in zip(grid, lines, strict=True):
        first = next(iter(line.values()))
        panels = [("truth", first.case.truth)]
        panels += [(f"{name}, {line[name].measures.psnr:.1f} dB", line[name].image) for name in shown]
        for panel, (title, image) in zip(axes, panels, strict=False):
            panel.imshow(image, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1])
            panel.set_title(title, fontsize=8)
        if spread:
            std = next(row.solved.std for row in line.values() if row.method == "DDS")
            drawn = axes[-1].imshow(std, cmap="magma", vmin=0, vmax=float(np.quantile(std, 0.995)))
            axes[-1].set_title("DDS, standard deviation / HU", fontsize=8)
            drawing.colorbar(drawn, ax=axes[-1], shrink=0.8)
        for panel in axes:
            panel.set_xticks([])
            panel.set_yticks([])
        axes[0].set_ylabel(f"{first.scan.beam}, {first.scan.name}", fontsize=9)
    drawing.savefig(path, dpi=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ct_quality",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="CT series in HU, HDF5")
    parser.add_argument("--series", required=True, metavar="NAME", help="the series of the file")
    parser.add_argument("--slices", type=int, nargs="+", default=[24], metavar="N", help="default: 24")
    parser.add_argument("--beams", nargs="+", default=BEAMS, choices=BEAMS)
    parser.add_argument("--views", type=int, nargs="*", default=VIEWS, metavar="N")
    parser.add_argument("--arcs", type=int, nargs="*", default=ARCS, metavar="DEGREES")
    parser.add_argument("--photons", type=float, default=PHOTONS, help="of an element through air")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--prior", default="chest", help="prior: a .safetensors file, or the name of a bundled one"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--num-samples", type=int, default=8, help="samples of DDS that are averaged")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the samples")
    parser.add_argument("--device", default="cpu", help="where to reconstruct")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the reconstructions here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ct_quality.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, print and write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def show(row: Row) -> None:
        shown = f"{', '.join(row.where)}, {row.name}: {row.measures.psnr:.2f} dB"
        print(shown, file=sys.stderr, flush=True)

    try:
        prior, digest, described = None, "", "none was needed"
        if not set(options.methods) <= set(CLASSICAL):
            prior = load_prior(options.prior, precision=options.precision, device=options.device)
            digest = f"{prior_hash(prior_path(options.prior))} {options.precision}"
            described = f"{prior.contract.name}, SHA-256 {digest[:12]}…, {options.precision}"
        rows = run(
            read_cases(options.data, options.series, options.slices),
            scans(options.beams, options.views, options.arcs),
            contenders(options.methods, prior, digest, options.num_samples),
            photons=options.photons,
            seed=options.seed,
            device=options.device,
            cache=Cache(options.cache),
            on_row=show,
        )
        if not rows:
            raise ReconError("there is nothing to scan: give --views or --arcs")
    except (OperatorError, PriorError, ReconError) as error:
        sys.exit(f"error: {error}")
    # Where files lie on this machine is nobody's concern.
    command = shlex.join(
        ["python", "-m", "benchmarks.ct_quality", *(w.rpartition("/")[2] if "/" in w else w for w in words)]
    )
    picture = options.out.with_suffix(".png")
    page = report(rows, command=command, prior=described, photons=options.photons, picture=picture.name)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, picture)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(options.out)
    print(page)


if __name__ == "__main__":
    main()
