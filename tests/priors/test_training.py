"""Training on small disks: batches, learning rate, resume, and that something is learned."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

import priors.training
from priors import Contract, DenoisingUNet, NetworkPrior, NetworkSettings, PriorError
from priors.mr_images import MRImages, prepare_slices, sample_patches
from priors.training import (
    VALIDATION_SIGMAS,
    TrainingSettings,
    denoising_errors,
    denoising_loss,
    draw_batch,
    draw_sigma,
    image_channels,
    learning_rate,
    rank_seed,
    read_curve,
    stream_seed,
    train,
)
from tests.priors.training_images import disks, rng

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


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SLICES = prepare_slices([disks()], TINY.level)
IMAGES = MRImages(SLICES)


def test_seeds_and_steps_have_streams_of_their_own():
    first = {
        float(torch.rand((), generator=torch.Generator().manual_seed(stream_seed(seed, step))))
        for seed in (0, 1, 2, 300)
        for step in (0, 1, 5, 10_000)
    }
    assert len(first) == 16
    assert stream_seed(0, 7) == 7


def test_noise_levels_cover_the_range():
    settings = replace(TINY, batch=4000)
    sigma = draw_sigma(settings, rng())
    assert float(sigma.min()) >= settings.sigma_min * 0.999
    assert float(sigma.max()) <= settings.sigma_max * 1.001
    assert float(sigma.median()) == pytest.approx(settings.sigma_centre, rel=0.2)
    # One in five is log-uniform: its share above 5 is log(20/5)/log(20/0.002) / 5, beside a log-normal tail.
    assert 0.02 < float((sigma > 5).float().mean()) < 0.06


class Discs:
    """Source of real images: one disc, brighter or darker."""

    def __len__(self):
        return 1

    def draw(self, batch, size, generator):
        x = torch.linspace(-1, 1, size)
        disc = (torch.hypot(x, x[:, None]) < 0.7).float()
        return disc * (0.8 + 0.4 * torch.rand(batch, 1, 1, generator=generator))


REAL = replace(TINY, unit="object", network=NetworkSettings(channels=1, widths=(4, 8), embedding=4))


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
        ({"slices": 0}, "slices must be positive, got 0"),
        ({"slices": 3}, "a network of 2 channels fits neither real nor complex images of 3 slices"),
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
    prior = train(IMAGES, IMAGES, settings, tmp_path, lambda step, loss: steps.append(step))
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


def test_a_real_prior_is_learned(tmp_path):
    settings = replace(
        REAL,
        steps=60,
        batch=4,
        warmup=10,
        decay=20,
        validate_every=60,
        learning_rate=1e-2,
        ema=0.9,
        sigma_centre=0.3,
        sigma_spread=0.5,
    )
    prior = train(Discs(), Discs(), settings, tmp_path)
    assert (prior.contract.channels, prior.contract.unit) == ("real", "object")
    images = Discs().draw(32, 16, rng(77))
    fresh = NetworkPrior(DenoisingUNet(REAL.network), Contract(channels="real")).requires_grad_(False)
    sigma = torch.full((32,), 0.3)
    losses = [float(denoising_loss(p, images, sigma, rng(78))) for p in (prior, fresh)]
    assert losses[0] < 0.5 * losses[1]
    assert prior.denoise(images, 0.3).dtype == torch.float32


class Killed(Exception):  # noqa: N818 (it is no error)
    """Stands for the end of the process."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, precision):
    settings = replace(TINY, precision=precision)
    whole = train(IMAGES, IMAGES, settings, tmp_path / "whole")
    folder = tmp_path / "resumed"

    def kill(at):
        def on_step(step, loss):
            if step == at:
                raise Killed

        return on_step

    for at in (1, 5):  # before anything was stored, and after step 4 was
        with pytest.raises(Killed):
            train(IMAGES, IMAGES, settings, folder, kill(at))
    torch.manual_seed(123)  # whatever the process did in between
    resumed_at = []
    resumed = train(IMAGES, IMAGES, settings, folder, lambda step, loss: resumed_at.append(step))
    assert resumed_at == [5, 6]
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.contract == whole.contract
    assert resumed.precision == "fp32"
    assert sorted(path.name for path in folder.iterdir()) == ["curve.jsonl", "state.pt"]
    # A finished training is loaded, not trained further; with more steps it goes on.
    assert torch.equal(weights(train(IMAGES, IMAGES, settings, folder)), weights(whole))
    longer = train(IMAGES, IMAGES, replace(settings, steps=7), folder)
    assert not torch.equal(weights(longer), weights(whole))


