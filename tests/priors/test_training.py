"""Training on small disks: batches, learning rate, resume, and that something is learned."""

import json
import math
from dataclasses import replace

import pytest
import torch

from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, PriorError
from priors.level import image_level
from priors.training import (
    VALIDATION_SIGMAS,
    TrainingSettings,
    denoising_errors,
    denoising_loss,
    draw_sigma,
    learning_rate,
    prepare_slices,
    sample_patches,
    train,
)

TINY = TrainingSettings(
    steps=6,
    batch=2,
    patch=16,
    learning_rate=1e-3,
    warmup=2,
    decay=2,
    precision="fp32",
    validate_every=3,
    save_every=2,
    network=NetworkSettings(widths=(4, 8), embedding=4),
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def disks(number=3, height=40, width=36):
    """A volume of smooth disks of different sizes, ``(number, height, width)``."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    radius = torch.linspace(0.5, 0.8, number)[:, None, None]
    return 700 * torch.sigmoid(20 * (radius - torch.hypot(y, x))) * (1 + 0.3 * torch.cos(9 * x))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SLICES = prepare_slices([disks()], TINY.level)


# Images


def test_slices_are_brought_to_the_level():
    slices = prepare_slices([disks(), 1e-6 * disks(2)], TINY.level)
    assert [tuple(image.shape) for image in slices] == 5 * [(40, 36)]
    for image in slices:
        assert float(image_level(image)) == pytest.approx(TINY.level, rel=1e-5)


def test_nearly_empty_slices_are_left_out():
    volume = disks()
    volume[1] *= 0.1
    assert len(prepare_slices([volume], 0.5)) == 2


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        ([], "no image to train on"),
        ([torch.zeros(3, 8, 8)], "every slice is empty"),
        ([disks(), disks()[0]], r"volume 1 has shape \(40, 36\), expected \(slices, H, W\)"),
        ([disks() * math.nan], "volume 0 holds values that are not finite"),
    ],
)
def test_volumes_that_cannot_be_used(volumes, message):
    with pytest.raises(PriorError, match=message):
        prepare_slices(volumes, 0.5)


def test_patches():
    patches = sample_patches(SLICES, 64, 16, rng())
    assert patches.shape == (64, 16, 16)
    assert patches.dtype == torch.complex64
    assert torch.isfinite(patches.abs()).all()
    assert 0.15 < float(image_level(patches).median()) < 0.8
    # The global phase is uniform: no direction is preferred.
    direction = patches.sum((1, 2))
    assert float((direction / direction.abs()).mean().abs()) < 0.4
    # Phase and magnitude vary smoothly, but they do vary.
    phases = (patches[:, 1:] * patches[:, :-1].conj()).sum((1, 2)).angle().abs()
    assert 0 < float(phases.median()) < 0.5
    assert torch.equal(patches, sample_patches(SLICES, 64, 16, rng()))
    assert not torch.equal(patches, sample_patches(SLICES, 64, 16, rng(1)))


def test_patches_of_a_constant_image_show_the_intensity_changes_only():
    # Centred in a large constant image, every rotation and zoom shows the constant.
    magnitude = sample_patches([torch.full((400, 400), 0.5)], 32, 8, rng()).abs()
    inside = magnitude.flatten(1).min(1).values > 0.1
    assert inside.float().mean() > 0.9
    spread = magnitude[inside].std((1, 2)) / magnitude[inside].mean((1, 2))
    assert float(spread.median()) < 0.2


def test_noise_levels_cover_the_range():
    settings = replace(TINY, batch=4000)
    sigma = draw_sigma(settings, rng())
    assert float(sigma.min()) >= settings.sigma_min * 0.999
    assert float(sigma.max()) <= settings.sigma_max * 1.001
    assert float(sigma.median()) == pytest.approx(settings.sigma_centre, rel=0.2)
    # One in five is log-uniform: its share above 5 is log(20/5)/log(20/0.002) / 5, beside a log-normal tail.
    assert 0.02 < float((sigma > 5).float().mean()) < 0.06


# Settings


def test_learning_rate_rises_stays_and_falls_to_zero():
    settings = TrainingSettings(steps=1000, warmup=100, decay=200, learning_rate=0.5)
    rates = [learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[49] == pytest.approx(0.25)
    assert set(rates[99:801]) == {0.5}
    assert rates[900] == pytest.approx(0.25)
    assert learning_rate(1000, settings) == 0
    assert rates[:100] == sorted(rates[:100])
    assert rates[800:] == sorted(rates[800:], reverse=True)


def test_learning_rate_without_warm_up_and_decay():
    settings = TrainingSettings(steps=10, warmup=0, decay=0, learning_rate=0.5)
    assert {learning_rate(step, settings) for step in range(10)} == {0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch": -1}, "batch must be positive, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"decay": 7}, r"decay \(7\) is longer than the training \(6 steps\)"),
        ({"patch": 18}, "patch 18 is no multiple of 4"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(PriorError, match=message):
        replace(TINY, **change)


# Training


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def weights(prior):
    return torch.cat([value.flatten() for value in prior.state_dict().values()])


def untrained():
    """The network as it starts: its head is zero, so ``D = c_skip x`` whatever the other weights are."""
    return NetworkPrior(DenoisingUNet(TINY.network), Contract()).requires_grad_(False)


def test_loss_falls_and_the_result_is_a_prior(tmp_path):
    settings = replace(
        TINY,
        steps=120,
        batch=4,
        warmup=10,
        decay=40,
        validate_every=60,
        learning_rate=1e-2,
        ema=0.95,
        sigma_centre=0.3,
        sigma_spread=0.5,
    )
    steps = []
    prior = train(SLICES, SLICES, settings, tmp_path, lambda step, loss: steps.append(step))
    assert steps == list(range(1, 121))
    # On other patches than those it was trained and validated on.
    patches, sigma = sample_patches(SLICES, 32, 16, rng(77)), torch.full((32,), 0.3)
    losses = [float(denoising_loss(p, patches, sigma, rng(78))) for p in (prior, untrained())]
    assert losses[0] < 0.75 * losses[1]
    assert not prior.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    contract = prior.contract
    assert (contract.level, contract.sigma_min, contract.sigma_max) == (TINY.level, 0.002, 20.0)
    assert contract.size_multiple == 4
    # The table is what was measured at the end, which is the last line of the curve.
    assert tuple(sigma for sigma, _ in contract.error_table) == VALIDATION_SIGMAS
    lines = curve(tmp_path)
    assert [line["step"] for line in lines] == [60, 120]
    # The curve counts every pixel, the table those of the objects alone, which are harder.
    assert all(error > rmse for (_, error), rmse in zip(contract.error_table, lines[-1]["rmse"], strict=True))
    errors = [error for _, error in contract.error_table]
    assert errors[0] > 0
    assert errors == sorted(errors)


class Killed(Exception):  # noqa: N818 (it is no error)
    """Stands for the end of the process."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, precision):
    settings = replace(TINY, precision=precision)
    whole = train(SLICES, SLICES, settings, tmp_path / "whole")
    folder = tmp_path / "resumed"

    def kill(at):
        def on_step(step, loss):
            if step == at:
                raise Killed

        return on_step

    for at in (1, 5):  # before anything was stored, and after step 4 was
        with pytest.raises(Killed):
            train(SLICES, SLICES, settings, folder, kill(at))
    torch.manual_seed(123)  # whatever the process did in between
    resumed_at = []
    resumed = train(SLICES, SLICES, settings, folder, lambda step, loss: resumed_at.append(step))
    assert resumed_at == [5, 6]
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.contract == whole.contract
    assert resumed.precision == "fp32"
    assert sorted(path.name for path in folder.iterdir()) == ["curve.jsonl", "state.pt"]
    # A finished training is loaded, not trained further; with more steps it goes on.
    assert torch.equal(weights(train(SLICES, SLICES, settings, folder)), weights(whole))
    longer = train(SLICES, SLICES, replace(settings, steps=7), folder)
    assert not torch.equal(weights(longer), weights(whole))


def test_the_seed_decides_and_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train(SLICES, SLICES, TINY, tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(train(SLICES, SLICES, TINY, tmp_path / "b")), weights(first))
    assert not torch.equal(
        weights(train(SLICES, SLICES, replace(TINY, seed=1), tmp_path / "c")), weights(first)
    )


def test_another_network_in_the_folder(tmp_path):
    train(SLICES, SLICES, TINY, tmp_path)
    other = replace(TINY, network=NetworkSettings(widths=(4, 4), embedding=4))
    with pytest.raises(PriorError, match=r"state.pt holds a training of another network, .*widths=\(4, 8\)"):
        train(SLICES, SLICES, other, tmp_path)


def test_a_training_starts_from_another_prior(tmp_path):
    first = train(SLICES, SLICES, TINY, tmp_path / "first")
    still = replace(TINY, learning_rate=1e-12)
    second = train(SLICES, SLICES, still, tmp_path / "second", initial=first)
    for name, weights in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[name], weights, rtol=1e-6, atol=1e-9)
    assert any(
        not torch.equal(weights, first.network.state_dict()[name])
        for name, weights in train(SLICES, SLICES, TINY, tmp_path / "third", initial=first)
        .network.state_dict()
        .items()
    )


