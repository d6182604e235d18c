"""Volumes with priors of slices along two planes (Lee, Chung, Park, Park, Ryu & Ye, ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from priors.base import ScorePrior
from recon.solvers.base import SolverError, check_at_least, check_choices
from recon.solvers.dds_3d import DDS3D, denoise_slices


class PerpendicularPriors(ScorePrior):
    """Two priors of slices: one of those in plane, one of those across. Where one is asked, the first.

    Parameters
    ----------
    in_plane
        Prior of the slices ``(H, W)`` of a volume ``(D, H, W)``.
    across
        Prior of the slices ``(D, W)`` or ``(D, H)``, at the spacings that these have.

    Raises
    ------
    SolverError
        If the two mean different things by the numbers in an image.
    """

    def __init__(self, in_plane: ScorePrior, across: ScorePrior) -> None:
        one, other = in_plane.contract, across.contract
        if (one.complex_images, one.unit) != (other.complex_images, other.unit):
            raise SolverError(
                f"the two priors know different images: {one.channels} in the unit {one.unit!r} in plane, "
                f"{other.channels} in the unit {other.unit!r} across"
            )
        if max(one.slices, other.slices) > 1:
            raise SolverError(
                f"the two priors must know single slices, not stacks of {one.slices} and {other.slices}"
            )
        low, high = max(one.sigma_min, other.sigma_min), min(one.sigma_max, other.sigma_max)
        if not low < high:
            raise SolverError(
                f"the two priors have no noise level in common: {one.sigma_min:g} to {one.sigma_max:g} in "
                f"plane, {other.sigma_min:g} to {other.sigma_max:g} across"
            )
        super().__init__(replace(one, sigma_min=low, sigma_max=high))
        self.in_plane, self.across = in_plane, across
        self.differentiable = in_plane.differentiable and across.differentiable

    def denoise_channels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See :meth:`ScorePrior.denoise_channels`; of the prior in plane."""
        return self.in_plane.denoise_channels(x, sigma)

    def error_variance(self, sigma: float) -> float:
        """See :meth:`ScorePrior.error_variance`; of the prior in plane."""
        return self.in_plane.error_variance(sigma)


@dataclass(frozen=True)
class Perpendicular(DDS3D):
    """Decomposed diffusion sampling of a volume with slices denoised along one plane and another in turn.

    As :class:`~recon.solvers.dds_3d.DDS3D`, but every ``period``-th noise level the slices that are denoised
    are those of a perpendicular plane, by a prior of their own if :class:`PerpendicularPriors` are given and
    by the same one otherwise, which is right where voxels are cubes and the anatomy looks alike in both, and
    helps a little where they are not. What holds the slices together is then the second prior, and there is
    no total variation unless asked for.

    Parameters
    ----------
    nfe, gamma, eta, sigma_max, sigma_min, start, schedule, rho, step
        As for :class:`~recon.solvers.dds.DDS`.
    cg_iterations, cg_tolerance, early_iterations, noise_free
        As for :class:`~recon.solvers.dds_3d.DDS3D`.
    lam, coupling, difference
        Total variation across the slices in plane, as for :class:`~recon.solvers.dds_3d.DDS3D`.
    slice_batch
        Slices that a prior is given at once: a matter of memory.
    plane
        The other plane: ``"coronal"``, slices ``(D, W)``, or ``"sagittal"``, slices ``(D, H)``; D is
        vertical in both.
    period
        Of so many noise levels the last is the other plane's. 2 takes them in turn, which is for a prior of
        that plane's own; one that was made for slices in plane, and knows little of voxels that are longer
        along z, costs detail with every turn. See ``docs/what-matters.md``.

    Raises
    ------
    SolverError
        If a setting is out of its range.

    Notes
    -----
    The paper's model is the product of two densities of volumes, each a product over the slices of one
    plane, whose scores it takes in turn. It samples with the data's gradient as DPS does; here the data come
    in as in DDS.
    """

    lam: float | None = 0.0
    plane: str = "coronal"
    period: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, plane=("coronal", "sagittal"))
        check_at_least(self, period=2)

    def denoise(self, prior: ScorePrior, x: Tensor, sigma: float, index: int) -> tuple[Tensor, float]:
        """Denoised volume, and the mean square error that is left in it."""
        if (index + 1) % self.period:
            return super().denoise(prior, x, sigma, index)
        across = prior.across if isinstance(prior, PerpendicularPriors) else prior
        # Rows of a coronal slice, or columns of a sagittal one, share an index of H, or of W: it goes first.
        axis = -2 if self.plane == "coronal" else -1
        denoised = denoise_slices(across, x.movedim(axis, -3), sigma, self.slice_batch)
        return denoised.movedim(-3, axis), across.error_variance(sigma)
