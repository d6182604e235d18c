"""The plan, and working it off: every unit that is not stored yet is run, stored, and forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, versions
from benchmarks.matrix.base import Reconstruction
from benchmarks.matrix.configuration import Configuration
from benchmarks.matrix.ct_study import CTStudy
from benchmarks.matrix.methods import Entry
from benchmarks.matrix.mri_study import MRIStudy
from benchmarks.matrix.resources import Meter
from benchmarks.matrix.store import Store, Unit, code_digest, key_of
from benchmarks.matrix.study import Condition, Study
from operators.errors import OperatorError
from priors.errors import PriorError
from recon.errors import ReconError

PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-image",
    "sigpy",
    "fastmri",
    "deepinv",
    "astra-toolbox",
    "dis-recon",
)
"""Whose versions are kept with every unit."""


@dataclass(frozen=True, eq=False)
class Planned:
    """One slice through one mask by one method with one seed.

    Attributes
    ----------
    volume, index, condition, entry, seed
        What of what.
    what : dict
        JSON-ready: everything that the result depends on.
    key : str
        Hash of that.
    """

    volume: Any
    index: int
    condition: Condition
    entry: Entry
    seed: int
    what: dict[str, Any]
    key: str

    @property
    def label(self) -> str:
        """For a person."""
        where = f"{self.volume.name}, slice {self.index}, {self.condition.label}"
        seed = f", seed {self.seed}" if self.entry.method.needs_seed else ""
        return f"{where}, {self.entry.name}{seed}"


def make_study(configuration: Configuration, device: str = "cpu") -> Study:
    """Open the data of a configuration.

    Raises
    ------
    ReconError
        If data are missing, a mask cannot be drawn, or two volumes or masks have one name.
    """
    study: Study = (
        MRIStudy(configuration) if configuration.modality == "mri" else CTStudy(configuration, device)
    )
    for what, names in (
        ("volumes are called", [volume.name for volume in study.volumes]),
        ("masks or scans are", [condition.label for condition in study.conditions]),
    ):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ReconError(f"{configuration.path}: two {what} {twice[0]!r}")
    return study


def plan(study: Study, entries: Sequence[Entry], seeds: Sequence[int], device: str = "cpu") -> list[Planned]:
    """List all units: slice by slice, so that data and coil maps are made once; methods inmost."""
    units = []
    kind = torch.device(device).type  # which of several alike GPUs it is makes no difference
    for volume in study.volumes:
        for index in volume.slices:
            for condition in study.conditions:
                data = study.identity(volume, index, condition)
                for entry in entries:
                    # A method that draws nothing gives the same image whatever the seed.
                    for seed in seeds if entry.method.needs_seed else seeds[:1]:
                        what = {
                            "modality": study.modality,
                            "data": data,
                            "targets": sorted(study.meanings) if entry.kind.startswith("oracle-") else None,
                            "method": entry.identity,
                            "device": kind,
                            "seed": seed if entry.method.needs_seed else None,
                        }
                        units.append(Planned(volume, index, condition, entry, seed, what, key_of(what)))
    return units


def outstanding(units: Sequence[Planned], store: Store, fresh: Collection[str] = ()) -> list[Planned]:
    """Units that are not stored, or whose method is to be run anew and was run by other code."""
    return [
        unit
        for unit in units
        if not store.has(unit.key)
        or (unit.entry.name in fresh and store.facts(unit.key).get("code") != code_digest())
    ]


def run_units(
    study: Study,
    units: Sequence[Planned],
    store: Store,
    *,
    device: str = "cpu",
    on_unit: Callable[[Planned], None] = lambda unit: None,
    on_done: Callable[[Planned, str | None], None] = lambda unit, failure: None,
) -> dict[str, str]:
    """Run units one after the other; one that fails does not stop the others.

    Parameters
    ----------
    study : Study
        Where the data are.
    units : sequence of Planned
        What to run.
    store : Store
        Where finished units go.
    device : str
        Where methods compute, whose memory is measured.
    on_unit, on_done : callable
        Called before and after every unit, the second with the reason if it failed.

    Returns
    -------
    dict of str to str
        Label of a unit -> why it failed.
    """
    failures: dict[str, str] = {}
    for unit in units:
        on_unit(unit)
        failure = None
        try:
            store.write(unit.key, unit.what, run_unit(study, unit, device))
        except (OperatorError, PriorError, ReconError) as error:
            failure = str(error)
        except Exception as error:
            # Methods are other people's code too: whatever it is, the other units have nothing to do with it.
            failure = f"{type(error).__name__}: {error}"
        if failure is not None:
            failures[unit.label] = failure
        on_done(unit, failure)
    return failures


def run_unit(study: Study, unit: Planned, device: str = "cpu") -> Unit:
    """Run one unit; loading the network and preparing the data are not part of its time.

    Of a slice of which nothing was measured nothing is reconstructed: every method gets an image of zeros.

    Raises
    ------
    ReconError
        If the method gives an image of another shape, or one that is not finite.
    """
    targets = study.targets(unit.volume, unit.index)
    shape = next(iter(targets.values())).shape
    if study.is_empty(unit.volume, unit.index):
        names = ("image", "first_sample")[: len(unit.entry.names)]
        nothing = {"nfe": 0, "num_samples": 1, "chosen": {}, "empty": True}
        return Unit({name: np.zeros(shape, np.float32) for name in names}, nothing | _circumstances(device))
    scenario = study.scenario(unit.volume, unit.index, unit.condition)
    prepare = getattr(unit.entry.method, "prepare", None)
    if prepare is not None:
        prepare()
    with Meter(device) as meter:
        made = unit.entry.method.reconstruct(scenario, unit.seed)
    images = {}
    for name, image in _images(made):
        scored = study.scored(unit.volume, image)
        if name == "std":  # it has a unit, but no zero point
            scored = scored - study.scored(unit.volume, torch.zeros_like(image))
        if scored.shape != shape:
            raise ReconError(f"an image of {scored.shape} was given, and the target has {shape}")
        if not np.isfinite(scored).all():
            raise ReconError("an image was given that is not finite")
        images[name] = scored
    facts = {
        "nfe": made.nfe,
        "num_samples": made.num_samples,
        "chosen": dict(made.chosen),
        "wall_s": meter.wall_s,
        "cpu_s": meter.cpu_s,
        "memory_mb": meter.memory_mb,
        "memory_added_mb": meter.memory_added_mb,
        "gpu_memory_mb": meter.gpu_memory_mb,
        "empty": False,
    }
    return Unit(images, facts | _circumstances(device))


def _circumstances(device: str) -> dict[str, Any]:
    """When, where and by what code a unit was made, as the page says it."""
    return {
        "code": code_digest(),
        "finished": time.time(),
        "device": device,
        "machine": machine(device),
        "versions": versions(PACKAGES),
    }


def _images(made: Reconstruction) -> Iterator[tuple[str, torch.Tensor]]:
    yield "image", made.image
    for target, image in made.per_target.items():
        yield f"image of {target}", image
    if made.first_sample is not None:
        yield "first_sample", made.first_sample
    if made.std is not None:
        yield "std", made.std
