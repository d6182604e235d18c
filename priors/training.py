"""Denoising score matching on patches: loop, validation, resume.

What the images are, and how they are varied, is said by an :class:`ImageSource`; each kind has a module of
its own (:mod:`priors.mr_images`, :mod:`priors.ct_images`, :mod:`priors.disc_images`,
:mod:`priors.plain_images`).

Several processes train together if ``torch.distributed`` has been initialised: each draws a batch of its own,
gradients are averaged (Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
VLDB 2020), and the first writes.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings

VALIDATION_SIGMAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Noise levels at which denoising is validated and, at the end, tabulated in the contract."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a prior is trained.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to zero over the last ``decay``
    steps; so a run can be lengthened by resuming it with larger ``steps``. The defaults are those of complex
    MR images; ``unit`` and ``level`` go into the contract. The network's channels say what images are: one
    a slice for real ones, two for complex ones, of ``slices`` neighbouring slices.

    Raises
    ------
    PriorError
        If a setting is out of its range, or the network has another number of channels.
    """

    steps: int = 12000
    batch: int = 8
    patch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 300
    decay: int = 3000
    ema: float = 0.9995
    seed: int = 0
    precision: str = "bf16"
    level: float = 0.3
    unit: str = "level"
    sigma_centre: float = 0.1
    sigma_spread: float = 1.4
    sigma_min: float = 0.002
    sigma_max: float = 20.0
    validate_every: int = 500
    save_every: int = 250
    slices: int = 1
    network: NetworkSettings = field(default_factory=NetworkSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patch", "learning_rate", "validate_every", "save_every", "slices"):
            if getattr(self, name) <= 0:
                raise PriorError(f"training setting {name} must be positive, got {getattr(self, name)}")
        if self.decay > self.steps:
            raise PriorError(f"decay ({self.decay}) is longer than the training ({self.steps} steps)")
        if self.patch % self.network.size_multiple:
            raise PriorError(f"patch {self.patch} is no multiple of {self.network.size_multiple}")
        if self.network.channels not in (self.slices, 2 * self.slices):
            raise PriorError(
                f"a network of {self.network.channels} channels fits neither real nor complex images of "
                f"{self.slices} slice{'s' * (self.slices > 1)}"
            )

    @property
    def channels(self) -> str:
        """``"real"`` or ``"complex"``: what the images are, one network channel a slice or two."""
        return "real" if self.network.channels == self.slices else "complex"


class ImageSource(Protocol):
    """Where clean images to learn from come from."""

    def __len__(self) -> int:
        """How many different images there are, before they are varied."""

    def draw(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """Draw clean images in the prior's unit, varied at random.

        Parameters
        ----------
        batch
            How many.
        size
            Their height and width.
        generator
            Where all randomness comes from.

        Returns
        -------
        Tensor
            ``(batch, size, size)``, complex64 for complex priors and float32 for real ones;
            ``(batch, K, size, size)`` for priors of K slices.
        """


@runtime_checkable
class Passing(Protocol):
    """What an image source may have besides, if it holds only some of its images at a time."""

    def seek(self, step: int) -> None:
        """Make ready for a training step; which images it can draw must follow from the step alone."""

    def forget(self) -> None:
        """Let go of the images in memory."""


def stream_seed(seed: int, index: int) -> int:
    """Seed of the generator for one of many things, drawn under a seed.

    Torch's generator on the CPU looks at the lower 32 bits alone, so both have to be in them: seeds are set
    apart by multiples of the golden ratio of the range (Knuth, The Art of Computer Programming 3, 6.4).
    """
    return (seed * 0x9E3779B1 + index) % 2**32


def rank_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what one of several processes draws at a step; the first one's is that of a process alone."""
    # Another odd multiplier, so that no process draws at one step what another draws at a later one.
    return (stream_seed(seed, step) + rank * 0x85EBCA6B) % 2**32


def draw_sigma(settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch: log-normal where it matters, one in five log-uniform over the whole range."""
    low, high = math.log(settings.sigma_min), math.log(settings.sigma_max)
    spread = settings.sigma_spread * torch.randn(settings.batch, generator=generator)
    normal = math.log(settings.sigma_centre) + spread
    flat = low + (high - low) * torch.rand(settings.batch, generator=generator)
    pick = torch.rand(settings.batch, generator=generator) < 0.2
    return torch.where(pick, flat, normal).clamp(low, high).exp()


def image_channels(images: Tensor) -> Tensor:
    """Images ``(B, H, W)`` or stacks ``(B, K, H, W)`` as a network's channels, ``(B, channels, H, W)``.

    Channels are slice by slice, real and imaginary part next to each other.
    """
    stacks = images if images.ndim == 4 else images[:, None]
    if not stacks.is_complex():
        return stacks
    return torch.view_as_real(stacks).permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()


def denoising_loss(prior: NetworkPrior, clean: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's loss ``(s^2 + d^2) / (s d)^2 |D - x0|^2``, s the noise's, d the data's (Karras et al. 2022)."""
    channels = image_channels(clean)
    return _Objective(prior)(channels, sigma, torch.randn(channels.shape, generator=generator))


class _Objective(nn.Module):
    """The loss as a module: distributed training averages the gradients of a module's ``forward``."""

    def __init__(self, prior: NetworkPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Loss of channels ``(B, channels, H, W)`` at the levels ``(B,)``, with their noise."""
        denoised = self.prior.denoise_channels(clean + sigma[:, None, None, None] * noise, sigma)
        data = self.prior.network.settings.sigma_data
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        return (weight * (denoised - clean).square().mean((1, 2, 3))).mean()


def draw_batch(
    images: ImageSource, settings: TrainingSettings, step: int, rank: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what a process learns from at a step; it depends on the seed, the step and the rank alone.

    Returns
    -------
    clean : Tensor
        ``(batch, channels, patch, patch)``.
    sigma : Tensor
        ``(batch,)``.
    noise : Tensor
        Of the shape of ``clean``.
    """
    generator = torch.Generator().manual_seed(rank_seed(settings.seed, step, rank))
    if isinstance(images, Passing):
        images.seek(step)
    clean = image_channels(images.draw(settings.batch, settings.patch, generator))
    sigma = draw_sigma(settings, generator)
    return clean, sigma, torch.randn(clean.shape, generator=generator)


FOREGROUND = 0.1
"""Magnitude, in units of the level, from which a pixel counts as object and not as air."""

_MAY_CHANGE = ("steps", "decay", "precision", "validate_every", "save_every")
"""Settings that may be others when a training is resumed."""


def _objects(patches: Tensor, level: float) -> Tensor:
    """Which pixels show an object; raises if none does."""
    shown = patches.abs() > FOREGROUND * level
    if not bool(shown.any()):
        raise PriorError(
            f"the {len(patches)} patches to measure errors on show nothing but air: take other images to "
            "validate on, or larger patches"
        )
    return shown


@torch.no_grad()
def denoising_errors(
    prior: ScorePrior, patches: Tensor, sigmas: Sequence[float], seed: int = 0, foreground: bool = False
) -> list[float]:
    """Root-mean-square error per real component of the denoiser on clean patches, one a sigma.

    Parameters
    ----------
    prior
        The denoiser.
    patches
        Clean images ``(N, n, n)``, complex or real as the prior's; stacks ``(N, K, n, n)`` for K slices.
    sigmas
        Noise levels.
    seed
        Of the noise.
    foreground
        Over the pixels of objects alone, not those of air, which are easy and would dilute the error.

    Raises
    ------
    PriorError
        If the pixels of objects alone are asked for, and there are none.
    """
    counted = _objects(patches, prior.contract.level) if foreground else torch.ones(patches.shape)
    components = 2 if patches.is_complex() else 1
    device = next((parameter.device for parameter in prior.parameters()), torch.device("cpu"))
    errors = []
    for index, sigma in enumerate(sigmas):
        generator = torch.Generator().manual_seed(seed + index)
        total = 0.0
        for chunk, weight in zip(patches.split(8), counted.split(8), strict=True):
            parts = [torch.randn(chunk.shape, generator=generator) for _ in range(components)]
            noise = torch.complex(*parts) if components == 2 else parts[0]
            denoised = prior.denoise((chunk + sigma * noise).to(device), sigma).cpu()
            residual = (denoised - chunk).abs().square()
            total += float((residual * weight).sum())
        errors.append(math.sqrt(total / (components * float(counted.sum()))))
    return errors


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of a step: warm-up, plateau, linear decay to zero at the end."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    fall = min(1.0, (settings.steps - step) / max(settings.decay, 1))
    return settings.learning_rate * rise * fall


def train(
    images: ImageSource,
    validation: ImageSource,
    settings: TrainingSettings,
    folder: Path,
    on_step: Callable[[int, float], None] | None = None,
    initial: NetworkPrior | None = None,
    *,
    on_validation: Callable[[int, NetworkPrior, Tensor], None] | None = None,
    facts: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
) -> NetworkPrior:
    """Train a prior, or go on with the training that ``folder`` holds.

    Every step draws from a generator seeded by ``(seed, step)``, so an interrupted training that is resumed
    sees the batches that an uninterrupted one would have seen; on one CPU thread it ends with the same
    weights, bit for bit. If ``torch.distributed`` has been initialised, every process of it has to call this;
    ``batch`` is then that of one process, and all must see the same ``folder``.

    Parameters
    ----------
    images, validation
        What to learn from and what to validate on, complex images or real ones as the network has two
        channels or one a slice.
    settings
        How to train. On resume only ``precision``, ``decay``, how often is validated and saved, and ``steps``
        may be others than the stored ones, and ``steps`` no fewer than were made.
    folder
        Receives ``state.pt`` (weights, average, optimiser, step, settings and facts) and ``curve.jsonl``
        (one line a validation).
    on_step
        Called with ``(step, loss)`` after every step.
    initial
        Prior whose weights the training starts from instead of random ones, to go on with it or to adapt it
        to other images; its network's shape must be that of the settings. If it has another number of
        image channels, its first and last layer are not taken over. A stored state goes first.
    on_validation
        Called by the first process after every validation with the step, the averaged prior and the
        validation images ``(N, n, n)`` or ``(N, K, n, n)``.
    facts
        What else makes a training this one, such as its images; on resume it must be as stored, as far as
        that was stored.
    device
        Where the network is; batches are drawn on the CPU.

    Returns
    -------
    NetworkPrior
        The averaged (EMA) weights, with the error table measured on the validation images.

    Raises
    ------
    PriorError
        If the folder cannot be written or holds another training or a damaged state, `initial` is another
        network, the validation images show nothing, processes are at different steps, or the loss stops being
        finite.
    """
    together = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if together else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PriorError(f"cannot make the training's folder {folder}: {error}") from None
    contract = Contract(
        channels=settings.channels,
        unit=settings.unit,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        level=settings.level,
        size_multiple=settings.network.size_multiple,
        slices=settings.slices,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is none of ours
        torch.manual_seed(settings.seed)
        prior = NetworkPrior(DenoisingUNet(settings.network), contract, settings.precision)
    if initial is not None:
        _start_from(prior, initial)
    prior.to(device)
    average = copy.deepcopy(prior)
    optimiser = torch.optim.AdamW(
        prior.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    held_out = validation.draw(32, settings.patch, torch.Generator().manual_seed(settings.seed + 1))
    if isinstance(validation, Passing):
        validation.forget()
    _objects(held_out, settings.level)  # now and not at the end, where the errors on them are tabulated
    given = dict(facts or {})
    step, spent = _restore(folder / "state.pt", prior, average, optimiser, settings, given)
    objective: nn.Module = _Objective(prior)
    if together:
        _check_same_step(step, device)
        objective = nn.parallel.DistributedDataParallel(objective)
    if rank == 0:
        _cut_curve(folder / "curve.jsonl", step)
    started = time.monotonic()
    while step < settings.steps:
        clean, sigma, noise = (tensor.to(device) for tensor in draw_batch(images, settings, step, rank))
        loss = objective(clean, sigma, noise)
        shown = _mean_of_processes(loss.detach()) if together else loss.item()
        if not math.isfinite(shown):
            raise PriorError(f"the training loss is not finite at step {step}; lower the learning rate")
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimiser.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), prior.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        step += 1
        if on_step is not None:
            on_step(step, shown)
        if rank:
            continue
        last = step == settings.steps
        if step % settings.validate_every == 0 or last:
            errors = denoising_errors(average, held_out, VALIDATION_SIGMAS)
            seconds = spent + time.monotonic() - started
            _append_line(folder / "curve.jsonl", {"step": step, "seconds": round(seconds, 1), "rmse": errors})
            if on_validation is not None:
                on_validation(step, average, held_out)
        if step % settings.save_every == 0 or last:
            seconds = spent + time.monotonic() - started
            _store(folder / "state.pt", prior, average, optimiser, step, seconds, settings, given)
    average.eval().requires_grad_(False)
    average.precision = "fp32"
    errors = denoising_errors(average, held_out, VALIDATION_SIGMAS, foreground=True)
    table = tuple(zip(VALIDATION_SIGMAS, errors, strict=True))
    average.contract = Contract.from_dict({**contract.as_dict(), "error_table": table})
    return average


def _mean_of_processes(value: Tensor) -> float:
    """Mean over all processes: what one finds out, all have to act upon."""
    total = value.clone()
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


def _check_same_step(step: int, device: str | torch.device) -> None:
    """Raise in every process if one of them resumes elsewhere than the others."""
    ends = torch.tensor([step, -step], device=device)
    distributed.all_reduce(ends, op=distributed.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise PriorError(
            f"processes that train together resume at steps from {-int(ends[1])} to {int(ends[0])}: they "
            "must all see the same folder"
        )


def _start_from(prior: NetworkPrior, initial: NetworkPrior) -> None:
    """Copy the weights of ``initial``, but the first and last layer where the image channels differ."""
    own, other = prior.network.settings, initial.network.settings
    if replace(other, channels=own.channels, sigma_data=own.sigma_data) != own:
        raise PriorError(
            f"prior {initial.contract.name!r} is the network {other}, cannot start the training of {own}"
        )
    kept = prior.network.state_dict() if own.channels != other.channels else {}
    ends = {key: value for key, value in kept.items() if key.startswith(("stem.", "head."))}
    prior.network.load_state_dict({**initial.network.state_dict(), **ends})


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``curve.jsonl``: ``step``, ``seconds`` and ``rmse``, one at each validation level.

    A line that is cut short, as by the end of the process that wrote it, ends the curve.
    """
    records: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if not isinstance(record, dict) or not {"step", "rmse"} <= set(record):
                break
            records.append(record)
    except (OSError, ValueError):  # there is none yet, or the line is cut short
        pass
    return records


def _cut_curve(path: Path, step: int) -> None:
    """Drop what was validated after the state that is resumed was stored: it will be validated again."""
    if not path.exists():
        return
    kept = [record for record in read_curve(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


def _append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _store(
    path: Path,
    prior: NetworkPrior,
    average: NetworkPrior,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    settings: TrainingSettings,
    facts: dict[str, str],
) -> None:
    state = {
        "network": prior.network.state_dict(),
        "average": average.network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "settings": json.dumps(asdict(settings)),
        "facts": json.dumps(facts),
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        # On the disk before it takes the name of the one before it, or a power cut could lose both.
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _restore(
    path: Path,
    prior: NetworkPrior,
    average: NetworkPrior,
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
    facts: dict[str, str],
) -> tuple[int, float]:
    """Load a stored training state if there is one; returns the step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        known = json.loads(state["settings"])
        stored = NetworkSettings.from_dict(known["network"])
        known |= json.loads(state.get("facts", "{}"))  # older states have none
        step, seconds = int(state["step"]), float(state["seconds"])
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise PriorError(f"{path} holds no training that can be resumed: {error}") from None
    if stored != settings.network:
        raise PriorError(f"{path} holds a training of another network, {stored}; choose another folder")
    own = {**asdict(settings), **facts}
    del own["network"]
    differ = [
        f"{name.replace('_', ' ')} {known[name]} there, {own[name]} here"
        for name in own
        if name in known and name not in _MAY_CHANGE and known[name] != own[name]
    ]
    if differ:
        raise PriorError(
            f"{path} holds another training ({'; '.join(differ)}): go on with it as it was begun, or choose "
            "another folder"
        )
    if step > settings.steps:
        raise PriorError(
            f"{path} holds a training that is at step {step} already: go on to {step} steps or more, not "
            f"{settings.steps}, or choose another folder"
        )
    prior.network.load_state_dict(state["network"])
    average.network.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return step, seconds
