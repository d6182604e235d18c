"""The matrix from YAML to page, on small data written here."""

from __future__ import annotations

import csv
import re
import time
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from benchmarks import __main__ as command
from benchmarks.matrix import methods as registry
from benchmarks.matrix import results, running
from benchmarks.matrix.base import Reconstruction
from benchmarks.matrix.configuration import read_configuration
from benchmarks.matrix.methods import KINDS, Kind
from benchmarks.matrix.mri_study import MRIStudy
from benchmarks.matrix.resources import Meter
from benchmarks.matrix.store import RECONSTRUCTING, ROOT, Store, code_digest
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, save_prior
from recon.errors import ReconError
from recon.metrics import nmse, psnr, ssim
from tests.benchmarks.chest_phantom import PIXEL, chest
from tests.benchmarks.head_phantom import case, phantom, write_cfl
from tests.recon.fastmri_files import make_kspace, write_file

MRI = """
modality: mri
data:
  - measured: full.cfl
  - fastmri: volume.h5
    slices: [0, 1]
masks:
  - {kind: equispaced, acceleration: 3}
methods: METHODS
targets: [rss]
seeds: SEEDS
prior: tiny.safetensors
bootstrap: 200
"""


@dataclass(eq=False)
class Made:
    """A method that adds to the truth what it is told to; it remembers what it was asked for."""

    name: str
    level: float = 0.1
    needs_seed: bool = False
    fails_at: str = ""
    interrupted_at: str = ""
    calls: list = field(default_factory=list)

    @property
    def settings(self):
        return f"level {self.level}"

    def reconstruct(self, case, seed):
        self.calls.append((case.case.name, case.mask.name, seed))
        if self.interrupted_at == case.case.name:
            raise KeyboardInterrupt
        if self.fails_at == case.case.name:
            raise RuntimeError("the machine is on fire")
        truth = case.case.targets["rss"]
        generator = torch.Generator().manual_seed(seed)
        return Reconstruction(
            truth + self.level * truth.max() * torch.randn(truth.shape, generator=generator)
        )


