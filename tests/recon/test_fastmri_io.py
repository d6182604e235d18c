from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recon.errors import ReconError
from recon.io.fastmri import (
    FastMRIFile,
    ReconstructionWriter,
    centre_crop,
    crop_readout,
    find_target,
    read_images,
)
from tests.recon import fastmri_files as files

# --- reading ------------------------------------------------------------------------------------------------


def test_knee(tmp_path):
    path = files.knee(tmp_path)
    with FastMRIFile(path) as file:
        assert (file.path, file.stem, file.multicoil) == (path, "file1000001", True)
        assert (file.num_slices, file.num_coils, file.shape) == (2, 3, (64, 46))
        assert (file.acquisition, file.mask, file.num_low_frequencies) == ("CORPD_FBK", None, None)
        assert (file.target, file.targets) == ("reconstruction_rss", {"reconstruction_rss": (32, 32)})
        assert (file.target_shape, file.readout_height) == ((32, 32), 32)
        assert file.valid_columns == (3, 43)  # 46 // 2 - 20, and 39 + 1 columns on
        slices = [file.read_slice(i) for i in range(file.num_slices)]
    stored = files.make_kspace(2, 3, 64, 46)
    stored[..., :3] = stored[..., 43:] = 0
    for i, item in enumerate(slices):
        assert item.index == i
        assert item.kspace.dtype == torch.complex64
        np.testing.assert_array_equal(item.kspace, stored[i])
        np.testing.assert_array_equal(item.measured, (np.arange(46) >= 3) & (np.arange(46) < 43))


def test_the_target_is_the_rss_of_what_is_read(tmp_path):
    with FastMRIFile(files.knee(tmp_path)) as file:
        for i in range(file.num_slices):
            kspace = crop_readout(file.read_slice(i).kspace, file.readout_height)
            image = files.root_sum_of_squares(kspace.numpy(), file.target_shape)
            target = file.read_target(i)
            assert target is not None
            np.testing.assert_allclose(target, image, rtol=1e-5)


def test_brain_narrower_than_the_reconstruction_matrix(tmp_path):
    with FastMRIFile(files.brain(tmp_path)) as file:
        assert (file.shape, file.target, file.read_target(0)) == ((72, 41), None, None)
        assert file.target_shape == (41, 41)
        assert file.readout_height == 48
        assert file.valid_columns == (0, 41)
        assert file.acquisition == "AXFLAIR"


def test_a_target_wider_than_the_image_is_cut_as_the_image_is(tmp_path):
    target = np.arange(72 * 48, dtype=np.float32).reshape(1, 72, 48)
    path = files.write_file(
        tmp_path / "f.h5", {"kspace": files.make_kspace(1, 2, 72, 40), "reconstruction_rss": target}
    )
    with FastMRIFile(path) as file:
        assert file.target_shape == (40, 40)
        np.testing.assert_array_equal(file.read_target(0), target[0, 16:56, 4:44])


def test_singlecoil(tmp_path):
    path = files.singlecoil(tmp_path)
    with FastMRIFile(path) as file, h5py.File(path) as raw:
        assert (file.multicoil, file.num_coils, file.target) == (False, 1, "reconstruction_esc")
        assert set(file.targets) == {"reconstruction_esc", "reconstruction_rss"}
        np.testing.assert_array_equal(file.read_slice(1).kspace, raw["kspace"][1][None])
        np.testing.assert_array_equal(file.read_target(1), raw["reconstruction_esc"][1])


def test_undersampled(tmp_path):
    with FastMRIFile(files.undersampled(tmp_path)) as file:
        expected = np.zeros(46, dtype=bool)
        expected[1::4] = expected[21:25] = True
        assert file.mask is not None
        np.testing.assert_array_equal(file.mask, expected)
        assert (file.num_low_frequencies, file.target) == (4, None)
        assert file.valid_columns == (3, 43)  # not narrowed to the outermost sampled columns, 5 and 41
        expected[:3] = expected[43:] = False  # the mask samples padding too: column 1 holds no measurement
        np.testing.assert_array_equal(file.read_slice(0).measured, expected)


