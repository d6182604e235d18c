"""CT of a volume from few views: slice by slice, and with neighbouring slices held together.

    python examples/volume_ct.py

A chest of ellipsoids is scanned with photon noise. Seen from the front, slices that know nothing of each
other show as stripes; DDS-3D holds them together where the data allow it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from operators import CTOperator, ParallelBeam, SliceStack, equispaced_angles
from operators.ct_noise import simulate_transmission
from priors import load_prior
from recon import DDS, DDS3D, CTSettings, reconstruct_sinogram

MU_WATER = 0.02
SLICES, SIDE, PIXEL, SPACING = 16, 96, 4.0, 5.0

# Attenuation over that of water, later ones in place of earlier ones; centre and half axes in mm along z,
# down and right.
ELLIPSOIDS = (
    (1.00, (0, 0, 0), (400, 110, 160)),  # the body
    (0.25, (0, -10, -75), (90, 75, 55)),  # lungs
    (0.25, (0, -10, 75), (80, 75, 50)),
    (1.05, (20, 15, 25), (45, 50, 50)),  # the heart
    (1.60, (0, 85, 0), (400, 18, 18)),  # the spine
    (1.00, (-12, -20, -80), (9, 9, 9)),  # a nodule
    (1.00, (10, -45, 80), (6, 6, 6)),
)


def chest() -> torch.Tensor:
    """Attenuation in 1/mm, ``(SLICES, SIDE, SIDE)``."""
    z = (torch.arange(SLICES) - (SLICES - 1) / 2) * SPACING
    v = (torch.arange(SIDE) - (SIDE - 1) / 2) * PIXEL
    volume = torch.zeros(SLICES, SIDE, SIDE)
    for value, centre, axes in ELLIPSOIDS:
        parts = [((x - c) / a) ** 2 for x, c, a in zip((z, v, v), centre, axes, strict=True)]
        volume[parts[0][:, None, None] + parts[1][:, None] + parts[2] < 1] = value
    return MU_WATER * volume


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--photons", type=float, default=2e5)
    parser.add_argument("--out", type=Path, default=Path("volume_ct.png"))
    arguments = parser.parse_args()

    truth = chest()
    scan = ParallelBeam(equispaced_angles(arguments.views), num_detectors=140, detector_spacing=PIXEL)
    A = SliceStack(CTOperator(scan, (SIDE, SIDE), PIXEL), SLICES)
    noise = torch.Generator().manual_seed(0)
    sinogram = simulate_transmission(A(truth), arguments.photons, noise).line_integrals

    prior, settings = load_prior("chest"), CTSettings(num_samples=1, units="HU", photons=arguments.photons)
    truth = 1000 * truth / MU_WATER - 1000
    panels = {"truth": truth}
    for name, solver in (("DDS, slice by slice", DDS.ct()), ("DDS-3D", DDS3D.ct())):
        image = reconstruct_sinogram(sinogram, A, prior, solver, settings).mean
        error = image - truth
        total, along_z = (float(e.square().mean().sqrt()) for e in (error, error.diff(dim=0)))
        print(f"{name}: RMS error {total:.1f} HU, of differences of neighbouring slices {along_z:.1f} HU")
        panels[name] = image
    draw(panels, arguments.out)
    print(f"picture: {arguments.out}")


def draw(panels: dict[str, torch.Tensor], path: Path) -> None:
    """Seen from the front, with the slice through the nodule below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row, index = round(SIDE / 2 - 20 / PIXEL), SLICES // 2 - 3
    figure = Figure(figsize=(3.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(panels), height_ratios=(SLICES * SPACING, SIDE * PIXEL))
    for column, (name, volume) in zip(grid.T, panels.items(), strict=True):
        views: list[tuple[np.ndarray, float]] = [
            (volume[:, row].numpy(), SPACING / PIXEL),
            (volume[index].numpy(), 1.0),
        ]
        for axes, (image, aspect) in zip(column, views, strict=True):
            axes.imshow(image, cmap="gray", vmin=-1000, vmax=300, aspect=aspect)
            axes.set_axis_off()
        column[0].set_title(name, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
