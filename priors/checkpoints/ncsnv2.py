"""Checkpoints of NCSNv2 and its offspring (csgm-mri-langevin).

A file is a list: the state dict, that of the optimiser, the epoch, the step, and, where it was kept, the
averaged weights by name, without the prefix ``module.`` and without the table of noise levels. A dict of
``model`` and ``ema`` and a state dict alone are accepted too.

The layout tells channels, widths, the depth and the noise levels. What it does not tell is taken from the
configuration, and else: ``nonlinearity`` is elu and ``rescaled`` false, as in every published NCSNv2, so that
the network takes images in [0, 1] and brings them to [-1, 1] itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior, padded
from priors.checkpoints.configuration import agree, flag, real, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.sections import sectioned_arguments
from priors.checkpoints.state_dicts import check_fit, has_keys, shape, state_dict
from priors.errors import PriorError
from priors.networks.ncsnv2 import NCSNv2, NCSNv2Settings
from priors.pretrained import PretrainedPrior, channel_fields

_USED = (
    "channels",
    "logit_transform",
    "ngf",
    "nonlinearity",
    "normalization",
    "num_classes",
    "rescaled",
    "sigma_begin",
    "sigma_end",
    "spec_norm",
)
# Arguments of the original code that change nothing in what a trained network computes.
_WITHOUT_EFFECT = ("dataset", "ema", "ema_rate", "image_size", "sigma_dist")


class NCSNv2Family:
    """The family; see the module."""

    name = "ncsnv2"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`."""
        return has_keys(
            _parts(content)[0], "begin_conv.weight", "normalizer.alpha", "refine1.crp.convs.0.weight"
        )

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`."""
        arguments = sectioned_arguments(config, (*_USED, *_WITHOUT_EFFECT))
        model, averaged = _parts(content)
        weights = state_dict(model, "model")
        settings, low, high = _infer(weights, arguments)
        check_fit(weights, lambda: NCSNv2(settings))
        if ema and averaged is not None:
            named = state_dict(averaged, "ema")
            # The levels are not trained; averages of every entry hold them all the same.
            weights = {"sigmas": weights["sigmas"], **named}
            try:
                check_fit(weights, lambda: NCSNv2(settings))
            except PriorError as error:
                raise PriorError(
                    f"{error} (in 'ema'; ema=False takes the weights of the last step)"
                ) from None
        levels = {"sigma_min": low, "sigma_max": high}
        return Recipe({"network": settings.as_dict(), **levels}, weights)

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        return NCSNv2(_network_settings(settings))

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`.

        The values that the network calls its own are [0, 1], or [-1, 1] if its images are real and come to it
        ``rescaled``.
        """
        network = _network_settings(settings)
        fields = channel_fields(network.channels)
        both = network.centered and fields["channels"] != "complex"
        low, high = fields["value_range"] = (-1.0, 1.0) if both else (0.0, 1.0)
        return Contract(
            sigma_min=real("sigma_min", settings.get("sigma_min")) / (high - low),
            sigma_max=real("sigma_max", settings.get("sigma_max")) / (high - low),
            name=self.name,
            **fields,
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        return NCSNv2Prior(network, contract, _network_settings(settings))


FAMILY = NCSNv2Family()


class NCSNv2Prior(PretrainedPrior):
    """A score network of Song & Ermon (NeurIPS 2020) as a prior, ``D = x + sigma raw(x)``.

    The noise level enters the network by a division alone (their Technique 3): ``s(x, k) = raw(x) / sigma_k``
    at its levels. So the same formula holds between them, no level need be looked up, and at each level the
    result is Tweedie's ``x + sigma_k^2 s(x, k)``.

    Parameters
    ----------
    network
        An :class:`priors.networks.ncsnv2.NCSNv2`.
    contract
        What it was trained for.
    settings
        Shape of the network.
    """

    def __init__(self, network: nn.Module, contract: Contract, settings: NCSNv2Settings) -> None:
        super().__init__(network, contract, settings.channels)
        self.settings = settings

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`PretrainedPrior.evaluate`; images smaller than the network can take are padded."""
        height, width = x.shape[-2:]
        least = self.settings.smallest
        with self.autocast(x):
            raw = self.network.raw(padded(x, smallest=(least, least)))  # type: ignore[operator]
        return x + sigma[:, None, None, None] * raw[..., :height, :width].float()


def _parts(content: Any) -> tuple[Any, Any]:
    """The state dict and the averaged weights, None if there are none."""
    if isinstance(content, list | tuple):
        if len(content) not in (4, 5):
            return None, None
        return content[0], (content[4] if len(content) == 5 else None)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        return content["model"], content.get("ema")
    return content, None


def _network_settings(settings: Mapping[str, Any]) -> NCSNv2Settings:
    values = settings.get("network")
    if not isinstance(values, dict):
        raise PriorError("the settings of an ncsnv2 prior have no 'network'")
    return NCSNv2Settings.from_dict(values)


def _infer(
    weights: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> tuple[NCSNv2Settings, float, float]:
    """Settings, lowest and highest noise level."""
    ngf, channels = shape(weights, "begin_conv.weight", 4)[:2]
    (count,) = shape(weights, "sigmas", 1)
    for name, found in (("ngf", ngf), ("channels", channels), ("num_classes", count)):
        if name in arguments:
            agree(name, whole(name, arguments[name], 1, 10**6), found)
    if arguments.get("normalization", "InstanceNorm++") != "InstanceNorm++":
        raise PriorError(f"normalization {arguments['normalization']!r} is not read, only 'InstanceNorm++'")
    for name in ("spec_norm", "logit_transform"):
        if flag(name, arguments.get(name, False)):
            raise PriorError(f"networks with {name} are not read")
    sigmas = weights["sigmas"]
    if count < 2 or not bool(((sigmas > 0) & torch.isfinite(sigmas)).all()):
        raise PriorError(f"'sigmas' is no table of at least two positive numbers: {tuple(sigmas.shape)}")
    low, high = float(sigmas.min()), float(sigmas.max())
    if not low < high:
        raise PriorError("'sigmas' holds one noise level only")
    for name, value in (("sigma_begin", float(sigmas[0])), ("sigma_end", float(sigmas[-1]))):
        if name in arguments and abs(real(name, arguments[name]) / value - 1) > 1e-2:
            agree(name, arguments[name], value)
    nonlinearity = arguments.get("nonlinearity", "elu")
    if not isinstance(nonlinearity, str):
        raise PriorError(f"nonlinearity must be a word, got {nonlinearity!r}")
    deepest, deeper = "res31.0.conv1.weight" in weights, "res5.0.conv1.weight" in weights
    settings = NCSNv2Settings(
        channels=channels,
        ngf=ngf,
        depth="NCSNv2Deepest" if deepest else "NCSNv2Deeper" if deeper else "NCSNv2",
        nonlinearity=nonlinearity.lower(),
        centered=flag("rescaled", arguments.get("rescaled", False)),
        num_classes=count,
    )
    return settings, low, high
