"""Non-Cartesian MRI: any two-dimensional trajectory, and what is needed to make its operator from data.

One convention for all engines: with positions k in radians/pixel as in `operators.trajectories`, an image of
shape ``(H, W)``, and r counted from its centre pixel ``(H // 2, W // 2)``,

    y_c(k) = (H W)^(-1/2) Σ_r s_c(r) x(r) exp(-i k·r).

On the positions of the Cartesian grid this is `operators.fft.fftc`, to the factor and for odd sizes too.

The sum is computed by a non-uniform FFT of one of two packages, which are imported when they are needed:

- torchkbnufft, on every device torch knows: relative error 1e-6, or 1e-11 for complex128.
- finufft, on the CPU, several times as fast: relative error 2e-7, or 1e-12 for complex128.

``AᴴA`` does not need either. Without the coils it is a convolution of the image with the trajectory's point
spread function, so a product between two ordinary FFTs of twice the size (Toeplitz embedding [1]_).

References
----------
.. [1] J. A. Fessler et al., "Toeplitz-based iterative image reconstruction for MRI with correction for
   magnetic field inhomogeneity", IEEE Trans. Signal Process. 53:3393-3402, 2005.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from operators.base import LinearOperator, Shape, broadcast_batches, linear_function, seeded_noise
from operators.errors import OperatorError
from operators.espirit import espirit_maps
from operators.fft import fftc

ENGINES = ("auto", "torchkbnufft", "finufft")

# Elements a block of embedded coil images has on the CPU for each thread, as in operators.mri.
_BLOCK = 2**18
# Grid samples that torchkbnufft interpolates over along each dimension: the relative error is 8e-7 with 7,
# 1e-12 with 13, and falls about tenfold with each more.
_INTERPOLATION_POINTS = {torch.complex64: 7, torch.complex128: 13}
# The same for density compensation.
_DENSITY_POINTS = 6
# Relative accuracies asked of finufft.
_FINUFFT_ACCURACY = {torch.complex64: 1e-7, torch.complex128: 1e-12}
# The centre of k-space that coil maps are made from: its smallest and largest side, the margin that is fitted
# with it, the conjugate-gradient steps of the fit, and how far the nearest sample may be, in cells.
_SMALLEST_CENTRE, _LARGEST_CENTRE = 4, 32
_CENTRE_MARGIN = 12
_CENTRE_ITERATIONS = 20
_COVERED = 1.2
# Room beyond ±π for what the rounding of positions leaves.
_MARGIN = 1e-5


class NonCartesianMRI(LinearOperator):
    """MRI with several coils on any two-dimensional trajectory, ``y_c(k) = F (s_c x)(k)``.

    Parameters
    ----------
    maps : Tensor
        Coil sensitivity maps, complex, ``(C, H, W)``, or ``(..., C, H, W)`` with batch dimensions that
        broadcast against those of the image.
    trajectory : Tensor
        Positions in k-space ``(K, 2)``, radians/pixel in [-π, π], rows first. Kept in float64.
    weights : Tensor, optional
        Real and not negative ``(K,)``: every sample of ``A x`` is multiplied by its weight, in all coils, and
        the measurement has to be multiplied by the same. Square roots of a density compensation w bring the
        norm close to 1, for solvers that need that. White noise is then not white any more; `noise_std` says
        which level stands for it.
    engine : {"auto", "torchkbnufft", "finufft"}
        Who computes the non-uniform FFT. ``auto`` is finufft on the CPU where it is installed, torchkbnufft
        otherwise.

    Raises
    ------
    OperatorError
        If the maps, the trajectory or the weights are not what they should be, or the engine is unknown, not
        installed, or cannot work on the device of the maps.

    Notes
    -----
    Images ``(..., H, W)`` and data ``(..., C, K)`` have the dtype of the maps. No gradient flows to the maps,
    the trajectory or the weights.

    Without weights the norm is not 1: its square is about the largest number of samples in one cell of the
    Cartesian grid, which is at the centre of k-space.

    The encoding model is that of Pruessmann et al., Magn Reson Med 46:638 (2001).
    """

    maps: Tensor
    trajectory: Tensor
    weights: Tensor | None

    def __init__(
        self,
        maps: Tensor,
        trajectory: Tensor,
        *,
        weights: Tensor | None = None,
        engine: str = "auto",
    ):
        if not maps.is_complex():
            raise OperatorError(f"NonCartesianMRI needs complex coil maps, got {maps.dtype}.")
        if maps.ndim < 3 or 0 in maps.shape:
            raise OperatorError(
                f"NonCartesianMRI needs coil maps of shape (..., C, H, W), got {tuple(maps.shape)}."
            )
        if not torch.isfinite(torch.view_as_real(maps.detach().resolve_conj())).all():
            raise OperatorError(f"coil maps of shape {tuple(maps.shape)} have NaN or infinite values.")
        points = _checked_trajectory(trajectory)
        batch, coils, shape = maps.shape[:-3], maps.shape[-3], maps.shape[-2:]
        super().__init__(shape, (coils, len(points)), batch)
        self.image_shape: Shape = self.domain_shape
        self._asked_engine = engine
        self._engine_name = _chosen_engine(engine, maps.device)
        # Copies, so that nothing done to the caller's tensors later changes the operator.
        self.register_buffer(
            "maps", maps.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        )
        self.register_buffer("trajectory", points.to(maps.device, copy=True))
        if weights is not None:
            weights = _checked_weights(weights, len(points)).to(maps.device, copy=True)
        self.register_buffer("weights", weights)
        self._made: dict[str, Any] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Complex data type of images and data."""
        return self.maps.dtype

    @property
    def num_coils(self) -> int:
        """Number of coils C."""
        return self.range_shape[0]

    @property
    def engine(self) -> str:
        """Name of the package that computes the non-uniform FFT."""
        return self._engine_name

    @property
    def support(self) -> Tensor:
        """Where any coil is sensitive, bool ``(..., H, W)``: nothing else of an image is measured."""
        return (self.maps != 0).any(dim=-3)

    def to_image(self, x: Tensor) -> Tensor:
        """Image ``(..., H, W)`` within the `support`; see `MulticoilMRI.to_image`."""
        self._check(x, self.domain_shape, "the domain")
        return x * self.support

    def noise_std(self, y: Tensor) -> float:
        """Estimate the noise level of a measurement of this operator; see `noncartesian_noise_std`.

        Of data with weights, the level that stands for noise of one level s before weighting: the image that
        makes ``AᴴA x = Aᴴy`` has noise of variance ``s² w⁴ / w²`` at a frequency where the samples have the
        weight w, and this is averaged over the part of k-space that was sampled,
        ``s sqrt(Σ w⁴ / Σ w²)`` for weights that are roots of a density compensation.

        Parameters
        ----------
        y : Tensor
            Complex ``(..., C, K)``, multiplied by the weights.

        Returns
        -------
        float
            Standard deviation per real component.

        Raises
        ------
        OperatorError
            If the shape does not fit, or the data are zero at the edge of k-space.
        """
        self._check(y, self.range_shape, "the range")
        if self.weights is None:
            return noncartesian_noise_std(y, self.trajectory)
        used = self.weights > 0
        plain = noncartesian_noise_std(y[..., used] / self.weights[used], self.trajectory[used])
        return plain * math.sqrt(float(self.weights.pow(4).sum() / self.weights.square().sum()))

    # -- the operator ----------------------------------------------------------------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._encode, self._combine)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._combine, self._encode)

    def _normal(self, x: Tensor) -> Tensor:
        return linear_function(x, self._combine_convolved, self._combine_convolved)

    def _encode(self, x: Tensor) -> Tensor:
        x, maps = self._expand(x, self.image_shape, (self.num_coils, *self.image_shape))
        y = x.new_empty(x.shape[:-2] + self.range_shape)
        for item in np.ndindex(*x.shape[:-2]):
            y[item] = self._nufft.forward(maps[item] * x[item])
        return y.mul_(self._factor)

    def _combine(self, y: Tensor) -> Tensor:
        y, maps = self._expand(y, self.range_shape, (self.num_coils, *self.image_shape))
        x = y.new_empty(y.shape[:-2] + self.image_shape)
        for item in np.ndindex(*y.shape[:-2]):
            images = self._nufft.adjoint(y[item] * self._factor)
            x[item] = images.mul_(maps[item].conj()).sum(dim=0)
        return x

    def _combine_convolved(self, x: Tensor) -> Tensor:
        x, maps = self._expand(x, self.image_shape, (self.num_coils, *self.image_shape))
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for item, coils in self._blocks(x.shape[:-2]):
            block = maps[item][..., coils, :, :]
            images = _convolve(block * x[item].unsqueeze(-3), self._transfer)
            out[item].add_(images.mul_(block.conj()).sum(dim=-3))
        return out

    def _expand(self, x: Tensor, shape: Shape, maps_shape: Shape) -> tuple[Tensor, Tensor]:
        """View ``x`` and the maps with the batch dimensions that both broadcast to."""
        batch = broadcast_batches(
            tuple(x.shape[: x.ndim - len(shape)]), self.batch_shape, "the input", "the maps"
        )
        return x.resolve_conj().expand(batch + shape), self.maps.expand(batch + maps_shape)

    def _blocks(self, batch: Shape) -> Iterator[tuple[tuple[int, ...], slice]]:
        """Cut the coil images of a batch into blocks: index of a batch item, slice of coils.

        All at once, where cutting gains nothing: on a GPU, and where everything is small.
        """
        pixels, budget = self._transfer.numel(), _BLOCK * torch.get_num_threads()
        if self.maps.device.type != "cpu" or math.prod(batch) * self.num_coils * pixels <= budget:
            yield (), slice(None)
            return
        step = max(1, budget // pixels)
        for item in np.ndindex(*batch):
            for start in range(0, self.num_coils, step):
                yield item, slice(start, start + step)

    # -- what is made when it is first needed, for one device, dtype and number of threads -------------------

    @property
    def _factor(self) -> Tensor:
        """What the samples of the plain sum are multiplied by, real: the scaling and the weights."""

        def make() -> Tensor:
            factor = torch.ones_like(self.trajectory[:, 0]) if self.weights is None else self.weights
            return (factor / math.sqrt(math.prod(self.image_shape))).to(self.dtype.to_real())

        return self._once("factor", make)

    @property
    def _nufft(self) -> _Engine:
        def make() -> _Engine:
            return _ENGINES[self._engine_name](self.image_shape, self.trajectory, self.dtype)

        return self._once(f"nufft, {torch.get_num_threads()} threads", make)

    @property
    def _transfer(self) -> Tensor:
        """Transfer function of ``AᴴA`` without coils, on the embedding grid, transposed; see `_convolve`."""

        def make() -> Tensor:
            weights = torch.ones_like(self.trajectory[:, 0]) if self.weights is None else self.weights**2
            transfer = _transfer_function(self.image_shape, self.trajectory, weights, self._engine_name)
            return transfer.T.contiguous().to(self.dtype.to_real())

        return self._once("transfer", make)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _apply(self, fn: Callable, recurse: bool = True) -> NonCartesianMRI:
        trajectory, weights = self.trajectory, self.weights
        super()._apply(fn, recurse)
        # In single precision the positions would be too coarse, whatever the precision of the data.
        self.trajectory = trajectory.to(self.maps.device)
        self.weights = None if weights is None else weights.to(self.maps.device)
        self._engine_name = _chosen_engine(self._asked_engine, self.maps.device)
        self._made = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # finufft's plans live outside of Python.
        return {**self.__dict__, "_made": {}}

    def _check(self, x: Tensor, shape: Shape, side: str) -> None:
        super()._check(x, shape, side)
        if x.dtype != self.dtype:
            raise OperatorError(f"NonCartesianMRI works in {self.dtype}, got a tensor of {x.dtype}.")


# -- engines -------------------------------------------------------------------------------------------------


class _Engine(Protocol):
    """The sum ``Σ_r x(r) exp(-i k·r)`` and its adjoint, for several images at once."""

    def __init__(self, shape: Shape, trajectory: Tensor, dtype: torch.dtype): ...

    def forward(self, x: Tensor) -> Tensor:
        """``(C, H, W)`` to ``(C, K)``."""

    def adjoint(self, y: Tensor) -> Tensor:
        """``(C, K)`` to ``(C, H, W)``."""


class _TorchKbNufft:
    """torchkbnufft: Kaiser-Bessel interpolation from a grid of twice the size, by sparse matrices.

    Its other way, by tables, is less exact, and slower on the CPU, where it starts threads of which a program
    that ends soon after is aborted.
    """

    def __init__(self, shape: Shape, trajectory: Tensor, dtype: torch.dtype):
        from torchkbnufft import KbNufft, KbNufftAdjoint

        options = _interpolation(shape, _INTERPOLATION_POINTS[dtype])
        self._forward = KbNufft(**options, dtype=dtype, device=trajectory.device)
        self._adjoint = KbNufftAdjoint(**options, dtype=dtype, device=trajectory.device)
        self._omega = trajectory.T.contiguous()
        self._matrices = tuple(
            matrix.to(trajectory.device, dtype.to_real())
            for matrix in _interpolation_matrices(trajectory, options)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x[None], self._omega, self._matrices)[0]

    def adjoint(self, y: Tensor) -> Tensor:
        return self._adjoint(y[None], self._omega, self._matrices)[0]


def _interpolation(shape: Shape, points: int) -> dict[str, Any]:
    """Options of torchkbnufft that say from which grid to interpolate, and over how many of its samples."""
    return {"im_size": shape, "grid_size": [2 * max(n, points) for n in shape], "numpoints": points}


def _interpolation_matrices(trajectory: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the sparse matrix from the grid to the samples, float64, on the CPU."""
    from torchkbnufft import calc_tensor_spmatrix

    # Torch wants to be told whether to check what a sparse matrix is made of, and warns otherwise.
    with torch.sparse.check_sparse_tensor_invariants():
        real, imaginary = calc_tensor_spmatrix(trajectory.T.contiguous().cpu(), **options)
        return real.coalesce(), imaginary.coalesce()


class _Finufft:
    """finufft, always in double precision.

    In single precision the positions alone cost an accuracy of 2e-5 at 320 pixels, and nothing is faster.
    """

    def __init__(self, shape: Shape, trajectory: Tensor, dtype: torch.dtype):
        self._shape, self._accuracy = shape, _FINUFFT_ACCURACY[dtype]
        self._points = [np.ascontiguousarray(axis) for axis in trajectory.cpu().numpy().T]
        self._plans: dict[int, Any] = {}

    def _plan(self, transforms: int) -> Any:
        from finufft import Plan

        if transforms not in self._plans:
            # Threads share out the transforms and not the samples of one, whose sum would depend on chance.
            plan = Plan(
                2,
                self._shape,
                transforms,
                self._accuracy,
                -1,
                "complex128",
                nthreads=torch.get_num_threads(),
                spread_thread=2,
            )
            plan.setpts(*self._points)
            self._plans[transforms] = plan
        return self._plans[transforms]

    def forward(self, x: Tensor) -> Tensor:
        y = self._plan(len(x)).execute(_as_double(x))
        return torch.from_numpy(y).reshape(len(x), -1).to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        x = self._plan(len(y)).execute_adjoint(_as_double(y))
        return torch.from_numpy(x).reshape(len(y), *self._shape).to(y.dtype)


_ENGINES: dict[str, type[_Engine]] = {"torchkbnufft": _TorchKbNufft, "finufft": _Finufft}


def _as_double(x: Tensor) -> np.ndarray:
    """Contiguous complex128 array; a first dimension of 1 goes, as finufft wants it."""
    x = x.resolve_conj().to(torch.complex128).contiguous()
    return (x[0] if len(x) == 1 else x).numpy()


def _chosen_engine(engine: str, device: torch.device) -> str:
    if engine not in ENGINES:
        raise OperatorError(f"engine is one of {', '.join(ENGINES)}, not {engine!r}")
    installed = importlib.util.find_spec("finufft") is not None
    if engine == "auto":
        return "finufft" if installed and device.type == "cpu" else "torchkbnufft"
    if engine == "finufft" and not installed:
        raise OperatorError("engine='finufft' needs the package finufft, which is not installed")
    if engine == "finufft" and device.type != "cpu":
        raise OperatorError(f"engine='finufft' works on the CPU, not on {device}; take 'torchkbnufft'")
    return engine


# -- Toeplitz embedding --------------------------------------------------------------------------------------


def _transfer_function(shape: Shape, trajectory: Tensor, weights: Tensor, engine: str) -> Tensor:
    """Transfer function of the convolution ``AᴴA`` for one coil of sensitivity 1.

    ``AᴴA`` is the convolution with ``p(d) = (H W)^(-1) Σ_k w(k) exp(i k·d)``, of which distances d up to
    ``H - 1`` and ``W - 1`` are needed; on a periodic grid that holds them all, it is a product in frequency.

    Returns
    -------
    Tensor
        Real float64 ``(rows, columns)``, at least ``(2H - 1, 2W - 1)``, its zero frequency first, and divided
        by the size, so that the FFTs around it need no scaling.
    """
    full = (2 * shape[0] - 1, 2 * shape[1] - 1)
    if engine == "finufft":
        strengths = weights.to(torch.complex128)[None]
        response = _Finufft(full, trajectory, torch.complex128).adjoint(strengths)[0]
    else:
        # Summed directly: torchkbnufft would need more memory for this than for all else.
        response = _point_spread(shape, trajectory, weights)
    size = [_fast_length(n) for n in full]
    grid = response.new_zeros(size)
    grid[: full[0], : full[1]] = response
    grid = grid.roll((1 - shape[0], 1 - shape[1]), dims=(0, 1))
    return torch.fft.fft2(grid).real / (math.prod(shape) * math.prod(size))


def _point_spread(shape: Shape, trajectory: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k w(k) exp(i k·d)`` for all distances d, complex128 ``(2H - 1, 2W - 1)``, by matrix products."""
    height, width = shape
    rows = torch.arange(height, dtype=torch.float64, device=trajectory.device)
    columns = torch.arange(1 - width, width, dtype=torch.float64, device=trajectory.device)
    half = trajectory.new_zeros((height, 2 * width - 1), dtype=torch.complex128)
    for k, w in zip(trajectory.split(4096), weights.split(4096), strict=True):
        waves = torch.polar(w.expand(height, -1), rows[:, None] * k[:, 0])
        half.addmm_(waves, torch.polar(torch.ones_like(columns), k[:, 1:] * columns))
    # The weights are real, so the other half is the mirror image's conjugate.
    return torch.cat([half[1:].flip(0, 1).conj(), half])


def _convolve(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply images ``(..., H, W)`` in frequency by a real, transposed transfer function.

    The transforms are pruned: rows that are zero before, or not needed after, are not transformed. On the CPU
    the second transform is quicker on transposed data than along the rows.
    """
    height, width = x.shape[-2:]
    columns, rows = transfer.shape
    z = torch.fft.fft(x, n=columns, dim=-1).transpose(-1, -2)
    z = torch.fft.fft(z, n=rows, dim=-1)
    # Torch would turn a real factor of a complex tensor into a complex one.
    torch.view_as_real(z).mul_(transfer.unsqueeze(-1))
    z = torch.fft.ifft(z, dim=-1, norm="forward")[..., :height].transpose(-1, -2)
    return torch.fft.ifft(z, dim=-1, norm="forward")[..., :width]


def _fast_length(n: int) -> int:
    """The smallest length of at least ``n`` without prime factors above 7, for which FFTs are quick."""
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


# -- density compensation, calibration, noise ----------------------------------------------------------------


def density_compensation(trajectory: Tensor, shape: tuple[int, int], *, iterations: int = 30) -> Tensor:
    """Density compensation of any trajectory: the area of k-space that each sample stands for.

    The iteration of Pipe and Menon [1]_, ``w ← w / (C w)``. C is interpolation to a grid of half cells and
    back, by torchkbnufft's matrix, and so spreads each weight over a few cells around it. Where samples are
    farther apart than that, as at the edge of an undersampled trajectory, a sample does not stand for all of
    the gap, as it does by `operators.trajectories.radial_density`.

    Parameters
    ----------
    trajectory : Tensor
        ``(K, 2)``, radians/pixel.
    shape : tuple of int
        ``(H, W)`` of the image: areas are in units of a cell of the Cartesian grid, ``(2π/H) (2π/W)``.
    iterations : int
        Number of iterations.

    Returns
    -------
    Tensor
        Float64 ``(K,)``, positive. ``A.adjoint(w * y)`` is then an image in its own units wherever k-space is
        sampled densely enough, and its square root makes `weights` of `NonCartesianMRI`.

    Raises
    ------
    OperatorError
        If the trajectory is not what it should be, the shape not positive, or there are no iterations.

    References
    ----------
    .. [1] J. G. Pipe and P. Menon, "Sampling density compensation in MRI: rationale and an iterative
       numerical solution", Magn. Reson. Med. 41:179-186, 1999.
    """
    points = _checked_trajectory(trajectory)
    _check_image_shape(shape)
    if iterations < 1:
        raise OperatorError(f"density compensation needs at least one iteration, got {iterations}")

    # The integral of C, from samples that stand for one cell each.
    axis = torch.arange(16, dtype=torch.float64) * (math.pi / 8) - math.pi
    unit = 1 / _pipe_menon(torch.cartesian_prod(axis, axis), (16, 16), 1).mean()
    # An image of fewer pixels than the smallest grid has is spread over less of it.
    unit = unit * math.prod(n / max(n, _DENSITY_POINTS) for n in shape)
    return (_pipe_menon(points, shape, iterations) * unit).to(points.device)


def gridded_centre(
    y: Tensor, trajectory: Tensor, shape: tuple[int, int], size: int | None = None
) -> tuple[Tensor, tuple[slice, slice]]:
    """Fit the centre of Cartesian k-space to non-Cartesian data, each coil on its own.

    The samples near the centre are explained, in the sense of least squares, by an image of the same field of
    view and few pixels; the Fourier transform of that image is the centre of k-space. Nothing but acquired
    samples goes into it.

    Parameters
    ----------
    y : Tensor
        Complex ``(..., C, K)``, without weights.
    trajectory : Tensor
        ``(K, 2)``, radians/pixel.
    shape : tuple of int
        ``(H, W)`` of the image.
    size : int, optional
        Side of the centre in samples. By default as large as the trajectory covers it, at most 32: everywhere
        a sample is within 1.2 cells. (Larger ones, with gaps, make worse maps.)

    Returns
    -------
    kspace : Tensor
        Complex ``(..., C, H, W)``, as `operators.fft.fftc` would give it, zero outside the centre.
    region : tuple of slice
        Where the centre is, as `espirit_maps` takes it.

    Raises
    ------
    OperatorError
        If the data do not fit the trajectory, or the trajectory does not cover a centre of 4 x 4 samples.
    """
    kspace, region, _ = _gridded_centre(y, trajectory, shape, size)
    return kspace, region


def noncartesian_maps(
    y: Tensor,
    trajectory: Tensor,
    shape: tuple[int, int],
    *,
    size: int | None = None,
    noise_std: float = 0.0,
    **settings: Any,
) -> Tensor:
    """Estimate coil sensitivity maps by ESPIRiT from the gridded centre of non-Cartesian k-space.

    Parameters
    ----------
    y : Tensor
        Complex ``(..., C, K)``, without weights.
    trajectory : Tensor
        ``(K, 2)``, radians/pixel.
    shape : tuple of int
        ``(H, W)`` of the image.
    size : int, optional
        Side of the calibration region; see `gridded_centre`.
    noise_std : float
        Standard deviation of the noise of ``y`` per real component, if it is known.
    **settings
        Further settings of `espirit_maps`.

    Returns
    -------
    Tensor
        Complex ``(..., C, H, W)``; see `espirit_maps`.

    Raises
    ------
    OperatorError
        As `gridded_centre` and `espirit_maps` do.
    """
    kspace, region, gain = _gridded_centre(y, trajectory, shape, size)
    return espirit_maps(kspace, region, noise_std=gain * noise_std, **settings)


def noncartesian_noise_std(y: Tensor, trajectory: Tensor) -> float:
    """Noise standard deviation per real component of non-Cartesian data, from the edge of k-space.

    The median magnitude of the samples in the outer tenth of the radii, which signal can only raise; samples
    that are exactly zero were not acquired.

    Parameters
    ----------
    y : Tensor
        Complex ``(..., K)``, without weights.
    trajectory : Tensor
        ``(K, 2)``, radians/pixel.

    Returns
    -------
    float
        In the units of ``y``.

    Raises
    ------
    OperatorError
        If the data do not fit the trajectory, or are zero at the edge.
    """
    points = _checked_trajectory(trajectory).to(y.device)
    _check_data(y, points, dims=1)
    radius = torch.linalg.vector_norm(points, dim=-1)
    magnitude = y[..., radius >= 0.9 * radius.max()].abs()
    magnitude = magnitude[magnitude > 0]
    if magnitude.numel() == 0:
        raise OperatorError("the data are zero at the edge of k-space: there is no noise to measure")
    # Of complex Gaussian noise of standard deviation s per component, the magnitude has the median
    # sqrt(2 ln 2) s.
    return float(magnitude.double().median()) / math.sqrt(2 * math.log(2))


def _pipe_menon(points: Tensor, shape: tuple[int, int], iterations: int) -> Tensor:
    """Weights ``(K,)`` with ``C w`` close to 1, float64 on the CPU."""
    real, imaginary = _interpolation_matrices(points, _interpolation(shape, _DENSITY_POINTS))
    # The magnitude, since the matrix also has the phase of a shift in the image.
    magnitude = torch.hypot(real.values(), imaginary.values())
    kernel = torch.sparse_coo_tensor(real.indices(), magnitude, real.shape, check_invariants=True).coalesce()
    adjoint = kernel.t().coalesce()
    weights = torch.ones(len(points), 1, dtype=torch.float64)
    for _ in range(iterations):
        weights = weights / torch.sparse.mm(kernel, torch.sparse.mm(adjoint, weights))
    return weights[:, 0]


def _gridded_centre(
    y: Tensor, trajectory: Tensor, shape: tuple[int, int], size: int | None
) -> tuple[Tensor, tuple[slice, slice], float]:
    """See `gridded_centre`; also returns the noise of the gridded samples over that of the data."""
    points = _checked_trajectory(trajectory).to(y.device)
    _check_image_shape(shape)
    _check_data(y, points, dims=2)
    cells = points * (torch.tensor(shape, dtype=torch.float64, device=points.device) / (2 * math.pi))
    if size is None:
        size = _covered_size(cells, min(_LARGEST_CENTRE, *shape))
    if not _SMALLEST_CENTRE <= size <= min(shape):
        raise OperatorError(
            f"the centre of k-space has a side of {size} samples, and {_SMALLEST_CENTRE} to {min(shape)} are "
            "needed"
        )
    # The samples in a margin around it keep the edge of the centre from being extrapolated.
    side = [min(size + _CENTRE_MARGIN, n) for n in shape]
    half = torch.tensor(side, dtype=torch.float64, device=points.device) / 2
    inside = (cells.abs() <= half).all(dim=-1)
    near = cells[inside] * (math.pi / half)
    data = y[..., inside]
    # A row of noise is fitted along with the coils, to see what becomes of it.
    noise = seeded_noise((*data.shape[:-2], 1, data.shape[-1]), data.dtype, 0).to(data)
    level = data.abs().square().mean().sqrt()
    if not level > 0:
        raise OperatorError(
            "the data are zero at the centre of k-space: there is nothing to calibrate coils on"
        )
    data = torch.cat([data, noise * level], dim=-2).unsqueeze(-2)
    one = NonCartesianMRI(torch.ones((1, *side), dtype=y.dtype, device=y.device), near)
    fitted = fftc(_least_squares(one, data))
    rows, columns = (_middle(n, size) for n in side)
    fitted = fitted[..., rows, columns]
    gain = float(fitted[..., -1, :, :].abs().square().mean().sqrt() / level)
    region = (_middle(shape[0], size), _middle(shape[1], size))
    kspace = y.new_zeros((*y.shape[:-1], *shape))
    kspace[(..., *region)] = fitted[..., :-1, :, :]
    return kspace, region, gain


def _covered_size(cells: Tensor, largest: int) -> int:
    """Side of the largest centred square of cells that all have a sample nearby; zero if there is none."""
    size = 0
    for n in range(1, largest + 1):
        axis = torch.arange(n, dtype=torch.float64, device=cells.device) - n // 2
        ring = torch.cartesian_prod(axis, axis)
        ring = ring[((ring == axis[0]) | (ring == axis[-1])).any(dim=-1)]
        near = cells[(cells.abs() <= n // 2 + 1).all(dim=-1)]
        if len(near) == 0 or float(torch.cdist(ring, near).amin(dim=1).max()) > _COVERED:
            break
        size = n
    return size


def _least_squares(operator: LinearOperator, y: Tensor) -> Tensor:
    """Conjugate gradients on ``AᴴA x = Aᴴy``, every item with its own step sizes."""
    r = p = operator.adjoint(y)
    x = torch.zeros_like(r)
    rr = _energy(r)
    for _ in range(_CENTRE_ITERATIONS):
        q = operator.normal(p)
        step = _ratio(rr, (p.conj() * q).real.sum((-2, -1), keepdim=True))
        x, r = x + step * p, r - step * q
        before, rr = rr, _energy(r)
        p = r + _ratio(rr, before) * p
    return x


def _energy(x: Tensor) -> Tensor:
    return x.abs().square().sum((-2, -1), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, zero where b is zero: nothing is left to do there."""
    return torch.where(b > 0, a / b, 0.0)


def _middle(n: int, size: int) -> slice:
    """``size`` of ``n`` samples around the zero frequency, which is at ``n // 2``."""
    start = n // 2 - size // 2
    return slice(start, start + size)


# -- checks --------------------------------------------------------------------------------------------------


def _checked_trajectory(trajectory: Tensor) -> Tensor:
    """The positions as float64 ``(K, 2)``."""
    if trajectory.ndim != 2 or trajectory.shape[1] != 2 or len(trajectory) == 0:
        raise OperatorError(
            "a trajectory has shape (K, 2), rows first, and at least one sample, got "
            f"{tuple(trajectory.shape)}"
        )
    if not trajectory.is_floating_point():
        raise OperatorError(f"a trajectory is real, in radians/pixel, got {trajectory.dtype}")
    points = trajectory.detach().double()
    if not bool(torch.isfinite(points).all()):
        raise OperatorError("the trajectory has NaN or infinite values")
    largest = float(points.abs().max())
    if largest > math.pi + _MARGIN:
        raise OperatorError(
            f"a trajectory is in radians/pixel, within -π and π; this one reaches {largest:.4g}"
        )
    return points


def _checked_weights(weights: Tensor, samples: int) -> Tensor:
    """The weights as float64 ``(K,)``."""
    if tuple(weights.shape) != (samples,) or weights.is_complex():
        raise OperatorError(
            f"weights are real, one for each of the {samples} samples, got {weights.dtype} "
            f"{tuple(weights.shape)}"
        )
    weights = weights.detach().double()
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise OperatorError("weights are finite and not negative")
    return weights


def _check_image_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise OperatorError(f"an image shape is (H, W), both positive, got {tuple(shape)}")


def _check_data(y: Tensor, points: Tensor, dims: int) -> None:
    """Raise unless ``y`` is complex, ends in the samples of the trajectory, and has ``dims`` dimensions."""
    if y.ndim < dims or y.shape[-1] != len(points) or not y.is_complex() or y.numel() == 0:
        expected = ", ".join(["...", *["C"] * (dims - 1), str(len(points))])
        raise OperatorError(
            f"data on this trajectory are complex of shape ({expected}), got {y.dtype} {tuple(y.shape)}"
        )
