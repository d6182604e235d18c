"""The noise of a sinogram, against that with which it was simulated."""

import math

import pytest
import torch

from operators.ct_noise import simulate_transmission
from recon import ReconError
from recon.sinogram_noise import estimate_photons, sinogram_noise


def disc_sinogram(views=60, detectors=300, mu=0.02, radius=120.0):
    """Line integrals of a disc with a smaller, denser one in it, whose shadow moves."""
    u = torch.linspace(-150, 150, detectors)
    angles = torch.linspace(0, math.pi, views + 1)[:-1, None]
    chord = 2 * (radius**2 - u**2).clamp_min(0).sqrt().expand(views, -1)
    offset = u - 50 * angles.cos()
    return mu * (chord + (20**2 - offset**2).clamp_min(0).sqrt())


@pytest.mark.parametrize("photons", [1e3, 1e4, 1e6])
def test_photons_within_fifteen_percent(photons):
    p = simulate_transmission(disc_sinogram(), photons, torch.Generator().manual_seed(0)).line_integrals
    assert estimate_photons(p) == pytest.approx(photons, rel=0.15)


@pytest.mark.parametrize("given", [False, True])
def test_standard_deviation_of_every_datum(given):
    clean = disc_sinogram(200, 300, mu=0.01)
    p = simulate_transmission(clean, 1e4, torch.Generator().manual_seed(1)).line_integrals
    noise = sinogram_noise(p, photons=1e4 if given else None)
    expected = torch.exp(clean / 2) / 100
    assert float((noise.std / expected).median()) == pytest.approx(1, rel=0.05)
    standardised = (p - clean) / noise.std
    # The same behind the thick middle and behind the thin rim.
    for part in (slice(120, 180), slice(36, 60)):
        assert float(standardised[:, part].std()) == pytest.approx(1, rel=0.07)


def test_electronic_noise_adds_where_photons_are_few():
    clean = disc_sinogram(mu=0.018)
    p = simulate_transmission(
        clean, 1e4, torch.Generator().manual_seed(2), electronic_std=20.0
    ).line_integrals
    noise = sinogram_noise(p, photons=1e4, electronic_std=20.0)
    middle = slice(130, 170)
    assert float(((p - clean) / noise.std)[:, middle].std()) == pytest.approx(1, rel=0.1)
    without = sinogram_noise(p, photons=1e4)
    assert float(((p - clean) / without.std)[:, middle].std()) > 1.2


def test_a_constant_level():
    p = disc_sinogram()
    noise = sinogram_noise(p, noise_std=0.02)
    assert noise.photons == math.inf
    assert torch.equal(noise.std, torch.full_like(p, 0.02))


def test_data_in_units_of_their_own_have_one_level():
    clean = 500 * disc_sinogram()
    noisy = clean + 7 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    noise = sinogram_noise(noisy)
    assert noise.photons == math.inf
    assert float(noise.std.min()) == float(noise.std.max()) == pytest.approx(7, rel=0.15)
    with pytest.raises(ReconError, match="shows no noise: give its level"):
        sinogram_noise(torch.full((4, 40), 100.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"photons": 1e4, "noise_std": 0.1}, "either the number of photons or the noise level"),
        ({"photons": 0.0}, "photons must be a positive number, got 0.0"),
        ({"noise_std": math.nan}, "noise_std must be a positive number, got nan"),
    ],
)
def test_impossible_levels(arguments, message):
    with pytest.raises(ReconError, match=message):
        sinogram_noise(disc_sinogram(), **arguments)


def test_nothing_to_estimate_from():
    with pytest.raises(ReconError, match="sinogram shows no noise"):
        estimate_photons(torch.ones(4, 40))
    with pytest.raises(ReconError, match="of 10 detector elements cannot be estimated"):
        estimate_photons(torch.ones(4, 10))
