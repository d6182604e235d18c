"""Filtered backprojection of objects whose sinograms are known, and against skimage."""

import math
from dataclasses import replace

import pytest
import torch

from operators import CTOperator, FanBeam, OperatorError, ParallelBeam, equispaced_angles, fbp
from operators.filtered_backprojection import FILTERS, _ray_weights
from tests.operators.ct_phantoms import blob_image, blob_sinogram, disc_sinogram, radii
from tests.operators.helper import random_complex, relative_error

TURN = 2 * math.pi
SHAPE, PIXEL, MU = (64, 56), 1.2, 0.02
CENTRE, RADIUS = (5.0, -7.0), 16.0


def parallel(arc, views=120, offset=0.0, start=0.0):
    return ParallelBeam(equispaced_angles(views, arc, start), 101, 1.0, offset)


def fan(arc, views=180, offset=0.0, start=0.0, detector="flat"):
    return FanBeam(equispaced_angles(views, arc, start), 101, 1.7, 180, 310, offset, detector)


def thrice(geometry):
    return replace(geometry, angles=tuple(angle for angle in geometry.angles for _ in range(3)))


def half_detector(geometry, sign=1):
    """One side of the detector reaches the edge of the object, the other only 12 of its 25 mm."""
    offset = sign * 21.3 * geometry.detector_spacing
    return replace(geometry, num_detectors=66, detector_offset=offset)


def reconstruct(geometry, **options):
    A = CTOperator(geometry, SHAPE, PIXEL)
    return fbp(A, MU * disc_sinogram(geometry, CENTRE, RADIUS), **options)


INSIDE = radii(SHAPE, PIXEL, CENTRE) < RADIUS - 3
OUTSIDE = (radii(SHAPE, PIXEL, CENTRE) > RADIUS + 4) & (radii(SHAPE, PIXEL, (0, 0)) < 40)

COMPLETE = {
    "half a turn": parallel(math.pi),
    "backwards": parallel(-math.pi, start=0.3),
    "a whole turn": parallel(TURN, 240),
    "three quarters of a turn": parallel(1.5 * math.pi, 180),
    "a turn and a half": parallel(3 * math.pi, 360),
    "two turns": parallel(4 * math.pi, 480),
    "each view three times": thrice(parallel(math.pi)),
    "each view of a fan three times": thrice(fan(TURN)),
    "each view of a short scan three times": thrice(fan(1.02 * fan(TURN).short_scan_arc)),
    "detector off centre": parallel(math.pi, offset=3.3),
    "fan": fan(TURN),
    "fan off centre": fan(TURN, offset=-4.1),
    "curved fan": fan(TURN, detector="curved"),
    "curved fan off centre": fan(TURN, offset=-4.1, detector="curved"),
    "short scan": fan(1.02 * fan(TURN).short_scan_arc, start=0.4),
    "short scan, backwards": fan(-1.02 * fan(TURN).short_scan_arc, start=0.4),
    "curved short scan": fan(1.02 * fan(TURN).short_scan_arc, start=5.0, detector="curved"),
    "more than a short scan": fan(math.radians(300)),
    "half a detector": half_detector(parallel(TURN, 360)),
    "half a detector, the other side": half_detector(parallel(TURN, 360), -1),
    "half a detector, a turn and a half": half_detector(parallel(3 * math.pi, 540)),
    "half a detector, fan": half_detector(fan(TURN, 360)),
    "half a detector, fan, the other side": half_detector(fan(TURN, 360), -1),
    "half a detector, curved fan": half_detector(fan(TURN, 360, detector="curved")),
}


@pytest.mark.parametrize("geometry", COMPLETE.values(), ids=COMPLETE)
def test_a_disc_has_its_attenuation(geometry):
    image = reconstruct(geometry)
    assert image[INSIDE].mean() == pytest.approx(MU, rel=1e-3)
    assert (image[INSIDE] - MU).abs().max() < 0.01 * MU
    assert image[OUTSIDE].mean().abs() < 2e-3 * MU
    assert image[OUTSIDE].abs().max() < 0.1 * MU


@pytest.mark.parametrize("geometry", COMPLETE.values(), ids=COMPLETE)
def test_a_blob_is_where_it_is(geometry):
    A = CTOperator(geometry, SHAPE, PIXEL)
    image = fbp(A, blob_sinogram(geometry, CENTRE, 6.0))
    assert relative_error(image, blob_image(SHAPE, PIXEL, CENTRE, 6.0)) < 0.01


