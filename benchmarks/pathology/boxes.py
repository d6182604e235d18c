"""Metrics of reconstructions inside and outside of the boxes of fastMRI+.

PSNR and SSIM of a whole slice say little of a finding that fills a hundredth of it. Here they are taken in
each box, with the volume's dynamic range as everywhere, beside those of everything that is in no box of the
same slices; and so is the contrast of the box with its surroundings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.pages import markdown_table
from recon.calibration import object_region
from recon.errors import ReconError
from recon.evaluation import TARGET_KINDS, comparable_volumes
from recon.io.fastmri import find_target, read_images
from recon.io.fastmri_plus import Annotations, Box
from recon.metrics import SSIM_WINDOW

OUTSIDE = "outside of all boxes"
TISSUE = "outside of all boxes, within the object"
REST = (OUTSIDE, TISSUE)


@dataclass(frozen=True)
class Score:
    """One box of one slice, or what lies outside of all boxes of a slice.

    Attributes
    ----------
    volume : str
        Name of the file.
    index : int
        Slice.
    label : str
        Finding, :data:`OUTSIDE`, or :data:`TISSUE`: air is easily reconstructed, and flatters the former.
    pixels : int
        How many there are.
    psnr, ssim, nmse : float
        PSNR (dB) of these pixels and the mean of SSIM's map over them, both with the largest value of the
        volume's target as their range; squared error over the target's squares.
    planted, found : float
        Contrast in the target and in the reconstruction, (mean inside − mean of the ring) / mean of the ring
        in the target; NaN outside of all boxes, and where a box has no ring.
    """

    volume: str
    index: int
    label: str
    pixels: int
    psnr: float
    ssim: float
    nmse: float
    planted: float = math.nan
    found: float = math.nan


def score_volume(
    name: str,
    truth: np.ndarray,
    images: np.ndarray,
    slices: Mapping[int, Sequence[Box]],
    picture: tuple[int, int],
) -> list[Score]:
    """Score the boxes of one volume.

    Parameters
    ----------
    name : str
        What the scores call it.
    truth, images : numpy.ndarray
        (S, h, w) target and reconstruction.
    slices : mapping
        Slice -> its boxes.
    picture : tuple of int
        Height and width of the uncropped target, on which the boxes were drawn; `truth` is its centre.

    Returns
    -------
    list of Score
        For each slice its boxes, as far as they lie in the images, then what is outside of them, and what of
        that is the object.

    Raises
    ------
    ReconError
        If the volumes' shapes differ, a box is of a slice that is not there, or the target is all zeros.
    """
    from skimage.metrics import structural_similarity  # slow to import

    if truth.ndim != 3 or truth.shape != images.shape or min(truth.shape[1:]) < SSIM_WINDOW:
        raise ReconError(
            f"{name}: boxes need two volumes (slices, h, w) of one shape, {SSIM_WINDOW} pixels or more each "
            f"way, got {truth.shape} and {images.shape}"
        )
    peak = float(truth.max())
    if not peak > 0:
        raise ReconError(f"{name}: the target is all zeros")
    scores = []
    for index, boxes in sorted(slices.items()):
        if index >= len(truth):
            raise ReconError(f"{name}: there is a box in slice {index}, but the volume has {len(truth)}")
        true, image = (volume[index].astype(np.float64) for volume in (truth, images))
        similarity = structural_similarity(true, image, data_range=peak, full=True)[1]
        squares = (true - image) ** 2
        regions = [(box, box.region(picture, (truth.shape[1], truth.shape[2]))) for box in boxes]
        covered = np.zeros(true.shape, dtype=bool)
        for _, region in regions:
            if region is not None:
                covered[region] = True

        score = partial(_score, name, index, peak, squares, true**2, similarity)
        for box, region in regions:
            if region is None:
                continue
            around = ring(region, covered)
            level = float(true[around].mean()) if around.any() else math.nan
            contrasts = [
                float(each[region].mean() - each[around].mean()) / level if level > 0 else math.nan
                for each in (true, image)
            ]
            scores.append(score(box.label, region, *contrasts))
        rest = {OUTSIDE: ~covered}
        if true.min() >= 0 and true.max() > 0:
            rest[TISSUE] = object_region(true) & ~covered
        scores += [score(label, where) for label, where in rest.items() if where.any()]
    return scores


def _score(
    name: str,
    index: int,
    peak: float,
    squares: np.ndarray,
    energies: np.ndarray,
    similarity: np.ndarray,
    label: str,
    where: Any,
    planted: float = math.nan,
    found: float = math.nan,
) -> Score:
    """Score the pixels `where` of a slice, of which squared errors, squares and SSIM's map are given."""
    error, energy = float(squares[where].mean()), float(energies[where].mean())
    return Score(
        name,
        index,
        label,
        int(squares[where].size),
        10 * math.log10(peak**2 / error) if error > 0 else math.inf,
        float(similarity[where].mean()),
        error / energy if energy > 0 else math.nan,
        planted,
        found,
    )


