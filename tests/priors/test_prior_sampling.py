"""Samplers of a prior on Gaussian images, where each is an affine map of its noise, known in closed form."""

import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from priors import (
    Contract,
    DenoisingUNet,
    GaussianPrior,
    NetworkPrior,
    NetworkSettings,
    PriorError,
    ScorePrior,
)
from priors.loading import load_prior
from priors.sampling import (
    SAMPLERS,
    ImageNoise,
    ddim,
    ddpm,
    heun,
    karras_levels,
    predictor_corrector,
    sample_prior,
)
from recon.errors import ReconError

C128 = torch.complex128
SHAPE, N = (3, 4), 12
LEVELS = karras_levels(6, 3.0, 0.05)


def randn(*shape, seed=0, dtype=C128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian_prior():
    root = randn(N, N, seed=1) / math.sqrt(N)
    return GaussianPrior(randn(*SHAPE, seed=2), covariance=root @ root.mH, sigma_max=3.0)


def diagonal_prior(**contract):
    """Variances over four decades, mean zero: each pixel is a problem of its own."""
    variance = torch.logspace(-3, 1, N, dtype=torch.float64).reshape(SHAPE)
    return GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=variance, **contract), variance


class BasisNoise:
    """Item 0 has no noise, the others one unit vector each, at one step each."""

    def __init__(self, steps):
        self.items = 1 + steps * N

    def __call__(self, step):
        noise = torch.zeros(self.items, N, dtype=C128)
        noise[1 + step * N : 1 + (step + 1) * N] = torch.eye(N)
        return noise.reshape(self.items, *SHAPE)


def moments_of_the_code(sampler, prior, sigmas):
    """Mean and covariance per real component, from what the code makes of every unit of noise."""
    x = sampler(prior, BasisNoise(len(sigmas)), sigmas).flatten(1)
    gains = (x[1:] - x[0]).mT
    return x[0], gains @ gains.mH


def recursion(prior, sigmas, step):
    """The same by dense linear algebra; ``step`` gives slope, offset and noise of ``x' = S x + c + f z``."""
    m, C, identity = (
        prior.mean.flatten(),
        (prior.basis * prior.values) @ prior.basis.mH,
        torch.eye(N, dtype=C128),
    )
    mean, covariance = 0 * m, sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        S, c, noise = step(m, C, identity, sigma, lower)
        mean, covariance = S @ mean + c, S @ covariance @ S.mH + noise
    return mean, covariance


def denoiser(C, identity, sigma):
    """``W`` of ``D(x) = W x + (I - W) m``."""
    return C @ torch.linalg.inv(C + sigma**2 * identity)


# Against dense recursions from the papers' equations


def ddpm_step(m, C, identity, sigma, lower):
    # Bayes' rule for x' given x = x' + sqrt(sigma^2 - lower^2) z and x' = x0 + lower z'.
    W = denoiser(C, identity, sigma)
    added = sigma**2 - lower**2
    precision = 1 / added + (1 / lower**2 if lower else math.inf)
    S = (identity / added + W / lower**2) / precision if lower else W
    c = (identity - W) @ m * (1 / lower**2 / precision if lower else 1)
    return S, c, identity / precision


def ddim_step(eta):
    def step(m, C, identity, sigma, lower):
        # In the paper's variables: x_vp = sqrt(abar) x.
        abar, abar_lower = 1 / (1 + sigma**2), 1 / (1 + lower**2)
        s = eta * math.sqrt((1 - abar_lower) / (1 - abar)) * math.sqrt(1 - abar / abar_lower)
        W = denoiser(C, identity, sigma)
        eps = math.sqrt(abar) * (identity - W) / math.sqrt(1 - abar)
        S_vp = math.sqrt(abar_lower) * W + math.sqrt(1 - abar_lower - s**2) * eps
        # eps(x) = sqrt(abar) (x - D) / sqrt(1 - abar) is (I - W) (x - m): its offset is its slope times -m.
        c_vp = math.sqrt(abar_lower) * (identity - W) @ m - math.sqrt(1 - abar_lower - s**2) * eps @ m
        scale = math.sqrt(abar_lower)
        return S_vp / scale, c_vp / scale, (s / scale) ** 2 * identity

    return step


