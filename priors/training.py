"""Denoising score matching on patches: loop, validation, resume.

What the images are, and how they are varied, is said by an :class:`ImageSource`; each kind has a module of
its own (:mod:`priors.mr_images`, :mod:`priors.ct_images`, :mod:`priors.disc_images`).
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from priors.base import Contract
from priors.errors import PriorError
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings

VALIDATION_SIGMAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Noise levels at which denoising is validated and, at the end, tabulated in the contract."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a prior is trained.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to zero over the last ``decay``
    steps; so a run can be lengthened by resuming it with larger ``steps``. The defaults are those of complex
    MR images; ``unit`` and ``level`` go into the contract, the network's channels say what images are.
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
    network: NetworkSettings = field(default_factory=NetworkSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patch", "learning_rate", "validate_every", "save_every"):
            if getattr(self, name) <= 0:
                raise PriorError(f"training setting {name} must be positive, got {getattr(self, name)}")
        if self.decay > self.steps:
            raise PriorError(f"decay ({self.decay}) is longer than the training ({self.steps} steps)")
        if self.patch % self.network.size_multiple:
            raise PriorError(f"patch {self.patch} is no multiple of {self.network.size_multiple}")


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
            ``(batch, size, size)``, complex64 for complex priors and float32 for real ones.
        """


def stream_seed(seed: int, index: int) -> int:
    """Seed of the generator for one of many things, drawn under a seed.

    Torch's generator on the CPU looks at the lower 32 bits alone, so both have to be in them: seeds are set
    apart by multiples of the golden ratio of the range (Knuth, The Art of Computer Programming 3, 6.4).
    """
    return (seed * 0x9E3779B1 + index) % 2**32


def draw_sigma(settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch: log-normal where it matters, one in five log-uniform over the whole range."""
    low, high = math.log(settings.sigma_min), math.log(settings.sigma_max)
    spread = settings.sigma_spread * torch.randn(settings.batch, generator=generator)
    normal = math.log(settings.sigma_centre) + spread
    flat = low + (high - low) * torch.rand(settings.batch, generator=generator)
    pick = torch.rand(settings.batch, generator=generator) < 0.2
    return torch.where(pick, flat, normal).clamp(low, high).exp()


def denoising_loss(prior: NetworkPrior, clean: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's loss ``(s^2 + d^2) / (s d)^2 |D - x0|^2``, s the noise's, d the data's (Karras et al. 2022)."""
    if clean.is_complex():
        channels = torch.view_as_real(clean).permute(0, 3, 1, 2).contiguous()
    else:
        channels = clean[:, None]
    noise = torch.randn(channels.shape, generator=generator)
    denoised = prior.denoise_channels(channels + sigma[:, None, None, None] * noise, sigma)
    data = prior.network.settings.sigma_data
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return (weight * (denoised - channels).square().mean((1, 2, 3))).mean()


FOREGROUND = 0.1
"""Magnitude, in units of the level, from which a pixel counts as object and not as air."""


@torch.no_grad()
def denoising_errors(
    prior: NetworkPrior, patches: Tensor, sigmas: Sequence[float], seed: int = 0, foreground: bool = False
) -> list[float]:
    """Root-mean-square error per real component of the denoiser on clean patches, one a sigma.

    Parameters
    ----------
    prior
        The denoiser.
    patches
        Clean images ``(N, n, n)``, complex or real as the prior's.
    sigmas
        Noise levels.
    seed
        Of the noise.
    foreground
        Over the pixels of objects alone, not those of air, which are easy and would dilute the error.
    """
    counted = patches.abs() > FOREGROUND * prior.contract.level if foreground else torch.ones(patches.shape)
    components = 2 if patches.is_complex() else 1
    errors = []
    for index, sigma in enumerate(sigmas):
        generator = torch.Generator().manual_seed(seed + index)
        total = 0.0
        for chunk, weight in zip(patches.split(8), counted.split(8), strict=True):
            parts = [torch.randn(chunk.shape, generator=generator) for _ in range(components)]
            noise = torch.complex(*parts) if components == 2 else parts[0]
            residual = (prior.denoise(chunk + sigma * noise, sigma) - chunk).abs().square()
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
) -> NetworkPrior:
    """Train a prior, or go on with the training that ``folder`` holds.

    Every step draws from a generator seeded by ``(seed, step)``, so an interrupted training that is resumed
    sees the batches that an uninterrupted one would have seen.

    Parameters
    ----------
    images, validation
        What to learn from and what to validate on, complex images or real ones as the network has two
        channels or one.
    settings
        How to train; on resume the network's shape must be the stored one.
    folder
        Receives ``state.pt`` (weights, average, optimiser, step) and ``curve.jsonl`` (one line a validation).
    on_step
        Called with ``(step, loss)`` after every step.
    initial
        Prior whose weights the training starts from instead of random ones, to go on with it or to adapt it
        to other images; its network's shape must be that of the settings. If it has another number of
        image channels, its first and last layer are not taken over. A stored state goes first.

    Returns
    -------
    NetworkPrior
        The averaged (EMA) weights, with the error table measured on the validation images.

    Raises
    ------
    PriorError
        If the folder cannot be written or holds another network's training or a damaged state, `initial` is
        another network, or the loss stops being finite.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PriorError(f"cannot make the training's folder {folder}: {error}") from None
    contract = Contract(
        channels="complex" if settings.network.channels == 2 else "real",
        unit=settings.unit,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        level=settings.level,
        size_multiple=settings.network.size_multiple,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is none of ours
        torch.manual_seed(settings.seed)
        prior = NetworkPrior(DenoisingUNet(settings.network), contract, settings.precision)
    if initial is not None:
        _start_from(prior, initial)
    average = copy.deepcopy(prior)
    optimiser = torch.optim.AdamW(
        prior.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    generator = torch.Generator().manual_seed(settings.seed + 1)
    held_out = validation.draw(32, settings.patch, generator)
    step, spent = _restore(folder / "state.pt", prior, average, optimiser, settings)
    started = time.monotonic()
    while step < settings.steps:
        generator.manual_seed(stream_seed(settings.seed, step))
        clean = images.draw(settings.batch, settings.patch, generator)
        loss = denoising_loss(prior, clean, draw_sigma(settings, generator), generator)
        if not math.isfinite(loss.item()):
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
            on_step(step, loss.item())
        last = step == settings.steps
        if step % settings.validate_every == 0 or last:
            errors = denoising_errors(average, held_out, VALIDATION_SIGMAS)
            seconds = spent + time.monotonic() - started
            _append_line(folder / "curve.jsonl", {"step": step, "seconds": round(seconds, 1), "rmse": errors})
        if step % settings.save_every == 0 or last:
            seconds = spent + time.monotonic() - started
            _store(folder / "state.pt", prior, average, optimiser, step, seconds, settings)
    average.eval().requires_grad_(False)
    average.precision = "fp32"
    errors = denoising_errors(average, held_out, VALIDATION_SIGMAS, foreground=True)
    table = tuple(zip(VALIDATION_SIGMAS, errors, strict=True))
    average.contract = Contract.from_dict({**contract.as_dict(), "error_table": table})
    return average


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
) -> None:
    state = {
        "network": prior.network.state_dict(),
        "average": average.network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "settings": json.dumps(asdict(settings)),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _restore(
    path: Path,
    prior: NetworkPrior,
    average: NetworkPrior,
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
) -> tuple[int, float]:
    """Load a stored training state if there is one; returns the step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True)
        stored = NetworkSettings.from_dict(json.loads(state["settings"])["network"])
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
    prior.network.load_state_dict(state["network"])
    average.network.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), float(state["seconds"])
