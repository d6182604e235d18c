"""NCSN++ and its checkpoints: parts against formulas, published shapes, round trips, refusals."""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.signal import convolve2d, correlate2d, upfirdn
from torch import nn

from priors import PriorError
from priors.checkpoints.score_sde import FAMILY
from priors.networks.ncsnpp import (
    FIRConv,
    FourierFeatures,
    NCSNpp,
    NCSNppSettings,
    PixelLinear,
    Resample,
    SelfAttention,
    fir_downsample,
    fir_upsample,
    positional_features,
)

PARITY = os.environ.get("RECON_PARITY", "")
PUBLISHED = "eee4bc45c55523603be33da272e6caf6c8274a4da4232a205eeec38055a26724"
"""SHA-256 of the keys, shapes and types of Score-MRI's network, as its own code lists them."""

SMALL = NCSNppSettings(channels=1, nf=8, ch_mult=(1, 2), num_res_blocks=1, num_scales=20)
POSITIONAL = replace(SMALL, embedding_type="positional", scale_by_sigma=False, num_scales=1000)
SHAPES = {
    "small": SMALL,
    "attention": replace(SMALL, channels=2, attention_levels=(0, 1), num_res_blocks=2),
    "one resolution": replace(SMALL, ch_mult=(2,), num_res_blocks=2, attention_levels=(0,)),
    "one resolution, residual": replace(SMALL, ch_mult=(1,), progressive="residual"),
    "four resolutions": replace(SMALL, ch_mult=(1, 1, 3, 1), attention_levels=(2,), progressive_input="none"),
    "skips of images": replace(
        SMALL, channels=3, progressive="output_skip", progressive_input="input_skip", ch_mult=(1, 2, 1)
    ),
    "images beside features": replace(
        SMALL, progressive="residual", progressive_input="input_skip", progressive_combine="cat"
    ),
    "residual both ways": replace(SMALL, progressive="residual", ch_mult=(2, 1, 1)),
    "plain resampling": replace(SMALL, fir=False, progressive="residual", skip_rescale=False),
    "ddpm": replace(SMALL, resblock_type="ddpm", nf=16, channels=2, progressive_input="none"),
    "ddpm, plain": replace(SMALL, resblock_type="ddpm", fir=False, nonlinearity="elu"),
    "ddpm, nothing learned in resampling": replace(
        SMALL, resblock_type="ddpm", resamp_with_conv=False, ch_mult=(1, 2, 2), progressive="output_skip"
    ),
    "not told the noise": replace(SMALL, conditional=False, nf=12),
    "levels by number": replace(SMALL, embedding_type="positional", nf=5, ch_mult=(1, 1)),
    "other filter": replace(SMALL, fir_kernel=(1.0, 2.0, 1.0), centered=True, nonlinearity="relu"),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=generator(seed))


def filled(network, seed=0):
    """Weights at random, everywhere of about the scale that keeps the features' size."""
    source = generator(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=source)
            if value.ndim == 1:
                value.copy_(0.2 * noise + name.endswith(("weight", "0.W")))
            else:
                fan = value.shape[0] if name.endswith("W") else value[0].numel()
                value.copy_(noise / math.sqrt(fan))
        levels = np.exp(np.linspace(math.log(50), math.log(0.01), len(network.sigmas)))
        network.sigmas.copy_(torch.from_numpy(levels))
    return network.eval()


def written(network, averaged=None):
    """The original's file: a list of the trained parameters' averages beside the state dict."""
    averaged = averaged or network
    trained = [value.detach() for name, value in averaged.named_parameters() if name != "all_modules.0.W"]
    return {
        "optimizer": {"state": {}},
        "model": {f"module.{key}": value.clone() for key, value in network.state_dict().items()},
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": trained},
        "step": 7,
    }