@pytest.mark.parametrize(
    ("width", "center", "maximum", "columns"),
    [(368, 184, 367, (0, 368)), (372, 161, 321, (25, 347)), (47, 20, 39, (3, 43)), (320, 96, 255, (64, 320))],
)
def test_columns_from_the_header(tmp_path, width, center, maximum, columns):
    header = files.header_xml((8, width), (8, 8), center, maximum)
    kspace = np.ones((1, 1, 8, width), np.complex64)
    with FastMRIFile(
        files.write_file(tmp_path / "f.h5", {"kspace": kspace, "ismrmrd_header": header})
    ) as file:
        assert file.valid_columns == columns
        np.testing.assert_array_equal(file.read_slice(0).measured.nonzero()[:, 0], np.arange(*columns))


def test_padding_is_found_without_a_header(tmp_path):
    kspace = files.make_kspace(3, 2, 24, 30)
    kspace[..., :4] = kspace[..., 27:] = 0
    kspace[..., 10] = 0  # a column left out, inside
    with FastMRIFile(files.write_file(tmp_path / "f.h5", {"kspace": kspace})) as file:
        assert file.valid_columns == (4, 27)
        measured = file.read_slice(0).measured
        assert measured.sum() == 22
        assert not measured[10]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((400, 330), (320, 320)), ((640, 300), (300, 300)), ((200, 330), (200, 200))],
)
def test_image_shape_without_header_or_target(tmp_path, shape, expected):
    path = files.write_file(tmp_path / "f.h5", {"kspace": np.ones((1, 1, *shape), np.complex64)})
    with FastMRIFile(path) as file:
        assert file.target_shape == expected
        assert file.readout_height == expected[0]


def test_nothing_reads_or_keeps_the_patient(tmp_path, monkeypatch):
    read = []
    get = h5py.AttributeManager.__getitem__

    def spy(self, name):
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(h5py.AttributeManager, "__getitem__", spy)
    with FastMRIFile(files.undersampled(tmp_path)) as file:
        file.read_slice(0)
        assert "acquisition" in read
        assert "patient_id" not in read
        assert files.PATIENT not in repr(vars(file))


def test_slices_that_do_not_exist(tmp_path):
    with FastMRIFile(files.knee(tmp_path)) as file:
        for index in (-1, 2):
            with pytest.raises(
                ReconError, match=rf"file1000001.h5: there is no slice {index}, the file has 2"
            ):
                file.read_slice(index)
    with pytest.raises(ReconError, match=r"slice 0 of dataset 'kspace' was asked of a closed file"):
        file.read_slice(0)


# --- what cannot be read ------------------------------------------------------------------------------------

