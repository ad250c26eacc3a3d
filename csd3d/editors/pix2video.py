"""Pix2Video (Ceylan et al. 2023, arXiv 2303.12688), on an InstructPix2Pix prior instead of the paper's depth model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_step
from csd3d.editors.canvas import Canvas, check_shares
from csd3d.editors.inversion import by_micro_batches, invert
from csd3d.editors.sampled import Sampled
from csd3d.priors import Prior
from csd3d.priors.attention import CrossFrameAttention, check_attention, cross_frame_attention
from csd3d.registry import register

DECODER = "up_blocks."  # UNet layers with cross-frame attention
GUIDANCE = 100.0  # weight of the mean squared difference in the authors' code


@register("canvas_editor", "pix2video", title="Pix2Video (on InstructPix2Pix)")
@dataclass(frozen=True)
class Pix2Video(Sampled):
    """In the decoder each frame attends to the first and the previous frame, not to itself; latents are guided too.

    In the first half of the steps each frame's latent descends the distance to the previous frame's clean latent, as in
    the authors' code (see `guide_latents`). The paper edits one frame after the other. Here all frames take each step
    together, with the same result: frame i uses frame i − 1 (attention inputs, ẑ_0) at the same step only.

        editors: {pix2video: {steps: 50}}
        compare: [pix2video]
    """

    guided_steps: float = 0.5  # share of the steps, from the first, in which frames are guided to the previous one

    edits: ClassVar[tuple[str, ...]] = ("video",)
    inverts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "guided_steps")

    def check(self, prior: Prior) -> None:
        """Raise InputError for a model without the attention of Stable Diffusion's UNet."""
        check_attention(prior)

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        z_source, images, timesteps = canvas.gather(canvas.z), canvas.condition(), self.timesteps(canvas)
        edited = torch.empty_like(z_source)
        for rows in canvas.tracks:
            z_t = invert(canvas, z_source[rows], images[rows], timesteps)
            state = CrossFrameAttention(("anchor", "previous"))
            guided = self.guided(canvas, images[rows], by_micro_batches(canvas, state.begin))
            with cross_frame_attention(canvas.prior.unet, state, DECODER):
                edited[rows] = sample_guided(
                    guided, z_t, canvas.prior.alphas_cumprod, timesteps, self.guided_steps * len(timesteps)
                )
        return canvas.merge(edited)


def sample_guided(
    predict: Callable[[Tensor, int], Tensor],
    z_t: Tensor,
    alphas_cumprod: Tensor,
    timesteps: list[int],
    guided_steps: float,
) -> Tensor:
    """`ddim_sample` of the frames z_t [T, ...] of a video, with `guide_latents` after each of the first steps."""
    alpha_bars = [alphas_cumprod[t].item() for t in timesteps] + [1.0]
    for step, (t, (alpha_bar, alpha_bar_next)) in enumerate(zip(timesteps, pairwise(alpha_bars), strict=True)):
        eps = predict(z_t, t)
        z0 = ddim_step(z_t, eps, alpha_bar, 1.0)
        z_t = ddim_step(z_t, eps, alpha_bar, alpha_bar_next)
        if step < guided_steps:
            z_t = guide_latents(z_t, z0)
    return z_t


def guide_latents(z_next: Tensor, z0: Tensor) -> Tensor:
    """Apply Pix2Video's latent guidance to frames i > 0; `z_next` and ẑ_0 are [T, ...].

        z_{t−1,i} ← z_{t−1,i} − ∇_{ẑ_0,i} 100 · mean (ẑ_0,i − ẑ_0,i−1)² = z_{t−1,i} − (200/n)(ẑ_0,i − ẑ_0,i−1)

    n is the number of values in a frame's latents. As in the authors' code, the gradient is taken with respect to ẑ_0,
    without a pass through the UNet, and the step does not depend on t: 0.012 of the difference for 4 × 64 × 64 latents.
    """
    ahead = torch.zeros_like(z0)
    ahead[1:] = z0[1:] - z0[:-1]
    return z_next - 2 * GUIDANCE / z0[0].numel() * ahead
