"""Linear operators: what they promise, and how they are put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from operators.errors import OperatorError

Shape = tuple[int, ...]


class LinearOperator(nn.Module):
    """A linear map between tensors, ``y = A x``, with its adjoint.

    The last ``len(domain_shape)`` dimensions of an input are the object, all dimensions before them are
    batch. A subclass implements `_forward`, `_adjoint` and, where there is a cheaper road to ``AᴴA`` than one
    after the other, `_normal`; it calls this constructor and keeps its tensors in buffers. Shapes are checked
    here, so the three may rely on them.

    An operator is not changed after it was made: a new mask is a new operator. As for every
    `torch.nn.Module`, `to` moves the operator itself, and returns it.

    Parameters
    ----------
    domain_shape : sequence of int
        Shape of one ``x``, e.g. ``(H, W)``.
    range_shape : sequence of int
        Shape of one ``A x``, e.g. ``(C, H, W)``.
    batch_shape : sequence of int, optional
        Batch dimensions of the operator itself, e.g. one set of coil maps a slice. They broadcast against the
        batch dimensions of the input.

    Attributes
    ----------
    matched_adjoint : bool
        True if ``⟨A x, y⟩ = ⟨x, Aᴴ y⟩`` holds up to rounding. Solvers that need it refuse operators without
        it.
    """

    matched_adjoint: bool = True

    def __init__(
        self, domain_shape: Sequence[int], range_shape: Sequence[int], batch_shape: Sequence[int] = ()
    ):
        super().__init__()
        self.domain_shape: Shape = tuple(int(n) for n in domain_shape)
        self.range_shape: Shape = tuple(int(n) for n in range_shape)
        self.batch_shape: Shape = tuple(int(n) for n in batch_shape)

    # -- what a subclass implements --------------------------------------------------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _normal(self, x: Tensor) -> Tensor:
        return self._adjoint(self._forward(x))

    # -- what a user calls -----------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator; see `forward`."""
        return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator, ``A x``, without noise.

        Parameters
        ----------
        x : Tensor
            Shape ``(..., *domain_shape)``.

        Returns
        -------
        Tensor
            Shape ``(..., *range_shape)``.

        Raises
        ------
        OperatorError
            If the shape does not fit.
        """
        self._check(x, self.domain_shape, "the domain")
        return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint, ``Aᴴ y``.

        Parameters
        ----------
        y : Tensor
            Shape ``(..., *range_shape)``.

        Returns
        -------
        Tensor
            Shape ``(..., *domain_shape)``.

        Raises
        ------
        OperatorError
            If the shape does not fit.
        """
        self._check(y, self.range_shape, "the range")
        return self._adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        """Apply ``AᴴA x`` by the cheapest road.

        Parameters
        ----------
        x : Tensor
            Shape ``(..., *domain_shape)``.

        Returns
        -------
        Tensor
            Shape ``(..., *domain_shape)``.

        Raises
        ------
        OperatorError
            If the shape does not fit.
        """
        self._check(x, self.domain_shape, "the domain")
        return self._normal(x)

    def direct_inverse(self, y: Tensor, filter: str = "ram-lak") -> Tensor:
        """Invert by a formula, without iterations, as filtered back-projection does.

        Parameters
        ----------
        y : Tensor
            Shape ``(..., *range_shape)``.
        filter : str
            Of filtered back-projection; other formulas have none and disregard it.

        Returns
        -------
        Tensor
            Shape ``(..., *domain_shape)``; as near to ``x`` as the formula and the data allow.

        Raises
        ------
        OperatorError
            If the shape does not fit, or no formula is known for this operator.
        """
        self._check(y, self.range_shape, "the range")
        return self._direct_inverse(y, filter)

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        raise OperatorError(f"{type(self).__name__} has no direct inversion formula.")

    def to_image(self, x: Tensor) -> Tensor:
        """Make of an ``x`` ``(..., *domain_shape)`` what a person looks at: by default ``x`` itself."""
        self._check(x, self.domain_shape, "the domain")
        return x

    def of_slice(self, index: int) -> LinearOperator:
        """Operator of one slice, the first axis being that of slices which are measured each on its own.

        Parameters
        ----------
        index : int
            Of the slice.

        Returns
        -------
        LinearOperator
            ``A.of_slice(n)(x[n])`` is ``A(x)[n]``.

        Raises
        ------
        OperatorError
            If the operator mixes slices, or has none.
        """
        raise OperatorError(f"{type(self).__name__} has no operator of a single slice.")

    @property
    def H(self) -> LinearOperator:  # noqa: N802 (the field's name for it)
        """The adjoint as an operator: ``A.H(y)`` is ``A.adjoint(y)``."""
        return Adjoint(self)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the domain: that of the first floating or complex buffer, else complex64."""
        return next(
            (b.dtype for b in self.buffers() if b.is_complex() or b.is_floating_point()), torch.complex64
        )

    @property
    def device(self) -> torch.device:
        """Device of the operator's buffers, the CPU if there are none."""
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    def norm(self, *, max_iterations: int = 200, tolerance: float = 1e-6, seed: int = 0) -> float:
        """Estimate the operator norm, the largest singular value, by power iteration on ``AᴴA``.

        Parameters
        ----------
        max_iterations : int
            Most applications of ``AᴴA``.
        tolerance : float
            Stop when the estimate changes by less than this fraction from one iteration to the next.
        seed : int
            Seed of the starting vector; equal seeds give equal results.

        Returns
        -------
        float
            The norm, approached from below; for an operator with batch dimensions, the largest in the batch.

        Notes
        -----
        Golub and Van Loan, *Matrix Computations*, 4th ed., section 8.2. The relative error after k iterations
        is of the order of ``(σ₂/σ₁)^(4k)``: small, unless the two largest singular values nearly agree, and
        then the estimate lies between them.
        """
        x = seeded_noise(self.batch_shape + self.domain_shape, self.dtype, seed).to(self.device)
        axes = len(self.domain_shape)
        largest = 0.0
        with torch.no_grad():
            for _ in range(max_iterations):
                length = vector_norm(x, axes)
                z = self.normal(x / length.clamp_min(torch.finfo(length.dtype).tiny))
                # ‖AᴴA v‖ for a unit vector v grows monotonically towards the largest eigenvalue.
                previous, largest = largest, float(vector_norm(z, axes).max())
                if abs(largest - previous) <= tolerance * largest:
                    break
                x = z
        return math.sqrt(largest)

    # -- composition -----------------------------------------------------------------------------------------

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """Compose: ``(A @ B)(x)`` is ``A(B(x))``."""
        return Composition(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scalar: complex) -> LinearOperator:
        return Scaled(self, scalar) if isinstance(scalar, int | float | complex) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1)

    # -- housekeeping ----------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        """Move to a device, to another precision, or both: ``to("cuda")``, ``to(torch.complex128)``.

        Unlike for other modules, a dtype stands for its precision: complex buffers stay complex, real ones
        real, and ``to(torch.float64)`` is ``to(torch.complex128)``.

        Parameters
        ----------
        *args, **kwargs
            A device, a dtype, both, or a tensor that has them, as for `torch.nn.Module.to`.

        Returns
        -------
        LinearOperator
            The operator itself.

        Raises
        ------
        OperatorError
            If the dtype is neither floating nor complex.
        """
        # Torch's own parser of the arguments is private, so an empty tensor is sent ahead to see where they
        # lead.
        target = torch.empty(0, dtype=self.dtype.to_real(), device=self.device).to(*args, **kwargs)
        if not (target.is_floating_point() or target.is_complex()):
            raise OperatorError(
                f"{type(self).__name__} needs a floating or complex dtype, got {target.dtype}."
            )
        non_blocking = bool(kwargs.get("non_blocking", False))

        def convert(buffer: Tensor) -> Tensor:
            dtype = buffer.dtype
            if buffer.is_complex():
                dtype = target.dtype.to_complex()
            elif buffer.is_floating_point():
                dtype = target.dtype.to_real()
            return buffer.to(target.device, dtype, non_blocking=non_blocking)

        return self._apply(convert)

    def extra_repr(self) -> str:
        """Shapes, as ``repr`` shows them."""
        batch = f", batch {self.batch_shape}" if self.batch_shape else ""
        return f"{self.domain_shape} -> {self.range_shape}{batch}"

    def _check(self, x: Tensor, shape: Shape, side: str) -> None:
        """Raise unless ``x`` is a tensor that ends in ``shape`` and whose batch fits the operator's."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise OperatorError(f"{name} needs a torch tensor, got {type(x).__name__}.")
        batch = x.ndim - len(shape)
        if batch < 0 or tuple(x.shape[batch:]) != shape:
            expected = ", ".join(["...", *map(str, shape)])
            raise OperatorError(
                f"{side} of {name} has shape ({expected}), got a tensor of shape {tuple(x.shape)}."
            )
        if self.batch_shape:
            broadcast_batches(
                tuple(x.shape[:batch]), self.batch_shape, f"a tensor of shape {tuple(x.shape)}", name
            )


