"""Loading what others saved: which layout it is, strictly, and never running what it holds."""

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import priors.checkpoints
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, PriorError, ScorePrior, save_prior
from priors import load_prior as load
from priors.checkpoints import Recipe
from priors.checkpoints.opening import open_checkpoint
from priors.files import prior_hash, prior_path, read_header
from priors.pretrained import PretrainedPrior


class ToyPrior(PretrainedPrior):
    """``D(x, sigma) = x + sigma gain f(x)`` with a convolution f."""

    def __init__(self, network, contract, gain):
        super().__init__(network, contract, contract.num_channels)
        self.gain = gain

    def evaluate(self, x, sigma):
        with self.autocast(x):
            out = self.network(x).float()
        return x + sigma[:, None, None, None] * self.gain * out


class Toy:
    """A family whose files are ``{"weights": ..., "average": ...}``; they do not tell the gain."""

    name = "toy"

    def recognises(self, content):
        return isinstance(content, dict) and "weights" in content

    def read(self, content, config, *, ema=True):
        arguments = config.get("constructor", config)
        if "gain" not in arguments:
            raise PriorError("the file does not tell gain; give it in config=")
        weights = content["average" if ema and "average" in content else "weights"]
        channels = weights["weight"].shape[0]  # whatever is wrong with the weight is left to the loader
        return Recipe({"gain": arguments["gain"], "channels": channels}, weights)

    def network(self, settings):
        return nn.Conv2d(settings["channels"], settings["channels"], 3, padding=1)

    def contract(self, settings):
        kind = {1: "real", 2: "complex", 3: "rgb"}[settings["channels"]]
        return Contract(channels=kind, name="toy", size_multiple=2)

    def prior(self, network, settings, contract):
        return ToyPrior(network, contract, settings["gain"])


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(priors.checkpoints, "families", lambda: (Toy(),))


def weights(channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(channels, channels, 3, 3, generator=generator),
        "bias": torch.randn(channels, generator=generator),
    }


CONFIG = {"gain": 0.5}
CONTENT = {"weights": weights(seed=0), "average": weights(seed=1), "step": 7}


@pytest.fixture
def file(tmp_path):
    torch.save(CONTENT, tmp_path / "toy.pth")
    return tmp_path / "toy.pth"


def result(prior):
    x = torch.randn(2, prior.contract.num_channels, 6, 8, generator=torch.Generator().manual_seed(9))
    return prior.denoise_channels(x, torch.tensor([0.3, 2.0]))


def expected(kind):
    x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(9))
    chosen = CONTENT[kind]
    f = nn.functional.conv2d(x, chosen["weight"], chosen["bias"], padding=1)
    return x + torch.tensor([0.3, 2.0])[:, None, None, None] * 0.5 * f


# Dispatch


@pytest.mark.parametrize(("ema", "kind"), [(True, "average"), (False, "weights")])
def test_a_checkpoint_of_other_code(file, ema, kind):
    prior = load(file, config=CONFIG, ema=ema)
    torch.testing.assert_close(result(prior), expected(kind))
    assert not prior.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())


