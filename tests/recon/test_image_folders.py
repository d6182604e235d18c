"""Volumes of all formats in files and folders, and whose they are."""

from __future__ import annotations

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from recon.errors import ReconError
from recon.image_folders import describe_volumes, find_volumes, natural_order, split_subjects
from recon.io.numpy_files import read_numpy
from recon.io.pictures import picture_size, read_picture
from tests.recon import fastmri_files


def values(*shape, seed=0, high=200):
    return np.random.default_rng(seed).integers(1, high, shape)


def nifti(path, data):
    path.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(nibabel.Nifti1Image(data.transpose(2, 1, 0), np.eye(4)), path)


def dicom(path, pixels, z, *, modality="MR", series="1.2", patient="Doe", number=1, **more):
    path.parent.mkdir(exist_ok=True, parents=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.dataset.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.PatientID, data.InstanceNumber = (
        modality,
        series,
        patient,
        number,
    )
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = pixels.astype("<u2").tobytes()
    for key, value in more.items():
        setattr(data, key, value)
    data.save_as(path, enforce_file_format=True)


def whole(volume):
    return volume.read(0, volume.num_slices).numpy()


def only(paths, kind="mr"):
    (volume,), problems = find_volumes(paths, kind)
    assert problems == []
    return volume


# Formats


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti(tmp_path, name):
    data = values(3, 4, 5).astype(np.int16) - 100
    nifti(tmp_path / name, data)
    volume = only([tmp_path])
    assert (volume.num_slices, volume.slice_bytes, volume.whole) == (3, 4 * 4 * 5, True)
    np.testing.assert_array_equal(whole(volume), data.clip(0))  # magnitudes are not negative
    np.testing.assert_array_equal(whole(only([tmp_path / name], "ct")), data)  # Hounsfield units are


def test_numpy(tmp_path):
    real, other = values(3, 4, 5).astype(np.float64), values(2, 6, 6) * (1 + 2j)
    np.save(tmp_path / "a.npy", real)
    np.savez_compressed(tmp_path / "b.npz", one=other, two=real[0], text=np.array("no image"))
    (a, one, two), problems = find_volumes([tmp_path], "mr")
    np.testing.assert_array_equal(whole(a), real)
    np.testing.assert_array_equal(whole(one), other)
    assert (one.num_slices, one.slice_bytes) == (2, 8 * 36)
    assert one.read(1, 2).dtype == torch.complex64
    np.testing.assert_array_equal(whole(two), real[:1])
    (problem,) = problems
    assert "b.npz: array 'text' holds" in problem
    with pytest.raises(ReconError, match=r"b.npz: array 'three': there is none such"):
        read_numpy(tmp_path / "b.npz", "three")
    np.save(tmp_path / "a.npy", np.array([[np.nan]]))
    with pytest.raises(ReconError, match=r"a.npy holds values that are not finite"):
        read_numpy(tmp_path / "a.npy")
    with pytest.raises(ReconError, match=r"absent.npy: there is no such file"):
        read_numpy(tmp_path / "absent.npy")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(3, 4, 5)", b"(3, 4, 5("),  # a header that ends in the middle, as a tokenizer sees it
        (b"'<f8'", b"'<z8'"),
        (b"(3, 4, 5)", b"(3, 4,-5)"),
        (b"(3, 4, 5), ", b"(3, 9**9),  "),
        (b"(3, 4, 5), }        ", b"(3, 999999999999), }"),  # more than any memory
    ],
)
def test_damaged_numpy_files_are_one_problem_each(tmp_path, old, new):
    np.save(tmp_path / "good.npy", values(3, 4, 5))
    np.save(tmp_path / "bad.npy", values(3, 4, 5).astype(float))
    content = (tmp_path / "bad.npy").read_bytes()
    assert old in content
    (tmp_path / "bad.npy").write_bytes(content.replace(old, new))
    (volume,), (problem,) = find_volumes([tmp_path], "mr")
    assert volume.path == tmp_path / "good.npy"
    assert "bad.npy" in problem
    with pytest.raises(ReconError, match=r"bad.npy"):
        read_numpy(tmp_path / "bad.npy")


def test_archives_and_arrays_by_the_names_of_each_other(tmp_path):
    np.savez(tmp_path / "a.npz", values(4, 5))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ReconError, match=r"a.npy cannot be read .* it holds an archive of arrays \(.npz\)"):
        read_numpy(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", values(4, 5))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ReconError, match=r"b.npz cannot be read .* it holds one array \(.npy\)"):
        read_numpy(tmp_path / "b.npz", "a")


def test_no_code_in_numpy_files_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    for attempt in (lambda: find_volumes([tmp_path], "mr"), lambda: read_numpy(tmp_path / "a.npy")):
        with pytest.raises(ReconError, match=r"a.npy"):
            attempt()
    assert not (tmp_path / "sprung").exists()


def test_pictures_of_a_folder_are_slices_in_the_order_of_their_numbers(tmp_path):
    pixels = values(11, 4, 5)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    volume = only([tmp_path], "images")
    assert (volume.num_slices, volume.slice_bytes, volume.whole) == (11, 80, False)
    np.testing.assert_array_equal(whole(volume), pixels)
    np.testing.assert_array_equal(volume.read(9, 11), pixels[9:])
    Image.fromarray(values(3, 3).astype(np.uint8)).save(tmp_path / "10.png")
    assert only([tmp_path], "images").read(10, 11).shape == (1, 3, 3)
    with pytest.raises(ReconError, match="neighbouring pictures differ in size"):
        only([tmp_path], "images").read(9, 11)


def test_pictures_of_all_depths(tmp_path):
    deep = values(4, 5, high=60000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png"), deep)
    colour = values(4, 5, 4).astype(np.uint8)
    for mode, channels in (("RGB", 3), ("RGBA", 4)):
        Image.fromarray(colour[..., :channels]).save(tmp_path / f"{mode}.png")
        expected = colour[..., :3] @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(read_picture(tmp_path / f"{mode}.png"), expected, rtol=1e-6)
    grey = colour[..., 0]
    Image.fromarray(np.repeat(grey[..., None], 3, axis=-1)).quantize().save(tmp_path / "palette.png")
    np.testing.assert_allclose(read_picture(tmp_path / "palette.png"), grey, rtol=1e-6)
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "bits.png"), 255.0 * (grey > 100))
    flat = np.full((16, 16), 90, np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(read_picture(tmp_path / "a.jpg"), flat, atol=1)
    assert picture_size(tmp_path / "deep.png") == (4, 5)
    whole_file = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole_file[:-30])
    with pytest.raises(ReconError, match=r"short.png cannot be read as a picture"):
        read_picture(tmp_path / "short.png")


