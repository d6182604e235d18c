"""The YAML file: what is asked for, every key checked, and errors that name file, key and line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cases import TARGETS
from recon.errors import ReconError

MODALITIES = ("mri", "ct")
CT_TARGET = "truth"
PRECISIONS = ("fp32", "bf16")
BEAMS = ("parallel", "fan")


@dataclass(frozen=True)
class VolumeEntry:
    """One or, of a folder, several volumes.

    Attributes
    ----------
    kind : str
        ``measured``, ``nifti``, ``fastmri`` or ``hu``.
    path : Path
        File; of ``fastmri`` also a folder.
    name : str, optional
        What tables call it.
    slices : tuple of int, optional
        All of them if None.
    crop : tuple of int, optional
        Height and width of the centre that is kept of a NIfTI volume.
    series : str, optional
        Of a file of HU volumes.
    where : str
        File and line.
    subject : str, optional
        Whom it shows; volumes of one subject are no independent evidence. The volume's own name if None.
    note : str
        One sentence that the page prints beside the volume; empty for none.
    """

    kind: str
    path: Path
    name: str | None
    slices: tuple[int, ...] | None
    crop: tuple[int, int] | None
    series: str | None
    where: str
    subject: str | None = None
    note: str = ""


@dataclass(frozen=True)
class MaskEntry:
    """A kind of mask at one acceleration."""

    kind: str
    acceleration: float


@dataclass(frozen=True)
class ScanEntry:
    """So many views of a beam, or an arc in degrees with a view a degree."""

    beam: str
    views: int
    arc: float | None


@dataclass(frozen=True)
class MethodEntry:
    """A method with its options, not yet looked up.

    Attributes
    ----------
    method : str
        Of the registry.
    name : str, optional
        What tables call it.
    optional : bool
        Left out, with a line in the page, if its weights or its package are missing.
    options : mapping
        What remains: options of the method itself.
    where : str
        File and line.
    """

    method: str
    name: str | None
    optional: bool
    options: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class PictureEntry:
    """Which case is drawn; what is None is chosen."""

    volume: str | None = None
    slice: int | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A whole benchmark; the keys of the file are the names of these attributes.

    Attributes
    ----------
    path : Path
        The file.
    title : str
        Of the page.
    modality : str
        ``mri`` or ``ct``.
    data : tuple of VolumeEntry
        Test volumes.
    masks : tuple of MaskEntry
        Of MRI.
    scans : tuple of ScanEntry
        Of CT.
    methods : tuple of MethodEntry
        In the order of the columns.
    targets : tuple of str
        What images are held against.
    main : str, optional
        Name of the method that the others are compared with; the last one if None.
    seeds : tuple of int
        Of the samples.
    num_samples : int
        Samples of methods that do not say another number.
    prior : str or Path
        Bundled prior, or a file.
    precision : str
        Arithmetic of the prior's network.
    bootstrap : int
        Draws.
    perceptual : bool
        HFEN and MS-SSIM as well.
    photons : float
        Of CT: an element through air.
    picture : PictureEntry
        Which case is drawn.
    """

    path: Path
    title: str
    modality: str
    data: tuple[VolumeEntry, ...]
    masks: tuple[MaskEntry, ...]
    scans: tuple[ScanEntry, ...]
    methods: tuple[MethodEntry, ...]
    targets: tuple[str, ...]
    main: str | None
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 4
    prior: str | Path = "brain"
    precision: str = "fp32"
    bootstrap: int = 2000
    perceptual: bool = True
    photons: float = 2e5
    picture: PictureEntry = field(default_factory=PictureEntry)


def read_configuration(path: Path, data: Path | None = None) -> Configuration:
    """Read and check a file; data are looked for below `data`, if given, else relative to the file.

    Raises
    ------
    ReconError
        One sentence that names the file and, where it can, line and key.
    """
    top = Section.read(path)
    folder = path.parent if data is None else data
    modality = top.word("modality", MODALITIES)
    mri = modality == "mri"
    return _finish(
        top,
        path=path,
        title=top.text("title", "MRI" if mri else "CT"),
        modality=modality,
        data=tuple(_volume(section, folder, modality) for section in top.sections("data")),
        masks=tuple(m for section in top.sections("masks") for m in _masks(section)) if mri else (),
        scans=() if mri else tuple(s for section in top.sections("scans") for s in _scans(section)),
        methods=_methods(top),
        targets=_targets(top, modality),
        main=top.optional_text("main"),
        seeds=_distinct(top, "seeds", top.numbers("seeds", (0,))),
        num_samples=top.count("num_samples", 4),
        prior=_prior(top, path.parent, "brain" if mri else "chest"),
        precision=top.word("precision", PRECISIONS, "fp32"),
        bootstrap=top.count("bootstrap", 2000),
        perceptual=top.flag("perceptual", True),
        photons=2e5 if mri else top.positive("photons", 2e5),
        picture=_picture(top),
    )


