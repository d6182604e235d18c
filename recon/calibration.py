"""How far an uncertainty can be trusted: metrics against the truth, and a calibration that mends it.

A calibration is learned on fully sampled cases. Each is undersampled and reconstructed (:func:`gather`), and
of every pixel of the object the error is compared with what the spread of the samples says of it. The factor
by which intervals must be wider is a quantile of that ratio (:func:`learn`): split conformal prediction with
a normalised score (Lei et al., J. Am. Stat. Assoc. 113, 1094 (2018)), the pixels weighted so that every
patient counts alike.

What that guarantees is a statement about patients, not about pixels: those of one patient err together. If a
new patient is exchangeable with the K that were learned from (same scanner, protocol, anatomy, choice of
slices, kind of mask, prior and solver), the coverage of a pixel drawn from a slice drawn from that patient
is, on average over patients, at least ``nominal K / (K + 1)``, whatever the distributions: the factor is no
smaller than the quantile at that level of all K + 1 patients together, of whom the new one is any (the
hierarchical exchangeability of Lee, Barber & Willett, arXiv:2306.06342). For 90 % of a finite sample it would
take a higher quantile and at least nine patients. Nothing is guaranteed for a single patient, slice or
region, nor at accelerations between those that were learned, where factors are interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from operators.errors import OperatorError
from operators.espirit import espirit_maps
from operators.fft import ifftc
from operators.masks import Mask
from priors.base import ScorePrior
from recon.errors import ReconError
from recon.nullspace import smoothed
from recon.sampling import reconstruct
from recon.solvers.base import Solver, settings_of

if TYPE_CHECKING:  # what reconstructs files applies calibrations, and so imports this module
    from recon.mri import SliceProblem

FORMAT = "recon-calibration"
VERSION = 1

# Both were chosen with the bundled prior on patients 09 and 20 of the open MS data set, left out in turn.

SMOOTHING = 1.5
"""Standard deviation in pixels of the window over which the variance of the samples is averaged: that of
eight samples is itself uncertain by half. Averaging raises the rank correlation with the error from 0.12 to
0.17 and the AUROC from 0.61 to 0.66; wider windows lose again."""

FLOOR = 0.5
"""Noise level, as a multiple of the measurement's, that is added to the spread: the fully sampled image that
the truth is has noise of its own, and a spread far below it is not believed. With 0, 0.5 and 1 the coverage
of a patient left out varies alike; only twofold random masks tell them apart, and 0.5 suits them best."""

EXTENT = 1.7
"""How far beyond the accelerations that were learned the last factor is still used: those of random masks
scatter as far about what is asked of them, 6.2 to 10 for 8."""

CENTRE = 24
"""Side of the central square of fully sampled k-space that the maps of the true image come from."""


def interval_factor(nominal: float) -> float:
    """Half-width of the central interval of a Gaussian in standard deviations: 1.645 for 0.9.

    Raises
    ------
    ReconError
        Unless the coverage lies between 0 and 1.
    """
    from scipy.special import ndtri

    if not 0 < nominal < 1:
        raise ReconError(f"a coverage lies between 0 and 1, got {nominal}")
    return float(ndtri((1 + nominal) / 2))


def gaussian_interval(mean: np.ndarray, std: np.ndarray, nominal: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds ``mean ∓ z std`` of the central interval of Gaussian posteriors, the shape of ``mean``."""
    half = interval_factor(nominal) * std
    return mean - half, mean + half


def sample_interval(samples: np.ndarray, nominal: float) -> tuple[np.ndarray, np.ndarray]:
    """Central interval that samples give, without an assumption on their distribution.

    Of n samples of the same distribution as the truth, ``n + 1`` gaps are left for the truth, each as likely
    as any other. The quantiles are therefore placed at ``(n + 1) p`` (Hyndman & Fan 1996, type 6) and not at
    ``(n - 1) p + 1``, whose intervals are too narrow for few samples. Where this is no whole number they are
    interpolated, and the coverage is nominal only nearly.

    Parameters
    ----------
    samples
        ``(N, ...)``, real.
    nominal
        Coverage; needs ``N >= (1 + nominal) / (1 - nominal)`` samples, 19 for 0.9.

    Returns
    -------
    lower, upper
        ``(...)``.

    Raises
    ------
    ReconError
        If there are too few samples for that coverage, or it does not lie between 0 and 1.
    """
    if not 0 < nominal < 1:
        raise ReconError(f"a coverage lies between 0 and 1, got {nominal}")
    count = len(samples)
    tail = (1 - nominal) / 2
    if (count + 1) * tail < 1 - 1e-9:
        needed = math.ceil(1 / tail - 1 - 1e-9)
        raise ReconError(f"intervals of coverage {nominal:g} need {needed} samples or more, got {count}")
    lower, upper = np.quantile(samples, (tail, 1 - tail), axis=0, method="weibull")
    return lower, upper


