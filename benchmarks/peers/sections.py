"""The comparisons: who competes on which data, and what of it is kept."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Scenario
from benchmarks.classical import Scores, best, best_images, climb
from benchmarks.ct_cases import FINENESS, Scan, reduced, scanned
from benchmarks.kept_lines import append_line, read_lines
from benchmarks.peers import bart_programs
from benchmarks.peers.ct_programs import astra_run, iradon, iradon_sart
from benchmarks.peers.deepinv_solvers import (
    RETURNED,
    PictureProblem,
    Setting,
    ct_picture,
    detectors_of,
    from_views,
)
from benchmarks.peers.environment import bart
from benchmarks.peers.interleaving import Contestant, Outcome, compete
from benchmarks.peers.methods import CLASSICAL, Posed, pose_mri, trimmed
from benchmarks.peers.search import TARGET, Choice, output
from operators.ct import CTOperator
from operators.ct_geometry import ParallelBeam
from operators.espirit import espirit_maps
from operators.fft import fftc, ifftc
from operators.mri import SinglecoilMRI
from priors.base import ScorePrior
from recon.ct import CTProblem, CTSettings, ct_problem
from recon.errors import ReconError
from recon.metrics import psnr
from recon.mri import SliceProblem, calibration_region
from recon.noise import kspace_noise_std
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.base import Problem
from recon.solvers.dds import DDS
from recon.solvers.filtered_backprojection import FilteredBackprojection
from recon.solvers.sirt import SIRT

OURS = "here"
SIRT_STEPS = 100
SART_SWEEPS = (0, 6)
"""Exponents of the powers of two of sweeps that are tried."""
PHOTONS = 2e5

Row = dict[str, Any]
"""One contestant on one set of data: what it is compared with, times, scores, ratios."""


@dataclass(frozen=True)
class Rules:
    """How competitions are held.

    Attributes
    ----------
    repetitions : int
        Rounds.
    seed : int
        Of the first round.
    clock : str
        ``cpu`` or ``wall``.
    nfe : tuple of int
        Network evaluations.
    """

    repetitions: int = 3
    seed: int = 0
    clock: str = "cpu"
    nfe: tuple[int, ...] = (30,)

    @property
    def seeds(self) -> range:
        """A round each, as `compete` takes them."""
        return range(self.seed, self.seed + self.repetitions)


class Store:
    """Groups of rows on disk, one JSON object a line, so that an interrupted run goes on where it was.

    Parameters
    ----------
    path : Path or None
        The file; in memory only if None.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, list[Row]] = {} if path is None else read_lines(path, "rows")

    def rows(self, what: dict[str, Any], make: Callable[[], list[Row]]) -> list[Row]:
        """Look up the rows of a group, or make and keep them; `what` is JSON-ready and its hash the key."""
        key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
        if key not in self._known:
            self._known[key] = make()
            if self.path is not None:
                append_line(self.path, key, what=what, rows=self._known[key])
        return self._known[key]


