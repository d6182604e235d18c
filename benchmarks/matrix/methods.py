"""Every method that a YAML file may name, and how it is made."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import typing
import warnings
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import classical
from benchmarks.cases import Scenario
from benchmarks.classical import best, best_images, climb
from benchmarks.ct_quality import TV_ITERATIONS, Solved, Task, best_fbp, best_tv
from benchmarks.matrix.base import Method, Reconstruction
from benchmarks.matrix.configuration import Configuration, MethodEntry
from benchmarks.matrix.study import file_digest
from priors.base import ScorePrior
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.ct import CTProblem, in_units
from recon.errors import ReconError
from recon.posterior import Posterior
from recon.sampling import reconstruct
from recon.scale import Scale
from recon.solvers import SOLVERS, make_solver, solver_class
from recon.solvers.base import Solver, settings_of
from recon.solvers.sirt import SIRT

ROWS = ("sample", "mean")
ORACLE = "chosen for each slice and target by PSNR against the target itself, an oracle, which flatters it"


class MissingError(ReconError):
    """What a method needs is not there: its weights, or a package."""


@dataclass(frozen=True)
class Shared:
    """What methods have in common; the prior is loaded when the first of them asks for it.

    Attributes
    ----------
    prior_name : str or Path
        Bundled prior, or a file.
    precision, device : str
        Of its network, and of everything that runs on a GPU.
    num_samples : int
        Of methods that do not say another number.
    folder : Path
        What paths in options are relative to.
    targets : tuple of str
        What images are held against, which an oracle looks at.
    """

    prior_name: str | Path
    precision: str
    device: str
    num_samples: int
    folder: Path
    targets: tuple[str, ...]

    @classmethod
    def of(cls, configuration: Configuration, device: str = "cpu") -> Shared:
        """Take what the file says."""
        return cls(
            configuration.prior,
            configuration.precision,
            device,
            configuration.num_samples,
            configuration.path.parent,
            configuration.targets,
        )

    @cached_property
    def prior(self) -> ScorePrior:
        """The prior."""
        return load_prior(self.prior_name, precision=self.precision, device=self.device)

    @cached_property
    def prior_digest(self) -> str:
        """Hash of the prior's file, and the precision."""
        return f"{prior_hash(prior_path(self.prior_name))} {self.precision}"


@dataclass(frozen=True, eq=False)
class Entry:
    """A method of the benchmark, ready to run.

    Attributes
    ----------
    name : str
        Of its column; that of a single sample beside the mean is :attr:`sample_name`.
    kind : str
        Its name in the registry.
    method : Method
        What runs.
    identity : dict
        JSON-ready: everything besides the data and the seed that its images depend on.
    names : tuple of str
        Columns that it fills.
    uses_prior : bool
        Whether the prior's hash is part of the identity.
    """

    name: str
    kind: str
    method: Method[Any]
    identity: dict[str, Any]
    names: tuple[str, ...]
    uses_prior: bool


# -- our own methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZeroFilled:
    """No reconstruction: for each target the zero-filled image of its own kind."""

    name: str = "zero-filled"
    settings: str = "Aᴴy with coil maps for the target `combined`, else the root sum of squares"
    needs_seed: bool = False

    def reconstruct(self, case: Scenario, seed: int) -> Reconstruction:
        """Combine what was measured."""
        problem = case.problem
        combined = problem.operator.adjoint(problem.y).abs()
        images = {t: combined if t == "combined" else problem.zero_filled for t in case.case.targets}
        return Reconstruction(problem.zero_filled, per_target=images)


@dataclass(frozen=True)
class ClassicalOracle:
    """A classical method of sigpy's at the weight, and with the maps, that suit it best."""

    name: str
    classical: classical.Method
    targets: tuple[str, ...]
    needs_seed: bool = False

    @property
    def settings(self) -> str:
        """Iterations, and how the weight is found."""
        return (
            f"sigpy, {self.classical.settings}; λ from the powers of two, and maps cropped or not, {ORACLE}"
        )

    def reconstruct(self, case: Scenario, seed: int) -> Reconstruction:
        """Climb to the best weight of every target."""
        targets = [name for name in self.targets if name in case.case.targets]
        found = best_images(self.classical, case, targets)
        images = {target: torch.from_numpy(item.image) for target, item in found.items()}
        chosen = {
            target: f"{item.weight:.2g}{' c' if item.cropped else ''}" for target, item in found.items()
        }
        return Reconstruction(images[targets[0]], chosen=chosen, per_target=images)


