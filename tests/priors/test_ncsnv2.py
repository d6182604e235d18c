"""NCSNv2 and its checkpoints: parts against formulas, published shapes, round trips, refusals."""

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
from scipy.ndimage import maximum_filter
from scipy.signal import correlate2d
from torch import nn

from priors import PriorError
from priors.checkpoints.ncsnv2 import FAMILY
from priors.networks.ncsnv2 import (
    ChainedPooling,
    Fusion,
    InstanceNormPlus,
    MeanPoolConv,
    NCSNv2,
    NCSNv2Settings,
    ResidualBlock,
    ResidualConvUnits,
)

PARITY = os.environ.get("RECON_PARITY", "")
PUBLISHED = "d4dfad82601a6fd59e00965ec3e78a2f6b2432261380efd7e7c6c92549f7aeac"
"""SHA-256 of the keys, shapes and types of csgm-mri-langevin's network, as its own code lists them."""

SMALL = NCSNv2Settings(channels=2, ngf=4, depth="NCSNv2", num_classes=20)
SHAPES = {
    "small": SMALL,
    "deeper": replace(SMALL, depth="NCSNv2Deeper", ngf=5, channels=1),
    "deepest": replace(SMALL, depth="NCSNv2Deepest", ngf=3, channels=3, num_classes=7),
    "other": replace(SMALL, nonlinearity="swish", centered=True, channels=1, ngf=7),
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
            norm = name.endswith(("alpha", "gamma"))
            value.copy_(noise / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.2 * noise + norm)
        network.sigmas.copy_(torch.logspace(1.5, -2, len(network.sigmas)))
    return network.eval()


def written(network, averaged=None):
    """The original's file: a list, the averages by name and without the levels."""
    averages = {key: value.detach().clone() for key, value in (averaged or network).named_parameters()}
    model = {f"module.{key}": value.clone() for key, value in network.state_dict().items()}
    return [model, {"state": {}}, 3, 400, averages]


def load(content, config=None, *, ema=True):
    assert FAMILY.recognises(content)
    recipe = FAMILY.read(content, config or {}, ema=ema)
    settings = json.loads(json.dumps(recipe.settings))
    network = FAMILY.network(settings)
    network.load_state_dict(recipe.weights, strict=True)
    return FAMILY.prior(network, settings, FAMILY.contract(settings)).eval().requires_grad_(False)


def convolved(x, conv):
    """A 3x3 convolution with zeros outside, by scipy, of one image ``(C, H, W)``."""
    weight = conv.weight.detach().numpy()
    planes = [sum(correlate2d(x[k], w[k], "same") for k in range(len(x))) for w in weight]
    bias = 0 if conv.bias is None else conv.bias.detach().numpy()[:, None, None]
    return np.stack(planes) + bias


# Parts


def test_instance_norm_plus():
    layer = InstanceNormPlus(5).double()
    for number, value in enumerate(layer.parameters()):
        nn.init.normal_(value, mean=number, generator=generator(number))
    x = 3 * image(2, 5, 4, 6, dtype=torch.float64) + image(2, 5, 1, 1, seed=1, dtype=torch.float64)
    alpha, gamma, beta = (p.detach().numpy()[:, None, None] for p in (layer.alpha, layer.gamma, layer.beta))
    for item, out in zip(x.numpy(), layer(x).detach().numpy(), strict=True):
        mu = item.mean((1, 2), keepdims=True)
        standard = (item - mu) / np.sqrt(item.var((1, 2), keepdims=True) + 1e-5)
        lift = (mu - mu.mean()) / np.sqrt(mu.var(ddof=1) + 1e-5)
        # The means are kept in single precision, as under autocast they must be.
        np.testing.assert_allclose(out, gamma * (standard + alpha * lift) + beta, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_mean_pool_drops_the_last_row_and_column_of_odd_sizes(size):
    layer, x = MeanPoolConv(2, 3, 3), image(1, 2, *size)
    full = convolved(x[0].numpy(), layer.conv)[:, : size[0] // 2 * 2, : size[1] // 2 * 2]
    expected = full.reshape(3, size[0] // 2, 2, size[1] // 2, 2).mean((2, 4))
    np.testing.assert_allclose(layer(x)[0].detach(), expected, atol=1e-6)


def test_residual_units_and_chained_pooling():
    units, x = ResidualConvUnits(3, 2, torch.tanh), image(1, 3, 6, 7)
    expected = x[0].numpy()
    for first, second in (("1_1_conv", "1_2_conv"), ("2_1_conv", "2_2_conv")):
        h = convolved(np.tanh(expected), units.get_submodule(first))
        expected = expected + convolved(np.tanh(h), units.get_submodule(second))
    np.testing.assert_allclose(units(x)[0].detach(), expected, atol=1e-5)
    pooling = ChainedPooling(3, torch.tanh)
    path = expected = np.tanh(x[0].numpy())
    for conv in pooling.convs:
        path = maximum_filter(path, (1, 5, 5), mode="constant", cval=-np.inf)
        path = convolved(path, conv)
        expected = expected + path
    np.testing.assert_allclose(pooling(x)[0].detach(), expected, atol=1e-5)


def test_fusion_brings_ramps_from_corner_to_corner():
    # Interpolation that keeps the corners takes a ramp to a ramp.
    fusion = Fusion([1, 1], 1)
    for value in fusion.parameters():
        if value.ndim == 4:
            nn.init.dirac_(value)
        else:
            nn.init.zeros_(value)
    fine = image(1, 1, 7, 10)
    ramp = torch.linspace(0, 1, 4)[:, None] + torch.linspace(0, 3, 5)[None, :]
    expected = torch.linspace(0, 1, 7)[:, None] + torch.linspace(0, 3, 10)[None, :]
    torch.testing.assert_close(fusion([fine, ramp[None, None]], (7, 10)), fine + expected)


def test_dilated_blocks_reach_as_far_as_said():
    # Two convolutions of dilation d move what a pixel says by up to 2d; the normalisation is taken out.
    for down, dilation, reach in ((True, 2, 4), (False, 4, 8), (False, None, 2)):
        block = ResidualBlock(2, 2, lambda x: x, down, dilation)
        block.add_module("normalize1", nn.Identity())
        block.add_module("normalize2", nn.Identity())
        x = torch.zeros(1, 2, 21, 21, requires_grad=True)
        (gradient,) = torch.autograd.grad(block(x)[0, 0, 10, 10], x)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (int(rows.min()), int(rows.max())) == (10 - reach, 10 + reach)


# The whole network


def test_the_published_network_of_csgm_mri_langevin():
    with torch.device("meta"):
        network = NCSNv2(NCSNv2Settings(channels=2, ngf=128))
    values = network.state_dict().items()
    lines = [f"{key} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for key, value in values]
    assert len(lines) == 230
    assert sum(value.numel() for value in network.parameters()) == 94_130_306
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_counts(name):
    network = filled(NCSNv2(SHAPES[name]))
    x = image(2, network.settings.channels, 21, 18)
    out = network(x, torch.tensor([1, 5]))
    assert out.shape == x.shape
    out.square().sum().backward()
    for key, value in network.named_parameters():
        assert value.grad is not None, key
        assert value.grad.abs().max() > 0, key


def test_the_level_divides_the_output_and_the_input_is_centred():
    network = filled(NCSNv2(SMALL))
    other = NCSNv2(replace(SMALL, centered=True))
    other.load_state_dict(network.state_dict())
    x, index = image(2, 2, 8, 9), torch.tensor([0, 19])
    with torch.no_grad():
        expected = other.raw(2 * x - 1) / network.sigmas[index][:, None, None, None]
        torch.testing.assert_close(network(x, index), expected)


# Checkpoints and priors


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name):
    shape = SHAPES[name]
    last, averaged = filled(NCSNv2(shape)), filled(NCSNv2(shape), seed=1)
    content = written(last, averaged)
    config = {
        "constructor": {"model": {"nonlinearity": shape.nonlinearity}, "data": {"rescaled": shape.centered}}
    }
    x, index = image(2, shape.channels, 17, 20), torch.tensor([2, 6])
    sigma = last.sigmas[index]
    for ema, network in ((True, averaged), (False, last)):
        prior = load(content, config, ema=ema)
        assert prior.contract.num_channels == shape.channels
        low, high = prior.contract.value_range
        assert (low, high) == ((-1, 1) if shape.centered else (0, 1))
        assert prior.contract.sigma_min * (high - low) == pytest.approx(0.01)
        assert prior.contract.sigma_max * (high - low) == pytest.approx(10**1.5)
        assert prior.network.settings == shape
        with torch.no_grad():
            expected = x + sigma[:, None, None, None] ** 2 * network(x, index)
        torch.testing.assert_close(prior.denoise_channels(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_other_holders_of_the_weights():
    network, averaged = filled(NCSNv2(SMALL)), filled(NCSNv2(SMALL), seed=1)
    model, _, _, _, averages = written(network, averaged)
    plain = dict(network.state_dict())
    for content, expected in (
        ([model, {}, 3, 4], network),
        (model, network),
        (plain, network),
        ({"model": model}, network),
        ({"model": model, "ema": averages}, averaged),
        ([model, {}, 3, 4, {f"module.{k}": v for k, v in averaged.state_dict().items()}], averaged),
    ):
        assert torch.equal(load(content).network.begin_conv.weight, expected.begin_conv.weight)


def changed(change):
    content = written(filled(NCSNv2(SMALL)))
    change(content)
    return content


BAD_FILES = {
    "wrong shape": (lambda c: c[0].update({"module.res2.0.conv1.bias": torch.ones(3)}), "res2.0.conv1.bias"),
    "missing": (lambda c: c[0].pop("module.res2.0.conv1.bias"), "res2.0.conv1.bias"),
    "unexpected": (lambda c: c[0].update({"module.res9.weight": torch.ones(3)}), "res9.weight"),
    "wrong shape in the averages": (lambda c: c[4].update({"end_conv.bias": torch.ones(3)}), "ema=False"),
    "missing in the averages": (lambda c: c[4].pop("end_conv.bias"), "ema=False"),
    "averages that are none": (lambda c: c.__setitem__(4, [3]), "ema"),
    "no levels": (lambda c: c[0].pop("module.sigmas"), "sigmas"),
    "levels not positive": (lambda c: c[0]["module.sigmas"].neg_(), "sigmas"),
    "levels not numbers": (lambda c: c[0]["module.sigmas"].fill_(math.nan), "sigmas"),
    "one level": (lambda c: c[0]["module.sigmas"].fill_(1), "one noise level"),
    "text": (lambda c: c[0].update({"module.end_conv.bias": "x"}), "end_conv.bias"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name):
    change, words = BAD_FILES[name]
    with pytest.raises(PriorError, match=words):
        load(changed(change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"ngf": 8}, "ngf = 8"),
        ({"model": {"num_classes": 10}}, "num_classes"),
        ({"data": {"channels": 1}}, "channels"),
        ({"sigma_begin": 232}, "sigma_begin"),
        ({"model": {"normalization": "InstanceNorm"}}, "InstanceNorm"),
        ({"model": {"spec_norm": True}}, "spec_norm"),
        ({"data": {"logit_transform": True}}, "logit_transform"),
        ({"rescaled": 1}, "rescaled"),
        ({"nonlinearity": "gelu"}, "nonlinearity"),
        ({"nonlinearity": 3}, "nonlinearity"),
        ({"depth": 3}, "depth"),
        ([1], "dictionary"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, words):
    with pytest.raises(PriorError, match=words):
        load(written(filled(NCSNv2(SMALL))), config)


@pytest.mark.parametrize(
    "change", [{"ngf": 1}, {"ngf": 2.0}, {"depth": "NCSN"}, {"depth": []}, {"centered": 0}, {"channels": 0}]
)
def test_impossible_settings(change):
    with pytest.raises(PriorError):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    "content", [None, 3, "x", [], [1, 2, 3, 4], [{}, {}, 1, 2, {}], {}, {"model": 3}, {3: 4}]
)
def test_other_content_is_not_recognised(content):
    assert not FAMILY.recognises(content)


@pytest.mark.parametrize("settings", [{}, {"network": 3}, {"network": {"ngf": 3}}])
def test_damaged_settings(settings):
    for use in (FAMILY.network, FAMILY.contract):
        with pytest.raises(PriorError):
            use(settings)


class Noise(nn.Module):
    """Knows the clean image and returns minus the noise at variance 1, without being told the level."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean

    def raw(self, x):
        difference = x - self.clean
        return -difference / difference.square().mean((1, 2, 3), keepdim=True).sqrt()


def test_between_the_levels():
    clean, noise = image(3, 2, 8, 8), image(3, 2, 8, 8, seed=1)
    noise /= noise.square().mean((1, 2, 3), keepdim=True).sqrt()
    prior, sigma = load(written(filled(NCSNv2(SMALL)))), torch.tensor([0.0123, 0.77, 29.0])
    prior.network = Noise(clean)
    out = prior.denoise_channels(clean + sigma[:, None, None, None] * noise, sigma)
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 40), (1, 1), (16, 17)])
def test_small_and_odd_images(size):
    prior = load(written(filled(NCSNv2(SHAPES["deepest"]))))
    x = image(2, 3, *size)
    out = prior.denoise_channels(x, torch.tensor([0.1, 2.0]))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_gradients_and_precision():
    prior = load(written(filled(NCSNv2(SMALL))))
    x, sigma = image(1, 2, 8, 8).requires_grad_(), torch.tensor([0.5])
    exact = prior.denoise_channels(x, sigma)
    (gradient,) = torch.autograd.grad(exact.square().sum(), x)
    step = 1e-3 * image(1, 2, 8, 8, seed=1)
    with torch.no_grad():
        ahead, behind = (prior.denoise_channels(x + s * step, sigma).double().square().sum() for s in (1, -1))
    expected = (ahead - behind).item() / 2
    assert (gradient * step).sum().item() == pytest.approx(expected, rel=2e-2, abs=1e-4)
    prior.precision = "bf16"
    error = (prior.denoise_channels(x, sigma) - exact).abs().max() / sigma
    assert 1e-4 < error < 0.2


# Recorded outputs of the original code


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
def test_parity_of_the_network():
    folder = Path(PARITY) / "csgm_ncsnv2"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = load(torch.load(folder / "checkpoint.pt", weights_only=True), config).network
    recorded = load_file(folder / "io.safetensors")
    for case in config["cases"]:
        values = {key: recorded[f"{case['id']}.{key}"] for key in ("x", "y", "score", "raw")}
        for result, expected in (
            (network(values["x"], values["y"]), values["score"]),
            (network.raw(values["x"]), values["raw"]),
        ):
            error = (result - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
            assert error.max() < 3e-5


@pytest.mark.skipif(not PARITY, reason="RECON_PARITY does not name the folder of recorded outputs")
def test_the_recorded_keys_of_the_published_network():
    recorded = json.loads((Path(PARITY) / "csgm_ncsnv2" / "full_keys.json").read_text(encoding="utf-8"))
    for entry in recorded.values():
        lines = [
            f"{key.removeprefix('module.')} {tuple(size)} {kind}" for key, size, kind, _ in entry["entries"]
        ]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
