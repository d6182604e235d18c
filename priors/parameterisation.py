"""Any function that denoises, in whatever terms, as a prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior, padded
from priors.errors import PriorError
from priors.pretrained import PretrainedPrior
from priors.processes import VE, PassTime, Process, told_time

PREDICTIONS = ("x0", "D", "eps", "v", "score")
"""What a network may predict; ``"x0"`` and ``"D"`` are two words for one thing."""


def denoised_weights(predicts: str, process: Process, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``(p, q)`` of ``D = p x + q f``, for a prediction f of noisy images ``x = x0 + sigma z``.

    Parameters
    ----------
    predicts
        ``"x0"`` or ``"D"``: the clean image. ``"eps"``: the noise z. ``"v"``: what networks of the process
        call v (:meth:`Process.velocity`): Salimans & Ho's, the velocity of a flow, the F of EDM. ``"score"``:
        the gradient of the logarithm of the density of the process's own ``x_t``.
    process
        The noise process.
    sigma
        Noise levels, of any shape.

    Raises
    ------
    PriorError
        If there is no such prediction.

    Notes
    -----
    From ``v = a z + b x0`` and ``z = (x - x0) / sigma`` follows ``x0 = (a x - sigma v) / (a - sigma b)``, and
    from Tweedie's formula for ``x_t = s x``, ``x0 = x + s sigma^2 score``.
    """
    one = torch.ones_like(sigma)
    if predicts in ("x0", "D"):
        return torch.zeros_like(sigma), one
    if predicts == "eps":
        return one, -sigma
    if predicts == "score":
        return one, process.signal(sigma) * sigma**2
    if predicts == "v":
        a, b = process.velocity(sigma)
        return a / (a - sigma * b), -sigma / (a - sigma * b)
    raise PriorError(f"a prior predicts one of {', '.join(PREDICTIONS)}, not {predicts!r}")


class FunctionPrior(ScorePrior):
    """A function that was made for another noise process or predicts something else, as a prior.

    Parameters
    ----------
    function
        Takes images ``(B, channels, H, W)`` as the process has them, and ``(B,)`` times; returns the shape
        of the images. A module becomes part of the prior, with its weights.
    contract
        What it was made for.
    predicts
        What it returns: one of :data:`PREDICTIONS`, see :func:`denoised_weights`.
    process
        The noise process that it knows; variance-exploding noise, ``x = x0 + sigma z``, if not given.
    pass_time
        What it is told of the noise level, see :func:`priors.processes.told_time`; by default the process's
        own time: the step of :class:`DiscreteVP`, t of :class:`VP` and :class:`Flow`, sigma of :class:`VE`,
        ``ln(sigma) / 4`` of :class:`EDM`.
    differentiable
        Whether gradients flow through it; if not it is never asked for any.
    dtype
        Floating-point type that it works in. That of its weights, for a module that has some, and otherwise
        that of the images, if not given.

    Raises
    ------
    PriorError
        If there is no such prediction or time.

    Examples
    --------
    A denoiser ``f(x, sigma)`` of images on [0, 1], such as those of deepinv, is one line:

    >>> import torch
    >>> from priors import Contract, FunctionPrior
    >>> def shrink(x, sigma):
    ...     return x / (1 + sigma[:, None, None, None] ** 2)
    >>> prior = FunctionPrior(shrink, Contract(channels="real"), predicts="D")
    >>> prior.denoise(torch.ones(2, 2), 1.0)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        contract: Contract,
        *,
        predicts: str,
        process: Process | None = None,
        pass_time: PassTime = "own",
        differentiable: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(contract)
        self.process = VE() if process is None else process
        probe = torch.tensor([1.0])
        denoised_weights(predicts, self.process, probe)
        told_time(self.process, pass_time, probe)
        self.function = function
        self.predicts = predicts
        self.pass_time = pass_time
        self.differentiable = differentiable
        if dtype is None and isinstance(function, nn.Module):
            kinds = [weight.dtype for weight in function.parameters() if weight.is_floating_point()]
            dtype = kinds[0] if kinds else None
        self.dtype = dtype

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the function says of noisy images ``x = x0 + sigma z``, ``(B, channels, H, W)``."""
        height, width = x.shape[-2:]
        scaled = padded(self.process.to_network(x, sigma), self.contract.size_multiple)
        time = told_time(self.process, self.pass_time, sigma)
        dtype = x.dtype if self.dtype is None else self.dtype
        if time.is_floating_point():  # in half precision it would say little
            time = time.to(torch.promote_types(dtype, torch.float32))
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            out = self.function(scaled.to(dtype), time)
        if not isinstance(out, Tensor) or out.shape != scaled.shape:
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise PriorError(
                f"the function of prior {self.contract.name!r} was given images {tuple(scaled.shape)} and "
                f"returned {found}"
            )
        return out[..., :height, :width].to(x.dtype)

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`."""
        self.check_channels(x)
        # In double precision: some of these are small differences.
        weights = denoised_weights(self.predicts, self.process, sigma.double())
        p, q = (weight.to(x.dtype)[:, None, None, None] for weight in weights)
        return p * x + q * self.predict(x, sigma)


class ProcessPrior(PretrainedPrior):
    """A pretrained network described by its noise process and what it predicts.

    What a network returns beyond as many channels as it takes, such as a learned variance, is dropped.

    Parameters
    ----------
    network
        Takes ``(B, C, H, W)`` as the process has them and ``(B,)`` times; returns a tensor, or an object
        whose ``sample`` is one.
    contract
        What it was trained for.
    process, predicts, pass_time
        As for :class:`FunctionPrior`.

    Raises
    ------
    PriorError
        If there is no such prediction or time.
    """

    def __init__(
        self,
        network: nn.Module,
        contract: Contract,
        *,
        process: Process,
        predicts: str,
        pass_time: PassTime = "own",
    ) -> None:
        super().__init__(network, contract, contract.num_channels)
        probe = torch.tensor([1.0])
        denoised_weights(predicts, process, probe)
        told_time(process, pass_time, probe)
        self.process, self.predicts, self.pass_time = process, predicts, pass_time

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`PretrainedPrior.evaluate`."""
        time = told_time(self.process, self.pass_time, sigma)
        with self.autocast(x):
            out = self.network(self.process.to_network(x, sigma), time)
        out = (out if isinstance(out, Tensor) else out.sample)[:, : x.shape[1]].float()
        weights = denoised_weights(self.predicts, self.process, sigma.double())
        p, q = (weight.to(x.dtype)[:, None, None, None] for weight in weights)
        return p * x + q * out
