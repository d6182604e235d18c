"""The project's own prior file: safetensors with the contract in its header; bundled priors by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from priors.base import Contract
from priors.errors import PriorError
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings

FORMAT = "recon-prior"
VERSION = "1"
_WEIGHTS = Path(__file__).parent / "weights"


def bundled_priors() -> list[str]:
    """Names of the priors that come with the package."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def save_prior(path: str | Path, prior: NetworkPrior, training: dict[str, Any] | None = None) -> None:
    """Write a prior to one safetensors file, through a temporary file.

    Parameters
    ----------
    path
        Where to; an existing file is replaced.
    prior
        The prior; its contract and the shape of its network go into the header.
    training
        JSON-ready facts about the training (data, licence, steps), kept in the header.

    Raises
    ------
    PriorError
        If the file cannot be written, or the facts are not JSON-ready.
    """
    path = Path(path)
    sections = {
        "contract": prior.contract.as_dict(),
        "network": prior.network.settings.as_dict(),
        "training": training or {},
    }
    try:
        header = {"format": FORMAT, "version": VERSION, **{k: json.dumps(v) for k, v in sections.items()}}
    except TypeError as error:
        raise PriorError(f"cannot write the prior to {path}: {error}") from None
    tensors = {key: value.detach().cpu().contiguous() for key, value in prior.network.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # there may be no such folder
            temporary.unlink()
        raise PriorError(f"cannot write the prior to {path}: {error}") from None


def prior_path(path_or_name: str | Path) -> Path:
    """File of a prior: a path as it is, or the bundled prior of that name."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    names = bundled_priors()
    if str(path_or_name) in names:
        return _WEIGHTS / f"{path_or_name}.safetensors"
    raise PriorError(
        f"no prior {str(path_or_name)!r}: neither a file nor one of the bundled priors "
        f"({', '.join(names) or 'there are none'})"
    )


def prior_hash(path: str | Path) -> str:
    """SHA-256 of a prior's file, for provenance."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_header(path_or_name: str | Path) -> dict[str, Any]:
    """Header of a prior's file: contract, network, training facts.

    Raises
    ------
    PriorError
        If the file is not a prior of this project.
    """
    path = prior_path(path_or_name)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PriorError(f"{path} is not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise PriorError(
            f"{path} is a safetensors file but not a prior of this project (no {FORMAT!r} header)"
        )
    if metadata.get("version") != VERSION:
        raise PriorError(f"{path} has format version {metadata.get('version')}; this release reads {VERSION}")
    header = {}
    for key in ("contract", "network", "training"):
        try:
            header[key] = json.loads(metadata[key])
        except (KeyError, json.JSONDecodeError):
            raise PriorError(f"{path} has a damaged header: {key!r} is missing or no JSON") from None
        if not isinstance(header[key], dict):
            raise PriorError(f"{path} has a damaged header: {key!r} is no JSON object")
    return header


def load_prior(
    path_or_name: str | Path, *, precision: str = "fp32", device: str | torch.device = "cpu"
) -> NetworkPrior:
    """Load a prior from a file or by the name of a bundled one.

    No code from the file is run, and every weight must be there, of the right shape, and finite.

    Parameters
    ----------
    path_or_name
        A ``.safetensors`` file, or a name from :func:`bundled_priors`.
    precision
        ``"fp32"`` or ``"bf16"`` (the network only, under autocast).
    device
        Where the network is put.

    Returns
    -------
    NetworkPrior
        In evaluation mode, without gradients for its weights.

    Raises
    ------
    PriorError
        Naming the file and the key at fault.
    """
    path = prior_path(path_or_name)
    header = read_header(path)
    try:
        contract = Contract.from_dict(header["contract"])
        network = DenoisingUNet(NetworkSettings.from_dict(header["network"]))
    except (TypeError, ValueError, RuntimeError) as error:  # PriorError is a ValueError
        raise PriorError(f"{path} has a damaged header: {error}") from None
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise PriorError(
            f"{path} does not fit its network: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            shapes = f"shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            raise PriorError(f"{path}: {key} has {shapes}")
        if not bool(torch.isfinite(value).all()):
            raise PriorError(f"{path}: {key} holds values that are not finite")
    network.load_state_dict(tensors)
    try:
        prior = NetworkPrior(network, contract, precision)
    except PriorError as error:
        raise PriorError(f"{path}: {error}") from None
    return prior.to(device).eval().requires_grad_(False)
