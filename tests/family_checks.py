"""What the tests of all model families share: pictures, noise, opening a prior and its diffusers pipeline."""

import json

import pytest
import torch
from PIL import Image

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.flow import flow_time

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 networks whose convolutions may be summed in another order
LOOP = {"rtol": 1e-3, "atol": 1e-4}  # after a few steps
PROMPT, SCALE = "make it red", 5.0


def images(batch=2, height=32, width=48, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder, require="text"):
    return load_prior(PriorConfig(str(folder), device="cpu"), require)


def refused(model, require=None, **options):
    """The one line that opening this model ends with."""
    with pytest.raises(InputError) as error:
        load_prior(PriorConfig(str(model), **{"device": "cpu"} | options), require)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quiet_pipeline(kind, folder, **options):
    pipeline = kind.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided(prior, z, t):
    """Classifier-free guidance with the project's one convention."""
    null, text = (prior.predict_noise(z, t, prior.condition([prompt]).expand(len(z))) for prompt in ("", PROMPT))
    return null + SCALE * (text - null)


def eight_bits(picture):
    """Pictures [1, 3, H, W] rounded to 255ths, and the same as PIL's."""
    pixels = (picture * 255).round()
    return pixels / 255, Image.fromarray(pixels[0].permute(1, 2, 0).to(torch.uint8).numpy())


def flow_step(prior, predict, x, t):
    """One Euler step of a flow from x at the time of t to a clean picture; `predict` gives ε of z_t."""
    alpha_bar = prior.alphas_cumprod[t]
    s = flow_time(alpha_bar).item()
    eps = predict(x * (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()))
    return x - s * (eps - x) / (1 - s)
