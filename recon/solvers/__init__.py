"""Solvers: one a file, each seeing tensors, operators and priors only.

:data:`SOLVERS` lists them by the names the command line knows; :func:`make_solver` makes one from its name
and the texts of its settings. Modules are loaded when they are asked for.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from recon.errors import ReconError

if TYPE_CHECKING:
    from recon.solvers.base import Solver

SOLVERS = {
    "dds": "recon.solvers.dds.DDS",
    "score-mri": "recon.solvers.score_mri.ScoreMRI",
    "score-ald": "recon.solvers.score_ald.ScoreALD",
    "ula": "recon.solvers.annealed_langevin.AnnealedLangevin",
    "adadiff": "recon.solvers.adadiff.AdaDiff",
    "replacement": "recon.solvers.replacement.Replacement",
    "dps": "recon.solvers.dps.DPS",
    "pigdm": "recon.solvers.pigdm.PiGDM",
    "diffpir": "recon.solvers.diffpir.DiffPIR",
    "daps": "recon.solvers.daps.DAPS",
    "red-diff": "recon.solvers.red_diff.REDDiff",
    "pnp-dm": "recon.solvers.pnp_dm.PnPDM",
    "twisted-smc": "recon.solvers.twisted_smc.TwistedSMC",
    "dds-3d": "recon.solvers.dds_3d.DDS3D",
    "diffusion-mbir": "recon.solvers.diffusion_mbir.DiffusionMBIR",
    "perpendicular": "recon.solvers.perpendicular.Perpendicular",
    "adjacent-slices": "recon.solvers.adjacent_slices.AdjacentSlices",
    "zero-filled": "recon.solvers.zero_filled.ZeroFilled",
    "fbp": "recon.solvers.filtered_backprojection.FilteredBackprojection",
    "sirt": "recon.solvers.sirt.SIRT",
    "cgls": "recon.solvers.cgls.CGLS",
    "cg-sense": "recon.solvers.tikhonov.Tikhonov",
    "tv": "recon.solvers.total_variation.TotalVariation",
    "l1-wavelet": "recon.solvers.wavelet.L1Wavelet",
}
"""Name -> where its class lives."""


def solver_class(name: str) -> type[Solver]:
    """Class of a solver.

    Raises
    ------
    ReconError
        If there is no solver of that name; the message lists them.
    """
    if name not in SOLVERS:
        raise ReconError(f"there is no solver {name!r}: the solvers are {', '.join(SOLVERS)}")
    module, _, attribute = SOLVERS[name].rpartition(".")
    found: type[Solver] = getattr(import_module(module), attribute)
    return found


PRESETS = ("paper", "released", "ct", "fast")
"""Settings that a solver may have beside its defaults: class methods of these names."""


def make_solver(name: str, preset: str | None = None, settings: Mapping[str, str] | None = None) -> Solver:
    """Make a solver from texts, as a command line or a file has them.

    Parameters
    ----------
    name
        One of :data:`SOLVERS`.
    preset
        Name of a setting to start from instead of the defaults: a published one (``"paper"``,
        ``"released"``), that for CT (``"ct"``), or a quick one (``"fast"``).
    settings
        Fields of the solver and their values as text, such as ``{"nfe": "50", "gamma": "none"}``.

    Raises
    ------
    ReconError
        If there is no such solver, preset or setting, or a value is not of the setting's type or range.
    """
    kind: Any = solver_class(name)
    known = [item.name for item in fields(kind)]
    hints = get_type_hints(kind)
    values = {}
    for setting, text in (settings or {}).items():
        if setting not in known:
            raise ReconError(f"solver {name} has no setting {setting!r}: its settings are {', '.join(known)}")
        values[setting] = _parse(text, hints[setting], f"setting {setting} of solver {name}")
    if preset is None:
        return kind(**values)
    presets = [word for word in PRESETS if hasattr(kind, word)]
    if preset not in presets:
        listed = ", ".join(presets) or "none"
        raise ReconError(f"solver {name} has no preset {preset!r}; its presets: {listed}")
    return getattr(kind, preset)(**values)


def _parse(text: str, hint: Any, what: str) -> Any:
    """Read ``text`` as a value of the annotated type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in (bool, int, float, str):
        if kind not in kinds:
            continue
        if kind is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            continue
        try:
            return kind(text)
        except ValueError:
            continue
    names = " or ".join(
        "none" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds
    )
    raise ReconError(f"{what} is {names}, not {text!r}")
