"""State dicts as files have them: nothing in them is trusted before it was looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from priors.errors import PriorError

# Left by wrappers for several devices and by compilation, before every key.
_WRAPPERS = ("module.", "_orig_mod.")


def has_keys(content: Any, *keys: str) -> bool:
    """Whether ``content`` is a state dict with these keys, wrapped or not."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return False
    names = set(_without_wrappers(list(content)))
    return all(key in names for key in keys)


def state_dict(content: Any, what: str) -> dict[str, Tensor]:
    """The entries of a state dict as float32 tensors, in their order, without the prefix of a wrapper.

    Raises
    ------
    PriorError
        Naming the entry that is no dense tensor of floating-point numbers.
    """
    if not isinstance(content, Mapping):
        raise PriorError(f"{what} is no state dict but {type(content).__name__}")
    if not all(isinstance(key, str) for key in content):
        raise PriorError(f"{what} is no state dict: it has keys that are no text")
    result = {}
    for name, value in zip(_without_wrappers(list(content)), content.values(), strict=True):
        if not isinstance(value, Tensor):
            raise PriorError(f"{what}: {name!r} is no tensor but {type(value).__name__}")
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise PriorError(f"{what}: {name!r} is no tensor that holds plain numbers")
        if not value.is_floating_point():
            raise PriorError(f"{what}: {name!r} has the type {value.dtype}; weights are floating-point")
        result[name] = value.detach().to(torch.float32)
    return result


def _without_wrappers(names: list[str]) -> list[str]:
    while True:
        for prefix in _WRAPPERS:
            if names and all(name.startswith(prefix) for name in names):
                names = [name.removeprefix(prefix) for name in names]
                break
        else:
            return names


def shape(weights: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Shape of an entry.

    Raises
    ------
    PriorError
        If there is no such entry, or it has another number of dimensions.
    """
    if key not in weights:
        raise PriorError(f"the checkpoint lacks {key!r}")
    found = tuple(weights[key].shape)
    if len(found) != ndim:
        raise PriorError(f"{key!r} should have {ndim} dimensions, has the shape {found}")
    return found


def check_fit(weights: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
    """Raise unless a network's state dict has exactly these keys and shapes; nothing is allocated.

    Raises
    ------
    PriorError
        Naming the first key that is missing, left over or of another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    for name, size in expected.items():
        if name not in weights:
            raise PriorError(f"the checkpoint lacks {name!r}, which a network of its layout has")
        if tuple(weights[name].shape) != size:
            raise PriorError(f"{name!r} has the shape {tuple(weights[name].shape)}, not {size}")
    for name in weights:
        if name not in expected:
            raise PriorError(f"the checkpoint has {name!r}, which a network of its layout has not")
