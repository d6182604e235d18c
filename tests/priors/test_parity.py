"""Checkpoints written by the original code give what the original code gave.

The fixtures are not part of the repository. ``RECON_PARITY`` names a folder with one folder for each:
``checkpoint.pt`` in the original's layout, ``config.json`` with the constructor's arguments, and
``io.safetensors`` with inputs and recorded outputs ``case<N>.<name>``.
"""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from priors import PriorError, load_prior, save_prior

ROOT = os.environ.get("RECON_PARITY")
FIXTURES = sorted(path.parent for path in Path(ROOT).glob("*/io.safetensors")) if ROOT else []

pytestmark = pytest.mark.skipif(
    not FIXTURES, reason="RECON_PARITY does not name a folder of recorded checkpoints"
)

each = pytest.mark.parametrize("folder", FIXTURES or [None], ids=[path.name for path in FIXTURES] or ["none"])


def configuration(folder):
    return json.loads((folder / "config.json").read_text())


def alphas_bar(arguments):
    """Cumulated schedule of guided diffusion, in double precision."""
    steps = arguments.get("diffusion_steps", 1000)
    if arguments.get("noise_schedule", "linear") == "linear":
        return np.cumprod(1 - np.linspace(0.1 / steps, 20 / steps, steps))
    time = np.linspace(0, 1, steps + 1)
    curve = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], 0.999))


def cases(folder):
    """Of each case, images in the coordinate ``x = x0 + sigma z``, noise levels, and denoised images."""
    recorded = load_file(folder / "io.safetensors")
    for number in range(len(configuration(folder)["cases"])):
        found = {key.split(".", 1)[1]: v for key, v in recorded.items() if key.startswith(f"case{number}.")}
        x = found["x"].double()
        if "sigma" in found:
            sigma = found["sigma"].double()
            wide = sigma[:, None, None, None]
            truth = found["denoised"] if "denoised" in found else x + wide**2 * found["score"]
        else:
            a = alphas_bar(configuration(folder)["constructor"])[found["t"].long().numpy()]
            sigma = torch.from_numpy(np.sqrt((1 - a) / a))
            x = x / torch.from_numpy(np.sqrt(a))[:, None, None, None]
            if "pred_xstart" in found:
                truth = found["pred_xstart"]
            else:  # a recorded "x0" has the rounding of a schedule in single precision
                truth = x - sigma[:, None, None, None] * found["raw"][:, : x.shape[1]]
        yield x.float(), sigma.float(), truth.double()


def worst(prior, folder):
    """Largest difference of the denoised images, and of what is taken for noise, relative to the maxima."""
    image = noise = 0.0
    for x, sigma, truth in cases(folder):
        for one in range(len(x)):  # as recorded and alone: samples of a batch do not concern each other
            with torch.no_grad():
                together = prior.denoise_channels(x, sigma)[one].double()
                alone = prior.denoise_channels(x[one : one + 1], sigma[one : one + 1])[0].double()
            for out in (together, alone):
                difference = float((out - truth[one]).abs().max())
                image = max(image, difference / float(truth[one].abs().max()))
                noise = max(noise, difference / float((truth[one] - x[one]).abs().max()))
    return image, noise


@each
def test_a_checkpoint_gives_what_its_own_code_gave(folder):
    config = configuration(folder)
    prior = load_prior(folder / "checkpoint.pt", config=folder / "config.json")
    image, noise = worst(prior, folder)
    print(f"{folder.name}: image {image:.2g}, noise {noise:.2g}")
    # Products of the Fourier features may be taken in more than one order.
    tolerance = 1e-4 if "fourier_rounding_worst_rel_to_max" in config else 3e-5
    assert image < tolerance
    # At low noise the image is mostly the input; what is taken away is not. Its digits are fewer.
    assert noise < 1e-4


@each
def test_without_the_configuration_it_is_the_same_or_asks_for_a_fact_by_name(folder):
    try:
        prior = load_prior(folder / "checkpoint.pt")
        asked = None
    except PriorError as error:
        asked = re.search(r"give config=\{'(\w+)':", str(error))
        print(error)
        assert asked is not None, error  # noqa: PT017 - some are refused, some are not
    if asked is not None:
        known = {"precond", *configuration(folder), *configuration(folder)["constructor"]}
        assert asked[1] in known
        return
    image, noise = worst(prior, folder)
    print(f"{folder.name}, without configuration: image {image:.2g}, noise {noise:.2g}")
    assert image < 1e-4
    assert noise < 1e-4


@each
def test_converted_it_is_the_same_to_the_last_bit(folder, tmp_path):
    prior = load_prior(folder / "checkpoint.pt", config=folder / "config.json", name="converted")
    save_prior(tmp_path / "new.safetensors", prior)
    again = load_prior(tmp_path / "new.safetensors")
    assert again.contract == prior.contract
    for x, sigma, _ in cases(folder):
        assert torch.equal(again.denoise_channels(x, sigma), prior.denoise_channels(x, sigma))
