"""GaussCtrl (Wu et al. 2024, arXiv 2403.08733) on InstructPix2Pix: inverted views are edited, aligned to key views."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_sample, ddim_timesteps
from csd3d.distillation.schedule import timestep
from csd3d.editors.inversion import invert
from csd3d.editors.key_views import KeyViewEditor, in_runs, key_views_first, one_of_each
from csd3d.editors.scene import Report, SceneEdit
from csd3d.priors.attention import self_attention
from csd3d.priors.key_views import AlignedAttention
from csd3d.registry import register
from csd3d.schema import Share, Within


@register("scene_editor", "gaussctrl", title="GaussCtrl-like, without its ControlNet")
@dataclass(frozen=True)
class GaussCtrl(KeyViewEditor):
    """All views are inverted by DDIM, then edited with self-attention mixed with that to the key views, once.

    See `AlignedAttention` for the mixture, which acts in every self-attention layer at every step. Unlike the authors'
    code (github.com/ActiveVisionLab/gaussctrl):

    * The model is InstructPix2Pix, which sees the photos; there, it is Stable Diffusion with a ControlNet of depth.
    * Sampling undoes a DDIM inversion, so it is by DDIM alone.
    * The inversion is under the photo and the empty text; there, under a prompt that describes the scene.
    * It starts at the photos rather than at renders. Each key view is drawn from a run of views in order of azimuth;
      there, in the order of the capture.
    * There is no mask from a text segmentation, and no prompt beside the instruction.

        compare: [gaussctrl]
    """

    # number of key views, at most all and prior.micro_batch; null: one for five views
    key_views: Annotated[int, Within(1, 100_000)] | None = 4
    own_weight: Share = 0.6  # λ, the share of a view's attention to itself; 1: all alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.own_weight <= 1:
            raise ValueError(f"own_weight is {self.own_weight}: give a number in [0, 1]")

    @torch.no_grad()
    def update(self, edit: SceneEdit, step: int, report: Report) -> None:
        """Edit all views before the first step."""
        if step:
            return
        source, alphas = edit.source, edit.prior.alphas_cumprod
        timesteps = ddim_timesteps(timestep(self.start, len(alphas)), self.ddim_steps)
        z_t = invert(edit, source.z, source.image, timesteps)
        state = AlignedAttention(self.own_weight)
        runs = in_runs(edit.cameras, self.count_keys(edit.count, edit.prior))
        guided = self.guided(edit, key_views_first(edit, state, one_of_each(runs, edit.generator)))

        def predict(z_t: Tensor, t: int) -> Tensor:
            report({"t": float(t)})
            return guided(z_t, t)

        with self_attention(edit.prior.unet, state.attend):
            z = ddim_sample(predict, z_t, alphas, timesteps)
        edit.replace(torch.arange(edit.count), z)
