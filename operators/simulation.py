"""Simulated multi-coil measurements: coil sensitivities, image phase, noise."""

import math

import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.fft import fftc

# Coils have a size: their field does not grow without bound towards the conductor (in half fields of view).
_COIL_SIZE = 0.4


def birdcage_maps(num_coils: int, shape: tuple[int, int], *, radius: float = 1.5) -> Tensor:
    """Compute the sensitivities of equal coils, evenly spaced on a ring around the field of view.

    Coil c at the complex position ``p = radius * exp(2 pi i c / C)`` sees ``exp(2 pi i c / C) / (p - z)``,
    the transverse field of a straight wire at p, at z = x + iy, softened for the finite size of a conductor.
    Its magnitude falls and its phase turns smoothly across the field of view, whose sides lie at +-1.

    Parameters
    ----------
    num_coils : int
        Number of coils C.
    shape : tuple of int
        ``(H, W)``.
    radius : float
        Radius of the ring in half fields of view, above 1.

    Returns
    -------
    Tensor
        Complex64 ``(C, H, W)``. The mean over the field of view of the root-sum-of-squares over the coils is
        1; the root-sum-of-squares itself is *not* constant but rises towards the coils, as a measured one
        does.

    Raises
    ------
    OperatorError
        If there are no coils, the shape is not two positive sizes, or the ring is inside the field of view.
    """
    if not radius > 1:
        raise OperatorError(f"the coils must lie outside the field of view: radius above 1, got {radius}")
    _check(num_coils, shape)
    angle = 2 * math.pi * torch.arange(num_coils, dtype=torch.float64) / num_coils
    direction = torch.polar(torch.ones_like(angle), angle)
    return _normalised(direction[:, None, None] * _wire_field(radius * direction, shape))


def random_smooth_maps(num_coils: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Draw the sensitivities of loop coils placed at random around the field of view.

    Each coil is a loop seen edge-on: two wires with opposite currents, outside the field of view (at 1.3 to
    1.8 half fields of view), roughly but not exactly evenly spaced, with its own size, gain and receiver
    phase.

    Parameters
    ----------
    num_coils : int
        Number of coils C.
    shape : tuple of int
        ``(H, W)``.
    seed : int
        Seed; the same seed gives the same coils on any matrix size.

    Returns
    -------
    Tensor
        Complex64 ``(C, H, W)``. The mean over the field of view of the root-sum-of-squares over the coils is
        1; the root-sum-of-squares itself is *not* constant, as in `birdcage_maps`.

    Raises
    ------
    OperatorError
        If there are no coils or the shape is not two positive sizes.
    """
    _check(num_coils, shape)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_coils, generator=generator, dtype=torch.float64)

    angle = (
        2 * math.pi * (torch.arange(num_coils) + uniform(-0.3, 0.3)) / num_coils + uniform(0, 2 * math.pi)[0]
    )
    radius, half_width = uniform(1.3, 1.8), uniform(0.2, 0.4)
    gain = torch.polar(uniform(0.7, 1.3), uniform(0, 2 * math.pi))
    wires = [torch.polar(radius, angle + sign * half_width) for sign in (1, -1)]
    field = _wire_field(wires[0], shape) - _wire_field(wires[1], shape)
    return _normalised(gain[:, None, None] * field)


def smooth_phase(shape: tuple[int, int], seed: int, *, strength: float = 1.0) -> Tensor:
    """Draw a smooth random phase, as field inhomogeneity and flow leave in an image.

    A random sum of the two-dimensional cosines with at most two periods over the field of view, their
    amplitudes falling with frequency.

    Parameters
    ----------
    shape : tuple of int
        ``(H, W)``.
    seed : int
        Seed; the same seed gives the same phase on any matrix size.
    strength : float
        Standard deviation of the phase over the field of view, in radians.

    Returns
    -------
    Tensor
        Float32 ``(H, W)``, radians, with mean 0. ``torch.polar(magnitude, phase)`` makes an image of it.

    Raises
    ------
    OperatorError
        If the shape is not two sizes above 1, or the strength is negative.
    """
    _check(1, shape)
    if min(shape) < 2 or not strength >= 0:
        raise OperatorError(
            f"a phase needs a shape of at least (2, 2) and a strength >= 0, got {shape}, {strength}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(5, dtype=torch.float64)
    frequency = order[:, None] + order  # in half periods
    weight = torch.randn(5, 5, generator=generator, dtype=torch.float64) / (1 + frequency**2)
    weight[frequency > 4] = 0
    # The samples of a type-II cosine transform: all terms but the constant one have mean zero.
    basis = [
        torch.cos(math.pi * order * (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) / size)
        for size in shape
    ]
    phase = basis[0] @ weight @ basis[1].T
    phase = phase - phase.mean()
    return (strength * phase / phase.std(correction=0)).float()


def simulate_kspace(image: Tensor, maps: Tensor, noise_std: float = 0.0, seed: int = 0) -> Tensor:
    """Simulate fully sampled multi-coil k-space of an image.

    Parameters
    ----------
    image : Tensor
        Real or complex ``(..., H, W)``.
    maps : Tensor
        Coil sensitivities, complex ``(..., C, H, W)``.
    noise_std : float
        Standard deviation of the noise per real component.
    seed : int
        Seed of the noise.

    Returns
    -------
    Tensor
        Complex ``(..., C, H, W)``, centred.

    Raises
    ------
    OperatorError
        If the matrix sizes of image and maps differ, or the maps have no coil dimension.
    """
    if maps.ndim < 3 or image.ndim < 2 or image.shape[-2:] != maps.shape[-2:]:
        raise OperatorError(
            f"image (..., H, W) and maps (..., C, H, W) must have the same H and W, got {tuple(image.shape)} "
            f"and {tuple(maps.shape)}"
        )
    kspace = fftc(maps * image.unsqueeze(-3))
    return add_noise(kspace, noise_std, torch.Generator(kspace.device).manual_seed(seed))


def add_noise(y: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise of a standard deviation `std` *per real component*: ``E|n|^2 = 2 std^2``.

    Parameters
    ----------
    y : Tensor
        Real or complex measurements.
    std : float
        Standard deviation per real component, in the units of y.
    generator : torch.Generator
        Source of the noise, on the device of y.

    Returns
    -------
    Tensor
        Like y. What is exactly zero because it was not sampled must be masked again by the caller.

    Raises
    ------
    OperatorError
        If the standard deviation is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0):
        raise OperatorError(f"the standard deviation of noise must be a number >= 0, got {std}")
    noise = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
    # torch draws complex numbers with E|n|^2 = 1.
    return y + noise * (std * math.sqrt(2) if y.is_complex() else std)


def _wire_field(position: Tensor, shape: tuple[int, int]) -> Tensor:
    y, x = (2 * (torch.arange(size, dtype=torch.float64) - size // 2) / size for size in shape)
    offset = position[:, None, None] - torch.complex(x.expand(shape), y[:, None].expand(shape))
    return offset.conj() / (offset.abs() ** 2 + _COIL_SIZE**2)


def _normalised(maps: Tensor) -> Tensor:
    rss = maps.abs().square().sum(dim=0).sqrt()
    return (maps / rss.mean()).to(torch.complex64)


def _check(num_coils: int, shape: tuple[int, int]) -> None:
    if num_coils < 1:
        raise OperatorError(f"there must be at least one coil, got {num_coils}")
    if len(shape) != 2 or min(shape) < 1:
        raise OperatorError(f"the shape of coil maps must be (H, W), both positive, got {tuple(shape)}")
