"""Filtered backprojection: the direct inversion formula of CT, for any set of views.

Each view is filtered with a ramp and smeared back along its rays [1]_. Views need not be equally spaced,
cover any particular arc or be many: every ray is counted with the angle that it stands for, and where two
rays run along the same line their weights add up to one, smoothly where a fan's coverage ends [2]_ (with the
arc of a short scan, weights like those of Parker [3]_; over a whole turn with the detector off the centre,
like those of Wang [4]_). What was not measured is missing: a limited arc leaves streaks, a detector that does
not see the whole object a bowl.

References
----------
.. [1] A. C. Kak and M. Slaney, *Principles of Computerized Tomographic Imaging*, IEEE Press 1988, chapter 3:
   equations 61 (ramp), 29-37 of section 3.4.1 (equiangular fan) and of section 3.4.2 (flat detector).
.. [2] F. Noo, M. Defrise, R. Clackdoyle and H. Kudo, "Image reconstruction from fan-beam projections on less
   than a short scan", Phys. Med. Biol. 47:2525-2546, 2002, section 2.5.
.. [3] D. L. Parker, "Optimal short scan convolution reconstruction for fan beam CT", Med. Phys. 9:254-257,
   1982.
.. [4] G. Wang, "X-ray micro-CT with a displaced detector array", Med. Phys. 29:1634-1636, 2002.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from operators.ct import CTOperator
from operators.ct_geometry import LARGEST_GAP, FanBeam, ParallelBeam, usual_gap, view_gaps
from operators.errors import OperatorError

# Apodisation of the ramp: f is the frequency as a fraction of the cut-off, 0 to 1.
_WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ram-lak": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi / 2 * f),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}
FILTERS = tuple(_WINDOWS)
"""Names of the filters, from the sharpest to the smoothest."""

# Least and largest angle over which the weights fall at the ends of a fan's arc.
_LEAST_TAPER, _LARGEST_TAPER = math.radians(5), math.radians(60)
# Elements of the grid on which a block of views is interpolated.
_BLOCK = 2**20


def fbp(operator: CTOperator, sinogram: Tensor, filter: str = "ram-lak", *, cutoff: float = 1.0) -> Tensor:
    """Reconstruct by filtered backprojection.

    Linear in the sinogram, and gradients flow through it.

    Parameters
    ----------
    operator : CTOperator
        Of the scan; only its geometry, its image shape and its pixel size matter.
    sinogram : Tensor
        Line integrals without unit ``(..., views, detectors)``, real or complex.
    filter : {"ram-lak", "shepp-logan", "cosine", "hamming", "hann"}
        What the ramp is multiplied by.
    cutoff : float
        Frequency beyond which the filter is 0, as a fraction of the highest the detector resolves; in (0, 1].

    Returns
    -------
    Tensor
        Attenuation in 1/mm ``(..., H, W)``, in the dtype of the sinogram.

    Raises
    ------
    OperatorError
        If the shape does not fit, the filter is unknown or the cut-off not in (0, 1].
    """
    shape = tuple(sinogram.shape)
    if shape[-2:] != operator.range_shape:
        views, detectors = operator.range_shape
        raise OperatorError(f"fbp needs a sinogram of shape (..., {views}, {detectors}), got {shape}.")
    if not (sinogram.is_floating_point() or sinogram.is_complex()):
        raise OperatorError(f"fbp needs a floating-point sinogram, got {sinogram.dtype}.")
    if filter not in FILTERS:
        raise OperatorError(f"filter of fbp is one of {', '.join(FILTERS)}, not {filter!r}.")
    if not 0 < cutoff <= 1:
        raise OperatorError(f"cutoff of fbp is in (0, 1], got {cutoff}.")
    items = sinogram.reshape(-1, *operator.range_shape)
    if items.is_complex():
        items = torch.cat([items.real, items.imag])
    geometry = operator.geometry
    weights = torch.from_numpy(_ray_weights(geometry)).to(items.device, items.dtype)
    items = items * weights
    if _is_offset_turn(geometry):
        items, geometry = _symmetric(items, geometry)
    response = _response(geometry, filter, cutoff).to(items.device, items.dtype)
    filtered = _filtered(items, response)
    image = _backprojected(filtered, geometry, operator.image_shape, operator.pixel_size)
    if sinogram.is_complex():
        image = torch.complex(*image.chunk(2))
    return image.reshape(*shape[:-2], *operator.image_shape)


# -- weights -------------------------------------------------------------------------------------------------


def _ray_weights(geometry: ParallelBeam | FanBeam) -> np.ndarray:
    """What each ray is multiplied by before the filter, float64 ``(views, detectors)``, or ``(views, 1)``."""
    angles = np.array(geometry.angles)
    offset = _is_offset_turn(geometry)
    if isinstance(geometry, ParallelBeam) and not offset:
        # Views half a turn apart see the same lines.
        return _view_widths(angles, math.pi)[:, None]
    widths = _view_widths(angles, 2 * math.pi)[:, None]
    if isinstance(geometry, ParallelBeam):
        return widths * _offset_shares(geometry)
    gamma = geometry.ray_angles(geometry.detector_positions)
    shares = _offset_shares(geometry) if offset else _redundancy(angles, gamma)
    return widths * np.cos(gamma) * shares


def _view_widths(angles: np.ndarray, period: float) -> np.ndarray:
    """Angle that each view stands for: half the way to its neighbours on either side, modulo `period`.

    Views beside a large gap stand at the end of an arc, and do not reach over it.
    """
    if len(angles) == 1:
        return np.array([period])
    order = np.argsort(np.mod(angles, period), kind="stable")
    ahead = view_gaps(angles, period)
    usual = usual_gap(ahead)
    reach = np.where(ahead > LARGEST_GAP * usual, usual, ahead) / 2
    widths = np.empty_like(reach)
    widths[order] = reach + np.roll(reach, 1)
    return widths


def _redundancy(angles: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Share of each ray of a fan in its line, ``(views, detectors)``: one half if the line is seen twice.

    The ray (β, γ) runs along the line of (β + π - 2γ, -γ), in the other direction. With a function c of β
    that is smooth and 0 beyond the arc, the share is ``c(β) / (c(β) + c(β + π - 2γ))``.
    """
    gaps = view_gaps(angles, 2 * math.pi)
    usual = usual_gap(gaps)
    if gaps.max() <= LARGEST_GAP * usual:
        return np.full((len(angles), len(gamma)), 0.5)
    # The arc begins behind the largest gap, and each end reaches half a step beyond the last view.
    last = int(gaps.argmax())
    turned = np.sort(np.mod(angles, 2 * math.pi))
    start = turned[(last + 1) % len(turned)] - usual / 2
    arc = 2 * math.pi - gaps[last] + usual
    taper = min(max(arc - math.pi, _LEAST_TAPER), _LARGEST_TAPER, arc / 2)

    def coverage(beta: np.ndarray) -> np.ndarray:
        along = np.mod(beta - start, 2 * math.pi)
        distance = np.clip(np.minimum(along, arc - along) / taper, 0, 1)
        return np.sin(math.pi / 2 * distance) ** 2

    own = coverage(angles)[:, None]
    return own / (own + coverage(angles[:, None] + math.pi - 2 * gamma))


