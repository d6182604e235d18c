"""Noise processes against their definitions, and their clocks against published tables."""

import math

import pytest
import torch

from priors import EDM, VE, VP, DiscreteVP, Flow, PriorError
from priors.processes import Process, told_time

PROCESSES: dict[str, Process] = {
    "discrete": DiscreteVP.linear(),
    "cosine": DiscreteVP.cosine(),
    "scaled-linear": DiscreteVP.scaled_linear(),
    "vp": VP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "flow-to-1": Flow(data_at=1),
}


def levels(process, count=7):
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64).log()
    return torch.exp(torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64))


@pytest.mark.parametrize("name", PROCESSES)
def test_time_and_noise_level_are_inverse(name):
    process = PROCESSES[name]
    sigmas = process.sigmas[[0, 3, 500, 998, 999]] if isinstance(process, DiscreteVP) else levels(process)
    times = process.time(sigmas)
    torch.testing.assert_close(process.sigma(times), sigmas, rtol=1e-9, atol=0)
    steps = times.double().diff()
    assert bool((steps < 0).all() if name == "flow-to-1" else (steps > 0).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_input_and_coordinate_are_inverse(name):
    process = PROCESSES[name]
    sigma = levels(process, 3).float()
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    scaled = process.to_network(x, sigma)
    assert scaled.dtype == x.dtype
    torch.testing.assert_close(process.from_network(scaled, sigma), x)


def test_variance_preserving_processes_keep_the_variance():
    # x_t = sqrt(abar) x0 + sqrt(1 - abar) z: the squares of the two scales add up to one.
    for process in (VP(), DiscreteVP.linear(), DiscreteVP.cosine()):
        sigma = levels(process)
        signal = process.signal(sigma)
        torch.testing.assert_close(signal**2 + (signal * sigma) ** 2, torch.ones_like(sigma))
    process = DiscreteVP.linear()
    torch.testing.assert_close(process.signal(process.sigmas) ** 2, process.alphas_bar)


def test_continuous_vp_follows_its_integral():
    # abar(t) = exp(-integral of beta), by the trapezoidal rule, exact for a linear beta.
    process, t = VP(0.2, 12.0), 0.37
    integral = (0.2 + (0.2 + t * 11.8)) / 2 * t
    sigma = math.sqrt(math.exp(integral) - 1)
    assert float(process.sigma(torch.tensor(t, dtype=torch.float64))) == pytest.approx(sigma, rel=1e-12)
    assert float(process.time(torch.tensor(sigma, dtype=torch.float64))) == pytest.approx(t, rel=1e-12)


def test_continuous_vp_is_the_limit_of_discrete_vp():
    # beta_t = beta(t) / T: the same curve, as T grows (Song et al. 2021, App. B).
    discrete = DiscreteVP.linear(20_000, 0.1 / 20_000, 20.0 / 20_000)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    index = (t * 20_000).long() - 1
    torch.testing.assert_close(discrete.sigmas[index], VP().sigma(t), rtol=2e-3, atol=0)


def test_flow_is_a_straight_line():
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x0, z = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for process, times in ((Flow(), t), (Flow(data_at=1), 1 - t)):
        sigma = process.sigma(times)
        torch.testing.assert_close(sigma, t / (1 - t))
        torch.testing.assert_close(process.unit_time(sigma), t)
        share = t[:, None, None]
        straight = (1 - share) * x0 + share * z
        torch.testing.assert_close(process.to_network(x0 + sigma[:, None, None] * z, sigma), straight)
        # The velocity is the derivative in the process's own time.
        a, b = process.velocity(sigma)
        sign = -1 if process.data_at else 1
        derivative = a[:, None, None] * z + b[:, None, None] * x0
        torch.testing.assert_close(derivative, sign * (z - x0))


def test_edm_input_has_unit_variance():
    process, sigma = EDM(0.3), torch.tensor([0.01, 1.0, 50.0])
    torch.testing.assert_close(process.input_scale(sigma) ** 2 * (sigma**2 + 0.09), torch.ones(3))
    torch.testing.assert_close(process.time(sigma), sigma.log() / 4)


# Values of the published tables: beta from 1e-4 to 0.02 in 1000 steps leaves abar_1000 = 4.036e-5 (Ho et al.
# 2020); EDM quotes sigma_max = 157 for it (Karras et al. 2022, Table 1); latent diffusion ends at sigma 14.6.
def test_published_ends():
    assert float(DiscreteVP.linear().alphas_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    assert DiscreteVP.linear().sigma_max == pytest.approx(157.4, rel=1e-3)
    assert DiscreteVP.linear().sigma_min == pytest.approx(0.01, rel=1e-3)
    assert DiscreteVP.scaled_linear().sigma_max == pytest.approx(14.6146, rel=1e-4)
    assert VP(0.1, 20.0).sigma_max == pytest.approx(152, rel=0.01)


def test_cosine_follows_its_curve_until_it_is_cut():
    process = DiscreteVP.cosine(100)

    def curve(t):
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 50, 99):
        assert float(process.alphas_bar[t - 1]) == pytest.approx(curve(t) / curve(0), rel=1e-9)
    last = 1 - float(process.alphas_bar[99] / process.alphas_bar[98])
    assert last == pytest.approx(0.999)


def test_the_nearest_step_is_so_in_the_logarithm():
    process = DiscreteVP(torch.tensor([0.8, 0.5, 0.1]))  # sigma 0.5, 1 and 3
    torch.testing.assert_close(process.sigmas, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    wanted = torch.tensor([1e-6, 0.5, 0.70, 0.71, 1.0, 1.73, 1.74, 3.0, 1e6])
    index = process.nearest(wanted)
    assert index.dtype == torch.int64
    assert index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # Against trying all of them.
    many = torch.exp(torch.linspace(-6, 6, 200, dtype=torch.float64))
    process = DiscreteVP.linear()
    brute = (many.log()[:, None] - process.sigmas.log()).abs().argmin(1)
    assert torch.equal(process.nearest(many), brute)
    assert torch.equal(process.nearest(process.sigmas.float()), torch.arange(1000))


def test_times_that_networks_are_told():
    sigma = torch.tensor([0.5, 3.0])
    discrete = DiscreteVP(torch.tensor([0.8, 0.5, 0.1]))
    assert (
        told_time(discrete, "own", sigma).tolist() == told_time(discrete, "index", sigma).tolist() == [0, 2]
    )
    torch.testing.assert_close(told_time(discrete, "t", sigma), torch.tensor([1 / 3, 1.0]))
    assert torch.equal(told_time(discrete, "sigma", sigma), sigma)
    torch.testing.assert_close(told_time(discrete, "log_sigma", sigma), sigma.log())
    torch.testing.assert_close(told_time(VE(0.5, 8.0), "t", torch.tensor([2.0])), torch.tensor([0.5]))
    torch.testing.assert_close(told_time(Flow(), lambda s: 1000 * s, sigma), 1000 * sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteVP(torch.tensor([0.5, 0.5])), "decrease strictly"),
        (lambda: DiscreteVP(torch.tensor([0.5, math.nan])), "decrease strictly"),
        (lambda: DiscreteVP(torch.tensor([1.0, 0.5])), r"within \(0, 1\)"),
        (lambda: DiscreteVP(torch.ones(2, 2)), r"a table \(T,\), got shape \(2, 2\)"),
        (lambda: DiscreteVP(torch.ones(0)), r"a table \(T,\), got shape \(0,\)"),
        (lambda: DiscreteVP.linear(0), "at least one step, got 0"),
        (lambda: VP(20.0, 0.1), "0 < beta_min < beta_max"),
        (lambda: VP(t_min=1.0), "0 < t_min < 1"),
        (lambda: VE(1.0, 0.5), "0 < sigma_min < sigma_max, got 1.0 and 0.5"),
        (lambda: EDM(0.0), "sigma_data must be positive, got 0"),
        (lambda: Flow(data_at=2), "time 0 or 1 of a flow, not 2"),
        (lambda: Flow(sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: told_time(VE(), "index", torch.ones(1)), "VE counts no steps"),
        (lambda: told_time(EDM(), "clock", torch.ones(1)), "not 'clock'"),
        (lambda: Process().unit_time(torch.ones(1)), "Process has no time from 0 to 1"),
    ],
)
def test_impossible_processes(make, message):
    with pytest.raises(PriorError, match=message):
        make()
