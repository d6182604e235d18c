"""From files to what a training draws from: sources of images for training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recon.errors import ReconError
from recon.image_folders import ImageVolume, find_volumes, split_subjects

if TYPE_CHECKING:
    from priors.slices import LazySlices
    from priors.training import ImageSource, TrainingSettings

GIB = 2**30


def kind_settings(kind: str, channels: str | None = None, slices: int = 1) -> TrainingSettings:
    """Settings of a kind of images: ``mr``, ``ct``, ``discs`` or ``images``.

    Parameters
    ----------
    kind
        The kind.
    channels
        ``"real"`` or ``"complex"``; the kind's own if not given.
    slices
        Neighbouring slices that the prior sees at once.

    Raises
    ------
    ReconError
        If images of the kind have no such channels or no slices.
    """
    if channels not in (None, "real", "complex"):
        raise ReconError(f"--channels is real or complex, not {channels!r}")
    if slices < 1:
        raise ReconError(f"--slices must be at least 1, got {slices}")
    if kind in ("ct", "discs") and channels == "complex":
        raise ReconError(f"images of kind {kind} are real: --channels complex has no use with them")
    if kind == "discs" and slices != 1:
        raise ReconError("discs are single images: --slices has no use with them")
    from priors.ct_images import CT_SETTINGS
    from priors.disc_images import DISC_SETTINGS
    from priors.mr_images import MR_SETTINGS
    from priors.plain_images import PLAIN_SETTINGS

    every = {"mr": MR_SETTINGS, "ct": CT_SETTINGS, "discs": DISC_SETTINGS, "images": PLAIN_SETTINGS}
    settings = every[kind]
    per_slice = settings.network.channels if channels is None else {"real": 1, "complex": 2}[channels]
    spread = settings.network.sigma_data
    if kind == "mr" and per_slice == 1:
        spread = PLAIN_SETTINGS.network.sigma_data  # of magnitudes at the same level
    network = replace(settings.network, channels=per_slice * slices, sigma_data=spread)
    return replace(settings, slices=slices, network=network)


class FileImages:
    """Images of files for training, for validation, or both.

    Parameters
    ----------
    kind
        ``mr``, ``ct`` or ``images``.
    settings
        Of the training, from :func:`kind_settings`: level, channels and slices are theirs.
    memory
        Bytes that images in memory may take.
    seed
        Of the order in which volumes pass through memory, and of the split.

    Attributes
    ----------
    problems : list of str
        A sentence for each file that cannot be used, as far as they are known.
    """

    def __init__(self, kind: str, settings: TrainingSettings, memory: float, seed: int = 0) -> None:
        self.kind, self.settings, self.memory, self.seed = kind, settings, memory, seed
        self._problems: list[str] = []
        self._read: list[LazySlices] = []

    @property
    def problems(self) -> list[str]:
        """See the class."""
        late = [sentence for slices in self._read for sentence in slices.failed.values()]
        return list(dict.fromkeys(self._problems + late))

    def find(self, paths: Sequence[Path]) -> list[ImageVolume]:
        """Find the volumes of files and folders.

        Raises
        ------
        ReconError
            If there are none.
        """
        volumes, problems = find_volumes(paths, self.kind)
        self._problems += problems
        return volumes

    def split(self, volumes: Sequence[ImageVolume]) -> tuple[list[ImageVolume], list[ImageVolume], str]:
        """Hold out volumes of some subjects; see :func:`recon.image_folders.split_subjects`."""
        return split_subjects(volumes, self.seed)

    def source(self, volumes: Sequence[ImageVolume]) -> tuple[ImageSource, str | None]:
        """Make a source of volumes; the sentence says so if not all have room in memory.

        Raises
        ------
        PriorError
            If no volume has enough slices, or not even one has room in memory.
        """
        from priors.ct_images import water_units
        from priors.slices import STAY, LazySlices

        physical = self.settings.unit != "level"
        slices = LazySlices(
            volumes,
            stack=self.settings.slices,
            level=None if physical else self.settings.level,
            prepare=water_units if physical else None,
            memory=self.memory,
            seed=self.seed,
        )
        self._read.append(slices)
        note = None
        if slices.held < len(slices.volumes):
            note = (
                f"all images need {slices.total_bytes / GIB:.2g} GiB of memory, more than the "
                f"{self.memory / GIB:.2g} GiB of --memory: {slices.held} of {len(slices.volumes)} volumes "
                f"are held at a time, and one is replaced every {STAY} steps"
            )
        if self.kind == "ct":
            from priors.ct_images import CTImages

            return CTImages(slices), note
        if self.kind == "images":
            from priors.plain_images import PlainImages

            return PlainImages(slices, self.settings.channels), note
        from priors.mr_images import MRImages

        return MRImages(slices, self.settings.channels), note
