"""Shared by Pix2Video and FateZero: DDIM inversion of the source, and prior calls for cross-frame attention.

Both invert the source under its own image and the empty text, without guidance. The windows at one place in all frames
are treated as a video of their own.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_invert
from csd3d.distillation.method import Predict, Query
from csd3d.editors.canvas import Canvas
from csd3d.editors.sampled import WINDOWS_AT_ONCE

Begin = Callable[[tuple[str, ...], int], None]  # (queries of the coming call, its first frame); see priors.attention


def image_query(z_t: Tensor, t: int, images: Tensor) -> Query:
    """The query under the source's own picture and no instruction."""
    return Query(z_t, t, ("",) * len(z_t), images)


def invert(canvas: Canvas, z: Tensor, images: Tensor, timesteps: list[int]) -> Tensor:
    """DDIM inversion of windows z [m, C, h, w], each alone, through the falling `timesteps` in reverse."""

    def inverted(part: Tensor) -> Tensor:
        def predict(z_t: Tensor, t: int) -> Tensor:
            return canvas.predict({"image": image_query(z_t, t, images[part])})["image"]

        return ddim_invert(predict, z[part], canvas.prior.alphas_cumprod, timesteps[::-1])

    return torch.cat([inverted(part) for part in torch.arange(len(z)).split(WINDOWS_AT_ONCE)])


def by_micro_batches(canvas: Canvas, begin: Begin) -> Predict:
    """`canvas.predict` for queries with one row per frame, split into calls of one micro-batch each.

    A call holds as many queries as fit in the micro-batch, then as many of their frames as fit, in rising order.
    `begin` is called before each call, so that cross-frame attention knows which row is which frame.
    """

    def predict(asked: dict[str, Query]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in asked}
        count = len(next(iter(asked.values())).z_t)
        for names, part in micro_batches(tuple(asked), count, canvas.prior.micro_batch):
            begin(names, int(part[0]))
            answers = canvas.predict({name: _of_frames(asked[name], part) for name in names})
            for name in names:
                found[name].append(answers[name])
        return {name: torch.cat(parts) for name, parts in found.items()}

    return predict


def micro_batches(names: tuple[str, ...], frames: int, size: int) -> list[tuple[tuple[str, ...], Tensor]]:
    """The queries and frames of each call, at most `size` rows per call."""
    together = min(len(names), size)
    groups = [names[i : i + together] for i in range(0, len(names), together)]
    return [(group, part) for group in groups for part in torch.arange(frames).split(size // together)]


def _of_frames(query: Query, rows: Tensor) -> Query:
    image = None if query.image is None else query.image[rows]
    return replace(query, z_t=query.z_t[rows], prompts=tuple(query.prompts[i] for i in rows.tolist()), image=image)
