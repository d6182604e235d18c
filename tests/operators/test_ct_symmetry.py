"""Views that follow from others, against the matrix of all views, which knows nothing of symmetry."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operators import CTOperator, FanBeam, ParallelBeam, check_adjoint, equispaced_angles
from operators.ct_matrix import MatrixRecipe
from operators.ct_symmetry import Motion, view_groups
from tests.operators.helper import random_complex, relative_error

TURN = 2 * math.pi
# No ray runs along the border of two pixels, where rounding decides which of them it belongs to.
SPACING = 0.83
SCANS: dict[str, Callable[..., ParallelBeam | FanBeam]] = {
    "parallel": lambda angles, offset=0.0: ParallelBeam(angles, 14, SPACING, offset),
    "flat": lambda angles, offset=0.0: FanBeam(angles, 14, 1.7 * SPACING, 22, 37, offset, "flat"),
    "curved": lambda angles, offset=0.0: FanBeam(angles, 14, 1.7 * SPACING, 22, 37, offset, "curved"),
}
every_scan = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
MOTIONS = [Motion(mirrored, quarters) for mirrored in (False, True) for quarters in range(4)]


def double(*arguments, **options):
    return CTOperator(*arguments, **options).to(torch.float64)


def dense(A):
    """Matrix of all views in double precision, made of the rays of each."""
    recipe = MatrixRecipe(A.geometry, A.image_shape, A.pixel_size, A.projector, A.rays_per_detector)
    return recipe.build(torch.float64).forward @ torch.eye(recipe.shape[1], dtype=torch.float64)


def columns(A):
    """Matrix that the operator acts as."""
    pixels = math.prod(A.image_shape)
    return A(torch.eye(pixels, dtype=A.dtype).reshape(pixels, *A.image_shape)).reshape(pixels, -1).T


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_move_what_they_say(motion):
    # An image of a function of x and y, at the moved coordinates.
    y, x = (2 - torch.arange(5.0))[:, None], (torch.arange(5.0) - 2)[None]
    moved_x, moved_y = (x, -y) if motion.mirrored else (x, y)
    for _ in range(motion.quarters):
        moved_x, moved_y = -moved_y, moved_x
    image = x + 10 * y
    torch.testing.assert_close(motion.moved(image), moved_x + 10 * moved_y)
    torch.testing.assert_close(motion.undone(motion.moved(image)), image)


@st.composite
def operators(draw):
    angles = []
    for base in draw(st.lists(st.floats(-TURN, TURN), min_size=1, max_size=4)):
        signs = draw(st.lists(st.tuples(st.sampled_from([-1, 1]), st.integers(-2, 2)), max_size=5))
        angles += [base] + [sign * base + quarters * math.pi / 2 for sign, quarters in signs]
    geometry = draw(st.sampled_from(list(SCANS.values())))(
        draw(st.permutations(angles)), draw(st.sampled_from([0.0, 0.17]))
    )
    shape = draw(st.sampled_from([(8, 8), (9, 9), (8, 11), (7, 6), (1, 1)]))
    return double(
        geometry,
        shape,
        1.0,
        projector=draw(st.sampled_from(["joseph", "line"])),
        rays_per_detector=draw(st.integers(1, 2)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(A=operators())
def test_equals_the_matrix_of_all_views(A):
    truth = dense(A)
    # As close as angles must be to be taken for equal.
    torch.testing.assert_close(columns(A), truth, rtol=0, atol=3e-8)
    y = torch.rand(A.range_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (truth.T @ y.reshape(-1)).reshape(A.image_shape)
    torch.testing.assert_close(A.adjoint(y), expected, rtol=0, atol=3e-7)
    assert check_adjoint(A) <= 1e-10


@pytest.mark.parametrize(
    ("scan", "offset", "views", "arc", "shape", "stored", "images"),
    [
        ("parallel", 0.0, 12, math.pi, (8, 8), 4, 4),  # 0, 15, 30 and 45 degrees
        ("parallel", 0.3, 12, math.pi, (8, 8), 4, 4),
        ("parallel", 0.3, 12, math.pi, (8, 7), 7, 2),  # 0 to 90 degrees
        ("parallel", 0.0, 24, TURN, (8, 8), 4, 8),
        ("parallel", 0.0, 7, math.pi / 2 - 0.1, (8, 8), 7, 1),
        ("flat", 0.0, 16, TURN, (8, 8), 3, 8),
        ("curved", 0.0, 16, TURN, (8, 8), 3, 8),
        ("flat", 0.3, 16, TURN, (8, 8), 4, 4),
        ("curved", 0.3, 16, TURN, (8, 7), 8, 2),
        ("flat", 0.3, 15, TURN, (8, 8), 15, 1),
    ],
)
def test_how_many_views_are_stored(scan, offset, views, arc, shape, stored, images):
    geometry = SCANS[scan](equispaced_angles(views, arc), offset)
    groups = view_groups(geometry, shape)
    assert (len(groups.stored), len(groups.motions)) == (stored, images)
    A = double(geometry, shape, 1.0)
    estimate = A.memory
    assert A.matrix.forward.shape == (stored * 14, math.prod(shape))
    assert A.matrix.nbytes <= estimate + 8 * (stored * 14 + math.prod(shape) + 2)
    assert relative_error(columns(A), dense(A)) < 1e-13


@every_scan
def test_no_two_views_at_the_same_place(scan):
    geometry = scan([*equispaced_angles(8, TURN), *equispaced_angles(8, TURN), 0.3, 0.3, -0.3])
    groups = view_groups(geometry, (6, 6))
    assert len({(place.stored, place.image) for place in groups.places}) == 19
    A = double(geometry, (6, 6), 1.0)
    torch.testing.assert_close(columns(A), dense(A))


@every_scan
def test_the_order_of_views_does_not_matter(scan):
    angles = np.array(equispaced_angles(24, TURN, 0.1)) % TURN
    counts = {
        len(view_groups(scan(order.tolist(), 0.3), (8, 8)).stored)
        for order in (angles, angles[::-1], np.random.default_rng(0).permutation(angles) - TURN)
    }
    assert counts == {6}


def test_only_equal_angles_are_taken_for_equal():
    angles = np.array(equispaced_angles(12, math.pi, 0.05))
    shifts = np.random.default_rng(0).uniform(-1, 1, 12)
    assert len(view_groups(SCANS["parallel"](angles + 1e-7 * shifts), (8, 8)).stored) == 12
    A = double(SCANS["parallel"](angles + 3e-10 * shifts), (8, 8), 1.0)
    assert len(A.matrix.forward.starts) == 6 * 14 + 1
    assert relative_error(columns(A), dense(A)) < 1e-8


@every_scan
def test_gradients_single_precision_and_large_batches(scan):
    A = CTOperator(scan(equispaced_angles(8, TURN)), (9, 9), 1.0)
    x = random_complex(11, *A.domain_shape)
    expected = (x.reshape(11, -1) @ dense(A).T.to(x)).reshape(11, *A.range_shape)
    torch.testing.assert_close(A(x), expected, rtol=1e-5, atol=1e-5)
    assert check_adjoint(A, batch=(11,)) <= 1e-5
    x = torch.rand(A.domain_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.rand(A.range_shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad((A(x) * y).sum(), x)[0], A.adjoint(y))
    torch.testing.assert_close(torch.autograd.grad((A.adjoint(y) * x).sum(), y)[0], A(x))


@every_scan
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_subsets_of_a_made_matrix(scan, offset, monkeypatch):
    A = double(scan(equispaced_angles(12, TURN), offset), (9, 9), 1.0, rays_per_detector=2)
    truth = dense(A).reshape(12, 14, -1)
    _ = A.matrix
    monkeypatch.setattr(MatrixRecipe, "_build", None)
    for kept in ([5], [11, 2, 5, 8], [10, 3, 3, 0, 7, 1]):
        part = A.subset(kept)
        torch.testing.assert_close(columns(part), truth[kept].flatten(0, 1))
        # And of a subset.
        torch.testing.assert_close(columns(part.subset([-1, 0])), truth[[kept[-1], kept[0]]].flatten(0, 1))


def test_scans_with_the_same_stored_views_share_a_file(tmp_path, monkeypatch):
    eighth = ParallelBeam([i * math.pi / 12 for i in range(4)], 14, SPACING)
    first = double(eighth, (8, 8), 1.0, cache=tmp_path)
    y = columns(first)
    full = double(replace(eighth, angles=equispaced_angles(12)), (8, 8), 1.0, cache=tmp_path)
    truth = dense(full)
    monkeypatch.setattr(MatrixRecipe, "_build", None)
    torch.testing.assert_close(columns(full), truth)
    torch.testing.assert_close(columns(full)[: 4 * 14], y)
    assert len(list(tmp_path.iterdir())) == 1


def test_copies():
    A = double(SCANS["flat"](equispaced_angles(8, TURN)), (8, 8), 1.0)
    torch.testing.assert_close(columns(copy.deepcopy(A)), columns(A))
