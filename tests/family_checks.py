"""What the tests of all model families share: pictures, noise, opening a prior and its diffusers pipeline."""

import torch

from csd3d.priors import PriorConfig, load_prior

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 networks whose convolutions may be summed in another order
LOOP = {"rtol": 1e-3, "atol": 1e-4}  # after a few steps
PROMPT, SCALE = "make it red", 5.0


def images(batch=2, height=32, width=48, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder, require="text"):
    return load_prior(PriorConfig(str(folder), device="cpu"), require)


def quiet_pipeline(kind, folder, **options):
    pipeline = kind.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided(prior, z, t):
    """Classifier-free guidance with the project's one convention."""
    null, text = (prior.predict_noise(z, t, prior.condition([prompt]).expand(len(z))) for prompt in ("", PROMPT))
    return null + SCALE * (text - null)
