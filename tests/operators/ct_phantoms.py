"""Objects whose line integrals are known in closed form, for every geometry, from its numbers alone."""

import math

import torch
from torch import Tensor

from operators import FanBeam, ParallelBeam


def distances(geometry: ParallelBeam | FanBeam, centre: tuple[float, float]) -> Tensor:
    """Distance in mm of a point (x, y) from each ray, signed, float64 ``(views, detectors)``.

    The ray (β, γ) of a fan is the line ``x cos θ + y sin θ = s`` with ``θ = β - γ`` and ``s = R sin γ``.
    """
    k = torch.arange(geometry.num_detectors, dtype=torch.float64) - (geometry.num_detectors - 1) / 2
    u = k * geometry.detector_spacing + geometry.detector_offset
    angles = torch.tensor(geometry.angles, dtype=torch.float64)[:, None]
    if isinstance(geometry, ParallelBeam):
        theta, s = angles, u
    else:
        gamma = u / geometry.source_detector
        if geometry.detector == "flat":
            gamma = gamma.atan()
        theta, s = angles - gamma, geometry.source_origin * gamma.sin()
    return s - centre[0] * theta.cos() - centre[1] * theta.sin()


def disc_sinogram(geometry: ParallelBeam | FanBeam, centre: tuple[float, float], radius: float) -> Tensor:
    """Line integrals in mm of a disc of attenuation 1/mm."""
    return 2 * (radius**2 - distances(geometry, centre).square()).clamp_min(0).sqrt()


def blob_sinogram(geometry: ParallelBeam | FanBeam, centre: tuple[float, float], width: float) -> Tensor:
    """Line integrals in mm of a Gaussian of standard deviation `width` and peak 1/mm."""
    return math.sqrt(2 * math.pi) * width * (-distances(geometry, centre).square() / (2 * width**2)).exp()


def radii(
    shape: tuple[int, int], pixel_size: float, centre: tuple[float, float], subpixels: int = 1
) -> Tensor:
    """Distance in mm from a point to the centres of pixels, or of squares within them."""
    y, x = (
        ((torch.arange(n * subpixels, dtype=torch.float64) + 0.5) / subpixels - n / 2) * pixel_size
        for n in shape
    )
    return ((x - centre[0]).square() + (-y[:, None] - centre[1]).square()).sqrt()


def disc_image(
    shape: tuple[int, int], pixel_size: float, centre: tuple[float, float], radius: float
) -> Tensor:
    """A disc of attenuation 1/mm, each pixel its mean over 8 × 8 points."""
    inside = (radii(shape, pixel_size, centre, 8) <= radius).double()
    return torch.nn.functional.avg_pool2d(inside[None], 8)[0]


def blob_image(
    shape: tuple[int, int], pixel_size: float, centre: tuple[float, float], width: float
) -> Tensor:
    """A Gaussian of peak 1/mm, at the centres of the pixels."""
    return (-radii(shape, pixel_size, centre).square() / (2 * width**2)).exp()
