"""The page: every row as a ratio of times and a difference of scores, and whether the bars are met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.pages import SIMULATED, markdown_table
from benchmarks.peers.interleaving import Spread
from benchmarks.peers.search import GRIDS, described
from benchmarks.peers.sections import Row

TIME_BAR = 0.7
"""Largest part of the time of the peer's best diffusion solver."""

SEEDS_DIFFER = 3.0
"""Range in dB of the scores of a row from which its setting says that seeds differ."""

CLOCK_WORDS = {
    "cpu": "processor seconds, of this process and the programs that it runs (on one thread and an idle "
    "machine those of the wall)",
    "wall": "seconds of the wall",
}

SECTIONS = {
    "mri": (
        "Diffusion, several coils",
        "deepinv's `MultiCoilMRI` with the same mask and maps (ESPIRiT from the calibration region of the "
        "undersampled data). Single samples against the target `combined`, the fully sampled coil images "
        "combined with maps of their own.",
    ),
    "single coil": (
        "Diffusion, one coil",
        "DDRM needs the singular value decomposition of the operator, which `MultiCoilMRI` does not have. So "
        "here is one coil that sees the fully sampled combined image, undersampled, with deepinv's `MRI`.",
    ),
    "ct": (
        "Diffusion, parallel-beam CT",
        "deepinv's `Tomography` (its adjoint by automatic differentiation, its default) on the same "
        "sinogram, which was simulated by another projector on pixels half as wide. It counts all data "
        "alike, and so does the first row; the second weighs them by their noise, as `recon ct` does.",
    ),
    "classical": (
        "Without a prior, several coils",
        "Each at its own best λ and with the maps, cropped or not, that suit it best, by PSNR against the "
        "target `combined`: an oracle for everybody. Four times the steps change total variation by at most "
        "0.05 dB on the measured slice. Wavelets on grids shifted at random, here and in BART, approach no "
        "minimum: their number of steps is part of the method. BART is a program: its time includes its "
        "start and its files.",
    ),
    "maps": (
        "Coil maps",
        "ESPIRiT from the calibration region of the undersampled data. Score: energy of the fully sampled "
        "coil images over that part of it which maps cannot explain, in dB; noise bounds it.",
    ),
    "ct classical": (
        "Without a prior, parallel-beam CT",
        "The same sinogram for everybody, PSNR in HU. scikit-image's SART reconstructs a square as wide as "
        "the detector's middle.",
    ),
}


def page(rows: Sequence[Row], head: dict[str, str], *, clock: str, repetitions: int) -> str:
    """Make the whole page of rows and facts."""
    text = ["# Against other software", ""]
    text += [f"- {name}: {value}" for name, value in head.items()]
    text += [
        f"- time: {CLOCK_WORDS[clock]}; of {repetitions} rounds in which all compete in turn: median "
        "(smallest–largest). A ratio is the time here over that of the peer, a difference the score here "
        "minus that of the peer, round by round",
        "- deepinv's solvers get images in [0, 1]: prior, data and noise are mapped exactly, and back. Every "
        "one of them stands there twice: at its defaults, but for the number of steps, and at a best setting",
        "- scores are those of the rounds, each of which has its seed: median (smallest–largest); where they "
        f"are more than {SEEDS_DIFFER:g} dB apart, the row says so",
    ]
    text += [f"- best setting of {solver}: {described(solver)}" for solver in GRIDS]
    if any(row.get("simulated") for row in rows):
        text.append(f"- MRI data other than measured ones: {SIMULATED}")
    text += ["", "## Bars", "", verdict(rows)]
    for section, (title, meaning) in SECTIONS.items():
        found = [row for row in rows if row["section"] == section]
        if found:
            text += ["", f"## {title}", "", meaning, "", table(found)]
    return "\n".join([*text, ""])


def place(row: Row) -> list[str]:
    """Where a row stands: data, and what was asked of it."""
    if "views" in row:
        where = f"{row['views']} views, {row['size']}²"
    else:
        where = f"{row['mask']}, asked ×{row['asked']:g}, realised ×{row['acceleration']:.2f}"
        where += f", calibration {row['calibration']}"
    asked = f"{row['nfe']} evaluations" if "nfe" in row else row.get("problem", "maps")
    return [row["case"], where, asked]


def table(rows: Sequence[Row]) -> str:
    """Table of one section."""
    headings = [
        "case",
        "data",
        "what",
        "who",
        "score / dB",
        "seconds",
        "time ratio",
        "difference / dB",
        "setting",
    ]
    lines = []
    for row in rows:
        ratio = difference = "–"
        if "ratio" in row:
            ratio = "{:.2f} ({:.2f}–{:.2f})".format(*row["ratio"])
            difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["difference"])
        cells = [
            *place(row),
            row["name"],
            _spread(row["scores"], ".2f"),
            _spread(row["seconds"], ".3g"),
            ratio,
            difference,
        ]
        apart = max(row["scores"]) - min(row["scores"])
        differ = f"**seeds differ by {apart:.1f} dB**" if apart > SEEDS_DIFFER else ""
        lines.append([*cells, "; ".join(filter(None, (row["remark"], differ)))])
    return markdown_table(headings, lines)


def _spread(values: Sequence[float], form: str) -> str:
    return Spread.of(values).text(form)


def verdict(rows: Iterable[Row]) -> str:
    """Whether DDS is at least as good as the peer's best diffusion solver, and takes less of its time."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["section"] in ("mri", "single coil", "ct"):
            groups.setdefault((row["section"], *place(row)), []).append(row)
    if not groups:
        return "No diffusion solver competed."
    lines = []
    for ours in dict.fromkeys(
        row["name"] for m in groups.values() for row in m if row["name"].startswith("DDS")
    ):
        behind, slow, count = [], [], 0
        for where, members in groups.items():
            mine = next((row for row in members if row["name"] == ours), None)
            peers = [row for row in members if row["name"].startswith("deepinv")]
            if mine is None or not peers:
                continue
            count += 1
            best = max(peers, key=lambda row: statistics.median(row["scores"]))
            lead = statistics.median(a - b for a, b in zip(mine["scores"], best["scores"], strict=True))
            part = statistics.median(a / b for a, b in zip(mine["seconds"], best["seconds"], strict=True))
            label = f"{', '.join(where)} ({best['name']}: {{}})"
            if lead < 0:
                behind.append(label.format(f"{lead:+.2f} dB"))
            if part > TIME_BAR:
                slow.append(label.format(f"{part:.2f} of its time"))
        quality = (
            f"behind the peer's best diffusion solver in {len(behind)} of {count}: {'; '.join(behind)}."
            if behind
            else f"at least as good as the peer's best diffusion solver in all {count}."
        )
        time = (
            f"More than {TIME_BAR:g} of its time in {len(slow)}: {'; '.join(slow)}."
            if slow
            else f"At most {TIME_BAR:g} of its time in all of them."
        )
        lines.append(f"- **{ours}**: {quality} {time}")
    return "\n".join(lines)
