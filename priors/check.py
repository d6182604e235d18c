"""Whether a prior denoises, and if not, which mistaken convention would explain it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from priors.base import Contract, ScorePrior
from priors.errors import PriorError
from priors.level import image_level
from priors.parameterisation import PREDICTIONS, FunctionPrior, denoised_weights
from priors.processes import VE, DiscreteVP, Flow, PassTime, Process, told_time

LEVELS = 7
"""Noise levels that are tried, spaced geometrically over the range that the contract declares."""

BETTER = 0.75
"""Share of its error to which another convention must bring a prior that passes otherwise."""

_SIZE = 64

_WORDS = {
    "x0": "the clean image",
    "eps": "the noise",
    "v": "the velocity v",
    "score": "the score",
}

Denoiser = Callable[[Tensor, float], Tensor]
"""Images ``(B, H, W)`` (or stacks) and a noise level to denoised images."""


@dataclass(frozen=True)
class PriorCheck:
    """What :func:`check_prior` found; prints as a report.

    Parameters
    ----------
    passed
        Whether the prior denoises as its contract says.
    findings
        What is wrong, a sentence each; empty if it passed.
    suggestions
        What would explain it, a sentence each: first the conventions under which the prior would pass, the
        likeliest first.
    table
        A row for each noise level: sigma; the rms of ``D(sigma z)`` in units of sigma, which is what is left
        of pure noise; the rms of ``D(x0) - x0``, the change of a clean image. Per real component.
    """

    passed: bool
    findings: tuple[str, ...]
    suggestions: tuple[str, ...]
    table: tuple[tuple[float, float, float], ...]

    def __str__(self) -> str:
        lines = ["passed" if self.passed else "failed"]
        lines += [f"- {finding}" for finding in self.findings]
        lines += [f"? {suggestion}" for suggestion in self.suggestions]
        lines.append(f"{'sigma':>10s} {'noise left':>12s} {'clean change':>14s}")
        lines += [f"{sigma:10.4g} {left:12.4g} {change:14.4g}" for sigma, left, change in self.table]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Probe:
    """What a denoiser made of pure noise, of a clean image and of a noisy one, ``(3, *image)``."""

    sigma: float
    given: Tensor
    denoised: Tensor


def check_prior(prior: ScorePrior, image: Tensor | None = None, *, seed: int = 0) -> PriorCheck:
    """See whether a prior denoises as its contract says; if not, find out which convention was mistaken.

    It has to take pure noise away, to leave a clean image alone at low noise, to bring a noisy image nearer
    to the clean one at every noise level, in the mean about as well at least as the best plain factor would,
    and to stay within the range of values that images have. A prior that does not is tried with the
    conventions that are most often mistaken: another meaning of the network's output (noise, score, velocity,
    image, the sign), another value range (2x - 1) or scale, time counted the other way round or told in other
    units.

    Parameters
    ----------
    prior
        Any prior. A network with random weights fails; that is a result, not an error.
    image
        ``(H, W)``, or ``(slices, H, W)``, clean and in the prior's units, of the kind that it was trained on:
        the more typical, the sharper the check. If not given, a smooth body of the contract's level,
        64 x 64.
    seed
        Of the noise.

    Returns
    -------
    PriorCheck
        With findings in words.

    Raises
    ------
    PriorError
        If the image does not fit the prior.

    Examples
    --------
    >>> import torch
    >>> from priors import GaussianPrior, check_prior
    >>> prior = GaussianPrior(torch.ones(8, 8), variance=0.05)
    >>> check_prior(prior, prior.sample(1, torch.Generator().manual_seed(0))[0]).passed
    True
    """
    contract = prior.contract
    clean = synthetic_image(contract) if image is None else _checked(image, contract)
    device = next((tensor.device for tensor in (*prior.parameters(), *prior.buffers())), clean.device)
    clean = clean.to(device)
    low, high = math.log(contract.sigma_min), math.log(contract.sigma_max)
    sigmas = [math.exp(low + (high - low) * k / (LEVELS - 1)) for k in range(LEVELS)]
    # The ends themselves, not what rounding makes of them.
    sigmas[0], sigmas[-1] = contract.sigma_min, contract.sigma_max
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((2, *clean.shape), dtype=clean.dtype, generator=generator).to(device)
    if clean.is_complex():
        z = z * math.sqrt(2)

    def probe(denoise: Denoiser) -> list[_Probe]:
        probes = []
        with torch.no_grad():
            for sigma in sigmas:
                given = torch.stack([sigma * z[0], clean, clean + sigma * z[1]])
                probes.append(_Probe(sigma, given, denoise(given, sigma)))
        return probes

    probes = probe(prior.denoise)
    table = tuple((p.sigma, _rms(p.denoised[0]) / p.sigma, _rms(p.denoised[1] - p.given[1])) for p in probes)
    findings = _judge(probes, clean)
    # Not all mistakes show by themselves, but a prior that is right is never much worse than one that is not.
    most = math.inf if findings else BETTER * _mean_error(probes, clean)
    explained: list[tuple[float, str]] = []
    candidates = [*_other_value_ranges(prior), *_other_directions(prior)]
    if findings:
        candidates += [*_other_scales(prior), *_other_times(prior)]
    tried = list(_output_meanings(prior, probes))
    for sentence, other in candidates:
        # A function may refuse a time that it does not know.
        with contextlib.suppress(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            tried.append((sentence, probe(other)))
    for sentence, others in tried:
        if not _judge(others, clean) and (error := _mean_error(others, clean)) < most:
            explained.append((error, sentence))
    if explained and not findings:
        findings.append(
            "Noise is taken away, but markedly less well than under another convention: the rms error is "
            f"{min(explained)[0] / _mean_error(probes, clean):.2f} times as large under that."
        )
    suggestions = [sentence for _, sentence in sorted(explained)]
    if findings and not suggestions:
        suggestions = [
            "None of the usual conventions explains it. If the weights came from a training checkpoint, see "
            "whether it also holds averaged (EMA) weights and whether all keys were loaded."
        ]
    return PriorCheck(not findings, tuple(findings), tuple(suggestions), table)


def synthetic_image(contract: Contract, size: int = _SIZE) -> Tensor:
    """A smooth body with organs, in the units and at the level of a contract, ``(size, size)`` or a stack.

    Returns
    -------
    Tensor
        Float32, or complex64 with a phase that varies gently; ``(slices, size, size)`` where the contract
        says so.
    """
    size = -(-size // contract.size_multiple) * contract.size_multiple
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None], axis[None]

    def blob(row: float, column: float, height: float, width: float) -> Tensor:
        radius = torch.hypot((y - row) / height, (x - column) / width)
        return torch.sigmoid((1 - radius) * min(height, width) * size / 2)

    def body(shift: float) -> Tensor:
        inside = blob(0, 0, 0.8, 0.65)
        if contract.unit == "object":
            return inside * (1 - blob(-0.2 + shift, 0.2, 0.2, 0.15)) * (1 - blob(0.3, -0.2, 0.15, 0.2))
        organs = 0.3 * blob(-0.2 + shift, 0.25, 0.3, 0.2) - 0.6 * blob(-0.1, -0.25 + shift, 0.35, 0.2)
        return inside * (1 + organs + 0.4 * blob(0.5, shift, 0.12, 0.12))

    images = torch.stack([body(0.02 * k) for k in range(contract.slices)])
    if contract.unit == "level":
        images = images * (contract.level / image_level(images).float().mean())
    if contract.complex_images:
        images = torch.polar(images, (0.6 * torch.sin(2 * x + y)).expand_as(images))
    return images if contract.slices > 1 else images[0]


def _checked(image: Tensor, contract: Contract) -> Tensor:
    if image.ndim != contract.image_ndim:
        expected = "(H, W)" if contract.image_ndim == 2 else f"({contract.slices}, H, W)"
        raise PriorError(f"check_prior takes one image {expected}, got shape {tuple(image.shape)}")
    if contract.complex_images and not image.is_complex():
        image = torch.complex(image.float(), torch.zeros_like(image, dtype=torch.float32))
    if not bool(torch.isfinite(image).all()):
        raise PriorError("the image holds values that are not finite")
    return image


def _rms(x: Tensor) -> float:
    """Root mean square per real component, in double precision."""
    wide = torch.view_as_real(x) if x.is_complex() else x
    return float(wide.double().square().mean().sqrt())


def _errors(probes: list[_Probe], clean: Tensor) -> list[float]:
    """Rms error of the denoised image at every level, in units of the noise that was there."""
    return [_rms(p.denoised[2] - clean) / p.sigma for p in probes]


def _mean_error(probes: list[_Probe], clean: Tensor) -> float:
    """Geometric mean over the levels."""
    errors = _errors(probes, clean)
    if not all(0 < error < math.inf for error in errors):
        return math.inf if any(not error < math.inf for error in errors) else 0.0
    return math.exp(sum(map(math.log, errors)) / len(errors))


def _judge(probes: list[_Probe], clean: Tensor) -> list[str]:
    """What is wrong with a denoiser, in sentences."""
    for p in probes:
        if not bool(torch.isfinite(p.denoised).all()):
            return [f"At sigma = {p.sigma:.3g} the denoiser returns values that are not finite."]
    findings = []
    size = _rms(clean)
    peak = float(clean.abs().max())
    left = [(p.sigma, _rms(p.denoised[0]) / p.sigma) for p in probes]
    # Well above the images' own size, hardly anything of what the denoiser returns can be noise.
    kept = [
        (sigma, ratio)
        for sigma, ratio in left
        if sigma >= 4 * size and ratio * sigma > 2.5 * size + 0.15 * sigma
    ]
    if kept:
        sigma, ratio = max(kept, key=lambda row: row[1])
        findings.append(
            f"Pure noise is not taken away: at sigma = {sigma:.3g} the rms of D(sigma z) is {ratio:.3g} "
            "sigma."
        )
    changes = [(p.sigma, _rms(p.denoised[1] - p.given[1])) for p in probes if p.sigma <= 0.1 * size]
    changes = changes or [(probes[0].sigma, _rms(probes[0].denoised[1] - probes[0].given[1]))]
    sigma, change = max(changes, key=lambda row: row[1] / row[0])
    if change > 1.5 * sigma:
        findings.append(
            f"A clean image does not stay as it is: at sigma = {sigma:.3g} it changes by {change:.3g} (rms), "
            "more than noise of that level would."
        )
    errors = _errors(probes, clean)
    # At the lowest level there may be little to take away, at the highest nearly all of it has to go.
    worse = [
        (p.sigma, e) for p, e in zip(probes, errors, strict=True) if e > (1.5 if p is probes[0] else 1.1)
    ]
    if worse:
        sigma, error = max(worse, key=lambda row: row[1])
        findings.append(
            f"A noisy image is not brought nearer to the clean one: at sigma = {sigma:.3g} the error is "
            f"{error:.3g} sigma."
        )
    elif errors[-1] > 0.9:
        findings.append(
            f"Hardly any noise is taken from a noisy image: at sigma = {probes[-1].sigma:.3g}, the highest "
            f"level, the error is still {errors[-1]:.3g} sigma."
        )
    # The least that a denoiser can know of images is their size; random weights do not know that.
    plain = (
        math.exp(sum(math.log(size / math.hypot(size, p.sigma)) for p in probes) / len(probes)) if size else 0
    )
    if not findings and size and _mean_error(probes, clean) > 1.1 * plain:
        findings.append(
            "It knows nothing of images: multiplying all pixels by one number, chosen for each noise level, "
            f"leaves {plain:.3g} sigma of error in the mean, this denoiser {_mean_error(probes, clean):.3g}."
        )
    if not clean.is_complex() and float(clean.min()) >= -0.05 * peak and not findings:
        findings += _out_of_range(probes, peak)
    return findings


def _out_of_range(probes: list[_Probe], peak: float) -> list[str]:
    """Whether images without negative values become clearly negative ones under noise of their own size."""
    middle = [p for p in probes if 0.3 * peak <= p.sigma <= 5 * peak]
    for p in middle:
        lowest = float(p.denoised[2].flatten().quantile(0.1))
        if lowest < -0.3 * peak - 0.1 * p.sigma:
            return [
                f"The range of values is not that of the image: at sigma = {p.sigma:.3g} a tenth of the "
                f"denoised image is below {lowest:.3g}, and the image has nothing below zero."
            ]
    return []


def _known_output(prior: ScorePrior) -> tuple[Process, tuple[str, ...]]:
    """Noise process of a prior's network, and what it may have been taken to predict."""
    process = getattr(prior, "process", None)
    predicts = getattr(prior, "predicts", None)
    if not isinstance(process, Process):
        process = VE()
    if isinstance(predicts, str) and predicts in PREDICTIONS:
        return process, ("x0" if predicts == "D" else predicts,)
    return process, tuple(_WORDS)