def digest(*tensors: Tensor | np.ndarray) -> str:
    """Hash of data."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        array = tensor.numpy() if isinstance(tensor, Tensor) else tensor
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def rows_of(outcomes: Sequence[Outcome], place: dict[str, Any]) -> list[Row]:
    """Rows of a competition, the first of which is ours: each other one beside it."""
    first = outcomes[0]
    rows = []
    for outcome in outcomes:
        row = place | {
            "name": outcome.contestant.name,
            "remark": outcome.contestant.remark,
            "seconds": list(outcome.seconds),
            "scores": list(outcome.scores),
        }
        if outcome is not first:  # of ours, too: what another setting of ours changes
            ratio, difference = first.time_ratio(outcome), first.score_difference(outcome)
            row["ratio"] = [ratio.median, ratio.low, ratio.high]
            row["difference"] = [difference.median, difference.low, difference.high]
        rows.append(row)
    return rows


# -- diffusion -----------------------------------------------------------------------------------------------


def diffusion(
    posed: Posed,
    ours: Sequence[Contestant],
    prior: ScorePrior,
    solvers: Sequence[str],
    nfe: int,
    rules: Rules,
    place: dict[str, Any],
) -> list[Row]:
    """DDS here against solvers of deepinv, each as it comes and as it suits the data best.

    Parameters
    ----------
    posed : Posed
        The problem.
    ours : sequence of Contestant
        What is compared; all else is held against the first.
    prior : ScorePrior
        The same for all.
    solvers : sequence of str
        Of deepinv.
    nfe : int
        Evaluations of each.
    rules : Rules
        Rounds and clock.
    place : dict
        What the rows have in common.
    """
    contestants = list(ours)
    for solver in solvers:
        default = Choice(Setting(solver, nfe), RETURNED, math.nan)
        chosen = posed.choose(solver, nfe, prior, rules.seeds)
        for kind, choice in (("its defaults", default), ("best setting", chosen)):

            def run(seed: int, choice: Choice = choice) -> np.ndarray:
                picture = choice.setting.run(posed.picture, prior, seed)
                return posed.finish(output(picture, choice.output)).numpy()

            contestants.append(Contestant(f"deepinv {solver}, {kind}", run, choice.text))
    return rows_of(
        compete(contestants, posed.score, rules.repetitions, seed=rules.seed, clock=rules.clock),
        place | {"nfe": nfe},
    )


def ours_of(nfe: int) -> dict[str, DDS]:
    """What competes for us: DDS as it comes, whose samples have the spread of the posterior, and with eta 0.

    PSNR rewards images without that spread, which peers reach by their own settings. Neither is chosen by
    looking at the target.
    """
    return {f"DDS {OURS}": DDS(nfe=nfe), f"DDS {OURS}, eta 0": DDS(nfe=nfe, eta=0.0)}


def mri_ours(problem: SliceProblem, prior: ScorePrior, nfe: int) -> list[Contestant]:
    """Our solvers, from k-space on."""
    return [_mri_ours(problem, prior, name, solver) for name, solver in ours_of(nfe).items()]


def _mri_ours(problem: SliceProblem, prior: ScorePrior, name: str, solver: DDS) -> Contestant:

    def run(seed: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anatomy or a spread is not what is judged here
            made = reconstruct(
                problem.y, problem.operator, prior, solver, seed=seed, noise_std=problem.noise_std
            )
        return made.mean.abs().numpy()

    return Contestant(name, run, "DDS, defaults" if solver.eta else "DDS, eta 0")


def of_scenario(scenario: Scenario) -> dict[str, Any]:
    """What rows of a scenario have in common."""
    return {
        "case": scenario.case.name,
        "simulated": scenario.case.simulated,
        "mask": scenario.mask.name,
        "asked": scenario.asked,
        "acceleration": scenario.mask.acceleration,
        "calibration": "{} × {}".format(*scenario.calibration),
    }


def mri_rows(scenario: Scenario, prior: ScorePrior, nfe: int, rules: Rules) -> list[Row]:
    """Several coils: DPS and DiffPIR on deepinv's `MultiCoilMRI`, against the coil-combined image."""
    problem = scenario.problem
    posed = pose_mri(
        Problem(problem.y, problem.operator, problem.noise_std),
        prior,
        scenario.case.targets["combined"].numpy(),
    )
    ours = mri_ours(problem, prior, nfe)
    return diffusion(
        posed, ours, prior, ("DPS", "DiffPIR"), nfe, rules, {"section": "mri"} | of_scenario(scenario)
    )


def single_coil(scenario: Scenario) -> tuple[SliceProblem, np.ndarray]:
    """One coil that sees what all of them together see: the fully sampled combined image, undersampled.

    Returns
    -------
    SliceProblem
        Of `operators.SinglecoilMRI`.
    ndarray
        Magnitude ``(H, W)`` of the fully sampled image.
    """
    images = ifftc(scenario.case.kspace)
    combined = (scenario.maps.conj() * images).sum(0)
    mask = scenario.mask.mask
    y = fftc(combined) * mask
    operator = SinglecoilMRI(mask, (combined.shape[-2], combined.shape[-1]))
    noise_std = kspace_noise_std(y[None], mask)
    return SliceProblem(y, operator, noise_std, ifftc(y).abs()), combined.abs().numpy()


