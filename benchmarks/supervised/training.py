"""The trainer: one example after the other, validated on held-out patients, resumed at any time."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.supervised.data import Example, Simulation, SliceSet, draw_example, validation_examples
from benchmarks.supervised.methods import calibration_data, run_varnet, unet_image
from benchmarks.supervised.networks import (
    Configuration,
    VarNetConfiguration,
    build,
    read_weights,
    store,
    write_weights,
)
from operators.fft import ifftc
from recon.errors import ReconError
from recon.metrics import psnr, ssim

LOSSES = ("ssim", "l1", "ssim+l1")
SSIM_WINDOW = 7


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    The learning rate rises over `warmup` steps, stays, and falls linearly to zero over the last `decay`, so
    that a training can be lengthened by resuming it with more steps.

    Attributes
    ----------
    configuration : VarNetConfiguration or UNetConfiguration
        Network and size.
    simulation : Simulation
        How examples are made.
    loss : str
        ``ssim`` (1 − SSIM, as the VarNet was published), ``l1`` (as the U-Net was) of images over their peak,
        or ``ssim+l1``, their sum with the second four times.
    steps, batch : int
        Steps, and examples in each.
    learning_rate : float
        Of Adam, on the plateau.
    warmup, decay : int
        Steps.
    precision : str
        ``bf16`` (autocast of convolutions; Fourier transforms stay single precision) or ``fp32``.
    seed : int
        Of everything drawn.
    validation_slices : int
        Held-out slices, whole, on which PSNR and SSIM are taken.
    validate_every, save_every : int
        Steps.

    Raises
    ------
    ReconError
        If a setting is out of its range.
    """

    configuration: Configuration
    simulation: Simulation = field(default_factory=Simulation)
    loss: str = "ssim+l1"
    steps: int = 2400
    batch: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: int = 1200
    precision: str = "bf16"
    seed: int = 0
    validation_slices: int = 4
    validate_every: int = 300
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "validation_slices", "validate_every", "save_every"):
            if not getattr(self, name) > 0:
                raise ReconError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup < 0 or not 0 <= self.decay <= self.steps:
            raise ReconError(
                f"warmup ({self.warmup}) must not be negative, and decay ({self.decay}) from 0 to the number "
                f"of steps ({self.steps})"
            )
        if self.loss not in LOSSES:
            raise ReconError(f"unknown loss {self.loss!r}; the losses are {', '.join(LOSSES)}")
        if self.precision not in ("bf16", "fp32"):
            raise ReconError(f"precision is bf16 or fp32, not {self.precision!r}")


def predict(network: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """Image ``(H, W)`` that a network makes of an example, and what is added to the loss.

    Of a VarNet, that is the part of the calibration data's energy that its sensitivities S do not explain,
    ``‖(I − S Sᴴ) c‖² / ‖c‖²`` with the low-resolution coil images c. Without it, sensitivities are learned
    through all cascades and late.
    """
    if not hasattr(network, "sens_net"):
        return unet_image(network, example.zero_filled), torch.zeros(())
    output = run_varnet(network, example.kspace, example.mask)
    low = ifftc(calibration_data(example.kspace, example.mask))
    left = low - output.maps * (output.maps.conj() * low).sum(0)
    return output.combined, left.abs().square().sum() / low.abs().square().sum().clamp_min(1e-20)


def image_loss(kind: str, image: Tensor, target: Tensor, peak: float) -> Tensor:
    """Loss of an image ``(H, W)``, by the names of `Training.loss`."""
    image, target = image / peak, target / peak
    terms = []
    if "ssim" in kind:
        terms.append(1 - structural_similarity(image, target))
    if "l1" in kind:
        terms.append((image - target).abs().mean() * (1.0 if kind == "l1" else 4.0))
    return torch.stack(terms).sum()


def structural_similarity(image: Tensor, target: Tensor) -> Tensor:
    """Mean SSIM of images ``(H, W)`` of range 1: 7 × 7 uniform window, sample covariances, no padding.

    Wang et al., IEEE Trans. Image Process. 13, 600, 2004, with the constants of `recon.metrics.ssim`.
    """
    planes = torch.stack([image, target, image * image, target * target, image * target])[:, None]
    mean_i, mean_t, square_i, square_t, product = F.avg_pool2d(planes, SSIM_WINDOW, stride=1)[:, 0]
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variances = sample * (square_i - mean_i**2 + square_t - mean_t**2)
    covariance = sample * (product - mean_i * mean_t)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_i * mean_t + c1) * (2 * covariance + c2)
    return (numerator / ((mean_i**2 + mean_t**2 + c1) * (variances + c2))).mean()


