"""Loading a prior: bundled, the project's own file, a checkpoint of other code, or a folder of diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from priors import checkpoints
from priors.base import Contract, ScorePrior
from priors.checkpoints.diffusers_folder import open_folder
from priors.checkpoints.family import Family
from priors.checkpoints.opening import open_checkpoint, read_config
from priors.errors import PriorError
from priors.files import FORMAT, Origin, prior_path, read_header, read_metadata
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings
from priors.pretrained import PretrainedPrior

_T = TypeVar("_T")
_M = TypeVar("_M", bound=nn.Module)

_DAMAGE = (
    TypeError,
    ValueError,  # PriorError is one
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # RecursionError too
    AssertionError,
    MemoryError,
)
"""What code that reads an untrusted header, or builds a network by it, may stumble over."""


def load_prior(
    path_or_name: str | Path,
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | str | Path | None = None,
    ema: bool = True,
    **overrides: Any,
) -> ScorePrior:
    """Load a prior from a file or by the name of a bundled one.

    No code from the file is run, and every weight must be there, of the right shape, and finite.

    Parameters
    ----------
    path_or_name
        A name from :func:`bundled_priors`; a file of :func:`save_prior`; a checkpoint of other code, in
        the layout of one of the families of :mod:`priors.checkpoints`; or a folder as diffusers writes it.
    precision
        ``"fp32"`` or ``"bf16"`` (the network only, under autocast).
    device
        Where the network is put.
    config
        What a checkpoint of other code does not tell: the arguments of its network's constructor, flat or
        under ``"constructor"``, or a JSON file with them.
    ema
        Take the averaged weights where a checkpoint holds them, else those of the last step.
    overrides
        Fields of :class:`Contract`, such as ``name``, ``anatomy``, ``level`` or ``value_range``, that go
        before those of the file.

    Returns
    -------
    ScorePrior
        In evaluation mode, without gradients for its weights; a :class:`NetworkPrior` if the network is the
        project's own. Whether it denoises is for :func:`priors.check.check_prior` to say: a network of any
        weights loads.

    Raises
    ------
    PriorError
        Naming the file and the key at fault.
    """
    if precision not in ("fp32", "bf16"):
        raise PriorError(f"precision is 'fp32' or 'bf16', not {precision!r}")
    known = [field.name for field in fields(Contract)]
    if unknown := sorted(set(overrides) - set(known)):
        raise PriorError(f"a prior's contract has no {', '.join(unknown)}; it has {', '.join(known)}")
    path = prior_path(path_or_name)
    facts = read_config(config)
    if not path.is_dir() and _is_ours(path):
        if facts or not ema:
            what = "config=" if facts else "ema=False"
            raise PriorError(
                f"{path} says itself what it holds, in one set of weights: {what} has no use with it"
            )
        prior = _load_own(path, overrides)
    else:
        prior = _load_foreign(path, facts, ema, overrides)
    prior.precision = precision
    return prior.to(device).eval().requires_grad_(False)


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError as error:
        raise PriorError(f"{path} cannot be read: {error.strerror or error}") from None
    return safetensors and read_metadata(path).get("format") == FORMAT


def _load_own(path: Path, overrides: Mapping[str, Any]) -> NetworkPrior | PretrainedPrior:
    header = read_header(path)
    where = f"{path} has a damaged header"
    contract = _guarded(where, lambda: Contract.from_dict(header["contract"]))
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    if "family" in header:
        family = _guarded(where, lambda: checkpoints.family_named(header["family"]))
        return _assemble(path, where, family, header["settings"], weights, contract, overrides)
    settings = _guarded(where, lambda: NetworkSettings.from_dict(header["network"]))
    network = _guarded(where, lambda: _build(lambda: DenoisingUNet(settings), weights))
    _fill(network, weights, path)
    contract = _overridden(contract, overrides, path)
    return _guarded(str(path), lambda: NetworkPrior(network, contract))


def _load_foreign(
    path: Path, config: Mapping[str, Any], ema: bool, overrides: Mapping[str, Any]
) -> NetworkPrior | PretrainedPrior:
    content = open_folder(path) if path.is_dir() else open_checkpoint(path)
    where = f"{path} is damaged, or does not fit what is said of it"
    for family in checkpoints.families():
        if _guarded(where, lambda family=family: family.recognises(content)):  # type: ignore[misc]
            break
    else:
        raise PriorError(_unknown_layout(path, content))
    recipe = _guarded(where, lambda: family.read(content, config, ema=ema), own=str(path))
    # As a converted file will give them back.
    settings = _guarded(where, lambda: json.loads(json.dumps(recipe.settings)))
    contract = _guarded(where, lambda: family.contract(settings), own=str(path))
    return _assemble(path, where, family, settings, recipe.weights, contract, overrides)


def _assemble(
    path: Path,
    where: str,
    family: Family,
    settings: dict[str, Any],
    weights: Mapping[str, Any],
    contract: Contract,
    overrides: Mapping[str, Any],
) -> PretrainedPrior:
    own = str(path)
    network = _guarded(where, lambda: _build(lambda: family.network(settings), weights), own=own)
    _fill(network, weights, path)
    contract = _overridden(contract, overrides, path)
    prior = _guarded(where, lambda: family.prior(network, settings, contract), own=own)
    if not isinstance(prior, PretrainedPrior):
        raise PriorError(f"{path}: a {type(prior).__name__} cannot choose its precision")
    prior.origin = Origin(family.name, settings, network)
    return prior


def _guarded(where: str, step: Callable[[], _T], own: str | None = None) -> _T:
    """Do a step with what was read from a file, and say which one it is in what it raises.

    ``own`` is put before the sentences of :class:`PriorError`, ``where`` before all others.
    """
    try:
        return step()
    except PriorError as error:
        raise PriorError(f"{own or where}: {error}") from None
    except _DAMAGE as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise PriorError(f"{where}: {kind}{next(iter(str(error).splitlines()), '')}") from None


def _build(make: Callable[[], _M], weights: Mapping[str, Any]) -> _M:
    """Build a network; only as a shell without memory, if the weights are not those of one like it.

    A file may claim a network that no machine holds, but not its weights.
    """
    most = 2 * len(weights) + 100
    parts = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parts
        parts += 1
        if parts > most:
            raise PriorError(f"a network with many more parts than the {len(weights)} tensors in the file")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            shell = make()
    finally:
        hook.remove()
    expected = shell.state_dict()
    fits = expected.keys() == weights.keys() and all(
        isinstance(weights[key], Tensor) and value.shape == weights[key].shape
        for key, value in expected.items()
    )
    return make() if fits else shell


def _fill(network: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Put weights into a network, all of them and no others.

    Raises
    ------
    PriorError
        Naming the key that is missing, unexpected, of another shape or type, or not finite.
    """
    expected = network.state_dict()
    missing = sorted(str(key) for key in set(expected) - set(weights))
    unexpected = sorted(str(key) for key in set(weights) - set(expected))
    if missing or unexpected:
        raise PriorError(
            f"{path} does not fit its network: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise PriorError(f"{path}: {key} is {type(value).__name__}, not a tensor")
        if value.shape != expected[key].shape:
            shapes = f"shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            raise PriorError(f"{path}: {key} has {shapes}")
        if (_kind(value), _kind(expected[key])) not in _CASTS:
            raise PriorError(f"{path}: {key} holds {value.dtype}, expected {expected[key].dtype}")
        if not bool(torch.isfinite(value.to(expected[key].dtype)).all()):
            raise PriorError(f"{path}: {key} holds values that are not finite")
    network.load_state_dict(weights)


_CASTS = {("float", "float"), ("whole", "whole"), ("complex", "complex")}


def _kind(value: Tensor) -> str:
    if value.is_complex():
        return "complex"
    return "float" if value.is_floating_point() else "whole"


def _overridden(contract: Contract, overrides: Mapping[str, Any], path: Path) -> Contract:
    """Give a contract the values that the user knows better, as far as the network allows them."""
    if not overrides:
        return contract
    given = dict(overrides)
    if isinstance(given.get("anatomy"), str):
        given["anatomy"] = (given["anatomy"],)
    try:
        changed = Contract.from_dict({**contract.as_dict(), **given})
    except (TypeError, ValueError) as error:
        raise PriorError(f"the contract of {path} cannot be changed: {error}") from None
    if changed.num_channels != contract.num_channels:
        raise PriorError(
            f"{path} has a network of {contract.num_channels} channels; {changed.channels!r} images in "
            f"{changed.slices} slice{'s' * (changed.slices != 1)} would take {changed.num_channels}"
        )
    if changed.size_multiple % contract.size_multiple:
        raise PriorError(
            f"{path} has a network for sizes that are multiples of {contract.size_multiple}, not of "
            f"{changed.size_multiple}"
        )
    return changed


def _unknown_layout(path: Path, content: Any) -> str:
    if isinstance(content, dict):
        names = [str(key) for key in content]
        holds = f"a dict of {len(names)}: {', '.join(names[:4])}{', …' * (len(names) > 4)}"
    elif isinstance(content, list):
        holds = f"a list of {len(content)}"
    else:
        holds = type(content).__name__
    known = ", ".join(family.name for family in checkpoints.families())
    return (
        f"{path} is not a prior of this project, nor a checkpoint in a layout that is known ({known}); it "
        f"holds {holds}"
    )