def predictor_step(m, C, identity, sigma, lower):
    score = -torch.linalg.inv(C + sigma**2 * identity)  # of N(m, C + sigma^2 I), at x - m
    added = sigma**2 - lower**2
    return identity + added * score, -added * score @ m, (added if lower else 0) * identity


def heun_step(churn, steps, low, high, spread, top):
    def step(m, C, identity, sigma, lower):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        raised = min(sigma * (1 + gamma), max(top, sigma))
        noise = spread**2 * (raised**2 - sigma**2)

        def slope(at):  # dx/dsigma = -sigma score
            return at * torch.linalg.inv(C + at**2 * identity)

        h = lower - raised
        euler = identity + h * slope(raised)
        S = identity + h / 2 * (slope(raised) + slope(lower) @ euler) if lower else euler
        return S, m - S @ m, noise * S @ S.mH

    return step


@pytest.mark.parametrize(
    ("sampler", "step"),
    [
        (ddpm, ddpm_step),
        (ddim, ddim_step(0.0)),
        (partial(ddim, eta=0.6), ddim_step(0.6)),
        (partial(ddim, eta=1.0), ddpm_step),
        (partial(predictor_corrector, corrections=0), predictor_step),
        (heun, heun_step(0.0, 6, 0.0, math.inf, 1.0, 3.0)),
        (partial(heun, churn=1.5), heun_step(1.5, 6, 0.0, math.inf, 1.0, 3.0)),
        (
            partial(heun, churn=99.0, churn_range=(0.1, 2.0), churn_noise=1.1),
            heun_step(99.0, 6, 0.1, 2.0, 1.1, 3.0),
        ),
    ],
)
def test_equal_to_the_dense_recursion(sampler, step):
    prior = gaussian_prior()
    mean, covariance = moments_of_the_code(sampler, prior, LEVELS)
    expected_mean, expected_covariance = recursion(prior, LEVELS, step)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-9, atol=1e-9)
    assert float(covariance.diagonal().real.max()) > 0.1


def test_churn_does_not_raise_the_noise_beyond_the_prior():
    class Bounded(GaussianPrior):
        def denoise(self, x, sigma):
            assert sigma <= 3.0
            return super().denoise(x, sigma)

    prior = Bounded(torch.zeros(SHAPE, dtype=C128), variance=1.0, sigma_max=3.0)
    x = heun(prior, BasisNoise(7), LEVELS, churn=100.0)
    # In steps after the first, noise came in.
    assert float(x[1 + N : 1 + 2 * N].abs().max()) == 0
    assert float(x[1 + 2 * N : 1 + 3 * N].abs().max()) > 0


# Against the continuous process


def flow_gain(variance, sigmas):
    """Exact solution of the probability flow down to the last level, and the step to zero, which is ``D``."""
    low = sigmas[-2] ** 2
    return torch.sqrt((variance + low) / (variance + sigmas[0] ** 2)) * variance / (variance + low)


def gain_of_the_code(sampler, prior, sigmas):
    x = sampler(prior, BasisNoise(1), sigmas)  # only the first noise is ever asked for
    return x[1 : 1 + N].flatten(1).diagonal().real.reshape(SHAPE) / sigmas[0]


@pytest.mark.parametrize(("sampler", "order"), [(heun, 2), (ddim, 1)])
def test_order_of_convergence_to_the_probability_flow(sampler, order):
    prior, variance = diagonal_prior()
    errors = []
    for steps in (40, 80, 160, 320):
        sigmas = karras_levels(steps + 1, 20.0, 0.02)
        exact = flow_gain(variance, sigmas)
        errors.append(float((gain_of_the_code(sampler, prior, sigmas) / exact - 1).abs().max()))
    for coarse, fine in pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order
    assert errors[-1] < (2e-4 if order == 2 else 0.05)


