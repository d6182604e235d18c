"""Checkpoints of score_sde_pytorch and its offspring (Score-MRI, MCG): NCSN++ networks.

A file is a dict of ``optimizer``, ``model``, ``ema`` and ``step``. The averaged weights,
``ema["shadow_params"]``, are a list without names: that of the trained parameters, in the network's order.
What is not trained, the Fourier frequencies and the table of noise levels, is in ``model`` only. A state dict
alone is accepted too.

The layout tells the channels, widths, depths, attention, the kind of blocks and of embedding, the skip
connections of images, and the noise levels. What it does not tell is taken from the configuration, and else:

- ``fir`` is asked for, unless a layer of the network shows it; ``fir_kernel`` is 1, 3, 3, 1.
- ``skip_rescale`` is true and ``nonlinearity`` swish, as in every published NCSN++.
- ``sde`` is ``vesde`` with Fourier features, as in every published network; else it is asked for, and so is,
  for ``vpsde``, whether it is ``continuous``.
- ``centered`` is false and ``scale_by_sigma`` true for ``vesde``, the reverse for the others. A network that
  is not ``centered`` takes images in [0, 1] and brings them to [-1, 1] itself.
- ``beta_min`` is 0.1 and ``beta_max`` 20.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from priors.base import Contract, ScorePrior
from priors.checkpoints.configuration import agree, flag, numbers, real, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.sections import sectioned_arguments
from priors.checkpoints.state_dicts import check_fit, state_dict
from priors.errors import PriorError
from priors.networks.ncsnpp import NCSNpp, NCSNppSettings
from priors.pretrained import PretrainedPrior, channel_fields
from priors.processes import VP, DiscreteVP

_COUNTS = ("nf", "num_res_blocks", "num_scales")
_FLAGS = ("conditional", "resamp_with_conv", "fir", "skip_rescale", "centered", "scale_by_sigma")
_WORDS = (
    "embedding_type",
    "resblock_type",
    "nonlinearity",
    "progressive",
    "progressive_input",
    "progressive_combine",
)
_OTHERS = (
    "attn_resolutions",
    "beta_max",
    "beta_min",
    "ch_mult",
    "continuous",
    "fir_kernel",
    "image_size",
    "name",
    "normalization",
    "num_channels",
    "sde",
    "sigma_max",
    "sigma_min",
)
# Arguments of the original code that change nothing in what a trained network computes.
_WITHOUT_EFFECT = ("attention_type", "conv_size", "dropout", "ema_rate", "fourier_scale", "init_scale")
_PROCESSES = ("vesde", "vpsde", "subvpsde")


class ScoreSDE:
    """The family; see the module."""

    name = "score_sde"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`."""
        if not isinstance(content, Mapping):
            return False
        model = content.get("model", content)
        if not isinstance(model, Mapping):
            return False
        return any(isinstance(key, str) and re.match(r"(\w+\.)*all_modules\.\d", key) for key in model)

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`."""
        arguments = sectioned_arguments(config, (*_COUNTS, *_FLAGS, *_WORDS, *_OTHERS, *_WITHOUT_EFFECT))
        for name, only in (("name", "ncsnpp"), ("normalization", "GroupNorm")):
            if arguments.get(name, only) != only:
                raise PriorError(f"networks with {name} = {arguments[name]!r} are not read, only {only!r}")
        model = content.get("model", content)
        weights = state_dict(model, "model")
        sigmas = _levels(weights, model)
        try:
            found = _infer(weights)
        except (IndexError, ZeroDivisionError):
            raise PriorError("the layers in all_modules are not in the order of an NCSN++") from None
        _compare(found, arguments)
        process = _process_settings(found["embedding_type"], arguments, sigmas)
        settings = _complete(found, arguments, process)
        check_fit(weights, lambda: NCSNpp(settings))
        if ema and "ema" in content:
            weights |= _averaged(content["ema"], settings)
        weights["sigmas"] = sigmas
        return Recipe({"network": settings.as_dict(), "process": process}, weights)

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        return NCSNpp(_network_settings(settings))

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`.

        The values that the network calls its own are [0, 1], or [-1, 1] if it is ``centered`` and its images
        are real.
        """
        network = _network_settings(settings)
        fields = channel_fields(network.channels)
        both = network.centered and fields["channels"] != "complex"
        low, high = fields["value_range"] = (-1.0, 1.0) if both else (0.0, 1.0)
        sigma_min, sigma_max = _clock(settings).range
        return Contract(
            sigma_min=sigma_min / (high - low),
            sigma_max=sigma_max / (high - low),
            size_multiple=network.size_multiple,
            name=self.name,
            **fields,
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        return ScoreSDEPrior(network, contract, _network_settings(settings).channels, _clock(settings))


FAMILY = ScoreSDE()


class _Clock:
    """How a network of this code base is told the noise level, and what its output means.

    Parameters
    ----------
    values
        ``sde``, ``continuous``, ``sigma_min``, ``sigma_max``, ``beta_min``, ``beta_max``, ``num_scales``.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.sde = values.get("sde")
        if not isinstance(self.sde, str) or self.sde not in _PROCESSES:
            raise PriorError(f"sde is {', '.join(map(repr, _PROCESSES))}, not {self.sde!r}")
        self.continuous = flag("continuous", values.get("continuous"))
        if self.sde == "vesde":
            self.range = (
                real("sigma_min", values.get("sigma_min")),
                real("sigma_max", values.get("sigma_max")),
            )
            if not self.range[0] < self.range[1]:
                raise PriorError(f"sigma_min and sigma_max must increase, got {self.range}")
            return
        steps = whole("num_scales", values.get("num_scales"), 2, 10**5)
        start, end = real("beta_min", values.get("beta_min")), real("beta_max", values.get("beta_max"))
        self.vp: VP | DiscreteVP
        if self.continuous:
            self.vp = VP(start, end, t_min=1e-3)
        elif self.sde == "vpsde":
            self.vp = DiscreteVP.linear(steps, start / steps, end / steps)
        else:
            raise PriorError("networks of the sub-VP process are continuous: config says continuous = False")
        self.range = self.vp.sigma_min, self.vp.sigma_max
        if self.sde == "subvpsde":  # 1 - abar is the standard deviation here, not its square
            low, high = self.range
            self.range = low**2 / math.hypot(1, low), high**2 / math.hypot(1, high)

    def signal(self, sigma: Tensor) -> Tensor:
        """Scale ``(B,)`` of the image in what the network is given."""
        if self.sde == "subvpsde":
            return 2 / (torch.sqrt(sigma**2 + 4) + sigma)
        return (1 + sigma**2).rsqrt()

    def label(self, sigma: Tensor, levels: Tensor) -> Tensor:
        """What the network is told, ``(B,)``; ``levels`` is its table of noise levels."""
        if self.sde == "vesde":
            if self.continuous:
                return sigma
            distance = levels.log()[None] - sigma.detach().to(levels.dtype).log()[:, None]
            return distance.abs().argmin(dim=1)
        if isinstance(self.vp, DiscreteVP):
            return self.vp.nearest(sigma)
        # The level at which the variance-preserving process has as much signal.
        double = sigma.double()
        same = (self.signal(double) ** -2 - 1).sqrt() if self.sde == "subvpsde" else double
        return (999 * self.vp.time(same)).to(sigma.dtype)