def _output_meanings(prior: ScorePrior, probes: list[_Probe]) -> Iterator[tuple[str, list[_Probe]]]:
    """Denoisers that follow if the network's output means something else; no evaluation is needed.

    What the network returned is known from ``D = p x + q f``, and ``D'`` follows from f under another name.
    """
    process, taken = _known_output(prior)
    low, high = prior.contract.value_range
    span = high - low

    def reread(p: _Probe, old: str, new: str, sign: float) -> _Probe:
        # In the network's own value range, in which the weights hold.
        sigma = torch.tensor(span * p.sigma, dtype=torch.float64)
        p0, q0 = (float(weight) for weight in denoised_weights(old, process, sigma))
        p1, q1 = (float(weight) for weight in denoised_weights(new, process, sigma))
        x, d = (low + span * image if low or span != 1 else image for image in (p.given, p.denoised))
        output = sign * (d - p0 * x) / q0
        again = p1 * x + q1 * output
        return _Probe(p.sigma, p.given, (again - low) / span if low or span != 1 else again)

    for old in taken:
        for new in _WORDS:
            for sign in (1.0, -1.0):
                if (new, sign) == (old, 1.0):
                    continue
                minus = "minus " if sign < 0 else ""
                if len(taken) == 1:
                    sentence = (
                        f"It would pass if the network's output, which is taken for {_WORDS[old]} "
                        f"({old}), were {minus}{_WORDS[new]} ({new})."
                    )
                elif new == old:
                    sentence = (
                        f"It would pass if the sign of the network's output, {_WORDS[old]}, were reversed."
                    )
                else:
                    sentence = (
                        f"It would pass if the network's output were {minus}{_WORDS[new]} ({new}) where "
                        f"{_WORDS[old]} ({old}) was assumed."
                    )
                yield sentence, [reread(p, old, new, sign) for p in probes]


