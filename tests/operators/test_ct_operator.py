"""Projections against closed forms, and the life of the system matrix: memory, subsets, the cache."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import operators.ct
from operators import (
    CTOperator,
    FanBeam,
    OperatorError,
    ParallelBeam,
    check_adjoint,
    equispaced_angles,
)
from operators.ct_matrix import MatrixRecipe
from tests.operators.ct_phantoms import blob_image, blob_sinogram, disc_image, disc_sinogram
from tests.operators.helper import random_complex, relative_error

SHAPE, PIXEL = (72, 60), 0.8
TURN = 2 * math.pi
GEOMETRIES: dict[str, ParallelBeam | FanBeam] = {
    "parallel": ParallelBeam(equispaced_angles(9), 97, 0.7, 1.1),
    "flat": FanBeam(equispaced_angles(9, TURN, 0.2), 97, 1.2, 110, 190, -1.7, "flat"),
    "curved": FanBeam(equispaced_angles(9, TURN, 0.2), 97, 1.2, 110, 190, -1.7, "curved"),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_projector = pytest.mark.parametrize("projector", ["joseph", "line"])


def double(*arguments, **options):
    return CTOperator(*arguments, **options).to(torch.float64)


# Closed forms, in mm


@every_geometry
@every_projector
def test_blob(geometry, projector):
    # So smooth that the pixels matter little: a tenth of a pixel in any place would be an error of 1.4 %.
    A = double(geometry, SHAPE, PIXEL, projector=projector)
    truth = blob_sinogram(geometry, (5.3, -4.1), 4.0)
    tolerance = {"joseph": 0.003, "line": 0.013}[projector]
    assert relative_error(A(blob_image(SHAPE, PIXEL, (5.3, -4.1), 4.0)), truth) < tolerance


@every_geometry
@every_projector
def test_disc(geometry, projector):
    A = double(geometry, SHAPE, PIXEL, projector=projector)
    truth = disc_sinogram(geometry, (3.0, -5.0), 15.0)
    assert relative_error(A(disc_image(SHAPE, PIXEL, (3.0, -5.0), 15.0)), truth) < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5)])
@every_projector
def test_uniform_image_along_an_axis(shape, projector):
    # Straight down and straight across, through the middle of the pixels: the sides of the rectangle.
    height, width = shape
    for angle, across, along in ((0.0, width, height), (math.pi / 2, height, width)):
        A = double(ParallelBeam([angle], across, 2.0), shape, 2.0, projector=projector)
        torch.testing.assert_close(
            A(torch.ones(shape).double()), torch.full((1, across), 2.0 * along).double()
        )


@every_geometry
def test_exact_lengths_in_one_square(geometry):
    # A pixel of 20 mm; a ray's length in it by clipping against its four sides.
    geometry = replace(geometry, angles=tuple(angle + 0.05 for angle in geometry.angles))
    A = double(geometry, (1, 1), 20.0, projector="line")
    lengths = []
    for view in range(geometry.num_views):
        points, directions = geometry.rays(view, geometry.detector_positions)
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        sides = np.sort([(side - points) / directions for side in (-10, 10)], axis=0)
        lengths.append(np.maximum(sides[1].min(axis=1) - sides[0].max(axis=1), 0))
    expected = torch.tensor(np.array(lengths))
    assert relative_error(A(torch.ones(1, 1).double()), expected) < 1e-9


@every_geometry
def test_projections_add_up(geometry):
    A = CTOperator(geometry, SHAPE, PIXEL)
    bone, soft = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    torch.testing.assert_close(A(0.05 * bone) + A(0.02 * soft), A(0.05 * bone + 0.02 * soft))


@every_geometry
def test_wide_detectors_measure_the_mean_of_their_rays(geometry):
    wide = CTOperator(geometry, SHAPE, PIXEL, rays_per_detector=3)
    spacing = geometry.detector_spacing / 3
    options = {"num_detectors": 3 * geometry.num_detectors, "detector_spacing": spacing}
    fine = CTOperator(replace(geometry, **options), SHAPE, PIXEL)
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide(x), fine(x).unflatten(-1, (-1, 3)).mean(-1))
    # Each pixel once in each row, or the product would read it twice.
    rows = wide.matrix.forward
    of_row = torch.arange(rows.shape[0]).repeat_interleave(rows.starts.diff())
    assert len(torch.unique(of_row * rows.shape[1] + rows.columns)) == len(rows.columns)


# Batches, precision, adjoint


@every_geometry
@every_projector
def test_adjoint_is_exact(geometry, projector):
    A = CTOperator(geometry, SHAPE, PIXEL, projector=projector)
    assert A.matched_adjoint
    assert check_adjoint(A, batch=(2, 3)) <= 1e-5
    assert check_adjoint(A.to(torch.float64)) <= 1e-10


def test_any_batch_real_or_complex():
    A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL)
    x = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = A(x)
    assert y.shape == (2, 3, *A.range_shape)
    torch.testing.assert_close(y[1, 2], A(x[1, 2]))
    z = random_complex(2, *SHAPE)
    torch.testing.assert_close(A(z), torch.complex(A(z.real), A(z.imag)))
    assert A(x[:0]).shape == (0, 3, *A.range_shape)


def test_double_precision_is_not_rounded_single():
    A = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL)
    rounded = A.matrix.forward.values.double()
    A.to(torch.float64)
    exact = A.matrix.forward.values
    assert exact.dtype == torch.float64
    assert 0 < relative_error(rounded, exact) < 1e-7
    assert not torch.equal(exact.float().double(), exact)


def test_wrong_dtypes_are_named():
    A = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL)
    with pytest.raises(OperatorError, match=r"works in torch.float32, got a tensor of torch.float64"):
        A(torch.zeros(SHAPE).double())
    with pytest.raises(OperatorError, match=r"float32 or float64, not in torch.float16"):
        A.to(torch.float16)
    assert A.dtype == torch.float32


def test_index_arrays_are_32_bit():
    matrix = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL).matrix
    for side in (matrix.forward, matrix.adjoint):
        assert {side.starts.dtype, side.columns.dtype} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_behind_the_entries_can_be_read(dtype, tmp_path):
    """MKL's product reads on behind them: one scan in fifty ended the process with a segmentation fault."""
    for cached in (False, True):  # made, and read back
        A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, cache=tmp_path)
        A.to(dtype)
        for matrix in (A.matrix, A.subset([3, 1]).matrix):
            for side in (matrix.forward, matrix.adjoint):
                for array in (side.starts, side.columns, side.values):
                    end = (array.storage_offset() + array.numel()) * array.element_size()
                    assert array.untyped_storage().nbytes() - end >= 256, cached
                assert side._matrix.values().data_ptr() == side.values.data_ptr()