def train(
    slices: SliceSet,
    validation: SliceSet,
    settings: Training,
    out: Path,
    *,
    initial: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_validation: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train a network, or go on with the training that lies beside `out`.

    Every example depends on the seed and its number alone: on one thread, a training that was interrupted
    ends with the weights of one that was not.

    Parameters
    ----------
    slices, validation : SliceSet
        What to learn from, and slices of other patients.
    settings : Training
        How; on resume, only the numbers of steps and how often is validated and saved may differ.
    out : Path
        File of weights, ``NAME.pt``, written at every validation. Beside it ``NAME.state.pt``, from which is
        resumed, and ``NAME.curve.jsonl``, one line a validation.
    initial : Path, optional
        File of weights of the same configuration to start from instead of random ones.
    on_step : callable, optional
        Called with step and loss after each step.
    on_validation : callable, optional
        Called with each line of the curve.
    stop : callable, optional
        Asked between two steps; if true, the state is stored and the training ends.

    Returns
    -------
    int
        The step that was reached.

    Raises
    ------
    ReconError
        If the state is another training's or damaged, `initial` is no such network, the folder cannot be
        written, or the loss is not finite.
    """
    state_file, curve = out.with_suffix(".state.pt"), out.with_suffix(".curve.jsonl")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReconError(f"cannot make the folder {out.parent}: {error}") from None
    with torch.random.fork_rng(devices=[]):  # the caller's random state is none of ours
        torch.manual_seed(settings.seed)
        network = build(settings.configuration)
    facts = _facts(settings, slices, validation)
    if initial is not None:
        weights = read_weights(initial)
        if weights.configuration != settings.configuration:
            raise ReconError(f"{initial} is a {weights.configuration}, not a {settings.configuration}")
        network.load_state_dict(weights.state)
        facts["initial"] = {"digest": weights.digest, **weights.training}
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    step, spent = _resume(state_file, network, optimiser, facts)
    _cut_curve(curve, step)
    held_out = validation_examples(validation, settings.simulation, settings.validation_slices)
    started = time.monotonic()

    def seconds() -> float:
        return round(spent + time.monotonic() - started, 1)

    def save() -> None:
        content = {
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": seconds(),
            "facts": json.dumps(facts),
        }
        store(state_file, content)

    while step < settings.steps and not stop():
        loss = _step(network, optimiser, slices, settings, step)
        step += 1
        if on_step is not None:
            on_step(step, loss)
        last = step == settings.steps
        if step % settings.validate_every == 0 or last:
            line = {"step": step, "seconds": seconds(), "loss": loss, **scores(network, held_out)}
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            write_weights(out, network, facts | {"step": step, "seconds": seconds()})
            if on_validation is not None:
                on_validation(line)
        if step % settings.save_every == 0 or last or stop():
            save()
    if step == settings.steps and not out.exists():  # it was complete, and its weights were taken away
        write_weights(out, network, facts | {"step": step, "seconds": seconds()})
    return step


def scores(network: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """Mean PSNR and SSIM over whole slices, of the network and of the zero-filled images."""
    network.eval()
    made = []
    with torch.no_grad():
        for example in examples:
            target = example.target[None].numpy()
            made.append(
                [
                    metric(target, image[None].numpy())
                    for image in (predict(network, example)[0], example.zero_filled)
                    for metric in (psnr, ssim)
                ]
            )
    network.train()
    means = torch.tensor(made, dtype=torch.float64).mean(0).tolist()
    names = ("PSNR", "SSIM", "zero-filled PSNR", "zero-filled SSIM")
    return {name: round(mean, 4) for name, mean in zip(names, means, strict=True)}


def learning_rate(step: int, settings: Training) -> float:
    """Learning rate of a step: warm-up, plateau, linear decay to zero."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    fall = min(1.0, (settings.steps - step) / max(settings.decay, 1))
    return settings.learning_rate * rise * fall


def _step(
    network: nn.Module, optimiser: torch.optim.Adam, slices: SliceSet, settings: Training, step: int
) -> float:
    """One step of Adam; returns the mean loss of its examples."""
    network.train()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimiser.zero_grad()
    total = 0.0
    for number in range(settings.batch):
        # Examples are of different sizes, so a batch is made of their gradients.
        example = draw_example(slices, settings.simulation, settings.seed, step * settings.batch + number)
        with _autocast(settings.precision):
            image, unexplained = predict(network, example)
        loss = image_loss(settings.loss, image, example.target, example.peak) + unexplained
        (loss / settings.batch).backward()
        total += float(loss.detach()) / settings.batch
    if not math.isfinite(total):
        raise ReconError(f"the training loss is not finite at step {step}; lower the learning rate")
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return total


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


def _facts(settings: Training, slices: SliceSet, validation: SliceSet) -> dict[str, Any]:
    """What a training is, JSON-ready: its settings, and of its data what tells them apart."""
    facts = {
        "model": settings.configuration.model,
        **asdict(settings),
        "slices": len(slices),
        "data": slices.digest,
        "validation_data": validation.digest,
        "target": "root sum of squares of the coil images before noise",
    }
    if isinstance(settings.configuration, VarNetConfiguration):
        facts["output"] = "coil images combined with the network's sensitivities"
    return json.loads(json.dumps(facts))


_MAY_CHANGE = ("steps", "decay", "validate_every", "save_every", "validation_slices", "validation_data")


def _resume(
    path: Path, network: nn.Module, optimiser: torch.optim.Adam, facts: dict[str, Any]
) -> tuple[int, float]:
    """Load a stored state if there is one; returns the step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        stored = json.loads(state["facts"])
        differ = [
            name
            for name in sorted({*facts, *stored})
            if name not in _MAY_CHANGE and stored.get(name) != facts.get(name)
        ]
        if not differ:
            network.load_state_dict(state["network"])
            optimiser.load_state_dict(state["optimiser"])
            return int(state["step"]), float(state["seconds"])
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise ReconError(f"{path} holds no training that can be resumed: {error}") from None
    told = "; ".join(f"{name} {stored.get(name)} there, {facts.get(name)} here" for name in differ)
    raise ReconError(f"{path} is the state of another training ({told}): choose another --out, or remove it")


def _cut_curve(path: Path, step: int) -> None:
    """Drop what was validated after the state that is resumed, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