@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=0.5), partial(heun, churn=30.0)])
def test_marginals_approach_the_prior(sampler):
    prior, variance = diagonal_prior()
    errors = []
    for steps in (25, 50, 100):
        sigmas = karras_levels(steps, 100.0, 0.002)
        _, covariance = moments_of_the_code(sampler, prior, sigmas)
        errors.append(float((covariance.diagonal().real.reshape(SHAPE) / variance - 1).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


# Predictor and corrector, whose steps depend on the noise


def test_corrector_equal_to_its_equations():
    prior, sigmas = gaussian_prior(), karras_levels(4, 3.0, 0.1)
    noise = ImageNoise(5, (0, 1), SHAPE, C128)
    x = predictor_corrector(prior, noise, sigmas, corrections=2, snr=0.2)
    m, C, identity = (
        prior.mean.flatten(),
        (prior.basis * prior.values) @ prior.basis.mH,
        torch.eye(N, dtype=C128),
    )

    def score(x, sigma):
        return torch.linalg.solve(C + sigma**2 * identity, m - x)

    for item in (0, 1):
        draws = iter(noise(k)[item].flatten() for k in range(10))
        expected = sigmas[0] * next(draws)
        for sigma, lower in pairwise(sigmas):
            expected = expected + (sigma**2 - lower**2) * score(expected, sigma)
            if lower:
                expected = expected + (sigma**2 - lower**2) ** 0.5 * next(draws)
                for _ in range(2):
                    g, z = score(expected, lower), next(draws)
                    epsilon = 2 * (0.2 * float(z.norm()) / float(g.norm())) ** 2
                    expected = expected + epsilon * g + (2 * epsilon) ** 0.5 * z
        assert next(draws, None) is None  # every step's noise was used, and once
        torch.testing.assert_close(x[item].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_predictor_corrector_has_the_moments_of_the_prior():
    # White images of many pixels: the corrector's step, which assumes such, is then the same at every pixel.
    size, variance, mean = (16, 16), 0.3, 0.5 - 0.2j
    prior = GaussianPrior(torch.full(size, mean, dtype=C128), variance=variance)
    noise = ImageNoise(0, range(40), size, C128)
    x = predictor_corrector(prior, noise, karras_levels(150, 20.0, 0.005), snr=0.1) - mean
    count = x.numel()
    # Monte-Carlo errors are 1 % and 0.8 % of the standard deviation.
    assert float(x.abs().square().mean()) / (2 * variance) == pytest.approx(1, abs=0.05)
    assert abs(complex(x.mean())) < 4 * math.sqrt(2 * variance / count)
    assert abs(complex((x * x).mean())) < 4 * 2 * variance / math.sqrt(count)  # both components alike


# From a prior to images


def tiny_prior(channels=2):
    torch.manual_seed(0)
    network = DenoisingUNet(NetworkSettings(channels=channels, widths=(8,), embedding=8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    kind = "complex" if channels == 2 else "real"
    return NetworkPrior(network, Contract(channels=kind, size_multiple=2))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("channels", "dtype"), [(2, torch.complex64), (1, torch.float32)])
def test_every_sampler_on_a_network(name, channels, dtype):
    steps = []
    x = sample_prior(
        tiny_prior(channels),
        (8, 6),
        3,
        sampler=name,
        steps=4,
        batch=2,
        on_progress=lambda *done: steps.append(done),
    )
    assert (x.shape, x.dtype) == ((3, 8, 6), dtype)
    assert torch.isfinite(x.abs()).all()
    assert not x.requires_grad
    assert steps == [(k + 1, 8) for k in range(8)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_seed_and_index_alone(name):
    draw = partial(sample_prior, tiny_prior(), (8, 6), sampler=name, steps=3)
    five = draw(5, batch=1)
    assert torch.equal(draw(2, batch=1), five[:2])
    torch.testing.assert_close(draw(5, batch=3), five, rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(5, batch=3)[:4], draw(4, batch=3))
    assert not torch.allclose(five[0], five[1], atol=0.01)
    assert not torch.allclose(draw(1, seed=1)[0], five[0], atol=0.01)


def test_samples_of_a_stationary_gaussian_have_its_spectrum():
    size = (16, 12)
    k = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(12)[None] ** 2
    spectrum = 1 / (1 + 200 * k)
    prior = GaussianPrior(torch.zeros(size, dtype=torch.complex64), spectrum=spectrum, sigma_max=50.0)
    x = sample_prior(prior, size, 300, steps=80, batch=100)
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(0) / 2
    # Each of 192 ratios is a mean of 300 exponential variates.
    assert float((power / spectrum - 1).abs().max()) < 4.5 / math.sqrt(300)
    assert float((power / spectrum).mean()) == pytest.approx(1, abs=4 / math.sqrt(300 * 192))


def test_noise_is_standard_normal_and_fresh():
    noise = ImageNoise(0, range(4), (64, 64))
    z = torch.stack([noise(0), noise(1)])
    assert float(z.abs().square().mean()) == pytest.approx(2, abs=0.05)
    assert float(z.real.square().mean()) == pytest.approx(1, abs=0.03)
    rows = z.reshape(8, -1)
    correlation = (rows @ rows.mH).abs() / rows.shape[1] / 2
    assert float((correlation - torch.eye(8)).abs().max()) < 0.08
    real = ImageNoise(0, (0,), (64, 64), torch.float64)(0)
    assert (real.dtype, real.shape) == (torch.float64, (1, 64, 64))
    assert float(real.square().mean()) == pytest.approx(1, abs=0.1)


def test_karras_levels_of_the_paper():
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert karras_levels(3, 80, 0.002) == pytest.approx([80, middle, 0.002, 0])
    assert middle == pytest.approx(2.5152, rel=1e-4)
    assert karras_levels(1, 2.0, 0.1) == pytest.approx([2.0, 0.0])


# What cannot be done


class NaNAt(ScorePrior):
    def __init__(self, call):
        super().__init__(Contract())
        self.call, self.calls = call, 0

    def denoise_channels(self, x, sigma):
        self.calls += 1
        return x * math.nan if self.calls == self.call else 0.5 * x


@pytest.mark.parametrize(("name", "call", "step"), [("heun", 5, 2), ("ddim", 3, 2), ("ddpm", 1, 0)])
def test_nan_names_the_step(name, call, step):
    with pytest.raises(PriorError, match=f"{name} produced values that are not finite at step {step}"):
        sample_prior(NaNAt(call), (4, 4), sampler=name, steps=4)


def test_nan_in_the_corrector_names_the_step():
    with pytest.raises(PriorError, match="predictor_corrector produced values that are not finite at step 1"):
        sample_prior(NaNAt(4), (4, 4), sampler="predictor-corrector", steps=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "euler"}, "there is no sampler 'euler': the samplers are heun, ddim, ddpm, "),
        ({"num": 0}, "at least one image of at least one pixel, got 0 of "),
        ({"size": (4, 0)}, "at least one image of at least one pixel, got 1 of "),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": 0}, "the number of steps must be at least 1, got 0"),
        ({"sigma_min": 30.0}, "need 0 < sigma_min <= sigma_max, got 30.0 and 20.0"),
        ({"sigma_max": 0.002}, "noise levels must fall, and end in zero"),
        ({"sampler": partial(heun, churn=-1.0)}, "churn and its noise must not be negative, got -1.0"),
        ({"sampler": partial(ddim, eta=1.5)}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"sampler": partial(predictor_corrector, snr=0.0)}, "snr positive, got 1 and 0.0"),
        ({"sampler": partial(predictor_corrector, corrections=-1)}, "corrections must not be negative"),
    ],
)
def test_impossible_arguments(settings, message):
    with pytest.raises(PriorError, match=message):
        sample_prior(**{"prior": NaNAt(0), "size": (4, 4), "steps": 3, **settings})


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0]])
def test_impossible_levels(sigmas):
    with pytest.raises(PriorError, match="noise levels must fall, and end in zero"):
        ddpm(NaNAt(0), ImageNoise(0, (0,), (4, 4)), sigmas)


