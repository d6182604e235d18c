"""The check of a prior: right ones pass, and each mistaken convention is named."""

import math
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest
import torch
from torch import nn

from priors import (
    EDM,
    VE,
    VP,
    Contract,
    DenoisingUNet,
    DiscreteVP,
    Flow,
    FunctionPrior,
    GaussianPrior,
    NetworkPrior,
    NetworkSettings,
    PriorError,
    ScorePrior,
    check_prior,
)
from priors.check import synthetic_image
from priors.level import image_level
from priors.parameterisation import denoised_weights

SHAPE = (16, 16)


@cache
def knowledge(channels="complex"):
    """A prior whose images are like a body with gentle variations, and one of its images."""
    contract = Contract(channels=channels)
    mean = synthetic_image(contract, SHAPE[0])
    frequency = torch.fft.fftfreq(SHAPE[0])
    radius = torch.hypot(frequency[:, None], frequency)
    spectrum = 0.02 / (1 + (8 * radius) ** 4)
    prior = GaussianPrior(mean, spectrum=spectrum)
    return prior, prior.sample(1, torch.Generator().manual_seed(1))[0]


def network(known, process, output, sign=1.0, twist=lambda sigma: sigma):
    """A perfect network of a process with that output; ``twist`` says how it misunderstands the time."""

    def function(scaled, time):
        sigma = twist(process.sigma(time)).to(torch.float64)
        x = process.from_network(scaled.double(), sigma)
        weights = denoised_weights(output, process, sigma)
        p, q = (weight[:, None, None, None] for weight in weights)
        return (sign * (known.denoise_channels(x, sigma) - p * x) / q).to(scaled.dtype)

    return function


PROCESSES = {"vp": VP(), "discrete": DiscreteVP.linear(), "ve": VE(), "edm": EDM(0.3), "flow": Flow()}
LEVELS = {"sigma_min": 0.011, "sigma_max": 20.0}
OUTPUTS = ("x0", "eps", "v", "score")


@pytest.mark.parametrize("channels", ["complex", "real"])
@pytest.mark.parametrize("process", PROCESSES)
def test_right_conventions_pass(process, channels):
    known, image = knowledge(channels)
    contract = replace(known.contract, **LEVELS)
    function = network(known, PROCESSES[process], "v")
    prior = FunctionPrior(function, contract, predicts="v", process=PROCESSES[process])
    result = check_prior(prior, image)
    assert result.passed, str(result)
    assert result.findings == result.suggestions == ()
    assert str(result).startswith("passed")


def test_the_table_holds_what_it_says():
    variance, size = 0.04, (6, 6)
    prior = GaussianPrior(torch.zeros(size), variance=variance, sigma_min=0.1, sigma_max=10.0)
    image = torch.full(size, 0.2)
    result = check_prior(prior, image, seed=3)
    noise = torch.randn((2, *size), generator=torch.Generator().manual_seed(3))[0]
    assert [row[0] for row in result.table] == pytest.approx([0.1 * 10 ** (k / 3) for k in range(7)])
    for sigma, left, change in result.table:
        gain = variance / (variance + sigma**2)
        assert left == pytest.approx(gain * float(noise.square().mean().sqrt()), rel=1e-5)
        assert change == pytest.approx((1 - gain) * 0.2, rel=1e-4)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize(("truth", "taken"), list(permutations(OUTPUTS, 2)))
def test_an_output_taken_for_another(process, truth, taken):
    known, image = knowledge()
    function = network(known, PROCESSES[process], truth)
    contract = replace(known.contract, **LEVELS)
    prior = FunctionPrior(function, contract, predicts=taken, process=PROCESSES[process])
    result = check_prior(prior, image)
    assert not result.passed
    assert result.findings
    assert f"({taken})" in result.suggestions[0]
    assert f"({truth})" in result.suggestions[0], str(result)
    # What it suggests is right.
    assert check_prior(FunctionPrior(function, contract, predicts=truth, process=prior.process), image).passed


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_wrong_sign(output):
    known, image = knowledge()
    function = network(known, VP(), output, sign=-1.0)
    prior = FunctionPrior(function, replace(known.contract, **LEVELS), predicts=output, process=VP())
    result = check_prior(prior, image)
    assert not result.passed
    assert any("were minus" in sentence and f"({output})." in sentence for sentence in result.suggestions)


class Wrapped(ScorePrior):
    """A prior of which nothing is known but its denoiser."""

    def __init__(self, known, change):
        super().__init__(replace(known.contract, **LEVELS))
        self.known, self.change = known, change

    def denoise_channels(self, x, sigma):
        s = sigma[:, None, None, None]
        eps = (x - self.known.denoise_channels(x, sigma)) / s
        return self.change(x, s, eps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, s, eps: x + s * eps, r"sign of the network's output, the noise, were reversed"),
        (lambda x, s, eps: x + s**2 * eps, r"were the noise (eps) where the score (score) was assumed"),
        (lambda x, s, eps: x + eps, r"were the score (score) where the noise (eps) was assumed"),
        (lambda x, s, eps: eps, r"were the noise (eps) where the clean image (x0) was assumed"),
    ],
)
def test_conventions_of_a_denoiser_of_which_nothing_is_known(change, words):
    known, image = knowledge()
    result = check_prior(Wrapped(known, change), image)
    assert not result.passed
    assert any(words in sentence for sentence in result.suggestions), str(result)


def in_range(known, low, high):
    """The network of a prior that was trained on images ``low + (high - low) x``."""

    def function(x, sigma):
        images = (x.mean(1, keepdim=True) - low) / (high - low)
        return (low + (high - low) * known.denoise_channels(images, sigma / (high - low))).expand_as(x)

    return function


