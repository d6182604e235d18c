"""Noise processes: how a network counts time, and what it is given, against ``x = x0 + sigma z``.

Every process here turns a clean image into ``x_t = s (x0 + sigma z)``: it has a clock of its own and a signal
scale ``s``, and nothing else sets it apart from the noise coordinate that this project computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from priors.errors import PriorError


class Process:
    """What a network's noise process has to do with the coordinate ``x = x0 + sigma z``.

    All methods take and return tensors of any one shape, in the precision they are given.
    """

    sigma_min: float
    """Lowest noise level the process has, per real component."""
    sigma_max: float
    """Highest one."""

    def time(self, sigma: Tensor) -> Tensor:
        """Time at which the process has the noise level ``sigma``: what its networks are told by default."""
        raise PriorError(f"{type(self).__name__} does not define time")

    def sigma(self, time: Tensor) -> Tensor:
        """Noise level at a time."""
        raise PriorError(f"{type(self).__name__} does not define sigma")

    def unit_time(self, sigma: Tensor) -> Tensor:
        """Time brought to [0, 1], from the image to the noise."""
        raise PriorError(f"{type(self).__name__} has no time from 0 to 1")

    def signal(self, sigma: Tensor) -> Tensor:
        """Scale ``s`` of ``x_t = s (x0 + sigma z)``; 1 if nothing is scaled."""
        return torch.ones_like(sigma)

    def input_scale(self, sigma: Tensor) -> Tensor:
        """What ``x = x0 + sigma z`` is multiplied with before the network sees it; the signal scale."""
        return self.signal(sigma)

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients ``(a, b)`` of what networks call v, ``a z + b x0``.

        That of Salimans & Ho (ICLR 2022, App. D), ``sqrt(abar) z - sqrt(1 - abar) x0``, which depends on
        ``sigma`` alone and so has a meaning in any coordinate.
        """
        alpha = (1 + sigma**2).rsqrt()
        return alpha, -sigma * alpha

    def to_network(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input for noisy images ``x`` ``(B, ...)`` of noise levels ``(B,)``."""
        return x * _beside(self.input_scale(sigma), x)

    def from_network(self, scaled: Tensor, sigma: Tensor) -> Tensor:
        """Noisy images ``x = x0 + sigma z`` of a network's inputs; the inverse of :meth:`to_network`."""
        return scaled / _beside(self.input_scale(sigma), scaled)


def _beside(value: Tensor, x: Tensor) -> Tensor:
    """Numbers ``(B,)`` shaped to multiply images ``(B, ...)``, in their precision."""
    return value.reshape(-1, *([1] * (x.ndim - 1))).to(x.abs().dtype)


class DiscreteVP(Process):
    """Variance-preserving noise in discrete steps, ``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) z``.

    Its time is the index of the step, counted from 0 (Ho, Jain & Abbeel, NeurIPS 2020). Between two steps the
    nearest is taken.

    Parameters
    ----------
    alphas_bar
        ``(T,)``, strictly decreasing, in (0, 1).

    Raises
    ------
    PriorError
        If it is no such table.
    """

    def __init__(self, alphas_bar: Tensor) -> None:
        table = torch.as_tensor(alphas_bar).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise PriorError(f"alphas_bar is a table (T,), got shape {tuple(table.shape)}")
        if not bool(((table > 0) & (table < 1)).all()) or not bool((table.diff() < 0).all()):
            raise PriorError("alphas_bar must decrease strictly, within (0, 1)")
        self.alphas_bar = table
        self._sigmas = ((1 - table) / table).sqrt()
        self.sigma_min, self.sigma_max = float(self._sigmas[0]), float(self._sigmas[-1])

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiscreteVP:
        """The process of variances ``beta_t`` ``(T,)`` of the single steps, ``abar = cumprod(1 - beta)``."""
        return cls(torch.cumprod(1 - torch.as_tensor(betas).to("cpu", torch.float64), 0))

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteVP:
        """Variances ``beta`` evenly spaced (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(start, end, _count(steps), dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> DiscreteVP:
        """Square roots of ``beta`` evenly spaced (latent diffusion, Rombach et al., CVPR 2022)."""
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), _count(steps), dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> DiscreteVP:
        """``abar`` along a squared cosine, no ``beta`` above ``largest`` (Nichol & Dhariwal, ICML 2021)."""
        time = torch.arange(_count(steps) + 1, dtype=torch.float64) / steps
        bar = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp_max(largest))

    @property
    def sigmas(self) -> Tensor:
        """Noise levels ``(T,)`` of the steps, increasing, float64: ``sqrt((1 - abar) / abar)``."""
        return self._sigmas

    def nearest(self, sigma: Tensor) -> Tensor:
        """Index, int64, of the step whose noise level is nearest in its logarithm."""
        levels = self._sigmas.log().to(sigma.device)
        wanted = sigma.detach().to(torch.float64).log()
        upper = torch.searchsorted(levels, wanted.contiguous()).clamp(0, len(levels) - 1)
        lower = (upper - 1).clamp_min(0)
        return torch.where(wanted - levels[lower] < levels[upper] - wanted, lower, upper)

    def time(self, sigma: Tensor) -> Tensor:
        """Index of the nearest step, int64."""
        return self.nearest(sigma)

    def sigma(self, time: Tensor) -> Tensor:
        """Noise level, float64, of steps given by their index."""
        return self._sigmas.to(time.device)[time.long()]

    def unit_time(self, sigma: Tensor) -> Tensor:
        """``(index + 1) / T``, so that the image itself would be at 0."""
        return ((self.nearest(sigma) + 1) / len(self._sigmas)).to(sigma.dtype)

    def signal(self, sigma: Tensor) -> Tensor:
        """``sqrt(abar) = 1 / sqrt(1 + sigma^2)``, at the level given and not at the nearest step's."""
        return (1 + sigma**2).rsqrt()


class VP(Process):
    """Variance-preserving noise in continuous time, t in (0, 1], with beta linear in t.

    ``abar(t) = exp(-(beta_min t + (beta_max - beta_min) t^2 / 2))`` (Song et al., ICLR 2021, Eq. 33).

    Parameters
    ----------
    beta_min, beta_max
        Rate of noise at t = 0 and t = 1.
    t_min
        Earliest time, which fixes the lowest noise level.

    Raises
    ------
    PriorError
        If there is no such process.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        if not 0 < beta_min < beta_max < math.inf or not 0 < t_min < 1:
            raise PriorError(
                f"need 0 < beta_min < beta_max and 0 < t_min < 1, got {beta_min}, {beta_max} and {t_min}"
            )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        ends = self.sigma(torch.tensor([t_min, 1.0], dtype=torch.float64))
        self.sigma_min, self.sigma_max = float(ends[0]), float(ends[1])

    def time(self, sigma: Tensor) -> Tensor:
        """T in (0, 1], from the positive root of a quadratic."""
        exponent = torch.log1p(sigma**2)
        slope = self.beta_max - self.beta_min
        return 2 * exponent / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * exponent))

    def sigma(self, time: Tensor) -> Tensor:
        """``sqrt(1 / abar - 1)``."""
        exponent = self.beta_min * time + (self.beta_max - self.beta_min) * time**2 / 2
        return torch.expm1(exponent).sqrt()

    def unit_time(self, sigma: Tensor) -> Tensor:
        """The process's own time."""
        return self.time(sigma)

    def signal(self, sigma: Tensor) -> Tensor:
        """``sqrt(abar) = 1 / sqrt(1 + sigma^2)``."""
        return (1 + sigma**2).rsqrt()


class VE(Process):
    """Variance-exploding noise, ``x_t = x0 + sigma z``: the coordinate itself; its time is sigma.

    Parameters
    ----------
    sigma_min, sigma_max
        Noise levels; :meth:`unit_time` spaces them geometrically (Song et al., ICLR 2021, App. C).

    Raises
    ------
    PriorError
        If they are not positive and increasing.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise PriorError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def time(self, sigma: Tensor) -> Tensor:
        """Sigma."""
        return sigma

    def sigma(self, time: Tensor) -> Tensor:
        """Sigma."""
        return time

    def unit_time(self, sigma: Tensor) -> Tensor:
        """``log(sigma / sigma_min) / log(sigma_max / sigma_min)``."""
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


class EDM(VE):
    """Karras et al. (NeurIPS 2022): VE noise, and a network that is given ``c_in x`` and ``ln(sigma) / 4``.

    What it predicts, ``F``, is its v: ``D = c_skip x + c_out F`` (their Eq. 7 and Table 1).

    Parameters
    ----------
    sigma_data
        Standard deviation per channel of the training images.
    sigma_min, sigma_max
        Noise levels.

    Raises
    ------
    PriorError
        If a number is not positive, or the levels do not increase.
    """

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)
        if not 0 < sigma_data < math.inf:
            raise PriorError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def time(self, sigma: Tensor) -> Tensor:
        """``ln(sigma) / 4``."""
        return sigma.log() / 4

    def sigma(self, time: Tensor) -> Tensor:
        """``exp(4 time)``."""
        return torch.exp(4 * time)

    def input_scale(self, sigma: Tensor) -> Tensor:
        """``c_in``, which brings the noisy image to unit variance."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of ``F = (x0 - c_skip x) / c_out`` on z and on x0."""
        c_in = self.input_scale(sigma)
        return -self.sigma_data * c_in, sigma * c_in / self.sigma_data


class Flow(Process):
    """Rectified flow and flow matching along straight lines, ``x_t = (1 - t) x0 + t z``.

    ``sigma = t / (1 - t)``, and v is the velocity ``z - x0`` (Liu, Gong & Liu, ICLR 2023; Lipman et al.,
    ICLR 2023).

    Parameters
    ----------
    data_at
        Time of the clean image: 0, or 1 for networks that count from noise to image, whose velocity is
        ``x0 - z``.
    sigma_min, sigma_max
        Noise levels; the highest stands for the time of pure noise, where sigma is infinite.

    Raises
    ------
    PriorError
        If a number is out of its range.
    """

    def __init__(self, data_at: int = 0, sigma_min: float = 1e-3, sigma_max: float = 1e3) -> None:
        if data_at not in (0, 1):
            raise PriorError(f"the image is at time 0 or 1 of a flow, not {data_at!r}")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise PriorError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.data_at = data_at
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def time(self, sigma: Tensor) -> Tensor:
        """``sigma / (1 + sigma)``, or ``1 / (1 + sigma)`` where the image is at 1."""
        return (1.0 if self.data_at else sigma) / (1 + sigma)

    def sigma(self, time: Tensor) -> Tensor:
        """``t / (1 - t)``, or its reciprocal."""
        return (1 - time) / time if self.data_at else time / (1 - time)

    def unit_time(self, sigma: Tensor) -> Tensor:
        """``sigma / (1 + sigma)``, wherever the image is."""
        return sigma / (1 + sigma)

    def signal(self, sigma: Tensor) -> Tensor:
        """``1 - t = 1 / (1 + sigma)``."""
        return 1 / (1 + sigma)

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """1 and -1, or the reverse."""
        one = torch.ones_like(sigma)
        return (-one, one) if self.data_at else (one, -one)


PassTime = str | Callable[[Tensor], Tensor]
"""How a network is told the noise level; see :func:`told_time`."""


def told_time(process: Process, pass_time: PassTime, sigma: Tensor) -> Tensor:
    """What a network is told of noise levels ``sigma`` ``(B,)``.

    Parameters
    ----------
    process
        The noise process.
    pass_time
        ``"own"``: the process's own time. ``"index"``: the step of a :class:`DiscreteVP`, int64. ``"t"``:
        from 0 to 1. ``"sigma"``, ``"log_sigma"``: the level itself. Or a function of sigma.
    sigma
        ``(B,)``.

    Raises
    ------
    PriorError
        If the process has no such time.
    """
    if callable(pass_time):
        return pass_time(sigma)
    if pass_time == "own":
        return process.time(sigma)
    if pass_time == "index":
        if not isinstance(process, DiscreteVP):
            raise PriorError(f"{type(process).__name__} counts no steps: pass_time 'index' needs DiscreteVP")
        return process.nearest(sigma)
    if pass_time == "t":
        return process.unit_time(sigma)
    if pass_time == "sigma":
        return sigma
    if pass_time == "log_sigma":
        return sigma.log()
    raise PriorError(
        f"pass_time is 'own', 'index', 't', 'sigma', 'log_sigma' or a function of sigma, not {pass_time!r}"
    )


def _count(steps: int) -> int:
    if steps < 1:
        raise PriorError(f"a process needs at least one step, got {steps}")
    return steps