class Compound(LinearOperator):
    """What an operator that is made of others takes from them, as they are at the time."""

    @property
    def parts(self) -> Iterable[LinearOperator]:
        """The others, each once."""
        return self.children()  # type: ignore[return-value]

    @property
    def matched_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the adjoints of all parts are matched."""
        return all(part.matched_adjoint for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """That of all parts; real weights take complex numbers too, but no MRI operator takes real ones."""
        return functools.reduce(torch.promote_types, (part.dtype for part in self.parts))


class Adjoint(Compound):
    """The adjoint of an operator, seen as an operator."""

    def __init__(self, operator: LinearOperator):
        super().__init__(operator.range_shape, operator.domain_shape, operator.batch_shape)
        self.operator = operator

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator(y)

    @property
    def H(self) -> LinearOperator:  # noqa: N802 (the field's name for it)
        """The operator itself: the adjoint of the adjoint."""
        return self.operator


class Composition(Compound):
    """``A @ B``: first ``B``, then ``A``."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        if outer.domain_shape != inner.range_shape:
            raise OperatorError(
                f"{type(outer).__name__} @ {type(inner).__name__}: the left one takes {outer.domain_shape}, "
                f"the right one gives {inner.range_shape}."
            )
        super().__init__(inner.domain_shape, outer.range_shape, _common_batch(outer, inner))
        self.outer = outer
        self.inner = inner

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def _normal(self, x: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.normal(self.inner(x)))

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        return self.inner.direct_inverse(self.outer.direct_inverse(y, filter), filter)

    def of_slice(self, index: int) -> LinearOperator:
        """See `LinearOperator.of_slice`."""
        return self.outer.of_slice(index) @ self.inner.of_slice(index)


