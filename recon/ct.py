"""From a scan's sinogram to images and their uncertainty: views, noise, units, operator, solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.attenuation import MU_WATER, hu_to_mu, mu_to_hu
from operators.base import LinearOperator
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, view_indices
from operators.ct_volume import SliceStack
from operators.errors import OperatorError
from operators.truncation import is_truncated
from operators.weighting import Weighting
from priors.base import ScorePrior
from priors.errors import PriorError
from recon.ct_corrections import CTCorrections, Room
from recon.ct_export import check_exportable, check_formats, export
from recon.ct_simulation import CTSimulation
from recon.errors import ReconError
from recon.io.ct_files import CTSource, open_ct
from recon.io.ct_results import CTReconstructionWriter
from recon.io.ct_scan import CTScan
from recon.io.dicom_series import check_folder
from recon.posterior import Posterior
from recon.provenance import common_facts, slice_facts
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.sinogram_noise import sinogram_noise
from recon.solvers.base import Problem, Solver
from recon.solvers.dds import DDS

Geometry = ParallelBeam | FanBeam

UNITS = ("1/mm", "HU", "1/element")

HU_RANGE = (-1024.0, 3071.0)
"""What images of 12 bits hold, and what priors in units of water have learned from."""

HU_TOLERANCE = 100.0
"""How far beyond a result may lie: air has noise, and streaks."""

TRUNCATED = (
    "projections do not fall to air at the ends of the detector: if the object is wider than the field of "
    "view, ask for the correction of truncated scans"
)

RESOLVE = 10.0
"""Difference in HU that is to be seen, if nothing else is said: a lesion in soft tissue."""


@dataclass(frozen=True)
class CTSettings:
    """What is asked of :func:`reconstruct_sinogram`.

    Parameters
    ----------
    views
        Keep this many views, evenly spread over those there are; ``None`` keeps all.
    arc, start
        Keep the views within an arc, radians, that begins at the angle ``start``; ``None`` keeps all.
    num_samples, seed
        Posterior samples a slice, and the seed of their noise.
    photons
        Incident photons of a detector element, for the noise level of every datum; estimated if not given.
    noise_std
        One noise level for all data instead.
    mu_water
        Attenuation of water in 1/mm: what brings attenuation to the units of a prior, and to HU.
    units
        Of the images: ``"1/mm"``, ``"HU"``, or ``"1/element"``, where the size of a detector element is not
        known: the scale of the image is then estimated, since attenuation has none.
    keep_samples
        Keep every sample.
    resolve
        Difference in HU that is to be seen; a solver whose noise levels end above it warns.

    Raises
    ------
    ReconError
        If a number is out of its range, or there are no such units.
    """

    views: int | None = None
    arc: float | None = None
    start: float = 0.0
    num_samples: int = 8
    seed: int = 0
    photons: float | None = None
    noise_std: float | None = None
    mu_water: float = MU_WATER
    units: str = "1/mm"
    keep_samples: bool = False
    resolve: float = RESOLVE

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise ReconError(f"images are written in {' or '.join(UNITS)}, not in {self.units!r}")
        if self.num_samples < 1:
            raise ReconError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.views is not None and self.views < 1:
            raise ReconError(f"views must be at least 1, got {self.views}")
        if self.arc is not None and not 0 < self.arc <= 2 * math.pi:
            raise ReconError(f"an arc lies between 0 and 360 degrees, got {math.degrees(self.arc):g}")
        if not 0 < self.mu_water < math.inf:
            raise ReconError(f"the attenuation of water is a positive number of 1/mm, got {self.mu_water}")
        if not 0 < self.resolve < math.inf:
            raise ReconError(f"what is to be resolved is a positive number of HU, got {self.resolve}")

    @property
    def unit(self) -> float:
        """Attenuation of an image value of 1: that of water, where lengths are known."""
        return 1.0 if self.units == "1/element" else self.mu_water

    def chosen_views(self, geometry: Geometry) -> tuple[int, ...]:
        """Indices of the views to keep: those within the arc, and of these some evenly spread.

        Raises
        ------
        OperatorError
            If there are fewer views than asked for, or none in the arc.
        """
        return view_indices(geometry, self.views, self.arc, self.start)


@dataclass(frozen=True, eq=False)
class CTProblem:
    """One slice, ready for a solver.

    Parameters
    ----------
    y
        Sinogram ``(views, detectors)``, of unit noise up to ``noise_std`` and scaled as the operator is.
    operator
        Of unit norm; its images are in the units of the prior.
    noise_std
        Of ``y``.
    """

    y: Tensor
    operator: LinearOperator
    noise_std: float


def ct_problem(
    sinogram: Tensor,
    operator: CTOperator | SliceStack,
    settings: CTSettings,
    *,
    weighted: bool = True,
    normalised: bool = True,
) -> CTProblem:
    """Bring a sinogram and its operator to unit norm, white noise and images in units of water.

    The sinograms of a volume, ``(D, views, detectors)``, belong to a :class:`operators.SliceStack`.

    The noise of every datum weighs it: ``W A`` and ``W y`` have white noise, where ``W`` is one over its
    standard deviation. Solvers know their step sizes for operators of unit norm.

    Parameters
    ----------
    sinogram
        Line integrals ``(views, detectors)`` or ``(D, views, detectors)``.
    operator
        In 1/mm and mm.
    settings
        For noise and units.
    weighted
        If not, all data are taken as if they had the mean noise, for solvers that need that
        (``needs.equal_weights``).
    normalised
        If not, data and operator keep their scale and are not weighted, for solvers to which that means
        nothing (``needs.direct``): then the operator need not be applied at all.

    Raises
    ------
    ReconError
        If the shapes do not fit, the sinogram is not finite, or its noise cannot be estimated.
    """
    if tuple(sinogram.shape) != operator.range_shape:
        raise ReconError(
            f"the sinogram has shape {tuple(sinogram.shape)}, the operator's is {operator.range_shape}"
        )
    if not bool(torch.isfinite(sinogram).all()):
        raise ReconError("the sinogram holds values that are not finite")
    parts = sinogram.reshape(-1, *sinogram.shape[-2:])
    std = torch.stack(
        [sinogram_noise(part, photons=settings.photons, noise_std=settings.noise_std).std for part in parts]
    ).reshape(sinogram.shape)
    scaled = settings.unit * operator
    if not normalised:
        return CTProblem(sinogram, scaled, root_mean_square(std))
    if weighted:
        return whitened(sinogram, scaled, std)
    norm = scaled.norm(max_iterations=30)
    level = root_mean_square(std)
    return CTProblem(sinogram / norm, (1 / norm) * scaled, level / norm)


def whitened(y: Tensor, operator: LinearOperator, std: Tensor) -> CTProblem:
    """Data and operator of white noise and unit norm.

    Parameters
    ----------
    y
        Data of the operator's range.
    operator
        Whose images have the units that are wanted.
    std
        Standard deviation of every datum.
    """
    level = root_mean_square(std)
    weights = level / std
    weighted = Weighting(weights) @ operator
    norm = weighted.norm(max_iterations=30)
    return CTProblem(weights * y / norm, (1 / norm) * weighted, level / norm)


def root_mean_square(x: Tensor) -> float:
    """Root mean square, summed in double precision."""
    return float(x.double().square().mean().sqrt())


def reconstruct_sinogram(
    sinogram: Tensor,
    operator: CTOperator | SliceStack,
    prior: ScorePrior | None,
    solver: Solver | None = None,
    settings: CTSettings | None = None,
    *,
    key: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Posterior:
    """Draw posterior samples of one slice, or of a volume, from its line integrals.

    Parameters
    ----------
    sinogram
        Line integrals ``(views, detectors)``, real; of a volume ``(D, views, detectors)``.
    operator
        How they were measured (all of them: views are chosen before); of a volume, the
        :class:`operators.SliceStack` of the operator of a slice.
    prior
        Score prior in units of water (``contract.unit``); ``None`` for a solver that needs none.
    solver
        :class:`recon.DDS` with its defaults if not given.
    settings
        Defaults if not given.
    key
        What is reconstructed, such as ``"file_stem/slice"``; the noise depends on it.
    on_progress
        Called with ``(steps done, steps in all)``.

    Returns
    -------
    Posterior
        In the units of the settings.

    Raises
    ------
    ReconError
        If something does not fit; the message says what.
    """
    asked = CTSettings() if settings is None else settings
    if prior is not None and prior.contract.unit == "object":
        raise ReconError(
            f"prior {prior.contract.name!r} knows one object in units of its material, not attenuation: it "
            "is for the challenge only"
        )
    solver = DDS.ct() if solver is None else solver
    problem = ct_problem(
        sinogram,
        operator,
        asked,
        weighted=not solver.needs.equal_weights,
        normalised=not solver.needs.direct,
    )
    # Attenuation has units, and so has a prior that knows water; another one knows a level.
    known = asked.units != "1/element" and prior is not None and prior.contract.unit == "water"
    scale = Scale(1.0) if known else None
    posterior = reconstruct(
        problem.y,
        problem.operator,
        prior,
        solver,
        asked.num_samples,
        asked.seed,
        noise_std=problem.noise_std,
        scale=scale,
        key=key,
        keep_samples=asked.keep_samples,
        on_progress=on_progress,
    )
    notes = posterior.warnings
    if known and prior is not None and solver.needs.prior:
        level = last_noise_level(solver, prior, Problem(problem.y, problem.operator, problem.noise_std))
        notes += unresolved(level, asked.resolve) + beyond_range(posterior.mean, prior.contract.name)
    return in_units(replace(posterior, warnings=notes), asked)


def last_noise_level(solver: Solver, prior: ScorePrior, problem: Problem) -> float:
    """Noise level in units of the prior at which the prior is asked last: below it, it removes nothing.

    That is the end of the solver's schedule. Of solvers that do not tell theirs it is their ``sigma_min``;
    ``None`` stands there for the measurement's noise level, or half of it. Others go down to the lowest level
    that the prior knows.
    """
    levels = getattr(solver, "levels", None)
    if callable(levels):  # of other solvers it is their number
        known = {"prior": prior, "problem": problem, "noise_std": problem.noise_std}
        return float(levels(**{name: known[name] for name in signature(levels).parameters})[-2])
    own = getattr(solver, "sigma_min", 0.0)
    return max(prior.contract.sigma_min, problem.noise_std / 2 if own is None else float(own))


def unresolved(level: float, resolve: float) -> tuple[str, ...]:
    """A warning, if noise levels that end at ``level``, in units of water, are above ``resolve`` in HU."""
    if 1000 * level <= resolve:
        return ()
    return (
        f"the noise levels end at {1000 * level:.3g} HU, so differences of {resolve:g} HU are not resolved "
        "by the prior",
    )


def beyond_range(image: Tensor, name: str) -> tuple[str, ...]:
    """A warning, if an image in units of water holds values far from all that its prior has learned from."""
    low, high = 1000 * (float(image.min()) - 1), 1000 * (float(image.max()) - 1)
    if low >= HU_RANGE[0] - HU_TOLERANCE and high <= HU_RANGE[1] + HU_TOLERANCE:
        return ()
    return (
        f"values from {low:.0f} to {high:.0f} HU lie beyond {HU_RANGE[0]:.0f} to {HU_RANGE[1]:.0f} HU, which "
        f"prior {name!r} has learned from",
    )


def in_units(posterior: Posterior, settings: CTSettings) -> Posterior:
    """Posterior of an image in units of :attr:`CTSettings.unit`, in those that were asked for."""
    factor, offset = (1000.0, -1000.0) if settings.units == "HU" else (settings.unit, 0.0)

    def value(image: Tensor) -> Tensor:
        return factor * image + offset

    return replace(
        posterior,
        mean=value(posterior.mean),
        std=factor * posterior.std,
        samples=None if posterior.samples is None else value(posterior.samples),
        quantiles={q: value(image) for q, image in posterior.quantiles.items()},
    )


def image_grid(
    scan: CTScan, size: int | None = None, pixel_size: float | None = None
) -> tuple[tuple[int, int], float]:
    """Pixels ``(H, W)`` and their side in mm: as asked, as the file has them, or such that all is in view.

    What a detector sees all around is a disc; the square around it has as many pixels a side as there are
    detector elements, if nothing else is said.

    Raises
    ------
    ReconError
        If the image is to have no pixels, or pixels of no size.
    """
    if size is not None and size < 1:
        raise ReconError(f"an image has at least 1 pixel a side, not {size}")
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ReconError(f"the side of a pixel is a positive number of mm, not {pixel_size:g}")
    geometry = geometry_of(scan)
    field = geometry.field_of_view
    if size is None and pixel_size is None and scan.image_shape is not None and scan.pixel_size is not None:
        return scan.image_shape, scan.pixel_size
    if pixel_size is not None:
        side = math.ceil(field / pixel_size) if size is None else size
        return (side, side), pixel_size
    side = geometry.num_detectors if size is None else size
    known = scan.image_shape is not None and scan.pixel_size is not None
    width = scan.image_shape[1] * scan.pixel_size if known else field  # type: ignore[index, operator]
    return (side, side), width / side


def geometry_of(scan: CTScan) -> Geometry:
    """Geometry of a scan.

    Raises
    ------
    ReconError
        If the file does not tell, and nobody else did.
    """
    if scan.geometry is None:
        raise ReconError(f"{scan.source}: the file does not say how the rays run")
    return scan.geometry


@dataclass(frozen=True, eq=False)
class CTSliceResult:
    """What a figure needs of one slice.

    Parameters
    ----------
    index
        In the file.
    mean, std
        ``(H, W)``, in the units of the settings.
    reference
        Image that came with the data, in the same units, if there is one.
    units
        Of all of them, one of :data:`UNITS`.
    """

    index: int
    mean: Tensor
    std: Tensor
    reference: Tensor | None
    units: str


def reconstruct_ct_file(
    source: str | Path,
    out: Path,
    prior: ScorePrior | None,
    solver: Solver,
    settings: CTSettings,
    *,
    size: int | None = None,
    pixel_size: float | None = None,
    slices: Sequence[int] | None = None,
    detector_spacing: float | None = None,
    corrections: CTCorrections | None = None,
    simulation: CTSimulation | None = None,
    also: Sequence[str] = (),
    prior_facts: dict[str, Any] | None = None,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    on_progress: Callable[[float, int], None] | None = None,
    on_slice: Callable[[CTSliceResult], None] | None = None,
) -> dict[str, Any]:
    """Reconstruct the slices of a file with projections and write ``out`` in one piece.

    Solvers of volumes (``needs.volume``) are given all slices at once, which have to be neighbours; the
    others one after the other.

    Parameters
    ----------
    source, out
        Input (:mod:`recon.io.ct_files` lists the formats) and output file.
    prior, solver, settings
        With what, and how.
    size, pixel_size
        Pixels a side of the image, and their size in mm; see :func:`image_grid`.
    slices
        Which ones; all if not given.
    detector_spacing
        In mm, for formats that do not tell.
    corrections
        What is put right before; of the defaults, the axis of rotation alone, where the format does not tell.
    simulation
        The source holds images, and this scan of them is reconstructed; the views are those of the
        simulation. The truth is written beside the result, as the dataset ``reference``.
    also
        Formats to write the result in too, see :func:`recon.ct_export.export`.
    prior_facts
        Name and hash of the prior, for provenance.
    cache
        Folder for system matrices.
    device
        Where to compute.
    on_progress
        Called with ``(slices done, slices in all)``, the first with its fraction.
    on_slice
        Called with every finished slice.

    Returns
    -------
    dict
        The provenance that was written.

    Raises
    ------
    ReconError
        Naming the file and what is wrong with it; nothing is written then, unless the disk refuses one of
        ``also``, which are written when ``out`` is there.
    """
    fixes = CTCorrections() if corrections is None else corrections
    check_formats(also)
    if "dicom" in also:
        for part in ("mean", "std"):
            check_folder(out.with_name(f"{out.stem}_dicom") / part, overwrite=True)
    opened = (
        open_ct(source, detector_spacing=detector_spacing)
        if simulation is None
        else simulation.open(source, even=bool(also))
    )
    with opened as file:
        chosen = range(file.num_slices) if slices is None else list(slices)
        if not chosen:
            raise ReconError(f"{source}: no slices are chosen, of the {file.num_slices} in the file")

        def read(index: int) -> CTScan:
            return fixes.apply(file.read_slice(index).to_line_integrals(photons=settings.photons))

        first = read(chosen[0])
        if first.length_unit == "element" and settings.units != "1/element":
            settings = replace(settings, units="1/element")
        check_exportable(also, settings.units, chosen, file.path)
        whole = solver.needs.volume
        if whole and list(chosen) != list(range(chosen[0], chosen[0] + len(chosen))):
            raise ReconError(
                f"{source}: {type(solver).__name__} reconstructs a volume, whose slices follow each other, "
                f"not slices {', '.join(map(str, chosen))}"
            )
        told = file.format not in ("mat", "dxchange")
        geometry = fixes.centred(first, geometry_of(first), told=told)
        views = settings.chosen_views(geometry)
        shape, side = image_grid(replace(first, geometry=geometry), size, pixel_size)
        measured = geometry.subset(views)
        direct = solver.needs.direct
        room = Room.around(shape, measured, truncated=fixes.truncated, continued=direct)
        # A matrix that is used once or twice is not worth making.
        engine = "on-the-fly" if direct else "auto"
        operator = CTOperator(room.geometry(measured), room.shape, side, engine=engine, cache=cache)
        operator.to(device)
        forward = SliceStack(operator, len(chosen)) if whole else operator
        provenance = _provenance(
            file, prior, solver, settings, geometry, views, shape, side, prior_facts, device
        )
        provenance["corrections"] = fixes.facts()
        provenance["simulation"] = None if simulation is None else simulation.facts()
        kept = provenance["num_samples"] if settings.keep_samples else 0
        mu_water = None if settings.units == "1/element" else settings.mu_water
        with CTReconstructionWriter(
            out, len(chosen), shape, provenance, units=settings.units, num_samples=kept
        ) as writer:
            facts: list[dict[str, Any]] = []
            notes: list[str] = []
            number = 0
            for portion in [list(chosen)] if whole else [[index] for index in chosen]:
                name = f"{portion[0]}" if not whole else f"{portion[0]}-{portion[-1]}"

                def report(done: int, total: int, number: int = number, count: int = len(portion)) -> None:
                    if on_progress is not None:
                        on_progress(number + count * done / total, len(chosen))

                references: list[Tensor | None] = []
                measurements: list[Tensor] = []
                try:
                    for index in portion:
                        scan = first if index == chosen[0] else read(index)
                        y = scan.sinogram[0][list(views)]
                        if not fixes.truncated and is_truncated(y):
                            notes.append(TRUNCATED)
                        measurements.append(room.continued(y, measured, mu_water))
                        references.append(_reference(scan, settings, shape))
                    posterior = reconstruct_sinogram(
                        (torch.stack(measurements) if whole else measurements[0]).to(device),
                        forward,
                        prior,
                        solver,
                        settings,
                        key=f"{file.path.stem}/{name}",
                        on_progress=report,
                    )
                except (OperatorError, PriorError, ReconError) as error:
                    where = f"{source}: slice{'s' * whole} {name}: "
                    raise ReconError(
                        f"{'' if str(error).startswith(str(source)) else where}{error}"
                    ) from None
                notes.extend(posterior.warnings)
                mean, std, samples = (
                    None if image is None else room.cropped(image).cpu()
                    for image in (posterior.mean, posterior.std, posterior.samples)
                )
                assert mean is not None
                assert std is not None
                for k, index in enumerate(portion):
                    at = (k,) if whole else ()
                    drawn = None if samples is None else samples[:, *at]
                    facts.append(slice_facts(index, posterior))
                    writer.write_slice(number, mean[at], std[at], drawn)
                    reference = references[k]
                    if reference is not None:
                        writer.write_reference(number, reference)
                    if on_slice is not None:
                        on_slice(CTSliceResult(index, mean[at], std[at], reference, settings.units))
                    number += 1
            writer.provenance["slices"] = facts
            writer.provenance["warnings"] = list(dict.fromkeys(notes))
        made = dict(writer.provenance)
        export(out, also, made, file.placement)
        return made


def _reference(scan: CTScan, settings: CTSettings, shape: tuple[int, int]) -> Tensor | None:
    """Image that came with a scan in the units of the settings, if it is one on the same pixels."""
    if scan.reference is None or tuple(scan.reference.shape[-2:]) != shape:
        return None
    image, units = scan.reference[0], scan.reference_units
    if units == settings.units:
        return image
    if (units, settings.units) == ("1/mm", "HU"):
        return mu_to_hu(image, settings.mu_water)
    return hu_to_mu(image, settings.mu_water) if (units, settings.units) == ("HU", "1/mm") else None


def _provenance(
    file: CTSource,
    prior: ScorePrior | None,
    solver: Solver,
    settings: CTSettings,
    geometry: Geometry,
    views: Sequence[int],
    shape: tuple[int, int],
    pixel_size: float,
    prior_facts: dict[str, Any] | None,
    device: str | torch.device,
) -> dict[str, Any]:
    kept = geometry.subset(views)
    return {
        **common_facts(solver, prior, prior_facts, device),
        "units": settings.units,
        "seed": settings.seed,
        "num_samples": settings.num_samples if solver.needs.prior else 1,
        "format": file.format,
        "geometry": {
            "name": type(geometry).__name__,
            **{key: value for key, value in asdict(kept).items() if key != "angles"},
            "angles_degrees": [round(math.degrees(angle), 6) for angle in kept.angles],
            "views_of_the_file": geometry.num_views,
        },
        "image": {"shape": list(shape), "pixel_size": pixel_size},
        "mu_water": settings.mu_water,
        "photons": "estimated" if settings.photons is None else settings.photons,
        "noise_std": settings.noise_std,
        "calibrated_uncertainty": False,
    }
