"""Denoising score matching on patches: data augmentation, loop, validation, resume."""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.base import Contract
from priors.errors import PriorError
from priors.level import image_level
from priors.network import DenoisingUNet, NetworkPrior, NetworkSettings

VALIDATION_SIGMAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Noise levels at which denoising is validated and, at the end, tabulated in the contract."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a prior is trained.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to zero over the last ``decay``
    steps; so a run can be lengthened by resuming it with larger ``steps``.
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


def prepare_slices(volumes: Sequence[Tensor], level: float) -> list[Tensor]:
    """Cut magnitude volumes ``(S, H, W)`` into slices at the prior's level, leaving out nearly empty ones.

    Raises
    ------
    PriorError
        If a volume has another number of axes or values that are not finite, or every slice is empty.
    """
    slices = []
    for number, volume in enumerate(volumes):
        if volume.ndim != 3:
            raise PriorError(f"volume {number} has shape {tuple(volume.shape)}, expected (slices, H, W)")
        if not bool(torch.isfinite(volume).all()):
            raise PriorError(f"volume {number} holds values that are not finite")
        energy = (volume.double() ** 2).sum((-2, -1))
        for index in torch.nonzero(energy > 0.05 * energy.max()).flatten().tolist():
            image = volume[index].float()
            slices.append(image * (level / float(image_level(image))))
    if not slices:
        raise PriorError("there is no image to train on: every slice is empty")
    return slices


def _smooth_field(shape: tuple[int, int, int], cycles: float, generator: torch.Generator) -> Tensor:
    """Random smooth fields ``(B, n, n)`` of unit variance made of a few plane waves."""
    batch, height, width = shape
    waves = 6
    frequency = cycles * torch.randn((2, batch, waves, 1, 1), generator=generator)
    phase = 2 * math.pi * torch.rand((batch, waves, 1, 1), generator=generator)
    y = torch.linspace(-0.5, 0.5, height)[:, None]
    x = torch.linspace(-0.5, 0.5, width)
    arguments = 2 * math.pi * (frequency[0] * y + frequency[1] * x) + phase
    return arguments.cos().sum(1) * math.sqrt(2 / waves)


