"""The contract, and what every prior inherits: shapes, precision, real priors on complex images."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import Contract, PriorError, ScorePrior


class Shrink(ScorePrior):
    """Denoiser of white images of variance one; remembers what it was asked."""

    def denoise_channels(self, x, sigma):
        self.asked = (x.shape, x.dtype, sigma)
        return x / (1 + sigma[:, None, None, None] ** 2)


def shrink(**contract):
    return Shrink(Contract(**contract))


def image(*shape, dtype=torch.complex64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


FLOATING = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


@settings(deadline=None, max_examples=25)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from(["complex", "real"]),
    dtype=st.sampled_from(COMPLEX + FLOATING),
    per_image=st.booleans(),
)
def test_any_leading_shape_and_precision(lead, size, channels, dtype, per_image):
    if channels == "complex" and dtype in FLOATING:
        dtype = torch.complex64
    prior, x = shrink(channels=channels), image(*lead, *size, dtype=dtype)
    sigma = torch.rand(lead, generator=torch.Generator().manual_seed(0)) + 0.5 if per_image else 0.7
    expected = x / (1 + torch.as_tensor(sigma, dtype=x.abs().dtype)[..., None, None] ** 2)
    result = prior.denoise(x, sigma)
    assert result.dtype == dtype
    assert result.shape == x.shape
    torch.testing.assert_close(result, expected)
    items = math.prod(lead) * (2 if channels == "real" and dtype in COMPLEX else 1)
    shape, inner, sigmas = prior.asked
    assert shape == (items, prior.contract.num_channels, *size)
    assert inner == x.abs().dtype
    assert sigmas.shape == (items,)


@pytest.mark.parametrize("channels", ["complex", "real"])
def test_real_and_imaginary_part_are_told_apart(channels):
    class Clip(ScorePrior):
        def denoise_channels(self, x, sigma):
            return x.clamp_min(0)

    x = torch.tensor([[1 - 2j, -3 + 4j]])
    assert torch.equal(Clip(Contract(channels=channels)).denoise(x, 1.0), torch.tensor([[1 + 0j, 0 + 4j]]))


def test_conjugated_and_strided_images():
    prior, x = shrink(), image(3, 4, 5)
    torch.testing.assert_close(prior.denoise(x.conj(), 1.0), x.conj() / 2)
    torch.testing.assert_close(prior.denoise(x.mT, 1.0), x.mT / 2)
    torch.testing.assert_close(shrink(channels="real").denoise(x.mH, 1.0), x.mH / 2)


@pytest.mark.parametrize(
    "sigma", [0.5, torch.tensor(0.5), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)]
)
def test_score_and_eps_follow_from_the_denoiser(sigma):
    prior, x = shrink(), image(3, 4, 5)
    s = torch.as_tensor(sigma, dtype=torch.float32)[..., None, None].expand(3, 1, 1)
    # White images of variance one, noisy: a Gaussian of variance 1 + sigma^2.
    assert prior.score(x, sigma).dtype == prior.eps(x, sigma).dtype == torch.complex64
    torch.testing.assert_close(prior.score(x, sigma), -x / (1 + s**2))
    torch.testing.assert_close(prior.eps(x, sigma), x * s / (1 + s**2))


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (torch.zeros(3), 1.0, r"images \(\.\.\., H, W\), got shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), 1.0, "floating-point images, got torch.int64"),
        (torch.zeros(3, 4), 1.0, "knows complex images; got a real one"),
        (image(3, 4), 0.0, "sigma must be positive"),
        (image(3, 4), -1.0, "sigma must be positive"),
        (image(3, 4), math.nan, "sigma must be positive"),
        (image(2, 3, 4), torch.ones(3), r"sigma of shape \(3,\) does not fit images of leading shape \(2,\)"),
        (image(3, 4), torch.ones(3), r"sigma of shape \(3,\) does not fit images of leading shape \(\)"),
    ],
)
def test_what_cannot_be_denoised(x, sigma, message):
    with pytest.raises(PriorError, match=message):
        shrink().denoise(x, sigma)


def test_a_prior_has_to_say_how_it_denoises():
    with pytest.raises(PriorError, match="ScorePrior does not define denoise_channels"):
        ScorePrior(Contract()).denoise(image(2, 2), 1.0)


def test_error_variance_without_a_table_is_that_of_a_gaussian():
    prior = shrink(level=2.0)  # variance 2 per real component
    assert prior.error_variance(1.0) == pytest.approx(2 / 3)
    assert prior.error_variance(1e-3) == pytest.approx(1e-6, rel=1e-5)
    assert prior.error_variance(1e3) == pytest.approx(2, rel=1e-5)


def test_error_variance_from_the_table():
    prior = shrink(error_table=((0.1, 0.05), (1.0, 0.2), (4.0, 0.3)))
    for sigma, error in prior.contract.error_table:
        assert prior.error_variance(sigma) == pytest.approx(error**2)
    # Straight lines between the knots on log-log axes, the noise itself below, the last error above.
    assert prior.error_variance(math.sqrt(0.1)) == pytest.approx(0.05 * 0.2)
    assert prior.error_variance(2.0) == pytest.approx(0.2 * 0.3)
    assert prior.error_variance(0.01) == pytest.approx(0.005**2)
    assert prior.error_variance(100.0) == pytest.approx(0.09)


def test_error_variance_from_a_table_of_one_entry():
    prior = shrink(error_table=((1.0, 0.2),))
    assert prior.error_variance(0.5) == pytest.approx(0.01)
    assert prior.error_variance(1.0) == prior.error_variance(7.0) == pytest.approx(0.04)


def test_contract_survives_json():
    contract = Contract("real", 0.01, 5.0, 0.3, 8, ("brain", "knee"), "own", ((0.1, 0.05), (1.0, 0.2)))
    assert Contract.from_dict(json.loads(json.dumps(contract.as_dict()))) == contract
    assert (contract.num_channels, Contract().num_channels) == (1, 2)
    water = Contract("real", unit="water")
    assert Contract.from_dict(json.loads(json.dumps(water.as_dict()))) == water


def test_contracts_written_before_there_were_units_are_of_images_at_a_level():
    values = Contract(name="old").as_dict()
    del values["unit"]
    assert Contract.from_dict(values) == Contract(name="old", unit="level")


def test_contracts_written_before_there_were_stacks_and_value_ranges():
    values = Contract("real", name="old").as_dict()
    del values["slices"], values["value_range"]
    assert Contract.from_dict(values) == Contract("real", name="old", slices=1, value_range=(0.0, 1.0))


def test_new_fields_of_a_contract_survive_json():
    for contract in (Contract(slices=3), Contract("rgb", value_range=(-1.0, 1.0), unit="water")):
        assert Contract.from_dict(json.loads(json.dumps(contract.as_dict()))) == contract


def test_channels_and_dimensions_of_an_image():
    kinds = (Contract(), Contract("real"), Contract("rgb"), Contract(slices=5), Contract("real", slices=3))
    assert [contract.num_channels for contract in kinds] == [2, 1, 3, 10, 3]
    assert [contract.image_ndim for contract in kinds] == [2, 2, 2, 3, 3]
    assert [contract.complex_images for contract in kinds] == [True, False, False, True, False]


class Gauss(ScorePrior):
    """Denoiser of white images whose channel c has the mean ``means[c]`` and the standard deviation s."""

    def __init__(self, means, s, **contract):
        super().__init__(Contract(**contract))
        self.means, self.s = torch.tensor(means)[:, None, None], s

    def denoise_channels(self, x, sigma):
        assert x.shape[1] == self.contract.num_channels
        gain = self.s**2 / (self.s**2 + sigma[:, None, None, None] ** 2)
        return self.means + gain * (x - self.means)


def gaussian_denoiser(x, sigma, mean, s):
    return mean + s**2 / (s**2 + sigma**2) * (x - mean)


def test_the_value_range_is_mapped_on_the_way_in_and_out():
    # Images of mean 0.7 and deviation 0.2 are, to a network on [-1, 1], of mean 0.4 and deviation 0.4.
    x = image(2, 3, 4, dtype=torch.float32)
    prior = Gauss([0.4], 0.4, channels="real", value_range=(-1.0, 1.0))
    for sigma in (0.3, torch.tensor([0.1, 2.0])):
        s = torch.as_tensor(sigma)[..., None, None]
        torch.testing.assert_close(prior.denoise(x, sigma), gaussian_denoiser(x, s, 0.7, 0.2))
    # Its own channels are left as they are.
    channels, sigma = x[:, None], torch.tensor([0.1, 2.0])
    expected = gaussian_denoiser(channels, sigma[:, None, None, None], 0.4, 0.4)
    torch.testing.assert_close(prior.denoise_channels(channels, sigma), expected)
    # Real and imaginary part are two images of that range each.
    z = image(3, 4)
    parts = [gaussian_denoiser(part, 0.5, 0.7, 0.2) for part in (z.real, z.imag)]
    torch.testing.assert_close(prior.denoise(z, 0.5), torch.complex(*parts))


@pytest.mark.parametrize("span", [(0.0, 1.0), (-1.0, 1.0)])
def test_an_rgb_prior_sees_grey_and_its_channels_are_averaged(span):
    means, x = [0.2, 0.5, 0.8], image(2, 3, 4, dtype=torch.float32)
    width = span[1] - span[0]
    theirs = [span[0] + width * mean for mean in means]
    prior = Gauss(theirs, width * 0.3, channels="rgb", value_range=span)
    results = [gaussian_denoiser(x, 0.6, mean, 0.3) for mean in means]
    torch.testing.assert_close(prior.denoise(x, 0.6), sum(results) / 3)
    z = image(3, 4)
    expected = torch.complex(*(gaussian_denoiser(part, 0.6, 0.5, 0.3) for part in (z.real, z.imag)))
    torch.testing.assert_close(prior.denoise(z, 0.6), expected)


def test_stacks_of_slices_go_in_slice_by_slice():
    class Remember(ScorePrior):
        def denoise_channels(self, x, sigma):
            self.seen = x
            return x / (1 + sigma[:, None, None, None] ** 2)

    prior, z = Remember(Contract(slices=3)), image(2, 3, 4, 5)
    sigma = torch.tensor([0.5, 2.0])
    s = sigma[:, None, None, None]
    torch.testing.assert_close(prior.denoise(z, sigma), z / (1 + s**2))
    for k in range(3):
        assert torch.equal(prior.seen[:, 2 * k], z[:, k].real)
        assert torch.equal(prior.seen[:, 2 * k + 1], z[:, k].imag)
    torch.testing.assert_close(prior.score(z, sigma), -z / (1 + s**2))
    torch.testing.assert_close(prior.eps(z, sigma), z * s / (1 + s**2))
    # One stack, and a real prior on complex stacks.
    torch.testing.assert_close(prior.denoise(z[0], 1.0), z[0] / 2)
    real = Remember(Contract("real", slices=3))
    torch.testing.assert_close(real.denoise(z.conj(), sigma), z.conj() / (1 + s**2))
    assert torch.equal(real.seen, torch.cat([z.real, -z.imag]))


@pytest.mark.parametrize(
    ("shape", "sigma", "message"),
    [
        ((4, 5), 1.0, r"takes stacks \(\.\.\., 3, H, W\), got shape \(4, 5\)"),
        ((2, 4, 5), 1.0, r"takes stacks \(\.\.\., 3, H, W\), got shape \(2, 4, 5\)"),
        ((3, 4, 5), torch.ones(3), r"sigma of shape \(3,\) does not fit images of leading shape \(\)"),
    ],
)
def test_what_is_no_stack(shape, sigma, message):
    with pytest.raises(PriorError, match=message):
        shrink(slices=3).denoise(image(*shape), sigma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": "cmyk"}, "'complex', 'real' or 'rgb', not 'cmyk'"),
        ({"slices": 0}, "whole number of slices, at least 1, not 0"),
        ({"slices": 2.0}, "whole number of slices, at least 1, not 2.0"),
        ({"slices": True}, "whole number of slices, at least 1, not True"),
        ({"channels": "rgb", "slices": 3}, "three channels of an rgb prior are one slice, not 3"),
        ({"channels": "real", "value_range": (1.0, -1.0)}, r"low < high, not \(1.0, -1.0\)"),
        ({"channels": "real", "value_range": (0.0, math.inf)}, "low < high"),
        ({"channels": "real", "value_range": "01"}, "low < high, not '01'"),
        ({"channels": "real", "value_range": None}, "low < high, not None"),
        ({"value_range": (-1.0, 1.0)}, r"complex images have the value range \(0, 1\)"),
        ({"unit": "HU"}, "'level', 'water' or 'object', not 'HU'"),
        ({"unit": "water"}, "images in the unit 'water' are real; this prior's are complex"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0.0 and 20"),
        ({"sigma_min": 30.0}, "0 < sigma_min < sigma_max, got 30.0 and 20"),
        ({"sigma_max": math.nan}, "0 < sigma_min < sigma_max"),
        ({"level": 0.0}, "level must be positive, got 0"),
        ({"level": math.nan}, "level must be positive, got nan"),
        ({"error_table": ((1.0, 0.1), (0.5, 0.2))}, "error table must hold positive numbers"),
        ({"error_table": ((0.5, 0.1), (0.5, 0.2))}, "error table must hold positive numbers"),
        ({"error_table": ((0.5, 0.0),)}, "error table must hold positive numbers"),
    ],
)
def test_impossible_contract(change, message):
    with pytest.raises(PriorError, match=message):
        Contract(**change)


def test_contract_fields_are_neither_guessed_nor_ignored():
    values = Contract().as_dict()
    with pytest.raises(PriorError, match=r"contract has unknown fields \['colour'\]"):
        Contract.from_dict({**values, "colour": "grey"})
    del values["level"]
    with pytest.raises(PriorError, match=r"contract has missing fields \['level'\]"):
        Contract.from_dict(values)
