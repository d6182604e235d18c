"""One analytic denoiser in every parameterisation of every process is one prior."""

from typing import Any

import pytest
import torch
from torch import nn

from operators.mri import MulticoilMRI
from operators.simulation import random_smooth_maps
from priors import EDM, VE, VP, Contract, DiscreteVP, Flow, FunctionPrior, GaussianPrior, PriorError
from recon.sampling import reconstruct
from recon.solvers.base import SolverError
from recon.solvers.dds import DDS
from recon.solvers.dps import DPS
from recon.solvers.schedule import vp_linear_sigmas

PROCESSES: dict[str, Any] = {
    "vp": VP(),
    "discrete": DiscreteVP.linear(),
    "ve": VE(),
    "edm": EDM(0.4),
    "flow": Flow(),
    "flow-to-1": Flow(data_at=1),
}
PREDICTIONS = ("x0", "D", "eps", "v", "score")
SHAPE = (8, 10)


def gaussian(channels="complex"):
    generator = torch.Generator().manual_seed(3)
    dtype = torch.complex64 if channels == "complex" else torch.float32
    mean = 0.3 * torch.randn(SHAPE, dtype=dtype, generator=generator)
    return GaussianPrior(mean, variance=0.02 + 0.1 * torch.rand(SHAPE, generator=generator))


def presented(prior, process, predicts):
    """What a perfect network of that process would compute, from the definitions of its paper."""

    def function(x_t, time):
        dtype = x_t.dtype
        x_t, b = x_t.double(), (slice(None), None, None, None)
        if isinstance(process, DiscreteVP):
            # alphas_bar as a table, time as an index.
            abar = process.alphas_bar[time][b]
            signal, noise = abar.sqrt(), (1 - abar).sqrt()
        elif isinstance(process, VP):
            t = time.double()[b]
            abar = torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
            signal, noise = abar.sqrt(), (1 - abar).sqrt()
        elif isinstance(process, Flow):
            t = time.double()[b]
            t = 1 - t if process.data_at else t
            signal, noise = 1 - t, t
        elif isinstance(process, EDM):
            noise = torch.exp(4 * time.double())[b]
            signal = torch.ones_like(noise)
            x_t = x_t * (noise**2 + 0.4**2).sqrt()
        else:
            noise = time.double()[b]
            signal = torch.ones_like(noise)
        sigma = noise / signal
        x0 = prior.denoise_channels(x_t / signal, sigma.flatten())
        z = (x_t - signal * x0) / noise
        if predicts == "v":
            if isinstance(process, Flow):
                out = x0 - z if process.data_at else z - x0
            elif isinstance(process, EDM):
                total = sigma**2 + 0.4**2
                out = (x0 - 0.4**2 / total * x_t) / (0.4 * sigma / total.sqrt())
            else:  # Salimans & Ho: alpha^2 + sigma^2 = 1
                angle = torch.atan(sigma)
                out = torch.cos(angle) * z - torch.sin(angle) * x0
        else:
            out = {"x0": x0, "D": x0, "eps": z, "score": -z / noise}[predicts]
        return out.to(dtype)

    return function


@pytest.mark.parametrize("channels", ["complex", "real"])
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_presentation_is_the_same_denoiser(process, predicts, channels):
    known, clock = gaussian(channels), PROCESSES[process]
    prior = FunctionPrior(
        presented(known, clock, predicts), Contract(channels=channels), predicts=predicts, process=clock
    )
    if process == "discrete":
        sigma = clock.sigmas[[0, 100, 500, 900]].float()
    else:
        sigma = torch.tensor([0.01, 0.1, 1.0, 10.0])
    x = torch.randn(4, *SHAPE, dtype=known.mean.dtype, generator=torch.Generator().manual_seed(0))
    x = known.mean + (0.3 + sigma[:, None, None]) * x
    torch.testing.assert_close(prior.denoise(x, sigma), known.denoise(x, sigma), rtol=1e-4, atol=3e-5)


@pytest.fixture(scope="module")
def scan():
    known = gaussian()
    maps = random_smooth_maps(3, SHAPE, seed=1)
    mask = torch.zeros(1, SHAPE[1])
    mask[0, [0, 2, 4, 5, 6, 9]] = 1
    operator = MulticoilMRI(maps / maps.abs().square().sum(0).sqrt(), mask)
    truth = known.sample(1, torch.Generator().manual_seed(5))[0]
    noise = torch.randn(
        operator.range_shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(6)
    )
    return known, operator, operator(truth) + 0.05 * mask * noise


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_presentation_gives_the_same_reconstruction(scan, process, predicts):
    known, operator, y = scan
    clock = PROCESSES[process]
    # The levels of this schedule are those of the table; the other processes have all levels.
    solver = DDS.paper(nfe=10)
    prior = FunctionPrior(presented(known, clock, predicts), known.contract, predicts=predicts, process=clock)
    images = [
        reconstruct(y, operator, given, solver, seed=1, noise_std=0.05).mean for given in (known, prior)
    ]
    peak = float(images[0].abs().max())
    assert float((images[1] - images[0]).abs().max()) <= 1e-4 * peak


