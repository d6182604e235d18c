"""What a run leaves behind: rows, page and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix.configuration import Configuration
from benchmarks.matrix.document import as_html, as_markdown
from benchmarks.matrix.drawing import Panel, curves, dots, pictures
from benchmarks.matrix.methods import Entry, Shared, make_entries, sample_name
from benchmarks.matrix.page import Facts, make_page
from benchmarks.matrix.rows import Row, as_csv, write_parquet
from benchmarks.matrix.running import Planned, make_study, plan
from benchmarks.matrix.store import Store, code_digest
from benchmarks.matrix.study import Condition, Study
from recon.errors import ReconError
from recon.metrics import psnr

DIGITS = 12
"""Of a hash that the page shows."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A YAML file, looked up: everything that it names is there.

    Attributes
    ----------
    configuration : Configuration
        What the file says.
    study : Study
        Its data.
    entries : list of Entry
        Its methods.
    skipped : dict of str to str
        Optional methods that are not there, volumes without a target, and why.
    units : list of Planned
        Everything that is to be reconstructed.
    store : Store
        Where reconstructions are kept.
    shared : Shared
        Prior and device.
    main : str
        Column that the others are compared with.
    drawn : tuple
        Volume, slice and mask of the picture.
    """

    configuration: Configuration
    study: Study
    entries: list[Entry]
    skipped: dict[str, str]
    units: list[Planned]
    store: Store
    shared: Shared
    main: str
    drawn: tuple[Any, int, Condition]


def prepare(
    configuration: Configuration, store: Store, device: str, only: Collection[str] | None = None
) -> Benchmark:
    """Look everything up, so that a mistake is known before the first reconstruction.

    Parameters
    ----------
    configuration : Configuration
        What the file says.
    store : Store
        Where reconstructions are kept.
    device : str
        Where methods compute.
    only : collection of str, optional
        Names of the methods that are to run; others need not be there.

    Raises
    ------
    ReconError
        If something that the file names is not there.
    """
    shared = Shared.of(configuration, device)
    entries, skipped = make_entries(configuration, shared, only)
    study = make_study(configuration, device)
    return Benchmark(
        configuration,
        study,
        entries,
        study.left_out | skipped,
        plan(study, entries, configuration.seeds, device),
        store,
        shared,
        _main_column(configuration, entries, skipped),
        _drawn(configuration, study),
    )


def write_results(
    benchmark: Benchmark, rows: Sequence[Row], failures: Mapping[str, str], out: Path, command: str
) -> list[str]:
    """Write rows.csv, page.md, page.html and figures, and rows.parquet if pyarrow is installed.

    Parameters
    ----------
    benchmark : Benchmark
        What was run.
    rows : sequence of dict
        Of `benchmarks.matrix.rows.make_rows`, at least one.
    failures : mapping
        Unit -> why it failed.
    out : Path
        Folder, which is made.
    command : str
        As the page says it.

    Returns
    -------
    list of str
        Names of the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    configuration, study = benchmark.configuration, benchmark.study
    made = {row["method"] for row in rows}
    columns = [name for entry in benchmark.entries for name in entry.names if name in made]
    targets = [target for target in study.meanings if any(row["target"] == target for row in rows)]
    absent = [unit for unit in benchmark.units if not benchmark.store.has(unit.key)]
    figures = _figures(benchmark, rows, columns, targets, out)
    facts = Facts(
        title=configuration.title,
        modality=study.modality,
        how=_how(benchmark, command),
        meanings={target: study.meanings[target] for target in targets},
        conditions=study.conditions,
        columns=columns,
        settings={name: entry.method.settings for entry in benchmark.entries for name in entry.names},
        seeds=configuration.seeds,
        draws=configuration.bootstrap,
        main=benchmark.main,
        skipped=benchmark.skipped,
        failures=failures,
        missing=sum(unit.label not in failures for unit in absent),
        figures=figures,
    )
    blocks = make_page(rows, facts)
    _replace(out / "rows.csv", as_csv(rows))
    _replace(out / "page.md", as_markdown(blocks))
    _replace(out / "page.html", as_html(blocks, configuration.title))
    written = ["rows.csv", "page.md", "page.html", *(path.name for path, _ in figures)]
    return [*written, "rows.parquet"] if write_parquet(rows, out / "rows.parquet") else written


def _figures(
    benchmark: Benchmark, rows: Sequence[Row], columns: Sequence[str], targets: Sequence[str], out: Path
) -> list[tuple[Path, str]]:
    """Draw what there is to draw: files and captions."""
    configuration, study = benchmark.configuration, benchmark.study
    shared: dict[str, Any] = {
        "conditions": study.conditions,
        "methods": columns,
        "seeds": configuration.seeds,
        "draws": configuration.bootstrap,
    }
    path = out / "psnr.png"
    dots(rows, path, targets=targets, **shared)
    caption = "PSNR of every method: means over volumes"
    if len({volume.subject for volume in study.volumes}) * len(configuration.seeds) > 1:
        caption += ", with 95 % intervals"
    if len(study.volumes) > 1:
        caption += "; ticks are single volumes"
    figures = [(path, caption)]
    label = "acceleration asked for" if study.modality == "mri" else "views, or degrees"
    path = out / "curves.png"
    if curves(rows, path, target=targets[0], label=label, **shared):
        figures.append((path, f"PSNR against {label}"))
    case = _picture(benchmark, out / "case.png")
    return figures if case is None else [*figures, case]


