"""What every prior is: a denoiser with a declared contract."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from priors.errors import PriorError


@dataclass(frozen=True)
class Contract:
    """What a prior was made for; solvers and the scale read it, nothing is guessed.

    Parameters
    ----------
    channels
        ``"complex"``: two network channels, real and imaginary part. ``"real"``: one channel; a complex
        image is run as two independent real images, Re and Im.
    sigma_min, sigma_max
        Noise standard deviations per real component between which the denoiser is trusted.
    level
        :func:`priors.level.image_level` of a typical image as the prior knows it.
    size_multiple
        The network pads height and width to a multiple of this; any size is accepted.
    anatomy
        What the training images showed; empty for priors without an anatomy (analytic ones).
    name
        Short name used in provenance.
    error_table
        Pairs ``(sigma, rms error per real component)`` measured on the objects (not the air) of held-out
        images, increasing in sigma.
    unit
        What the numbers in an image mean. ``"level"``: nothing by themselves, images are brought to
        ``level`` (MR). ``"water"``: attenuation in units of that of water, ``1 + HU/1000``, so that air is 0
        and 1 HU is 0.001. ``"object"``: 0 where there is no material and 1 where there is. Images in a
        physical unit are real, and nothing may rescale them.

    Raises
    ------
    PriorError
        If a value is out of its range, or complex images are said to have a physical unit.
    """

    channels: str = "complex"
    sigma_min: float = 0.002
    sigma_max: float = 20.0
    level: float = 0.3
    size_multiple: int = 1
    anatomy: tuple[str, ...] = ()
    name: str = "prior"
    error_table: tuple[tuple[float, float], ...] = ()
    unit: str = "level"

    def __post_init__(self) -> None:
        if self.channels not in ("complex", "real"):
            raise PriorError(f"a prior's channels are 'complex' or 'real', not {self.channels!r}")
        if self.unit not in ("level", "water", "object"):
            raise PriorError(f"a prior's unit is 'level', 'water' or 'object', not {self.unit!r}")
        if self.unit != "level" and self.channels != "real":
            raise PriorError(f"images in the unit {self.unit!r} are real; this prior's are {self.channels}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise PriorError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not self.level > 0:
            raise PriorError(f"level must be positive, got {self.level}")
        sigmas = [sigma for sigma, _ in self.error_table]
        if sigmas != sorted(set(sigmas)) or not all(s > 0 and e > 0 for s, e in self.error_table):
            raise PriorError("the error table must hold positive numbers, its sigmas increasing")

    @property
    def num_channels(self) -> int:
        """Channels of the network's own images: 2 for complex priors, 1 for real ones."""
        return 2 if self.channels == "complex" else 1

    def as_dict(self) -> dict[str, Any]:
        """The contract as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contract:
        """Rebuild a contract from :meth:`as_dict`; an unknown or missing field is an error.

        Only ``unit`` may be absent: files written before there was one hold priors of images at a level.
        """
        values = {"unit": "level", **values}
        check_fields(cls, values, "contract")
        table = tuple((float(s), float(e)) for s, e in values["error_table"])
        return cls(**{**values, "anatomy": tuple(values["anatomy"]), "error_table": table})


def check_fields(kind: type, values: dict[str, Any], what: str) -> None:
    """Raise unless ``values`` has the fields of the dataclass ``kind``, all of them and no others."""
    known = {field.name for field in fields(kind)}
    for word, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            raise PriorError(f"the prior's {what} has {word} fields {sorted(names)}")


class ScorePrior(nn.Module):
    """A prior on images, consulted through its minimum-mean-square-error denoiser.

    The one noise convention is ``x = x0 + sigma * z`` with ``sigma`` the standard deviation per real
    component, so ``E|z|^2 = 2`` for complex images. A subclass implements :meth:`denoise_channels` on the
    network's own real channels; everything else follows from it.
    """

    differentiable: bool = True
    """Whether gradients flow through the denoiser; a subclass around a function that stops them says no."""

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise the network's own channels.

        Parameters
        ----------
        x
            ``(B, channels, H, W)``, real.
        sigma
            ``(B,)``, real, noise standard deviation per channel.

        Returns
        -------
        Tensor
            ``E[x0 | x]``, the shape and dtype of ``x``.
        """
        raise PriorError(f"{type(self).__name__} does not define denoise_channels")

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return ``E[x0 | x]`` for noisy images ``x = x0 + sigma z``.

        Parameters
        ----------
        x
            ``(..., H, W)``, complex or real floating point.
        sigma
            Positive number, or a tensor of the leading shape of ``x``.

        Returns
        -------
        Tensor
            The shape and dtype of ``x``.

        Raises
        ------
        PriorError
            If a real image meets a prior on complex ones, or the shapes do not fit.

        Notes
        -----
        The posterior mean and the score are tied by Tweedie's formula, ``D(x) = x + sigma^2 score(x)``
        (Robbins 1956; Efron 2011).
        """
        if x.ndim < 2:
            raise PriorError(f"a prior takes images (..., H, W), got shape {tuple(x.shape)}")
        if not (x.is_floating_point() or x.is_complex()):
            raise PriorError(f"a prior takes floating-point images, got {x.dtype}")
        lead, size = x.shape[:-2], x.shape[-2:]
        flat = x.resolve_conj().reshape(-1, *size)
        real_dtype = flat.real.dtype if x.is_complex() else x.dtype
        sigmas = torch.as_tensor(sigma, dtype=real_dtype, device=x.device)
        if not bool((sigmas > 0).all()):
            raise PriorError("sigma must be positive")
        try:
            sigmas = sigmas.expand(lead).reshape(-1) if lead else sigmas.reshape(1)
        except RuntimeError:
            raise PriorError(
                f"sigma of shape {tuple(sigmas.shape)} does not fit images of leading shape {tuple(lead)}"
            ) from None
        if self.contract.channels == "complex":
            if not x.is_complex():
                raise PriorError(f"prior {self.contract.name!r} knows complex images; got a real one")
            channels = torch.view_as_real(flat).permute(0, 3, 1, 2)
            out = self.denoise_channels(channels, sigmas)
            return torch.view_as_complex(out.permute(0, 2, 3, 1).contiguous()).reshape(x.shape)
        if not x.is_complex():
            return self.denoise_channels(flat[:, None], sigmas)[:, 0].reshape(x.shape)
        # A real prior sees Re and Im as two images with independent noise of the same sigma.
        parts = torch.cat([flat.real, flat.imag])[:, None]
        out = self.denoise_channels(parts, sigmas.repeat(2))[:, 0]
        return torch.complex(*out.chunk(2)).reshape(x.shape)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Score ``(D(x, sigma) - x) / sigma^2`` of the noisy density; shapes as in :meth:`denoise`."""
        return (self.denoise(x, sigma) - x) / _per_image(sigma, x) ** 2

    def eps(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Noise estimate ``(x - D(x, sigma)) / sigma``; shapes as in :meth:`denoise`."""
        return (x - self.denoise(x, sigma)) / _per_image(sigma, x)

    def error_variance(self, sigma: float) -> float:
        """Mean square error per real component that the denoiser leaves at ``sigma``.

        Read from the contract's measured table by log-log interpolation (below the table the error is the
        noise itself, above it the last entry); without a table, from a Gaussian image of the contract's
        level, ``s^2 sigma^2 / (s^2 + sigma^2)`` with ``s^2 = level^2 / 2``.
        """
        table = self.contract.error_table
        if not table:
            variance = self.contract.level**2 / 2
            return variance * sigma**2 / (variance + sigma**2)
        if sigma <= table[0][0]:
            return (sigma * table[0][1] / table[0][0]) ** 2
        if sigma >= table[-1][0]:
            return table[-1][1] ** 2
        upper = bisect_left(table, (sigma,))
        (s0, e0), (s1, e1) = table[upper - 1], table[upper]
        weight = math.log(sigma / s0) / math.log(s1 / s0)
        return (e0 * (e1 / e0) ** weight) ** 2


def _per_image(sigma: float | Tensor, x: Tensor) -> Tensor:
    # In the precision of the image, so that a float64 sigma does not make a complex64 image complex128.
    return torch.as_tensor(sigma, dtype=x.abs().dtype, device=x.device)[..., None, None]