def told(settings):
    """What a file does not tell, under the original's names and in its sections."""
    model = {
        name: getattr(settings, name) for name in ("skip_rescale", "nonlinearity", "fir", "scale_by_sigma")
    }
    model["fir_kernel"] = list(settings.fir_kernel)
    fourier = settings.embedding_type == "fourier"
    return {
        "model": {**model, "lr": 3},
        "data": {"centered": settings.centered},
        "training": {"sde": "vesde", "continuous": fourier, "batch_size": 5},
    }


def load(content, config=None, *, ema=True, **changes):
    assert FAMILY.recognises(content)
    recipe = FAMILY.read(content, config or {}, ema=ema)
    settings = json.loads(json.dumps(recipe.settings))
    network = FAMILY.network(settings)
    network.load_state_dict(recipe.weights, strict=True)
    contract = replace(FAMILY.contract(settings), **changes)
    return FAMILY.prior(network, settings, contract).eval().requires_grad_(False)


# Parts


TAPS = [(1.0, 3.0, 3.0, 1.0), (1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0), (1.0, -2.0, 5.0, 3.0, 2.0)]


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("size", [(6, 10), (2, 4)])
def test_filtered_resampling_is_upfirdn(taps, size):
    x = image(2, 3, *size, dtype=torch.float64)
    h, count = np.array(taps) / sum(taps), len(taps)

    def along(values, axis, kernel, up, start, step, length):
        full = upfirdn(kernel, values, up=up, axis=axis)
        return np.take(full, np.arange(start, start + step * length, step), axis=axis)

    small, large = x.numpy(), x.numpy()
    for axis in (2, 3):
        length = x.shape[axis]
        small = along(small, axis, h, 1, count // 2, 2, length // 2)
        large = along(large, axis, 2 * h, 2, (count - 2) // 2, 1, 2 * length)
    np.testing.assert_allclose(fir_downsample(x, taps), small, atol=1e-14)
    np.testing.assert_allclose(fir_upsample(x, taps), large, atol=1e-14)


@pytest.mark.parametrize("taps", TAPS[:4])
@pytest.mark.parametrize("up", [False, True])
def test_filtered_convolution(taps, up):
    # Zeros between the pixels, correlation with the weights, then the filter; or filter, then correlation.
    layer = FIRConv(2, 3, taps, up=up).double()
    with torch.no_grad():
        layer.weight.copy_(image(3, 2, 3, 3, seed=1))
        layer.bias.copy_(image(3, seed=2))
    x = image(1, 2, 6, 4, seed=3, dtype=torch.float64)
    plane, count = np.outer(taps, taps) / sum(taps) ** 2, len(taps)
    expected = np.zeros((3, 12, 8) if up else (3, 3, 2))
    for outer in range(3):
        for inner in range(2):
            weight, z = layer.weight[outer, inner].detach().numpy(), x[0, inner].numpy()
            if up:
                z = np.kron(z, [[1, 0], [0, 0]])
            full = correlate2d(convolve2d(z, 4 * plane if up else plane), weight)
            start = (count - 2) // 2 + 1 if up else count // 2 + 1
            step = 1 if up else 2
            height, width = expected.shape[1:]
            expected[outer] += full[start::step, start::step][:height, :width]
    expected += layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(x)[0].detach(), expected, atol=1e-13)


@pytest.mark.parametrize("fir", [False, True])
def test_resampling_without_a_filter_is_mean_and_nearest_neighbour(fir):
    settings = replace(SMALL, fir=fir, fir_kernel=(1.0, 1.0))
    x = image(1, 2, 4, 6, dtype=torch.float64)
    half = x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    double = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(Resample(2, 2, settings, up=False, conv=False)(x), half)
    torch.testing.assert_close(Resample(2, 2, settings, up=True, conv=False)(x), double)


def test_plain_resampling_with_a_convolution():
    settings, x = replace(SMALL, fir=False), image(1, 2, 4, 6)
    down = Resample(2, 3, settings, up=False, conv=True)
    padded = np.pad(x[0].numpy(), ((0, 0), (0, 1), (0, 1)))
    weight, bias = (value.detach().numpy() for value in down.Conv_0.parameters())
    expected = sum(correlate2d(padded[k], weight[1, k], "valid") for k in range(2))[::2, ::2]
    np.testing.assert_allclose(down(x)[0, 1].detach() - bias[1], expected, atol=1e-6)
    up = Resample(2, 3, settings, up=True, conv=True)
    large = np.kron(x[0].numpy(), np.ones((2, 2)))
    weight, bias = (value.detach().numpy() for value in up.Conv_0.parameters())
    expected = sum(correlate2d(large[k], weight[2, k], "same") for k in range(2))
    np.testing.assert_allclose(up(x)[0, 2].detach() - bias[2], expected, atol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
def test_attention_is_a_softmax_over_all_pixels(rescale):
    layer = filled_layer(SelfAttention(8, rescale)).double()
    x = image(2, 8, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x)
        groups = x.reshape(2, 2, -1)  # of four channels each
        spread = groups.var(2, unbiased=False, keepdim=True) + 1e-6
        h = ((groups - groups.mean(2, keepdim=True)) / spread.sqrt()).reshape(x.shape)
        h = h * layer.GroupNorm_0.weight[:, None, None] + layer.GroupNorm_0.bias[:, None, None]

        def mix(part, values):
            return torch.einsum("bchw,cd->bdhw", values, part.W) + part.b[:, None, None]

        q, k, v = (mix(part, h).flatten(2) for part in (layer.NIN_0, layer.NIN_1, layer.NIN_2))
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), dim=2)
        assert weights.max() > 0.3  # far from uniform
        seen = torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape)
        expected = x + mix(layer.NIN_3, seen)
    torch.testing.assert_close(out, expected / math.sqrt(2) if rescale else expected)


