r"""Uncertainty held against the truth: what intervals of the posterior cover, before and after calibration.

Two patients are calibrated on, a third is tested; none of them was trained on::

    python -m benchmarks.calibration --data open_ms --cache runs/calibration

Patients 09 and 20, and 19, of the open MS data set (Lesjak et al. 2016, CC BY). Coils, phase and noise are
simulated on processed magnitude images, which are first reduced to a common matrix by cropping their Fourier
transform. With ``--cache`` an interrupted run resumes; what is kept belongs to the prior's file, the solver's
settings and the images, so a new prior starts anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import NOISE, NUM_COILS, Case, make_case, make_scenario
from benchmarks.machine import machine
from operators.fft import fftc, ifftc
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.calibration import (
    Calibration,
    Evidence,
    coverage,
    error_auroc,
    error_correlation,
    gather,
    gaussian_interval,
    kspace_digest,
    learn,
    stored_evidence,
)
from recon.calibration_files import middle_slices
from recon.errors import ReconError
from recon.figures import uncertainty_grid
from recon.io.nifti import read_volume
from recon.solvers.base import Solver, settings_of
from recon.solvers.dds import DDS

CALIBRATED_ON = (
    "patient09/study2_FLAIR.nii.gz",
    "patient20/study2_FLAIR.nii.gz",
    "patient20/study2_T1W.nii.gz",
)
TESTED_ON = (
    "patient19/study1_FLAIR.nii.gz",
    "patient19/study2_FLAIR.nii.gz",
    "patient19/study2_T1W.nii.gz",
)
MASKS = ("equispaced", "random", "poisson")
ACCELERATIONS = (2.0, 4.0, 6.0, 8.0)
MATRIX = (192, 160)
NOMINAL = 0.9
ACCEPTED = (0.85, 0.95)
TARGETS = {
    "fully sampled": "the coil-combined image of the fully sampled k-space, with its noise: all that a "
    "scanner can offer, and what `recon calibrate` learns from",
    "noise-free": "the image before noise was added, which only a simulation knows",
}


@dataclass(frozen=True, eq=False)
class Result:
    """One slice through one mask: the evidence against the fully sampled image, and the noise-free one."""

    evidence: Evidence
    noise_free: np.ndarray

    def against(self, target: str) -> Evidence:
        """The evidence with the truth of that name."""
        return self.evidence if target == "fully sampled" else replace(self.evidence, truth=self.noise_free)

    @property
    def name(self) -> str:
        """Patient, volume and slice, as a table calls them."""
        return f"{self.evidence.patient} {self.evidence.volume}, slice {self.evidence.index}"


def reduced(image: Tensor, matrix: tuple[int, int]) -> Tensor:
    """Resample a magnitude image ``(H, W)`` by cropping its Fourier transform, and cut it to the matrix.

    The height becomes the matrix's, the width follows in proportion; it is then cropped or padded with zeros.
    """
    height, width = matrix
    rows, columns = image.shape
    across = max(1, round(columns * height / rows))
    spectrum = fftc(image.to(torch.complex64))
    top, left = rows // 2 - height // 2, columns // 2 - across // 2
    small = ifftc(spectrum[top : top + height, left : left + across]).abs()
    margin = width - across
    if margin >= 0:
        return torch.nn.functional.pad(small, (margin // 2, margin - margin // 2))
    return small[:, -margin // 2 : -margin // 2 + width]


def reduced_case(path: Path, index: int, matrix: tuple[int, int]) -> Case:
    """Make a case of one slice of a NIfTI volume: reduced, with simulated coils, phase and noise.

    Raises
    ------
    ReconError
        Naming the file, if the slice is empty or smaller than the matrix.
    """
    image = read_volume(path)[index]
    if image.shape[0] < matrix[0] or not float(image.max()) > 0:
        raise ReconError(
            f"{path}: slice {index} is empty or smaller than {matrix[0]} rows: {tuple(image.shape)}"
        )
    image = reduced(image, matrix)
    image = image / image.max()
    maps = random_smooth_maps(NUM_COILS, matrix, seed=index)
    kspace = simulate_kspace(torch.polar(image, smooth_phase(matrix, seed=index)), maps, NOISE, seed=index)
    name = f"{path.parent.name}/{path.name}/{index}"
    return make_case(name, kspace, image * maps.abs().square().sum(0).sqrt())


def reconstruct_all(
    data: Path,
    volumes: Iterable[str],
    prior: ScorePrior,
    identity: str,
    solver: Solver,
    *,
    slices: int,
    matrix: tuple[int, int] = MATRIX,
    masks: Sequence[str] = MASKS,
    accelerations: Sequence[float] = ACCELERATIONS,
    num_samples: int = 8,
    device: str = "cpu",
    cache: Path | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Reconstruct slices of the middle half of every volume through every mask.

    Parameters
    ----------
    data
        Folder with the volumes, one folder a patient.
    volumes
        Paths in it.
    prior, identity
        The prior, and what tells it from others: the hash of its file with the precision.
    solver, num_samples, device
        How to reconstruct.
    slices
        Slices of a volume.
    matrix, masks, accelerations
        Of the cases.
    cache
        Folder for what was reconstructed.
    on_result
        Called with every result.
    """
    results = []
    for volume in volumes:
        path = data / volume
        for index in middle_slices(range(len(read_volume(path))), slices):
            case = reduced_case(path, index, matrix)
            for kind in masks:
                for asked in accelerations:
                    evidence = case_evidence(
                        case,
                        kind,
                        asked,
                        prior,
                        identity,
                        solver,
                        patient=path.parent.name,
                        volume=path.name.partition(".")[0],
                        index=index,
                        num_samples=num_samples,
                        device=device,
                        cache=cache,
                    )
                    result = Result(evidence, case.targets["noise-free"].numpy())
                    results.append(result)
                    on_result(result)
    return results


