"""Cartesian MRI: coil sensitivity maps, Fourier transform, sampling mask.

All three operators compute ``y = M F S x`` with the centred orthonormal transform ``F`` of `operators.fft`,
by the cheapest road:

- The shifts around an FFT are products with complex exponentials on either side of it. Those on the k-space
  side are folded into the mask, those on the image side multiply the image once for all coils. They are signs
  for even sizes and complex ramps for odd ones.
- In ``AᴴA`` they cancel: an FFT without shifts and a mask that was shifted beforehand are enough.
- Along a direction in which the mask does not vary, the two transforms of ``AᴴA`` cancel altogether: a mask
  of columns needs one-dimensional FFTs only.
- With a mask of columns rows do not mix, and those in which no coil is sensitive are left out of ``AᴴA``.
- On a CPU the coils are processed in blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from operators.base import LinearOperator, Shape, broadcast_batches, linear_function
from operators.errors import OperatorError

# Elements a block has on the CPU for each thread: 1 MiB in complex64, so that the operands of a step stay in
# the cache. Smaller blocks gain nothing more, and threads wait for each other more often.
_BLOCK = 2**17


class _CartesianMRI(LinearOperator):
    """What the Cartesian operators share: the mask, and the Fourier transform around it."""

    mask: Tensor
    _ramp: Tensor
    _weight: Tensor
    _shifted_mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        domain_shape: Sequence[int],
        range_shape: Sequence[int],
        batch_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(domain_shape, range_shape, batch_shape)
        self.image_shape: Shape = self.range_shape[-2:]
        self.register_buffer("mask", _checked_mask(mask, self.image_shape, type(self).__name__).to(device))
        # AᴴA needs transforms along the directions in which the mask varies only.
        varies = {
            -2: bool((self.mask != self.mask[:1]).any()),
            -1: bool((self.mask != self.mask[:, :1]).any()),
        }
        self._normal_dim = tuple(dim for dim in (-2, -1) if varies[dim])
        self._make_tables(dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        """Complex data type of images and k-space."""
        return self._ramp.dtype

    def _make_tables(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make what follows from the mask: the ramps of the centring, the folded mask, the shifted mask."""
        height, width = self.image_shape
        mask = self.mask.cpu()
        (image_h, kspace_h), (image_w, kspace_w) = _centring(height), _centring(width)
        weight = kspace_h[:, None] * kspace_w * mask / math.sqrt(height * width)
        if height % 2 == 0 and width % 2 == 0:
            weight = _doubled(weight.real)
        shifted = torch.fft.ifftshift(mask.double(), dim=(-2, -1))
        # The FFTs of AᴴA are unnormalised in both directions; the mask takes up the factor.
        shifted = shifted / math.prod(self.image_shape[dim] for dim in self._normal_dim)
        if -2 not in self._normal_dim:
            shifted = shifted[0]
        for name, table in (
            ("_ramp", image_h[:, None] * image_w),
            ("_weight", weight),
            ("_shifted_mask", _doubled(shifted)),
        ):
            precision = dtype if table.is_complex() else dtype.to_real()
            self.register_buffer(name, table.to(device, precision), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> _CartesianMRI:
        super()._apply(fn, recurse)
        # Tables are remade rather than converted: a complex64 ramp is not accurate enough for complex128.
        self._make_tables(self._ramp.dtype, self._ramp.device)
        return self

    def _check(self, x: Tensor, shape: Shape, side: str) -> None:
        super()._check(x, shape, side)
        if x.dtype != self.dtype:
            raise OperatorError(f"{type(self).__name__} works in {self.dtype}, got a tensor of {x.dtype}.")

    def _to_kspace(self, z: Tensor, out: Tensor) -> None:
        """Masked transform of ``z``, which has the image ramp on it already; ``out`` is contiguous."""
        torch.fft.fftn(z, dim=(-2, -1), out=out)
        _multiply(out, self._weight, out)

    def _from_kspace(self, y: Tensor, scratch: Tensor, out: Tensor) -> None:
        """Adjoint of `_to_kspace`; ``scratch`` is contiguous and may not be ``y``."""
        _multiply(y, self._weight.conj(), scratch)
        torch.fft.ifftn(scratch, dim=(-2, -1), norm="forward", out=out)

    def _project(self, z: Tensor, scratch: Tensor) -> None:
        """Replace ``z`` by ``Fᴴ M F z``; both are contiguous."""
        if not self._normal_dim:
            _multiply(z, self._shifted_mask, z)
            return
        torch.fft.fftn(z, dim=self._normal_dim, out=scratch)
        _multiply(scratch, self._shifted_mask, scratch)
        torch.fft.ifftn(scratch, dim=self._normal_dim, norm="forward", out=z)


class _MaskedFourier(_CartesianMRI):
    """``M F`` without coil maps; what is before ``(H, W)`` is carried along."""

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._masked_transform, self._masked_inverse)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._masked_inverse, self._masked_transform)

    def _normal(self, x: Tensor) -> Tensor:
        return linear_function(x, self._projection, self._projection)

    def _masked_transform(self, x: Tensor) -> Tensor:
        z = x * self._ramp
        y = torch.empty_like(z, memory_format=torch.contiguous_format)
        self._to_kspace(z, y)
        return y

    def _masked_inverse(self, y: Tensor) -> Tensor:
        scratch = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        x = torch.empty_like(scratch)
        self._from_kspace(y.resolve_conj(), scratch, x)
        return x.mul_(self._ramp.conj())

    def _projection(self, x: Tensor) -> Tensor:
        z = x.resolve_conj().clone(memory_format=torch.contiguous_format)
        self._project(z, torch.empty_like(z))
        return z


