"""Sampling masks: against those of the fastmri package, by counts and densities, and read back from data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import OperatorError
from operators.masks import Mask, make_mask, mask_from_array, mask_from_kspace

COLUMN_KINDS = ["random", "equispaced", "equispaced-fraction", "magic", "gaussian-1d"]
SAMPLE_KINDS = ["gaussian-2d", "uniform-2d", "poisson"]
EXACT_KINDS = ["gaussian-1d", *SAMPLE_KINDS]


def region(mask: Mask):
    assert mask.acs is not None
    return (slice(None), mask.acs) if isinstance(mask.acs, slice) else mask.acs


# Columns drawn by fastmri 0.3.0 with its seed for the file file1000001.h5, read as binary digits.
@pytest.mark.parametrize(
    ("kind", "width", "acceleration", "columns"),
    [
        ("random", 47, 4, 0x98881E08900),
        ("random", 64, 8, 0x3100001C0000040),
        ("equispaced", 47, 4, 0x88889E88888),
        ("equispaced", 64, 8, 0x10101011D0101010),
        ("magic", 47, 4, 0x444445E44444),
        ("magic", 64, 8, 0x4040405C4040404),
        ("equispaced-fraction", 47, 4, 0x82105E08410),
        ("equispaced-fraction", 64, 8, 0x10010011C0800800),
    ],
)
def test_masks_are_those_of_fastmri(kind, width, acceleration, columns):
    mask = make_mask(kind, (10, width), acceleration, seed="file1000001.h5")
    assert mask.mask.shape == (1, width)
    assert int("".join("01"[int(sampled)] for sampled in mask.mask[0]), 2) == columns


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(24, 70), st.integers(24, 70)),
    acceleration=st.sampled_from([2, 3.5, 4, 8]),
    seed=st.one_of(st.integers(0, 2**32 - 1), st.text(min_size=1)),
)
@pytest.mark.parametrize("kind", COLUMN_KINDS + SAMPLE_KINDS)
def test_every_mask(kind, shape, acceleration, seed):
    mask = make_mask(kind, shape, acceleration, seed=seed)
    assert mask.name == kind
    assert mask.mask.dtype == torch.bool
    assert mask.mask.shape == (shape if kind in SAMPLE_KINDS else (1, shape[1]))
    assert mask.mask[region(mask)].all()
    assert mask.acceleration == pytest.approx(mask.mask.numel() / int(mask.mask.sum()))
    fraction = 0.12 if kind in SAMPLE_KINDS else 0.32 / acceleration
    assert region(mask)[1].stop - region(mask)[1].start == round(shape[1] * fraction)
    np.random.seed(1)  # noqa: NPY002 - a mask must not depend on it
    assert torch.equal(make_mask(kind, shape, acceleration, seed=seed).mask, mask.mask)
    if kind in EXACT_KINDS:
        assert int(mask.mask.sum()) == round(mask.mask.numel() / acceleration)


@pytest.mark.parametrize("kind", ["random", "gaussian-1d", *SAMPLE_KINDS])
def test_seeds_give_different_masks(kind):
    masks = [make_mask(kind, (40, 60), 4, seed=seed).mask for seed in (0, 1, "a.h5", "b.h5")]
    assert len({mask.numpy().tobytes() for mask in masks}) == 4


def test_realised_acceleration():
    assert make_mask("equispaced", (640, 368), 4, seed=1).acceleration == pytest.approx(3.25, abs=0.03)
    assert make_mask("equispaced", (640, 368), 8, seed=1).acceleration == pytest.approx(6.24, abs=0.12)
    for seed in range(10):
        assert make_mask("equispaced-fraction", (640, 368), 4, seed=seed).acceleration == pytest.approx(
            4, abs=0.2
        )
        assert make_mask("equispaced-fraction", (640, 368), 8, seed=seed).acceleration == pytest.approx(
            8, abs=0.5
        )
    sampled = [int(make_mask("random", (640, 368), 4, seed=seed).mask.sum()) for seed in range(200)]
    # 339 columns with probability 63/339: a standard deviation of 7.2, of the mean over 200 of 0.5.
    assert np.mean(sampled) == pytest.approx(92, abs=2)
    assert np.std(sampled) == pytest.approx(7.2, abs=1.2)


@pytest.mark.parametrize("kind", COLUMN_KINDS + SAMPLE_KINDS)
def test_padding_columns_are_neither_sampled_nor_counted(kind):
    mask = make_mask(kind, (40, 100), 4, seed=3, valid_columns=(10, 80))
    assert not mask.mask[:, :10].any()
    assert not mask.mask[:, 80:].any()
    assert mask.acceleration == pytest.approx(mask.mask.shape[0] * 70 / int(mask.mask.sum()))
    if kind in EXACT_KINDS:
        assert int(mask.mask.sum()) == round(mask.mask.shape[0] * 70 / 4)
    cut = make_mask(kind, (40, 100), 2, center_fraction=0.3, seed=3, valid_columns=(42, 90))
    assert region(cut)[1] == slice(42, 65)


@pytest.mark.parametrize("acceleration", [4, 6])
def test_magic_never_samples_a_frequency_and_its_mirror(acceleration):
    for seed in range(6):
        mask = make_mask("magic", (8, 96), acceleration, seed=seed, center_fraction=0).mask[0]
        assert mask.sum() >= 96 // acceleration - 1
        mirrored = mask[1:].flip(0)  # index 48 is frequency zero, index 0 has no mirror
        assert not (mask[1:] & mirrored).any()


def test_gaussian_density():
    masks = torch.stack(
        [make_mask("gaussian-2d", (60, 90), 20, seed=s, center_fraction=0).mask for s in range(40)]
    )
    _, y, x = masks.nonzero(as_tuple=True)
    # Without replacement the density saturates a little in the middle, and the sides cut it at 3 sigma.
    assert float((y - 30).float().std()) == pytest.approx(60 / 6, rel=0.1)
    assert float((x - 45).float().std()) == pytest.approx(90 / 6, rel=0.1)


@pytest.mark.parametrize("acceleration", [4, 8])
def test_poisson_disc_keeps_distance_and_thins_outwards(acceleration):
    mask = make_mask("poisson", (120, 100), acceleration, seed=1).mask
    uniform = make_mask("uniform-2d", (120, 100), acceleration, seed=1).mask

    ring = ((torch.arange(120)[:, None] - 60) / 60) ** 2 + ((torch.arange(100) - 50) / 50) ** 2

    def adjacent(m):
        outer = m & (ring > 0.5)
        return int((outer[1:] & outer[:-1]).sum() + (outer[:, 1:] & outer[:, :-1]).sum())

    assert adjacent(mask) == 0
    assert adjacent(uniform) > 100
    density = [
        float(mask[(ring >= low) & (ring < low + 0.3)].float().mean()) for low in (0.1, 0.4, 0.7, 1.1, 1.5)
    ]
    assert density == sorted(density, reverse=True)
    assert density[0] > 2 * density[-1] > 0


@pytest.mark.parametrize("width", [64, 63])
@pytest.mark.parametrize("kind", COLUMN_KINDS + SAMPLE_KINDS)
def test_a_mask_is_read_back_from_kspace(kind, width):
    mask = make_mask(kind, (48, width), 4, seed=5)
    kspace = torch.randn(2, 3, 48, width, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    kspace[0, 0, 20, width // 2] = 0  # one coil of one slice may measure nothing
    found = mask_from_kspace(kspace * mask.mask, name="x")
    assert torch.equal(found.mask, mask.mask)
    assert found.acceleration == mask.acceleration
    assert found.name == "x"
    assert found.mask[region(found)].all()
    if kind in SAMPLE_KINDS:  # another rectangle may be larger
        assert found.mask[region(found)].numel() >= mask.mask[region(mask)].numel()
    else:
        assert region(found)[1].start <= region(mask)[1].start
        assert region(found)[1].stop >= region(mask)[1].stop


def test_calibration_region_of_given_masks():
    columns = torch.zeros(20)
    columns[[1, 5, 8, 9, 10, 11, 12, 15]] = 1  # the run 8 to 12 about the centre 10
    found = mask_from_array(columns)
    assert found.acs == slice(8, 13)
    assert found.acceleration == 20 / 8
    columns[12] = 0
    assert mask_from_array(columns).acs == slice(8, 12)
    columns[13] = columns[12] = columns[14] = 1  # what is farther to one side does not count
    assert mask_from_array(columns).acs == slice(8, 14)
    columns[10] = 0
    assert mask_from_array(columns).acs is None

    samples = np.zeros((30, 40), dtype=bool)
    samples[::4, ::4] = True
    samples[10:20, 15:25] = True
    assert mask_from_array(samples).acs == (slice(10, 20), slice(15, 25))
    samples[15] = True  # a full row is no calibration region
    assert mask_from_array(samples).acs == (slice(10, 20), slice(15, 25))
    full = mask_from_array(torch.ones(30, 40, dtype=torch.bool))
    assert full.mask.shape == (1, 40)
    assert full.acs == slice(0, 40)
    assert full.acceleration == 1


def test_accidental_zeros_are_not_a_pattern():
    kspace = torch.ones(1, 50, 40)
    kspace[..., ::3] = 0
    kspace[0, 7, 11] = 0
    assert mask_from_kspace(kspace).mask.shape == (1, 40)
    partial = torch.ones(1, 50, 40)
    partial[:, :10] = 0  # a partial echo is a pattern
    assert mask_from_kspace(partial).mask.sum() == 40 * 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "spiral"}, "unknown mask kind 'spiral'; the kinds are random, .*, poisson"),
        ({"acceleration": 1}, "acceleration of a random mask must be a number above 1, got 1"),
        ({"acceleration": float("nan")}, "above 1"),
        ({"center_fraction": 0.5}, "25 of 100 columns, fewer than the 50 of its fully sampled centre"),
        ({"kind": "poisson", "center_fraction": 0.6}, "1000 of 4000 samples, fewer than the 1440"),
        ({"center_fraction": 1.0}, "center_fraction"),
        ({"shape": (0, 100)}, r"\(H, W\)"),
        ({"seed": -1}, "seed"),
        ({"seed": ""}, "seed"),
        ({"valid_columns": (60, 90)}, "valid_columns"),
        ({"kind": "equispaced", "acceleration": 1000, "center_fraction": 0, "seed": 0}, "samples nothing"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OperatorError, match=message):
        make_mask(**{"kind": "random", "shape": (40, 100), "acceleration": 4, **arguments})


def test_bad_given_masks():
    with pytest.raises(OperatorError, match="samples nothing"):
        mask_from_array(torch.zeros(10))
    with pytest.raises(OperatorError, match="NaN"):
        mask_from_array(torch.full((10,), float("nan")))
    with pytest.raises(OperatorError, match=r"got \(2, 3, 4\)"):
        mask_from_array(torch.ones(2, 3, 4))
    with pytest.raises(OperatorError, match="zero everywhere"):
        mask_from_kspace(torch.zeros(2, 4, 4))
    with pytest.raises(OperatorError, match="shape"):
        mask_from_kspace(torch.ones(4))
