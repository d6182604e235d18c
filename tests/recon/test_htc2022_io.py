from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.io import savemat

from operators.ct_geometry import FanBeam
from recon.errors import ReconError
from recon.io.htc2022 import read_htc2022, read_htc2022_reconstruction, read_htc2022_segmentation
from tests.operators.discs import disc_sinogram

DSO, DSD = 410.66, 553.74


def parameters(degrees, **changes):
    values = {
        "projectName": "htc2022_t_",
        "measurers": "A Person",
        "distanceSourceOrigin": DSO,
        "distanceSourceDetector": DSD,
        "angles": np.asarray(degrees, dtype=float),
        "pixelSizePost": 0.2,
        "effectivePixelSizePost": 0.2 * DSO / DSD,
        "numDetectorsPost": 560,
        "voltage": 45,
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def sinogram(degrees, seed=0):
    return np.random.default_rng(seed).random((len(degrees), 560))


def write(path, degrees, data=None, name="CtDataFull", **changes):
    content = {
        "type": "2d",
        "sinogram": sinogram(degrees) if data is None else data,
        "parameters": parameters(degrees, **changes),
    }
    savemat(path, {name: content})
    return path


WHOLE = np.linspace(0, 360, 25)


def test_full_scan_without_its_repeated_view(tmp_path):
    scan = read_htc2022(write(tmp_path / "a.mat", WHOLE))
    assert scan.sinogram.shape == (1, 24, 560)
    np.testing.assert_array_equal(scan.sinogram[0], sinogram(WHOLE)[:24].astype(np.float32))
    assert scan.kind == "line_integrals"
    assert scan.geometry == FanBeam(tuple(np.deg2rad(WHOLE[:24])), 560, 0.2, DSO, DSD)
    assert scan.pixel_size == pytest.approx(0.14832, abs=1e-5)
    assert scan.image_shape == (512, 512)
    assert scan.metadata == {"projectName": "htc2022_t_", "voltage": 45}


def test_limited_scan_keeps_its_arc_and_start(tmp_path):
    degrees = np.arange(40, 70.5, 0.5)
    scan = read_htc2022(write(tmp_path / "a.mat", degrees, name="CtDataLimited"))
    assert scan.sinogram.shape == (1, 61, 560)
    assert scan.geometry is not None
    np.testing.assert_allclose(scan.geometry.angles, np.deg2rad(degrees))


def test_geometry_is_that_of_the_challenge():
    """A point at column j and row i, the latter counted downwards, by the challenge's own formula."""
    x, down, degrees = 12.0, -20.0, np.array([0.0, 37.0, 110.0, 250.0])
    a = -np.deg2rad(degrees)
    t, s = x * np.cos(a) + down * np.sin(a), -x * np.sin(a) + down * np.cos(a)
    shadow = DSD * t / (DSO - s)
    geometry = FanBeam(tuple(np.deg2rad(degrees)), 560, 0.2, DSO, DSD)
    projected = disc_sinogram(geometry, ((x, -down, 0.5, 1.0),)).numpy()
    middle = (projected * geometry.detector_positions).sum(1) / projected.sum(1)
    np.testing.assert_allclose(middle, shadow, atol=0.02)


def test_images_that_came_with_it(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (512, 512)).astype(np.uint8)
    savemat(tmp_path / "seg.mat", {"reconFullFbpSeg": mask})
    result = read_htc2022_segmentation(tmp_path / "seg.mat")
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result, mask)
    savemat(tmp_path / "fbp.mat", {"reconFullFbp": mask * 0.007})
    image = read_htc2022_reconstruction(tmp_path / "fbp.mat", 0.14)
    np.testing.assert_allclose(image, mask * 0.05, rtol=1e-6)
    for name, content, message in (
        ("two.mat", {"a": mask, "b": mask}, "one image is expected, got the variables a, b"),
        ("small.mat", {"a": mask[:100]}, r"\(512, 512\), got uint8 \(100, 512\)"),
        ("grey.mat", {"a": mask * 2}, "zeros and ones only"),
        ("nan.mat", {"a": np.full((512, 512), np.nan)}, "NaN"),
    ):
        savemat(tmp_path / name, content)
        with pytest.raises(ReconError, match=message):
            read_htc2022_segmentation(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angles": None}, "CtDataFull.parameters has no field 'angles'"),
        ({"angles": np.deg2rad(WHOLE)}, "angles holds 25 angles that span 6.283 degrees only"),
        ({"angles": WHOLE[:20]}, "holds 20 angles for 25 views"),
        ({"angles": WHOLE * np.nan}, "NaN or infinite angles"),
        ({"numDetectorsPost": 561}, "is 561, but the sinogram has 560"),
        ({"distanceSourceOrigin": 0.0}, "distanceSourceOrigin must be a positive number, got 0"),
        ({"distanceSourceDetector": 400.0}, "must lie behind the origin"),
        ({"pixelSizePost": None}, "has no field 'pixelSizePost'"),
    ],
)
def test_parameters_that_cannot_be(tmp_path, changes, message):
    path = write(tmp_path / "a.mat", WHOLE, **changes)
    with pytest.raises(ReconError, match=message) as error:
        read_htc2022(path)
    assert str(error.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    data = sinogram(WHOLE)
    data[3, 4] = math.nan
    with pytest.raises(ReconError, match="the sinogram holds NaN"):
        read_htc2022(write(tmp_path / "nan.mat", WHOLE, data))
    with pytest.raises(ReconError, match=r"real \(views, detectors\), got float64 \(560,\)"):
        read_htc2022(write(tmp_path / "one.mat", WHOLE[:1], sinogram(WHOLE[:1])))
    with pytest.raises(ReconError, match=r"none\.mat: there is no such file"):
        read_htc2022(tmp_path / "none.mat")
    savemat(tmp_path / "other.mat", {"x": 1})
    with pytest.raises(ReconError, match="neither CtDataLimited nor CtDataFull"):
        read_htc2022(tmp_path / "other.mat")
    whole = write(tmp_path / "whole.mat", WHOLE).read_bytes()
    for name, content in (("cut.mat", whole[: len(whole) // 2]), ("text.mat", b"hello"), ("empty.mat", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ReconError, match=rf"{name} cannot be read as a MATLAB file"):
            read_htc2022(tmp_path / name)
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "new.mat").write_bytes(header + bytes(512))
    with pytest.raises(ReconError, match=r"version 7\.3"):
        read_htc2022(tmp_path / "new.mat")
