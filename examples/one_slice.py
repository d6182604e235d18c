"""Reconstruct one slice of a fully sampled fastMRI file from a quarter of its k-space, in a script.

    python examples/one_slice.py recon/data/demo_brain.h5 --slice 1

Everything between file and posterior is spelled out, to be replaced by what your own data need.
"""

import argparse
from pathlib import Path

from operators import MulticoilMRI, espirit_maps, make_mask
from priors import load_prior
from recon import DDS, reconstruct
from recon.figures import reconstruction_figure
from recon.io.fastmri import FastMRIFile, centre_crop, crop_readout
from recon.mri import calibration_region


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--slice", type=int, default=0)
    parser.add_argument("--acceleration", type=float, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/one_slice.png"))
    arguments = parser.parse_args()

    with FastMRIFile(arguments.file) as file:
        full = crop_readout(file.read_slice(arguments.slice).kspace, file.readout_height)
        truth, shape = file.read_target(arguments.slice), file.target_shape

    size = (full.shape[-2], full.shape[-1])
    mask = make_mask("equispaced", size, arguments.acceleration, seed=arguments.file.stem)
    y = full * mask.mask
    # Only the fully sampled centre of the undersampled data may calibrate the coils.
    maps = espirit_maps(y, calibration_region(mask, size))
    operator = MulticoilMRI(maps, mask.mask)
    posterior = reconstruct(y, operator, load_prior("brain"), DDS(), num_samples=4, seed=1)

    zero_filled = operator.adjoint(y).abs()
    reconstruction_figure(
        arguments.out,
        *(centre_crop(image, shape).numpy() for image in (posterior.mean.abs(), posterior.std)),
        zero_filled=centre_crop(zero_filled, shape).numpy(),
        mask=mask.mask.numpy(),
        truth=None if truth is None else truth.numpy(),
        title=f"{arguments.file.stem}, slice {arguments.slice}, ×{mask.acceleration:.2f}",
    )
    print(f"noise level {posterior.noise_std:.3g}, residual {posterior.residual:.3g}")
    print(f"picture in {arguments.out}")
    for warning in posterior.warnings:
        print(f"note: {warning}")


if __name__ == "__main__":
    main()
