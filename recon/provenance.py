"""What every result says of how it was made."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from priors.base import ScorePrior
from recon import __version__
from recon.posterior import Posterior
from recon.solvers.base import Solver, settings_of

NOT_FOR_DIAGNOSIS = "research software: not for diagnostic use"


def slice_facts(index: int, posterior: Posterior) -> dict[str, Any]:
    """What a result says of one slice, JSON-ready."""
    return {
        "index": index,
        "scale": posterior.scale.factor,
        "noise_std": posterior.noise_std,
        "residual": posterior.residual,
        "nfe": posterior.nfe,
        "micro_batch": posterior.micro_batch,
        "threads": posterior.threads,
    }


def common_facts(
    solver: Solver, prior: ScorePrior | None, prior_facts: dict[str, Any] | None, device: object
) -> dict[str, Any]:
    """What does not depend on the kind of scan, JSON-ready: notice, solver, prior, device, versions."""
    return {
        "notice": NOT_FOR_DIAGNOSIS,
        "solver": settings_of(solver),
        "prior": None if prior is None else {"name": prior.contract.name, **(prior_facts or {})},
        "device": str(device),
        "versions": {
            "dis-recon": __version__,
            **{name: version(name) for name in ("torch", "numpy", "h5py")},
        },
    }
