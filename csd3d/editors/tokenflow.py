"""TokenFlow (Geyer et al. 2023, arXiv 2307.10373), on InstructPix2Pix."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from csd3d.distillation.guidance import edit_guided, edit_queries
from csd3d.editors.canvas import Canvas
from csd3d.editors.inversion import SampledFromSource, image_query, noised_source
from csd3d.editors.key_views import key_views_first, one_of_each
from csd3d.errors import InputError
from csd3d.priors import Prior
from csd3d.priors.attention import check_attention, self_attention
from csd3d.priors.token_flow import SOURCE, TokenFlowAttention
from csd3d.registry import register
from csd3d.schema import Within


@register("canvas_editor", "tokenflow", title="TokenFlow (on InstructPix2Pix)")
@dataclass(frozen=True)
class TokenFlow(SampledFromSource):
    """Key frames are edited together at each step; their features flow to the other frames by the source's matches.

    At each step one key frame is drawn from each run of `key_every` frames, as in the authors' code. Key frames attend
    to all key frames in all self-attention layers, and the other frames take over their outputs (`TokenFlowAttention`).
    The source's own latents at the same t go through the UNet beside the edit, under the source's picture and no text:
    one prediction more for each frame and step. The authors' editing technique (Plug-and-Play) is replaced by
    InstructPix2Pix, which sees the source picture itself. Noise other than "inversion" is not in the paper.

        editors: {tokenflow: {key_every: 8}}
        compare: [tokenflow]
    """

    key_every: Annotated[int, Within(1, 100_000)] = 8  # frames for each key frame; there are at most prior.micro_batch

    def check(self, prior: Prior) -> None:
        """Raise InputError for a model without the attention of Stable Diffusion's UNet."""
        check_attention(prior)

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        images, timesteps = canvas.condition(), self.timesteps(canvas)
        count, at_once = -(-len(canvas.z) // self.key_every), canvas.prior.micro_batch
        if count > at_once:
            raise InputError(
                f"tokenflow.key_every: {self.key_every} makes {count} key frames of {len(canvas.z)} frames, which need "
                f"one call of the model, but prior.micro_batch is {at_once}: raise one of the two"
            )
        source = noised_source(canvas, images, timesteps, self.noise, generator)
        edited = torch.empty_like(source[timesteps[0]])
        for rows in canvas.tracks:
            of_track = {t: z_t[rows] for t, z_t in source.items()}
            edited[rows] = self.flow(canvas, of_track, images[rows], timesteps, generator)
        return canvas.merge(edited)

    def flow(
        self,
        canvas: Canvas,
        source: dict[int, Tensor],
        images: Tensor,
        timesteps: list[int],
        generator: torch.Generator,
    ) -> Tensor:
        """The edited latents [T, C, h, w] of the frames of a video, by the source's latents at each timestep."""
        own, state = self.sampling(canvas), TokenFlowAttention()
        runs = list(torch.arange(len(images)).split(self.key_every))

        def predict(z_t: Tensor, t: int) -> Tensor:
            asked = {SOURCE: image_query(source[t], t, images)}  # first, because the others need its matches
            asked |= edit_queries(z_t, t, canvas.prompts(len(images)), images, own.image_scale)
            found = key_views_first(canvas, state, one_of_each(runs, generator))(asked)
            return edit_guided(found, own.text_scale, own.image_scale)

        with self_attention(canvas.prior.unet, state.attend):
            return self.denoise(canvas, predict, source[timesteps[0]])