# The command


@pytest.fixture
def prior_file(tmp_path):
    from priors import save_prior

    save_prior(tmp_path / "tiny.safetensors", tiny_prior())
    return tmp_path / "tiny.safetensors"


def test_command_writes_arrays_and_a_sheet(prior_file, tmp_path, capsys):
    from PIL import Image

    from recon.cli.sample import COLUMNS, GAP, sample

    files = [tmp_path / "out" / "s.npy", tmp_path / "out" / "s.png"]
    sample(str(prior_file), files, size="10x6", num=9, sampler="ddim", steps=3, seed=4)
    expected = sample_prior(load_prior(prior_file), (10, 6), 9, sampler="ddim", steps=3, seed=4)
    images = np.load(files[0])
    np.testing.assert_array_equal(images, expected.numpy())
    assert "9 images of 10 × 6" in capsys.readouterr().out
    sheet = Image.open(files[1])
    assert "ddim, 3 steps, seed 4" in sheet.info["Description"]
    # Two rows of magnitudes, each with the phases below it.
    assert sheet.size == (COLUMNS * (6 + GAP) - GAP, 4 * (10 + GAP) - GAP)
    pixels = np.asarray(sheet.convert("RGB")).astype(float)
    first = np.abs(images[0]) / np.quantile(np.abs(images), 0.998)
    np.testing.assert_allclose(pixels[:10, :6] / 255, first.clip(0, 1)[..., None].repeat(3, -1), atol=0.003)
    ninth = 2 * (10 + GAP)
    assert pixels[ninth : ninth + 10, :6].max() > 0
    assert pixels[ninth : ninth + 10, 6 + GAP :].max() == 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["s.npy", "s.png"]