def case_evidence(
    case: Case,
    kind: str,
    asked: float,
    prior: ScorePrior,
    identity: str,
    solver: Solver,
    *,
    patient: str,
    volume: str,
    index: int,
    num_samples: int = 8,
    device: str = "cpu",
    cache: Path | None = None,
) -> Evidence:
    """Reconstruct a case, held against the coil-combined image of the fully sampled k-space.

    Parameters
    ----------
    case
        Fully sampled slice.
    kind, asked
        Mask and its acceleration.
    prior, identity
        The prior, and what tells it from others.
    solver, num_samples, device
        How to reconstruct.
    patient, volume, index
        What the slice is one of.
    cache
        Folder for what was reconstructed.
    """
    facts = {
        "case": [case.name, kspace_digest(case.kspace)],
        "mask": [kind, asked],
        "prior": identity,
        "solver": settings_of(solver),
        "num_samples": num_samples,
    }

    def make() -> Evidence:
        scenario = make_scenario(case, kind, asked)
        problem = replace(
            scenario.problem,
            y=scenario.problem.y.to(device),
            operator=scenario.problem.operator.to(device),
        )
        return gather(
            problem,
            scenario.mask,
            case.targets["combined"],
            prior,
            solver,
            patient=patient,
            volume=volume,
            index=index,
            asked=asked,
            num_samples=num_samples,
        )

    return stored_evidence(cache, facts, make)


def covered(evidence: Evidence, calibration: Calibration | None) -> float:
    """Coverage of the object's pixels by Gaussian intervals of the raw std, or by calibrated ones."""
    if calibration is None:
        bounds = gaussian_interval(evidence.mean, evidence.std, NOMINAL)
    else:
        half = calibration.half_width(
            torch.from_numpy(evidence.std),
            evidence.noise_std,
            mask=evidence.mask,
            acceleration=evidence.acceleration,
        ).numpy()
        bounds = evidence.mean - half, evidence.mean + half
    return coverage(evidence.truth, *bounds, evidence.region)


