"""What the scanner does: linear forward operators, and what is needed to make them from data."""

from operators.base import LinearOperator, linear_function, stack
from operators.checks import check_adjoint
from operators.errors import OperatorError
from operators.fft import FourierTransform, fftc, ifftc
from operators.mri import CoilwiseMRI, MulticoilMRI, SinglecoilMRI

__all__ = [
    "CoilwiseMRI",
    "FourierTransform",
    "LinearOperator",
    "MulticoilMRI",
    "OperatorError",
    "SinglecoilMRI",
    "check_adjoint",
    "fftc",
    "ifftc",
    "linear_function",
    "stack",
]
