"""Reads and changes the attention of Stable Diffusion's UNets: across the frames of a video, and fused with a source's.

It works through diffusers' attention processors. A processor has no state; the caller keeps a state object and tells it
before every call of the UNet what the call holds:

    a call has B groups (branches of guidance) of M frames, row b M + m being frame m of group b; a video that does not
    fit in one call comes in several at the same timestep, its frames in rising order

Symbols: n queries (the pixels of a layer), m keys, L tokens of text; attention maps [rows, heads, n, m], each row of a
map summing to 1. Only attention in transformer blocks is changed: it has no residual, scale or norm of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csd3d.errors import InputError

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from csd3d.priors.prior import Prior

SEES = ("own", "anchor", "previous")
MODES = ("pass", "record", "fuse")
MAP_BYTES = 2  # maps are kept in float16
Shape = tuple[int, int, int]
Attend = Callable[["Attention", Tensor, Tensor | None], Tensor]  # (layer, hidden states, text or None) -> output
SelfAttend = Callable[[str, Callable[..., Tensor], "Attention", Tensor], Tensor]  # (name, own processor, layer, states)
NONE_THERE = (
    "prior.model: this method works inside the attention of a UNet of Stable Diffusion's class, "
    "and this model has none; use InstructPix2Pix or the shipped prior"
)


def attention_layers(unet: nn.Module, within: str = "") -> dict[str, "Attention"]:
    """The attention layers of a UNet's transformer blocks whose names start with `within`, by name.

    Raises InputError where there are none, or they do more than attend (DeepFloyd IF's, a transformer's).
    """
    from diffusers.models.attention_processor import Attention

    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and ".transformer_blocks." in name and name.startswith(within)
    }
    if not layers or any(x.added_kv_proj_dim or x.norm_q or x.norm_cross or x.group_norm for x in layers.values()):
        raise InputError(NONE_THERE)
    return layers


def check_attention(prior: "Prior") -> None:
    """Raise InputError for a prior without a UNet whose attention can be changed; it may have no network at all."""
    network = getattr(prior, "outline", None)  # without weights: nothing is opened to look
    if not isinstance(network, nn.Module):
        raise InputError(NONE_THERE)
    attention_layers(network)


@dataclass
class _Processor:
    """A processor of diffusers that calls `attend`; `encoder_hidden_states` is None in self-attention."""

    attend: Attend

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention across frames takes no attention mask: embed prompts without one")
        return self.attend(attn, hidden_states, encoder_hidden_states)


@contextmanager
def _replaced(layers: dict[str, "Attention"], make: Callable[[str, Callable[..., Tensor]], Attend]) -> Iterator[None]:
    """Let `layers` attend by `make(name, own processor)` inside the block; then they get their own processors back."""
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(_Processor(make(name, layer.processor)))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


class CrossFrameAttention:
    """Which frames a frame's self-attention takes keys and values from; keeps those of earlier calls that it needs.

    `sees` lists the frames whose keys are concatenated: "own", the frame itself; "anchor", the first of all frames;
    "previous", the frame before (the first frame sees itself). Pix2Video (arXiv 2303.12688) sees anchor and previous.
    Keys that appear twice share their weight, so a frame that sees itself twice attends as if it saw itself once.

    For every layer and group the inputs of the anchor and of the last frame are kept, however long the video.
    """

    def __init__(self, sees: tuple[str, ...]):
        if not sees or not set(sees) <= set(SEES):
            raise ValueError(f"sees is {sees}: give some of {', '.join(SEES)}")
        self.sees, self.groups, self.first = sees, (), 0
        self._kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def begin(self, groups: tuple[str, ...], first: int) -> None:
        """Announce a call of the UNet: the names of its groups, and the number of its first frame in the video."""
        self.groups, self.first = groups, first

    def context(self, layer: str, hidden: Tensor) -> Tensor:
        """The states [B M, len(sees) n, D] that rows [B M, n, D] of a self-attention layer attend to."""
        if not self.groups or len(hidden) % len(self.groups):
            raise ValueError(f"a call of {len(hidden)} rows does not hold whole frames of groups {self.groups}")
        frames = hidden.unflatten(0, (len(self.groups), -1))
        return torch.cat([self._of_group(layer, group, own) for group, own in zip(self.groups, frames, strict=True)])

    def _of_group(self, layer: str, group: str, own: Tensor) -> Tensor:
        anchor, last = (own[:1], own[:1]) if self.first == 0 else self._kept[layer, group]
        self._kept[layer, group] = anchor.clone(), own[-1:].clone()  # a slice would keep the whole batch
        seen = {"own": own, "anchor": anchor.expand_as(own), "previous": torch.cat([last, own[:-1]])}
        return torch.cat([seen[name] for name in self.sees], dim=1)


@contextmanager
def self_attention(unet: nn.Module, attend: SelfAttend, within: str = "") -> Iterator[None]:
    """Let self-attention in layers whose names start with `within` be done by `attend`, inside the block."""
    layers = {name: layer for name, layer in attention_layers(unet, within).items() if not layer.is_cross_attention}
    with _replaced(layers, lambda name, base: lambda attn, hidden, _: attend(name, base, attn, hidden)):
        yield


@contextmanager
def cross_frame_attention(unet: nn.Module, state: CrossFrameAttention, within: str = "") -> Iterator[None]:
    """Make self-attention in layers whose names start with `within` see the frames of `state`, inside the block."""

    def attend(name: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor) -> Tensor:
        return base(attn, hidden, encoder_hidden_states=state.context(name, hidden))

    with self_attention(unet, attend, within):
        yield


def layer_sizes(unet: nn.Module, height: int, width: int) -> dict[str, tuple[int, int]]:
    """(h, w) of each attention layer for latents of `height` x `width`: halved by each block, rounded up."""
    levels = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(unet.down_blocks))]
    blocks = {f"down_blocks.{i}.": size for i, size in enumerate(levels)} | {"mid_block.": levels[-1]}
    blocks |= {f"up_blocks.{i}.": size for i, size in enumerate(reversed(levels))}
    names = attention_layers(unet)
    return {name: next(size for block, size in blocks.items() if name.startswith(block)) for name in names}


def map_shapes(
    unet: nn.Module, sizes: dict[str, tuple[int, int]], tokens: int, contexts: int, max_pixels: int
) -> dict[str, Shape]:
    """(heads, n, m) of one frame's map, in the layers that have at most `max_pixels` queries.

    Self-attention has `contexts` n keys, cross-attention `tokens`. Raises InputError where no layer is small enough.
    """
    shapes = {}
    for name, layer in attention_layers(unet).items():
        n = sizes[name][0] * sizes[name][1]
        if n <= max_pixels:
            shapes[name] = (layer.heads, n, tokens if layer.is_cross_attention else contexts * n)
    if not shapes:
        smallest = min(h * w for h, w in sizes.values())
        raise InputError(f"max_pixels is {max_pixels}, and no attention layer is so small: give at least {smallest}")
    return shapes


class AttentionMaps:
    """Attention maps of a source by step, layer and frame, on the CPU in float16; `shapes` are from `map_shapes`.

    Raises InputError where the maps of all `frames` and `steps` need more than `budget` bytes. They are allocated when
    they are first stored.
    """

    def __init__(self, shapes: dict[str, Shape], frames: int, steps: int, budget: int):
        self.shapes, self.frames, self.steps = shapes, frames, steps
        needed = frames * self.frame_bytes(shapes, steps)
        if needed > budget:
            raise InputError(
                f"attention maps of {frames} frames in {steps} steps take {needed / 2**30:.3g} GiB, more than the "
                f"{budget / 2**30:.3g} GiB allowed: raise budget_gib, or lower max_pixels or steps"
            )
        self._maps: dict[tuple[int, str], Tensor] = {}

    @staticmethod
    def frame_bytes(shapes: dict[str, Shape], steps: int) -> int:
        """Bytes of one frame's maps."""
        return steps * MAP_BYTES * sum(heads * n * m for heads, n, m in shapes.values())

    def put(self, step: int, layer: str, rows: slice, maps: Tensor) -> None:
        """Store `maps` [M, heads, n, m] of the frames `rows`."""
        if (step, layer) not in self._maps:
            self._maps[step, layer] = torch.empty(self.frames, *self.shapes[layer], dtype=torch.float16)
        self._maps[step, layer][rows] = maps.to("cpu", torch.float16)

    def get(self, step: int, layer: str, rows: slice, like: Tensor) -> Tensor:
        """The maps of the frames `rows`, in the dtype and on the device of `like`."""
        return self._maps[step, layer][rows].to(like)


