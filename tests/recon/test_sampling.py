"""`reconstruct`: what it returns, what it depends on, and what it refuses."""

import cmath
import json
import math

import pytest
import torch

from operators import CoilwiseMRI, FourierTransform, MulticoilMRI
from operators.masks import make_mask
from operators.simulation import add_noise, birdcage_maps, random_smooth_maps
from priors import Contract, DenoisingUNet, GaussianPrior, NetworkPrior, NetworkSettings
from recon import DDS, ReconError, Scale, reconstruct
from recon.sampling import NOISE_FLOOR

SHAPE = (24, 20)
SOLVER = DDS(nfe=5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian():
    """Smooth images around a disk."""
    y, x = (torch.linspace(-1, 1, n) for n in SHAPE)
    f, g = (torch.fft.fftfreq(n) for n in SHAPE)
    mean = torch.sigmoid(20 * (0.7 - torch.hypot(y[:, None], x))).to(torch.complex64)
    return GaussianPrior(mean, spectrum=0.3 / (1 + 300 * (f[:, None] ** 2 + g**2)) ** 2)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DenoisingUNet(NetworkSettings(widths=(8, 16), embedding=8))
        torch.nn.init.normal_(net.head.weight, std=0.05)
    return NetworkPrior(net, Contract(sigma_min=0.01)).eval().requires_grad_(False)


PRIORS = {"gaussian": gaussian(), "network": network()}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)

MASK = make_mask("equispaced", SHAPE, 3, center_fraction=0.2, seed=1).mask
OPERATOR = MulticoilMRI(birdcage_maps(4, SHAPE), MASK)
NOISE = 0.02
Y = add_noise(OPERATOR(gaussian().sample(1, rng(1))[0]), NOISE, rng(2)) * MASK


def draw(num_samples=2, prior=PRIORS["gaussian"], y=Y, **arguments):
    return reconstruct(y, OPERATOR, prior, SOLVER, num_samples, **{"keep_samples": True, **arguments})


def relative(x, truth):
    return float((x - truth).norm() / truth.norm())


# What comes back


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_summary_of_the_samples(micro_batch):
    posterior = draw(5, micro_batch=micro_batch, quantiles=(0.0, 0.1, 0.5, 1.0), seed=3, key="file/2")
    samples = posterior.samples
    assert samples.shape == (5, *SHAPE)
    assert samples.dtype == posterior.mean.dtype == torch.complex64
    assert posterior.std.dtype == torch.float32
    torch.testing.assert_close(posterior.mean, samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.std, samples.abs().std(0), rtol=1e-4, atol=1e-6)
    assert float(posterior.std.min()) > 0
    assert list(posterior.quantiles) == [0.0, 0.1, 0.5, 1.0]
    for q, image in posterior.quantiles.items():
        torch.testing.assert_close(image, samples.abs().quantile(q, dim=0))
    left = (Y - OPERATOR(posterior.mean)).abs().double().square().sum() / (2 * 4 * 24 * int(MASK.sum()))
    assert posterior.residual == pytest.approx(math.sqrt(float(left)))
    assert (posterior.num_samples, posterior.nfe) == (5, SOLVER.nfe)
    assert (posterior.seed, posterior.key, posterior.micro_batch) == (3, "file/2", micro_batch)
    assert posterior.threads == torch.get_num_threads()
    assert posterior.settings["name"] == "DDS"
    assert json.loads(json.dumps(posterior.settings))["nfe"] == SOLVER.nfe


def test_samples_and_quantiles_are_kept_only_when_asked_for():
    posterior = draw(keep_samples=False)
    assert posterior.samples is None
    assert posterior.quantiles == {}
    assert torch.equal(posterior.mean, draw().mean)


def test_the_image_is_found():
    truth = gaussian().sample(1, rng(1))[0]
    posterior = reconstruct(Y, OPERATOR, PRIORS["gaussian"], DDS(nfe=20), 8, noise_std=NOISE)
    zero_filled = OPERATOR.adjoint(Y)
    assert relative(posterior.mean, truth) < 0.1
    assert relative(posterior.mean, truth) < 0.3 * relative(zero_filled, truth)
    assert posterior.noise_std == NOISE
    assert 0.5 * NOISE < posterior.residual < 1.5 * NOISE


def test_the_solver_is_dds_by_default():
    posterior = reconstruct(Y, OPERATOR, PRIORS["gaussian"])
    assert posterior.settings["name"] == "DDS"
    assert posterior.nfe == DDS().nfe
    assert posterior.num_samples == 1


def test_one_sample_says_that_its_spread_is_unknown():
    posterior = draw(1)
    assert torch.equal(posterior.std, torch.zeros(SHAPE))
    assert any("one sample has no spread" in warning for warning in posterior.warnings)
    assert not any("one sample" in warning for warning in draw(2).warnings)
    assert torch.equal(posterior.mean, posterior.samples[0])


def test_nobody_has_calibrated_the_spread():
    assert any("not been calibrated" in warning for warning in draw().warnings)


def test_progress_runs_to_its_end():
    for micro_batch, batches in ((1, 5), (2, 3), (8, 1)):
        steps: list[tuple[int, int]] = []
        draw(5, micro_batch=micro_batch, on_progress=lambda *progress, steps=steps: steps.append(progress))
        total = batches * SOLVER.nfe
        assert steps == [(k + 1, total) for k in range(total)]


def test_no_gradients_are_kept():
    assert not draw(prior=network().requires_grad_(True)).samples.requires_grad


# What the result depends on


