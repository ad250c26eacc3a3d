"""DGE (Chen et al. 2024, arXiv 2404.18929): one edit of all views, by attention to key views along epipolar lines."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.method import Predict, Query
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.distillation.samplers import Sampler, sample
from csd3d.distillation.schedule import timestep
from csd3d.editors.key_views import EpipolarLines, KeyViewEditor, in_runs, key_views_first, layer_strides, one_of_each
from csd3d.editors.sampled import INITS
from csd3d.editors.scene import Report, SceneEdit
from csd3d.priors.attention import layer_sizes, self_attention
from csd3d.priors.key_views import InjectedAttention
from csd3d.registry import register
from csd3d.schema import MOST_STEPS, Share, Steps, Within


@register("scene_editor", "dge", title="DGE-like, key views along epipolar lines")
@dataclass(frozen=True)
class DGE(KeyViewEditor):
    """At each step of sampling key views are drawn, which attend to one another; all others take over their attention.

    See `InjectedAttention` for the attention and `EpipolarLines` for the constraint; both act in every self-attention
    layer of the UNet. Then the scene is fitted. Unlike the authors' code (github.com/silent-chen/DGE):

    * Key views keep their own output; there, a key view is blended with the next key view, 27 % of it.
    * All other views use the two nearest key views; there, the first run of views uses one.
    * A pixel off the epipolar line cannot be matched; there, its likeness is set to 0. Lines go through pixel centres.
    * Views are put in order by the azimuth that they look at; there, by the angle from the leftmost view.
    * The first edit starts at the photos rather than at renders; all views are edited, not a random 20.
    * Timesteps fall evenly from `start`. There is no mask from a text segmentation.

        compare: [dge, {type: dge+shared, noise: shared}]
    """

    init: str = "source"  # start from the photos noised to `start`, or from pure noise
    noise: str = "independent"  # noise of the views: independent (as in the code), or shared by all
    epipolar_reach: Annotated[float, Within(0, 10_000)] = 1.0  # largest distance from the line, in pixels of a layer
    # noise level below which each view is denoised alone, a share of the schedule
    alone_below: Share = 0.1
    sampler: Sampler = "ddim"  # ddim, euler or dpm++: how each step is taken
    rounds: Annotated[int, Within(0, MOST_STEPS)] = 1  # number of edits; the authors make a second one
    edit_every: Steps = 300  # steps of the fit between edits
    later_start: Share = 0.3  # `start` of later edits, which begin at renders of the scene

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, choices in (("init", INITS), ("noise", NOISES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: choose one of {', '.join(choices)}")
        if self.edit_every < 1:
            raise ValueError(f"edit_every is {self.edit_every}: give a whole number of at least 1")

    @torch.no_grad()
    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit all views, if a round begins at `step`."""
        number, rest = divmod(step, self.edit_every)
        if rest or number >= self.rounds:
            return
        rows, alphas = torch.arange(edit.count), edit.prior.alphas_cumprod
        z = edit.encode(edit.render(rows)) if number else edit.source.z
        first = timestep(self.later_start if number else self.start, len(alphas))
        timesteps = ddim_timesteps(first, self.ddim_steps)
        z_t = draw_noise(z, self.noise, edit.generator)
        if number or self.init == "source":
            z_t = add_noise(z, z_t, alphas[first].item())
        guided = self.guided(edit, self.predictor(edit))

        def predict(z_t: Tensor, t: int) -> Tensor:
            report({"t": float(t)})
            return guided(z_t, t)

        edit.replace(rows, sample(predict, z_t, alphas, timesteps, self.sampler))

    def predictor(self, edit: SceneEdit) -> Predict:
        """Predictions of all views; at each timestep from `alone_below` up, by attention to newly drawn key views."""
        unet, latents = edit.prior.unet, tuple(edit.source.z.shape[2:])
        sizes, cameras = layer_sizes(unet, *latents), edit.cameras.to(edit.prior.device)
        strides = layer_strides(sizes, latents, edit.prior.codec.downscale)
        lines = EpipolarLines(cameras, strides, sizes, self.epipolar_reach)
        positions = edit.cameras.positions.cpu()
        state = InjectedAttention(torch.cdist(positions, positions), lines.near)
        runs = in_runs(edit.cameras, self.count_keys(edit.count, edit.prior))

        def predict(asked: dict[str, Query]) -> dict[str, Tensor]:
            if next(iter(asked.values())).t < self.alone_below * edit.prior.num_train_timesteps:
                return edit.predict(asked)
            with self_attention(unet, state.attend):
                return key_views_first(edit, state, one_of_each(runs, edit.generator))(asked)

        return predict