class Sum(Compound):
    """``A + B`` of two operators with the same domain and the same range."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        for side in ("domain_shape", "range_shape"):
            if getattr(first, side) != getattr(second, side):
                raise OperatorError(
                    f"{type(first).__name__} + {type(second).__name__}: {side} is {getattr(first, side)} "
                    f"on the left and {getattr(second, side)} on the right."
                )
        super().__init__(first.domain_shape, first.range_shape, _common_batch(first, second))
        self.first = first
        self.second = second

    def _forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.first.adjoint(y) + self.second.adjoint(y)


class Scaled(Compound):
    """``c * A`` for a real or complex number ``c``."""

    def __init__(self, operator: LinearOperator, scalar: complex):
        super().__init__(operator.domain_shape, operator.range_shape, operator.batch_shape)
        self.operator = operator
        # A number without imaginary part stays real, so that real tensors stay real.
        self.scalar = scalar if isinstance(scalar, complex) and scalar.imag else scalar.real

    def _forward(self, x: Tensor) -> Tensor:
        return self.scalar * self.operator(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.scalar.conjugate() * self.operator.adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        return abs(self.scalar) ** 2 * self.operator.normal(x)

    def _direct_inverse(self, y: Tensor, filter: str) -> Tensor:
        return self.operator.direct_inverse(y, filter) / self.scalar

    def of_slice(self, index: int) -> LinearOperator:
        """See `LinearOperator.of_slice`."""
        return self.scalar * self.operator.of_slice(index)

    def extra_repr(self) -> str:
        """The number and the shapes."""
        return f"{self.scalar} *, {super().extra_repr()}"


class Stack(Compound):
    """Operators over one domain side by side; made by `stack`."""

    def __init__(self, operators: Sequence[LinearOperator]):
        operators = list(operators)
        if not operators:
            raise OperatorError("stack needs at least one operator, got none.")
        first = operators[0]
        for operator in operators[1:]:
            if (operator.domain_shape, operator.range_shape) != (first.domain_shape, first.range_shape):
                raise OperatorError(
                    "stack needs operators of one domain and one range: "
                    f"{type(first).__name__} maps {first.domain_shape} to {first.range_shape}, "
                    f"{type(operator).__name__} maps {operator.domain_shape} to {operator.range_shape}."
                )
        super().__init__(first.domain_shape, (len(operators), *first.range_shape), _common_batch(*operators))
        self.operators: Sequence[LinearOperator] = nn.ModuleList(operators)  # type: ignore[assignment]
        self._axis = -len(self.range_shape)

    @property
    def parts(self) -> Iterable[LinearOperator]:
        """The operators."""
        return self.operators

    def _forward(self, x: Tensor) -> Tensor:
        parts = torch.broadcast_tensors(*(operator(x) for operator in self.operators))
        return torch.stack(parts, dim=self._axis)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _total([A.adjoint(part) for A, part in zip(self.operators, y.unbind(self._axis), strict=True)])

    def _normal(self, x: Tensor) -> Tensor:
        return _total([operator.normal(x) for operator in self.operators])


def stack(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Stack operators that see the same object: ``y[i] = Aᵢ x``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        All of the same domain and range shape.

    Returns
    -------
    LinearOperator
        From ``domain_shape`` to ``(len(operators), *range_shape)``; its adjoint sums over the stack.

    Raises
    ------
    OperatorError
        If there are none, or if their shapes differ.
    """
    return Stack(operators)