@dataclass(frozen=True)
class CTOracle:
    """A classical method of CT at the setting that suits it best.

    Attributes
    ----------
    name : str
        What tables call it.
    settings : str
        What is chosen.
    search : callable
        ``task -> image in HU, what was chosen``.
    """

    name: str
    settings: str
    search: Callable[[Task], tuple[Tensor, str]]
    needs_seed: bool = False

    def reconstruct(self, case: Task, seed: int) -> Reconstruction:
        """Search."""
        image, chosen = self.search(case)
        return Reconstruction(image, chosen={"truth": chosen})


def searched(best_of: Callable[[Task], Solved]) -> Callable[[Task], tuple[Tensor, str]]:
    """What `benchmarks.ct_quality` finds to be the best setting."""

    def search(task: Task) -> tuple[Tensor, str]:
        solved = best_of(task)
        return torch.from_numpy(solved.mean), solved.setting

    return search


def best_sirt(task: Task) -> tuple[Tensor, str]:
    """SIRT, stopped after 1, 2, 4 … or 4096 steps."""
    tried: dict[int, Tensor] = {}

    def evaluate(exponent: int) -> classical.Scores:
        tried[exponent] = task.reconstruct(SIRT(2**exponent)).mean
        return {"truth": {"PSNR": task.psnr(tried[exponent].cpu().numpy())}}

    chosen = best(climb(evaluate, (6,), bounds=(0, 12)), "truth")
    return tried[chosen], f"{2**chosen} steps"


@dataclass(frozen=True, eq=False)
class Sampled:
    """A solver of `recon.solvers`, with or without a prior.

    Attributes
    ----------
    name : str
        What tables call it.
    solver : Solver
        With its settings.
    shared : Shared
        Where the prior is.
    num_samples : int
        Samples that are averaged.
    first : bool
        Whether the first sample is wanted too.
    """

    name: str
    solver: Solver
    shared: Shared
    num_samples: int
    first: bool

    @property
    def needs_seed(self) -> bool:
        """Classical solvers draw nothing."""
        return self.solver.needs.prior

    @property
    def settings(self) -> str:
        """Solver, settings and number of samples."""
        made = settings_of(self.solver)
        text = f"{made.pop('name')} ({', '.join(f'{key} {value}' for key, value in made.items())})"
        if not self.solver.needs.prior:
            return text
        return f"{text}, {self.num_samples} sample{'s' * (self.num_samples > 1)}"

    def prepare(self) -> None:
        """Load the prior, whose time is not that of a reconstruction."""
        if self.solver.needs.prior:
            _ = self.shared.prior

    def reconstruct(self, case: Scenario | Task, seed: int) -> Reconstruction:
        """Sample."""
        posterior = self._mri(case, seed) if isinstance(case, Scenario) else self._ct(case, seed)
        first = posterior.samples[0] if self.first and posterior.samples is not None else None
        return Reconstruction(
            posterior.mean.abs() if posterior.mean.is_complex() else posterior.mean,
            std=posterior.std if posterior.num_samples > 1 else None,
            nfe=posterior.nfe * posterior.num_samples,
            first_sample=first,
            num_samples=posterior.num_samples,
        )

    def _mri(self, case: Scenario, seed: int) -> Posterior:
        problem, device = case.problem, self.shared.device
        # `to` moves a module itself, and the methods that follow want theirs where it was.
        operator = problem.operator if device == "cpu" else deepcopy(problem.operator).to(device)
        return self._posterior(
            problem.y.to(device),
            operator,
            seed,
            key=case.case.name,
            noise_std=problem.noise_std,
        )

    def _ct(self, case: Task, seed: int) -> Posterior:
        problem: CTProblem = case.unweighted if self.solver.needs.equal_weights else case.weighted
        posterior = self._posterior(
            problem.y,
            problem.operator,
            seed,
            key=f"{case.case.name}/{case.scan}",
            noise_std=problem.noise_std,
            scale=Scale(1.0),  # what images are worth in attenuation is known
        )
        return in_units(posterior, case.settings)

    def _posterior(self, y: Tensor, operator: Any, seed: int, **options: Any) -> Posterior:
        prior = self.shared.prior if self.solver.needs.prior else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anatomy or a spread is not what is judged here
            return reconstruct(
                y,
                operator,
                prior,
                self.solver,
                self.num_samples,
                seed,
                keep_samples=self.first,
                **options,
            )


