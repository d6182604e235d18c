"""The Helsinki Tomography Challenge 2022: from a limited sinogram to the probability of material.

One disc of one material with holes, measured by a polychromatic fan beam within an arc of 30 to 90 degrees.
The sinogram is linearised into path lengths through material, images are drawn with a prior on discs, and the
probability of a pixel follows from the share of them in which it is material.

Over an arc of 60 degrees or less one run of the sampler mostly ends in an image that is not quite right: it
fits the data badly, or has holes of shapes that the prior would hardly draw. The sum of both, misfit and
prior, tells, and errors fall along with it. So the images of a first run are candidates; the best are drawn
anew from somewhat below the top of the noise, again and again, until that finds nothing better. Within narrow
arcs two such searches end differently, and a third goes on from what both have found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.base import seeded_noise
from operators.beam_hardening import BeamHardeningCorrection
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, view_gaps
from operators.errors import OperatorError
from operators.weighting import DirectionWhitening
from priors.base import ScorePrior
from recon.ct import CTSettings, whitened
from recon.errors import ReconError
from recon.io.ct_scan import CTScan
from recon.io.htc2022 import IMAGE_SHAPE, read_htc2022
from recon.io.segmentation import write_segmentation
from recon.provenance import common_facts
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.binary_dds import BinaryDDS

PATH_LENGTH = BeamHardeningCorrection((20.99781, 8.277988, -4.651490, 1.393605), 2.296)
"""From line integrals above air to mm of material. Fitted (`python -m benchmarks.htc2022 --fit`) to the full
scans of the challenge's five training objects and their reference segmentations."""

DETECTOR_OFFSET = 0.028
"""By how far, in mm, the middle of the detector is off the line from the source through the axis; fitted
likewise (0.018 to 0.043 from object to object). It is a fifth of a pixel of the references."""

NOISE = 0.009
"""Standard deviation of a line integral of :data:`BINNING` detector elements: noise of 0.005 and what the
model does not explain. Images near the references come to 0.0075."""

SCALE = 0.03
"""By what share path lengths differ from one scan to another, standard deviation: -3 to 3 % with the training
objects."""

AIR = 20
"""Detector elements at either end that see nothing but air: the disc of 70 mm is well within the field."""

SIZE = 128
"""Side of the images that are sampled, a quarter of the challenge's."""

BINNING = 4
"""Detector elements taken together; at the disc they are then as wide as a pixel of the samples."""

FIRST = BinaryDDS()
"""How the first candidates are drawn: from noise alone, most steps where it is decided which image it is."""

AGAIN, RESTARTS = BinaryDDS(nfe=40, rho=2.0), (1.4, 1.0, 0.7)
"""How candidates are drawn anew, and the noise levels from which: one a round, in turn."""

ROUNDS = 12
"""How many times at the most."""

STALL, PATIENCE = 0.995, 6
"""So many rounds that leave more than this share of the energy have found nothing, and end a search."""

NARROW, SEARCHES = math.radians(45), 2
"""Within an arc narrower than this searches end differently: so many are made, and then one from what all of
them found. So they are where the first ends with an image that is ruled out."""

MOST_VIEWS = 60
"""Views used at the most; more of them say the same again."""

MISFIT = 1.0
"""Largest misfit, over the noise assumed, of an image that is not ruled out. Right ones have 0.7 to 0.95, but
for two scans of 35, in which the references too have 1.3 and 2."""

ALIKE = 4.0
"""Summed squared difference below which two candidates are one."""

EDGE, AROUND, WRONG = 0.7, 24.0, 0.22
"""Pixels of the challenge's images by which edges are off, and over which material is counted around a pixel;
weight of the latter at 30 degrees."""

PRIOR_LEVELS = (0.15, 0.4, 1.0)
"""Noise levels at which :func:`surprise` asks the prior, each a factor of about 2.6 from the next."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Material of a disc.

    Parameters
    ----------
    segmentation
        ``(512, 512)`` uint8, 1 where there is material, oriented as the challenge's references.
    probability
        ``(512, 512)`` float32, posterior probability of material.
    residual
        Root mean square misfit of the best image over the noise assumed.
    warnings
        What a reader should know.
    """

    segmentation: Tensor
    probability: Tensor
    residual: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Candidate:
    """An image ``(SIZE, SIZE)`` and what speaks against it.

    Parameters
    ----------
    image
        Share of material.
    misfit
        Root mean square, over the noise.
    energy
        Minus the logarithm of its posterior density, but for a constant: half the sum of squares of the
        misfit, and :func:`surprise`.
    correction
        Path lengths that go with it.
    """

    image: Tensor
    misfit: float
    energy: float = 0.0
    correction: BeamHardeningCorrection = PATH_LENGTH


