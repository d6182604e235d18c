"""Time and memory that a piece of work takes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

import torch

INTERVAL = 0.01
"""Seconds between two looks at the memory."""

_STATM = Path("/proc/self/statm")


def resident_mb() -> float | None:
    """Memory of this process that is resident now, MB; None where the system does not tell."""
    import resource

    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize() / 1e6


class Meter:
    """Measures what happens in a ``with`` block.

    A thread looks at the resident memory every ten milliseconds, so that the peak is that of the block and
    not of what ran before in the process, as the operating system's own peak would be.

    Attributes
    ----------
    wall_s, cpu_s : float
        Seconds; of the processor, over all threads.
    memory_mb, memory_added_mb : float or None
        Peak of the resident memory, and by how much it exceeds that at the beginning; None where the system
        does not tell.
    gpu_memory_mb : float or None
        Peak of what torch allocated on the GPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.wall_s = self.cpu_s = 0.0
        self.memory_mb: float | None = None
        self.memory_added_mb: float | None = None
        self.gpu_memory_mb: float | None = None
        self._device = device if device.startswith("cuda") else None
        self._done = threading.Event()
        self._peak = 0.0
        self._before: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._peak = max(self._peak, resident_mb() or 0.0)

    def __enter__(self) -> Meter:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._before = resident_mb()
        self._peak = self._before or 0.0
        if self._before is not None:
            self._thread.start()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            self.gpu_memory_mb = torch.cuda.max_memory_allocated(self._device) / 1e6
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if self._before is not None:
            self._done.set()
            self._thread.join()
            self.memory_mb = max(self._peak, resident_mb() or 0.0)
            self.memory_added_mb = self.memory_mb - self._before