def filled_layer(layer):
    with torch.no_grad():
        for number, value in enumerate(layer.parameters()):
            value.copy_(image(*value.shape, seed=number) / (1 if value.ndim == 1 else 2))
    return layer


def test_embeddings():
    numbers = torch.tensor([0.3, -2.0, 700.0])
    layer = FourierFeatures(5)
    angles = 2 * np.pi * np.outer(numbers.double(), layer.W.double())
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(layer(numbers).detach(), expected, atol=3e-3)
    np.testing.assert_allclose(layer(numbers[:2]).detach(), expected[:2], atol=1e-5)
    rates = 10000.0 ** (-np.arange(4) / 3)
    angles = np.outer(numbers.double(), rates)
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((3, 1))], axis=1)
    np.testing.assert_allclose(positional_features(numbers, 9), expected, atol=1e-4)


def test_a_linear_map_of_channels():
    layer = filled_layer(PixelLinear(3, 5))
    x = image(2, 3, 4, 6)
    expected = torch.einsum("bchw,cd->bdhw", x, layer.W) + layer.b[:, None, None]
    torch.testing.assert_close(layer(x), expected)


# The whole network


def listed(network):
    values = network.state_dict().items()
    return [f"{key} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for key, value in values]


def test_the_published_network_of_score_mri():
    with torch.device("meta"):
        network = NCSNpp(NCSNppSettings(1, 128, (1, 2, 2, 2), 4, num_scales=2000))
    lines = listed(network)
    assert len(lines) == 522
    trained = [value for value in network.parameters() if value.requires_grad]
    assert len(trained) == 520
    assert sum(value.numel() for value in trained) == 61_433_473
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_counts(name):
    network = filled(NCSNpp(SHAPES[name]))
    label = torch.tensor([0.4, 3.0]) if network.settings.embedding_type == "fourier" else torch.tensor([2, 9])
    multiple = network.settings.size_multiple
    x = image(2, network.settings.channels, 2 * multiple, 3 * multiple)
    out = network(x, label)
    assert out.shape == x.shape
    # The residual of a single resolution has nothing finer to be added to.
    idle = [] if name != "one resolution, residual" else ["all_modules.10.", "all_modules.11."]
    out.square().sum().backward()
    for key, value in network.named_parameters():
        if not value.requires_grad:
            continue
        # Only what would tell the noise level stays untouched where the network is not told.
        unused = not network.settings.conditional and "Dense_0" in key
        unused |= key.startswith(tuple(idle))
        # A bias before the normalisation of its own channels alone cancels, as do those of attention's keys.
        if not unused and not key.endswith(("NIN_1.b", "bias")):
            assert value.grad is not None, key
            assert value.grad.abs().max() > 0, key
        assert (value.grad is None) == unused, key


@pytest.mark.parametrize("name", ["small", "attention", "skips of images", "ddpm"])
def test_an_item_does_not_depend_on_its_batch(name):
    network = filled(NCSNpp(SHAPES[name]))
    x, sigma = image(3, network.settings.channels, 8, 12), torch.tensor([0.05, 1.0, 20.0])
    with torch.no_grad():
        together = network(x, sigma)
        alone = torch.cat([network(x[k : k + 1], sigma[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_the_output_is_divided_by_sigma_and_the_input_centred():
    network = filled(NCSNpp(SMALL))
    other = NCSNpp(replace(SMALL, scale_by_sigma=False, centered=True))
    other.load_state_dict(network.state_dict())
    x, sigma = image(2, 1, 4, 6), torch.tensor([0.1, 30.0])
    with torch.no_grad():
        expected = other(2 * x - 1, sigma) / sigma[:, None, None, None]
        torch.testing.assert_close(network(x, sigma), expected)
        assert not torch.allclose(network(x, sigma), network(x, sigma * 1.1))


# Checkpoints


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name):
    shape = SHAPES[name]
    last, averaged = filled(NCSNpp(shape)), filled(NCSNpp(shape), seed=1)
    with torch.no_grad():
        for key, value in averaged.named_parameters():
            if not value.requires_grad:
                value.copy_(last.get_parameter(key))
    content = written(last, averaged)
    multiple = shape.size_multiple
    x, label = image(2, shape.channels, multiple, 2 * multiple), torch.tensor([3, 17])
    sigma = last.sigmas[label].float()
    for ema, network in ((True, averaged), (False, last)):
        prior = load(content, told(shape), ema=ema)
        assert prior.contract.num_channels == shape.channels
        assert prior.contract.size_multiple == multiple
        low, high = prior.contract.value_range
        assert (prior.contract.sigma_min * (high - low), prior.contract.sigma_max * (high - low)) == (
            pytest.approx(0.01),
            pytest.approx(50.0),
        )
        with torch.no_grad():
            score = network(x, sigma if shape.embedding_type == "fourier" else label)
            expected = x + sigma[:, None, None, None] ** 2 * score
        torch.testing.assert_close(prior.denoise_channels(x, sigma), expected, rtol=1e-4, atol=1e-4)
    assert [str(v.dtype) for v in prior.network.state_dict().values()] == [
        str(v.dtype) for v in last.state_dict().values()
    ]


def test_a_file_without_averages_and_a_state_dict_alone():
    network = filled(NCSNpp(SMALL))
    content = written(network, filled(NCSNpp(SMALL), seed=1))
    del content["ema"]
    for holder in (content, content["model"], dict(network.state_dict())):
        assert torch.equal(load(holder).network.all_modules[3].weight, network.all_modules[3].weight)


def test_averages_of_all_parameters():
    network = filled(NCSNpp(SMALL))
    content = written(network)
    content["ema"]["shadow_params"] = [value.detach() + 1 for value in network.parameters()]
    torch.testing.assert_close(load(content).network.all_modules[0].W, network.all_modules[0].W + 1)


def test_where_a_single_number_says_where_attention_is():
    network = filled(NCSNpp(SHAPES["attention"]))
    data = {"image_size": 64}
    assert load(written(network), {"attn_resolutions": [64, 32], **data}).contract.channels == "complex"
    with pytest.raises(PriorError, match="attn_resolutions"):
        load(written(network), {"attn_resolutions": [32], **data})


def test_values_of_centred_images():
    for channels, span in ((1, (-1, 1)), (2, (0, 1)), (3, (-1, 1))):
        network = filled(NCSNpp(replace(SMALL, channels=channels, centered=True)))
        contract = load(written(network), {"centered": True}).contract
        assert contract.value_range == span
        assert contract.sigma_max == pytest.approx(50 / (span[1] - span[0]))


def test_more_channels_are_slices():
    for channels, kind, slices in ((4, "complex", 2), (5, "real", 5)):
        contract = load(written(filled(NCSNpp(replace(SMALL, channels=channels))))).contract
        assert (contract.channels, contract.slices) == (kind, slices)


# What is refused


def changed(change):
    content = written(filled(NCSNpp(SMALL)))
    change(content)
    return content


BAD_FILES = {
    "wrong shape in the averages": (lambda c: c["ema"]["shadow_params"].reverse(), "entry 0"),
    "too few averages": (lambda c: c["ema"]["shadow_params"].pop(), "shadow_params' holds"),
    "averages that are none": (lambda c: c["ema"].update(shadow_params=None), "ema=False"),
    "no averages": (lambda c: c.update(ema=None), "ema=False"),
    "a number in the averages": (lambda c: c["ema"]["shadow_params"].insert(0, 3), "no tensor"),
    "wrong shape": (
        lambda c: c["model"].update({"module.all_modules.4.Conv_1.weight": torch.ones(8, 8, 5, 5)}),
        "all_modules.4.Conv_1.weight",
    ),
    "missing": (lambda c: c["model"].pop("module.all_modules.4.Conv_1.bias"), "all_modules.4.Conv_1.bias"),
    "unexpected": (lambda c: c["model"].update({"module.all_modules.4.x": torch.ones(1)}), "all_modules.4.x"),
    "unexpected beside": (lambda c: c["model"].update({"module.head": torch.ones(1)}), "'head'"),
    "no levels": (lambda c: c["model"].pop("module.sigmas"), "sigmas"),
    "levels not positive": (lambda c: c["model"]["module.sigmas"].neg_(), "sigmas"),
    "levels not numbers": (lambda c: c["model"]["module.sigmas"].fill_(math.nan), "sigmas"),
    "one level": (lambda c: c["model"]["module.sigmas"].fill_(1), "one noise level"),
    "text among the weights": (lambda c: c["model"].update({"module.all_modules.0.W": "x"}), "W"),
    "a layer left out": (
        lambda c: [c["model"].pop(k) for k in list(c["model"]) if ".all_modules.3." in k],
        "first convolution",
    ),
    "numbers far apart": (
        lambda c: c["model"].update({"module.all_modules.99999.weight": torch.ones(1)}),
        "gaps",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name):
    change, words = BAD_FILES[name]
    with pytest.raises(PriorError, match=words):
        load(changed(change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"nf": 16}, "nf = 16"),
        ({"model": {"num_res_blocks": 2}}, "num_res_blocks"),
        ({"constructor": {"model": {"ch_mult": [1, 1]}}}, "ch_mult"),
        ({"model": {"progressive_input": "none"}}, "progressive_input"),
        ({"fir": False}, "fir = False"),
        ({"sigma_max": 378}, "sigma_max"),
        ({"model": {"name": "ddpm"}}, "ddpm"),
        ({"normalization": "InstanceNorm++"}, "normalization"),
        ({"continuous": False}, "continuous"),
        ({"sde": "edm"}, "sde"),
        ({"sde": 3}, "sde"),
        ({"skip_rescale": "yes"}, "skip_rescale"),
        ({"nonlinearity": "gelu"}, "nonlinearity"),
        ({"fir_kernel": []}, "fir_kernel"),
        ({"depth": 3}, "depth"),
        ({"model": {"nf": 8, "beta_min": 1}, "data": {"nf": 9}}, "nf"),
        ({"constructor": 3}, "constructor"),
        ([], "dictionary"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, words):
    with pytest.raises(PriorError, match=words):
        load(written(filled(NCSNpp(SMALL))), config or [1])


def test_what_cannot_be_told_is_asked_for_by_name():
    def read(config, **changes):
        return load(written(filled(NCSNpp(replace(SMALL, **changes)))), config)

    with pytest.raises(PriorError, match="'fir'"):
        read({}, progressive_input="none")
    assert read({"fir": False}, progressive_input="none", fir=False).network.settings.fir is False
    with pytest.raises(PriorError, match="'sde'"):
        read({}, embedding_type="positional")
    with pytest.raises(PriorError, match="'continuous'"):
        load(written(filled(NCSNpp(POSITIONAL))), {"sde": "vpsde"})


@pytest.mark.parametrize(
    "change",
    [
        {"nf": 2},
        {"nf": 14},  # three groups
        {"nf": True},
        {"ch_mult": ()},
        {"ch_mult": (1, 1.5)},
        {"attention_levels": (2,)},
        {"fir_kernel": (1.0,)},
        {"fir_kernel": (1.0, -1.0)},
        {"fir": 1},
        {"progressive": ["none"]},
        {"num_res_blocks": 10**9},
    ],
)
def test_impossible_settings(change):
    with pytest.raises(PriorError):
        NCSNpp(replace(SMALL, **change))


@pytest.mark.parametrize("content", [None, 3, "x", [], {}, {"model": 3}, {3: 4}, {"net": {}}])
def test_other_content_is_not_recognised(content):
    assert not FAMILY.recognises(content)


@pytest.mark.parametrize("settings", [{}, {"network": 3}, {"network": {"nf": 3}}, {"process": {}}])
def test_damaged_settings(settings):
    for use in (FAMILY.network, FAMILY.contract):
        with pytest.raises(PriorError):
            use(settings)


# Priors


class Gaussian(nn.Module):
    """What the best network would return for images of independent pixels of variance ``variance``."""

    sigmas: torch.Tensor

    def __init__(self, kind, sigmas, variance):
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.kind, self.variance, self.labels = kind, variance, None

    def signal_and_noise(self, label):
        """Scale of the image and standard deviation of the noise at a label, as the papers define them."""
        if self.kind == "vpsde in steps":
            bar = np.cumprod(1 - np.linspace(0.1 / 1000, 20 / 1000, 1000))[label.numpy()]
            return np.sqrt(bar), np.sqrt(1 - bar)
        t = label.numpy().astype(np.float64) / 999
        alpha = np.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
        return alpha, 1 - alpha**2 if self.kind == "subvpsde" else np.sqrt(1 - alpha**2)

    def forward(self, x, label):
        self.labels = label
        if self.kind.startswith("vesde"):
            sigma = label if self.kind == "vesde" else self.sigmas[label].float()
            return -x / (self.variance + sigma[:, None, None, None] ** 2)
        alpha, noise = (
            torch.from_numpy(v)[:, None, None, None].float() for v in self.signal_and_noise(label)
        )
        return noise * x / (alpha**2 * self.variance + noise**2)


KINDS: dict[str, dict[str, object]] = {
    "vesde": {},
    "vesde in steps": {"sde": "vesde"},
    "vpsde": {"sde": "vpsde", "continuous": True},
    "vpsde in steps": {"sde": "vpsde", "continuous": False},
    "subvpsde": {"sde": "subvpsde"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_denoiser_of_gaussian_images(kind):
    # Posterior mean variance / (variance + sigma^2) x, whatever the process is.
    shape = SMALL if kind == "vesde" else POSITIONAL
    network = filled(NCSNpp(shape))
    prior = load(written(network), {"centered": False, **KINDS[kind]})
    prior.network = Gaussian(kind, network.sigmas, 0.3)
    sigma = torch.tensor([0.02, 0.3, 1.0, 7.0])
    x = image(4, 1, 4, 4) * (0.3 + sigma[:, None, None, None] ** 2).sqrt()
    wide = sigma[:, None, None, None]
    out = prior.denoise_channels(x, sigma)
    torch.testing.assert_close(
        out, 0.3 / (0.3 + wide**2) * x, rtol=0, atol=2e-5 if "steps" not in kind else 0.02
    )
    if kind.endswith("steps"):
        alpha, noise = prior.network.signal_and_noise(torch.arange(1000))
        table = network.sigmas.numpy() if kind.startswith("vesde") else noise / alpha
        nearest = np.abs(np.log(table)[:, None] - np.log(sigma.numpy())).argmin(axis=0)
        assert prior.network.labels.tolist() == nearest.tolist()
    elif kind != "vesde":
        alpha, noise = prior.network.signal_and_noise(prior.network.labels)
        np.testing.assert_allclose(noise / alpha, sigma, rtol=1e-3)


def test_gradients_reach_the_image():
    prior = load(written(filled(NCSNpp(SHAPES["attention"]))), {})
    x = image(1, 2, 4, 4).requires_grad_()
    direction, sigma = image(1, 2, 4, 4, seed=1), torch.tensor([0.5])
    (gradient,) = torch.autograd.grad(prior.denoise_channels(x, sigma).square().sum(), x)
    step = 1e-3 * direction
    with torch.no_grad():
        ahead, behind = (prior.denoise_channels(x + s * step, sigma).double().square().sum() for s in (1, -1))
    torch.testing.assert_close(
        (gradient * direction).sum().item(), (ahead - behind).item() / 2e-3, rtol=1e-2, atol=1e-2
    )


def test_after_inference_mode_gradients_still_flow():
    prior = load(written(filled(NCSNpp(replace(SMALL, fir_kernel=(1.0, 7.0))))), {"fir_kernel": [1, 7]})
    with torch.inference_mode():
        prior.denoise(image(4, 4), 0.5)
    x = image(4, 4).requires_grad_()
    prior.denoise(x, 0.5).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (8, 8)])
def test_any_size(size):
    prior = load(written(filled(NCSNpp(SHAPES["four resolutions"]))), {"fir": True})
    x = image(2, 1, *size)
    out = prior.denoise_channels(x, torch.tensor([0.1, 2.0]))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_bf16_runs_the_network_only():
    prior = load(written(filled(NCSNpp(SHAPES["attention"]))), {})
    x, sigma = image(2, 2, 8, 8), torch.tensor([0.01, 2.0])
    exact = prior.denoise_channels(x, sigma)
    prior.precision = "bf16"
    rough = prior.denoise_channels(x, sigma)
    assert rough.dtype == torch.float32
    error = (rough - exact).abs().amax((1, 2, 3)) / sigma  # that of the noise estimate, whose scale is 1
    assert 1e-4 < error.max() < 0.2
    with pytest.raises(PriorError, match="precision"):
        prior.precision = "fp16"


# Recorded outputs of the original code


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
@pytest.mark.parametrize("name", ["scoremri_ncsnpp", "scoremri_ncsnpp_attn"])
def test_parity_of_the_network(name):
    folder = Path(PARITY) / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = load(torch.load(folder / "checkpoint.pt", weights_only=True), config).network
    plain = NCSNpp(replace(network.settings, scale_by_sigma=False)).eval().requires_grad_(False)
    plain.load_state_dict(network.state_dict())
    recorded = load_file(folder / "io.safetensors")
    for case in config["cases"]:
        values = {key: recorded[f"{case['id']}.{key}"] for key in ("x", "sigma", "score", "raw")}
        for use, expected in ((network, values["score"]), (plain, values["raw"])):
            error = (use(values["x"], values["sigma"]) - expected).abs().amax((1, 2, 3))
            assert (error / expected.abs().amax((1, 2, 3))).max() < 3e-5


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
def test_the_recorded_keys_of_the_published_network():
    recorded = json.loads((Path(PARITY) / "scoremri_ncsnpp" / "full_keys.json").read_text(encoding="utf-8"))
    for entry in recorded.values():
        lines = [
            f"{key.removeprefix('module.')} {tuple(size)} {kind}" for key, size, kind, _ in entry["entries"]
        ]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
