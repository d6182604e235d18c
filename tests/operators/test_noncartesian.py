"""The non-Cartesian operator against the plain sum, for every engine; calibration against known coils."""

import copy
import importlib.util
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import (
    MulticoilMRI,
    OperatorError,
    add_noise,
    birdcage_maps,
    check_adjoint,
    espirit_maps,
    fftc,
    ifftc,
)
from operators.noncartesian import (
    NonCartesianMRI,
    density_compensation,
    gridded_centre,
    noncartesian_maps,
    noncartesian_noise_std,
)
from operators.trajectories import radial, radial_density, spiral
from priors import GaussianPrior
from recon import DDS, ReconError, Scale, reconstruct
from recon.solvers import SOLVERS, make_solver, solver_class
from tests.operators.helper import dense, random_complex, relative_error

C64, C128 = torch.complex64, torch.complex128

needs_finufft = pytest.mark.skipif(
    importlib.util.find_spec("finufft") is None, reason="finufft is not installed"
)
every_engine = pytest.mark.parametrize(
    "engine", ["torchkbnufft", pytest.param("finufft", marks=needs_finufft)]
)

# Relative errors, with room for other sizes and trajectories.
ERROR = {
    ("torchkbnufft", C64): 2e-6,
    ("torchkbnufft", C128): 1e-11,
    ("finufft", C64): 1e-6,
    ("finufft", C128): 1e-11,
}

SIZES = [(1, 1), (1, 4), (6, 8), (7, 5), (8, 9), (31, 40)]


def random_trajectory(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(samples, 2, dtype=torch.float64, generator=generator) - 1) * math.pi