# -- the registry --------------------------------------------------------------------------------------------

Make = Callable[[str, Shared], Method[Any]]


@dataclass(frozen=True)
class Kind:
    """What a name in a YAML file stands for.

    Attributes
    ----------
    what : str
        One line for the help.
    make : callable or str
        Makes the method, of its column's name and what is shared. Or ``module:attribute`` of something that
        is imported when it is asked for, whose parameters are the method's options. Of these, `name`,
        `prior`, `prior_digest`, `device` and `num_samples` need not be given: they are the column's name and
        what the file says for all; a `Path` is looked for beside the YAML file.
    fixed : mapping
        Arguments of what is imported that come with the name.
    packages, programs : tuple of str
        Without which what is imported cannot be made.
    """

    what: str
    make: Make | str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    @property
    def absent(self) -> list[str]:
        """Packages and programs that are not installed."""
        packages = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return packages + [name for name in self.programs if shutil.which(name) is None]


def _sigpy(index: int) -> Kind:
    method = classical.METHODS[index]
    return Kind(
        f"{method.name} of sigpy at its best λ",
        lambda name, shared: ClassicalOracle(name, method, shared.targets),
    )


def _searched(settings: str, search: Callable[[Task], tuple[Tensor, str]]) -> Kind:
    return Kind(settings, lambda name, shared: CTOracle(name, f"{settings}, {ORACLE}", search))


def _deepinv(solver: str) -> Kind:
    what = f"{solver} of deepinv with our prior"
    packages = ("deepinv", "torchvision")
    return Kind(what, "benchmarks.peers.methods:DeepinvMethod", {"solver": solver}, packages)


KINDS: dict[str, dict[str, Kind]] = {
    "mri": {
        "zero-filled": Kind("what was measured, combined", lambda name, shared: ZeroFilled(name)),
        "oracle-cg-sense": _sigpy(0),
        "oracle-tv": _sigpy(1),
        "oracle-l1-wavelet": _sigpy(2),
        "unet": Kind("U-Net of fastmri", "benchmarks.supervised.methods:UNetMethod", packages=("fastmri",)),
        "varnet": Kind(
            "E2E-VarNet of fastmri", "benchmarks.supervised.methods:VarNetMethod", packages=("fastmri",)
        ),
        **{f"deepinv-{name.lower()}": _deepinv(name) for name in ("DPS", "DiffPIR", "DDRM")},
        "bart-pics": Kind(
            "`bart pics` at its best λ", "benchmarks.peers.methods:BartMethod", programs=("bart",)
        ),
    },
    "ct": {
        "oracle-fbp": _searched("filtered backprojection, its window", searched(best_fbp)),
        "oracle-tv": _searched(
            f"total variation, {TV_ITERATIONS} steps, λ of powers of two", searched(best_tv)
        ),
        "oracle-sirt": _searched("SIRT, its number of steps of powers of two", best_sirt),
        **{f"deepinv-{name.lower()}": _deepinv(name) for name in ("DPS", "DiffPIR")},
    },
}
"""Modality -> methods beside the solvers of `recon.solvers`, which go by the names of ``recon solvers``."""