def test_the_seed_decides_and_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train(IMAGES, IMAGES, TINY, tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(train(IMAGES, IMAGES, TINY, tmp_path / "b")), weights(first))
    assert not torch.equal(
        weights(train(IMAGES, IMAGES, replace(TINY, seed=1), tmp_path / "c")), weights(first)
    )


def test_another_network_in_the_folder(tmp_path):
    train(IMAGES, IMAGES, TINY, tmp_path)
    other = replace(TINY, network=NetworkSettings(widths=(4, 4), embedding=4))
    with pytest.raises(PriorError, match=r"state.pt holds a training of another network, .*widths=\(4, 8\)"):
        train(IMAGES, IMAGES, other, tmp_path)


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        ({"seed": 1}, {}, r"\(seed 0 there, 1 here\): go on with it as it was begun, or choose another"),
        ({"learning_rate": 0.5, "patch": 8}, {}, r"\(patch 16 there, 8 here; learning rate 0.001 there, 0.5"),
        ({"level": 0.4, "steps": 9}, {}, r"\(level 0.3 there, 0.4 here\)"),
        ({}, {"images": "b"}, r"\(images a there, b here\)"),
        ({"steps": 5}, {}, "is at step 6 already: go on to 6 steps or more, not 5"),
    ],
)
def test_another_training_in_the_folder(tmp_path, change, facts, message):
    train(IMAGES, IMAGES, TINY, tmp_path, facts={"images": "a"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PriorError, match=rf"state.pt holds a(nother)? training .*{message}"):
        train(IMAGES, IMAGES, replace(TINY, **change), tmp_path, facts={"images": "a", **facts})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_may_change_on_resumption_and_states_that_know_less(tmp_path):
    train(IMAGES, IMAGES, TINY, tmp_path, facts={"images": "a"})
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["facts"]
    known = json.loads(state["settings"])
    del known["ema"]
    torch.save({**state, "settings": json.dumps(known)}, tmp_path / "state.pt")
    other = replace(TINY, steps=8, decay=1, precision="bf16", validate_every=1, save_every=1, ema=0.5)
    train(IMAGES, IMAGES, other, tmp_path, facts={"images": "b"})
    assert [line["step"] for line in curve(tmp_path)] == [3, 6, 7, 8]
    with pytest.raises(PriorError, match="images b there, a here"):  # from now on it is known
        train(IMAGES, IMAGES, other, tmp_path, facts={"images": "a"})


class Air(Discs):
    """Source of images below the level from which anything counts as an object."""

    def draw(self, batch, size, generator):
        return torch.full((batch, size, size), 0.09 * REAL.level)


def test_validation_images_that_show_nothing_are_refused_at_the_start(tmp_path):
    steps = []
    with pytest.raises(PriorError, match="the 32 patches to measure errors on show nothing but air"):
        train(Discs(), Air(), REAL, tmp_path, lambda step, loss: steps.append(step))
    assert steps == []
    train(Air(), Discs(), replace(REAL, steps=2), tmp_path)


def test_a_training_starts_from_another_prior(tmp_path):
    first = train(IMAGES, IMAGES, TINY, tmp_path / "first")
    still = replace(TINY, learning_rate=1e-12)
    second = train(IMAGES, IMAGES, still, tmp_path / "second", initial=first)
    for name, weights in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[name], weights, rtol=1e-6, atol=1e-9)
    assert any(
        not torch.equal(weights, first.network.state_dict()[name])
        for name, weights in train(IMAGES, IMAGES, TINY, tmp_path / "third", initial=first)
        .network.state_dict()
        .items()
    )


def test_a_training_starts_from_a_prior_with_other_channels(tmp_path):
    first = train(IMAGES, IMAGES, TINY, tmp_path / "first")
    real = NetworkSettings(channels=1, widths=(4, 8), embedding=4, sigma_data=0.5)
    settings = replace(REAL, network=real, learning_rate=1e-12)
    second = train(Discs(), Discs(), settings, tmp_path / "second", initial=first)
    taken = {name for name in second.network.state_dict() if not name.startswith(("stem.", "head."))}
    assert len(taken) == len(second.network.state_dict()) - 4
    for name in taken:
        weights = first.network.state_dict()[name]
        torch.testing.assert_close(second.network.state_dict()[name], weights, rtol=1e-6, atol=1e-9)
    assert second.network.stem.weight.shape == (4, 4, 3, 3)
    assert second.network.settings.sigma_data == 0.5


