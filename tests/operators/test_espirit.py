"""ESPIRiT: against sigpy, against maps that are known, and the properties that maps must have."""

import math
import warnings

import numpy as np
import pytest
import sigpy.mri
import torch

from operators import espirit
from operators.errors import OperatorError
from operators.espirit import CalibrationWarning, calibration_residual, espirit_maps
from operators.fft import fftc, ifftc
from operators.simulation import random_smooth_maps, simulate_kspace, smooth_phase


def textured_ellipse(height, width):
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    texture = 1 + 0.3 * torch.sin(9 * x + 4 * y) + 0.3 * torch.sin(23 * y) * torch.cos(17 * x)
    inside = (y / 0.8) ** 2 + (x / 0.7) ** 2 < 1
    return torch.polar(inside * texture, smooth_phase((height, width), 1))


def acquisition(num_coils, height, width, *, noise_std=0.0, seed=0):
    """Return the image, the true maps and k-space."""
    image, maps = textured_ellipse(height, width), random_smooth_maps(num_coils, (height, width), 0)
    return image, maps, simulate_kspace(image, maps, noise_std, seed)


def centre(height, width, rows=24, columns=24):
    return tuple(slice(n // 2 - m // 2, n // 2 - m // 2 + m) for n, m in ((height, rows), (width, columns)))


def misalignment(a, b):
    """1 - |<a, b>| of the coil vectors of every pixel."""
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    return 1 - (a.conj() * b).sum(dim=0).abs() / (a.norm(dim=0) * b.norm(dim=0))


def separated(kspace, acs):
    """Pixels with lambda_1 > 0.95 of the largest and lambda_2 / lambda_1 < 0.7, from G in full."""
    basis = espirit._patch_basis(kspace[(..., *acs)], (6, 6), 0.02, 0.0)
    padded = torch.zeros(len(basis), *kspace.shape, dtype=torch.complex128)
    padded[..., :6, :6] = basis
    spectrum = torch.fft.fftshift(torch.fft.ifft2(padded), dim=(-2, -1))
    values = torch.linalg.svdvals(spectrum.permute(2, 3, 0, 1)) ** 2
    return (values[..., 0] > 0.95 * values[..., 0].max()) & (values[..., 1] < 0.7 * values[..., 0])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (165, 40), (51, 70)])
def test_agrees_with_sigpy(shape, exact):
    _, _, kspace = acquisition(5, *shape, noise_std=0.01)
    reference = sigpy.mri.app.EspiritCalib(kspace.numpy(), crop=0, show_pbar=False).run()
    maps = espirit_maps(kspace, centre(*shape), crop=0, exact=exact)
    chosen = separated(kspace, centre(*shape))
    assert chosen.sum() > 0.2 * chosen.numel()
    assert misalignment(maps, torch.from_numpy(np.ascontiguousarray(reference)))[chosen].max() <= 1e-5


@pytest.mark.parametrize("shape", [(330, 41), (167, 203), (90, 180)])
def test_coarse_to_fine_is_exact_where_eigenvalues_are_separated(shape):
    _, _, kspace = acquisition(4, *shape, noise_std=0.01)
    coarse, coarse_value = espirit_maps(kspace, centre(*shape), crop=0, return_eigenvalues=True)
    exact, value = espirit_maps(kspace, centre(*shape), crop=0, exact=True, return_eigenvalues=True)
    chosen = separated(kspace, centre(*shape))
    assert misalignment(coarse, exact)[chosen].max() <= 1e-5
    # The phase comes with the maps: not only the subspaces agree.
    torch.testing.assert_close(coarse[:, chosen], exact[:, chosen], atol=3e-3, rtol=0)
    torch.testing.assert_close(coarse_value[chosen], value[chosen], atol=1e-3, rtol=0)


def test_recovers_the_true_maps():
    image, maps, kspace = acquisition(6, 96, 80)
    error = misalignment(espirit_maps(kspace, centre(96, 80)), maps)[image.abs() > 0]
    assert error.mean() < 2e-5
    assert error.max() < 2e-3


def test_uniform_coils_give_their_constant():
    gains = torch.tensor([1.0, 0.5j, -0.7 + 0.2j, 0.1], dtype=torch.complex128)
    image = textured_ellipse(40, 36)
    kspace = fftc(gains[:, None, None] * image.to(torch.complex128))
    maps, eigenvalues = espirit_maps(kspace, centre(40, 36), return_eigenvalues=True)
    # The principal component is the gains themselves, and its largest entry, the first, is positive.
    expected = (gains / gains.norm())[:, None, None].expand(4, 40, 36)
    assert maps.dtype == torch.complex128
    support = eigenvalues > 0.8 * eigenvalues.max()
    assert support[image.abs() > 0].all()
    torch.testing.assert_close(maps, expected * support)


