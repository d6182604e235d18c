"""The Helsinki Tomography Challenge 2022: from a limited sinogram to the probability of material.

One disc of one material with holes, measured by a polychromatic fan beam within an arc of 30 to 90 degrees.
The sinogram is linearised into path lengths through material, posterior samples are drawn with a prior on
discs, and the probability of a pixel is the share of samples in which it is material.
"""

from __future__ import annotations

from collections.abc import Callable
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
from recon.posterior import Posterior
from recon.provenance import common_facts
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.base import Solver
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

NFE, SIGMA_MAX = 120, 3.0
"""Steps and first noise level of DDS. Much of a disc seen within an arc is known from the prior alone and has
to find its place: with 60 steps a scan that scores 0.980 with these scored 0.938."""

FIRST_SAMPLES = 4
"""Samples of the first pass."""

MOST_VIEWS = 120
"""Views used at the most; more of them say the same again."""


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
        Root mean square misfit of the mean over the noise assumed.
    warnings
        What a reader should know.
    """

    segmentation: Tensor
    probability: Tensor
    residual: float
    warnings: tuple[str, ...]


def challenge_solver() -> DDS:
    """DDS as it is used for the challenge."""
    return DDS(nfe=NFE, sigma_max=SIGMA_MAX)


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
    solver: Solver | None = None,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Segmentation:
    """Segment one disc, with the probability of every pixel.

    Beam and material differ by some percent from object to object. So a first pass with a few samples, which
    takes :data:`PATH_LENGTH` as it is, is followed by another that takes the polynomial which the scan itself
    and the first image agree on.

    Parameters
    ----------
    scan
        As :func:`recon.io.htc2022.read_htc2022` gives it.
    prior
        In units of one object's material (``contract.unit`` of ``"object"``): the bundled ``discs``.
    solver
        :class:`recon.DDS` with :data:`NFE` steps from :data:`SIGMA_MAX` if not given.
    settings
        For the views to keep, samples, seed and, if given, the noise of a line integral.
    key
        The noise depends on it.
    device
        Where to compute.
    on_progress
        Called with ``(steps done, steps in all)``.

    Raises
    ------
    ReconError
        If the prior is of another kind, or something does not fit.
    """
    asked = CTSettings() if settings is None else settings
    solver = challenge_solver() if solver is None else solver
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
    counts = [min(FIRST_SAMPLES, asked.num_samples), asked.num_samples]
    total, done_before = sum(counts), 0

    def sampled(correction: BeamHardeningCorrection, num_samples: int, name: str) -> Posterior:
        # Where the beam is hard, a line integral says less of the length.
        std = correction.slope(p.clamp(0, correction.largest)) * (asked.noise_std or NOISE)
        problem = whitened(correction(p), operator, std)

        def report(done: int, steps: int) -> None:
            if on_progress is not None:
                on_progress(done_before * steps // num_samples + done, total * steps // num_samples)

        return reconstruct(
            problem.y.to(device),
            problem.operator.to(device),
            prior,
            solver,
            num_samples,
            asked.seed,
            noise_std=problem.noise_std,
            scale=Scale(1.0),
            key=name,
            keep_samples=True,
            on_progress=report,
        )

    first = sampled(PATH_LENGTH, counts[0], f"{key}/first")
    done_before = counts[0]
    posterior = sampled(refitted(p, operator.to("cpu")(first.mean.cpu().clamp(0, 1))), counts[1], key)
    assert posterior.samples is not None
    probability = torch.stack([material(sample) for sample in posterior.samples.cpu()]).mean(0)
    return Segmentation(
        (probability > 0.5).to(torch.uint8),
        probability,
        posterior.residual / posterior.noise_std,
        posterior.warnings,
    )


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
    solver: Solver,
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
