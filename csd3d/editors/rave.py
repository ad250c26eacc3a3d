"""RAVE (Kara et al. 2023, arXiv 2312.04524), on InstructPix2Pix."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from csd3d.editors.canvas import Canvas
from csd3d.editors.inversion import SampledFromSource, noised_source
from csd3d.errors import InputError
from csd3d.priors import Prior
from csd3d.registry import register
from csd3d.schema import Within


@register("canvas_editor", "rave", title="RAVE (on InstructPix2Pix)")
@dataclass(frozen=True)
class RAVE(SampledFromSource):
    """Frames are laid side by side in square grids, each denoised as one picture; every step deals them out anew.

    Attention and convolutions of the model then see several frames at once, and over the steps every frame meets many
    others. Where frames do not fill the last grid, some appear twice, and their second prediction is not used. The
    paper's ControlNet is replaced by the source pictures, which InstructPix2Pix sees in the same grid. Noise other than
    "inversion" is not in the paper. The pictures are `grid` times as wide and high as those the model was trained on;
    each frame in them counts as one evaluation of the model.

        editors: {rave: {grid: 2}}
        compare: [rave]
    """

    grid: Annotated[int, Within(1, 32)] = 3  # frames along a side of a grid

    def check(self, prior: Prior) -> None:
        """Raise InputError for a prior without a network, which knows pictures of one size alone."""
        if not isinstance(getattr(prior, "outline", None), nn.Module):
            raise InputError(
                "prior.model: RAVE lays several frames in one larger picture, and this prior has no network that takes "
                "it; use InstructPix2Pix or the shipped prior"
            )

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        images, timesteps = canvas.condition(), self.timesteps(canvas)
        z_t = noised_source(canvas, images, timesteps, self.noise, generator)[timesteps[0]]
        edited = torch.empty_like(z_t)
        for rows in canvas.tracks:

            def predict(z_t: Tensor, t: int, rows: Tensor = rows) -> Tensor:
                return self.in_grids(canvas, images[rows], z_t, t, generator)

            edited[rows] = self.denoise(canvas, predict, z_t[rows])
        return canvas.merge(edited)

    def in_grids(self, canvas: Canvas, images: Tensor, z_t: Tensor, t: int, generator: torch.Generator) -> Tensor:
        """The guided ε(z_t, t) [T, C, h, w] of frames that are dealt to grids at random.

        A call of the prior holds grids of at most `micro_batch` frames, or one grid.
        """
        dealt, found = deal(len(z_t), self.grid**2, generator), []
        before = canvas.prior.unet_evaluations
        for order in dealt.split(max(canvas.prior.micro_batch // self.grid**2, 1)):
            predict = self.guided(canvas, lay(images[order], self.grid))
            found.append(cut(predict(lay(z_t[order], self.grid), t), self.grid))
        # the prior counts a grid once, although it is as much work as its frames are, or more
        canvas.prior.unet_evaluations += (canvas.prior.unet_evaluations - before) * (self.grid**2 - 1)
        eps = torch.empty_like(z_t)
        eps[dealt.flatten()[: len(z_t)]] = torch.cat(found)[: len(z_t)]
        return eps


def deal(frames: int, places: int, generator: torch.Generator) -> Tensor:
    """Frames in a random order, `places` in each grid, [G, places]; the first of them again where the last has room."""
    order = torch.randperm(frames, generator=generator)
    grids = -(-frames // places)
    return order.repeat(-(-grids * places // frames))[: grids * places].view(grids, places)


def lay(frames: Tensor, side: int) -> Tensor:
    """Frames [G, side², C, h, w] as pictures [G, C, side h, side w], in rows from the top left."""
    G, _, C, h, w = frames.shape
    return frames.view(G, side, side, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(G, C, side * h, side * w)


def cut(pictures: Tensor, side: int) -> Tensor:
    """The frames [G side², C, h, w] of pictures: the inverse of `lay`, of all grids in order."""
    G, C, height, width = pictures.shape
    parts = pictures.view(G, C, side, height // side, side, width // side).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(G * side**2, C, height // side, width // side)