class _InRange(ScorePrior):
    """A prior whose network is given images of another value range, complex ones scaled only."""

    def __init__(self, prior: ScorePrior, low: float, high: float) -> None:
        contract = prior.contract
        super().__init__(replace(contract, value_range=(0.0, 1.0)))
        self.prior, self.low, self.span = prior, low, high - low

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        out = self.prior.denoise_channels(self.low + self.span * x, self.span * sigma)
        return (out - self.low) / self.span


def _other_value_ranges(prior: ScorePrior) -> Iterator[tuple[str, Denoiser]]:
    """The same network on real images of the usual value ranges."""
    own = prior.contract.value_range
    if prior.contract.complex_images:
        return
    for span, image in (((0.0, 1.0), "x"), ((-1.0, 1.0), "2x - 1"), ((0.0, 255.0), "255x")):
        if span != own:
            yield (
                f"It would pass if the network's image were {image}: value_range={span}, not {own}.",
                _InRange(prior, *span).denoise,
            )


def _other_scales(prior: ScorePrior) -> Iterator[tuple[str, Denoiser]]:
    """The same network on images that are larger or smaller."""
    low, high = prior.contract.value_range
    for factor in (0.5, 2.0, 0.1, 10.0, 100.0):
        yield (
            f"It would pass if the network's images were {factor:g} times as large as the contract says.",
            _InRange(prior, factor * low, factor * high).denoise,
        )