def test_views_taken_twice_count_once():
    geometry = fan(TURN)
    again = FanBeam((*geometry.angles, *geometry.angles[:40]), 101, 1.7, 180, 310)
    assert relative_error(reconstruct(again), reconstruct(geometry)) < 1e-9


@pytest.mark.parametrize("turn", [parallel(TURN, 360), fan(TURN, 360), fan(TURN, 360, detector="curved")])
@pytest.mark.parametrize(("detectors", "elements"), [(60, 18.0), (48, -20.0), (56, 3.0)])
def test_half_a_detector_shows_a_disc_about_the_axis_at_all_radii(turn, detectors, elements):
    geometry = replace(turn, num_detectors=detectors, detector_offset=elements * turn.detector_spacing)
    A = CTOperator(geometry, (64, 64), 1.0)
    image = fbp(A, MU * disc_sinogram(geometry, (0.0, 0.0), 27.0))
    distance = radii((64, 64), 1.0, (0.0, 0.0))
    for radius in (1, 5, 10, 15, 20):
        ring = image[(distance - radius).abs() < 1]
        assert ring.mean() == pytest.approx(MU, rel=5e-3)
        assert (ring - MU).abs().max() < 0.01 * MU


def test_small_offsets_change_little():
    noise = torch.randn(240, 101, generator=torch.Generator().manual_seed(0))
    level = {}
    for offset in (0.0, 1.0, 3.3):
        geometry = parallel(TURN, 240, offset)
        level[offset] = float(fbp(CTOperator(geometry, SHAPE, PIXEL), noise).std())
    # Opposed rays count equally, but for those whose opposite is hardly on the detector.
    assert level[3.3] == pytest.approx(level[0.0], rel=0.05)
    # Up to an element, they all do.
    for geometry in (fan(TURN, offset=1.7), fan(TURN, offset=-1.7, detector="curved")):
        gamma = torch.from_numpy(geometry.ray_angles(geometry.detector_positions))
        weights = torch.from_numpy(_ray_weights(geometry))
        torch.testing.assert_close(weights, (math.pi / 180 * gamma.cos()).expand(180, 101))


def test_half_a_detector_over_less_than_a_turn_counts_as_before():
    geometry = half_detector(parallel(math.pi))
    assert _ray_weights(geometry) == pytest.approx(math.pi / 120)


def test_opposed_rays_of_half_a_detector_count_one_together():
    geometry = replace(half_detector(parallel(TURN, 360)), detector_offset=-21.5)
    shares = _ray_weights(geometry)[0] / math.radians(1)
    # Elements are at ..., 11, and the opposites of the last 23 of them among these.
    assert shares[-23:] + shares[-23:][::-1] == pytest.approx(1)
    assert shares[:-23] == pytest.approx(1)
    # Beyond the axis altogether, every ray is measured once.
    assert _ray_weights(replace(geometry, detector_offset=40.0)) == pytest.approx(math.radians(1))


def test_two_arcs_do_not_reach_over_what_is_between():
    middle = radii(SHAPE, PIXEL, CENTRE) < 2
    degrees = [*range(60), *range(90, 150)]
    image = reconstruct(ParallelBeam([math.radians(angle) for angle in degrees], 101, 1.0))
    assert image[middle].mean() == pytest.approx(MU * 120 / 180, rel=0.01)


def test_views_that_are_not_equally_spaced():
    golden = [math.pi * ((i * 0.6180339887) % 1) for i in range(233)]
    image = reconstruct(ParallelBeam(golden, 101, 1.0))
    assert image[INSIDE].mean() == pytest.approx(MU, rel=2e-3)
    assert (image[INSIDE] - MU).abs().max() < 0.015 * MU


def test_a_limited_arc_keeps_what_it_saw():
    # Each view adds its share to the middle of a disc, and nothing makes up for the others.
    middle = radii(SHAPE, PIXEL, CENTRE) < 2
    for arc in (150, 120, 60):
        image = reconstruct(parallel(math.radians(arc), views=arc))
        assert image[middle].mean() == pytest.approx(MU * arc / 180, rel=0.01)
    for detector in ("flat", "curved"):
        image = reconstruct(fan(math.radians(90), views=90, detector=detector))
        assert image[middle].mean() == pytest.approx(MU / 2, rel=0.1)


