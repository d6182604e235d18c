"""Segmentation of the challenge's discs: linearisation, binning, and a disc that was simulated."""

import math
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from operators.ct import CTOperator
from operators.ct_geometry import FanBeam, ParallelBeam, equispaced_angles
from priors import GaussianPrior
from priors.base import Contract, ScorePrior
from recon import ReconError, htc2022
from recon.ct import CTSettings
from recon.htc2022 import (
    AGAIN,
    AIR,
    FIRST,
    MISFIT,
    NOISE,
    PATH_LENGTH,
    SIZE,
    Candidate,
    Segmentation,
    Source,
    above_air,
    arc_of,
    best,
    binned,
    material,
    refitted,
    search,
    segment,
    segmented,
    surprise,
)
from recon.io.ct_scan import CTScan
from recon.io.segmentation import read_segmentation, write_segmentation

GEOMETRY = FanBeam(equispaced_angles(60, 2 * math.pi), 560, 0.2, 410.66, 553.74)
PIXEL = 0.1483223
AIR_LEVEL = 0.015


def disc(side=512, pixel=PIXEL):
    """A disc of 30 mm radius with a hole of 7 mm."""
    y = (((side - 1) / 2 - torch.arange(side)) * pixel)[:, None]
    x = (torch.arange(side) - (side - 1) / 2) * pixel
    return ((x**2 + y**2 < 30**2) & ((x - 9) ** 2 + (y - 6) ** 2 > 7**2)).float()


def hardened(lengths):
    """Line integrals whose path lengths `PATH_LENGTH` finds: its inverse, by a table."""
    p = torch.linspace(0, 2.4, 4000)
    return torch.from_numpy(np.interp(lengths.numpy(), PATH_LENGTH(p).numpy(), p.numpy()).astype(np.float32))


@pytest.fixture(scope="module")
def scan():
    lengths = CTOperator(GEOMETRY, (256, 256), 2 * PIXEL)(disc(256, 2 * PIXEL))
    p = hardened(lengths) + AIR_LEVEL
    noise = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return CTScan(
        (p + noise)[None],
        "line_integrals",
        Path("disc.mat"),
        GEOMETRY,
        pixel_size=PIXEL,
        image_shape=(512, 512),
    )


class Majority(ScorePrior):
    """Says what most of the pixels nearby are, the more of them the noisier the image."""

    def __init__(self):
        super().__init__(Contract(name="majority", channels="real", unit="object", level=0.7, sigma_min=1e-3))

    def denoise_channels(self, x, sigma):
        near = 0.8 + 1.2 * float(sigma[0])
        v, u = torch.meshgrid(*(torch.fft.fftfreq(side) for side in x.shape[-2:]), indexing="ij")
        mean = torch.fft.ifft2(torch.fft.fft2(x) * torch.exp(-2 * (math.pi * near) ** 2 * (u**2 + v**2))).real
        spread = float(sigma[0]) / (2 * math.sqrt(math.pi) * near)
        return torch.sigmoid((mean - 0.5) / (spread**2 + 0.05))


def smooth_prior(unit="object"):
    v, u = torch.meshgrid(*(torch.fft.fftfreq(SIZE) for _ in range(2)), indexing="ij")
    spectrum = 1 / (0.003 + u**2 + v**2)
    made = GaussianPrior(torch.full((SIZE, SIZE), 0.3), spectrum=0.2 * spectrum / spectrum.mean())
    made.contract = replace(made.contract, channels="real", unit=unit)
    return made


def test_path_lengths_are_those_of_the_disc(scan):
    lengths = CTOperator(GEOMETRY, (256, 256), 2 * PIXEL)(disc(256, 2 * PIXEL))
    found = PATH_LENGTH(above_air(scan))
    thick = lengths > 20
    assert float((found - lengths)[thick].mean()) == pytest.approx(0, abs=0.1)
    assert float(found[:, :AIR].median()) == pytest.approx(0, abs=0.1)