def _other_directions(prior: ScorePrior) -> Iterator[tuple[str, Denoiser]]:
    """The same network, its time counted from the other end."""
    process = getattr(prior, "process", None)
    if isinstance(process, DiscreteVP):
        yield (
            "It would pass if the network's time ran the other way: index T - 1 - t for t.",
            _with_process(prior, _Reversed(process.alphas_bar)),
        )
    if isinstance(process, Flow):
        yield (
            f"It would pass if the flow had its image at time {1 - process.data_at}: "
            f"Flow(data_at={1 - process.data_at}).",
            _with_process(prior, Flow(1 - process.data_at, process.sigma_min, process.sigma_max)),
        )


def _other_times(prior: ScorePrior) -> Iterator[tuple[str, Denoiser]]:
    """The same network, told another time."""
    for name, factor in (("10", 10), ("1/10", 0.1), ("255", 255), ("1/255", 1 / 255), ("1000", 1e3)):
        sentence = f"It would pass if the network were told {name} times the noise level."
        yield sentence, _told(prior, lambda sigma, factor=factor: factor * sigma)  # type: ignore[misc]
    if isinstance(prior, FunctionPrior):
        probe = torch.ones(1)
        for other in ("own", "index", "t", "sigma", "log_sigma"):
            try:
                same = torch.equal(told_time(prior.process, other, probe), _time(prior, probe))
            except PriorError:
                continue
            if other != prior.pass_time and not same:
                sentence = f"It would pass if the function were told pass_time={other!r}."
                yield sentence, _retold(prior, other)
        for factor in (1000.0, 999.0, 1e-3):
            sentence = f"It would pass if the function were told {factor:g} times that time."
            told = prior.pass_time
            yield (
                sentence,
                _retold(
                    prior,
                    lambda sigma, factor=factor, told=told: (  # type: ignore[misc]
                        factor * told_time(prior.process, told, sigma)
                    ),
                ),
            )


