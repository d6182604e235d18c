"""Our projections against ASTRA's, and ASTRA as an engine."""

import importlib.util
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import operators.ct
import operators.ct_astra
from operators import (
    ConeBeam,
    ConeBeamOperator,
    CTOperator,
    FanBeam,
    OperatorError,
    ParallelBeam,
    check_adjoint,
    equispaced_angles,
)
from operators.ct_astra import _cone_geometry, _slice_geometry, astra_has_gpu, astra_projector_name
from tests.operators.helper import random_complex, relative_error

needs_astra = pytest.mark.skipif(importlib.util.find_spec("astra") is None, reason="astra is not installed")
without_gpu = pytest.mark.skipif(astra_has_gpu(), reason="there is a GPU")

SHAPE, PIXEL = (50, 64), 0.7
# Begins beside 0, where rays would run along the sides of pixels, which belong to either.
PARALLEL = ParallelBeam(equispaced_angles(20, start=0.02), 96, 0.6, 0.9)
FAN = FanBeam(equispaced_angles(20, 6.2, 0.3), 96, 1.1, 80, 140, -2.3)
KERNELS: dict[str, tuple[ParallelBeam | FanBeam, str]] = {
    "linear": (PARALLEL, "joseph"),
    "line": (PARALLEL, "line"),
    "line_fanflat": (FAN, "line"),
}
every_kernel = pytest.mark.parametrize(("geometry", "projector"), KERNELS.values(), ids=KERNELS)