@dataclass
class AttentionFusion:
    """State of FateZero (Qi et al. 2023, arXiv 2303.09535): a source's attention recorded, then fused into its edit.

        s = M s_edit + (1 − M) s_src                        self-attention maps
        o = M c_edit V_edit + (1 − M) c_src V_src           outputs of cross-attention
        M = 1 where A / max A ≥ threshold, else 0           A [n], the source's attention to the instruction's words

    at every pixel of a layer; A is the mean over cross-attention layers and heads, resized to the layer. Mode "record"
    stores the maps of group "image" as s_src and c_src, and computes A from those of group "full"; mode "fuse" fuses
    both groups. In mode "pass", in other groups and in layers without stored maps, only the frames seen change.

    The paper takes c_src for the words that both prompts have. An instruction shares no words with the empty text of an
    InstructPix2Pix source, so we apply the rule to both texts side by side: the empty text has the source's maps, the
    instruction its own, and M chooses between them at each pixel. With M = 0 everywhere, "full" equals "image", and
    both are the source's own prediction.

    `source_text` [1, L, D] is the embedding whose values are V_src; `words` [L] bool marks the tokens that are words.
    """

    frames: CrossFrameAttention
    maps: AttentionMaps
    sizes: dict[str, tuple[int, int]]
    source_text: Tensor
    words: Tensor
    threshold: float
    mode: str = "pass"
    step: int = 0
    attended: dict[int, Tensor] = field(default_factory=dict)  # A before the division, [frames, 1, h, w] by step

    def at(self, mode: str, step: int) -> bool:
        """Set what the next calls do, and the step whose maps they store or read. False where `mode` became "pass".

        Maps are kept for the first `maps.steps` steps of the edit; the others pass.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
        kept = step < self.maps.steps
        self.mode, self.step = mode if kept else "pass", step
        if self.mode == "record":
            self.attended[step] = torch.zeros(self.maps.frames, 1, *max(self.sizes[name] for name in self.maps.shapes))
        return kept

    def process(
        self, layer: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor, text: Tensor | None
    ) -> Tensor:
        """The output of a layer; its own processor `base` attends where no map is stored."""
        context = text if attn.is_cross_attention else self.frames.context(layer, hidden)
        if self.mode == "pass" or layer not in self.maps.shapes:
            return base(attn, hidden, encoder_hidden_states=context)
        probs, value = attention_maps(attn, hidden, context)
        source = attention_values(attn, self.source_text.to(context)) if attn.is_cross_attention else None
        return attention_output(attn, self.attend(layer, probs, value, source))

    def attend(self, layer: str, probs: Tensor, value: Tensor, source_value: Tensor | None) -> Tensor:
        """The output [B M, heads, n, d] of maps `probs` and `value` [B M, heads, m, d], recorded or fused.

        `source_value` [1, heads, m, d]: the values of the source text in a cross-attention layer, else None.
        """
        count = len(probs) // len(self.frames.groups)
        rows = slice(self.frames.first, self.frames.first + count)
        outputs = []
        for group, maps, values in zip(self.frames.groups, probs.split(count), value.split(count), strict=True):
            if self.mode == "record":
                self._record(group, layer, rows, maps, cross=source_value is not None)
            fused = self.mode == "fuse" and group in ("image", "full")
            outputs.append(self._fuse(layer, rows, maps, values, source_value) if fused else maps @ values)
        return torch.cat(outputs)

    def _record(self, group: str, layer: str, rows: slice, maps: Tensor, cross: bool) -> None:
        if group == "image":
            self.maps.put(self.step, layer, rows, maps)
        elif group == "full" and cross:
            attended = maps[..., self.words.to(maps.device)].float().sum(-1).mean(1)
            attended = attended.unflatten(1, self.sizes[layer])[:, None]
            total = self.attended[self.step]
            total[rows] += _resize(attended, total.shape[-2:]).to(total)

    def _fuse(self, layer: str, rows: slice, maps: Tensor, value: Tensor, source_value: Tensor | None) -> Tensor:
        source = self.maps.get(self.step, layer, rows, like=maps)
        edited = blend_mask(self.attended[self.step][rows], self.sizes[layer], self.threshold).to(maps.device)
        edited = edited[:, None, :, None]
        if source_value is None:
            return torch.where(edited, maps, source) @ value
        return torch.where(edited, maps @ value, source @ source_value)


def blend_mask(attended: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """M [M, n] bool of attention A [M, 1, H, W] ≥ 0 at a layer of `size` = (h, w): where A / max A ≥ threshold.

    The maximum is over each frame; A / max A counts as 0 where A is 0 everywhere.
    """
    attended = _resize(attended, size).flatten(1)
    return attended / attended.amax(1, keepdim=True).clamp_min(torch.finfo(attended.dtype).tiny) >= threshold


def attention_maps(attn: "Attention", hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / √d) [rows, heads, n, m] and V [rows, heads, m, d] of queries [rows, n, D], keys [rows, m, D'].

    The same as in diffusers' AttnProcessor.
    """
    query, key = (attn.head_to_batch_dim(to(x)) for to, x in ((attn.to_q, hidden), (attn.to_k, context)))
    probs = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
    return probs, attention_values(attn, context)


def attention_values(attn: "Attention", context: Tensor) -> Tensor:
    """V [rows, heads, m, d] of a context [rows, m, D']."""
    return attn.head_to_batch_dim(attn.to_v(context)).unflatten(0, (-1, attn.heads))


def attention_output(attn: "Attention", heads: Tensor) -> Tensor:
    """The output [rows, n, D] of a layer, from what each head gives, [rows, heads, n, d]."""
    return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(heads.flatten(0, 1))))


class ChangesAttention(Protocol):
    """A state that computes all attention layers of a UNet: `AttentionFusion`, `PromptAttention`."""

    def process(
        self, layer: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor, text: Tensor | None
    ) -> Tensor: ...


@contextmanager
def changed_attention(unet: nn.Module, state: ChangesAttention) -> Iterator[None]:
    """Let `state` compute the attention of all layers, inside the block."""
    with _replaced(attention_layers(unet), lambda name, base: partial(state.process, name, base)):
        yield


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
