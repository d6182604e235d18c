"""Configurations in sections, as Song's code bases write them: ``model``, ``data``, ``training`` and more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from priors.checkpoints.configuration import constructor_arguments
from priors.errors import PriorError

_SECTIONS = ("model", "data", "training")


def sectioned_arguments(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The arguments that a configuration gives, flat or in sections, under ``"constructor"`` or not.

    A section says much about the training that a network is not built from: of ``model``, ``data`` and
    ``training`` the known names are taken, other sections are passed over. What stands outside of sections
    must be known, as for :func:`priors.checkpoints.configuration.constructor_arguments`. The ``name`` of a
    model is taken from its section only.

    Raises
    ------
    PriorError
        If an argument is unknown, or two sections say different things.
    """
    if not isinstance(config, Mapping):
        raise PriorError(f"config is a dictionary of constructor arguments, not {type(config).__name__}")
    inner = config.get("constructor")
    if inner is not None and not isinstance(inner, Mapping):
        raise PriorError(f"config['constructor'] is a dictionary, not {type(inner).__name__}")
    beside = {} if inner is None else {k: v for k, v in config.items() if k in known and k != "name"}
    found: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for key, value in (config if inner is None else inner).items():
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        for name in known if key in _SECTIONS else ():
            if name in value and not (name == "name" and key != "model"):
                if name in found and found[name] != value[name]:
                    raise PriorError(f"config says {name} = {found[name]!r} and {value[name]!r}")
                found[name] = value[name]
    return constructor_arguments({**beside, **found, **flat}, known)
