r"""Train the supervised networks that the benchmark compares with, on the data of the bundled brain prior.

::

    python -m benchmarks.supervised train --model varnet --out runs/supervised/varnet \
        --data patient01 patient03 patient12 --validation patient09 patient20

with the python of ``.venv-peers``, which ``make peers`` makes. Folders or files of NIfTI volumes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.supervised.data import Simulation, read_slices
from benchmarks.supervised.networks import MODELS, Configuration, UNetConfiguration, VarNetConfiguration
from benchmarks.supervised.training import LOSSES, Training, train
from operators.errors import OperatorError
from priors.errors import PriorError
from recon.errors import ReconError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        return _train(options)
    except (OperatorError, PriorError, ReconError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    out = options.out if options.out.suffix == ".pt" else options.out.with_name(options.out.name + ".pt")
    settings = Training(
        configuration=_configuration(options),
        simulation=Simulation(
            mask=options.mask,
            acceleration=options.acceleration,
            coils=options.coils,
            widths=tuple(options.widths),
            rows=options.rows,
        ),
        loss=options.loss,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        decay=options.steps // 2 if options.decay is None else options.decay,
        precision=options.precision,
        seed=options.seed,
        validate_every=options.validate_every,
    )
    slices, validation = read_slices(options.data), read_slices(options.validation)
    print(f"{len(slices)} slices to learn from, {len(validation)} held out", flush=True)
    begun: list[float] = []  # time and step at which this run began

    def on_step(step: int, loss: float) -> None:
        now = time.monotonic()
        if not begun:
            begun.extend((now, step))
        elif (step - begun[1]) % 10 == 0 or step == settings.steps:
            each = (now - begun[0]) / (step - begun[1])
            left = each * (settings.steps - step) / 60
            print(f"step {step}  loss {loss:.4f}  {each:.2f} s a step  {left:.0f} min left", flush=True)

    def on_validation(line: dict[str, Any]) -> None:
        print(
            f"step {line['step']}: PSNR {line['PSNR']:.2f} dB, SSIM {line['SSIM']:.4f} (zero-filled "
            f"{line['zero-filled PSNR']:.2f}, {line['zero-filled SSIM']:.4f}) on held-out slices",
            flush=True,
        )

    stopped: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        stopped.append(number)

    # A step is finished first, so that what is stored is whole.
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        step = train(
            slices,
            validation,
            settings,
            out,
            initial=options.initial,
            on_step=on_step,
            on_validation=on_validation,
            stop=lambda: bool(stopped),
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if step < settings.steps:
        print(f"Stopped after step {step}; the same command goes on from there.", file=sys.stderr)
        return 130
    print(out)
    return 0


def _configuration(options: argparse.Namespace) -> Configuration:
    chans = {"varnet": 8, "unet": 32}[options.model] if options.chans is None else options.chans
    if options.model == "unet":
        return UNetConfiguration(chans=chans)
    return VarNetConfiguration(
        num_cascades=options.cascades, pools=4, chans=chans, sens_pools=3, sens_chans=4
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supervised",
        description="Supervised networks of the package fastmri, trained on the data of the bundled prior.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "train", help="train a network", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = command.add_argument
    add("--model", choices=MODELS, required=True, help="which network")
    add(
        "--data", type=Path, nargs="+", required=True, help="NIfTI volumes, or folders of them, to learn from"
    )
    add("--validation", type=Path, nargs="+", required=True, help="the same of other patients")
    add("--out", type=Path, required=True, help="file of weights; an interrupted training is resumed")
    add("--initial", type=Path, help="file of weights to start from instead of random ones")
    add("--mask", default="equispaced", help="kind of mask")
    add("--acceleration", type=float, default=4.0, help="of the mask")
    add("--coils", type=int, default=Simulation.coils, help="simulated coils")
    add("--chans", type=int, help="channels at the finest level (8 for varnet, 32 for unet)")
    add("--cascades", type=int, default=6, help="cascades of varnet")
    add("--widths", type=int, nargs=2, default=list(Simulation.widths), help="range of image widths, pixels")
    add("--rows", type=int, default=Simulation.rows, help="rows of an image, along the readout")
    add("--loss", choices=LOSSES, default=Training.loss, help="what is minimised")
    add("--steps", type=int, default=Training.steps, help="training steps")
    add("--batch", type=int, default=Training.batch, help="examples in a step")
    add("--learning-rate", type=float, default=Training.learning_rate, help="of Adam")
    add("--decay", type=int, help="last steps over which the learning rate falls (half of all)")
    add("--precision", choices=("bf16", "fp32"), default=Training.precision, help="of convolutions")
    add("--seed", type=int, default=0, help="of everything drawn")
    add("--validate-every", type=int, default=Training.validate_every, help="steps")
    add("--threads", type=int, default=1, help="threads of torch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
