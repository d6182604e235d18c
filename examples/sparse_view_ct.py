"""Sparse-view CT of a slice from a DICOM series: simulate few noisy views, reconstruct, compare.

    python examples/sparse_view_ct.py FOLDER_OF_DICOM --views 60

The views are simulated on the pixels of the series and reconstructed on pixels twice as large, so that the
simulation does not share the reconstruction's grid.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from operators import CTOperator, FanBeam, equispaced_angles, hu_to_mu
from operators.ct_noise import simulate_transmission
from priors import load_prior
from recon import DDS, CTSettings, FilteredBackprojection, reconstruct_sinogram
from recon.figures import ct_figure
from recon.io.dicom_series import read_dicom_series


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="DICOM series of the chest")
    parser.add_argument("--slice", type=int, help="its middle if not given")
    parser.add_argument("--views", type=int, default=60)
    parser.add_argument("--photons", type=float, default=1e5)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("sparse_view.png"))
    arguments = parser.parse_args()

    volume = read_dicom_series(arguments.folder)
    index = len(volume.hu) // 2 if arguments.slice is None else arguments.slice
    hu = volume.hu[index].clamp_min(-1000)  # what lies outside of the scanner's field is air
    side = volume.pixel_spacing[0]
    width = hu.shape[-1] * side

    scan = FanBeam(
        equispaced_angles(arguments.views, 2 * math.pi),
        num_detectors=512,
        detector_spacing=2 * width * math.sqrt(2) / 512,
        source_origin=600.0,
        source_detector=1100.0,
    )
    clean = CTOperator(scan, tuple(hu.shape), side)(hu_to_mu(hu))
    noise = torch.Generator().manual_seed(0)
    sinogram = simulate_transmission(clean, arguments.photons, noise).line_integrals

    truth = F.avg_pool2d(hu[None], 2)[0]
    A = CTOperator(scan, tuple(truth.shape), 2 * side)
    settings = CTSettings(num_samples=arguments.num_samples, units="HU")
    fbp = reconstruct_sinogram(sinogram, A, None, FilteredBackprojection("hann"), settings)
    dds = reconstruct_sinogram(sinogram, A, load_prior("chest"), DDS.ct(), settings)
    for name, image in (("filtered back-projection", fbp.mean), ("DDS", dds.mean)):
        print(f"{name}: root mean square error {float((image - truth).square().mean().sqrt()):.1f} HU")
    ct_figure(arguments.out, dds.mean.numpy(), dds.std.numpy(), units="HU", truth=truth.numpy())
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
