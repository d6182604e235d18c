"""Samplers of a prior itself: images from noise alone.

Each sampler is a function of a prior, a source of noise and a falling sequence of noise levels that ends in
zero; :func:`sample_prior` puts the three together. All work in the one noise coordinate ``x = x0 + sigma z``,
so that what the papers write for variance-preserving processes is here without their factors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from priors.base import ScorePrior
from priors.errors import PriorError

Noise = Callable[[int], Tensor]
"""Step -> standard normal images ``(B, H, W)``, ``E|z|^2 = 2`` for complex ones; fresh for every step."""

Progress = Callable[[int, int], None]
"""Called with ``(steps done, steps in all)``."""


class Sampler(Protocol):
    """What :func:`sample_prior` calls: a function of this module, or a ``functools.partial`` of one."""

    def __call__(
        self, prior: ScorePrior, noise: Noise, sigmas: Sequence[float], *, on_step: Progress | None = None
    ) -> Tensor:
        """Draw images ``(B, H, W)`` from noise at the levels ``sigmas``."""


@dataclass(frozen=True)
class ImageNoise:
    """Standard normal noise that depends on a seed, the image's index and the step, and on nothing else.

    Drawn on the CPU image by image, so neither the batch it is drawn in nor the device changes it.

    Parameters
    ----------
    seed
        The user's seed.
    images
        Index of each image of the batch.
    size
        Of an image: ``(H, W)``, or ``(slices, H, W)`` for a prior on stacks of slices.
    dtype, device
        Of the result; complex noise has ``E|z|^2 = 2``.
    """

    seed: int
    images: Sequence[int]
    size: tuple[int, ...]
    dtype: torch.dtype = torch.complex64
    device: torch.device | str = "cpu"

    def __call__(self, step: int) -> Tensor:
        """Noise of a step, ``(B, H, W)``."""
        return torch.stack([self._draw(image, step) for image in self.images]).to(self.device)

    def _draw(self, image: int, step: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}|{image}|{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        if not self.dtype.is_complex:
            return torch.randn(self.size, generator=generator, dtype=self.dtype)
        parts = torch.randn((*self.size, 2), generator=generator, dtype=self.dtype.to_real())
        return torch.view_as_complex(parts)


def karras_levels(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """Levels with ``sigma^(1/rho)`` spaced evenly, and a final zero (Karras et al. 2022, Eq. 5).

    Returns ``steps + 1`` levels.

    Raises
    ------
    PriorError
        If there is no step, or not ``0 < sigma_min <= sigma_max``.
    """
    if steps < 1:
        raise PriorError(f"the number of steps must be at least 1, got {steps}")
    if not 0 < sigma_min <= sigma_max:
        raise PriorError(f"need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = ((high + k / max(steps - 1, 1) * (low - high)) ** rho for k in range(steps))
    return [*(min(max(level, sigma_min), sigma_max) for level in levels), 0.0]  # rounding stays within


@torch.no_grad()
def heun(
    prior: ScorePrior,
    noise: Noise,
    sigmas: Sequence[float],
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    on_step: Progress | None = None,
) -> Tensor:
    """Heun's second-order method on the probability flow (Karras et al. 2022, Algorithms 1 and 2).

    Two network evaluations a step, but one in the last.

    Parameters
    ----------
    prior, noise, sigmas, on_step
        As for every sampler here.
    churn
        Fresh noise in all (``S_churn``): before each of N steps sigma is raised by the factor
        ``1 + min(churn / N, sqrt(2) - 1)``, though not above the prior's ``sigma_max``. Zero: deterministic.
    churn_range
        Noise levels at which that is done (``S_tmin``, ``S_tmax``).
    churn_noise
        Standard deviation of the fresh noise (``S_noise``).

    Returns
    -------
    Tensor
        ``(B, H, W)`` in the prior's units.

    Raises
    ------
    PriorError
        If a setting is out of its range, or a value stops being finite.
    """
    if not (churn >= 0 and churn_noise >= 0):
        raise PriorError(f"heun: churn and its noise must not be negative, got {churn} and {churn_noise}")
    steps = len(sigmas) - 1
    x = _start(noise, sigmas)
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        raised = sigma
        if churn_range[0] <= sigma <= churn_range[1]:
            gamma = min(churn / steps, math.sqrt(2) - 1)
            raised = max(sigma, min(sigma * (1 + gamma), prior.contract.sigma_max))
        if raised > sigma:
            x = x + math.sqrt(raised**2 - sigma**2) * churn_noise * noise(index + 1)
        slope = (x - prior.denoise(x, raised)) / raised
        euler = x + (lower - raised) * slope
        if lower > 0:
            slope = (slope + (euler - prior.denoise(euler, lower)) / lower) / 2
        x = x + (lower - raised) * slope
        _finished(x, "heun", index, steps, on_step)
    return x


@torch.no_grad()
def ddim(
    prior: ScorePrior,
    noise: Noise,
    sigmas: Sequence[float],
    *,
    eta: float = 0.0,
    on_step: Progress | None = None,
) -> Tensor:
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, Eq. 12).

    One network evaluation a step. With ``sigma_t = sqrt((1 - abar_t) / abar_t)`` the paper's step becomes
    ``x' = D + sqrt(sigma'^2 - s^2) eps + s z``, ``s = eta sigma' sqrt(sigma^2 - sigma'^2) / sigma``.

    Parameters
    ----------
    prior, noise, sigmas, on_step
        As for every sampler here.
    eta
        Share of fresh noise: 0 is deterministic (Euler's method on the probability flow), 1 is :func:`ddpm`.

    Returns
    -------
    Tensor
        ``(B, H, W)`` in the prior's units.

    Raises
    ------
    PriorError
        If a setting is out of its range, or a value stops being finite.
    """
    if not 0 <= eta <= 1:
        raise PriorError(f"ddim: eta must lie in [0, 1], got {eta}")
    x = _start(noise, sigmas)
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        denoised = prior.denoise(x, sigma)
        eps = (x - denoised) / sigma
        fresh = eta * lower * math.sqrt(sigma**2 - lower**2) / sigma
        x = denoised + math.sqrt(lower**2 - fresh**2) * eps
        if fresh > 0:
            x = x + fresh * noise(index + 1)
        _finished(x, "ddim", index, len(sigmas) - 1, on_step)
    return x