@pytest.fixture
def made(monkeypatch, undrawn):
    """Methods `a` and `b` of the registry, the second one with a seed."""
    found = {"a": Made("a", 0.2), "b": Made("b", 0.1, needs_seed=True)}
    for name in found:
        monkeypatch.setitem(KINDS["mri"], name, Kind("made up", lambda name, shared: found[name]))
    return found


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take time, and have tests of their own."""

    def draw(*arguments, **options):
        path = next(argument for argument in arguments if isinstance(argument, Path))
        path.write_bytes(b"\x89PNG")

    for name in ("dots", "pictures"):
        monkeypatch.setattr(results, name, draw)


@pytest.fixture
def folder(tmp_path):
    array = case().kspace.numpy().transpose(1, 2, 0)
    write_cfl(tmp_path, array, (1, *array.shape))
    write_file(tmp_path / "volume.h5", {"kspace": make_kspace(3, 4, 64, 48)})
    return tmp_path


def write(folder, methods="[a, b]", seeds="[0]", **changes):
    text = MRI.replace("METHODS", methods).replace("SEEDS", seeds)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "test.yaml").write_text(text)


def run(folder, *words):
    out = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    return command.main([str(folder / "test.yaml"), *out, *words])


def rows_of(folder):
    with (folder / "out" / "rows.csv").open() as file:
        return list(csv.DictReader(file))


# A whole run


def test_rows_are_over_volumes_and_every_unit_runs_once(folder, made):
    write(folder, seeds="[0, 5]")
    assert run(folder) == 0
    assert len(made["a"].calls) == 3  # three slices, whatever the seeds
    assert len(made["b"].calls) == 6
    rows = rows_of(folder)
    assert [(row["volume"], row["method"], row["seed"]) for row in rows] == [
        (volume, *which)
        for volume in ("full, measured, 5 coils", "volume")
        for which in (("a", ""), ("b", "0"), ("b", "5"))
    ]
    assert {row["slices"] for row in rows if row["volume"] == "volume"} == {"2"}

    # The same again, by hand: the largest value of the volume is the peak, and the centre is scored.
    configuration = read_configuration(folder / "test.yaml")
    study = MRIStudy(configuration)
    volume = study.volumes[1]
    truth = np.stack([study.targets(volume, index)["rss"] for index in (0, 1)])
    assert truth.shape == (2, 48, 48)
    images = []
    for index in (0, 1):
        scenario = study.scenario(volume, index, study.conditions[0])
        images.append(made["b"].reconstruct(scenario, 5).image.abs().numpy())
    assert truth[0].max() != truth[1].max()
    (row,) = (row for row in rows if (row["volume"], row["seed"]) == ("volume", "5"))
    for metric in (psnr, ssim, nmse):
        assert float(row[metric.__name__.upper()]) == pytest.approx(metric(truth, np.stack(images)), rel=1e-5)
    mask = study.mask(volume, study.conditions[0])
    assert float(row["acceleration"]) == pytest.approx(1 / float(mask.mask.double().mean()))
    assert row["calibration_source"] == "undersampled data"
    assert float(row["wall_s"]) > 0
    assert row["MS-SSIM"] == ""  # too small for five scales
    assert float(row["HFEN"]) > 0


def test_a_second_run_computes_nothing_and_changes_nothing(folder, made):
    write(folder)
    assert run(folder) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    stored = sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "cache").rglob("*.*"))
    for method in made.values():
        method.calls.clear()
    assert run(folder) == 0
    assert not made["a"].calls
    assert not made["b"].calls
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (folder / "cache").rglob("*.*")) == stored


def test_an_interrupted_run_goes_on_where_it_was(folder, made, capsys):
    write(folder)
    made["b"].interrupted_at = "volume, slice 1"
    assert run(folder) == 130
    assert (
        "stopped after 5 of 6 reconstructions; the same command goes on from there" in capsys.readouterr().err
    )
    assert not list((folder / "cache").rglob("*.tmp"))
    made["b"].interrupted_at = ""
    for method in made.values():
        method.calls.clear()
    assert run(folder) == 0
    assert (made["a"].calls, [name for name, _, _ in made["b"].calls]) == ([], ["volume, slice 1"])
    assert len(rows_of(folder)) == 4


def test_a_failing_unit_is_reported_and_the_others_go_on(folder, made, capsys):
    write(folder)
    made["a"].fails_at = "volume, slice 0"
    assert run(folder) == 1
    printed = capsys.readouterr().err
    assert "failed: volume, slice 0, equispaced ×3, a: RuntimeError: the machine is on fire" in printed
    rows = rows_of(folder)
    assert [(row["volume"], row["method"]) for row in rows] == [
        ("full, measured, 5 coils", "a"),
        ("full, measured, 5 coils", "b"),
        ("volume", "b"),  # of `a` a slice is missing, and half a volume is no volume
    ]
    page = (folder / "out" / "page.md").read_text()
    assert "- Failed: volume, slice 0, equispaced ×3, a: RuntimeError: the machine is on fire" in page
    assert "Means over 1 volume of 1 subject. Of one volume and one seed there is no interval." in page
    assert "equispaced ×3: without volume, which not every method has." in page
    made["a"].fails_at = ""
    assert run(folder) == 0
    assert len(rows_of(folder)) == 4
    assert "Failed" not in (folder / "out" / "page.md").read_text()


def test_an_image_that_is_not_finite_or_of_another_shape_is_a_failure(folder, made, capsys):
    write(folder)
    made["a"].level = float("nan")
    made["b"].reconstruct = lambda case, seed: Reconstruction(torch.zeros(30, 30))
    assert run(folder) == 1
    printed = capsys.readouterr().err
    assert (
        "full, measured, 5 coils, slice 0, equispaced ×3, a: an image was given that is not finite" in printed
    )
    assert "b, seed 0: an image of (30, 30) was given, and the target has (48, 40)" in printed


# What makes a stored result stale


def calls_after(folder, made, **changes):
    for method in made.values():
        method.calls.clear()
    write(folder, **changes)
    assert run(folder) == 0
    return len(made["a"].calls), len(made["b"].calls)


def test_only_what_was_changed_is_computed_again(folder, made):
    assert calls_after(folder, made) == (3, 3)
    made["b"].level = 0.3
    assert calls_after(folder, made) == (0, 3)  # the settings of one method
    assert calls_after(folder, made, seeds="[0, 1]") == (0, 3)  # one more seed, of which `a` knows nothing
    more = {"acceleration: 3": "acceleration: [3, 2]"}
    assert calls_after(folder, made, **more) == (3, 3)  # one more mask
    assert calls_after(folder, made, methods="[b, a]") == (0, 0)  # the order
    array = case(seed=3).kspace.numpy().transpose(1, 2, 0)
    write_cfl(folder, array, (1, *array.shape))
    assert calls_after(folder, made) == (1, 1)  # the data of one slice


def test_renaming_computes_nothing(folder, made, monkeypatch):
    monkeypatch.setitem(
        KINDS["mri"], "zero", Kind("", lambda name, shared: Made(name, calls=made["a"].calls))
    )
    assert calls_after(folder, made, methods="[zero]") == (3, 0)
    assert calls_after(folder, made, methods="[{method: zero, name: other}]") == (0, 0)
    assert {row["method"] for row in rows_of(folder)} == {"other"}


def test_other_code_is_said_in_the_page_and_computed_again_when_asked(folder, made, monkeypatch):
    write(folder)
    assert run(folder) == 0
    assert "- code: as it stands" in (folder / "out" / "page.md").read_text()
    for module in ("running", "results"):
        monkeypatch.setattr(f"benchmarks.matrix.{module}.code_digest", lambda: "changed")
    assert run(folder) == 0
    assert "6 of 6 reconstructions were made by an earlier state" in (folder / "out" / "page.md").read_text()
    assert len(made["a"].calls) == 3
    assert run(folder, "--fresh", "--methods", "a") == 0
    assert (len(made["a"].calls), len(made["b"].calls)) == (6, 3)
    assert "3 of 6 reconstructions were made by an earlier state" in (folder / "out" / "page.md").read_text()


def test_the_page_names_all_machines_that_made_what_is_kept(folder, made, monkeypatch):
    write(folder)
    assert run(folder, "--methods", "a") == 0
    for name, text in (("machine", "another machine"), ("versions", "torch 9")):
        monkeypatch.setattr(running, name, lambda *arguments, text=text: text)
    assert run(folder) == 0
    page = (folder / "out" / "page.md").read_text()
    assert re.search(
        r"\n- machine: .* used by torch \(3 of 6 rec.*; another machine \(3 of 6 reconstructions\)\n", page
    )
    assert re.search(r"\n- versions: torch .* \(3 of 6 rec.*; torch 9 \(3 of 6 reconstructions\)\n", page)
    assert "\n- device: cpu\n" in page
    assert f"\n- code: as it stands, {code_digest()[:12]}: every" in page


def test_what_a_gpu_made_is_not_taken_for_what_a_cpu_would(folder, made):
    configuration, shared = configured(folder, "[a]")
    study, (entries, _) = MRIStudy(configuration), registry.make_entries(configuration, shared)
    keys = {
        device: [unit.key for unit in running.plan(study, entries, [0], device)]
        for device in ("cpu", "cuda", "cuda:1")
    }
    assert not set(keys["cpu"]) & set(keys["cuda"])
    assert keys["cuda"] == keys["cuda:1"]


def test_the_hash_is_of_all_code_that_makes_images():
    # Every module of the benchmarks behind a unit, but those known here to make neither data nor images.
    seen, waiting = set(), ["benchmarks/matrix/running.py"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r"from (benchmarks[.\w]*) import (\w+)", (ROOT / path).read_text()):
            parts = (f"{name[0].replace('.', '/')}.py", f"{'/'.join(name).replace('.', '/')}.py")
            waiting += [part for part in parts if (ROOT / part).exists()]
    assert {path for path in seen if not path.startswith(RECONSTRUCTING)} == {
        "benchmarks/machine.py",
        "benchmarks/kept_lines.py",
        *(
            f"benchmarks/matrix/{name}.py"
            for name in ("base", "configuration", "resources", "store", "study")
        ),
    }


def test_a_part_may_be_run_alone(folder, made):
    write(folder)
    assert run(folder, "--methods", "b", "--only", "volume, slice 1") == 0
    assert (len(made["a"].calls), len(made["b"].calls)) == (0, 1)
    assert run(folder, "--methods", "b") == 0
    assert [row["method"] for row in rows_of(folder)] == ["b", "b"]
    assert "3 reconstructions have not been run" in (folder / "out" / "page.md").read_text()


# Volumes, subjects and targets

SIMULATED = {"  - fastmri: volume.h5": "  - nifti: head.nii"}


@pytest.fixture
def head(folder):
    """A folder with a volume to simulate k-space of, too."""
    nibabel = pytest.importorskip("nibabel")
    volume = np.stack([phantom().numpy().T] * 2, axis=-1)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "head.nii")
    return folder


def test_volumes_of_one_subject_and_what_is_to_be_known_of_them(folder, made):
    write(
        folder,
        **{
            "full.cfl": "full.cfl\n    subject: she",
            "slices: [0, 1]": "slices: [0, 1]\n    subject: she\n    note: Settings were chosen on it.",
        },
    )
    assert run(folder) == 0
    assert {row["subject"] for row in rows_of(folder)} == {"she"}
    page = (folder / "out" / "page.md").read_text()
    assert "slices 0, 1, subject she (Settings were chosen on it)" in page
    assert "Means over 2 volumes of 1 subject. Of one subject and one seed there is no interval." in page
    assert "[" not in page.partition("## Summary")[2].partition("## Target")[0]


def test_three_volumes_of_mri_yaml_are_of_one_patient(tmp_path):
    path = ROOT / "benchmarks" / "mri.yaml"
    for entry in yaml.safe_load(path.read_text())["data"]:
        file = tmp_path / entry.get("nifti", entry.get("measured"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    data = read_configuration(path, tmp_path).data
    assert [entry.subject for entry in data] == [None, *["patient 19"] * 3]
    assert [bool(entry.note) for entry in data] == [True, True, True, False]


def test_each_target_says_how_many_volumes_have_it(head, made):
    write(head, **SIMULATED, **{"targets: [rss]": "targets: [rss, noise-free]"})
    assert run(head) == 0
    page = (head / "out" / "page.md").read_text()
    for target, text in (("rss", "2 volumes of 2 subjects"), ("noise-free", "1 volume of 1 subject")):
        assert f"### Target `{target}`, all volumes\n\nMeans over {text}." in page


def test_a_target_asked_for_later_completes_the_rows_of_the_others(head, made):
    def noise_free():
        assert run(head) == 0
        return [row["noise_free_PSNR"] for row in rows_of(head) if row["target"] == "rss"]

    write(head, **SIMULATED)
    assert noise_free() == [""] * 4
    write(head, **SIMULATED, **{"targets: [rss]": "targets: [rss, noise-free]"})
    assert [bool(value) for value in noise_free()] == [False, False, True, True]
    assert len(made["a"].calls) == 3


def test_volumes_without_a_target_are_left_out_before_the_run(head, made, capsys):
    write(head, **SIMULATED, **{"targets: [rss]": "targets: [noise-free]"})
    assert run(head) == 0
    reason = "it has none of the targets noise-free"
    assert capsys.readouterr().err.count(f"full, measured, 5 coils is left out: {reason}\n") == 1
    assert f"- Left out: full, measured, 5 coils, because {reason}." in (
        (head / "out" / "page.md").read_text()
    )
    assert {row["volume"] for row in rows_of(head)} == {"head"}
    made["a"].calls.clear()
    write(head, **{"targets: [rss]": "targets: [noise-free]"})
    assert run(head) == 2
    assert "targets: no volume has any of noise-free" in capsys.readouterr().err
    assert not made["a"].calls


def test_an_empty_slice_is_zero_for_every_method(folder, made):
    save_tiny(folder / "tiny.safetensors")
    with h5py.File(folder / "volume.h5", "r+") as file:
        file["kspace"][0] = 0
    two = "{method: dds, name: D, num_samples: 2, rows: [sample, mean], settings: {nfe: 2}}"
    black = {"bootstrap: 200": "picture: {volume: volume, slice: 0}"}
    write(folder, methods=f"[a, {two}]", **black)
    assert run(folder) == 0
    assert [name for name, _, _ in made["a"].calls] == ["full, measured, 5 coils", "volume, slice 1"]
    rows = {row["method"]: row for row in rows_of(folder) if row["volume"] == "volume"}
    assert {row["slices"] for row in rows.values()} == {"2"}
    assert (rows["D, mean of 2"]["num_samples"], float(rows["D, mean of 2"]["NFE"])) == ("2", 4)
    # By hand, with nothing where nothing was measured.
    study = MRIStudy(read_configuration(folder / "test.yaml"))
    truth = np.stack([study.targets(study.volumes[1], index)["rss"] for index in (0, 1)])
    scenario = study.scenario(study.volumes[1], 1, study.conditions[0])
    image = study.scored(study.volumes[1], made["a"].reconstruct(scenario, 0).image)
    assert not truth[0].any()
    assert float(rows["a"]["PSNR"]) == pytest.approx(psnr(truth, np.stack([0 * image, image])), rel=1e-5)
    page = (folder / "out" / "page.md").read_text()
    assert "- empty slices: volume, slice 0: nothing was measured" in page

    with h5py.File(folder / "volume.h5", "r+") as file:
        file["kspace"][1] = 0
    with pytest.raises(ReconError, match="the slices 0, 1 are all zeros"):
        MRIStudy(read_configuration(folder / "test.yaml"))


# Our own methods, and the page


def save_tiny(path, channels="complex"):
    torch.manual_seed(0)
    count = 2 if channels == "complex" else 1
    settings = NetworkSettings(channels=count, widths=(8,), embedding=8, sigma_data=0.5)
    unit = "level" if channels == "complex" else "water"
    contract = Contract(channels=channels, name="tiny", level=0.5, size_multiple=2, unit=unit)
    save_prior(path, NetworkPrior(DenoisingUNet(settings), contract))


class References(HTMLParser):
    """Everything that a page would have to fetch."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_from_the_files_to_the_page(folder):
    save_tiny(folder / "tiny.safetensors")
    write(
        folder,
        "[zero-filled, {method: oracle-cg-sense, name: CG}, {method: dds, name: DDS, num_samples: 2, "
        "rows: [sample, mean], settings: {nfe: 2}}, {method: unet, weights: none.pt, optional: true}]",
        seeds="[0, 1]",
        **{"targets: [rss]": "targets: [combined, rss]\nmain: CG"},
    )
    assert run(folder) == 0
    rows = rows_of(folder)
    columns = ["zero-filled", "CG", "DDS, one sample", "DDS, mean of 2"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == columns
    nfe = {row["method"]: float(row["NFE"]) for row in rows}
    assert nfe == dict(zip(columns, (0, 0, 2, 4), strict=True))
    assert {row["seed"] for row in rows if row["method"].startswith("DDS")} == {"0", "1"}
    assert all(row["chosen"] for row in rows if row["method"] == "CG")
    # Each target is met with the zero-filled image of its own kind.
    zero = {
        (row["volume"], row["target"]): float(row["PSNR"]) for row in rows if row["method"] == "zero-filled"
    }
    assert len(set(zero.values())) == 4

    page = (folder / "out" / "page.md").read_text()
    assert str(folder) not in page
    assert "# MRI" in page.splitlines()[0]
    for text in (
        "- prior: tiny.safetensors, SHA-256 ",
        ", fp32",
        "- command: `python -m benchmarks test.yaml",
        "- machine: ",
        "Left out: unet, because",
        "ESPIRiT from the calibration region of the undersampled data",
        "Magnitude of the fully sampled coil images combined with ESPIRiT maps",
        "| CG – zero-filled |",
        "200 bootstrap draws over subjects and seeds",
        "Means over 2 volumes of 2 subjects. Of 2 subjects the intervals are rough",
    ):
        assert text in page, text
    # Below the means and the differences of both targets.
    source = "Coil maps, for methods that take them: from the calibration region of undersampled data."
    assert page.count(source) == 4
    assert "flatters every method, since" not in page  # all of it was measured
    table = page.partition("\n## Target `rss`")[2].partition("HFEN")[0]
    (line,) = (line for line in table.splitlines() if line.startswith("| volume | 2 | equispaced ×3 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][-len(columns) :]
    here = [row for row in rows if (row["volume"], row["target"]) == ("volume", "rss")]
    means = [np.mean([float(row["PSNR"]) for row in here if row["method"] == name]) for name in columns]
    assert [cell.split(" / ")[0].strip("*") for cell in cells] == [f"{mean:.2f}" for mean in means]
    assert [cell.startswith("**") for cell in cells] == [mean == max(means) for mean in means]

    text = (folder / "out" / "page.html").read_text()
    references = References()
    references.feed(text)
    assert references.tags.count("img") == 2
    assert all(found.startswith("data:image/png;base64,") for found in references.found)
    assert "prefers-color-scheme: dark" in text
    for name in ("psnr.png", "case.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_supervised_methods_are_imported_when_they_are_asked_for(folder, monkeypatch):
    @dataclass(frozen=True)
    class Network:
        weights: Path
        name: str = "?"
        device: str = "?"
        steps: int = 1
        settings: str = "a network"
        needs_seed: bool = False

        def __post_init__(self):
            if self.steps < 1:
                raise ReconError("at least one step")

        def reconstruct(self, case, seed):
            return Reconstruction(case.case.targets["rss"])

    import types

    module = types.SimpleNamespace(Network=Network)
    monkeypatch.setattr(registry, "import_module", lambda name: module)
    monkeypatch.setitem(KINDS["mri"], "net", Kind("", "some.where:Network"))
    (folder / "weights.pt").write_bytes(b"first")
    configuration, shared = configured(folder, "[{method: net, name: N, weights: weights.pt, steps: 3}]")
    ((entry,), skipped) = registry.make_entries(configuration, shared)
    assert entry.method == Network(folder / "weights.pt", "N", "cpu", 3)
    assert not skipped
    (folder / "weights.pt").write_bytes(b"others")
    assert registry.make_entries(configuration, shared)[0][0].identity != entry.identity
    for text, message in (
        ("[{method: net, weights: none.pt}]", "net: weights: there is no file none.pt"),
        (
            "[{method: net, weights: weights.pt, stepz: 3}]",
            "net has no option 'stepz'; its options are",
        ),
        ("[net]", "net needs the option weights"),
        (
            "[{method: net, weights: weights.pt, steps: many}]",
            "line 9: net: steps is a whole number, not 'many'",
        ),
        ("[{method: net, weights: weights.pt, steps: 1.5}]", "steps is a whole number, not 1.5"),
        ("[{method: net, weights: weights.pt, steps: true}]", "steps is a whole number, not True"),
        ("[{method: net, weights: 3}]", "weights is the name of a file, not 3"),
        # Optional is what is missing, not what is wrong.
        ("[zero-filled, {method: net, weights: none.pt, steps: many, optional: true}]", "steps is a whole"),
        (
            "[zero-filled, {method: net, weights: weights.pt, steps: 0, optional: true}]",
            "line 9: net: at least one step",
        ),
    ):
        with pytest.raises(ReconError, match=message) as error:
            registry.make_entries(*configured(folder, text))
        assert "\n" not in str(error.value)
    optional = "[zero-filled, {method: net, name: N, weights: none.pt, optional: true}]"
    entries, skipped = registry.make_entries(*configured(folder, optional))
    assert [made.name for made in entries] == ["zero-filled"]
    assert skipped == {"N": "net: weights: there is no file none.pt"}
    needy = Kind(
        "", "some.where:Network", packages=("torch", "no_such_package"), programs=("no-such-program",)
    )
    monkeypatch.setitem(KINDS["mri"], "net", needy)
    without = configured(folder, optional.replace("none.pt", "weights.pt"))
    _, skipped = registry.make_entries(*without)
    assert skipped == {"N": "net needs what is not installed: no_such_package, no-such-program"}
    with pytest.raises(ReconError, match="main: N is left out: net needs what is not installed: no_such"):
        results.prepare(replace(without[0], main="N"), Store(folder / "cache"), "cpu")

    def absent(name):
        raise ImportError("no fastmri here")

    monkeypatch.setattr(registry, "import_module", absent)
    with pytest.raises(ReconError, match="net cannot be imported: no fastmri here"):
        registry.make_entries(configuration, shared)


def configured(folder, methods):
    write(folder, methods)
    configuration = read_configuration(folder / "test.yaml")
    return configuration, registry.Shared.of(configuration)


# Mistakes in the file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("modality: mri", "modality: xray", r"test.yaml, line 2: modality is one of mri, ct, not 'xray'"),
        (
            "bootstrap: 200",
            "bootstrap: 200\nbotstrap: 3",
            "line 14: 'botstrap' is not known here; the keys",
        ),
        ("bootstrap: 200", "bootstrap: many", "line 13: bootstrap is a whole number from 1, not 'many'"),
        ("bootstrap: 200", "bootstrap: 0", "bootstrap is a whole number from 1, not 0"),
        ("bootstrap: 200", "bootstrap: 1\nbootstrap: 2", "line 14: 'bootstrap' is there twice"),
        ("bootstrap: 200", "perceptual: 1", "perceptual is true or false, not 1"),
        ("bootstrap: 200", "picture: {volume: none}", "picture: there is no volume 'none'"),
        ("bootstrap: 200", "picture: {mask: none}", "picture: there is no mask 'none', but equispaced ×3"),
        ("bootstrap: 200", "picture: {volume: volume, slice: 2}", "slice 2 of volume is not among those"),
        ("bootstrap: 200", "main: none", "main: there is no method 'none'"),
        ("measured: full.cfl", "measured: none.cfl", r"line 4: measured .*none\.cfl: there is no such file"),
        (
            "measured: full.cfl",
            "mesured: full.cfl",
            "line 4: data are given by one of measured, nifti",
        ),
        ("slices: [0, 1]", "slices: [0, 7]", "has no slice 7, but 3 of them"),
        ("slices: [0, 1]", "slices: [0, 0]", "slices are given twice"),
        ("slices: [0, 1]", "slices: one", "line 6: slices is a list of whole numbers from 0, not 'one'"),
        ("slices: [0, 1]", "crop: [3, 4]", "'crop' is not known here; the keys are"),
        ("kind: equispaced", "kind: magical", "unknown mask kind 'magical'"),
        ("acceleration: 3", "acceleration: fast", "acceleration is a positive number, not 'fast'"),
        ("acceleration: 3", "acceleration: [3, 3]", "two masks or scans are 'equispaced ×3'"),
        ("targets: [rss]", "targets: [truth]", "targets are of rss, combined, noise-free, not 'truth'"),
        ("seeds: [0]", "seeds: [-1]", "seeds is a list of whole numbers from 0"),
        ("[a, b]", "[a, a]", "two methods are called 'a': give one of them a name"),
        ("[a, b]", "[a, c]", "there is no method 'c'"),
        ("[a, b]", "[{method: a, speed: 3}]", "line 9: a has no option 'speed'; it has none"),
        ("[a, b]", "[{method: dds, settings: {nfr: 3}}]", "line 9: solver dds has no setting 'nfr'"),
        ("[a, b]", "[{method: dds, preset: none}]", "solver dds has no preset 'none'"),
        ("[a, b]", "[{method: dds, rows: [median]}]", "rows is a list of sample, mean"),
        ("[a, b]", "[{method: tv, num_samples: 3}]", "tv draws no samples"),
        ("[a, b]", "[dds-3d]", "reconstructs whole volumes"),
        (
            "[a, b]",
            "[{method: deepinv-dps, nfe: many}]",
            "line 9: deepinv-dps: nfe is a whole number, not 'many'",
        ),
        ("[a, b]", "[{method: deepinv-dps, num_samples: 1.5}]", "num_samples is a whole number, not 1.5"),
        ("[a, b]", "[oracle-fbp]", "there is no method 'oracle-fbp'"),
        ("[a, b]", "[a, {name: b}]", "line 9: method is missing"),
        ("[a, b]", "[a, b", "expected"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(folder, made, capsys, old, new, message):
    save_tiny(folder / "tiny.safetensors")
    write(folder, **({old: new} if old != "[a, b]" else {"[a, b]": new}))
    assert run(folder) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ")
    assert re.search(message, printed), printed
    assert not made["a"].calls
    assert not made["b"].calls
    assert not (folder / "out" / "page.md").exists()


def test_no_file_and_unknown_methods_of_the_command(folder, made, capsys):
    assert command.main([str(folder / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    write(folder)
    assert run(folder, "--methods", "c") == 2
    assert "there is no method 'c', but a, b" in capsys.readouterr().err
    assert run(folder, "--only", "nowhere") == 2
    assert "nothing is left to reconstruct" in capsys.readouterr().err
    for words, message in (
        (("--threads", "0"), "error: --threads is a whole number from 1, not 0\n"),
        (("--device", "foo"), "error: unknown device 'foo': cpu, cuda, cuda:1, ... are known\n"),
    ):
        assert run(folder, *words) == 2
        assert capsys.readouterr().err == message
    assert command.main(["--list-methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("oracle-tv", "varnet", "score-mri", "oracle-fbp"))


def test_a_damaged_file_of_the_cache_is_named(folder, made, capsys):
    write(folder)
    assert run(folder) == 0
    path = next((folder / "cache" / "units").iterdir())
    path.write_bytes(path.read_bytes()[:50])
    assert run(folder) == 2
    assert f"{path.name} is damaged; remove it" in capsys.readouterr().err
    path.unlink()
    assert run(folder) == 0


def test_data_may_lie_elsewhere(folder, made, tmp_path_factory):
    write(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("full.cfl", "full.hdr", "volume.h5"):
        (folder / name).rename(elsewhere / name)
    assert run(folder) == 2
    assert run(folder, "--data", str(elsewhere)) == 0


# CT


def write_series(folder):
    with h5py.File(folder / "hu.h5", "w") as file:
        group = file.create_group("left_out")
        group["hu"] = chest()[None].astype(np.int16)
        group.attrs.update({"pixel_spacing_mm": [PIXEL / 2] * 2, "licence": "CC BY 4.0"})


def test_no_method_is_charged_with_the_scan_and_its_operator(tmp_path, monkeypatch, undrawn):
    write_series(tmp_path)
    ready = []

    class Spy(Made):
        def reconstruct(self, case, seed):
            problems = {"measurement", "weighted", "unweighted"} <= vars(case).keys()
            ready.append(problems and "matrix" in case.measurement.operator._made)
            return Reconstruction(torch.from_numpy(case.case.truth))

    for name in ("first", "second"):
        monkeypatch.setitem(KINDS["ct"], name, Kind("", lambda name, shared: Spy(name)))
    (tmp_path / "test.yaml").write_text(
        "modality: ct\n"
        "data: [{hu: hu.h5, series: left_out, slices: 0, note: It is made up.}]\n"
        "scans: [{beam: fan, views: [12, 8]}]\n"
        "methods: [first, {method: second, name: second}]\n"
    )
    assert run(tmp_path, "--methods", "first") == 0
    assert run(tmp_path) == 0
    assert ready == [True] * 4
    assert "(It is made up)" in (tmp_path / "out" / "page.md").read_text()


def test_ct_from_the_series_to_the_page(tmp_path):
    write_series(tmp_path)
    save_tiny(tmp_path / "tiny.safetensors", "real")
    (tmp_path / "test.yaml").write_text(
        "modality: ct\n"
        "data: [{hu: hu.h5, series: left_out, slices: 0}]\n"
        "scans: [{beam: parallel, views: [12, 20, 30]}, {beam: fan, arcs: 90}]\n"
        "methods: [{method: oracle-fbp, name: FBP}, {method: sirt, settings: {iterations: 3}}, "
        "{method: dds, preset: ct, num_samples: 1, settings: {nfe: 2, cg_iterations: 2}}]\n"
        "prior: tiny.safetensors\n"
    )
    assert run(tmp_path) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 4 * 3
    assert [row["mask"] for row in rows[::3]] == [
        "parallel, 12 views",
        "parallel, 20 views",
        "parallel, 30 views",
        "fan, 90°, 90 views",
    ]
    assert [row["views"] for row in rows[::3]] == ["12", "20", "30", "90"]
    fbp = [float(row["PSNR"]) for row in rows if row["method"] == "FBP"]
    assert fbp[0] < fbp[1] < fbp[2]
    page = (tmp_path / "out" / "page.md").read_text()
    for text in ("left_out, CC BY 4.0", "2e+05 photons", "](curves.png)", "](psnr.png)", "](case.png)"):
        assert text in page
    assert "Of one volume and one seed there is no interval." in page
    assert "Scans are simulated" in page


# Memory


def test_the_memory_of_one_piece_of_work_is_not_that_of_another():
    def work(megabytes):
        with Meter() as meter:
            block = np.ones(megabytes * 125_000)
            time.sleep(0.05)
            del block
        return meter

    if Meter().memory_mb is None and work(1).memory_mb is None:
        pytest.skip("this system does not tell how much memory a process has")
    large, small = work(300), work(10)
    assert large.memory_added_mb == pytest.approx(300, rel=0.2)
    assert small.memory_added_mb < 100
    assert small.memory_mb < large.memory_mb - 150
    assert large.wall_s > 0.05