def coverage(
    truth: np.ndarray, lower: np.ndarray, upper: np.ndarray, region: np.ndarray | None = None
) -> float:
    """Share of the pixels of a region whose truth lies within the bounds.

    Parameters
    ----------
    truth, lower, upper
        Real, of one shape.
    region
        Bool, of that shape; everything if not given.

    Raises
    ------
    ReconError
        If the shapes differ, a value is not a number, or the region is empty.
    """
    truth, lower, upper = _within(region, truth=truth, lower=lower, upper=upper)
    return float(np.mean((lower <= truth) & (truth <= upper)))


def rank_histogram(
    truth: np.ndarray, samples: np.ndarray, region: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Count how many samples lie below the truth, pixel by pixel (Talagrand diagram).

    Flat if the truth is distributed as the samples are; a U says that the spread is too small, a hump too
    large, a slope that there is a bias. Of samples equal to the truth a random number counts as below it.

    Parameters
    ----------
    truth
        ``(...)``, real.
    samples
        ``(N, ...)``, real.
    region
        Bool ``(...)``; everything if not given.
    seed
        Seed of the tie-breaking.

    Returns
    -------
    numpy.ndarray
        Counts of the ranks 0 to N, int64 ``(N + 1,)``.

    Raises
    ------
    ReconError
        If the shapes differ, a value is not a number, or the region is empty.

    Notes
    -----
    Hamill, Monthly Weather Review 129, 550 (2001); Talts et al., arXiv:1804.06788.
    """
    truth, *drawn = _within(region, truth=truth, **_named(samples))
    stack = np.stack(drawn)
    below, ties = (stack < truth).sum(0), (stack == truth).sum(0)
    ranks = below + np.random.default_rng(seed).integers(0, ties + 1)
    return np.bincount(ranks, minlength=len(samples) + 1)


def flatness(counts: np.ndarray) -> tuple[float, float]:
    """Pearson's chi-square of a rank histogram against a flat one.

    Returns
    -------
    statistic, p
        ``sum (c - m)² / m`` with the mean count m, and the probability of at least that much if the
        histogram is flat *and its counts are of independent pixels*: neighbouring ones are not, so hand in
        pixels that lie apart, or compare the statistic only.

    Raises
    ------
    ReconError
        If the histogram is empty or has a single bin.
    """
    from scipy.special import gammaincc

    counts = np.asarray(counts, dtype=float)
    if counts.ndim != 1 or len(counts) < 2 or not counts.sum() > 0:
        raise ReconError("a rank histogram has at least two bins and one count")
    mean = counts.mean()
    statistic = float(((counts - mean) ** 2 / mean).sum())
    return statistic, float(gammaincc((len(counts) - 1) / 2, statistic / 2))


def crps(truth: np.ndarray, samples: np.ndarray, region: np.ndarray | None = None) -> float:
    """Continuous ranked probability score of samples, averaged over a region; in the units of the truth.

    The fair version, ``E|x - y| - E|x - x'| / 2`` with the second mean over pairs of *different* samples: its
    expectation is that of infinitely many samples, so that results with different numbers of them compare.
    Lower is better; for a single sure value it is the absolute error.

    Parameters
    ----------
    truth
        ``(...)``, real.
    samples
        ``(N, ...)``, real, at least 2.
    region
        Bool ``(...)``; everything if not given.

    Raises
    ------
    ReconError
        If there are fewer than 2 samples, the shapes differ, a value is not a number, or the region is empty.

    Notes
    -----
    Gneiting & Raftery, J. Am. Stat. Assoc. 102, 359 (2007), Eq. 21; Ferro, Q. J. R. Meteorol. Soc. 140, 1917
    (2014).
    """
    count = len(samples)
    if count < 2:
        raise ReconError(f"the score needs at least 2 samples, got {count}")
    truth, *drawn = _within(region, truth=truth, **_named(samples))
    stack = np.sort(np.stack(drawn).astype(float), axis=0)
    # sum over pairs i < j of x_j - x_i, from the sorted samples.
    weight = 2 * np.arange(count) - (count - 1.0)
    pairs = np.tensordot(weight, stack, axes=1)
    return float((np.abs(stack - truth).mean(0) - pairs / (count * (count - 1))).mean())


def error_correlation(
    truth: np.ndarray, mean: np.ndarray, std: np.ndarray, region: np.ndarray | None = None
) -> tuple[float, float]:
    """Correlation over pixels between the absolute error and the standard deviation.

    Even where the spread is exactly right it is below 1, for an error is a draw: for Gaussian errors whose
    standard deviation varies from pixel to pixel with the coefficient of variation c, Pearson's correlation
    is ``c / sqrt(c² + (π/2 - 1)(1 + c²))``, 0.8 at the most.

    Returns
    -------
    pearson, spearman
        Linear correlation and correlation of ranks; NaN where one of both is constant.

    Raises
    ------
    ReconError
        If the shapes differ, a value is not a number, or the region is empty.
    """
    from scipy.stats import rankdata

    truth, mean, std = _within(region, truth=truth, mean=mean, std=std)
    error = np.abs(truth - mean)
    return _pearson(error, std), _pearson(rankdata(error), rankdata(std))


def error_auroc(
    truth: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    region: np.ndarray | None = None,
    *,
    top: float = 0.1,
) -> float:
    """Area under the receiver operating characteristic of the std as a detector of large errors.

    The probability that a pixel among the ``top`` share of the absolute errors has a larger standard
    deviation than one that is not, ties counting one half (Mann & Whitney 1947): 0.5 is chance, 1 perfect.

    Raises
    ------
    ReconError
        If ``top`` does not lie between 0 and 1 or leaves one of both classes empty, the shapes differ, a
        value is not a number, or the region is empty.
    """
    from scipy.stats import rankdata

    if not 0 < top < 1:
        raise ReconError(f"the share of large errors lies between 0 and 1, got {top}")
    truth, mean, std = _within(region, truth=truth, mean=mean, std=std)
    error = np.abs(truth - mean)
    large = error > np.quantile(error, 1 - top)
    count = int(large.sum())
    if not 0 < count < large.size:
        raise ReconError("the errors are all alike: none of them is large")
    rank_sum = rankdata(std)[large].sum()
    return float((rank_sum - count * (count + 1) / 2) / (count * (large.size - count)))


def object_region(image: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Pixels of the object in a magnitude image: what is not air around it.

    Blurred by one pixel, above ``threshold`` of the image's 99th percentile; holes are filled, the rim of one
    pixel that the blur added is taken off, and only the largest connected part is kept.

    Parameters
    ----------
    image
        ``(H, W)``, real and not negative.
    threshold
        Between 0 and 1.

    Returns
    -------
    numpy.ndarray
        Bool ``(H, W)``.

    Raises
    ------
    ReconError
        If it is no such image, or shows no object.
    """
    from scipy import ndimage

    if image.ndim != 2 or np.iscomplexobj(image) or not np.isfinite(image).all() or image.min() < 0:
        raise ReconError(f"an object is looked for in a magnitude image (H, W), got shape {image.shape}")
    if not image.max() > 0:
        raise ReconError("there is no object in an image of zeros")
    blurred = ndimage.gaussian_filter(image.astype(float), 1.0)
    found = ndimage.binary_fill_holes(blurred > threshold * (np.quantile(image, 0.99) or image.max()))
    found = ndimage.binary_erosion(found, border_value=1)
    labels, count = ndimage.label(found)
    if count == 0:
        raise ReconError("there is no object in the image, but speckles")
    if count > 1:
        found = labels == 1 + int(np.argmax(ndimage.sum_labels(found, labels, range(1, count + 1))))
    return np.asarray(found, dtype=bool)


def _named(samples: np.ndarray) -> dict[str, np.ndarray]:
    return {f"sample {index}": sample for index, sample in enumerate(samples)}


def _within(region: np.ndarray | None, **arrays: np.ndarray) -> list[np.ndarray]:
    """Values of the arrays inside the region, ``(n,)`` each."""
    shape = next(iter(arrays.values())).shape
    if region is None:
        region = np.ones(shape, dtype=bool)
    if region.dtype != bool or region.shape != shape:
        raise ReconError(f"the region must be bool of shape {shape}, got {region.dtype} {region.shape}")
    if not region.any():
        raise ReconError("the region is empty")
    values = []
    for name, array in arrays.items():
        if array.shape != shape or np.iscomplexobj(array):
            raise ReconError(f"'{name}' must be real of shape {shape}, got {array.dtype} {array.shape}")
        values.append(array[region])
        if not np.isfinite(values[-1]).all():
            raise ReconError(f"'{name}' holds NaN or infinite values")
    return values


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float) - a.mean(dtype=float), b.astype(float) - b.mean(dtype=float)
    norm = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norm if norm > 0 else math.nan


