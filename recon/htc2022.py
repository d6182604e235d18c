"""The Helsinki Tomography Challenge 2022: from a limited sinogram to the probability of material.

One disc of one material with holes, measured by a polychromatic fan beam within an arc of 30 to 90 degrees.
The sinogram is linearised into path lengths through material, images are drawn with a prior on discs, and the
probability of a pixel follows from the share of them in which it is material.

One run of a sampler over an arc of 60 degrees or less mostly ends in an image that the data rule out: holes
that run into each other along the rays, say. Its misfit tells, and it falls along with the errors. So the
images of a first run are candidates; those of least misfit are drawn anew from somewhat below the top of the
noise, and again, until the misfit stalls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.beam_hardening import BeamHardeningCorrection
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam
from operators.errors import OperatorError
from priors.base import ScorePrior
from recon.ct import CTSettings, whitened
from recon.errors import ReconError
from recon.io.ct_scan import CTScan
from recon.io.htc2022 import IMAGE_SHAPE, read_htc2022
from recon.io.segmentation import write_segmentation
from recon.provenance import common_facts
from recon.solvers.base import KeyedNoise, Problem
from recon.solvers.dds import DDS

PATH_LENGTH = BeamHardeningCorrection((20.99781, 8.277988, -4.651490, 1.393605), 2.296)
"""From line integrals above air to mm of material. Fitted (`python -m benchmarks.htc2022 --fit`) to the full
scans of the challenge's five training objects and their reference segmentations."""

DETECTOR_OFFSET = 0.028
"""By how far, in mm, the middle of the detector is off the line from the source through the axis; fitted
likewise (0.018 to 0.043 from object to object). It is a fifth of a pixel of the references."""

NOISE = 0.015
"""Standard deviation of a line integral: noise of 0.01 and as much again that the model does not explain."""

AIR = 20
"""Detector elements at either end that see nothing but air: the disc of 70 mm is well within the field."""

SIZE = 128
"""Side of the images that are sampled, a quarter of the challenge's."""

BINNING = 4
"""Detector elements taken together; at the disc they are then as wide as a pixel of the samples."""

FIRST = DDS(nfe=60, sigma_max=2.0, sigma_min=0.03, rho=2.0)
"""How the first candidates are drawn. Which image it is is decided at noise levels between 0.3 and 2, where a
schedule of small ``rho`` has most of its steps."""

RESTARTS, RESTART_STEPS = (1.4, 1.0, 0.7, 0.5), 40
"""Noise levels from which candidates are drawn anew, and steps from there on."""

ROUNDS, PARENTS = 6, 4
"""How many times at the most, and how many candidates live on each time."""

STALL = 0.97
"""A round that leaves more than this share of the misfit has found nothing. It ends the search if there is an
image that is not ruled out, and the second such round ends it in any case."""

MOST_VIEWS = 120
"""Views used at the most; more of them say the same again."""

MISFIT = 0.8
"""Largest misfit, over the noise assumed, of an image that is not ruled out: references have 0.49 to 0.63."""


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
    """An image ``(SIZE, SIZE)``, its misfit over the noise, and the path lengths that go with it."""

    image: Tensor
    misfit: float
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
    solver: DDS = FIRST,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Segmentation:
    """Segment one disc: :func:`search`, whose parameters these are, and :func:`segmented`."""
    return segmented(search(scan, prior, solver, settings, key=key, device=device, on_progress=on_progress))


def search(
    scan: CTScan,
    prior: ScorePrior,
    solver: DDS = FIRST,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Look for images of one disc that fit its scan; the best comes first.

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
    most = count * (solver.nfe + ROUNDS * RESTART_STEPS)
    done = 0

    def stepped(_step: int, _steps: int) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, most)

    restarts = [
        replace(solver, nfe=RESTART_STEPS, sigma_max=min(level, solver.sigma_max)) for level in RESTARTS
    ]
    problem = source.problem(PATH_LENGTH)
    found = [source.draw(problem, solver, None, f"0/{index}", stepped) for index in range(count)]
    found.sort(key=lambda candidate: candidate.misfit)
    stalled = 0
    for number in range(1, ROUNDS + 1):
        best, parents = found[0].misfit, found[:PARENTS]
        problem = source.problem(found[0].correction)
        drawn = [
            source.draw(
                problem,
                restarts[(index // 2 + index) % len(restarts)],
                parents[index % len(parents)].image,
                f"{number}/{index}",
                stepped,
            )
            for index in range(count)
        ]
        found = sorted(parents + drawn, key=lambda candidate: candidate.misfit)
        stalled = stalled + 1 if found[0].misfit > STALL * best else 0
        if stalled == (1 if found[0].misfit <= MISFIT else 2):
            break
    if on_progress is not None:
        on_progress(most, most)
    return found[:count]


def segmented(found: Sequence[Candidate]) -> Segmentation:
    """Segmentation and probabilities from what :func:`search` found."""
    share = torch.stack([material(candidate.image) for candidate in found]).mean(0)
    warnings = []
    if found[0].misfit > MISFIT:
        warnings.append(
            f"no image was found that fits the data: the best misfit is {found[0].misfit:.2f} of the noise, "
            f"where up to {MISFIT} is usual"
        )
    return Segmentation((share > 0.5).to(torch.uint8), share, found[0].misfit, tuple(warnings))


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

    def problem(self, correction: BeamHardeningCorrection) -> Problem:
        """Path lengths to be explained, whitened: where the beam is hard, an integral says less of them."""
        made = whitened(correction(self.line_integrals), self.operator, self._spread(correction))
        return Problem(made.y.to(self.device), made.operator.to(self.device), made.noise_std)

    def draw(
        self,
        problem: Problem,
        solver: DDS,
        start: Tensor | None,
        name: str,
        on_step: Callable[[int, int], None],
    ) -> Candidate:
        """One image, down from the solver's first noise level, beginning at an image if there is one."""
        shape = problem.operator.domain_shape
        noise = KeyedNoise(
            self.seed, f"{self.key}/{name}", [0], shape, self.line_integrals.dtype, self.device
        )
        solver.check(problem, self.prior)
        with torch.no_grad():
            image = solver.descend(
                problem.noise_std,
                self.prior,
                noise,
                solver.data_consistency(problem, self.prior),
                problem.unfolded if start is None else start.to(self.device),
                on_step,
            )[0]
        return self.candidate(image.cpu())

    def candidate(self, image: Tensor) -> Candidate:
        """An image with its misfit, by the path lengths that the scan and it agree on."""
        lengths = self.operator(image.clamp(0, 1))
        correction = refitted(self.line_integrals, lengths)
        error = (correction(self.line_integrals) - lengths) / self._spread(correction)
        return Candidate(image, float(error.square().mean().sqrt()), correction)

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
    solver: DDS,
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