@torch.no_grad()
def ddpm(
    prior: ScorePrior, noise: Noise, sigmas: Sequence[float], *, on_step: Progress | None = None
) -> Tensor:
    """Ancestral sampling (Ho, Jain & Abbeel 2020, Algorithm 2).

    One network evaluation a step: draws ``x'`` from ``q(x' | x, x0)``, Eq. 6 and 7, at ``x0 = D(x)``, with
    the variance of that distribution.

    Parameters
    ----------
    prior, noise, sigmas, on_step
        As for every sampler here.

    Returns
    -------
    Tensor
        ``(B, H, W)`` in the prior's units.

    Raises
    ------
    PriorError
        If a value stops being finite.
    """
    x = _start(noise, sigmas)
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        denoised = prior.denoise(x, sigma)
        # Given x0, both x' and x are x0 plus noise, of variance sigma'^2 and sigma^2.
        kept = lower**2 / sigma**2
        x = denoised + kept * (x - denoised)
        if lower > 0:
            x = x + lower * math.sqrt(1 - kept) * noise(index + 1)
        _finished(x, "ddpm", index, len(sigmas) - 1, on_step)
    return x


@torch.no_grad()
def predictor_corrector(
    prior: ScorePrior,
    noise: Noise,
    sigmas: Sequence[float],
    *,
    corrections: int = 1,
    snr: float = 0.16,
    on_step: Progress | None = None,
) -> Tensor:
    """Predictor and corrector of the variance-exploding process (Song et al. 2021, Algorithm 2).

    ``1 + corrections`` network evaluations a step, one in the last: the step to zero is the denoised image.
    It wants many more steps than the other samplers, hundreds; the paper takes a thousand.

    Parameters
    ----------
    prior, noise, sigmas, on_step
        As for every sampler here.
    corrections
        Langevin steps at a level.
    snr
        The paper's r, by which the step of the corrector follows from the norms of noise and score, of each
        image on its own.

    Returns
    -------
    Tensor
        ``(B, H, W)`` in the prior's units.

    Raises
    ------
    PriorError
        If a setting is out of its range, or a value stops being finite.
    """
    if corrections < 0 or not snr > 0:
        raise PriorError(
            "predictor_corrector: corrections must not be negative and snr positive, "
            f"got {corrections} and {snr}"
        )
    x = _start(noise, sigmas)
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        first = 1 + index * (1 + corrections)
        x = x + (sigma**2 - lower**2) * prior.score(x, sigma)
        if lower > 0:
            x = x + math.sqrt(sigma**2 - lower**2) * noise(first)
            for k in range(corrections):
                score, z = prior.score(x, lower), noise(first + 1 + k)
                step = 2 * (snr * _norm(z) / _norm(score)) ** 2
                x = x + step * score + torch.sqrt(2 * step) * z
        _finished(x, "predictor_corrector", index, len(sigmas) - 1, on_step)
    return x


