"""EDM's networks, preconditionings and checkpoints: formulas, published shapes, round trips, refusals."""

import hashlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from priors import PriorError
from priors.checkpoints.edm import FAMILY
from priors.networks.dhariwal_unet import DhariwalSettings, DhariwalUNet
from priors.networks.edm_layers import Block, Convolution, positional_features
from priors.networks.edm_preconditioning import EDMPrecond, VEPrecond, VPPrecond
from priors.networks.song_unet import SongSettings, SongUNet
from tests.priors.checkpoint_helper import PARITY, image, loaded

PRECONDITIONINGS = {"EDMPrecond": EDMPrecond, "VEPrecond": VEPrecond, "VPPrecond": VPPrecond}

SONG = SongSettings(
    img_resolution=16,
    in_channels=2,
    out_channels=2,
    model_channels=8,
    widths=(8, 16),
    num_blocks=1,
    noise_channels=8,
    embedding_channels=32,
    attention_levels=(1,),
)
NCSNPP = replace(
    SONG,
    noise_channels=16,
    embedding_type="fourier",
    encoder_type="residual",
    resample_filter=(1.0, 3.0, 3.0, 1.0),
)
DHARIWAL = DhariwalSettings(
    img_resolution=20,
    in_channels=2,
    out_channels=2,
    model_channels=16,
    widths=(16, 64),
    num_blocks=1,
    embedding_channels=64,
    attention_levels=(1,),
)
SHAPES: dict[str, Any] = {
    "DDPM++": SONG,
    "DDPM++, deeper": replace(SONG, widths=(16, 8, 24), num_blocks=2, attention_levels=(0, 2), in_channels=1,
                              out_channels=1),
    "DDPM++, augmented, classes": replace(SONG, augment_dim=9, label_dim=4),
    "NCSN++": NCSNPP,
    "NCSN++, augmented, three levels": replace(NCSNPP, widths=(8, 8, 16), augment_dim=6, in_channels=3,
                                               out_channels=3),
    "input and output skip": replace(SONG, encoder_type="skip", decoder_type="skip", widths=(8, 16, 8)),
    "output skip": replace(NCSNPP, decoder_type="skip"),
    "Song, one level": replace(SONG, widths=(16,), attention_levels=()),
    "Dhariwal": DHARIWAL,
    "Dhariwal, several heads": replace(DHARIWAL, widths=(16, 32), channels_per_head=8,
                                       attention_levels=(0, 1)),
    "Dhariwal, two published heads": replace(DHARIWAL, widths=(32, 128), num_blocks=2),
    "Dhariwal, too narrow for attention": replace(DHARIWAL, widths=(32, 16, 32), attention_levels=()),
    "Dhariwal, classes": replace(DHARIWAL, label_dim=3, augment_dim=5),
    "Dhariwal, one level": replace(DHARIWAL, widths=(64,), attention_levels=(0,)),
}  # fmt: skip


def raw(shape):
    return SongUNet(shape) if isinstance(shape, SongSettings) else DhariwalUNet(shape)


