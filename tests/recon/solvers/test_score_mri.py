"""Score-MRI against the paper's steps worked out with dense matrices, and where they have a closed form."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from operators import CoilwiseMRI, SinglecoilMRI, fftc, ifftc
from priors import GaussianPrior
from recon import reconstruct
from recon.solvers.base import Problem, SolverError
from recon.solvers.score_mri import ScoreMRI
from tests.operators.helper import dense
from tests.recon.solvers import helper
from tests.recon.solvers.helper import (
    C128,
    Counting,
    SimultaneousNoise,
    covariance_of,
    keyed_noise,
    moments_of_the_code,
    normalised_coils_problem,
    randn,
    random_mask,
    samples_of,
)

SHAPE, N = (6, 5), 30

mask = partial(random_mask, SHAPE)
gaussian_prior = partial(helper.gaussian_prior, SHAPE, sigma_min=0.02)
problem = partial(normalised_coils_problem, SHAPE)
keyed = partial(keyed_noise, SHAPE)


class Tape:
    """Random noise for three items, every step number once, and a record of it in the order of use."""

    def __init__(self, *shape):
        self.shape, self.used, self.drawn = shape, set(), []

    def __call__(self, step):
        assert step not in self.used
        self.used.add(step)
        self.drawn.append(math.sqrt(2) * randn(3, *self.shape, seed=100 + step))
        return self.drawn[-1]


def moments_by_recursion(solver, given, prior):
    """The same by dense linear algebra, from the paper's equations, without a corrector."""
    A, identity = dense(given.operator, SHAPE), torch.eye(N, dtype=C128)
    normal, right = A.mH @ A, A.mH @ given.y.flatten()
    m, C = prior.mean.flatten(), covariance_of(prior)
    sigmas = solver.sigmas(prior, given.noise_std)
    mean = given.unfolded.flatten() if solver.start == "warm" else 0 * m
    covariance = sigmas[0] ** 2 * identity
    for sigma, lower in pairwise(sigmas):
        # x' = x + (sigma^2 - sigma'^2) score + sqrt(sigma^2 - sigma'^2) z, score = (C + sigma^2)^-1 (m - x)
        precision = torch.linalg.inv(C + sigma**2 * identity)
        variance = sigma**2 - lower**2
        mean = mean + variance * precision @ (m - mean)
        slope = identity - variance * precision
        covariance = slope @ covariance @ slope.mH + (variance if lower else 0.0) * identity
        # x <- x + A^H (y + c A w - A x)
        lacking = lower**2 - given.noise_std**2 if solver.consistency == "matched" else 0.0
        if lower or solver.consistency == "paper" or given.noise_std < 0.999 * sigma:
            mean = mean + right - normal @ mean
            covariance = (identity - normal) @ covariance @ (identity - normal)
            covariance = covariance + max(lacking, 0.0) * normal @ normal
    return mean, covariance


@pytest.mark.parametrize("consistency", ["clean", "matched", "paper"])
@pytest.mark.parametrize("noise_std", [0.2, 0.0])
@pytest.mark.parametrize("settings", [{}, {"start": "noise", "sigma_max": 20.0, "sigma_min": 0.1}])
def test_equal_to_the_dense_recursion(consistency, noise_std, settings):
    solver = ScoreMRI(steps=7, corrector_steps=0, consistency=consistency, **settings)
    given, prior = problem(noise_std), gaussian_prior()
    found = moments_of_the_code(solver, given, prior, 2 * 7)
    torch.testing.assert_close(found, moments_by_recursion(solver, given, prior), rtol=1e-8, atol=1e-8)
    assert float(found[1].diagonal().real.max()) > 1e-3


def paths_by_hand(solver, given, prior, tape, images):
    """What becomes of the noise on the tape, each item and image by itself, with dense matrices.

    Norms make a corrector step nonlinear, so paths are compared and not moments.
    """
    shape = given.operator.domain_shape
    A = dense(given.operator, shape)
    C, m = covariance_of(prior), prior.mean.flatten()
    sigmas = solver.sigmas(prior, given.noise_std)
    results = []
    for item in range(3):
        noise = iter([drawn[item].flatten() for drawn in tape.drawn])

        def consistent(x, level, noise=noise):
            y = given.y.flatten()
            if solver.consistency == "matched":
                y = y + math.sqrt(max(level**2 - given.noise_std**2, 0)) * A @ next(noise)
            return x + A.mH @ (y - A @ x)

        def score(x, level):
            precision = torch.linalg.inv(C + level**2 * torch.eye(N, dtype=C128))
            return torch.cat([precision @ (m - part) for part in x.chunk(images)])

        x = given.unfolded.flatten() + sigmas[0] * next(noise)
        for sigma, lower in pairwise(sigmas):
            x = x + (sigma**2 - lower**2) * score(x, sigma)
            if lower > 0:
                x = consistent(x + math.sqrt(sigma**2 - lower**2) * next(noise), lower)
                for _ in range(solver.corrector_steps):
                    s, z = score(x, lower), next(noise)
                    parts = []
                    for xi, si, zi in zip(x.chunk(images), s.chunk(images), z.chunk(images), strict=True):
                        eps = 2 * (solver.snr * float(zi.norm() / si.norm())) ** 2
                        parts.append(xi + eps * si + math.sqrt(2 * eps) * zi)
                    x = consistent(torch.cat(parts), lower)
            elif solver.consistency == "paper":
                x = consistent(x, lower)
        assert next(noise, None) is None
        results.append(x.reshape(shape))
    return torch.stack(results)