def test_a_training_cannot_start_from_another_network(tmp_path):
    other = replace(TINY, network=NetworkSettings(widths=(6, 8), embedding=4))
    first = train(SLICES, SLICES, other, tmp_path / "first")
    with pytest.raises(PriorError, match="cannot start the training"):
        train(SLICES, SLICES, TINY, tmp_path / "second", initial=first)


@pytest.mark.parametrize("damage", ["truncated", "text", "another content"])
def test_damaged_state(tmp_path, damage):
    train(SLICES, SLICES, replace(TINY, steps=2), tmp_path)
    state = tmp_path / "state.pt"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:500])
    elif damage == "text":
        state.write_text("no training")
    else:
        torch.save({"step": 3}, state)
    with pytest.raises(PriorError, match=r"state.pt holds no training that can be resumed"):
        train(SLICES, SLICES, TINY, tmp_path)


@pytest.mark.parametrize(("slices", "validation"), [([], SLICES), (SLICES, []), ([], [])])
def test_no_images(tmp_path, slices, validation):
    with pytest.raises(PriorError, match="needs images to train on and images to validate on"):
        train(slices, validation, TINY, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PriorError, match=r"cannot make the training's folder .*file/new"):
        train(SLICES, SLICES, TINY, tmp_path / "file" / "new")


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(PriorError, match="training loss is not finite at step 0; lower the learning rate"):
        train([SLICES[0] * math.inf], SLICES, TINY, tmp_path)