def single_coil_rows(scenario: Scenario, prior: ScorePrior, nfe: int, rules: Rules) -> list[Row]:
    """One coil, whose operator has the singular value decomposition that DDRM needs."""
    problem, target = single_coil(scenario)
    posed = pose_mri(Problem(problem.y, problem.operator, problem.noise_std), prior, target)
    place = {"section": "single coil"} | of_scenario(scenario)
    return diffusion(
        posed, mri_ours(problem, prior, nfe), prior, ("DDRM", "DPS", "DiffPIR"), nfe, rules, place
    )


# -- CT ------------------------------------------------------------------------------------------------------


def odd_size(largest: int) -> int:
    """Largest odd number of pixels at which deepinv's, scikit-image's and our images have one centre.

    Raises
    ------
    ReconError
        If there is none.
    """
    for size in range(largest, 2, -1):
        if size % 2 and detectors_of(size) % 2:
            return size
    raise ReconError(f"an image of {largest} pixels is too small")


@dataclass(frozen=True, eq=False)
class CTScenario:
    """A slice seen by a parallel beam.

    Attributes
    ----------
    name : str
        What a table calls the slice.
    truth : ndarray
        HU ``(N, N)``, N odd.
    sinogram : Tensor
        Noisy line integrals ``(views, detectors)``.
    operator : CTOperator
        With a detector as long as the diagonal.
    photons : float
        An element through air.
    """

    name: str
    truth: np.ndarray
    sinogram: Tensor
    operator: CTOperator
    photons: float = PHOTONS

    @property
    def settings(self) -> CTSettings:
        """Photons are known, images are wanted in HU."""
        return CTSettings(photons=self.photons, units="HU")

    def score(self, image: np.ndarray) -> float:
        """PSNR of an image in HU, the range of the truth as the peak."""
        return psnr(self.truth[None], image[None], float(np.ptp(self.truth)))

    def problem(self, **options: bool) -> CTProblem:
        """As `recon.ct.ct_problem` makes it."""
        return ct_problem(self.sinogram, self.operator, self.settings, **options)

    def hu(self, attenuation: np.ndarray) -> np.ndarray:
        """Attenuation in 1/mm as HU."""
        return 1000 * (attenuation / self.settings.unit - 1)


