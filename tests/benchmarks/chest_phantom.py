"""A slice of a chest made of ellipses, with room for everything that is planted."""

from __future__ import annotations

import numpy as np

SIDE, PIXEL = 72, 4.0
"""Pixels reconstructed, and their side in mm."""


def chest(seed=0, noise=8.0):
    """Hounsfield units on pixels half as wide, ``(2 SIDE, 2 SIDE)``."""
    axis = (np.arange(2 * SIDE) - SIDE + 0.5) * PIXEL / 2
    y, x = -axis[:, None], axis

    def ellipse(x0, y0, a, b):
        return ((x - x0) / a) ** 2 + ((y - y0) / b) ** 2 <= 1

    hu = np.where(ellipse(0, 0, 130, 120), 40.0, -1000.0)
    for side in (-1, 1):
        hu[ellipse(62 * side, 30, 38, 46)] = -850.0
    hu[ellipse(0, -100, 14, 10)] = 700.0  # the spine
    hu[np.broadcast_to(abs(y + 138) < 3, hu.shape)] = 150.0  # the table
    return hu + noise * np.random.default_rng(seed).standard_normal(hu.shape)