def _is_offset_turn(geometry: ParallelBeam | FanBeam) -> bool:
    """Whether views all around were taken with the detector more than an element off the centre.

    The lines that pass its short side are then measured once, by the other side half a turn later.
    """
    gaps = view_gaps(np.array(geometry.angles), 2 * math.pi)
    all_around = gaps.max() < math.pi and gaps.max() <= LARGEST_GAP * usual_gap(gaps)
    return bool(all_around) and abs(geometry.detector_offset) > geometry.detector_spacing


def _offset_shares(geometry: ParallelBeam | FanBeam) -> np.ndarray:
    """Share of each ray in its line over a whole turn of an offset detector, ``(detectors,)``.

    The opposite of the ray to u ends at -u, also in fans: the share grows from 0 at the near end of the
    detector to 1 at that distance on the far side, where the opposite is not measured, as a sine [4]_. Noise
    is least where both count one half, and in between they do, if little is missing on the near side.
    """
    side = math.copysign(1.0, geometry.detector_offset)
    near = -float((side * geometry.detector_edges).min())
    position = side * geometry.detector_positions
    if near <= 0:  # the detector ends before the axis, and nothing is seen twice
        return np.ones_like(position)
    # Twice as wide as what is missing: narrower, it would be felt.
    taper = min(near, 4 * abs(geometry.detector_offset))
    more = np.sin(math.pi / 2 * np.clip((np.abs(position) - near + taper) / taper, 0, 1))
    if taper < near:  # smooth where it joins the constant half, too
        more = more**2
    return (1 + np.sign(position) * more) / 2


# -- filter --------------------------------------------------------------------------------------------------


