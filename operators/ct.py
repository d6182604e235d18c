"""CT: line integrals of attenuation along the rays of a scan.

``y = A x`` with x in 1/mm, or any other unit per mm, on square pixels, and y without unit;
`operators.ct_geometry` says where the rays run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.base import LinearOperator, Shape, linear_function
from operators.ct_astra import AstraSlices, astra_installed, astra_projector_name, check_outside
from operators.ct_geometry import FanBeam, ParallelBeam, checked_indices
from operators.ct_matrix import MatrixRecipe, SparseRows, SystemMatrix
from operators.ct_on_the_fly import OnTheFly
from operators.ct_rays import PROJECTORS
from operators.ct_symmetry import ViewGroups, view_groups
from operators.errors import OperatorError

ENGINES = ("auto", "matrix", "astra", "on-the-fly")
DEFAULT_MEMORY_LIMIT = 4 * 2**30
"""Most bytes that a system matrix and its transpose may take together."""
_COLUMNS_AT_ONCE = 16


class CTOperator(LinearOperator):
    """Parallel- or fan-beam CT of a slice, ``(H, W)`` to ``(views, detectors)``.

    Parameters
    ----------
    geometry : ParallelBeam or FanBeam
        The scan.
    image_shape : (int, int)
        Height H and width W in pixels.
    pixel_size : float
        Side of a pixel in mm.
    engine : {"auto", "matrix", "astra", "on-the-fly"}
        ``matrix`` keeps a sparse matrix and its transpose, made when first needed: much the fastest where
        they fit in memory. Of views that see the image as others see it turned or mirrored it keeps only one,
        a quarter of those of evenly spread angles (see `operators.ct_symmetry`). ``astra`` computes every ray
        anew, in float32 only. ``on-the-fly`` does so too, to the same values as the matrix and on the CPU:
        the quickest where few products are needed. ``auto`` takes the matrix if it fits, else ASTRA.
    projector : {"auto", "joseph", "line"}
        Model of the line integral, see `operators.ct_rays`. ``auto`` is ``joseph``, but ``line`` for fan
        beams by ASTRA, which has no other.
    rays_per_detector : int
        Rays spread over the width of each detector element, which measures their mean. More than one pays
        where elements are wider than pixels.
    memory_limit : int, optional
        Most bytes that the matrix and its transpose may take; `DEFAULT_MEMORY_LIMIT` by default.
    cache : path, optional
        Folder in which the matrix is kept for the next time; it is made if it is not there.

    Raises
    ------
    OperatorError
        If the arguments do not fit together, or the matrix is too large and ASTRA is not installed or cannot
        compute what is asked for.

    Notes
    -----
    Images are real, or complex of the same precision; the precision is float32 unless `to` changes it. On a
    GPU the matrix is multiplied there; ASTRA's projectors of the GPU are not matched (`matched_adjoint`).
    """

    _unit: Tensor

    def __init__(
        self,
        geometry: ParallelBeam | FanBeam,
        image_shape: Iterable[int],
        pixel_size: float,
        *,
        engine: str = "auto",
        projector: str = "auto",
        rays_per_detector: int = 1,
        memory_limit: int | None = None,
        cache: str | PathLike[str] | None = None,
    ):
        shape = tuple(int(n) for n in image_shape)
        if not isinstance(geometry, ParallelBeam | FanBeam):
            raise OperatorError(f"CTOperator needs a ParallelBeam or FanBeam, got {type(geometry).__name__}.")
        if len(shape) != 2 or min(shape) < 1:
            raise OperatorError(f"the image shape of CTOperator is (H, W), both positive, got {shape}.")
        if not (math.isfinite(pixel_size) and pixel_size > 0):
            raise OperatorError(f"pixel_size of CTOperator is a positive number of mm, got {pixel_size!r}.")
        if engine not in ENGINES:
            raise OperatorError(f"engine of CTOperator is one of {', '.join(ENGINES)}, not {engine!r}.")
        if projector not in ("auto", *PROJECTORS):
            raise OperatorError(
                f"projector of CTOperator is one of auto, {', '.join(PROJECTORS)}, not {projector!r}."
            )
        if not isinstance(rays_per_detector, int) or rays_per_detector < 1:
            raise OperatorError(
                f"rays_per_detector of CTOperator is a positive integer, got {rays_per_detector!r}."
            )
        if isinstance(geometry, FanBeam):
            check_outside(geometry, shape, float(pixel_size))
        super().__init__(shape, geometry.range_shape)
        self.geometry = geometry
        self.image_shape: Shape = shape
        self.pixel_size = float(pixel_size)
        self.rays_per_detector = rays_per_detector
        self.memory_limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else int(memory_limit)
        self.cache = None if cache is None else Path(cache)
        # Says precision and device before there is a matrix, and when there is none.
        self.register_buffer("_unit", torch.ones(()), persistent=False)
        self._made: dict[str, Any] = {}
        self._largest_entries: int | None = None
        self._asked = (engine, projector)
        self.engine = self._chosen_engine(engine, projector)
        if self.engine == "astra":
            self.projector = astra_projector_name(geometry, projector, rays_per_detector)
        else:
            self.projector = "joseph" if projector == "auto" else projector

    @property
    def dtype(self) -> torch.dtype:
        """Real data type in which it computes."""
        return self._unit.dtype

    @property
    def memory(self) -> int:
        """Bytes that the matrix and its transpose take; before they are made, an estimate from above."""
        made = self._made.get("matrix")
        if made is not None:
            return made.nbytes
        return self._estimated_memory() if self.engine == "matrix" else 0

    def subset(self, indices: Iterable[int]) -> CTOperator:
        """Keep some of the views, without computing the matrix again.

        Parameters
        ----------
        indices : iterable of int
            Which views, in order; negative ones count from the end.

        Returns
        -------
        CTOperator
            From the same images to ``(len(indices), detectors)``, on the same device and in the same
            precision.

        Raises
        ------
        OperatorError
            If there are none, or one does not exist.
        """
        kept = checked_indices(indices, self.geometry.num_views)
        part = CTOperator(
            self.geometry.subset(kept),
            self.image_shape,
            self.pixel_size,
            engine=self.engine,
            projector=self.projector,
            rays_per_detector=self.rays_per_detector,
            memory_limit=self.memory_limit,
            cache=self.cache,
        )
        part.to(self.device, self.dtype)
        made = self._made.get("matrix")
        if made is not None:
            places = [self._groups.places[kept[view]] for view in part._groups.stored]
            pixels = self._groups.pixels(self.image_shape)
            part._made["matrix"] = made.views(places, pixels, self.geometry.num_detectors)
        return part

    def extra_repr(self) -> str:
        """Shapes and what computes them."""
        return f"{super().extra_repr()}, {type(self.geometry).__name__}, {self.engine}, {self.projector}"

    # -- the operator ----------------------------------------------------------------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._project, self._backproject)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._backproject, self._project)

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        from operators.filtered_backprojection import fbp

        return fbp(self, y, filter)

    def _project(self, x: Tensor) -> Tensor:
        return _on_real_batch(x, self.domain_shape, self.range_shape, self._engine.forward)

    def _backproject(self, y: Tensor) -> Tensor:
        return _on_real_batch(y, self.range_shape, self.domain_shape, self._engine.adjoint)

    # -- engines, made when first needed for one device and precision ----------------------------------------

    @property
    def _engine(self) -> _Engine:
        if self.engine == "matrix":
            return self._once("product", self._make_product)
        if self.engine == "on-the-fly":
            return OnTheFly(self._recipe_of(self.geometry))
        return self._once("astra", self._make_astra)

    @property
    def matrix(self) -> SystemMatrix:
        """The system matrix of the views that are kept, and its transpose, made if they are not there yet.

        Raises
        ------
        OperatorError
            If the engine has none, or they would take more memory than the limit.
        """
        if self.engine != "matrix":
            raise OperatorError(f"CTOperator with engine={self.engine!r} has no matrix.")
        return self._once("matrix", self._make_matrix)

    def _make_matrix(self) -> SystemMatrix:
        self._check_memory()
        return self._recipe.build(self.dtype, self.cache).to(self.device)

    def _make_product(self) -> _Engine:
        return _MatrixEngine(self.matrix, self._groups, self.image_shape, self.geometry.num_detectors)

    def _make_astra(self) -> _Engine:
        return AstraSlices(self.geometry, self.image_shape, self.pixel_size, self.projector, self.device)

    @cached_property
    def _groups(self) -> ViewGroups:
        return view_groups(self.geometry, self.image_shape)

    @property
    def _recipe(self) -> MatrixRecipe:
        return self._recipe_of(self.geometry.subset(self._groups.stored))

    def _recipe_of(self, geometry: ParallelBeam | FanBeam) -> MatrixRecipe:
        return MatrixRecipe(
            geometry, self.image_shape, self.pixel_size, self.projector, self.rays_per_detector
        )

    def _estimated_memory(self) -> int:
        """Bytes of the matrix and its transpose, from above: an index and a value for each entry, twice."""
        if self._largest_entries is None:
            kept = self.geometry.subset(self._groups.stored)
            recipe = MatrixRecipe(
                kept, self.image_shape, self.pixel_size, rays_per_detector=self.rays_per_detector
            )
            self._largest_entries = recipe.largest_entries()
        return 2 * self._largest_entries * (4 + self.dtype.itemsize)

    def _check_memory(self) -> None:
        needed = self._estimated_memory()
        if needed > self.memory_limit:
            raise OperatorError(
                f"the system matrix and its transpose would take {needed / 2**30:.2g} GiB, and memory_limit "
                f"is {self.memory_limit / 2**30:.2g} GiB: raise it, or take engine='astra' or 'on-the-fly', "
                "which need none."
            )

    def _chosen_engine(self, engine: str, projector: str) -> str:
        if engine == "auto" and self._estimated_memory() > self.memory_limit and astra_installed():
            # If ASTRA cannot compute it either, what is wrong is still the memory.
            with contextlib.suppress(OperatorError):
                astra_projector_name(self.geometry, projector, self.rays_per_detector)
                return "astra"
        if engine in ("auto", "matrix"):
            self._check_memory()
            return "matrix"
        return engine

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _apply(self, fn: Callable, recurse: bool = True) -> CTOperator:
        before = self._unit
        super()._apply(fn, recurse)
        if self.engine == "astra" and self.dtype != torch.float32:
            self._unit = before
            raise OperatorError(f"CTOperator with engine='astra' computes in float32, not in {before.dtype}.")
        if self.dtype not in (torch.float32, torch.float64):
            dtype, self._unit = self.dtype, before
            raise OperatorError(f"CTOperator computes in float32 or float64, not in {dtype}.")
        matrix: SystemMatrix | None = self._made.get("matrix")
        # Of another precision it is made anew: in double precision, rounded entries would be worth little.
        self._made = {}
        if matrix is not None and self.dtype == before.dtype:
            self._made["matrix"] = matrix.to(self.device)
        self.matched_adjoint = self.engine != "astra" or self.device.type == "cpu"
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A matrix of some hundred MB is sooner made than sent to another process, and ASTRA's objects cannot
        # be.
        return {k: v for k, v in self.__dict__.items() if k != "_groups"} | {"_made": {}}

    def _check(self, x: Tensor, shape: Shape, side: str) -> None:
        super()._check(x, shape, side)
        if x.dtype not in (self.dtype, self.dtype.to_complex()):
            raise OperatorError(f"CTOperator works in {self.dtype}, got a tensor of {x.dtype}.")


class _Engine(Protocol):
    """Projection of a batch of real images, and its adjoint."""

    def forward(self, x: Tensor) -> Tensor:
        """``(n, H, W)`` to ``(n, views, detectors)``, or flattened."""

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, views, detectors)`` to ``(n, H, W)``, or flattened."""


