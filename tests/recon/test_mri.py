from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from operators.espirit import CalibrationWarning
from operators.masks import Mask, make_mask
from priors import Contract, DenoisingUNet, GaussianPrior, NetworkPrior, NetworkSettings, PriorError
from recon import DDS, ReconError
from recon.io.fastmri import FastMRIFile
from recon.mri import (
    MRISettings,
    SliceResult,
    anatomy_of,
    calibration_region,
    find_sampling,
    reconstruct_file,
    slice_problem,
)
from recon.solvers.zero_filled import ZeroFilled
from tests.recon import fastmri_files as files

UNDERSAMPLED = MRISettings("equispaced", 3.0, center_fraction=0.2, num_samples=2, seed=1)
FAST = DDS(nfe=3)


def tiny_prior(anatomy: tuple[str, ...] = ("knee",)) -> NetworkPrior:
    # A fresh network's head is zero: what is left, the skip connection, denoises Gaussian images exactly.
    settings = NetworkSettings(widths=(8,), blocks=1, embedding=8, sigma_data=0.5)
    contract = Contract(name="tiny", anatomy=anatomy, size_multiple=settings.size_multiple)
    return NetworkPrior(DenoisingUNet(settings), contract).eval().requires_grad_(False)


PRIOR = tiny_prior()


def reconstruct(source, out, settings=UNDERSAMPLED, *, prior=PRIOR, solver=FAST, **kwargs):
    provenance = reconstruct_file(source, out, prior, solver, settings, **kwargs)
    with h5py.File(out) as file:
        return provenance, {name: file[name][()] for name in file}


def same_bits(first, second):
    assert first.keys() == second.keys()
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


def changed(source, target, change):
    """Copy a file, with `change` applied to its k-space."""
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        kspace = file["kspace"][()]
        change(kspace)
        file["kspace"][...] = kspace
    return target


