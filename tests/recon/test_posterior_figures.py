"""What the pictures of a posterior show: the axes of the figure, looked into before they become pixels."""

from __future__ import annotations

import numpy as np
import pytest

from recon import figures
from recon.errors import ReconError
from recon.figures import posterior_figure, uncertainty_grid
from recon.metrics import psnr, ssim


def make_posterior(shape=(40, 30), count=8):
    rng = np.random.default_rng(0)
    truth = 1e-4 * (0.2 + rng.random(shape))
    samples = truth + 1e-5 * rng.random((count, *shape))
    invented = 2e-5 * rng.random(shape)
    mean = samples.mean(0)
    return {
        "mean": mean,
        "std": samples.std(0),
        "samples": samples,
        "truth": truth,
        "measured": mean - invented,
        "invented": invented,
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    kept = []
    draw = figures._draw

    def keep(*arguments):
        kept.append(draw(*arguments))
        return kept[-1]

    monkeypatch.setattr(figures, "_draw", keep)
    return kept


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_images()}


def content(ax):
    return np.asarray(ax.get_images()[0].get_array())


def limits(ax):
    return ax.get_images()[0].get_clim()


def rows(figure):
    """Titles, row by row from above and from left to right."""
    places: dict[float, list[tuple[float, str]]] = {}
    for title, ax in panels(figure).items():
        box = ax.get_position()
        places.setdefault(round(-box.y0, 6), []).append((box.x0, title))
    return [[title for _, title in sorted(places[y])] for y in sorted(places)]


def bars(figure):
    return sum(not ax.get_title(loc="left") for ax in figure.axes)


def test_posterior_with_truth_and_split(tmp_path, drawn):
    images = make_posterior()
    path = posterior_figure(tmp_path / "new" / "p.png", **images, title="slice 3")
    assert [item.name for item in path.parent.iterdir()] == ["p.png"]
    assert path.stat().st_size > 10_000
    shown = panels(drawn[0])
    assert rows(drawn[0]) == [
        ["Fully sampled", "Posterior mean", "Posterior std", "Absolute error"],
        ["Sample 1", "Sample 2", "Measured part", "Invented part"],
    ]
    peak = images["truth"].max()
    error = abs(images["mean"] - images["truth"])
    for name, expected in {
        "Fully sampled": images["truth"],
        "Posterior mean": images["mean"],
        "Posterior std": 100 * images["std"] / peak,
        "Absolute error": 100 * error / peak,
        "Sample 2": images["samples"][1],
        "Measured part": images["measured"],
        "Invented part": 100 * images["invented"] / peak,
    }.items():
        np.testing.assert_allclose(content(shown[name]), expected)
    assert limits(shown["Posterior std"]) == limits(shown["Absolute error"])
    assert len({limits(shown[name]) for name in ("Fully sampled", "Sample 1", "Measured part")}) == 1
    assert bars(drawn[0]) == 2

    for name, image in (("Posterior mean", images["mean"]), ("Sample 1", images["samples"][0])):
        pair = images["truth"][None], image[None]
        assert shown[name].get_title(loc="right") == f"{psnr(*pair):.1f} dB · SSIM {ssim(*pair):.3f}"
    energy = (images["invented"] ** 2).sum(), (images["measured"] ** 2).sum()
    note = f"% of max · {100 * energy[0] / sum(energy):.2g} % of energy"
    assert shown["Invented part"].get_title(loc="right") == note
    assert [text.get_text() for text in drawn[0].texts] == ["slice 3", "Not for diagnostic use"]


