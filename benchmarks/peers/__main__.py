r"""Other software side by side: same prior, same data, same number of network evaluations, one process.

    python -m benchmarks.peers --measured full.cfl --nifti study2_T1W.nii.gz:24 \
        --ct chest_hu.h5 --series Lung_Dx-A0001_3 --slices 34 --cache runs/peers

Run it with the python of the environment that `make peers` makes. Everything competes in turn, and ratios are
taken round by round. Groups of rows are kept with ``--cache``, and an interrupted run goes on where it was.
Writes a Markdown page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import (
    make_scenario,
    mask_argument,
    measured_case,
    nifti_argument,
    simulated_case,
)
from benchmarks.ct_cases import read_series, source_of
from benchmarks.machine import command as typed
from benchmarks.machine import machine
from benchmarks.matrix.store import code_digest
from benchmarks.pages import write_page
from benchmarks.peers.environment import NO_BART, bart, peer, versions
from benchmarks.peers.interleaving import CLOCKS
from benchmarks.peers.methods import CLASSICAL
from benchmarks.peers.page import page
from benchmarks.peers.search import GRIDS
from benchmarks.peers.sections import (
    PHOTONS,
    Row,
    Rules,
    Store,
    classical_rows,
    ct_classical_rows,
    ct_rows,
    ct_scenario,
    digest,
    map_rows,
    mri_rows,
    ours_of,
    single_coil_rows,
)
from operators.errors import OperatorError
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.errors import ReconError
from recon.solvers.base import settings_of
from recon.solvers.dds import DDS

MASKS = (("equispaced", 4.0), ("poisson", 8.0))
VIEWS = (60, 30)
SECTIONS = ("mri", "single-coil", "classical", "maps", "ct", "ct-classical")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="fully sampled slice in BART's layout")
    parser.add_argument("--nifti", type=nifti_argument, nargs="+", default=[], metavar="FILE:SLICE[:HxW]")
    parser.add_argument("--masks", type=mask_argument, nargs="+", default=MASKS, metavar="KIND:ACCELERATION")
    parser.add_argument("--ct", type=Path, metavar="FILE", help="CT series in HU, HDF5")
    parser.add_argument("--series", metavar="NAME", help="the series of that file")
    parser.add_argument("--slices", type=int, nargs="+", default=[34], metavar="N", help="of it; default 34")
    parser.add_argument("--views", type=int, nargs="+", default=VIEWS, metavar="N", help="parallel beam")
    parser.add_argument("--reduce", type=int, default=1, metavar="N", help="average N × N pixels of CT first")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME")
    parser.add_argument("--nfe", type=int, nargs="+", default=[30], help="network evaluations; default 30")
    parser.add_argument("--prior", default="brain", help="for MRI: a file, or the name of a bundled one")
    parser.add_argument("--ct-prior", default="chest", help="for CT")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds, each with its seed; default 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of everybody; default 1")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="cpu",
        help="time of processors, which a busy machine hardly disturbs (the default), or of the wall",
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep rows here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peers.md")
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be run, before anything is.

    Raises
    ------
    ReconError
        In one sentence.
    """
    mri = options.measured is not None or bool(options.nifti)
    if not mri and options.ct is None:
        raise ReconError("nothing to reconstruct: give --measured, --nifti or --ct")
    if options.ct is not None and options.series is None:
        raise ReconError("--ct needs --series, the name of a series in that file")
    for name in ("repetitions", "threads", "reduce"):
        if getattr(options, name) < 1:
            raise ReconError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if min(options.nfe) < 2:
        raise ReconError(f"--nfe must be at least 2, got {min(options.nfe)}")


Group = tuple[dict[str, Any], Callable[[], list[Row]]]
"""What a competition depends on, JSON-ready, and what holds it."""


