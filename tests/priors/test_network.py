"""The denoising network: any size, its preconditioning, batches, precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, PriorError

SMALL = NetworkSettings(widths=(8, 16), embedding=8)


def make(settings=SMALL, precision="fp32", seed=0, **contract):
    """A prior whose weights, the head's too, are random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DenoisingUNet(settings)
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    channels = "complex" if settings.channels == 2 else "real"
    prior = NetworkPrior(network, Contract(channels=channels, **contract), precision)
    return prior.eval().requires_grad_(False)


def image(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


PRIORS = {
    "stem": make(),
    "no stem": make(NetworkSettings(widths=(8,), embedding=4, unshuffle=1)),
    "three levels": make(NetworkSettings(widths=(4, 8, 8), embedding=4, blocks=2)),
    "real": make(NetworkSettings(channels=1, widths=(8, 8), embedding=4)),
}


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(list(PRIORS)),
    batch=st.integers(1, 3),
    height=st.integers(1, 21),
    width=st.integers(1, 21),
)
def test_any_size(name, batch, height, width):
    x = image(batch, height, width)
    result = PRIORS[name].denoise(x, 0.3)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("shape", [(8, 12), (9, 7)])
def test_untrained_network_returns_the_preconditioned_input(shape):
    prior = NetworkPrior(DenoisingUNet(SMALL), Contract())
    x = image(2, *shape)
    for sigma in (0.01, 0.2, 5.0):
        skip = SMALL.sigma_data**2 / (sigma**2 + SMALL.sigma_data**2)
        torch.testing.assert_close(prior.denoise(x, sigma), skip * x)


def test_preconditioning():
    # What the raw network is given and what is made of its output (Karras et al. 2022, Table 1).
    prior = make()
    x, sigma, data = image(2, 8, 8), torch.tensor([0.1, 3.0]), SMALL.sigma_data
    seen = []
    prior.network.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    result = prior.denoise(x, sigma)
    ((scaled, label, raw),) = seen
    total = (sigma**2 + data**2)[:, None, None]
    torch.testing.assert_close(torch.complex(scaled[:, 0], scaled[:, 1]), x / total.sqrt())
    torch.testing.assert_close(label, sigma.log() / 4)
    scale = sigma[:, None, None] * data / total.sqrt()
    torch.testing.assert_close(result, data**2 / total * x + scale * torch.complex(raw[:, 0], raw[:, 1]))


@pytest.mark.parametrize("name", PRIORS)
def test_an_item_does_not_depend_on_its_batch(name):
    prior, x = PRIORS[name], image(3, 11, 14)
    sigmas = torch.tensor([0.02, 0.3, 4.0])
    together = prior.denoise(x, sigmas)
    for item, sigma, result in zip(x, sigmas, together, strict=True):
        torch.testing.assert_close(prior.denoise(item, float(sigma)), result, rtol=1e-5, atol=1e-5)
    # The noise level matters at all.
    assert float((prior.denoise(x, 0.3)[0] - together[0]).abs().max()) > 1e-3


def test_padding_continues_the_edge():
    # 9 x 7 is padded to 12 x 8 with copies of the last row and column.
    prior, x = make(), image(9, 7)
    rows, columns = torch.arange(12).clamp_max(8), torch.arange(8).clamp_max(6)
    torch.testing.assert_close(prior.denoise(x, 0.5), prior.denoise(x[rows][:, columns], 0.5)[:9, :7])


def test_translation_by_the_size_multiple():
    # Fully convolutional, no statistics over the image: far from the edges only the surroundings count.
    prior = make(NetworkSettings(widths=(8, 8), embedding=4))
    x = torch.zeros(96, 96, dtype=torch.complex64)
    x[40:48, 40:48] = image(8, 8)
    shift = prior.network.settings.size_multiple
    moved = prior.denoise(x.roll((shift, -2 * shift), (0, 1)), 0.2)
    expected = prior.denoise(x, 0.2).roll((shift, -2 * shift), (0, 1))
    torch.testing.assert_close(moved[32:64, 32:64], expected[32:64, 32:64])


def test_bf16_is_close_to_fp32():
    x = image(2, 16, 18)
    for sigma in (0.01, 0.2, 5.0):
        exact, rounded = (make(precision=precision).denoise(x, sigma) for precision in ("fp32", "bf16"))
        assert rounded.dtype == torch.complex64
        # Only the network's share is rounded: sigma times at most one.
        skip = SMALL.sigma_data**2 / (sigma**2 + SMALL.sigma_data**2) * x
        difference = float((rounded - exact).norm() / (exact - skip).norm())
        assert 0 < difference < 0.02


def test_double_precision_images_are_taken():
    prior, x = make(), image(9, 10)
    result = prior.denoise(x.to(torch.complex128), 0.3)
    assert result.dtype == torch.complex128
    torch.testing.assert_close(result.to(torch.complex64), prior.denoise(x, 0.3))


def test_real_prior_on_a_complex_image():
    prior, x = PRIORS["real"], image(2, 9, 10)
    expected = torch.complex(prior.denoise(x.real, 0.3), prior.denoise(x.imag, 0.3))
    torch.testing.assert_close(prior.denoise(x, 0.3), expected, rtol=1e-5, atol=1e-5)


def test_network_and_contract_must_agree():
    with pytest.raises(PriorError, match="the network has 2 channels, its contract 1"):
        NetworkPrior(DenoisingUNet(SMALL), Contract(channels="real"))


def test_channels_of_the_image():
    with pytest.raises(PriorError, match=r"prior 'own' takes \(B, 2, H, W\), got \(1, 3, 8, 8\)"):
        make(name="own").denoise_channels(torch.zeros(1, 3, 8, 8), torch.ones(1))


def test_unknown_precision():
    with pytest.raises(PriorError, match="precision is 'fp32' or 'bf16', not 'fp16'"):
        make(precision="fp16")


@pytest.mark.parametrize(
    "change",
    [{"widths": ()}, {"widths": (8, 0)}, {"blocks": 0}, {"unshuffle": 0}, {"embedding": 7}, {"embedding": 0}],
)
def test_impossible_network(change):
    with pytest.raises(PriorError, match="impossible network settings"):
        NetworkSettings(**change)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_impossible_preconditioning(value):
    with pytest.raises(PriorError, match="sigma_data must be positive"):
        NetworkSettings(sigma_data=value)


def test_settings_from_json():
    settings = NetworkSettings(widths=(4, 8), blocks=2)
    values = {**settings.as_dict(), "widths": [4, 8]}
    assert NetworkSettings.from_dict(values) == settings
    with pytest.raises(PriorError, match=r"network has unknown fields \['depth'\]"):
        NetworkSettings.from_dict({**values, "depth": 3})
    del values["sigma_data"]
    with pytest.raises(PriorError, match=r"network has missing fields \['sigma_data'\]"):
        NetworkSettings.from_dict(values)
