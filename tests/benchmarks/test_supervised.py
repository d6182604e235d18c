"""The supervised networks: their examples, training and resuming, files of weights, fair inputs."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as skimage_ssim
from torch import nn

from benchmarks.cases import NOISE, make_case, make_scenario
from benchmarks.supervised import networks, training
from benchmarks.supervised.__main__ import main
from benchmarks.supervised.data import (
    Example,
    Simulation,
    SliceSet,
    draw_example,
    read_slices,
    validation_examples,
)
from benchmarks.supervised.methods import (
    UNetMethod,
    VarNetMethod,
    VarNetOutput,
    _steps,
    calibration_data,
    low_frequencies,
    run_varnet,
    unet_image,
)
from benchmarks.supervised.networks import (
    PUBLISHED_UNET,
    PUBLISHED_VARNET,
    UNetConfiguration,
    VarNetConfiguration,
    configuration_of,
    load_network,
    read_weights,
    write_weights,
)
from operators.fft import fftc, ifftc
from operators.masks import make_mask, mask_from_array
from operators.simulation import birdcage_maps, simulate_kspace
from recon.errors import ReconError

SMALL = Simulation(coils=4, widths=(48, 64), rows=32, whole=0.25)


def unet_shapes(chans, pools, channels, prefix=""):
    """Names and shapes of a fastMRI U-Net, written down from its architecture."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name, before, after):
        shapes[f"{prefix}{name}.layers.0.weight"] = (after, before, 3, 3)
        shapes[f"{prefix}{name}.layers.4.weight"] = (after, after, 3, 3)

    for level in range(pools):
        before = channels if level == 0 else chans * 2 ** (level - 1)
        block(f"down_sample_layers.{level}", before, chans * 2**level)
    deepest = chans * 2 ** (pools - 1)
    block("conv", deepest, 2 * deepest)
    for index in range(pools):
        wide = chans * 2 ** (pools - index)
        last = index == pools - 1
        block(f"up_conv.{index}.0" if last else f"up_conv.{index}", wide, wide // 2)
        shapes[f"{prefix}up_transpose_conv.{index}.layers.0.weight"] = (wide, wide // 2, 2, 2)
    shapes[f"{prefix}up_conv.{pools - 1}.1.weight"] = (channels, chans, 1, 1)
    shapes[f"{prefix}up_conv.{pools - 1}.1.bias"] = (channels,)
    return shapes


def varnet_shapes(configuration):
    shapes = unet_shapes(
        configuration.sens_chans, configuration.sens_pools, 2, prefix="sens_net.norm_unet.unet."
    )
    for index in range(configuration.num_cascades):
        shapes[f"cascades.{index}.dc_weight"] = (1,)
        shapes |= unet_shapes(
            configuration.chans, configuration.pools, 2, prefix=f"cascades.{index}.model.unet."
        )
    return shapes


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SMALL_VARNET = VarNetConfiguration(num_cascades=2, pools=2, chans=4, sens_pools=3, sens_chans=2)
SMALL_UNET = UNetConfiguration(chans=4, num_pool_layers=2)


@pytest.fixture
def image():
    """An ellipse with two spots, maximum 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    head = ((y / 0.8) ** 2 + (x / 0.7) ** 2 < 1).float() * 0.5
    for top, left in ((-0.3, 0.2), (0.4, -0.1)):
        head = head + 0.5 * torch.exp(-((y - top) ** 2 + (x - left) ** 2) / 0.01)
    return head / head.max()


@pytest.fixture
def slices(image):
    return SliceSet([image, image.flip(0), image.flip(1).square()], "abc")


class Convolution(nn.Module):
    """In the place of a U-Net: quick, and with something to learn."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, image):
        return image + self.layer(image)


class RecordingVarNet(nn.Module):
    """In the place of a VarNet: keeps what it is given, and changes nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.cascades = nn.ModuleList([KeepData()])

    def sens_net(self, kspace, mask, count):
        self.calls.append((kspace, mask, count))
        return torch.view_as_real(2 * torch.ones(kspace.shape[:-1], dtype=torch.complex64))


class KeepData(nn.Module):
    def forward(self, current, measured, mask, maps):
        assert mask.dtype == torch.bool
        return torch.where(mask, measured, torch.zeros(()))


def problem(image, kind, acceleration, noise=NOISE):
    kspace = simulate_kspace(image, birdcage_maps(4, tuple(image.shape)), noise, seed=1)
    mask = make_mask(kind, tuple(image.shape), acceleration, seed=2)
    return kspace * mask.mask, mask


# -- data ----------------------------------------------------------------------------------------------------


def test_an_example_is_undersampled_noisy_kspace_of_its_target(slices):
    quiet, loud = (Simulation(coils=4, widths=(48, 64), rows=32, whole=0, noise=n) for n in (0.0, 0.01))
    example, noisy = (draw_example(slices, simulation, 3, 7) for simulation in (quiet, loud))
    assert example.kspace.shape == (4, 32, example.target.shape[1])
    assert example.target.dtype == torch.float32
    assert example.mask.name == "equispaced"
    # Of noise nothing but its level: what is added has the standard deviation asked for where it is sampled.
    added = (noisy.kspace - example.kspace)[:, :, noisy.mask.mask[0]]
    assert torch.view_as_real(added).std() == pytest.approx(0.01, rel=0.1)
    assert not noisy.kspace[:, :, ~noisy.mask.mask[0]].any()
    # Half the target's energy is in the fully sampled centre, in the units of k-space.
    centre = example.kspace[..., example.mask.acs].abs().square().sum()
    assert 0.3 < centre / example.target.square().sum() < 1


def test_the_fully_sampled_kspace_of_an_example_gives_its_target(slices, monkeypatch):
    everything = mask_from_array(np.ones((1, 64)))
    monkeypatch.setattr("benchmarks.supervised.data.make_mask", lambda *given, **named: everything)
    simulation = Simulation(coils=4, widths=(64, 64), rows=32, whole=0, noise=0.0)
    example = draw_example(slices, simulation, 0, 0)
    assert torch.allclose(example.zero_filled, example.target, atol=1e-5)
    assert example.peak >= float(example.target.max())


def test_examples_follow_from_seed_and_number_and_differ_in_all_that_is_drawn(slices):
    first, again, other = (draw_example(slices, SMALL, 0, index) for index in (5, 5, 6))
    assert torch.equal(first.kspace, again.kspace)
    assert first.kspace.shape != other.kspace.shape or not torch.equal(first.kspace, other.kspace)
    examples = [draw_example(slices, SMALL, 0, index) for index in range(24)]
    offsets = {int(e.mask.mask[0].nonzero()[0]) for e in examples}
    assert offsets == {0, 1, 2, 3}
    heights = [e.target.shape[0] for e in examples]
    assert 32 in heights
    assert max(heights) > 48  # whole ones
    widths = {e.target.shape[1] for e in examples}
    assert len(widths) > 3
    assert min(widths) >= 48
    assert max(widths) <= 64
    relative = [e.kspace.abs().square().sum((1, 2)) for e in examples]
    assert len({round(float(power[0] / power.sum()), 6) for power in relative}) == 24  # other coils each time


def test_coils_and_phase_of_the_training_are_not_those_of_the_test_cases(slices, monkeypatch):
    seeds = []
    real = training.draw_example.__globals__["random_smooth_maps"]

    def record(count, shape, seed):
        seeds.append(seed)
        return real(count, shape, seed=seed)

    monkeypatch.setattr("benchmarks.supervised.data.random_smooth_maps", record)
    for index in range(5):
        draw_example(slices, SMALL, 0, index)
    validation_examples(slices, SMALL, 3)
    assert len(set(seeds)) == 8
    assert min(seeds) > 1000  # a test case takes the number of its slice


def test_validation_slices_are_whole_and_as_they_are(slices):
    examples = validation_examples(slices, SMALL, 3)
    assert [tuple(e.target.shape) for e in examples] == [(64, 48)] * 3
    again = validation_examples(slices, SMALL, 3)
    assert all(torch.equal(a.kspace, b.kspace) for a, b in zip(examples, again, strict=True))
    assert len(validation_examples(slices, SMALL, 9)) == 3


def test_slices_are_read_scaled_to_one_and_without_empty_ones(tmp_path):
    volume = np.zeros((20, 24, 3), np.float32)
    volume[5:15, 5:20, 0] = 70
    volume[8:12, 5:20, 2] = 300
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    read = read_slices([tmp_path])
    assert [tuple(image.shape) for image in read.slices] == [(24, 20)] * 2
    assert [float(image.max()) for image in read.slices] == [1.0, 1.0]
    assert read.digest == read_slices([path]).digest
    volume[9, 9, 2] = 290
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    assert read.digest != read_slices([path]).digest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": "spiral"}, "unknown mask kind"),
        ({"acceleration": 0.5}, "above 1"),
        ({"widths": (64, 48)}, "widths"),
        ({"rows": 8}, "rows"),
        ({"whole": 1.5}, "whole"),
        ({"coils": 1}, "coils"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_a_simulation_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ReconError, match=message):
        Simulation(**wrong)


# -- training ------------------------------------------------------------------------------------------------


def settings(**changed):
    base = {"steps": 6, "decay": 3, "warmup": 2, "validate_every": 3, "save_every": 2, "validation_slices": 2}
    return training.Training(SMALL_UNET, SMALL, **{**base, "precision": "fp32", **changed})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(training, "build", lambda configuration: Convolution())


def test_our_ssim_is_that_of_skimage():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(20, 17, generator=generator)
    image = target + 0.1 * torch.randn(20, 17, generator=generator)
    # Without padding, skimage's mean over all but the border of half a window is the same.
    _, full = skimage_ssim(target.numpy(), image.numpy(), data_range=1.0, full=True)
    assert float(training.structural_similarity(image, target)) == pytest.approx(
        full[3:-3, 3:-3].mean(), abs=1e-5
    )


def test_losses_are_of_images_over_their_peak():
    target = torch.full((16, 16), 2.0)
    image = target + 0.5
    assert float(training.image_loss("l1", image, target, 5.0)) == pytest.approx(0.1)
    ssim = 1 - (2 * 0.4 * 0.5 + 1e-4) / (0.4**2 + 0.5**2 + 1e-4)
    assert float(training.image_loss("ssim", image, target, 5.0)) == pytest.approx(ssim, abs=1e-4)
    assert float(training.image_loss("ssim+l1", image, target, 5.0)) == pytest.approx(ssim + 0.4, abs=1e-4)


def test_training_helps_and_writes_weights_and_curve(quick, slices, tmp_path):
    out, steps = tmp_path / "deep" / "net.pt", []
    wanted = settings(steps=45, decay=15, learning_rate=0.02, validate_every=15)
    reached = training.train(slices, slices, wanted, out, on_step=lambda step, loss: steps.append(step))
    assert reached == 45
    assert steps == list(range(1, 46))
    lines = [json.loads(line) for line in out.with_suffix(".curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15, 30, 45]
    stored = torch.load(out, weights_only=True)
    assert stored["training"]["step"] == 45
    assert stored["training"]["simulation"]["mask"] == "equispaced"
    held_out = validation_examples(slices, SMALL, 2)
    torch.manual_seed(0)
    network = Convolution()
    assert lines[-1]["PSNR"] > training.scores(network, held_out)["PSNR"] + 1
    network.load_state_dict(stored["network"])
    again = training.scores(network, held_out)
    assert again["PSNR"] == pytest.approx(lines[-1]["PSNR"], abs=1e-3)


def test_an_interrupted_training_ends_as_one_that_was_not(quick, slices, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    training.train(slices, slices, settings(), whole)
    steps: list[int] = []
    count = steps.append

    def part(stop_at):
        return training.train(
            slices,
            slices,
            settings(),
            parts,
            on_step=lambda step, loss: count(step),
            stop=lambda: len(steps) >= stop_at,
        )

    # Before the first state is due, and between two.
    assert part(1) == 1
    assert part(5) == 5
    training.train(slices, slices, settings(), parts, on_step=lambda step, loss: count(step))
    assert steps == [1, 2, 3, 4, 5, 6]  # nothing is done twice
    a, b = (torch.load(path, weights_only=True)["network"] for path in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    curves = [path.with_suffix(".curve.jsonl").read_text().splitlines() for path in (whole, parts)]
    scores = [[{**json.loads(line), "seconds": 0} for line in curve] for curve in curves]
    assert scores[0] == scores[1]
    # A training that was killed is resumed from its last state, and a curve that is ahead of it is cut.
    with parts.with_suffix(".curve.jsonl").open("a") as file:
        file.write('{"step": 9, "PSNR": 1}\n{"st')
    training.train(slices, slices, settings(steps=8), parts)
    lines = parts.with_suffix(".curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 8]
    parts.unlink()
    assert training.train(slices, slices, settings(steps=8), parts) == 8
    assert parts.exists()


def test_the_state_of_another_training_is_refused(quick, slices, tmp_path):
    out = tmp_path / "net.pt"
    training.train(slices, slices, settings(steps=3), out)
    with pytest.raises(ReconError, match=r"net\.state\.pt is the state of another training \(loss ssim\+l1"):
        training.train(slices, slices, settings(loss="l1"), out)
    other = SliceSet(slices.slices, "other")
    with pytest.raises(ReconError, match="data abc there, other here"):
        training.train(other, slices, settings(), out)
    out.with_suffix(".state.pt").write_bytes(b"nothing")
    with pytest.raises(ReconError, match="no training that can be resumed"):
        training.train(slices, slices, settings(), out)


def test_a_training_can_start_from_weights(quick, slices, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "configuration_of", lambda state: SMALL_UNET)
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    training.train(slices, slices, settings(steps=4), first)
    # With a learning rate of nothing, what comes out is what was started from.
    training.train(slices, slices, settings(learning_rate=1e-30), second, initial=first)
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    assert all(torch.equal(a["network"][name], b["network"][name]) for name in a["network"])
    assert b["training"]["initial"]["digest"] == read_weights(first).digest
    assert _steps(b["training"]) == "4 steps and then 6 steps"
    with pytest.raises(ReconError, match="another training"):
        training.train(slices, slices, settings(learning_rate=1e-30), second)
    monkeypatch.setattr(networks, "configuration_of", lambda state: PUBLISHED_UNET)
    with pytest.raises(ReconError, match=r"first\.pt is a UNetConfiguration\(chans=256.* not a UNetConf"):
        training.train(slices, slices, settings(), second, initial=first)


def test_a_loss_that_is_not_finite_ends_the_training(slices, tmp_path, monkeypatch):
    class Broken(Convolution):
        def forward(self, image):
            return super().forward(image) * torch.nan

    monkeypatch.setattr(training, "build", lambda configuration: Broken())
    with pytest.raises(ReconError, match="not finite at step 0"):
        training.train(slices, slices, settings(), tmp_path / "net.pt")


def test_the_learning_rate_rises_stays_and_falls():
    chosen = settings(steps=10, warmup=4, decay=4, learning_rate=1.0)
    rates = [training.learning_rate(step, chosen) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"decay": 7}, {"loss": "l2"}, {"precision": "fp16"}, {"batch": -1}]
)
def test_training_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ReconError):
        settings(**wrong)


def test_the_command_trains_and_says_errors_in_one_line(quick, image, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        nibabel.save(
            nibabel.Nifti1Image(np.stack([image.T.numpy()] * 2, axis=-1), np.eye(4)), tmp_path / "a.nii"
        )
        given = ["train", "--model", "unet", "--data", str(tmp_path / "a.nii"), "--validation", str(tmp_path)]
        small = ["--steps", "2", "--widths", "48", "64", "--rows", "32", "--coils", "4"]
        assert main([*given, *small, "--out", str(tmp_path / "runs" / "net")]) == 0
        shown = capsys.readouterr().out
        assert "2 slices to learn from, 2 held out" in shown
        assert str(tmp_path / "runs" / "net.pt") in shown
        assert main([*given, "--mask", "spiral", "--out", str(tmp_path / "b")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: unknown mask kind 'spiral'")
        assert error.count("\n") == 1
    finally:
        torch.set_num_threads(threads)


# -- weights -------------------------------------------------------------------------------------------------


def test_the_published_varnet_is_known_by_its_tensors():
    shapes = varnet_shapes(PUBLISHED_VARNET)
    assert len(shapes) == 324
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(29.94e6, rel=1e-3)
    assert configuration_of(state) == PUBLISHED_VARNET
    assert configuration_of(random_state(varnet_shapes(SMALL_VARNET))) == SMALL_VARNET
    assert configuration_of(random_state(unet_shapes(4, 2, 1))) == SMALL_UNET


@pytest.mark.parametrize("wrap", ["flat", "state_dict", "lightning", "module"])
@pytest.mark.parametrize("model", ["varnet", "unet"])
def test_weights_are_read_flat_and_wrapped(tmp_path, model, wrap):
    shapes = {"varnet": varnet_shapes(SMALL_VARNET), "unet": unet_shapes(4, 2, 1)}[model]
    expected = {"varnet": SMALL_VARNET, "unet": SMALL_UNET}[model]
    state = random_state(shapes)
    prefixed = {f"{model}.{name}": value for name, value in state.items()}
    content = {
        "flat": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "lightning": {"state_dict": {**prefixed, "loss.w": torch.ones(1)}},
        "module": {f"module.{k}": v for k, v in state.items()},
    }[wrap]
    torch.save(content, tmp_path / "weights.pt")
    read = read_weights(tmp_path / "weights.pt")
    assert read.configuration == expected
    assert list(read.state) == list(state)
    assert all(torch.equal(read.state[name], state[name]) for name in state)
    assert not read.training
    assert not read.published
    assert len(read.digest) == 12


class Harmful:
    def __reduce__(self):
        return (print, ("code of a file was run",))


def test_files_that_are_no_weights_are_named(tmp_path, capsys):
    with pytest.raises(ReconError, match=r"absent\.pt: there is no such file"):
        read_weights(tmp_path / "absent.pt")
    path = tmp_path / "weights.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(ReconError, match=r"weights\.pt cannot be read"):
        read_weights(path)
    torch.save(Harmful(), path)
    with pytest.raises(ReconError, match=r"weights\.pt cannot be read"):
        read_weights(path)
    assert "code of a file" not in capsys.readouterr().out
    torch.save(torch.ones(3), path)
    with pytest.raises(ReconError, match="holds no state dict but Tensor"):
        read_weights(path)
    torch.save({"layer.weight": torch.ones(3)}, path)
    with pytest.raises(ReconError, match=r"those of no VarNet or U-Net of fastmri: layer\.weight"):
        read_weights(path)
    state = random_state(varnet_shapes(SMALL_VARNET))
    del state["cascades.0.model.unet.down_sample_layers.0.layers.0.weight"]
    torch.save(state, path)
    with pytest.raises(ReconError, match=r"weights\.pt: the tensor cascades\.0.* is missing"):
        read_weights(path)
    torch.save(random_state(unet_shapes(4, 2, 2)), path)
    with pytest.raises(ReconError, match="takes 2 channels"):
        read_weights(path)


def test_without_fastmri_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastmri.models", None)
    torch.save(random_state(unet_shapes(4, 2, 1)), tmp_path / "weights.pt")
    with pytest.raises(ReconError, match=r"need the package fastmri .*make peers.*\.venv-peers/bin/python"):
        UNetMethod(tmp_path / "weights.pt")


def test_tensors_that_do_not_fit_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "build", lambda configuration: Convolution())
    state = {"layer.bias": torch.zeros(2), "more": torch.zeros(1)}
    weights = networks.Weights(SMALL_UNET, state)
    with pytest.raises(ReconError) as caught:
        load_network(weights, "file.pt")
    text = str(caught.value)
    assert text.startswith("file.pt does not fit")
    assert "missing: layer.weight" in text
    assert "not the network's: more" in text
    assert "of another shape: layer.bias" in text


# -- methods -------------------------------------------------------------------------------------------------


def test_varnet_is_given_the_number_of_low_frequencies(image):
    network = RecordingVarNet()
    kspace, mask = problem(image, "equispaced", 4.0)
    made = run_varnet(network, kspace, mask)
    (seen, samples, count) = network.calls[0]
    assert count == mask.acs.stop - mask.acs.start == round(48 * 0.08)
    assert samples.shape == (1, 1, 1, 48, 1)
    assert torch.equal(torch.view_as_complex(seen[0])[..., mask.acs], kspace[..., mask.acs])
    assert not torch.view_as_complex(seen[0])[..., : mask.acs.start].any()
    assert not torch.view_as_complex(seen[0])[..., mask.acs.stop :].any()
    # A cascade that changes nothing leaves the zero-filled image, in the units of k-space.
    images = ifftc(kspace)
    assert torch.allclose(made.rss, images.abs().square().sum(0).sqrt(), atol=1e-6)
    assert torch.allclose(made.combined, 2 * images.sum(0).abs(), atol=1e-6)  # with maps of 2


@pytest.mark.parametrize("kind", ["gaussian-2d", "poisson"])
def test_under_a_mask_of_samples_coils_are_estimated_from_what_is_fully_sampled(image, kind):
    network = RecordingVarNet()
    kspace, mask = problem(image, kind, 8.0)
    rows, columns = mask.acs
    run_varnet(network, kspace, mask)
    run_varnet(network, kspace, mask, calibration="columns")
    (block, samples, count), (everything, _, same) = network.calls
    assert samples.shape == (1, 1, 64, 48, 1)
    assert count == same == columns.stop - columns.start
    start = (48 - count + 1) // 2  # where fastmri cuts
    cut = slice(start, start + count)
    assert bool(mask.mask[rows, cut].all())
    expected = torch.zeros_like(kspace)
    expected[:, rows, cut] = kspace[:, rows, cut]
    assert torch.equal(torch.view_as_complex(block[0]), expected)
    expected[:, :, cut] = kspace[:, :, cut]
    assert torch.equal(torch.view_as_complex(everything[0]), expected)
    assert torch.equal(calibration_data(kspace, mask, "columns"), expected)


def test_low_frequencies_are_counted_as_fastmri_cuts_them():
    # Even widths and even or odd counts: fastmri takes [(W - n + 1) // 2, (W - n + 1) // 2 + n).
    for region, expected in ((slice(22, 26), 4), (slice(22, 27), 5), (slice(23, 27), 3), (slice(20, 26), 4)):
        columns = np.zeros((1, 48), bool)
        columns[0, region] = True
        mask = mask_from_array(columns)
        object.__setattr__(mask, "acs", region)
        count, rows = low_frequencies(mask, 48)
        assert count == expected
        assert rows is None
        start = (48 - count + 1) // 2
        assert columns[0, start : start + count].all()
    nothing = mask_from_array(np.arange(48) == 3)
    with pytest.raises(ReconError, match="no fully sampled centre"):
        low_frequencies(nothing, 48)


def test_slices_and_coils_of_zeros_survive(image):
    network = RecordingVarNet()
    kspace, mask = problem(image, "equispaced", 4.0)
    nothing = run_varnet(network, torch.zeros_like(kspace), mask)
    assert torch.equal(nothing.rss, torch.zeros(64, 48))
    assert torch.equal(nothing.combined, torch.zeros(64, 48))
    assert not network.calls
    kspace[1] = 0
    made = run_varnet(network, kspace, mask)
    assert network.calls[0][0].shape[1] == 3
    assert torch.allclose(made.rss, ifftc(kspace).abs().square().sum(0).sqrt(), atol=1e-6)
    assert not unet_image(Convolution(), torch.zeros(16, 16)).any()


def test_a_unet_sees_a_normalised_image_and_gives_the_units_back(image):
    seen = []

    class Keep(nn.Module):
        def forward(self, given):
            seen.append(given)
            return given

    assert torch.allclose(unet_image(Keep(), 7e-6 * image), 7e-6 * image, atol=1e-11)
    assert float(seen[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(seen[0].std()) == pytest.approx(1, abs=1e-5)
    assert seen[0].shape == (1, 1, 64, 48)
    unet_image(Keep(), image, limit=1.5)
    assert float(seen[1].max()) == 1.5


def scenario(image, kind="equispaced", acceleration=4.0):
    kspace = simulate_kspace(image, birdcage_maps(6, tuple(image.shape)), NOISE, seed=1)
    return make_scenario(make_case("ellipse", kspace), kind, acceleration)


def test_methods_say_what_they_are_and_what_they_learned(image, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "build", lambda configuration: Convolution())
    facts = {
        "model": "unet", "step": 40, "steps": 60, "batch": 1, "slices": 3, "loss": "l1", "target": "truth",
        "simulation": {"coils": 4, "mask": "equispaced", "acceleration": 4.0},
    }  # fmt: skip
    monkeypatch.setattr(networks, "configuration_of", lambda state: SMALL_UNET)
    write_weights(tmp_path / "unet.pt", Convolution(), facts)
    method = UNetMethod(tmp_path / "unet.pt")
    assert method.name == "unet"
    assert not method.needs_seed
    assert "trained 40 of 60 steps of 1 on 3 slices with 4 simulated coils, equispaced ×4" in method.settings
    assert "l1 against the truth" in method.settings
    case = scenario(image)
    made = method.reconstruct(case, 0)
    assert made.nfe == 1
    expected = unet_image(method.network, case.problem.zero_filled)
    assert torch.allclose(made.image, expected.clamp_min(0))
    with pytest.raises(ReconError, match="holds a U-Net, not a VarNet"):
        VarNetMethod(tmp_path / "unet.pt")
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(networks, "configuration_of", lambda state: PUBLISHED_UNET)
    torch.save(Convolution().state_dict(), tmp_path / "published.pt")
    released = UNetMethod(tmp_path / "published.pt", name="released")
    assert "cut at 6 standard deviations" in released.settings
    assert "no fair comparison" in released.settings
    assert "no fair comparison" in capsys.readouterr().err


def test_a_released_varnet_comes_with_its_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "build", lambda configuration: Convolution())
    monkeypatch.setattr(networks, "configuration_of", lambda state: PUBLISHED_VARNET)
    torch.save(Convolution().state_dict(), tmp_path / "varnet.pt")
    method = VarNetMethod(tmp_path / "varnet.pt")
    assert "training AND validation sets" in method.settings
    assert "training AND validation sets" in capsys.readouterr().err
    with pytest.raises(ReconError, match="holds a VarNet, not a U-Net"):
        UNetMethod(tmp_path / "varnet.pt")
    with pytest.raises(ReconError, match="calibration is block or columns"):
        VarNetMethod(tmp_path / "varnet.pt", calibration="rows")


# -- with fastmri itself -------------------------------------------------------------------------------------


def test_shapes_written_down_here_are_those_of_fastmri():
    pytest.importorskip("fastmri", reason="needs the environment of `make peers`")
    with torch.device("meta"):
        published = networks.build(PUBLISHED_VARNET).state_dict()
    assert {k: tuple(v.shape) for k, v in published.items()} == varnet_shapes(PUBLISHED_VARNET)
    unet = networks.build(SMALL_UNET).state_dict()
    assert {k: tuple(v.shape) for k, v in unet.items()} == unet_shapes(4, 2, 1)


def test_what_a_varnet_adds_to_the_loss_is_what_its_maps_do_not_explain(image):
    class Known(RecordingVarNet):
        def sens_net(self, kspace, mask, count):
            return torch.view_as_real(maps)[None]

    true = birdcage_maps(4, (64, 48))
    kspace = fftc(true * image)
    mask = make_mask("equispaced", (64, 48), 4.0, center_fraction=0.5, seed=1)
    example = Example(kspace * mask.mask, mask, image, 1.0)
    maps = true / true.abs().square().sum(0).sqrt()
    explained = training.predict(Known(), example)
    maps = maps[[1, 0, 3, 2]]
    wrong = training.predict(Known(), example)
    assert float(explained[1]) < 0.01
    assert float(wrong[1]) > 0.2
    coil_images = ifftc(example.kspace)
    assert torch.allclose(wrong[0], (maps.conj() * coil_images).sum(0).abs(), atol=1e-6)


def test_noise_that_maps_do_not_explain_is_left_out_of_the_combined_image(image):
    true = birdcage_maps(8, (64, 48))
    maps = true / true.abs().square().sum(0).sqrt()
    noise = torch.randn(8, 64, 48, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)) * 0.1
    beside = noise - maps * (maps.conj() * noise).sum(0)
    output = VarNetOutput(maps * image + beside, maps)
    assert torch.allclose(output.combined, image, atol=1e-5)
    assert float((output.rss - image)[image == 0].mean()) > 0.1


def test_under_masks_of_columns_varnet_is_that_of_fastmri(image, tmp_path):
    pytest.importorskip("fastmri", reason="needs the environment of `make peers`")
    torch.save(random_state(varnet_shapes(SMALL_VARNET)), tmp_path / "varnet.pt")
    method = VarNetMethod(tmp_path / "varnet.pt")
    case = scenario(image)
    result = method.reconstruct(case, 0)
    made = result.image
    assert set(result.per_target) == set(case.case.targets)
    assert result.per_target["rss"] is made
    assert bool(
        (result.per_target["combined"] <= made * (1 + 1e-5)).all()
    )  # maps of unit length: Cauchy-Schwarz
    network, y = method.network, case.problem.y
    samples = case.mask.mask[None, None, :, :, None]
    count = case.mask.acs.stop - case.mask.acs.start
    with torch.no_grad():
        expected = network(torch.view_as_real(y)[None], samples, count)[0]
        assert torch.allclose(made, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        # Scale: fastMRI's data are a hundred thousand times smaller.
        tiny = run_varnet(network, 1e-5 * y, case.mask)
        assert torch.allclose(1e5 * tiny.rss, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    for kind in ("gaussian-2d", "poisson"):
        other = method.reconstruct(scenario(image, kind, 8.0), 0).image
        assert other.shape == image.shape
        assert bool(torch.isfinite(other).all())


@pytest.mark.parametrize("configuration", [SMALL_VARNET, SMALL_UNET])
def test_networks_of_fastmri_train_and_their_files_are_methods(configuration, slices, image, tmp_path):
    pytest.importorskip("fastmri", reason="needs the environment of `make peers`")
    out = tmp_path / "net.pt"
    chosen = training.Training(
        configuration, SMALL, steps=3, decay=1, validate_every=3, validation_slices=1, precision="bf16"
    )
    training.train(slices, slices, chosen, out)
    make = {"varnet": VarNetMethod, "unet": UNetMethod}[configuration.model]
    method = make(out)
    assert read_weights(out).configuration == configuration
    assert "trained 3 steps of 1 on 3 slices" in method.settings
    assert bool(torch.isfinite(method.reconstruct(scenario(image), 0).image).all())


def test_fft_conventions_agree_with_fastmri(image):
    fastmri = pytest.importorskip("fastmri", reason="needs the environment of `make peers`")
    kspace = fftc(image.to(torch.complex64))
    theirs = fastmri.fft2c(torch.view_as_real(image.to(torch.complex64)))
    assert torch.allclose(torch.view_as_real(kspace), theirs, atol=1e-5)
