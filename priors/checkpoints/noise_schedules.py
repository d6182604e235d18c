"""Noise schedules as libraries describe them in their configurations, by names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from priors.checkpoints.configuration import flag, real, whole
from priors.errors import PriorError
from priors.processes import DiscreteVP, Flow, Process

SCHEDULES = ("linear", "scaled_linear", "sigmoid", "cosine")
"""Names of schedules of ``beta``."""

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What diffusers and MONAI call a prediction, and what this project does."""


def discrete_process(facts: Mapping[str, Any]) -> DiscreteVP:
    """A variance-preserving process in steps.

    Parameters
    ----------
    facts
        ``num_train_timesteps``, ``beta_schedule`` (one of :data:`SCHEDULES`), ``beta_start`` and ``beta_end``
        but for ``"cosine"``; or ``trained_betas``. With ``rescale_betas_zero_snr``, the last step is pure
        noise (Lin, Liu, Li & Yang, WACV 2024, Algorithm 1): it has no finite noise level, and is left out.

    Raises
    ------
    PriorError
        Naming what is missing or impossible.
    """
    given = facts.get("trained_betas")
    if given is not None:
        if not isinstance(given, list) or not given:
            raise PriorError("trained_betas must be a list of numbers")
        betas = torch.tensor([real("trained_betas", beta) for beta in given], dtype=torch.float64)
        process = DiscreteVP.from_betas(betas)
    else:
        steps = whole("num_train_timesteps", facts.get("num_train_timesteps"), 2, 10**5)
        schedule = facts.get("beta_schedule")
        if schedule not in SCHEDULES:
            raise PriorError(f"beta_schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        if schedule == "cosine":
            process = DiscreteVP.cosine(steps)
        else:
            start, end = (real(name, facts.get(name)) for name in ("beta_start", "beta_end"))
            if schedule == "linear":
                process = DiscreteVP.linear(steps, start, end)
            elif schedule == "scaled_linear":
                process = DiscreteVP.scaled_linear(steps, start, end)
            else:
                rise = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
                process = DiscreteVP.from_betas(start + rise * (end - start))
    if flag("rescale_betas_zero_snr", facts.get("rescale_betas_zero_snr", False)):
        roots = process.alphas_bar.sqrt()
        first, last = roots[0].clone(), roots[-1].clone()
        process = DiscreteVP(((roots - last) * first / (first - last))[:-1] ** 2)
    return process


def prediction(facts: Mapping[str, Any]) -> str:
    """What the network predicts, in this project's words.

    Raises
    ------
    PriorError
        If it is none of :data:`PREDICTIONS`.
    """
    name = facts.get("prediction_type")
    if name not in PREDICTIONS:
        raise PriorError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {name!r}")
    return PREDICTIONS[name]


def in_units_of(process: Process, span: float) -> dict[str, Any]:
    """Noise range of a contract in the units of our images, of which the network has ``span`` times as many.

    A flow ends in pure noise, where sigma is infinite; beyond a hundred levels nothing is left of the image.
    """
    high = min(process.sigma_max, 200.0) if isinstance(process, Flow) else process.sigma_max
    return {"sigma_min": process.sigma_min / span, "sigma_max": high / span}