class SinglecoilMRI(_MaskedFourier):
    """Cartesian MRI with one coil, ``y = M F x``.

    Parameters
    ----------
    mask : Tensor
        Sampling mask, bool or numbers 0 and 1: ``(H, W)``, or ``(W,)`` or ``(1, W)`` for a mask of columns,
        or ``(H, 1)`` for one of rows. k-space is centred: the zero frequency lies at ``(H // 2, W // 2)``.
    shape : sequence of int, optional
        ``(H, W)``. Needed unless the mask has this shape itself.

    Raises
    ------
    OperatorError
        If the mask does not fit the shape, has other values than 0 and 1, or leaves the shape open.

    Notes
    -----
    Images and k-space are complex64, ``(..., H, W)``; ``to(torch.complex128)`` makes that complex128. k-space
    that was not sampled is zero in ``A x`` and disregarded by the adjoint.
    """

    def __init__(self, mask: Tensor, shape: Sequence[int] | None = None):
        shape = _image_shape(mask, shape, type(self).__name__)
        super().__init__(mask, shape, shape, (), torch.complex64, mask.device)


class CoilwiseMRI(_MaskedFourier):
    """Cartesian MRI of coil images, ``y_c = M F x_c``: every coil on its own, without maps.

    Parameters
    ----------
    num_coils : int
        Number of coils C.
    mask : Tensor
        Sampling mask, as for `SinglecoilMRI`; the same for all coils.
    shape : sequence of int, optional
        ``(H, W)``. Needed unless the mask has this shape itself.

    Raises
    ------
    OperatorError
        If there are no coils, or the mask does not fit the shape, has other values than 0 and 1, or leaves
        the shape open.

    Notes
    -----
    Coil images and k-space are complex64, ``(..., C, H, W)``; ``to(torch.complex128)`` makes that complex128.
    """

    def __init__(self, num_coils: int, mask: Tensor, shape: Sequence[int] | None = None):
        if num_coils < 1:
            raise OperatorError(f"CoilwiseMRI needs at least one coil, got {num_coils}.")
        shape = (num_coils, *_image_shape(mask, shape, type(self).__name__))
        super().__init__(mask, shape, shape, (), torch.complex64, mask.device)

    def to_image(self, x: Tensor) -> Tensor:
        """Root sum of squares of coil images ``(..., C, H, W)``: ``(..., H, W)``, real."""
        self._check(x, self.domain_shape, "the domain")
        return torch.linalg.vector_norm(x, dim=-3)