def test_configuration_from_a_file(file, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"family": "toy", "constructor": CONFIG, "seed": 0}))
    for config in (path, str(path), {"constructor": CONFIG}):
        torch.testing.assert_close(result(load(file, config=config)), expected("average"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_of_other_code(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Toy, "recognises", lambda self, content: "bias" in content)
    monkeypatch.setattr(
        Toy, "read", lambda self, content, config, ema: Recipe({"gain": 0.5, "channels": 2}, content)
    )
    save_file(CONTENT["average"], tmp_path / f"toy{suffix}")
    torch.testing.assert_close(result(load(tmp_path / f"toy{suffix}")), expected("average"))


def test_the_old_format_of_torch(tmp_path):
    torch.save(CONTENT, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(result(load(tmp_path / "old.pt", config=CONFIG)), expected("average"))


def test_parameters_half_precision_and_what_stands_beside_the_weights(tmp_path):
    parameters = {key: nn.Parameter(value.half()) for key, value in CONTENT["average"].items()}
    beside = {"hyper": argparse.Namespace(lr=1.0), "path": Path("x"), "kinds": {1, 2}, "type": torch.float32}
    torch.save({"weights": parameters, **beside}, tmp_path / "toy.ckpt")
    prior = load(tmp_path / "toy.ckpt", config=CONFIG)
    assert {value.dtype for value in prior.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(result(prior), expected("average"), rtol=0.01, atol=0.01)
    content = open_checkpoint(tmp_path / "toy.ckpt")
    assert [content[key] for key in beside] == [None] * 4


def test_a_loaded_prior_does_not_need_its_file(file):
    prior = load(file, config=CONFIG)
    file.write_bytes(bytes(file.stat().st_size))
    torch.testing.assert_close(result(prior), expected("average"))


def test_our_own_files(tmp_path):
    network = DenoisingUNet(NetworkSettings(widths=(4,), embedding=4))
    save_prior(tmp_path / "own.safetensors", NetworkPrior(network, Contract(name="own", size_multiple=2)))
    prior = load(tmp_path / "own.safetensors", level=0.7, anatomy="knee")
    assert isinstance(prior, NetworkPrior)
    assert (prior.contract.name, prior.contract.level, prior.contract.anatomy) == ("own", 0.7, ("knee",))
    with pytest.raises(PriorError, match="config= has no use"):
        load(tmp_path / "own.safetensors", config=CONFIG)
    with pytest.raises(PriorError, match="ema=False has no use"):
        load(tmp_path / "own.safetensors", ema=False)


# The contract


def test_what_the_user_knows_better(file):
    given: dict[str, Any] = {
        "name": "knee",
        "anatomy": ["knee", "leg"],
        "sigma_max": 5,
        "level": 0.2,
        "size_multiple": 4,
    }
    contract = load(file, config=CONFIG, error_table=[[0.1, 0.05]], **given).contract
    assert (contract.name, contract.anatomy, contract.sigma_max) == ("knee", ("knee", "leg"), 5)
    assert (contract.level, contract.size_multiple, contract.error_table) == (0.2, 4, ((0.1, 0.05),))
    assert load(file, config=CONFIG, channels="real", slices=2).contract.num_channels == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"colour": 1}, r"contract has no colour; it has channels, sigma_min, .*value_range"),
        ({"level": -1}, "level must be positive"),
        ({"level": "high"}, "cannot be changed"),
        ({"anatomy": 3}, "cannot be changed"),
        ({"value_range": (-1, 1)}, r"complex images have the value range \(0, 1\)"),
        ({"channels": "real"}, "a network of 2 channels; 'real' images in 1 slice would take 1"),
        ({"size_multiple": 3}, "sizes that are multiples of 2, not of 3"),
        ({"precision": "int8"}, "precision is 'fp32' or 'bf16', not 'int8'"),
    ],
)
def test_overrides_that_do_not_fit(file, override, message):
    with pytest.raises(PriorError, match=message):
        load(file, config=CONFIG, **override)


def test_precision_reaches_the_prior(file, monkeypatch):
    exact, rounded = (result(load(file, config=CONFIG, precision=word)) for word in ("fp32", "bf16"))
    assert 0 < float((exact - rounded).abs().max()) < 0.1
    without = lambda self, network, settings, contract: Without(contract)  # noqa: E731
    monkeypatch.setattr(Toy, "prior", without)
    with pytest.raises(PriorError, match="Without cannot choose its precision"):
        load(file, config=CONFIG)


class Without(ScorePrior):
    pass


# Converted files


def test_a_converted_prior_is_the_same_to_the_last_bit(file, tmp_path):
    prior, out = load(file, config=CONFIG, name="knee", anatomy="knee"), tmp_path / "new.safetensors"
    save_prior(out, prior, {"data": "none"})
    again = load(out)
    assert torch.equal(result(again), result(prior))
    assert again.contract == prior.contract
    header = read_header(out)
    assert (header["family"], header["settings"]) == ("toy", {"gain": 0.5, "channels": 2})
    assert header["training"] == {"data": "none"}
    save_prior(tmp_path / "second.safetensors", again, {"data": "none"})
    assert read_header(tmp_path / "second.safetensors") == header


def test_weights_that_share_memory_can_be_written(file, tmp_path):
    prior = load(file, config=CONFIG)
    network = prior.network
    assert isinstance(network, nn.Conv2d)
    network.bias = nn.Parameter(network.weight.data.view(-1)[:2])
    save_prior(tmp_path / "new.safetensors", prior)
    assert torch.equal(result(load(tmp_path / "new.safetensors")), result(prior))


def test_a_prior_without_a_file_cannot_be_written(tmp_path):
    with pytest.raises(PriorError, match="a ToyPrior that was not loaded from a file has no description"):
        save_prior(tmp_path / "x.safetensors", ToyPrior(nn.Identity(), Contract(), 1.0))


