"""The benchmark of the challenge of discs, with a search that is made up."""

import numpy as np
import pytest
import torch

from benchmarks import htc2022
from recon.htc2022 import Candidate

PLACE = ("ta", 45, 65, 8)


def searched(identity, cache):
    return htc2022.searched(cache, None, identity, *PLACE, cache)  # type: ignore[arg-type]


@pytest.fixture
def searches(monkeypatch):
    made = []

    def search(scan, prior, *, settings, key):
        made.append(key)
        return [Candidate(torch.full((4, 4), 0.25), 1.5)]

    monkeypatch.setattr(htc2022, "search", search)
    monkeypatch.setattr(htc2022, "read_htc2022", lambda path: None)
    return made


def test_what_a_search_found_is_kept_for_its_prior_precision_and_code(searches, tmp_path):
    first, again = (searched("a_fp32_1", tmp_path / "cache") for _ in range(2))
    assert searches == ["ta"]
    assert torch.equal(first[0][0].image, again[0][0].image)
    assert first[1] == again[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ta_45_65_8_a_fp32_1.npz"]
    searched("a_bf16_1", tmp_path / "cache")
    assert len(searches) == 2


def test_a_search_that_is_stopped_while_it_is_written_leaves_nothing_to_read(searches, tmp_path, monkeypatch):
    def killed(file, **arrays):
        handle = file if hasattr(file, "write") else file.open("wb")
        handle.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            searched("a", tmp_path)
    searched("a", tmp_path)
    assert len(searches) == 2


def test_the_code_that_searches_is_told_from_other_code(monkeypatch, tmp_path):
    for name in ("operators/ct.py", "recon/htc2022.py", "recon/solvers/binary_dds.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(htc2022, "ROOT", tmp_path)
    codes = {htc2022.search_code()}
    for path in tmp_path.rglob("*.py"):
        path.write_text("x = 2\n")
        codes.add(htc2022.search_code())
    assert len(codes) == 4


def test_an_arc_without_an_aim_has_a_dash():
    counts = dict.fromkeys(("pixels", "material", "claimed"), [1] * 10)
    rows = [
        {"name": name, "arc": arc, "mcc": 0.96, **counts} for name in htc2022.OBJECTS for arc in (45, 50, 40)
    ]
    lines = htc2022.table(rows).splitlines()[2:5]
    assert [line.split(" | ")[-3:-1] for line in lines] == [
        ["0.9600", "–"],
        ["0.9600", "0.965"],
        ["**0.9600**", "0.95"],
    ]