def test_the_polynomial_is_fitted_to_the_scan_itself():
    """Of a material that attenuates 4 % less; from lengths that are uncertain by 1 mm."""
    lengths = 70 * torch.rand(5000, generator=torch.Generator().manual_seed(1))
    p = hardened(0.96 * lengths)
    found = refitted(p, lengths + torch.randn(5000, generator=torch.Generator().manual_seed(2)))
    assert float((found(p) - lengths).abs().mean()) < 0.2
    assert float((PATH_LENGTH(p) - lengths).abs().mean()) > 1
    # What does not rise is no path length.
    assert refitted(p, -lengths) == PATH_LENGTH


@pytest.mark.parametrize("detectors", [560, 558, 563])
def test_binning_keeps_every_ray_where_it_was(detectors):
    geometry = replace(GEOMETRY, num_detectors=detectors, detector_offset=0.3)
    positions = torch.from_numpy(geometry.detector_positions).float()
    means, wider = binned(positions.expand(60, -1), geometry)
    assert wider.num_detectors == detectors // 4
    torch.testing.assert_close(means[0], torch.from_numpy(wider.detector_positions).float())


def test_edges_of_samples_are_placed_within_a_pixel():
    image = disc()
    coarse = torch.nn.functional.avg_pool2d(image[None, None], 4)[0, 0]
    wrong = (material(coarse) != image).float().mean()
    assert float(wrong) < 0.002


@pytest.fixture
def quick(monkeypatch):
    """The first candidates of a search that takes few steps."""
    monkeypatch.setattr(htc2022, "AGAIN", replace(AGAIN, nfe=4))
    monkeypatch.setattr(htc2022, "ROUNDS", 2)
    return replace(FIRST, nfe=8)


def test_a_disc_seen_all_around(scan, quick):
    settings = CTSettings(num_samples=3)
    found = segment(scan, Majority(), quick, settings)
    agreement = (found.segmentation == disc()).float().mean()
    assert float(agreement) > 0.985
    assert found.segmentation.dtype == torch.uint8
    assert found.probability.shape == (512, 512)
    assert 0 <= float(found.probability.min()) < 0.01
    assert 0.99 < float(found.probability.max()) <= 1
    # Within the narrowest arc of the challenge less is known, and the probability says so.
    limited = segment(scan, Majority(), quick, replace(settings, arc=math.pi / 6, start=1.0))

    def doubt(result: Segmentation) -> float:
        return float((result.probability * (1 - result.probability)).mean())

    assert doubt(limited) > 2 * doubt(found)


def test_the_search_goes_on_from_what_fits_best(scan, quick, monkeypatch):
    """More rounds never end with a larger energy, and say what they took; the same seed finds the same."""
    settings = CTSettings(num_samples=2, arc=math.pi / 3)
    monkeypatch.setattr(htc2022, "ROUNDS", 0)
    first = search(scan, Majority(), quick, settings)
    monkeypatch.setattr(htc2022, "ROUNDS", 2)
    told: list[tuple[int, int]] = []
    found = search(scan, Majority(), quick, settings, on_progress=lambda *at: told.append(at))
    assert [item.energy for item in found] == sorted(item.energy for item in found)
    assert 1 <= len(found) <= 2  # those that are alike count once
    assert found[0].energy < first[0].energy
    again = search(scan, Majority(), quick, settings)
    assert torch.equal(found[0].image, again[0].image)
    steps = [done for done, _ in told]
    assert steps == sorted(steps)
    assert told[-1] == (2 * (8 + 2 * 4) + 2 * 4,) * 2