def ct_scenario(
    name: str, hu: np.ndarray, spacing: float, views: int, *, reduce: int = 1, photons: float = PHOTONS
) -> CTScenario:
    """Scan a square slice in HU; every `reduce` × `reduce` of its pixels are averaged first.

    Raises
    ------
    ReconError
        If the slice is not square or too small.
    """
    if hu.ndim != 2 or hu.shape[0] != hu.shape[1] or reduce < 1:
        raise ReconError(f"{name}: a square slice is needed, got {hu.shape}")
    whole = len(hu) // reduce * reduce
    fine = hu[:whole, :whole].reshape(whole // reduce, reduce, whole // reduce, reduce).mean((1, 3))
    size = odd_size(len(fine) // FINENESS)
    first = (len(fine) - FINENESS * size) // 2
    fine = fine[first : first + FINENESS * size, first : first + FINENESS * size].clip(-1024.0)
    pixel = FINENESS * reduce * spacing
    made = scanned(
        torch.from_numpy(fine).float(), pixel, Scan("parallel", views), photons, f"peers/{name}/{reduce}"
    )
    sinogram, operator = trimmed(made.sinogram, made.operator)
    return CTScenario(name, reduced(fine).astype(np.float32), sinogram, operator, photons)


def pose_scan(scenario: CTScenario) -> Posed:
    """A scan as deepinv sees it: every datum counts the same."""
    plain = scenario.problem(weighted=False, normalised=False)
    picture: PictureProblem = ct_picture(
        scenario.sinogram, scenario.operator, plain.noise_std, scenario.settings.unit
    )
    return Posed(picture, lambda image: 1000 * image - 1000, scenario.score)


def of_scan(scenario: CTScenario) -> dict[str, Any]:
    """What rows of a scan have in common."""
    return {
        "case": scenario.name,
        "size": len(scenario.truth),
        "views": scenario.operator.geometry.num_views,
    }


def ct_rows(scenario: CTScenario, prior: ScorePrior, nfe: int, rules: Rules) -> list[Row]:
    """DDS, with all data alike as deepinv has them and weighted by their noise, against DPS and DiffPIR."""

    def contestant(name: str, solver: DDS, weighted: bool) -> Contestant:
        def run(seed: int) -> np.ndarray:
            problem = scenario.problem(weighted=weighted)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = reconstruct(
                    problem.y,
                    problem.operator,
                    prior,
                    solver,
                    seed=seed,
                    noise_std=problem.noise_std,
                    scale=Scale(1.0),
                )
            return (1000 * made.mean - 1000).numpy()

        how = "data weighted by their noise" if weighted else "all data alike, as deepinv has them"
        eta = "" if solver.eta else ", eta 0"
        return Contestant(f"DDS {OURS}{eta}{name}", run, f"DDS.ct{eta}, {how}")

    ours = [
        contestant("", DDS.ct(nfe=nfe), False),
        contestant("", DDS.ct(nfe=nfe, eta=0.0), False),
        contestant(", weighted", DDS.ct(nfe=nfe), True),
    ]
    return diffusion(
        pose_scan(scenario),
        ours,
        prior,
        ("DPS", "DiffPIR"),
        nfe,
        rules,
        {"section": "ct"} | of_scan(scenario),
    )


def ct_classical_rows(scenario: CTScenario, rules: Rules) -> list[Row]:
    """Filtered back-projection, and iterations, without a prior."""
    geometry, size, pixel = scenario.operator.geometry, len(scenario.truth), scenario.operator.pixel_size
    assert isinstance(geometry, ParallelBeam)
    sinogram = scenario.sinogram.numpy()

    def ours(solver: FilteredBackprojection | SIRT) -> Callable[[int], np.ndarray]:
        def run(seed: int) -> np.ndarray:
            direct = solver.needs.direct
            problem = scenario.problem(weighted=False, normalised=not direct)
            made = reconstruct(
                problem.y, problem.operator, None, solver, noise_std=problem.noise_std, scale=Scale(1.0)
            )
            return (1000 * made.mean - 1000).numpy()

        return run

    def theirs(make: Callable[[], np.ndarray]) -> Callable[[int], np.ndarray]:
        return lambda seed: scenario.hu(make())

    def deepinv(seed: int) -> np.ndarray:
        data = factor * from_views(scenario.sinogram)
        return scenario.hu(picture.physics.fbp(data)[0, 0].numpy())

    picture = pose_scan(scenario).picture
    factor = 1 / (pixel * float(picture.physics.operator_norm))

    def sart(sweeps: int) -> np.ndarray:
        return iradon_sart(sinogram, geometry, size, pixel, sweeps)

    def sart_score(exponent: int) -> Scores:
        return {TARGET: {"PSNR": scenario.score(scenario.hu(sart(2**exponent)))}}

    sweeps = 2 ** best(climb(sart_score, (1,), SART_SWEEPS), TARGET)
    groups = {
        "FBP, no window": [
            Contestant(OURS, ours(FilteredBackprojection())),
            Contestant("scikit-image", theirs(lambda: iradon(sinogram, geometry, size, pixel)), "iradon"),
            Contestant("ASTRA", theirs(lambda: astra_run("FBP", sinogram, geometry, size, pixel)), "FBP"),
            Contestant("deepinv", deepinv, "Tomography.fbp"),
        ],
        "iterations": [
            Contestant(OURS, ours(SIRT(SIRT_STEPS)), f"SIRT, {SIRT_STEPS} steps"),
            Contestant(
                "ASTRA",
                theirs(lambda: astra_run("SIRT", sinogram, geometry, size, pixel, iterations=SIRT_STEPS)),
                f"SIRT, {SIRT_STEPS} steps",
            ),
            Contestant(
                "scikit-image",
                theirs(lambda: sart(sweeps)),
                f"iradon_sart, {sweeps} sweep{'s' * (sweeps > 1)}, of the powers of two the best by PSNR",
            ),
        ],
    }
    rows = []
    for name, contestants in groups.items():
        outcomes = compete(contestants, scenario.score, rules.repetitions, clock=rules.clock, warm_up=True)
        rows += rows_of(outcomes, {"section": "ct classical", "problem": name} | of_scan(scenario))
    return rows


# -- classical MRI -------------------------------------------------------------------------------------------


def classical_rows(scenario: Scenario, problem: str, rules: Rules) -> list[Row]:
    """CG-SENSE, total variation or wavelets, by everybody, each at its own best λ."""
    target = scenario.case.targets["combined"].numpy()
    data = scenario.problem
    scale = float(data.operator.adjoint(data.y).abs().max())
    y = (data.y / scale).numpy()
    weights = scenario.mask.mask.expand(y.shape[-2:]).numpy().astype(np.float32)
    contestants = []
    for name, method in CLASSICAL[problem].items():
        if name == "BART" and bart() is None:
            continue
        found = best_images(method, scenario, ["combined"])["combined"]
        maps = (scenario.cropped_maps if found.cropped else scenario.maps).numpy()

        def run(seed: int, method: Any = method, maps: np.ndarray = maps, found: Any = found) -> np.ndarray:
            return scale * np.abs(method.solve(y, maps, weights, found.weight))

        remark = f"{method.settings}, λ {found.weight:.2g}{', cropped maps' * found.cropped}"
        contestants.append(Contestant(OURS if name == "ours" else name, run, remark))

    def score(image: np.ndarray) -> float:
        return psnr(target[None], image[None])

    return rows_of(
        compete(contestants, score, rules.repetitions, clock=rules.clock),
        {"section": "classical", "problem": problem} | of_scenario(scenario),
    )


def unexplained(maps: Tensor, images: Tensor) -> float:
    """Part of the energy of coil images ``(C, H, W)`` that no image seen through the maps has, in -dB."""
    weight = maps.abs().square().sum(0)
    combined = (maps.conj() * images).sum(0) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    left = (images - maps * combined).abs().square().sum()
    return -10 * math.log10(float(left / images.abs().square().sum()))


def map_rows(scenario: Scenario, rules: Rules) -> list[Row]:
    """ESPIRiT from the calibration region of the undersampled data, by everybody."""
    y, images = scenario.problem.y, ifftc(scenario.case.kspace)
    region = calibration_region(scenario.mask, (y.shape[-2], y.shape[-1]))
    rows, columns = scenario.calibration

    def ours(seed: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return espirit_maps(y, region, crop=0.0).numpy()

    def sigpy(seed: int) -> np.ndarray:
        from sigpy.mri.app import EspiritCalib

        width = min(rows, columns)  # it takes squares only
        return EspiritCalib(
            y.numpy(), calib_width=width, kernel_width=min(6, width // 2), crop=0.0, show_pbar=False
        ).run()

    contestants = [Contestant(OURS, ours), Contestant("sigpy", sigpy, "a square of the narrower side")]
    if bart() is not None:
        contestants.append(
            Contestant(
                "BART",
                lambda seed: bart_programs.ecalib(y.numpy(), (rows, columns), torch.get_num_threads()),
                "ecalib",
            )
        )

    def score(maps: np.ndarray) -> float:
        return unexplained(torch.from_numpy(np.ascontiguousarray(maps)).to(images.dtype), images)

    return rows_of(
        compete(contestants, score, rules.repetitions, clock=rules.clock, warm_up=True),
        {"section": "maps"} | of_scenario(scenario),
    )
