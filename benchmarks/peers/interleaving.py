"""Contestants in turn within one process, and what of one is what of the other."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CLOCKS = ("cpu", "wall")

SHORTEST, MOST_CALLS = 0.05, 50
"""Seconds that a measurement lasts at least, by as many calls as it takes, within reason."""


def now(clock: str) -> float:
    """Seconds: of the wall, or of processors spent by this process and the programs that it ran."""
    if clock == "wall":
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass(frozen=True)
class Contestant:
    """Something that makes an image.

    Attributes
    ----------
    name : str
        What tables call it.
    run : callable
        ``seed -> image``, in the units in which it is scored.
    remark : str
        Settings, and what else a reader should know.
    """

    name: str
    run: Callable[[int], np.ndarray]
    remark: str = ""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one number."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """``median (low–high)`` in a format."""
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


@dataclass(frozen=True)
class Outcome:
    """What one contestant did in every round.

    Attributes
    ----------
    contestant : Contestant
        Which.
    seconds, scores : tuple of float
        Time and score, a round each.
    """

    contestant: Contestant
    seconds: tuple[float, ...]
    scores: tuple[float, ...]

    def time_ratio(self, other: Outcome) -> Spread:
        """Its time over the other's, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])

    def score_difference(self, other: Outcome) -> Spread:
        """Its score minus the other's, round by round."""
        return Spread.of([a - b for a, b in zip(self.scores, other.scores, strict=True)])


def timed(contestant: Contestant, seed: int, clock: str) -> tuple[np.ndarray, float]:
    """Image of one call, and the seconds of a call; what takes next to no time is called several times."""
    start = now(clock)
    image = contestant.run(seed)
    spent = now(clock) - start
    if spent >= SHORTEST:
        return image, spent
    calls = min(MOST_CALLS, math.ceil(SHORTEST / max(spent, SHORTEST / MOST_CALLS)))
    start = now(clock)
    for _ in range(calls):
        contestant.run(seed)
    return image, max((now(clock) - start) / calls, np.finfo(float).tiny)


def compete(
    contestants: Sequence[Contestant],
    score: Callable[[np.ndarray], float],
    repetitions: int,
    *,
    seed: int = 0,
    clock: str = "cpu",
    warm_up: bool = False,
) -> list[Outcome]:
    """Run all of them in turn, again and again, so that a machine whose speed drifts tilts no ratio.

    Parameters
    ----------
    contestants : sequence of Contestant
        Each runs once a round, with the round's seed.
    score : callable
        Image -> score.
    repetitions : int
        Rounds.
    seed : int
        Of the first round; each following one has the next.
    clock : str
        One of `CLOCKS`.
    warm_up : bool
        Whether a first round does not count.
    """
    seconds: list[list[float]] = [[] for _ in contestants]
    scores: list[list[float]] = [[] for _ in contestants]
    for round_number in range(-1 if warm_up else 0, repetitions):
        for contestant, times, values in zip(contestants, seconds, scores, strict=True):
            image, spent = timed(contestant, seed + max(round_number, 0), clock)
            if round_number >= 0:
                times.append(spent)
                values.append(score(image))
    made = zip(contestants, seconds, scores, strict=True)
    return [Outcome(contestant, tuple(times), tuple(values)) for contestant, times, values in made]
