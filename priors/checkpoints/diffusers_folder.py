"""Folders as diffusers writes them: an unconditional ``UNet2DModel`` and the scheduler it was trained with.

``config.json`` says how the network is built and ``scheduler_config.json`` what it predicts and under which
noise. A pipeline has them in the folders ``unet`` and ``scheduler``. Only the network comes from diffusers
itself, which therefore has to be installed; its samplers are not used.

Pipelines of diffusers bring images to [-1, 1] beforehand, unless the network does (``center_input_sample``)
or the noise is variance-exploding, where they are in [0, 1]. That is what the contract says of real images;
who trained otherwise gives ``value_range``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from priors.base import Contract, ScorePrior
from priors.checkpoints.configuration import constructor_arguments, real, whole
from priors.checkpoints.family import Recipe
from priors.checkpoints.noise_schedules import discrete_process, in_units_of, prediction
from priors.checkpoints.opening import open_checkpoint
from priors.checkpoints.state_dicts import check_fit, state_dict
from priors.errors import PriorError
from priors.parameterisation import ProcessPrior
from priors.pretrained import channel_fields
from priors.processes import VE, Flow, PassTime, Process

_WEIGHTS = "diffusion_pytorch_model"
_ENCODERS = ("vae", "vqvae", "movq", "text_encoder", "image_encoder", "bert", "prior")
_DISCRETE = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMInverse",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "UniPCMultistep",
    )
)
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_FACTS = (
    "scheduler",
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "sigma_min",
    "sigma_max",
)
"""What may be said in ``config=``, under the names of diffusers; ``scheduler`` is the scheduler's class."""


def open_folder(path: str | Path) -> dict[str, Any]:
    """Read a folder of diffusers: what it says of the network and the noise, and the weights.

    Returns
    -------
    dict
        ``diffusers``: the network's configuration; ``scheduler``: that of the scheduler, or None;
        ``weights``; ``ema``: averaged weights that lie beside them in ``unet_ema``, or None.

    Raises
    ------
    PriorError
        If it is no such folder, or one of a model that this project cannot use.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        index = _json(path / "model_index.json")
        found = [name for name in _ENCODERS if isinstance(index.get(name), list) and index[name][-1]]
        if found:
            raise PriorError(
                f"{path} is a latent or conditional model (it has {', '.join(found)}); a prior has to know "
                "the images themselves, without a condition"
            )
    model = path if (path / "config.json").is_file() else path / "unet"
    config = _json(model / "config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        hint = ", which is a conditional model" if "Condition" in str(kind) else ""
        raise PriorError(
            f"{model} holds a {kind}{hint}; the only model of diffusers that is read is UNet2DModel"
        )
    places = (path / "scheduler", path, model)
    scheduler = next((p / "scheduler_config.json" for p in places if _has(p, "scheduler_config.json")), None)
    averaged = path / "unet_ema"
    return {
        "diffusers": config,
        "scheduler": None if scheduler is None else _json(scheduler),
        "weights": _weights(model),
        "ema": _weights(averaged) if _has(averaged, "config.json") else None,
    }


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PriorError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PriorError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PriorError(f"{path} holds {type(values).__name__}, not a JSON object")
    return values


def _weights(folder: Path) -> dict[str, Any]:
    """Weights in one file, or in several by an index; those of reduced precision if there are no others."""
    for suffix in (".safetensors", ".bin"):
        if _has(folder, _WEIGHTS + suffix):
            return _tensors(folder / (_WEIGHTS + suffix))
        index = folder / f"{_WEIGHTS}{suffix}.index.json"
        if index.is_file():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise PriorError(f"{index} has no weight_map from keys to files")
            merged: dict[str, Any] = {}
            for name in sorted(set(places.values())):
                if Path(name).name != name:
                    raise PriorError(f"{index} names a file outside of its folder: {name!r}")
                merged.update(_tensors(folder / name))
            return merged
    variants = sorted(folder.glob(f"{_WEIGHTS}.*.safetensors"))
    if len(variants) == 1:
        return _tensors(variants[0])
    found = f"; there are {', '.join(file.name for file in variants)}" if variants else ""
    raise PriorError(f"{folder} has no {_WEIGHTS}.safetensors{found}")


def _tensors(path: Path) -> dict[str, Any]:
    content = open_checkpoint(path)
    if not isinstance(content, dict):
        raise PriorError(f"{path} is no state dict but {type(content).__name__}")
    return content


class DiffusersFolder:
    """The family; see the module."""

    name = "diffusers"

    def recognises(self, content: Any) -> bool:
        """See :class:`priors.checkpoints.Family`; the content is that of :func:`open_folder`."""
        return isinstance(content, dict) and {"diffusers", "scheduler", "weights"} <= content.keys()

    def read(self, content: Any, config: Mapping[str, Any], *, ema: bool = True) -> Recipe:
        """See :class:`priors.checkpoints.Family`; ``config`` goes before the scheduler's own."""
        settings = {
            "network": _network_settings(content["diffusers"]),
            "noise": _noise(content["scheduler"], config),
        }
        averaged = ema and content.get("ema") is not None
        weights = state_dict(content["ema" if averaged else "weights"], "unet_ema" if averaged else "unet")
        self.contract(settings)  # complains of what is impossible
        check_fit(weights, lambda: self.network(settings))
        return Recipe(settings, weights)

    def network(self, settings: Mapping[str, Any]) -> nn.Module:
        """See :class:`priors.checkpoints.Family`."""
        return _unet_class()(**_network_settings(settings["network"]))

    def contract(self, settings: Mapping[str, Any]) -> Contract:
        """See :class:`priors.checkpoints.Family`; value ranges as the module says."""
        network = settings["network"]
        process = _process(settings["noise"])[0]
        fields = channel_fields(whole("in_channels", network.get("in_channels", 3)))
        own = isinstance(process, VE) or network.get("center_input_sample", False)
        real_images = fields["channels"] != "complex"
        low, high = fields["value_range"] = (-1.0, 1.0) if real_images and not own else (0.0, 1.0)
        # The network halves its images at every width but the last.
        halvings = len(network.get("block_out_channels", (1, 1, 1, 1))) - 1
        return Contract(
            **in_units_of(process, high - low), size_multiple=2**halvings, name=self.name, **fields
        )

    def prior(self, network: nn.Module, settings: Mapping[str, Any], contract: Contract) -> ScorePrior:
        """See :class:`priors.checkpoints.Family`."""
        process, predicts, pass_time = _process(settings["noise"])
        return ProcessPrior(network, contract, process=process, predicts=predicts, pass_time=pass_time)