def test_loss_of_the_untrained_network_is_known():
    # D = c_skip x is the best denoiser of white images of variance sigma_data^2: its weighted error is 1.
    prior, data = untrained(), TINY.network.sigma_data
    clean = data * math.sqrt(2) * torch.randn(32, 16, 16, dtype=torch.complex64, generator=rng())
    for sigma in (0.01, 0.2, 5.0):
        loss = denoising_loss(prior, clean, torch.full((32,), sigma), rng(1))
        assert float(loss) == pytest.approx(1, rel=0.03)
        error = data * sigma / math.hypot(data, sigma)
        assert denoising_errors(prior, clean, (sigma,)) == [pytest.approx(error, rel=0.03)]


def test_errors_of_objects_alone():
    prior, data, sigma, value = untrained(), TINY.network.sigma_data, 0.1, 0.3
    clean = torch.zeros(64, 16, 16, dtype=torch.complex64)
    clean[:, :8] = value
    # D = c x: what is missing of the object, and what is left of the noise.
    c = data**2 / (data**2 + sigma**2)
    left, missing = (c * sigma) ** 2, ((1 - c) * value) ** 2 / 2
    assert denoising_errors(prior, clean, (sigma,)) == [
        pytest.approx(math.sqrt(left + missing / 2), rel=0.03)
    ]
    objects = denoising_errors(prior, clean, (sigma,), foreground=True)
    assert objects == [pytest.approx(math.sqrt(left + missing), rel=0.03)]