@pytest.mark.parametrize(
    ("left_out", "count", "expected"),
    [
        (
            ("measured", "invented"),
            8,
            [
                ["Fully sampled", "Posterior mean", "Posterior std", "Absolute error"],
                ["Sample 1", "Sample 2", "Sample 3", "Sample 4"],
            ],
        ),
        (
            ("truth",),
            8,
            [
                ["Sample 1", "Posterior mean", "Posterior std"],
                ["Sample 2", "Measured part", "Invented part"],
            ],
        ),
        (
            ("truth", "measured", "invented"),
            8,
            [["Posterior mean", "Posterior std"], ["Sample 1", "Sample 2"]],
        ),
        (("truth", "measured", "invented"), 1, [["Posterior mean", "Posterior std"], ["Sample 1"]]),
    ],
)
def test_what_is_not_known_is_left_out(tmp_path, drawn, left_out, count, expected):
    images = make_posterior(count=count)
    for name in left_out:
        del images[name]
    posterior_figure(tmp_path / "p.png", **images)
    assert rows(drawn[0]) == expected


def test_grid_has_one_colour_scale(tmp_path, drawn):
    images = make_posterior()
    truth, region = images["truth"], np.zeros((40, 30), dtype=bool)
    region[10:20, 5:25] = True
    results = {f"×{a}": (truth + a * (images["mean"] - truth), a * images["std"]) for a in (2, 4, 8)}
    path = uncertainty_grid(tmp_path / "g.png", results, region=region, truth=truth, title="all")
    assert path.stat().st_size > 10_000
    assert rows(drawn[0]) == [[f"{kind} ×{a}" for a in (2, 4, 8)] for kind in ("Mean", "Std", "Error")]
    shown = panels(drawn[0])
    assert len({limits(shown[f"{kind} ×{a}"]) for kind in ("Std", "Error") for a in (2, 4, 8)}) == 1
    assert bars(drawn[0]) == 2
    peak = truth.max()
    for a in (2, 4, 8):
        std = 100 * a * images["std"] / peak
        np.testing.assert_allclose(content(shown[f"Std ×{a}"]), std)
        assert shown[f"Std ×{a}"].get_title(loc="right") == f"mean {std[region].mean():.2f} % of max"
        error = 100 * a * abs(images["mean"] - truth) / peak
        assert shown[f"Error ×{a}"].get_title(loc="right") == f"mean {error[region].mean():.2f} % of max"


def test_grid_without_truth(tmp_path, drawn):
    images = make_posterior()
    results = {"×2": (images["mean"], images["std"]), "×4": (images["mean"], 3 * images["std"])}
    uncertainty_grid(tmp_path / "g.png", results, region=np.ones((40, 30), dtype=bool))
    assert rows(drawn[0]) == [["Mean ×2", "Mean ×4"], ["Std ×2", "Std ×4"]]
    shown = panels(drawn[0])
    np.testing.assert_allclose(content(shown["Std ×2"]), 100 * images["std"] / images["mean"].max())
    assert shown["Mean ×2"].get_title(loc="right") == ""


def test_bad_images(tmp_path):
    images = make_posterior()
    path, region = tmp_path / "p.png", np.ones((40, 30), dtype=bool)
    with pytest.raises(ReconError, match=r"p.png: 'std' must be a real image like 'mean'"):
        posterior_figure(path, **{**images, "std": images["std"][:9]})
    samples = images["samples"].copy()
    samples[1, 0, 0] = np.nan
    with pytest.raises(ReconError, match=r"'sample 2' holds NaN"):
        posterior_figure(path, **{**images, "samples": samples})
    with pytest.raises(ReconError, match=r"'samples' must have shape \(n, h, w\), .* got \(40, 30\)"):
        posterior_figure(path, **{**images, "samples": images["mean"]})
    with pytest.raises(ReconError, match="drawn together or not at all"):
        posterior_figure(path, **{**images, "measured": None})
    with pytest.raises(ReconError, match="no results to draw"):
        uncertainty_grid(path, {}, region=region)
    pair = images["mean"], images["std"]
    with pytest.raises(ReconError, match=r"'std ×4' must be a real image"):
        uncertainty_grid(path, {"×2": pair, "×4": (pair[0], 1j * pair[1])}, region=region)
    with pytest.raises(ReconError, match=r"region must be bool of shape \(40, 30\), and not empty"):
        uncertainty_grid(path, {"×2": pair}, region=~region)
    assert not list(tmp_path.iterdir())
