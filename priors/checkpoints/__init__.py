"""Checkpoints of other code bases: one layout a file, opened without running code from them."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from priors.checkpoints.family import Family, Recipe
from priors.errors import PriorError

MODULES = ("score_sde", "ncsnv2", "guided_diffusion", "edm", "diffusers_folder", "monai_unet")
"""Modules of this folder that define families, in the order in which they are asked for a file's layout."""


@cache
def families() -> tuple[Family, ...]:
    """Every family there is, in the order in which they are asked; imported at the first call."""
    found: list[Family] = []
    for name in MODULES:
        module = import_module(f"priors.checkpoints.{name}")
        found.extend(module.FAMILIES if hasattr(module, "FAMILIES") else (module.FAMILY,))
    return tuple(found)


def family_named(name: str) -> Family:
    """The family of that name.

    Raises
    ------
    PriorError
        If there is none.
    """
    for family in families():
        if family.name == name:
            return family
    raise PriorError(
        f"no family of networks {name!r}; known are {', '.join(family.name for family in families())}"
    )


__all__ = ["Family", "Recipe", "families", "family_named"]