def test_what_is_written(tmp_path):
    source, out = files.knee(tmp_path), tmp_path / "out" / "result.h5"
    settings = replace(UNDERSAMPLED, keep_samples=True)
    facts = {"file": "tiny.safetensors", "sha256": "ab"}
    returned, data = reconstruct(source, out, settings, prior_facts=facts)
    assert {name: (value.shape, value.dtype) for name, value in data.items()} == {
        "reconstruction": ((2, 32, 32), np.float32),
        "reconstruction_std": ((2, 32, 32), np.float32),
        "samples": ((2, 2, 32, 32), np.complex64),
    }
    samples = data["samples"].astype(np.complex128)
    np.testing.assert_allclose(data["reconstruction"], np.abs(samples.mean(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(
        data["reconstruction_std"], np.abs(samples).std(axis=1, ddof=1), rtol=1e-3, atol=1e-10
    )
    with h5py.File(out) as file:
        assert set(file.attrs) == {"provenance", "not_for_diagnostic_use"}
        assert file.attrs["not_for_diagnostic_use"]
        provenance = json.loads(file.attrs["provenance"])
    assert provenance == returned
    assert set(provenance) == {
        "notice",
        "units",
        "solver",
        "prior",
        "seed",
        "num_samples",
        "mask",
        "coil_maps",
        "num_coils",
        "noise_std",
        "noise_floor",
        "calibrated_uncertainty",
        "device",
        "versions",
        "slices",
        "warnings",
    }
    assert provenance["solver"]["name"] == "DDS"
    assert provenance["solver"]["nfe"] == 3
    assert provenance["prior"] == {"name": "tiny", **facts}
    assert (provenance["seed"], provenance["num_samples"], provenance["num_coils"]) == (1, 2, 3)
    assert set(provenance["versions"]) == {"dis-recon", "torch", "numpy", "h5py"}
    assert [facts["index"] for facts in provenance["slices"]] == [0, 1]
    for facts in provenance["slices"]:
        assert facts["nfe"] == 3
        assert facts["threads"] == torch.get_num_threads()
        assert min(facts["scale"], facts["noise_std"], facts["residual"]) > 0
    # The mask, redrawn from what is written about it and the file's name.
    mask = provenance["mask"]
    drawn = make_mask(
        mask["name"],
        (32, 46),
        mask["asked_acceleration"],
        center_fraction=mask["asked_center_fraction"],
        seed=source.stem,
        valid_columns=(3, 43),
    )
    assert mask["realised_acceleration"] == drawn.acceleration == 40 / int(drawn.mask.sum())
    assert isinstance(drawn.acs, slice)
    assert mask["calibration"] == [[drawn.acs.start, drawn.acs.stop]]

    assert "samples" not in reconstruct(source, tmp_path / "out" / "few.h5")[1]
    assert sorted(path.name for path in out.parent.iterdir()) == ["few.h5", "result.h5"]


def test_a_solver_without_a_prior_keeps_its_one_image(tmp_path):
    settings = replace(UNDERSAMPLED, keep_samples=True, num_samples=8)
    provenance, data = reconstruct(
        files.knee(tmp_path), tmp_path / "out.h5", settings, prior=None, solver=ZeroFilled()
    )
    assert provenance["num_samples"] == 1
    assert data["samples"].shape == (2, 1, 32, 32)
    np.testing.assert_allclose(np.abs(data["samples"][:, 0]), data["reconstruction"], rtol=1e-6)


def test_nothing_leads_to_the_patient(tmp_path):
    folder = tmp_path / "Doe, Jane 1970-01-01"
    folder.mkdir()
    source = changed(files.knee(tmp_path), folder / "scan.h5", lambda kspace: kspace[1].fill(0))
    out = tmp_path / "out.h5"
    provenance, _ = reconstruct(source, out)
    content = out.read_bytes() + json.dumps(provenance).encode()
    assert files.PATIENT.encode() in source.read_bytes()
    assert files.PATIENT.encode() not in content
    assert b"Jane" not in content


@pytest.mark.parametrize("make", [files.brain, files.singlecoil])
def test_fully_sampled_data_give_their_root_sum_of_squares(tmp_path, make):
    source = make(tmp_path)
    with FastMRIFile(source) as file:
        target, shape = file.target_shape, (file.readout_height, file.shape[1])
    with h5py.File(source) as file:
        kspace = file["kspace"][()]
    kspace = kspace if kspace.ndim == 4 else kspace[:, None]
    truth = files.root_sum_of_squares(kspace, target)
    prior = GaussianPrior(torch.zeros(shape, dtype=torch.complex64), variance=1.0)
    for factor in (1.0, 1024.0):
        scaled = changed(
            source, tmp_path / "scaled" / source.name, lambda k, c=factor: np.multiply(k, c, out=k)
        )
        _, data = reconstruct(scaled, tmp_path / "out.h5", MRISettings(num_samples=4), prior=prior)
        error = np.linalg.norm(data["reconstruction"] / factor - truth) / np.linalg.norm(truth)
        assert error < 0.025  # the spread of a posterior as wide as the noise, over the root of 4 samples
        assert 0 < data["reconstruction_std"].mean() / factor < 0.02 * truth.max()


def test_kspace_times_c_gives_the_image_times_c(tmp_path):
    source = files.knee(tmp_path)
    # A fixed number of steps: whether a tolerance is met a step earlier may hang on the last bit.
    solver = DDS(nfe=3, cg_iterations=4, cg_tolerance=0.0)
    first, data = reconstruct(source, tmp_path / "first.h5", solver=solver)
    for factor in (1e-3, 7e5):
        scaled = changed(
            source, tmp_path / "scaled" / source.name, lambda k, c=factor: np.multiply(k, c, out=k)
        )
        second, times = reconstruct(scaled, tmp_path / "second.h5", solver=solver)
        for name, value in data.items():
            np.testing.assert_allclose(times[name], factor * value, atol=1e-3 * factor * value.max())
        assert second["slices"][0]["scale"] == pytest.approx(factor * first["slices"][0]["scale"], rel=1e-4)


def test_only_sampled_data_are_looked_at(tmp_path):
    source = files.knee(tmp_path)
    with FastMRIFile(source) as file:
        mask = find_sampling(file, UNDERSAMPLED).mask.mask
    settings = replace(UNDERSAMPLED, keep_samples=True)
    _, data = reconstruct(source, tmp_path / "first.h5", settings)

    def garble(kspace):
        left_out = ~mask[0].numpy()
        left_out[:3] = left_out[43:] = False  # padding stays padding
        kspace[..., left_out] = np.random.default_rng(0).standard_normal(int(left_out.sum()))

    garbled = changed(source, tmp_path / "garbled" / source.name, garble)
    assert same_bits(data, reconstruct(garbled, tmp_path / "second.h5", settings)[1])
    # The comparison can tell: one sampled value makes a difference.
    column = int(mask[0].nonzero()[-1])

    def touch(kspace):
        kspace[:, 0, 32, column] *= 1.1

    touched = changed(source, tmp_path / "touched" / source.name, touch)
    assert not same_bits(data, reconstruct(touched, tmp_path / "third.h5", settings)[1])


def test_maps_come_from_the_calibration_region_alone():
    kspace = torch.from_numpy(files.make_kspace(1, 4, 64, 48)[0])
    mask = make_mask("equispaced", (64, 48), 3, center_fraction=0.4, seed="a")
    rows, columns = calibration_region(mask, (64, 48))
    inside = torch.zeros(64, 48, dtype=torch.bool)
    inside[rows, columns] = True

    def maps(data):
        return slice_problem(data, mask, noise_std=1e-6).operator.maps

    garbled = kspace.flip(-1) * torch.linspace(1, 3, 4)[:, None, None]
    assert torch.equal(maps(kspace), maps(torch.where(inside, kspace, garbled)))
    assert not torch.equal(maps(kspace), maps(torch.where(inside, garbled, kspace)))


def test_one_mask_a_volume_from_its_name(tmp_path):
    seen: list[SliceResult] = []
    source = files.knee(tmp_path)
    first, _ = reconstruct(source, tmp_path / "out.h5", on_slice=seen.append)
    second, _ = reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, seed=9), on_slice=seen.append)
    assert first["mask"] == second["mask"]
    assert len(seen) == 4
    assert all(torch.equal(result.mask, seen[0].mask) for result in seen)
    masks = set()
    for name in ("a.h5", "b.h5", "c.h5", "d.h5"):
        with FastMRIFile(files.knee(tmp_path, name)) as file:
            masks.add(tuple(find_sampling(file, UNDERSAMPLED).mask.mask[0].tolist()))
    assert len(masks) > 1


def test_slices_for_figures(tmp_path):
    source = files.knee(tmp_path)
    seen: list[SliceResult] = []
    _, data = reconstruct(source, tmp_path / "out.h5", on_slice=seen.append)
    for index, result in enumerate(seen):
        assert result.index == index
        assert result.mask.shape == (1, 46)
        assert not result.mask[:, :3].any()  # padding
        assert not result.mask[:, 43:].any()
        np.testing.assert_array_equal(result.mean, data["reconstruction"][index])
        np.testing.assert_array_equal(result.std, data["reconstruction_std"][index])
        assert result.target is not None
        with h5py.File(source) as file:
            np.testing.assert_allclose(result.target, file["reconstruction_rss"][index])
            masked = file["kspace"][index] * result.mask.numpy()
        expected = files.root_sum_of_squares(masked, (32, 32))
        np.testing.assert_allclose(result.zero_filled, expected, rtol=1e-4, atol=1e-9)


def test_a_bad_target_matters_only_where_it_is_shown(tmp_path):
    source = files.knee(tmp_path)
    with h5py.File(source, "r+") as file:
        file["reconstruction_rss"][0, 0, 0] = np.nan
    reconstruct(source, tmp_path / "out.h5")
    with pytest.raises(ReconError, match="slice 0 of dataset 'reconstruction_rss' holds NaN"):
        reconstruct(source, tmp_path / "other.h5", on_slice=lambda result: None)


@pytest.mark.parametrize(
    ("make", "shape"), [(files.knee, (32, 32)), (files.brain, (41, 41)), (files.singlecoil, (32, 32))]
)
@pytest.mark.parametrize("kind", ["random", "poisson"])
def test_every_layout(tmp_path, make, shape, kind):
    source = make(tmp_path)
    settings = replace(UNDERSAMPLED, mask=kind, center_fraction=0.3, acceleration=2.0)
    provenance, data = reconstruct(source, tmp_path / "out.h5", settings)
    assert data["reconstruction"].shape[1:] == shape
    assert data["reconstruction"].min() >= 0
    assert data["reconstruction"].mean() > 0
    assert (provenance["coil_maps"] is None) == (make is files.singlecoil)


def test_a_single_coil_needs_no_calibration_region(tmp_path):
    settings = replace(UNDERSAMPLED, center_fraction=0.0)
    provenance, _ = reconstruct(files.singlecoil(tmp_path), tmp_path / "out.h5", settings)
    assert provenance["coil_maps"] is None
    with pytest.raises(ReconError, match=r"file1000001.h5: no calibration region"):
        reconstruct(files.knee(tmp_path), tmp_path / "other.h5", settings)
    assert not (tmp_path / "other.h5").exists()


class TestAcquiredUndersampled:
    def test_mask_of_the_file(self, tmp_path):
        source = files.undersampled(tmp_path)
        provenance, data = reconstruct(source, tmp_path / "out.h5", MRISettings(num_samples=1))
        with h5py.File(source) as file:
            sampled = int(file["mask"][3:43].sum())
        assert provenance["mask"]["name"] == "acquired"
        assert provenance["mask"]["asked_acceleration"] is None
        assert provenance["mask"]["realised_acceleration"] == 40 / sampled
        assert not data["reconstruction_std"].any()  # of one sample

        def fill(kspace):
            with h5py.File(source) as file:
                kspace[..., file["mask"][()] == 0] = 1e-3

        filled = changed(source, tmp_path / "filled" / source.name, fill)
        assert same_bits(data, reconstruct(filled, tmp_path / "other.h5", MRISettings(num_samples=1))[1])

    def test_zeros_instead_of_a_mask(self, tmp_path):
        source = files.undersampled(tmp_path)
        provenance, data = reconstruct(source, tmp_path / "out.h5", MRISettings(num_samples=2))
        with h5py.File(source, "r+") as file:
            del file["mask"]
        other, bits = reconstruct(source, tmp_path / "other.h5", MRISettings(num_samples=2))
        assert other["mask"]["calibration"] == provenance["mask"]["calibration"]
        # Columns that were left out at the edges cannot be told from padding.
        assert 0.9 < other["mask"]["realised_acceleration"] / provenance["mask"]["realised_acceleration"] <= 1
        assert same_bits(data, bits)

    def test_samples_instead_of_columns(self, tmp_path):
        source = files.knee(tmp_path)
        with h5py.File(source, "r+") as file:
            del file["ismrmrd_header"]
        mask = make_mask("poisson", (64, 46), 2.0, seed=1, valid_columns=(3, 43))
        source = changed(source, tmp_path / "a" / "a.h5", lambda k: np.multiply(k, mask.mask.numpy(), out=k))
        seen: list[SliceResult] = []
        provenance, data = reconstruct(
            source, tmp_path / "out.h5", MRISettings(num_samples=1), on_slice=seen.append
        )
        # No row may be mixed with another before the data are used: the readout is not cropped.
        assert torch.equal(seen[0].mask, mask.mask)
        assert provenance["mask"]["realised_acceleration"] == pytest.approx(2.0, rel=0.15)
        assert data["reconstruction"].shape == (2, 32, 32)

    def test_samples_that_differ_between_slices(self, tmp_path):
        source = files.knee(tmp_path)
        with h5py.File(source, "r+") as file:
            del file["ismrmrd_header"]
        masks = [make_mask("poisson", (64, 46), 2.0, seed=seed, valid_columns=(3, 43)) for seed in (1, 2)]
        differ, alike = (
            changed(
                source,
                tmp_path / folder / "a.h5",
                lambda k, pair=pair: np.multiply(k, np.stack([m.mask.numpy()[None] for m in pair]), out=k),
            )
            for folder, pair in (("differ", masks), ("alike", [masks[1]] * 2))
        )
        seen: list[SliceResult] = []
        provenance, data = reconstruct(
            differ, tmp_path / "out.h5", MRISettings(num_samples=1), on_slice=seen.append
        )
        other, expected = reconstruct(alike, tmp_path / "out.h5", MRISettings(num_samples=1))
        assert all(torch.equal(result.mask, m.mask) for result, m in zip(seen, masks, strict=True))
        assert data["reconstruction"][1].tobytes() == expected["reconstruction"][1].tobytes()
        accelerations = [facts["realised_acceleration"] for facts in provenance["slices"]]
        assert accelerations == [m.acceleration for m in masks]
        assert provenance["mask"]["realised_acceleration"] == pytest.approx(sum(accelerations) / 2)
        note = "the samples differ between slices: each slice is reconstructed from its own"
        assert note in provenance["warnings"]
        assert note not in other["warnings"]

    def test_samples_that_fill_whole_columns_together(self, tmp_path):
        masks = [make_mask("poisson", (32, 24), 2.0, seed=seed).mask for seed in range(12)]
        kspace = files.make_kspace(12, 2, 32, 24) * np.stack([mask.numpy()[None] for mask in masks])
        source = files.write_file(tmp_path / "a.h5", {"kspace": kspace.astype(np.complex64)})
        with FastMRIFile(source) as file:
            sampling = find_sampling(file, MRISettings())
            assert len(sampling.mask.mask) == 1
            assert sampling.height == 32
            for measured, mask in zip(sampling.measured, masks, strict=True):
                assert measured is not None
                assert torch.equal(measured, mask)
            with pytest.raises(ReconError, match=r"a.h5: the data are undersampled already"):
                find_sampling(file, UNDERSAMPLED)

    @pytest.mark.parametrize("keep_mask", [True, False])
    def test_a_second_mask_is_refused(self, tmp_path, keep_mask):
        source = files.undersampled(tmp_path)
        if not keep_mask:
            with h5py.File(source, "r+") as file:
                del file["mask"]
        with pytest.raises(ReconError, match=r"file1000003.h5: the data are undersampled already"):
            reconstruct(source, tmp_path / "out.h5")

    def test_a_slice_that_lacks_a_column(self, tmp_path):
        source = files.knee(tmp_path)
        with FastMRIFile(source) as file:
            mask = find_sampling(file, UNDERSAMPLED).mask.mask[0]
        column = int(mask.nonzero()[0])
        source = changed(source, tmp_path / "a" / source.name, lambda k: k[1, ..., column].fill(0))
        seen: list[SliceResult] = []
        provenance, _ = reconstruct(source, tmp_path / "out.h5", on_slice=seen.append)
        assert torch.equal(seen[0].mask[0], mask)
        mask[column] = False
        assert torch.equal(seen[1].mask[0], mask)
        assert provenance["slices"][1]["realised_acceleration"] == 40 / int(mask.sum())
        assert any(note.startswith("slice 1 lacks columns") for note in provenance["warnings"])


class TestEmptySlices:
    @pytest.mark.parametrize("empty", [0, 1, 2])
    def test_is_zero_with_a_note(self, tmp_path, empty):
        source = files.brain(tmp_path)
        settings = replace(UNDERSAMPLED, keep_samples=True)
        _, full = reconstruct(source, tmp_path / "full.h5", settings)
        holed = changed(source, tmp_path / "a" / source.name, lambda k: k[empty].fill(0))
        progress: list[tuple[float, int]] = []
        seen: list[SliceResult] = []
        provenance, data = reconstruct(
            holed,
            tmp_path / "out.h5",
            settings,
            on_progress=lambda done, total: progress.append((done, total)),
            on_slice=seen.append,
        )
        others = [index for index in range(3) if index != empty]
        for name, value in data.items():
            assert not value[empty].any()
            assert value[others].tobytes() == full[name][others].tobytes()
        assert f"slice {empty} holds no measurement: its reconstruction is zero" in provenance["warnings"]
        assert [facts["index"] for facts in provenance["slices"]] == others
        assert [result.index for result in seen] == others
        assert [total for _, total in progress] == [3] * len(progress)
        done = [done for done, _ in progress]
        assert done == sorted(done)
        assert done[-1] == 3

    @pytest.mark.parametrize("make", [files.knee, files.undersampled])
    def test_all_of_them(self, tmp_path, make):
        source = make(tmp_path)
        source = changed(source, tmp_path / "a" / source.name, lambda k: k.fill(0))
        with pytest.raises(ReconError, match=r"dataset 'kspace' is all zeros"):
            reconstruct(source, tmp_path / "out.h5", MRISettings())


def test_nan_is_found_before_the_first_slice_is_reconstructed(tmp_path):
    source = files.knee(tmp_path)
    source = changed(source, tmp_path / "a" / source.name, lambda k: k[1, 0, 5].fill(np.nan))
    seen: list[SliceResult] = []
    with pytest.raises(ReconError, match=r"file1000001.h5: slice 1 of dataset 'kspace' holds NaN"):
        reconstruct(source, tmp_path / "out.h5", on_slice=seen.append)
    assert not seen
    assert not (tmp_path / "out.h5").exists()


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path):
    class Failing(NetworkPrior):
        calls = 0

        def denoise_channels(self, x, sigma):
            self.calls += 1
            if self.calls > 4:
                raise PriorError("out of order")
            return super().denoise_channels(x, sigma)

    source, out = files.knee(tmp_path), tmp_path / "out" / "out.h5"
    prior = Failing(PRIOR.network, PRIOR.contract)
    settings = replace(UNDERSAMPLED, num_samples=1)
    with pytest.raises(ReconError, match=r"file1000001.h5: slice 1: out of order"):
        reconstruct(source, out, settings, prior=prior)
    assert not list(out.parent.iterdir())
    _, data = reconstruct(source, out, settings)
    prior.calls = 0
    with pytest.raises(ReconError, match="out of order"):
        reconstruct(source, out, settings, prior=prior)
    assert [path.name for path in out.parent.iterdir()] == ["out.h5"]
    with h5py.File(out) as file:
        assert same_bits(data, {name: file[name][()] for name in file})


