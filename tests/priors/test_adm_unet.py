"""The ADM U-Net and its checkpoints: parts against formulas, published shapes, round trips, refusals."""

import hashlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from priors import PriorError
from priors.checkpoints.guided_diffusion import FAMILY
from priors.networks.adm_unet import ADMSettings, ADMUNet, _Attention, _Grow, _ResidualBlock, time_features
from tests.priors.checkpoint_helper import PARITY, image, loaded

SMALL = ADMSettings(
    in_channels=2,
    out_channels=4,
    model_channels=32,
    widths=(32, 64),
    num_res_blocks=1,
    attention_levels=(1,),
    num_head_channels=16,
)
SHAPES = {
    "small": SMALL,
    "heads counted, both ways": replace(
        SMALL, num_head_channels=0, num_heads=4, num_heads_upsample=2, attention_levels=(0, 1)
    ),
    "new order": replace(SMALL, use_new_attention_order=True),
    "convolutions resample": replace(SMALL, resblock_updown=False, attention_levels=(0,)),
    "nothing learned in resampling": replace(
        SMALL, resblock_updown=False, conv_resample=False, widths=(32, 32, 64), num_res_blocks=2
    ),
    "embedding added": replace(SMALL, use_scale_shift_norm=False, attention_levels=()),
    "one level": replace(SMALL, widths=(64,), model_channels=32, num_res_blocks=2, attention_levels=()),
    "no variance, one channel": replace(SMALL, in_channels=1, out_channels=1, widths=(64, 32, 32)),
    "classes": replace(SMALL, num_classes=5),
    "rgb, half a width": replace(
        SMALL, in_channels=3, out_channels=6, model_channels=64, widths=(32, 64, 64), attention_levels=(1, 2)
    ),
}


