"""State dicts of MONAI's ``DiffusionModelUNet``, unconditional and of two dimensions.

The file tells widths, depths, where attention is and how it is built. It does not tell ``num_head_channels``
and ``norm_num_groups`` of the network, nor what a scheduler was told in the training: ``prediction_type``,
``num_train_timesteps``, ``schedule``, ``beta_start`` and ``beta_end``. These are asked for. The network
itself comes from MONAI, which therefore has to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.checkpoints.configuration import agree, constructor_arguments, real, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.noise_schedules import discrete_process, in_units_of, prediction
from priors.checkpoints.state_dicts import check_fit, has_keys, shape, state_dict
from priors.errors import PriorError
from priors.parameterisation import ProcessPrior
from priors.pretrained import channel_fields

_WRAPPERS = ("state_dict", "model_state_dict", "unet_state_dict", "model", "unet")
_SCHEDULES = {
    "linear_beta": "linear",
    "scaled_linear_beta": "scaled_linear",
    "sigmoid_beta": "sigmoid",
    "cosine": "cosine",
}
_NETWORK = (
    "attention_levels",
    "channels",
    "in_channels",
    "include_fc",
    "norm_eps",
    "norm_num_groups",
    "num_channels",
    "num_head_channels",
    "num_res_blocks",
    "out_channels",
    "resblock_updown",
    "spatial_dims",
    "use_combined_linear",
)
_NOISE = ("prediction_type", "num_train_timesteps", "schedule", "beta_start", "beta_end")
# Arguments that change how a network computes, or how it was trained, but not what it computes.
_WITHOUT_EFFECT = ("dropout_cattn", "upcast_attention", "use_flash_attention", "variance_type", "clip_sample")
# Arguments of conditional networks; only their neutral values pass.
_CONDITION = ("cross_attention_dim", "num_class_embeds", "with_conditioning", "transformer_num_layers")


class MonaiUNet:
    """The family; see the module."""

    name = "monai_unet"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`."""
        return has_keys(_weights(content), "conv_in.conv.weight", "time_embed.0.weight", "out.2.conv.weight")

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`; the layout has no place for averaged weights."""
        arguments = constructor_arguments(config, (*_NETWORK, *_NOISE, *_WITHOUT_EFFECT, *_CONDITION))
        for name in ("cross_attention_dim", "num_class_embeds", "with_conditioning"):
            if arguments.get(name):
                raise PriorError(
                    f"config says {name}: the network is conditional, a prior needs one that is not"
                )
        weights = state_dict(_weights(content), "the checkpoint")
        settings = {"network": _network(weights, arguments), "noise": _noise(arguments)}
        self.contract(settings)  # complains of what is impossible
        check_fit(weights, lambda: self.network(settings))
        return Recipe(settings, weights)

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        try:
            from monai.networks.nets import DiffusionModelUNet
        except ImportError as error:
            raise PriorError(
                f"networks of MONAI need it installed, pip install 'dis-recon[monai]' ({error})"
            ) from None
        return DiffusionModelUNet(**settings["network"])

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`; images of MONAI's tutorials are in [0, 1]."""
        network = settings["network"]
        fields = channel_fields(whole("in_channels", network.get("in_channels")))
        fields["value_range"] = (0.0, 1.0)
        levels = len(network.get("channels", ()))
        return Contract(
            **in_units_of(discrete_process(settings["noise"]), 1.0),
            size_multiple=2 ** max(0, levels - 1),
            name=self.name,
            **fields,
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        noise = settings["noise"]
        return ProcessPrior(
            network, contract, process=discrete_process(noise), predicts=prediction(noise), pass_time="index"
        )


FAMILY = MonaiUNet()


def _weights(content: Any) -> Any:
    if isinstance(content, Mapping):
        for name in _WRAPPERS:
            if isinstance(content.get(name), Mapping):
                return content[name]
    return content


def _network(weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the constructor, from the shapes and from what is said beside them."""
    first = weights.get("conv_in.conv.weight")
    if first is not None and first.ndim == 5:
        raise PriorError("the network is one of volumes; priors see images of two dimensions")
    if any(".attn2." in name or ".transformer_blocks." in name for name in weights):
        raise PriorError("the network is conditional (cross-attention); a prior needs one that is not")
    if "class_embedding.weight" in weights:
        raise PriorError("the network is class-conditional; a prior needs one without a condition")
    levels = 1 + max((_index(name, r"down_blocks\.(\d{1,3})\.") for name in weights), default=-1)
    if not levels:
        raise PriorError("the checkpoint has no down_blocks")
    channels, depths, attention = [], [], []
    for level in range(levels):
        channels.append(shape(weights, f"down_blocks.{level}.resnets.0.conv1.conv.weight", 4)[0])
        depths.append(
            1 + max(_index(name, rf"down_blocks\.{level}\.resnets\.(\d{{1,3}})\.") for name in weights)
        )
        attention.append(f"down_blocks.{level}.attentions.0.norm.weight" in weights)
    found = {
        "spatial_dims": 2,
        "in_channels": shape(weights, "conv_in.conv.weight", 4)[1],
        "out_channels": shape(weights, "out.2.conv.weight", 4)[0],
        "channels": channels,
        "num_res_blocks": depths,
        "attention_levels": attention,
        "resblock_updown": "down_blocks.0.downsampler.conv1.conv.weight" in weights,
        "use_combined_linear": any(".attn.qkv." in name for name in weights),
        "include_fc": any(".attn.out_proj." in name for name in weights),
    }
    given = dict(arguments)
    if "num_channels" in given:  # its name in MONAI's generative package
        given.setdefault("channels", given.pop("num_channels"))
    if isinstance(given.get("num_res_blocks"), int):
        given["num_res_blocks"] = [given["num_res_blocks"]] * levels
    for name, value in found.items():
        if name in given:
            said = given[name]
            agree(name, list(said) if isinstance(said, list | tuple) else said, value)
    return {
        **found,
        "norm_num_groups": whole("norm_num_groups", _asked(arguments, "norm_num_groups")),
        "num_head_channels": _heads(_asked(arguments, "num_head_channels"), levels),
        "norm_eps": real("norm_eps", arguments.get("norm_eps", 1e-6)),
    }


def _index(name: str, pattern: str) -> int:
    match = re.match(pattern, name, re.ASCII)
    return int(match[1]) if match else -1


def _heads(value: Any, levels: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value] * levels
    return [whole("num_head_channels", item, 0) for item in values]


def _noise(arguments: Mapping[str, Any]) -> dict[str, Any]:
    schedule = _asked(arguments, "schedule")
    if schedule not in _SCHEDULES:
        raise PriorError(f"schedule must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")
    names = ["prediction_type", "num_train_timesteps"]
    if schedule != "cosine":
        names += ["beta_start", "beta_end"]
    return {"beta_schedule": _SCHEDULES[schedule], **{name: _asked(arguments, name) for name in names}}


def _asked(arguments: Mapping[str, Any], name: str) -> Any:
    if name not in arguments:
        raise PriorError(
            f"the file does not tell {name}: give config={{{name!r}: ...}} with what the training had"
        )
    return arguments[name]