def test_a_training_cannot_start_from_another_network(tmp_path):
    other = replace(TINY, network=NetworkSettings(widths=(6, 8), embedding=4))
    first = train(IMAGES, IMAGES, other, tmp_path / "first")
    with pytest.raises(PriorError, match="cannot start the training"):
        train(IMAGES, IMAGES, TINY, tmp_path / "second", initial=first)


@pytest.mark.parametrize("damage", ["truncated", "text", "another content"])
def test_damaged_state(tmp_path, damage):
    train(IMAGES, IMAGES, replace(TINY, steps=2), tmp_path)
    state = tmp_path / "state.pt"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:500])
    elif damage == "text":
        state.write_text("no training")
    else:
        torch.save({"step": 3}, state)
    with pytest.raises(PriorError, match=r"state.pt holds no training that can be resumed"):
        train(IMAGES, IMAGES, TINY, tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PriorError, match=r"cannot make the training's folder .*file/new"):
        train(IMAGES, IMAGES, TINY, tmp_path / "file" / "new")


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(PriorError, match="training loss is not finite at step 0; lower the learning rate"):
        train(MRImages([SLICES[0] * math.inf]), IMAGES, TINY, tmp_path)


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


def test_loss_and_errors_of_real_images_are_known():
    data, sigma = REAL.network.sigma_data, 0.1
    prior = NetworkPrior(DenoisingUNet(REAL.network), Contract(channels="real")).requires_grad_(False)
    clean = data * torch.randn(64, 16, 16, generator=rng(55))
    assert float(denoising_loss(prior, clean, torch.full((64,), sigma), rng(1))) == pytest.approx(1, rel=0.03)
    error = data * sigma / math.hypot(data, sigma)
    assert denoising_errors(prior, clean, (sigma,)) == [pytest.approx(error, rel=0.03)]


# Several slices at once


def test_channels_are_slice_by_slice_and_those_of_the_prior():
    stacks = torch.randn(2, 3, 4, 4, dtype=torch.complex64, generator=rng())
    channels = image_channels(stacks)
    expected = [getattr(stacks[:, k], part) for k in range(3) for part in ("real", "imag")]
    assert torch.equal(channels, torch.stack(expected, dim=1))
    assert torch.equal(image_channels(stacks.real), stacks.real)
    assert torch.equal(image_channels(stacks[:, 0])[:, 1], stacks[:, 0].imag)

    # As the prior packs them when it denoises: its network sees the same noise and leaves the same error.
    shape = NetworkSettings(channels=6, widths=(4, 8), embedding=4)
    prior = NetworkPrior(DenoisingUNet(shape), Contract(slices=3)).requires_grad_(False)
    torch.nn.init.normal_(prior.network.head.weight, generator=rng(1))
    sigma = torch.full((2,), 0.3)
    direct = prior.denoise_channels(channels, sigma)
    assert torch.equal(image_channels(prior.denoise(stacks, sigma)), direct)


class Stacks:
    """Source of stacks of three discs, each smaller than the one below."""

    def __len__(self):
        return 1

    def draw(self, batch, size, generator):
        x = torch.linspace(-1, 1, size)
        discs = torch.stack([(torch.hypot(x, x[:, None]) < radius).float() for radius in (0.9, 0.7, 0.5)])
        return discs * (0.8 + 0.4 * torch.rand(batch, 1, 1, 1, generator=generator))


def test_a_prior_of_several_slices_is_learned(tmp_path):
    network = NetworkSettings(channels=3, widths=(4, 8), embedding=4)
    settings = replace(
        REAL, slices=3, network=network, steps=60, batch=4, warmup=10, decay=20, validate_every=60,
        learning_rate=1e-2, ema=0.9, sigma_centre=0.3, sigma_spread=0.5,
    )  # fmt: skip
    prior = train(Stacks(), Stacks(), settings, tmp_path)
    contract = prior.contract
    assert (contract.channels, contract.slices, contract.num_channels) == ("real", 3, 3)
    stacks = Stacks().draw(8, 16, rng(5))
    assert prior.denoise(stacks, 0.3).shape == stacks.shape
    fresh = NetworkPrior(DenoisingUNet(network), contract).requires_grad_(False)
    errors = [denoising_errors(each, stacks, (0.3,))[0] for each in (prior, fresh)]
    assert errors[0] < 0.7 * errors[1]


