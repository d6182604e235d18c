"""What the comparison needs beside the project: Python packages of an environment of their own, and BART.

Nothing here is imported by the project's own modules. The packages are looked for in the function that needs
them, and a sentence says where they come from if they are not there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from functools import cache
from types import ModuleType

from recon.errors import ReconError

NEEDS_TORCHVISION = ("deepinv",)
"""Packages that import torchvision, for pictures that are not made here."""

TORCHVISION_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "ps_roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width) -> (Tensor, Tensor)",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
}
"""Operators that torchvision says something about while it is imported, whether its binaries fit or not."""


def peer(name: str) -> ModuleType:
    """Import a package of the peers' environment, or one of its modules by its dotted name.

    Raises
    ------
    ReconError
        If it is not installed, or cannot be imported.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ReconError(
            f"{package} is not installed: `make peers` makes the environment .venv-peers, "
            "and the command is to be run with its python"
        )
    if package in NEEDS_TORCHVISION:
        import_torchvision()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ReconError(f"{name} cannot be imported: {error}") from None


@cache
def import_torchvision() -> None:
    """Import torchvision, also where its binaries are for another build of torch.

    torchvision describes its operators to torch when it is imported, which fails if the binaries that define
    them did not load. They are declared then, without an implementation: pictures can be transformed, and
    whoever calls one of them is told that it is not there.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        raise ReconError(
            f"torchvision is missing ({error}): `make peers` makes the environment .venv-peers, "
            "and the command is to be run with its python"
        ) from None
    except RuntimeError:
        _declare_operators()
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    """Declare operators that are missing, and forget the modules of a torchvision that failed half way."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in TORCHVISION_OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _LIBRARIES.append(library)
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]


_LIBRARIES: list[object] = []
"""Declarations last as long as the object that made them."""


def bart() -> str | None:
    """Path of the program ``bart``; None where it is not installed."""
    return shutil.which("bart")


NO_BART = "BART is not installed (Debian and Ubuntu: the package bart), so it is left out"


def bart_version() -> str:
    """Version of BART, or that there is none."""
    path = bart()
    if path is None:
        return "none"
    return subprocess.run([path, "version"], capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of everything that takes part; ``none`` where it is not installed."""
    found = {}
    for name in ("torch", "deepinv", "sigpy", "scikit-image", "astra-toolbox"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    found["BART"] = bart_version()
    return found


def main() -> None:
    """Import every package once, and say what there is."""
    for name in ("deepinv", "fastmri.models", "sigpy", "skimage", "astra"):
        peer(name)
    listed = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"the peers can be imported: {listed}")


if __name__ == "__main__":
    try:
        main()
    except ReconError as error:
        sys.exit(f"error: {error}")
