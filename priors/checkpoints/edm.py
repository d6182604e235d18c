"""Checkpoints of EDM (NVlabs) and InverseBench: a preconditioned SongUNet or DhariwalUNet.

A file is a flat state dict (NVlabs' own pickles hold code and are not opened; save ``net.state_dict()`` from
them), or the dictionary of InverseBench, ``net, ema, optimizer, scheduler``. The layout tells everything of
the network but these two:

- ``precond``, one of ``EDMPrecond``, ``VEPrecond`` and ``VPPrecond``, which have no weights. InverseBench has
  the first alone, and so has the published DhariwalUNet of NVlabs; it is taken there. It is asked for with a
  flat SongUNet, which exists with all three.
- ``channels_per_head`` of a DhariwalUNet, which its code fixes at 64. It is asked for where the file
  shows that this was changed: attention over fewer channels.

``sigma_data`` is 0.5 unless the configuration says otherwise, as in both code bases.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.checkpoints.configuration import agree, constructor_arguments, numbers, real, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.state_dicts import check_fit, has_keys, shape, state_dict
from priors.errors import PriorError
from priors.networks.dhariwal_unet import DhariwalSettings, DhariwalUNet
from priors.networks.edm_preconditioning import EDMPrecond, Preconditioned, VEPrecond, VPPrecond
from priors.networks.song_unet import SongSettings, SongUNet
from priors.pretrained import PretrainedPrior, channel_fields

_NETWORKS: dict[str, tuple[Any, Any]] = {
    "SongUNet": (SongSettings, SongUNet),
    "DhariwalUNet": (DhariwalSettings, DhariwalUNet),
}
_PRECONDITIONINGS: dict[str, type[Preconditioned]] = {
    "EDMPrecond": EDMPrecond,
    "VEPrecond": VEPrecond,
    "VPPrecond": VPPrecond,
}
# What each is constructed with beside the network, where the configuration gives it.
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "EDMPrecond": ("sigma_data", "sigma_min", "sigma_max"),
    "VEPrecond": ("sigma_min", "sigma_max"),
    "VPPrecond": ("beta_d", "beta_min", "M", "epsilon_t"),
}
_USED = (
    "attn_resolutions",
    "augment_dim",
    "channel_mult",
    "channel_mult_emb",
    "channel_mult_noise",
    "channels_per_head",
    "class_label",
    "class_name",
    "decoder_type",
    "embedding_type",
    "encoder_type",
    "img_channels",
    "img_resolution",
    "label_dim",
    "model_channels",
    "model_type",
    "num_blocks",
    "precond",
    "resample_filter",
    *sorted({name for names in _CONSTANTS.values() for name in names}),
)
# Arguments of the original code that change nothing in what the network computes.
_WITHOUT_EFFECT = ("dropout", "label_dropout", "use_fp16")


class EDM:
    """The family; see the module."""

    name = "edm"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`."""
        return _is_network(content) or (
            isinstance(content, Mapping) and any(_is_network(content.get(name)) for name in ("net", "ema"))
        )

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`.

        Beside the arguments of the original constructors, ``class_label`` says of which class the images are,
        for a network that can be told; without it the network is told of none, a vector of zeros.
        """
        weights, wrapped = _select(content, ema)
        arguments = constructor_arguments(config, (*_USED, *_WITHOUT_EFFECT))
        kind, found = _infer(weights)
        agree("model_type", arguments.get("model_type", kind), kind)
        if kind == "DhariwalUNet":
            found["channels_per_head"] = _channels_per_head(weights, found, arguments)
        elif "channels_per_head" in arguments:
            raise PriorError("config gives channels_per_head, but a SongUNet has one head")
        settings = _NETWORKS[kind][0](**found)
        _compare(kind, settings, arguments)
        precond = _preconditioning(kind, wrapped, weights, settings, arguments)
        for name in sorted({name for names in _CONSTANTS.values() for name in names} & set(arguments)):
            if name not in _CONSTANTS[precond]:
                raise PriorError(f"config gives {name}, which {precond} does not have")
        constants = {
            name: whole(name, arguments[name]) if name == "M" else real(name, arguments[name])
            for name in _CONSTANTS[precond]
            # The original's own bounds of EDMPrecond are 0 and infinity, which bound nothing.
            if name in arguments and not _is_no_bound(name, arguments[name])
        }
        result = {
            "model_type": kind,
            "network": settings.as_dict(),
            "precond": precond,
            "constants": constants,
            "class_label": _class_label(settings, arguments.get("class_label")),
        }
        check_fit(weights, lambda: self.network(result))
        return Recipe(result, weights)

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        kind, precond = settings.get("model_type"), settings.get("precond")
        if not isinstance(kind, str) or kind not in _NETWORKS:
            raise PriorError(f"model_type is one of {sorted(_NETWORKS)}, not {kind!r}")
        if not isinstance(precond, str) or precond not in _PRECONDITIONINGS:
            raise PriorError(f"precond is one of {sorted(_PRECONDITIONINGS)}, not {precond!r}")
        constants = settings.get("constants")
        if not isinstance(constants, dict) or not set(constants) <= set(_CONSTANTS[precond]):
            raise PriorError(f"{precond} has the constants {_CONSTANTS[precond]}, got {constants!r}")
        for name, value in constants.items():
            real(name, value)
        network = _NETWORKS[kind][1](_network_settings(settings))
        try:
            return _PRECONDITIONINGS[precond](network, **constants)
        except OverflowError:
            raise PriorError(f"{precond} with the constants {constants} has no highest noise level") from None

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`."""
        network = _network_settings(settings)
        with torch.device("meta"):
            levels = self.network(settings)
        assert isinstance(levels, Preconditioned)
        fields = channel_fields(network.in_channels)
        # The levels are those of the network's values, the contract counts in those of our images.
        low, high = fields.get("value_range", (0.0, 1.0))
        return Contract(
            sigma_min=levels.sigma_min / (high - low),
            sigma_max=levels.sigma_max / (high - low),
            size_multiple=network.size_multiple,
            name=self.name,
            **fields,
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        shape_of = _network_settings(settings)
        label = _class_label(shape_of, settings.get("class_label"))
        return EDMPrior(network, contract, shape_of.in_channels, shape_of.label_dim, label)


FAMILY = EDM()


class EDMPrior(PretrainedPrior):
    """A preconditioned network, which is a denoiser in the coordinate ``x = x0 + sigma z`` already.

    Parameters
    ----------
    network
        One of :mod:`priors.networks.edm_preconditioning`.
    contract
        What it was trained for.
    channels
        Channels of its images.
    label_dim
        Classes that it can be told of.
    label
        The class that it is told; None for zeros.
    """

    def __init__(
        self,
        network: nn.Module,
        contract: Contract,
        channels: int,
        label_dim: int = 0,
        label: int | None = None,
    ) -> None:
        super().__init__(network, contract, channels)
        self.label_dim = label_dim
        self.label = label

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`PretrainedPrior.evaluate`."""
        classes = x.new_zeros(1, self.label_dim) if self.label_dim else None
        if classes is not None and self.label is not None:
            classes[:, self.label] = 1
        with self.autocast(x):
            return self.network(x, sigma, classes).float()


