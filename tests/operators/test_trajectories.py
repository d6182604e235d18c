"""Trajectories against their closed forms, density weights against areas and integrals."""

import math

import pytest
import torch

from operators import OperatorError
from operators.trajectories import (
    GOLDEN_ANGLE,
    radial,
    radial_acceleration,
    radial_density,
    spiral,
    spiral_acceleration,
)


@pytest.mark.parametrize("readout", [8, 9])
@pytest.mark.parametrize("golden", [True, False])
def test_spokes_are_straight_and_pass_through_the_centre(readout, golden):
    k = radial(5, readout, golden_angle=golden).reshape(5, readout, 2)
    assert k.dtype == torch.float64
    assert (k[:, readout // 2] == 0).all()
    expected = (torch.arange(readout) - readout // 2) * (2 * math.pi / readout)
    step = GOLDEN_ANGLE if golden else math.pi / 5
    for spoke in range(5):
        rows = expected * math.sin(spoke * step)
        columns = expected * math.cos(spoke * step)
        torch.testing.assert_close(k[spoke], torch.stack([rows, columns], -1).double())
    assert k.abs().max() <= math.pi


def test_the_first_spoke_is_a_row_of_the_cartesian_grid():
    k = radial(1, 6)
    torch.testing.assert_close(k[:, 1], (torch.arange(6).double() - 3) * math.pi / 3)
    assert (k[:, 0] == 0).all()


def test_golden_angle_is_the_golden_ratio_of_half_a_turn():
    ratio = (1 + math.sqrt(5)) / 2
    assert pytest.approx(math.pi / ratio) == GOLDEN_ANGLE
    assert math.degrees(GOLDEN_ANGLE) == pytest.approx(111.246, abs=1e-3)


@pytest.mark.parametrize("golden", [True, False])
@pytest.mark.parametrize("spokes", [1, 7, 64])
def test_radial_areas_fill_the_disc(spokes, golden):
    # An odd readout reaches half a step short of π on either side, so the rings end at π exactly.
    shape, readout = (30, 20), 41
    area = radial_density(spokes, readout, shape, golden_angle=golden)
    disc = math.pi * math.pi**2 / ((2 * math.pi / 30) * (2 * math.pi / 20))
    assert float(area.sum()) == pytest.approx(disc)
    assert (area > 0).all()


def test_radial_areas_of_equal_angles_are_pieces_of_rings():
    spokes, readout, shape = 6, 16, (16, 16)
    area = radial_density(spokes, readout, shape, golden_angle=False).reshape(spokes, readout)
    # In cells: rings of a cell's thickness, in 2 S pieces, and the disc of half a cell's radius in S.
    ring = 2 * math.pi * (torch.arange(16).double() - 8).abs() / (2 * spokes)
    ring[8] = math.pi * 0.25 / spokes
    torch.testing.assert_close(area, ring.expand(spokes, readout))


def test_radial_areas_integrate():
    """As weights of a sum over the samples, they give the integral of a Gaussian over k-space."""
    shape, width = (32, 24), 0.6
    k = radial(89, 128)
    weight = radial_density(89, 128, shape)
    total = float((weight * torch.exp(-k.square().sum(-1) / (2 * width**2))).sum())
    cell = (2 * math.pi / shape[0]) * (2 * math.pi / shape[1])
    assert total == pytest.approx(2 * math.pi * width**2 / cell, rel=1e-3)


def test_gap_of_adjacent_spokes_is_the_acceleration():
    spokes, n = 20, 64
    k = radial(spokes, n, golden_angle=False).reshape(spokes, n, 2)
    gap = float((k[0, 0] - k[1, 0]).norm()) / (2 * math.pi / n)
    assert radial_acceleration(spokes, (n, n)) == pytest.approx(gap, rel=2e-3)
    assert radial_acceleration(64, (320, 256)) == pytest.approx(math.pi / 2 * 320 / 64)


@pytest.mark.parametrize("density", [1.0, 1.7])
def test_spirals_wind_from_the_centre_to_the_edge(density):
    interleaves, samples, turns = 3, 400, 5
    k = spiral(interleaves, samples, turns, density=density).reshape(interleaves, samples, 2)
    t = torch.linspace(0, 1, samples, dtype=torch.float64)
    torch.testing.assert_close(k.norm(dim=-1), (math.pi * t**density).expand(interleaves, -1))
    z = torch.complex(k[..., 1], k[..., 0])
    steps = (z[:, 2:] / z[:, 1:-1]).angle()
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * math.pi * turns / (samples - 1)))
    # The second interleave is the first one turned by a third of a circle.
    third = torch.polar(torch.tensor(1.0), torch.tensor(2 * math.pi / 3)).to(z.dtype)
    torch.testing.assert_close(z[1], z[0] * third, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [1.0, 1.5])
def test_distance_of_adjacent_turns_is_the_acceleration(density):
    interleaves, turns, n = 4, 12, 96
    per_turn = 360
    k = spiral(interleaves, per_turn * turns + 1, turns, density=density).reshape(interleaves, -1, 2)
    radius = k.norm(dim=-1)
    # Along one direction the interleaves follow each other by a quarter of a turn.
    gap = float(radius[0, -1] - radius[0, -1 - per_turn // interleaves]) / (2 * math.pi / n)
    assert spiral_acceleration(interleaves, turns, (n, n // 2), density=density) == pytest.approx(
        gap, rel=0.02
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: radial(0, 8), "num_spokes"),
        (lambda: radial(3, 1), "num_readout"),
        (lambda: radial_density(3, 8, (0, 8)), r"\(H, W\)"),
        (lambda: radial_density(0, 8, (8, 8)), "num_spokes"),
        (lambda: radial_acceleration(3, (-8, 8)), r"\(H, W\)"),
        (lambda: spiral(0, 8, 2), "num_interleaves"),
        (lambda: spiral(2, 1, 2), "num_samples"),
        (lambda: spiral(2, 8, 0), "num_turns"),
        (lambda: spiral(2, 8, float("nan")), "num_turns"),
        (lambda: spiral(2, 8, 2, density=-1), "density"),
        (lambda: spiral_acceleration(2, -1, (8, 8)), "num_turns"),
        (lambda: spiral_acceleration(2, 1, (8, 0)), r"\(H, W\)"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(OperatorError, match=message):
        call()