def filled(network, seed=0):
    """Weights at random, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            norm = value.ndim == 1 and name.endswith("weight")
            scale = 0.1 if value.ndim == 1 else 1 / math.sqrt(value[0].numel())
            value.copy_(norm + scale * noise)
    return network.eval().requires_grad_(False)


def facts(shape, precond="EDMPrecond"):
    """What a file of this shape does not tell."""
    narrow = isinstance(shape, DhariwalSettings) and shape.channels_per_head != 64
    return {"precond": precond, **({"channels_per_head": shape.channels_per_head} if narrow else {})}


load = partial(loaded, FAMILY)


def hollow(network):
    """A state dict of the right shapes that takes no memory; its filters are true, since they are read."""
    with torch.device("meta"):
        shell = network()
    entries = {key: torch.zeros(1).expand(value.shape) for key, value in shell.state_dict().items()}
    taps = getattr(shell.model.settings, "resample_filter", (1.0, 1.0))
    row = torch.tensor(taps) / sum(taps)
    filters = {key: torch.outer(row, row)[None, None] for key in entries if key.endswith("resample_filter")}
    return {**entries, **filters}


# Layers


@pytest.mark.parametrize("endpoint", [False, True])
def test_positional_features(endpoint):
    labels = np.array([-0.5, 0.0, 1.3, 700.0])
    last = 4 - endpoint
    angles = labels[:, None] * 10000.0 ** (-np.arange(4) / last)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(positional_features(torch.tensor(labels), 8, endpoint), expected, atol=1e-4)


def test_embedding_of_random_frequencies_has_sines_first():
    network = SongUNet(NCSNPP)
    frequencies = network.get_buffer("map_noise.freqs").double().numpy()
    labels = np.array([0.3, -1.0])
    angles = 2 * np.pi * labels[:, None] * frequencies
    seen = []
    hook = network.map_layer0.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.embed(torch.tensor(labels), None)
    hook.remove()
    np.testing.assert_allclose(seen[0], np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-4)


@pytest.mark.parametrize("taps", [(1.0, 1.0), (1.0, 3.0, 3.0, 1.0)])
def test_resampling_filters_in_both_dimensions(taps):
    x = image(1, 3, 6, 8)
    row = np.array(taps) / sum(taps)
    border = len(taps) // 2 - 1

    def along(values, axis, step):
        return np.apply_along_axis(step, axis, values)

    def shrink(line):
        return np.convolve(np.pad(line, border), row, mode="valid")[::2]

    def grow(line):
        sparse = np.zeros(2 * len(line) - 1)
        sparse[::2] = line
        return np.convolve(sparse, 2 * row)[border : border + 2 * len(line)]

    for resample, step in (("down", shrink), ("up", grow)):
        layer = Convolution(3, 3, 0, resample, taps)
        expected = along(along(x.double().numpy(), -1, step), -2, step)
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    plain = Convolution(3, 3, 0, "down")
    torch.testing.assert_close(plain(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(Convolution(3, 3, 0, "up")(x), F.interpolate(x, scale_factor=2.0))


def test_fused_resampling_filters_the_whole_convolution():
    taps = (1.0, 3.0, 3.0, 1.0)
    layer = filled(Convolution(2, 5, 3, "down", taps, fused=True))
    x = image(1, 2, 8, 8)
    # Full convolution, of which the filter sees every value: both in one kernel of side 6.
    row = torch.tensor(taps).double() / sum(taps)
    joint = F.conv2d(
        layer.weight.double().flatten(0, 1)[:, None], torch.outer(row, row)[None, None], padding=3
    ).reshape(5, 2, 6, 6)
    expected = F.conv2d(x.double(), joint, layer.bias.double(), stride=2, padding=2)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_a_softmax_average_of_the_values_of_each_head(heads):
    width = 16
    block = filled(
        Block(width, width, 4, heads, scale_shift=True, project_skip=False, skip_scale=1.0, eps=1e-5)
    )
    x = image(2, width, 3, 5)
    flat = F.group_norm(x.flatten(2), 4, block.norm2.weight, block.norm2.bias).double()
    qkv = block.qkv.weight[..., 0, 0].double() @ flat + block.qkv.bias.double()[:, None]
    q, k, v = qkv.numpy().reshape(2, heads, width // heads, 3, 15).transpose(3, 0, 1, 2, 4)
    weight = np.exp(np.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(width // heads))
    weight /= weight.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bhcs->bhct", weight, v).reshape(2, width, 15)
    out = block.proj.weight[..., 0, 0].double().numpy() @ mixed + block.proj.bias.numpy()[:, None]
    np.testing.assert_allclose(block._attend(x).flatten(2), out, atol=2e-5)


@pytest.mark.parametrize("song", [False, True])
def test_residual_block(song):
    scale = math.sqrt(0.5) if song else 1.0
    eps = 1e-6 if song else 1e-5
    block = filled(Block(8, 16, 4, 1, scale_shift=not song, project_skip=song, skip_scale=scale, eps=eps))
    x, embedding = image(2, 8, 4, 4), image(2, 4, seed=1)

    def norm(h, layer, groups):
        return F.group_norm(h, groups, layer.weight, layer.bias, eps)

    h = F.conv2d(F.silu(norm(x, block.norm0, 2)), block.conv0.weight, block.conv0.bias, padding=1)
    linear = (embedding @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = norm(h + linear, block.norm1, 4) if song else (
        norm(h, block.norm1, 4) * (1 + linear[:, :16]) + linear[:, 16:]
    )  # fmt: skip
    h = F.conv2d(F.silu(h), block.conv1.weight, block.conv1.bias, padding=1)
    h = scale * (h + F.conv2d(x, block.skip.weight, block.skip.bias))
    h = scale * (h + block._attend(h))
    torch.testing.assert_close(block(x, embedding), h, atol=1e-5, rtol=1e-5)


# Preconditioning


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, label, classes=None):
        self.seen.append((x, label))
        return torch.ones_like(x)


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
def test_preconditioning_is_that_of_table_1(kind):
    for sigma in (0.002, 0.05, 0.5, 7.0, 80.0):
        # c_skip, c_out, c_in, c_noise of Karras et al. 2022, Table 1, columns "EDM", "VE" and "VP"
        total = math.hypot(sigma, 0.5)
        time = (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9
        row = {
            "EDMPrecond": (0.25 / total**2, sigma * 0.5 / total, 1 / total, math.log(sigma) / 4),
            "VEPrecond": (1, sigma, 1, math.log(sigma / 2)),
            "VPPrecond": (1, -sigma, 1 / math.hypot(sigma, 1), 999 * time),
        }[kind]
        network = Recorder()
        x = image(1, 1, 2, 2)
        result = PRECONDITIONINGS[kind](network)(x, torch.tensor([sigma]))
        given, label = network.seen[0]
        torch.testing.assert_close(result, row[0] * x + row[1])
        torch.testing.assert_close(given, row[2] * x)
        # In float32 the logarithm of VP's small levels loses digits, in training as here.
        assert label.item() == pytest.approx(row[3], rel=1e-5, abs=0.02 if kind == "VPPrecond" else 1e-6)


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
def test_preconditioning_has_no_entries_and_known_bounds(kind):
    precond = PRECONDITIONINGS[kind](torch.nn.Linear(1, 1))
    assert list(precond.state_dict()) == ["model.weight", "model.bias"]
    expected = {
        "EDMPrecond": (0.002, 80.0),
        "VEPrecond": (0.02, 100.0),
        # sigma(t)^2 = exp(9.95 t^2 + 0.1 t) - 1 at 1e-5 and 1
        "VPPrecond": (0.0010005, math.sqrt(math.exp(10.05) - 1)),
    }[kind]
    assert (precond.sigma_min, precond.sigma_max) == pytest.approx(expected, rel=1e-4)


# Published configurations


WIDE = (1.0, 3.0, 3.0, 1.0)
CIFAR = SongSettings(32, 3, 3, 128, (256, 256, 256), 4, 128, 512, (1,), augment_dim=9)
CIFAR_VE = replace(
    CIFAR, noise_channels=256, embedding_type="fourier", encoder_type="residual", resample_filter=WIDE
)
# Number of entries, of parameters, and the sha256 of "key shape dtype" lines of the original code's networks.
PUBLISHED: dict[str, Any] = {
    "CIFAR-10, DDPM++": (
        "EDMPrecond", CIFAR,
        (425, 55733891, "54ea3254f2b7c6056bbfd264cb58740f57e8d7824bc164adc403721959e6b4a6"),
    ),
    "FFHQ, DDPM++": (
        "EDMPrecond", replace(CIFAR, img_resolution=64, widths=(128, 256, 256, 256), attention_levels=(2,)),
        (553, 61805571, "194431aa2a7c9b81ca2114dfed6450358f2bc9f97be3e5225ccb455d7f2bdcd6"),
    ),
    "CIFAR-10, NCSN++": (
        "EDMPrecond", CIFAR_VE,
        (432, 56397827, "6c19321d1602f8143c4cf9cc5394207bbf281490d7e956a2f5b1685d8e82d132"),
    ),
    "VE": (
        "VEPrecond", replace(CIFAR_VE, augment_dim=0),
        (431, 56395523, "1aba34b1df1ed5e54346bef6217b68171a617489e41d5967312b412812d470d7"),
    ),
    "VP": (
        "VPPrecond", replace(CIFAR, augment_dim=0),
        (424, 55732739, "d88e98bfb021f30c5c515bdf32c5779084fb3d4a50db52bd6e12a91b963481cf"),
    ),
    "VP, four levels": (
        "VPPrecond", replace(CIFAR, widths=(128, 256, 256, 256), augment_dim=0),
        (552, 61804419, "f756ce4853288a9d937715f4495ded0e5cf74f01e516ef2abee37409a226508e"),
    ),
    "InverseBench MRI": (
        "EDMPrecond", DhariwalSettings(320, 2, 2, 128, (128, 128, 128, 256, 256), 1, 512),
        (304, 26002050, "d1ad513c765a95f838bf0338aa006f08a8a2121fde66056ee732f4c5a63d3ddf"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_built_and_recognised(name):
    precond, shape, found = PUBLISHED[name]
    weights = hollow(lambda: PRECONDITIONINGS[precond](raw(shape)))
    assert FAMILY.recognises(weights)
    recipe = FAMILY.read(weights, {"precond": precond})
    assert type(shape).from_dict(recipe.settings["network"]) == shape
    with torch.device("meta"):
        network = FAMILY.network(recipe.settings)
    lines = [f"{k} {list(v.shape)} {str(v.dtype)[6:]}" for k, v in network.state_dict().items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), sum(value.numel() for value in network.parameters()), digest) == found


# Round trips


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name):
    shape = SHAPES[name]
    network = filled(EDMPrecond(raw(shape)))
    weights = network.state_dict()
    prior = load(weights, facts(shape))
    found = prior.network.model.settings
    assert replace(found, **{} if found.widths[1:] else {"attention_levels": shape.attention_levels}) == shape
    assert list(prior.network.state_dict()) == list(weights)
    x, sigma = image(2, shape.in_channels, 8, 12), torch.tensor([0.1, 20.0])
    torch.testing.assert_close(prior.denoise_channels(x, sigma), network(x, sigma), rtol=0, atol=0)
    assert prior.contract.num_channels == shape.in_channels
    assert prior.contract.size_multiple == 2 ** (len(shape.widths) - 1)


@settings(deadline=None, max_examples=10)
@given(
    widths=st.lists(st.sampled_from([8, 16, 64]), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    attention=st.sets(st.integers(0, 3)),
    kinds=st.sampled_from(
        [("standard", "standard"), ("skip", "standard"), ("residual", "skip"), ("residual", "standard")]
    ),
    taps=st.sampled_from([(1.0, 1.0), WIDE]),
    fourier=st.booleans(),
    per_head=st.sampled_from([0, 4, 16]),
    extra=st.integers(0, 3),
)
def test_any_shape_is_told_from_keys(widths, blocks, attention, kinds, taps, fourier, per_head, extra):
    single = len(widths) == 1
    common: dict[str, Any] = {
        "img_resolution": 40, "in_channels": 1, "out_channels": 1, "model_channels": 8,
        "widths": tuple(widths), "num_blocks": blocks, "embedding_channels": 24,
        "label_dim": extra, "augment_dim": 3 - extra,
    }  # fmt: skip
    levels = tuple(sorted(level for level in attention if level < len(widths)))
    if per_head:
        levels = tuple(level for level in levels if widths[level] >= per_head)
        shape: Any = DhariwalSettings(**common, attention_levels=levels, channels_per_head=per_head)
    else:
        shape = SongSettings(
            **common,
            attention_levels=levels,
            noise_channels=16,
            embedding_type="fourier" if fourier else "positional",
            encoder_type="standard" if single else kinds[0],
            decoder_type="standard" if single else kinds[1],
            resample_filter=(1.0, 1.0) if single else taps,
        )
    weights = hollow(lambda: EDMPrecond(raw(shape)))
    config = {"precond": "edm", **({"channels_per_head": per_head} if per_head else {})}
    recipe = FAMILY.read(weights, config)
    assert type(shape).from_dict(json.loads(json.dumps(recipe.settings["network"]))) == shape


def test_dictionary_of_inversebench_gives_averaged_weights():
    first, second = (filled(EDMPrecond(DhariwalUNet(DHARIWAL)), seed).state_dict() for seed in (0, 1))
    content = {"net": first, "ema": second, "optimizer": {"state": {}}, "scheduler": None}
    assert FAMILY.recognises(content)
    for file, options, expected in (
        (content, {}, second),
        (content, {"ema": False}, first),
        ({"net": first}, {}, first),
        ({"net": first, "ema": None}, {}, first),
        ({"ema": second}, {}, second),
    ):
        weights = FAMILY.read(file, {}, **options).weights
        assert torch.equal(weights["model.out_conv.weight"], expected["model.out_conv.weight"])
    with pytest.raises(PriorError, match="no 'net'"):
        FAMILY.read({"ema": second}, {}, ema=False)
    # A SongUNet of InverseBench needs nothing more either.
    FAMILY.read({"net": EDMPrecond(SongUNet(SONG)).state_dict()}, {})


def test_half_precision_and_a_wrapper_s_prefix():
    network = filled(EDMPrecond(SongUNet(NCSNPP)))
    halves = {f"module._orig_mod.{key}": value.half() for key, value in network.state_dict().items()}
    assert FAMILY.recognises(halves)
    prior = load(halves, facts(NCSNPP))
    for key, value in prior.network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, halves[f"module._orig_mod.{key}"].float(), rtol=0, atol=0)


# The prior


@pytest.mark.parametrize("precond", PRECONDITIONINGS)
def test_preconditioning_of_the_configuration_is_used(precond):
    weights = filled(EDMPrecond(SongUNet(SONG))).state_dict()
    prior = load(weights, {"precond": precond})
    network = PRECONDITIONINGS[precond](filled(SongUNet(SONG)))
    network.load_state_dict(weights)
    x, sigma = image(2, 2, 8, 8), torch.tensor([0.05, 9.0])
    torch.testing.assert_close(prior.denoise_channels(x, sigma), network(x, sigma))
    assert (prior.contract.sigma_min, prior.contract.sigma_max) == (network.sigma_min, network.sigma_max)


def test_contract_counts_in_the_values_of_our_images():
    shape = replace(SONG, in_channels=3, out_channels=3)
    contract = load(filled(EDMPrecond(SongUNet(shape))).state_dict(), facts(shape)).contract
    assert (contract.channels, contract.value_range) == ("rgb", (-1, 1))
    assert (contract.sigma_min, contract.sigma_max) == (0.001, 40.0)


def test_constants_of_the_configuration():
    weights = filled(EDMPrecond(SongUNet(SONG))).state_dict()
    x, sigma = image(1, 2, 8, 8), torch.tensor([0.3])
    prior = load(weights, {"precond": "edm", "sigma_data": 0.1, "sigma_min": 0, "sigma_max": math.inf})
    network = EDMPrecond(SongUNet(SONG), sigma_data=0.1)
    network.load_state_dict(weights)
    torch.testing.assert_close(prior.denoise_channels(x, sigma), network.eval()(x, sigma))
    assert prior.contract.sigma_max == 80
    bounded = load(weights, {"precond": "ve", "sigma_min": 0.01, "sigma_max": 50.0}).contract
    assert (bounded.sigma_min, bounded.sigma_max) == (0.01, 50)


@pytest.mark.parametrize("name", ["DDPM++, augmented, classes", "Dhariwal, classes"])
def test_class_label(name):
    shape = SHAPES[name]
    network = filled(EDMPrecond(raw(shape)))
    x, sigma = image(2, 2, 8, 8), torch.tensor([1.0, 2.0])
    results = []
    for label in (None, 0, 2):
        prior = load(network.state_dict(), {**facts(shape), "class_label": label})
        vector = torch.zeros(shape.label_dim)
        if label is not None:
            vector[label] = 1
        results.append(prior.denoise_channels(x, sigma))
        torch.testing.assert_close(results[-1], network(x, sigma, vector.expand(2, -1)))
    torch.testing.assert_close(results[0], network(x, sigma))
    assert (results[0] - results[1]).abs().max() > 1e-3
    assert (results[1] - results[2]).abs().max() > 1e-3


def test_any_size_is_padded_and_cropped():
    prior = load(filled(EDMPrecond(DhariwalUNet(DHARIWAL))).state_dict(), {})
    x, sigma = image(2, 2, 7, 9), torch.tensor([0.1, 3.0])
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    expected = prior.denoise_channels(padded, sigma)[..., :7, :9]
    torch.testing.assert_close(prior.denoise_channels(x, sigma), expected)
    assert prior.denoise_channels(x.double(), sigma.double()).dtype == torch.float64
    with pytest.raises(PriorError, match=r"takes \(B, 2, H, W\)"):
        prior.denoise_channels(x[:, :1], sigma)


@pytest.mark.parametrize("shape", [NCSNPP, DHARIWAL], ids=["Song", "Dhariwal"])
def test_gradients_reach_the_image(shape):
    prior = load(filled(EDMPrecond(raw(shape))).state_dict(), facts(shape))
    x, direction = image(1, 2, 8, 8), image(1, 2, 8, 8, seed=1)
    sigma = torch.tensor([0.5])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((prior.denoise_channels(leaf, sigma) * direction).sum(), leaf)
    step = 1e-2 * direction
    ends = [prior.denoise_channels(x + sign * step, sigma) for sign in (1, -1)]
    change = ((ends[0] - ends[1]) * direction).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), change, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("shape", [NCSNPP, DHARIWAL], ids=["Song", "Dhariwal"])
def test_bfloat16_is_close_and_only_the_network_s(shape):
    weights = filled(EDMPrecond(raw(shape))).state_dict()
    full, half = (load(weights, facts(shape), precision) for precision in ("fp32", "bf16"))
    x, sigma = image(2, 2, 8, 8), torch.tensor([0.01, 1.0])
    a, b = full.denoise_channels(x, sigma), half.denoise_channels(x, sigma)
    assert b.dtype == torch.float32
    # Of what is taken from the image: at low noise the image itself is not rounded.
    difference = (a - b).abs().amax((1, 2, 3)) / (x - a).abs().amax((1, 2, 3))
    assert difference.min() > 1e-5
    assert difference.max() < 0.05


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "cannot tell precond"),
        ({"precond": "iDDPMPrecond"}, "precond is one of"),
        ({"precond": ["edm"]}, "precond is one of"),
        ({"precond": "edm", "class_name": "training.networks.VPPrecond"}, "config says precond"),
        ({"precond": "edm", "model_type": "DhariwalUNet"}, "config says model_type"),
        ({"precond": "edm", "img_resolution": 32}, "config says img_resolution = 32, the file has 16"),
        ({"precond": "edm", "channel_mult": [1, 1]}, "channel_mult"),
        ({"precond": "edm", "attn_resolutions": [16]}, "attn_resolutions"),
        ({"precond": "edm", "embedding_type": "fourier"}, "embedding_type"),
        ({"precond": "edm", "encoder_type": "residual"}, "encoder_type"),
        ({"precond": "edm", "resample_filter": [1, 3, 3, 1]}, "resample_filter"),
        ({"precond": "edm", "channel_mult_noise": 2}, "channel_mult_noise"),
        ({"precond": "edm", "channel_mult_emb": 2}, "channel_mult_emb"),
        ({"precond": "edm", "augment_dim": 9}, "augment_dim"),
        ({"precond": "edm", "channels_per_head": 8}, "one head"),
        ({"precond": "edm", "class_label": 0}, "cannot be told"),
        ({"precond": "edm", "sigma_data": "half"}, "sigma_data must be a positive number"),
        ({"precond": "vp", "sigma_data": 0.5}, "sigma_data, which VPPrecond does not have"),
        ({"precond": "vp", "beta_d": 1e6}, "no highest noise level"),
        ({"precond": "edm", "width": 3}, r"unknown arguments \['width'\]"),
    ],
)
def test_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(PriorError, match=message):
        FAMILY.read(EDMPrecond(SongUNet(SONG)).state_dict(), config)


def test_agreeing_config_is_accepted_as_a_whole():
    config = {
        "seed": "ignored beside constructor",
        "class_name": "training.networks.VEPrecond",
        "constructor": {
            "model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual",
            "decoder_type": "standard", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
            "model_channels": 8, "channel_mult": [1, 2], "img_resolution": 16, "img_channels": 2,
            "label_dim": 0, "num_blocks": 1, "dropout": 0.1, "attn_resolutions": [8], "channel_mult_emb": 4,
        },
    }  # fmt: skip
    recipe = FAMILY.read(EDMPrecond(SongUNet(NCSNPP)).state_dict(), config)
    assert recipe.settings["precond"] == "VEPrecond"


def test_heads_narrower_than_the_original_s_are_asked_for():
    shape = SHAPES["Dhariwal, several heads"]
    weights = EDMPrecond(DhariwalUNet(shape)).state_dict()
    with pytest.raises(PriorError, match="cannot tell channels_per_head"):
        FAMILY.read(weights, {})
    with pytest.raises(PriorError, match=r"lacks|has 'model"):
        FAMILY.read(weights, {"channels_per_head": 33})
    FAMILY.read(weights, {"constructor": {"img_resolution": 20}, "channels_per_head": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.dec.8x8_in1.norm0.bias"), "lacks 'model.dec.8x8_in1.norm0.bias'"),
        (lambda w: w.update({"model.extra": torch.zeros(3)}), "has 'model.extra'"),
        (lambda w: w.update({"u": torch.zeros(3)}), "iDDPMPrecond"),
        (lambda w: w.update({"model.map_layer0.weight": torch.zeros(3)}), "should have 2 dimensions"),
        (lambda w: w.update({"model.map_layer1.bias": torch.zeros(3)}), r"has the shape \(3,\), not"),
        (
            lambda w: w.update({"model.enc.8x8_down.conv0.resample_filter": torch.zeros(1, 1, 0, 0)}),
            "resampl",
        ),
        (
            lambda w: w.update({"model.enc.8x8_down.conv0.resample_filter": torch.zeros(1, 1, 2, 2)}),
            "resampl",
        ),
        (lambda w: w.pop("model.enc.16x16_block0.conv0.weight"), "model.enc.16x16_block0.conv0.weight"),
        (lambda w: w.pop("model.dec.16x16_aux_conv.weight"), "output layers of neither"),
        (lambda w: w.update({"model.enc.9x9_conv.weight": torch.zeros(1, 1, 1, 1)}), "exactly one"),
        (lambda w: w.update({"model.map_layer1.bias": "text"}), "is no tensor but str"),
    ],
)
def test_damaged_checkpoint_is_refused_by_the_name_of_the_key(change, message):
    weights = dict(EDMPrecond(SongUNet(SONG)).state_dict())
    change(weights)
    with pytest.raises(PriorError, match=message):
        FAMILY.read(weights, {"precond": "edm"})


def test_other_content_is_not_recognised():
    weights = EDMPrecond(SongUNet(SONG)).state_dict()
    assert FAMILY.recognises(weights)
    for other in (
        [weights],
        None,
        3,
        {},
        {"model": weights},
        {1: 2},
        {"net": 3, "ema": {}},
        {"net": [weights]},
    ):
        assert not FAMILY.recognises(other)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "UNet"},
        {"model_type": ["SongUNet"]},
        {"precond": None},
        {"constants": {"sigma_datum": 1.0}},
        {"constants": {"sigma_data": "1"}},
        {"network": None},
        {"network": {**SONG.as_dict(), "widths": [8, "16"]}},
        {"network": {**SONG.as_dict(), "widths": [6, 10]}},
        {"network": {**SONG.as_dict(), "resample_filter": [1, 2, 1]}},
        {"network": {**SONG.as_dict(), "encoder_type": 3}},
        {"network": {**SONG.as_dict(), "img_resolution": 1}},
    ],
)
def test_damaged_settings_of_a_converted_prior_are_refused(change):
    chosen = FAMILY.read(EDMPrecond(SongUNet(SONG)).state_dict(), {"precond": "edm"}).settings
    FAMILY.network(chosen)
    with pytest.raises(PriorError):
        FAMILY.network({**chosen, **change})


# Recorded outputs of the original code


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
@pytest.mark.parametrize(
    "name",
    ["edm_ddpmpp", "edm_ve_ncsnpp", "edm_vp_ddpmpp", "inversebench_edm", "inversebench_edm_heads"],
)
def test_parity(name):
    folder = Path(PARITY) / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prior = load(torch.load(folder / "checkpoint.pt", weights_only=True), config)
    recorded = load_file(folder / "io.safetensors")

    def check(result, expected):
        largest = expected.abs().reshape(len(expected), -1).amax(1)
        error = (result - expected).abs().reshape(len(expected), -1).amax(1) / largest
        assert error.max() < 3e-5

    for case in config["cases"]:
        values = {
            key: recorded[f"{case['id']}.{key}"] for key in ("x", "sigma", "raw", "denoised", "c_noise")
        }
        found = prior.network.coefficients(values["sigma"])
        check(found.c_noise, values["c_noise"])
        given = found.c_in[:, None, None, None] * values["x"]
        check(prior.network.model(given, values["c_noise"]), values["raw"])
        denoised = prior.denoise_channels(values["x"], values["sigma"])
        check(denoised, values["denoised"])
        if f"{case['id']}.score" in recorded:
            score = (denoised - values["x"]) / values["sigma"][:, None, None, None] ** 2
            check(score, recorded[f"{case['id']}.score"])
