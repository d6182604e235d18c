"""Projections without a matrix: those of the matrix, and nothing stored."""

from __future__ import annotations

import math

import pytest
import torch

from operators import CTOperator, FanBeam, OperatorError, ParallelBeam, check_adjoint, equispaced_angles
from tests.operators.ct_phantoms import blob_image, blob_sinogram
from tests.operators.helper import relative_error

SHAPE, PIXEL = (13, 16), 1.5
GEOMETRIES: dict[str, ParallelBeam | FanBeam] = {
    "parallel": ParallelBeam(equispaced_angles(11), 23, 1.3, 0.4),
    "flat": FanBeam(equispaced_angles(13, 2 * math.pi), 31, 2.0, 40.0, 70.0, 0.7),
    "curved": FanBeam(equispaced_angles(13, 2 * math.pi), 31, 2.0, 40.0, 70.0, 0.7, "curved"),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@every_geometry
@pytest.mark.parametrize("projector", ["joseph", "line"])
@pytest.mark.parametrize("rays", [1, 3])
def test_the_same_as_the_matrix(geometry, projector, rays):
    options = {"projector": projector, "rays_per_detector": rays}
    A, B = (
        CTOperator(geometry, SHAPE, PIXEL, engine=engine, **options).to(torch.float64)
        for engine in ("matrix", "on-the-fly")
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    y = torch.randn(2, *geometry.range_shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(B(x), A(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.adjoint(y), A.adjoint(y), rtol=1e-12, atol=1e-12)


@every_geometry
def test_a_blob_in_single_precision(geometry):
    A = CTOperator(geometry, (48, 52), 0.5, engine="on-the-fly")
    truth = blob_sinogram(geometry, (2.3, -1.1), 3.0)
    assert relative_error(A(blob_image((48, 52), 0.5, (2.3, -1.1), 3.0).float()).double(), truth) < 0.003
    check_adjoint(A)


def test_no_memory_is_needed():
    A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, engine="on-the-fly", memory_limit=0)
    assert A.memory == 0
    assert A.matched_adjoint
    assert A.subset([1, 4])(torch.ones(SHAPE)).shape == (2, 31)
    with pytest.raises(OperatorError, match="has no matrix"):
        _ = A.matrix
    with pytest.raises(OperatorError, match="take engine='astra' or 'on-the-fly', which need none"):
        CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, engine="matrix", memory_limit=0)