def test_more_samples_change_none(tmp_path):
    source = files.knee(tmp_path)
    few, many = (
        reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, keep_samples=True, num_samples=n))[1]
        for n in (2, 4)
    )
    assert many["samples"][:, :2].tobytes() == few["samples"].tobytes()
    other = reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, keep_samples=True, seed=2))[1]
    assert np.abs(other["samples"] - few["samples"]).max() > 0


def test_a_slice_depends_on_its_place_and_file_name_only(tmp_path):
    source = files.knee(tmp_path)
    with h5py.File(source) as file:
        rss, kspace = file["reconstruction_rss"][()], file["kspace"][()]
        header = file["ismrmrd_header"][()]
    (tmp_path / "short").mkdir()
    content = {"kspace": kspace[:1], "reconstruction_rss": rss[:1], "ismrmrd_header": header}
    short = files.write_file(tmp_path / "short" / source.name, content)
    renamed = files.write_file(tmp_path / "short" / "renamed.h5", content)
    settings = MRISettings(num_samples=2)
    whole, alone, other = (
        reconstruct(path, tmp_path / "out.h5", settings)[1]["reconstruction"][0]
        for path in (source, short, renamed)
    )
    assert whole.tobytes() == alone.tobytes()
    assert whole.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("known", "acquisition", "stated", "note"),
    [
        (("brain",), "CORPD_FBK", None, "the images show a knee, but prior 'tiny' knows brain only"),
        (("brain",), "AXT2", None, None),
        (("brain", "knee"), "CORPDFS_FBK", None, None),
        (("brain",), "unheard of", None, "the anatomy is not stated; prior 'tiny' knows brain only"),
        (("brain",), "CORPD_FBK", "brain", None),
        (("brain",), "AXT2", "prostate", "the images show a prostate, but prior 'tiny' knows brain only"),
        ((), "CORPD_FBK", None, None),
    ],
)
def test_anatomy(tmp_path, known, acquisition, stated, note):
    source = files.write_file(
        tmp_path / "a.h5", {"kspace": files.make_kspace(1, 2, 24, 24)}, acquisition=acquisition
    )
    settings = MRISettings(num_samples=2, anatomy=stated)
    provenance, _ = reconstruct(source, tmp_path / "out.h5", settings, prior=tiny_prior(known))
    assert [text for text in provenance["warnings"] if "knows" in text] == ([note] if note else [])


