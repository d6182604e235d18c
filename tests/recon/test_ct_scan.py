from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError
from recon.io.ct_scan import CTScan, angles_in_radians

SOURCE = Path("data/scan.h5")
GEOMETRY = ParallelBeam((0.0, 0.5, 1.0, 1.5), 5, 0.2)


def scan(**changes):
    line_integrals = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {
        "sinogram": line_integrals,
        "kind": "line_integrals",
        "source": SOURCE,
        "geometry": GEOMETRY,
        "slices": (3, 7),
    }
    return CTScan(**(given | changes))


def counted():
    p = scan().sinogram
    dark, gain = torch.full((2, 3, 5), 10.0), 1000 * torch.ones(2, 2, 5)
    return p, scan(sinogram=10 + 1000 * torch.exp(-p), kind="counts", flats=gain + 10, darks=dark)


def test_counts_become_line_integrals():
    p, counts = counted()
    result = counts.to_line_integrals()
    torch.testing.assert_close(result.sinogram, p, atol=1e-5, rtol=0)
    assert result.kind == "line_integrals"
    assert result.flats is result.darks is None
    assert result.metadata["values_below_floor"] == 0
    assert result.to_line_integrals() is result
    assert result.slices == (3, 7)


def test_starved_values_are_counted():
    _, counts = counted()
    values = counts.sinogram.clone()
    values[0, 1, :3] = 4.0
    result = replace(counts, sinogram=values).to_line_integrals(floor=1e-3)
    assert result.metadata["values_below_floor"] == 3
    assert float(result.sinogram.max()) == pytest.approx(math.log(1000))


def test_without_flats_the_photons_must_be_known():
    p, counts = counted()
    bare = replace(counts, flats=None)
    with pytest.raises(ReconError, match=r"scan\.h5: counts without flats"):
        bare.to_line_integrals()
    torch.testing.assert_close(bare.to_line_integrals(photons=1000.0).sinogram, p, atol=1e-5, rtol=0)
    for photons in (0.0, -5.0, math.nan, math.inf):
        with pytest.raises(ReconError, match=rf"incident beam must be a positive number, got {photons:g}"):
            bare.to_line_integrals(photons=photons)


def test_views_are_chosen_with_their_angles():
    part = scan().subset([3, 1])
    assert part.geometry.angles == (1.5, 0.5)
    assert torch.equal(part.sinogram, scan().sinogram[:, [3, 1]])
    for wrong in ([], [4], [-1], [True, False, True, False], [1.7]):
        with pytest.raises(ReconError, match="views from 0 to 3 can be chosen"):
            scan().subset(wrong)
    with pytest.raises(ReconError, match="no geometry"):
        scan(geometry=None).subset([0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sinogram": torch.ones(4, 5)}, r"\(slices, views, detectors\), got \(4, 5\)"),
        ({"sinogram": torch.ones(2, 0, 5)}, r"got \(2, 0, 5\)"),
        ({"sinogram": torch.ones(2, 3, 5)}, "there are 4 angles for 3 views"),
        ({"sinogram": torch.ones(2, 4, 6)}, "has 5 detector elements, but the sinogram 6"),
        ({"sinogram": torch.ones(2, 4, 5).double()}, r"sinogram must be float32, got torch\.float64"),
        ({"sinogram": torch.ones(2, 4, 5) / 0}, "the sinogram holds NaN"),
        ({"sinogram": -torch.ones(2, 4, 5), "kind": "counts"}, "the sinogram holds negative values"),
        ({"flats": torch.ones(2, 1, 4)}, r"flats must have shape \(2, n, 5\)"),
        ({"darks": torch.ones(1, 1, 5)}, r"darks must have shape \(2, n, 5\)"),
        ({"slices": (1,)}, "2 slices were read, but 1 are named"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ReconError, match=message) as error:
        scan(**changes)
    assert str(error.value).startswith(str(SOURCE))


def test_negative_line_integrals_are_noise():
    assert scan(sinogram=-torch.ones(2, 4, 5)).num_slices == 2


def test_degrees_and_radians():
    assert angles_in_radians(np.array([0, 90, 180]), "degrees", "x") == pytest.approx(
        (0, math.pi / 2, math.pi)
    )
    assert angles_in_radians(np.array([0.0, 1.0]), "radians", "x") == (0.0, 1.0)
    # Few views over a small arc are no mistake.
    assert len(angles_in_radians(np.array([0.0, 2.0, 4.0]), "degrees", "x")) == 3


def test_stages_count_on_from_scan_to_scan():
    turned = np.linspace(0, math.pi, 7) + 46 * 2 * math.pi
    angles = np.array(angles_in_radians(turned, "radians", "x"))
    assert np.abs(angles).max() <= 4 * math.pi
    np.testing.assert_allclose(np.exp(1j * angles), np.exp(1j * turned), atol=1e-12)
    np.testing.assert_allclose(np.diff(angles), np.diff(turned), atol=1e-12)
    two_turns = np.linspace(6.0, 6.0 + 4 * math.pi, 9) + 20 * math.pi
    assert max(angles_in_radians(two_turns, "radians", "x")) <= 4 * math.pi


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        (np.arange(0, 180.0), "radians", r"spans 179 radians, 28\.5 turns: these look like degrees"),
        (np.linspace(0, math.pi, 90), "degrees", r"90 angles that span 3\.142 degrees only.*radians"),
        (np.linspace(0, 2 * math.pi, 90), "degrees", "look like radians"),
        (np.array([]), "degrees", "holds no angles"),
        (np.array([0.0, np.nan]), "degrees", "NaN or infinite angles"),
        (np.array(["a"]), "degrees", "must be real numbers"),
        (np.arange(3.0), "grad", "degrees or radians, not 'grad'"),
    ],
)
def test_angles_that_cannot_be(values, unit, message):
    with pytest.raises(ReconError, match=message) as error:
        angles_in_radians(values, unit, "a.h5: angles")
    assert str(error.value).startswith("a.h5: angles")


def test_one_angle_for_each_view():
    with pytest.raises(ReconError, match="holds 3 angles for 4 views"):
        angles_in_radians(np.arange(3.0), "degrees", "a.h5: angles", expected=4)
