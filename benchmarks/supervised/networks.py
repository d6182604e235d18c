"""The U-Net and the E2E-VarNet of the `fastmri` package: build them, and read and write their weights.

E2E-VarNet: Sriram et al., "End-to-end variational networks for accelerated MRI reconstruction", MICCAI 2020;
U-Net: Zbontar et al., arXiv:1811.08839. The networks are those of the package itself; which one a file of
weights belongs to, and its size, follow from the names and shapes of its tensors.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import ReconError

MODELS = ("varnet", "unet")
FORMAT = "recon-supervised-1"


@dataclass(frozen=True)
class VarNetConfiguration:
    """Size of an E2E-VarNet, by the names of `fastmri.models.VarNet`; as published if nothing is given.

    Attributes
    ----------
    num_cascades : int
        Number of cascades.
    pools, chans : int
        Levels and channels at the finest of them, of the U-Net of a cascade.
    sens_pools, sens_chans : int
        The same for the U-Net that estimates the coil sensitivities.
    """

    num_cascades: int = 12
    pools: int = 4
    chans: int = 18
    sens_pools: int = 4
    sens_chans: int = 8

    @property
    def model(self) -> str:
        """The name of the network."""
        return "varnet"


@dataclass(frozen=True)
class UNetConfiguration:
    """Size of a U-Net from one image to one image, by the names of `fastmri.models.Unet`.

    Attributes
    ----------
    chans : int
        Channels at the finest level.
    num_pool_layers : int
        Number of levels.
    """

    chans: int = 32
    num_pool_layers: int = 4

    @property
    def model(self) -> str:
        """The name of the network."""
        return "unet"


Configuration = VarNetConfiguration | UNetConfiguration
PUBLISHED_VARNET = VarNetConfiguration()
"""Of ``knee_leaderboard_state_dict.pt`` and ``brain_leaderboard_state_dict.pt``: 29.9 million parameters."""
PUBLISHED_UNET = UNetConfiguration(chans=256, num_pool_layers=4)
"""Of the published U-Nets of the leaderboard."""


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file of weights holds.

    Attributes
    ----------
    configuration : Configuration
        Network and size, read off the tensors.
    state : dict of str to Tensor
        Names as the network has them.
    training : mapping
        How it was trained, where the file says so (those of this package's trainer do); else empty.
    digest : str
        First twelve hexadecimal digits of the file's SHA-256.
    """

    configuration: Configuration
    state: dict[str, Tensor]
    training: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def published(self) -> bool:
        """Whether it has the size of a published network and says nothing of another origin."""
        return not self.training and self.configuration in (PUBLISHED_VARNET, PUBLISHED_UNET)


def build(configuration: Configuration) -> nn.Module:
    """Make the network of the `fastmri` package, with random weights.

    Raises
    ------
    ReconError
        If `fastmri` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its dependencies deprecate is not ours to mend
            models = import_module("fastmri.models")
    except ImportError as error:
        raise ReconError(
            f"the supervised networks need the package fastmri ({error}): `make peers` makes the environment "
            ".venv-peers, run this with .venv-peers/bin/python"
        ) from None
    if isinstance(configuration, VarNetConfiguration):
        return models.VarNet(**asdict(configuration))
    return models.Unet(in_chans=1, out_chans=1, **asdict(configuration))


def configuration_of(state: Mapping[str, Tensor]) -> Configuration:
    """Read network and size off the names and shapes of a state dict.

    Raises
    ------
    ReconError
        If it is of neither network, or a tensor that says the size is missing.
    """

    def first(prefix: str) -> Tensor:
        name = f"{prefix}down_sample_layers.0.layers.0.weight"
        if name not in state or state[name].ndim != 4:
            raise ReconError(f"the tensor {name} is missing, or no convolution")
        return state[name]

    def count(pattern: str) -> int:
        found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
        return max(found, default=-1) + 1

    layers = r"down_sample_layers\.(\d+)\."
    if any(key.startswith(("cascades.", "sens_net.")) for key in state):
        inner, sens = "cascades.0.model.unet.", "sens_net.norm_unet.unet."
        return VarNetConfiguration(
            num_cascades=count(r"cascades\.(\d+)\."),
            pools=count(re.escape(inner) + layers),
            chans=first(inner).shape[0],
            sens_pools=count(re.escape(sens) + layers),
            sens_chans=first(sens).shape[0],
        )
    if any(key.startswith(("down_sample_layers.", "up_conv.")) for key in state):
        layer = first("")
        if layer.shape[1] != 1:
            raise ReconError(f"the U-Net takes {layer.shape[1]} channels, a magnitude image has one")
        return UNetConfiguration(chans=layer.shape[0], num_pool_layers=count(layers))
    shown = ", ".join(list(state)[:3]) or "nothing"
    raise ReconError(f"the tensors are those of no VarNet or U-Net of fastmri: {shown}")


def read_weights(path: str | Path) -> Weights:
    """Read a file of weights: one of the trainer's, a published flat state dict, or one that is wrapped.

    Wrapped are those with ``state_dict`` inside, or names behind a prefix such as ``varnet.`` or ``unet.``,
    as Lightning writes them; tensors beside the network's (the window of a loss, say) are left out then. No
    code of the file is run.

    Raises
    ------
    ReconError
        Naming the file, if it is missing, damaged or of another network.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        with path.open("rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReconError(f"{path} cannot be read as weights: {reason}") from None
    training: dict[str, Any] = {}
    if isinstance(stored, Mapping) and stored.get("format") == FORMAT:
        training, stored = dict(stored["training"]), stored["network"]
    while isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not stored:
        raise ReconError(f"{path} holds no state dict but {type(stored).__name__}")
    tensors = {str(key): value for key, value in stored.items() if isinstance(value, Tensor)}
    state = _without_prefix(tensors)
    try:
        configuration = configuration_of(state)
    except ReconError as error:
        raise ReconError(f"{path}: {error}") from None
    return Weights(configuration, state, training, hashlib.sha256(content).hexdigest()[:12])


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the names down to what the network calls its tensors, if all of its tensors share a prefix."""
    for marker in ("sens_net.norm_unet.", "down_sample_layers.0.layers.0.weight"):
        found = next((key for key in tensors if marker in key), None)
        if found is None:
            continue
        prefix = found[: found.index(marker)]
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return dict(tensors)


def load_network(weights: Weights, path: str | Path) -> nn.Module:
    """Build the network of a file and load its tensors, all of them and no others; for inference.

    Raises
    ------
    ReconError
        Naming `path` and the tensors, if some are missing, are not the network's or have another shape; if
        `fastmri` is not installed.
    """
    network = build(weights.configuration)
    own = network.state_dict()
    problems = []
    for what, names in (
        ("missing", [key for key in own if key not in weights.state]),
        ("not the network's", [key for key in weights.state if key not in own]),
        (
            "of another shape",
            [key for key in own if key in weights.state and own[key].shape != weights.state[key].shape],
        ),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{what}: {', '.join(names[:4])}{more}")
    if problems:
        raise ReconError(f"{path} does not fit a {weights.configuration}: {'; '.join(problems)}")
    network.load_state_dict(weights.state)
    return network.eval().requires_grad_(False)


def write_weights(path: Path, network: nn.Module, training: Mapping[str, Any]) -> None:
    """Write a network's weights and how they came about, by way of a temporary file."""
    state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    store(path, {"format": FORMAT, "training": dict(training), "network": state})


def store(path: Path, content: object) -> None:
    """Save with torch, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        # On the disk before it takes the name of the one before it, or a power cut could lose both.
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
