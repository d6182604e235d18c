"""The project's own prior file: safetensors with the contract in its header; bundled priors by name.

Version 1 holds the project's own network, described in the section ``network``. Version 2 holds the network
of another code base: ``family`` is the name of its layout (:mod:`priors.checkpoints`), and ``settings`` what
the family builds it from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from priors.base import ScorePrior
from priors.errors import PriorError
from priors.network import NetworkPrior

FORMAT = "recon-prior"
SECTIONS = {"1": ("contract", "network", "training"), "2": ("contract", "settings", "training")}
"""JSON objects in the header of each version of the format."""
_WEIGHTS = Path(__file__).parent / "weights"
_INDEX = ("model_index.json", "config.json", "unet/config.json")
"""A folder with one of these is a prior: a model as diffusers saves it."""


@dataclass(frozen=True, eq=False)
class Origin:
    """What a prior around a network of another code base was made of.

    Parameters
    ----------
    family
        Name of the family of checkpoints that knows how to build it.
    settings
        JSON-ready: what the family builds network and prior from.
    network
        The network, whose state dict has the original's keys.
    """

    family: str
    settings: dict[str, Any]
    network: nn.Module


def bundled_priors() -> list[str]:
    """Names of the priors that come with the package."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def save_prior(path: str | Path, prior: ScorePrior, training: dict[str, Any] | None = None) -> None:
    """Write a prior to one safetensors file, through a temporary file.

    Parameters
    ----------
    path
        Where to; an existing file is replaced.
    prior
        A :class:`NetworkPrior`, or what :func:`priors.load_prior` made of a checkpoint of other code. Its
        contract and all that its network is built from go into the header.
    training
        JSON-ready facts about the training (data, licence, steps), kept in the header.

    Raises
    ------
    PriorError
        If the file cannot be written, the facts are not JSON-ready, or the prior has no network.
    """
    path = Path(path)
    sections: dict[str, Any] = {"contract": prior.contract.as_dict(), "training": training or {}}
    if isinstance(prior, NetworkPrior):
        version, names, network = "1", {}, prior.network
        sections["network"] = prior.network.settings.as_dict()
    elif prior.origin is not None:
        version, names, network = "2", {"family": prior.origin.family}, prior.origin.network
        sections["settings"] = prior.origin.settings
    else:
        raise PriorError(
            f"cannot write the prior to {path}: a {type(prior).__name__} that was not loaded from a file has "
            "no description to be built from again"
        )
    try:
        header = {
            "format": FORMAT,
            "version": version,
            **names,
            **{key: json.dumps(value) for key, value in sections.items()},
        }
    except (TypeError, ValueError) as error:
        raise PriorError(f"cannot write the prior to {path}: {error}") from None
    # Cloned, because the format knows no tensors that share memory.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # there may be no such folder
            temporary.unlink()
        raise PriorError(f"cannot write the prior to {path}: {error}") from None


def prior_path(path_or_name: str | Path) -> Path:
    """File or folder of a prior: a path as it is, or the file of the bundled prior of that name."""
    path = Path(path_or_name)
    if path.is_file() or any((path / index).is_file() for index in _INDEX):
        return path
    names = bundled_priors()
    if str(path_or_name) in names:
        return _WEIGHTS / f"{path_or_name}.safetensors"
    raise PriorError(
        f"no prior {str(path_or_name)!r}: neither a file nor one of the bundled priors "
        f"({', '.join(names) or 'there are none'})"
    )


def prior_hash(path: str | Path) -> str:
    """SHA-256 of a prior's file, for provenance; of a folder, of its files' names and hashes in their order.

    Hidden files, such as a download leaves behind, do not count.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        lines = [f"{prior_hash(path / name)} {name}\n" for name in visible]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path_or_name: str | Path) -> dict[str, Any]:
    """Header of a prior's file: contract, training facts, and ``network``, or ``settings`` and ``family``.

    Raises
    ------
    PriorError
        If the file is not a prior of this project.
    """
    path = prior_path(path_or_name)
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise PriorError(
            f"{path} is a safetensors file but not a prior of this project (no {FORMAT!r} header)"
        )
    version = metadata.get("version", "")
    if version not in SECTIONS:
        raise PriorError(
            f"{path} has format version {version or None}; this release reads {' and '.join(SECTIONS)}"
        )
    header: dict[str, Any] = {}
    for key in SECTIONS[version]:
        try:
            header[key] = json.loads(metadata[key])
        except (KeyError, ValueError, RecursionError):
            raise PriorError(f"{path} has a damaged header: {key!r} is missing or no JSON") from None
        if not isinstance(header[key], dict):
            raise PriorError(f"{path} has a damaged header: {key!r} is no JSON object")
    if version == "2":
        if "family" not in metadata:
            raise PriorError(f"{path} has a damaged header: 'family' is missing")
        header["family"] = metadata["family"]
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """Strings in the header of any safetensors file.

    Raises
    ------
    PriorError
        If it is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PriorError(f"{path} is not a safetensors file: {error}") from None
