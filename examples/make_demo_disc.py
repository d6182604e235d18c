"""Make the file that ``recon demo --ct`` segments: a measured disc of the Helsinki Tomography Challenge.

    python examples/make_demo_disc.py htc2022_tc_full.mat htc2022_tc_full_recon_fbp_seg.mat demo_disc.mat

Views within 90 degrees are kept, every second one, in the layout of the challenge's limited data.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.io import savemat

from recon.io.htc2022 import read_htc2022_segmentation
from recon.io.matlab import read_variables

ATTRIBUTION = (
    "Views of 0 to 90 degrees in steps of 1 degree of object tc and its reference segmentation, Helsinki "
    "Tomography Challenge 2022: A. Meaney, F. Silva de Moura, S. Siltanen, University of Helsinki, Zenodo "
    "8041800, CC BY 4.0."
)
KEPT = ("distanceSourceOrigin", "distanceSourceDetector", "pixelSizePost", "effectivePixelSizePost")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scan", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    full = read_variables(arguments.scan)["CtDataFull"]
    angles = np.asarray(full.parameters.angles)
    chosen = np.flatnonzero((angles >= 0) & (angles <= 90))[::2]
    parameters = {name: getattr(full.parameters, name) for name in KEPT}
    parameters |= {"angles": angles[chosen], "numDetectorsPost": full.sinogram.shape[1]}
    savemat(
        arguments.out,
        {
            "CtDataLimited": {
                # Rounded to far below the noise, to a power of two, so that the file compresses.
                "sinogram": (np.round(full.sinogram[chosen] * 2**12) / 2**12).astype(np.float32),
                "parameters": parameters,
            },
            "reference": read_htc2022_segmentation(arguments.reference).numpy(),
            "attribution": ATTRIBUTION,
        },
        do_compression=True,
    )


if __name__ == "__main__":
    main()
