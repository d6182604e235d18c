"""Damaged checkpoints of every layout: a prior that evaluates, or one clear error, and nothing else."""

import copy
import random
import zipfile
from typing import Any

import pytest
import torch

from priors import PriorError, load_prior, save_prior
from priors.networks.adm_unet import ADMSettings, ADMUNet
from priors.networks.dhariwal_unet import DhariwalSettings, DhariwalUNet
from priors.networks.edm_preconditioning import EDMPrecond, VPPrecond
from priors.networks.ncsnpp import NCSNpp, NCSNppSettings
from priors.networks.ncsnv2 import NCSNv2, NCSNv2Settings
from priors.networks.song_unet import SongSettings, SongUNet

TRIES = 40  # of each of the five layouts


def score_sde():
    network = NCSNpp(NCSNppSettings(channels=1, nf=8, ch_mult=(1, 1), num_res_blocks=1, num_scales=10))
    state = network.state_dict()
    state["sigmas"].copy_(torch.logspace(1.7, -2, 10))
    # Trained were the parameters but the Fourier frequencies.
    trained = [p for name, p in network.named_parameters() if name != "all_modules.0.W"]
    ema = {"decay": 0.999, "num_updates": 5, "shadow_params": [parameter.detach() for parameter in trained]}
    model = {f"module.{key}": value for key, value in state.items()}
    config = {
        "model": {"sigma_min": 0.01, "sigma_max": 50.0},
        "training": {"sde": "vesde", "continuous": True},
    }
    return {"optimizer": {}, "model": model, "ema": ema, "step": 5}, config


def ncsnv2():
    network = NCSNv2(NCSNv2Settings(channels=2, ngf=4, depth="NCSNv2", num_classes=10))
    state = network.state_dict()
    state["sigmas"].copy_(torch.logspace(1, -2, 10))
    ema = {key: value for key, value in state.items() if key != "sigmas"}
    return [{f"module.{key}": value for key, value in state.items()}, {}, 1, 2, ema], {}


def guided_diffusion():
    settings = ADMSettings(
        in_channels=1, out_channels=2, model_channels=32, widths=(32, 32), num_res_blocks=1
    )
    return dict(ADMUNet(settings).state_dict()), {"num_heads": 4}


def inversebench():
    settings = DhariwalSettings(
        img_resolution=8,
        in_channels=2,
        out_channels=2,
        model_channels=8,
        widths=(8, 8),
        num_blocks=1,
        embedding_channels=32,
    )
    state = dict(EDMPrecond(DhariwalUNet(settings)).state_dict())
    return {"net": state, "ema": state, "scheduler": {"last_epoch": 0}}, {}


def edm():
    settings = SongSettings(
        img_resolution=8,
        in_channels=3,
        out_channels=3,
        model_channels=8,
        widths=(8, 8),
        num_blocks=1,
        noise_channels=8,
        embedding_channels=32,
    )
    return dict(VPPrecond(SongUNet(settings)).state_dict()), {"precond": "VPPrecond"}


LAYOUTS = (score_sde, ncsnv2, guided_diffusion, inversebench, edm)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request):
    torch.manual_seed(0)
    return request.param()