@pytest.mark.parametrize("consistency", ["clean", "matched", "paper"])
@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_paths_with_a_corrector(consistency, corrector_steps):
    solver = ScoreMRI(steps=5, corrector_steps=corrector_steps, snr=0.3, consistency=consistency)
    given, prior, tape = problem(), gaussian_prior(), Tape(*SHAPE)
    samples = samples_of(solver, given, prior, tape)
    expected = paths_by_hand(solver, given, prior, tape, 1)
    torch.testing.assert_close(samples, expected, rtol=1e-9, atol=1e-9)


def test_coil_images_have_corrector_steps_of_their_own():
    solver, prior, tape = ScoreMRI(steps=4, snr=0.3), gaussian_prior(), Tape(2, *SHAPE)
    given = Problem(mask() * randn(2, *SHAPE, seed=6), CoilwiseMRI(2, mask()).to(C128), 0.1)
    samples = samples_of(solver, given, prior, tape)
    torch.testing.assert_close(samples, paths_by_hand(solver, given, prior, tape, 2), rtol=1e-9, atol=1e-9)


def test_coil_by_coil_is_what_each_coil_gives_on_its_own():
    """Algorithm 7.2: coil images one by one, then the root of the sum of squares."""
    prior, tape = gaussian_prior(), Tape(2, *SHAPE)
    y = mask() * randn(2, *SHAPE, seed=6)
    operator = CoilwiseMRI(2, mask()).to(C128)
    solver = ScoreMRI(steps=4)
    together = samples_of(solver, Problem(y, operator, 0.1), prior, tape)
    for coil in range(2):
        replay = iter([drawn[:, coil] for drawn in tape.drawn])
        single = Problem(y[coil], SinglecoilMRI(mask()).to(C128), 0.1)
        alone = samples_of(solver, single, prior, lambda step, replay=replay: next(replay))
        torch.testing.assert_close(together[:, coil], alone)
    posterior = reconstruct(y, operator, prior, solver, noise_std=0.1, keep_samples=True)
    assert posterior.samples is not None
    assert posterior.samples.shape == (1, *SHAPE)
    assert not posterior.samples.is_complex()


def test_a_real_prior_sees_real_and_imaginary_part():
    """Two real images with the same real covariance are one complex image with it."""
    root = randn(N, N, seed=8, dtype=torch.float64) / math.sqrt(N)
    covariance = root @ root.mT
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    real = GaussianPrior(zero, covariance=covariance)
    both = GaussianPrior(zero.to(C128), covariance=covariance.to(C128))
    solver, noise = ScoreMRI(steps=6, sigma_max=2.0), keyed((0, 1))
    one, other = (solver.sample(problem(), prior, noise).samples for prior in (real, both))
    torch.testing.assert_close(one, other)
    assert float(one.imag.abs().max()) > 0.01


# Closed forms

SPECTRUM = torch.logspace(-2, 0.5, N, dtype=torch.float64).reshape(SHAPE)


def stationary_prior():
    """Independent Fourier coefficients, in the order of the operators' centred transform."""
    return GaussianPrior(torch.zeros(SHAPE, dtype=C128), spectrum=torch.fft.ifftshift(SPECTRUM), sigma_max=30)