KSPACE = np.ones((2, 3, 8, 10), np.complex64)
BAD_FILES = {
    "no k-space": ({"mask": np.ones(10)}, "there is no dataset 'kspace'"),
    "real k-space": ({"kspace": KSPACE.real}, "'kspace' must be complex, got float32"),
    "2-D k-space": ({"kspace": KSPACE[0, 0]}, r"shape \(slices, coils, H, W\).* got \(8, 10\)"),
    "5-D k-space": ({"kspace": KSPACE[None]}, r"got \(1, 2, 3, 8, 10\)"),
    "empty k-space": ({"kspace": KSPACE[:, :0]}, r"'kspace' is empty: its shape is \(2, 0, 8, 10\)"),
    "short mask": ({"kspace": KSPACE, "mask": np.ones(9)}, r"'mask' must have shape \(10,\).* got \(9,\)"),
    "fractional mask": ({"kspace": KSPACE, "mask": np.full(10, 0.5)}, "'mask' must hold zeros and ones only"),
    "empty mask": ({"kspace": KSPACE, "mask": np.zeros(10)}, "'mask' samples no column"),
    "complex mask": ({"kspace": KSPACE, "mask": KSPACE[0, 0, 0]}, "'mask' must be boolean or real"),
    "short target": (
        {"kspace": KSPACE, "reconstruction_rss": np.ones((1, 8, 8))},
        "'reconstruction_rss' has 1 slices but 'kspace' has 2",
    ),
    "flat target": (
        {"kspace": KSPACE, "reconstruction_rss": np.ones((2, 8))},
        r"'reconstruction_rss' must have shape \(slices, h, w\), got \(2, 8\)",
    ),
    "complex target": (
        {"kspace": KSPACE, "reconstruction_esc": KSPACE[:, 0]},
        "'reconstruction_esc' must be real, got complex64",
    ),
}
BAD_HEADERS = {
    "not XML": (b"matrix 8x10", "not well-formed XML"),
    "not text": (np.arange(3), "must be a scalar text"),
    "not UTF-8": (np.bytes_(b"<a>\xff</a>"), "not UTF-8"),
    "no numbers": (b"<ismrmrdHeader/>", "no usable number at encoding/encodedSpace/matrixSize/y"),
    "bad number": (
        files.header_xml((8, 10), (8, 8), "five", 9),
        "encoding/encodingLimits/kspace_encoding_step_1/c",
    ),
    "negative number": (files.header_xml((8, 10), (8, -8), 5, 9), "encoding/reconSpace/matrixSize/y"),
    "no images": (files.header_xml((8, 10), (0, 8), 5, 9), r"empty reconstruction matrix, \(0, 8\)"),
    "other width": (files.header_xml((8, 12), (8, 8), 5, 9), "12 columns were encoded, but 'kspace' has 10"),
    "outside": (files.header_xml((8, 10), (8, 8), 5, 12), "columns at 0:13, outside the 10"),
}


@pytest.mark.parametrize(("datasets", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, datasets, message):
    path = files.write_file(tmp_path / "bad.h5", datasets)
    with pytest.raises(ReconError, match=f"bad.h5: .*{message}"):
        FastMRIFile(path)
    path.unlink()  # where files are locked while open: it was closed


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers(tmp_path, header, message):
    path = files.write_file(tmp_path / "bad.h5", {"kspace": KSPACE, "ismrmrd_header": header})
    with pytest.raises(ReconError, match=f"bad.h5: dataset 'ismrmrd_header' .*{message}"):
        FastMRIFile(path)


def test_no_entity_of_a_header_is_expanded(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("8")
    header = files.header_xml((8, 10), (8, 8), "&width;", 9).decode()
    doctype = f'<!DOCTYPE ismrmrdHeader [<!ENTITY width SYSTEM "{secret.as_uri()}">]>'
    header = header.replace("<ismrmrdHeader", f"{doctype}<ismrmrdHeader", 1)
    path = files.write_file(tmp_path / "bad.h5", {"kspace": KSPACE, "ismrmrd_header": header.encode()})
    with pytest.raises(ReconError, match="has a document type declaration, which is not accepted"):
        FastMRIFile(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1j * np.nan])
def test_bad_values_are_found_in_their_slice(tmp_path, value):
    kspace = KSPACE.copy()
    kspace[1, 2, 3, 4] = value
    with FastMRIFile(files.write_file(tmp_path / "bad.h5", {"kspace": kspace})) as file:
        file.read_slice(0)
        with pytest.raises(
            ReconError, match=r"bad.h5: slice 1 of dataset 'kspace' holds NaN or infinite values"
        ):
            file.read_slice(1)


def test_bad_values_in_a_target(tmp_path):
    target = np.full((2, 8, 8), np.nan)
    path = files.write_file(tmp_path / "bad.h5", {"kspace": KSPACE, "reconstruction_rss": target})
    with (
        FastMRIFile(path) as file,
        pytest.raises(ReconError, match="slice 1 of dataset 'reconstruction_rss' holds"),
    ):
        file.read_target(1)


def test_zeros(tmp_path):
    with (
        FastMRIFile(files.write_file(tmp_path / "bad.h5", {"kspace": 0 * KSPACE})) as file,
        pytest.raises(ReconError, match=r"bad.h5: slice 0 of dataset 'kspace' is all zeros"),
    ):
        file.read_slice(0)


def test_measurements_only_where_the_mask_does_not_sample(tmp_path):
    mask = np.arange(10) < 2
    kspace = np.where(mask, 0, KSPACE).astype(np.complex64)
    with (
        FastMRIFile(files.write_file(tmp_path / "bad.h5", {"kspace": kspace, "mask": mask})) as file,
        pytest.raises(ReconError, match="is zero in every column that is sampled and not padding"),
    ):
        file.read_slice(0)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ReconError, match=r"absent.h5: there is no such file"):
        FastMRIFile(tmp_path / "absent.h5")
    with pytest.raises(ReconError, match="this is a folder, not a file"):
        FastMRIFile(tmp_path)
    text = tmp_path / "text.h5"
    text.write_text("k-space")
    with pytest.raises(ReconError, match=r"text.h5: this is not an HDF5 file"):
        FastMRIFile(text)
    short = files.knee(tmp_path, "short.h5")
    short.write_bytes(short.read_bytes()[:5000])
    with pytest.raises(ReconError, match=r"short.h5: this HDF5 file cannot be opened .*truncated"):
        FastMRIFile(short)

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(ReconError, match=r"text.h5: this file may not be read"):
        FastMRIFile(text)


