"""Classical reconstructions by sigpy, each at the regularisation that suits it best.

The weight λ is chosen by PSNR against the target itself, and so is whether the coil maps are cropped: an
oracle, which nobody has in practice and which flatters these methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Scenario
from recon.errors import ReconError
from recon.metrics import nmse, psnr, ssim

Scores = dict[str, dict[str, float]]
"""Target -> metric -> value."""

EXPONENTS = (-24, 4)
"""First and last exponent k of the grid λ = 2^k, for data scaled to a zero-filled image of maximum 1."""


@dataclass(frozen=True)
class Method:
    """A named reconstruction with one weight.

    Attributes
    ----------
    name : str
        What a table calls it.
    solve : callable
        ``(y, maps, weights, λ) -> image``: complex64 arrays ``(C, H, W)`` and ``(C, H, W)``, float32
        ``(H, W)``, and the image is complex ``(H, W)``. The data are scaled such that the largest magnitude
        of the zero-filled image is 1.
    start : tuple of int
        Exponents of the grid to begin with.
    settings : str
        What else a result depends on.
    """

    name: str
    solve: Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
    start: tuple[int, ...]
    settings: str


def cg_sense(y: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
    """Iterative SENSE with Tikhonov regularisation, ``½|Ax − y|² + λ/2 |x|²`` (Pruessmann et al. 2001)."""
    from sigpy.mri.app import SenseRecon

    return SenseRecon(y, maps, lamda=weight, weights=weights, max_iter=30, tol=1e-3, show_pbar=False).run()


def total_variation(y: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
    """Total variation, ``½|Ax − y|² + λ |Gx|₁`` (Block et al. 2007).

    ADMM rather than sigpy's default for it: 20 rounds of 8 conjugate-gradient steps come closer to the
    minimum than several hundred iterations of the primal-dual method with its default step sizes.
    """
    from sigpy.mri.app import TotalVariationRecon

    return TotalVariationRecon(
        y, maps, weight, weights=weights, solver="ADMM", rho=0.01, max_iter=20, max_cg_iter=8, show_pbar=False
    ).run()


def l1_wavelet(y: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
    """Sparse wavelets, ``½|Ax − y|² + λ |Wx|₁`` (Lustig et al. 2007), by accelerated proximal gradients.

    The operator's norm is at most 1, its maps being normalised, so the step is 1.
    """
    from sigpy.mri.app import L1WaveletRecon

    return L1WaveletRecon(y, maps, weight, weights=weights, max_iter=80, alpha=1, show_pbar=False).run()


METHODS = (
    Method("CG-SENSE", cg_sense, (-7,), "SenseRecon, at most 30 iterations"),
    Method("TV", total_variation, (-10,), "TotalVariationRecon, ADMM, 20 × 8 iterations"),
    Method("L1-wavelet", l1_wavelet, (-9,), "L1WaveletRecon, db4, 80 iterations"),
)


class Cache:
    """Scores on disk, one JSON object a line, so that an interrupted run resumes where it was.

    An entry says how its data looked, in numbers that a change of k-space, maps, or target moves; where they
    differ from the present ones by more than rounding does, the entry is passed over and computed again.

    Parameters
    ----------
    folder : Path or None
        Where ``classical.jsonl`` lies; ``None`` keeps everything in memory.
    """

    TOLERANCE = 1e-3

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "classical.jsonl"
        self._entries: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text() if self.path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a run was stopped while it wrote its last line
                self.path.write_text(whole)
        except OSError as error:
            raise ReconError(f"{self.path}: the cache cannot be used: {error}") from None
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._entries[entry["key"]] = entry
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ReconError(f"{self.path}: line {number} is damaged; remove it or the file") from None

    def scores(
        self, what: dict[str, object], looks: dict[str, float], compute: Callable[[], Scores]
    ) -> Scores:
        """Look the scores up, or compute and store them.

        Parameters
        ----------
        what : dict
            What was done to what, JSON-ready; its hash is the key.
        looks : dict of str to float
            How the data look.
        compute : callable
            Makes the scores.
        """
        key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
        known = self._entries.get(key)
        if known is not None and known["looks"].keys() == looks.keys():
            differences = (abs(known["looks"][name] - value) for name, value in looks.items())
            if all(difference <= self.TOLERANCE for difference in differences):
                return known["scores"]
        scores = compute()
        entry = {"key": key, "what": what, "looks": looks, "scores": scores}
        self._entries[key] = entry
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return scores


def climb(
    evaluate: Callable[[int], Scores], start: Iterable[int], bounds: tuple[int, int] = EXPONENTS
) -> dict[int, Scores]:
    """Try exponents until, for every target, the best one has been tried together with both its neighbours.

    So the best is never at an edge of what was tried, unless that is the edge of the whole grid; it is the
    best of the grid if there is only one maximum.

    Parameters
    ----------
    evaluate : callable
        Exponent -> scores; the higher PSNR is the better.
    start : iterable of int
        Exponents to begin with.
    bounds : tuple of int
        First and last exponent of the grid.

    Returns
    -------
    dict of int to Scores
        Everything tried.
    """
    tried: dict[int, Scores] = {}
    wanted = set(start)
    while wanted:
        for exponent in sorted(wanted):
            tried[exponent] = evaluate(exponent)
        peaks = {best(tried, target) for target in next(iter(tried.values()))}
        around = {peak + step for peak in peaks for step in (-1, 1)}
        wanted = {k for k in around if bounds[0] <= k <= bounds[1]} - tried.keys()
    return tried


def best(tried: dict[int, Scores], target: str) -> int:
    """Exponent with the highest PSNR."""
    return max(tried, key=lambda exponent: tried[exponent][target]["PSNR"])


def score(scenario: Scenario, image: np.ndarray) -> Scores:
    """Metrics of a magnitude image ``(H, W)`` in the units of k-space, against every target of the case."""
    return {name: score_one(target.numpy(), image) for name, target in scenario.case.targets.items()}


def score_one(target: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and NMSE of one image ``(H, W)``, as fastMRI defines them for a volume of one slice."""
    return {metric.__name__.upper(): metric(target[None], image[None]) for metric in (psnr, ssim, nmse)}