# Learning


@dataclass(frozen=True, eq=False)
class Evidence:
    """A fully sampled slice, undersampled, reconstructed, and held against itself.

    Parameters
    ----------
    patient, volume, index
        Whose it is, the file, and the slice in it.
    mask, acceleration
        Kind of the mask, and its realised acceleration.
    asked
        Acceleration that was asked for.
    noise_std
        Noise level of the measurement per real component.
    truth, mean, std
        Real ``(H, W)``: magnitudes of the fully sampled image and of the posterior's mean, and the standard
        deviation of the samples.
    region
        Bool ``(H, W)``: pixels of the object.
    """

    patient: str
    volume: str
    index: int
    mask: str
    acceleration: float
    asked: float
    noise_std: float
    truth: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    region: np.ndarray

    def scores(self, smoothing: float, floor: float) -> np.ndarray:
        """Absolute errors of the object's pixels over the spread that is expected of them, ``(n,)``."""
        spread = expected_spread(torch.from_numpy(self.std), self.noise_std, smoothing, floor).numpy()
        return (np.abs(self.truth - self.mean) / spread)[self.region]

    def save(self, path: Path) -> None:
        """Write to a ``.npz`` file, through a temporary one."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **{item.name: getattr(self, item.name) for item in fields(self)})
            temporary.replace(path)
        except OSError as error:
            raise ReconError(f"{path}: cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ReconError
            Naming the file, if it is damaged or not such a file.
        """
        try:
            with path.open("rb") as file, np.load(file) as stored:
                values = {item.name: stored[item.name] for item in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise ReconError(f"{path}: this is no stored evidence ({error})") from None
        return cls(**{name: value.item() if value.ndim == 0 else value for name, value in values.items()})


def stored_evidence(folder: Path | None, facts: dict[str, Any], make: Callable[[], Evidence]) -> Evidence:
    """Take evidence from a folder if it is there, else make it and put it there: hours of work resume so.

    Parameters
    ----------
    folder
        ``None`` to keep nothing.
    facts
        JSON-ready: everything that the evidence depends on. A hash of it names the file.
    make
        Makes the evidence.

    Raises
    ------
    ReconError
        If a file of the folder is damaged or cannot be written.
    """
    if folder is None:
        return make()
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    path = folder / f"{digest}.npz"
    if path.exists():
        return Evidence.load(path)
    evidence = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReconError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
    evidence.save(path)
    return evidence


def kspace_digest(kspace: Tensor) -> str:
    """Hash of the values of k-space, one of the facts that evidence depends on."""
    return hashlib.blake2b(kspace.cpu().contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def expected_spread(std: Tensor, noise_std: float, smoothing: float, floor: float) -> Tensor:
    """What intervals are multiples of: ``sqrt(average of std² + (floor noise_std)²)``, ``(..., H, W)``.

    Parameters
    ----------
    std
        Standard deviation of the samples, real ``(..., H, W)``.
    noise_std
        Noise level of the measurement per real component.
    smoothing
        Radius in pixels of the average.
    floor
        Multiple of the noise level.
    """
    return (smoothed(std.double().square(), smoothing) + (floor * noise_std) ** 2).sqrt().to(std.dtype)


def fully_sampled_image(kspace: Tensor) -> Tensor:
    """Magnitude of the coil-combined image of fully sampled k-space ``(C, H, W)``: real ``(H, W)``.

    The coils are combined with ESPIRiT maps of the central square of :data:`CENTRE`: ``|sum conj(s_c) x_c|``.
    Unlike the root sum of squares it has no floor of noise, and its noise is that of one coil.

    Raises
    ------
    ReconError
        If the k-space is too small for that.
    """
    images = ifftc(kspace)
    if len(kspace) == 1:
        return images[0].abs()
    centre = []
    for size in kspace.shape[-2:]:
        start = size // 2 - min(CENTRE, size) // 2
        centre.append(slice(start, start + min(CENTRE, size)))
    try:
        maps = espirit_maps(kspace, (centre[0], centre[1]), crop=0.0)
    except OperatorError as error:
        raise ReconError(f"the fully sampled coil images cannot be combined: {error}") from None
    return (maps.conj() * images).sum(0).abs()


def gather(
    problem: SliceProblem,
    mask: Mask,
    truth: Tensor,
    prior: ScorePrior | None,
    solver: Solver,
    *,
    patient: str,
    volume: str,
    index: int,
    asked: float,
    num_samples: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Reconstruct an undersampled slice, and hold the result against the truth.

    Parameters
    ----------
    problem
        Of :func:`recon.mri.slice_problem`: coil maps and noise level found from the undersampled data alone.
    mask
        What it was undersampled with.
    truth
        Real ``(H, W)``, such as :func:`fully_sampled_image`.
    prior, solver
        With what to reconstruct.
    patient, volume, index, asked
        As in :class:`Evidence`.
    num_samples, seed
        Samples, at least 2, and the seed of their noise.
    on_progress
        Called with ``(steps done, steps in all)``.

    Raises
    ------
    ReconError
        If the slice cannot be reconstructed, or the truth shows no object.
    """
    if num_samples < 2:
        raise ReconError(f"a spread needs at least 2 samples, got {num_samples}")
    image = truth.cpu().numpy()
    region = object_region(image)
    posterior = reconstruct(
        problem.y,
        problem.operator,
        prior,
        solver,
        num_samples,
        seed,
        noise_std=problem.noise_std,
        key=f"{volume}/{index}",
        on_progress=on_progress,
    )
    return Evidence(
        patient=patient,
        volume=volume,
        index=index,
        mask=mask.name,
        acceleration=mask.acceleration,
        asked=float(asked),
        noise_std=posterior.noise_std,
        truth=image,
        mean=posterior.mean.abs().cpu().numpy(),
        std=posterior.std.cpu().numpy(),
        region=region,
    )


@dataclass(frozen=True)
class Cell:
    """What was learned for one kind of mask at one acceleration.

    Parameters
    ----------
    mask
        Kind of mask.
    acceleration
        Realised acceleration, averaged geometrically over what was learned from.
    factor
        Half-width of the intervals, in units of :func:`expected_spread`.
    left_out
        Lowest and highest coverage of a slice whose patient was left out of the learning; ``None`` with one
        patient.
    """

    mask: str
    acceleration: float
    factor: float
    left_out: tuple[float, float] | None

    def __post_init__(self) -> None:
        for name in ("acceleration", "factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ReconError(f"{name} of a calibration must be positive and finite, got {value!r}")


@dataclass(frozen=True)
class Calibration:
    """Factors that turn the spread of samples into intervals of known coverage.

    Parameters
    ----------
    name
        By which it is applied.
    nominal
        Coverage of the intervals.
    guaranteed
        Expected coverage that is guaranteed for exchangeable patients, ``nominal K / (K + 1)``.
    patients, slices
        How many were learned from.
    smoothing, floor
        Of :func:`expected_spread`.
    cells
        Factors by mask and acceleration.
    prior
        Name of the prior, and SHA-256 of its file; ``None`` for both without one.
    solver
        Its name and settings.
    num_samples
        Samples a slice.
    target
        What the intervals cover.
    date
        ISO date.
    settings
        What else :func:`recon.mri.calibrated_settings` tells. Nothing is held against settings that are not
        among these: files written before they were stored have none.

    Raises
    ------
    ReconError
        If a value is out of its range.
    """

    name: str
    nominal: float
    guaranteed: float
    patients: int
    slices: int
    smoothing: float
    floor: float
    cells: tuple[Cell, ...]
    prior: dict[str, str | None]
    solver: dict[str, Any]
    num_samples: int
    target: str
    date: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nominal", "guaranteed"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < 1:
                raise ReconError(f"{name} of a calibration must lie between 0 and 1, got {value!r}")
        for name, low in (("patients", 1), ("slices", 1), ("num_samples", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ReconError(f"{name} of a calibration must be a number from {low}, got {value!r}")
        for name in ("smoothing", "floor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ReconError(f"{name} of a calibration must be a number from 0, got {value!r}")
        if not self.cells:
            raise ReconError("a calibration needs at least one mask")

    def factor(self, mask: str, acceleration: float) -> float:
        """Factor of a mask: between two accelerations interpolated in their logarithms.

        For a kind of mask that was not learned, the largest of those of the kinds that were.

        Raises
        ------
        ReconError
            If the acceleration lies outside of the range that was learned by more than :data:`EXTENT`.
        """
        kinds = {cell.mask for cell in self.cells}
        found = [
            self._interpolated(kind, acceleration)
            for kind in sorted(kinds & {mask} if mask in kinds else kinds)
        ]
        known = [value for value in found if value is not None]
        if not known:
            low = min(cell.acceleration for cell in self.cells)
            high = max(cell.acceleration for cell in self.cells)
            raise ReconError(
                f"calibration {self.name!r} was learned for accelerations from {low:.2f} to {high:.2f}, and "
                f"this {mask} mask has {acceleration:.2f}"
            )
        return max(known)

    def _interpolated(self, kind: str, acceleration: float) -> float | None:
        cells = sorted((cell for cell in self.cells if cell.mask == kind), key=lambda cell: cell.acceleration)
        if not cells[0].acceleration / EXTENT <= acceleration <= cells[-1].acceleration * EXTENT:
            return None
        return float(
            np.exp(
                np.interp(
                    math.log(acceleration),
                    [math.log(cell.acceleration) for cell in cells],
                    [math.log(cell.factor) for cell in cells],
                )
            )
        )

    def half_width(self, std: Tensor, noise_std: float, *, mask: str, acceleration: float) -> Tensor:
        """Half-width of the intervals about the mean, in the units of ``std``.

        Parameters
        ----------
        std
            Standard deviation of the samples, real ``(..., H, W)``.
        noise_std
            Noise level of the measurement per real component, in the same units.
        mask, acceleration
            Kind of the mask, and its realised acceleration.

        Returns
        -------
        Tensor
            The shape and dtype of ``std``.

        Raises
        ------
        ReconError
            If the mask is not one that was learned, or the noise level not positive.
        """
        if not 0 < noise_std < math.inf:
            raise ReconError(f"noise_std must be positive and finite, got {noise_std}")
        spread = expected_spread(std, noise_std, self.smoothing, self.floor)
        return self.factor(mask, acceleration) * spread

    def apply(self, std: Tensor, noise_std: float, *, mask: str, acceleration: float) -> Tensor:
        """Calibrated standard deviation: that of the Gaussian whose intervals have the learned half-width.

        Parameters and errors are those of :meth:`half_width`. At the nominal coverage it is exact by
        construction; at others in so far as the errors are Gaussian.
        """
        return self.half_width(std, noise_std, mask=mask, acceleration=acceleration) / interval_factor(
            self.nominal
        )

    def check(
        self,
        prior_sha256: str | None,
        solver: Solver,
        num_samples: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what the calibration was not learned with.

        Parameters
        ----------
        prior_sha256
            Of the prior's file.
        solver, num_samples
            With what it will be reconstructed.
        settings
            Of :func:`recon.mri.calibrated_settings`. Those that either side does not state are not compared.

        Raises
        ------
        ReconError
            Naming what differs.
        """
        if prior_sha256 != self.prior["sha256"]:
            raise ReconError(
                f"calibration {self.name!r} was learned with another prior file: {self.prior['name']}, "
                f"SHA-256 {str(self.prior['sha256'])[:12]} and not {str(prior_sha256)[:12]}"
            )
        asked = _plain(settings_of(solver))
        differing = [
            f"{key}={self.solver.get(key)} and not {asked.get(key)}"
            for key in sorted({*self.solver, *asked})
            if self.solver.get(key) != asked.get(key)
        ]
        # Nothing learns coil by coil or with a configuration of the prior, whatever a file does not say.
        known = {"coil_by_coil": False, "prior_config": None, **self.settings}
        differing += [
            f"{key}={known[key]} and not {value}"
            for key, value in sorted((settings or {}).items())
            if key in known and known[key] != value
        ]
        if differing:
            raise ReconError(f"calibration {self.name!r} was learned with {', '.join(differing)}")
        if num_samples != self.num_samples:
            raise ReconError(
                f"calibration {self.name!r} was learned with {self.num_samples} samples a slice, "
                f"not {num_samples}"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a result that was calibrated says about it, JSON-ready."""
        keys = ("name", "nominal", "guaranteed", "patients", "target", "date")
        return {key: getattr(self, key) for key in keys}

    def save(self, path: str | Path) -> None:
        """Write to a JSON file, through a temporary one.

        Raises
        ------
        ReconError
            If it cannot be written.
        """
        path = Path(path)
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ReconError(f"{path}: cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read and check a file that :meth:`save` wrote.

        Raises
        ------
        ReconError
            Naming the file and what is wrong with it.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ReconError(f"{path}: there is no such calibration") from None
        except OSError as error:
            raise ReconError(f"{path}: cannot be read ({error})") from None
        except ValueError as error:
            raise ReconError(f"{path}: this is no JSON ({error})") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ReconError(f"{path}: this is no calibration of this project")
        if (version := content.pop("version", None)) != VERSION:
            raise ReconError(f"{path}: format version {version!r}; this release reads {VERSION}")
        try:
            content = {"settings": {}, **content}  # not in files of earlier releases
            _check_keys(cls, content, "calibration")
            if not isinstance(content["cells"], list):
                raise ReconError("'cells' must be a list")
            if not isinstance(content["solver"], dict):
                raise ReconError("'solver' must be an object")
            if not isinstance(content["settings"], dict):
                raise ReconError("'settings' must be an object")
            if not isinstance(content["prior"], dict) or set(content["prior"]) != {"name", "sha256"}:
                raise ReconError("'prior' must hold 'name' and 'sha256'")
            cells = []
            for cell in content["cells"]:
                _check_keys(Cell, cell, "cell")
                left_out = cell["left_out"]
                cells.append(Cell(**{**cell, "left_out": None if left_out is None else tuple(left_out)}))
            return cls(**{**content, "cells": tuple(cells)})
        except (TypeError, ReconError) as error:  # a list or a number where it does not belong
            raise ReconError(f"{path}: {error}") from None


def calibration_path(name_or_path: str, prior: Path | None) -> Path:
    """File of a calibration: a path to a ``.json`` file as it is, or one of that name beside the prior.

    The calibration ``scanner-a`` of the prior ``brain.safetensors`` is ``brain.scanner-a.json`` beside it.

    Raises
    ------
    ReconError
        If there is no such file.
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        if path.is_file():
            return path
        raise ReconError(f"{path}: there is no such calibration")
    if prior is None:
        raise ReconError(f"calibration {name_or_path!r}: without a prior, give the path of its .json file")
    beside = prior.with_name(f"{prior.stem}.{name_or_path}.json")
    if beside.is_file():
        return beside
    known = [item.name.split(".")[-2] for item in sorted(prior.parent.glob(f"{prior.stem}.*.json"))]
    raise ReconError(
        f"no calibration {name_or_path!r} of prior {prior.stem!r}: neither a .json file nor one of those "
        f"beside the prior ({', '.join(known) or 'there are none'})"
    )


def pooled_quantile(scores: Sequence[np.ndarray], weights: Sequence[float], nominal: float) -> float:
    """Smallest number that scores of the given total weight do not exceed.

    Parameters
    ----------
    scores
        Groups of scores ``(n_i,)``.
    weights
        Weight of each group, shared out evenly among its scores.
    nominal
        Share of the whole weight.
    """
    values = np.concatenate(scores)
    each = np.concatenate([np.full(s.size, w / s.size) for s, w in zip(scores, weights, strict=True)])
    order = np.argsort(values)
    total = np.cumsum(each[order])
    index = int(np.searchsorted(total, nominal * total[-1] * (1 - 1e-12)))
    return float(values[order[min(index, values.size - 1)]])


def learn(
    evidence: Iterable[Evidence],
    *,
    name: str,
    solver: Solver,
    num_samples: int,
    prior: tuple[str, str] | None,
    nominal: float = 0.9,
    smoothing: float = SMOOTHING,
    floor: float = FLOOR,
    target: str = "fully sampled image",
    settings: Mapping[str, Any] | None = None,
) -> Calibration:
    """Learn the factors of every kind of mask and every acceleration from reconstructed cases.

    Parameters
    ----------
    evidence
        Of :func:`gather`: patients, slices and masks; every patient counts alike, and so does every slice of
        one patient.
    name
        Of the calibration.
    solver, num_samples, prior
        What they were reconstructed with; the prior by its name and the SHA-256 of its file.
    nominal
        Coverage of the intervals.
    smoothing, floor
        Of :func:`expected_spread`.
    target
        What the truth was.
    settings
        What else they were reconstructed with (:func:`recon.mri.calibrated_settings`).

    Returns
    -------
    Calibration

    Raises
    ------
    ReconError
        If there is no evidence, or a number is out of its range.
    """
    cases = list(evidence)
    if not cases:
        raise ReconError("a calibration cannot be learned from nothing")
    interval_factor(nominal)  # raises unless it is a coverage
    groups: dict[tuple[str, float], list[Evidence]] = {}
    for case in cases:
        groups.setdefault((case.mask, case.asked), []).append(case)
    cells = []
    for (mask, _), members in sorted(groups.items()):
        scores = [case.scores(smoothing, floor) for case in members]
        coverages = []
        for patient in sorted({case.patient for case in members}):
            rest = [(case, s) for case, s in zip(members, scores, strict=True) if case.patient != patient]
            if rest:
                factor = pooled_quantile([s for _, s in rest], _weights([case for case, _ in rest]), nominal)
                held_out = (s for case, s in zip(members, scores, strict=True) if case.patient == patient)
                coverages += [float((s <= factor).mean()) for s in held_out]
        cells.append(
            Cell(
                mask=mask,
                acceleration=math.exp(np.mean([math.log(case.acceleration) for case in members])),
                factor=pooled_quantile(scores, _weights(members), nominal),
                left_out=(min(coverages), max(coverages)) if coverages else None,
            )
        )
    patients = len({case.patient for case in cases})
    return Calibration(
        name=name,
        nominal=float(nominal),
        guaranteed=nominal * patients / (patients + 1),
        patients=patients,
        slices=len({(case.patient, case.volume, case.index) for case in cases}),
        smoothing=smoothing,
        floor=floor,
        cells=tuple(cells),
        prior={"name": None, "sha256": None} if prior is None else {"name": prior[0], "sha256": prior[1]},
        solver=_plain(settings_of(solver)),
        num_samples=num_samples,
        target=target,
        date=date.today().isoformat(),
        settings=dict(settings or {}),
    )


def _weights(cases: Sequence[Evidence]) -> list[float]:
    """Weight of each slice: patients alike, and the slices of one patient alike."""
    patients = [case.patient for case in cases]
    return [1 / patients.count(patient) for patient in patients]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, so that tuples compare as the lists they become."""
    return json.loads(json.dumps(settings))


def _check_keys(kind: type, values: Any, what: str) -> None:
    if not isinstance(values, dict):
        raise ReconError(f"a {what} must be an object")
    known = {item.name for item in fields(kind)}
    for word, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            raise ReconError(f"the {what} has {word} fields {sorted(names)}")
