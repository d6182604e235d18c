"""The networks that time is spent in: bundled ones, any that can be loaded, and published ones by their size.

Published weights are out of reach of many machines, and time does not depend on them: the networks below
have the published architecture and random weights. What they make of an image is nothing to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from priors.base import ScorePrior
from priors.checkpoints import family_named
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from priors.networks.adm_unet import ADMSettings
from priors.networks.ncsnpp import NCSNppSettings


@dataclass(frozen=True)
class Network:
    """A prior with what a table says of it."""

    prior: ScorePrior
    description: str


@dataclass(frozen=True)
class Published:
    """An architecture: the family of checkpoints it belongs to, its settings there, and where it is from."""

    family: str
    settings: Mapping[str, Any]
    source: str


PUBLISHED = {
    "ncsnpp": Published(
        "score_sde",
        {
            "network": NCSNppSettings(1, 128, (1, 2, 2, 2), 4, num_scales=2000).as_dict(),
            "process": {"sde": "vesde", "continuous": True, "sigma_min": 0.01, "sigma_max": 378.0},
        },
        "NCSN++ of Score-MRI, one channel, evaluated on real and imaginary part",
    ),
    "adm": Published(
        "guided_diffusion",
        {
            "network": ADMSettings(
                2, 4, 256, (256, 256, 512, 512, 1024, 1024), 1, num_head_channels=64
            ).as_dict(),
            "noise_schedule": "linear",
            "diffusion_steps": 1000,
            "predict_xstart": False,
            "rescale_timesteps": False,
            "class_label": None,
        },
        "ADM U-Net of DDS's knees, two channels",
    ),
}


def random_network(name: str, precision: str = "fp32", device: str | torch.device = "cpu") -> ScorePrior:
    """A published architecture with random weights, made on the device; ``"meta"`` takes no memory."""
    published = PUBLISHED[name]
    family = family_named(published.family)
    with torch.device(device):
        network = family.network(published.settings)
    contract = replace(family.contract(published.settings), name=f"{name}, random weights")
    prior = family.prior(network, published.settings, contract)
    setattr(prior, "precision", precision)  # noqa: B010 - a family gives back a ScorePrior of its own kind
    return prior.to(device).eval().requires_grad_(False)


def load_network(name: str, precision: str, device: str | torch.device) -> Network:
    """A network of :data:`PUBLISHED` by its name, or any prior that `priors.load_prior` reads.

    Raises
    ------
    PriorError
        If it is neither.
    """
    if name in PUBLISHED:
        prior = random_network(name, precision, device)
        origin = f"{PUBLISHED[name].source}, random weights (only time counts)"
    else:
        prior = load_prior(name, precision=precision, device=device)
        path = prior_path(name)
        digest = "" if path.is_dir() else f", SHA-256 {prior_hash(path)[:12]}…"
        origin = f"{prior.contract.name}{digest}"
    return Network(prior, f"{origin}, {parameter_count(prior) / 1e6:.1f} M parameters, {precision}")


def parameter_count(module: nn.Module) -> int:
    """Trained parameters."""
    fixed = {"all_modules.0.W"}  # Fourier frequencies, which are drawn and not trained
    return sum(
        value.numel()
        for name, value in module.named_parameters()
        if name.removeprefix("network.") not in fixed
    )
