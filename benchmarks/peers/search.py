"""An oracle for settings that a peer leaves to its user: a small grid, judged by PSNR against the target.

A setting counts by the mean over the very seeds that are scored afterwards: with some seeds a peer may fail,
and a setting chosen by one of those alone suits no other. Nobody has such an oracle in practice, so it
flatters whom it serves. Our own solvers get none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.classical import Scores, best, climb
from benchmarks.peers.deepinv_solvers import DENOISED, RETURNED, DivergedError, Picture, Setting

TARGET = "target"


@dataclass(frozen=True)
class Grid:
    """Settings that are tried.

    Attributes
    ----------
    climbed : str
        Option of which the powers of two are climbed.
    bounds : tuple of int
        Smallest and largest exponent.
    others : tuple of (mapping, int or None)
        Further options, and the exponent from which the powers are climbed with them. None: from the best one
        of the first of these, if they are better there.
    """

    climbed: str
    bounds: tuple[int, int]
    others: tuple[tuple[Mapping[str, Any], int | None], ...]

    def setting(self, solver: str, nfe: int, exponent: int, other: int) -> Setting:
        """One point."""
        return Setting(solver, nfe, {self.climbed: 2.0**exponent, **self.others[other][0]})


GRIDS = {
    # The gradient of the norm is of unit size, so with fewer steps they have to be longer.
    "DPS": Grid("weight", (-6, 14), (({"guidance": "norm"}, 3), ({"guidance": "annealed"}, 0))),
    "DiffPIR": Grid("lambda_", (-8, 14), (({"zeta": 0.1}, 3), ({"zeta": 0.5}, None), ({"zeta": 1.0}, None))),
    "DDRM": Grid("largest", (-12, 6), (({"geometric": False}, 0), ({"geometric": True}, None))),
}
"""Solver -> grid. What is not named stays at deepinv's defaults."""

ORACLE = (
    "the image that it returns or the one that its network made last, and of its settings "
    "{settings}, chosen by the mean PSNR against the target itself over the very seeds that are scored, an "
    "oracle, which flatters it"
)


def described(solver: str) -> str:
    """What the oracle chooses."""
    grid = GRIDS[solver]
    names = [
        f"{grid.climbed} of the powers of two",
        *{name: None for other, _ in grid.others for name in other},
    ]
    return ORACLE.format(settings=" and ".join(names))


@dataclass(frozen=True)
class Choice:
    """What suits a solver best.

    Attributes
    ----------
    setting : Setting
        Its options.
    output : str
        ``returned`` or ``denoised``.
    psnr : float
        That it reached, dB, the mean over seeds.
    """

    setting: Setting
    output: str
    psnr: float

    @property
    def text(self) -> str:
        """For a table."""
        taken = "" if self.output == RETURNED else ", last denoised image"
        return self.setting.text + taken


def output(picture: Picture, which: str) -> Tensor:
    """The image of that name."""
    return picture.image if which == RETURNED else picture.denoised


def search(
    solver: str,
    nfe: int,
    seeds: Sequence[int],
    run: Callable[[Setting, int], Picture],
    score: Callable[[Tensor], float],
) -> Choice:
    """Find what suits a solver of deepinv best.

    Parameters
    ----------
    solver : str
        Its name.
    nfe : int
        Network evaluations, which are kept.
    seeds : sequence of int
        Of the samples over which PSNR is averaged.
    run : callable
        Draws a sample with a setting and a seed.
    score : callable
        PSNR of an image in the prior's units. What is not a number, and what diverges, counts as the worst.

    Returns
    -------
    Choice
        The best of everything tried.

    Raises
    ------
    DivergedError
        If no setting gives finite images with every seed.
    """
    grid = GRIDS[solver]
    tried: dict[tuple[int, int], Choice] = {}

    def evaluate(exponent: int, other: int) -> Scores:
        if (exponent, other) not in tried:
            setting = grid.setting(solver, nfe, exponent, other)
            try:
                pictures = [run(setting, seed) for seed in seeds]
                scores = {
                    which: statistics.fmean(score(output(picture, which)) for picture in pictures)
                    for which in (RETURNED, DENOISED)
                }
            except DivergedError:
                scores = {RETURNED: -math.inf}
            finite = {which: value if math.isfinite(value) else -math.inf for which, value in scores.items()}
            which = max(finite, key=lambda key: finite[key])
            tried[exponent, other] = Choice(setting, which, finite[which])
        return {TARGET: {"PSNR": tried[exponent, other].psnr}}

    peak = 0
    for other, (_, start) in enumerate(grid.others):

        def along(exponent: int, other: int = other) -> Scores:
            return evaluate(exponent, other)

        if start is None:
            along(peak)
            if tried[peak, other].psnr > tried[peak, 0].psnr:
                climb(along, (peak,), grid.bounds)
            continue
        found = best(climb(along, (start,), grid.bounds), TARGET)
        peak = found if other == 0 else peak
    chosen = max(tried.values(), key=lambda choice: choice.psnr)
    if chosen.psnr == -math.inf:
        raise DivergedError(f"{solver} of deepinv: no setting that was tried gives finite images")
    return chosen