def test_tiff_pages_and_files(tmp_path):
    pages = values(3, 4, 5).astype(np.uint16)
    (tmp_path / "single").mkdir()
    for index, page in enumerate(pages):
        tifffile.imwrite(tmp_path / "single" / f"{index + 9}.tif", page)
    tifffile.imwrite(tmp_path / "stack.tiff", pages, photometric="minisblack")
    found, problems = find_volumes([tmp_path], "images")
    assert problems == []
    assert sorted(volume.path.name for volume in found) == ["single", "stack.tiff"]
    for volume in found:
        np.testing.assert_array_equal(whole(volume), pages)
        np.testing.assert_array_equal(volume.read(1, 2), pages[1:2])


def test_dicom_series_of_two_patients(tmp_path):
    pixels = values(2, 3, 4, 5)
    for number in range(2):
        for place in range(3):
            name = tmp_path / f"{(place * 2) % 3}{number}"  # neither by name nor by ending
            more = {"series": f"1.{number}", "patient": f"Doe{number}", "RescaleSlope": 2.0}
            dicom(name, pixels[number, place], 5.0 * place, **more)
    dicom(tmp_path / "phase.dcm", pixels[0, 0], 0, series="1.7", ImageType=["ORIGINAL", "PRIMARY", "P", "ND"])
    dicom(tmp_path / "xray.dcm", pixels[0, 0], 0, series="1.8", modality="DX")
    found, problems = find_volumes([tmp_path], "mr")
    assert problems == []
    np.testing.assert_array_equal(sorted(whole(v)[0, 0, 0] for v in found), sorted(2 * pixels[:, 0, 0, 0]))
    for volume in found:
        number = 0 if whole(volume)[0, 0, 0] == 2 * pixels[0, 0, 0, 0] else 1
        np.testing.assert_array_equal(whole(volume), 2 * pixels[number])
    assert len({volume.subject for volume in found}) == 2
    assert not any("Doe" in volume.subject + volume.name for volume in found)