def test_a_damaged_slice(tmp_path):
    path = tmp_path / "damaged.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("kspace", data=KSPACE, chunks=(1, 3, 8, 10), fletcher32=True)
        offset = data.id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)
    with FastMRIFile(path) as file:
        file.read_slice(0)
        with pytest.raises(ReconError, match=r"damaged.h5: slice 1 of dataset 'kspace' cannot be read"):
            file.read_slice(1)


@pytest.mark.parametrize("place", ["header", "type"])
def test_a_damaged_layout(tmp_path, place):
    path = files.knee(tmp_path)
    with h5py.File(path) as file:
        header, kspace = (h5py.h5o.get_info(file[name].id).addr for name in ("ismrmrd_header", "kspace"))
    content = bytearray(path.read_bytes())
    if place == "header":
        content[header : header + 8] = bytes(8)  # h5py raises a KeyError
    else:
        content[content.index(b"r\0", kspace)] = 0xFF  # the name of the real part: a UnicodeDecodeError
    path.write_bytes(content)
    with pytest.raises(ReconError, match=r"file1000001.h5: this HDF5 file cannot be read, it may be damaged"):
        FastMRIFile(path)


# --- cropping -----------------------------------------------------------------------------------------------


@st.composite
def crops(draw):
    height = draw(st.integers(2, 24))
    return height, draw(st.integers(1, 12)), draw(st.integers(1, height))


@settings(deadline=None, max_examples=25)
@given(crops())
def test_the_image_of_cropped_kspace_is_the_cropped_image(sizes):
    height, width, rows = sizes
    rng = np.random.default_rng(height)
    kspace = rng.standard_normal((2, 3, height, width, 2)) @ np.array([1, 1j])
    cropped = crop_readout(torch.from_numpy(kspace), rows)
    assert cropped.shape == (2, 3, rows, width)
    top = (height - rows) // 2
    np.testing.assert_allclose(
        files.ifft2c(cropped.numpy()), files.ifft2c(kspace)[..., top : top + rows, :], atol=1e-12
    )
    np.testing.assert_allclose(
        files.root_sum_of_squares(cropped.numpy(), (rows, width)),
        files.root_sum_of_squares(kspace, (rows, width)),
        atol=1e-12,
    )


@settings(deadline=None, max_examples=15)
@given(crops())
def test_white_noise_stays_white_and_columns_stay_columns(sizes):
    height, _, rows = sizes
    # Cropping acts on each column alike; its matrix has orthonormal rows exactly if white noise stays white.
    matrix = crop_readout(torch.eye(height, dtype=torch.complex128), rows)
    torch.testing.assert_close(
        matrix @ matrix.mH, torch.eye(rows, dtype=torch.complex128), atol=1e-12, rtol=0
    )
    sampled = torch.arange(height) % 3 == 0
    masked = crop_readout(torch.eye(height, dtype=torch.complex128) * sampled, rows)
    torch.testing.assert_close(masked, matrix * sampled, atol=0, rtol=0)


