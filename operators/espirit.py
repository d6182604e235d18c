"""Coil sensitivity maps from the calibration region alone: ESPIRiT [1]_.

Every patch of k-space that a kernel covers lies in a subspace, spanned by the dominant singular vectors of
the matrix of all patches in the calibration region. At each pixel x this leaves a C x C matrix G(x), the
projection onto that subspace restricted to the patches of a point source at x; the sensitivities at x are its
eigenvector with eigenvalue 1. G has no more oscillations across the image than twice the kernel has samples,
so that its eigenvectors are found on a coarse grid and interpolated.

References
----------
.. [1] M. Uecker et al., "ESPIRiT - an eigenvalue approach to autocalibrating parallel MRI: where SENSE meets
   GRAPPA", Magn. Reson. Med. 71:990-1001, 2014.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.fft import fftc, ifftc
from operators.masks import Region

# Points of the coarse grid per period of the fastest oscillation in G. Measured: cubic interpolation is then
# good to the precision of complex64 where the eigenvalues are well separated, with 12 to 1e-6, with 8 to
# 5e-4.
_POINTS_PER_PERIOD = 16
# Rows used when whole columns are sampled: more cost time and change nothing, the signal is in the centre.
_CALIBRATION_ROWS = 48
# Complex numbers in one piece of per-pixel matrices: few enough for the cache.
_PIECE = 2**18


class CalibrationWarning(UserWarning):
    """The calibration region is too small or too noisy for coil maps as good as those asked for."""


@dataclass(frozen=True)
class CalibrationResidual:
    """What coil maps leave unexplained of the data they were made from; see `calibration_residual`.

    Attributes
    ----------
    std : float
        Root mean square of the residual, per real component of a k-space sample, scaled such that it equals
        the standard deviation of the thermal noise when the maps are perfect. Larger: the maps are wrong by
        that much.
    relative : float
        Share of the signal's energy that the maps do not explain, the expected share of the noise taken off.
    """

    std: float
    relative: float


@overload
def espirit_maps(
    kspace: Tensor,
    acs: Region | None,
    *,
    kernel_size: int = ...,
    singular_threshold: float = ...,
    noise_std: float = ...,
    crop: float = ...,
    exact: bool = ...,
    return_eigenvalues: Literal[False] = ...,
) -> Tensor: ...
@overload
def espirit_maps(
    kspace: Tensor,
    acs: Region | None,
    *,
    kernel_size: int = ...,
    singular_threshold: float = ...,
    noise_std: float = ...,
    crop: float = ...,
    exact: bool = ...,
    return_eigenvalues: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def espirit_maps(
    kspace: Tensor,
    acs: Region | None,
    *,
    kernel_size: int = 6,
    singular_threshold: float = 0.02,
    noise_std: float = 0.0,
    crop: float = 0.8,
    exact: bool = False,
    return_eigenvalues: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Estimate one set of coil sensitivity maps by ESPIRiT, from the calibration region and nothing else.

    Computed by one CPU thread, whatever torch is set to use: more would gain little.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(..., C, H, W)``, centred. Leading dimensions are batch; each item gets maps of its own.
    acs : slice or tuple of slice
        The fully sampled centre, as in `operators.masks.Mask`: a slice of columns, of which the 48 rows in
        the middle are used, or slices ``(rows, columns)``. At least 3 samples to a side.
    kernel_size : int
        Side of the kernels. It shrinks along a short side of n samples to ``(n - 2) // 2`` and at least 2,
        because too few positions of a large kernel leave the maps worse than a small kernel does.
    singular_threshold : float
        Patches are spanned by the singular vectors with singular values above this fraction of the largest.
    noise_std : float
        Standard deviation of the noise per real component, white over the coils, if it is known: singular
        values that noise alone would produce are left out too. Matters where the signal-to-noise ratio is
        low.
    crop : float
        The maps' support is where the eigenvalue is above this fraction of the largest in the image.
    exact : bool
        Solve the eigenproblem at every pixel instead of on a coarse grid. Differs from the default only where
        the two largest eigenvalues nearly coincide.
    return_eigenvalues : bool
        Return the eigenvalues as well.

    Returns
    -------
    maps : Tensor
        Complex ``(..., C, H, W)``: of unit norm over the coils in the support, zero outside. The phase is
        relative to the first principal component of the coils in the calibration region, which unlike a
        single coil is nowhere near zero.
    eigenvalues : Tensor
        Real ``(..., H, W)``, the largest eigenvalue at every pixel, uncropped. Only with
        `return_eigenvalues`.

    Warns
    -----
    CalibrationWarning
        If the kernel had to shrink, or the calibration region holds no signal above the noise.

    Raises
    ------
    OperatorError
        If there is no calibration region, if it is smaller than 3 x 3, outside k-space, zero, or not finite,
        or if a parameter is out of its range.
    """
    if kernel_size < 2:
        raise OperatorError(f"kernel_size must be at least 2, got {kernel_size}")
    if not 0 < singular_threshold < 1:
        raise OperatorError(f"singular_threshold must be between 0 and 1, got {singular_threshold}")
    if not 0 <= crop < 1:
        raise OperatorError(f"crop must be at least 0 and below 1, got {crop}")
    if not (math.isfinite(noise_std) and noise_std >= 0):
        raise OperatorError(f"noise_std must be a number >= 0, got {noise_std}")
    _check_kspace(kspace)
    region = _calibration_region(acs, kspace.shape)
    sides = [part.stop - part.start for part in region]
    kernel = (min(kernel_size, max(2, (sides[0] - 2) // 2)), min(kernel_size, max(2, (sides[1] - 2) // 2)))
    if kernel != (kernel_size, kernel_size):
        warnings.warn(
            f"the calibration region of {sides[0]} x {sides[1]} samples is too small for a kernel of "
            f"{kernel_size} x {kernel_size}: using {kernel[0]} x {kernel[1]}, the maps will be less accurate",
            CalibrationWarning,
            stacklevel=2,
        )
    shape = (kspace.shape[-2], kspace.shape[-1])
    maps, eigenvalues = [], []
    with _one_thread():
        for calibration in kspace[(..., *region)].reshape(-1, kspace.shape[-3], *sides):
            _check_calibration(calibration)
            basis = _patch_basis(calibration, kernel, singular_threshold, noise_std)
            correlation = _autocorrelation(basis)
            vector, value = (
                _eigenvectors(correlation, shape) if exact else _coarse_to_fine(correlation, shape)
            )
            maps.append(vector * _phase_factor(vector, calibration) * (value > crop * value.max()))
            eigenvalues.append(value)
    batch = kspace.shape[:-3]
    result = torch.stack(maps).reshape(kspace.shape)
    return (result, torch.stack(eigenvalues).reshape(*batch, *shape)) if return_eigenvalues else result


def calibration_residual(
    kspace: Tensor, maps: Tensor, acs: Region | None, noise_std: float = 0.0
) -> CalibrationResidual:
    """Measure how much of the calibration region's signal coil maps cannot explain.

    Of the coil images c that the calibration region y makes (zero outside it), maps S explain ``S S^H c``.
    Both are compared in k-space, in the *interior* of the calibration region, a quarter of its width away
    from each edge: there alone the product with the maps, a convolution with short kernels, sees the data it
    needs. Over the N samples of the interior, with f the fraction of the image that the support of S fills,

        E = sum |y - F S S^H c|^2,    std = sqrt(E / (2 N (C - f))),
        relative = max(0, E - 2 N (C - f) noise_std^2) / sum |y|^2.

    White noise leaves C - f of its C components per pixel unexplained, hence the scale. For noiseless data
    and perfect maps `relative` is about 1e-5 for a calibration region of 24 x 24 and 2e-4 for one of 7
    columns. Maps fitted to the same data explain a little of its noise too: errors well below the thermal
    noise are not seen.

    Parameters
    ----------
    kspace : Tensor
        Complex ``(C, H, W)``, centred.
    maps : Tensor
        Complex ``(C, H, W)``, of unit norm over the coils in their support and zero outside, as
        `espirit_maps` makes them.
    acs : slice or tuple of slice
        The fully sampled centre, as for `espirit_maps`.
    noise_std : float
        Standard deviation of the thermal noise per real component.

    Returns
    -------
    CalibrationResidual

    Raises
    ------
    OperatorError
        If k-space and maps differ in shape or have fewer than two coils (one coil explains everything), or if
        the calibration region is not usable, as in `espirit_maps`.
    """
    if kspace.ndim != 3 or kspace.shape != maps.shape:
        raise OperatorError(
            f"k-space and coil maps must have the same shape (C, H, W), got {tuple(kspace.shape)} "
            f"and {tuple(maps.shape)}"
        )
    _check_kspace(kspace)
    num_coils = kspace.shape[0]
    if num_coils < 2:
        raise OperatorError("the calibration residual needs at least two coils: one coil explains everything")
    region = _calibration_region(acs, kspace.shape)
    calibration = kspace[(..., *region)]
    _check_calibration(calibration)
    centre = torch.zeros_like(kspace)
    centre[(..., *region)] = calibration
    images = ifftc(centre)
    explained = fftc(maps * (maps.conj() * images).sum(dim=0))
    margins = [max(1, (part.stop - part.start) // 4) for part in region]
    rows, columns = (slice(part.start + m, part.stop - m) for part, m in zip(region, margins, strict=True))
    measured, explained = centre[:, rows, columns], explained[:, rows, columns]
    unexplained = _energy(measured - explained)
    support = float((maps != 0).any(dim=0).double().mean())
    degrees = 2 * measured[0].numel() * (num_coils - support)
    return CalibrationResidual(
        std=math.sqrt(unexplained / degrees),
        relative=max(0.0, unexplained - degrees * noise_std**2) / _energy(measured),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one CPU thread, in this thread of the program.

    Eigendecompositions gain little from more and synchronise them thousands of times: measured with two
    threads on two processors that had other work to do, the whole took 20 times as long. It also makes the
    maps the same to the last bit for any number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _patch_basis(calibration: Tensor, kernel: tuple[int, int], threshold: float, noise_std: float) -> Tensor:
    """Return an orthonormal basis of the patches of the calibration region, ``(rank, C, kh, kw)``."""
    num_coils = calibration.shape[0]
    patches = calibration.unfold(1, kernel[0], 1).unfold(2, kernel[1], 1)  # (C, y, x, kh, kw)
    matrix = patches.permute(1, 2, 0, 3, 4).reshape(-1, num_coils * kernel[0] * kernel[1])
    # The Gram matrix of the shorter side has the singular values squared, and is far quicker than the SVD.
    if matrix.shape[0] < matrix.shape[1]:
        squared, left = torch.linalg.eigh(matrix @ matrix.mH)
    else:
        squared, vectors = torch.linalg.eigh(matrix.mT @ matrix.conj())
    # The largest singular value of a matrix of white noise (Marchenko and Pastur 1967), with room for its
    # fluctuation, which is larger where the rows are overlapping patches.
    noise = 1.1 * math.sqrt(2) * noise_std * (math.sqrt(matrix.shape[0]) + math.sqrt(matrix.shape[1]))
    keep = (squared > threshold**2 * squared[-1]) & (squared > noise**2)
    if not bool(keep.any()):
        keep[-1] = True
        warnings.warn(
            "the calibration region holds no signal above the noise: its coil maps mean little",
            CalibrationWarning,
            stacklevel=3,
        )
    if matrix.shape[0] < matrix.shape[1]:
        vectors = matrix.mT @ left[:, keep].conj() / squared[keep].sqrt()
    else:
        vectors = vectors[:, keep]
    return vectors.mT.reshape(-1, num_coils, *kernel)


def _autocorrelation(basis: Tensor) -> Tensor:
    """Sum ``v_i(d) conj(v_j(d'))`` over basis vectors v and all ``d - d' = D``: ``(2kh-1, 2kw-1, C, C)``.

    D = 0 comes first. The Fourier series with these coefficients is G: the projection onto the basis mixes
    all places in the kernel, and what a point source at x gives in two of them differs by a phase only.
    """
    kernel = basis.shape[-2:]
    spectrum = torch.fft.fft2(basis, s=[2 * side - 1 for side in kernel]).permute(2, 3, 1, 0)
    return torch.fft.ifft2(spectrum @ spectrum.mH, dim=(0, 1)) / (kernel[0] * kernel[1])


def _eigenvectors(
    correlation: Tensor, shape: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the dominant eigenvector ``(C, y, x)`` and eigenvalue ``(y, x)`` of G, by default everywhere."""
    num_coils = correlation.shape[-1]
    positions = [
        torch.arange(size) if given is None else given
        for given, size in zip((rows, columns), shape, strict=True)
    ]
    waves = [
        _waves(position, size, taps).to(correlation)
        for position, size, taps in zip(positions, shape, correlation.shape, strict=False)
    ]
    vectors, values = [], []
    # The Fourier series is separable: first along H, then along W, a few rows at a time.
    for some in waves[0].split(max(1, _PIECE // (len(positions[1]) * num_coils**2))):
        along_rows = torch.tensordot(some, correlation, dims=1).flatten(2)
        matrices = (waves[1] @ along_rows).reshape(-1, num_coils, num_coils)
        value, vector = torch.linalg.eigh(matrices)
        vectors.append(vector[..., -1])
        values.append(value[..., -1])
    grid = (len(positions[0]), len(positions[1]))
    return torch.cat(vectors).T.reshape(num_coils, *grid), torch.cat(values).reshape(grid)


def _waves(position: Tensor, size: int, taps: int) -> Tensor:
    lag = torch.fft.fftfreq(taps, 1 / taps, dtype=torch.float64)
    turns = (position[:, None].double() - size // 2) * lag / size
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)


def _coarse_to_fine(correlation: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Do as `_eigenvectors` does, on a coarse grid, and interpolate by cubics in each cell of the grid."""
    steps, cells = [], []
    for size, taps in zip(shape, correlation.shape, strict=False):
        step = max(1, 2 * size // ((taps - 1) * _POINTS_PER_PERIOD))
        steps.append(step)
        cells.append(math.ceil(size / step))
    if steps == [1, 1]:
        return _eigenvectors(correlation, shape)
    # A cubic needs one point before the cell and two after its first; G is defined outside the image as well.
    points = [torch.arange(-1, count + 2) * step for count, step in zip(cells, steps, strict=True)]
    coarse, coarse_value = _eigenvectors(correlation, shape, *points)
    weights = torch.einsum("aj,bk->jkab", *(_cubic_weights(step) for step in steps)).reshape(16, -1)
    corners = _neighbourhoods(coarse)  # (cells, C, 16)
    # Eigenvectors have arbitrary phases: give those around a cell the phase of its first corner.
    overlap = corners[:, :, 5:6].mH @ corners
    corners = corners * torch.sgn(overlap.conj())
    fine = _assemble(corners @ weights.to(corners), cells, steps, shape)
    value = _assemble(_neighbourhoods(coarse_value[None]) @ weights.to(coarse_value), cells, steps, shape)
    return fine / fine.norm(dim=0).clamp_min(1e-6), value[0]


def _cubic_weights(step: int) -> Tensor:
    """Weights (step, 4) of Lagrange's cubic through the points -1, 0, 1, 2 at 0, 1/step, ..."""
    t = torch.arange(step, dtype=torch.float64)[:, None] / step
    return torch.cat(
        [
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        ],
        dim=1,
    )


def _neighbourhoods(grid: Tensor) -> Tensor:
    """Cut ``(C, y + 3, x + 3)`` into the 4 x 4 points around each of y x cells: ``(y x, C, 16)``."""
    return grid.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, grid.shape[0], 16)


def _assemble(blocks: Tensor, cells: list[int], steps: list[int], shape: tuple[int, int]) -> Tensor:
    """Put the blocks ``(y x, C, step step)`` of all cells together: ``(C, H, W)``."""
    whole = blocks.reshape(*cells, -1, *steps).permute(2, 0, 3, 1, 4)
    return whole.reshape(-1, cells[0] * steps[0], cells[1] * steps[1])[:, : shape[0], : shape[1]]


def _phase_factor(vector: Tensor, calibration: Tensor) -> Tensor:
    """Return the unit factor ``(H, W)`` that makes the coils' principal component real and positive."""
    flat = calibration.flatten(1)
    principal = torch.linalg.eigh(flat @ flat.mH)[1][:, -1]
    # An eigenvector's own phase is arbitrary as well: make its largest entry positive.
    principal = principal * torch.sgn(principal[principal.abs().argmax()].conj())
    component = torch.tensordot(principal.conj(), vector, dims=1)
    return torch.where(component == 0, torch.ones_like(component), torch.sgn(component.conj()))


def _calibration_region(acs: Region | None, shape: torch.Size) -> tuple[slice, slice]:
    height, width = shape[-2:]
    if acs is None:
        raise OperatorError("there is no calibration region: the centre of k-space is not fully sampled")
    if isinstance(acs, slice):
        rows = min(height, _CALIBRATION_ROWS)
        start = (height - rows + 1) // 2
        acs = (slice(start, start + rows), acs)
    for name, part, size in zip(("rows", "columns"), acs, (height, width), strict=True):
        if part.start is None or part.stop is None or part.step not in (None, 1):
            raise OperatorError(f"the calibration region's {name} must be a slice(start, stop), got {part}")
        if not 0 <= part.start < part.stop <= size:
            raise OperatorError(
                f"the calibration region's {name} {part.start} to {part.stop} are not within the {size} "
                "of k-space"
            )
        if part.stop - part.start < 3:
            raise OperatorError(
                f"the calibration region has {part.stop - part.start} {name}, coil maps need at least 3"
            )
    return acs


def _check_kspace(kspace: Tensor) -> None:
    if kspace.ndim < 3 or not kspace.is_complex():
        raise OperatorError(
            f"k-space must be complex with shape (..., C, H, W), got {kspace.dtype} {tuple(kspace.shape)}"
        )


def _check_calibration(calibration: Tensor) -> None:
    if not bool(calibration.isfinite().all()):
        raise OperatorError("the calibration region of k-space contains NaN or infinite values")
    if not bool((calibration != 0).any()):
        raise OperatorError("the calibration region of k-space is zero throughout")


def _energy(x: Tensor) -> float:
    return float(x.abs().square().sum(dtype=torch.float64))