def test_anatomy_of():
    assert [anatomy_of(name) for name in ("AXFLAIR", "axt1pre", "CORPD_FBK", "SAG", None)] == [
        "brain",
        "brain",
        "knee",
        None,
        None,
    ]


def test_noise_level_can_be_given(tmp_path):
    source = files.knee(tmp_path)
    provenance, _ = reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, noise_std=3e-6))
    assert provenance["noise_std"] == "given"
    assert [facts["noise_std"] for facts in provenance["slices"]] == [3e-6, 3e-6]
    estimated, _ = reconstruct(source, tmp_path / "out.h5")
    assert estimated["noise_std"] == "estimated"


def test_noise_floor_of_the_targets_can_be_added(tmp_path):
    """That of all coils, however they were compressed; a file with columns of padding has less of it."""
    source = files.knee(tmp_path)
    given = replace(UNDERSAMPLED, noise_std=3e-6, num_coils=2)
    plain, without = reconstruct(source, tmp_path / "out.h5", given)
    told, data = reconstruct(source, tmp_path / "out.h5", replace(given, noise_floor=True))
    assert (plain["noise_floor"], told["noise_floor"]) == (False, True)
    with FastMRIFile(source) as file:
        left, right = file.valid_columns
        variance = (2 * file.num_coils - 1) * 3e-6**2 * (right - left) / file.shape[1]
    added = data["reconstruction"].astype(float) ** 2 - without["reconstruction"].astype(float) ** 2
    np.testing.assert_allclose(added, variance, rtol=1e-2)
    assert same_bits({"s": data["reconstruction_std"]}, {"s": without["reconstruction_std"]})


