"""What images look like: score priors behind one interface, ``D(x, sigma) = E[x0 | x]``."""

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.files import bundled_priors, load_prior, save_prior
from priors.gaussian import GaussianPrior
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings

__all__ = [
    "Contract",
    "DenoisingUNet",
    "GaussianPrior",
    "NetworkPrior",
    "NetworkSettings",
    "PriorError",
    "ScorePrior",
    "bundled_priors",
    "load_prior",
    "save_prior",
]
