"""Where the axis of rotation meets the detector, from the data alone and to a fraction of a detector element.

In the geometries of this package the axis lies at the detector coordinate 0, and `detector_offset` says where
the middle of the detector is. Files and other programs speak of the *centre*, the fractional index of the
element in front of which the axis lies: `offset_from_centre` and `centre_from_offset` translate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from operators.ct_geometry import LARGEST_GAP, FanBeam, ParallelBeam, usual_gap
from operators.errors import OperatorError

_METHODS = ("auto", "opposed", "fourier", "moments")


def offset_from_centre(centre: float, num_detectors: int, detector_spacing: float) -> float:
    """Detector offset in mm of a centre of rotation given as a fractional element index.

    Index 0 is the middle of the first element. A program that counts from the edge of the detector gives a
    number larger by one half.
    """
    return ((num_detectors - 1) / 2 - centre) * detector_spacing


def centre_from_offset(detector_offset: float, num_detectors: int, detector_spacing: float) -> float:
    """Centre of rotation, as a fractional element index, of a detector offset in mm."""
    return (num_detectors - 1) / 2 - detector_offset / detector_spacing


def find_detector_offset(
    sinogram: Tensor,
    geometry: ParallelBeam | FanBeam,
    *,
    method: str = "auto",
    max_shift: float | None = None,
) -> float:
    """Find the detector offset that makes a scan consistent with itself.

    Parameters
    ----------
    sinogram : Tensor
        Line integrals ``(..., views, detectors)``; slices in leading dimensions share one axis of rotation
        and are used together. At most 8 of them are.
    geometry : ParallelBeam or FanBeam
        That of the scan. Its `detector_offset` is where the search begins.
    method : str
        How consistency is measured.

        ``opposed``
            A ray measured from both its ends has one line integral: ``p(t, u) = p(t + π, -u)`` for parallel
            beams and ``p(t, γ) = p(t + π - 2γ, -γ)`` for fans (Kak and Slaney, *Principles of Computerized
            Tomographic Imaging*, 1988, eq. 3.113). Needs views that oppose each other: a whole turn, or a
            parallel scan with 0° and 180°.
        ``fourier``
            Half a turn of a parallel beam and its mirror image make up a whole one, whose Fourier transform
            vanishes outside of a double wedge if, and only if, the mirror stood at the centre (Vo et al.,
            "Reliable method for calculating the center of rotation in parallel-beam tomography", Opt. Express
            22, 19078, 2014). Also works on truncated scans.
        ``moments``
            The centre of mass of each parallel projection is the projection of the object's (Helgason and
            Ludwig's condition of first order; Azevedo et al., IEEE Trans. Nucl. Sci. 37, 1525, 1990). Needs
            any angles, but the whole object in every view, and no background.
        ``auto``
            ``opposed`` for fans and beyond half a turn, else ``fourier``.
    max_shift : float, optional
        Largest distance in mm from the offset in `geometry`; an eighth of the detector by default.

    Returns
    -------
    float
        `detector_offset` in mm; ``dataclasses.replace(geometry, detector_offset=...)`` is the corrected
        geometry.

    Raises
    ------
    OperatorError
        If the shapes do not fit, the scan lacks the views or angles that the method needs, the object does
        not fit into the view (``moments``), or the best offset lies at the end of the search.
    """
    if method not in _METHODS:
        raise OperatorError(f"the method is one of {', '.join(_METHODS)}, not {method!r}")
    expected = geometry.range_shape
    if sinogram.ndim < 2 or tuple(sinogram.shape[-2:]) != expected:
        raise OperatorError(
            f"the geometry has (views, detectors) {expected}, got a sinogram of shape {tuple(sinogram.shape)}"
        )
    if not bool(torch.isfinite(sinogram).all()):
        raise OperatorError("the sinogram holds NaN or infinite values")
    data = sinogram.double().reshape(-1, *expected)
    data = data[torch.linspace(0, len(data) - 1, min(len(data), 8)).round().long()]
    angles = torch.from_numpy(_in_one_piece(np.array(geometry.angles)))
    order = angles.argsort()
    data, angles = data[:, order], angles[order]

    fan = isinstance(geometry, FanBeam)
    if len(angles) == 1:
        raise OperatorError("a single view does not tell the centre of rotation")
    if method == "auto":
        beyond = float(angles[-1] - angles[0]) > math.pi + 1.5 * float(angles.diff().median())
        method = "opposed" if fan or beyond or _is_whole_turn(angles) else "fourier"
    if fan and method != "opposed":
        raise OperatorError(f"the method {method!r} is for parallel beams; 'opposed' works with fans")
    if method == "moments":
        return _from_moments(data, angles, geometry.detector_spacing)

    spacing = geometry.detector_spacing
    reach = (max_shift if max_shift is not None else geometry.num_detectors * spacing / 8) / spacing
    if not 1 <= reach <= geometry.num_detectors / 4:
        raise OperatorError(
            f"max_shift must be between one element and a quarter of the detector, got {reach:g} elements"
        )
    middle = centre_from_offset(geometry.detector_offset, geometry.num_detectors, spacing)
    half_width = min(middle, geometry.num_detectors - 1 - middle) - reach - 1
    if half_width < 4:
        raise OperatorError(
            f"the search for the centre around {middle:g} ± {reach:g} leaves the detector of "
            f"{geometry.num_detectors} elements: give a smaller max_shift"
        )
    # A band limit, so that interpolation neither smooths nor shifts, wherever between two elements it falls.
    data = _smooth(data, 1.5)
    if method == "fourier":
        cost = _fourier_cost(data, angles, int(half_width))
    else:
        cost = _opposed_cost(data, angles, geometry, int(half_width))
    return offset_from_centre(_minimum(cost, middle - reach, middle + reach), geometry.num_detectors, spacing)


def _from_moments(data: Tensor, angles: Tensor, spacing: float) -> float:
    size = data.shape[-1]
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    mass = data.sum(-1)
    edge = data[..., [0, 1, -2, -1]].mean(-2).abs().amax(-1)  # over the views, so noise hardly counts
    truncated = bool((edge > 0.05 * data.mean(-2).amax(-1)).any())
    if truncated or bool((mass <= 0).any()) or float((mass.std(-1) / mass.mean(-1)).max()) > 0.05:
        raise OperatorError(
            "the object is not wholly in each view, or there is a background, so the centres of mass do not "
            "tell the centre of rotation"
        )
    if len(angles) < 3 or float(angles[-1] - angles[0]) < math.pi / 4:
        raise OperatorError("the centres of mass need at least three views over at least 45°")
    centroid = (data @ position) / mass
    columns = torch.stack([angles.cos(), angles.sin(), torch.ones_like(angles)], -1)
    fit = torch.linalg.lstsq(columns, centroid.mT).solution
    return -float(fit[2].mean()) * spacing


def _fourier_cost(data: Tensor, angles: Tensor, half_width: int) -> Callable[[float], float]:
    """Mean magnitude outside of the double wedge, as a function of the centre."""
    if len(angles) < 3:
        raise OperatorError(f"the method 'fourier' needs at least three views, got {len(angles)}")
    step = float(angles.diff().median())
    if float(angles[-1] - angles[0]) > math.pi - step / 2:  # the view at 180° is that at 0° again
        data, angles = data[:, :-1], angles[:-1]
    spread = float((angles.diff() - step).abs().max())
    if abs(len(angles) * step - math.pi) > step or spread > 0.2 * step:
        raise OperatorError(
            f"the method 'fourier' needs half a turn in equal steps, got {len(angles)} views over "
            f"{math.degrees(float(angles[-1] - angles[0])):.4g}°"
        )
    distance = torch.arange(-half_width, half_width + 1, dtype=torch.float64)
    window = _taper(len(distance), max(len(distance) // 10, 2))
    views = 2 * len(angles)
    harmonic = (torch.fft.fftfreq(views, dtype=torch.float64) * views).abs()[:, None]
    frequency = 2 * math.pi * torch.fft.rfftfreq(len(distance), dtype=torch.float64)
    # |m| > R ω, and well clear of the low harmonics, where truncation and background have their energy.
    outside = (harmonic > half_width * frequency + 4) & (harmonic > views / 32)
    # The transform's origin, moved from the first sample to the middle one.
    phase = torch.polar(torch.ones_like(frequency), half_width * frequency)
    columns = int(outside.any(0).sum())  # the lowest frequencies; the others lie within the wedge
    outside = outside[:, :columns]

    def cost(centre: float) -> float:
        half = torch.fft.rfft(_sample(data, centre + distance) * window)[..., :columns]
        half = half * phase[:columns]  # about the centre, so that the mirror image is the conjugate
        return float(torch.fft.fft(torch.cat([half, half.conj()], -2), dim=-2).abs()[..., outside].mean())

    return cost


def _opposed_cost(
    data: Tensor, angles: Tensor, geometry: ParallelBeam | FanBeam, half_width: int
) -> Callable[[float], float]:
    """Mean square difference of rays measured from both ends, as a function of the centre."""
    views = len(angles)
    spacing = geometry.detector_spacing
    distance = torch.arange(-half_width, half_width + 1, dtype=torch.float64)
    u = distance * spacing
    if isinstance(geometry, FanBeam):
        gamma = torch.from_numpy(geometry.ray_angles(u.numpy()))
    else:
        gamma = torch.zeros_like(u)
    chosen = torch.linspace(0, views - 1, min(views, 180)).round().long()
    opposed = angles[chosen, None] + math.pi - 2 * gamma  # (chosen, distance)
    step = float(angles.diff().median())
    whole_turn = _is_whole_turn(angles)
    if whole_turn:
        # One period, with its first view once more behind its last.
        keep = angles - angles[0] < 2 * math.pi - 0.01 * step
        period = angles[keep]
        nodes = torch.cat([period, period[:1] + 2 * math.pi])
        rows = torch.cat([torch.arange(len(period)), torch.tensor([0])])
        opposed = nodes[0] + (opposed - nodes[0]).remainder(2 * math.pi)
        measured = torch.ones_like(opposed, dtype=torch.bool)
    else:
        nodes, rows = angles, torch.arange(views)
        measured = (opposed >= nodes[0] - step / 4) & (opposed <= nodes[-1] + step / 4)
    upper = torch.searchsorted(nodes, opposed).clamp(1, len(nodes) - 1)
    gap = nodes[upper] - nodes[upper - 1]
    measured &= gap <= LARGEST_GAP * usual_gap(nodes.diff().numpy())
    if float(measured.double().sum()) < len(distance):
        raise OperatorError(
            f"the scan over {math.degrees(float(angles[-1] - angles[0])):.4g}° has no views that oppose each "
            "other, as the method 'opposed' needs"
        )
    weight = ((opposed - nodes[upper - 1]) / gap).clamp(0, 1)
    column = torch.arange(len(distance)).expand(upper.shape)
    first, second = rows[upper - 1], rows[upper]

    def cost(centre: float) -> float:
        one = _sample(data[:, chosen], centre + distance)
        other = _sample(data, centre - distance)
        other = (1 - weight) * other[:, first, column] + weight * other[:, second, column]
        return float((one - other)[:, measured].square().mean())

    return cost


def _in_one_piece(angles: np.ndarray) -> np.ndarray:
    """Angles of an arc through 0 that were stored modulo a whole turn, without the jump."""
    ordered = np.sort(angles)
    gaps = np.diff(ordered, append=ordered[0] + 2 * math.pi)
    last = int(gaps.argmax())
    if 0 <= gaps[-1] < gaps[last] and gaps[last] > LARGEST_GAP * usual_gap(gaps):
        return np.where(angles <= ordered[last], angles + 2 * math.pi, angles)
    return angles


def _is_whole_turn(angles: Tensor) -> bool:
    gaps = angles.diff()
    closed = float(angles[-1] - angles[0]) + 1.5 * float(gaps.median()) >= 2 * math.pi
    return closed and float(gaps.max()) <= LARGEST_GAP * usual_gap(gaps.numpy())


def _smooth(data: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=data.dtype) / sigma) ** 2)
    flat = torch.nn.functional.pad(data.flatten(0, 1)[:, None], (reach, reach), mode="replicate")
    return torch.nn.functional.conv1d(flat, (kernel / kernel.sum())[None, None]).reshape(data.shape)


def _sample(data: Tensor, position: Tensor) -> Tensor:
    """Values between the elements, by cubic convolution (Keys, IEEE Trans. ASSP 29, 1153, 1981, a = -1/2)."""
    base = position.floor()
    t = position - base
    weights = (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (-(t**2) + t**3) / 2,
    )
    last = data.shape[-1] - 1
    taps = [(base.long() + k - 1).clamp(0, last) for k in range(4)]
    return sum((w * data[..., tap] for w, tap in zip(weights, taps, strict=True)), start=torch.zeros(()))


def _taper(size: int, edge: int) -> Tensor:
    window = torch.ones(size, dtype=torch.float64)
    ramp = torch.sin(math.pi / 2 * (torch.arange(edge, dtype=torch.float64) + 0.5) / edge) ** 2
    window[:edge], window[-edge:] = ramp, ramp.flip(0)
    return window


def _minimum(cost: Callable[[float], float], low: float, high: float) -> float:
    """Global minimum: steps of about one element, then golden sections around the best one."""
    count = math.ceil(high - low) + 1
    grid = [low + (high - low) * k / (count - 1) for k in range(count)]
    best = min(range(count), key=[cost(centre) for centre in grid].__getitem__)
    if best in (0, count - 1):
        raise OperatorError(
            f"the best centre of rotation, {grid[best]:g}, is at the end of the search between {low:g} and "
            f"{high:g}: give another detector_offset or max_shift, or another method"
        )
    a, b = grid[best - 1], grid[best + 1]
    ratio = (math.sqrt(5) - 1) / 2
    x1, x2 = b - ratio * (b - a), a + ratio * (b - a)
    f1, f2 = cost(x1), cost(x2)
    while b - a > 1e-3:
        if f1 < f2:
            b, x2, f2 = x2, x1, f1
            x1 = b - ratio * (b - a)
            f1 = cost(x1)
        else:
            a, x1, f1 = x1, x2, f2
            x2 = a + ratio * (b - a)
            f2 = cost(x2)
    return (a + b) / 2