def test_uses_the_calibration_region_only():
    _, _, kspace = acquisition(4, 60, 50)
    for acs in (centre(60, 50), slice(14, 36)):
        region = (..., slice(None), acs) if isinstance(acs, slice) else (..., *acs)
        other = torch.full_like(kspace, float("nan"))
        other[region] = kspace[region]
        assert torch.equal(espirit_maps(other, acs), espirit_maps(kspace, acs))


def test_a_slice_of_columns_uses_the_central_rows():
    _, _, kspace = acquisition(4, 80, 50)
    assert torch.equal(
        espirit_maps(kspace, slice(14, 36)), espirit_maps(kspace, (slice(16, 64), slice(14, 36)))
    )


def test_unit_norm_in_the_support_and_phase_of_the_principal_component():
    _, _, kspace = acquisition(6, 96, 84)
    acs = centre(96, 84)
    maps, eigenvalues = espirit_maps(kspace, acs, return_eigenvalues=True)
    support = eigenvalues > 0.8 * eigenvalues.max()
    assert 0.2 < support.float().mean() < 0.99
    assert 0.9 < eigenvalues.max() < 1.001
    norm = maps.norm(dim=0)
    torch.testing.assert_close(norm[support], torch.ones_like(norm[support]))
    assert (maps[:, ~support] == 0).all()
    principal = torch.linalg.svd(kspace[(..., *acs)].flatten(1))[0][:, 0]
    component = (principal.conj()[:, None, None] * maps).sum(0)[support]
    assert component.abs().min() > 1e-3
    torch.testing.assert_close(
        component / component[0], (component / component[0]).abs().to(component), atol=1e-3, rtol=0
    )


def test_crop_is_relative_to_the_largest_eigenvalue():
    _, _, kspace = acquisition(6, 60, 50)
    _, eigenvalues = espirit_maps(kspace, centre(60, 50), return_eigenvalues=True)
    for crop in (0.5, 0.99):
        maps = espirit_maps(kspace, centre(60, 50), crop=crop)
        assert torch.equal((maps != 0).any(dim=0), eigenvalues > crop * eigenvalues.max())


def test_scale_and_phase_of_kspace_do_not_matter():
    _, _, kspace = acquisition(4, 60, 50, noise_std=0.01)
    maps = espirit_maps(kspace, centre(60, 50), crop=0)
    other = espirit_maps(kspace * (3e-6 * np.exp(1j)), centre(60, 50), crop=0)
    chosen = separated(kspace, centre(60, 50))
    torch.testing.assert_close(other[:, chosen], maps[:, chosen], atol=1e-3, rtol=0)


def test_batch():
    kspace = torch.stack([acquisition(4, 60, 50, noise_std=0.01, seed=seed)[2] for seed in range(6)])
    maps = espirit_maps(kspace.reshape(2, 3, 4, 60, 50), centre(60, 50))
    assert maps.shape == (2, 3, 4, 60, 50)
    assert torch.equal(maps[1, 2], espirit_maps(kspace[5], centre(60, 50)))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_and_are_left_as_they_were(threads):
    _, _, kspace = acquisition(4, 170, 90, noise_std=0.01)
    before = torch.get_num_threads()
    try:
        maps = espirit_maps(kspace, centre(170, 90))
        torch.set_num_threads(threads)
        assert torch.equal(espirit_maps(kspace, centre(170, 90)), maps)
        with pytest.raises(OperatorError):
            espirit_maps(0 * kspace, centre(170, 90))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_one_coil():
    _, _, kspace = acquisition(1, 60, 50)
    maps = espirit_maps(kspace, centre(60, 50))
    support = maps[0] != 0
    torch.testing.assert_close(maps[0][support], torch.ones_like(maps[0][support]))


