"""Priors around networks that others trained: what such a network needs before and after it is evaluated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior, padded
from priors.errors import PriorError


def channel_fields(count: int) -> dict[str, Any]:
    """What the number of a network's channels says of its images, as fields of a :class:`Contract`.

    One channel is a real image, two are a complex one, three a colour image on [-1, 1]. Of more channels, an
    even number is taken for complex slices and an odd one for real slices; who knows better overrides
    ``channels`` and ``slices``.
    """
    if count == 3:
        return {"channels": "rgb", "value_range": (-1.0, 1.0)}
    if count % 2:
        return {"channels": "real", "slices": count}
    return {"channels": "complex", "slices": count // 2}


class PretrainedPrior(ScorePrior):
    """A network of another code base as a prior; a subclass says what its outputs mean.

    Images are padded to the contract's ``size_multiple`` by repeating their border, and cropped again. The
    network computes in float32, or in bfloat16 with the channels of a pixel side by side in memory. In
    float32 they are not: on the CPU that order makes the rounding error up to eight times as large.

    Parameters
    ----------
    network
        The network, in the noise convention of its code base.
    contract
        What it was trained for.
    channels
        Channels of the images that the network takes.
    precision
        ``"fp32"`` (default), or ``"bf16"`` to run the network, and nothing else, under autocast.

    Raises
    ------
    PriorError
        If there is no such precision, or the contract speaks of another number of channels.
    """

    def __init__(
        self, network: nn.Module, contract: Contract, channels: int, precision: str = "fp32"
    ) -> None:
        super().__init__(contract)
        if channels != contract.num_channels:
            raise PriorError(f"the network has {channels} channels, its contract {contract.num_channels}")
        self.network = network
        self.precision = precision

    @property
    def precision(self) -> str:
        """``"fp32"`` or ``"bf16"``."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in ("fp32", "bf16"):
            raise PriorError(f"precision is 'fp32' or 'bf16', not {value!r}")
        self._precision = value
        self.network.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._precision == "bf16" else torch.contiguous_format

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise float32 images of a fitting size; shapes as in :meth:`denoise_channels`.

        The network is called inside :meth:`autocast`.
        """
        raise PriorError(f"{type(self).__name__} does not define evaluate")

    def autocast(self, x: Tensor) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        self.check_channels(x)
        dtype, (height, width) = x.dtype, x.shape[-2:]
        x = padded(x.to(torch.float32), self.contract.size_multiple)
        x = x.contiguous(memory_format=self._memory_format)
        return self.evaluate(x, sigma.to(torch.float32))[..., :height, :width].to(dtype)
