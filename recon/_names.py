"""Makes sure that ``operators`` and ``priors`` are the packages installed with ``recon``.

Both names are common words: a script called ``operators.py`` in the working directory takes the package's
place on Python's search path, and what follows is an obscure error far from its cause.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

COMPANIONS = ("operators", "priors")
"""The top-level packages that ``recon`` is built on."""


def check_companions() -> None:
    """Fail if a companion package is missing or shadowed by another module of its name.

    Nothing is imported: only Python's finders are asked, so the check costs no more than a few file look-ups.

    Raises
    ------
    ImportError
        With one sentence that names the package and the file found in its place.
    """
    home = Path(__file__).resolve().parent.parent
    for name in COMPANIONS:
        found = _origin(name)
        if found is None:
            raise ImportError(
                f"recon needs its package '{name}' in {home}, and Python finds none: reinstall dis-recon.",
                name=name,
            )
        if found.resolve().parent != home / name:
            raise ImportError(
                f"recon needs its own package '{name}', but Python finds {found} under that name: "
                "rename that file or take its folder off sys.path.",
                name=name,
                path=str(found),
            )


def _origin(name: str) -> Path | None:
    """File that ``import name`` runs or has run, or the folder of a namespace package; None if nothing."""
    loaded = sys.modules.get(name)
    # find_spec raises on a module without a spec, as a script or a test may have put there by hand.
    spec = find_spec(name) if loaded is None else getattr(loaded, "__spec__", None)
    if spec is None:
        file = getattr(loaded, "__file__", None)
        return None if file is None else Path(file)
    if spec.origin is None:
        return next((Path(folder) for folder in spec.submodule_search_locations or ()), None)
    return Path(spec.origin)