def random_image(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def both(geometry, projector):
    return tuple(
        CTOperator(geometry, SHAPE, PIXEL, engine=engine, projector=projector)
        for engine in ("matrix", "astra")
    )


@needs_astra
@every_kernel
def test_agrees_with_astra(geometry, projector):
    ours, theirs = both(geometry, projector)
    x, y = random_image(3, *SHAPE), random_image(3, *ours.range_shape)
    assert relative_error(ours(x), theirs(x)) <= 1e-4
    assert relative_error(ours.adjoint(y), theirs.adjoint(y)) <= 1e-4


@needs_astra
def test_agrees_with_astra_as_its_users_call_it():
    # Angles and distances instead of our vectors, and pixels of side 1 instead of mm.
    import astra

    volume = astra.create_vol_geom(*SHAPE)
    scans = {
        "linear": astra.create_proj_geom("parallel", 0.6 / PIXEL, 96, np.array(PARALLEL.angles)),
        "line_fanflat": astra.create_proj_geom(
            "fanflat", 1.1 / PIXEL, 96, np.array(FAN.angles), 80 / PIXEL, 60 / PIXEL
        ),
    }
    x = random_image(*SHAPE)
    for name, scan in scans.items():
        geometry, model = KERNELS[name]
        centred = replace(geometry, detector_offset=0.0)
        projector = astra.create_projector(name, scan, volume)
        identity, sinogram = astra.create_sino(x.numpy(), projector)
        astra.data2d.delete(identity)
        astra.projector.delete(projector)
        ours = CTOperator(centred, SHAPE, PIXEL, projector=model)(x)
        assert relative_error(ours, PIXEL * torch.from_numpy(sinogram)) <= 1e-4


@needs_astra
@every_kernel
def test_the_pair_of_the_cpu_is_matched(geometry, projector):
    A = both(geometry, projector)[1]
    assert A.matched_adjoint
    assert check_adjoint(A, batch=(2,), tolerance=1e-5) <= 1e-5
    z = random_complex(*SHAPE)
    torch.testing.assert_close(A(z), torch.complex(A(z.real), A(z.imag)))


@needs_astra
def test_the_engine_follows_from_the_memory():
    A = CTOperator(PARALLEL, SHAPE, PIXEL, memory_limit=10_000)
    assert (A.engine, A.projector, A.memory) == ("astra", "joseph", 0)
    fan = CTOperator(FAN, SHAPE, PIXEL, memory_limit=10_000)
    assert (fan.engine, fan.projector) == ("astra", "line")
    part = fan.subset([3, 1])
    assert part.engine == "astra"
    x = random_image(*SHAPE)
    torch.testing.assert_close(part(x), fan(x)[[3, 1]])
    with pytest.raises(OperatorError, match="has no matrix"):
        _ = fan.matrix
    with pytest.raises(OperatorError, match="memory_limit"):
        CTOperator(PARALLEL, SHAPE, PIXEL, memory_limit=10_000, rays_per_detector=2)


@needs_astra
def test_gradients_pickles_and_precision_of_the_engine():
    A = CTOperator(PARALLEL, SHAPE, PIXEL, engine="astra")
    x = random_image(*SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(A(x).square().sum() / 2, x)
    torch.testing.assert_close(gradient, A.normal(x.detach()))
    assert torch.equal(pickle.loads(pickle.dumps(A))(x), A(x))
    with pytest.raises(OperatorError, match="engine='astra' computes in float32"):
        A.to(torch.float64)
    assert A.dtype == torch.float32


@needs_astra
@pytest.mark.parametrize(
    ("geometry", "options", "message"),
    [
        (FAN, {"projector": "joseph"}, "no projector 'joseph' for a fan beam, only 'line'"),
        (FanBeam((0.0,), 9, 1.0, 80, 140, detector="curved"), {}, "knows no curved detector"),
        (FAN, {"rays_per_detector": 3}, "one ray for each detector element, not 3"),
    ],
)
def test_what_astra_cannot_compute(geometry, options, message):
    with pytest.raises(OperatorError, match=message):
        CTOperator(geometry, SHAPE, PIXEL, engine="astra", **options)


def test_without_astra_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(operators.ct_astra, "astra_installed", lambda: False)
    with pytest.raises(OperatorError, match=r"astra-toolbox, which is not installed: pip install"):
        CTOperator(PARALLEL, SHAPE, PIXEL, engine="astra")
    with pytest.raises(OperatorError, match="not installed"):
        astra_projector_name(PARALLEL, "auto", 1)
    with pytest.raises(OperatorError, match="a cone beam needs astra-toolbox and a GPU"):
        ConeBeamOperator(ConeBeam((0.0,), (4, 4), (1, 1), 80, 140), (4, 4, 4), 1.0)


# Cone beams. What needs a GPU is not tested where there is none: asking for it would end the process.


@without_gpu
def test_a_cone_beam_without_a_gpu_is_an_error():
    geometry = ConeBeam(equispaced_angles(4, 6.2), (8, 9), (1.0, 1.1), 80, 140)
    with pytest.raises(OperatorError, match="a GPU that ASTRA can use"):
        ConeBeamOperator(geometry, (6, 7, 8), 0.9)


@pytest.mark.parametrize(
    ("shape", "voxel", "message"),
    [
        ((6, 7), 0.9, r"ConeBeamOperator needs a volume \(D, H, W\)"),
        ((6, 7, 8), 0.0, "voxel_size of ConeBeamOperator is a positive number"),
        ((6, 100, 200), 0.9, "80 mm from the axis, would be within the image"),
    ],
)
def test_bad_volumes_are_named(shape, voxel, message):
    with pytest.raises(OperatorError, match=message):
        ConeBeamOperator(ConeBeam((0.0,), (8, 9), (1.0, 1.1), 80, 140), shape, voxel)


@needs_astra
def test_the_middle_of_a_cone_is_a_fan():
    # ASTRA's y-axis of volumes points down the rows, that of slices up.
    cone = ConeBeam(FAN.angles, (5, 96), (1.3, 1.1), 80, 140, (0.4, -2.3))
    vectors, flat = _cone_geometry(cone)["Vectors"], _slice_geometry(FAN)["Vectors"]
    source, middle, along, upwards = np.split(vectors, 4, axis=1)
    mirrored = np.hstack([part[:, :2] * [1, -1] for part in (source, middle, along)])
    np.testing.assert_allclose(mirrored, flat, atol=1e-12)
    np.testing.assert_allclose(middle[:, 2], 0.4)
    np.testing.assert_allclose(upwards, np.tile([0, 0, 1.3], (20, 1)))