def rewrite(path, **metadata):
    with safe_open(path, framework="pt") as opened:
        header = {**opened.metadata(), **metadata}
        kept = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(kept, path, metadata={key: value for key, value in header.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": None}, "damaged header: 'family' is missing"),
        ({"family": "nobody"}, "no family of networks 'nobody'; known are toy"),
        ({"settings": None}, "damaged header: 'settings' is missing or no JSON"),
        ({"settings": "{}"}, "damaged header: KeyError: 'channels'"),
        ({"settings": '{"channels": "two", "gain": 1}'}, "damaged header"),
        (
            {"settings": '{"channels": 3, "gain": 1}'},
            r"has shape \(2,.*expected \(3,",
        ),
        ({"settings": '{"channels": 9999999, "gain": 1}'}, r"has shape \(2,.*expected \(9999999,"),
        ({"version": "3"}, "format version 3; this release reads 1 and 2"),
        ({"version": "1"}, "damaged header: 'network' is missing or no JSON"),
    ],
)
def test_damaged_header_of_a_converted_prior(file, tmp_path, change, message):
    out = tmp_path / "new.safetensors"
    save_prior(out, load(file, config=CONFIG))
    rewrite(out, **change)
    with pytest.raises(PriorError, match=message) as caught:
        load(out)
    assert str(out) in str(caught.value)


def test_a_header_cannot_ask_for_more_parts_than_there_are_weights(file, tmp_path, monkeypatch):
    out = tmp_path / "new.safetensors"
    save_prior(out, load(file, config=CONFIG))
    monkeypatch.setattr(
        Toy, "network", lambda self, settings: nn.ModuleList(nn.Linear(1, 1) for _ in range(10**9))
    )
    with pytest.raises(PriorError, match="many more parts than the 2 tensors"):
        load(out)


# What does not fit


def changed(**entries):
    average = {**CONTENT["average"], **entries}
    return {"weights": {key: value for key, value in average.items() if value is not None}}


