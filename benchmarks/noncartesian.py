r"""Non-Cartesian MRI: the engines of the non-uniform FFT side by side, and image quality on radial scans.

Without arguments, the engines are timed. With an image, radial scans of it are simulated and reconstructed::

    python -m benchmarks.noncartesian --nifti study2_T1W.nii.gz:24:320x320

Coils, phase and noise are simulated; coil maps and noise level come from the simulated data alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import NOISE, NUM_COILS, nifti_argument
from benchmarks.classical import best, climb, score_one
from benchmarks.machine import cpu_name
from operators.espirit import CalibrationWarning
from operators.noncartesian import (
    NonCartesianMRI,
    density_compensation,
    gridded_centre,
    noncartesian_maps,
    noncartesian_noise_std,
)
from operators.simulation import add_noise, random_smooth_maps, smooth_phase
from operators.trajectories import radial, radial_acceleration
from priors.base import ScorePrior
from priors.errors import PriorError
from priors.files import prior_hash, prior_path
from priors.loading import load_prior
from recon.errors import ReconError
from recon.io.nifti import read_volume
from recon.sampling import reconstruct
from recon.solvers.cg import cg
from recon.solvers.dds import DDS

OVERSAMPLING = 2  # samples along a spoke, over the matrix size
CG_ITERATIONS, WAVELET_ITERATIONS = 100, 100
TARGET = "noise-free"

# -- engines -------------------------------------------------------------------------------------------------


def engine_table(size: int, coils: int, spokes: int, repetitions: int, seed: int) -> str:
    """Time every engine and measure its errors; a Markdown table.

    Calls alternate, so that whatever else the machine does falls on all alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex64, generator=generator)

    maps, x = draw(coils, size, size), draw(size, size)
    maps /= torch.linalg.vector_norm(maps, dim=0)
    k = radial(spokes, OVERSAMPLING * size)
    y = draw(coils, len(k))
    names = ["torchkbnufft"] + ["finufft"] * (importlib.util.find_spec("finufft") is not None)
    operators = {name: NonCartesianMRI(maps, k, engine=name) for name in names}

    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    setup = {}
    for name, operator in operators.items():
        for what, first in (("forward", lambda A=operator: A(x)), ("normal", lambda A=operator: A.normal(x))):
            start = time.perf_counter()
            first()
            setup[what, name] = time.perf_counter() - start
        calls["forward", name] = lambda A=operator: A(x)  # type: ignore[misc]
        calls["adjoint", name] = lambda A=operator: A.adjoint(y)  # type: ignore[misc]
        calls["normal, explicit", name] = lambda A=operator: A.adjoint(A(x))  # type: ignore[misc]
        calls["normal, Toeplitz", name] = lambda A=operator: A.normal(x)  # type: ignore[misc]
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(repetitions):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(times) for key, times in seconds.items()}

    medians |= {(f"first {what}", name): took for (what, name), took in setup.items()}

    text = ["| operation | " + " | ".join(f"{name}, ms" for name in names)]
    text[0] += " | ratio |" if len(names) == 2 else " |"
    text.append("|" + "---|" * (len(names) + 1 + (len(names) == 2)))
    for operation in dict.fromkeys(operation for operation, _ in medians):
        row = [medians[operation, name] for name in names]
        cells = [f"{1e3 * value:.0f}" for value in row] + [f"{row[0] / row[-1]:.1f}×"] * (len(names) == 2)
        text.append(f"| {operation} | " + " | ".join(cells) + " |")
    text += ["", "The first call makes interpolation matrices or plans, or the transfer function."]

    kinds = ("forward against the plain sum", "adjointness", "Toeplitz against explicit")
    errors: dict[str, list[float]] = {kind: [] for kind in kinds}
    some = torch.arange(0, len(k), 101)
    truth = _plain_sum(maps * x, k[some])
    for name in names:
        A = operators[name]
        ax, ahy = A(x), A.adjoint(y)
        gap = torch.vdot(_wide(y), _wide(ax)) - torch.vdot(_wide(ahy), _wide(x))
        found = (
            _relative(ax[:, some], truth),
            float(gap.abs() / (ax.norm() * y.norm())),
            _relative(A.normal(x), A.adjoint(ax)),
        )
        for kind, value in zip(kinds, found, strict=True):
            errors[kind].append(value)
    text += ["", "| relative error | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    text += [
        f"| {what} | " + " | ".join(f"{value:.1e}" for value in values) + " |"
        for what, values in errors.items()
    ]
    fast, slow = medians["normal, Toeplitz", names[-1]], medians["normal, explicit", names[-1]]
    text += [
        "",
        f"With {names[-1]}, Toeplitz embedding is {slow / fast:.1f} times as fast as the explicit way.",
    ]
    return "\n".join(text)