class MulticoilMRI(_CartesianMRI):
    """Cartesian MRI with several coils, ``y_c = M F (s_c x)``.

    Parameters
    ----------
    maps : Tensor
        Coil sensitivity maps, complex, ``(C, H, W)``, or ``(..., C, H, W)`` with batch dimensions (one set a
        slice) that broadcast against those of the image.
    mask : Tensor
        Sampling mask, bool or numbers 0 and 1: ``(H, W)``, or ``(W,)`` or ``(1, W)`` for a mask of columns,
        or ``(H, 1)`` for one of rows. k-space is centred: the zero frequency lies at ``(H // 2, W // 2)``.

    Raises
    ------
    OperatorError
        If the maps are not complex, not finite or have fewer than three dimensions, or the mask does not fit
        them or has other values than 0 and 1.

    Notes
    -----
    Images ``(..., H, W)`` and k-space ``(..., C, H, W)`` have the dtype of the maps. k-space that was not
    sampled is zero in ``A x`` and disregarded by the adjoint. No gradient flows to the maps.

    The encoding model is that of Pruessmann et al., Magn Reson Med 42:952 (1999).
    """

    maps: Tensor
    _conjugate_maps: Tensor

    def __init__(self, maps: Tensor, mask: Tensor):
        if not maps.is_complex():
            raise OperatorError(f"MulticoilMRI needs complex coil maps, got {maps.dtype}.")
        if maps.ndim < 3 or 0 in maps.shape:
            raise OperatorError(
                f"MulticoilMRI needs coil maps of shape (..., C, H, W), got {tuple(maps.shape)}."
            )
        if not torch.isfinite(torch.view_as_real(maps.detach().resolve_conj())).all():
            raise OperatorError(f"coil maps of shape {tuple(maps.shape)} have NaN or infinite values.")
        batch, coils, shape = maps.shape[:-3], maps.shape[-3], maps.shape[-2:]
        super().__init__(mask, shape, (coils, *shape), batch, maps.dtype, maps.device)
        # A copy, so that nothing done to the caller's tensor later changes the operator.
        self.register_buffer(
            "maps", maps.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        )
        # Kept beside the maps: torch would conjugate them anew, one pass over memory, at every product.
        self.register_buffer("_conjugate_maps", self.maps.conj().resolve_conj(), persistent=False)
        self._rows = self._measured_rows()

    def _measured_rows(self) -> slice:
        """Rows of the image that `_combine_projected` has to compute; the others of ``AᴴA x`` are zero."""
        if -2 in self._normal_dim:
            return slice(None)
        sensitive = (self.maps != 0).flatten(0, -3).any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        return slice(sensitive[0], sensitive[-1] + 1) if sensitive else slice(0, 1)

    @property
    def num_coils(self) -> int:
        """Number of coils C."""
        return self.range_shape[0]

    @property
    def support(self) -> Tensor:
        """Where any coil is sensitive, bool ``(..., H, W)``: nothing else of an image is measured."""
        return (self.maps != 0).any(dim=-3)

    def to_image(self, x: Tensor) -> Tensor:
        """Image ``(..., H, W)`` within the `support`.

        Cropped maps say that there is no object where they are zero; what a prior fills in there without any
        data is not a reconstruction.
        """
        self._check(x, self.domain_shape, "the domain")
        return x * self.support

    def _forward(self, x: Tensor) -> Tensor:
        return linear_function(x, self._encode, self._combine)

    def _adjoint(self, y: Tensor) -> Tensor:
        return linear_function(y, self._combine, self._encode)

    def _normal(self, x: Tensor) -> Tensor:
        return linear_function(x, self._combine_projected, self._combine_projected)

    def _encode(self, x: Tensor) -> Tensor:
        x, maps = self._expand(x * self._ramp, self.image_shape, self.maps)
        y = x.new_empty(x.shape[:-2] + self.range_shape)
        for item, coils, (z,) in self._blocks(x, 1):
            torch.mul(maps[item][..., coils, :, :], x[item].unsqueeze(-3), out=z)
            self._to_kspace(z, y[item][..., coils, :, :])
        return y

    def _combine(self, y: Tensor) -> Tensor:
        y, conjugate = self._expand(y.resolve_conj(), self.range_shape, self._conjugate_maps)
        x = y.new_zeros(y.shape[:-3] + self.image_shape)
        for item, coils, (scratch, z) in self._blocks(x, 2):
            self._from_kspace(y[item][..., coils, :, :], scratch, z)
            _add_combined(x[item], conjugate[item][..., coils, :, :], z)
        return x.mul_(self._ramp.conj())

    def _combine_projected(self, x: Tensor) -> Tensor:
        x, maps, conjugate = self._expand(x, self.image_shape, self.maps, self._conjugate_maps)
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        x, maps, conjugate, inner = (tensor[..., self._rows, :] for tensor in (x, maps, conjugate, out))
        for item, coils, (z, scratch) in self._blocks(inner, 2):
            torch.mul(maps[item][..., coils, :, :], x[item].unsqueeze(-3), out=z)
            self._project(z, scratch)
            _add_combined(inner[item], conjugate[item][..., coils, :, :], z)
        return out

    def _expand(self, x: Tensor, shape: Shape, *maps: Tensor) -> tuple[Tensor, ...]:
        """View ``x`` and maps with the batch dimensions that all broadcast to."""
        batch = broadcast_batches(
            tuple(x.shape[: x.ndim - len(shape)]), self.batch_shape, "the input", "the maps"
        )
        return x.expand(batch + shape), *(each.expand(batch + self.range_shape) for each in maps)

    def _blocks(self, image: Tensor, scratch: int) -> Iterator[tuple[tuple[int, ...], slice, list[Tensor]]]:
        """Cut the coil images of ``image (..., H, W)`` into blocks.

        Yields the index of a batch item, a slice of coils, and as many scratch tensors as asked for; all at
        once, where cutting gains nothing: on a GPU, and where everything is small.
        """
        batch, coils, size = image.shape[:-2], self.num_coils, image.shape[-2:]
        pixels = math.prod(size)
        budget = _BLOCK * torch.get_num_threads()
        if image.device.type != "cpu" or math.prod(batch) * coils * pixels <= budget:
            shape = (*batch, coils, *size)
            yield (), slice(None), [image.new_empty(shape) for _ in range(scratch)]
            return
        step = min(coils, max(1, budget // pixels))
        buffers = [image.new_empty((step, *size)) for _ in range(scratch)]
        for item in np.ndindex(*batch):
            for start in range(0, coils, step):
                count = min(step, coils - start)
                yield item, slice(start, start + count), [buffer[:count] for buffer in buffers]


def _add_combined(total: Tensor, conjugate: Tensor, z: Tensor) -> None:
    """Add ``Σ_c conj(maps_c) z_c`` to ``total``, at the expense of ``z``."""
    if conjugate.shape[-3] == 1:
        total.addcmul_(conjugate.squeeze(-3), z.squeeze(-3))
    else:
        total.add_(z.mul_(conjugate).sum(dim=-3))


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Store ``x * weight`` in the contiguous ``out``; a real weight has every entry twice, see `_doubled`."""
    if weight.is_complex():
        torch.mul(x, weight, out=out)
    else:
        torch.mul(torch.view_as_real(x).flatten(-2), weight, out=torch.view_as_real(out).flatten(-2))


def _doubled(weight: Tensor) -> Tensor:
    """Repeat every entry along W, for the real and the imaginary part.

    Torch would turn a real factor of a complex tensor into a complex one; as floats they multiply twice as
    fast.
    """
    return weight.repeat_interleave(2, dim=-1)


def _centring(n: int) -> tuple[Tensor, Tensor]:
    """Factors before and after an FFT of length ``n`` that centre it, complex128 ``(n,)``.

    With ``c = n // 2`` the centred kernel ``exp(-2πi (j - c)(k - c) / n)`` is the plain one ``exp(-2πi jk /
    n)`` times ``exp(2πi cj / n)`` in space and ``exp(2πi (ck - c²) / n)`` in frequency.
    """
    centre = n // 2
    index = torch.arange(n)
    # Whole turns are taken off in integers, where nothing is rounded.
    space = (centre * index) % n
    frequency = (centre * (index - centre)) % n
    return _unit_circle(space, n), _unit_circle(frequency, n)


def _unit_circle(turns: Tensor, n: int) -> Tensor:
    angle = turns.double() * (2 * math.pi / n)
    return torch.complex(angle.cos(), angle.sin())


def _image_shape(mask: Tensor, shape: Sequence[int] | None, name: str) -> Shape:
    """``(H, W)`` from the argument, or from a mask that has it."""
    if shape is not None:
        if len(shape) != 2 or min(shape) < 1:
            raise OperatorError(f"{name} needs a shape (H, W), got {tuple(shape)}.")
        return int(shape[0]), int(shape[1])
    if mask.ndim != 2 or 1 in mask.shape:
        raise OperatorError(
            f"{name}: a mask of shape {tuple(mask.shape)} leaves the image shape open; give shape=(H, W)."
        )
    return mask.shape[0], mask.shape[1]


def _checked_mask(mask: Tensor, shape: Shape, name: str) -> Tensor:
    """The mask as bool ``(H, W)``."""
    mask = mask.detach()
    height, width = shape
    if tuple(mask.shape) not in {(width,), (1, width), (height, 1), (height, width)}:
        raise OperatorError(
            f"{name}: the mask has shape {tuple(mask.shape)}, "
            f"expected ({width},), (1, {width}), ({height}, 1) "
            f"or ({height}, {width})."
        )
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        raise OperatorError(f"{name}: the mask must be bool or real with no other values than 0 and 1.")
    return (mask != 0).expand(height, width).clone()