class _Reversed(DiscreteVP):
    """Steps counted from the noise to the image."""

    def nearest(self, sigma: Tensor) -> Tensor:
        """Index from the other end."""
        return len(self.sigmas) - 1 - super().nearest(sigma)


def _time(prior: FunctionPrior, sigma: Tensor) -> Tensor:
    return told_time(prior.process, prior.pass_time, sigma)


def _with_process(prior: ScorePrior, process: Process) -> Denoiser:
    other = copy.copy(prior)
    other.process = process  # type: ignore[assignment]
    return other.denoise


def _retold(prior: FunctionPrior, pass_time: PassTime) -> Denoiser:
    other = copy.copy(prior)
    other.pass_time = pass_time
    return other.denoise


def _told(prior: ScorePrior, change: Callable[[Tensor], Tensor]) -> Denoiser:
    """A prior whose network alone is told another noise level, as far as one can get at the network."""
    if isinstance(prior, FunctionPrior):
        told = prior.pass_time
        return _retold(prior, lambda sigma: told_time(prior.process, told, change(sigma)))
    other = _Misled(prior, change)
    return other.denoise


class _Misled(ScorePrior):
    """A prior that is told another noise level throughout."""

    def __init__(self, prior: ScorePrior, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(prior.contract)
        self.prior, self.change = prior, change

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        return self.prior.denoise_channels(x, self.change(sigma))
