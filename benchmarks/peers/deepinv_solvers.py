"""deepinv's diffusion solvers (Tachella et al. 2025) on its own physics, with a prior of ours as denoiser.

Its solvers are called as its documentation shows them. What they leave to the user is chosen by an oracle, in
`benchmarks.peers.methods`; what they have defaults for is left at these in the rows that say so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.coordinates import PictureDenoiser, Span, joined, split
from benchmarks.peers.environment import peer
from operators.base import LinearOperator
from operators.ct import CTOperator
from operators.ct_geometry import ParallelBeam
from operators.mri import MulticoilMRI, SinglecoilMRI
from priors.base import ScorePrior
from recon.errors import ReconError
from recon.solvers.base import Problem

SOLVERS = ("DPS", "DiffPIR", "DDRM")

RETURNED, DENOISED = "returned", "denoised"
"""Which image is taken: the one that the solver returns, or the one that its network made last."""


class DivergedError(ReconError):
    """A solver ended with values that are not finite."""


def mri_physics(operator: MulticoilMRI | SinglecoilMRI, sigma: float) -> Any:
    """MRI of deepinv with the same maps and mask, and noise of that standard deviation a channel."""
    physics, mask = peer("deepinv.physics"), operator.mask.float()
    if isinstance(operator, MulticoilMRI):
        made = physics.MultiCoilMRI(mask=mask, coil_maps=operator.maps)
    else:
        made = physics.MRI(mask=mask)
    made.noise_model = physics.GaussianNoise(sigma)
    return made


def detectors_of(size: int) -> int:
    """Detector elements that deepinv's and skimage's parallel beam has for images of `size` pixels square."""
    return math.ceil(math.sqrt(2) * size)


def tomography(geometry: ParallelBeam, size: int, sigma: float) -> Any:
    """Parallel-beam tomography of deepinv, of unit norm, for the same views of a square image.

    Its lengths are in pixels, its data ``(B, 1, detectors, views)``, and its norm, by which data are to be
    divided, is ``operator_norm``.

    Raises
    ------
    ReconError
        If it cannot have that detector: its elements are pixels, as many as the diagonal is long, and it puts
        the image in the middle of them only where both numbers are odd or both even.
    """
    expected = detectors_of(size)
    if geometry.num_detectors != expected or geometry.detector_offset != 0 or (expected - size) % 2:
        raise ReconError(
            f"deepinv's tomography of {size} × {size} pixels has {expected} detector elements, and its image "
            f"in their middle if both numbers are odd or both even; the scan has {geometry.num_detectors}"
        )
    physics = peer("deepinv.physics")
    angles = torch.tensor(np.rad2deg(geometry.angles), dtype=torch.float32)
    made = physics.Tomography(angles=angles, img_width=size, circle=False, normalize=True)
    made.noise_model = physics.GaussianNoise(sigma)
    return made


@dataclass(frozen=True, eq=False)
class PictureProblem:
    """A problem as deepinv sees it.

    Attributes
    ----------
    y : Tensor
        Data in its layout.
    physics : object
        Its forward operator, with the noise level of the data.
    span : Span
        Between its images and the prior's.
    first : Tensor
        First image ``(1, C, H, W)`` in [0, 1]: the zero-filled or back-projected one.
    """

    y: Tensor
    physics: Any
    span: Span
    first: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its images, ``(1, C, H, W)``."""
        return tuple(self.first.shape)


def mri_picture(problem: Problem) -> PictureProblem:
    """MRI in the prior's units, with one coil or several."""
    operator = problem.operator
    assert isinstance(operator, MulticoilMRI | SinglecoilMRI)
    span = Span.of(problem.unfolded)
    physics = mri_physics(operator, span.slope * problem.noise_std)
    y = split(span.data(problem.y, operator)[None])
    return PictureProblem(y, physics, span, span.channels(problem.adjoint_y[None]))


def ct_picture(sinogram: Tensor, operator: CTOperator, noise_std: float, unit: float) -> PictureProblem:
    """Parallel-beam line integrals ``(views, detectors)`` of a square image.

    Parameters
    ----------
    sinogram : Tensor
        In the units of `operator`.
    operator : CTOperator
        Ours, for its geometry.
    noise_std : float
        Noise of the line integrals.
    unit : float
        Attenuation that the prior calls 1, in 1/mm.
    """
    geometry = operator.geometry
    size = operator.domain_shape[-1]
    if not isinstance(geometry, ParallelBeam) or operator.domain_shape[-2] != size:
        raise ReconError("deepinv's tomography has parallel beams and square images")
    from recon.solvers.cg import cg

    scaled = unit * operator
    norm = scaled.norm(max_iterations=10)
    rough = cg(
        lambda v: scaled.normal(v) / norm**2, scaled.adjoint(sinogram) / norm**2, max_iter=10, axes=2
    ).x
    span = Span(0.0, float(rough.max()), False)
    physics = tomography(geometry, size, 1.0)
    # Its line integrals count pixels, so the prior's image u gives A u * unit * pixel size in ours.
    factor = span.slope / (unit * operator.pixel_size * float(physics.operator_norm))
    physics.noise_model = peer("deepinv.physics").GaussianNoise(factor * noise_std)
    y = factor * from_views(sinogram)
    first = physics.fbp(y).clamp(0, 1)
    return PictureProblem(y, physics, span, first)


