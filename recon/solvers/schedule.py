"""Sequences of noise levels."""

from __future__ import annotations

import torch

from priors.base import Contract
from priors.processes import DiscreteVP
from priors.sampling import karras_levels
from recon.errors import ReconError


def vp_linear_sigmas(
    nfe: int, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
) -> list[float]:
    """Levels of a variance-preserving process with linear beta, at evenly spaced steps, and a final zero.

    ``sigma = sqrt((1 - abar) / abar)`` (Ho et al. 2020; the spacing of DDIM, Song et al. 2021).
    """
    if not 1 <= nfe <= steps:
        raise ReconError(f"the number of network evaluations must lie in 1..{steps}, got {nfe}")
    picked = (
        torch.linspace(steps - 1, 0, nfe, dtype=torch.float64).round().long()
        if nfe > 1
        else torch.tensor([steps - 1])
    )
    return [*DiscreteVP.linear(steps, beta_min, beta_max).sigmas[picked].tolist(), 0.0]


def noise_levels(
    schedule: str,
    nfe: int,
    sigma_max: float,
    sigma_min: float | None,
    contract: Contract,
    noise_std: float,
    rho: float = 7.0,
) -> list[float]:
    """Levels of a schedule by its name, ``"karras"`` or ``"vp-linear"``, for a measurement and a prior.

    The levels of ``"vp-linear"`` are fixed by ``nfe`` alone. ``rho`` bends those of ``"karras"``, which begin
    at ``sigma_max``, or at the prior's largest level if that is lower, and end, where ``sigma_min`` is
    ``None``, at the measurement's noise level, below which the data say no more, within the prior's range.
    """
    if schedule == "vp-linear":
        return vp_linear_sigmas(nfe)
    sigma_max = min(sigma_max, contract.sigma_max)
    if sigma_min is None:
        known = min(noise_std, sigma_max) if noise_std > 0 else 0.0
        sigma_min = max(contract.sigma_min, known)
    return karras_levels(nfe, sigma_max, sigma_min, rho)
