"""A UNet's attention read and altered from outside: across the frames of a video, and fused with that of a source.

Through diffusers' attention processors, for UNets of Stable Diffusion's class. A processor holds no state of its own;
the state is an object that the caller keeps and tells, before every call of the UNet, what the call holds:

    a call has B groups (branches of guidance) of M frames, row b M + m being frame m of group b, as in
    `distillation.edit`; a video that does not fit in one call comes in several, its frames in rising order, at one
    timestep after the other

Symbols: n queries (the pixels of a layer), m keys, L tokens of text; attention maps [rows, heads, n, m], each row of a
map summing to 1. Only transformer blocks are touched, whose attention has no residual, scale or norm of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from csd3d.errors import InputError

SEES = ("own", "anchor", "previous")
MODES = ("pass", "record", "fuse")
MAP_BYTES = 2  # maps are kept in float16
Shape = tuple[int, int, int]


def attention_layers(unet: nn.Module, within: str = "") -> dict[str, Attention]:
    """The attention layers of a UNet's transformer blocks by name, of those whose name starts with `within`.

    Raises InputError where there are none, or such as do more than attend (DeepFloyd IF's, a transformer's).
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and ".transformer_blocks." in name and name.startswith(within)
    }
    if not layers or any(x.added_kv_proj_dim or x.norm_q or x.norm_cross or x.group_norm for x in layers.values()):
        raise InputError(
            "prior.model: this method works on the attention of a UNet of Stable Diffusion's class, "
            "and this model has none; use InstructPix2Pix or the shipped prior"
        )
    return layers


@contextmanager
def replaced_processors(
    layers: dict[str, Attention], make: Callable[[str, Attention], Callable[..., Tensor]]
) -> Iterator[None]:
    """`layers` with the processors `make(name, layer)` inside the block, and with their own again behind it."""
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(make(name, layer))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


class CrossFrameAttention:
    """Which frames a frame's self-attention takes its keys and values from, and those it needs from earlier calls.

    `sees` lists what comes one after the other: "own", the frame itself; "anchor", the first of all frames;
    "previous", the frame before (the first frame's is itself). Pix2Video (arXiv 2303.12688) sees anchor and previous.
    Keys that appear twice share their weight, so a frame that sees itself twice is as if it saw itself.

    Kept from call to call: of every layer and group the anchor's and the last frame's input, two frames, however long
    the video.
    """

    def __init__(self, sees: tuple[str, ...]):
        if not sees or not set(sees) <= set(SEES):
            raise ValueError(f"sees is {sees}: give some of {', '.join(SEES)}")
        self.sees, self.groups, self.first = sees, (), 0
        self._kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def begin(self, groups: tuple[str, ...], first: int) -> None:
        """Before a call of the UNet: its groups by name, and which frame of the video its first one is."""
        self.groups, self.first = groups, first

    def context(self, layer: str, hidden: Tensor) -> Tensor:
        """What rows [B M, n, D] of a self-attention layer attend to, [B M, len(sees) n, D]."""
        return torch.cat([self._of_group(layer, *one) for one in zip(self.groups, self._frames(hidden), strict=True)])

    def _frames(self, hidden: Tensor) -> Tensor:
        if not self.groups or len(hidden) % len(self.groups):
            raise ValueError(f"a call of {len(hidden)} rows does not hold whole frames of groups {self.groups}")
        return hidden.unflatten(0, (len(self.groups), -1))

    def _of_group(self, layer: str, group: str, own: Tensor) -> Tensor:
        anchor, last = (own[:1], own[:1]) if self.first == 0 else self._kept[layer, group]
        self._kept[layer, group] = anchor.clone(), own[-1:].clone()  # a slice would keep the whole batch
        seen = {"own": own, "anchor": anchor.expand_as(own), "previous": torch.cat([last, own[:-1]])}
        return torch.cat([seen[name] for name in self.sees], dim=1)


class CrossFrameProcessor:
    """A self-attention layer's processor that hands `base`, the layer's own, the frames that `state` says it sees."""

    def __init__(self, layer: str, base: Callable[..., Tensor], state: CrossFrameAttention):
        self.layer, self.base, self.state = layer, base, state

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        return self.base(attn, hidden_states, encoder_hidden_states=self.state.context(self.layer, hidden_states))


@contextmanager
def cross_frame_attention(unet: nn.Module, state: CrossFrameAttention, within: str = "") -> Iterator[None]:
    """The UNet with its self-attention, in layers whose name starts with `within`, across frames as `state` says."""
    layers = attention_layers(unet, within)
    layers = {name: layer for name, layer in layers.items() if not layer.is_cross_attention}
    with replaced_processors(layers, lambda name, layer: CrossFrameProcessor(name, layer.processor, state)):
        yield


def layer_sizes(unet: nn.Module, height: int, width: int) -> dict[str, tuple[int, int]]:
    """(h, w) at which each attention layer works on latents of `height` x `width`: halved by each block, rounded up."""
    levels = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(unet.down_blocks))]
    blocks = {f"down_blocks.{i}.": size for i, size in enumerate(levels)} | {"mid_block.": levels[-1]}
    blocks |= {f"up_blocks.{i}.": size for i, size in enumerate(reversed(levels))}
    names = attention_layers(unet)
    return {name: next(size for block, size in blocks.items() if name.startswith(block)) for name in names}


