"""Hounsfield units, linear attenuation, and the units in which image priors of CT work.

By definition ``HU = 1000 (μ - μ_water) / μ_water`` (air attenuates next to nothing). Priors see attenuation
in units of water, ``x = μ / μ_water = 1 + HU / 1000``: air is 0, water 1, and one Hounsfield unit 0.001. None
of the conversions clips: windowing is for looking, and a negative attenuation is noise that must stay what it
is.
"""

from __future__ import annotations

import math

from torch import Tensor

from operators.errors import OperatorError

MU_WATER = 0.02
"""Attenuation of water in 1/mm at 60 to 70 keV, the mean energy of a clinical beam. Scanners differ."""


def hu_to_mu(hu: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Linear attenuation of Hounsfield units.

    Parameters
    ----------
    hu : Tensor
        Hounsfield units, floating point, any shape.
    mu_water : float
        Attenuation of water in 1/mm.

    Returns
    -------
    Tensor
        Attenuation in 1/mm, like `hu`.

    Raises
    ------
    OperatorError
        If `mu_water` is not a positive number, or `hu` is not floating point.
    """
    return hu_to_prior(hu) * _positive(mu_water)


def mu_to_hu(mu: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Hounsfield units of a linear attenuation in 1/mm, the inverse of `hu_to_mu`.

    Parameters
    ----------
    mu : Tensor
        Attenuation in 1/mm, floating point, any shape.
    mu_water : float
        Attenuation of water in 1/mm.

    Returns
    -------
    Tensor
        Hounsfield units, like `mu`.

    Raises
    ------
    OperatorError
        If `mu_water` is not a positive number, or `mu` is not floating point.
    """
    return prior_to_hu(mu_to_prior(mu, mu_water))


def hu_to_prior(hu: Tensor) -> Tensor:
    """Hounsfield units in units of water, ``1 + HU / 1000``; air is 0, water 1.

    Raises
    ------
    OperatorError
        If `hu` is not floating point: integers would be cut to whole numbers of water.
    """
    return 1 + _floating(hu, "Hounsfield units") / 1000


def prior_to_hu(x: Tensor) -> Tensor:
    """Hounsfield units of an image in units of water, ``1000 (x - 1)``.

    Raises
    ------
    OperatorError
        If `x` is not floating point.
    """
    return 1000 * (_floating(x, "an image in units of water") - 1)


def mu_to_prior(mu: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Attenuation in 1/mm in units of water, ``μ / μ_water``.

    Raises
    ------
    OperatorError
        If `mu_water` is not a positive number, or `mu` is not floating point.
    """
    return _floating(mu, "attenuation") / _positive(mu_water)


def prior_to_mu(x: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Attenuation in 1/mm of an image in units of water, ``μ_water x``.

    Raises
    ------
    OperatorError
        If `mu_water` is not a positive number, or `x` is not floating point.
    """
    return _floating(x, "an image in units of water") * _positive(mu_water)


def _floating(x: Tensor, name: str) -> Tensor:
    if not x.is_floating_point():
        raise OperatorError(f"{name} must be floating point here, got {x.dtype}")
    return x


def _positive(mu_water: float) -> float:
    if not (math.isfinite(mu_water) and mu_water > 0):
        raise OperatorError(f"the attenuation of water must be a positive number of 1/mm, got {mu_water}")
    return mu_water
