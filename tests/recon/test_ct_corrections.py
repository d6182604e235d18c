"""Corrections of a scan: each against a simulated defect and the truth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from operators.beam_hardening import BeamHardeningCorrection
from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from recon import ReconError
from recon.ct import CTSettings, reconstruct_sinogram
from recon.ct_corrections import CTCorrections, Room
from recon.io.beam_hardening import read_beam_hardening
from recon.io.ct_scan import CTScan
from recon.solvers import make_solver
from tests.operators.discs import disc_sinogram

MU = 0.02
DISCS = ((1.0, -0.5, 7.0, MU), (-2.0, 2.0, 2.0, 0.5 * MU))
GEOMETRY = ParallelBeam(equispaced_angles(60), 48, 0.5)
SHAPE, PIXEL = (40, 40), 0.5


def image(discs=DISCS, shape=SHAPE):
    y, x = (((n - 1) / 2 - torch.arange(n)) * PIXEL for n in shape)
    return sum(
        (mu * ((-x - x0) ** 2 + (y[:, None] - y0) ** 2 < r**2).float() for x0, y0, r, mu in discs),
        start=torch.zeros(shape),
    )


def scan(sinogram, geometry=GEOMETRY):
    return CTScan(sinogram.float()[None], "line_integrals", Path("scan.mat"), geometry)


def away_from_edges(truth):
    """Pixels whose 5 × 5 neighbours are alike: edges are blurred with and without a defect."""
    pool = torch.nn.functional.max_pool2d
    return (pool(truth[None], 5, 1, 2) + pool(-truth[None], 5, 1, 2))[0] < 1e-6


def error(sinogram, geometry=GEOMETRY, factor=1.0):
    """Root mean square error of filtered back-projection in units of water, away from edges."""
    operator = CTOperator(geometry, SHAPE, PIXEL, engine="on-the-fly")
    settings = CTSettings(noise_std=0.01)
    result = reconstruct_sinogram(
        sinogram, operator, None, make_solver("fbp", None, {"filter": "hann"}), settings
    )
    truth = image()
    difference = (result.mean / factor - truth)[away_from_edges(truth)]
    return float(difference.square().mean().sqrt()) / MU


def test_rings():
    clean = disc_sinogram(GEOMETRY, DISCS)
    gains = torch.zeros(48, dtype=torch.float64)
    gains[[14, 19, 30]] = torch.tensor([0.03, -0.04, 0.03], dtype=torch.float64)
    spoilt = scan(clean + gains)
    assert CTCorrections().apply(spoilt) is spoilt
    corrected = CTCorrections(rings=True).apply(spoilt)
    base, bad, good = (error(s) for s in (scan(clean).sinogram[0], spoilt.sinogram[0], corrected.sinogram[0]))
    assert bad > 2 * base, (base, bad, good)
    assert good < base + 0.75 * (bad - base), (base, bad, good)
    assert error(CTCorrections(rings=True).apply(scan(clean)).sinogram[0]) < 1.1 * base
    # Narrower detectors than the median is wide.
    narrow = scan(clean[:, 20:28], replace(GEOMETRY, num_detectors=8))
    assert CTCorrections(rings=True).apply(narrow).sinogram.shape == (1, 60, 8)


def test_beam_hardening(tmp_path):
    """Two energies: the correction fitted to water alone brings back the image of the mean one."""

    def measured(p):
        return -torch.log(0.5 * torch.exp(-1.5 * p) + 0.5 * torch.exp(-0.5 * p))

    lengths = torch.linspace(0, 1.2, 100, dtype=torch.float64)
    fitted = BeamHardeningCorrection.fit(measured(lengths), lengths, degree=3)
    path = tmp_path / "water.json"
    path.write_text(json.dumps({"coefficients": list(fitted.coefficients), "largest": fitted.largest}))
    assert read_beam_hardening(path) == fitted
    thick = tuple((x, y, r, 3 * mu) for x, y, r, mu in DISCS)
    clean = disc_sinogram(GEOMETRY, thick)
    corrections = CTCorrections(beam_hardening=read_beam_hardening(path))
    corrected = corrections.apply(scan(measured(clean))).sinogram[0]
    assert float((corrected - clean).abs().max()) < 0.01 * float(clean.max())
    good, bad = error(corrected, factor=3), error(measured(clean).float(), factor=3)
    assert good < 0.5 * bad, (bad, good)
    assert corrections.facts()["beam_hardening"]["largest"] == fitted.largest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.json: there is no such file"),
        ("{", r"a\.json cannot be read as JSON"),
        ("[1, 2]", r"a\.json: a beam-hardening correction is {'coefficients'"),
        ('{"coefficients": [1]}', "a beam-hardening correction is"),
        ('{"coefficients": ["a"], "largest": 2}', "must be numbers"),
        ('{"coefficients": 1, "largest": 2}', "must be numbers"),
        ('{"coefficients": [], "largest": 2}', r"a\.json: a beam-hardening correction needs finite"),
        ('{"coefficients": [1], "largest": -2}', "positive largest line integral"),
    ],
)
def test_files_that_are_no_correction(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(ReconError, match=message):
        read_beam_hardening(tmp_path / "a.json")


def corrections_for(offset: Any) -> CTCorrections:
    return CTCorrections(detector_offset=offset)


def test_centre_of_rotation():
    moved = replace(GEOMETRY, detector_offset=1.7)
    spoilt = scan(disc_sinogram(moved, DISCS))
    for told, offset, expected in (
        (True, None, 0.0),
        (False, None, 1.7),
        (True, "auto", 1.7),
        (False, 0.3, 0.3),
        (True, 0.3, 0.3),
    ):
        found = corrections_for(offset).centred(spoilt, GEOMETRY, told=told)
        assert found.detector_offset == pytest.approx(expected, abs=0.05)
    auto = CTCorrections(detector_offset="auto").centred(spoilt, GEOMETRY, told=True)
    assert error(spoilt.sinogram[0], auto) < 0.5 * error(spoilt.sinogram[0])


def test_a_centre_that_is_not_found():
    part = GEOMETRY.subset(range(20))
    spoilt = scan(disc_sinogram(part, DISCS), part)
    with pytest.raises(
        ReconError, match=r"scan\.mat: the centre of rotation is not found, give the detector"
    ):
        CTCorrections().centred(spoilt, part, told=False)
    for wrong in ("automatic", math.nan):
        with pytest.raises(ReconError, match="a number of mm or 'auto', not"):
            CTCorrections(detector_offset=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["parallel", "fan"])
@pytest.mark.parametrize("solver", ["fbp", "cgls"])
def test_room_for_a_truncated_object(kind, solver):
    """Within the field of view, the image with room beyond is nearer to the truth than the one without."""
    if kind == "parallel":
        geometry: ParallelBeam | FanBeam = ParallelBeam(equispaced_angles(60), 30, 0.5)
    else:
        geometry = FanBeam(equispaced_angles(60, 2 * math.pi), 30, 1.0, 40.0, 80.0)
    wide = ((0.5, 0.3, 9.0, MU), (-2.0, 2.0, 2.0, 0.5 * MU))
    shape = (30, 30)
    y = disc_sinogram(geometry, wide).float()
    truth = image(wide, shape)
    rows, columns = torch.meshgrid(*(torch.arange(30) - 14.5,) * 2, indexing="ij")
    inside = (torch.hypot(rows, columns) < 13) & away_from_edges(truth)
    made, errors = make_solver(solver), []
    for truncated in (False, True):
        room = Room.around(shape, geometry, truncated=truncated, continued=made.needs.direct)
        operator = CTOperator(room.geometry(geometry), room.shape, PIXEL, engine="on-the-fly")
        data = room.continued(y, geometry, MU)
        result = reconstruct_sinogram(data, operator, None, made, CTSettings(noise_std=0.01))
        found = room.cropped(result.mean)
        assert found.shape == shape
        errors.append(float((found - truth)[inside].square().mean().sqrt()) / MU)
    assert errors[1] < 0.7 * errors[0], errors


def test_room_is_a_quarter_on_either_side():
    room = Room.around((30, 40), GEOMETRY, truncated=True, continued=True)
    assert (room.shape, room.pad) == ((50, 60), 12)
    assert room.geometry(GEOMETRY).num_detectors == 72
    np.testing.assert_allclose(room.geometry(GEOMETRY).detector_positions[12:60], GEOMETRY.detector_positions)
    numbered = torch.arange(50 * 60).reshape(50, 60)
    assert torch.equal(room.cropped(numbered), numbered[10:40, 10:50])
    mirrored = room.continued(torch.ones(60, 48), GEOMETRY, None)
    assert mirrored.shape == (60, 72)
    none = Room.around((30, 40), GEOMETRY, truncated=False, continued=True)
    assert (none.shape, none.pad) == ((30, 40), 0)
    assert none.continued(torch.ones(60, 48), GEOMETRY, MU).shape == (60, 48)
