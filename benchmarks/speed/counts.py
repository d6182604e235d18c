"""What a reconstruction costs, in counts that no clock is needed for: the same on every machine.

A small problem and a prior in closed form. Work of FFTs, tensor operations (each a launch on a GPU), waits
for the device, noise that is drawn, memory that grows with the samples, modules that an import loads. A
regression of speed that is one of work shows here, whatever else the machine does.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.imports import STATEMENTS, imported, others_of, ours_of
from benchmarks.speed.settings import Scan, phantom, scan
from benchmarks.speed.timing import NETWORK, NOISE, OPERATOR, Parts, watched
from operators.mri import MulticoilMRI
from priors.base import ScorePrior
from priors.gaussian import GaussianPrior
from recon.mri import SliceProblem
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers.base import KeyedNoise, Problem, Solver
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS
from recon.solvers.score_mri import ScoreMRI

SIZE, COILS = 64, 4
CPU = torch.device("cpu")


class OperationCounter(TorchDispatchMode):
    """Counts tensor operations, FFT work and waits for the device while it is entered.

    Attributes
    ----------
    operations : int
        Operations that reach a device; views cost nothing and are left out.
    waits : int
        Numbers that are read from tensors, for which a GPU has to finish first.
    fft_work : float
        ``n log2 L`` summed over FFTs of n points along axes of lengths of product L.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits = 0
        self.fft_work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and do it."""
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not func.is_view:
            self.operations += 1
        if name.startswith("_fft_"):
            x, dims = args[0], args[1]
            self.fft_work += x.numel() * math.log2(math.prod(x.shape[dim] for dim in dims))
        return func(*args, **(kwargs or {}))


def transform_pair(coils: int, height: int, width: int) -> float:
    """FFT work of two transforms of all coil images, the unit of the counts below."""
    return 2 * coils * height * width * math.log2(height * width)


def example(points: bool = False) -> tuple[Scan, SliceProblem, GaussianPrior]:
    """A small slice, the problem that it poses, and a prior of independent pixels, which needs no FFT."""
    one = scan(phantom((SIZE, SIZE)), COILS, CPU, center_fraction=0.25)
    ready = one.problem()
    if points:
        assert isinstance(ready.operator, MulticoilMRI)
        mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
        operator = MulticoilMRI(ready.operator.maps, mask)
        ready = replace(ready, y=ready.y * mask, operator=operator)
    mean = torch.zeros(SIZE, SIZE, dtype=torch.complex64)
    return one, ready, GaussianPrior(mean, variance=0.1)


@dataclass(frozen=True)
class SamplerCounts:
    """Counts of one sample: network evaluations, and over their number all else."""

    evaluations: int
    fft: float
    operations: float
    waits: float
    noise: float
    normals: float


def count_sampler(solver: Solver, ready: SliceProblem, prior: ScorePrior, nfe: int) -> SamplerCounts:
    """Count what one sample takes, with what a problem computes once.

    Parameters
    ----------
    solver
        That makes ``nfe`` network evaluations.
    ready
        A small problem with several coils.
    prior
        One without FFTs.
    nfe
        What the counts are divided by.
    """
    scale = Scale.estimate(ready.y, ready.operator, prior.contract.level)
    problem = Problem(scale.apply(ready.y), ready.operator, ready.noise_std / scale.factor)
    noise = KeyedNoise(0, "count", [0], ready.operator.domain_shape, ready.y.dtype, CPU)
    parts = Parts(CPU)
    with torch.no_grad(), watched(parts, solver, prior, ready.operator), OperationCounter() as counter:
        solver.sample(problem, prior, noise)
    coils, height, width = ready.operator.range_shape
    return SamplerCounts(
        parts.entries.get(NETWORK, 0),
        counter.fft_work / transform_pair(coils, height, width) / nfe,
        counter.operations / nfe,
        counter.waits / nfe,
        parts.entries.get(NOISE, 0) / nfe,
        parts.entries.get(OPERATOR, 0) / nfe,
    )


def count_normal(ready: SliceProblem) -> float:
    """FFT work of one ``A.normal`` in pairs of two-dimensional transforms of all coils."""
    x = torch.ones(ready.operator.domain_shape, dtype=ready.y.dtype)
    with torch.no_grad(), OperationCounter() as counter:
        ready.operator.normal(x)
    return counter.fft_work / transform_pair(*ready.operator.range_shape)


def count_slice(one: Scan, prior: ScorePrior, solver: DDS) -> float:
    """FFT work of a whole slice, from k-space to image, over that of its sampler alone."""
    with OperationCounter() as whole:
        ready = one.problem()
        reconstruct(ready.y, ready.operator, prior, solver, noise_std=ready.noise_std, micro_batch=1)
    pair = transform_pair(*ready.operator.range_shape)
    return whole.fft_work / pair / count_sampler(solver, ready, prior, 1).fft


class TensorKeeper(TorchDispatchMode):
    """Knows the tensors that were made while it is entered, and how much memory those hold that are left."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation and remember what it gives."""
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._made.append(weakref.ref(item))
        return result

    def held(self) -> int:
        """Bytes of the tensors that are left, storage that several share counted once."""
        self._made = [one for one in self._made if one() is not None]
        storages = {}
        for one in self._made:
            tensor = one()
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def most_held(ready: SliceProblem, prior: ScorePrior, solver: Solver, samples: int, **more: Any) -> int:
    """Most bytes that a reconstruction's tensors hold between its steps and at its end."""
    held = []
    with TensorKeeper() as keeper:
        posterior = reconstruct(
            ready.y,
            ready.operator,
            prior,
            solver,
            samples,
            noise_std=ready.noise_std,
            micro_batch=1,
            on_progress=lambda done, total: held.append(keeper.held()),
            **more,
        )
        held.append(keeper.held())
    del posterior
    return max(held)