def best_scores(method: Method, scenario: Scenario, cache: Cache) -> dict[str, dict[str, float | bool]]:
    """Metrics of a method at its best λ, for every target.

    The grid is climbed with the full maps first. Cropped maps are tried at the λ that was best then, and
    where they win the grid is climbed again with them.

    Returns
    -------
    dict
        Target -> ``PSNR``, ``SSIM``, ``NMSE``, ``lambda``, ``cropped``.
    """
    problem, targets = scenario.problem, scenario.case.targets
    combined = problem.operator.adjoint(problem.y).abs()
    scale = float(combined.max())
    if not scale > 0:
        raise ReconError(f"{scenario.case.name}: the acquired data are all zero")
    y = (problem.y / scale).numpy()
    weights = scenario.mask.mask.expand(y.shape[-2:]).numpy().astype(np.float32)
    looks = {
        f"PSNR of |Aᴴy|, {name}": psnr(t.numpy()[None], combined.numpy()[None]) for name, t in targets.items()
    }
    sampled = hashlib.blake2b(np.packbits(weights > 0).tobytes(), digest_size=16).hexdigest()

    def evaluate(exponent: int, *, cropped: bool) -> Scores:
        maps = scenario.cropped_maps if cropped else scenario.maps
        what: dict[str, object] = {
            "case": scenario.case.name,
            "mask": sampled,
            "method": method.name,
            "settings": method.settings,
            "cropped": cropped,
            "exponent": exponent,
        }
        seen = looks | ({"cropped": float((maps == 0).all(0).double().mean())} if cropped else {})

        def compute() -> Scores:
            return score(scenario, scale * np.abs(method.solve(y, maps.numpy(), weights, 2.0**exponent)))

        return cache.scores(what, seen, compute)

    tried = {False: climb(lambda k: evaluate(k, cropped=False), method.start)}
    peaks = {target: best(tried[False], target) for target in targets}
    tried[True] = {k: evaluate(k, cropped=True) for k in sorted(set(peaks.values()))}
    better = {
        k for target, k in peaks.items() if tried[True][k][target]["PSNR"] > tried[False][k][target]["PSNR"]
    }
    if better:
        tried[True] |= climb(lambda k: evaluate(k, cropped=True), better)
    result: dict[str, dict[str, float | bool]] = {}
    for target in targets:
        cropped = max(tried, key=lambda c: tried[c][best(tried[c], target)][target]["PSNR"])
        exponent = best(tried[cropped], target)
        result[target] = {**tried[cropped][exponent][target], "lambda": 2.0**exponent, "cropped": cropped}
    return result
