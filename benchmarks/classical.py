"""Classical reconstructions by sigpy, each at the regularisation that suits it best.

The weight λ is chosen by PSNR against the target itself, and so is whether the coil maps are cropped: an
oracle, which nobody has in practice and which flatters these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def score_one(target: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and NMSE of one image ``(H, W)``, as fastMRI defines them for a volume of one slice."""
    return {metric.__name__.upper(): metric(target[None], image[None]) for metric in (psnr, ssim, nmse)}


@dataclass(frozen=True, eq=False)
class Found:
    """A method's image at what suits it best for one target.

    Attributes
    ----------
    image : ndarray
        Magnitude ``(H, W)`` in the units of k-space, float32.
    weight : float
        The weight λ.
    cropped : bool
        Whether the coil maps are cropped.
    scores : dict of str to float
        Metrics against the target.
    """

    image: np.ndarray
    weight: float
    cropped: bool
    scores: dict[str, float]


def best_images(method: Method, scenario: Scenario, targets: Iterable[str] | None = None) -> dict[str, Found]:
    """Images of a method at its best λ, for every target of the case, or for those named.

    The grid is climbed with the full maps first. Cropped maps are tried at the λ that was best then, and
    where they win the grid is climbed again with them.

    Raises
    ------
    ReconError
        If nothing was acquired.
    """
    problem = scenario.problem
    names = list(scenario.case.targets) if targets is None else list(targets)
    scale = float(problem.operator.adjoint(problem.y).abs().max())
    if not scale > 0:
        raise ReconError(f"{scenario.case.name}: the acquired data are all zero")
    y = (problem.y / scale).numpy()
    weights = scenario.mask.mask.expand(y.shape[-2:]).numpy().astype(np.float32)
    images: dict[tuple[bool, int], np.ndarray] = {}
    known: dict[tuple[bool, int], Scores] = {}

    def evaluate(exponent: int, *, cropped: bool) -> Scores:
        if (cropped, exponent) in known:
            return known[cropped, exponent]
        maps = scenario.cropped_maps if cropped else scenario.maps
        image = scale * np.abs(method.solve(y, maps.numpy(), weights, 2.0**exponent)).astype(np.float32)
        images[cropped, exponent] = image
        scores = {name: score_one(scenario.case.targets[name].numpy(), image) for name in names}
        known[cropped, exponent] = scores
        return scores

    tried = {False: climb(lambda k: evaluate(k, cropped=False), method.start)}
    peaks = {name: best(tried[False], name) for name in names}
    tried[True] = {k: evaluate(k, cropped=True) for k in sorted(set(peaks.values()))}
    better = {k for name, k in peaks.items() if tried[True][k][name]["PSNR"] > tried[False][k][name]["PSNR"]}
    if better:
        tried[True] |= climb(lambda k: evaluate(k, cropped=True), better)
    result = {}
    for name in names:
        cropped = max(tried, key=lambda c: tried[c][best(tried[c], name)][name]["PSNR"])
        exponent = best(tried[cropped], name)
        result[name] = Found(
            images[cropped, exponent], 2.0**exponent, cropped, tried[cropped][exponent][name]
        )
    return result
