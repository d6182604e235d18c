"""Diffusion posterior sampling for image reconstruction.

Measured data and a forward operator (package ``operators``) go in, a pretrained score prior (package
``priors``) is consulted, posterior samples come out, with their mean and their spread.

The names below are loaded when they are first used, so that ``import recon`` stays quick.

==================  ============================================================================
``reconstruct``     data, operator, prior and solver in, `Posterior` out
``Posterior``       mean, spread and, when asked for, samples, with what is known about the run
``DDS``             the decomposed diffusion sampler
``Scale``           between the scale of the data and the scale a prior was trained on
``cg``              conjugate gradients for Hermitian systems, in batches
``evaluate``        the fastMRI metrics of reconstructions against their targets
``ReconError``      what is raised when data, settings or files do not fit
==================  ============================================================================
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from recon._names import check_companions

if TYPE_CHECKING:
    from recon.errors import ReconError
    from recon.evaluation import evaluate
    from recon.posterior import Posterior
    from recon.sampling import reconstruct
    from recon.scale import Scale
    from recon.solvers.cg import cg
    from recon.solvers.dds import DDS

check_companions()

try:
    __version__ = version("dis-recon")
except PackageNotFoundError:  # a checkout that is on the path but was not installed
    __version__ = "0+unknown"

__all__ = ["DDS", "Posterior", "ReconError", "Scale", "__version__", "cg", "evaluate", "reconstruct"]

# Where a public name lives. No module bears the name of a function in it: importing such a module would put
# it, as an attribute of this package, in the function's place.
_HOMES = {
    "DDS": "recon.solvers.dds",
    "Posterior": "recon.posterior",
    "ReconError": "recon.errors",
    "Scale": "recon.scale",
    "cg": "recon.solvers.cg",
    "evaluate": "recon.evaluation",
    "reconstruct": "recon.sampling",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'recon' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