def _plain_sum(images: Tensor, k: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    rows = torch.arange(height, dtype=torch.float64) - height // 2
    columns = torch.arange(width, dtype=torch.float64) - width // 2
    along_h, along_w = torch.exp(-1j * k[:, :1] * rows), torch.exp(-1j * k[:, 1:] * columns)
    total = torch.einsum("kh,chw,kw->ck", along_h, images.to(torch.complex128), along_w)
    return total / math.sqrt(height * width)


def _wide(x: Tensor) -> Tensor:
    return x.flatten().to(torch.complex128)


def _relative(result: Tensor, truth: Tensor) -> float:
    return float((_wide(result) - _wide(truth)).norm() / _wide(truth).norm())


# -- image quality -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RadialCase:
    """A simulated radial scan, and what every method is given.

    Attributes
    ----------
    name : str
        What a table calls it.
    spokes : int
        Number of spokes.
    target : Tensor
        Magnitude ``(H, W)`` without noise: the image times the root sum of squares of the true coils.
    trajectory : Tensor
        ``(K, 2)``, golden-angle spokes.
    y : Tensor
        Complex64 ``(C, K)``.
    true_noise, noise_std : float
        Noise that was added to ``y``, and what is estimated from it.
    maps : Tensor
        Coil maps from the gridded centre of ``y``.
    calibration : int
        Side of that centre.
    """

    name: str
    spokes: int
    target: Tensor
    trajectory: Tensor
    y: Tensor
    true_noise: float
    noise_std: float
    maps: Tensor
    calibration: int


def radial_case(path: Path, index: int, shape: tuple[int, int] | None, spokes: int) -> RadialCase:
    """Simulate a radial scan of one slice of a NIfTI volume, cropped or padded with zeros to ``shape``.

    The readout has twice the bandwidth of the Cartesian cases, hence its noise the standard deviation `NOISE`
    times sqrt(2).

    Raises
    ------
    ReconError
        Naming the file, if there is no such slice or it is empty.
    """
    volume = read_volume(path)
    if not 0 <= index < len(volume):
        raise ReconError(f"{path}: there is no slice {index}, the volume has {len(volume)}")
    image = fitted(volume[index], shape or (volume.shape[1], volume.shape[2]))
    if not float(image.max()) > 0:
        raise ReconError(f"{path}: slice {index} is empty")
    image = image / image.max()
    size = (image.shape[0], image.shape[1])
    coils = random_smooth_maps(NUM_COILS, size, seed=index)
    k = radial(spokes, OVERSAMPLING * max(size))
    noise = NOISE * math.sqrt(OVERSAMPLING)
    clean = NonCartesianMRI(coils, k)(torch.polar(image, smooth_phase(size, seed=index)))
    y = add_noise(clean, noise, torch.Generator().manual_seed(index))
    found = noncartesian_noise_std(y, k)
    region = gridded_centre(y, k, size)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # the table shows the size of the region
        maps = noncartesian_maps(y, k, size, noise_std=found)
    return RadialCase(
        name=f"{path.name.removesuffix('.gz').removesuffix('.nii')}, slice {index}",
        spokes=spokes,
        target=image * coils.abs().square().sum(0).sqrt(),
        trajectory=k,
        y=y,
        true_noise=noise,
        noise_std=found,
        maps=maps,
        calibration=region[0].stop - region[0].start,
    )


def fitted(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Crop an image to the centre, or pad it with zeros around it, along each side."""
    for dim, size in enumerate(shape):
        have = image.shape[dim]
        if have >= size:
            image = image.narrow(dim, (have - size) // 2, size)
        else:
            before = (size - have) // 2
            padding = [0, 0, 0, 0]
            padding[2 * (1 - dim)], padding[2 * (1 - dim) + 1] = before, size - have - before
            image = torch.nn.functional.pad(image, padding)
    return image


def gridding(case: RadialCase, weight: Tensor) -> Tensor:
    """Density-compensated adjoint, combined over the coils."""
    return NonCartesianMRI(case.maps, case.trajectory).adjoint(case.y * weight)


def cg_sense(case: RadialCase) -> Callable[[float], Tensor]:
    """CG-SENSE with Tikhonov regularisation, ``½|Ax − y|² + λ/2 |x|²`` (Pruessmann et al. 2001), by λ."""
    A = NonCartesianMRI(case.maps, case.trajectory)
    right = A.adjoint(case.y)
    return lambda weight: (
        cg(lambda x: torch.add(A.normal(x), x, alpha=weight), right, max_iter=CG_ITERATIONS, tol=1e-4).x
    )


def l1_wavelet(case: RadialCase, weight: Tensor, largest: float) -> Callable[[float], Tensor]:
    """Sparse wavelets, ``½|W(Ax − y)|² + λ |Ψx|₁`` (Lustig et al. 2007), by FISTA on sigpy's wavelets, by λ.

    W is the root of the density compensation: without it, a step that is stable at the centre of k-space
    leaves its edge where it was for hundreds of iterations. λ is for an image with the maximum 1, `largest`
    what the maximum is.
    """
    from sigpy import prox
    from sigpy.linop import Wavelet

    A = NonCartesianMRI(case.maps, case.trajectory, weights=weight.sqrt())
    right = A.adjoint(case.y * weight.sqrt())
    step = 1 / (1.02 * A.norm()) ** 2
    wavelet = Wavelet(A.domain_shape)

    def solve(penalty: float) -> Tensor:
        shrink = prox.UnitaryTransform(prox.L1Reg(wavelet.oshape, penalty * largest), wavelet)
        x = ahead = torch.zeros_like(right)
        momentum = 1.0
        for _ in range(WAVELET_ITERATIONS):
            before = x
            moved = shrink(step, (ahead - step * (A.normal(ahead) - right)).numpy())
            x = torch.from_numpy(moved).to(right.dtype)
            faster = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = x + (momentum - 1) / faster * (x - before)
            momentum = faster
        return x

    return solve


def best_scores(case: RadialCase, solve: Callable[[float], Tensor], start: int) -> dict[str, float]:
    """Scores at the λ = 2^k with the highest PSNR against the target itself, and that ``lambda``."""
    tried = climb(lambda k: {TARGET: scores(case, solve(2.0**k))}, (start,))
    exponent = best(tried, TARGET)
    return {**tried[exponent][TARGET], "lambda": 2.0**exponent}


def scores(case: RadialCase, image: Tensor) -> dict[str, float]:
    """PSNR, SSIM and NMSE of the magnitude of an image ``(H, W)``."""
    return score_one(case.target.numpy(), image.abs().numpy())


def reconstruct_all(
    case: RadialCase, prior: ScorePrior | None, num_samples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Scores of every method; method -> metric -> value, and the seconds of the diffusion sampler."""
    shape = (case.target.shape[0], case.target.shape[1])
    weight = density_compensation(case.trajectory, shape).float()
    gridded = gridding(case, weight)
    result = {
        "gridding": scores(case, gridded),
        "CG-SENSE": best_scores(case, cg_sense(case), -1),
        "L1-wavelet": best_scores(case, l1_wavelet(case, weight, float(gridded.abs().max())), -9),
    }
    if prior is None:
        return result
    A = NonCartesianMRI(case.maps, case.trajectory)
    start = time.perf_counter()
    posterior = reconstruct(
        case.y,
        A,
        prior,
        DDS(),
        num_samples,
        seed,
        noise_std=case.noise_std,
        key=f"{case.name}, {case.spokes}",
        keep_samples=True,
    )
    assert posterior.samples is not None
    took = (time.perf_counter() - start) / num_samples
    result["DDS, one sample"] = {**scores(case, posterior.samples[0]), "seconds": took}
    result[f"DDS, mean of {num_samples}"] = scores(case, posterior.mean)
    return result


# -- the page ------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, Callable]] = {
    "PSNR": ("{:.2f}", max),
    "SSIM": ("{:.3f}", max),
    "NMSE": ("{:.4f}", min),
}


def quality_table(cases: Sequence[RadialCase], results: Sequence[dict[str, dict[str, float]]]) -> str:
    """Make the Markdown table of all metrics; the best of each in bold."""
    names = list(results[0])
    headings = ["case", "size", "spokes", "acceleration", "calibration", "noise found / true", *names]
    text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for case, result in zip(cases, results, strict=True):
        height, width = case.target.shape
        cells = [case.name, f"{height} × {width}", f"{case.spokes}"]
        cells += [f"×{radial_acceleration(case.spokes, (height, width)):.1f}"]
        cells += [f"{case.calibration} × {case.calibration}", f"{case.noise_std / case.true_noise:.2f}"]
        for name in names:
            parts = []
            for metric, (form, better) in FORMS.items():
                part = form.format(result[name][metric])
                top = form.format(better(row[metric] for row in result.values()))
                parts.append(f"**{part}**" if part == top else part)
            cells.append(" / ".join(parts))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def choices(cases: Sequence[RadialCase], results: Sequence[dict[str, dict[str, float]]]) -> str:
    """Make the Markdown table of the weights that were chosen and of DDS's time."""
    names = [name for name, row in results[0].items() if "lambda" in row]
    timed = [name for name, row in results[0].items() if "seconds" in row]
    headings = ["case", "spokes", *(f"λ of {name}" for name in names), *(f"{name}, s" for name in timed)]
    text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for case, result in zip(cases, results, strict=True):
        cells = [case.name, str(case.spokes)]
        cells += [f"{result[name]['lambda']:.2g}" for name in names]
        cells += [f"{result[name]['seconds']:.0f}" for name in timed]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(facts: dict[str, str], engines: str, quality: str | None, chosen: str | None) -> str:
    """Make the whole page."""
    text = ["# Non-Cartesian MRI", "", *(f"- {name}: {value}" for name, value in facts.items())]
    text += ["", "## Engines of the non-uniform FFT", "", engines]
    if quality is not None and chosen is not None:
        text += [
            "",
            "## Radial scans",
            "",
            "Cells are PSNR in dB / SSIM / NMSE of one slice as fastMRI defines them, against the noise-free "
            "image; the best of each in bold. Acceleration is against π/2 spokes a pixel. Images with "
            "simulated coils flatter every method on them.",
            "",
            quality,
            "",
            "Weights chosen, for an image of maximum 1, and time of one sample of DDS:",
            "",
            chosen,
        ]
    return "\n".join([*text, ""])


def machine() -> str:
    """Name of the processor, cores, threads and present load."""
    name, load = cpu_name(), os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f} at the start"