@pytest.mark.parametrize("noise_std", [0.3, 0.02])
def test_single_coil_with_matched_noise(noise_std):
    """What was measured ends as its posterior mean, what was not as a draw from the prior."""
    prior, A = stationary_prior(), SinglecoilMRI(mask()).to(C128)
    y = mask() * randn(*SHAPE, seed=9)
    errors = []
    for steps in (40, 80):
        solver = ScoreMRI(steps, 0, sigma_max=30.0, start="noise", consistency="matched")
        noise = SimultaneousNoise(ifftc(torch.ones(SHAPE, dtype=C128)), 2 * steps)
        samples = fftc(samples_of(solver, Problem(y, A, noise_std), prior, noise))
        variance = (samples[1:] - samples[0]).abs().square().sum(0)
        wiener = SPECTRUM / (SPECTRUM + noise_std**2) * y
        torch.testing.assert_close(samples[0] * mask(), wiener)
        assert float(variance[mask()].max()) < 1e-12
        # The last step, from s to zero, has no noise, so a variance much below s^2 is lost.
        exact = SPECTRUM**2 / (SPECTRUM + noise_std**2)
        errors.append(float((variance / exact - 1)[~mask()].abs().max()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.2


def test_without_noise_the_data_are_met():
    A = SinglecoilMRI(mask()).to(C128)
    y = mask() * randn(*SHAPE, seed=9)
    for solver in (ScoreMRI(steps=6), ScoreMRI(steps=6, consistency="paper")):
        x = solver.sample(Problem(y, A, 0.0), stationary_prior(), keyed()).samples
        torch.testing.assert_close(A(x)[0], y)
    # The paper's form does so whatever the noise, the others leave the denoised image.
    noisy = Problem(y, A, 0.3)
    x = ScoreMRI(steps=6, consistency="paper").sample(noisy, stationary_prior(), keyed()).samples
    torch.testing.assert_close(A(x)[0], y)
    x = ScoreMRI(steps=6).sample(noisy, stationary_prior(), keyed()).samples
    assert float((A(x)[0] - y).norm()) > 0.01


def test_the_corrector_repairs_coarse_levels():
    """Without data, few predictor steps miss the prior's variance; Langevin steps bring it nearer."""
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=0.5)
    nothing = Problem(torch.zeros(SHAPE, dtype=C128), SinglecoilMRI(torch.zeros(SHAPE)).to(C128), 0.05)

    def variance(corrector_steps):
        solver = ScoreMRI(steps=8, corrector_steps=corrector_steps, snr=0.16)
        samples = solver.sample(nothing, prior, keyed(range(60))).samples
        return float(samples.abs().square().mean()) / 2

    # 60 * 30 complex numbers: a standard error of 2.4 per cent.
    without, with_them = variance(0), variance(20)
    assert abs(with_them / 0.5 - 1) < 0.5 * abs(without / 0.5 - 1)


# What a run costs and reports


def test_levels():
    prior = Counting()  # 0.002 to 20
    sigmas = ScoreMRI(steps=5).sigmas(prior, 0.0125)
    assert sigmas[0] == pytest.approx(2 * prior.contract.level)
    assert sigmas[-2:] == [pytest.approx(0.0125), 0.0]
    ratios = [b / a for a, b in pairwise(sigmas[:-1])]
    assert ratios == pytest.approx([ratios[0]] * 4)
    assert ScoreMRI().sigmas(prior, 1e-5)[-2] == pytest.approx(0.002)
    assert ScoreMRI(sigma_max=3.0, sigma_min=0.1).sigmas(prior, 0.01)[::39] == pytest.approx([3.0, 0.1])
    assert ScoreMRI(sigma_max=99.0).sigmas(prior, 0.01)[0] == pytest.approx(20)
    with pytest.raises(SolverError, match=r"need sigma_min <= sigma_max in the prior's range, got 3.0, 0.6"):
        ScoreMRI(sigma_min=3.0).sigmas(prior, 0.01)


def test_published_settings():
    paper, released = ScoreMRI.paper(), ScoreMRI.released()
    assert (paper.steps, paper.corrector_steps, paper.snr) == (2000, 1, 0.16)
    assert (paper.sigma_max, paper.sigma_min, paper.consistency) == (378.0, 0.01, "paper")
    assert paper.start == released.start == "noise"
    assert (released.steps, released.snr, released.consistency) == (500, 0.16, "paper")
    assert ScoreMRI.paper(steps=10).steps == ScoreMRI.released(steps=10).steps == 10
    wide = GaussianPrior(torch.zeros(SHAPE, dtype=C128), variance=1.0, sigma_min=1e-3, sigma_max=1e3)
    assert paper.sigmas(wide, 0.1)[::1999] == pytest.approx([378, 0.01])


def test_norms_up_to_the_root_of_two():
    """Within the bound data consistency does not expand; beyond it, it is refused."""
    ScoreMRI(steps=50, consistency="paper").sample(problem(norm=1.4142), gaussian_prior(), keyed())
    with pytest.raises(SolverError, match=r"ScoreMRI is stable up to an operator norm of 1.414"):
        ScoreMRI(steps=2).sample(problem(norm=1.6), gaussian_prior(), keyed())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"corrector_steps": -1}, "corrector_steps must be at least 0, got -1"),
        ({"snr": 0.0}, "snr must be positive, got 0.0"),
        ({"snr": math.nan}, "snr must be positive, got nan"),
        ({"sigma_max": -1.0}, "sigma_max must be positive, got -1.0"),
        ({"sigma_min": math.inf}, "sigma_min must be positive, got inf"),
        ({"start": "cold"}, "start is one of warm, noise, not 'cold'"),
        ({"consistency": "soft"}, "consistency is one of clean, matched, paper, not 'soft'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SolverError, match=f"ScoreMRI: {message}"):
        ScoreMRI(**settings)
