"""Make the file that ``recon demo`` reconstructs: fastMRI-layout HDF5 of real anatomy with simulated coils.

    python examples/make_demo_file.py study2_FLAIR.nii.gz recon/data/demo_brain.h5

The volume is patient 19 of the open MS data set (Lesjak et al. 2016, CC BY), which no bundled prior was
trained on.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
import torch

from operators.fft import ifftc
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase
from recon.io.nifti import read_volume

NUM_COILS = 12
PEAK = 4e-4  # of an image, the order of magnitude of fastMRI's
NOISE = 0.003  # standard deviation per real component, of the peak
ATTRIBUTION = (
    "Simulated 12-coil k-space of FLAIR slices of patient 19 of the open MS data set, Lesjak, Pernus, Likar, "
    "Spiclin, Neuroinformatics 14, 403-420 (2016), CC BY. Magnitude images processed by their authors; "
    "cropped and flipped; coil sensitivities, phase and noise are simulated."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("volume", type=Path, help="study2_FLAIR.nii.gz of patient 19")
    parser.add_argument("out", type=Path, help="HDF5 file to write")
    parser.add_argument("--slices", type=int, nargs="+", default=[20, 25, 30])
    parser.add_argument("--width", type=int, default=256, help="columns kept, the head's width")
    arguments = parser.parse_args()

    volume = read_volume(arguments.volume)[arguments.slices]
    left = (volume.shape[-1] - arguments.width) // 2
    # fastMRI's images are upside-down relative to DICOM's.
    images = volume[..., left : left + arguments.width].flip(-2)
    images = images * (PEAK / images.max())
    shape = (images.shape[-2], images.shape[-1])
    maps = random_smooth_maps(NUM_COILS, shape, seed=19)
    kspace, rss = [], []
    for index, image in enumerate(images):
        noisy = simulate_kspace(
            torch.polar(image, smooth_phase(shape, seed=index)), maps, NOISE * PEAK, seed=index
        )
        # Rounded to far below the noise, to a power of two, so that the file compresses.
        step = 2.0 ** np.floor(np.log2(NOISE * PEAK / 8))
        rounded = torch.view_as_complex(torch.round(torch.view_as_real(noisy) / step) * step)
        kspace.append(rounded.numpy())
        rss.append(ifftc(rounded).abs().square().sum(0).sqrt().numpy())

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(arguments.out, "w") as file:
        file.create_dataset(
            "kspace",
            data=np.stack(kspace),
            chunks=(1, 1, *shape),
            compression="gzip",
            compression_opts=9,
            shuffle=True,
        )
        file.create_dataset(
            "reconstruction_rss", data=np.stack(rss), compression="gzip", compression_opts=9, shuffle=True
        )
        file.attrs["acquisition"] = "AXFLAIR"
        file.attrs["max"] = float(np.stack(rss).max())
        file.attrs["norm"] = float(np.linalg.norm(np.stack(rss)))
        file.attrs["attribution"] = ATTRIBUTION


if __name__ == "__main__":
    main()
