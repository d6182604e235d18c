"""What images look like: score priors behind one interface, ``D(x, sigma) = E[x0 | x]``."""

from priors.base import Contract, ScorePrior
from priors.check import PriorCheck, check_prior
from priors.errors import PriorError
from priors.files import bundled_priors, save_prior
from priors.gaussian import GaussianPrior
from priors.loading import load_prior
from priors.mixture import GaussianMixturePrior
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings
from priors.parameterisation import FunctionPrior
from priors.processes import EDM, VE, VP, DiscreteVP, Flow
from priors.sampling import sample_prior
from priors.tiling import TiledPrior

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Contract",
    "DenoisingUNet",
    "DiscreteVP",
    "Flow",
    "FunctionPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "NetworkPrior",
    "NetworkSettings",
    "PriorCheck",
    "PriorError",
    "ScorePrior",
    "TiledPrior",
    "bundled_priors",
    "check_prior",
    "load_prior",
    "sample_prior",
    "save_prior",
]
