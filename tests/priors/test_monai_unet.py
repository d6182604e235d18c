"""State dicts of MONAI's own network, held against it and its scheduler."""

from typing import Any

import pytest
import torch

from priors import PriorError, load_prior, save_prior

pytest.importorskip("einops")  # MONAI's attention needs it
nets = pytest.importorskip("monai.networks.nets")
schedulers = pytest.importorskip("monai.networks.schedulers")

NETWORKS: dict[str, Any] = {
    "plain": {},
    "updown": {"resblock_updown": True},
    "linear": {"use_combined_linear": True},
    "without-fc": {"include_fc": False},
    "depths": {"num_res_blocks": (1, 2)},
    "heads": {"num_head_channels": (0, 8)},
}
NOISE = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "schedule": "linear_beta"}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def unet(channels=1, **options):
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "spatial_dims": 2,
        "in_channels": channels,
        "out_channels": channels,
        "num_res_blocks": 1,
        "channels": (8, 16),
        "attention_levels": (False, True),
        "norm_num_groups": 4,
        "num_head_channels": 4,
    }
    network = nets.DiffusionModelUNet(**{**settings, **options}).eval()
    for weight in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(weight, std=0.1)
    return network


def config(**changes):
    return {**NOISE, **BETAS, "norm_num_groups": 4, "num_head_channels": 4, **changes}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_in_which_it_is_built(tmp_path, name):
    network = unet(**NETWORKS[name])
    torch.save(network.state_dict(), tmp_path / "unet.pth")
    heads = NETWORKS[name].get("num_head_channels", 4)
    prior = load_prior(tmp_path / "unet.pth", config=config(num_head_channels=heads))
    assert (prior.contract.channels, prior.contract.size_multiple) == ("real", 2)
    abar = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[300])
    sigma = ((1 - abar) / abar) ** 0.5
    x = torch.randn(2, 1, 16, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eps = network(x * abar**0.5, torch.tensor([300, 300]))
        denoised = prior.denoise_channels(x, torch.full((2,), sigma))
    torch.testing.assert_close(denoised, x - sigma * eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"])
def test_the_denoised_image_is_that_of_the_scheduler(tmp_path, schedule, prediction):
    network = unet(2)
    betas = {} if schedule == "cosine" else {"beta_start": 5e-4, "beta_end": 0.0195}
    scheduler = schedulers.DDIMScheduler(
        1000, schedule=schedule, prediction_type=prediction, clip_sample=False, **betas
    )
    torch.save({"epoch": 3, "unet_state_dict": network.state_dict()}, tmp_path / "unet.pt")
    facts = {"prediction_type": prediction, "num_train_timesteps": 1000, "schedule": schedule, **betas}
    given = {**facts, "norm_num_groups": 4, "num_head_channels": 4, "num_channels": (8, 16)}
    prior = load_prior(tmp_path / "unet.pt", config=given)
    assert prior.contract.channels == "complex"
    scheduler.set_timesteps(1000)
    for index in (10, 700):
        abar = float(scheduler.alphas_cumprod[index])
        sigma = ((1 - abar) / abar) ** 0.5
        x = (1 + sigma) * torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(2))
        x_t = x * abar**0.5
        with torch.no_grad():
            expected = scheduler.step(network(x_t, torch.tensor([index])), index, x_t)[1]
            denoised = prior.denoise_channels(x, torch.tensor([sigma]))
        torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_way_to_our_own_file(tmp_path):
    torch.save(unet().state_dict(), tmp_path / "unet.pt")
    prior = load_prior(tmp_path / "unet.pt", config=config())
    save_prior(tmp_path / "mine.safetensors", prior)
    x = torch.randn(15, 18, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_prior(tmp_path / "mine.safetensors").denoise(x, 0.4), prior.denoise(x, 0.4))


@pytest.mark.parametrize("name", [*NOISE, *BETAS, "norm_num_groups", "num_head_channels"])
def test_what_the_file_does_not_tell_is_asked_for(tmp_path, name):
    torch.save(unet().state_dict(), tmp_path / "unet.pt")
    given = config()
    del given[name]
    with pytest.raises(PriorError, match=f"does not tell {name}: give config="):
        load_prior(tmp_path / "unet.pt", config=given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 8)}, r"config says channels = \[8, 8\], the file has \[8, 16\]"),
        ({"num_res_blocks": 2}, r"num_res_blocks = \[2, 2\], the file has \[1, 1\]"),
        ({"spatial_dims": 3}, "spatial_dims = 3, the file has 2"),
        ({"schedule": "steep"}, "schedule must be one of"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"num_class_embeds": 3}, "the network is conditional"),
        ({"wings": 2}, r"unknown arguments \['wings'\]"),
        ({"norm_num_groups": 3}, "multiple of norm_num_groups"),
    ],
)
def test_contradictions(tmp_path, changes, message):
    torch.save(unet().state_dict(), tmp_path / "unet.pt")
    with pytest.raises(PriorError, match=message):
        load_prior(tmp_path / "unet.pt", config=config(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_class_embeds": 3}, "class-conditional"),
        ({"with_conditioning": True, "cross_attention_dim": 4}, "cross-attention"),
        ({"spatial_dims": 3}, "one of volumes"),
    ],
)
def test_networks_that_no_prior_can_be(tmp_path, options, message):
    torch.save(unet(**options).state_dict(), tmp_path / "unet.pt")
    with pytest.raises(PriorError, match=message):
        load_prior(tmp_path / "unet.pt", config=config())
