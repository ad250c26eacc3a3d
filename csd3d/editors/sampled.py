"""The base of editors that sample the edited picture, in one step of the run."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.method import Predict
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.samplers import Sampler, sample
from csd3d.editors.canvas import Canvas, CanvasPhase, Sampling, check_sampling
from csd3d.schema import Within

WINDOWS_AT_ONCE = 64  # windows per call of the prior, which splits the call into micro-batches
INITS = ("noise", "source")


@dataclass(frozen=True)
class Sampled:
    """Keys of all editors that sample; null takes the value of the job's `sampling`. Subclasses define `sample`."""

    steps: Annotated[int, Within(1, 10_000)] | None = None  # steps to a clean picture; null: sampling.steps
    start: float | None = None  # noise level of the first step, a share of the schedule; null: sampling.start
    text_scale: float | None = None  # guidance by the instruction; null: sampling.text_scale
    image_scale: float | None = None  # guidance by the source picture; null: sampling.image_scale
    sampler: Sampler | None = None  # ddim, euler or dpm++; null: sampling.sampler

    def __post_init__(self) -> None:
        check_sampling(self)

    def count_steps(self, canvas: Canvas) -> int:
        return 1

    @torch.no_grad()
    def take_step(self, canvas: Canvas, phase: CanvasPhase, step: int) -> dict[str, float]:
        phase.z = self.sample(canvas, phase.generator).cpu()
        return {"t": float(self.timesteps(canvas)[-1]), "skipped": 0.0}

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        """The edited latents [F, C, H, W] of a canvas."""
        raise NotImplementedError

    def sampling(self, canvas: Canvas) -> Sampling:
        """This editor's keys; null ones are taken from the job, then from the model's defaults."""
        shared, suits = canvas.sampling, canvas.prior.defaults
        return Sampling(
            steps=_first(self.steps, shared.steps),
            start=_first(self.start, shared.start),
            text_scale=_first(self.text_scale, shared.text_scale, suits.sampling_text_scale),
            image_scale=_first(self.image_scale, shared.image_scale, suits.sampling_image_scale),
            sampler=_first(self.sampler, shared.sampler),
        )

    def timesteps(self, canvas: Canvas) -> list[int]:
        """The timesteps of the steps, in falling order."""
        return self.sampling(canvas).timesteps(canvas.prior.num_train_timesteps)

    def denoise(self, canvas: Canvas, predict: PredictNoise, z_t: Tensor) -> Tensor:
        """The clean latents of `z_t` at the first timestep, by this editor's sampler."""
        schedule = canvas.prior.alphas_cumprod
        return sample(predict, z_t, schedule, self.timesteps(canvas), self.sampling(canvas).sampler)

    def guided(self, canvas: Canvas, images: Tensor, predict: Predict | None = None) -> PredictNoise:
        """The guided ε(z_t, t) of windows whose source pictures are `images` [m, C, h, w]; `predict`: see `Canvas`."""
        own = self.sampling(canvas)
        scales = own.text_scale, own.image_scale
        return edit_predictor(predict or canvas.predict, canvas.prompts(len(images)), images, *scales)


@dataclass(frozen=True)
class SampledFromNoise(Sampled):
    """Base of editors that start from noise, or from the noised source."""

    init: str = "noise"  # start from pure noise, or from the source noised to `start`
    noise: str = "independent"  # noise of the frames: independent, or shared by all

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, choices in (("init", INITS), ("noise", NOISES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")

    def start_latents(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        """The start of sampling, [F, C, H, W]; noise is drawn once for the whole canvas."""
        eps = draw_noise(canvas.z, self.noise, generator)
        if self.init == "noise":
            return eps
        return add_noise(canvas.z, eps, canvas.prior.alphas_cumprod[self.timesteps(canvas)[0]].item())


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)
