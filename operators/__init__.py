"""What the scanner does: linear forward operators, and what is needed to make them from data.

==============================  ========================================================================
operators                       `LinearOperator`, `stack`, `FourierTransform`, `SinglecoilMRI`,
                                `MulticoilMRI`, `CoilwiseMRI`
CT                              `CTOperator`, `ParallelBeam`, `FanBeam`, `equispaced_angles`, `sparse_view`,
                                `limited_angle`, `view_indices`, `fbp`
CT of volumes                   `SliceStack`, `ThroughPlaneAverage`, `ConeBeam`, `ConeBeamOperator`
tools for your own operators    `check_adjoint`, `linear_function`, `OperatorError`
Fourier transforms              `fftc`, `ifftc`
sampling masks                  `Mask`, `make_mask`, `mask_from_array`, `mask_from_kspace`
coil sensitivity maps           `espirit_maps`, `calibration_residual`, `CalibrationResidual`,
                                `CalibrationWarning`
noise                           `noise_covariance`, `noise_from_kspace_edge`, `noise_from_image_corners`,
                                `prewhiten`
coil compression                `compression_matrix`, `compress_coils`
simulation                      `birdcage_maps`, `random_smooth_maps`, `smooth_phase`, `simulate_kspace`,
                                `add_noise`
==============================  ========================================================================
"""

from operators.base import LinearOperator, linear_function, stack
from operators.checks import check_adjoint
from operators.coil_compression import compress_coils, compression_matrix
from operators.cone_beam import ConeBeamOperator
from operators.ct import CTOperator
from operators.ct_geometry import (
    ConeBeam,
    FanBeam,
    ParallelBeam,
    equispaced_angles,
    limited_angle,
    sparse_view,
    view_indices,
)
from operators.ct_volume import SliceStack, ThroughPlaneAverage
from operators.errors import OperatorError
from operators.espirit import CalibrationResidual, CalibrationWarning, calibration_residual, espirit_maps
from operators.fbp import fbp
from operators.fft import FourierTransform, fftc, ifftc
from operators.gfactor import NoiseAmplification, noise_amplification
from operators.masks import Mask, make_mask, mask_from_array, mask_from_kspace
from operators.mri import CoilwiseMRI, MulticoilMRI, SinglecoilMRI
from operators.noncartesian import (
    NonCartesianMRI,
    density_compensation,
    noncartesian_maps,
    noncartesian_noise_std,
)
from operators.prewhitening import (
    noise_covariance,
    noise_from_image_corners,
    noise_from_kspace_edge,
    prewhiten,
)
from operators.simulation import add_noise, birdcage_maps, random_smooth_maps, simulate_kspace, smooth_phase
from operators.trajectories import radial, spiral
from operators.weighting import Weighting

__all__ = [
    "CTOperator",
    "CalibrationResidual",
    "CalibrationWarning",
    "CoilwiseMRI",
    "ConeBeam",
    "ConeBeamOperator",
    "FanBeam",
    "FourierTransform",
    "LinearOperator",
    "Mask",
    "MulticoilMRI",
    "NoiseAmplification",
    "NonCartesianMRI",
    "OperatorError",
    "ParallelBeam",
    "SinglecoilMRI",
    "SliceStack",
    "ThroughPlaneAverage",
    "Weighting",
    "add_noise",
    "birdcage_maps",
    "calibration_residual",
    "check_adjoint",
    "compress_coils",
    "compression_matrix",
    "density_compensation",
    "equispaced_angles",
    "espirit_maps",
    "fbp",
    "fftc",
    "ifftc",
    "limited_angle",
    "linear_function",
    "make_mask",
    "mask_from_array",
    "mask_from_kspace",
    "noise_amplification",
    "noise_covariance",
    "noise_from_image_corners",
    "noise_from_kspace_edge",
    "noncartesian_maps",
    "noncartesian_noise_std",
    "prewhiten",
    "radial",
    "random_smooth_maps",
    "simulate_kspace",
    "smooth_phase",
    "sparse_view",
    "spiral",
    "stack",
    "view_indices",
]
