"""Record what the ``fastmri`` package's own metrics and evaluator give, for ``tests/recon/test_metrics.py``.

``fastmri`` is no dependency of this project. In an environment of its own::

    pip install --no-deps fastmri==0.3.0
    pip install torch numpy scikit-image h5py runstats pandas requests tqdm pyyaml
    python benchmarks/record_fastmri_metrics.py

Paste what it prints over ``RECORDED`` and ``RECORDED_EVALUATION`` in the test.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from pprint import pprint

import numpy as np

# (slices, h, w), type, and the error's share of the image: the magnitudes are those of fastMRI files.
CASES = {
    "float64": ((2, 40, 40), np.float64, 0.05),
    "float32": ((3, 64, 48), np.float32, 0.02),
    "knee": ((4, 320, 320), np.float32, 0.1),
}
# Target and prediction of the volumes the evaluators are compared on; both are cropped to the target's width.
EVALUATION_SHAPES = {
    "file1": ((2, 40, 36), (2, 44, 40)),
    "file2": ((3, 32, 32), (3, 32, 32)),
    "file3": ((2, 48, 48), (2, 64, 50)),
}


def make_volume(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A smooth positive volume with some grain, of fastMRI's magnitudes, always the same for a seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]]
    waves = [np.cos(x / (3 + s) + s) * np.sin(y / (5 + s)) + 1.2 for s in range(shape[0])]
    return 1e-4 * (np.stack(waves) + 0.3 * rng.random(shape))


def make_pair(
    shape: tuple[int, int, int], dtype: type, error: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A target and a prediction that differs from it by a scale and noise."""
    target = make_volume(shape, seed)
    noise = np.random.default_rng(seed + 1).random(shape) - 0.5
    prediction = (1 - error) * target + error * 1e-4 * noise
    return target.astype(dtype), prediction.astype(dtype)


def write_evaluation_files(targets: Path, predictions: Path) -> None:
    """Write the volumes of ``EVALUATION_SHAPES`` as fastMRI targets and reconstructions."""
    import h5py

    for seed, (name, (target_shape, shape)) in enumerate(EVALUATION_SHAPES.items()):
        target, prediction = make_pair(shape, np.float32, 0.05 * (seed + 1), seed)
        top, left = (shape[1] - target_shape[1]) // 2, (shape[2] - target_shape[2]) // 2
        with h5py.File(targets / f"{name}.h5", "w") as file:
            file["reconstruction_rss"] = target[:, top:, left:][:, : target_shape[1], : target_shape[2]]
            file.attrs["acquisition"] = "AXT2"
        with h5py.File(predictions / f"{name}.h5", "w") as file:
            file["reconstruction"] = prediction


def as_scalar(metric: Callable[..., np.ndarray]) -> Callable[..., float]:
    """The same metric, returning a number."""
    return lambda target, prediction: float(np.asarray(metric(target, prediction)).item())


def main() -> None:
    """Print the values."""
    import fastmri.evaluate as reference  # type: ignore[import-not-found]

    # Its ssim() returns an array of one element, on which its evaluate() fails under current numpy.
    metrics = {name: as_scalar(function) for name, function in reference.METRIC_FUNCS.items()}
    reference.METRIC_FUNCS.update(metrics)

    recorded = {}
    for seed, (name, case) in enumerate(CASES.items()):
        pair = make_pair(*case, seed)
        recorded[name] = {metric: function(*pair) for metric, function in metrics.items()}

    with tempfile.TemporaryDirectory() as folder:
        targets, predictions = Path(folder, "targets"), Path(folder, "predictions")
        targets.mkdir()
        predictions.mkdir()
        write_evaluation_files(targets, predictions)
        arguments = argparse.Namespace(
            target_path=targets, predictions_path=predictions, acquisition=None, acceleration=None
        )
        result = reference.evaluate(arguments, "reconstruction_rss")
    evaluation = {"mean": result.means(), "std": result.stddevs()}

    for title, values in {"RECORDED": recorded, "RECORDED_EVALUATION": evaluation}.items():
        print(f"{title} =", end=" ")
        pprint(values, sort_dicts=False)


if __name__ == "__main__":
    main()