def coverage_table(tested: Sequence[Result], calibrations: Mapping[str, Calibration]) -> str:
    """Markdown: for every slice and mask the coverage of every target before and after calibration."""
    headings = ["slice", "mask", "asked", "realised"]
    for target in calibrations:
        headings += [f"{target}: before", "after"]
    headings += ["Spearman", "AUROC"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    misses: dict[str, list[str]] = {target: [] for target in calibrations}
    for result in tested:
        given = result.evidence
        cells = [result.name, given.mask, f"×{given.asked:g}", f"×{given.acceleration:.2f}"]
        for target, calibration in calibrations.items():
            evidence = result.against(target)
            after = covered(evidence, calibration)
            inside = ACCEPTED[0] <= after <= ACCEPTED[1]
            cells += [f"{covered(evidence, None):.1%}", f"{after:.1%}" if inside else f"**{after:.1%}**"]
            if not inside:
                misses[target].append(f"{result.name}, {given.mask} ×{given.asked:g} ({after:.1%})")
        std = next(iter(calibrations.values())).apply(
            torch.from_numpy(given.std), given.noise_std, mask=given.mask, acceleration=given.acceleration
        )
        against = given.truth, given.mean, std.numpy(), given.region
        cells += [f"{error_correlation(*against)[1]:.2f}", f"{error_auroc(*against):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for target, names in misses.items():
        count = len(tested) - len(names)
        outside = f"; outside: {'; '.join(names)}" if names else ""
        lines += [
            "",
            f"Against the {target} image {count} of {len(tested)} lie within {ACCEPTED[0]:.0%} to "
            f"{ACCEPTED[1]:.0%}{outside}.",
        ]
    return "\n".join(lines)


def factor_table(calibrations: Mapping[str, Calibration]) -> str:
    """Markdown: factors of every mask, with the coverage of slices of patients that were left out."""
    headings = ["mask", "realised"]
    for target in calibrations:
        headings += [f"{target}: interval / spread", "left-out coverage"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    first, *_ = calibrations.values()
    for number, cell in enumerate(first.cells):
        cells = [cell.mask, f"×{cell.acceleration:.2f}"]
        for calibration in calibrations.values():
            this = calibration.cells[number]
            left_out = "–" if this.left_out is None else "{:.0%} to {:.0%}".format(*this.left_out)
            cells += [f"{this.factor:.2f}", left_out]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_table(tested: Sequence[Result]) -> str:
    """Markdown: the standard deviation averaged over the object, at every acceleration."""
    accelerations = sorted({result.evidence.asked for result in tested})
    values: dict[tuple[str, str], dict[float, float]] = {}
    for result in tested:
        given = result.evidence
        std = 100 * float(given.std[given.region].mean() / given.truth.max())
        values.setdefault((result.name, given.mask), {})[given.asked] = std
    headings = ["slice", "mask", *(f"×{a:g}" for a in accelerations), "grows"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for (name, mask), row in values.items():
        ordered = [row[a] for a in accelerations]
        grows = "yes" if ordered == sorted(ordered) else "**no**"
        lines.append("| " + " | ".join([name, mask, *(f"{v:.2f}" for v in ordered), grows]) + " |")
    return "\n".join(lines)


def report(
    tested: Sequence[Result],
    calibrations: Mapping[str, Calibration],
    *,
    command: str,
    prior: str,
    solver: Solver,
    matrix: tuple[int, int],
) -> str:
    """Make the whole page."""
    calibration = next(iter(calibrations.values()))
    settings = ", ".join(f"{k}={v}" for k, v in settings_of(solver).items() if k != "name")
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": f"`{command}`",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "dis-recon")),
        "prior": prior,
        "solver": f"{type(solver).__name__} ({settings}), {calibration.num_samples} samples",
        "cases": f"reduced to {matrix[0]} × {matrix[1]}, {NUM_COILS} simulated coils, noise of {NOISE} of "
        f"the maximum per real component; {calibration.slices} slices of {calibration.patients} patients to "
        "learn from",
    }
    text = ["# Calibration of the uncertainty", "", *(f"- {key}: {value}" for key, value in facts.items())]
    text += [
        "",
        "Processed magnitude images with simulated coils flatter every method.",
        "",
        f"Intervals of {NOMINAL:.0%}. Before: mean ± 1.645 std of the samples. After: mean ± a factor times "
        f"the spread, `sqrt(std² averaged over {calibration.smoothing:g} pixels + ({calibration.floor:g} "
        "noise)²)`; the factor of each kind of mask and acceleration is the quantile over the pixels of the "
        "patients learned from, every patient counting alike.",
        "",
        *(f"- {name}: {meaning}" for name, meaning in TARGETS.items()),
        "",
        f"What is guaranteed: if the tested patient is exchangeable with the {calibration.patients} learned "
        f"from, a random pixel is covered with a probability of at least {calibration.guaranteed:.0%}, on "
        f"average over patients. With so few of them this is far below {NOMINAL:.0%}, and for a single slice "
        "nothing is guaranteed.",
        "",
        "## Coverage of the object's pixels, patient left out of everything",
        "",
        "Bold where it leaves 85 % to 95 %. Spearman: correlation of ranks between error and calibrated std; "
        "AUROC: of the calibrated std against the largest tenth of the errors.",
        "",
        coverage_table(tested, calibrations),
        "",
        "## Standard deviation against acceleration",
        "",
        "Of the samples, averaged over the object, in percent of the image's maximum.",
        "",
        growth_table(tested),
        "",
        "## Factors",
        "",
        "1.64 would leave a Gaussian spread as it is. Left-out coverage: lowest and highest of a slice whose "
        "patient was not learned from.",
        "",
        factor_table(calibrations),
        "",
    ]
    return "\n".join(text)


def draw_grid(tested: Sequence[Result], path: Path, mask: str = "equispaced") -> None:
    """Draw the std of the first tested slice at every acceleration."""
    first = next(result.name for result in tested if result.evidence.mask == mask)
    chosen = sorted(
        (r.evidence for r in tested if r.name == first and r.evidence.mask == mask),
        key=lambda evidence: evidence.asked,
    )
    uncertainty_grid(
        path,
        {f"×{evidence.asked:g}": (evidence.mean, evidence.std) for evidence in chosen},
        region=chosen[0].region,
        truth=chosen[0].truth,
        title=f"{first}, {mask} mask",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the open MS data set")
    parser.add_argument("--slices", type=int, default=1, help="slices of a volume (default: %(default)s)")
    parser.add_argument("--masks", nargs="+", default=MASKS, metavar="KIND")
    parser.add_argument("--accelerations", type=float, nargs="+", default=ACCELERATIONS)
    parser.add_argument(
        "--prior", default="brain", help="a .safetensors file, or the name of a bundled prior"
    )
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what was reconstructed here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what recon calibrate would, as JSON")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the std at every acceleration")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "calibration.md",
        help="default: %(default)s",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the page and write it."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()

    def show(result: Result) -> None:
        given = result.evidence
        print(
            f"{result.name}, {given.mask} ×{given.asked:g}: {covered(given, None):.1%} before calibration, "
            f"{time.monotonic() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    solver = DDS()
    try:
        prior = load_prior(options.prior, precision=options.precision, device=options.device)
        digest = prior_hash(prior_path(options.prior))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anatomy or a narrow calibration region is not judged here
            learned_from, tested = (
                reconstruct_all(
                    options.data,
                    volumes,
                    prior,
                    f"{digest} {options.precision}",
                    solver,
                    slices=options.slices,
                    matrix=MATRIX,
                    masks=options.masks,
                    accelerations=options.accelerations,
                    num_samples=options.num_samples,
                    device=options.device,
                    cache=options.cache,
                    on_result=show,
                )
                for volumes in (CALIBRATED_ON, TESTED_ON)
            )
        calibrations = {
            target: learn(
                (result.against(target) for result in learned_from),
                name=target,
                solver=solver,
                num_samples=options.num_samples,
                prior=(prior.contract.name, digest),
                nominal=NOMINAL,
                target=f"{target} image",
            )
            for target in TARGETS
        }
        if options.save is not None:
            replace(calibrations["fully sampled"], name=options.save.stem).save(options.save)
        if options.figure is not None:
            draw_grid(tested, options.figure)
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    shown = [word.rpartition("/")[2] if "/" in word else word for word in words]
    page = report(
        tested,
        calibrations,
        command=shlex.join(["python", "-m", "benchmarks.calibration", *shown]),
        prior=f"{prior.contract.name}, SHA-256 {digest[:12]}…, {options.precision}",
        solver=solver,
        matrix=MATRIX,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".part")
    partial.write_text(page)
    partial.replace(options.out)
    print(page)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
