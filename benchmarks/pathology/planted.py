"""What reconstructions make of planted lesions, and what they show where nothing was planted.

Every slice is simulated twice, with lesions and without, with the same coils, phase, noise, mask and random
numbers of the sampler. What a reconstruction made of a lesion is the difference of the two, against the same
difference of the true images; what a reader would see is its contrast in the one with lesions.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Scenario, make_scenario, nifti_name, nifti_slice, simulate
from benchmarks.classical import METHODS, best_images
from benchmarks.classical import Method as Classical
from benchmarks.matrix.base import Method
from benchmarks.pathology.lesions import Lesion, Site, choose_lesions, empty_sites, plant
from priors.base import ScorePrior
from recon.calibration import kspace_digest
from recon.errors import ReconError
from recon.sampling import reconstruct
from recon.solvers.base import Solver, settings_of
from recon.solvers.dds import DDS

TARGET = "noise-free"
KEPT = 0.5
"""A lesion is kept if at least this part of its contrast is there …"""
NOTICED = 2.0
"""… and it is at least as many times the error that the method makes in the contrast of empty places."""
EMPTY_SITES = 200
SIZES = (1.5, 3.0, 6.0)
CONTRASTS = (0.05, 0.1, 0.2, -0.1)


@dataclass(frozen=True, eq=False)
class Images:
    """A reconstruction: magnitude (H, W) in the units of k-space, and the samples (N, H, W) it is made of.

    A method without samples has none: (0, H, W).
    """

    image: np.ndarray
    samples: np.ndarray


class Contender(Protocol):
    """A method that is tried on a pair of slices, without lesions and with them.

    `name` is what a table calls it, `how` a line on what it does; `facts` is what its images depend on
    besides the data, JSON-ready.
    """

    @property
    def name(self) -> str:
        """What a table calls it."""
        ...

    @property
    def how(self) -> str:
        """One line on what it does."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What its images depend on besides the data, JSON-ready."""
        ...

    def pair(self, clean: Scenario, planted: Scenario) -> tuple[Images, Images]:
        """Reconstruct both."""
        ...


def _alone(image: Tensor | np.ndarray) -> Images:
    array = np.abs(image.cpu().numpy() if isinstance(image, Tensor) else image)
    return Images(array, np.empty((0, *array.shape), dtype=np.float32))


