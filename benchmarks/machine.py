"""Where and how a benchmark ran, as its page says it."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def cpu_name() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: str = "cpu", threads: Sequence[int] = ()) -> str:
    """Processor, cores, threads of torch (now, if not given), and the name of the GPU where one is used."""
    used = ", ".join(map(str, threads or [torch.get_num_threads()]))
    text = f"{cpu_name()}, {os.cpu_count()} cores, {used} used by torch"
    if device.startswith("cuda") and torch.cuda.is_available():
        text += f"; {torch.cuda.get_device_name(device)}"
    return text


def versions(packages: Sequence[str]) -> str:
    """Packages with their versions; those that are not installed are left out."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def command(module: str, arguments: Sequence[str]) -> str:
    """Command as typed, with file names for paths: where files lie on a machine is nobody's concern."""
    shown = [word.rstrip("/").rpartition("/")[2] if "/" in word else word for word in arguments]
    return shlex.join(["python", "-m", module, *shown])
