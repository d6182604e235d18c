"""Other software as methods of the benchmark: `benchmarks.matrix.base.Method`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks import classical
from benchmarks.cases import Scenario
from benchmarks.classical import best_images
from benchmarks.ct_quality import Task
from benchmarks.matrix.base import Reconstruction
from benchmarks.peers import bart_programs
from benchmarks.peers.deepinv_solvers import (
    RETURNED,
    PictureProblem,
    Setting,
    ct_picture,
    mri_picture,
)
from benchmarks.peers.environment import NO_BART, bart, bart_version, peer, versions
from benchmarks.peers.search import Choice, described, output, search
from operators.ct import CTOperator
from operators.fft import ifftc
from operators.mri import MulticoilMRI, SinglecoilMRI
from priors.base import ScorePrior
from recon.ct import ct_problem
from recon.errors import ReconError
from recon.metrics import psnr
from recon.posterior import Moments
from recon.scale import Scale
from recon.solvers.base import KeyedNoise, Problem, Solver
from recon.solvers.tikhonov import Tikhonov
from recon.solvers.total_variation import TotalVariation
from recon.solvers.wavelet import L1Wavelet

__all__ = ["CLASSICAL", "BartMethod", "DeepinvMethod", "Posed", "pose_ct", "pose_mri"]

SEED_STRIDE = 7919
"""Between the seeds of samples, so that those of neighbouring seeds of a case differ."""


@dataclass(frozen=True, eq=False)
class Posed:
    """A problem as deepinv sees it, and how its images are scored.

    Attributes
    ----------
    picture : PictureProblem
        For its solvers.
    finish : callable
        Image in the prior's units -> image ``(H, W)`` in those of the case, magnitude or HU.
    score : callable
        Finished image -> PSNR in dB against the target that settings are chosen by.
    """

    picture: PictureProblem
    finish: Callable[[Tensor], Tensor]
    score: Callable[[np.ndarray], float]

    def psnr(self, image: Tensor) -> float:
        """PSNR of an image in the prior's units."""
        return self.score(self.finish(image).numpy())

    def choose(self, solver: str, nfe: int, prior: ScorePrior, seeds: Sequence[int]) -> Choice:
        """What suits a solver best with these seeds."""
        return search(
            solver, nfe, seeds, lambda setting, seed: setting.run(self.picture, prior, seed), self.psnr
        )


def pose_mri(problem: Problem, prior: ScorePrior, target: np.ndarray) -> Posed:
    """MRI in the scanner's units ``(C, H, W)`` or ``(H, W)``, held against a magnitude image ``(H, W)``."""
    scale = Scale.estimate(problem.y, problem.operator, prior.contract.level)
    scaled = Problem(scale.apply(problem.y), problem.operator, problem.noise_std / scale.factor)
    return Posed(
        mri_picture(scaled),
        lambda image: scale.undo(image).abs(),
        lambda image: psnr(target[None], image[None]),
    )


def pose_ct(task: Task) -> Posed:
    """A parallel-beam scan; every datum counts the same, as deepinv's data terms have it.

    Raises
    ------
    ReconError
        If deepinv cannot have that scan: its detector is as long as the diagonal, its image square.
    """
    measured = task.measurement
    operator = measured.operator
    assert isinstance(operator, CTOperator)
    sinogram, operator = trimmed(measured.sinogram, operator)
    plain = ct_problem(sinogram, operator, task.settings, weighted=False, normalised=False)
    return Posed(
        ct_picture(sinogram, operator, plain.noise_std, task.settings.unit),
        lambda image: 1000 * image - 1000,
        task.psnr,
    )


