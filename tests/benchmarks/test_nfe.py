"""Quality against network evaluations: what is kept, and what is compared."""

import torch

from benchmarks import nfe
from benchmarks.cases import make_case, make_scenario
from recon.solvers.dds import DDS


def scenario(seed=0, shape=(32, 28)):
    noise = torch.randn(4, *shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return make_scenario(make_case("head", noise), "gaussian-2d", 2.5)


def test_rows_are_kept_for_data_and_prior_and_a_torn_line_is_dropped(tmp_path, monkeypatch):
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return {"nfe": 5, "psnr": 30.0, "seconds": 1.0}

    monkeypatch.setattr(nfe, "measure", measure)
    monkeypatch.setattr(nfe, "contenders", lambda longest: [("DDS", DDS(nfe=5))])
    cache = tmp_path / "nfe.jsonl"

    def rows(case, identity="a fp32"):
        return list(
            nfe.run([case], None, identity, num_samples=1, seed=0, longest=49, cache=cache),  # type: ignore[arg-type]
        )

    first = scenario()
    kept = rows(first)
    with cache.open("a") as file:
        file.write('{"key": "torn')
    assert rows(first) == kept
    assert len(measured) == 1
    # The name of both is that of the first.
    for number, (case, identity) in enumerate(
        [(first, "a bf16"), (scenario(seed=1), "a fp32"), (scenario(shape=(28, 28)), "a fp32")], start=2
    ):
        rows(case, identity)
        assert len(measured) == number
    monkeypatch.setattr(nfe, "code_digest", lambda: "other")
    rows(first)
    assert len(measured) == 5


def test_solvers_without_a_run_are_not_compared():
    rows = [
        {"where": "here", "name": name, "nfe": solver.nfe, "psnr": 30.0, "seconds": 1.0}  # type: ignore[attr-defined]
        for name, solver in nfe.contenders(49)
    ]
    assert {row["name"] for row in rows} == {"DDS", "DDS, eta = 0", "DDS, published setting"}
    assert nfe.table(rows).endswith("+0.00 dB from the published setting with 49.")
