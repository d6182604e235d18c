"""Diffusion posterior sampling for image reconstruction.

Measured data and a forward operator (package ``operators``) go in, a pretrained score prior (package
``priors``) is consulted, posterior samples come out, with their mean and their spread.

The names below are loaded when they are first used, so that ``import recon`` stays quick.

==================  ============================================================================
``reconstruct``     data, operator, prior and solver in, `Posterior` out
``Posterior``       mean, spread and, when asked for, samples, with what is known about the run
``DDS``             the decomposed diffusion sampler, the default; the other solvers go by their names too
                    (``recon solvers`` lists them)
``check_solver``    holds a solver to problems whose posterior is known in closed form
``Calibration``     makes intervals of a known coverage of the spread
``split_posterior`` what of an image the data determined, and what the prior filled in
``summarise``       a posterior in numbers that a program can act on
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
    from recon.calibration import Calibration
    from recon.ct import CTSettings, reconstruct_sinogram
    from recon.errors import ReconError
    from recon.evaluation import evaluate
    from recon.nullspace import split_posterior
    from recon.posterior import Posterior
    from recon.sampling import reconstruct
    from recon.scale import Scale
    from recon.solvers.adadiff import AdaDiff
    from recon.solvers.adjacent_slices import AdjacentSlices
    from recon.solvers.annealed_langevin import AnnealedLangevin
    from recon.solvers.cg import cg
    from recon.solvers.cgls import CGLS
    from recon.solvers.daps import DAPS
    from recon.solvers.dds import DDS
    from recon.solvers.dds_3d import DDS3D
    from recon.solvers.diffpir import DiffPIR
    from recon.solvers.diffusion_mbir import DiffusionMBIR
    from recon.solvers.dps import DPS
    from recon.solvers.filtered_backprojection import FilteredBackprojection
    from recon.solvers.perpendicular import Perpendicular, PerpendicularPriors
    from recon.solvers.pigdm import PiGDM
    from recon.solvers.pnp_dm import PnPDM
    from recon.solvers.red_diff import REDDiff
    from recon.solvers.replacement import Replacement
    from recon.solvers.score_ald import ScoreALD
    from recon.solvers.score_mri import ScoreMRI
    from recon.solvers.sirt import SIRT
    from recon.solvers.tikhonov import Tikhonov
    from recon.solvers.total_variation import TotalVariation
    from recon.solvers.twisted_smc import TwistedSMC
    from recon.solvers.wavelet import L1Wavelet
    from recon.solvers.zero_filled import ZeroFilled
    from recon.summary import summarise
    from recon.truth import check_solver

check_companions()

try:
    __version__ = version("dis-recon")
except PackageNotFoundError:  # a checkout that is on the path but was not installed
    __version__ = "0+unknown"

__all__ = [
    "CGLS",
    "DAPS",
    "DDS",
    "DDS3D",
    "DPS",
    "SIRT",
    "AdaDiff",
    "AdjacentSlices",
    "AnnealedLangevin",
    "CTSettings",
    "Calibration",
    "DiffPIR",
    "DiffusionMBIR",
    "FilteredBackprojection",
    "L1Wavelet",
    "Perpendicular",
    "PerpendicularPriors",
    "PiGDM",
    "PnPDM",
    "Posterior",
    "REDDiff",
    "ReconError",
    "Replacement",
    "Scale",
    "ScoreALD",
    "ScoreMRI",
    "Tikhonov",
    "TotalVariation",
    "TwistedSMC",
    "ZeroFilled",
    "__version__",
    "cg",
    "check_solver",
    "evaluate",
    "reconstruct",
    "reconstruct_sinogram",
    "split_posterior",
    "summarise",
]

# Where a public name lives. No module bears the name of a function in it: importing such a module would put
# it, as an attribute of this package, in the function's place.
_HOMES = {
    "AdaDiff": "recon.solvers.adadiff",
    "AdjacentSlices": "recon.solvers.adjacent_slices",
    "AnnealedLangevin": "recon.solvers.annealed_langevin",
    "CGLS": "recon.solvers.cgls",
    "CTSettings": "recon.ct",
    "Calibration": "recon.calibration",
    "DAPS": "recon.solvers.daps",
    "DDS": "recon.solvers.dds",
    "DDS3D": "recon.solvers.dds_3d",
    "DPS": "recon.solvers.dps",
    "DiffPIR": "recon.solvers.diffpir",
    "DiffusionMBIR": "recon.solvers.diffusion_mbir",
    "FilteredBackprojection": "recon.solvers.filtered_backprojection",
    "L1Wavelet": "recon.solvers.wavelet",
    "Perpendicular": "recon.solvers.perpendicular",
    "PerpendicularPriors": "recon.solvers.perpendicular",
    "PiGDM": "recon.solvers.pigdm",
    "PnPDM": "recon.solvers.pnp_dm",
    "Posterior": "recon.posterior",
    "REDDiff": "recon.solvers.red_diff",
    "ReconError": "recon.errors",
    "Replacement": "recon.solvers.replacement",
    "SIRT": "recon.solvers.sirt",
    "Scale": "recon.scale",
    "ScoreALD": "recon.solvers.score_ald",
    "ScoreMRI": "recon.solvers.score_mri",
    "Tikhonov": "recon.solvers.tikhonov",
    "TotalVariation": "recon.solvers.total_variation",
    "TwistedSMC": "recon.solvers.twisted_smc",
    "ZeroFilled": "recon.solvers.zero_filled",
    "cg": "recon.solvers.cg",
    "check_solver": "recon.truth",
    "evaluate": "recon.evaluation",
    "reconstruct": "recon.sampling",
    "reconstruct_sinogram": "recon.ct",
    "split_posterior": "recon.nullspace",
    "summarise": "recon.summary",
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
