"""``recon prior inspect`` and ``convert``, and reconstructions with a checkpoint of other code."""

import json
import re

import h5py
import nibabel
import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from torch import nn

from priors import Contract, load_prior
from priors.disc_images import disc_images
from priors.files import prior_hash, read_header
from priors.level import image_level
from priors.networks.adm_unet import ADMSettings, ADMUNet
from priors.networks.dhariwal_unet import DhariwalSettings, DhariwalUNet
from priors.networks.edm_preconditioning import EDMPrecond
from recon.cli.prior_files import read_image
from recon.errors import ReconError
from tests.recon import fastmri_files as files


@pytest.fixture
def inversebench(tmp_path):
    """A checkpoint that tells everything, whose two sets of weights differ."""
    torch.manual_seed(0)
    settings = DhariwalSettings(
        img_resolution=8,
        in_channels=2,
        out_channels=2,
        model_channels=8,
        widths=(8, 8),
        num_blocks=1,
        embedding_channels=32,
    )
    state = EDMPrecond(DhariwalUNet(settings)).state_dict()
    average = {key: value + 0.01 * torch.randn_like(value) for key, value in state.items()}
    torch.save({"net": state, "ema": average, "optimizer": {}, "scheduler": {}}, tmp_path / "edm.pt")
    return tmp_path / "edm.pt"


@pytest.fixture
def adm(tmp_path):
    """A checkpoint that does not tell its heads, and the configuration that does."""
    torch.manual_seed(0)
    settings = ADMSettings(
        in_channels=2,
        out_channels=4,
        model_channels=32,
        widths=(32, 32),
        num_res_blocks=1,
        num_heads=4,
        num_heads_upsample=4,
    )
    network = ADMUNet(settings)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    torch.save(network.state_dict(), tmp_path / "knee.pt")
    (tmp_path / "knee.json").write_text(json.dumps({"constructor": {"num_heads": 4}}))
    return tmp_path / "knee.pt", tmp_path / "knee.json"


IMAGE = np.outer(np.hanning(16), np.hanning(20)).astype(np.float32)


def denoised(prior):
    x = torch.randn(1, 2, 12, 10, generator=torch.Generator().manual_seed(5))
    return prior.denoise_channels(x, torch.tensor([0.7]))


def test_convert(recon, adm, tmp_path):
    source, config = adm
    out = tmp_path / "new" / "knee.safetensors"
    status, stdout, stderr = recon(
        *("prior", "convert", source, "--config", config, "--out", out, "--name", "knee"),
        *("--anatomy", "knee", "--anatomy", "leg", "--level", 0.5, "--sigma-max", 20),
    )
    assert (status, stderr) == (0, "")
    assert re.fullmatch(rf"guided_diffusion, [\d,]+ parameters: written to {out}\n", stdout)
    original, converted = load_prior(source, config=config), load_prior(out)
    assert torch.equal(denoised(converted), denoised(original))
    contract = converted.contract
    assert (contract.name, contract.anatomy, contract.level) == ("knee", ("knee", "leg"), 0.5)
    assert (contract.sigma_min, contract.sigma_max) == (original.contract.sigma_min, 20)
    facts = {"converted_from": "knee.pt", "sha256": prior_hash(source), "ema": True}
    assert read_header(out)["training"] == facts


def test_convert_takes_the_weights_that_are_asked_for(recon, inversebench, tmp_path):
    for option, ema in (((), True), (("--no-ema",), False)):
        out = tmp_path / f"{ema}.safetensors"
        assert recon("prior", "convert", inversebench, "--out", out, *option)[0] == 0
        assert torch.equal(denoised(load_prior(out)), denoised(load_prior(inversebench, ema=ema)))
    first, second = (denoised(load_prior(tmp_path / f"{ema}.safetensors")) for ema in (True, False))
    assert not torch.equal(first, second)


def test_convert_a_file_of_our_own(recon, tmp_path):
    out = tmp_path / "mine.safetensors"
    status, stdout, _ = recon("prior", "convert", "discs", "--out", out, "--name", "mine")
    assert status == 0
    assert stdout.startswith("the project's own network, ")
    assert load_prior(out).contract.name == "mine"
    before, after = read_header("discs")["training"], read_header(out)["training"]
    assert {key: after[key] for key in before} == before
    assert after["converted_from"] == "discs.safetensors"


def test_convert_value_range_and_channels(recon, tmp_path, adm):
    source, config = adm
    out = tmp_path / "real.safetensors"
    options = ("--channels", "real", "--slices", 2, "--value-range", -1, 1, "--unit", "water")
    status, _, stderr = recon("prior", "convert", source, "--config", config, "--out", out, *options)
    assert status == 0, stderr
    contract = load_prior(out).contract
    assert (contract.channels, contract.slices, contract.value_range) == ("real", 2, (-1.0, 1.0))
    assert contract.unit == "water"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "{}/x.pt"), r"x\.pt: a prior is a \.safetensors file"),
        (("--out", "{}/x.safetensors"), "cannot tell num_head_channels from the file"),
        (("--out", "{}/x.safetensors", "--config", "{}/none.json"), r"none\.json cannot be read"),
        (("--out", "{}/x.safetensors", "--config", "{}/knee.json", "--level", -1), "level must be positive"),
        (("--out", "{}/x.safetensors", "--config", "{}/knee.json", "--channels", "grey"), "not 'grey'"),
    ],
)
def test_convert_that_cannot_be_done(recon, adm, tmp_path, options, message):
    given = [str(option).format(tmp_path) for option in options]
    status, _, stderr = recon("prior", "convert", adm[0], *given)
    assert status == 1
    assert re.search(message, stderr), stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_inspect_a_good_prior(recon):
    status, stdout, stderr = recon("prior", "inspect", "discs")
    assert status == 0, stdout + stderr
    contract = load_prior("discs").contract
    assert re.search(r"^layout +the project's own network$", stdout, re.M)
    assert re.search(rf"^noise levels +{contract.sigma_min:g} to {contract.sigma_max:g},", stdout, re.M)
    assert re.search(rf"^size multiple +{contract.size_multiple}$", stdout, re.M)
    assert re.search(r"^value range +0 to 1$", stdout, re.M)
    count = sum(parameter.numel() for parameter in load_prior("discs").parameters())
    assert f"{count:,} parameters" in stdout
    assert re.search(r"^check: passed$", stdout, re.M)