def linear_function(
    x: Tensor, apply: Callable[[Tensor], Tensor], apply_adjoint: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute ``apply(x)`` so that gradients flow through ``apply_adjoint`` instead of a recorded graph.

    The gradient of a linear map is its adjoint, so nothing is kept for the backward pass, and ``apply`` is
    free to work in place on what it allocates. Works for gradients of gradients and for forward-mode
    derivatives too.

    Parameters
    ----------
    x : Tensor
        The argument, of any shape.
    apply : callable
        The linear map.
    apply_adjoint : callable
        Its matched adjoint.

    Returns
    -------
    Tensor
        ``apply(x)``.
    """
    return _LinearFunction.apply(x, apply, apply_adjoint)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable, apply_adjoint: Callable) -> Tensor:
        # Not ctx.apply: torch calls a method of that name.
        ctx.linear, ctx.adjoint = apply, apply_adjoint
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        # Where x was broadcast against the batch of the operator, autograd sums over it by itself.
        return linear_function(gradients[0], ctx.adjoint, ctx.linear), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return linear_function(tangents[0], ctx.linear, ctx.adjoint)


def check_slice(operator: LinearOperator, index: int) -> None:
    """Refuse the index of a slice that is not there.

    Raises
    ------
    OperatorError
        Naming the operator, the index and how many slices there are.
    """
    if not 0 <= index < operator.domain_shape[0]:
        raise OperatorError(
            f"{type(operator).__name__} has {operator.domain_shape[0]} slices, there is no slice {index}."
        )


def seeded_noise(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw a standard normal tensor on the CPU that depends on nothing but the arguments."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def vector_norm(x: Tensor, axes: int) -> Tensor:
    """Euclidean norm over the last axes, which are kept with length 1; real.

    Of real and imaginary parts as they lie in memory: torch takes a hundred times as long over complex ones.
    """
    kept = (..., *[None] * axes)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(-2)
    return torch.linalg.vector_norm(x.flatten(-axes), dim=-1)[kept]


def broadcast_batches(first: Shape, second: Shape, first_name: str, second_name: str) -> Shape:
    """Broadcast two batch shapes.

    Raises
    ------
    OperatorError
        If they do not fit; the message names both.
    """
    try:
        return tuple(torch.broadcast_shapes(first, second))
    except RuntimeError as error:
        raise OperatorError(
            f"batch dimensions do not fit: {first} of {first_name}, {second} of {second_name}."
        ) from error


def _common_batch(*operators: LinearOperator) -> Shape:
    batch, name = operators[0].batch_shape, type(operators[0]).__name__
    for operator in operators[1:]:
        batch = broadcast_batches(batch, operator.batch_shape, name, type(operator).__name__)
    return batch


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
