"""Registry of operators, and what the tests do to each of them.

A new operator is registered by one entry of `REGISTRY`: a function that makes a small one for an image size.
Every check of ``test_registry.py`` then runs over it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from operators import (
    CoilwiseMRI,
    CTOperator,
    FanBeam,
    FourierTransform,
    LinearOperator,
    MulticoilMRI,
    ParallelBeam,
    SinglecoilMRI,
    SliceStack,
    ThroughPlaneAverage,
    stack,
)

SIZES = [(6, 8), (7, 5), (8, 9), (5, 6), (1, 4)]
"""Even, odd, mixed and degenerate image sizes."""


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    # Neither empty nor full, whatever was drawn.
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def multicoil(shape: tuple[int, int], mask: Tensor, *batch: int) -> MulticoilMRI:
    return MulticoilMRI(random_complex(*batch, 3, *shape, seed=1), mask)


def parallel_ct(shape: tuple[int, int], **options) -> CTOperator:
    return CTOperator(ParallelBeam((0.0, 0.7, 2.9), 9, 1.3, 0.4), shape, 1.1, **options)


def fan_ct(shape: tuple[int, int], detector: str, **options) -> CTOperator:
    return CTOperator(FanBeam((0.1, 1.9, 4.0), 8, 2.5, 30, 50, -0.7, detector), shape, 1.1, **options)


Factory = Callable[[tuple[int, int]], LinearOperator]

REGISTRY: dict[str, Factory] = {
    "FourierTransform": FourierTransform,
    "FourierTransform 3-D": lambda s: FourierTransform((3, *s)),
    "SinglecoilMRI points": lambda s: SinglecoilMRI(random_mask(*s), s),
    "SinglecoilMRI columns": lambda s: SinglecoilMRI(random_mask(s[1]), s),
    "CoilwiseMRI points": lambda s: CoilwiseMRI(3, random_mask(*s), s),
    "CoilwiseMRI rows": lambda s: CoilwiseMRI(3, random_mask(s[0], 1), s),
    "MulticoilMRI points": lambda s: multicoil(s, random_mask(*s)),
    "MulticoilMRI columns": lambda s: multicoil(s, random_mask(1, s[1])),
    "MulticoilMRI rows": lambda s: multicoil(s, random_mask(s[0], 1)),
    "MulticoilMRI everything": lambda s: multicoil(s, torch.ones(s)),
    "MulticoilMRI nothing": lambda s: multicoil(s, torch.zeros(s)),
    "MulticoilMRI batched maps": lambda s: multicoil(s, random_mask(s[1]), 2),
    "CTOperator parallel": parallel_ct,
    "CTOperator parallel, line": lambda s: parallel_ct(s, projector="line"),
    "CTOperator wide detectors": lambda s: parallel_ct(s, rays_per_detector=3),
    "CTOperator flat fan": lambda s: fan_ct(s, "flat"),
    "CTOperator curved fan": lambda s: fan_ct(s, "curved"),
    "SliceStack": lambda s: SliceStack(parallel_ct(s), 2),
    "ThroughPlaneAverage": lambda s: ThroughPlaneAverage((5, *s), 3, step=2, profile=(1, 2, 1)),
    "adjoint": lambda s: multicoil(s, random_mask(*s)).H,
    "composition": lambda s: CoilwiseMRI(3, random_mask(*s, seed=2), s) @ multicoil(s, random_mask(*s)),
    "sum": lambda s: multicoil(s, random_mask(*s)) + multicoil(s, random_mask(s[1])),
    "difference": lambda s: FourierTransform(s) - SinglecoilMRI(random_mask(*s), s),
    "scaled": lambda s: (0.5 - 2j) * multicoil(s, random_mask(s[1])),
    "stack": lambda s: stack([multicoil(s, random_mask(*s)), multicoil(s, random_mask(s[1]), 2)]),
}


def dense(
    apply: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.complex128
) -> Tensor:
    """Matrix of a linear map without operator batch, from what it does to each unit vector."""
    size = int(torch.Size(shape).numel())
    columns = apply(torch.eye(size, dtype=dtype).reshape(size, *shape))
    return columns.reshape(size, -1).T


def relative_error(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm().clamp_min(1e-30))