# Subsets


@pytest.mark.parametrize("built", [True, False])
def test_subset_keeps_views_in_order(built):
    A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, rays_per_detector=2)
    A.to(torch.float64)
    x, y = random_complex(*SHAPE, dtype=torch.complex128), random_complex(3, 97, dtype=torch.complex128)
    if built:
        A(x)
    part = A.subset([7, 0, -2])
    assert part.range_shape == (3, 97)
    assert part.geometry == A.geometry.subset([7, 0, 7])
    assert part.dtype == torch.float64
    torch.testing.assert_close(part(x), A(x)[[7, 0, 7]])
    padded = y.new_zeros(9, 97)
    padded[0] = y[1]
    padded[7] = y[0] + y[2]
    torch.testing.assert_close(part.adjoint(y), A.adjoint(padded))


def test_subset_of_a_made_matrix_computes_no_ray_again(monkeypatch):
    A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL)
    expected = A(torch.ones(SHAPE))[2:5]
    monkeypatch.setattr(MatrixRecipe, "_build", None)
    torch.testing.assert_close(A.subset(range(2, 5))(torch.ones(SHAPE)), expected)


# Memory


@every_geometry
@every_projector
def test_memory_is_estimated_closely_and_never_too_low(geometry, projector):
    A = CTOperator(geometry, (60, 50), PIXEL, projector=projector)
    estimate = A.memory
    actual = A.matrix.nbytes
    assert A.memory == actual
    offsets = 4 * (math.prod(A.range_shape) + 3000 + 2)
    assert actual - offsets <= estimate <= actual * (1.15 if projector == "joseph" else 1.7)


def test_a_matrix_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(operators.ct, "astra_installed", lambda: False)
    with pytest.raises(OperatorError, match=r"would take .* GiB, and memory_limit is .* GiB: raise it, or"):
        CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL, memory_limit=10_000)
    enough = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL).memory
    A = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL, memory_limit=enough)
    A(torch.ones(SHAPE))
    # Double precision takes one half more.
    with pytest.raises(OperatorError, match="memory_limit"):
        A.to(torch.float64)(torch.ones(SHAPE).double())


