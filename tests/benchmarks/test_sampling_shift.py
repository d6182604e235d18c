"""The figure of shifted sampling patterns, on rows made up here."""

from __future__ import annotations

import csv

import pytest

from benchmarks import sampling_shift as shift
from recon.errors import ReconError

OWN, OTHER = "equispaced ×4", "poisson ×8"
FIELDS = [*shift.COLUMNS, "SSIM"]


def row(method, mask=OWN, volume="a", psnr=40.0, seed="", target="rss", registry="oracle-tv", subject=None):
    return {
        "volume": volume,
        "subject": subject or volume,
        "mask": mask,
        "target": target,
        "method": method,
        "registry_name": registry,
        "seed": seed,
        "simulated": "True",
        "acceleration": "3.2",
        "calibration_source": "undersampled data",
        "PSNR": psnr,
        "SSIM": 0.9,
    }


def rows():
    made = []
    for volume, level in (("a", 0.0), ("b", 2.0)):
        for mask, network, sampled in ((OWN, 41.0, 40.0), (OTHER, 33.0, 36.0)):
            made.append(row("VarNet", mask, volume, network + level, registry="varnet"))
            made.append(row("TV", mask, volume, 30.0 + level))
            made += [
                row("DDS", mask, volume, sampled + level + 0.1 * s, seed=str(s), registry="dds")
                for s in (0, 1)
            ]
    return made


def write(path, made, fields=FIELDS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made)
    return path


def test_means_and_paired_leads():
    found = shift.Shift.of(rows(), "rss", OWN)
    assert found.masks == [OWN, OTHER]
    assert found.supervised == ["VarNet"]
    mean, lead = found.estimate(OTHER, "DDS"), found.lead(OTHER, "DDS", "VarNet")
    assert mean is not None
    assert mean.mean == pytest.approx(37.05)
    assert lead is not None
    # Both volumes lead by 3.0 with one seed and by 3.1 with the other: volumes do not widen the interval.
    assert lead.mean == pytest.approx(3.05)
    assert lead.low == pytest.approx(3.0)
    assert lead.high == pytest.approx(3.1)
    assert found.lead(OWN, "DDS", "nobody") is None


def test_table_and_verdict():
    found = shift.Shift.of(rows(), "rss", OWN)
    lines = shift.table(found, "DDS").splitlines()
    assert lines[2].startswith(f"| {OWN} (trained on) | **42.00** | 31.00 | 41.05 | -0.95")
    assert lines[3].startswith(f"| {OTHER} | 34.00 | 31.00 | **37.05** | +3.05")
    assert "the best supervised network is VarNet, +0.95 dB from DDS" in shift.verdict(found, "DDS")
    assert "DDS leads over every other method on every volume" in shift.verdict(found, "DDS")
    assert (
        "TV does not lead in 4 of 4 comparisons of a volume: VarNet on poisson ×8, a (-3.00 dB); VarNet on "
        "poisson ×8, b (-3.00 dB); DDS on poisson ×8, a (-6.05 dB)" in shift.verdict(found, "TV")
    )


def test_only_volumes_that_both_have_are_compared():
    made = [r for r in rows() if not (r["method"] == "VarNet" and r["volume"] == "b")]
    lead = shift.Shift.of(made, "rss", OWN).lead(OTHER, "DDS", "VarNet")
    assert lead is not None
    assert lead.mean == pytest.approx(3.05)


def test_means_of_a_line_are_over_the_volumes_that_all_methods_have(tmp_path):
    hard = [row("TV", volume="hard", psnr=20.0, registry="oracle-tv")]
    made = [row("TV", volume="easy", psnr=40.0), *hard, row("L1", volume="easy", psnr=39.0)]
    found = shift.Shift.of(made, "rss", OWN)
    assert "| **40.00** | 39.00 |" in shift.table(found, "TV")
    shift.main(["--rows", str(write(tmp_path / "a.csv", made)), "--out", str(tmp_path / "a.md")])
    page = (tmp_path / "a.md").read_text()
    assert "Means over 1 volume of 1 subject. Of one volume and one seed there is no interval." in page
    assert f"{OWN}: without hard, which not every method has." in page
    assert "Coil maps, for methods that take them: from the calibration region of undersampled data." in page
    found = shift.Shift.of([*hard, row("L1", volume="easy")], "rss", OWN)
    assert f"| {OWN} | – | – | – |" in shift.table(found, "TV")


def test_intervals_draw_subjects():
    lead = shift.Shift.of([{**r, "subject": "p"} for r in rows()], "rss", OWN).estimate(OWN, "VarNet")
    assert lead is not None
    assert not lead.known  # two volumes of one patient, and nothing drawn


def test_seeds_that_differ_are_refused():
    made = [r for r in rows() if not (r["volume"] == "b" and r["seed"] == "1")]
    with pytest.raises(ReconError, match="b, poisson ×8, DDS: there is no row with the seed 1"):
        shift.Shift.of(made, "rss", OWN).lead(OTHER, "DDS", "TV")


def test_the_command_writes_page_and_picture(tmp_path, capsys):
    path = write(tmp_path / "rows.csv", rows())
    out = tmp_path / "results" / "shift.md"
    shift.main(["--rows", str(path), "--out", str(out)])
    page = out.read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert str(tmp_path) not in page
    assert "supervised: VarNet, trained on equispaced ×4" in page
    assert "simulated coils" in page
    assert out.with_suffix(".png").stat().st_size > 10_000
    shift.main(["--rows", str(path), "--out", str(out), "--methods", "TV", "DDS", "--main", "TV"])
    assert "VarNet" not in out.read_text()
    assert "TV over DDS" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--main", "XYZ"], "there is no method 'XYZ', but VarNet; TV; DDS"),
        (["--own", "radial ×4"], "has the mask 'radial ×4'; there are: equispaced ×4; poisson ×8"),
        (["--target", "mvue"], "there is no target 'mvue', but rss"),
    ],
)
def test_what_is_not_in_the_rows_is_named(tmp_path, words, message):
    path = write(tmp_path / "rows.csv", rows())
    with pytest.raises(SystemExit, match=message):
        shift.main(["--rows", str(path), "--out", str(tmp_path / "a.md"), *words])


def test_bad_files(tmp_path):
    with pytest.raises(ReconError, match="there is no such file"):
        shift.read_rows(tmp_path / "absent.csv")
    with pytest.raises(ReconError, match=r"^[^ ]*a\.csv: the column 'mask' of"):
        shift.read_rows(write(tmp_path / "a.csv", rows(), [f for f in FIELDS if f != "mask"]))
    with pytest.raises(ReconError, match="there are no rows"):
        shift.read_rows(write(tmp_path / "b.csv", []))
    with pytest.raises(ReconError, match="these are no rows"):
        shift.read_rows(write(tmp_path / "c.csv", [row("TV", psnr="good")]))