def test_inspect_a_network_of_random_weights(recon, adm, tmp_path):
    source, config = adm
    np.save(tmp_path / "small.npy", IMAGE)
    image = ("--image", tmp_path / "small.npy")
    status, stdout, _ = recon("prior", "inspect", source, "--config", config, *image)
    assert status == 1
    assert re.search(r"^layout +guided_diffusion$", stdout, re.M)
    assert re.search(r"^check: failed$", stdout, re.M)
    assert re.search(r"^- ", stdout, re.M)


def test_inspect_with_an_image(recon, tmp_path):
    np.save(tmp_path / "disc.npy", disc_images(1, 64, seed=1)[0].numpy())
    plain = recon("prior", "inspect", "discs")[1]
    status, stdout, stderr = recon("prior", "inspect", "discs", "--image", tmp_path / "disc.npy")
    assert status == 0, stdout + stderr
    assert stdout != plain  # the numbers are those of this image


def test_inspect_does_not_run_code(recon, tmp_path):
    class Malicious:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'written')!r}, 'w')",)

    torch.save({"net": Malicious()}, tmp_path / "bad.pt")
    for command in (("inspect",), ("convert", "--out", tmp_path / "x.safetensors")):
        status, _, stderr = recon("prior", command[0], tmp_path / "bad.pt", *command[1:])
        assert status == 1
        assert "holds Python code, not only tensors" in stderr
    assert not (tmp_path / "written").exists()


# Images


def test_images_of_every_format(tmp_path):
    np.save(tmp_path / "a.npy", 7 * IMAGE)
    imsave(tmp_path / "b.png", IMAGE, cmap="gray", vmin=0, vmax=1)
    nibabel.save(nibabel.Nifti1Image(np.stack([0 * IMAGE.T, IMAGE.T], -1), np.eye(4)), tmp_path / "c.nii.gz")
    for name in ("a.npy", "b.png", "c.nii.gz"):
        image = read_image(tmp_path / name, Contract(level=0.4))
        assert (image.shape, image.dtype) == ((16, 20), torch.complex64)
        assert float(image_level(image)) == pytest.approx(0.4, rel=1e-4)
        expected = torch.from_numpy(IMAGE * 0.4 / float(image_level(torch.from_numpy(IMAGE))))
        torch.testing.assert_close(image.real, expected, rtol=0, atol=0.01)
    contract = Contract(channels="real", unit="water", slices=3)
    assert torch.equal(read_image(tmp_path / "a.npy", contract)[2], torch.from_numpy(7 * IMAGE))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros((4, 4)), "is empty: all its values are zero"),
        ("a.npy", np.full((4, 4), np.nan), "values that are not finite"),
        ("a.npy", np.zeros(4), r"of shape \(4,\); an image is \(H, W\)"),
        ("a.npy", np.array([["a"]]), "an image is"),
        ("a.npy", b"text", "cannot be read as NumPy's .npy"),
        ("a.npy", b"", r"a.npy cannot be read as NumPy's .npy: No data left in file"),
        ("a.npy", {"a": IMAGE}, r"a.npy cannot be read .*: it holds an archive of arrays \(.npz\)"),
        ("a.png", b"text", "cannot be read as an image"),
        ("a.txt", b"text", "an image is a .npy, .png"),
        ("b.npy", None, "b.npy: there is no such file"),
    ],
)
def test_no_image(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / "a.npz", **content)
        (tmp_path / "a.npz").rename(tmp_path / name)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(ReconError, match=message):
        read_image(tmp_path / name, Contract())


# Reconstructions


def test_a_reconstruction_with_a_checkpoint_of_other_code(recon, adm, tmp_path):
    source, config = adm
    scan, out = files.knee(tmp_path), tmp_path / "out"
    command = ("mri", scan, "--mask", "equispaced", "--num-samples", 1, "--nfe", 2, "--out", out)
    status, _, stderr = recon(*command, "--prior", source, "--prior-config", config)
    assert status == 0, stderr
    with h5py.File(out / scan.name) as file:
        facts = json.loads(file.attrs["provenance"])["prior"]
        assert np.isfinite(file["reconstruction"][()]).all()
    assert (facts["file"], facts["sha256"]) == ("knee.pt", prior_hash(source))
    assert (facts["config"], facts["config_sha256"]) == ("knee.json", prior_hash(config))
    status, _, stderr = recon(*command, "--prior", source)
    assert status == 1
    assert "cannot tell num_head_channels from the file" in stderr
    status, _, stderr = recon(*command, "--prior-config", config)
    assert status == 1
    assert "config= has no use with it" in stderr
    status, _, stderr = recon("ct", tmp_path / "scan.mat", "--out", out, "--prior-config", config)
    assert status == 1
    assert re.search(r"chest\.safetensors .* config= has no use with it", stderr)