def test_within_narrow_arcs_a_search_goes_on_from_what_two_have_found(scan, quick, monkeypatch):
    monkeypatch.setattr(htc2022, "ROUNDS", 1)
    starts: list[tuple[str, list[Candidate]]] = []

    def noted(source, found, count, name, on_step):
        ended = evolved(source, found, count, name, on_step)
        starts.append((name, found))
        return ended

    evolved = htc2022.evolved
    monkeypatch.setattr(htc2022, "evolved", noted)
    told: list[tuple[int, int]] = []
    settings = CTSettings(num_samples=2, arc=math.radians(40), start=math.radians(340))
    found = search(scan, Majority(), quick, settings, on_progress=lambda *at: told.append(at))
    assert [name for name, _ in starts] == ["0", "1", "all"]
    firsts, pool = [found for _, found in starts[:2]], starts[2][1]
    assert not torch.equal(firsts[0][0].image, firsts[1][0].image)
    assert found[0].energy <= min(one.energy for one in pool)
    assert min(one.energy for one in pool) <= min(one.energy for first in firsts for one in first)
    assert told[-1] == (2 * (8 + 4) + 4,) * 2
    # Within wide ones only if the first ends with an image that is ruled out.
    for misfit, names in ((math.inf, ["0"]), (0.0, ["0", "1", "all"])):
        starts.clear()
        monkeypatch.setattr(htc2022, "MISFIT", misfit)
        search(scan, Majority(), quick, CTSettings(num_samples=2, arc=math.pi / 2))
        assert [name for name, _ in starts] == names


def test_an_arc_may_run_through_zero():
    degrees = [350.0, 355.0, 0.0, 5.0, 10.0]
    geometry = replace(GEOMETRY, angles=tuple(map(math.radians, degrees)))
    assert arc_of(geometry) == pytest.approx(math.radians(20))
    assert arc_of(geometry.subset([1])) == pytest.approx(0.0)
    assert arc_of(replace(GEOMETRY, angles=tuple(map(math.radians, range(360))))) == pytest.approx(
        math.radians(359)
    )


def test_the_misfit_is_that_of_the_noise_for_the_true_image(scan):
    p, geometry = binned(above_air(scan), GEOMETRY)
    operator = CTOperator(geometry, (SIZE, SIZE), 512 * PIXEL / SIZE, rays_per_detector=4)
    source = Source(p, operator, smooth_prior(), NOISE, 0, "", torch.device("cpu"))
    image = torch.nn.functional.avg_pool2d(disc()[None], 4)[0]
    # Noise of 0.01 in each of four detector elements that are taken together, and what coarse pixels cost.
    right, wrong = source.candidates(torch.stack([image, image.roll(1, 0)]))
    assert 0.01 / NOISE / 2 < right.misfit < MISFIT
    assert wrong.misfit > 1.5 * right.misfit
    assert wrong.energy > 2 * right.energy
    # Half the sum of squares, and what the prior has against it.
    squares = p.numel() * right.misfit**2 / 2
    assert right.energy == pytest.approx(squares + float(surprise(source.prior, image[None])), rel=1e-4)


def test_the_surprise_is_the_logarithm_of_the_density():
    """Up to a constant, of a Gaussian whose widths lie well within the levels asked at."""
    prior = GaussianPrior(torch.zeros(SIZE, SIZE), spectrum=torch.full((SIZE, SIZE), 0.4**2))
    prior.contract = replace(prior.contract, channels="real", unit="object")
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    near, far = surprise(prior, torch.stack([0.4 * noise, 0.8 * noise])).tolist()
    expected = float((0.8**2 - 0.4**2) * noise.square().sum()) / 2 / 0.4**2
    # Three levels stand for the integral from 0.09 to 1.7.
    assert far - near == pytest.approx(expected, rel=0.15)


def test_candidates_that_are_alike_count_once():
    image = torch.zeros(SIZE, SIZE)
    near, far = image.clone(), image.clone()
    near[0, :3], far[0, :5] = 1, 1
    found = [Candidate(i, 1.0, e) for i, e in ((image, 1.0), (far, 1.3), (far, 1.2), (near, 1.1))]
    assert [one.energy for one in best(found, 5)] == [1.0, 1.2]
    assert [one.energy for one in best(found, 1)] == [1.0]