def test_the_caller_sees_every_validation(tmp_path):
    seen = []
    train(
        IMAGES, IMAGES, TINY, tmp_path,
        on_validation=lambda step, prior, clean: seen.append((step, prior.contract.level, clean.shape)),
    )  # fmt: skip
    assert seen == [(step, TINY.level, (32, 16, 16)) for step in (3, 6)]


# The curve of a training that was stopped


def test_validations_after_the_stored_step_are_not_counted_twice(tmp_path):
    settings = replace(TINY, steps=8, validate_every=3, save_every=4)

    def kill(step, loss):
        if step == 7:  # validated at 3 and 6, stored at 4
            raise Killed

    with pytest.raises(Killed):
        train(IMAGES, IMAGES, settings, tmp_path, kill)
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 9, "rm')  # killed while a line was written
    assert [record["step"] for record in read_curve(tmp_path / "curve.jsonl")] == [3, 6]
    train(IMAGES, IMAGES, settings, tmp_path)
    assert [line["step"] for line in curve(tmp_path)] == [3, 6, 8]
    train(IMAGES, IMAGES, settings, tmp_path / "whole")
    for one, other in zip(curve(tmp_path), curve(tmp_path / "whole"), strict=True):
        assert one["rmse"] == other["rmse"]
    assert read_curve(tmp_path / "absent") == []


class Turns(Discs):
    """Source that can draw only at the step it was made ready for."""

    def __init__(self):
        self.step = None
        self.forgotten = False

    def seek(self, step):
        self.step = step

    def forget(self):
        self.forgotten = True

    def draw(self, batch, size, generator):
        self.steps = [*getattr(self, "steps", []), self.step]
        return super().draw(batch, size, generator)


def test_images_that_take_turns_are_made_ready_for_each_step(tmp_path):
    images, held_out = Turns(), Turns()
    train(images, held_out, replace(REAL, steps=3), tmp_path)
    assert images.steps == [0, 1, 2]
    assert not images.forgotten
    assert held_out.forgotten
    train(images, held_out, replace(REAL, steps=5), tmp_path)
    assert images.steps[3:] == [3, 4]


# Several processes

TOGETHER = replace(REAL, steps=4, batch=3, learning_rate=1e-4, warmup=2, decay=0, validate_every=4)


def join(rank, store, folder):
    """Train as one of two processes."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return train(Discs(), Discs(), TOGETHER, Path(folder))
    finally:
        distributed.destroy_process_group()


def test_processes_draw_differently_and_the_first_as_one_alone():
    seeds = {rank_seed(seed, step, rank) for seed in (0, 1) for step in range(100) for rank in range(8)}
    assert len(seeds) == 1600
    assert rank_seed(3, 7, 0) == stream_seed(3, 7)
    clean = [draw_batch(Discs(), TOGETHER, 0, rank)[0] for rank in (0, 1)]
    assert not torch.equal(*clean)


def test_two_processes_are_one_with_the_batches_of_both(tmp_path, monkeypatch):
    code = "import sys; from tests.priors.test_training import join; join(1, *sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "both")]
    other = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        both = join(0, tmp_path / "store", tmp_path / "both")
        assert other.wait() == 0
    finally:
        other.kill()
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["curve.jsonl", "state.pt"]
    assert [line["step"] for line in curve(tmp_path / "both")] == [4]  # the first process alone writes

    def joint(images, settings, step, rank=0):
        return tuple(
            map(torch.cat, zip(*(draw_batch(images, settings, step, r) for r in (0, 1)), strict=True))
        )

    monkeypatch.setattr(priors.training, "draw_batch", joint)
    one = train(Discs(), Discs(), TOGETHER, tmp_path / "one")
    torch.testing.assert_close(weights(both), weights(one), rtol=1e-4, atol=1e-7)
    monkeypatch.undo()
    alone = train(Discs(), Discs(), TOGETHER, tmp_path / "alone")
    far = float((weights(alone) - weights(one)).abs().max())
    assert far > 100 * float((weights(both) - weights(one)).abs().max())
