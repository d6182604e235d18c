"""The reader of fastMRI+, held against a picture that is turned over and cut."""

from __future__ import annotations

import numpy as np
import pytest

from recon.errors import ReconError
from recon.io.fastmri import centre_crop
from recon.io.fastmri_plus import Box, read_annotations

HEADER = "file,slice,study_level,x,y,width,height,label\n"


def table(path, *lines, header=HEADER):
    path.write_text(header + "".join(line + "\n" for line in lines))
    return path


def painted(box, picture, shape=None):
    """The box drawn into the published picture, which is then turned over and cut as fastMRI cuts."""
    image = np.zeros(picture, dtype=bool)
    rows, columns = np.indices(picture)
    image |= (
        (rows >= box.y) & (rows < box.y + box.height) & (columns >= box.x) & (columns < box.x + box.width)
    )
    image = np.flipud(image)
    return image if shape is None else centre_crop(image, shape)


@pytest.mark.parametrize("picture", [(20, 20), (21, 16), (16, 13)])
@pytest.mark.parametrize(
    "box", [Box("a", 3, 2, 5, 4), Box("a", 0, 0, 1, 1), Box("a", 4, -1, 3, 5), Box("a", 9, 10, 30, 30)]
)
@pytest.mark.parametrize("cut", [0, 3, 4])
def test_box_lies_where_it_was_drawn(picture, box, cut):
    shape = (picture[0] - cut, picture[1] - cut)
    expected = painted(box, picture, shape)
    region = box.region(picture, shape)
    found = np.zeros(shape, dtype=bool)
    if region is not None:
        found[region] = True
    np.testing.assert_array_equal(found, expected)
    if cut == 0:
        assert box.region(picture) == region


def test_without_a_crop_the_rule_is_that_of_the_loader():
    # y -> recon_size - y - h, x as it is.
    assert Box("a", 91, 132, 7, 6).region((320, 320)) == (slice(182, 188), slice(91, 98))


def test_box_outside_and_image_too_large():
    box = Box("a", 0, 0, 2, 2)
    assert box.region((20, 20), (10, 10)) is None
    assert Box("a", 25, 3, 2, 2).region((20, 20)) is None
    with pytest.raises(ReconError, match=r"an image of \(24, 20\) is no part of a target of \(20, 20\)"):
        box.region((20, 20), (24, 20))


def test_a_table_of_every_kind_of_line(tmp_path):
    path = table(
        tmp_path / "brain.csv",
        "file_brain_AXFLAIR_200_1,2,No,91,132,7,6,Nonspecific white matter lesion",
        "file_brain_AXFLAIR_200_1,0,No,10,-1,7,6,Mass",
        "file_brain_AXFLAIR_200_1,2,No,30,31,8,9,Edema",
        "file_brain_AXFLAIR_200_1,2,No,91,132,7,6,Nonspecific white matter lesion",
        "file_brain_AXFLAIR_200_1,2,No,91,132,7,6,Lacunar infarct",
        "file1000002,9,No,86,51,169,99,Joint Effusion ",
        "file1000002,9,No,86,51,0,99,Meniscus Tear",
        "file1000002,12.0,No,86.0,51,3,99,Meniscus Tear",
        "file3,0,Yes,,,,,Normal for age",
        "file3,0,Yes,,,,,Normal for age",
        'file3,0,Yes,,,,,"artifact, motion"',
    )
    found = read_annotations(path)
    assert found.of("file_brain_AXFLAIR_200_1.h5") == {
        0: (Box("Mass", 10, -1, 7, 6),),
        2: (
            Box("Nonspecific white matter lesion", 91, 132, 7, 6),
            Box("Edema", 30, 31, 8, 9),
            Box("Lacunar infarct", 91, 132, 7, 6),
        ),
    }
    assert found.of("file1000002") == {
        9: (Box("Joint Effusion", 86, 51, 169, 99),),
        12: (Box("Meniscus Tear", 86, 51, 3, 99),),
    }
    assert found.of("file3") == {}
    assert found.study == {"file3": ("Normal for age", "artifact, motion")}
    assert (found.repeated, found.empty) == (2, 1)
    assert found.labels[:2] == ["Edema", "Joint Effusion"]
    assert len(list(found)) == 6


def test_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path):
    path = tmp_path / "knee.csv"
    path.write_text("\ufeffid," + HEADER + "7,file1,1,no,1,2,3,4,Mass\n", encoding="utf-8")
    assert read_annotations(path).of("file1") == {1: (Box("Mass", 1, 2, 3, 4),)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("file1,1,No,1,2,3,,Mass", "line 2: height is no whole number: ''"),
        ("file1,1,No,1,2.5,3,4,Mass", "line 2: y is no whole number: '2.5'"),
        ("file1,1,No,nan,2,3,4,Mass", "line 2: x is no whole number: 'nan'"),
        ("file1,1,No,inf,2,3,4,Mass", "line 2: x is no whole number: 'inf'"),
        ("file1,-1,No,1,2,3,4,Mass", "line 2: there is no slice -1"),
        ("file1,1,Perhaps,1,2,3,4,Mass", "Yes or No for study_level, got 'file1', 'Mass', 'Perhaps'"),
        (",1,No,1,2,3,4,Mass", "needs a file"),
        ("file1,1,No,1,2,3,4,", "needs a file, a label"),
        ("file1,1,No,1,2,3,4", "line 2 has not as many values as there are columns"),
        ("file1,1,No,1,2,3,4,Mass,more", "line 2 has not as many values as there are columns"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = table(tmp_path / "brain.csv", line)
    with pytest.raises(ReconError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(ReconError, match="there is no such file"):
        read_annotations(tmp_path / "absent.csv")
    with pytest.raises(ReconError, match="the column 'y' of a fastMRI\\+ table is missing"):
        read_annotations(table(tmp_path / "a.csv", header=HEADER.replace(",y,", ",")))
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ReconError, match="this is no table that can be read"):
        read_annotations(tmp_path / "b.csv")
    with pytest.raises(ReconError, match="the column 'file'"):
        read_annotations(table(tmp_path / "c.csv", header=""))
