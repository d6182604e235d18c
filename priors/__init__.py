"""What images look like: score priors behind one interface, ``D(x, sigma) = E[x0 | x]``."""

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.files import bundled_priors, load_prior, save_prior
from priors.gaussian import GaussianPrior
from priors.mixture import GaussianMixturePrior
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings
from priors.sampling import sample_prior

__all__ = [
    "Contract",
    "DenoisingUNet",
    "GaussianMixturePrior",
    "GaussianPrior",
    "NetworkPrior",
    "NetworkSettings",
    "PriorError",
    "ScorePrior",
    "bundled_priors",
    "load_prior",
    "sample_prior",
    "save_prior",
]