def above_air(scan: CTScan) -> Tensor:
    """Line integrals ``(views, detectors)`` less those of air, which scatter and the flat field leave over.

    Raises
    ------
    ReconError
        If the scan is no fan-beam scan of line integrals.
    """
    if scan.kind != "line_integrals" or not isinstance(scan.geometry, FanBeam):
        raise ReconError(f"{scan.source}: the challenge's data are line integrals of a fan beam")
    p = scan.sinogram[0]
    return p - torch.cat([p[:, :AIR], p[:, -AIR:]], dim=1).median()


def segment(
    scan: CTScan,
    prior: ScorePrior,
    solver: BinaryDDS = FIRST,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Segmentation:
    """Segment one disc: :func:`search`, whose parameters these are, and :func:`segmented`."""
    found = search(scan, prior, solver, settings, key=key, device=device, on_progress=on_progress)
    asked = CTSettings() if settings is None else settings
    assert isinstance(scan.geometry, FanBeam)  # or the search would have said so
    return segmented(found, arc_of(scan.geometry.subset(asked.chosen_views(scan.geometry))))


def arc_of(geometry: FanBeam) -> float:
    """Arc in radians that the views span: a turn less the widest gap between neighbours."""
    return math.tau - float(view_gaps(np.array(geometry.angles), math.tau).max())


def search(
    scan: CTScan,
    prior: ScorePrior,
    solver: BinaryDDS = FIRST,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Look for images of one disc that its scan and the prior agree on; the best comes first.

    Beam and material differ by some percent from object to object. So the candidates of the first round take
    :data:`PATH_LENGTH` as it is, those of each later one the polynomial which the scan itself and the best
    image so far agree on.

    Parameters
    ----------
    scan
        As :func:`recon.io.htc2022.read_htc2022` gives it.
    prior
        In units of one object's material (``contract.unit`` of ``"object"``): the bundled ``discs``.
    solver
        How the first candidates are drawn.
    settings
        For the views to keep, the number of candidates a round, the seed and, if given, the noise of a line
        integral.
    key
        The noise depends on it.
    device
        Where to compute.
    on_progress
        Called with ``(steps done, steps at the most)``.

    Raises
    ------
    ReconError
        If the prior is of another kind, or something does not fit.
    """
    asked = CTSettings() if settings is None else settings
    if prior.contract.unit != "object":
        raise ReconError(
            "the challenge needs a prior of one material, such as 'discs', and "
            f"{prior.contract.name!r} is in the unit {prior.contract.unit!r}"
        )
    if scan.pixel_size is None:
        raise ReconError(f"{scan.source}: the file does not say the size of a pixel")
    p = above_air(scan)
    assert isinstance(scan.geometry, FanBeam)
    views = list(asked.chosen_views(scan.geometry))
    views = views[:: -(-len(views) // MOST_VIEWS)]
    adjusted = replace(scan.geometry, detector_offset=scan.geometry.detector_offset + DETECTOR_OFFSET)
    p, geometry = binned(p[views], adjusted.subset(views))
    operator = CTOperator(
        geometry, (SIZE, SIZE), scan.pixel_size * IMAGE_SHAPE[0] / SIZE, rays_per_detector=BINNING
    )
    source = Source(p, operator, prior, asked.noise_std or NOISE, asked.seed, key, torch.device(device))
    count = asked.num_samples
    most = SEARCHES * (solver.nfe + ROUNDS * AGAIN.nfe) + ROUNDS * AGAIN.nfe
    done = 0

    def stepped(_step: int, _steps: int) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, most)

    found: list[Candidate] = []
    for number in range(SEARCHES):
        first = source.draw(PATH_LENGTH, solver, None, count, f"{number}/0", stepped)
        found += evolved(source, first, count, f"{number}", stepped)
        if arc_of(geometry) >= NARROW and found[0].misfit <= MISFIT:
            break
    else:
        found = evolved(source, found, count, "all", stepped)
    if on_progress is not None:
        on_progress(most, most)
    return found


def evolved(
    source: Source, found: list[Candidate], count: int, name: str, on_step: Callable[[int, int], None]
) -> list[Candidate]:
    """Draw the best candidates anew until that finds nothing better; the best comes first."""
    found = best(found, count)
    energies = [found[0].energy]
    for number in range(1, ROUNDS + 1):
        again = replace(AGAIN, sigma_max=RESTARTS[(number - 1) % len(RESTARTS)])
        start = torch.stack([found[index % len(found)].image for index in range(count)])
        found += source.draw(found[0].correction, again, start, count, f"{name}/{number}", on_step)
        found = best(found, count)
        energies.append(found[0].energy)
        if number >= PATIENCE and energies[-1] > STALL * energies[-1 - PATIENCE]:
            break
    return found


def best(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Candidates of least energy, at most so many, the best first; of those that are alike the best alone."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda candidate: candidate.energy):
        if all(float((one.image - other.image).square().sum()) > ALIKE for other in kept):
            kept.append(one)
        if len(kept) == count:
            break
    return kept


def surprise(prior: ScorePrior, images: Tensor) -> Tensor:
    """Minus the logarithm of the prior density of images ``(B, H, W)``, but for a constant: ``(B,)``.

    The integral over the logarithm of sigma of ``E |x - D(x + sigma n)|^2 / sigma^2`` (the bound of Kingma et
    al. 2021, Eq. 13, for noise that adds up), by two draws of noise a level that are the same for all images.
    """
    spacing = (PRIOR_LEVELS[-1] / PRIOR_LEVELS[0]) ** (1 / (len(PRIOR_LEVELS) - 1))
    draws = seeded_noise((len(PRIOR_LEVELS), 2, *images.shape[1:]), images.dtype, seed=0).to(images.device)
    total = torch.zeros(len(images), device=images.device)
    for sigma, pair in zip(PRIOR_LEVELS, draws, strict=True):
        for n in pair:
            error = prior.denoise(images + sigma * n, sigma) - images
            total += error.square().sum(dim=(1, 2)) / sigma**2 / len(pair)
    return math.log(spacing) * total


def segmented(found: Sequence[Candidate], arc: float) -> Segmentation:
    """Segmentation and probabilities from what :func:`search` found within an arc in radians.

    Candidates resemble each other more than they do the truth. So their edges are blurred by as much as edges
    were found to be off, :data:`EDGE` pixels, and within arcs of less than 60 degrees, where all of them may
    hold a wrong shape, the share of material around a pixel counts besides, up to :data:`WRONG` of the whole
    at 30 degrees. All were fitted to the reliability of 15 scans of the challenge's training objects, within
    30, 40 and 50 degrees, none of which the benchmark scores.
    """
    from scipy import ndimage

    share = torch.stack([material(candidate.image) for candidate in found]).mean(0).numpy()
    doubt = WRONG * min(max((60 - math.degrees(arc)) / 30, 0), 1) ** 2
    near, around = (ndimage.gaussian_filter(share, width, mode="nearest") for width in (EDGE, AROUND))
    probability = torch.from_numpy((1 - doubt) * near + doubt * around).clamp(0, 1)
    warnings = []
    if found[0].misfit > MISFIT:
        warnings.append(
            f"no image was found that fits the data: the best misfit is {found[0].misfit:.2f} of the noise, "
            f"where up to {MISFIT} is usual"
        )
    segmentation = (probability > 0.5).to(torch.uint8)
    return Segmentation(segmentation, probability, found[0].misfit, tuple(warnings))


@dataclass(frozen=True, eq=False)
class Source:
    """What candidates are drawn from: line integrals above air and what is known beside them."""

    line_integrals: Tensor
    operator: CTOperator
    prior: ScorePrior
    noise: float
    seed: int
    key: str
    device: torch.device

    def draw(
        self,
        correction: BeamHardeningCorrection,
        solver: BinaryDDS,
        start: Tensor | None,
        count: int,
        name: str,
        on_step: Callable[[int, int], None],
    ) -> list[Candidate]:
        """Draw images down from the solver's first noise level, beginning at images if there are any."""
        p, device = self.line_integrals, self.device
        # Path lengths to be explained, whitened: where the beam is hard, an integral says less of them.
        made = whitened(correction(p), self.operator, self._spread(correction))
        y, operator = made.y.to(device), made.operator.to(device)
        if start is not None:
            # Their scale is not quite known, and a disc must not be bent to fit it. (Without a first image an
            # image of zeros would fit, but for that one direction.)
            free = DirectionWhitening(y, SCALE * float(torch.linalg.vector_norm(y)) / made.noise_std)
            y, operator, start = free(y), free @ operator, start.to(device)
        problem = Problem(y, operator, made.noise_std)
        noise = KeyedNoise(self.seed, f"{self.key}/{name}", range(count), (SIZE, SIZE), p.dtype, device)
        return self.candidates(solver.draw(problem, self.prior, noise, start, on_step))

    @torch.no_grad()
    def candidates(self, images: Tensor) -> list[Candidate]:
        """Images with what speaks against them, by the path lengths that the scan and each agree on."""
        surprises = surprise(self.prior, images).cpu()
        return [self._candidate(image, float(u)) for image, u in zip(images.cpu(), surprises, strict=True)]

    def _candidate(self, image: Tensor, surprise: float) -> Candidate:
        lengths = self.operator(image.clamp(0, 1))
        correction = refitted(self.line_integrals, lengths)
        error = (correction(self.line_integrals) - lengths) / self._spread(correction)
        energy = float(error.square().sum()) / 2 + surprise
        return Candidate(image, float(error.square().mean().sqrt()), energy, correction)

    def _spread(self, correction: BeamHardeningCorrection) -> Tensor:
        return correction.slope(self.line_integrals.clamp(0, correction.largest)) * self.noise


def refitted(p: Tensor, lengths: Tensor) -> BeamHardeningCorrection:
    """Polynomial from line integrals to path lengths of one scan, near :data:`PATH_LENGTH`.

    ``lengths`` are those of a first image; what they are uncertain by averages out over thousands of rays. A
    fit that does not rise all the way is not taken.
    """
    try:
        return BeamHardeningCorrection.fit(p, lengths, degree=4)
    except OperatorError:
        return PATH_LENGTH


def binned(sinogram: Tensor, geometry: FanBeam) -> tuple[Tensor, FanBeam]:
    """Mean of every :data:`BINNING` detector elements, and the geometry of these wider ones."""
    count = geometry.num_detectors // BINNING
    kept = count * BINNING
    first = (geometry.num_detectors - kept) // 2
    part = sinogram[..., first : first + kept].unflatten(-1, (count, BINNING)).mean(-1)
    # What is cut off at the two ends may differ by one element, and moves the middle by half of that.
    moved = (2 * first + kept - geometry.num_detectors) / 2 * geometry.detector_spacing
    return part, replace(
        geometry,
        num_detectors=count,
        detector_spacing=BINNING * geometry.detector_spacing,
        detector_offset=geometry.detector_offset + moved,
    )


def material(sample: Tensor) -> Tensor:
    """Which pixels of the challenge's image are material in a sample, float32 0 or 1.

    A pixel of the sample that an edge runs through holds the share of material in it; bicubic interpolation
    places the edge to a fraction of a pixel.
    """
    image = F.interpolate(sample[None, None], IMAGE_SHAPE, mode="bicubic", align_corners=False)[0, 0]
    return (image > 0.5).float()


def segment_file(
    source: str | Path,
    out: Path,
    prior: ScorePrior,
    solver: BinaryDDS,
    settings: CTSettings,
    *,
    prior_facts: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Segment the disc of one of the challenge's files and write ``out`` in one piece.

    Returns
    -------
    dict
        The provenance that was written.

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it; nothing is written then.
    """
    scan = read_htc2022(source)
    assert scan.geometry is not None
    kept = scan.geometry.subset(settings.chosen_views(scan.geometry))
    found = segment(
        scan, prior, solver, settings, key=Path(source).stem, device=device, on_progress=on_progress
    )
    provenance = {
        **common_facts(solver, prior, prior_facts, device),
        "seed": settings.seed,
        "num_samples": settings.num_samples,
        "angles_degrees": [round(float(np.rad2deg(angle)), 6) for angle in kept.angles],
        "residual": found.residual,
        "warnings": list(found.warnings),
    }
    write_segmentation(out, found.segmentation.numpy(), found.probability.numpy(), provenance)
    return provenance