def filled(network, seed=0, scale=1.0):
    """Weights at random, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            one_d = value.ndim == 1
            norm = one_d and name.endswith("weight")
            value.copy_(norm + 0.1 * noise if one_d else scale * noise / math.sqrt(value[0].numel()))
    return network.eval().requires_grad_(False)


def facts(shape):
    """What a file of this shape does not tell."""
    config = {"use_new_attention_order": shape.use_new_attention_order}
    if shape.num_head_channels:
        config["num_head_channels"] = shape.num_head_channels
    else:
        config |= {"num_heads": shape.num_heads, "num_heads_upsample": shape.num_heads_upsample}
    return config | ({"class_label": 3} if shape.num_classes else {})


load = partial(loaded, FAMILY)

# Parts


def test_time_features_are_cosines_and_sines_at_geometric_frequencies():
    times = np.array([0, 1, 37, 999])
    frequencies = 10000.0 ** (-np.arange(5) / 5)
    angles = times[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(time_features(torch.tensor(times), 10), expected, atol=1e-4)
    odd = time_features(torch.tensor(times), 11)
    np.testing.assert_allclose(odd[:, :10], expected, atol=1e-4)
    assert not odd[:, 10].any()


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_a_softmax_average_of_the_values_of_each_head(new_order):
    width, heads = 64, 4
    layer = filled(_Attention(width, heads, new_order))
    x = image(2, width, 3, 5)
    flat = F.group_norm(x.flatten(2), 32, layer.norm.weight, layer.norm.bias).double()
    qkv = (layer.qkv.weight[..., 0].double() @ flat + layer.qkv.bias.double()[:, None]).numpy()
    mixed = np.empty((2, width, 15))
    each = width // heads
    for head in range(heads):
        first = head * each if new_order else 3 * head * each
        step = width if new_order else each
        q, k, v = (qkv[:, first + i * step :][:, :each] for i in range(3))
        logits = np.einsum("bct,bcs->bts", q, k) / math.sqrt(each)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        mixed[:, head * each :][:, :each] = np.einsum("bts,bcs->bct", weight, v)
    out = layer.proj_out.weight[..., 0].double().numpy() @ mixed + layer.proj_out.bias.numpy()[:, None]
    np.testing.assert_allclose(layer(x).flatten(2), x.flatten(2).numpy() + out, atol=2e-5)


def test_resampling_averages_and_repeats_pixels():
    x = image(1, 32, 4, 6)
    fine = np.kron(x.numpy(), np.ones((2, 2)))
    coarse = x.numpy().reshape(1, 32, 2, 2, 3, 2).mean((3, 5))
    down, up = (_ResidualBlock(32, 32, 8, True, resample) for resample in ("down", "up"))
    np.testing.assert_allclose(down._resample(x), coarse, atol=1e-6)
    np.testing.assert_array_equal(up._resample(x), fine)
    grow = filled(_Grow(32))
    expected = F.conv2d(torch.from_numpy(fine).float(), grow.conv.weight, grow.conv.bias, padding=1)
    torch.testing.assert_close(grow(x), expected)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_embedding_modulates_the_second_normalisation(scale_shift):
    block = filled(_ResidualBlock(32, 64, 8, scale_shift, ""))
    x, embedding = image(2, 32, 4, 4), image(2, 8, seed=1)
    values = dict(block.named_parameters())

    def group_norm(h, part):
        grouped = h.reshape(2, 32, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        plain = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        return plain * values[f"{part}.weight"][:, None, None] + values[f"{part}.bias"][:, None, None]

    def conv(h, part):
        kernel = values[f"{part}.weight"]
        return F.conv2d(h, kernel, values[f"{part}.bias"], padding=kernel.shape[-1] // 2)

    linear = embedding.sigmoid() * embedding @ values["emb_layers.1.weight"].T + values["emb_layers.1.bias"]
    h = conv(F.silu(group_norm(x, "in_layers.0")), "in_layers.2")
    if scale_shift:
        factor, shift = 1 + linear[:, :64, None, None], linear[:, 64:, None, None]
        h = group_norm(h, "out_layers.0") * factor + shift
    else:
        h = group_norm(h + linear[:, :, None, None], "out_layers.0")
    expected = conv(x, "skip_connection") + conv(F.silu(h), "out_layers.3")
    torch.testing.assert_close(block(x, embedding), expected, atol=2e-5, rtol=1e-4)


# Published configurations

# Number of entries, of parameters, and the sha256 of "key shape dtype" lines of the original code's networks.
MULTIPLIERS = (1, 1, 2, 2, 4, 4)
PUBLISHED = {
    "guided-diffusion 256": (
        ADMSettings(3, 6, 256, tuple(256 * m for m in MULTIPLIERS), 2, (3, 4, 5), num_head_channels=64),
        (566, 552814086, "9da10182cce1792b0d5093a30225dafc48a10d745d263c33750137ae902c7cd8"),
    ),
    "DDS knee": (
        ADMSettings(2, 4, 256, tuple(256 * m for m in MULTIPLIERS), 1, (), num_head_channels=64),
        (344, 361428228, "455ee6e67bac88e021c071fbd71a7ede7b2623d211b123389481ced602182ff1"),
    ),
    "DDS AAPM": (
        ADMSettings(1, 2, 256, tuple(256 * m for m in MULTIPLIERS), 1, (4,), num_head_channels=64),
        (362, 374022658, "2763f99929de3b0b4603e85a913dc90c573d42fa6b6d5730901d3baa6bc0d20b"),
    ),
}


def signature(network):
    entries = network.state_dict()
    lines = [f"{key} {list(value.shape)} {str(value.dtype)[6:]}" for key, value in entries.items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return len(entries), sum(value.numel() for value in network.parameters()), digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_built_and_recognised(name):
    expected, found = PUBLISHED[name]
    with torch.device("meta"):
        network = ADMUNet(expected)
    assert signature(network) == found
    # As large as they are, without memory.
    weights = {key: torch.zeros(1).expand(value.shape) for key, value in network.state_dict().items()}
    recipe = FAMILY.read(weights, {})
    assert ADMSettings.from_dict(recipe.settings["network"]) == expected
    assert recipe.settings["noise_schedule"] == "linear"


def test_heads_of_the_published_networks_that_differ():
    sixty_four = ADMSettings(
        3, 6, 192, (192, 384, 576, 768), 3, (1, 2, 3), num_head_channels=64,
        use_new_attention_order=True, num_classes=1000,
    )  # fmt: skip
    middle = ADMSettings(
        3, 6, 256, (256, 256, 512, 768, 1024), 2, (2, 3, 4), num_heads=4, num_heads_upsample=4,
        num_classes=1000,
    )  # fmt: skip
    for expected, schedule in ((sixty_four, "cosine"), (middle, "linear")):
        with torch.device("meta"):
            entries = ADMUNet(expected).state_dict()
        weights = {key: torch.zeros(1).expand(value.shape) for key, value in entries.items()}
        recipe = FAMILY.read(weights, {"class_label": 0})
        assert ADMSettings.from_dict(recipe.settings["network"]) == expected
        assert recipe.settings["noise_schedule"] == schedule


# Round trips


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name):
    shape = SHAPES[name]
    network = filled(ADMUNet(shape))
    weights = network.state_dict()
    prior = load(weights, facts(shape))
    found = replace(prior.network.settings, resblock_updown=shape.resblock_updown)  # one level does not tell
    assert replace(found, num_heads_upsample=shape.num_heads_upsample) == shape or shape.num_heads > 1
    assert list(prior.network.state_dict()) == list(weights)
    x, time = image(2, shape.in_channels, 8, 12), torch.tensor([5, 700])
    label = torch.tensor([3, 3]) if shape.num_classes else None
    torch.testing.assert_close(prior.network(x, time, label), network(x, time, label), rtol=0, atol=0)
    assert prior.contract.num_channels == shape.in_channels
    assert prior.contract.size_multiple == 2 ** (len(shape.widths) - 1)


@settings(deadline=None, max_examples=12)
@given(
    widths=st.lists(st.sampled_from([32, 64]), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    attention=st.sets(st.integers(0, 3)),
    resampling=st.sampled_from([(True, True), (False, True), (False, False)]),
    scale_shift=st.booleans(),
    learned=st.booleans(),
    channels=st.integers(1, 4),
)
def test_any_shape_is_told_from_keys(widths, blocks, attention, resampling, scale_shift, learned, channels):
    single = len(widths) == 1
    shape = ADMSettings(
        in_channels=channels,
        out_channels=channels * (1 + learned),
        model_channels=64,
        widths=tuple(widths),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(level for level in attention if level < len(widths))),
        num_head_channels=32,
        use_scale_shift_norm=scale_shift,
        resblock_updown=resampling[0] and not single,
        conv_resample=resampling[1] or single,
    )
    with torch.device("meta"):
        entries = ADMUNet(shape).state_dict()
    weights = {key: torch.zeros(1).expand(value.shape) for key, value in entries.items()}
    recipe = FAMILY.read(weights, {"num_head_channels": 32})
    assert ADMSettings.from_dict(json.loads(json.dumps(recipe.settings["network"]))) == shape


def test_half_precision_and_a_wrapper_s_prefix():
    network = filled(ADMUNet(SMALL))
    halves = {f"module.{key}": value.half() for key, value in network.state_dict().items()}
    assert FAMILY.recognises(halves)
    prior = load(halves, facts(SMALL))
    for key, value in prior.network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, halves[f"module.{key}"].float(), rtol=0, atol=0)


# The noise


class Perfect(torch.nn.Module):
    """Predicts the noise of images from N(0, s^2), one a channel, and rubbish for the variance."""

    def __init__(self, alphas_bar, s):
        super().__init__()
        self.alphas_bar, self.s, self.times = alphas_bar, s, []

    def forward(self, x, time, label=None):
        self.times.append(time)
        bar = self.alphas_bar[time.long()][:, None, None, None]
        eps = (1 - bar).sqrt() * x / (bar * self.s**2 + 1 - bar)
        return torch.cat([eps, torch.full_like(eps, 1e6)], dim=1).float()


def with_network(network, **config):
    weights = filled(ADMUNet(SMALL)).state_dict()
    chosen = FAMILY.read(weights, {**facts(SMALL), **config}).settings
    return FAMILY.prior(network, chosen, FAMILY.contract(chosen))


def linear_alphas_bar(steps=1000):
    betas = np.linspace(0.1 / steps, 20 / steps, steps)
    return torch.from_numpy(np.cumprod(1 - betas))


@pytest.mark.parametrize("time", [0, 1, 500, 999])
def test_at_a_step_the_denoiser_is_tweedie_s_formula(time):
    network = Perfect(linear_alphas_bar(), s=0.5)
    prior = with_network(network)
    bar = float(network.alphas_bar[time])
    sigma = math.sqrt((1 - bar) / bar)
    x = image(2, 2, 8, 8) * math.sqrt(sigma**2 + 0.25)
    result = prior.denoise_channels(x, torch.full((2,), sigma))
    assert network.times[-1].tolist() == [time, time]
    rounding = 1e-6 * float(x.abs().max())  # the noise cancels
    torch.testing.assert_close(result, x * 0.25 / (0.25 + sigma**2), rtol=1e-4, atol=rounding)
    network.times.clear()
    prior.denoise(torch.view_as_complex(x.permute(0, 2, 3, 1).contiguous()), sigma)
    assert network.times[-1].tolist() == [time, time]


def test_noise_levels_of_the_contract_are_those_of_the_schedule():
    bar = linear_alphas_bar()
    contract = load(filled(ADMUNet(SMALL)).state_dict(), facts(SMALL)).contract
    assert contract.channels == "complex"
    assert contract.sigma_min == pytest.approx(math.sqrt(1 / bar[0] - 1), rel=1e-9)
    assert contract.sigma_max == pytest.approx(math.sqrt(1 / bar[-1] - 1), rel=1e-9)
    colour = replace(SMALL, in_channels=3, out_channels=6)
    contract_rgb = load(filled(ADMUNet(colour)).state_dict(), facts(colour)).contract
    assert (contract_rgb.channels, contract_rgb.value_range) == ("rgb", (-1, 1))
    # The network's images span twice the range of ours.
    assert contract_rgb.sigma_max == pytest.approx(contract.sigma_max / 2)


def test_configured_schedule_steps_and_output():
    weights = filled(ADMUNet(SMALL)).state_dict()
    x, sigma = image(1, 2, 8, 8), torch.tensor([0.7])
    config = {**facts(SMALL), "diffusion_steps": 250}
    plain = load(weights, config)
    level = int((plain.process.sigmas.log() - math.log(0.7)).abs().argmin())
    bar = linear_alphas_bar(250)
    torch.testing.assert_close(plain.process.sigmas, (1 / bar - 1).sqrt())
    scaled = x / math.sqrt(1 + 0.7**2)
    eps = plain.network(scaled, torch.tensor([level]))[:, :2]
    torch.testing.assert_close(plain.denoise_channels(x, sigma), x - 0.7 * eps)
    rescaled = load(weights, {**config, "rescale_timesteps": True})
    eps = plain.network(scaled, torch.tensor([4.0 * level]))[:, :2]
    torch.testing.assert_close(rescaled.denoise_channels(x, sigma), x - 0.7 * eps)
    image_wise = load(weights, {**config, "predict_xstart": True})
    out = plain.network(scaled, torch.tensor([level]))[:, :2]
    torch.testing.assert_close(image_wise.denoise_channels(x, sigma), out)
    cosine = load(weights, {**facts(SMALL), "noise_schedule": "cosine"})
    # abar(t) of Nichol & Dhariwal, far from the clipped end
    time = 0.4
    bar_mid = (math.cos((time + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    assert cosine.process.sigmas[399] == pytest.approx(math.sqrt(1 / bar_mid - 1), rel=1e-6)


# The prior


def test_any_size_is_padded_and_cropped():
    prior = load(filled(ADMUNet(SMALL)).state_dict(), facts(SMALL))
    x, sigma = image(2, 2, 7, 9), torch.tensor([0.1, 3.0])
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    expected = prior.denoise_channels(padded, sigma)[..., :7, :9]
    torch.testing.assert_close(prior.denoise_channels(x, sigma), expected)


def test_gradients_reach_the_image():
    prior = load(filled(ADMUNet(SMALL)).state_dict(), facts(SMALL))
    x, direction = image(1, 2, 8, 8), image(1, 2, 8, 8, seed=1)
    sigma = torch.tensor([0.5])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((prior.denoise_channels(leaf, sigma) * direction).sum(), leaf)
    step = 1e-2 * direction
    change = (
        (prior.denoise_channels(x + step, sigma) - prior.denoise_channels(x - step, sigma)) * direction
    ).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), change, rtol=2e-2, atol=1e-4)


def test_bfloat16_is_close_and_only_the_network_s():
    shape = replace(SMALL, attention_levels=(0, 1))
    weights = filled(ADMUNet(shape)).state_dict()
    full, half = (load(weights, facts(shape), precision) for precision in ("fp32", "bf16"))
    x, sigma = image(2, 2, 8, 8), torch.tensor([0.01, 1.0])
    a, b = full.denoise_channels(x, sigma), half.denoise_channels(x, sigma)
    assert b.dtype == torch.float32
    # Of what is taken from the image: at low noise the image itself is not rounded.
    difference = (a - b).abs().amax((1, 2, 3)) / (x - a).abs().amax((1, 2, 3))
    assert difference.min() > 1e-5
    assert difference.max() < 0.05
    with pytest.raises(PriorError, match="precision"):
        full.precision = "fp16"


@pytest.mark.parametrize("label", [0, 4])
def test_class_label(label):
    shape = SHAPES["classes"]
    network = filled(ADMUNet(shape))
    prior = load(network.state_dict(), {**facts(shape), "class_label": label})
    x, sigma = image(2, 2, 8, 8), torch.tensor([1.0, 1.0])
    time = prior.process.nearest(sigma)
    eps = network(x / math.sqrt(2), time, torch.tensor([label, label]))[:, :2]
    torch.testing.assert_close(prior.denoise_channels(x, sigma), x - eps)
    other = network(x / math.sqrt(2), time, torch.tensor([2, 2]))[:, :2]
    assert (eps - other).abs().max() > 1e-3


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "cannot tell num_head_channels"),
        ({"num_head_channels": -1}, "cannot tell num_head_channels"),
        ({"num_head_channels": 24}, "num_head_channels 24 does not divide 64 channels"),
        ({"num_heads": 5}, "num_heads 5 does not divide 64 channels"),
        ({"num_head_channels": "many"}, "num_head_channels must be a whole number"),
        ({"num_head_channels": 16, "num_channels": 64}, "config says num_channels = 64, the file has 32"),
        ({"num_head_channels": 16, "channel_mult": "1,1"}, "channel_mult"),
        ({"num_head_channels": 16, "learn_sigma": False}, "learn_sigma"),
        ({"num_head_channels": 16, "class_cond": True}, "class_cond"),
        ({"num_head_channels": 16, "resblock_updown": False}, "resblock_updown"),
        ({"num_head_channels": 16, "use_scale_shift_norm": 1}, "must be true or false"),
        ({"num_head_channels": 16, "image_size": 16, "attention_resolutions": "16"}, "attention_resol"),
        ({"num_head_channels": 16, "noise_schedule": "sigmoid"}, "noise_schedule"),
        ({"num_head_channels": 16, "diffusion_steps": 0}, "diffusion_steps"),
        ({"num_head_channels": 16, "diffusion_steps": 10}, "alphas_bar"),
        ({"num_head_channels": 16, "class_label": 1}, "not told of classes"),
        ({"num_head_channels": 16, "type": "simple"}, "simple"),
        ({"num_head_channels": 16, "num_head": 4}, r"unknown arguments \['num_head'\]"),
        ({"constructor": {"depth": 4}}, r"unknown arguments \['depth'\]"),
        ({"constructor": [1]}, "constructor"),
    ],
)
def test_config_that_does_not_fit_is_refused(config, message):
    with torch.device("meta"):
        entries = ADMUNet(SMALL).state_dict()
    weights = {key: torch.zeros(value.shape) for key, value in entries.items()}
    with pytest.raises(PriorError, match=message):
        FAMILY.read(weights, config)


def test_agreeing_config_is_accepted_as_a_whole():
    config = {
        "family": "ignored beside constructor",
        "constructor": {
            "image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1,
            "attention_resolutions": "8", "num_head_channels": 16, "num_heads": 7, "learn_sigma": True,
            "class_cond": False, "use_scale_shift_norm": True, "resblock_updown": True, "use_fp16": True,
            "in_channels": 2, "out_channels": 4, "diffusion_steps": 1000, "dropout": 0.1, "type": "openai",
        },
    }  # fmt: skip
    recipe = FAMILY.read(filled(ADMUNet(SMALL)).state_dict(), config)
    assert recipe.settings["network"]["num_head_channels"] == 16


def test_class_conditional_network_asks_for_the_class():
    shape = SHAPES["classes"]
    weights = filled(ADMUNet(shape)).state_dict()
    with pytest.raises(PriorError, match="class_label"):
        FAMILY.read(weights, {"num_head_channels": 16})
    with pytest.raises(PriorError, match="class_label must be a whole number from 0 to 4"):
        FAMILY.read(weights, {"num_head_channels": 16, "class_label": 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("output_blocks.1.0.skip_connection.bias"), "lacks 'output_blocks.1.0.skip"),
        (lambda w: w.update({"input_blocks.1.1.transformer": torch.zeros(3)}), "input_blocks.1.1.tr"),
        (lambda w: w.update({"out.0.bias": torch.zeros(7)}), r"'out.0.bias' has the shape \(7,\), not"),
        (lambda w: w.update({"time_embed.0.weight": torch.zeros(3)}), "should have 2 dimensions"),
        (lambda w: w.update({"out.2.weight": torch.zeros(5, 32, 3, 3)}), "5 output and 2 input"),
        (lambda w: w.update({"out.0.bias": 3}), "'out.0.bias' is no tensor but int"),
        (lambda w: w.update({"out.0.bias": torch.zeros(32, dtype=torch.int64)}), "floating-point"),
        (lambda w: w.pop("input_blocks.1.0.out_layers.3.weight"), "input_blocks.1.0.out_layers.3.weight"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("output_blocks.3")], "cannot be divided"),
        (lambda w: w.update({"output_blocks.9999.0.op.weight": torch.zeros(1)}), "cannot be divided"),
    ],
)
def test_damaged_checkpoint_is_refused_by_the_name_of_the_key(change, message):
    weights = dict(filled(ADMUNet(SMALL)).state_dict())
    change(weights)
    with pytest.raises(PriorError, match=message):
        FAMILY.read(weights, {"num_head_channels": 16})


def test_other_content_is_not_recognised():
    weights = filled(ADMUNet(SMALL)).state_dict()
    assert FAMILY.recognises(weights)
    for other in ([weights], None, 3, {}, {"model": weights}, {1: 2}, {"out.2.weight": 0}):
        assert not FAMILY.recognises(other)


@pytest.mark.parametrize(
    "values",
    [
        {"widths": 3},
        {"widths": [32, "64"]},
        {"num_res_blocks": True},
        {"widths": []},
        {"attention_levels": [7]},
    ],
)
def test_damaged_settings_of_a_converted_prior_are_refused(values):
    with pytest.raises(PriorError):
        ADMSettings.from_dict({**SMALL.as_dict(), **values})
    with pytest.raises(PriorError):
        FAMILY.network({"network": {**SMALL.as_dict(), **values}})


# Recorded outputs of the original code


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
@pytest.mark.parametrize("name", ["guided_diffusion", "dds_knee320", "dds_aapm256"])
def test_parity(name):
    folder = Path(PARITY) / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prior = load(torch.load(folder / "checkpoint.pt", weights_only=True), config)
    recorded = load_file(folder / "io.safetensors")

    def check(result, expected):
        error = (result - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
        assert error.max() < 3e-5

    for case in config["cases"]:
        values = {key: recorded[f"{case['id']}.{key}"] for key in ("x", "t", "raw")}
        clean = recorded.get(f"{case['id']}.x0", recorded.get(f"{case['id']}.pred_xstart"))
        check(prior.network(values["x"], values["t"]), values["raw"])
        bar = prior.process.alphas_bar[values["t"].long()]
        noisy = (values["x"] / bar.sqrt()[:, None, None, None]).float()
        check(prior.denoise_channels(noisy, (1 / bar - 1).sqrt().float()), clean)