def trimmed(sinogram: Tensor, operator: CTOperator) -> tuple[Tensor, CTOperator]:
    """Leave out elements at both ends of a detector that see nothing of the image, as scans here have them.

    scikit-image and deepinv have a detector that is just as long as the image's diagonal.
    """
    from benchmarks.peers.deepinv_solvers import detectors_of

    geometry = operator.geometry
    surplus = geometry.num_detectors - detectors_of(max(operator.domain_shape))
    if surplus <= 0 or surplus % 2:
        return sinogram, operator
    kept = sinogram[..., surplus // 2 : -(surplus // 2)].contiguous()
    shorter = replace(geometry, num_detectors=kept.shape[-1])
    return kept, CTOperator(shorter, operator.domain_shape, operator.pixel_size)


@dataclass(frozen=True, eq=False)
class DeepinvMethod:
    """A diffusion solver of deepinv with our prior, at the settings that suit it best or at its defaults.

    Settings are chosen by its samples' mean PSNR against the target ``combined`` of MRI, or the truth of CT.
    ``DDRM`` needs a singular value decomposition, which an operator of several coils does not have: it
    reconstructs every coil on its own, and the image is the root sum of squares.

    Attributes
    ----------
    name : str
        What a table calls it.
    solver : str
        ``DPS``, ``DiffPIR`` or ``DDRM``.
    prior : ScorePrior
        The prior.
    nfe : int
        Network evaluations a sample.
    oracle : bool
        Whether settings are chosen; else they are deepinv's defaults.
    num_samples : int
        Samples that are averaged.

    Raises
    ------
    ReconError
        If deepinv is not installed, there is no such solver, or a number is out of its range.
    """

    name: str
    solver: str
    prior: ScorePrior
    nfe: int = 30
    oracle: bool = True
    num_samples: int = 1
    needs_seed: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        peer("deepinv")
        Setting(self.solver, self.nfe)
        if self.num_samples < 1:
            raise ReconError(f"num_samples must be at least 1, got {self.num_samples}")

    @cached_property
    def settings(self) -> str:
        """Version, evaluations, and what is chosen."""
        chosen = described(self.solver) if self.oracle else "its defaults"
        count = f"{self.num_samples} sample{'s' * (self.num_samples > 1)}"
        return f"deepinv {versions()['deepinv']}, {self.nfe} evaluations, {count}, {chosen}"

    def reconstruct(self, case: Scenario | Task, seed: int) -> Reconstruction:
        """Choose settings, and draw samples with them; those that were tried count in the time."""
        if isinstance(case, Task):
            return self._sampled(pose_ct(case), seed)
        problem = Problem(case.problem.y, case.problem.operator, case.problem.noise_std)
        if self.solver != "DDRM" or not isinstance(problem.operator, MulticoilMRI):
            return self._sampled(pose_mri(problem, self.prior, case.case.targets["combined"].numpy()), seed)
        squares = torch.zeros(problem.operator.domain_shape)
        nfe = 0
        chosen: dict[str, str] = {}
        for index, coil in enumerate(coils(problem)):
            target = ifftc(case.case.kspace[index]).abs().numpy()
            made = self._sampled(pose_mri(coil, self.prior, target), seed)
            squares += made.image.square()
            nfe += made.nfe
            chosen |= {f"coil {index}": made.chosen.get("setting", "")}
        return Reconstruction(squares.sqrt(), nfe=nfe, chosen=chosen, num_samples=self.num_samples)

    def _sampled(self, posed: Posed, seed: int) -> Reconstruction:
        seeds = [seed + SEED_STRIDE * index for index in range(self.num_samples)]
        choice = Choice(Setting(self.solver, self.nfe), RETURNED, float("nan"))
        if self.oracle:
            choice = posed.choose(self.solver, self.nfe, self.prior, seeds)
        moments, nfe = Moments(), 0
        images = []
        for one in seeds:
            made = choice.setting.run(posed.picture, self.prior, one)
            nfe += made.nfe
            images.append(output(made, choice.output))
            moments.add(posed.finish(images[-1]))
        # As ours are: the magnitude of the mean, and the standard deviation of the magnitude.
        return Reconstruction(
            posed.finish(torch.stack(images).mean(0)),
            std=moments.std.float() if self.num_samples > 1 else None,
            nfe=nfe,
            chosen={"setting": choice.text},
            num_samples=self.num_samples,
        )


def coils(problem: Problem) -> Iterator[Problem]:
    """Every coil as a problem of its own."""
    operator = problem.operator
    assert isinstance(operator, MulticoilMRI)
    for y in problem.y:
        yield Problem(y, SinglecoilMRI(operator.mask, operator.domain_shape), problem.noise_std)


# -- classical -----------------------------------------------------------------------------------------------


def _ours(make: Callable[[float], Solver]) -> Callable[..., np.ndarray]:
    """Solve by a solver of `recon.solvers`, in the shape of `benchmarks.classical.Method`."""

    def solve(y: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
        operator = MulticoilMRI(torch.from_numpy(maps), torch.from_numpy(weights))
        data = torch.from_numpy(y)
        noise = KeyedNoise(0, "", [0], operator.domain_shape, data.dtype, data.device)
        with torch.no_grad():
            solution = make(weight).sample(Problem(data, operator, 0.0), None, noise)
        return solution.samples[0].numpy()

    return solve


def _bart(kind: str) -> Callable[..., np.ndarray]:
    """Solve by ``bart pics``."""

    def solve(y: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
        return bart_programs.pics(y, maps, weight, kind, threads=torch.get_num_threads())

    return solve


_SIGPY = {method.name: method for method in classical.METHODS}

CLASSICAL: dict[str, dict[str, classical.Method]] = {
    "CG-SENSE": {
        "ours": classical.Method("ours", _ours(lambda w: Tikhonov(w, 30)), (-7,), "Tikhonov, 30 steps"),
        "sigpy": _SIGPY["CG-SENSE"],
        "BART": classical.Method("BART", _bart("l2"), (-7,), "pics -l2, at most 100 steps"),
    },
    "TV": {
        "ours": classical.Method(
            "ours", _ours(lambda w: TotalVariation(w, 200)), (-10,), "TotalVariation, 200 steps"
        ),
        "sigpy": _SIGPY["TV"],
        "BART": classical.Method(
            "BART",
            _bart("tv"),
            (-10,),
            f"pics -R T, ADMM of at most {bart_programs.ITERATIONS['tv']} conjugate-gradient steps in all, "
            f"-u {bart_programs.RHO:g}",
        ),
    },
    "L1-wavelet": {
        "ours": classical.Method("ours", _ours(lambda w: L1Wavelet(w, 100)), (-9,), "L1Wavelet, 100 steps"),
        "sigpy": _SIGPY["L1-wavelet"],
        "BART": classical.Method("BART", _bart("wavelet"), (-9,), "pics -l1, 100 steps"),
    },
}
"""Problem -> who solves it -> how, each at its own best λ."""

PENALTIES = {"l2": "CG-SENSE", "tv": "TV", "wavelet": "L1-wavelet"}


@dataclass(frozen=True, eq=False)
class BartMethod:
    """``bart pics`` at the weight, and with the maps, that suit it best for every target.

    Attributes
    ----------
    name : str
        What a table calls it.
    penalty : str
        ``l2``, ``tv`` or ``wavelet``.

    Raises
    ------
    ReconError
        If BART is not installed, or there is no such penalty.
    """

    name: str
    penalty: str = "wavelet"
    needs_seed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise ReconError(f"bart pics penalises {', '.join(PENALTIES)}, not {self.penalty!r}")
        if bart() is None:
            raise ReconError(NO_BART)

    @cached_property
    def settings(self) -> str:
        """Version, tool, and what is chosen."""
        method = CLASSICAL[PENALTIES[self.penalty]]["BART"]
        return (
            f"BART {bart_version()}, {method.settings}; λ of the powers of two, and maps cropped or not, "
            "chosen by PSNR against the target itself, an oracle, which flatters it"
        )

    def reconstruct(self, case: Scenario, seed: int) -> Reconstruction:
        """Climb to the best weight of every target."""
        found = best_images(CLASSICAL[PENALTIES[self.penalty]]["BART"], case)
        images = {target: torch.from_numpy(item.image) for target, item in found.items()}
        chosen = {t: f"{item.weight:.2g}{' c' if item.cropped else ''}" for t, item in found.items()}
        return Reconstruction(next(iter(images.values())), chosen=chosen, per_target=images)
