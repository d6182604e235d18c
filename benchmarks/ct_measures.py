"""What CT images are judged by: bias, resolution at an edge, noise texture, and discs of low contrast.

All of it knows the truth: resolution and detection are measured on the image minus the truth without what was
planted, so that anatomy does not stand in the way. For a nonlinear method they hold at the contrast at which
they were measured and at no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recon.errors import ReconError

STEP = 0.25
"""Distance between the points of an oversampled edge response, in pixels."""

THRESHOLD = 3.0
"""Standard deviations of the observer's answer where there is nothing, from which a disc counts as detected:
of normal noise, one empty place in 740 would."""

RING = (1.2, 1.7)
"""Inner and outer radius of the ring that tells the local background of a disc, over the disc's radius."""

LEAST_PLACES = 10
"""Empty places without which nothing is said about a disc."""

NPS_SIDE, NPS_STRIDE = 16, 4
"""Side of the squares in which noise texture is measured and their distance, pixels."""


@dataclass(frozen=True)
class Disc:
    """A disc that is added to an image.

    Attributes
    ----------
    row, column : float
        Centre, in pixels of the reconstructed image, whose first pixel has its centre at 0.
    radius : float
        In mm.
    contrast : float
        In HU.
    """

    row: float
    column: float
    radius: float
    contrast: float

    def coverage(self, shape: tuple[int, int], pixel_size: float, fineness: int = 1) -> np.ndarray:
        """Share of each pixel that the disc covers, float64 ``(fineness H, fineness W)``.

        Parameters
        ----------
        shape : (int, int)
            Height and width of the reconstructed image.
        pixel_size : float
            Of the reconstructed image, mm.
        fineness : int
            How many pixels of the result make a pixel of the reconstructed image, along each axis.
        """
        radius, inner = self.radius / pixel_size, 32 // fineness
        # Sampled by points on a grid; 32 x 32 of them in a reconstructed pixel err by some 0.1 % of an edge.
        rows, columns = (
            (np.arange(n * fineness * inner) + 0.5) / (fineness * inner) - 0.5 - centre
            for n, centre in zip(shape, (self.row, self.column), strict=True)
        )
        result = np.zeros((shape[0] * fineness, shape[1] * fineness))
        near = [np.flatnonzero(np.abs(axis) <= radius + 1) // inner for axis in (rows, columns)]
        if not all(len(axis) for axis in near):
            return result
        top, left = near[0][0], near[1][0]
        height, width = near[0][-1] - top + 1, near[1][-1] - left + 1
        y = rows[top * inner : (top + height) * inner]
        x = columns[left * inner : (left + width) * inner]
        inside = y[:, None] ** 2 + x**2 <= radius**2
        result[top : top + height, left : left + width] = inside.reshape(height, inner, width, inner).mean(
            axis=(1, 3)
        )
        return result


def bias(image: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """Mean of image minus truth in a region, in their units."""
    if not region.any():
        raise ReconError("the bias is asked for in a region without pixels")
    return float((image - truth)[region].mean(dtype=np.float64))


# -- resolution ----------------------------------------------------------------------------------------------


def edge_mtf(
    response: np.ndarray, disc: Disc, pixel_size: float, reach: float = 8.0
) -> tuple[np.ndarray, np.ndarray]:
    """Modulation transfer at the edge of a disc, all around it.

    The values of the pixels, ordered by their distance from the edge, are an oversampled edge response;
    its derivative is the line spread, and the Fourier transform of that the transfer (Richard et al.,
    "Towards task-based assessment of CT performance", Med. Phys. 39, 4115, 2012). The transfer of what is
    done with the values is divided out. It contains the pixels themselves: an ideal image with the mean over
    each pixel has the transfer of a pixel and not 1.

    Parameters
    ----------
    response : ndarray
        Image minus the truth without the disc, ``(H, W)``.
    disc : Disc
        What was added.
    pixel_size : float
        mm.
    reach : float
        How far from the edge the response is looked at, mm.

    Returns
    -------
    frequencies, transfer : ndarray
        In 1/mm, from 0 to one period a pixel; 1 at frequency 0.

    Raises
    ------
    ReconError
        If the edge does not show at all: the difference between inside and outside is not positive.
    """
    rows, columns = (np.arange(n) for n in response.shape)
    distance = np.hypot(rows[:, None] - disc.row, columns - disc.column) * pixel_size - disc.radius
    step = STEP * pixel_size
    half = math.ceil(reach / step)
    positions = step * np.arange(-half, half + 1)
    edge = _local_lines(distance.ravel(), response.ravel(), positions, step)
    spread = (edge[:-1] - edge[1:]) * _flat_window(len(edge) - 1)
    if not spread.sum() > 0:
        raise ReconError("no edge is seen where the disc was planted")
    frequencies = np.linspace(0, 1 / pixel_size, 201)
    transform = np.abs(np.exp(-2j * np.pi * frequencies[:, None] * positions[1:]) @ spread)
    # The triangle has the transfer sinc², the difference sinc.
    return frequencies, transform / transform[0] / np.sinc(frequencies * step) ** 3


def _local_lines(x: np.ndarray, values: np.ndarray, positions: np.ndarray, width: float) -> np.ndarray:
    """Value at each position of the line that fits best nearby, weights falling to 0 at a distance `width`.

    About a small disc the pixels are few, and not at the same distances everywhere. A mean would take the
    value of where they lie for that of the position.
    """
    near = (x > positions[0] - width) & (x < positions[-1] + width)
    x, values = x[near], values[near]
    away = x - positions[:, None]
    weight = np.clip(1 - np.abs(away) / width, 0, None)
    s0, s1, s2 = ((weight * away**k).sum(axis=1) for k in range(3))
    t0, t1 = ((weight * away**k * values).sum(axis=1) for k in range(2))
    determinant = s0 * s2 - s1**2
    found = determinant > 1e-6 * (s0 * width) ** 2
    if not found.any():
        raise ReconError("the disc is too small, or too near the border, for an edge response")
    lines = (s2 * t0 - s1 * t1)[found] / determinant[found]
    return np.interp(positions, positions[found], lines)


def first_below(frequencies: np.ndarray, transfer: np.ndarray, level: float) -> float:
    """Frequency at which the transfer first falls to a level; NaN if it does not."""
    below = np.flatnonzero(transfer <= level)
    if not len(below) or below[0] == 0:
        return math.nan
    last, first = below[0] - 1, below[0]
    share = (transfer[last] - level) / (transfer[last] - transfer[first])
    return float(frequencies[last] + share * (frequencies[first] - frequencies[last]))


def _flat_window(length: int) -> np.ndarray:
    """1 over the middle half, cosines outside (Tukey): without a flat top, it would narrow the spread."""
    x = np.abs(np.linspace(-1, 1, length))
    return np.where(x <= 0.5, 1.0, 0.5 + 0.5 * np.cos(2 * np.pi * (x - 0.5)))


# -- noise texture -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NoiseTexture:
    """Noise power spectrum, averaged around the origin.

    Attributes
    ----------
    frequencies : ndarray
        Middles of the rings, 1/mm, up to the highest that the pixels resolve along the axes.
    power : ndarray
        In HU² mm². Over all frequencies of the plane it integrates to the variance.
    std : float
        Standard deviation in HU, the mean of each square taken off.
    mean_frequency : float
        Mean of the frequency, weighted by ``power``, 1/mm: half the highest for white noise.
    squares : int
        How many squares it is of.
    """

    frequencies: np.ndarray
    power: np.ndarray
    std: float
    mean_frequency: float
    squares: int


def noise_texture(error: np.ndarray, region: np.ndarray, pixel_size: float) -> NoiseTexture:
    """Noise power spectrum of the error of an image in a flat region.

    The mean over overlapping squares within the region of ``p² / N² |DFT(e - mean e)|²`` (Siewerdsen et al.,
    "A framework for noise-power spectrum analysis of multidimensional images", Med. Phys. 29, 2655, 2002).
    The error of one image holds noise and artefacts alike.

    Parameters
    ----------
    error : ndarray
        Image minus truth, ``(H, W)``, HU.
    region : ndarray
        Bool ``(H, W)``: all pixels of a square lie in it.
    pixel_size : float
        mm.

    Raises
    ------
    ReconError
        If no square fits.
    """
    corners = noise_squares(region)
    if not corners:
        raise ReconError(f"no square of {NPS_SIDE} × {NPS_SIDE} pixels fits into the flat region")
    squares = np.stack([error[i : i + NPS_SIDE, j : j + NPS_SIDE] for i, j in corners]).astype(np.float64)
    squares -= squares.mean(axis=(1, 2), keepdims=True)
    spectrum = (np.abs(np.fft.fft2(squares)) ** 2).mean(axis=0) * pixel_size**2 / NPS_SIDE**2
    lines = np.fft.fftfreq(NPS_SIDE) * NPS_SIDE
    # Rings one frequency step wide. The mean was taken off, so frequency 0 says nothing.
    ring = np.rint(np.hypot(lines[:, None], lines)).astype(int)
    last = NPS_SIDE // 2
    power = np.array([spectrum[ring == k].mean() for k in range(1, last + 1)])
    frequencies = np.arange(1, last + 1) / (NPS_SIDE * pixel_size)
    # By the trapezoid rule; at frequency 0, which the mean took with it, the power is that of the next ring.
    below, all_power = np.append(0, frequencies), np.append(power[:1], power)
    total = np.trapezoid(all_power, below)
    mean = float(np.trapezoid(below * all_power, below) / total) if total > 0 else math.nan
    return NoiseTexture(frequencies, power, float(np.sqrt((squares**2).mean())), mean, len(corners))


def noise_squares(region: np.ndarray) -> list[tuple[int, int]]:
    """First row and column of each square that lies in a region."""
    height, width = region.shape
    return [
        (i, j)
        for i in range(0, height - NPS_SIDE + 1, NPS_STRIDE)
        for j in range(0, width - NPS_SIDE + 1, NPS_STRIDE)
        if region[i : i + NPS_SIDE, j : j + NPS_SIDE].all()
    ]


# -- detection -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """Answer of the observer of one disc.

    Attributes
    ----------
    contrast : float
        Contrast found, HU; of an ideal image, the disc's.
    snr : float
        The answer minus its mean where there is nothing, over its standard deviation there.
    """

    contrast: float
    snr: float

    @property
    def detected(self) -> bool:
        """Whether the ratio reaches :data:`THRESHOLD`."""
        return self.snr >= THRESHOLD


def detect(
    response: np.ndarray, error: np.ndarray, disc: Disc, places: np.ndarray, pixel_size: float
) -> Detection:
    """Ask a non-prewhitening matched filter whether a disc is there, background and place known.

    Its template is the disc, as a mean over pixels, minus the mean over a ring around it, which takes the
    local background off. Its answer at the disc is compared with those at empty places in the same tissue,
    whose spread counts noise of any texture, streaks, and what a prior has made up.

    Parameters
    ----------
    response : ndarray
        Image minus the truth without discs, ``(H, W)``, HU.
    error : ndarray
        Image minus truth.
    disc : Disc
        What was added; its centre is a pixel's.
    places : ndarray
        Bool ``(H, W)``: where there is nothing, the template fits, and the tissue is the disc's.
    pixel_size : float
        mm.

    Raises
    ------
    ReconError
        If there are too few empty places.
    """
    from scipy.ndimage import correlate

    if np.count_nonzero(places) < LEAST_PLACES:
        raise ReconError(f"there are fewer than {LEAST_PLACES} empty places to compare a disc with")
    template = observer(disc.radius, pixel_size)
    answers = correlate(response.astype(np.float64), template, mode="nearest")
    answer = answers[int(disc.row), int(disc.column)]
    empty = correlate(error.astype(np.float64), template, mode="nearest")[places]
    spread = float(empty.std(ddof=1))
    excess = float(answer - empty.mean())
    snr = excess / spread if spread > 0 else math.copysign(math.inf, excess) if excess else 0.0
    return Detection(float(answer), snr)


def observer(radius: float, pixel_size: float) -> np.ndarray:
    """Template for a disc of a radius in mm: of sum 0, and its product with the disc itself is 1."""
    half = math.ceil(RING[1] * radius / pixel_size) + 1
    shape = (2 * half + 1, 2 * half + 1)

    def covered(size: float) -> np.ndarray:
        return Disc(half, half, size, 1.0).coverage(shape, pixel_size)

    disc, ring = covered(radius), covered(RING[1] * radius) - covered(RING[0] * radius)
    template = disc / disc.sum() - ring / ring.sum()
    return template / (template * disc).sum()


# -- regions -------------------------------------------------------------------------------------------------


def body(image: np.ndarray) -> np.ndarray:
    """Pixels of the largest thing denser than -300 HU, and what it encloses: the table is not among them."""
    from scipy.ndimage import binary_fill_holes, label, median_filter

    parts, count = label(median_filter(image, 3) > -300)
    if count == 0:
        raise ReconError("the image shows nothing but air")
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return binary_fill_holes(parts == sizes.argmax())


def tissue(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels of the body whose median of 3 × 3 lies between two values in HU."""
    from scipy.ndimage import median_filter

    smooth = median_filter(image, 3)
    return body(image) & (smooth >= low) & (smooth <= high)


def away_from(shape: tuple[int, int], discs: list[tuple[float, float, float]]) -> np.ndarray:
    """Pixels further than a distance from each of some points, ``(row, column, distance)`` in pixels."""
    rows, columns = (np.arange(n) for n in shape)
    result = np.ones(shape, dtype=bool)
    for row, column, distance in discs:
        result &= np.hypot(rows[:, None] - row, columns - column) > distance
    return result


def room(region: np.ndarray) -> np.ndarray:
    """Distance in pixels of each pixel of a region from the nearest one outside, where the image ends too."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]


def place(region: np.ndarray, radii: list[float]) -> list[tuple[int, int]]:
    """Find pixels about which discs fit into a region and do not overlap, the roomiest place first.

    Parameters
    ----------
    region : ndarray
        Bool ``(H, W)``.
    radii : list of float
        Of the discs, in pixels.

    Raises
    ------
    ReconError
        If they do not all fit.
    """
    free = region
    found: list[tuple[int, int]] = []
    for number, radius in enumerate(radii):
        distance = room(free)
        row, column = (int(k) for k in np.unravel_index(int(distance.argmax()), distance.shape))
        if distance[row, column] <= radius:
            raise ReconError(f"only {number} of {len(radii)} discs fit into the region")
        found.append((row, column))
        free = free & away_from(region.shape, [(row, column, radius)])
    return found