def installed(package: str) -> str:
    """Version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noncartesian",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nifti",
        type=nifti_argument,
        nargs="+",
        default=[],
        metavar="FILE:SLICE[:HxW]",
        help="slices of NIfTI volumes, cropped or padded with zeros to H × W",
    )
    parser.add_argument("--spokes", type=int, nargs="+", default=[64, 32, 16], help="default: 64 32 16")
    parser.add_argument("--prior", default="brain", help="a .safetensors file, or the name of a bundled one")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="network arithmetic")
    parser.add_argument("--num-samples", type=int, default=8, help="samples that are averaged")
    parser.add_argument("--skip-dds", action="store_true", help="the classical methods only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--size", type=int, default=320, help="matrix size for the engines")
    parser.add_argument("--coils", type=int, default=15, help="coils for the engines")
    parser.add_argument("--repetitions", type=int, default=5, help="calls that a median is taken over")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "noncartesian.md",
        help="default: %(default)s",
    )
    return parser


def _shown(arguments: Sequence[str]) -> str:
    """The command as typed, with file names for paths."""
    shown = [word.rpartition("/")[2] if "/" in word else word for word in arguments]
    return shlex.join(["python", "-m", "benchmarks.noncartesian", *shown])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the page and write it."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    packages = ("torch", "torchkbnufft", "finufft", "sigpy", "dis-recon")
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": f"`{_shown(words)}`",
        "versions": ", ".join(f"{name} {installed(name)}" for name in packages),
        "engines": f"{options.coils} coils of {options.size} × {options.size}, {options.spokes[0]} "
        f"golden-angle spokes of {OVERSAMPLING * options.size} samples, complex64; medians of "
        f"{options.repetitions} alternating calls",
    }
    quality, chosen = None, None
    try:
        prior = None
        if options.nifti and not options.skip_dds:
            prior = load_prior(options.prior, precision=options.precision)
            digest = prior_hash(prior_path(options.prior))[:12]
            facts["prior"] = f"{prior.contract.name}, SHA-256 {digest}…, {options.precision}"
        engines = engine_table(
            options.size, options.coils, options.spokes[0], options.repetitions, options.seed
        )
        print(engines, file=sys.stderr, flush=True)
        if options.nifti:
            facts["scans"] = (
                f"{NUM_COILS} simulated coils, golden-angle spokes of {OVERSAMPLING} samples a pixel, noise "
                f"of {NOISE} sqrt({OVERSAMPLING}) of the image's maximum per real component and sample; coil "
                "maps by ESPIRiT from the gridded centre of k-space and the noise level from its edge, the "
                "same for all methods"
            )
            facts["methods"] = (
                "gridding: density-compensated adjoint (Pipe and Menon); CG-SENSE: at most "
                f"{CG_ITERATIONS} iterations; L1-wavelet: db4, {WAVELET_ITERATIONS} iterations of FISTA on "
                "density-weighted data; λ of both from the powers of two by PSNR against the target itself, "
                "an oracle that flatters them; DDS: default settings, data without weights"
            )
            cases, results = [], []
            for path, index, shape in options.nifti:
                for spokes in options.spokes:
                    case = radial_case(path, index, shape, spokes)
                    result = reconstruct_all(case, prior, options.num_samples, options.seed)
                    cases.append(case)
                    results.append(result)
                    found = ", ".join(f"{name} {row['PSNR']:.2f}" for name, row in result.items())
                    print(f"{case.name}, {spokes} spokes: {found}", file=sys.stderr, flush=True)
            quality, chosen = quality_table(cases, results), choices(cases, results)
    except (ReconError, PriorError) as error:
        sys.exit(f"error: {error}")
    page = report(facts, engines, quality, chosen)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".part")
    partial.write_text(page)
    partial.replace(options.out)
    print(page)


if __name__ == "__main__":
    main()