def map_shapes(
    unet: nn.Module, sizes: dict[str, tuple[int, int]], tokens: int, contexts: int, max_pixels: int
) -> dict[str, Shape]:
    """(heads, n, m) of one frame's map in every layer that is kept: those of at most `max_pixels` queries.

    Self-attention has `contexts` n keys, cross-attention `tokens`. Raises InputError where no layer is so small.
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
    """Attention maps of a source by step, layer and frame: on the CPU in float16, within a budget of bytes.

    `shapes` are `map_shapes`. Maps are allocated as they come in; that all of `frames` and `steps` will fit is checked
    here, before the first: InputError otherwise.
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
        """What one frame takes."""
        return steps * MAP_BYTES * sum(heads * n * m for heads, n, m in shapes.values())

    def put(self, step: int, layer: str, rows: slice, maps: Tensor) -> None:
        """Keeps `maps` [M, heads, n, m] of the frames `rows`."""
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

    at every pixel of a layer, A being the mean over cross-attention layers and heads, brought to the layer's size. In
    "record" the maps of group "image" are stored as s_src and c_src, and those of group "full" make A; in "fuse" both
    groups are fused; in "pass", and always in other groups and in layers of which no map is kept, attention is as it
    was but for the frames it sees.

    An instruction shares no words with the empty text of an InstructPix2Pix source, so the paper's rule, c_src for the
    words that both have, is applied to the two texts set side by side: the empty one has the source's maps, the
    instruction its own, and the mask says which of them a pixel listens to. All source (M = 0), "full" is "image" and
    both are the source's own prediction.

    `source_text` [1, L, D] is the embedding whose values are V_src; `words` [L] bool, the tokens that are words.
    """

    frames: CrossFrameAttention
    maps: AttentionMaps
    sizes: dict[str, tuple[int, int]]
    source_text: Tensor
    words: Tensor
    threshold: float
    mode: str = "pass"
    step: int = 0
    attended: dict[int, Tensor] = field(default_factory=dict)  # A, not divided: [frames, 1, h, w] by step

    def at(self, mode: str, step: int) -> bool:
        """What the calls from here on do, at the step whose maps they write or read: `mode`, if there are any of it.

        Those of the first steps of the edit are kept, as many as `maps` has; at others attention is passed through.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
        kept = step < self.maps.steps
        self.mode, self.step = mode if kept else "pass", step
        if self.mode == "record":
            self.attended[step] = torch.zeros(self.maps.frames, 1, *max(self.sizes[name] for name in self.maps.shapes))
        return kept

    def attend(self, layer: str, probs: Tensor, value: Tensor, source_value: Tensor | None) -> Tensor:
        """The output [B M, heads, n, d] of maps `probs` and `value` [B M, heads, m, d], recorded or fused.

        `source_value` [1, heads, m, d] are a cross-attention layer's values of the source text, None in the others.
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

    The largest is each frame's own; where nothing is attended to, A / max A counts as 0.
    """
    attended = _resize(attended, size).flatten(1)
    return attended / attended.amax(1, keepdim=True).clamp_min(torch.finfo(attended.dtype).tiny) >= threshold


def attention_maps(attn: Attention, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / √d) [rows, heads, n, m] and V [rows, heads, m, d] of queries [rows, n, D], keys [rows, m, D'].

    As diffusers' AttnProcessor computes them, and AttnProcessor2_0 without writing them down.
    """
    query, key = (attn.head_to_batch_dim(to(x)) for to, x in ((attn.to_q, hidden), (attn.to_k, context)))
    probs = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
    return probs, attention_values(attn, context)


def attention_values(attn: Attention, context: Tensor) -> Tensor:
    """V [rows, heads, m, d] of a context [rows, m, D']."""
    return attn.head_to_batch_dim(attn.to_v(context)).unflatten(0, (-1, attn.heads))


class FusionProcessor:
    """A layer's processor for FateZero: the frames it sees, and its maps recorded or fused as `state` says.

    Maps are written down only where they are kept; elsewhere, and in "pass", the layer's own processor `base` attends.
    """

    def __init__(self, layer: str, base: Callable[..., Tensor], state: AttentionFusion):
        self.layer, self.base, self.state = layer, base, state

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _refuse_mask(attention_mask)
        state, context = self.state, encoder_hidden_states
        if not attn.is_cross_attention:
            context = state.frames.context(self.layer, hidden_states)
        if state.mode == "pass" or self.layer not in state.maps.shapes:
            return self.base(attn, hidden_states, encoder_hidden_states=context)
        probs, value = attention_maps(attn, hidden_states, context)
        source = attention_values(attn, state.source_text.to(context)) if attn.is_cross_attention else None
        output = attn.batch_to_head_dim(state.attend(self.layer, probs, value, source).flatten(0, 1))
        return attn.to_out[1](attn.to_out[0](output))


@contextmanager
def fused_attention(unet: nn.Module, state: AttentionFusion) -> Iterator[None]:
    """The UNet with all its attention layers recorded or fused as `state` says."""
    with replaced_processors(attention_layers(unet), lambda name, layer: FusionProcessor(name, layer.processor, state)):
        yield


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("attention across frames takes no attention mask: embed prompts without one")


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