def test_crop_readout_refuses_what_is_not_there():
    kspace = torch.ones(3, 8, 4, dtype=torch.complex64)
    assert crop_readout(kspace, 8) is kspace
    for height in (0, 9):
        with pytest.raises(ReconError, match=f"k-space with 8 rows cannot be cropped to {height}"):
            crop_readout(kspace, height)


@pytest.mark.parametrize(
    ("size", "shape", "rows", "columns"),
    [
        ((8, 9), (4, 4), (2, 6), (2, 6)),
        ((8, 8), (5, 3), (1, 6), (2, 5)),
        ((7, 7), (4, 6), (1, 5), (0, 6)),
        ((12, 6), (8, 8), (3, 9), (0, 6)),  # narrower than the crop: (6, 6)
    ],
)
def test_centre_crop(size, shape, rows, columns):
    image = np.arange(2 * size[0] * size[1]).reshape(2, *size)
    expected = image[:, slice(*rows), slice(*columns)]
    np.testing.assert_array_equal(centre_crop(image, shape), expected)
    np.testing.assert_array_equal(centre_crop(torch.from_numpy(image), shape), expected)


def test_centre_crop_refuses_to_pad():
    for shape, message in (((9, 4), "8 × 6 cannot be cropped to 9 × 4"), ((0, 4), "to 0 × 4")):
        with pytest.raises(ReconError, match=message):
            centre_crop(np.ones((8, 6)), shape)


# --- writing ------------------------------------------------------------------------------------------------

MEAN = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
STD = MEAN / 10


def write(path, provenance=None, order=(0, 1), mean=MEAN, late=()):
    with ReconstructionWriter(path, 2, (4, 6), provenance or {"seed": 1}) as writer:
        for i in order:
            writer.write_slice(i, mean[i], STD[i])
        writer.provenance.update(late)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "out" / "file1.h5"
    samples = np.arange(144).reshape(2, 3, 4, 6) * (1 + 2j)
    with ReconstructionWriter(path, 2, (4, 6), {"seed": 1}, num_samples=3) as writer:
        for i in (1, 0):
            writer.write_slice(
                i, torch.from_numpy(MEAN[i]), STD[i].astype(np.float64), torch.from_numpy(samples[i])
            )
            assert not path.exists()
        writer.provenance["scale"] = 2.5
    assert contents(path.parent) == ["file1.h5"]
    with h5py.File(path) as file:
        assert set(file) == {"reconstruction", "reconstruction_std", "samples"}
        assert [file[name].dtype for name in sorted(file)] == [np.float32, np.float32, np.complex64]
        np.testing.assert_array_equal(file["samples"], samples)
        assert json.loads(file.attrs["provenance"]) == {"seed": 1, "scale": 2.5}
        assert file.attrs["not_for_diagnostic_use"]
    np.testing.assert_array_equal(read_images(path), MEAN)
    np.testing.assert_array_equal(read_images(path, "reconstruction_std"), STD)


def test_samples_are_stored_only_if_kept(tmp_path):
    write(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        assert set(file) == {"reconstruction", "reconstruction_std"}


def test_a_result_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "f.h5"
    write(path)
    write(path, mean=MEAN + 1)
    np.testing.assert_array_equal(read_images(path), MEAN + 1)

    with pytest.raises(IndexError):
        write(path, mean=MEAN[:1])  # comes to no second slice
    with pytest.raises(ReconError, match=r"f.h5: slices \[1\] were not written"):
        write(path, order=(0,))
    np.testing.assert_array_equal(read_images(path), MEAN + 1)
    assert contents(tmp_path) == ["f.h5"]


@pytest.mark.parametrize("step", ["Dataset.__setitem__", "File.close", "Group.create_dataset"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, step):
    def refuse(*arguments, **keywords):
        raise OSError("No space left on device")

    owner, method = step.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(h5py, owner), method, refuse)
        with pytest.raises(ReconError, match=r"f.h5: cannot be written .*No space left on device"):
            write(tmp_path / "f.h5")
    assert contents(tmp_path) == []


def test_a_refused_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ReconError, match=r"f.h5: cannot be written .*Operation not permitted"):
        write(tmp_path / "f.h5")
    assert contents(tmp_path) == []


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ReconError, match=r"f.h5: cannot be written"):
        write(tmp_path / "file" / "f.h5")
    with pytest.raises(ReconError, match="it is a folder"):
        write(tmp_path)


