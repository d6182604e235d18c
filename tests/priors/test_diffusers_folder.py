"""Folders that diffusers itself wrote, held against its own network and scheduler."""

import json
from typing import Any

import pytest
import torch

from priors import PriorError, save_prior
from priors import load_prior as load
from priors.checkpoints.diffusers_folder import FAMILY, open_folder

diffusers = pytest.importorskip("diffusers")

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("DDPMScheduler", {"beta_schedule": "linear"}),
    "scaled": ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200}),
    "sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    "trained": ("DDPMScheduler", {"trained_betas": [0.01, 0.02, 0.05, 0.2], "num_train_timesteps": 4}),
    "zero-snr": ("DDPMScheduler", {"rescale_betas_zero_snr": True, "num_train_timesteps": 100}),
}


def load_prior(*arguments, **options) -> Any:
    """Attributes of the prior's own kind are asked for below."""
    return load(*arguments, **options)


def unet(channels=3, **options):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    settings: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        **sizes,
        **blocks,
    }
    return diffusers.UNet2DModel(**{**settings, **options}).eval()


def write(folder, network, scheduler="DDPMScheduler", **options):
    """A pipeline's folder."""
    made = getattr(diffusers, scheduler)(**options)
    network.save_pretrained(folder / "unet")
    made.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", scheduler],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return made


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_denoised_image_is_that_of_the_scheduler(tmp_path, name, prediction):
    network = unet()
    kind, options = SCHEDULERS[name]
    options = {"prediction_type": prediction, "clip_sample": False, **options}
    made = write(tmp_path, network, kind, **options)
    prior = load_prior(tmp_path)
    assert (prior.contract.channels, prior.contract.value_range) == ("rgb", (-1.0, 1.0))
    for index in (0, len(made.alphas_cumprod) // 2, len(made.alphas_cumprod) - 2):
        abar = float(made.alphas_cumprod[index])
        sigma = torch.full((2,), ((1 - abar) / abar) ** 0.5)
        x = images(2, 3, 16, 12) * (1 + sigma[0])
        x_t = x * abar**0.5
        with torch.no_grad():
            out = network(x_t, torch.full((2,), index)).sample
            # The scheduler's own estimate of the clean image.
            made.set_timesteps(len(made.alphas_cumprod))
            expected = made.step(out[:1], index, x_t[:1]).pred_original_sample
            denoised = prior.denoise_channels(x, sigma)
        torch.testing.assert_close(denoised[:1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_flow(tmp_path):
    network = unet(1)
    write(tmp_path, network, "FlowMatchEulerDiscreteScheduler")
    prior, x = load_prior(tmp_path), images(1, 1, 16, 16)
    t = 0.3
    with torch.no_grad():
        velocity = network((1 - t) * x, torch.tensor([1000 * t])).sample
        denoised = prior.denoise_channels(x, torch.tensor([t / (1 - t)]))
    torch.testing.assert_close(denoised, (1 - t) * x - t * velocity, rtol=1e-4, atol=1e-5)


def test_variance_exploding_scores(tmp_path):
    network = unet(time_embedding_type="fourier", center_input_sample=True)
    write(tmp_path, network, "ScoreSdeVeScheduler", sigma_min=0.01, sigma_max=50.0)
    prior, x = load_prior(tmp_path), images(1, 3, 16, 16)
    assert prior.contract.value_range == (0.0, 1.0)
    assert (prior.contract.sigma_min, prior.contract.sigma_max) == (0.01, 50.0)
    with torch.no_grad():
        score = network(x, torch.tensor([2.0])).sample
        torch.testing.assert_close(prior.denoise_channels(x, torch.tensor([2.0])), x + 4 * score)


def test_learned_variances_are_dropped(tmp_path):
    network = unet(2, out_channels=4)
    made = write(tmp_path, network, variance_type="learned_range")
    prior, x = load_prior(tmp_path), images(1, 2, 16, 16)
    assert prior.contract.channels == "complex"
    abar = float(made.alphas_cumprod[500])
    sigma = ((1 - abar) / abar) ** 0.5
    with torch.no_grad():
        eps = network(x * abar**0.5, 500).sample[:, :2]
        torch.testing.assert_close(
            prior.denoise_channels(x, torch.tensor([sigma])), x - sigma * eps, rtol=1e-4, atol=1e-5
        )


def test_sizes_that_the_network_does_not_take_and_the_way_to_our_own_file(tmp_path):
    write(tmp_path / "folder", unet(1))
    prior = load_prior(tmp_path / "folder", name="mine", anatomy=("brain",))
    assert prior.contract.size_multiple == 2
    save_prior(tmp_path / "mine.safetensors", prior)
    again = load_prior(tmp_path / "mine.safetensors")
    assert again.contract == prior.contract
    x = images(2, 15, 13)
    assert torch.equal(again.denoise(x, 0.5), prior.denoise(x, 0.5))


def test_averaged_weights_go_first(tmp_path):
    network = unet(1)
    write(tmp_path, network)
    torch.manual_seed(5)
    average = diffusers.UNet2DModel(**{k: v for k, v in network.config.items() if not k.startswith("_")})
    average.save_pretrained(tmp_path / "unet_ema")
    for ema, expected in ((True, average), (False, network)):
        loaded = load_prior(tmp_path, ema=ema).network.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.state_dict().items())


def test_a_model_without_a_scheduler_is_asked_about(tmp_path):
    network = unet(1)
    network.save_pretrained(tmp_path)
    with pytest.raises(PriorError, match=r"says prediction_type: give config=\{'prediction_type': ...\}"):
        load_prior(tmp_path)
    facts = {"prediction_type": "v_prediction", "num_train_timesteps": 500, "beta_schedule": "linear"}
    with pytest.raises(PriorError, match="beta_start, beta_end"):
        load_prior(tmp_path, config=facts)
    prior = load_prior(tmp_path, config={**facts, "beta_start": 1e-4, "beta_end": 0.02})
    assert (prior.predicts, len(prior.process.sigmas)) == ("v", 500)
    # Or a scheduler's own file, wherever it is.
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "other")
    prior = load_prior(tmp_path, config=tmp_path / "other" / "scheduler_config.json")
    assert (prior.predicts, len(prior.process.sigmas)) == ("eps", 1000)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "which is a conditional model"),
        ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("unet/config.json", {"out_channels": 5}, "turns 1 channels into 5"),
        ("unet/config.json", {"wings": 2}, "has wings, which the installed diffusers does not know"),
        ("unet/config.json", {"layers_per_block": 2}, "lacks 'down_blocks.0.resnets.1"),
        (
            "model_index.json",
            {"vqvae": ["diffusers", "VQModel"]},
            r"latent or conditional model \(it has vqvae",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "AmusedScheduler"}, "is a AmusedScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "noise"}, "prediction_type must be one of"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}, "beta_schedule must be one of"),
        ("scheduler/scheduler_config.json", {"beta_start": -1.0}, "beta_start must be a positive number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "num_train_timesteps must be"),
    ],
)
def test_folders_that_are_refused(tmp_path, file, values, message):
    write(tmp_path, unet(1))
    change(tmp_path / file, **values)
    with pytest.raises(PriorError, match=message):
        load_prior(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("unet/config.json", b"{", "config.json is not JSON"),
        ("unet/config.json", b"[]", "config.json holds list, not a JSON object"),
        ("unet/diffusion_pytorch_model.safetensors", b"weights", "is not a safetensors file"),
        ("unet/diffusion_pytorch_model.safetensors", None, "has no diffusion_pytorch_model.safetensors"),
        ("unet/config.json", None, "config.json cannot be read"),
    ],
)
def test_damaged_folders(tmp_path, file, content, message):
    write(tmp_path, unet(1))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(PriorError, match=message):
        load_prior(tmp_path)


def test_weights_in_several_files_stay_in_their_folder(tmp_path):
    network = unet(1)
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert index.is_file()
    loaded = load_prior(tmp_path).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    change(index, weight_map={"conv_in.weight": "../elsewhere.safetensors"})
    with pytest.raises(PriorError, match="names a file outside of its folder"):
        open_folder(tmp_path)


def test_what_is_no_folder_of_diffusers():
    assert not FAMILY.recognises({"state_dict": {}})
    assert not FAMILY.recognises([1, 2])