def ring(region: tuple[slice, slice], covered: np.ndarray) -> np.ndarray:
    """Frame around a box, about as many pixels as the box has, without those of any box.

    Parameters
    ----------
    region : tuple of slice
        Rows and columns of the box.
    covered : numpy.ndarray
        (h, w) bool: pixels of all boxes of the slice.

    Returns
    -------
    numpy.ndarray
        (h, w) bool; may be empty, where boxes or the image's edges leave nothing.
    """
    height, width = (part.stop - part.start for part in region)
    # (h + 2 m)(w + 2 m) = 2 h w
    margin = max(2, math.ceil((math.sqrt((height + width) ** 2 + 4 * height * width) - height - width) / 4))
    grown = tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in region)
    frame = np.zeros_like(covered)
    frame[grown] = True
    return frame & ~covered


@dataclass(frozen=True)
class Boxes:
    """What :func:`score_files` found.

    Attributes
    ----------
    scores : list of Score
        Of all volumes.
    targets : list of str
        Kinds of target that were compared with.
    study : dict
        Volume -> findings of the whole study, which have no box.
    unmarked : list of str
        Volumes of which the table names no box.
    missing : list of str
        Volumes with boxes but without a reconstruction.
    failed : dict
        Volume -> why it could not be scored.
    sampling : dict
        Scored volume -> what its reconstruction says of its sampling, :func:`stated_sampling`.
    """

    scores: list[Score]
    targets: list[str]
    study: dict[str, tuple[str, ...]]
    unmarked: list[str]
    missing: list[str]
    failed: dict[str, str]
    sampling: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; a number that is not finite becomes None."""
        plain = asdict(self)
        for score in plain["scores"]:
            for key, value in score.items():
                if isinstance(value, float) and not math.isfinite(value):
                    score[key] = None
        return plain


def score_files(
    annotations: Annotations, targets: Path, reconstructions: Path, labels: Iterable[str] | None = None
) -> Boxes:
    """Score the boxes of all volumes of a folder; a volume that cannot be scored does not stop the others.

    Parameters
    ----------
    annotations : Annotations
        Of `recon.io.fastmri_plus.read_annotations`.
    targets : Path
        A fully sampled fastMRI file, or a folder of them.
    reconstructions : Path
        Folder with files of the same names, dataset ``reconstruction``.
    labels : iterable of str, optional
        Findings to score; all if not given. Other boxes still count as boxes for what is outside.

    Raises
    ------
    ReconError
        If a folder is not there or empty, or a label is none of the table's.
    """
    wanted = None if labels is None else set(labels)
    unknown = sorted((wanted or set()) - set(annotations.labels))
    if unknown:
        raise ReconError(f"no box has the label {unknown[0]!r}; there are: {'; '.join(annotations.labels)}")
    if not targets.exists():
        raise ReconError(f"{targets}: there is no such file or folder of targets")
    if not reconstructions.is_dir():
        raise ReconError(f"{reconstructions}: there is no such folder of reconstructions")
    paths = sorted(targets.glob("*.h5")) if targets.is_dir() else [targets]
    if not paths:
        raise ReconError(f"{targets}: there are no .h5 files in this folder of targets")
    result = Boxes([], [], {}, [], [], {})
    kinds = set()
    for path in paths:
        if path.stem in annotations.study:
            result.study[path.name] = annotations.study[path.stem]
        boxes = annotations.of(path.name)
        prediction = reconstructions / path.name
        if not boxes:
            result.unmarked.append(path.name)
        elif not prediction.exists():
            result.missing.append(path.name)
        else:
            try:
                kind, _ = find_target(path)
                whole = read_images(path, kind)
                truth, images = comparable_volumes(path, prediction, kind)
                found = score_volume(path.name, truth, images, boxes, (whole.shape[1], whole.shape[2]))
            except ReconError as error:
                result.failed[path.name] = str(error)
                continue
            kinds.add(kind)
            result.sampling[path.name] = stated_sampling(prediction)
            result.scores.extend(s for s in found if wanted is None or s.label in {*wanted, *REST})
    result.targets.extend(sorted(kinds))
    return result


def stated_sampling(path: Path) -> dict[str, Any]:
    """Mask, realised acceleration, calibration and coil maps, as ``recon mri`` notes them in its files.

    Parameters
    ----------
    path : Path
        A reconstruction.

    Returns
    -------
    dict
        ``mask``, ``acceleration``, ``calibration`` (columns of the fully sampled centre, or rows × columns)
        and ``coil_maps``; empty if the file does not say, as those of other programs.
    """
    with h5py.File(path, "r") as file:
        text = file.attrs.get("provenance")
    try:
        provenance = json.loads(text)
        mask = provenance["mask"]
        return {
            "mask": mask["name"],
            "acceleration": float(mask["realised_acceleration"]),
            "calibration": " × ".join(str(last - first) for first, last in filter(None, mask["calibration"])),
            "coil_maps": provenance["coil_maps"],
        }
    except (TypeError, ValueError, KeyError):
        return {}


def _sampling_lines(sampling: Collection[Mapping[str, Any]]) -> list[str]:
    """For the head of the page: acceleration of every kind of mask, and what the coil maps are from."""
    stated = [each for each in sampling if each]
    lines = []
    for name in dict.fromkeys(each["mask"] for each in stated):
        here = [each for each in stated if each["mask"] == name]
        values = [each["acceleration"] for each in here]
        span = " to ".join(dict.fromkeys(f"×{value:.2f}" for value in (min(values), max(values))))
        lines.append(f"- acceleration: {name}, realised {span} ({_volumes(here)})")
    for made, region in dict.fromkeys((each["coil_maps"], each["calibration"]) for each in stated):
        here = [each for each in stated if (each["coil_maps"], each["calibration"]) == (made, region)]
        source = f"{made or 'none, one coil'}; calibration region: {region or 'none'}"
        lines.append(f"- coil maps: {source} ({_volumes(here)})")
    if silent := [each for each in sampling if not each]:
        lines.append(f"- acceleration and calibration: not stated by the files of {_volumes(silent)}")
    return lines


def contrast_kept(scores: Sequence[Score]) -> float:
    """Slope through the origin of found against true contrast: 1 if contrasts are kept, 0 if lost.

    Unlike a mean of ratios it is not ruled by boxes of hardly any contrast. NaN where nothing has contrast.
    """
    pairs = np.array([(s.planted, s.found) for s in scores if math.isfinite(s.planted)]).reshape(-1, 2)
    energy = float((pairs[:, 0] ** 2).sum())
    return float((pairs[:, 0] * pairs[:, 1]).sum()) / energy if energy > 0 else math.nan


def summary(scores: Sequence[Score]) -> str:
    """Make the Markdown table: a line for each finding, the most frequent first, then all, then outside."""
    labels = [s.label for s in scores if s.label not in REST]
    lines = []
    for label in sorted(set(labels), key=lambda name: (-labels.count(name), name)):
        lines.append(_line(label, [s for s in scores if s.label == label]))
    lines.append(_line("**all boxes**", [s for s in scores if s.label not in REST]))
    lines += [_line(name, [s for s in scores if s.label == name]) for name in REST]
    headings = ["finding", "boxes", "volumes", "PSNR / dB", "SSIM", "NMSE", "contrast kept"]
    return markdown_table(headings, lines)


def _volumes(names: Collection[object]) -> str:
    return f"{len(names)} volume{'s' if len(names) != 1 else ''}"


def _line(name: str, scores: Sequence[Score]) -> list[str]:
    if not scores:
        return [name, "0", "0", "–", "–", "–", "–"]
    kept = contrast_kept(scores)
    values = [
        (np.mean([getattr(s, key) for s in scores if not math.isnan(getattr(s, key))] or [math.nan]), form)
        for key, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}"), ("nmse", "{:.4f}"))
    ]
    return [
        name,
        str(len(scores)) if name not in REST else f"{len(scores)} slices",
        str(len({s.volume for s in scores})),
        *(form.format(value) if math.isfinite(value) else "–" for value, form in values),
        f"{kept:.2f}" if math.isfinite(kept) else "–",
    ]


def report(result: Boxes, *, facts: Mapping[str, str], annotations: Annotations) -> str:
    """Make the whole page.

    Parameters
    ----------
    result : Boxes
        Of :func:`score_files`.
    facts : mapping of str to str
        How it was made.
    annotations : Annotations
        For the lines that were passed over.
    """
    text = ["# Reconstructions inside the boxes of fastMRI+", ""]
    text += [f"- {key}: {value}" for key, value in facts.items()]
    text += _sampling_lines(result.sampling.values())
    text += [f"- target: {TARGET_KINDS[kind]}" for kind in result.targets]
    text += [
        "",
        "Means over boxes, and over slices for what is outside of them. The range of PSNR and SSIM is the "
        "largest value of the volume's target. Contrast kept: slope of the contrast with a ring around the "
        "box in the reconstruction against that in the target, 1 where it is kept. The boxes are one "
        "radiologist's, of single slices: they say where a finding may be, not what is true.",
        "",
        summary(result.scores),
        "",
    ]
    if annotations.repeated or annotations.empty:
        text += [
            f"Of the table {annotations.repeated} repeated lines and {annotations.empty} boxes without area "
            "were passed over.",
            "",
        ]
    if result.study:
        findings = sorted({finding for found in result.study.values() for finding in found})
        text += [
            f"Findings of a whole study, without a box ({_volumes(result.study)}): {'; '.join(findings)}.",
            "",
        ]
    if result.unmarked:
        text += [f"Without any box: {_volumes(result.unmarked)}.", ""]
    if result.missing:
        text += [f"No reconstruction of {len(result.missing)}: {', '.join(result.missing)}.", ""]
    for name, reason in result.failed.items():
        text += [f"Not scored: {reason if name in reason else f'{name}: {reason}'}.", ""]
    return "\n".join(text)