SAMPLERS: dict[str, Sampler] = {
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
    "predictor-corrector": predictor_corrector,
}
"""Name -> sampler with its defaults."""


def sample_prior(
    prior: ScorePrior,
    size: tuple[int, int],
    num: int = 1,
    *,
    sampler: str | Sampler = "heun",
    steps: int = 40,
    seed: int = 0,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Tensor:
    """Draw images from a prior.

    Parameters
    ----------
    prior
        The prior.
    size
        ``(H, W)``.
    num
        Images to draw.
    sampler
        One of :data:`SAMPLERS`, or a function like them, such as ``partial(heun, churn=20)``.
    steps
        Noise levels.
    seed
        Image k depends on this and k alone.
    sigma_max, sigma_min
        First and last noise level; the ends of the prior's range if not given.
    batch
        Images drawn at once; 1 on a CPU, 8 elsewhere if not given.
    device
        Where the prior is.
    on_progress
        Called with ``(steps done, steps in all)`` after every step.

    Returns
    -------
    Tensor
        ``(num, H, W)`` in the prior's units, complex64 or, of a prior on real images, float32;
        ``(num, slices, H, W)`` of a prior on stacks of slices.

    Raises
    ------
    PriorError
        If an argument is out of its range, or a value stops being finite.

    Examples
    --------
    >>> import torch
    >>> from priors import GaussianPrior
    >>> prior = GaussianPrior(torch.zeros(8, 8, dtype=torch.complex64), variance=0.1)
    >>> sample_prior(prior, (8, 8), num=3).shape
    torch.Size([3, 8, 8])
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise PriorError(f"there is no sampler {sampler!r}: the samplers are {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[sampler]
    if num < 1 or min(size) < 1:
        raise PriorError(f"need at least one image of at least one pixel, got {num} of {size}")
    if batch is None:
        batch = 1 if torch.device(device).type == "cpu" else 8
    if batch < 1:
        raise PriorError(f"batch must be at least 1, got {batch}")
    contract = prior.contract
    sigmas = karras_levels(
        steps,
        contract.sigma_max if sigma_max is None else sigma_max,
        contract.sigma_min if sigma_min is None else sigma_min,
    )
    dtype = torch.complex64 if contract.complex_images else torch.float32
    shape = size if contract.slices == 1 else (contract.slices, *size)
    batches = -(-num // batch)
    drawn = []
    for number in range(batches):

        def report(done: int, total: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress(number * total + done, batches * total)

        # The last batch is filled too: an image must not depend on how many were asked for.
        noise = ImageNoise(seed, range(number * batch, (number + 1) * batch), shape, dtype, device)
        drawn.append(sampler(prior, noise, sigmas, on_step=report).cpu())
    return torch.cat(drawn)[:num]


def _start(noise: Noise, sigmas: Sequence[float]) -> Tensor:
    """Noise of the first level; the levels are checked."""
    if len(sigmas) < 2 or sigmas[-1] != 0 or not all(a > b for a, b in pairwise(sigmas)):
        raise PriorError(f"noise levels must fall, and end in zero, got {list(sigmas)}")
    return sigmas[0] * noise(0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def _finished(x: Tensor, name: str, index: int, steps: int, on_step: Progress | None) -> None:
    """Raise if the step's result is not finite, report it otherwise."""
    if not bool(torch.isfinite(x.abs().sum())):
        raise PriorError(f"{name} produced values that are not finite at step {index}")
    if on_step is not None:
        on_step(index + 1, steps)
