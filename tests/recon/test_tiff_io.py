from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch

from operators.ct_geometry import ParallelBeam
from recon.errors import ReconError
from recon.io.tiff import read_tiff_projections, read_tiff_stack, write_tiff_stack

GEOMETRY = ParallelBeam((0.0, 0.5, 1.0), 6, 0.2)


def projections():
    return np.random.default_rng(0).integers(100, 900, (3, 4, 6)).astype(np.uint16)


def write(path, pages):
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pages, photometric="minisblack")
    return path


def test_pages_and_files(tmp_path):
    stack = projections()
    np.testing.assert_array_equal(read_tiff_stack(write(tmp_path / "a.tif", stack)), stack)
    for number, page in zip((2, 10, 1), stack, strict=True):
        write(tmp_path / "b" / f"view_{number}.tiff", page)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    images = read_tiff_stack(tmp_path / "b")
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images, stack[[2, 0, 1]])
    files = [tmp_path / "b" / f"view_{number}.tiff" for number in (10, 2)]
    np.testing.assert_array_equal(read_tiff_stack(files), stack[[1, 0]])


def test_projections_become_sinograms(tmp_path):
    stack = projections()
    flats = write(tmp_path / "flats.tif", np.full((2, 4, 6), 1000, np.uint16))
    darks = write(tmp_path / "darks.tif", np.full((5, 4, 6), 50, np.uint16))
    path = write(tmp_path / "a.tif", stack)
    scan = read_tiff_projections(path, GEOMETRY, flats=flats, darks=darks)
    assert scan.sinogram.shape == (4, 3, 6)
    for row in range(4):
        np.testing.assert_array_equal(scan.sinogram[row], stack[:, row])
    assert scan.flats is not None
    assert scan.darks is not None
    assert (scan.flats.shape, scan.darks.shape) == ((4, 2, 6), (4, 5, 6))
    assert (scan.kind, scan.geometry, scan.slices) == ("counts", GEOMETRY, (0, 1, 2, 3))
    part = read_tiff_projections(path, GEOMETRY, flats=flats, darks=darks, slices=[2])
    np.testing.assert_allclose(
        part.to_line_integrals().sinogram[0], -np.log((stack[:, 2] - 50.0) / 950), rtol=1e-5
    )
    assert part.slices == (2,)
    pages = [write(tmp_path / f"{number}.tif", page) for number, page in enumerate(stack)]
    listed = read_tiff_projections(iter(pages), GEOMETRY, flats=iter([flats]))
    assert torch.equal(listed.sinogram, scan.sinogram)
    assert listed.source == tmp_path


def test_written_stack_is_read_back(tmp_path):
    images = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    write_tiff_stack(tmp_path / "out" / "a.tif", images, description="HU, not for diagnostic use")
    assert torch.equal(read_tiff_stack(tmp_path / "out" / "a.tif"), images)
    write_tiff_stack(tmp_path / "out" / "a.tif", images[:1])
    assert torch.equal(read_tiff_stack(tmp_path / "out" / "a.tif"), images[:1])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tif"]
    with pytest.raises(ReconError, match=r"real \(pages, H, W\), got float32 \(5, 4\)"):
        write_tiff_stack(tmp_path / "b.tif", images[0])
    with pytest.raises(ReconError, match="NaN"):
        write_tiff_stack(tmp_path / "b.tif", images / 0)
    with pytest.raises(ReconError, match="cannot be written"):
        write_tiff_stack(tmp_path / "out" / "a.tif" / "b.tif", images)
    assert not (tmp_path / "b.tif").exists()


def test_stacks_that_cannot_be_read(tmp_path):
    with pytest.raises(ReconError, match="there is no TIFF file"):
        read_tiff_stack(tmp_path)
    with pytest.raises(ReconError, match=r"none\.tif: there is no such file"):
        read_tiff_stack(tmp_path / "none.tif")
    whole = write(tmp_path / "a.tif", projections()).read_bytes()
    for name, content in (("text.tif", b"hello there"), ("cut.tif", whole[: len(whole) // 3])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ReconError, match=name):
            read_tiff_stack(tmp_path / name)
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((5, 6, 3), np.uint8), photometric="rgb")
    with pytest.raises(ReconError, match=r"page 0 must be a grey image, got uint8 \(5, 6, 3\)"):
        read_tiff_stack(tmp_path / "colour.tif")
    write(tmp_path / "nan.tif", np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ReconError, match="page 0 holds NaN"):
        read_tiff_stack(tmp_path / "nan.tif")
    other = write(tmp_path / "b.tif", np.zeros((4, 7), np.uint16))
    with pytest.raises(ReconError, match=r"b\.tif: page 0 has shape \(4, 7\), but those before it \(4, 6\)"):
        read_tiff_stack([tmp_path / "a.tif", other])


def test_projections_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.tif", projections())
    with pytest.raises(ReconError, match="nothing: there is no TIFF file"):
        read_tiff_projections([], GEOMETRY)
    with pytest.raises(ReconError, match="there are 2 angles for 3 projections"):
        read_tiff_projections(path, GEOMETRY.subset([0, 1]))
    with pytest.raises(ReconError, match="has 7 detector elements, but the projections 6 columns"):
        read_tiff_projections(path, ParallelBeam((0.0, 0.5, 1.0), 7, 0.2))
    with pytest.raises(ReconError, match="rows from 0 to 3 can be chosen"):
        read_tiff_projections(path, GEOMETRY, slices=[4])
    small = write(tmp_path / "flats.tif", np.zeros((4, 5), np.uint16))
    with pytest.raises(
        ReconError, match=r"flats\.tif: the flats have shape \(4, 5\), but projections \(4, 6\)"
    ):
        read_tiff_projections(path, GEOMETRY, flats=small)
    negative = write(tmp_path / "neg.tif", projections().astype(np.float32) - 500)
    with pytest.raises(ReconError, match="sinogram holds negative values, which are no counts"):
        read_tiff_projections(negative, GEOMETRY)
    assert read_tiff_projections(negative, GEOMETRY, kind="line_integrals").kind == "line_integrals"
