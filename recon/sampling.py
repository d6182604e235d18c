"""``reconstruct``: data, operator, prior and solver in, posterior out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from operators.base import LinearOperator
from priors.base import ScorePrior
from recon.errors import ReconError
from recon.noise import estimate_noise
from recon.posterior import Moments, Posterior
from recon.scale import Scale
from recon.solvers.base import KeyedNoise, Problem, Solver, settings_of
from recon.solvers.dds import DDS

NOISE_FLOOR = 1e-3
"""Smallest noise level, as a fraction of the prior's level, that is believed: rounding and model errors are
there even in data that were simulated without noise."""

NOT_CALIBRATED = "the spread has not been calibrated against fully sampled cases"


def reconstruct(
    y: Tensor,
    operator: LinearOperator,
    prior: ScorePrior | None,
    solver: Solver | None = None,
    num_samples: int = 1,
    seed: int = 0,
    *,
    noise_std: float | None = None,
    scale: Scale | None = None,
    key: str = "",
    keep_samples: bool = False,
    quantiles: Sequence[float] = (),
    micro_batch: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Posterior:
    """Draw posterior samples of one image and summarise them.

    Parameters
    ----------
    y
        Measurement, of the operator's ``range_shape``, in any units. Entries that the operator's ``mask``, if
        it has one, leaves out are ignored.
    operator
        Forward operator without batch dimensions.
    prior
        Score prior; ``None`` for a solver that needs none.
    solver
        :class:`DDS` with its defaults if not given.
    num_samples
        Samples to draw; with one, ``std`` is zero. A solver without a prior gives one image in any case.
    seed, key
        The noise of (key, sample, step) depends on these and nothing else.
    noise_std
        Noise standard deviation of ``y`` per real component, in its units; estimated for MRI if not given.
    scale
        Between scanner and prior; estimated from ``y`` if not given.
    keep_samples
        Keep every sample (memory then grows with their number).
    quantiles
        Quantiles of the magnitude to compute, in [0, 1]; these keep the magnitudes.
    micro_batch
        Samples the solver works on at once. If not given, 1 on a CPU, so that a sample does not depend on how
        many were asked for; elsewhere ``num_samples``, at most 8. It is always filled, and what is surplus
        discarded.
    on_progress
        Called with ``(steps done, steps in all)``.

    Returns
    -------
    Posterior
        In the units of ``y``; images as the operator's ``to_image`` makes them of samples.

    Raises
    ------
    ReconError
        If the solver cannot work with this operator or prior, the shapes do not fit, the data are not
        finite or all zero, or an argument is out of its range.
    """
    chosen: Solver = DDS() if solver is None else solver
    if num_samples < 1:
        raise ReconError(f"num_samples must be at least 1, got {num_samples}")
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ReconError(f"quantiles lie in [0, 1], got {list(quantiles)}")
    if operator.batch_shape:
        raise ReconError(f"reconstruct takes one image; the operator has a batch {operator.batch_shape}")
    if tuple(y.shape) != operator.range_shape:
        raise ReconError(
            f"the measurement has shape {tuple(y.shape)}, the operator's is {operator.range_shape}"
        )
    if not bool(torch.isfinite(y).all()):
        raise ReconError("the measurement holds values that are not finite")
    if micro_batch is None:
        micro_batch = 1 if y.device.type == "cpu" else max(1, min(num_samples, 8))
    if micro_batch < 1:
        raise ReconError(f"micro_batch must be at least 1, got {micro_batch}")
    if noise_std is not None and not 0 <= noise_std < math.inf:
        raise ReconError(f"noise_std must be a number and not negative, got {noise_std}")
    mask = getattr(operator, "mask", None)
    acquired = y.numel() if mask is None else y.numel() // mask.numel() * int(mask.sum())
    if mask is not None:
        y = y * mask
    level = 1.0 if prior is None else prior.contract.level
    if scale is None:
        scale = Scale(1.0) if chosen.needs.direct else Scale.estimate(y, operator, level)
    if noise_std is None:
        noise_std = estimate_noise(y, operator)
    floor = 0.0 if chosen.needs.direct else NOISE_FLOOR * level * scale.factor
    warnings: list[str] = []
    if noise_std < floor:
        warnings.append(
            f"noise level {noise_std:.3g} raised to {floor:.3g}, {NOISE_FLOOR:.1%} of the image's level"
        )
        noise_std = floor
    if not chosen.needs.prior:
        num_samples = 1  # nothing in it is random
        warnings.append(f"{type(chosen).__name__} gives one image without a spread")
    elif num_samples == 1:
        warnings.append("one sample has no spread: the standard deviation is zero, not known to be small")
    warnings.append(NOT_CALIBRATED)

    wide = torch.complex128 if y.is_complex() else torch.float64
    problem = Problem(scale.apply(y), operator, noise_std / scale.factor)
    batches = -(-num_samples // micro_batch)
    moments = Moments()
    total = torch.zeros(operator.domain_shape, dtype=wide, device=y.device)
    kept: list[Tensor] = []
    magnitudes: list[Tensor] = []
    nfe = 0
    with torch.no_grad():
        for first in range(0, num_samples, micro_batch):
            items = range(first, first + micro_batch)
            noise = KeyedNoise(seed, key, items, operator.domain_shape, y.dtype, y.device)

            def report(done: int, steps: int, batch: int = first // micro_batch) -> None:
                if on_progress is not None:
                    on_progress(batch * steps + done, batches * steps)

            solution = chosen.sample(problem, prior, noise, report)
            nfe = solution.nfe
            samples = scale.undo(solution.samples[: num_samples - first])
            total += samples.sum(0, dtype=wide)
            samples = operator.to_image(samples)
            for sample in samples:
                moments.add(sample)
                if keep_samples:
                    kept.append(sample)
                if quantiles:
                    magnitudes.append(sample.abs() if sample.is_complex() else sample)
        mean = moments.mean.to(y.dtype if moments.mean.is_complex() else y.real.dtype)
        difference = y - operator((total / num_samples).to(y.dtype))
    components = max(acquired, 1) * (2 if y.is_complex() else 1)
    residual = float((difference.abs().double() ** 2).sum() / components) ** 0.5
    return Posterior(
        mean=mean,
        std=moments.std.to(mean.abs().dtype),
        num_samples=num_samples,
        residual=residual,
        noise_std=noise_std,
        nfe=nfe,
        scale=scale,
        seed=seed,
        key=key,
        micro_batch=micro_batch,
        threads=torch.get_num_threads(),
        settings=settings_of(chosen),
        samples=torch.stack(kept) if keep_samples else None,
        quantiles=_quantiles(magnitudes, quantiles),
        warnings=tuple(warnings),
    )


def _quantiles(magnitudes: Sequence[Tensor], quantiles: Sequence[float]) -> dict[float, Tensor]:
    """Quantiles over the samples, interpolated linearly; ``torch.quantile`` refuses large stacks."""
    if not quantiles:
        return {}
    ordered = torch.stack(list(magnitudes)).sort(dim=0).values
    result = {}
    for q in quantiles:
        position = q * (len(ordered) - 1)
        low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
        result[q] = torch.lerp(low, high, position - math.floor(position))
    return result