def make_entry(entry: MethodEntry, modality: str, shared: Shared) -> Entry:
    """Make one method of the file.

    Raises
    ------
    MissingError
        If its weights or its package are missing.
    ReconError
        Naming file and line, if there is no such method, or an option is not known or out of its range.
    """
    kind = KINDS[modality].get(entry.method)
    try:
        if kind is None:
            return _solver_entry(entry, shared)
        if isinstance(kind.make, str):
            return _imported_entry(entry, kind, shared)
        _refuse(entry, entry.options, ())
        method = kind.make(entry.name or entry.method, shared)
    except MissingError:
        raise
    except ReconError as error:
        text = str(error)
        raise ReconError(text if text.startswith(entry.where) else f"{entry.where}: {text}") from None
    identity = {"method": entry.method, "settings": method.settings}
    return Entry(method.name, entry.method, method, identity, (method.name,), uses_prior=False)


def make_entries(
    configuration: Configuration, shared: Shared, only: Collection[str] | None = None
) -> tuple[list[Entry], dict[str, str]]:
    """Make the methods of a file.

    Parameters
    ----------
    configuration : Configuration
        The file.
    shared : Shared
        What they have in common.
    only : collection of str, optional
        Names of methods to run; others may be missing without harm.

    Returns
    -------
    entries : list of Entry
        In the order of the file.
    skipped : dict of str to str
        Name -> why an optional method was left out.

    Raises
    ------
    ReconError
        If a method cannot be made and is not optional, two have one name, or there is none of those wanted.
    """
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    known: set[str] = set()
    for wanted in configuration.methods:
        label = wanted.name or wanted.method
        try:
            made = make_entry(wanted, configuration.modality, shared)
        except MissingError as error:
            known.add(label)
            if not wanted.optional and (only is None or label in only):
                raise MissingError(f"{wanted.where}: {error}") from None
            skipped[label] = str(error)
            continue
        for name in made.names:
            if any(name in other.names for other in entries):
                raise ReconError(f"{wanted.where}: two methods are called {name!r}: give one of them a name")
        known |= {made.name, *made.names}
        entries.append(made)
    absent = [] if only is None else [name for name in only if name not in known]
    if absent:
        raise ReconError(
            f"{configuration.path}: there is no method {absent[0]!r}, but "
            f"{', '.join(entry.name for entry in entries)}"
        )
    return entries, skipped


def _refuse(entry: MethodEntry, given: Collection[str], known: Collection[str]) -> None:
    for option in given:
        if option not in known:
            text = f"its options are {', '.join(known)}" if known else "it has none"
            raise ReconError(f"{entry.where}: {entry.method} has no option {option!r}; {text}")


def _solver_entry(entry: MethodEntry, shared: Shared) -> Entry:
    if entry.method not in SOLVERS:
        raise ReconError(
            f"there is no method {entry.method!r}; `python -m benchmarks --list-methods` lists them"
        )
    _refuse(entry, entry.options, ("preset", "settings", "num_samples", "rows"))
    settings = entry.options.get("settings", {})
    if not isinstance(settings, Mapping):
        raise ReconError(f"settings is a mapping, not {settings!r}")
    texts = {key: "none" if value is None else str(value) for key, value in settings.items()}
    preset = entry.options.get("preset")
    solver = make_solver(entry.method, preset, texts)
    if solver.needs.volume:
        raise ReconError(
            f"{entry.method} reconstructs whole volumes, and here slices are reconstructed alone"
        )
    count = entry.options.get("num_samples", shared.num_samples)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ReconError(f"num_samples is a whole number from 1, not {count!r}")
    rows = entry.options.get("rows", ["mean"])
    if not isinstance(rows, list) or not rows or any(row not in ROWS for row in rows):
        raise ReconError(f"rows is a list of {', '.join(ROWS)}, not {rows!r}")
    if not solver.needs.prior:
        if "num_samples" in entry.options or "rows" in entry.options:
            raise ReconError(f"{entry.method} draws no samples, so it has neither num_samples nor rows")
        count = 1
    if "mean" not in rows:
        count = 1  # the others would be drawn in vain
    name = entry.name or entry.method
    both = count > 1 and "sample" in rows
    names: tuple[str, ...] = (name,) if count == 1 else (f"{name}, mean of {count}",)
    if both:
        names = (sample_name(name), *names)
    identity = {"method": entry.method, "solver": settings_of(solver), "samples": count, "first": both}
    if solver.needs.prior:
        identity["prior"] = shared.prior_digest
    made = Sampled(name, solver, shared, count, both)
    return Entry(name, entry.method, made, identity, names, uses_prior=solver.needs.prior)