def test_measured_data_is_never_overwritten(tmp_path):
    path = files.knee(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ReconError, match=r"file1000001.h5: not overwritten, it holds measured k-space"):
        write(path)
    assert path.read_bytes() == before


def test_a_broken_result_is_replaced(tmp_path):
    (tmp_path / "f.h5").write_text("not HDF5")
    write(tmp_path / "f.h5")
    np.testing.assert_array_equal(read_images(tmp_path / "f.h5"), MEAN)


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_provenance_must_be_json(tmp_path, value):
    with pytest.raises(ReconError, match="the provenance cannot be stored as JSON"):
        write(tmp_path / "f.h5", {"setting": value})
    with pytest.raises(ReconError, match="the provenance cannot be stored as JSON"):
        write(tmp_path / "f.h5", late={"setting": value})
    assert contents(tmp_path) == []


BAD_SLICES = {
    "shape": (
        (0, MEAN[0, :3], STD[0]),
        r"slice 0 of 'reconstruction' must have shape \(4, 6\), got \(3, 6\)",
    ),
    "complex": ((0, MEAN[0] * 1j, STD[0]), "slice 0 of 'reconstruction' must be real, got complex64"),
    "NaN": ((1, MEAN[0], STD[0] * np.nan), "slice 1 of 'reconstruction_std' holds NaN"),
    "samples": (
        (0, MEAN[0], STD[0], MEAN[:1]),
        "0 samples a slice were announced, but slice 0 has some",
    ),
    "index": ((2, MEAN[0], STD[0]), "there is no slice 2 to write"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_SLICES.values(), ids=BAD_SLICES)
def test_bad_slices(tmp_path, arguments, message):
    with (
        pytest.raises(ReconError, match=f"f.h5: {message}"),
        ReconstructionWriter(tmp_path / "f.h5", 2, (4, 6), {}) as writer,
    ):
        writer.write_slice(*arguments)
    assert contents(tmp_path) == []


def test_announced_samples_must_come(tmp_path):
    with (
        pytest.raises(ReconError, match="3 samples a slice were announced, but slice 0 has none"),
        ReconstructionWriter(tmp_path / "f.h5", 1, (4, 6), {}, num_samples=3) as writer,
    ):
        writer.write_slice(0, MEAN[0], STD[0])


# --- reading images -----------------------------------------------------------------------------------------


def test_find_target(tmp_path):
    assert find_target(files.knee(tmp_path)) == ("reconstruction_rss", "CORPD_FBK")
    assert find_target(files.singlecoil(tmp_path)) == ("reconstruction_esc", "CORPD_FBK")
    with pytest.raises(ReconError, match=r"6002440.h5: there is no target in it"):
        find_target(files.brain(tmp_path))


def test_images_that_cannot_be_read(tmp_path):
    path = files.knee(tmp_path)
    with pytest.raises(ReconError, match=r"file1000001.h5: there is no dataset 'reconstruction'"):
        read_images(path)
    with pytest.raises(ReconError, match="'kspace' must be real, got complex64"):
        read_images(path, "kspace")
    bad = files.write_file(tmp_path / "bad.h5", {"reconstruction": np.full((1, 4, 4), np.nan)})
    with pytest.raises(ReconError, match=r"bad.h5: dataset 'reconstruction' holds NaN"):
        read_images(bad)