BIAS = torch.zeros(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(bias=None), r"missing \['bias'\], unexpected \[\]"),
        (changed(**{"tail.bias": BIAS}), r"missing \[\], unexpected \['tail.bias'\]"),
        (changed(bias=BIAS[:1]), r"bias has shape \(1,\), expected \(2,\)"),
        (changed(bias=BIAS * torch.nan), "bias holds values that are not finite"),
        (changed(bias=BIAS - torch.inf), "bias holds values that are not finite"),
        (changed(bias=BIAS.double() + 1e300), "bias holds values that are not finite"),
        (changed(bias=BIAS.long()), "bias holds torch.int64, expected torch.float32"),
        (changed(bias=BIAS * 1j), "bias holds torch.complex64, expected torch.float32"),
        (changed(bias=[0.0, 0.0]), "bias is list, not a tensor"),
        (changed(bias="zero"), "bias is str, not a tensor"),
        (changed(bias=BIAS.to_sparse()), "weights.bias is not a dense tensor with values"),
        (changed(bias=BIAS.to("meta")), "weights.bias is not a dense tensor with values"),
        (
            changed(bias=BIAS[:1].expand(10**6, 10**6)),
            r"more than its \d+ bytes can hold: weights.bias has shape",
        ),
        (changed(weight=None), "does not fit what is said of it: KeyError: 'weight'"),
        ({"weights": 3}, "does not fit what is said of it: TypeError"),
        ({"state": {}}, r"a layout that is known \(toy\); it holds a dict of 1: state"),
        ([1, 2], "it holds a list of 2"),
        (torch.ones(3), "it holds Tensor"),
    ],
)
def test_content_that_does_not_fit(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    torch.save(content, path)
    with pytest.raises(PriorError, match=message) as caught:
        load(path, config=CONFIG)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "toy.pth: the file does not tell gain; give it in config="),
        ("absent.json", "absent.json cannot be read: No such file"),
        ("text.json", "text.json is not JSON"),
        ("list.json", "list.json holds list; the arguments of a constructor come as a JSON object"),
        ([1], "config= is list; the arguments"),
        ({1: 2}, "names that are no strings"),
    ],
)
def test_bad_configuration(file, tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("gain: 0.5")
    Path("list.json").write_text("[0.5]")
    with pytest.raises(PriorError, match=message):
        load(file, config=config)


# Files that are none


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("size", [1, 10, 80, 500, -300, -30, -1])
def test_truncated(file, old, size):
    torch.save(CONTENT, file, _use_new_zipfile_serialization=not old)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(PriorError, match=r"toy.pth is (damaged|not a checkpoint)"):
        load(file, config=CONFIG)


def test_flipped_bit(file):
    data = bytearray(file.read_bytes())
    start = data.find(CONTENT["average"]["weight"].numpy().tobytes())
    assert start > 0
    data[start + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(PriorError, match="is damaged: the sum of its record toy/data/"):
        load(file, config=CONFIG)


def copy_archive(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_storage_that_claims_more_than_its_record(tmp_path):
    torch.save({"weights": {"bias": torch.ones(77)}}, tmp_path / "good.pt")

    def change(name, data):
        if name.endswith("data.pkl"):
            assert data.count(b"K\x4d") == 2  # numbers of the storage's and of the tensor's elements
            data = data.replace(b"K\x4d", b"J\xff\xff\xff\x0f")
        return data

    copy_archive(tmp_path / "good.pt", tmp_path / "bad.pt", change)
    with pytest.raises(PriorError, match=r"bad\.pt is damaged"):
        load(tmp_path / "bad.pt", config=CONFIG)


def test_archives_of_other_programs(file, tmp_path):
    copy_archive(file, tmp_path / "small.pt", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(PriorError, match="is a compressed archive"):
        load(tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme/first", "hello")
    with pytest.raises(PriorError, match="is an archive, but not one of"):
        load(tmp_path / "other.pt")


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("weights: none\n", "is not a checkpoint")])
def test_no_checkpoint(file, text, message):
    file.write_text(text)
    with pytest.raises(PriorError, match=message):
        load(file)


def test_a_folder_is_none_unless_it_says_so(tmp_path):
    with pytest.raises(PriorError, match="neither a file nor one of the bundled priors"):
        load(tmp_path)
    with pytest.raises(PriorError, match="cannot be read: Is a directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert prior_path(tmp_path) == tmp_path


def test_hash_of_a_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "unet" / "weights").write_text("1")
    first = prior_hash(tmp_path)
    (tmp_path / ".cache").write_text("x")
    assert prior_hash(tmp_path) == first
    (tmp_path / "unet" / "weights").write_text("2")
    assert prior_hash(tmp_path) != first
    (tmp_path / "unet" / "weights").write_text("1")
    (tmp_path / "unet" / "weights").rename(tmp_path / "unet" / "other")
    assert prior_hash(tmp_path) != first


def test_content_that_contains_itself(tmp_path):
    loop: list = []
    loop.append(loop)
    torch.save({"weights": loop}, tmp_path / "loop.pt")
    with pytest.raises(PriorError, match=r"weights\[0\] contains itself"):
        load(tmp_path / "loop.pt")
    # As a tree it would have 3^50 leaves.
    shared: list = [torch.ones(1)]
    for _ in range(50):
        shared = [shared, shared, shared]
    torch.save({"state": shared}, tmp_path / "shared.pt")
    assert open_checkpoint(tmp_path / "shared.pt")["state"][0] is not None
    deep: list = []
    for _ in range(100):
        deep = [deep]
    torch.save({"weights": deep}, tmp_path / "deep.pt")
    with pytest.raises(PriorError, match="containers more than 64 deep"):
        load(tmp_path / "deep.pt")


# Code


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


class Quiet(argparse.Namespace):
    """Has the looks of settings, but its class is not one that is known to be harmless."""


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    with path.open("wb") as file:
        pickle.dump(content, file)


@pytest.mark.parametrize("save", [torch.save, save_old, save_pickle])
@pytest.mark.parametrize("name", ["net.pt", "network-snapshot.pkl"])
def test_code_is_not_run(tmp_path, save, name):
    target, path = tmp_path / "written", tmp_path / name
    for content in (
        {"weights": Malicious(target)},
        {**CONTENT, "note": Malicious(target)},
        Malicious(target),
    ):
        save(content, path)
        with pytest.raises(PriorError, match="holds Python code, not only tensors") as caught:
            load(path, config=CONFIG)
        assert not target.exists()
        assert "it was not run" in str(caught.value)
        assert "torch.save(net.state_dict(), …)" in str(caught.value)
    # The file would have been written indeed:
    with path.open("rb") as file:
        save_pickle(Malicious(target), path)
        pickle.load(file)
    assert target.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, open, getattr, torch.load, torch.hub.load, argparse.FileType]
)
def test_functions_that_could_do_anything_are_refused(tmp_path, function):
    class Call:
        def __reduce__(self):
            return function, ("1",)

    torch.save({**CONTENT, "note": Call()}, tmp_path / "net.pt")
    with pytest.raises(PriorError, match="holds Python code"):
        load(tmp_path / "net.pt", config=CONFIG)


def test_whole_networks_and_unknown_classes_are_refused(tmp_path):
    for content in (nn.Conv2d(2, 2, 3), {**CONTENT, "settings": Quiet(lr=1)}):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(PriorError, match="holds Python code, not only tensors"):
            load(tmp_path / "net.pt", config=CONFIG)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Conv2d(2, 2, 3)).save(tmp_path / "net.pt")
    with pytest.raises(PriorError, match=r"holds Python code, not only tensors \(TorchScript\)"):
        load(tmp_path / "net.pt")
