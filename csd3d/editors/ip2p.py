"""InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): each window alone, or the whole canvas scaled down."""

from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.editors.canvas import Canvas, window_side
from csd3d.editors.sampled import WINDOWS_AT_ONCE, SampledFromNoise
from csd3d.priors import Prior
from csd3d.registry import register


@register("canvas_editor", "ip2p", title="InstructPix2Pix, one by one")
@dataclass(frozen=True)
class IP2P(SampledFromNoise):
    """InstructPix2Pix on each window alone; overlapping windows are averaged at the end.

    editors: {ip2p: {steps: 20, noise: shared}}
    compare: [ip2p]
    """

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        images = canvas.condition()
        windows = canvas.gather(self.start_latents(canvas, generator))
        edited = [
            self.denoise(canvas, self.guided(canvas, images[rows]), windows[rows])
            for rows in torch.arange(len(windows)).split(WINDOWS_AT_ONCE)
        ]
        return canvas.merge(torch.cat(edited))


@register("canvas_editor", "ip2p_downscaled", title="InstructPix2Pix on the whole, scaled down")
@dataclass(frozen=True)
class DownscaledIP2P(IP2P):
    """InstructPix2Pix on whole frames, scaled down to the prior's training size.

    compare: [ip2p_downscaled]
    """

    def own_canvas(self, canvas: Canvas) -> Canvas:
        return canvas.scaled(downscaled_size(canvas.prior, *canvas.latents.clip.size))


def downscaled_size(prior: Prior, height: int, width: int) -> tuple[int, int]:
    """(H, W) with the longer side at the prior's training size, both multiples of what VAE and predictor divide by."""
    factor = prior.codec.downscale
    unit = prior.codec.multiple
    if blocks := prior.outline.config.get("down_block_types"):
        unit = factor * 2 ** (len(blocks) - 1)
    scale = window_side(prior, None) * factor / max(height, width)
    return tuple(max(round(side * scale / unit), 1) * unit for side in (height, width))
