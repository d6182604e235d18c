"""What every prior is: a denoiser with a declared contract."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.errors import PriorError


@dataclass(frozen=True)
class Contract:
    """What a prior was made for; solvers and the scale read it, nothing is guessed.

    Parameters
    ----------
    channels
        ``"complex"``: two network channels, real and imaginary part. ``"real"``: one channel; a complex
        image is run as two independent real images, Re and Im. ``"rgb"``: three channels of a network of
        colour images, which for us are real ones: the image stands in all three, and the mean of the three
        results is taken.
    sigma_min, sigma_max
        Noise standard deviations per real component between which the denoiser is trusted, in units of our
        images, whatever ``value_range`` the network has.
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
    slices
        Neighbouring slices that the network sees at once, as channels ``(slice, component)``, the component
        fastest. With more than one, an image is a stack ``(..., slices, H, W)`` with one noise level.
    value_range
        What the network calls the values 0 and 1 of our images: ``(-1, 1)`` says that its image is
        ``2x - 1``. Complex images have none but ``(0, 1)``: their zero stays zero.

    Raises
    ------
    PriorError
        If a value is out of its range, or complex images are said to have a physical unit or a value range.
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
    slices: int = 1
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.channels not in ("complex", "real", "rgb"):
            raise PriorError(f"a prior's channels are 'complex', 'real' or 'rgb', not {self.channels!r}")
        if self.unit not in ("level", "water", "object"):
            raise PriorError(f"a prior's unit is 'level', 'water' or 'object', not {self.unit!r}")
        if self.unit != "level" and self.channels == "complex":
            raise PriorError(f"images in the unit {self.unit!r} are real; this prior's are {self.channels}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise PriorError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not self.level > 0:
            raise PriorError(f"level must be positive, got {self.level}")
        sigmas = [sigma for sigma, _ in self.error_table]
        if sigmas != sorted(set(sigmas)) or not all(s > 0 and e > 0 for s, e in self.error_table):
            raise PriorError("the error table must hold positive numbers, its sigmas increasing")
        if type(self.slices) is not int or self.slices < 1:
            raise PriorError(f"a prior sees a whole number of slices, at least 1, not {self.slices!r}")
        if self.slices > 1 and self.channels == "rgb":
            raise PriorError(f"the three channels of an rgb prior are one slice, not {self.slices}")
        if not _is_range(self.value_range):
            raise PriorError(f"a value range is (low, high) with low < high, not {self.value_range!r}")
        if self.channels == "complex" and tuple(self.value_range) != (0, 1):
            raise PriorError(f"complex images have the value range (0, 1), not {self.value_range!r}")

    @property
    def complex_images(self) -> bool:
        """Whether the prior's own images are complex; those of an rgb prior are real."""
        return self.channels == "complex"

    @property
    def num_channels(self) -> int:
        """Channels of the network's own images: 2 for complex priors, 1 for real ones, 3 for rgb; a slice."""
        return {"complex": 2, "real": 1, "rgb": 3}[self.channels] * self.slices

    @property
    def image_ndim(self) -> int:
        """Dimensions of one image: 2, or 3 for a stack of slices."""
        return 2 if self.slices == 1 else 3

    def as_dict(self) -> dict[str, Any]:
        """The contract as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contract:
        """Rebuild a contract from :meth:`as_dict`; an unknown or missing field is an error.

        Only ``unit``, ``slices`` and ``value_range`` may be absent, and have their defaults then: there are
        files that were written before them.
        """
        values = {"unit": "level", "slices": 1, "value_range": (0.0, 1.0), **values}
        check_fields(cls, values, "contract")
        table = tuple((float(s), float(e)) for s, e in values["error_table"])
        span = values["value_range"]
        span = tuple(map(float, span)) if _is_range(span) else span  # refused below
        return cls(
            **{**values, "anatomy": tuple(values["anatomy"]), "error_table": table, "value_range": span}
        )


def _is_range(span: Any) -> bool:
    if not isinstance(span, tuple | list) or len(span) != 2:
        return False
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in span):
        return False
    return bool(span[0] < span[1])


def check_fields(kind: type, values: dict[str, Any], what: str) -> None:
    """Raise unless ``values`` has the fields of the dataclass ``kind``, all of them and no others."""
    known = {field.name for field in fields(kind)}
    for word, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            raise PriorError(f"the prior's {what} has {word} fields {sorted(names)}")


class JSONSettings:
    """What settings of a network, frozen dataclasses, share: they go into a header of JSON and come back."""

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild settings from :meth:`as_dict`; an unknown or missing field is an error."""
        check_fields(cls, values, "network")
        # JSON has lists for tuples.
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def padded(x: Tensor, multiple: int = 1, smallest: tuple[int, int] = (0, 0)) -> Tensor:
    """Repeat the lower and right border of ``(B, C, H, W)`` until it fits a network.

    Parameters
    ----------
    x
        Images; returned as they are if they fit.
    multiple
        What height and width are to be multiples of.
    smallest
        Least height and width.
    """
    below, beside = (
        max(-length % multiple, least - length) for length, least in zip(x.shape[-2:], smallest, strict=True)
    )
    return F.pad(x, (0, beside, 0, below), mode="replicate") if below or beside else x


class ScorePrior(nn.Module):
    """A prior on images, consulted through its minimum-mean-square-error denoiser.

    The one noise convention is ``x = x0 + sigma * z`` with ``sigma`` the standard deviation per real
    component, so ``E|z|^2 = 2`` for complex images. A subclass implements :meth:`denoise_channels` on the
    network's own real channels; everything else follows from it.
    """

    differentiable: bool = True
    """Whether gradients flow through the denoiser; a subclass around a function that stops them says no."""

    origin: Any = None
    """:class:`priors.files.Origin` of a prior around a network of other code, by which it is written."""

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def check_channels(self, x: Tensor) -> None:
        """Refuse what are not images ``(B, channels, H, W)`` of the contract's number of channels."""
        if x.ndim != 4 or x.shape[1] != self.contract.num_channels:
            expected = f"(B, {self.contract.num_channels}, H, W)"
            raise PriorError(f"prior {self.contract.name!r} takes {expected}, got {tuple(x.shape)}")

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
            ``(..., H, W)``, complex or real floating point; ``(..., slices, H, W)`` if the contract has more
            than one slice.
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
        contract = self.contract
        stack = contract.slices > 1
        if x.ndim < contract.image_ndim or (stack and x.shape[-3] != contract.slices):
            expected = f"stacks (..., {contract.slices}, H, W)" if stack else "images (..., H, W)"
            which = f"prior {contract.name!r}" if stack else "a prior"
            raise PriorError(f"{which} takes {expected}, got shape {tuple(x.shape)}")
        if not (x.is_floating_point() or x.is_complex()):
            raise PriorError(f"a prior takes floating-point images, got {x.dtype}")
        if contract.complex_images and not x.is_complex():
            raise PriorError(f"prior {contract.name!r} knows complex images; got a real one")
        lead, size = x.shape[: x.ndim - contract.image_ndim], x.shape[-2:]
        flat = x.resolve_conj().reshape(-1, contract.slices, *size)
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
        if contract.complex_images:
            channels = torch.view_as_real(flat).permute(0, 1, 4, 2, 3).flatten(1, 2)
            out = self.denoise_channels(channels, sigmas).unflatten(1, (contract.slices, 2))
            return torch.view_as_complex(out.permute(0, 1, 3, 4, 2).contiguous()).reshape(x.shape)
        if not x.is_complex():
            return self._denoise_real(flat, sigmas).reshape(x.shape)
        # A real prior sees Re and Im as two images with independent noise of the same sigma.
        out = self._denoise_real(torch.cat([flat.real, flat.imag]), sigmas.repeat(2))
        return torch.complex(*out.chunk(2)).reshape(x.shape)

    def _denoise_real(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise real images ``(B, slices, H, W)``, in our units, by the network in its own."""
        low, high = self.contract.value_range
        plain = (low, high) == (0, 1)
        channels = x if plain else low + (high - low) * x
        if self.contract.channels == "rgb":
            channels = channels.expand(-1, 3, -1, -1).contiguous()
        out = self.denoise_channels(channels, sigma if plain else (high - low) * sigma)
        if self.contract.channels == "rgb":
            out = out.mean(1, keepdim=True)
        return out if plain else (out - low) / (high - low)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Score ``(D(x, sigma) - x) / sigma^2`` of the noisy density; shapes as in :meth:`denoise`."""
        return (self.denoise(x, sigma) - x) / self._per_image(sigma, x) ** 2

    def eps(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Noise estimate ``(x - D(x, sigma)) / sigma``; shapes as in :meth:`denoise`."""
        return (x - self.denoise(x, sigma)) / self._per_image(sigma, x)

    def _per_image(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        # In the precision of the image, so that a float64 sigma does not make a complex64 image complex128.
        sigma = torch.as_tensor(sigma, dtype=x.abs().dtype, device=x.device)
        return sigma.reshape(*sigma.shape, *([1] * self.contract.image_ndim))

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