FAMILY = DiffusersFolder()


def _unet_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise PriorError(
            f"networks of diffusers need it installed, pip install 'dis-recon[diffusers]' ({error})"
        ) from None
    return UNet2DModel


def _network_settings(config: Any) -> dict[str, Any]:
    """Arguments of the network's constructor, those of a condition refused."""
    if not isinstance(config, dict):
        raise PriorError("the network has no configuration")
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    if values.get("class_embed_type") is not None or values.get("num_class_embeds") is not None:
        raise PriorError("the network is class-conditional; a prior needs one without a condition")
    known = inspect.signature(_unet_class().__init__).parameters
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise PriorError(
            f"the network's configuration has {', '.join(unknown)}, which the installed diffusers does not "
            "know"
        )
    ins, outs = (whole(name, values.get(name, 3)) for name in ("in_channels", "out_channels"))
    if outs not in (ins, 2 * ins):
        raise PriorError(
            f"the network turns {ins} channels into {outs}; it should be as many, or twice as many where the "
            "variance is learned"
        )
    return values


def _noise(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler says of noise and prediction, under names that stay."""
    # A scheduler's own configuration may be handed over as it is.
    given = dict(config) if "_class_name" in config else constructor_arguments(config, _FACTS)
    facts = {**(scheduler if isinstance(scheduler, dict) else {}), **given}
    kind = facts.get("scheduler") or facts.get("_class_name")
    if kind == "ScoreSdeVeScheduler":
        return {"kind": "ve", **_needed(facts, "sigma_min", "sigma_max")}
    if facts.get("prediction_type") == "flow_prediction" or str(kind).startswith("FlowMatchEulerDiscrete"):
        return {"kind": "flow", **_needed(facts, "num_train_timesteps")}
    if kind is not None and kind not in _DISCRETE:
        raise PriorError(
            f"the scheduler is a {kind}; those that are known are FlowMatchEulerDiscreteScheduler, "
            f"ScoreSdeVeScheduler, {', '.join(_DISCRETE)}"
        )
    if facts.get("predict_epsilon") is False:  # the word of the first versions
        facts["prediction_type"] = "sample"
    elif kind is not None:
        facts.setdefault("prediction_type", "epsilon")  # what schedulers do that say nothing
    noise = {"kind": "discrete", **_needed(facts, "prediction_type")}
    noise["rescale_betas_zero_snr"] = bool(facts.get("rescale_betas_zero_snr"))
    if facts.get("trained_betas") is not None:
        return {**noise, "trained_betas": facts["trained_betas"]}
    noise.update(_needed(facts, "num_train_timesteps", "beta_schedule"))
    schedule = noise["beta_schedule"]
    if schedule not in _SCHEDULES:
        raise PriorError(f"beta_schedule must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")
    noise["beta_schedule"] = _SCHEDULES[schedule]
    return noise if schedule == "squaredcos_cap_v2" else {**noise, **_needed(facts, "beta_start", "beta_end")}


def _needed(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    missing = [name for name in names if facts.get(name) is None]
    if missing:
        raise PriorError(
            f"the folder has no scheduler_config.json that says {', '.join(missing)}: give "
            f"config={{{', '.join(f'{name!r}: ...' for name in missing)}}}"
        )
    return {name: facts[name] for name in names}


def _process(noise: Any) -> tuple[Process, str, PassTime]:
    """Process, prediction and time of a network."""
    if not isinstance(noise, dict):
        raise PriorError("the prior's settings have no 'noise'")
    if noise.get("kind") == "ve":
        low, high = (real(name, noise.get(name)) for name in ("sigma_min", "sigma_max"))
        return VE(low, high), "score", "sigma"
    if noise.get("kind") == "flow":
        steps = whole("num_train_timesteps", noise.get("num_train_timesteps"), 1, 10**5)
        return Flow(), "v", lambda sigma: steps * sigma / (1 + sigma)
    return discrete_process(noise), prediction(noise), "index"