def test_a_curved_detector_beyond_the_limit_is_a_matter_of_memory():
    with pytest.raises(OperatorError, match="memory_limit"):
        CTOperator(GEOMETRIES["curved"], SHAPE, PIXEL, memory_limit=10_000)


def test_more_entries_than_indices_can_count(monkeypatch):
    monkeypatch.setattr(MatrixRecipe, "largest_entries", lambda self: 2**31)
    with pytest.raises(OperatorError, match=r"2\.15e\+09 entries, more than 32-bit indices"):
        MatrixRecipe(GEOMETRIES["parallel"], SHAPE, PIXEL).build()


def test_pickles_are_small():
    A = CTOperator(GEOMETRIES["parallel"], SHAPE, PIXEL)
    A(torch.ones(SHAPE))
    assert len(pickle.dumps(A)) < 10_000


# The cache


@pytest.fixture
def make(tmp_path):
    return lambda **options: CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, cache=tmp_path / "made", **options)


def test_cache_is_read_back(make, tmp_path, monkeypatch):
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    first = make()
    y = first(x)
    (file,) = (tmp_path / "made").iterdir()
    assert file.name.startswith("ct-")
    monkeypatch.setattr(MatrixRecipe, "_build", None)
    second = make()
    assert torch.equal(second(x), y)
    assert torch.equal(second.adjoint(y), first.adjoint(y))


def test_cache_tells_matrices_apart(make, tmp_path):
    x = torch.ones(SHAPE)
    results = [make()(x), make(projector="line")(x), make(rays_per_detector=2)(x)]
    results.append(make().to(torch.float64)(x.double()))
    assert len(list((tmp_path / "made").iterdir())) == 4
    assert not torch.equal(results[0], results[1])


def damage_bytes(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def damage_indices(file):
    with np.load(file) as arrays:
        content = dict(arrays)
    content["forward_columns"][5] = SHAPE[0] * SHAPE[1]
    np.savez(file, **content)


def damage_shape(file):
    with np.load(file) as arrays:
        content = dict(arrays)
    content["adjoint_values"] = content["adjoint_values"][:-1]
    np.savez(file, **content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_text("not a matrix"),
        lambda file: np.savez(file, other=np.zeros(3)),
        damage_bytes,
        damage_indices,
        damage_shape,
    ],
)
def test_a_damaged_file_is_made_anew(make, tmp_path, damage):
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    y = make()(x)
    (file,) = (tmp_path / "made").iterdir()
    good = file.read_bytes()
    damage(file)
    assert file.read_bytes() != good
    assert torch.equal(make()(x), y)
    assert [f.name for f in (tmp_path / "made").iterdir()] == [file.name]
    with np.load(file) as arrays:
        assert sorted(arrays) == sorted(
            f"{side}_{part}" for side in ("forward", "adjoint") for part in ("starts", "columns", "values")
        )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    A = CTOperator(GEOMETRIES["flat"], SHAPE, PIXEL, cache=tmp_path / "file")
    with pytest.raises(OperatorError, match=r"cannot be kept in .*file"):
        A(torch.ones(SHAPE))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("parallel", SHAPE, 1.0), {}, "needs a ParallelBeam or FanBeam, got str"),
        ((GEOMETRIES["flat"], (4,), 1.0), {}, r"image shape of CTOperator is \(H, W\), both positive"),
        ((GEOMETRIES["flat"], (4, 0), 1.0), {}, r"image shape of CTOperator is \(H, W\), both positive"),
        ((GEOMETRIES["flat"], SHAPE, 0.0), {}, "pixel_size of CTOperator is a positive number of mm"),
        ((GEOMETRIES["flat"], SHAPE, math.nan), {}, "pixel_size of CTOperator is a positive number of mm"),
        ((GEOMETRIES["flat"], SHAPE, 1.0), {"engine": "gpu"}, "auto, matrix, astra, on-the-fly, not 'gpu'"),
        ((GEOMETRIES["flat"], SHAPE, 1.0), {"projector": "strip"}, "auto, joseph, line, not 'strip'"),
        ((GEOMETRIES["flat"], SHAPE, 1.0), {"rays_per_detector": 0}, r"rays_per_detector .* got 0"),
        ((GEOMETRIES["flat"], SHAPE, 3.0), {}, "110 mm from the axis, would be within the image"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(OperatorError, match=message):
        CTOperator(*arguments, **options)
