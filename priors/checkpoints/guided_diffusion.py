"""Checkpoints of guided-diffusion and its offspring (DDS, DPS, DiffPIR): the state dict of an ADM U-Net.

The layout tells widths, depths, attention and modulation. It does not tell how attention is divided into
heads, nor the noise schedule. Both are taken from the published configurations (see ``_PUBLISHED``) where a
file has exactly the widths of one; elsewhere the heads are asked for, and the schedule is taken to be linear,
which all but one of the published networks have. Values of images are [-1, 1] for networks of colour images
and [0, 1] for all others; ``value_range`` overrides that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.checkpoints.configuration import agree, constructor_arguments, flag, numbers, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.state_dicts import check_fit, has_keys, shape, state_dict
from priors.errors import PriorError
from priors.networks.adm_unet import ADMSettings, ADMUNet
from priors.pretrained import PretrainedPrior, channel_fields
from priors.processes import DiscreteVP

_USED = (
    "attention_resolutions",
    "channel_mult",
    "class_cond",
    "class_label",
    "conv_resample",
    "diffusion_steps",
    "image_size",
    "in_channels",
    "learn_sigma",
    "noise_schedule",
    "num_channels",
    "num_head_channels",
    "num_heads",
    "num_heads_upsample",
    "num_res_blocks",
    "out_channels",
    "predict_xstart",
    "resblock_updown",
    "rescale_timesteps",
    "type",
    "use_new_attention_order",
    "use_scale_shift_norm",
)
# Arguments of the original code that change nothing in what the network computes.
_WITHOUT_EFFECT = (
    "dropout",
    "resamp_with_conv",
    "rescale_learned_sigmas",
    "timestep_respacing",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "var_type",
)


class _Published(NamedTuple):
    """A published network: what its file tells, and what it does not."""

    model_channels: tuple[int, ...]
    multipliers: tuple[float, ...]
    blocks: tuple[int, ...]
    heads: dict[str, Any]
    schedule: str


_SIXTY_FOUR = {"num_head_channels": 64}
_PUBLISHED = (
    # guided-diffusion 256 and LSUN; DDS knee and AAPM (one block); FFHQ of DPS (128 channels, one block)
    _Published((128, 256), (1, 1, 2, 2, 4, 4), (1, 2), _SIXTY_FOUR, "linear"),
    # guided-diffusion 512
    _Published((256,), (0.5, 1, 1, 2, 2, 4, 4), (2,), _SIXTY_FOUR, "linear"),
    # guided-diffusion 128
    _Published((256,), (1, 1, 2, 3, 4), (2,), {"num_heads": 4, "num_heads_upsample": 4}, "linear"),
    # guided-diffusion 64
    _Published((192,), (1, 2, 3, 4), (3,), {**_SIXTY_FOUR, "use_new_attention_order": True}, "cosine"),
)


class GuidedDiffusion:
    """The family; see the module."""

    name = "guided_diffusion"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`."""
        return has_keys(
            content,
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "middle_block.1.qkv.weight",
            "output_blocks.0.0.in_layers.2.weight",
            "out.2.weight",
        )

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`.

        The file holds one set of weights, whichever it is, so that ``ema`` chooses nothing. Beside the
        arguments of the original constructor, ``class_label`` says of which class the images are, for a
        network that is told.
        """
        weights = state_dict(content, "the checkpoint")
        arguments = constructor_arguments(config, (*_USED, *_WITHOUT_EFFECT))
        if arguments.get("type", "openai") != "openai":
            raise PriorError(f"networks of type {arguments['type']!r} are not read, only those of 'openai'")
        settings = _infer(weights)
        _compare(settings, arguments)
        published = _published(settings)
        settings = _with_heads(settings, arguments, published)
        check_fit(weights, lambda: ADMUNet(settings))
        schedule = arguments.get("noise_schedule", published.schedule if published else "linear")
        noise = {
            "noise_schedule": schedule,
            "diffusion_steps": whole("diffusion_steps", arguments.get("diffusion_steps", 1000), 1, 10**5),
            "predict_xstart": flag("predict_xstart", arguments.get("predict_xstart", False)),
            "rescale_timesteps": flag("rescale_timesteps", arguments.get("rescale_timesteps", False)),
        }
        _process(noise)
        return Recipe(
            {
                "network": settings.as_dict(),
                **noise,
                "class_label": _class_label(settings, arguments.get("class_label")),
            },
            weights,
        )

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        return ADMUNet(_network_settings(settings))

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`."""
        network = _network_settings(settings)
        fields = channel_fields(network.in_channels)
        process = _process(settings)
        # The schedule counts in the network's values, the contract in those of our images.
        low, high = fields.get("value_range", (0.0, 1.0))
        return Contract(
            sigma_min=process.sigma_min / (high - low),
            sigma_max=process.sigma_max / (high - low),
            size_multiple=network.size_multiple,
            name=self.name,
            **fields,
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        network_settings = _network_settings(settings)
        return DiscreteTimePrior(
            network,
            contract,
            _process(settings),
            channels=network_settings.in_channels,
            predicts_image=flag("predict_xstart", settings.get("predict_xstart")),
            time_scale=1000 / settings["diffusion_steps"] if settings.get("rescale_timesteps") else 1.0,
            label=_class_label(network_settings, settings.get("class_label")),
        )


FAMILY = GuidedDiffusion()


class DiscreteTimePrior(PretrainedPrior):
    """A network that predicts the noise (or the image) of a variance-preserving process in steps.

    ``x = x0 + sigma z`` is given to it as ``x / sqrt(1 + sigma^2)`` and with the step whose noise level is
    nearest, and ``D = x - sigma eps`` (Ho, Jain & Abbeel, NeurIPS 2020, Eqs. 4 and 11). Both use ``sigma`` as
    it is: between two steps the input then is what the process would give at ``sigma``, and the network is
    told an index that is half a step off at most. A learned variance, in further channels of the output, is
    dropped.

    Parameters
    ----------
    network
        Takes ``(B, C, H, W)``, ``(B,)`` times and a class; returns C channels or more.
    contract
        What it was trained for.
    process
        Its noise.
    channels
        C.
    predicts_image
        The output is the clean image and not the noise.
    time_scale
        The network is told the step times this.
    label
        Class of the images, for a network that is told.
    """

    def __init__(
        self,
        network: nn.Module,
        contract: Contract,
        process: DiscreteVP,
        *,
        channels: int,
        predicts_image: bool = False,
        time_scale: float = 1.0,
        label: int | None = None,
    ) -> None:
        super().__init__(network, contract, channels)
        self.process = process
        self.channels = channels
        self.predicts_image = predicts_image
        self.time_scale = time_scale
        self.label = label

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`PretrainedPrior.evaluate`."""
        time = self.process.nearest(sigma) * self.time_scale
        label = None
        if self.label is not None:
            label = torch.full((len(x),), self.label, dtype=torch.int64, device=x.device)
        with self.autocast(x):
            out = self.network(self.process.to_network(x, sigma), time, label)
        out = out[:, : self.channels].float()
        return out if self.predicts_image else x - sigma[:, None, None, None] * out