def memory_growth(ready: SliceProblem, prior: ScorePrior, solver: Solver, **more: Any) -> float:
    """What eight samples hold more than two, in images of the sample's size."""
    two, eight = (most_held(ready, prior, solver, count, **more) for count in (2, 8))
    image = math.prod(ready.operator.domain_shape) * ready.y.element_size()
    return (eight - two) / image


@contextmanager
def _one_thread() -> Iterator[None]:
    # The blocks of coils that an operator works on depend on the number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_counts() -> dict[str, float]:
    """All counts by name; `bounds.yaml` has the most that each may be."""
    with _one_thread():
        one, ready, prior = example()
        _, points, _ = example(points=True)
        counts = {
            "normal, columns: FFT": count_normal(ready),
            "normal, points: FFT": count_normal(points),
            "slice over sampler: FFT": count_slice(one, prior, DDS(nfe=10)),
            "memory: images, 8 samples over 2": memory_growth(ready, prior, DDS(nfe=3)),
        }
        solvers: dict[str, tuple[Solver, int]] = {
            "DDS": (DDS(nfe=10), 10),
            "DPS": (DPS(nfe=10), 10),
            "ScoreMRI": (ScoreMRI(steps=5), 10),
        }
        for name, (solver, nfe) in solvers.items():
            found = count_sampler(solver, ready, prior, nfe)
            counts |= {
                f"{name}: network evaluations over NFE": found.evaluations / nfe,
                f"{name}: FFT": found.fft,
                f"{name}: operator": found.normals,
                f"{name}: tensor operations": found.operations,
                f"{name}: waits": found.waits,
                f"{name}: noise images": found.noise,
            }
    for label, name, given in (
        ("import recon", "recon", "pass"),
        ("first script beside torch", "a first script", "import torch"),
    ):
        modules = imported(STATEMENTS[name], given)
        counts[f"{label}: modules"] = len(ours_of(modules))
        counts[f"{label}: packages of others"] = len(others_of(modules))
    return counts
