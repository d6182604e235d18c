"""Posterior samples, summarised while they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recon.scale import Scale


@dataclass(frozen=True)
class Posterior:
    """What repeated sampling says of one image ``(H, W)``, or one volume, in the units of the data.

    Of a volume, ``(D, H, W)`` stands for ``(H, W)`` below.

    Parameters
    ----------
    mean
        Mean of the samples, ``(H, W)``, complex for complex samples; its magnitude is the image.
    std
        Standard deviation over the samples of the magnitude (of the value, for real samples), ``(H, W)``.
        Zero for a single sample.
    num_samples
        Samples drawn.
    samples
        All of them, ``(N, H, W)``, if they were asked for.
    quantiles
        Quantile -> magnitude ``(H, W)``, those that were asked for.
    residual
        Root mean square of ``y - A mean`` per real component, over the acquired entries.
    noise_std
        Noise level per real component that the data term assumed; a residual far above it means that the
        image, the coil maps or the noise level are wrong, far below it that noise was fitted.
    nfe
        Network evaluations a sample.
    scale
        Factor and phase between the data and the prior.
    seed, key, micro_batch, threads
        What the noise, and to the last bit the result, depend on.
    settings
        Solver and its settings.
    warnings
        What a reader should know before trusting the result.
    """

    mean: Tensor
    std: Tensor
    num_samples: int
    residual: float
    noise_std: float
    nfe: int
    scale: Scale
    seed: int
    key: str
    micro_batch: int
    threads: int
    settings: dict[str, Any]
    samples: Tensor | None = None
    quantiles: dict[float, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Moments:
    """Running mean of images and standard deviation of their magnitude (Welford 1962), in double precision.

    Welford's update never subtracts two large sums, so the variance cannot come out negative; its memory does
    not grow with the number of samples.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._mean_magnitude: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, sample: Tensor) -> None:
        """Take in one sample ``(H, W)``."""
        wide = sample.to(torch.complex128 if sample.is_complex() else torch.float64)
        magnitude = wide.abs() if wide.is_complex() else wide
        self.count += 1
        if self._mean is None or self._mean_magnitude is None or self._squares is None:
            self._mean, self._mean_magnitude = wide.clone(), magnitude.clone()
            self._squares = torch.zeros_like(magnitude)
            return
        self._mean += (wide - self._mean) / self.count
        step = magnitude - self._mean_magnitude
        self._mean_magnitude += step / self.count
        self._squares += step * (magnitude - self._mean_magnitude)

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, ``(H, W)``."""
        assert self._mean is not None, "no sample was added"
        return self._mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of the magnitude with the unbiased variance; zero for one sample."""
        assert self._squares is not None, "no sample was added"
        return (self._squares / max(self.count - 1, 1)).sqrt()