class ScoreSDEPrior(PretrainedPrior):
    """A score network of Song et al. (ICLR 2021) as a prior.

    For the variance-exploding process ``D = x + sigma^2 s(x, sigma)`` (Tweedie's formula). Of a
    network that knows a table of levels the denoiser of the nearest one is taken, ``x + sigma_k^2 s(x, k)``:
    it changes less between two levels than the score does. Networks of the variance-preserving processes
    estimate the noise, ``D = x - sigma eps(alpha x, t)``, with alpha the scale of the image at that level.

    Parameters
    ----------
    network
        An :class:`priors.networks.ncsnpp.NCSNpp`.
    contract
        What it was trained for.
    channels
        Channels of its images.
    clock
        Its noise process.
    """

    def __init__(self, network: nn.Module, contract: Contract, channels: int, clock: _Clock) -> None:
        super().__init__(network, contract, channels)
        self.clock = clock

    def evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`PretrainedPrior.evaluate`."""
        levels: Tensor = self.network.sigmas  # type: ignore[assignment]
        label = self.clock.label(sigma, levels)
        exploding = self.clock.sde == "vesde"
        given = x if exploding else x * self.clock.signal(sigma)[:, None, None, None]
        with self.autocast(x):
            out = self.network(given, label)
        if not exploding:
            return x - sigma[:, None, None, None] * out.float()
        told = sigma if self.clock.continuous else levels[label].to(sigma.dtype)
        return x + told[:, None, None, None] ** 2 * out.float()


def _network_settings(settings: Mapping[str, Any]) -> NCSNppSettings:
    values = settings.get("network")
    if not isinstance(values, dict):
        raise PriorError("the settings of a score_sde prior have no 'network'")
    return NCSNppSettings.from_dict(values)


def _clock(settings: Mapping[str, Any]) -> _Clock:
    values = settings.get("process")
    if not isinstance(values, dict):
        raise PriorError("the settings of a score_sde prior have no 'process'")
    return _Clock(values)


def _levels(weights: Mapping[str, Tensor], model: Mapping[str, Any]) -> Tensor:
    """The table of noise levels, in the precision in which it is stored."""
    key = next((name for name in model if name == "sigmas" or name.endswith(".sigmas")), None)
    if key is None or "sigmas" not in weights:
        raise PriorError("the checkpoint lacks 'sigmas', the table of noise levels")
    sigmas: Tensor = model[key].detach()
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool(((sigmas > 0) & torch.isfinite(sigmas)).all()):
        raise PriorError(f"'sigmas' is no table of at least two positive numbers: {tuple(sigmas.shape)}")
    if not bool(sigmas.min() < sigmas.max()):
        raise PriorError("'sigmas' holds one noise level only")
    return sigmas


def _averaged(ema: Any, settings: NCSNppSettings) -> dict[str, Tensor]:
    """Weights of the list in ``ema``, under their names."""
    values = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(values, list | tuple):
        raise PriorError("'ema' holds no list 'shadow_params'; ema=False takes the weights of the last step")
    with torch.device("meta"):
        parameters = dict(NCSNpp(settings).named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if len(values) == len(parameters):
        names = list(parameters)  # some average what is not trained too
    if len(values) != len(names):
        raise PriorError(f"'shadow_params' holds {len(values)} tensors, the network {len(names)} parameters")
    averaged = state_dict(dict(zip(names, values, strict=True)), "shadow_params")
    for number, (name, value) in enumerate(averaged.items()):
        if value.shape != parameters[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(parameters[name].shape)} as {name!r} has"
            raise PriorError(f"entry {number} of 'shadow_params' has the shape {shapes}")
    return averaged


class _Layer(NamedTuple):
    """What the weights of one layer tell of it."""

    kind: str
    inner: int = 0
    outer: int = 0
    shortcut: str = ""


def _layers(weights: Mapping[str, Tensor]) -> list[_Layer]:
    """Every layer of ``all_modules``, in order; those without weights, which numbers left out show, too."""
    groups: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"all_modules\.(\d{1,6})\.([\w.]+)", name, re.ASCII)
        if match:
            groups.setdefault(int(match[1]), {})[match[2]] = value
        elif name != "sigmas":
            raise PriorError(f"the checkpoint has {name!r}, which an NCSN++ has not")
    if not groups or max(groups) > 2 * len(groups):
        raise PriorError("the numbers of the layers in all_modules have gaps")
    return [_layer(number, groups.get(number, {})) for number in range(max(groups) + 1)]


def _layer(number: int, group: Mapping[str, Tensor]) -> _Layer:
    def sizes(name: str, ndim: int) -> tuple[int, ...]:
        value = group.get(name)
        if value is None or value.ndim != ndim:
            raise PriorError(f"'all_modules.{number}' is no layer of an NCSN++: it has {sorted(group)[:4]}")
        return tuple(value.shape)

    if not group:
        return _Layer("none")
    if "W" in group:
        return _Layer("fourier", outer=sizes("W", 1)[0])
    if "NIN_3.W" in group:
        return _Layer("attention")
    if "Conv_1.weight" in group:
        outer, inner = sizes("Conv_0.weight", 4)[:2]
        shortcut = "Conv_2" if "Conv_2.weight" in group else "NIN_0" if "NIN_0.W" in group else ""
        resamples = shortcut == "Conv_2" and inner == outer
        return _Layer("resampling block" if resamples else "block", inner, outer, shortcut)
    if "Conv2d_0.weight" in group:
        outer, inner = sizes("Conv2d_0.weight", 4)[:2]
        return _Layer("filtered", inner, outer)
    if "Conv_0.weight" in group:
        outer, inner, size, _ = sizes("Conv_0.weight", 4)
        return _Layer("combine" if size == 1 else "plain", inner, outer)
    for kind, ndim in (("norm", 1), ("linear", 2)):
        if "weight" in group and group["weight"].ndim == ndim:
            return _Layer(kind)
    outer, inner = sizes("weight", 4)[:2]
    return _Layer("conv", inner, outer)


def _infer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that the layers show; what they do not show is left out."""
    layers = _layers(weights)
    found: dict[str, Any] = {"num_scales": len(weights["sigmas"])}
    first = int(layers[0].kind == "fourier")
    found["embedding_type"] = "fourier" if first else "positional"
    found["conditional"] = layers[first].kind == "linear"
    first += 2 * found["conditional"]
    stem = layers[first]
    if stem.kind != "conv":
        raise PriorError(f"'all_modules.{first}' should be the first convolution")
    found["channels"], found["nf"] = stem.inner, stem.outer
    # Blocks and their attention, and between them what leads from one resolution to the next.
    runs: list[list[_Layer]] = []
    between: list[list[_Layer]] = []
    for layer in layers[first + 1 :]:
        inside = layer.kind in ("block", "attention")
        if inside and len(runs) == len(between):
            runs.append([])
        elif not inside and len(runs) != len(between):
            between.append([])
        (runs if inside else between)[-1].append(layer)
    counts = [sum(layer.kind == "block" for layer in run) for run in runs]
    if len(runs) % 2 == 0 or len(between) != len(runs):
        raise PriorError("the layers in all_modules do not go down and up through the same resolutions")
    # The deepest run holds that resolution's blocks of both ways and two between them.
    levels = (len(runs) + 1) // 2
    found["num_res_blocks"] = counts[0] if levels > 1 else (counts[0] - 3) // 2
    outer = [run[0].outer for run in runs[:levels]]
    if any(width % stem.outer for width in outer):
        raise PriorError(f"widths {outer} of the resolutions are no multiples of nf = {stem.outer}")
    found["ch_mult"] = tuple(width // stem.outer for width in outer)
    found["attention_levels"] = tuple(
        level for level in range(levels) if len(runs[level]) > 1 and runs[level][1].kind == "attention"
    )
    shortcuts = {layer.shortcut for run in runs for layer in run} - {""}
    found["resblock_type"] = "biggan" if "Conv_2" in shortcuts else "ddpm"
    found |= _infer_resampling(layers, runs, between, levels, found["resblock_type"])
    return found


def _infer_resampling(
    layers: Sequence[_Layer],
    runs: Sequence[Sequence[_Layer]],
    between: Sequence[Sequence[_Layer]],
    levels: int,
    resblock_type: str,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kinds = {layer.kind for layer in layers}
    if kinds & {"filtered", "plain"}:
        found["fir"] = "filtered" in kinds
    # One resolution alone has no skips of images, and its output is the same with "none" and "output_skip".
    if levels == 1:
        found["progressive"] = "residual" if len(between[0]) == 4 else "none"
        return found
    if resblock_type == "ddpm":
        found["resamp_with_conv"] = between[0][0].kind != "none"
    image = between[0][1].kind if len(between[0]) > 1 else ""
    found["progressive_input"] = {"": "none", "combine": "input_skip"}.get(image, "residual")
    if image == "combine":
        doubled = runs[1][0].inner == 2 * between[0][1].outer
        found["progressive_combine"] = "cat" if doubled else "sum"
    if between[levels - 1][0].kind != "norm":
        found["progressive"] = "none"
    else:
        found["progressive"] = "output_skip" if between[-1][0].kind == "norm" else "residual"
    return found


def _compare(found: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise if the configuration contradicts what the file tells."""
    levels = len(found["ch_mult"])
    for name in _COUNTS:
        if name in arguments:
            agree(name, whole(name, arguments[name], 1, 10**6), found[name])
    if "num_channels" in arguments:
        agree("num_channels", whole("num_channels", arguments["num_channels"]), found["channels"])
    if "ch_mult" in arguments:
        agree("ch_mult", numbers("ch_mult", arguments["ch_mult"]), list(found["ch_mult"]))
    for name in _FLAGS:
        if name in arguments:
            agree(name, flag(name, arguments[name]), found.get(name, arguments[name]))
    for name in _WORDS:
        given = _word(name, arguments)
        if given is not None and (name, levels) != ("progressive", 1):
            agree(name, given, found.get(name, given))
    if "image_size" in arguments and "attn_resolutions" in arguments:
        size = whole("image_size", arguments["image_size"])
        widths = numbers("attn_resolutions", arguments["attn_resolutions"])
        built = [level for level in range(levels) if size // 2**level in widths]
        agree("attn_resolutions, as levels,", built, list(found["attention_levels"]))


def _word(name: str, arguments: Mapping[str, Any]) -> str | None:
    value = arguments.get(name)
    if value is not None and not isinstance(value, str):
        raise PriorError(f"{name} must be a word, got {value!r}")
    return None if value is None else value.lower()


def _process_settings(embedding: str, arguments: Mapping[str, Any], sigmas: Tensor) -> dict[str, Any]:
    """The noise process, JSON-ready; see :class:`_Clock`."""
    sde = _word("sde", arguments) or ("vesde" if embedding == "fourier" else None)
    if sde is None:
        raise PriorError(
            "the file does not tell the noise process: give config={'sde': ...}, one of "
            f"{', '.join(map(repr, _PROCESSES))}"
        )
    continuous = arguments.get("continuous")
    if sde == "vesde":
        known = embedding == "fourier"
        if continuous is not None and flag("continuous", continuous) != known:
            raise PriorError(
                f"config says continuous = {continuous}; a network of the process 'vesde' with {embedding} "
                f"features is {'' if known else 'not '}continuous"
            )
        continuous = known
    elif sde not in _PROCESSES:
        raise PriorError(f"sde is {', '.join(map(repr, _PROCESSES))}, not {sde!r}")
    elif continuous is None and sde == "subvpsde":
        continuous = True
    elif continuous is None:
        raise PriorError("the file does not tell how time is counted: give config={'continuous': ...}")
    low, high = float(sigmas.min()), float(sigmas.max())
    for name, value in (("sigma_min", low), ("sigma_max", high)):
        if name in arguments and abs(real(name, arguments[name]) / value - 1) > 1e-2:
            agree(name, arguments[name], value)
    values = {
        "sde": sde,
        "continuous": flag("continuous", continuous),
        "num_scales": len(sigmas),
        "sigma_min": low,
        "sigma_max": high,
        "beta_min": real("beta_min", arguments.get("beta_min", 0.1)),
        "beta_max": real("beta_max", arguments.get("beta_max", 20.0)),
    }
    _Clock(values)
    return values


def _complete(
    found: Mapping[str, Any], arguments: Mapping[str, Any], process: Mapping[str, Any]
) -> NCSNppSettings:
    """Settings from what the file tells, what the configuration adds, and what is usual."""
    values: dict[str, Any] = {}
    for name in (*_FLAGS, *_WORDS):
        if name in arguments:
            values[name] = _word(name, arguments) if name in _WORDS else flag(name, arguments[name])
    exploding = process["sde"] == "vesde"
    values = {"centered": not exploding, "scale_by_sigma": exploding, **values, **found}
    resamples = len(values["ch_mult"]) > 1
    if resamples and "fir" not in values:
        raise PriorError("the file does not tell how the network resamples: give config={'fir': ...}")
    if "fir_kernel" in arguments:
        values["fir_kernel"] = tuple(numbers("fir_kernel", arguments["fir_kernel"]))
    return NCSNppSettings(**values)
