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

from operators.attenuation import (
    MU_WATER,
    hu_to_mu,
    hu_to_prior,
    mu_to_hu,
    mu_to_prior,
    prior_to_hu,
    prior_to_mu,
)
from operators.base import LinearOperator, linear_function, stack
from operators.beam_hardening import BeamHardeningCorrection
from operators.centre_of_rotation import centre_from_offset, find_detector_offset, offset_from_centre
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
from operators.ct_noise import (
    LogData,
    log_transform,
    log_variance,
    simulate_counts,
    simulate_transmission,
    wls_weights,
)
from operators.ct_volume import SliceStack, ThroughPlaneAverage
from operators.errors import OperatorError
from operators.espirit import CalibrationResidual, CalibrationWarning, calibration_residual, espirit_maps
from operators.fft import FourierTransform, fftc, ifftc
from operators.filtered_backprojection import fbp
from operators.flat_field import flat_dark_correction
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
from operators.rings import find_stripes, suppress_rings
from operators.simulation import add_noise, birdcage_maps, random_smooth_maps, simulate_kspace, smooth_phase
from operators.trajectories import radial, spiral
from operators.truncation import pad_truncated
from operators.weighting import DirectionWhitening, Weighting

__all__ = [
    "MU_WATER",
    "BeamHardeningCorrection",
    "CTOperator",
    "CalibrationResidual",
    "CalibrationWarning",
    "CoilwiseMRI",
    "ConeBeam",
    "ConeBeamOperator",
    "DirectionWhitening",
    "FanBeam",
    "FourierTransform",
    "LinearOperator",
    "LogData",
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
    "centre_from_offset",
    "check_adjoint",
    "compress_coils",
    "compression_matrix",
    "density_compensation",
    "equispaced_angles",
    "espirit_maps",
    "fbp",
    "fftc",
    "find_detector_offset",
    "find_stripes",
    "flat_dark_correction",
    "hu_to_mu",
    "hu_to_prior",
    "ifftc",
    "limited_angle",
    "linear_function",
    "log_transform",
    "log_variance",
    "make_mask",
    "mask_from_array",
    "mask_from_kspace",
    "mu_to_hu",
    "mu_to_prior",
    "noise_amplification",
    "noise_covariance",
    "noise_from_image_corners",
    "noise_from_kspace_edge",
    "noncartesian_maps",
    "noncartesian_noise_std",
    "offset_from_centre",
    "pad_truncated",
    "prewhiten",
    "prior_to_hu",
    "prior_to_mu",
    "radial",
    "random_smooth_maps",
    "simulate_counts",
    "simulate_kspace",
    "simulate_transmission",
    "smooth_phase",
    "sparse_view",
    "spiral",
    "stack",
    "suppress_rings",
    "view_indices",
    "wls_weights",
]