@pytest.mark.parametrize(("columns", "kernel"), [(13, 5), (9, 3), (7, 2), (3, 2)])
def test_a_narrow_region_shrinks_the_kernel_and_says_so(columns, kernel):
    image, maps, kspace = acquisition(6, 96, 80)
    acs = slice(40 - columns // 2, 40 - columns // 2 + columns)
    with pytest.warns(CalibrationWarning, match=f"of 48 x {columns} .* using 6 x {kernel}"):
        found = espirit_maps(kspace, acs)
    signal = maps * image
    unexplained = signal - found * (found.conj() * signal).sum(dim=0)
    bound = {13: 2e-4, 9: 5e-4, 7: 2e-3, 3: 0.1}[columns]
    assert unexplained.abs().square().sum() < bound * signal.abs().square().sum()


def test_known_noise_keeps_noise_out_of_the_maps():
    image, maps, kspace = acquisition(8, 128, 96, noise_std=0.3)
    signal = maps * image
    error = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        for noise_std in (0.0, 0.3):
            found = espirit_maps(kspace, slice(44, 52), noise_std=noise_std)
            unexplained = signal - found * (found.conj() * signal).sum(dim=0)
            error[noise_std] = float(unexplained.abs().square().sum() / signal.abs().square().sum())
    assert error[0.3] < 0.02
    assert error[0.3] < 0.5 * error[0.0]


def test_nothing_but_noise_warns():
    kspace = torch.randn(4, 40, 40, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(CalibrationWarning, match="no signal above the noise"):
        maps = espirit_maps(kspace, centre(40, 40), noise_std=math.sqrt(0.5))
    assert maps.isfinite().all()


def test_residual_of_perfect_maps_is_the_noise():
    _, maps, kspace = acquisition(8, 160, 128, noise_std=0.05, seed=3)
    residual = calibration_residual(kspace, maps / maps.norm(dim=0), slice(50, 78), noise_std=0.05)
    # 24 x 14 samples of 7 unexplained components, real and imaginary: 1.5 % standard deviation.
    assert residual.std == pytest.approx(0.05, rel=0.05)
    assert residual.relative < 1e-4


@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_residual_measures_wrong_maps(strength):
    image, maps, kspace = acquisition(8, 160, 128, noise_std=0.02)
    wrong = maps / maps.norm(dim=0) + strength * random_smooth_maps(8, (160, 128), 5)
    wrong = wrong / wrong.norm(dim=0)
    signal = maps * image
    unexplained = signal - wrong * (wrong.conj() * signal).sum(dim=0)
    truth = float(unexplained.abs().square().sum() / signal.abs().square().sum())
    residual = calibration_residual(kspace, wrong, slice(50, 78), noise_std=0.02)
    assert residual.relative == pytest.approx(truth, rel=0.25)
    assert residual.std > 0.03


def test_residual_ignores_what_is_outside_the_calibration_region_and_scales_with_the_data():
    _, _, kspace = acquisition(4, 60, 50, noise_std=0.01)
    maps = espirit_maps(kspace, centre(60, 50))
    inside = torch.zeros_like(kspace)
    inside[(..., *centre(60, 50))] = kspace[(..., *centre(60, 50))]
    residual = calibration_residual(kspace, maps, centre(60, 50))
    assert residual == calibration_residual(inside, maps, centre(60, 50))
    scaled = calibration_residual(1000 * kspace, maps, centre(60, 50))
    assert scaled.std == pytest.approx(1000 * residual.std, rel=1e-4)
    assert scaled.relative == pytest.approx(residual.relative, rel=1e-4)
    assert ifftc(inside).abs().max() > 0


@pytest.mark.parametrize(
    ("acs", "options", "message"),
    [
        (None, {}, "there is no calibration region"),
        (slice(20, 22), {}, "has 2 columns, coil maps need at least 3"),
        ((slice(20, 21), slice(10, 30)), {}, "has 1 rows"),
        (slice(30, 51), {}, "columns 30 to 51 are not within the 50 of k-space"),
        (slice(None, 20), {}, r"must be a slice\(start, stop\)"),
        (slice(15, 35), {"kernel_size": 1}, "kernel_size"),
        (slice(15, 35), {"singular_threshold": 0}, "singular_threshold"),
        (slice(15, 35), {"crop": 1}, "crop"),
        (slice(15, 35), {"noise_std": -1}, "noise_std"),
    ],
)
def test_bad_arguments(acs, options, message):
    _, _, kspace = acquisition(2, 60, 50)
    with pytest.raises(OperatorError, match=message):
        espirit_maps(kspace, acs, **options)


def test_bad_kspace():
    acs = centre(60, 50)
    _, maps, kspace = acquisition(2, 60, 50)
    with pytest.raises(OperatorError, match="zero throughout"):
        espirit_maps(torch.zeros_like(kspace), acs)
    with pytest.raises(OperatorError, match="NaN"):
        espirit_maps(kspace * float("nan"), acs)
    with pytest.raises(OperatorError, match=r"got torch.float32 \(2, 60, 50\)"):
        espirit_maps(kspace.real, acs)
    with pytest.raises(OperatorError, match="same shape"):
        calibration_residual(kspace, maps[:1], acs)
    with pytest.raises(OperatorError, match="at least two coils"):
        calibration_residual(kspace[:1], maps[:1], acs)
    with pytest.raises(OperatorError, match="there is no calibration region"):
        calibration_residual(kspace, maps, None)
