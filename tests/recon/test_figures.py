from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from recon import figures
from recon.errors import ReconError
from recon.figures import ct_figure, reconstruction_figure, segmentation_figure
from recon.metrics import psnr, ssim


def make_images(shape=(40, 30)):
    rng = np.random.default_rng(0)
    truth = 1e-4 * (0.2 + rng.random(shape))
    zero_filled = truth + 3e-5 * rng.random(shape)
    mean = truth + 1e-5 * rng.random(shape)
    return {"mean": mean, "std": 5e-6 * rng.random(shape), "zero_filled": zero_filled, "truth": truth}


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, to look into."""
    kept = []
    draw = figures._draw

    def keep(*arguments):
        kept.append(draw(*arguments))
        return kept[-1]

    monkeypatch.setattr(figures, "_draw", keep)
    return kept


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_images()}


@pytest.mark.parametrize("mask", [np.arange(46) % 4 == 0, np.ones((1, 46)), np.eye(64, 46)])
def test_everything_is_shown(tmp_path, drawn, mask):
    images = make_images()
    path = reconstruction_figure(
        tmp_path / "new" / "figure.png", **images, mask=mask, title="file1 · slice 3"
    )
    picture = pixels(path)
    assert picture.shape[0] > 800
    assert picture.shape[1] > 1200
    assert [item.name for item in path.parent.iterdir()] == ["figure.png"]

    shown = panels(drawn[0])
    assert list(shown) == [
        "Zero-filled", "Posterior mean", "Posterior std", "Sampling mask", "Fully sampled", "Absolute error"
    ]  # fmt: skip
    peak = images["truth"].max()
    np.testing.assert_allclose(
        shown["Absolute error"].get_images()[0].get_array(),
        100 * abs(images["mean"] - images["truth"]) / peak,
    )
    np.testing.assert_allclose(shown["Posterior std"].get_images()[0].get_array(), 100 * images["std"] / peak)
    np.testing.assert_array_equal(shown["Posterior mean"].get_images()[0].get_array(), images["mean"])
    np.testing.assert_array_equal(shown["Sampling mask"].get_images()[0].get_array(), np.atleast_2d(mask))
    for name, key in (("Zero-filled", "zero_filled"), ("Posterior mean", "mean")):
        pair = images["truth"][None], images[key][None]
        assert shown[name].get_title(loc="right") == f"{psnr(*pair):.1f} dB · SSIM {ssim(*pair):.3f}"
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts == ["file1 · slice 3", "Not for diagnostic use"]


def test_panels_have_one_size_and_maps_one_scale(tmp_path, drawn):
    reconstruction_figure(tmp_path / "figure.png", **make_images(), mask=np.ones(46))
    shown = panels(drawn[0])
    sizes = np.array([ax.get_position().size for ax in shown.values()])
    np.testing.assert_allclose(sizes, np.broadcast_to(sizes[0], sizes.shape))
    limits = {name: ax.get_images()[0].get_clim() for name, ax in shown.items()}
    assert limits["Posterior std"] == limits["Absolute error"]
    assert limits["Zero-filled"] == limits["Posterior mean"] == limits["Fully sampled"]


def test_without_truth(tmp_path, drawn):
    images = make_images()
    del images["truth"]
    path = reconstruction_figure(tmp_path / "figure.png", **images, mask=np.ones(46))
    shown = panels(drawn[0])
    assert list(shown) == ["Sampling mask", "Zero-filled", "Posterior mean", "Posterior std"]
    assert shown["Posterior mean"].get_title(loc="right") == ""
    assert pixels(path).std() > 0.05


def test_empty_images(tmp_path):
    empty = np.zeros((16, 16))
    path = reconstruction_figure(
        tmp_path / "f.png", empty, empty, zero_filled=empty, mask=np.ones(16), truth=empty
    )
    assert path.stat().st_size > 0


def test_bad_images(tmp_path):
    images = make_images()
    path = tmp_path / "figure.png"
    with pytest.raises(
        ReconError, match=r"figure.png: 'std' must be a real image like 'mean', \(40, 30\), got \(40,"
    ):
        reconstruction_figure(path, **{**images, "std": images["std"][:, :20]}, mask=np.ones(46))
    with pytest.raises(ReconError, match="'truth' must be a real image"):
        reconstruction_figure(path, **{**images, "truth": 1j * images["truth"]}, mask=np.ones(46))
    with pytest.raises(ReconError, match="'mean' holds NaN"):
        reconstruction_figure(path, **{**images, "mean": images["mean"] * np.nan}, mask=np.ones(46))
    with pytest.raises(ReconError, match=r"mask must have shape \(W,\) or \(H, W\), got \(1, 2, 46\)"):
        reconstruction_figure(path, **images, mask=np.ones((1, 2, 46)))
    (tmp_path / "file").touch()
    with pytest.raises(ReconError, match=r"figure.png: cannot be written"):
        reconstruction_figure(tmp_path / "file" / "figure.png", **images, mask=np.ones(46))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_slow_libraries_are_imported_when_needed():
    slow = "'matplotlib' in sys.modules, 'skimage' in sys.modules"
    code = f"import sys, recon.figures, recon.evaluation; print({slow})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


@pytest.mark.parametrize("units", ["1/mm", "HU"])
def test_ct_figure_with_and_without_the_truth(tmp_path, units):
    rng = np.random.default_rng(0)
    mean, std = rng.random((20, 30)), 0.1 * rng.random((20, 30))
    sizes = []
    for truth in (None, mean + 0.1):
        path = ct_figure(tmp_path / "a" / "ct.png", mean, std, units=units, truth=truth, title="x")
        assert path.read_bytes().startswith(b"\x89PNG")
        sizes.append(pixels(path).shape)
    assert sizes[1][1] > 1.5 * sizes[0][1]
    with pytest.raises(ReconError, match="'std' must be a real image like 'mean'"):
        ct_figure(tmp_path / "b.png", mean, std[1:], units=units)
    assert not (tmp_path / "b.png").exists()


def test_segmentation_figure_shows_what_is_wrong(tmp_path):
    reference = np.zeros((20, 20), dtype=np.uint8)
    reference[5:15, 5:15] = 1
    probability = np.roll(reference, 3, axis=1).astype(np.float32)
    segmentation = (probability > 0.5).astype(np.uint8)
    alone = pixels(segmentation_figure(tmp_path / "a.png", segmentation, probability))
    beside = pixels(segmentation_figure(tmp_path / "b.png", segmentation, probability, reference))
    assert beside.shape[1] > 1.5 * alone.shape[1]
    with pytest.raises(ReconError, match="NaN or infinite"):
        segmentation_figure(tmp_path / "c.png", segmentation, probability * np.nan)