class _MatrixEngine:
    """Products of the matrix with images as they are, turned and mirrored: it is read once for them."""

    def __init__(self, matrix: SystemMatrix, groups: ViewGroups, image_shape: Shape, num_detectors: int):
        self._matrix, self._groups, self._shape = matrix, groups, image_shape
        self._rays = groups.rays(num_detectors).to(matrix.forward.values.device)
        # More columns than this, and they would no longer stay in the cache of a processor.
        self._items = max(1, _COLUMNS_AT_ONCE // len(groups.motions))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._projected(part) for part in x.split(self._items)])

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([self._backprojected(part) for part in y.split(self._items)])

    def _projected(self, x: Tensor) -> Tensor:
        sums = _product(self._matrix.forward, self._groups.images(x))
        return sums.reshape(-1, len(x)).index_select(0, self._rays).T

    def _backprojected(self, y: Tensor) -> Tensor:
        rows, motions = self._matrix.forward.shape[0], len(self._groups.motions)
        # What no view of the scan sees stays 0.
        columns = y.new_zeros(rows * motions, len(y))
        columns.index_copy_(0, self._rays, y.reshape(len(y), -1).T)
        return self._groups.image(_product(self._matrix.adjoint, columns.view(rows, -1)), self._shape)


def _product(matrix: SparseRows, columns: Tensor) -> Tensor:
    if columns.shape[1] == 1:
        return (matrix @ columns[:, 0])[:, None]
    return matrix @ columns


def _on_real_batch(x: Tensor, shape: Shape, result: Shape, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a real linear map to ``(..., *shape)``, real or complex, all items at once."""
    batch = x.shape[: x.ndim - len(shape)]
    items = x.reshape(math.prod(batch), *shape)
    if items.is_complex():
        items = torch.cat([items.real, items.imag])
    if len(items) == 0:
        return x.new_zeros(*batch, *result)
    y = apply(items).reshape(len(items), *result)
    if x.is_complex():
        y = torch.complex(*y.chunk(2))
    return y.reshape(*batch, *result).contiguous()