def run(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Hold all competitions.

    Returns
    -------
    list of dict
        Rows.
    dict of str to str
        Facts for the head of the page.
    """
    rules = Rules(options.repetitions, options.seed, options.clock, tuple(options.nfe))
    store = Store(None if options.cache is None else options.cache / "peers.jsonl")
    common = {
        "versions": versions(),
        "threads": options.threads,
        "clock": options.clock,
        "repetitions": options.repetitions,
        "seed": options.seed,
        "precision": options.precision,
        "code": code_digest(),
    }
    facts: dict[str, str] = {}
    rows: list[Row] = []
    for what, make in (*mri_groups(options, rules, facts), *ct_groups(options, rules, facts)):
        made = store.rows(common | what, make)
        rows += made
        for row in made:
            shown = (
                f"{row['section']}, {row['case']}, {row['name']}: {statistics.median(row['scores']):.2f} dB"
            )
            print(shown, file=sys.stderr, flush=True)
    if bart() is None:
        facts["missing"] = NO_BART
    return rows, facts


def _prior(options: argparse.Namespace, name: str) -> tuple[ScorePrior, str, str]:
    prior = load_prior(name, precision=options.precision)
    hashed = prior_hash(prior_path(name))
    return prior, hashed, f"{prior.contract.name}, SHA-256 {hashed[:12]}…, {options.precision}"


def mri_groups(options: argparse.Namespace, rules: Rules, facts: dict[str, str]) -> Iterator[Group]:
    """Competitions on MRI; says in `facts` what takes part."""
    cases = [] if options.measured is None else [measured_case(options.measured)]
    cases += [simulated_case(*which) for which in options.nifti]
    if not cases or not {"mri", "single-coil", "classical", "maps"} & set(options.sections):
        return
    prior, hashed, facts["prior for MRI"] = _prior(options, options.prior)
    facts["MRI data"] = "; ".join(case.name for case in cases)
    for scenario in (make_scenario(case, *mask) for case in cases for mask in options.masks):
        data = digest(scenario.case.kspace, scenario.mask.mask)
        what = {"data": data, "mask": scenario.mask.name}
        for nfe in rules.nfe:
            ours = [settings_of(solver) for solver in ours_of(nfe).values()]
            diffusion = what | {"nfe": nfe, "prior": hashed, "grids": repr(GRIDS), "ours": ours}
            if "mri" in options.sections:
                yield diffusion | {"section": "mri"}, partial(mri_rows, scenario, prior, nfe, rules)
            if "single-coil" in options.sections:
                section = {"section": "single coil"}
                yield diffusion | section, partial(single_coil_rows, scenario, prior, nfe, rules)
        if "classical" in options.sections:
            for problem, methods in CLASSICAL.items():
                settings = [method.settings for method in methods.values()]
                said = {"section": problem, "settings": settings}
                yield what | said, partial(classical_rows, scenario, problem, rules)
        if "maps" in options.sections:
            yield what | {"section": "maps"}, partial(map_rows, scenario, rules)


def ct_groups(options: argparse.Namespace, rules: Rules, facts: dict[str, str]) -> Iterator[Group]:
    """Competitions on CT; says in `facts` what takes part.

    Raises
    ------
    ReconError
        Naming the file, if there is no such series or slice.
    """
    if options.ct is None or not {"ct", "ct-classical"} & set(options.sections):
        return
    volume, spacing = read_series(options.ct, options.series)
    facts["CT data"] = f"{source_of(volume)}; {PHOTONS:.3g} photons an element through air, parallel beam"
    prior, hashed, facts["prior for CT"] = _prior(options, options.ct_prior)
    for index in options.slices:
        if not 0 <= index < len(volume.hu):
            raise ReconError(f"{options.ct}: there is no slice {index}, the series has {len(volume.hu)}")
        for views in options.views:
            hu = volume.hu[index].numpy()
            scenario = ct_scenario(f"slice {index}", hu, spacing, views, reduce=options.reduce)
            what = {"data": digest(scenario.sinogram), "views": views}
            if "ct" in options.sections:
                for nfe in rules.nfe:
                    ours = settings_of(DDS.ct(nfe=nfe))
                    diffusion = what | {"nfe": nfe, "prior": hashed, "grids": repr(GRIDS), "ours": ours}
                    yield diffusion | {"section": "ct"}, partial(ct_rows, scenario, prior, nfe, rules)
            if "ct-classical" in options.sections:
                yield what | {"section": "ct classical"}, partial(ct_classical_rows, scenario, rules)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compete, print and write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser().parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        check(options)
        peer("deepinv")
        rows, facts = run(options)
    except (OperatorError, PriorError, ReconError) as error:
        sys.exit(f"error: {error}")
    head = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": f"`{typed('benchmarks.peers', words)}`",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "threads": f"{options.threads}, of everybody",
        **facts,
    }
    text = page(rows, head, clock=options.clock, repetitions=options.repetitions)
    write_page(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