def test_the_schedule_of_that_test_is_on_the_table():
    sigmas = torch.tensor(vp_linear_sigmas(10)[:-1])
    table = DiscreteVP.linear()
    torch.testing.assert_close(table.sigmas[table.nearest(sigmas)].float(), sigmas)


def test_a_wrong_word_is_another_prior(scan):
    known, operator, y = scan
    prior = FunctionPrior(presented(known, VP(), "v"), known.contract, predicts="eps", process=VP())
    solver = DDS.paper(nfe=10)
    right, wrong = (
        reconstruct(y, operator, given, solver, seed=1, noise_std=0.05).mean for given in (known, prior)
    )
    assert float((wrong - right).abs().max()) > 0.05 * float(right.abs().max())


@pytest.mark.parametrize(
    ("process", "pass_time", "sigma", "told"),
    [
        (DiscreteVP(torch.tensor([0.8, 0.5, 0.1])), "own", 1.0, 1),
        (DiscreteVP(torch.tensor([0.8, 0.5, 0.1])), "t", 1.0, 2 / 3),
        (VE(), "log_sigma", 1.0, 0.0),
        (Flow(), "own", 1.0, 0.5),
        (Flow(), lambda sigma: 1000 * sigma / (1 + sigma), 1.0, 500.0),
    ],
)
def test_what_the_function_is_told(process, pass_time, sigma, told):
    seen = []

    def function(x, time):
        seen.append(time)
        return x

    prior = FunctionPrior(function, Contract("real"), predicts="x0", process=process, pass_time=pass_time)
    prior.denoise(torch.zeros(2, 3, 3), sigma)
    torch.testing.assert_close(seen[0], torch.full((2,), told))


def test_images_are_padded_to_what_the_function_accepts():
    def function(x, sigma):
        assert x.shape[-2] % 4 == 0
        assert x.shape[-1] % 4 == 0
        return x / 2

    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    prior = FunctionPrior(function, Contract("real", size_multiple=4), predicts="x0")
    torch.testing.assert_close(prior.denoise(x, 1.0), x / 2)


def test_a_module_belongs_to_the_prior_and_keeps_its_precision():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, sigma):
            assert x.dtype == sigma.dtype == torch.float32
            return self.factor * x

    module = Half()
    prior = FunctionPrior(module, Contract("real"), predicts="D")
    assert [id(weight) for weight in prior.parameters()] == [id(module.factor)]
    x = torch.ones(2, 2, dtype=torch.float64)
    result = prior.denoise(x, 1.0)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, x / 2)
    assert FunctionPrior(nn.Identity(), Contract("real"), predicts="D").dtype is None


def test_gradients_flow_unless_it_is_said_that_they_do_not(scan):
    known, operator, y = scan

    def prior(differentiable):
        function = presented(known, VE(), "D")
        return FunctionPrior(function, known.contract, predicts="D", differentiable=differentiable)

    x = torch.ones(SHAPE, dtype=torch.complex64, requires_grad=True)
    (expected,) = torch.autograd.grad(known.denoise(x, 0.5).abs().sum(), x)
    (gradient,) = torch.autograd.grad(prior(True).denoise(x, 0.5).abs().sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert not prior(False).predict(torch.view_as_real(x).permute(2, 0, 1)[None], torch.ones(1)).requires_grad
    with pytest.raises(SolverError, match="can be differentiated"):
        reconstruct(y, operator, prior(False), DPS(), noise_std=0.05)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, t: x.repeat(1, 2, 1, 1), r"given images \(1, 1, 4, 4\) and returned shape \(1, 2, 4, 4\)"),
        (lambda x, t: (x, x), "returned a tuple"),
        (lambda x, t: None, "returned a NoneType"),
    ],
)
def test_functions_that_return_no_image(function, message):
    prior = FunctionPrior(function, Contract("real"), predicts="eps")
    with pytest.raises(PriorError, match=message):
        prior.denoise(torch.zeros(4, 4), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicts": "x1"}, "predicts one of x0, D, eps, v, score, not 'x1'"),
        ({"predicts": "eps", "pass_time": "index"}, "VE counts no steps"),
        ({"predicts": "eps", "pass_time": "now"}, "not 'now'"),
    ],
)
def test_words_without_a_meaning(options, message):
    with pytest.raises(PriorError, match=message):
        FunctionPrior(lambda x, t: x, Contract("real"), **options)


def test_wrong_channels():
    prior = FunctionPrior(lambda x, t: x, Contract("real", name="one"), predicts="D")
    with pytest.raises(PriorError, match=r"'one' takes \(B, 1, H, W\), got \(1, 2, 4, 4\)"):
        prior.denoise_channels(torch.zeros(1, 2, 4, 4), torch.ones(1))
