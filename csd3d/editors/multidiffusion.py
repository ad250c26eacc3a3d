"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113) on InstructPix2Pix: windows fused at every step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.distillation.multidiffusion import multidiffusion_sample
from csd3d.editors.canvas import Canvas
from csd3d.editors.sampled import WINDOWS_AT_ONCE, SampledFromNoise
from csd3d.registry import register


@register("canvas_editor", "ip2p_multidiffusion", title="InstructPix2Pix with MultiDiffusion")
@dataclass(frozen=True)
class MultiDiffusion(SampledFromNoise):
    """InstructPix2Pix; the windows' guided predictions are averaged at every step.

    compare: [ip2p_multidiffusion]
    """

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        images = canvas.condition()

        def predict(z_windows: Tensor, t: int, rows: Tensor) -> Tensor:
            return self.guided(canvas, images[rows])(z_windows, t)

        return multidiffusion_sample(
            predict,
            self.start_latents(canvas, generator),
            canvas.prior.alphas_cumprod,
            self.timesteps(canvas),
            gather=canvas.gather,
            scatter=canvas.scatter,
            weights=canvas.weights,
            batch=WINDOWS_AT_ONCE,
            sampler=self.sampling(canvas).sampler,
        )
