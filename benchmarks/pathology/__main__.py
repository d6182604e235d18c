"""Pathology: what reconstructions make of findings.

Metrics inside and outside of the boxes of fastMRI+, whose tables lie at github.com/microsoft/fastmri-plus::

    python -m benchmarks.pathology boxes --csv brain.csv --targets multicoil_val --reconstructions out

Lesions planted in slices of which the truth is known, the methods side by side::

    python -m benchmarks.pathology lesions --nifti study2_T1W.nii.gz:24 --cache runs/pathology
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.cases import NOISE, NUM_COILS, mask_argument, nifti_argument
from benchmarks.machine import command, machine, versions
from benchmarks.pages import write_page
from benchmarks.pathology import boxes, page, planted
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.errors import ReconError
from recon.io.fastmri_plus import read_annotations
from recon.solvers.dds import DDS

METHODS = ("zero-filled", "TV", "DDS")
MASKS = (("equispaced", 4.0), ("equispaced", 8.0), ("poisson", 8.0))
RESULTS = Path(__file__).parent.parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pathology",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True)
    inside = parts.add_parser("boxes", help="metrics inside and outside of the boxes of fastMRI+")
    inside.add_argument("--csv", type=Path, required=True, metavar="FILE", help="knee.csv or brain.csv")
    inside.add_argument(
        "--targets", type=Path, required=True, metavar="PATH", help="fully sampled fastMRI file, or a folder"
    )
    inside.add_argument(
        "--reconstructions", type=Path, required=True, metavar="FOLDER", help="files of the same names"
    )
    inside.add_argument("--labels", nargs="+", metavar="FINDING", help="these findings only")
    inside.add_argument("--json", type=Path, metavar="FILE", help="write every box's scores as JSON too")
    inside.add_argument("--out", type=Path, metavar="FILE", help="write the page here too")

    lesions = parts.add_parser("lesions", help="planted lesions: kept, lost, false")
    lesions.add_argument(
        "--nifti",
        type=nifti_argument,
        nargs="+",
        required=True,
        metavar="FILE:SLICE[:HxW]",
        help="slices of NIfTI volumes, cropped to the central H × W; coils, phase and noise are simulated",
    )
    lesions.add_argument(
        "--masks",
        type=mask_argument,
        nargs="+",
        default=MASKS,
        metavar="KIND:ACCELERATION",
        help="default: equispaced:4 equispaced:8 poisson:8",
    )
    lesions.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help=f"default: {' '.join(METHODS)}"
    )
    lesions.add_argument("--unet", type=Path, metavar="FILE", help="weights of a U-Net, to try it too")
    lesions.add_argument("--varnet", type=Path, metavar="FILE", help="weights of a VarNet, to try it too")
    lesions.add_argument(
        "--sizes", type=float, nargs="+", default=planted.SIZES, help="long semi-axes in pixels"
    )
    lesions.add_argument(
        "--contrasts", type=float, nargs="+", default=planted.CONTRASTS, help="of the image's maximum"
    )
    lesions.add_argument("--prior", default="brain", help="a .safetensors file, or a bundled prior's name")
    lesions.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    lesions.add_argument("--num-samples", type=int, default=4, help="samples of DDS (default: %(default)s)")
    lesions.add_argument("--nfe", type=int, help="network evaluations of a sample (default: DDS's own)")
    lesions.add_argument("--seed", type=int, default=0, help="of the samples")
    lesions.add_argument("--threads", type=int, help="CPU threads")
    lesions.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what was reconstructed here")
    lesions.add_argument(
        "--picture",
        type=mask_argument,
        metavar="KIND:ACCELERATION",
        help="mask of the picture, which shows the first slice (default: the last mask)",
    )
    lesions.add_argument(
        "--out", type=Path, default=RESULTS / "pathology.md", help="default: %(default)s; the picture beside"
    )
    return parser


def _boxes(options: argparse.Namespace, typed: str) -> int:
    annotations = read_annotations(options.csv)
    result = boxes.score_files(annotations, options.targets, options.reconstructions, options.labels)
    facts = {
        "date": date.today().isoformat(),
        "command": f"`{typed}`",
        "boxes": f"fastMRI+ (Zhao et al., Scientific Data 9, 152, 2022), {options.csv.name}",
    }
    text = boxes.report(result, facts=facts, annotations=annotations)
    if options.json is not None:
        write_page(options.json, json.dumps(result.to_dict(), indent=2) + "\n")
    if options.out is not None:
        write_page(options.out, text)
    print(text)
    return 0 if result.scores and not result.failed else 1


def contenders(options: argparse.Namespace) -> tuple[list[planted.Contender], str]:
    """Make the methods that were asked for, and a line on the prior."""
    methods: list[planted.Contender] = []
    line = "none"
    if "zero-filled" in options.methods:
        methods.append(planted.ZeroFilled())
    if "TV" in options.methods:
        methods.append(planted.Oracle())
    if options.unet is not None or options.varnet is not None:
        from benchmarks.supervised.methods import UNetMethod, VarNetMethod

        if options.unet is not None:
            methods.append(planted.Wrapped(UNetMethod(options.unet)))
        if options.varnet is not None:
            methods.append(planted.Wrapped(VarNetMethod(options.varnet)))
    if "DDS" in options.methods:
        prior = load_prior(options.prior, precision=options.precision)
        digest = prior_hash(prior_path(options.prior))
        name = prior.contract.name or Path(options.prior).name
        line = f"{name}, SHA-256 {digest[:12]}…, {options.precision}"
        identity = f"{digest} {options.precision}"
        solver = DDS() if options.nfe is None else DDS(nfe=options.nfe)
        methods.append(planted.Sampled(prior, identity, options.num_samples, options.seed, solver))
    return methods, line


def _lesions(options: argparse.Namespace, typed: str) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    methods, prior = contenders(options)
    pairs = [
        planted.Pair.make(path, index, crop, options.sizes, options.contrasts)
        for path, index, crop in options.nifti
    ]

    def show(outcome: planted.Outcome) -> None:
        kept = sum(found.kept for found in outcome.lesions)
        print(
            f"{outcome.where}, {outcome.method}: {kept} of {len(outcome.lesions)} kept",
            file=sys.stderr,
            flush=True,
        )

    outcomes = planted.run(pairs, options.masks, methods, cache=options.cache, on_outcome=show)
    kind, asked = options.picture or options.masks[-1]
    where = f"{pairs[0].name}, {kind} ×{asked:g}"
    if all(outcome.where != where for outcome in outcomes):
        raise ReconError(f"--picture {kind}:{asked:g} is none of the masks")
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": f"`{typed}`",
        "versions": versions(("torch", "numpy", "sigpy", "dis-recon")),
        "prior": prior,
        **{method.name: method.how for method in methods},
        "coil maps": "ESPIRiT from the calibration region of the undersampled data, for every method that "
        "takes maps",
        "target": "image before noise, in the units of the coil-combined image",
        "cases": f"{len(pairs)} slice{'s' if len(pairs) > 1 else ''}, {NUM_COILS} simulated coils, noise of "
        f"{NOISE} of the maximum per real component, {len(pairs[0].lesions)} lesions a slice",
    }
    picture = options.out.with_suffix(".png")
    page.draw(outcomes, pairs[0], where, picture)
    text = page.report(outcomes, facts=facts, picture=picture.name)
    write_page(options.out, text)
    print(text)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the part that was asked for."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    typed = command("benchmarks.pathology", words)
    try:
        status = (_boxes if options.part == "boxes" else _lesions)(options, typed)
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