@every_prior
def test_the_same_call_gives_the_same_bits(prior):
    first = draw(prior=prior, seed=5, key="a")
    torch.manual_seed(9)
    again = draw(prior=prior, seed=5, key="a")
    assert torch.equal(first.samples, again.samples)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.std, again.std)
    for other in (draw(prior=prior, seed=6, key="a"), draw(prior=prior, seed=5, key="b")):
        assert float((other.samples - first.samples).abs().max()) > 1e-3 * float(first.mean.abs().max())


@every_prior
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_sample_does_not_depend_on_how_many_are_asked_for(prior, micro_batch):
    two, five = (draw(n, prior=prior, micro_batch=micro_batch) for n in (2, 5))
    assert torch.equal(two.samples, five.samples[:2])
    assert not torch.equal(five.samples[0], five.samples[1])


@every_prior
def test_the_micro_batch_changes_rounding_only(prior):
    one, three = (draw(5, prior=prior, micro_batch=n) for n in (1, 3))
    assert relative(three.samples, one.samples) < 1e-4
    assert relative(three.mean, one.mean) < 1e-4
    assert relative(three.std, one.std) < 1e-4


# Scale


@every_prior
@pytest.mark.parametrize(
    ("c", "tolerance"), [(4.0, 0.0), (3.7e-5, 1e-4), (1e4, 1e-4), (2 * cmath.exp(0.7j), 1e-4), (1e-12j, 1e-4)]
)
@pytest.mark.parametrize("noise_std", [None, NOISE])
def test_kspace_times_a_number_gives_image_times_it(prior, c, tolerance, noise_std):
    one = draw(prior=prior, noise_std=noise_std)
    other = draw(prior=prior, y=c * Y, noise_std=noise_std and abs(c) * noise_std)
    assert relative(other.samples / c, one.samples) <= tolerance
    assert relative(other.mean / c, one.mean) <= tolerance
    assert relative(other.std / abs(c), one.std) <= 10 * tolerance
    assert other.noise_std == pytest.approx(abs(c) * one.noise_std, rel=1e-4)
    assert other.residual == pytest.approx(abs(c) * one.residual, rel=1e-3)
    assert other.scale.factor == pytest.approx(abs(c) * one.scale.factor, rel=1e-4)


def test_a_given_scale_is_used():
    scale = Scale(2.0, 0.3)
    given = draw(scale=scale, noise_std=NOISE)
    assert given.scale == scale
    assert relative(given.mean, draw(noise_std=NOISE).mean) > 1e-3


def test_noise_is_believed_down_to_a_floor():
    posterior = draw(noise_std=0.0)
    floor = NOISE_FLOOR * PRIORS["gaussian"].contract.level * posterior.scale.factor
    assert posterior.noise_std == pytest.approx(floor)
    assert any("raised to" in warning for warning in posterior.warnings)
    assert not any("raised to" in warning for warning in draw(noise_std=NOISE).warnings)


def test_what_the_mask_leaves_out_is_ignored():
    full = Y + 3 * ~MASK
    one, other = draw(), draw(y=full)
    assert torch.equal(one.mean, other.mean)
    assert other.residual == one.residual
    assert other.noise_std == one.noise_std


# Other operators


def test_operator_without_a_mask_needs_the_noise_level():
    A = FourierTransform(SHAPE)
    truth = gaussian().sample(1, rng(1))[0]
    y = add_noise(A(truth), NOISE, rng(2))
    with pytest.raises(ReconError, match="FourierTransform data cannot be estimated; give noise_std"):
        reconstruct(y, A, PRIORS["gaussian"], SOLVER)
    posterior = reconstruct(y, A, PRIORS["gaussian"], DDS(nfe=20), noise_std=NOISE)
    assert relative(posterior.mean, truth) < 0.1


def test_coil_images_each_on_their_own():
    A = CoilwiseMRI(4, MASK, SHAPE)
    y = A(random_smooth_maps(4, SHAPE, seed=0) * gaussian().mean)
    posterior = reconstruct(y, A, PRIORS["network"], SOLVER, 2, noise_std=NOISE)
    # Combined by root sum of squares, sample by sample: real, and nowhere negative.
    assert posterior.mean.shape == posterior.std.shape == SHAPE
    assert posterior.mean.dtype == torch.float32
    assert bool((posterior.mean >= 0).all())


# What is refused


def with_entry(value):
    y = Y.clone()
    y[1, 2, 3] = value
    return y


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"quantiles": (0.5, 1.5)}, r"quantiles lie in \[0, 1\], got \[0.5, 1.5\]"),
        ({"quantiles": (math.nan,)}, r"quantiles lie in \[0, 1\], got \[nan\]"),
        ({"noise_std": -1.0}, "noise_std must be a number and not negative, got -1.0"),
        ({"noise_std": math.nan}, "noise_std must be a number and not negative, got nan"),
        ({"noise_std": math.inf}, "noise_std must be a number and not negative, got inf"),
        ({"y": Y[:3]}, r"measurement has shape \(3, 24, 20\), the operator's is \(4, 24, 20\)"),
        ({"y": Y[None]}, r"measurement has shape \(1, 4, 24, 20\), the operator's is \(4, 24, 20\)"),
        ({"y": with_entry(math.nan)}, "measurement holds values that are not finite"),
        ({"y": with_entry(complex(0, math.inf))}, "measurement holds values that are not finite"),
        ({"y": 0 * Y}, "measurement is all zero"),
        ({"y": Y * 0 + ~MASK}, "measurement is all zero"),
    ],
)
def test_what_cannot_be_reconstructed(arguments, message):
    with pytest.raises(ReconError, match=message):
        draw(**arguments)


def test_an_operator_with_a_batch():
    A = MulticoilMRI(torch.stack([OPERATOR.maps, OPERATOR.maps]), MASK)
    with pytest.raises(ReconError, match=r"takes one image; the operator has a batch \(2,\)"):
        reconstruct(Y, A, PRIORS["gaussian"])
