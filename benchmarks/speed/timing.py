"""Clocks: calls timed in turn within one process, time by parts, exponents of cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from operators.base import LinearOperator
from priors.base import ScorePrior
from recon.solvers.base import KeyedNoise

NETWORK, OPERATOR, DATA, NOISE, REST = "network", "operator", "data consistency", "noise", "rest"


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing: their median, and between what they lie."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of at least one number."""
        if not values:
            raise ValueError("a spread needs at least one measurement")
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.values)

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(tuple(factor * value for value in self.values))

    def over(self, other: Spread) -> Spread:
        """Ratios, round by round, so that a machine whose speed drifts does not tilt them."""
        pairs = zip(self.values, other.values, strict=True)
        return Spread(tuple(own / its for own, its in pairs))

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{short(self.median)} ({short(low)}–{short(high)})"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "n": len(self.values),
        }


def short(value: float) -> str:
    """A number in three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


class Seconds(NamedTuple):
    """Time of a call: by the wall, and of the processor, over all threads of this process."""

    wall: float
    cpu: float


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> Seconds:
    """Time of one call, with everything that it left to the device."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronise(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    repetitions: int,
    device: torch.device,
    *,
    in_a_row: int = 1,
    warmups: int = 1,
) -> dict[str, list[Seconds]]:
    """Time calls in turn, so that what else the machine does falls on all alike.

    Parameters
    ----------
    calls
        By name, in the order in which they are made.
    repetitions
        Rounds that count.
    device
        That is waited for.
    in_a_row
        Calls that are timed together, as an iterative method makes them; the result is that of one.
    warmups
        Rounds before, which do not count.
    """
    result: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(warmups + repetitions):
        for name, call in calls.items():
            together = timed(lambda call=call: [call() for _ in range(in_a_row)], device)  # type: ignore[misc]
            if turn >= warmups:
                result[name].append(Seconds(together.wall / in_a_row, together.cpu / in_a_row))
    return result


def wall(times: Sequence[Seconds]) -> Spread:
    """Spread of the wall times."""
    return Spread.of([one.wall for one in times])


def cpu(times: Sequence[Seconds]) -> Spread:
    """Spread of the processor times, which others on the same machine disturb less."""
    return Spread.of([one.cpu for one in times])


@dataclass(frozen=True)
class Exponent:
    """Exponent p of a cost ``c n^p`` with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"

    def as_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Exponent:
    """Fit the exponent of a cost by least squares on logarithms.

    The interval is that of the slope of a straight line with independent normal errors of equal size
    (Student's t with ``n - 2`` degrees of freedom).

    Parameters
    ----------
    sizes, seconds
        One of each a measurement, positive, at least three and of two sizes.

    Raises
    ------
    ValueError
        If there are too few measurements or sizes, or one is not positive.
    """
    from scipy.stats import t

    x, y = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    if x.shape != y.shape or x.size < 3 or np.unique(x).size < 2:
        raise ValueError(f"an exponent needs three measurements of two sizes, got {x.size} and {y.size}")
    if not (x > 0).all() or not (y > 0).all():
        raise ValueError("an exponent is fitted to positive sizes and times only")
    x, y = np.log(x), np.log(y)
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    left = y - y.mean() - slope * centred
    error = math.sqrt(float(left @ left) / (x.size - 2) / float(centred @ centred))
    half = float(t.ppf(0.975, x.size - 2)) * error
    return Exponent(slope, slope - half, slope + half)


class Parts:
    """A stopwatch whose time belongs to one part at each moment: the innermost that was entered.

    Parameters
    ----------
    device
        Waited for at every change, so that a part is charged with the work that it gave the device.
    clock
        Seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.entries: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge what happens within to a part."""
        self._charge()
        self._open.append(name)
        self.entries[name] = self.entries.get(name, 0) + 1
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        synchronise(self.device)
        now = self.clock()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is charged to a part."""

        def charged(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return charged


@contextmanager
def watched(parts: Parts, solver: Any, prior: ScorePrior, operator: LinearOperator) -> Iterator[None]:
    """Charge network, operator, data consistency and the drawing of noise to parts of their own.

    Functions of the objects are replaced for the time being; what is left belongs to whatever part is open
    outside. A solver without ``data_consistency`` has none apart from its operator's.
    """
    with (
        _replaced(prior, "denoise", lambda of: parts.wrap(NETWORK, of)),
        _replaced(operator, "normal", lambda of: parts.wrap(OPERATOR, of)),
        _replaced(operator, "adjoint", lambda of: parts.wrap(OPERATOR, of)),
        _replaced(operator, "forward", lambda of: parts.wrap(OPERATOR, of)),
        _replaced(solver, "data_consistency", lambda of: lambda *a, **k: parts.wrap(DATA, of(*a, **k))),
        _noise_charged(parts),
    ):
        yield


@contextmanager
def _replaced(
    owner: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put something before a method of one object; a frozen dataclass is no obstacle."""
    if not hasattr(owner, name):
        yield
        return
    vars(owner)[name] = change(getattr(owner, name))
    try:
        yield
    finally:
        del vars(owner)[name]


@contextmanager
def _noise_charged(parts: Parts) -> Iterator[None]:
    # Called as an object, which Python looks up in the class.
    plain = KeyedNoise.__call__

    def charged(self: KeyedNoise, step: int) -> Tensor:
        with parts(NOISE):
            return plain(self, step)

    setattr(KeyedNoise, "__call__", charged)  # noqa: B010 - mypy refuses the assignment to a method
    try:
        yield
    finally:
        setattr(KeyedNoise, "__call__", plain)  # noqa: B010