def sample_name(name: str) -> str:
    """What the column of one of several samples is called."""
    return f"{name}, one sample"


def _imported_entry(entry: MethodEntry, kind: Kind, shared: Shared) -> Entry:
    assert isinstance(kind.make, str)
    module, _, attribute = kind.make.partition(":")
    try:
        make = getattr(import_module(module), attribute)
    except ImportError as error:
        raise MissingError(f"{entry.method} cannot be imported: {error}") from None
    parameters = inspect.signature(make).parameters
    hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    ours: dict[str, Callable[[], Any]] = {
        "name": lambda: entry.name or entry.method,
        "prior": lambda: shared.prior,
        "prior_digest": lambda: shared.prior_digest,
        "device": lambda: shared.device,
        "num_samples": lambda: shared.num_samples,
    }
    hidden = (*kind.fixed, *(name for name in ours if name != "num_samples"), "needs_seed")
    options = [name for name in parameters if name not in hidden]
    _refuse(entry, entry.options, options)
    values = {**kind.fixed, **entry.options}
    digests = {}
    # A wrong option is said before what is missing, which may be left out.
    for name, value in entry.options.items():
        _check_type(entry.method, name, value, hints.get(name))
    for name, value in entry.options.items():
        if _is_path(hints.get(name)):
            path = shared.folder / value
            if not path.is_file():
                raise MissingError(f"{entry.method}: {name}: there is no file {value}")
            values[name], digests[name] = path, file_digest(path)
    for name, parameter in parameters.items():
        if name not in values and name not in ours and parameter.default is parameter.empty:
            raise ReconError(f"{entry.method} needs the option {name}")
    if kind.absent:
        raise MissingError(f"{entry.method} needs what is not installed: {', '.join(kind.absent)}")
    values = {name: ours[name]() for name in parameters if name in ours} | values
    try:
        method: Method[Any] = make(**values)
    except ImportError as error:
        raise MissingError(f"{entry.method}: {error}") from None
    except ReconError as error:  # weights of another network, a number out of its range
        raise ReconError(f"{entry.method}: {error}") from None
    identity = {
        "method": entry.method,
        "options": {k: str(v) for k, v in entry.options.items() if k not in digests},
        "files": digests,
        "settings": method.settings,
    }
    uses_prior = bool({"prior", "prior_digest"} & parameters.keys())
    if uses_prior:
        identity["prior"] = shared.prior_digest
    if "num_samples" in parameters:
        identity["samples"] = values["num_samples"]
    return Entry(method.name, entry.method, method, identity, (method.name,), uses_prior)


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in typing.get_args(hint)


TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text", (str,)),
    Path: ("the name of a file", (str,)),
}
"""Type of a parameter -> what a file has to give for it."""


def _check_type(method: str, name: str, value: Any, hint: Any) -> None:
    """Refuse an option of another type than the parameter's."""
    known = [kind for kind in (typing.get_args(hint) or (hint,)) if kind in TYPES]
    taken = {kind for expected in known for kind in TYPES[expected][1]}
    if known and type(value) not in taken:  # true is an int, but no number
        what = " or ".join(TYPES[expected][0] for expected in known)
        raise ReconError(f"{method}: {name} is {what}, not {value!r}")


def described() -> str:
    """List of all methods for the command line."""
    lines = []
    for modality, kinds in KINDS.items():
        lines.append(f"{modality.upper()}:")
        lines += [f"  {name:<20}{kind.what}" for name, kind in kinds.items()]
    lines.append(
        "Both, with the options preset, settings, num_samples, rows (`recon solvers` explains them):"
    )
    lines.append("  " + ", ".join(name for name in SOLVERS if not solver_class(name).needs.volume))
    return "\n".join(lines)