def _symmetric(items: Tensor, geometry: ParallelBeam | FanBeam) -> tuple[Tensor, ParallelBeam | FanBeam]:
    """Weighted views, and their geometry, with zeros that make the short side as long as the other.

    The filter spreads what was measured beyond the end of the detector, and pixels are seen there.
    """
    missing = int(2 * abs(geometry.detector_offset) / geometry.detector_spacing)
    low, high = (missing, 0) if geometry.detector_offset > 0 else (0, missing)
    wider = replace(
        geometry,
        num_detectors=geometry.num_detectors + missing,
        detector_offset=geometry.detector_offset + (high - low) / 2 * geometry.detector_spacing,
    )
    return functional.pad(items, (low, high)), wider


def _response(geometry: ParallelBeam | FanBeam, filter: str, cutoff: float) -> Tensor:
    """Frequency response of the filter, float64, on the grid of the padded real transform.

    The ramp is sampled in space, as it acts on detector samples: sampled in frequency, it would lose the
    mean.
    """
    count = geometry.num_detectors
    padded = 2 ** math.ceil(math.log2(2 * count))
    spacing = geometry.detector_spacing
    if isinstance(geometry, FanBeam):
        # On a flat detector as it would be at the axis of rotation, on a curved one in angles.
        spacing /= geometry.magnification if geometry.detector == "flat" else geometry.source_detector
    n = torch.arange(padded, dtype=torch.float64)
    n = torch.minimum(n, padded - n)
    kernel = torch.where(n % 2 == 1, -1 / (math.pi * n.clamp_min(1)) ** 2, 0.0)
    kernel[0] = 1 / 4
    if isinstance(geometry, FanBeam) and geometry.detector == "curved":
        angle = n.clamp(1, count) * spacing
        kernel *= torch.where((n >= 1) & (n <= count), (angle / angle.sin()) ** 2, 1.0)
    response = torch.fft.rfft(kernel).real / spacing
    frequency = torch.linspace(0, 1, padded // 2 + 1, dtype=torch.float64) / cutoff
    return response * _WINDOWS[filter](frequency) * (frequency <= 1)


def _filtered(items: Tensor, response: Tensor) -> Tensor:
    padded = 2 * (len(response) - 1)
    spectrum = torch.fft.rfft(items, n=padded)
    return torch.fft.irfft(spectrum * response, n=padded)[..., : items.shape[-1]]


# -- backprojection ------------------------------------------------------------------------------------------


def _backprojected(
    filtered: Tensor, geometry: ParallelBeam | FanBeam, shape: tuple[int, ...], pixel_size: float
) -> Tensor:
    """Sum over the views of what each one says of each pixel, ``(n, views, detectors)`` to ``(n, H, W)``.

    Where each pixel is seen is computed from the geometry, and the filtered view is interpolated there:
    unlike with the transpose of the projector, no pattern of rays is left in the image.
    """
    rows, columns = (
        (torch.arange(n, dtype=filtered.dtype, device=filtered.device) - (n - 1) / 2) * pixel_size
        for n in shape
    )
    y, x = -rows[:, None], columns
    image = filtered.new_zeros(len(filtered), *shape)
    block = max(1, _BLOCK // math.prod(shape))
    for first in range(0, geometry.num_views, block):
        views = slice(first, first + block)
        angles = torch.tensor(geometry.angles[views], dtype=torch.float64)[:, None, None]
        cosine, sine = angles.cos().to(filtered), angles.sin().to(filtered)
        across = x * cosine + y * sine
        weight: Tensor | None = None
        if isinstance(geometry, ParallelBeam):
            position = across
        else:
            depth = geometry.source_origin - x * sine + y * cosine
            if geometry.detector == "flat":
                position = across / depth * geometry.source_detector
                weight = (geometry.source_origin / depth) ** 2
            else:
                position = torch.atan2(across, depth) * geometry.source_detector
                weight = geometry.source_origin / (across**2 + depth**2)
        index = (position - geometry.detector_offset) / geometry.detector_spacing
        seen = _interpolated(filtered[:, views], index + (geometry.num_detectors - 1) / 2)
        image = image + (seen if weight is None else seen * weight).sum(dim=1)
    return image


def _interpolated(views: Tensor, index: Tensor) -> Tensor:
    """Interpolate each view linearly, ``(n, views, K)`` at ``(views, H, W)`` to ``(n, views, H, W)``."""
    last = views.shape[-1] - 1
    # A detector of one element is a constant; a width of 2 spares the grid a division by 0.
    grid = torch.stack([index * (2 / max(last, 1)) - 1, torch.zeros_like(index)], dim=-1)
    lines = views.transpose(0, 1).unsqueeze(2)
    if last == 0:
        lines = functional.pad(lines, (0, 1))
    values = functional.grid_sample(lines, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return values.transpose(0, 1)
