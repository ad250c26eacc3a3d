"""Pictures sampled from a text-to-image prior: what it draws itself, beside what is distilled from it."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise, ddim_timesteps
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.distillation.noise import draw_noise
from csd3d.distillation.samplers import TITLES, Sampler, sample
from csd3d.distillation.schedule import timestep
from csd3d.engine.logs import Curves
from csd3d.engine.phase import Job, Phase, run_steps
from csd3d.errors import at_key
from csd3d.evaluation.text import check_judge
from csd3d.guidance.classifier import check_gradient, classifier_guided, clip_log_prob, guided_with_graph
from csd3d.guidance.prompt_to_prompt import PromptToPrompt, edit_predictor
from csd3d.priors import Prior
from csd3d.priors.attention import changed_attention, check_attention
from csd3d.schema import Within, path_key

SAMPLED, EDITED = "sampled", "prompt_to_prompt"  # rows of results


@dataclass
class PictureSampling:
    """How a text's pictures are sampled from noise.

    Flow-matching models (SD3, FLUX, Qwen) have their own Euler steps by ddim and by euler, see `distillation.samplers`.

        sampling: {sampler: dpm++, steps: 20}
        sampling: {classifier_scale: 0.5, guidance_scale: 1}      # CLIP in place of classifier-free guidance
    """

    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken
    steps: Annotated[int, Within(1, 10_000)] = 50  # steps from noise to a picture
    guidance_scale: float | None = None  # classifier-free guidance by the prompt; null: the model's default
    classifier_scale: float = 0.0  # guidance by the gradient of a CLIP's log-likelihood of the prompt; 0: none
    # the CLIP that guides: a folder, a hub name or open_clip:NAME/WEIGHTS; "": CLIP (world), the shipped one
    classifier: str = path_key()
    prompt_to_prompt: PromptToPrompt | None = None  # an edit of the pictures by another prompt; null: none

    def __post_init__(self) -> None:
        for key in ("guidance_scale", "classifier_scale"):
            if (value := getattr(self, key)) is not None and not math.isfinite(value):
                raise ValueError(f"{key} is {value}: give a finite number")
        if self.classifier_scale and self.prompt_to_prompt:
            raise ValueError("classifier_scale and prompt_to_prompt do not go together: leave one of them out")

    @property
    def ignored(self) -> list[str]:
        """A warning for each key that is set and not read."""
        unread = self.classifier and not self.classifier_scale
        return ["sampling.classifier is set, but has no effect: sampling.classifier_scale is 0"] if unread else []

    @property
    def titles(self) -> dict[str, str]:
        """The titles of the rows of pictures, by the name of the row."""
        by = f"Sampled, {TITLES[self.sampler]}{', guided by CLIP' if self.classifier_scale else ''}"
        return {SAMPLED: by} | ({EDITED: "Prompt-to-Prompt"} if self.prompt_to_prompt else {})

    def texts(self, prompts: list[str], row: str = SAMPLED) -> list[str]:
        """The texts of a row's pictures."""
        return [self.prompt_to_prompt.after(text) for text in prompts] if row == EDITED else prompts

    def check(self, prior: Prior, prompts: list[str], null_prompt: str) -> None:
        """Embed all prompts; raise InputError for a prior, words or a CLIP that this cannot be done with."""
        prior.condition([*prompts, null_prompt])
        if self.classifier_scale:
            check_gradient(prior)
            with at_key("sampling.classifier"):
                check_judge(self.classifier)
        if self.prompt_to_prompt:
            with at_key("sampling.prompt_to_prompt"):
                check_attention(prior)
            prior.condition(self.texts(prompts, EDITED))
            for text in prompts:
                self.prompt_to_prompt.attention(prior, text, self.steps)


@dataclass(kw_only=True)
class SampledPhase(Phase):
    """One prompt's pictures: z [N, ...], or [2N, ...] with those of the edit behind them; 0 until it is done."""

    z: Tensor

    TENSORS = ("z",)

    def images(self, prior: Prior, count: int, side: int, row: str) -> Tensor:
        """The pictures [N, 3, S, S] of a row, N = `count`."""
        z = self.z[count:] if row == EDITED else self.z[:count]
        return prior.decode(z.to(prior.device), (side, side)).clamp(0, 1)


def draw(job: Job, text: str, name: str) -> SampledPhase:
    """Sample the pictures of one prompt in one step; `name` is the phase's. The job is an `ImageJob`."""
    config, prior = job.config, job.prior
    like = torch.empty(config.particles, *prior.latent_shape(job.side, job.side), device=prior.device)
    rows = 2 if config.sampling.prompt_to_prompt else 1
    phase = SampledPhase(job.generator(name), z=torch.zeros(rows * len(like), *like.shape[1:]))

    def advance(step: int, curves: Curves) -> dict[str, float]:
        noise = draw_noise(like, "independent", phase.generator)
        phase.z = sample_pictures(prior, config.sampling, text, config.distill.null_prompt, noise, job.side).cpu()
        return {"skipped": float(not bool(phase.z.isfinite().all()))}

    run_steps(job, phase, name, 1, advance, lambda: "")
    return phase


@torch.no_grad()
def sample_pictures(
    prior: Prior, own: PictureSampling, text: str, null_prompt: str, noise: Tensor, side: int
) -> Tensor:
    """Clean latents [N, ...] of one prompt from `noise` [N, ...]; with an edit [2N, ...], the edit's behind.

    side: pixels along a side of the pictures, which a guiding CLIP sees.
    """
    scale = prior.defaults.guidance_scale if own.guidance_scale is None else own.guidance_scale
    timesteps = ddim_timesteps(timestep(1.0, prior.num_train_timesteps), own.steps)
    if own.prompt_to_prompt:
        prompts = (text, own.prompt_to_prompt.after(text))
        state = own.prompt_to_prompt.attention(prior, text, len(timesteps))
        predict = edit_predictor(prior, state, prompts, null_prompt, scale)
        with changed_attention(prior.unet, state):
            return sample(predict, torch.cat([noise, noise]), prior.alphas_cumprod, timesteps, own.sampler)
    predict = guided(prior, text, null_prompt, scale)
    if own.classifier_scale:
        log_prob = clip_log_prob(own.classifier, text, lambda z: prior.decode(z, (side, side)), prior.device)
        predict = guided_with_graph(prior, text, null_prompt, scale)
        predict = classifier_guided(predict, log_prob, prior.alphas_cumprod, own.classifier_scale)
    return sample(predict, noise, prior.alphas_cumprod, timesteps, own.sampler)


def guided(prior: Prior, prompt: str, null_prompt: str, scale: float) -> PredictNoise:
    """The classifier-free guided ε(z_t, t) of one prompt."""

    def predict(z_t: Tensor, t: int) -> Tensor:
        asked = {"text": Query(z_t, t, (prompt,) * len(z_t))}
        if scale == 1:
            return prior.predict(asked)["text"]
        found = prior.predict(asked | {"null": Query(z_t, t, (null_prompt,) * len(z_t))})
        return cfg(found["null"], found["text"], scale)

    return predict