def test_dicom_ct_is_in_hounsfield_units(tmp_path):
    pixels = values(2, 4, 5) + 1000
    pixels[0, 0, 0] = 0
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelPaddingValue": 0, "modality": "CT"}
    for place in range(2):
        dicom(tmp_path / f"{place}.dcm", pixels[place], -place, **rescale)
    expected = pixels[::-1].astype(float) - 1024
    expected[1, 0, 0] = -1000  # outside of the scanner's circle there is air
    np.testing.assert_array_equal(whole(only([tmp_path], "ct")), expected)
    with pytest.raises(ReconError, match=r"its series is of CT images, which --kind mr does not take"):
        find_volumes([tmp_path], "mr")
    dicom(tmp_path / "0.dcm", pixels[0], 0, modality="CT", RescaleSlope=1)
    with pytest.raises(ReconError, match=r"0.dcm has no RescaleIntercept, so no Hounsfield units"):
        whole(only([tmp_path / "0.dcm"], "ct"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_damaged_dicom_is_listed(tmp_path):
    dicom(tmp_path / "good.dcm", values(4, 5), 0)
    (tmp_path / "text.dcm").write_text("no image")
    dicom(tmp_path / "movie.dcm", values(4, 5), 1, series="1.9", NumberOfFrames=2)
    dicom(tmp_path / "number.dcm", values(4, 5), 2)
    instance = b"\x20\x00\x13\x00IS\x02\x00"
    whole_file = (tmp_path / "number.dcm").read_bytes()
    (tmp_path / "number.dcm").write_bytes(whole_file.replace(instance + b"1 ", instance + b"x "))
    (volume,), problems = find_volumes([tmp_path], "mr")
    assert volume.path == tmp_path / "good.dcm"
    (movie, number, text) = problems
    assert "movie.dcm holds several frames" in movie
    assert "number.dcm has a damaged header" in number
    assert "text.dcm cannot be read as DICOM" in text


# fastMRI


def smooth_images(num_slices, height, width):
    """Complex objects with a phase of their own, which are zero at the borders."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    radii = np.linspace(0.3, 0.6, num_slices)[:, None, None]
    return 1e-4 / (1 + np.exp(30 * (np.hypot(2 * y, x) - radii))) * np.exp(1j * (x + y**2))


def test_coils_are_combined_into_the_complex_image(tmp_path):
    truth = smooth_images(2, 64, 40)
    y, x = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 40), indexing="ij")
    angles = 2 * np.pi * np.arange(4)[:, None, None] / 4
    coils = np.exp(-((x - np.cos(angles)) ** 2 + (y - np.sin(angles)) ** 2) / 2 + 1j * angles)
    coils /= np.sqrt((abs(coils) ** 2).sum(0))
    kspace = fastmri_files.fft2c(truth[:, None] * coils)
    target = abs(truth[:, 16:48, 4:36]).astype(np.float32)
    kspace = np.concatenate([kspace, 1e-3 * kspace[:1], 0 * kspace[:1]]).astype(np.complex64)
    target = np.concatenate([target, 1e-3 * target[:1], 0 * target[:1]])
    header = fastmri_files.header_xml((64, 40), (32, 32), center=20, maximum=39)
    datasets = {"kspace": kspace, "reconstruction_rss": target, "ismrmrd_header": header}
    fastmri_files.write_file(tmp_path / "knee.h5", datasets)
    volume = only([tmp_path])
    assert (volume.num_slices, volume.slice_bytes, volume.whole) == (4, 8 * 32 * 32, False)
    images = volume.read(0, 2).numpy()
    assert images.dtype == np.complex64
    for image, wanted in zip(images, truth[:, 16:48, 4:36], strict=True):
        error = np.linalg.norm(abs(image) - abs(wanted)) / np.linalg.norm(wanted)
        assert error < 0.02  # the calibration region holds 24 samples of maps that are no polynomials
        # Its phase is its own but for that of the maps, which has no meaning and is smooth.
        inside = abs(wanted) > 0.5 * abs(wanted).max()
        turn = (image * wanted.conj())[inside]
        assert abs(turn.sum()) / abs(turn).sum() > 0.95
    assert not volume.read(3, 4).any()
    energies = volume.energies()
    sums = (target.astype(float) ** 2).sum((1, 2))
    np.testing.assert_allclose(energies / energies.max(), sums / sums.max(), atol=0.05)


def test_a_single_coil_needs_no_maps(tmp_path):
    truth = smooth_images(2, 64, 40)
    datasets = {
        "kspace": fastmri_files.fft2c(truth).astype(np.complex64),
        "ismrmrd_header": fastmri_files.header_xml((64, 40), (32, 32), center=20, maximum=39),
    }
    fastmri_files.write_file(tmp_path / "knee.h5", datasets)
    np.testing.assert_allclose(whole(only([tmp_path])), truth[:, 16:48, 4:36], atol=1e-9)


def test_undersampled_files_hold_no_clean_image(tmp_path):
    fastmri_files.undersampled(tmp_path)
    with pytest.raises(ReconError, match=r"is undersampled \(it has a mask\), so it holds no clean image"):
        find_volumes([tmp_path], "mr")


def test_zeros_instead_of_a_mask_hold_no_clean_image_either(tmp_path):
    with h5py.File(fastmri_files.undersampled(tmp_path), "r+") as file:
        del file["mask"]
    with pytest.raises(ReconError, match=r"is undersampled \(samples of slice 1 are zero\), so it holds no"):
        find_volumes([tmp_path], "mr")
    # The middle slice stands for all until they are read.
    path = fastmri_files.knee(tmp_path)
    with h5py.File(path, "r+") as file:
        file["kspace"][0, ..., 10:14] = 0
    volume = only([path])
    assert volume.read(1, 2).any()
    with pytest.raises(ReconError, match=r"file1000001.h5 is undersampled \(samples of slice 0 are zero\)"):
        volume.read(0, 1)


# What does not fit


@pytest.mark.parametrize(
    ("name", "kind", "pattern"),
    [
        ("a.png", "ct", "PNG and JPEG pictures hold no Hounsfield units"),
        ("a.tif", "ct", "TIFF pictures hold no Hounsfield units"),
        ("complex.npy", "ct", "holds complex numbers, which are no Hounsfield units"),
        ("text.nii", "mr", "text.nii cannot be read as NIfTI"),
        ("text.h5", "mr", "holds no k-space; HDF5 files of CT series need --kind ct"),
        ("text.txt", "mr", "text.txt is of no format that images are read from"),
        ("text.png", "images", "text.png is no PNG or JPEG picture"),
        ("absent.npy", "mr", "absent.npy: there is no such file"),
        ("a.png", "film", "there are no images of kind 'film'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, kind, pattern):
    Image.fromarray(values(4, 5).astype(np.uint8)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", values(4, 5).astype(np.uint8))
    np.save(tmp_path / "complex.npy", np.ones((4, 5), complex))
    for text in ("text.nii", "text.h5", "text.txt", "text.png"):
        (tmp_path / text).write_text("no image")
    with pytest.raises(ReconError, match=pattern):
        find_volumes([tmp_path / name], kind)


def test_numbers_that_are_no_hounsfield_units(tmp_path):
    np.save(tmp_path / "a.npy", values(3, 4, 5))
    with pytest.raises(ReconError, match=r"a.npy holds values from .* which are no Hounsfield units"):
        whole(only([tmp_path], "ct"))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ReconError, match="there is no image of a known format in"):
        find_volumes([tmp_path], "mr")


# Subjects


def test_subjects_are_the_folders_in_which_volumes_part(tmp_path):
    for name in ("a/sub-1/anat/t1.npy", "a/sub-1/anat/t2.npy", "a/sub-2/t1.npy", "a/sub-10.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, values(2, 4, 5))
    found, _ = find_volumes([tmp_path], "mr")
    assert [volume.subject for volume in found] == ["sub-1", "sub-1", "sub-2", "sub-10.npy"]
    given, _ = find_volumes([tmp_path / "a/sub-2", tmp_path / "a/sub-1", tmp_path / "a/sub-1"], "mr")
    assert [volume.subject for volume in given] == ["sub-2", "sub-1", "sub-1"]  # each file once


def test_one_person_in_several_formats_is_one_subject(tmp_path):
    for number in range(4):
        nifti(tmp_path / f"sub-{number}" / "t1.nii", values(3, 4, 5).astype(np.int16))
        place = tmp_path / ("sub-0" if number == 3 else f"sub-{number}") / "dicom" / f"{number}.dcm"
        dicom(place, values(4, 5), 0, series=f"1.{number}", patient="Roe" if number > 1 else f"Doe{number}")
    for number in range(3):  # a folder of nothing but patients
        dicom(
            tmp_path / "more" / f"{number}.dcm", values(4, 5), 0, series=f"2.{number}", patient=f"P{number}"
        )

    def groups(paths):
        found, problems = find_volumes(paths, "mr")
        assert problems == []
        together: dict[str, set[str]] = {}
        for volume in found:
            together.setdefault(volume.subject, set()).add(volume.path.relative_to(tmp_path).as_posix())
        return together

    together = groups([tmp_path])
    # Roe's series are in the folders of 0 and of 2, so that these are one person; 3 has no series.
    zero, two = ({f"sub-{n}/t1.nii", f"sub-{n}/dicom/{n}.dcm"} for n in (0, 2))
    assert together.pop("sub-0") == zero | two | {"sub-0/dicom/3.dcm"}
    assert together.pop("sub-1") == {"sub-1/t1.nii", "sub-1/dicom/1.dcm"}
    assert together.pop("sub-3") == {"sub-3/t1.nii"}
    assert sorted(map(len, together.values())) == [1, 1, 1]
    folders = sorted(tmp_path.iterdir())
    assert groups(folders[::-1]) == groups(folders) == groups([tmp_path])
    # Where only one subject has other files than DICOM, too.
    one = groups([tmp_path / "sub-1", tmp_path / "more"])
    assert one["sub-1"] == {"sub-1/t1.nii", "sub-1/dicom/1.dcm"}


def test_volumes_in_few_words(tmp_path):
    for subject in "ab":
        (tmp_path / "data" / subject).mkdir(parents=True)
        np.save(tmp_path / "data" / subject / "v.npy", values(2, 4, 5))

    def words(*paths):
        return describe_volumes(find_volumes(paths, "mr")[0], paths)

    both, one, other = words(tmp_path / "data"), words(tmp_path / "data/a"), words(tmp_path / "data/b")
    assert both.startswith("2 volumes (")
    assert one.startswith("1 volume (")
    assert len({both, one, other}) == 3
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").rename(tmp_path / "disk" / "data")
    assert words(tmp_path / "disk" / "data") == both  # moved as a whole
    np.save(tmp_path / "disk" / "data" / "a" / "v.npy", values(3, 4, 5))
    assert words(tmp_path / "disk" / "data") != both


def test_a_tenth_of_the_subjects_is_held_out(tmp_path):
    for subject in range(20):
        for part in "ab":
            (tmp_path / f"s{subject}").mkdir(exist_ok=True)
            np.save(tmp_path / f"s{subject}" / f"{part}.npy", values(2, 4, 5))
    found, _ = find_volumes([tmp_path], "mr")
    learned, held_out, sentence = split_subjects(found)
    assert (len(learned), len(held_out)) == (36, 4)
    names = {volume.subject for volume in held_out}
    assert names.isdisjoint({volume.subject for volume in learned})
    assert sentence == f"2 of 20 subjects held out for validation: {', '.join(sorted(names))}"
    # By their names and the seed, whatever the order.
    assert {v.subject for v in split_subjects(found[::-1])[1]} == names
    assert {v.subject for v in split_subjects(found, seed=1)[1]} != names
    with pytest.raises(
        ReconError, match=r"all images seem to be of one subject \(s3\), so none can be held out"
    ):
        split_subjects([volume for volume in found if volume.subject == "s3"])


def test_numbers_in_names_count_as_numbers():
    names = [Path("s9/2.png"), Path("s9/11.png"), Path("s10/2.png")]
    assert sorted([names[2], names[1], names[0]], key=natural_order) == names