def _main_column(configuration: Configuration, entries: Sequence[Entry], skipped: Mapping[str, str]) -> str:
    """Column that the others are compared with."""
    if not entries:
        raise ReconError(f"{configuration.path}: every method is left out")
    if configuration.main is None:
        return entries[-1].names[-1]
    for entry in entries:
        if configuration.main in (entry.name, *entry.names):
            return configuration.main if configuration.main in entry.names else entry.names[-1]
    where = f"{configuration.path}: main:"
    if configuration.main in skipped:
        raise ReconError(f"{where} {configuration.main} is left out: {skipped[configuration.main]}")
    raise ReconError(f"{where} there is no method {configuration.main!r}")


def _how(benchmark: Benchmark, command: str) -> dict[str, str]:
    """Name -> text: how the page was made."""
    configuration, study, shared = benchmark.configuration, benchmark.study, benchmark.shared
    store, units = benchmark.store, benchmark.units
    kept = [(unit, store.facts(unit.key)) for unit in units if store.has(unit.key)]
    stored = [fact for _, fact in kept]
    days = sorted({date.fromtimestamp(fact["finished"]).isoformat() for fact in stored})
    how = {
        "date": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        "machine": _all_of(stored, "machine"),
        "device": _all_of(stored, "device"),
        "command": f"`{command}`",
        "versions": _all_of(stored, "versions"),
        "code": _code(stored),
    }
    if any(entry.uses_prior for entry in benchmark.entries):
        digest = shared.prior_digest.partition(" ")[0]
        name = Path(str(shared.prior_name)).name
        how["prior"] = f"{name}, SHA-256 {digest[:DIGITS]}…, {shared.precision}"
    how["volumes"] = "; ".join(_described(volume) for volume in study.volumes)
    empty = dict.fromkeys(f"{unit.volume.name}, slice {unit.index}" for unit, fact in kept if fact["empty"])
    if empty:
        how["empty slices"] = f"{'; '.join(empty)}: nothing was measured, and every method's image is zero"
    how["seeds"] = ", ".join(map(str, configuration.seeds))
    return how | study.notes


def _all_of(facts: Sequence[Mapping[str, Any]], what: str) -> str:
    """What units say of where they were made: reconstructions that are kept may be of several machines."""
    counts = Counter(fact[what] for fact in facts)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{text} ({count} of {len(facts)} reconstructions)" for text, count in counts.items())


def _code(facts: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the code, and whether it made all units."""
    now = code_digest()[:DIGITS]
    earlier = Counter(fact["code"][:DIGITS] for fact in facts if fact["code"] != code_digest())
    if not earlier:
        return f"as it stands, {now}: every reconstruction was made by it"
    return (
        f"now {now}; {earlier.total()} of {len(facts)} reconstructions were made by an earlier state, "
        f"{', '.join(earlier)}; `--fresh` repeats them"
    )


def _described(volume: Any) -> str:
    """Name, source, slices, whom it shows, and what is to be known of it."""
    text = f"{volume.name}: {volume.source}{_slices(volume)}"
    if volume.subject != volume.name:
        text += f", subject {volume.subject}"
    return f"{text} ({volume.note.rstrip('.')})" if volume.note else text


def _slices(volume: Any) -> str:
    if len(volume.slices) == 1 and volume.slices[0] == 0:
        return ""
    return f", slice{'s' * (len(volume.slices) > 1)} {', '.join(map(str, volume.slices))}"


def _drawn(configuration: Configuration, study: Study) -> tuple[Any, int, Condition]:
    """Volume, slice and mask that the file wants to be drawn, or the first one."""
    chosen = configuration.picture
    where = f"{configuration.path}: picture:"
    volume = next((v for v in study.volumes if chosen.volume in (None, v.name)), None)
    if volume is None:
        known = "; ".join(v.name for v in study.volumes)
        why = study.left_out.get(chosen.volume or "")
        if why is not None:
            raise ReconError(f"{where} the volume {chosen.volume!r} is left out: {why}")
        raise ReconError(f"{where} there is no volume {chosen.volume!r}, but {known}")
    condition = next((c for c in study.conditions if chosen.mask in (None, c.label)), None)
    if condition is None:
        known = "; ".join(c.label for c in study.conditions)
        raise ReconError(f"{where} there is no mask {chosen.mask!r}, but {known}")
    index = volume.slices[len(volume.slices) // 2] if chosen.slice is None else chosen.slice
    if index not in volume.slices:
        raise ReconError(f"{where} slice {index} of {volume.name} is not among those that are reconstructed")
    return volume, index, condition


def _picture(benchmark: Benchmark, path: Path) -> tuple[Path, str] | None:
    """Draw a case; None if nothing of it is stored."""
    study, store = benchmark.study, benchmark.store
    volume, index, condition = benchmark.drawn
    targets = study.targets(volume, index)
    target, truth = next(iter(targets.items()))
    if study.is_empty(volume, index):
        return None  # black throughout
    peak = study.data_range(truth)
    panels = []
    for entry in benchmark.entries:
        wanted = (volume, index, condition, entry)
        unit = next(u for u in benchmark.units if (u.volume, u.index, u.condition, u.entry) == wanted)
        if not store.has(unit.key):
            continue
        made = store.read(unit.key)
        shown = {entry.names[-1]: made.image(target)}
        if len(entry.names) == 2:
            shown = {sample_name(entry.name): made.images["first_sample"], **shown}
        for name, image in shown.items():
            std = made.images.get("std") if name == entry.names[-1] else None
            panels.append(Panel(name, image, std, _psnr(truth, image, peak)))
    if not panels:
        return None
    pictures(truth, panels, path, modality=study.modality)
    return path, f"{volume.name}, slice {index}, {condition.label}, target `{target}`; PSNR of this slice"


def _psnr(truth: np.ndarray, image: np.ndarray, peak: float | None) -> float:
    return psnr(truth[None], image[None], peak)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