def _finish(top: Section, **values: Any) -> Configuration:
    top.close()
    return Configuration(**values)


# -- YAML with lines -----------------------------------------------------------------------------------------


class _Lines(yaml.SafeLoader):
    """Knows where each mapping and each of its keys stands, and refuses a key that stands there twice."""


class _Mapping(dict):
    """A mapping of the file with the lines of its keys."""

    line: int
    lines: dict[str, int]


def _construct_mapping(loader: _Lines, node: yaml.MappingNode) -> _Mapping:
    made = _Mapping()
    made.line, made.lines = node.start_mark.line + 1, {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"{key!r} is no word", problem_mark=node.start_mark
            )
        if key in made:
            problem = f"{key!r} is there twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
        made[key], made.lines[key] = loader.construct_object(value_node, deep=True), line
    return made


_Lines.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)

_REQUIRED = object()


class Section:
    """A mapping of the file whose keys are taken one by one; :meth:`close` refuses what is left."""

    def __init__(self, path: Path, values: _Mapping) -> None:
        self.path = path
        self._values = values
        self._left = dict(values)
        self._known: dict[str, None] = {}  # in the order in which they were asked for

    @classmethod
    def read(cls, path: Path) -> Section:
        """Read a file whose top level is a mapping."""
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Lines)
        except FileNotFoundError:
            raise ReconError(f"{path}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ReconError(f"{path}: cannot be read: {error}") from None
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise ReconError(f"{path}{line}: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ReconError(f"{path}: this is no YAML: {error}") from None
        if not isinstance(values, _Mapping):
            raise ReconError(f"{path}: a mapping with the keys modality, data, methods … is expected")
        return cls(path, values)

    def where(self, key: str | None = None) -> str:
        """File and line of a key."""
        line = self._values.line if key is None else self._values.lines.get(key, self._values.line)
        return f"{self.path}, line {line}"

    def error(self, key: str, what: str) -> ReconError:
        """Error that names file, line and key."""
        return ReconError(f"{self.where(key)}: {key} {what}")

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        self._known[key] = None
        return key in self._values

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Value of a key."""
        self._known[key] = None
        if key not in self._values:
            if default is _REQUIRED:
                raise ReconError(f"{self.where()}: {key} is missing")
            return default
        self._left.pop(key, None)
        return self._values[key]

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Text that is not empty."""
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"is a text, not {value!r}")
        return value

    def optional_text(self, key: str) -> str | None:
        """Text, or None if the key is absent."""
        return self.text(key) if self.has(key) else None

    def word(self, key: str, known: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """One of some words."""
        value = self.take(key, default)
        if value not in known:
            raise self.error(key, f"is one of {', '.join(known)}, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """``true`` or ``false``."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is true or false, not {value!r}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        """Positive number; ``2e5``, which YAML 1.1 takes for a text, is one too."""
        value = self.take(key, default)
        return self._number(key, value)

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """Whole number from 1."""
        value = self.take(key, default)
        if not _is_integer(value) or value < 1:
            raise self.error(key, f"is a whole number from 1, not {value!r}")
        return value

    def numbers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Whole numbers from 0, or a single one."""
        value = self.take(key, default)
        items = value if isinstance(value, list | tuple) else [value]
        if not items or not all(_is_integer(item) and item >= 0 for item in items):
            raise self.error(key, f"is a list of whole numbers from 0, not {value!r}")
        return tuple(items)

    def positives(self, key: str) -> tuple[float, ...]:
        """Positive numbers, or a single one."""
        value = self.take(key)
        items = value if isinstance(value, list) else [value]
        if not items:
            raise self.error(key, "is an empty list")
        return tuple(self._number(key, item) for item in items)

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise self.error(key, f"is a positive number, not {value!r}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, f"is a positive number, not {value!r}")
        return float(value)

    def items(self, key: str) -> list[Any]:
        """List that is not empty."""
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"is a list, not {value!r}")
        return value

    def sections(self, key: str) -> list[Section]:
        """List of mappings."""
        made = []
        for item in self.items(key):
            if not isinstance(item, _Mapping):
                raise self.error(key, f"is a list of mappings, and {item!r} is none")
            made.append(Section(self.path, item))
        return made

    def section(self, key: str) -> Section | None:
        """Mapping, or None if the key is absent."""
        value = self.take(key, None)
        if value is None and not self.has(key):
            return None
        if not isinstance(value, _Mapping):
            raise self.error(key, f"is a mapping, not {value!r}")
        return Section(self.path, value)

    def rest(self) -> dict[str, Any]:
        """Everything not yet taken."""
        left, self._left = self._left, {}
        return left

    def close(self) -> None:
        """Refuse keys that nobody took."""
        for key in self._left:
            raise ReconError(
                f"{self.where(key)}: {key!r} is not known here; the keys are {', '.join(self._known)}"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -- what the sections say -----------------------------------------------------------------------------------


def _volume(section: Section, folder: Path, modality: str) -> VolumeEntry:
    kinds = ("measured", "nifti", "fastmri") if modality == "mri" else ("hu",)
    found = [kind for kind in kinds if section.has(kind)]
    if len(found) != 1:
        raise ReconError(f"{section.where()}: data are given by one of {', '.join(kinds)}")
    kind = found[0]
    path = folder / Path(section.text(kind)).expanduser()
    if not path.exists():
        raise section.error(kind, f"{path}: there is no such file")
    slices, crop, series = None, None, None
    if kind != "measured":
        given = section.take("slices", "all") if kind == "fastmri" else section.take("slices")
        slices = None if given == "all" else _distinct(section, "slices", section.numbers("slices"))
    if kind == "nifti" and section.has("crop"):
        sides = section.numbers("crop")
        if len(sides) != 2 or min(sides) < 1:
            raise section.error("crop", f"is height and width, not {list(sides)}")
        crop = (sides[0], sides[1])
    if kind == "hu":
        series = section.text("series")
    name, subject = section.optional_text("name"), section.optional_text("subject")
    note = section.optional_text("note") or ""
    entry = VolumeEntry(kind, path, name, slices, crop, series, section.where(), subject, note)
    if entry.name is not None and kind == "fastmri" and path.is_dir():
        raise section.error("name", f"cannot be given to all files of the folder {path}")
    section.close()
    return entry


def _masks(section: Section) -> list[MaskEntry]:
    kind = section.text("kind")
    made = [MaskEntry(kind, value) for value in section.positives("acceleration")]
    section.close()
    return made


def _scans(section: Section) -> list[ScanEntry]:
    beam = section.word("beam", BEAMS)
    made = [ScanEntry(beam, _whole(section, "views", n), None) for n in _some(section, "views")]
    # An arc has a view a degree.
    made += [ScanEntry(beam, _whole(section, "arcs", arc), float(arc)) for arc in _some(section, "arcs")]
    if not made:
        raise ReconError(f"{section.where()}: give views, arcs, or both")
    section.close()
    return made


def _some(section: Section, key: str) -> tuple[float, ...]:
    return section.positives(key) if section.has(key) else ()


def _whole(section: Section, key: str, value: float) -> int:
    if value != int(value):
        raise section.error(key, f"are whole numbers, not {value:g}")
    return int(value)


def _methods(top: Section) -> tuple[MethodEntry, ...]:
    made = []
    for item in top.items("methods"):
        if isinstance(item, str):
            made.append(MethodEntry(item, None, False, {}, top.where("methods")))
            continue
        if not isinstance(item, _Mapping):
            raise top.error("methods", f"is a list of names and mappings, and {item!r} is neither")
        section = Section(top.path, item)
        method, name = section.text("method"), section.optional_text("name")
        optional = section.flag("optional", False)
        made.append(MethodEntry(method, name, optional, section.rest(), section.where()))
    return tuple(made)


def _targets(top: Section, modality: str) -> tuple[str, ...]:
    known = tuple(TARGETS) if modality == "mri" else (CT_TARGET,)
    if not top.has("targets"):
        return known
    targets = top.items("targets")
    for target in targets:
        if target not in known:
            raise top.error("targets", f"are of {', '.join(known)}, not {target!r}")
    return _distinct(top, "targets", tuple(targets))


def _distinct(section: Section, key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise section.error(key, f"are given twice: {', '.join(map(str, values))}")
    return values


def _prior(top: Section, folder: Path, default: str) -> str | Path:
    text = top.text("prior", default)
    return folder / text if (folder / text).exists() else text


def _picture(top: Section) -> PictureEntry:
    section = top.section("picture")
    if section is None:
        return PictureEntry()
    index = section.numbers("slice")[0] if section.has("slice") else None
    made = PictureEntry(section.optional_text("volume"), index, section.optional_text("mask"))
    section.close()
    return made
