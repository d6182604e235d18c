"""Stacks of slices, and thick slices as means of thin ones."""

import pytest
import torch

from operators import (
    CTOperator,
    MulticoilMRI,
    OperatorError,
    ParallelBeam,
    SliceStack,
    ThroughPlaneAverage,
    Weighting,
    equispaced_angles,
)
from tests.operators.helper import random_complex

A = CTOperator(ParallelBeam(equispaced_angles(6), 15, 1.0), (8, 9), 1.0)


def random_volume(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_a_stack_projects_each_slice():
    stack, volume = SliceStack(A, 4), random_volume(2, 4, 8, 9)
    assert stack.range_shape == (4, 6, 15)
    y = stack(volume)
    torch.testing.assert_close(y[1, 2], A(volume[1, 2]))
    torch.testing.assert_close(stack.adjoint(y)[0, 3], A.adjoint(y[0, 3]))
    torch.testing.assert_close(stack.direct_inverse(y)[0, 1], A.direct_inverse(y[0, 1]))


def test_a_stack_says_whether_its_adjoint_is_matched():
    stack = SliceStack(A, 2)
    assert stack.matched_adjoint
    unmatched = CTOperator(A.geometry, (8, 9), 1.0)
    unmatched.matched_adjoint = False
    assert not SliceStack(unmatched, 2).matched_adjoint


def test_a_box_is_the_mean_of_its_slices():
    volume = random_volume(6, 3, 2)
    thick = ThroughPlaneAverage((6, 3, 2), 3)
    torch.testing.assert_close(thick(volume), volume.reshape(2, 3, 3, 2).mean(1))
    torch.testing.assert_close(thick(torch.ones(6, 3, 2)), torch.ones(2, 3, 2))


@pytest.mark.parametrize(("thickness", "step"), [(4, 2), (2, 3), (1, 7), (8, 1), (2, 1)])
def test_any_thickness_step_and_profile(thickness, step):
    weights = torch.arange(1.0, thickness + 1)
    thick = ThroughPlaneAverage((8, 1, 1), thickness, step=step, profile=weights)
    volume = random_volume(8, 1, 1)
    count = (8 - thickness) // step + 1
    expected = [
        (volume[n * step : n * step + thickness, 0, 0] * weights).sum() / weights.sum() for n in range(count)
    ]
    torch.testing.assert_close(thick(volume)[:, 0, 0], torch.stack(expected))


def test_projection_and_averaging_commute():
    thick = ThroughPlaneAverage((6, 8, 9), 3)
    volume = random_volume(6, 8, 9)
    sinograms = SliceStack(A, 6)(volume).reshape(2, 3, 6, 15).mean(1)
    torch.testing.assert_close((SliceStack(A, 2) @ thick)(volume), sinograms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SliceStack(A, 0), "num_slices of SliceStack is positive, got 0"),
        (
            lambda: SliceStack(MulticoilMRI(random_complex(2, 3, 4, 4), torch.ones(4)), 2),
            r"MulticoilMRI has batch dimensions \(2,\)",
        ),
        (lambda: ThroughPlaneAverage((6, 3), 2), r"needs a volume \(D, H, W\)"),
        (lambda: ThroughPlaneAverage((6, 3, 3), 0), "positive, got 0 and 0"),
        (lambda: ThroughPlaneAverage((7, 3, 3), 2), "7 slices are no whole number of slices of thickness 2"),
        (lambda: ThroughPlaneAverage((2, 3, 3), 3), "2 slices are no whole number of slices of thickness 3"),
        (lambda: ThroughPlaneAverage((6, 3, 3), 2, profile=[1]), "profile of ThroughPlaneAverage has 2"),
        (lambda: ThroughPlaneAverage((6, 3, 3), 2, profile=[0, 0]), "profile of ThroughPlaneAverage has 2"),
        (lambda: ThroughPlaneAverage((6, 3, 3), 2, profile=[2, -1]), "profile of ThroughPlaneAverage has 2"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(OperatorError, match=message):
        make()


def test_the_operator_of_a_slice():
    stack, volume = 0.5 * SliceStack(A, 4), random_volume(4, 8, 9)
    weights = 0.5 + torch.rand(stack.range_shape, generator=torch.Generator().manual_seed(1))
    weighted = Weighting(weights) @ stack
    for k in range(4):
        torch.testing.assert_close(weighted.of_slice(k)(volume[k]), weighted(volume)[k])
    for index in (-1, 4):
        with pytest.raises(OperatorError, match=f"SliceStack has 4 slices, there is no slice {index}."):
            stack.of_slice(index)
        with pytest.raises(OperatorError, match=f"Weighting has 4 slices, there is no slice {index}."):
            Weighting(weights).of_slice(index)
    thick = SliceStack(A, 2) @ ThroughPlaneAverage((4, 8, 9), 2)
    with pytest.raises(OperatorError, match="ThroughPlaneAverage has no operator of a single slice"):
        thick.of_slice(0)


def test_a_stack_has_the_data_type_of_what_it_stacks():
    """Not that of its first buffer, which here are real weights before a complex operator."""
    mask = torch.ones(8, 8)
    maps = torch.ones(2, 8, 8, dtype=torch.complex64) / 2**0.5
    stack = SliceStack(Weighting(torch.ones(2, 8, 8)) @ MulticoilMRI(maps, mask), 3)
    assert stack.dtype == torch.complex64
    assert stack.norm() == pytest.approx(1.0, rel=1e-4)
