"""What a user knows beside a file: the constructor arguments of the original network, checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from priors.errors import PriorError


def constructor_arguments(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The arguments that a configuration gives.

    They stand in it flat or under ``"constructor"``. In the second case known names are read beside it too,
    and whatever else is there is a description that concerns nobody here. Null means not given.

    Raises
    ------
    PriorError
        If an argument is unknown.
    """
    if not isinstance(config, Mapping):
        raise PriorError(f"config is a dictionary of constructor arguments, not {type(config).__name__}")
    inner = config.get("constructor")
    if inner is None:
        arguments = {name: value for name, value in config.items() if name != "constructor"}
    elif isinstance(inner, Mapping):
        arguments = {name: config[name] for name in known if name in config} | dict(inner)
    else:
        raise PriorError(f"config['constructor'] is a dictionary, not {type(inner).__name__}")
    unknown = sorted(str(name) for name in arguments if name not in known)
    if unknown:
        raise PriorError(f"config has unknown arguments {unknown}; known are {sorted(known)}")
    return {name: value for name, value in arguments.items() if value is not None}


def whole(name: str, value: Any, least: int = 1, most: int = 2**16) -> int:
    """``value`` as a whole number, or a :class:`priors.PriorError` that names it."""
    exact = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not exact or int(value) != value or not least <= value <= most:
        raise PriorError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return int(value)


def real(name: str, value: Any) -> float:
    """``value`` as a positive number, or a :class:`priors.PriorError` that names it."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise PriorError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """``value`` as a truth value, or a :class:`priors.PriorError` that names it."""
    if not isinstance(value, bool):
        raise PriorError(f"{name} must be true or false, got {value!r}")
    return value


def numbers(name: str, value: Any) -> list[float]:
    """``value``, a list or text such as ``"32,16,8"``, as positive numbers; empty text has none."""
    if isinstance(value, str):
        items: list[Any] = [part for part in value.split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        raise PriorError(f"{name} must be a list of numbers, got {value!r}")
    try:
        result = [float(item) for item in items]
    except (TypeError, ValueError, OverflowError):
        raise PriorError(f"{name} must be a list of numbers, got {value!r}") from None
    if not all(0 < item < math.inf for item in result):
        raise PriorError(f"{name} must be a list of positive numbers, got {value!r}")
    return result


def agree(name: str, given: Any, found: Any) -> None:
    """Raise unless what the configuration says is what the file has."""
    if given != found:
        raise PriorError(f"config says {name} = {given!r}, the file has {found!r}")