def test_one_view_is_smeared_over_its_rays():
    geometry = ParallelBeam([0.0], 101, 1.0)
    image = fbp(CTOperator(geometry, SHAPE, PIXEL), blob_sinogram(geometry, CENTRE, 6.0))
    torch.testing.assert_close(image, image[:1].expand(SHAPE))


def test_there_is_no_bias_of_the_mean():
    # The integral of the image is that of each view; a ramp sampled in frequency would lose it.
    geometry = ParallelBeam(equispaced_angles(60), 101, 1.0)
    A = CTOperator(geometry, (90, 90), 1.0)
    sinogram = blob_sinogram(geometry, (0.0, 0.0), 5.0)
    assert float(fbp(A, sinogram).sum()) == pytest.approx(float(sinogram[0].sum()), rel=0.01)


@pytest.mark.parametrize("filter", FILTERS)
def test_against_skimage(filter):
    from skimage.transform import iradon

    # An odd size: skimage turns about pixel N // 2, which of an even one is not the middle.
    geometry = ParallelBeam(equispaced_angles(60), 65, 1.0)
    sinogram = blob_sinogram(geometry, (6.0, -9.0), 3.0)
    ours = fbp(CTOperator(geometry, (65, 65), 1.0), sinogram, filter)
    theirs = iradon(
        sinogram.T.numpy(),
        theta=[math.degrees(angle) for angle in geometry.angles],
        filter_name="ramp" if filter == "ram-lak" else filter,
    )
    within = radii((65, 65), 1.0, (0, 0)) < 30
    assert relative_error(ours[within], torch.from_numpy(theirs)[within]) < 0.01


def test_filters_from_sharp_to_smooth():
    noise = torch.randn(120, 101, generator=torch.Generator().manual_seed(0))
    A = CTOperator(parallel(math.pi), SHAPE, PIXEL)
    levels = [float(fbp(A, noise, filter).std()) for filter in FILTERS]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == len(FILTERS)
    assert float(fbp(A, noise, cutoff=0.5).std()) < 0.5 * levels[0]


def test_linear_differentiable_batched_and_complex():
    A = CTOperator(fan(TURN, views=9), (6, 5), 8.0)
    A.to(torch.float64)
    y = random_complex(2, *A.range_shape, dtype=torch.complex128)
    x = fbp(A, y)
    assert x.shape == (2, 6, 5)
    torch.testing.assert_close(x.real[1], fbp(A, y.real[1]))
    torch.testing.assert_close(x.imag[0], fbp(A, y.imag[0]))
    torch.testing.assert_close(A.direct_inverse(y, "hann"), fbp(A, y, "hann"))
    assert fbp(A, y.real.float()).dtype == torch.float32
    small = CTOperator(FanBeam((0.1, 2.0), 3, 2.0, 30, 50), (2, 2), 1.0)
    z = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fbp(small, z), z)


def test_a_detector_of_one_element():
    A = CTOperator(ParallelBeam(equispaced_angles(4), 1, 9.0), (3, 3), 1.0)
    image = fbp(A, torch.ones(4, 1))
    # A quarter of the ramp at 0, times π; the middle of the element is in the middle of the image.
    assert float(image[1, 1]) == pytest.approx(math.pi / 4 / 9)


@pytest.mark.parametrize(
    ("sinogram", "options", "message"),
    [
        (torch.zeros(120, 100), {}, r"sinogram of shape \(..., 120, 101\), got \(120, 100\)"),
        (torch.zeros(101), {}, r"sinogram of shape \(..., 120, 101\), got \(101,\)"),
        (torch.zeros(120, 101, dtype=torch.int32), {}, "floating-point sinogram, got torch.int32"),
        (torch.zeros(120, 101), {"filter": "ramp"}, "ram-lak, shepp-logan, .* not 'ramp'"),
        (torch.zeros(120, 101), {"cutoff": 0.0}, "cutoff of fbp is in"),
        (torch.zeros(120, 101), {"cutoff": 1.5}, "cutoff of fbp is in"),
    ],
)
def test_bad_input_is_named(sinogram, options, message):
    with pytest.raises(OperatorError, match=message):
        fbp(CTOperator(parallel(math.pi), SHAPE, PIXEL), sinogram, **options)