@dataclass(frozen=True)
class ZeroFilled:
    """No reconstruction: the coil-combined image of what was measured."""

    name: str = "zero-filled"
    how: str = "coil-combined image of what was measured"

    @property
    def facts(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": self.name}

    def pair(self, clean: Scenario, planted: Scenario) -> tuple[Images, Images]:
        """Combine both."""
        first, second = (s.problem.operator.adjoint(s.problem.y) for s in (clean, planted))
        return _alone(first), _alone(second)


_TV = next(method for method in METHODS if method.name == "TV")


@dataclass(frozen=True, eq=False)
class Oracle:
    """A classical method at the weight that is best, by PSNR, for the slice without lesions."""

    method: Classical = _TV

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def how(self) -> str:
        """Settings, and how the weight is found."""
        return (
            f"sigpy, {self.method.settings}, at the λ that is best for the slice without lesions against the "
            "truth, which nobody has"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The method's settings."""
        return {"name": self.name, "settings": self.method.settings}

    def pair(self, clean: Scenario, planted: Scenario) -> tuple[Images, Images]:
        """Choose the weight on the first, and solve both with it."""
        chosen = best_images(self.method, clean, [TARGET])[TARGET]
        problem = planted.problem
        scale = float(problem.operator.adjoint(problem.y).abs().max())
        weights = planted.mask.mask.expand(problem.y.shape[-2:]).numpy().astype(np.float32)
        maps = planted.cropped_maps if chosen.cropped else planted.maps
        image = self.method.solve((problem.y / scale).numpy(), maps.numpy(), weights, chosen.weight)
        return _alone(chosen.image), _alone(scale * image)


@dataclass(frozen=True, eq=False)
class Sampled:
    """A diffusion solver: the magnitude of the mean of its samples, and the samples."""

    prior: ScorePrior
    identity: str
    num_samples: int = 4
    seed: int = 0
    solver: Solver = field(default_factory=DDS)

    @property
    def name(self) -> str:
        """Solver and number of samples."""
        return f"{type(self.solver).__name__}, mean of {self.num_samples}"

    @property
    def how(self) -> str:
        """Settings of the solver."""
        settings = ", ".join(f"{k}={v}" for k, v in settings_of(self.solver).items() if k != "name")
        return f"{type(self.solver).__name__} ({settings}), seed {self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """Solver, samples, and what tells the prior from others."""
        return {
            "solver": settings_of(self.solver),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "prior": self.identity,
        }

    def pair(self, clean: Scenario, planted: Scenario) -> tuple[Images, Images]:
        """Sample both with the same random numbers."""

        def sample(scenario: Scenario) -> Images:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an anatomy or a spread is not what is judged here
                posterior = reconstruct(
                    scenario.problem.y,
                    scenario.problem.operator,
                    self.prior,
                    self.solver,
                    self.num_samples,
                    self.seed,
                    noise_std=scenario.problem.noise_std,
                    key=scenario.case.name,
                    keep_samples=True,
                )
            assert posterior.samples is not None
            return Images(posterior.mean.abs().numpy(), posterior.samples.abs().numpy())

        return sample(clean), sample(planted)


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A method of the matrix, such as a supervised network."""

    method: Method[Scenario]
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def how(self) -> str:
        """Its settings."""
        return self.method.settings

    @property
    def facts(self) -> dict[str, Any]:
        """Its settings, and the target that its images are for."""
        return {"name": self.name, "settings": self.method.settings, "seed": self.seed, "target": TARGET}

    def pair(self, clean: Scenario, planted: Scenario) -> tuple[Images, Images]:
        """Reconstruct both."""

        def one(scenario: Scenario) -> Images:
            made = self.method.reconstruct(scenario, self.seed)
            return _alone(made.per_target.get(TARGET, made.image))

        return one(clean), one(planted)


@dataclass(frozen=True)
class Found:
    """What became of one lesion.

    Attributes
    ----------
    size, contrast : float
        As planted: long semi-axis in pixels, and what was added, of the image's maximum.
    recovered : float
        Contrast that the lesion made in the reconstruction over that in the truth: 1 is faithful.
    spread : float
        Standard deviation of that over samples, each against its twin without lesions; NaN without samples.
    seen : float
        Contrast with the ring in the reconstruction with lesions, less the true one without them, over what
        the lesion made in the truth: what a reader who knows the tissue would see.
    noise : float
        Root mean square error of the contrast at empty places of this size, over what the lesion made.
    kept : bool
        Whether `seen` is at least :data:`KEPT` and :data:`NOTICED` times `noise`.
    """

    size: float
    contrast: float
    recovered: float
    spread: float
    seen: float
    noise: float
    kept: bool


@dataclass(frozen=True)
class Empty:
    """Empty places of one size, in the reconstruction with lesions elsewhere.

    Attributes
    ----------
    size : float
        Long semi-axis in pixels.
    errors : tuple of float
        Contrast in the reconstruction less that in the truth, of the image's maximum.
    """

    size: float
    errors: tuple[float, ...]

    def false_share(self, contrast: float) -> float:
        """Part of the places where as much is false as counts for a lesion of this contrast as kept."""
        return float(np.mean(np.abs(self.errors) >= KEPT * abs(contrast)))


@dataclass(frozen=True, eq=False)
class Outcome:
    """One method on one slice through one mask.

    Attributes
    ----------
    case, mask, method : str
        Names.
    asked, acceleration : float
        Asked for, and realised.
    calibration : tuple of int
        Rows and columns of the calibration region.
    lesions : list of Found
        In the order in which they were planted.
    empty : list of Empty
        For every size.
    clean, planted : numpy.ndarray
        (H, W) images of the slice without and with lesions.
    """

    case: str
    mask: str
    asked: float
    acceleration: float
    calibration: tuple[int, int]
    method: str
    lesions: list[Found]
    empty: list[Empty]
    clean: np.ndarray
    planted: np.ndarray

    @property
    def where(self) -> str:
        """Slice and mask."""
        return f"{self.case}, {self.mask} ×{self.asked:g}"


@dataclass(frozen=True, eq=False)
class Pair:
    """A slice with and without lesions, before a mask.

    Attributes
    ----------
    name : str
        What a table calls it.
    image : numpy.ndarray
        (H, W) magnitudes of maximum 1, without lesions.
    lesions : list of Lesion
        What is planted.
    empty : dict
        Size -> places where nothing is.
    seed : int
        Of coils, phase and noise.
    """

    name: str
    image: np.ndarray
    lesions: list[Lesion]
    empty: dict[float, list[Site]]
    seed: int

    @classmethod
    def make(
        cls,
        path: Path,
        index: int,
        crop: tuple[int, int] | None,
        sizes: Sequence[float] = SIZES,
        contrasts: Sequence[float] = CONTRASTS,
        empty_places: int = EMPTY_SITES,
    ) -> Pair:
        """Read a slice of a NIfTI volume and choose what is planted where.

        Raises
        ------
        ReconError
            Naming the file, if it cannot be read or has no room for the lesions.
        """
        image = nifti_slice(path, index, crop).numpy()
        try:
            lesions = choose_lesions(image, sizes, contrasts, seed=index)
            empty = {s: empty_sites(image, lesions, s, empty_places, seed=index) for s in sorted(set(sizes))}
        except ReconError as error:
            raise ReconError(f"{path}: slice {index}: {error}") from None
        return cls(nifti_name(path, index), image, lesions, empty, index)

    def scenarios(self, kind: str, acceleration: float) -> tuple[Scenario, Scenario]:
        """Without and with lesions: one name, so one mask, and one seed, so the same coils and noise."""
        images = self.image, plant(self.image, self.lesions)
        clean, planted = (
            make_scenario(simulate(self.name, torch.from_numpy(image), self.seed), kind, acceleration)
            for image in images
        )
        return clean, planted


def judge(
    pair: Pair, truths: tuple[np.ndarray, np.ndarray], clean: Images, planted: Images
) -> tuple[list[Found], list[Empty]]:
    """Measure every lesion and every empty place.

    Parameters
    ----------
    pair : Pair
        What was planted where.
    truths : tuple of numpy.ndarray
        True images (H, W) without and with lesions, in the units of the reconstructions.
    clean, planted : Images
        Reconstructions of the same.

    Returns
    -------
    list of Found, list of Empty
    """
    peak = float(truths[0].max())
    empty = [
        Empty(
            size,
            tuple((site.contrast(planted.image) - site.contrast(truths[1])) / peak for site in sites),
        )
        for size, sites in pair.empty.items()
    ]
    errors = {each.size: math.sqrt(float(np.mean(np.square(each.errors)))) for each in empty}
    found = []
    shape = (pair.image.shape[0], pair.image.shape[1])
    for lesion in pair.lesions:
        site = lesion.site(shape)
        made = site.contrast(truths[1]) - site.contrast(truths[0])
        samples = [
            (site.contrast(b) - site.contrast(a)) / made
            for a, b in zip(clean.samples, planted.samples, strict=True)
        ]
        seen = (site.contrast(planted.image) - site.contrast(truths[0])) / made
        noise = errors[lesion.size] * peak / abs(made)
        found.append(
            Found(
                lesion.size,
                lesion.contrast,
                recovered=(site.contrast(planted.image) - site.contrast(clean.image)) / made,
                spread=float(np.std(samples, ddof=1)) if len(samples) > 1 else math.nan,
                seen=seen,
                noise=noise,
                kept=seen >= max(KEPT, NOTICED * noise),
            )
        )
    return found, empty


def run(
    pairs: Sequence[Pair],
    masks: Sequence[tuple[str, float]],
    contenders: Sequence[Contender],
    *,
    cache: Path | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Try every method on every pair of slices through every mask.

    Parameters
    ----------
    pairs : sequence of Pair
        Slices with what is planted in them.
    masks : sequence of (str, float)
        Kinds and accelerations.
    contenders : sequence of Contender
        Methods.
    cache : Path, optional
        Folder for the images; what lies there for the same data and settings is not made again.
    on_outcome : callable
        Called with every outcome.

    Raises
    ------
    ReconError
        If a mask cannot be drawn, a method fails, or a file of the cache is damaged.
    """
    outcomes = []
    for pair in pairs:
        for kind, acceleration in masks:
            clean, planted = pair.scenarios(kind, acceleration)
            truths = clean.case.targets[TARGET].numpy(), planted.case.targets[TARGET].numpy()
            for contender in contenders:
                facts = {
                    "kspace": [kspace_digest(s.problem.y) for s in (clean, planted)],
                    "method": contender.facts,
                }
                images = _stored(cache, facts, contender, clean, planted)
                found, empty = judge(pair, truths, *images)
                outcome = Outcome(
                    pair.name,
                    clean.mask.name,
                    acceleration,
                    clean.mask.acceleration,
                    clean.calibration,
                    contender.name,
                    found,
                    empty,
                    images[0].image,
                    images[1].image,
                )
                outcomes.append(outcome)
                on_outcome(outcome)
    return outcomes


def _stored(
    folder: Path | None, facts: dict[str, Any], contender: Contender, clean: Scenario, planted: Scenario
) -> tuple[Images, Images]:
    """Images of a folder if they are there, else made and put there."""
    if folder is None:
        return contender.pair(clean, planted)
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    path = folder / f"planted-{digest}.npz"
    if path.exists():
        try:
            with np.load(io.BytesIO(path.read_bytes())) as kept:
                first, second = (Images(kept[f"image{n}"], kept[f"samples{n}"]) for n in (0, 1))
                return first, second
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ReconError(f"{path}: is damaged, remove it: {error}") from None
    pair = contender.pair(clean, planted)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"{name}{n}": np.asarray(array, dtype=np.float32)
        for n, images in enumerate(pair)
        for name, array in (("image", images.image), ("samples", images.samples))
    }
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)
    return pair


def by_size_and_contrast(outcomes: Sequence[Outcome]) -> Iterator[tuple[float, float]]:
    """Every size and contrast that was planted, the largest and the faintest first."""
    planted = {(found.size, found.contrast) for outcome in outcomes for found in outcome.lesions}
    yield from sorted(planted, key=lambda each: (-each[0], abs(each[1]), each[1]))
