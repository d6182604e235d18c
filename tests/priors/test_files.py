"""Prior files: what is written is what is read, and every kind of damage is one clear error."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import priors.files
from priors import (
    Contract,
    DenoisingUNet,
    NetworkPrior,
    NetworkSettings,
    PriorError,
    bundled_priors,
    load_prior,
    save_prior,
)
from priors.files import prior_hash, prior_path, read_header

CONTRACT = Contract(
    sigma_min=0.01,
    sigma_max=7.0,
    level=0.4,
    size_multiple=4,
    anatomy=("brain",),
    name="tiny",
    error_table=((0.1, 0.05), (1.0, 0.1)),
)
FACTS = {"data": "phantoms", "steps": 3}


def make():
    network = DenoisingUNet(NetworkSettings(widths=(4, 8), embedding=4))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return NetworkPrior(network, CONTRACT)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_prior(path, make(), FACTS)
    return path


def rewrite(path, tensors=None, **metadata):
    """Write a prior's file anew with other tensors or header entries; None takes an entry out."""
    with safe_open(path, framework="pt") as opened:
        header = {**opened.metadata(), **metadata}
        kept = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    kept = {key: value for key, value in {**kept, **(tensors or {})}.items() if value is not None}
    save_file(kept, path, metadata={key: value for key, value in header.items() if value is not None})


def test_round_trip_changes_no_bit(file):
    prior, loaded = make(), load_prior(file)
    assert isinstance(loaded, NetworkPrior)
    assert loaded.contract == CONTRACT
    assert loaded.network.settings == prior.network.settings
    weights = prior.network.state_dict()
    assert weights.keys() == loaded.network.state_dict().keys()
    for key, value in loaded.network.state_dict().items():
        assert torch.equal(value, weights[key]), key
    x = torch.randn(2, 9, 7, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, 0.3), prior.denoise(x, 0.3))
    assert read_header(file)["training"] == FACTS


def test_a_loaded_prior_is_ready_for_use(file):
    prior = load_prior(file, precision="bf16")
    assert prior.precision == "bf16"
    assert not prior.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())


def test_hash_is_that_of_the_file(file):
    assert prior_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_existing_file_is_replaced(file, tmp_path):
    file.write_text("something else")
    save_prior(file, make())
    assert load_prior(file).contract == CONTRACT
    assert list(tmp_path.iterdir()) == [file]


def other_contract(**change):
    return json.dumps({**CONTRACT.as_dict(), **change})


def other_network(**change):
    return json.dumps({**NetworkSettings(widths=(4, 8), embedding=4).as_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "not a prior of this project"),
        ({"format": "something"}, "not a prior of this project"),
        ({"version": "3"}, "format version 3; this release reads 1 and 2"),
        ({"contract": None}, "damaged header: 'contract' is missing or no JSON"),
        ({"network": "{"}, "damaged header: 'network' is missing or no JSON"),
        ({"training": "[1]"}, "damaged header: 'training' is no JSON object"),
        ({"contract": other_contract(colour="grey")}, r"unknown fields \['colour'\]"),
        ({"contract": "{}"}, "contract has missing fields"),
        ({"contract": other_contract(level="high")}, "damaged header"),
        ({"contract": other_contract(level=-1.0)}, "level must be positive"),
        ({"contract": other_contract(error_table=[[1, "low"]])}, "damaged header"),
        ({"contract": other_contract(channels="real")}, "the network has 2 channels, its contract 1"),
        ({"network": other_network(depth=3)}, r"unknown fields \['depth'\]"),
        ({"network": other_network(widths=7)}, "damaged header"),
        ({"network": other_network(widths=[4, -8])}, "impossible network settings"),
        ({"network": other_network(widths=[4, 4])}, r"has shape \([0-9, ]+\), expected \([0-9, ]+\)"),
        (
            {"network": other_network(widths=[4, 8, 8])},
            r"missing \['down.2.0.conv1.bias', .* unexpected \[\]",
        ),
        ({"network": other_network(widths=[4])}, r"missing \[\], unexpected \['down.1.0.conv1.bias'"),
    ],
)
def test_damaged_header(file, change, message):
    rewrite(file, **change)
    with pytest.raises(PriorError, match=message) as caught:
        load_prior(file)
    assert str(file) in str(caught.value)


HEAD = torch.zeros(8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"head.bias": None}, r"missing \['head.bias'\], unexpected \[\]"),
        ({"tail.bias": HEAD}, r"missing \[\], unexpected \['tail.bias'\]"),
        ({"head.bias": HEAD[:3]}, r"head.bias has shape \(3,\), expected \(8,\)"),
        ({"head.bias": HEAD + float("nan")}, "head.bias holds values that are not finite"),
        ({"head.bias": HEAD - float("inf")}, "head.bias holds values that are not finite"),
    ],
)
def test_damaged_weights(file, tensors, message):
    rewrite(file, tensors)
    with pytest.raises(PriorError, match=message) as caught:
        load_prior(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "cut in the header", "empty", "text", "pickle"])
def test_no_safetensors_file(file, damage):
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-100])
    elif damage == "cut in the header":
        file.write_bytes(whole[:100])
    elif damage == "pickle":
        torch.save({"head.bias": HEAD}, file)
    else:
        file.write_text("" if damage == "empty" else "These are no weights.\n")
    with pytest.raises(PriorError, match="is not a safetensors file") as caught:
        load_prior(file)
    assert str(file) in str(caught.value)


def test_unknown_precision(file):
    with pytest.raises(PriorError, match="precision is 'fp32' or 'bf16', not 'int8'"):
        load_prior(file, precision="int8")


def test_unknown_name_lists_the_bundled_priors(file, monkeypatch):
    monkeypatch.setattr(priors.files, "_WEIGHTS", file.parent)
    assert bundled_priors() == ["tiny"]
    assert prior_path("tiny") == file
    assert load_prior("tiny").contract == CONTRACT
    for name in ("big", file.parent / "absent" / "tiny.safetensors", file.parent):
        with pytest.raises(
            PriorError, match=r"neither a file nor one of the bundled priors \(tiny\)"
        ) as caught:
            load_prior(name)
        assert str(name) in str(caught.value)


def test_every_bundled_prior_loads_and_has_a_card():
    folder = Path(priors.files.__file__).parent / "weights"
    assert bundled_priors() == sorted(path.stem for path in folder.glob("*.md"))
    for name in bundled_priors():
        assert load_prior(name).contract.name == name
        assert prior_path(name).stat().st_size <= 16 * 2**20


def test_nothing_is_left_of_a_file_that_cannot_be_written(file, tmp_path, monkeypatch):
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(priors.files, "save_file", fail)
    with pytest.raises(PriorError, match=r"cannot write the prior to .*tiny.safetensors: no space left"):
        save_prior(file, make())
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


@pytest.mark.parametrize("folder", ["absent", "tiny.safetensors"])
def test_folder_that_is_none(file, folder):
    with pytest.raises(PriorError, match=r"cannot write the prior to .*new.safetensors"):
        save_prior(file.parent / folder / "new.safetensors", make())


def test_facts_that_are_not_json(tmp_path):
    with pytest.raises(PriorError, match=r"cannot write the prior to .*Path.* is not JSON serializable"):
        save_prior(tmp_path / "new.safetensors", make(), {"data": tmp_path})
    assert list(tmp_path.iterdir()) == []
