"""FateZero (Qi et al. 2023, arXiv 2303.09535) on an InstructPix2Pix prior: the source keeps its attention."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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
    fused_attention,
    layer_sizes,
    map_shapes,
)
from csd3d.registry import register

MakeState = Callable[[int], AttentionFusion]  # of how many windows


@register("canvas_editor", "fatezero", title="FateZero (on InstructPix2Pix)")
@dataclass(frozen=True)
class FateZero(Sampled):
    """The source's attention maps are recorded while it is inverted, and fused into the edit's (`AttentionFusion`).

    Frames attend to themselves and to the middle one of their track, which is inverted and edited anew with each chunk
    of the others; attention maps are kept of one chunk at a time. Raises InputError where those of the middle frame and
    one other exceed the budget.

        editors: {fatezero: {mask_threshold: 0.3}}
        compare: [fatezero]
    """

    fuse_steps: float = 0.8  # the first steps of the edit, as a share of all, in which maps are fused
    mask_threshold: float = 0.3  # τ: pixels that attend to the instruction less are the source's; 0: none, above 1: all
    max_pixels: int = 256  # maps are fused in layers of at most so many latent pixels
    budget_gib: float = 2.0  # that maps may take; as many frames are edited at once as fit, however long the video

    edits: ClassVar[tuple[str, ...]] = ("video",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "fuse_steps")
        for key in ("mask_threshold", "budget_gib"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: give a finite number of at least 0")

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
        """How to make the state for some windows of `size` = (h, w), and of how many the maps fit in the budget."""
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
        """Windows [T, C, h, w], of which all see the first, inverted and edited by FateZero: clean latents.

        Step k of the edit has the maps of the step of the inversion that it undoes, the k-th from its end. Beside the
        inversion, on its latents, the instruction is asked what its words attend to.
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

        with fused_attention(canvas.prior.unet, state):
            z_t = ddim_invert(record, z_source, canvas.prior.alphas_cumprod, timesteps[::-1])
            return ddim_sample(fuse, z_t, canvas.prior.alphas_cumprod, timesteps)


def instruction_words(prior: Prior, prompt: str) -> Tensor:
    """[L] bool: the tokens of `prompt` that are neither its start, its end nor padding.

    Raises InputError where the text encoder, and its tokenizer with it, was freed before.
    """
    if "tokenizer" not in prior.text.parts:
        raise InputError("prior.drop_text_encoder: the tokenizer is freed; find words before, or set it false")
    position = torch.arange(prior.condition([prompt]).text.shape[1])
    count = len(prior.tokenizer(prompt, truncation=True, max_length=len(position)).input_ids)
    return (position > 0) & (position < count - 1)