def test_an_image_that_does_not_fit_is_told():
    image = torch.nn.functional.avg_pool2d(disc()[None], 4)[0]
    good, bad = Candidate(image, MISFIT - 0.1), Candidate(1 - image, MISFIT + 0.1)
    made = segmented([good, bad], math.pi)
    assert made.warnings == ()
    far = (disc() == 1) & (torch.nn.functional.max_pool2d(1 - disc()[None], 11, 1, 5)[0] == 0)
    assert set(made.probability[far].unique().tolist()) == {0.5}
    (warning,) = segmented([bad], math.pi).warnings
    assert "no image was found that fits the data" in warning


def test_probabilities_are_doubtful_where_the_truth_may_be_elsewhere():
    """Beside edges, and at short arcs beside what may be another shape altogether."""
    image = torch.nn.functional.avg_pool2d(disc()[None], 4)[0]
    wide, short = (segmented([Candidate(image, 0.5)] * 2, math.radians(arc)) for arc in (90, 30))
    for made in (wide, short):
        assert float((made.segmentation == disc()).float().mean()) > 0.998
        assert torch.equal(made.segmentation == 1, made.probability > 0.5)
    # Row 255 runs through the middle: a pixel 4 inside the rim of 202 pixels, and one well inside.
    rim, inside = (255, 255 - 198), (255, 255 - 100)
    assert float(wide.probability[rim]) > 0.999
    assert float(short.probability[rim]) == pytest.approx(
        1 - 0.22 * (0.5 - 0.5 * math.erf(4 / 24 / 2**0.5)), abs=0.01
    )
    assert float(short.probability[inside]) > 0.999


def test_what_cannot_be_segmented(scan):
    with pytest.raises(ReconError, match=r"needs a prior of one material, such as 'discs'.*unit 'water'"):
        segment(scan, smooth_prior("water"))
    parallel = replace(scan, geometry=ParallelBeam(GEOMETRY.angles, 560, 0.2))
    with pytest.raises(ReconError, match="line integrals of a fan beam"):
        segment(parallel, smooth_prior())
    with pytest.raises(ReconError, match="does not say the size of a pixel"):
        segment(replace(scan, pixel_size=None), smooth_prior())


def test_what_is_written(tmp_path):
    path = tmp_path / "out" / "a.h5"
    probability = np.array([[0.2, 0.9]], dtype=np.float32)
    for _ in range(2):  # an earlier one is replaced
        write_segmentation(path, (probability > 0.5).astype(np.uint8), probability, {"seed": 1})
    segmentation, read = read_segmentation(path)
    assert segmentation.tolist() == [[0, 1]]
    np.testing.assert_array_equal(read, probability)
    with h5py.File(path) as file:
        assert file.attrs["provenance"] == '{"seed": 1}'
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["exchange/data"] = np.zeros(3)
    probability = np.zeros((2, 2), dtype=np.float32)
    with pytest.raises(ReconError, match="it is HDF5 and no earlier segmentation"):
        write_segmentation(path, probability.astype(np.uint8), probability, {})
    with pytest.raises(ReconError, match=r"scan\.h5: .*segmentation"):
        read_segmentation(path)
    with pytest.raises(ReconError, match=r"absent\.h5: cannot be read"):
        read_segmentation(tmp_path / "absent.h5")
    whole = probability.astype(np.uint8)
    for segmentation, chance, message in (
        (probability.astype(np.int32), probability, "is uint8"),
        (whole, probability + 2, "lie in"),
        (whole + np.uint8(3), probability, "be 0 or 1"),
        (whole[:1], probability, "one shape"),
    ):
        with pytest.raises(ReconError, match=message):
            write_segmentation(tmp_path / "b.h5", segmentation, chance, {})
    with pytest.raises(ReconError, match=r"b\.h5: cannot be written"):
        write_segmentation(path / "b.h5", whole, probability, {})