def test_coils_can_be_compressed(tmp_path):
    source = files.knee(tmp_path)
    _, full = reconstruct(source, tmp_path / "out.h5")
    fewer, data = reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, num_coils=2))
    assert fewer["num_coils"] == 2
    assert np.abs(data["reconstruction"] - full["reconstruction"]).max() > 0
    more, data = reconstruct(source, tmp_path / "out.h5", replace(UNDERSAMPLED, num_coils=9))
    assert more["num_coils"] == 3
    assert same_bits(data, full)


def test_warnings_of_a_slice_are_kept(tmp_path):
    settings = replace(UNDERSAMPLED, center_fraction=0.1)
    provenance, _ = reconstruct(files.knee(tmp_path), tmp_path / "out.h5", settings)
    assert sum("too small for a kernel" in note for note in provenance["warnings"]) == 1
    kspace = torch.from_numpy(files.make_kspace(1, 3, 64, 48)[0])
    mask = make_mask("equispaced", (64, 48), 4, center_fraction=0.1)
    with pytest.warns(CalibrationWarning, match="too small for a kernel"):
        slice_problem(kspace, mask)


def test_a_calibration_region_that_is_too_narrow(tmp_path):
    settings = replace(UNDERSAMPLED, center_fraction=0.045)
    pattern = r"file1000001.h5: slice 0: the calibration region has 2 columns, coil maps need at least 3"
    with pytest.raises(ReconError, match=pattern):
        reconstruct(files.knee(tmp_path), tmp_path / "out.h5", settings)


