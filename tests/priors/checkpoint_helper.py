"""What the tests of checkpoints share."""

import json
import os

import torch

PARITY = os.environ.get("RECON_PARITY", "")
"""Folder of recorded outputs of the original networks; empty if there is none."""


def loaded(family, content, config, precision="fp32", **options):
    """The prior that a family makes of a file's content, by way of JSON as in a converted file."""
    recipe = family.read(content, config, **options)
    chosen = json.loads(json.dumps(recipe.settings))
    network = family.network(chosen)
    network.load_state_dict(recipe.weights, strict=True)
    prior = family.prior(network, chosen, family.contract(chosen)).eval().requires_grad_(False)
    prior.precision = precision
    return prior


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
