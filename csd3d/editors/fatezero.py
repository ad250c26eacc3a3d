"""FateZero (Qi et al. 2023, arXiv 2303.09535) on an InstructPix2Pix prior: reuse the source's attention maps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_invert, ddim_sample
from csd3d.distillation.guidance import edit_queries
from csd3d.editors.canvas import Canvas, check_shares
from csd3d.editors.inversion import by_micro_batches, image_query
from csd3d.editors.sampled import Sampled
from csd3d.errors import InputError
from csd3d.priors import Prior
from csd3d.priors.attention import (
    AttentionFusion,
    AttentionMaps,
    CrossFrameAttention,
    changed_attention,
    check_attention,
    layer_sizes,
    map_shapes,
)
from csd3d.registry import register
from csd3d.schema import Within

MakeState = Callable[[int], AttentionFusion]  # takes the number of windows


@register("canvas_editor", "fatezero", title="FateZero (on InstructPix2Pix)")
@dataclass(frozen=True)
class FateZero(Sampled):
    """Record the source's attention maps during its inversion, and fuse them into the edit's (`AttentionFusion`).

    Every frame attends to itself and to the middle frame of its track. Frames are edited in chunks, each together with
    the middle frame, and only one chunk's maps are in memory. Raises InputError if the maps of two frames exceed the
    budget.

        editors: {fatezero: {mask_threshold: 0.3}}
        compare: [fatezero]
    """

    fuse_steps: float = 0.8  # share of the edit's steps, from the first, in which maps are fused
    mask_threshold: float = 0.3  # τ: pixels that attend less to the instruction keep the source; above 1: all do
    max_pixels: Annotated[int, Within(0, 2**24)] = 256  # fuse maps only in layers of at most this many latent pixels
    budget_gib: float = 2.0  # memory for maps, in GiB; it limits how many frames are edited at once

    edits: ClassVar[tuple[str, ...]] = ("video",)
    inverts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "fuse_steps")
        for key in ("mask_threshold", "budget_gib"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: give a finite number of at least 0")

    def check(self, prior: Prior) -> None:
        """Raise InputError for a model without Stable Diffusion's attention, or if the tokenizer will be freed."""
        check_attention(prior)
        if prior.options.drop_text_encoder:
            raise InputError("prior.drop_text_encoder: fatezero needs the tokenizer until the end; set it false")

    def sample(self, canvas: Canvas, generator: torch.Generator) -> Tensor:
        z_source, images = canvas.gather(canvas.z), canvas.condition()
        edited = torch.empty_like(z_source)
        make_state, at_once = self.plan(canvas, z_source.shape[-2:])
        for track in canvas.tracks:
            middle = track[len(track) // 2]
            for chunk in track[track != middle].split(max(at_once - 1, 1)):
                rows = torch.cat([middle[None], chunk])
                edited[rows] = self.fuse(canvas, z_source[rows], images[rows], make_state(len(rows)))
        return canvas.merge(edited)

    def plan(self, canvas: Canvas, size: tuple[int, int]) -> tuple[MakeState, int]:
        """Return a function that makes the state for windows of `size` = (h, w), and how many fit in the budget."""
        unet, nothing = canvas.prior.unet, canvas.prior.condition([""]).text
        sees, sizes = ("own", "anchor"), layer_sizes(unet, *size)
        shapes = map_shapes(unet, sizes, nothing.shape[1], len(sees), self.max_pixels)
        steps = round(self.fuse_steps * len(self.timesteps(canvas)))
        budget, words = int(self.budget_gib * 2**30), instruction_words(canvas.prior, canvas.instructions[0])

        def make_state(count: int) -> AttentionFusion:
            return AttentionFusion(
                frames=CrossFrameAttention(sees),
                maps=AttentionMaps(shapes, count, steps, budget),
                sizes=sizes,
                source_text=nothing,
                words=words,
                threshold=self.mask_threshold,
            )

        return make_state, budget // max(AttentionMaps.frame_bytes(shapes, steps), 1)

    def fuse(self, canvas: Canvas, z_source: Tensor, images: Tensor, state: AttentionFusion) -> Tensor:
        """Invert windows [T, C, h, w] and edit them by FateZero; all attend to the first. Return clean latents.

        Step k of the edit uses the maps of the inversion's k-th step from the end. While maps are recorded, the prior
        is also run with the instruction, to see which pixels attend to its words.
        """
        timesteps, prompts = self.timesteps(canvas), canvas.prompts(len(z_source))
        predict = by_micro_batches(canvas, state.frames.begin)
        guided = self.guided(canvas, images, predict)
        undone_by, step = iter(reversed(range(len(timesteps)))), iter(range(len(timesteps)))

        def record(z_t: Tensor, t: int) -> Tensor:
            if state.at("record", next(undone_by)):
                asked = edit_queries(z_t, t, prompts, images, image_scale=1.0)  # "image" and "full"
            else:
                asked = {"image": image_query(z_t, t, images)}
            return predict(asked)["image"]

        def fuse(z_t: Tensor, t: int) -> Tensor:
            state.at("fuse", next(step))
            return guided(z_t, t)

        with changed_attention(canvas.prior.unet, state):
            z_t = ddim_invert(record, z_source, canvas.prior.alphas_cumprod, timesteps[::-1])
            return ddim_sample(fuse, z_t, canvas.prior.alphas_cumprod, timesteps)


def instruction_words(prior: Prior, prompt: str) -> Tensor:
    """A mask [L] bool of the tokens of `prompt`, without start, end and padding.

    Raises InputError if the text encoder and its tokenizer were freed before.
    """
    if "tokenizer" not in prior.text.parts:
        raise InputError("prior.drop_text_encoder: the tokenizer is already freed; set it false")
    position = torch.arange(prior.condition([prompt]).text.shape[1])
    count = len(prior.tokenizer(prompt, truncation=True, max_length=len(position)).input_ids)
    return (position > 0) & (position < count - 1)
