from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat

from recon.errors import ReconError
from recon.io.matlab import read_mat_sinogram

ANGLES = np.linspace(0, np.pi, 12, endpoint=False)


def sinogram(views=12, detectors=7):
    return np.random.default_rng(0).random((views, detectors)).astype(np.float32)


def geometry_of(scan):
    assert scan.geometry is not None
    return scan.geometry


def write(path, **content):
    savemat(path, content)
    return path


@pytest.mark.parametrize("transposed", [False, True])
def test_axis_of_the_views_is_the_one_as_long_as_the_angles(tmp_path, transposed):
    data = sinogram()
    path = write(tmp_path / "a.mat", sino=data.T if transposed else data, anglesRad=ANGLES[:, None], n=7)
    scan = read_mat_sinogram(path)
    np.testing.assert_array_equal(scan.sinogram[0], data)
    np.testing.assert_allclose(geometry_of(scan).angles, ANGLES)
    assert geometry_of(scan).detector_spacing == 1.0
    assert scan.length_unit == "element"
    assert scan.kind == "line_integrals"
    known = read_mat_sinogram(path, detector_spacing=0.1, detector_offset=0.3)
    assert (geometry_of(known).detector_spacing, geometry_of(known).detector_offset) == (0.1, 0.3)
    assert known.length_unit == "mm"


def test_names_and_units_can_be_given(tmp_path):
    path = write(
        tmp_path / "a.mat", first=sinogram(), second=2 * sinogram(), t=np.rad2deg(ANGLES), thetaDeg=ANGLES
    )
    scan = read_mat_sinogram(path, sinogram="second", angles="t", angle_unit="degrees")
    np.testing.assert_array_equal(scan.sinogram[0], 2 * sinogram())
    np.testing.assert_allclose(geometry_of(scan).angles, ANGLES)
    with pytest.raises(ReconError, match=r"'thetaDeg' holds 12 angles that span 2\.88 degrees only"):
        read_mat_sinogram(path, sinogram="first")


def test_a_square_matrix_needs_the_axis(tmp_path):
    path = write(tmp_path / "a.mat", sino=sinogram(12, 12), anglesRad=ANGLES)
    with pytest.raises(ReconError, match="'sino' is square: give the views_axis"):
        read_mat_sinogram(path)
    for axis, expected in ((0, sinogram(12, 12)), (1, sinogram(12, 12).T)):
        np.testing.assert_array_equal(read_mat_sinogram(path, views_axis=axis).sinogram[0], expected)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            {"sino": sinogram()},
            {},
            "a vector of angles is expected, and the file has none; name it with 'angles'",
        ),
        ({"theta": ANGLES, "angles": ANGLES}, {}, "the file has several: theta, angles"),
        ({"theta": ANGLES}, {}, "'theta' does not say whether it holds degrees or radians"),
        (
            {"thetaRad": ANGLES},
            {},
            "a matrix with a side of 12, one a view is expected, and the file has none",
        ),
        ({"thetaRad": ANGLES, "a": sinogram(), "b": sinogram()}, {}, "the file has several: a, b"),
        ({"thetaRad": ANGLES, "a": sinogram()}, {"sinogram": "c"}, "'c' is no matrix of real numbers"),
        (
            {"thetaRad": ANGLES, "a": sinogram(5, 6)},
            {"sinogram": "a"},
            r"\(5, 6\), of which no side is as long",
        ),
        ({"thetaRad": ANGLES, "a": sinogram()}, {"views_axis": 1}, "whose axis 1 is not as long"),
        ({"thetaRad": ANGLES, "a": sinogram()}, {"angles": "b"}, "no variable 'b' with angles"),
        ({"thetaRad": sinogram(), "a": sinogram()}, {"angles": "thetaRad"}, "must be a vector of angles"),
        ({"thetaRad": np.arange(12.0) * 15, "a": sinogram()}, {}, "'thetaRad' spans 165 radians"),
        ({"thetaRad": ANGLES, "a": np.nan * sinogram()}, {}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, options, message):
    path = write(tmp_path / "a.mat", **content)
    with pytest.raises(ReconError, match=message) as error:
        read_mat_sinogram(path, **options)
    assert str(error.value).startswith(str(path))