def _network_settings(settings: Mapping[str, Any]) -> ADMSettings:
    values = settings.get("network")
    if not isinstance(values, dict):
        raise PriorError("the prior's settings have no 'network'")
    return ADMSettings.from_dict(values)


def _process(settings: Mapping[str, Any]) -> DiscreteVP:
    steps = whole("diffusion_steps", settings.get("diffusion_steps"), 1, 10**5)
    schedule = settings.get("noise_schedule")
    if schedule == "linear":
        # As many steps as there are, their variances add up to the same.
        return DiscreteVP.linear(steps, 0.1 / steps, 20 / steps)
    if schedule == "cosine":
        return DiscreteVP.cosine(steps)
    raise PriorError(f"noise_schedule is 'linear' or 'cosine', not {schedule!r}")


def _infer(weights: Mapping[str, Tensor]) -> ADMSettings:
    """What the keys and shapes tell; heads are still to come."""
    model_channels = shape(weights, "time_embed.0.weight", 2)[1]
    first_width, in_channels = shape(weights, "input_blocks.0.0.weight", 4)[:2]
    out_channels = shape(weights, "out.2.weight", 4)[0]
    modulation = shape(weights, "middle_block.0.emb_layers.1.weight", 2)[0]
    middle = shape(weights, "middle_block.0.out_layers.3.weight", 4)[0]
    if modulation not in (middle, 2 * middle):
        raise PriorError(f"'middle_block.0.emb_layers.1.weight' has {modulation} rows for {middle} channels")
    down, up = _stages(weights, "input_blocks"), _stages(weights, "output_blocks")
    # On the way up each level ends in a layer with an index of its own beside the block and its attention.
    ends = [
        index for index, names in up.items() if names & {"1.conv", "2.conv", "1.in_layers", "2.in_layers"}
    ]
    plain = [index for index in range(1, max(down) + 1) if index not in down]
    if ends:
        per_level = ends[0] + 1
    elif plain:
        per_level = plain[0]
    else:
        per_level = max(up) + 1
    count = max(up) + 1
    levels, blocks = count // per_level, per_level - 1
    if count % per_level or not blocks or (ends and len(ends) != levels - 1):
        raise PriorError(f"{count} blocks of output_blocks cannot be divided into levels of {per_level}")
    widths, attention = [], []
    for level in range(levels):
        index = 1 + level * per_level
        widths.append(shape(weights, f"input_blocks.{index}.0.out_layers.3.weight", 4)[0])
        if "1.qkv" in down.get(index, ()):
            attention.append(level)
    if widths[0] != first_width:
        raise PriorError(f"'input_blocks.0.0.weight' has {first_width} channels, the first level {widths[0]}")
    classes = shape(weights, "label_emb.weight", 2)[0] if "label_emb.weight" in weights else 0
    return ADMSettings(
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=model_channels,
        widths=tuple(widths),
        num_res_blocks=blocks,
        attention_levels=tuple(attention),
        use_scale_shift_norm=modulation == 2 * middle,
        resblock_updown=levels > 1 and f"input_blocks.{per_level}.0.in_layers.2.weight" in weights,
        conv_resample=not plain,
        num_classes=classes,
    )