def evaluate(path, config):
    prior = load_prior(path, config=config)
    x = torch.randn(1, prior.contract.num_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = prior.denoise_channels(x, torch.tensor([0.5]))
    assert out.shape == x.shape
    return out


def evaluates(path, config):
    """Whether there is a prior in the file; anything but that and a PriorError fails the test."""
    try:
        evaluate(path, config)
    except PriorError:
        return False
    return True


# Damage to the content


def containers(value):
    """Every dict and list in the content, the outermost first."""
    found = [value] if isinstance(value, dict | list) else []
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += containers(item)
    return found


def other(value, rng):
    """Something else in the place of a value."""
    strange: list[Any] = [
        None,
        True,
        -1,
        10**30,
        float("nan"),
        "text",
        "",
        [],
        {},
        [[]],
        {"a": []},
        {7: 7},
        torch.ones(0),
    ]
    if isinstance(value, torch.Tensor):
        flat = value.reshape(-1)
        pick = rng.randrange(len(flat)) if len(flat) else 0
        poisoned = value.clone()
        if len(flat):
            poisoned.view(-1)[pick] = rng.choice([float("nan"), float("inf"), -float("inf")])
        huge = torch.full((), 1e300, dtype=torch.float64)
        strange += [
            *(poisoned, poisoned, value[None], value[..., None], flat, flat[:-1], value[:0], value[:1], huge),
            *(
                value.half(),
                value.double(),
                value.long(),
                value.bool(),
                value.to(torch.complex64),
                value.tolist(),
            ),
            *(value.T if value.ndim == 2 else value.transpose(0, -1) if value.ndim else value[None, None],),
            *(torch.zeros(1).expand(3000, 3000, 3000), torch.cat([value, value]) if value.ndim else value),
            *(value.to_sparse() if value.ndim else value, value.to("meta"), torch.zeros_like(value)),
        ]
    return rng.choice(strange)


def rename(key, rng):
    if not isinstance(key, str) or not key:
        return rng.choice(["", "x", 0])
    at = rng.randrange(len(key))
    return rng.choice(
        [
            key[:at] + rng.choice("0123456789abcxyz._") + key[at + 1 :],
            key[:at],
            key[at:],
            "module." + key,
            key.replace("0", "1"),
            key.replace("1", "99999"),
            key.upper(),
        ]
    )


def damage(content, rng):
    content = copy.copy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        full = [found for found in containers(content) if found]
        if not full:
            break
        chosen = rng.choice([content if content else full[0], rng.choice(full)])
        keys = list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
        key = rng.choice(keys)
        kind = rng.choice(["drop", "rename", "replace", "replace", "replace", "swap"])
        if kind == "drop":
            del chosen[key]
        elif kind == "rename" and isinstance(chosen, dict):
            chosen[rename(key, rng)] = chosen.pop(key)
        elif kind == "swap":
            partner = rng.choice(keys)
            chosen[key], chosen[partner] = chosen[partner], chosen[key]
        else:
            chosen[key] = other(chosen[key], rng)
    return content


# Damage to the file


def flip(data, rng, count=1):
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def damage_file(path, rng):
    kind = rng.choice(["flip", "flip", "cut", "pickle", "pickle", "middle"])
    data = path.read_bytes()
    if kind == "flip":
        path.write_bytes(flip(data, rng, rng.choice([1, 3, 100])))
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "middle":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + data[at + rng.randrange(1, 2000) :])
    elif zipfile.is_zipfile(path):  # the pickle, and sums that fit it
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in records if name.endswith("data.pkl"))
        records[name] = flip(records[name], rng, rng.choice([1, 2, 20]))
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, record)
    else:
        path.write_bytes(flip(data[:2000], rng) + data[2000:])


# The tests


def test_the_undamaged_layout_loads(layout, tmp_path):
    content, config = layout
    torch.save(content, tmp_path / "good.pt")
    assert bool(torch.isfinite(evaluate(tmp_path / "good.pt", config)).all())


def test_a_damaged_checkpoint_is_an_error_or_a_prior(layout, tmp_path):
    content, config = layout
    path = tmp_path / "bad.pt"
    refused = 0
    for seed in range(TRIES):
        rng = random.Random(seed)
        if seed % 4 == 3:
            torch.save(content, path, _use_new_zipfile_serialization=seed % 8 == 3)
            damage_file(path, rng)
        else:
            torch.save(damage(copy.deepcopy(content), rng), path)
        refused += not evaluates(path, config)
    assert refused > TRIES // 4  # the damage is not harmless


def test_a_damaged_configuration_is_an_error_or_a_prior(layout, tmp_path):
    content, config = layout
    torch.save(content, tmp_path / "good.pt")
    if not config:
        pytest.skip("this layout tells everything")
    for seed in range(TRIES // 4):
        rng = random.Random(seed)
        changed = damage(copy.deepcopy(config), rng)
        evaluates(tmp_path / "good.pt", {str(key): value for key, value in changed.items()})


def test_a_damaged_file_of_our_own_is_an_error_or_a_prior(layout, tmp_path):
    content, config = layout
    torch.save(content, tmp_path / "good.pt")
    own = tmp_path / "own.safetensors"
    save_prior(own, load_prior(tmp_path / "good.pt", config=config))
    data = own.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    for seed in range(TRIES // 4):
        rng = random.Random(seed)
        start = data[8:header] if seed % 2 else data
        damaged = (
            flip(start, rng, rng.choice([1, 2])) if rng.random() < 0.8 else start[: rng.randrange(len(start))]
        )
        (tmp_path / "bad.safetensors").write_bytes(
            data[:8] + damaged + data[header:] if seed % 2 else damaged
        )
        evaluates(tmp_path / "bad.safetensors", None)