def from_views(sinogram: Tensor) -> Tensor:
    """Our sinogram ``(views, detectors)`` in deepinv's layout ``(1, 1, detectors, views)``."""
    return sinogram.T[None, None].contiguous()


@dataclass(frozen=True)
class Picture:
    """What a solver made.

    Attributes
    ----------
    image : Tensor
        ``(H, W)`` in the prior's units, as the solver returned it.
    denoised : Tensor
        What its network made last. DiffPIR here evaluates it once more after its last step towards the data
        and returns the image before, with the noise of its last level on it.
    nfe : int
        Network evaluations.
    """

    image: Tensor
    denoised: Tensor
    nfe: int


@dataclass(frozen=True)
class Setting:
    """A solver with its options.

    Parameters
    ----------
    solver : str
        One of `SOLVERS`.
    nfe : int
        Network evaluations.
    options : mapping
        Of its constructor, beside the number of steps. ``DDRM`` has ``largest`` too, the first of its noise
        levels, and ``geometric``, whether they fall geometrically and not linearly.

    Raises
    ------
    ReconError
        If there is no such solver.
    """

    solver: str
    nfe: int
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ReconError(f"the solvers of deepinv are {', '.join(SOLVERS)}, not {self.solver!r}")
        if self.nfe < 2:
            raise ReconError(f"{self.solver} of deepinv takes at least 2 network evaluations, got {self.nfe}")

    @property
    def text(self) -> str:
        """Options for a table."""
        shown = {n: f"{v:.3g}" if isinstance(v, float) else str(v) for n, v in self.options.items()}
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults"

    def run(self, problem: PictureProblem, prior: ScorePrior, seed: int) -> Picture:
        """Draw one sample.

        Raises
        ------
        DivergedError
            If the image is not finite.
        ReconError
            If deepinv is not installed, or the solver cannot work with this operator.
        """
        denoiser = PictureDenoiser(prior, problem.span)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations of its own
            if self.solver == "DPS":
                image = self._dps(problem, denoiser, seed)
            elif self.solver == "DiffPIR":
                image = self._diffpir(problem, denoiser, seed)
            else:
                image = self._ddrm(problem, denoiser, seed)
        if not bool(torch.isfinite(image).all()):
            raise DivergedError(f"{self.solver} of deepinv ({self.text}): the image is not finite")
        assert denoiser.last is not None
        returned, denoised = (problem.span.image(u.detach().float())[0] for u in (image, denoiser.last))
        return Picture(returned, denoised, denoiser.evaluations)

    def _dps(self, problem: PictureProblem, denoiser: PictureDenoiser, seed: int) -> Tensor:
        # The network is not asked at the last of its times, which is zero.
        model = peer("deepinv.sampling").DPS(
            denoiser, num_steps=self.nfe + 1, rng=torch.Generator(), **self.options
        )
        # Given a shape it draws its first image; given none, it solves least squares to learn the shape.
        return model(problem.y, problem.physics, x_init=problem.shape, seed=seed)

    def _diffpir(self, problem: PictureProblem, denoiser: PictureDenoiser, seed: int) -> Tensor:
        model = peer("deepinv.sampling").DiffPIR(
            denoiser,
            peer("deepinv.optim").L2(),
            sigma=float(problem.physics.noise_model.sigma),
            max_iter=self.nfe,
            **self.options,
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return model(problem.y, problem.physics, x_init=problem.first)

    def _ddrm(self, problem: PictureProblem, denoiser: PictureDenoiser, seed: int) -> Tensor:
        if not isinstance(problem.physics, peer("deepinv.physics").DecomposablePhysics):
            raise ReconError(
                "DDRM needs the singular value decomposition of the operator: one coil, not several"
            )
        options = dict(self.options)
        largest, geometric = options.pop("largest", 1.0), options.pop("geometric", False)
        if geometric:
            sigmas = np.geomspace(largest, 1e-3, self.nfe)
        else:
            sigmas = np.linspace(largest, 0, self.nfe)
        model = peer("deepinv.sampling").DDRM(denoiser, sigmas=sigmas, **options)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(seed)
            # It writes into the data that it is given.
            return model(problem.y.clone(), problem.physics)


class Adjointness:
    """Both operators on the same random image and data, ours and deepinv's; for tests and the page."""

    def __init__(self, operator: LinearOperator, physics: Any) -> None:
        self.operator, self.physics = operator, physics

    def forward_difference(self, x: Tensor) -> float:
        """Relative difference of ``A x`` for complex ``(H, W)``."""
        ours = self.operator(x)
        theirs = joined(self.physics.A(split(x[None])), True)[0]
        return float(torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(ours))

    def adjoint_difference(self, y: Tensor) -> float:
        """Relative difference of ``A^H y``."""
        ours = self.operator.adjoint(y)
        theirs = joined(self.physics.A_adjoint(split(y[None])), True)[0]
        return float(torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(ours))