def sample_patches(slices: Sequence[Tensor], batch: int, patch: int, generator: torch.Generator) -> Tensor:
    """Draw augmented complex patches from magnitude slices.

    Rotation by any angle, flips, zoom 0.65-1.5 (anisotropic by up to 10 %), gamma, brightness, a smooth bias
    field, and a smooth random phase with a random global one.

    Returns
    -------
    Tensor
        ``(batch, patch, patch)``, complex64.
    """

    def uniform(low: float, high: float, size: int = batch) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-math.pi, math.pi)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zoom = torch.exp(uniform(math.log(0.65), math.log(1.5)))
    stretch = uniform(0.95, 1.05)
    out = torch.empty(batch, patch, patch)
    for item in range(batch):
        image = slices[int(torch.randint(len(slices), (1,), generator=generator))]
        height, width = image.shape
        # Centre the patch on a pixel of the object where a few tries find one, so that few patches are air.
        pixel = int(torch.randint(height * width, (1,), generator=generator))
        for _ in range(4):
            if image.view(-1)[pixel] > 0.05:
                break
            pixel = int(torch.randint(height * width, (1,), generator=generator))
        row, column = divmod(pixel, width)
        centre = torch.tensor([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1])
        cos, sin = math.cos(float(angle[item])), math.sin(float(angle[item]))
        sx, sy = float(zoom[item] * stretch[item]), float(zoom[item] / stretch[item])
        rotation = torch.tensor(
            [
                [cos * sx * patch / width, -sin * sy * patch / width],
                [sin * sx * patch / height, cos * sy * patch / height],
            ]
        )
        rotation[:, 0] *= flip[item]
        theta = torch.cat([rotation, centre[:, None]], dim=1)[None]
        grid = F.affine_grid(theta, [1, 1, patch, patch], align_corners=False)
        out[item] = F.grid_sample(image[None, None], grid, mode="bicubic", align_corners=False)[0, 0]
    magnitude = out.clamp_min(0)
    gamma = torch.exp(uniform(-0.3, 0.3))[:, None, None]
    magnitude = 0.5 * (magnitude / 0.5) ** gamma
    brightness = torch.exp(0.25 * torch.randn(batch, generator=generator))[:, None, None]
    shape = (batch, patch, patch)
    bias = torch.exp(uniform(0, 0.4)[:, None, None] * _smooth_field(shape, 0.4, generator))
    phase = uniform(0, 2.5)[:, None, None] * _smooth_field(shape, 0.6, generator)
    phase = phase + uniform(-math.pi, math.pi)[:, None, None]
    return torch.polar(magnitude * brightness * bias, phase)


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
    channels = torch.view_as_real(clean).permute(0, 3, 1, 2).contiguous()
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
        Clean images ``(N, n, n)``, complex.
    sigmas
        Noise levels.
    seed
        Of the noise.
    foreground
        Over the pixels of objects alone, not those of air, which are easy and would dilute the error.
    """
    counted = patches.abs() > FOREGROUND * prior.contract.level if foreground else torch.ones(patches.shape)
    errors = []
    for index, sigma in enumerate(sigmas):
        generator = torch.Generator().manual_seed(seed + index)
        total = 0.0
        for chunk, weight in zip(patches.split(8), counted.split(8), strict=True):
            noise = torch.complex(
                torch.randn(chunk.shape, generator=generator), torch.randn(chunk.shape, generator=generator)
            )
            residual = (prior.denoise(chunk + sigma * noise, sigma) - chunk).abs().square()
            total += float((residual * weight).sum())
        errors.append(math.sqrt(total / (2 * float(counted.sum()))))
    return errors


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of a step: warm-up, plateau, linear decay to zero at the end."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    fall = min(1.0, (settings.steps - step) / max(settings.decay, 1))
    return settings.learning_rate * rise * fall


def train(
    slices: Sequence[Tensor],
    validation: Sequence[Tensor],
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
    slices, validation
        Magnitude images from :func:`prepare_slices`.
    settings
        How to train; on resume the network's shape must be the stored one.
    folder
        Receives ``state.pt`` (weights, average, optimiser, step) and ``curve.jsonl`` (one line a validation).
    on_step
        Called with ``(step, loss)`` after every step.
    initial
        Prior whose weights the training starts from instead of random ones, to go on with it or to adapt it
        to other images; its network's shape must be that of the settings. A stored state goes first.

    Returns
    -------
    NetworkPrior
        The averaged (EMA) weights, with the error table measured on the validation images.

    Raises
    ------
    PriorError
        If there are no images, the folder cannot be written or holds another network's training or a damaged
        state, `initial` is another network, or the loss stops being finite.
    """
    if not slices or not validation:
        raise PriorError("training needs images to train on and images to validate on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PriorError(f"cannot make the training's folder {folder}: {error}") from None
    contract = Contract(
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        level=settings.level,
        size_multiple=settings.network.size_multiple,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is none of ours
        torch.manual_seed(settings.seed)
        prior = NetworkPrior(DenoisingUNet(settings.network), contract, settings.precision)
    if initial is not None:
        if initial.network.settings != settings.network:
            raise PriorError(
                f"prior {initial.contract.name!r} is the network {initial.network.settings}, cannot start "
                f"the training of {settings.network}"
            )
        prior.network.load_state_dict(initial.network.state_dict())
    average = copy.deepcopy(prior)
    optimiser = torch.optim.AdamW(
        prior.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    generator = torch.Generator().manual_seed(settings.seed + 1)
    held_out = sample_patches(validation, 32, settings.patch, generator)
    step, spent = _restore(folder / "state.pt", prior, average, optimiser, settings)
    started = time.monotonic()
    while step < settings.steps:
        generator.manual_seed((settings.seed << 32) + step)
        clean = sample_patches(slices, settings.batch, settings.patch, generator)
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
