"""CT projections without a matrix: every ray is followed anew each time.

The same line integrals as the system matrix has, and its exact transpose. Slower than a matrix that is there
already, and much faster than making one: for what needs few products, and where the matrix does not fit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from operators.ct_matrix import MatrixRecipe
from operators.ct_rays import ViewSteps, view_steps


class OnTheFly:
    """Projector of a slice and its transpose, view by view on the CPU.

    Parameters
    ----------
    recipe : MatrixRecipe
        Of the matrix that is not made.
    """

    def __init__(self, recipe: MatrixRecipe):
        self._recipe = recipe
        self._geometry = recipe.geometry
        self._rays = recipe.rays_per_detector

    def forward(self, x: Tensor) -> Tensor:
        """``(n, H, W)`` to ``(n, views, detectors)``, on the device of `x`."""
        images = _framed(x.cpu().numpy())
        turned = np.ascontiguousarray(images.transpose(0, 2, 1))
        views, detectors = self._geometry.range_shape
        result = np.empty((len(images), views, detectors * self._rays), images.dtype)
        for view in range(views):
            for steps in self._steps(view, images.dtype):
                flat = (images if steps.along_rows else turned).reshape(len(images), -1)
                for item, values in enumerate(flat):
                    lower, upper = values.take(steps.pixels), values.take(steps.pixels + np.int32(1))
                    upper -= lower
                    upper *= steps.upper_part
                    upper += lower
                    result[item, view, steps.rays] = upper.sum(axis=1) * steps.length
        mean = result.reshape(len(images), views, detectors, self._rays).mean(axis=-1)
        return torch.from_numpy(mean).to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, views, detectors)`` to ``(n, H, W)``, on the device of `y`."""
        data = y.cpu().numpy().repeat(self._rays, axis=-1) / self._rays
        height, width = (n + 2 for n in self._recipe.image_shape)
        # Pixels that a ray meets along rows, and along columns, are counted each in the order of its image.
        upright = np.zeros((len(data), height * width))
        turned = np.zeros((len(data), height * width))
        for view in range(self._geometry.num_views):
            for steps in self._steps(view, data.dtype):
                pixels = steps.pixels.reshape(-1)
                sums = upright if steps.along_rows else turned
                for item, values in enumerate(data[:, view, steps.rays]):
                    share = (values * steps.length)[:, None]
                    upper = share * steps.upper_part
                    for index, part in ((pixels, share - upper), (pixels + 1, upper)):
                        sums[item] += np.bincount(index, part.reshape(-1), height * width)
        image = upright.reshape(-1, height, width) + turned.reshape(-1, width, height).transpose(0, 2, 1)
        return torch.from_numpy(image[:, 1:-1, 1:-1].astype(data.dtype)).to(y)

    def _steps(self, view: int, dtype: np.dtype) -> list[ViewSteps]:
        kind = np.float32 if dtype == np.float32 else np.float64
        made = self._recipe
        return list(
            view_steps(
                made.geometry,
                view,
                made.image_shape,
                made.pixel_size,
                made.projector,
                made.rays_per_detector,
                kind,
            )
        )


def _framed(images: np.ndarray) -> np.ndarray:
    """Images in a frame of zeros, one pixel wide: what a ray meets outside."""
    return np.pad(images, ((0, 0), (1, 1), (1, 1)))