@pytest.mark.parametrize("channels", ["real", "rgb"])
@pytest.mark.parametrize(("truth", "declared"), [((-1.0, 1.0), (0.0, 1.0)), ((0.0, 1.0), (-1.0, 1.0))])
def test_a_wrong_value_range(truth, declared, channels):
    known, image = knowledge("real")
    function = in_range(known, *truth)
    contract = replace(known.contract, channels=channels, value_range=declared)
    result = check_prior(FunctionPrior(function, contract, predicts="D"), image)
    assert not result.passed
    assert f"value_range={truth}, not {declared}" in result.suggestions[0], str(result)
    contract = replace(contract, value_range=truth)
    assert check_prior(FunctionPrior(function, contract, predicts="D"), image).passed


def test_time_that_runs_the_other_way():
    known, image = knowledge()
    process = DiscreteVP.linear()
    forward = network(known, process, "eps")
    contract = replace(known.contract, **LEVELS)
    prior = FunctionPrior(lambda x, t: forward(x, 999 - t), contract, predicts="eps", process=process)
    result = check_prior(prior, image)
    assert not result.passed
    assert any("index T - 1 - t" in sentence for sentence in result.suggestions), str(result)
    # A flow whose image is at the other end; its velocity then has the other sign too.
    prior = FunctionPrior(network(known, Flow(data_at=1), "v"), contract, predicts="v", process=Flow())
    result = check_prior(prior, image)
    assert not result.passed
    assert "Flow(data_at=1)" in result.suggestions[0], str(result)


@pytest.mark.parametrize(("name", "factor"), [("1000", 1000.0), ("1/255", 1 / 255)])
def test_a_noise_level_in_other_units(name, factor):
    known, image = knowledge()
    function = network(known, VE(), "D", twist=lambda sigma: sigma / factor)
    prior = FunctionPrior(function, replace(known.contract, **LEVELS), predicts="D")
    result = check_prior(prior, image)
    assert not result.passed
    assert any(f"told {name} times the noise level" in sentence for sentence in result.suggestions), str(
        result
    )


def test_a_time_told_in_other_words():
    known, image = knowledge()
    function = network(known, VE(), "D", twist=torch.exp)
    prior = FunctionPrior(function, replace(known.contract, **LEVELS), predicts="D")
    result = check_prior(prior, image)
    assert not result.passed
    assert any("pass_time='log_sigma'" in sentence for sentence in result.suggestions), str(result)


def test_stacks_of_slices():
    class Stack(ScorePrior):
        def denoise_channels(self, x, sigma):
            s = sigma[:, None, None, None]
            return 0.04 / (0.04 + s**2) * x

    contract = Contract(slices=3)
    assert synthetic_image(contract).shape == (3, 64, 64)
    result = check_prior(Stack(contract))
    assert result.passed, str(result)


def test_random_weights_fail_and_nothing_explains_them():
    torch.manual_seed(0)
    prior = NetworkPrior(DenoisingUNet(NetworkSettings(widths=(8, 8), embedding=8)), Contract())
    for weight in prior.parameters():
        nn.init.normal_(weight, std=0.3)
    result = check_prior(prior, knowledge()[1])
    assert not result.passed
    assert result.findings
    (suggestion,) = result.suggestions
    assert "averaged (EMA) weights" in suggestion


def test_shrinking_by_the_wrong_size_is_no_knowledge_of_images():
    # What the preconditioning of EDM does around a network that contributes nothing.
    def prior(sigma_data):
        edm = EDM(sigma_data)
        return FunctionPrior(lambda x, t: torch.zeros_like(x), Contract(), predicts="v", process=edm)

    image = knowledge()[1]
    result = check_prior(prior(0.5), image)
    assert not result.passed
    assert "knows nothing of images" in result.findings[0]
    assert check_prior(prior(float(image.abs().square().mean().sqrt()) / 2**0.5), image).passed


@pytest.mark.parametrize("output", [math.nan, 0.0])
def test_useless_outputs(output):
    prior = FunctionPrior(lambda x, t: torch.full_like(x, output), Contract("real"), predicts="D")
    result = check_prior(prior)
    assert not result.passed
    assert len(result.table) == 7
    if math.isnan(output):
        assert "not finite" in result.findings[0]
    else:
        assert "clean image does not stay" in result.findings[0]


def test_a_denoiser_that_does_nothing_fails():
    assert not check_prior(FunctionPrior(lambda x, t: x, Contract("real"), predicts="D")).passed


@pytest.mark.parametrize("contract", [Contract(), Contract("real"), Contract("real", level=2.0)])
def test_the_synthetic_image_has_the_level_of_the_contract(contract):
    image = synthetic_image(contract)
    assert image.is_complex() == contract.complex_images
    assert float(image_level(image)) == pytest.approx(contract.level, rel=1e-5)


def test_the_synthetic_image_in_physical_units():
    water, material = (synthetic_image(Contract("real", unit=unit)) for unit in ("water", "object"))
    assert 0 <= float(water.min()) < 0.01
    assert 1.2 < float(water.max()) < 1.6
    assert float(material.min()) >= 0
    assert 0.99 < float(material.max()) <= 1
    assert synthetic_image(Contract("real", size_multiple=48)).shape == (96, 96)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 4, 4), r"one image \(H, W\), got shape \(2, 4, 4\)"),
        (torch.full((4, 4), math.nan), "not finite"),
    ],
)
def test_images_that_are_none(image, message):
    with pytest.raises(PriorError, match=message):
        check_prior(FunctionPrior(lambda x, t: x, Contract("real"), predicts="D"), image)