def test_of_stacks_the_sheet_shows_the_middle_slice(tmp_path, capsys):
    from PIL import Image

    from priors import save_prior
    from recon.cli.sample import contact_sheet, sample

    network = DenoisingUNet(NetworkSettings(channels=3, widths=(4,), embedding=4))
    save_prior(tmp_path / "stacks.safetensors", NetworkPrior(network, Contract(channels="real", slices=3)))
    files = [tmp_path / "s.npy", tmp_path / "s.png"]
    sample(str(tmp_path / "stacks.safetensors"), files, size="10x6", num=2, steps=2)
    assert "Of the 3 slices of each, .png shows the middle one." in capsys.readouterr().out
    images = np.load(files[0])
    assert images.shape == (2, 3, 10, 6)
    sheet = np.asarray(Image.open(files[1]).convert("RGB"))
    np.testing.assert_array_equal(sheet, contact_sheet(images[:, 1]))


def test_sheet_of_real_images_has_no_phases():
    from recon.cli.sample import contact_sheet

    sheet = contact_sheet(np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 4, 3))
    assert sheet.shape == (4, 2 * 3 + 4, 3)
    assert (sheet[..., 0] == sheet[..., 2]).all()


def test_samplers_of_the_command():
    from recon.cli import sample as command

    assert tuple(SAMPLERS) == command.SAMPLERS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "10"}, "--size takes HEIGHTxWIDTH, such as 256x256, not '10'"),
        ({"size": "10x-6"}, "--size takes HEIGHTxWIDTH"),
        ({"out": [Path("s.jpg")]}, "s.jpg: samples are written as .png or .npy"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"sampler": "euler"}, "there is no sampler 'euler'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
    ],
)
def test_impossible_commands(prior_file, tmp_path, settings, message):
    from recon.cli.sample import sample

    arguments = {"out": [tmp_path / "s.npy"], "size": "8x6", "num": 1, "steps": 2, **settings}
    with pytest.raises((ReconError, PriorError), match=re.escape(message)):
        sample(str(prior_file), **arguments)
    assert not (tmp_path / "s.npy").exists()


def test_a_file_that_cannot_be_written(prior_file, tmp_path):
    from recon.cli.sample import sample

    (tmp_path / "s.npy").mkdir()
    with pytest.raises(ReconError, match=r"s\.npy: cannot be written"):
        sample(str(prior_file), [tmp_path / "s.npy"], size="8x6", num=1, steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npy", "tiny.safetensors"]