def _is_network(content: Any) -> bool:
    return has_keys(content, "model.map_layer0.weight", "model.map_layer1.weight") and any(
        re.search(r"(^|\.)model\.enc\.\d+x\d+_conv\.weight$", name) for name in content
    )


def _select(content: Any, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The weights to take, and whether they lie in the dictionary of InverseBench."""
    if _is_network(content):
        return state_dict(content, "the checkpoint"), False
    if not isinstance(content, Mapping):
        raise PriorError(f"the checkpoint is no dictionary but {type(content).__name__}")
    if ema and content.get("ema") is not None:
        return state_dict(content["ema"], "'ema'"), True
    if content.get("net") is None:
        raise PriorError("the checkpoint has no 'net', only averaged weights: take those (ema=True)")
    return state_dict(content["net"], "'net'"), True


def _infer(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Which network it is, and what the keys and shapes tell of it."""
    first = [
        match
        for match in (re.fullmatch(r"model\.enc\.(\d{1,5})x\1_conv\.weight", k) for k in weights)
        if match
    ]
    if len(first) != 1:
        raise PriorError("the checkpoint does not have exactly one 'model.enc.<size>x<size>_conv.weight'")
    size = int(first[0][1])
    song = f"model.dec.{size}x{size}_aux_conv.weight" in weights
    if not song and "model.out_conv.weight" not in weights:
        raise PriorError("the checkpoint has the output layers of neither a SongUNet nor a DhariwalUNet")
    sides = [size]
    while sides[-1] > 1 and f"model.enc.{sides[-1] // 2}x{sides[-1] // 2}_down.conv0.weight" in weights:
        sides.append(sides[-1] // 2)
    blocks = 0
    while f"model.enc.{size}x{size}_block{blocks}.conv0.weight" in weights:
        blocks += 1
    stem = shape(weights, first[0][0], 4)
    embedding, noise = shape(weights, "model.map_layer0.weight", 2)
    out_key = f"dec.{size}x{size}_aux_conv" if song else "out_conv"
    found: dict[str, Any] = {
        "img_resolution": size,
        "in_channels": stem[1],
        "out_channels": shape(weights, f"model.{out_key}.weight", 4)[0],
        "model_channels": stem[0] if song else noise,
        "widths": tuple(shape(weights, f"model.enc.{s}x{s}_block0.conv0.weight", 4)[0] for s in sides),
        "num_blocks": blocks,
        "embedding_channels": embedding,
        "attention_levels": tuple(
            level for level, s in enumerate(sides) if f"model.enc.{s}x{s}_block0.qkv.weight" in weights
        ),
        "label_dim": _second(weights, "model.map_label.weight"),
        "augment_dim": _second(weights, "model.map_augment.weight"),
    }
    if not song:
        return "DhariwalUNet", found
    found["noise_channels"] = noise
    found["embedding_type"] = "fourier" if "model.map_noise.freqs" in weights else "positional"
    if len(sides) > 1:
        side = sides[1]
        if f"model.enc.{side}x{side}_aux_residual.weight" in weights:
            found["encoder_type"] = "residual"
        elif f"model.enc.{side}x{side}_aux_skip.weight" in weights:
            found["encoder_type"] = "skip"
        if f"model.dec.{side}x{side}_aux_conv.weight" in weights:
            found["decoder_type"] = "skip"
        found["resample_filter"] = _taps(weights, f"model.enc.{side}x{side}_down.conv0.resample_filter")
    return "SongUNet", found


def _taps(weights: Mapping[str, Tensor], key: str) -> tuple[float, ...]:
    """Taps of a filter in one dimension, the smallest 1: what the original code is given."""
    shape(weights, key, 4)
    if not weights[key].numel():
        raise PriorError(f"{key!r} is an empty filter")
    # An outer product of taps of sum 1, so that its rows add up to them.
    row = weights[key][0, 0].double().sum(-1)
    smallest = row.abs()[row != 0]
    return tuple((row / smallest.min()).tolist()) if len(smallest) else tuple(row.tolist())


def _second(weights: Mapping[str, Tensor], key: str) -> int:
    return shape(weights, key, 2)[1] if key in weights else 0


def _channels_per_head(
    weights: Mapping[str, Tensor], found: Mapping[str, Any], arguments: Mapping[str, Any]
) -> int:
    middle = found["img_resolution"] >> (len(found["widths"]) - 1)
    attended = [found["widths"][level] for level in found["attention_levels"]]
    if f"model.dec.{middle}x{middle}_in0.qkv.weight" in weights:
        attended.append(found["widths"][-1])
    if "channels_per_head" in arguments:
        return whole("channels_per_head", arguments["channels_per_head"])
    if attended and min(attended) < 64:
        raise PriorError(
            "cannot tell channels_per_head from the file, whose attention is over fewer than the 64 channels "
            "of a head in the original code: give config={'channels_per_head': ...}"
        )
    return 64


def _compare(kind: str, settings: Any, arguments: Mapping[str, Any]) -> None:
    """Raise if the configuration contradicts what the file tells."""
    for name, value in (
        ("img_resolution", settings.img_resolution),
        ("model_channels", settings.model_channels),
        ("num_blocks", settings.num_blocks),
        ("img_channels", settings.in_channels),
        ("label_dim", settings.label_dim),
        ("augment_dim", settings.augment_dim),
    ):
        if name in arguments:
            agree(name, whole(name, arguments[name], 0), value)
    base = settings.model_channels
    if "channel_mult" in arguments:
        given = [multiplier * base for multiplier in numbers("channel_mult", arguments["channel_mult"])]
        agree("channel_mult, in channels,", given, list(settings.widths))
    if "channel_mult_emb" in arguments:
        given_emb = whole("channel_mult_emb", arguments["channel_mult_emb"]) * base
        agree("channel_mult_emb, in channels,", given_emb, settings.embedding_channels)
    if "attn_resolutions" in arguments:
        sides = numbers("attn_resolutions", arguments["attn_resolutions"])
        levels = [
            level
            for level, width in enumerate(settings.widths)
            if settings.img_resolution >> level in sides
            and (kind == "SongUNet" or width >= settings.channels_per_head)
        ]
        agree("attn_resolutions, as levels,", levels, list(settings.attention_levels))
    if kind == "DhariwalUNet":
        return
    if "channel_mult_noise" in arguments:
        given_noise = whole("channel_mult_noise", arguments["channel_mult_noise"]) * base
        agree("channel_mult_noise, in channels,", given_noise, settings.noise_channels)
    if "embedding_type" in arguments:
        agree("embedding_type", arguments["embedding_type"], settings.embedding_type)
    if len(settings.widths) > 1:
        for name in ("encoder_type", "decoder_type"):
            if name in arguments:
                agree(name, arguments[name], getattr(settings, name))
        if "resample_filter" in arguments:
            taps = numbers("resample_filter", arguments["resample_filter"])
            smallest = min(taps, default=1.0)
            given = [round(tap / smallest, 3) for tap in taps]
            agree("resample_filter", given, [round(tap, 3) for tap in settings.resample_filter])


def _preconditioning(
    kind: str, wrapped: bool, weights: Mapping[str, Tensor], settings: Any, arguments: Mapping[str, Any]
) -> str:
    if "u" in weights or settings.out_channels != settings.in_channels:
        raise PriorError(
            f"the network has {settings.out_channels} output and {settings.in_channels} input channels, as "
            "iDDPMPrecond has them; only EDMPrecond, VEPrecond and VPPrecond are read"
        )
    names = []
    for argument in ("precond", "class_name"):
        if argument in arguments:
            given = arguments[argument]
            short = given.rpartition(".")[2] if isinstance(given, str) else None
            name = {"edm": "EDMPrecond", "ve": "VEPrecond", "vp": "VPPrecond"}.get(str(short), short)
            if name not in _PRECONDITIONINGS:
                raise PriorError(f"{argument} is one of {sorted(_PRECONDITIONINGS)}, not {given!r}")
            names.append(name)
    if names:
        agree("precond", names[0], names[-1])
        return str(names[0])
    if wrapped or kind == "DhariwalUNet":
        return "EDMPrecond"
    raise PriorError(
        "cannot tell precond from the file, the preconditioning that the network was trained in: give "
        "config={'precond': ...}, one of 'EDMPrecond', 'VEPrecond' and 'VPPrecond'"
    )


def _is_no_bound(name: str, value: Any) -> bool:
    return name in ("sigma_min", "sigma_max") and value in (0, math.inf)


def _network_settings(settings: Mapping[str, Any]) -> Any:
    kind, values = settings.get("model_type"), settings.get("network")
    if not isinstance(kind, str) or kind not in _NETWORKS or not isinstance(values, dict):
        raise PriorError("the prior's settings have no known 'model_type' or no 'network'")
    return _NETWORKS[kind][0].from_dict(values)


def _class_label(settings: Any, label: Any) -> int | None:
    if label is None:
        return None
    if not settings.label_dim:
        raise PriorError("config gives class_label, but the network cannot be told of classes")
    return whole("class_label", label, 0, settings.label_dim - 1)
