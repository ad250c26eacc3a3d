"""Shared by editors that work inside the attention: DDIM inversion of the source, and prior calls row by row.

The source is inverted under its own image and the empty text, without guidance. The windows at one place in all frames
of a canvas are treated as a video of their own; in scenes, each view is a frame.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_invert
from csd3d.distillation.method import Predict, Query
from csd3d.distillation.noise import NOISES, add_noise, draw_noise
from csd3d.editors.canvas import Canvas
from csd3d.editors.sampled import WINDOWS_AT_ONCE, Sampled
from csd3d.priors import Prior
from csd3d.priors.queries import restricted

SOURCES = ("inversion", *NOISES)  # where the noise of an edit comes from
Begin = Callable[[tuple[str, ...], int], None]  # (queries of the coming call, its first frame); see priors.attention


class Asked(Protocol):
    """The part of a `Canvas` or a `SceneEdit` that is used here."""

    @property
    def prior(self) -> Prior: ...

    def predict(self, asked: dict[str, Query]) -> dict[str, Tensor]: ...


def image_query(z_t: Tensor, t: int, images: Tensor) -> Query:
    """The query under the source's own picture and no instruction."""
    return Query(z_t, t, ("",) * len(z_t), images)


def invert(work: Asked, z: Tensor, images: Tensor, timesteps: list[int]) -> Tensor:
    """DDIM inversion of windows z [m, C, h, w], each alone, through the falling `timesteps` in reverse."""

    def inverted(part: Tensor) -> Tensor:
        def predict(z_t: Tensor, t: int) -> Tensor:
            return work.predict({"image": image_query(z_t, t, images[part])})["image"]

        return ddim_invert(predict, z[part], work.prior.alphas_cumprod, timesteps[::-1])

    return torch.cat([inverted(part) for part in torch.arange(len(z)).split(WINDOWS_AT_ONCE)])


def by_micro_batches(work: Asked, begin: Begin, whole: bool = False) -> Predict:
    """`work.predict` for queries with one row per frame, split into calls of one micro-batch each.

    A call holds as many queries as fit in the micro-batch, then as many of their frames as fit, in rising order; with
    `whole` it always holds all frames, of at least one query. `begin` is called before each call, so that attention
    across frames knows which row is which frame.
    """

    def predict(asked: dict[str, Query]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in asked}
        count = len(next(iter(asked.values())).z_t)
        for names, part in micro_batches(tuple(asked), count, work.prior.micro_batch, whole):
            begin(names, int(part[0]))
            answers = work.predict({name: restricted(replace(asked[name], rows=part)) for name in names})
            for name in names:
                found[name].append(answers[name])
        return {name: torch.cat(parts) for name, parts in found.items()}

    return predict


def micro_batches(
    names: tuple[str, ...], frames: int, size: int, whole: bool = False
) -> list[tuple[tuple[str, ...], Tensor]]:
    """The queries and frames of each call, at most `size` rows per call; ValueError if `whole` frames do not fit."""
    if whole and frames > size:
        raise ValueError(f"{frames} frames in one call, and prior.micro_batch is {size}")
    together = min(len(names), size // frames if whole else size)
    groups = [names[i : i + together] for i in range(0, len(names), together)]
    return [(group, part) for group in groups for part in torch.arange(frames).split(size // together)]


def noised_source(
    canvas: Canvas, images: Tensor, timesteps: list[int], kind: str, generator: torch.Generator
) -> dict[int, Tensor]:
    """The source's windows [m, C, h, w] at each of the falling `timesteps`: inverted, or all with one draw of noise.

    `kind` is one of `SOURCES`; noise is drawn once for the whole canvas.
    """
    z, alphas = canvas.gather(canvas.z), canvas.prior.alphas_cumprod
    if kind != "inversion":
        eps = canvas.gather(draw_noise(canvas.z, kind, generator))
        return {t: add_noise(z, eps, alphas[t].item()) for t in timesteps}
    started: list[Tensor] = []  # what each step of the inversion starts at

    def predict(z_t: Tensor, t: int) -> Tensor:
        started.append(z_t)
        return canvas.predict({"image": image_query(z_t, t, images)})["image"]

    last = ddim_invert(predict, z, alphas, timesteps[::-1])
    return dict(zip(timesteps[::-1], [*started[1:], last], strict=True))


@dataclass(frozen=True)
class SampledFromSource(Sampled):
    """Base of editors of videos that sample from the inverted source, as their papers do, or from the noised one."""

    noise: str = "inversion"  # where the frames' noise comes from: inversion (the paper), shared or independent

    edits: ClassVar[tuple[str, ...]] = ("video",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise not in SOURCES:
            raise ValueError(f"noise is {self.noise!r}: choose one of {', '.join(SOURCES)}")

    @property
    def inverts(self) -> bool:
        """Whether sampling starts from a DDIM inversion."""
        return self.noise == "inversion"
