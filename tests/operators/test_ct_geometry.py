"""Scan geometries: what they say about rays, which views they keep, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from operators import (
    ConeBeam,
    FanBeam,
    OperatorError,
    ParallelBeam,
    equispaced_angles,
    limited_angle,
    sparse_view,
    view_indices,
)

FULL = equispaced_angles(8, 2 * math.pi)


def fan(angles=FULL, **options):
    return FanBeam(angles, 5, 2.0, 40, 100, **options)


def test_parallel_rays():
    geometry = ParallelBeam([0.3], 4, 2.0, 0.5)
    assert geometry.detector_positions.tolist() == [-2.5, -0.5, 1.5, 3.5]
    points, directions = geometry.rays(0, geometry.detector_positions)
    cosine, sine = math.cos(0.3), math.sin(0.3)
    np.testing.assert_allclose(points @ [cosine, sine], geometry.detector_positions)
    np.testing.assert_allclose(directions, np.tile([sine, -cosine], (4, 1)))
    assert geometry.fan_angle == 0
    assert geometry.short_scan_arc == math.pi


@pytest.mark.parametrize("detector", ["flat", "curved"])
def test_fan_rays_go_from_the_source_to_the_detector(detector):
    geometry = fan((0.3,), detector_offset=1.0, detector=detector)
    points, directions = geometry.rays(0, geometry.detector_positions)
    cosine, sine = math.cos(0.3), math.sin(0.3)
    np.testing.assert_allclose(points, np.tile([40 * sine, -40 * cosine], (5, 1)))
    u = np.array([-3.0, -1.0, 1.0, 3.0, 5.0])
    along, across = directions @ [-sine, cosine], directions @ [cosine, sine]
    if detector == "flat":
        np.testing.assert_allclose(across / along * 100, u)
    else:
        np.testing.assert_allclose(np.arctan2(across, along) * 100, u)


def test_fan_angle_and_short_scan():
    geometry = fan(detector="curved", detector_offset=1.0)
    assert geometry.fan_angle == pytest.approx(0.1)
    assert geometry.short_scan_arc == pytest.approx(math.pi + 0.12)
    assert fan().fan_angle == pytest.approx(2 * math.atan(0.05))
    assert geometry.magnification == 2.5


def test_angles_of_any_kind_become_a_tuple():
    assert ParallelBeam(np.array([0, 1]), 3, 1).angles == (0.0, 1.0)  # type: ignore[arg-type]
    assert equispaced_angles(4, start=1.0) == (1.0, 1 + math.pi / 4, 1 + math.pi / 2, 1 + 3 * math.pi / 4)


def test_subset_and_shapes():
    geometry = fan().subset([3, -1, 0])
    assert geometry.angles == (FULL[3], FULL[7], FULL[0])
    assert geometry.range_shape == (3, 5)
    assert geometry.source_origin == 40
    cone = ConeBeam(FULL, (6, 5), (1, 2), 40, 100)
    assert cone.subset([1]).range_shape == (6, 1, 5)


@pytest.mark.parametrize("indices", [[], [8], [0, -9]])
def test_subset_of_views_that_are_not_there(indices):
    with pytest.raises(OperatorError, match="8 views"):
        fan().subset(indices)


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        ([True, False] * 4, "True"),
        (np.arange(8) < 3, "True"),
        (torch.arange(8) < 3, "True"),
        ([1.7], "1.7"),
        (np.ones(1), "1.0"),
        (["1"], "'1'"),
    ],
)
def test_views_are_chosen_by_integers(indices, wrong):
    with pytest.raises(OperatorError, match=f"integer indices, got {wrong}: of a mask give np.flatnonzero"):
        fan().subset(indices)
    for kept in (np.flatnonzero(np.arange(8) < 2), torch.arange(2), range(2), np.array([0, 1], np.uint8)):
        assert fan().subset(kept).angles == FULL[:2]


def test_sparse_view_is_evenly_spread():
    geometry = ParallelBeam(equispaced_angles(180), 7, 1.0)
    assert sparse_view(geometry, 60) == ParallelBeam(geometry.angles[::3], 7, 1.0)
    assert view_indices(geometry, 7) == (0, 25, 51, 77, 102, 128, 154)
    assert sparse_view(geometry, 180) == geometry
    with pytest.raises(OperatorError, match="181 views are asked of a geometry that has 180"):
        sparse_view(geometry, 181)


@pytest.mark.parametrize("sign", [1, -1])
def test_limited_angle_includes_both_ends_and_passes_zero(sign):
    geometry = fan(tuple(sign * math.radians(10 * i) for i in range(36)))
    kept = limited_angle(geometry, math.radians(30), math.radians(350))
    degrees = sorted(round(math.degrees(angle)) % 360 for angle in kept.angles)
    assert degrees == [0, 10, 20, 350]


def test_views_evenly_spread_within_an_arc():
    geometry = fan(tuple(math.radians(10 * i) for i in range(36)))
    assert view_indices(geometry, 2, arc=math.radians(30), start=math.radians(100)) == (10, 12)


def test_an_arc_without_views():
    geometry = fan((0.0, 1.0))
    with pytest.raises(OperatorError, match=r"no view lies within 5\.7.* from 114"):
        limited_angle(geometry, 0.1, 2.0)
    with pytest.raises(OperatorError, match="an arc is in radians, at most 2π, got 90"):
        limited_angle(geometry, 90.0)


def test_field_of_view_is_tangent_to_the_outermost_rays():
    parallel = ParallelBeam((0.1,), 10, 2.0, 0.5)
    assert parallel.field_of_view == pytest.approx(2 * 10.5)
    for detector in ("flat", "curved"):
        geometry = FanBeam((0.3,), 11, 2.0, 40.0, 100.0, -1.5, detector)
        np.testing.assert_allclose(geometry.detector_edges, [-12.5, 9.5])
        points, directions = geometry.rays(0, geometry.detector_edges)
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        away = np.abs(points[:, 0] * directions[:, 1] - points[:, 1] * directions[:, 0])
        assert geometry.field_of_view == pytest.approx(2 * away.max())


def test_hash_tells_geometries_apart_in_every_process():
    geometry = fan((0.1,))
    others = [fan((0.2,)), fan((0.1,), detector_offset=0.1), fan((0.1,), detector="curved")]
    assert len({g.hash() for g in [geometry, *others, ParallelBeam((0.1,), 5, 2.0)]}) == 5
    # Recorded: caches of other processes, and of other days, are found by it.
    assert geometry.hash() == "7928cea890e697e1a61c267b3d2986871c3614ec9ff7729d96bc391aeb21feed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParallelBeam([], 5, 1.0), "ParallelBeam needs the angle of at least one view"),
        (lambda: ParallelBeam([0, 90, 180], 5, 1.0), "in radians, within two turns, and one is 180"),
        (lambda: ParallelBeam([0, math.nan], 5, 1.0), "angles of ParallelBeam have NaN"),
        (
            lambda: ParallelBeam(["a"], 5, 1.0),  # type: ignore[list-item]
            "angles of ParallelBeam are a sequence of numbers",
        ),
        (
            lambda: ParallelBeam(None, 5, 1.0),  # type: ignore[arg-type]
            "angles of ParallelBeam are a sequence of numbers",
        ),
        (lambda: ParallelBeam([0], 0, 1.0), "num_detectors of ParallelBeam is a positive integer, got 0"),
        (lambda: ParallelBeam([0], 5, 0.0), "detector_spacing of ParallelBeam is positive, got 0"),
        (lambda: ParallelBeam([0], 5, 1.0, math.inf), "detector_offset of ParallelBeam is a finite number"),
        (lambda: fan(detector="round"), "detector of FanBeam is 'flat' or 'curved', not 'round'"),
        (lambda: FanBeam([0], 5, 1.0, -1, 100), "source_origin of FanBeam is positive, got -1"),
        (lambda: FanBeam([0], 400, 1.0, 40, 100, detector="curved"), r"reaches 200 mm.* looks behind it"),
        (
            lambda: ConeBeam([0], (5,), (1, 1), 40, 100),  # type: ignore[arg-type]
            "detector_shape of ConeBeam is a pair",
        ),
        (lambda: ConeBeam([0], (5, 5), (1, 0), 40, 100), "detector_spacing of ConeBeam is positive"),
        (lambda: equispaced_angles(0), "num_views of equispaced_angles is a positive integer"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(OperatorError, match=message):
        make()