@pytest.mark.parametrize(
    ("acs", "shape", "region"),
    [
        (slice(160, 190), (320, 350), (slice(136, 184), slice(160, 190))),
        (slice(0, 40), (31, 40), (slice(0, 31), slice(0, 40))),
        (slice(20, 300), (320, 320), (slice(136, 184), slice(136, 184))),
        # Asymmetric: few columns left of the centre were acquired.
        (slice(150, 300), (320, 320), (slice(136, 184), slice(150, 198))),
        ((slice(10, 20), slice(12, 22)), (30, 34), (slice(10, 20), slice(12, 22))),
    ],
)
def test_calibration_region(acs, shape, region):
    mask = Mask(torch.ones(1, shape[1], dtype=torch.bool), acs, 1.0, "given")
    assert calibration_region(mask, shape) == region


def test_no_calibration_region():
    mask = Mask(torch.ones(1, 40, dtype=torch.bool), None, 1.0, "given")
    with pytest.raises(ReconError, match="no calibration region"):
        calibration_region(mask, (40, 40))


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_coils": 0}, "num_coils must be at least 1, got 0"),
        ({"noise_std": 0.0}, "noise_std must be positive and finite, got 0.0"),
        ({"noise_std": float("nan")}, "noise_std must be positive and finite, got nan"),
        ({"noise_std": float("inf")}, "noise_std must be positive and finite, got inf"),
        ({"mask": "random", "acceleration": 1.0}, "acceleration of a mask must be a number above 1, got 1.0"),
        ({"mask": "random", "acceleration": float("nan")}, "must be a number above 1, got nan"),
        ({"center_fraction": 1.0}, "center_fraction must be at least 0 and below 1, got 1.0"),
        ({"center_fraction": -0.1}, "center_fraction must be at least 0 and below 1, got -0.1"),
    ],
)
def test_settings_out_of_range(setting, pattern):
    with pytest.raises(ReconError, match=pattern):
        MRISettings(**setting)


def test_a_mask_that_cannot_be_drawn_names_the_file(tmp_path):
    source = files.knee(tmp_path)
    settings = MRISettings("equispaced-fraction", 8.0, center_fraction=0.5)
    with pytest.raises(ReconError, match=r"file1000001.h5: .*fewer than the .* fully sampled centre"):
        reconstruct(source, tmp_path / "out.h5", settings)
    with pytest.raises(ReconError, match=r"file1000001.h5: unknown mask kind 'spiral'; the kinds are random"):
        reconstruct(source, tmp_path / "out.h5", MRISettings("spiral"))


def test_columns_without_the_centre(tmp_path):
    kspace = files.make_kspace(1, 2, 24, 24)
    kspace[..., 10:] = 0
    source = files.write_file(tmp_path / "a.h5", {"kspace": kspace})
    with pytest.raises(ReconError, match=r"a.h5: the columns .* 0:10, do not include its centre, 12"):
        reconstruct(source, tmp_path / "out.h5", MRISettings())
