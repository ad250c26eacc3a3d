"""How much of a pattern a text-to-image model keeps: of true pictures under noise, the part of it in the model's guess.

ẑ_0 = (z_t − σ_t ε(z_t)) / √ᾱ_t with z_t = √ᾱ_t z_0 + σ_t ε of a true picture's latent z_0, told its prompt and its
camera, without guidance. It is what an asset is led to, so a pattern that is not in it can't be in the asset. Give
`world:exact` as a model, too: its guess is the best there is.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from csd3d.arguments import path_of
from csd3d.cameras import orbit
from csd3d.distillation.ddim import ddim_sample
from csd3d.distillation.method import Query
from csd3d.distillation.noise import add_noise
from csd3d.errors import InputError
from csd3d.guidance.views import PromptConfig, view_of
from csd3d.metrics.surface import pattern_found
from csd3d.priors import Prior, PriorConfig, load_prior
from csd3d.world.objects import WorldObjects
from csd3d.world.scene import BACKDROPS
from tools.train_shipped.held_out import print_report
from tools.train_shipped.start import ASSETS

PROMPTS = ("a red chair with yellow stripes", "a purple robot with white checks", "a green mug with white dots")
TIMES = (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8)  # noise levels, of all timesteps
VIEWS, ELEVATION_DEG, DISTANCE, FOV_DEG = 12, 30.0, 4.0, 31.0  # as of configs/sds.yaml's held-out cameras
MOST_SCENES = 1000
GREY = BACKDROPS["grey"]


def add_options(part: argparse.ArgumentParser) -> None:
    """The options of `judge-patterns`."""
    part.add_argument("--model", nargs="+", default=[str(ASSETS / "t2i")], help="pipeline folders, or world:exact")
    part.add_argument("--scenes", type=int, default=4, help="true scenes of each prompt")
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--json", type=path_of, help="where the numbers go, too")
    part.add_argument("--threads", type=int)


def run(options: argparse.Namespace) -> int:
    """Print the patterns kept by every model."""
    if not 1 <= options.scenes <= MOST_SCENES:
        raise InputError(f"judge-patterns: --scenes is {options.scenes}; give 1 to {MOST_SCENES}")
    priors = {model: _open(model) for model in options.model}  # all, so that a wrong one is told before the work
    report = {
        model: {prompt: patterns_kept(prior, prompt, options.scenes, options.seed) for prompt in PROMPTS}
        for model, prior in priors.items()
    }
    print_report(report, options.json)
    return 0


def _open(model: str) -> Prior:
    """A text-to-image model that takes cameras, or InputError."""
    prior = load_prior(PriorConfig(model=model, device="cpu", dtype="float32"), require="text")
    if not prior.takes_camera:
        raise InputError(f"judge-patterns: {model}: takes no camera; guesses would be of any side")
    return prior


@torch.no_grad()
def patterns_kept(
    prior: Prior, prompt: str, scenes: int, seed: int, times: Sequence[float] = TIMES
) -> dict[str, float]:
    """`pattern_found`, 0 to 1, in what the autoencoder alone keeps ("autoencoder") and in the guess from each t."""
    size = prior.defaults.working_size
    cameras, backdrop = orbit(VIEWS, DISTANCE, ELEVATION_DEG, FOV_DEG, size, size), torch.tensor(GREY)
    azimuths = [360 * i / VIEWS for i in range(VIEWS)]
    view = torch.tensor([[azimuth, ELEVATION_DEG, DISTANCE] for azimuth in azimuths])
    words = PromptConfig(template="{prompt}, {backdrop} background, {view}", backdrops={"grey": GREY})
    texts = tuple(words.text(prompt, view_of(azimuth, ELEVATION_DEG, words)) for azimuth in azimuths)
    objects, generator = WorldObjects(prompt), torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for scene in objects.draw(scenes, seed):
        true = objects.views(scene, cameras, backdrop)
        z_0 = prior.encode(true.rgb.permute(0, 3, 1, 2))
        guesses = {"autoencoder": z_0}
        for time in times:
            t = round(time * (prior.num_train_timesteps - 1))
            guesses[f"t {time:g}"] = _guess(prior, z_0, t, texts, view, generator)
        for name, z in guesses.items():
            pictures = prior.decode(z).permute(0, 2, 3, 1)
            kept = pattern_found(pictures, true.mask > 0.5, true.rgb, true.asked)
            if kept is None:
                raise InputError(f"judge-patterns: {prompt!r} asks for no pattern")
            found.setdefault(name, []).append(kept)
    return {name: round(sum(values) / len(values), 3) for name, values in found.items()}


def _guess(
    prior: Prior, z_0: Tensor, t: int, texts: tuple[str, ...], view: Tensor, generator: torch.Generator
) -> Tensor:
    """ẑ_0 [V, C, h, w] of z_0 noised to t: a sampler of one step."""

    def predict(z_t: Tensor, t: int) -> Tensor:
        return prior.predict({"text": Query(z_t, t, texts, view=view)})["text"]

    eps = torch.randn(z_0.shape, generator=generator)
    return ddim_sample(predict, add_noise(z_0, eps, prior.alphas_cumprod[t].item()), prior.alphas_cumprod, [t])
