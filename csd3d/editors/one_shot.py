"""One-shot dataset update: all training views are edited at once, each alone, and the scene is fitted to them."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.samplers import Sampler, sample
from csd3d.distillation.schedule import timestep
from csd3d.editors.canvas import check_shares
from csd3d.editors.sampled import INITS
from csd3d.editors.scene import Report, SceneEdit
from csd3d.registry import register
from csd3d.schema import Steps, Within


@register("scene_editor", "one_shot", title="One-shot dataset update")
@dataclass(frozen=True)
class OneShot:
    """Before the fit, edit every view by InstructPix2Pix's sampling, conditioned on its photo.

    Sampling starts from noise, or from the photo noised to `start`. With `edits_every` K, all views are edited again
    after every K steps of the fit, from renders of the scene noised to `start`, as in Instruct-GS2GS's released code:
    there K is 2500 of 7500 steps, the level is drawn for each view from 0.7 to 0.98, the first edit starts at renders
    too, DDIM takes 20 steps, and the scales are 12.5 and 1.5. We use one level for all views.

        compare: [one_shot, {type: one_shot+shared, noise: shared}]
        editor: {type: one_shot, init: source, start: 0.85, edits_every: 200}     # like Instruct-GS2GS
    """

    edits_every: Steps | None = None  # steps of the fit between edits of all views; null: one edit, before the fit
    init: str = "noise"  # the first edit starts from: noise, or source (the photo noised to `start`)
    start: float = 1.0  # noise level of the first step, a share of the schedule
    ddim_steps: Annotated[int, Within(1, 10_000)] = 20  # steps of an edit, by `sampler`
    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken
    text_scale: float | None = None  # ω_y, guidance by the instruction; null: the model's default
    image_scale: float | None = None  # ω_s, guidance by the photo; null: the model's default
    noise: str = "independent"  # ε: independent (drawn for each view) or shared by all views

    def __post_init__(self) -> None:
        for key, choices in (("init", INITS), ("noise", NOISES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")
        check_shares(self, "start")
        for key in ("edits_every", "ddim_steps"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} is {value}: give a whole number of at least 1")

    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit all views, if an edit is due at `step`."""
        if step % self.edits_every if self.edits_every else step:
            return
        alphas = edit.prior.alphas_cumprod
        timesteps = ddim_timesteps(timestep(self.start, len(alphas)), self.ddim_steps)
        eps = draw_noise(edit.source.z, self.noise, edit.generator)
        for rows in torch.arange(edit.count).split(edit.prior.micro_batch):
            z_t = self.begin(edit, step, rows, eps[rows], alphas[timesteps[0]].item())
            guided = edit.guided(rows, self.text_scale, self.image_scale)
            edit.replace(rows, sample(guided, z_t, alphas, timesteps, self.sampler))
            report({"t": float(timesteps[0])})

    def begin(self, edit: SceneEdit, step: int, rows: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
        """The latents that sampling of `rows` starts from."""
        if step == 0 and self.init == "noise":
            return eps
        return add_noise(edit.encode(edit.render(rows)) if step else edit.source.z[rows], eps, alpha_bar)
