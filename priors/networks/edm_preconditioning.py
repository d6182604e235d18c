"""What stands around a raw network ``F`` to make it a denoiser.

``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``, Karras et al., NeurIPS 2022 (arXiv:2206.00364), Eq. 7
and Table 1. None of the three has tensors of its own, so that the state dict is the raw network's under
``model.``. The coefficients are computed in float32 as they were in training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from priors.errors import PriorError


class Coefficients(NamedTuple):
    """Columns of Table 1, each ``(B,)``."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioned(nn.Module):
    """A raw network in its preconditioning.

    Parameters
    ----------
    model
        ``F``: takes ``(B, C, H, W)``, ``(B,)`` noise labels and a class vector or None.

    Attributes
    ----------
    sigma_min, sigma_max
        Noise levels that were trained.
    """

    sigma_min: float
    sigma_max: float

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The row of Table 1 at noise levels ``(B,)``."""
        raise PriorError(f"{type(self).__name__} does not define coefficients")

    def forward(self, x: Tensor, sigma: Tensor, classes: Tensor | None = None) -> Tensor:
        """Denoise ``x = x0 + sigma z``: ``(B, C, H, W)`` and ``(B,)``, both float32."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        raw = self.model(c_in[:, None, None, None] * x, c_noise, classes)
        return c_skip[:, None, None, None] * x + c_out[:, None, None, None] * raw.float()


class EDMPrecond(Preconditioned):
    """The paper's own preconditioning: unit variance in and out.

    Parameters
    ----------
    model
        See :class:`Preconditioned`.
    sigma_data
        Standard deviation of the training images.
    sigma_min, sigma_max
        Noise levels that were trained; the paper samples between the defaults.
    """

    def __init__(
        self, model: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        super().__init__(model)
        self.sigma_data = sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :meth:`Preconditioned.coefficients`."""
        data = self.sigma_data
        total = sigma**2 + data**2
        return Coefficients(data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


class VEPrecond(Preconditioned):
    """Variance exploding (Song et al., ICLR 2021).

    Parameters
    ----------
    model
        See :class:`Preconditioned`.
    sigma_min, sigma_max
        Noise levels that were trained.
    """

    def __init__(self, model: nn.Module, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__(model)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :meth:`Preconditioned.coefficients`."""
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, one, (sigma / 2).log())


class VPPrecond(Preconditioned):
    """Variance preserving in continuous time (Song et al., ICLR 2021).

    ``sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1``; the network is told ``(M - 1) t``.

    Parameters
    ----------
    model
        See :class:`Preconditioned`.
    beta_d, beta_min
        The process.
    M
        Steps of the discrete process it stands for.
    epsilon_t
        Earliest time that was trained.
    """

    def __init__(
        self,
        model: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
    ) -> None:
        super().__init__(model)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = (
            math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in (epsilon_t, 1.0)
        )

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :meth:`Preconditioned.coefficients`."""
        # Not log1p, though it would be more exact at small sigma: the network was trained with these labels.
        exponent = (1 + sigma**2).log()
        time = ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() - self.beta_min) / self.beta_d
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * time)
