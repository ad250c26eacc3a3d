"""What the first lines of a run say of a model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from csd3d.priors import Defaults, speed


def prior_of(count=859_500_000, dtype=torch.float32, unet=True):
    """A prior of `count` parameters at 64 × 64 latents; its weights are not allocated."""
    network = nn.Module()
    network.register_parameter("weight", nn.Parameter(torch.empty(count, device="meta"), requires_grad=False))
    if unet:
        network.down_blocks = ()
    return SimpleNamespace(
        outline=network, device=torch.device("cpu"), defaults=Defaults(), options=SimpleNamespace(dtype=dtype),
        codec=SimpleNamespace(downscale=8, multiple=16), latent_shape=lambda h, w: (4, h // 8, w // 8),
    )  # fmt: skip


def test_a_row_of_stable_diffusion_takes_what_was_measured():
    """23.4 s on one core of this machine, at 512 × 512."""
    assert speed.row_seconds(prior_of(), 859_500_000, 1) == pytest.approx(23.4, rel=0.02)
    assert speed.row_seconds(prior_of(), 859_500_000, 4) == pytest.approx(23.4 / 4, rel=0.02)


def test_every_weight_of_a_transformer_acts_on_every_patch():
    found = speed.row_seconds(prior_of(unet=False), 2_000_000_000, 1)
    assert found == pytest.approx(2 * 2e9 * 32 * 32 / speed.CORE)


def test_only_a_large_model_on_a_processor_is_said_to_be_slow():
    (line,) = speed.slow_rows(prior_of())
    assert "860 million parameters" in line or "859 million parameters" in line
    assert "s a row" in line
    assert "an estimate" in line
    assert speed.slow_rows(prior_of(count=1000)) == []
    on_card = prior_of()
    on_card.device = torch.device("cuda")
    assert speed.slow_rows(on_card) == []


def test_precision_is_that_of_the_predictor_and_of_its_weights():
    assert speed.precision(prior_of()) == "float32"
    assert speed.precision(prior_of(dtype=torch.float16)) == "float16 with weights in float32"