def _stages(weights: Mapping[str, Tensor], part: str) -> dict[int, set[str]]:
    """Of each numbered stage of ``part``, the layers in it, as in ``"1.qkv"``."""
    found: dict[int, set[str]] = {}
    for name in weights:
        match = re.fullmatch(rf"{part}\.(\d{{1,4}})\.(\d\.\w+)\..*", name, re.ASCII)
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
    if not found:
        raise PriorError(f"the checkpoint has no stages {part}")
    return found


def _compare(settings: ADMSettings, arguments: Mapping[str, Any]) -> None:
    """Raise if the configuration contradicts what the file tells."""
    single = len(settings.widths) == 1
    learned = settings.out_channels == 2 * settings.in_channels
    if settings.out_channels not in (settings.in_channels, 2 * settings.in_channels):
        raise PriorError(
            f"the network has {settings.out_channels} output and {settings.in_channels} input channels; "
            "there should be as many, or twice as many where the variance is learned"
        )
    for name, found in (
        ("in_channels", settings.in_channels),
        ("out_channels", settings.out_channels),
        ("num_channels", settings.model_channels),
        ("num_res_blocks", settings.num_res_blocks),
    ):
        if name in arguments:
            agree(name, whole(name, arguments[name]), found)
    for name, value in (
        ("learn_sigma", learned),
        ("class_cond", settings.num_classes > 0),
        ("use_scale_shift_norm", settings.use_scale_shift_norm),
        ("resblock_updown", None if single else settings.resblock_updown),
        ("conv_resample", None if single or settings.resblock_updown else settings.conv_resample),
    ):
        if name in arguments and value is not None:
            agree(name, flag(name, arguments[name]), value)
    multipliers = numbers("channel_mult", arguments.get("channel_mult", ""))
    if multipliers:
        given = [int(multiplier * settings.model_channels) for multiplier in multipliers]
        agree("channel_mult, in channels,", given, list(settings.widths))
    if "image_size" in arguments and "attention_resolutions" in arguments:
        size = whole("image_size", arguments["image_size"])
        factors = {size // r for r in numbers("attention_resolutions", arguments["attention_resolutions"])}
        levels = [level for level in range(len(settings.widths)) if 2**level in factors]
        agree("attention_resolutions, as levels,", levels, list(settings.attention_levels))


def _published(settings: ADMSettings) -> _Published | None:
    """The published configuration of exactly these widths and depths."""
    if not settings.use_scale_shift_norm or not settings.resblock_updown:
        return None
    for row in _PUBLISHED:
        widths = tuple(int(multiplier * settings.model_channels) for multiplier in row.multipliers)
        if (
            settings.model_channels in row.model_channels
            and settings.num_res_blocks in row.blocks
            and settings.widths == widths
        ):
            return row
    return None


def _with_heads(
    settings: ADMSettings, arguments: Mapping[str, Any], published: _Published | None
) -> ADMSettings:
    """Settle how attention is divided into heads."""
    order = flag("use_new_attention_order", arguments.get("use_new_attention_order", False))

    def count(name: str) -> int:
        # -1 stands for "not by this argument" in the original.
        value = arguments.get(name, -1)
        return 0 if value == -1 else whole(name, value)

    per_head, heads, heads_up = count("num_head_channels"), count("num_heads"), count("num_heads_upsample")
    if per_head:
        return replace(settings, num_head_channels=per_head, use_new_attention_order=order)
    if heads:
        return replace(
            settings, num_heads=heads, num_heads_upsample=heads_up or heads, use_new_attention_order=order
        )
    if published is None:
        raise PriorError(
            "cannot tell num_head_channels from the file: give config={'num_head_channels': ...}, or "
            "config={'num_heads': ...} if that is how the network was made"
        )
    found = replace(settings, **published.heads)
    if "use_new_attention_order" in arguments:
        found = replace(found, use_new_attention_order=order)
    return found


def _class_label(settings: ADMSettings, label: Any) -> int | None:
    if settings.num_classes == 0:
        if label is not None:
            raise PriorError("config gives class_label, but the network is not told of classes")
        return None
    if label is None:
        raise PriorError(
            f"the network needs to be told one of {settings.num_classes} classes: "
            "give config={'class_label': ...}"
        )
    return whole("class_label", label, 0, settings.num_classes - 1)
