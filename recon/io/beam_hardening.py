"""Beam-hardening corrections in JSON: ``{"coefficients": [1.0, 0.05], "largest": 4.5}``."""

from __future__ import annotations

import json
from pathlib import Path

from operators.beam_hardening import BeamHardeningCorrection
from operators.errors import OperatorError
from recon.errors import ReconError


def read_beam_hardening(path: str | Path) -> BeamHardeningCorrection:
    """Read the polynomial from measured to monochromatic line integrals.

    Parameters
    ----------
    path : str or Path
        JSON with ``coefficients``, those of the powers 1, 2, …, and ``largest``, the largest line integral
        they hold for.

    Raises
    ------
    ReconError
        Naming the file, if it is absent, no JSON, or does not hold these two.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ReconError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != {"coefficients", "largest"}:
        raise ReconError(f"{path}: a beam-hardening correction is {{'coefficients': [...], 'largest': ...}}")
    coefficients, largest = content["coefficients"], content["largest"]
    values = [*coefficients, largest] if isinstance(coefficients, list) else [None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ReconError(f"{path}: 'coefficients' must be numbers and 'largest' a number, got {content}")
    try:
        return BeamHardeningCorrection(tuple(map(float, coefficients)), float(largest))
    except OperatorError as error:
        raise ReconError(f"{path}: {error}") from None