def plain_sum(images, k):
    """``(H W)^(-1/2) Σ_r x(r) exp(-i k·r)`` as it stands, ``(..., H, W)`` to ``(..., K)``."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, dtype=torch.float64) - height // 2
    columns = torch.arange(width, dtype=torch.float64) - width // 2
    phase = k[:, 0, None, None] * rows[:, None] + k[:, 1, None, None] * columns
    wave = torch.polar(torch.ones_like(phase), -phase).flatten(1)
    return images.to(C128).flatten(-2) @ wave.mT / math.sqrt(height * width)


def phantom(shape):
    """A disc with two smaller ones in it, complex, well inside the field of view."""
    v, u = torch.meshgrid(*(2 * (torch.arange(n) - n // 2) / n for n in shape), indexing="ij")
    image = (v**2 + u**2 < 0.45).float()
    image -= 0.5 * ((v - 0.2) ** 2 + (u + 0.25) ** 2 < 0.04)
    image += 0.7 * ((v + 0.3) ** 2 + (u - 0.1) ** 2 < 0.02)
    return torch.polar(image, 0.5 * v + 0.8 * u**2)


def unit_birdcage(coils, shape):
    maps = birdcage_maps(coils, shape)
    return maps / maps.abs().square().sum(0).sqrt()


# The operator


@every_engine
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [C64, C128])
def test_is_the_plain_sum(engine, shape, dtype):
    k, maps = random_trajectory(40), random_complex(3, *shape, seed=1, dtype=dtype)
    x, y = random_complex(2, *shape, dtype=dtype), random_complex(2, 3, 40, seed=2, dtype=dtype)
    A = NonCartesianMRI(maps, k, engine=engine)
    assert A.engine == engine
    assert relative_error(A(x), plain_sum(maps * x[:, None], k)) <= ERROR[engine, dtype]
    matrix = plain_sum(torch.eye(math.prod(shape), dtype=C128).reshape(-1, *shape), k).mT
    images = (y.to(C128) @ matrix.conj()).reshape(2, 3, *shape)
    assert relative_error(A.adjoint(y), (maps.conj() * images).sum(1)) <= ERROR[engine, dtype]


@every_engine
def test_is_the_plain_sum_on_a_large_image(engine):
    k = radial(4, 640)
    x = random_complex(1, 320, 319)
    A = NonCartesianMRI(torch.ones(1, 320, 319, dtype=C64), k, engine=engine)
    some = torch.arange(0, len(k), 29)
    assert relative_error(A(x[0])[:, some], plain_sum(x, k[some])) <= ERROR[engine, C64]


@every_engine
@pytest.mark.parametrize("shape", [(8, 6), (7, 9)])
def test_on_the_cartesian_grid_it_is_the_fft(engine, shape):
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) * (2 * math.pi / n) for n in shape]
    maps, x = random_complex(2, *shape, seed=1), random_complex(*shape)
    A = NonCartesianMRI(maps, torch.cartesian_prod(*axes), engine=engine)
    assert relative_error(A(x), fftc(maps * x).flatten(1)) <= 3e-6
    assert relative_error(A.adjoint(A(x)), (maps.conj() * ifftc(fftc(maps * x))).sum(0)) <= 3e-6
    torch.testing.assert_close(A.normal(x), maps.abs().square().sum(0) * x, rtol=1e-4, atol=1e-4)


@every_engine
@pytest.mark.parametrize(("dtype", "tolerance"), [(C64, 1e-5), (C128, 1e-10)])
@settings(deadline=None, max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    samples=st.integers(1, 30),
    coils=st.integers(1, 3),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_adjoint_matches(engine, dtype, tolerance, shape, samples, coils, batch, weighted, seed):
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(seed)) if weighted else None
    maps, k = random_complex(coils, *shape, seed=seed, dtype=dtype), random_trajectory(samples, seed)
    A = NonCartesianMRI(maps, k, weights=weights, engine=engine)
    assert check_adjoint(A, batch=batch, dtype=dtype, tolerance=tolerance, seed=seed) <= tolerance


@every_engine
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(C64, 1e-6), (C128, 1e-11)])
def test_toeplitz_is_exact(engine, shape, dtype, tolerance):
    k, maps = random_trajectory(40), random_complex(3, *shape, seed=1, dtype=dtype)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = random_complex(2, *shape, dtype=dtype)
    A = NonCartesianMRI(maps, k, weights=weights, engine=engine)
    wave = plain_sum(torch.eye(math.prod(shape), dtype=C128).reshape(-1, *shape), k).mT
    coil_images = (maps * x[:, None]).to(C128).flatten(2)
    projected = ((coil_images @ wave.mT) * weights**2) @ wave.conj()
    truth = (maps.conj() * projected.reshape(2, 3, *shape)).sum(1)
    assert relative_error(A.normal(x), truth) <= tolerance
    assert relative_error(A.normal(x), A.adjoint(A(x))) <= ERROR[engine, dtype]


@every_engine
def test_coils_in_blocks(engine, monkeypatch):
    maps, x = random_complex(2, 5, 8, 9, seed=1), random_complex(3, 2, 8, 9)
    A = NonCartesianMRI(maps, random_trajectory(50), engine=engine)
    whole = A.normal(x)
    # Two coils at a time of five leave a smaller last block.
    monkeypatch.setattr("operators.noncartesian._BLOCK", 2 * 15 * 18 // torch.get_num_threads() + 1)
    torch.testing.assert_close(A.normal(x), whole)


@every_engine
def test_weights_scale_the_samples(engine):
    k, maps, x = random_trajectory(30), random_complex(2, 6, 7, seed=1), random_complex(6, 7)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(4))
    weights[3] = 0
    A, B = NonCartesianMRI(maps, k, weights=weights, engine=engine), NonCartesianMRI(maps, k, engine=engine)
    torch.testing.assert_close(A(x), weights * B(x))
    y = random_complex(2, 30, seed=5)
    torch.testing.assert_close(A.adjoint(y), B.adjoint(weights * y))


@every_engine
def test_one_set_of_maps_a_slice(engine):
    maps, k = random_complex(3, 2, 8, 9, seed=1), random_trajectory(30)
    A = NonCartesianMRI(maps, k, engine=engine)
    assert A.batch_shape == (3,)
    x, y = random_complex(3, 8, 9), random_complex(2, 3, 2, 30)
    for i in range(3):
        B = NonCartesianMRI(maps[i], k, engine=engine)
        torch.testing.assert_close(A(x)[i], B(x[i]))
        torch.testing.assert_close(A(x[0])[i], B(x[0]))
        torch.testing.assert_close(A.normal(x)[i], B.normal(x[i]))
        torch.testing.assert_close(A.adjoint(y)[:, i], B.adjoint(y[:, i]))
    with pytest.raises(OperatorError, match="batch"):
        A(random_complex(2, 8, 9))


@every_engine
def test_gradient_is_the_adjoint(engine):
    maps, k = random_complex(2, 4, 5, seed=1, dtype=C128), random_trajectory(12)
    A = NonCartesianMRI(maps, k, engine=engine)
    for apply, adjoint, shape in (
        (A, A.adjoint, (3, 4, 5)),
        (A.adjoint, A, (3, 2, 12)),
        (A.normal, A.normal, (3, 4, 5)),
    ):
        x = random_complex(*shape, dtype=C128).requires_grad_()
        y = apply(x)
        v = random_complex(*y.shape, seed=3, dtype=C128)
        (gradient,) = torch.autograd.grad(y, x, v)
        torch.testing.assert_close(gradient, adjoint(v))
    x = random_complex(4, 5, dtype=C128).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: A(x).abs().square().sum(), x)
    assert not NonCartesianMRI(maps.requires_grad_(), k, engine=engine)(x.detach()).requires_grad


@every_engine
def test_precision_there_and_back(engine):
    maps, x = random_complex(2, 6, 7, seed=1), random_complex(6, 7)
    A = NonCartesianMRI(maps, random_trajectory(30), weights=torch.rand(30), engine=engine)
    single, normal = A(x), A.normal(x)
    double = A.to(torch.float64)(x.to(C128))
    assert double.dtype == C128
    assert relative_error(single, double) < ERROR[engine, C64]
    assert relative_error(normal, A.normal(x.to(C128))) < 1e-6
    A.to(C64)
    # The positions were never rounded.
    assert {A.trajectory.dtype, dict(A.named_buffers())["weights"].dtype} == {torch.float64}
    assert torch.equal(A.trajectory, random_trajectory(30))
    assert torch.equal(A(x), single)


@every_engine
def test_survives_pickle_and_copy(engine):
    A = NonCartesianMRI(random_complex(2, 6, 7), random_trajectory(30), engine=engine)
    x = random_complex(6, 7)
    before = A(x), A.normal(x)
    for B in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        assert torch.equal(B(x), before[0])
        assert torch.equal(B.normal(x), before[1])


@every_engine
def test_more_threads_leave_nothing_to_chance(engine):
    A = NonCartesianMRI(random_complex(5, 40, 40), radial(40, 80), engine=engine)
    y = random_complex(5, 3200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = A.adjoint(y)
        assert all(torch.equal(A.adjoint(y), first) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    assert relative_error(A.adjoint(y), first) < 1e-5


def test_inputs_and_copies_are_left_alone():
    maps, k, x = random_complex(2, 6, 7), random_trajectory(9), random_complex(6, 7)
    weights = torch.rand(9)
    A = NonCartesianMRI(maps, k, weights=weights)
    y = A(x)
    kept = x.clone(), y.clone()
    A.adjoint(y), A.normal(x).zero_(), A(x).zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    for tensor in (maps, k, weights):
        tensor.zero_()
    assert torch.equal(A(x), kept[1])


def test_what_a_person_looks_at_is_within_the_maps():
    maps = random_complex(2, 6, 7)
    maps[:, :2] = 0
    A = NonCartesianMRI(maps, random_trajectory(9))
    x = random_complex(3, 6, 7)
    assert A.num_coils == 2
    assert not A.support[:2].any()
    assert A.support[2:].all()
    assert torch.equal(A.to_image(x), x * A.support)


# The engines


def test_auto_takes_finufft_on_the_cpu_where_it_is_installed(monkeypatch):
    make = lambda engine="auto": NonCartesianMRI(random_complex(1, 4, 4), random_trajectory(5), engine=engine)  # noqa: E731
    installed = importlib.util.find_spec("finufft") is not None
    assert make().engine == ("finufft" if installed else "torchkbnufft")
    assert make().to("meta").engine == "torchkbnufft"
    assert make("torchkbnufft").engine == "torchkbnufft"
    if installed:
        with pytest.raises(OperatorError, match="on the CPU, not on meta"):
            make("finufft").to("meta")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make().engine == "torchkbnufft"
    with pytest.raises(OperatorError, match="finufft, which is not installed"):
        make("finufft")
    with pytest.raises(OperatorError, match="auto, torchkbnufft, finufft, not 'nfft'"):
        make("nfft")


# Density compensation


def test_density_of_a_cartesian_grid_is_one():
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) * (2 * math.pi / n) for n in (12, 9)]
    # For fewer pixels the cells are larger, and the same samples stand for parts of them.
    for shape, area, tolerance in (((12, 9), 1.0, 3e-3), ((6, 9), 0.5, 0.05), ((2, 9), 1 / 6, 0.05)):
        weight = density_compensation(torch.cartesian_prod(*axes), shape, iterations=5)
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, torch.full_like(weight, area), rtol=tolerance, atol=0)


def test_density_of_spokes_is_the_ramp():
    spokes, readout, shape = 80, 96, (48, 48)
    numeric = density_compensation(radial(spokes, readout, golden_angle=False), shape)
    exact = radial_density(spokes, readout, shape, golden_angle=False)
    numeric, exact = (w.reshape(spokes, readout).mean(0) for w in (numeric, exact))
    inner = slice(8, -8)  # at the rim, a sample of the numerical one also stands for what is outside
    torch.testing.assert_close(numeric[inner].sum(), exact[inner].sum(), rtol=0.02, atol=0)
    assert float((numeric - exact)[inner].abs().max() / exact.max()) < 0.08


@pytest.mark.parametrize("make", ["radial", "spiral"])
def test_compensated_adjoint_is_the_image(make):
    shape = (48, 48)
    k = radial(90, 96) if make == "radial" else spiral(8, 700, 4)
    # Smooth, so that nothing of it is outside the disc that the trajectory covers.
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    x = torch.exp(-8 * ((v - 0.1) ** 2 + 2 * u**2)).to(C64)
    A = NonCartesianMRI(torch.ones(1, *shape, dtype=C64), k)
    weight = density_compensation(k, shape)
    assert relative_error(A.adjoint(weight.float() * A(x)), x) < 0.02
    B = NonCartesianMRI(torch.ones(1, *shape, dtype=C64), k, weights=weight.sqrt())
    assert A.norm(max_iterations=30) > 4
    assert B.norm(max_iterations=30) < 1.4  # more than 1, because of the rim


# Calibration and noise


@pytest.fixture(scope="module")
def scan():
    """A phantom of 64 x 60 pixels, seen by 6 coils on 48 spokes, with noise."""
    shape = (64, 60)
    maps, k = unit_birdcage(6, shape), radial(48, 128)
    x = phantom(shape)
    clean = NonCartesianMRI(maps, k)(x)
    noise = 0.02
    return x, maps, k, clean, add_noise(clean, noise, torch.Generator().manual_seed(0)), noise


def test_centre_is_that_of_cartesian_kspace(scan):
    x, maps, k, clean, _, _ = scan
    truth = fftc(maps * x)
    kspace, (rows, columns) = gridded_centre(clean, k, x.shape)
    assert kspace.shape == truth.shape
    assert (rows.start + rows.stop) // 2 == 32
    assert (columns.start + columns.stop) // 2 == 30
    assert 20 <= rows.stop - rows.start <= 32
    assert relative_error(kspace[:, rows, columns], truth[:, rows, columns]) < 0.02
    kspace[:, rows, columns] = 0
    assert (kspace == 0).all()


@pytest.mark.parametrize("size", [11, 16])
def test_centre_of_a_given_size_needs_samples_near_it_only(scan, size):
    x, maps, k, clean, _, _ = scan
    kspace, region = gridded_centre(clean, k, x.shape, size)
    assert [part.stop - part.start for part in region] == [size, size]
    assert relative_error(kspace[(..., *region)], fftc(maps * x)[(..., *region)]) < 0.01
    far = (k * torch.tensor([64.0, 60.0]) / (2 * math.pi)).abs().amax(-1) > size / 2 + 6
    spoilt = clean.masked_fill(far, 1e3)
    assert torch.equal(gridded_centre(spoilt, k, x.shape, size)[0], kspace)
    silent = clean * (torch.arange(6) != 2)[:, None]
    assert (gridded_centre(silent, k, x.shape, size)[0][2] == 0).all()
    with pytest.raises(OperatorError, match="zero at the centre"):
        gridded_centre(0 * clean, k, x.shape, size)
    batch = gridded_centre(torch.stack([clean, 2 * clean]), k, x.shape, size)[0]
    torch.testing.assert_close(batch[1], 2 * kspace, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spokes", [8, 16, 40])
def test_the_centre_ends_where_the_trajectory_leaves_gaps(spokes):
    k = radial(spokes, 128)
    rows, columns = gridded_centre(random_complex(1, len(k)), k, (64, 64))[1]
    size = rows.stop - rows.start
    assert (rows.start, rows.stop) == (columns.start, columns.stop) == (32 - size // 2, 32 + (size + 1) // 2)

    def gap(n):
        axis = torch.arange(n, dtype=torch.float64) - n // 2
        return float(torch.cdist(torch.cartesian_prod(axis, axis), k * 32 / math.pi).amin(1).max())

    assert gap(size) <= 1.2
    assert size == 32 or gap(size + 1) > 1.2


def test_maps_are_those_of_the_coils(scan):
    x, true, k, _, y, noise = scan
    maps = noncartesian_maps(y, k, x.shape, noise_std=noise)
    inside = x.abs() > 0.3
    overlap = (maps.conj() * true).sum(0).abs()[inside]
    assert float((1 - overlap.square()).clamp_min(0).mean().sqrt()) < 0.03
    # As good as from Cartesian k-space of the same size.
    region = gridded_centre(y, k, x.shape)[1]
    generator = torch.Generator().manual_seed(1)
    cartesian = espirit_maps(add_noise(fftc(true * x), noise, generator), region, noise_std=noise)
    reference = (cartesian.conj() * true).sum(0).abs()[inside]
    assert overlap.square().mean() > reference.square().mean() - 1e-3
    assert torch.equal(noncartesian_maps(y, k, x.shape, noise_std=noise, crop=0.0) != 0, true != 0)


def test_noise_of_the_centre_is_passed_on(scan, monkeypatch):
    x, _, k, _, _, noise = scan
    seen = {}

    def spy(kspace, region, noise_std, **_):
        seen["noise"], seen["std"] = noise_std, kspace[(..., *region)]
        return kspace

    monkeypatch.setattr("operators.noncartesian.espirit_maps", spy)
    y = add_noise(torch.zeros(20, len(k), dtype=C64), noise, torch.Generator().manual_seed(3))
    noncartesian_maps(y, k, x.shape, noise_std=noise)
    measured = float(torch.view_as_real(seen["std"]).std())
    assert seen["noise"] == pytest.approx(measured, rel=0.1)
    assert measured < noise  # many samples there


def test_noise_level_from_the_edge(scan):
    _, _, k, _, y, noise = scan
    pure = add_noise(torch.zeros(4, len(k), dtype=C64), 0.3, torch.Generator().manual_seed(1))
    assert noncartesian_noise_std(pure, k) == pytest.approx(0.3, rel=0.05)
    radius = k.norm(dim=-1)
    inner = radius < 0.9 * radius.max()
    assert noncartesian_noise_std(pure.masked_fill(inner, 1e4), k) == noncartesian_noise_std(pure, k)
    assert noncartesian_noise_std(pure.masked_fill(~inner & (k[:, 0] > 0), 0), k) == pytest.approx(
        0.3, rel=0.1
    )
    assert noise < noncartesian_noise_std(y, k) < 3 * noise  # signal can only raise it
    with pytest.raises(OperatorError, match="zero at the edge"):
        noncartesian_noise_std(pure.masked_fill(~inner, 0), k)


def test_noise_level_of_weighted_data():
    k, shape = radial(60, 64), (32, 32)
    weights = radial_density(60, 64, shape).sqrt()
    maps = torch.ones(1, *shape, dtype=C64)
    A = NonCartesianMRI(maps, k, weights=weights)
    noise = add_noise(torch.zeros(50, 1, len(k), dtype=C64), 0.3, torch.Generator().manual_seed(0))
    assert NonCartesianMRI(maps, k).noise_std(noise) == pytest.approx(0.3, rel=0.02)
    weighted = weights.float() * noise
    # The adjoint's image holds that level in the part of k-space that was sampled, nearly a disc.
    image = A.adjoint(weighted)
    share = float(weights.square().sum()) / 32**2
    assert share == pytest.approx(math.pi / 4, rel=0.05)
    assert A.noise_std(weighted) == pytest.approx(float(image.real.std()) / math.sqrt(share), rel=0.03)
    # A sample without weight says nothing, and must not.
    weights[k.norm(dim=-1) > 3] = 0
    assert NonCartesianMRI(maps, k, weights=weights).noise_std(weights.float() * noise) > 0


# What is refused


@pytest.mark.parametrize(
    ("maps", "trajectory", "options", "message"),
    [
        (torch.ones(3, 6, 7), random_trajectory(5), {}, r"complex coil maps, got torch\.float32"),
        (random_complex(6, 7), random_trajectory(5), {}, r"\(\.\.\., C, H, W\), got \(6, 7\)"),
        (random_complex(3, 6, 7) / 0, random_trajectory(5), {}, "NaN or infinite"),
        (random_complex(3, 6, 7), random_trajectory(5).T, {}, r"\(K, 2\).*got \(2, 5\)"),
        (random_complex(3, 6, 7), torch.zeros(0, 2), {}, "at least one sample"),
        (random_complex(3, 6, 7), torch.zeros(5, 2, dtype=torch.int64), {}, "got torch.int64"),
        (random_complex(3, 6, 7), torch.full((5, 2), math.nan), {}, "trajectory has NaN"),
        (random_complex(3, 6, 7), 2 * random_trajectory(50), {}, "within -π and π; this one reaches"),
        (random_complex(3, 6, 7), random_trajectory(5), {"weights": torch.ones(4)}, "each of the 5 samples"),
        (random_complex(3, 6, 7), random_trajectory(5), {"weights": -torch.ones(5)}, "not negative"),
        (random_complex(3, 6, 7), random_trajectory(5), {"weights": torch.ones(5) / 0}, "finite"),
    ],
)
def test_what_makes_no_operator(maps, trajectory, options, message):
    with pytest.raises(OperatorError, match=message):
        NonCartesianMRI(maps, trajectory, **options)


def test_data_that_do_not_fit():
    k = random_trajectory(5)
    A = NonCartesianMRI(random_complex(3, 6, 7), k)
    for apply, wrong in ((A, (7, 6)), (A.normal, (6,)), (A.adjoint, (3, 4)), (A.adjoint, (2, 5))):
        with pytest.raises(OperatorError, match=str(wrong[-1])):
            apply(random_complex(*wrong))
    with pytest.raises(OperatorError, match=r"complex64, got a tensor of torch\.complex128"):
        A(random_complex(6, 7, dtype=C128))
    with pytest.raises(OperatorError, match=r"\(\.\.\., C, 5\), got torch\.complex64 \(3, 4\)"):
        gridded_centre(random_complex(3, 4), k, (6, 7))
    with pytest.raises(OperatorError, match=r"\(\.\.\., 5\), got torch\.float32 \(5,\)"):
        noncartesian_noise_std(torch.ones(5), k)
    for shape in ((-6, 6), (6, 0)):
        with pytest.raises(OperatorError, match=r"\(H, W\)"):
            gridded_centre(random_complex(3, 5), k, shape)
        with pytest.raises(OperatorError, match=r"\(H, W\)"):
            density_compensation(k, shape)
    with pytest.raises(OperatorError, match="at least one iteration"):
        density_compensation(k, (6, 7), iterations=0)
    with pytest.raises(OperatorError, match="side of 3 samples, and 4 to 6"):
        gridded_centre(random_complex(3, 5), k, (6, 7), 3)
    with pytest.raises(OperatorError, match="side of 0 samples"):
        gridded_centre(random_complex(1, 2), torch.full((2, 2), 3.0), (64, 64))


# Reconstruction


def small_problem(weighted):
    """10 spokes of a phantom of 16 x 16; weighted, the norm is 1."""
    shape, noise = (16, 16), 0.05
    maps, k, x = unit_birdcage(3, shape), radial(10, 32), phantom(shape)
    y = add_noise(NonCartesianMRI(maps, k)(x), noise, torch.Generator().manual_seed(0))
    if not weighted:
        return x, y, NonCartesianMRI(maps, k), noise
    weight = density_compensation(k, shape)
    root = weight.sqrt() / NonCartesianMRI(maps, k, weights=weight.sqrt()).norm()
    A = NonCartesianMRI(maps, k, weights=root)
    return x, root.float() * y, A, A.noise_std(root.float() * y)


def test_scale_of_an_image_needs_no_normalised_operator(scan):
    x, maps, k, _, y, _ = scan
    truth = Scale.estimate(fftc(maps * x), MulticoilMRI(maps, torch.ones(x.shape)), 1.0)
    for spokes in (48, 24):
        part = slice(0, spokes * 128)
        found = Scale.estimate(y[:, part], NonCartesianMRI(maps, k[part]), 1.0)
        assert found.factor == pytest.approx(truth.factor, rel=0.02)
        assert found.phase == pytest.approx(truth.phase, abs=0.02)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_that_needs_no_mask_runs(name):
    kind = solver_class(name)
    if kind.needs.projection:
        pytest.skip("replaces what was measured, which a non-Cartesian scan does not allow")
    if kind.needs.volume:
        pytest.skip("works on volumes")
    if name == "fbp" or "complex" not in kind.needs.images:
        pytest.skip("inverts line integrals")
    settings = {"dps": {"nfe": "50"}, "twisted-smc": {"particles": "4", "steps": "20"}}
    solver = make_solver(name, None, settings.get(name))
    x, y, A, noise = small_problem(weighted=kind.needs.max_norm is not None)
    v, u = torch.meshgrid(*(torch.fft.fftfreq(n) for n in x.shape), indexing="ij")
    prior = GaussianPrior(0 * x, spectrum=0.01 / (0.02 + v**2 + u**2))
    posterior = reconstruct(y, A, prior if kind.needs.prior else None, solver, noise_std=noise)
    assert posterior.mean.shape == x.shape
    empty = float(y.abs().square().mean() / 2) ** 0.5
    assert posterior.residual < 0.5 * empty


def test_a_solver_that_needs_a_small_norm_says_so():
    _, y, A, noise = small_problem(weighted=False)
    prior = GaussianPrior(torch.zeros(A.domain_shape, dtype=C64), spectrum=torch.ones(A.domain_shape))
    with pytest.raises(ReconError, match="operator norm"):
        reconstruct(y, A, prior, make_solver("score-mri"), noise_std=noise)


def test_default_conjugate_gradient_steps_of_dds_are_enough():
    """The centre of k-space is sampled many times over, and the problem conditioned accordingly."""
    _, y, A, noise = small_problem(weighted=False)
    assert A.norm() > 4
    shape = A.domain_shape
    v, u = torch.meshgrid(*(torch.fft.fftfreq(n) for n in shape), indexing="ij")
    spectrum = 0.01 / (0.02 + v**2 + u**2)
    prior = GaussianPrior(torch.zeros(shape, dtype=C64), spectrum=spectrum)
    default, converged = (
        reconstruct(
            y, A, prior, solver, num_samples=16, noise_std=noise, scale=Scale(1.0), micro_batch=16
        ).mean
        for solver in (DDS(), DDS(cg_iterations=200, cg_tolerance=0.0))
    )
    # The mean of the posterior, in closed form: per real component the prior has F^H diag(spectrum) F.
    fourier = dense(lambda x: torch.fft.fft2(x, norm="ortho"), shape)
    matrix = dense(A.to(C128), shape)
    precision = (fourier.mH / spectrum.flatten()) @ fourier + matrix.mH @ matrix / noise**2
    mean = torch.linalg.solve(precision, matrix.mH @ y.flatten().to(C128) / noise**2).reshape(shape)
    # What is left is the approximation that DDS is, the same as for a Cartesian scan.
    assert relative_error(default, mean) < 1.05 * relative_error(converged, mean) < 0.25
