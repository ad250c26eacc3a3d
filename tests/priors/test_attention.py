"""Attention across frames and FateZero's fusion, against softmax written out, on tiny random UNets."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from tiny_models import build_unet
from torch import Tensor

from csd3d.errors import InputError
from csd3d.priors.attention import (
    AttentionFusion,
    AttentionMaps,
    CrossFrameAttention,
    attention_layers,
    blend_mask,
    changed_attention,
    cross_frame_attention,
    layer_sizes,
    map_shapes,
)

PROCESSORS = [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)]
SIZE, TOKENS = (4, 4), 5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # a layer, in float32
THROUGH = {"rtol": 1e-3, "atol": 1e-4}  # the whole UNet
LAYERS = (("a", 2), ("b", 1))
SELF, CROSS = (f"down_blocks.0.attentions.0.transformer_blocks.0.attn{k}" for k in (1, 2))


def normal(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    """With attention loud enough to be seen in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = build_unet(8).requires_grad_(False)
        for layer in attention_layers(unet).values():
            for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
                part.weight.mul_(3)
    return unet


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def inputs(frames: int, texts: tuple[int, ...] = (0,), seed: int = 0, size=SIZE) -> tuple[Tensor, Tensor]:
    """Samples [B M, 8, h, w], the same frames in every group, and the text of group b, drawn from seed texts[b]."""
    sample = normal(frames, 8, *size, seed=seed).repeat(len(texts), 1, 1, 1)
    text = torch.cat([normal(1, TOKENS, 16, seed=100 + t).expand(frames, -1, -1) for t in texts])
    return sample, text


def run(unet, sample: Tensor, text: Tensor, t: int = 300) -> Tensor:
    with torch.no_grad():
        return unet(sample, t, encoder_hidden_states=text, return_dict=False)[0]


def listen(unet, layer: str):
    """Runs `unet` noting what goes into the layer and comes out: a callable, and the list that it fills."""
    heard, module = [], attention_layers(unet)[layer]

    def hook(_, args, kwargs, output):
        heard.append((args[0], kwargs.get("encoder_hidden_states"), output))

    def call(*arguments, **options):
        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            return run(unet, *arguments, **options)
        finally:
            handle.remove()

    return call, heard


def written_out(attn, query_of: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [heads, n, m] and output [n, D] of one frame, head by head."""
    maps, parts, width = [], [], attn.to_q.out_features // attn.heads
    q, k, v = attn.to_q(query_of), attn.to_k(context), attn.to_v(context)
    for head in range(attn.heads):
        own = slice(head * width, (head + 1) * width)
        maps.append(torch.softmax(q[:, own] @ k[:, own].T / width**0.5, dim=-1))
        parts.append(maps[-1] @ v[:, own])
    return torch.stack(maps), attn.to_out[0](torch.cat(parts, dim=-1))


def across(sees, groups=("one",), first=0) -> CrossFrameAttention:
    state = CrossFrameAttention(sees)
    state.begin(groups, first)
    return state


@pytest.mark.parametrize("make", PROCESSORS)
@pytest.mark.parametrize("sees", [("anchor", "previous"), ("own", "anchor"), ("previous",)])
def test_frames_attend_to_those_they_see(make, sees):
    unet = make_unet()
    unet.set_attn_processor(make())
    layer, (call, heard) = attention_layers(unet)[SELF], listen(unet, SELF)
    with cross_frame_attention(unet, across(sees, groups=("a", "b"))):
        call(*inputs(3, texts=(0, 1)))
    ((hidden, _, output),) = heard
    for group in range(2):
        frames = hidden[3 * group : 3 * group + 3]
        for i, own in enumerate(frames):
            seen = {"own": own, "anchor": frames[0], "previous": frames[max(i - 1, 0)]}
            _, expected = written_out(layer, own, torch.cat([seen[name] for name in sees]))
            torch.testing.assert_close(output[3 * group + i], expected, **CLOSE)


def test_own_keys_change_nothing_and_repeated_keys_share_their_weight(unet):
    sample, text = inputs(3)
    plain = run(unet, sample, text)
    with cross_frame_attention(unet, across(("own",))):
        assert torch.equal(run(unet, sample, text), plain)
    with cross_frame_attention(unet, across(("own", "own"))):
        torch.testing.assert_close(run(unet, sample, text), plain, **THROUGH)
    with cross_frame_attention(unet, across(("anchor", "previous"))):
        crossed = run(unet, sample, text)
    torch.testing.assert_close(crossed[:1], plain[:1], **THROUGH)  # the anchor sees itself twice
    assert (crossed[1:] - plain[1:]).abs().max() > 1e-2


def test_equal_queries_are_answered_equally_by_the_anchor_alone(unet):
    layer = attention_layers(unet)[SELF]
    anchor, other = normal(2, 16, 8, seed=1)
    hidden = torch.stack([anchor, other, other])
    outputs = {}
    for sees in (("anchor",), ("anchor", "previous")):
        with cross_frame_attention(unet, across(sees)):
            outputs[sees] = layer(hidden)
    assert torch.equal(outputs["anchor",][1], outputs["anchor",][2])
    differing = outputs["anchor", "previous"]  # the second frame's previous one is the anchor, the third's the second
    assert (differing[1] - differing[2]).abs().max() > 1e-2


@pytest.mark.parametrize("sees", [("anchor", "previous"), ("own", "anchor")])
def test_a_video_in_several_calls_is_as_in_one(unet, sees):
    groups = {"a": 0, "b": 1}
    state = across(sees, groups=tuple(groups))
    with cross_frame_attention(unet, state):
        for seed, t in ((3, 900), (4, 500)):  # a second step starts anew from its own anchor
            state.begin(tuple(groups), 0)
            whole = run(unet, *inputs(5, texts=(0, 1), seed=seed), t=t).chunk(2)
            for together in (("a",), ("b",), ("a", "b")):
                parts = []
                for part in torch.arange(5).split(2):
                    state.begin(together, int(part[0]))
                    sample, words = inputs(5, texts=tuple(groups[group] for group in together), seed=seed)
                    rows = torch.cat([part + 5 * group for group in range(len(together))])
                    parts.append(run(unet, sample[rows], words[rows], t=t).chunk(len(together)))
                for group, found in zip(together, zip(*parts, strict=True), strict=True):
                    torch.testing.assert_close(torch.cat(found), whole[groups[group]], **THROUGH)


def test_only_the_layers_asked_for_are_touched(unet):
    layers = attention_layers(unet)
    before = {name: layer.processor for name, layer in layers.items()}
    with cross_frame_attention(unet, across(("anchor",)), "up_blocks."):
        touched = {name for name, layer in layers.items() if layer.processor is not before[name]}
    assert touched == {name for name in layers if name.startswith("up_blocks.") and name.endswith("attn1")}
    assert touched


@pytest.mark.parametrize("make", PROCESSORS)
def test_the_unet_is_left_exactly_as_it_was_even_by_an_error(make):
    unet = make_unet()
    unet.set_attn_processor(make())
    layers = attention_layers(unet)
    before, plain = {name: layer.processor for name, layer in layers.items()}, run(unet, *inputs(2))
    for change in (
        lambda: cross_frame_attention(unet, across(("anchor",), groups=("image", "full"))),
        lambda: changed_attention(unet, make_fusion(unet, 1)),
    ):
        with pytest.raises(RuntimeError, match="channels"), change():
            run(unet, normal(2, 7, *SIZE), normal(2, TOKENS, 16))
        with change():
            run(unet, *inputs(2))
        assert all(layer.processor is before[name] for name, layer in layers.items())
        assert torch.equal(run(unet, *inputs(2)), plain)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (9, 6)])
def test_layer_sizes_are_those_that_layers_work_at(unet, size):
    sizes, seen, handles = layer_sizes(unet, *size), {}, []
    for name, layer in attention_layers(unet).items():
        hook = lambda _, args, name=name: seen.update({name: args[0].shape[1]})  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook))
    run(unet, *inputs(1, size=size))
    for handle in handles:
        handle.remove()
    assert seen == {name: h * w for name, (h, w) in sizes.items()}
    assert len({*seen.values()}) == 2


def test_layers_too_large_are_not_kept(unet):
    sizes = layer_sizes(unet, *SIZE)
    kept = map_shapes(unet, sizes, TOKENS, 2, max_pixels=4)
    assert {name.split(".")[0] for name in kept} == {"mid_block"}
    assert set(kept.values()) == {(2, 4, 8), (2, 4, TOKENS)}
    assert map_shapes(unet, sizes, TOKENS, 2, max_pixels=16)[SELF] == (2, 16, 32)
    with pytest.raises(InputError, match="give at least 4"):
        map_shapes(unet, sizes, TOKENS, 2, max_pixels=3)


def test_maps_beyond_the_budget_are_refused_before_they_are_allocated():
    shapes = {"layer": (8, 4096, 8192)}
    one = AttentionMaps.frame_bytes(shapes, 50)
    assert one == 50 * 8 * 4096 * 8192 * 2
    with pytest.raises(InputError, match=r"of 24 frames in 50 steps take 600 GiB, more than the 599 GiB allowed"):
        AttentionMaps(shapes, 24, 50, 599 * 2**30)
    AttentionMaps(shapes, 24, 50, 24 * one)  # would fit: still nothing is allocated


def test_maps_come_back_by_step_layer_and_frame():
    maps = AttentionMaps({"a": (2, 3, 4), "b": (1, 3, 4)}, 3, 2, 2**20)
    kept = {(step, layer): normal(3, heads, 3, 4, seed=step).softmax(-1) for step in (0, 1) for layer, heads in LAYERS}
    for (step, layer), value in kept.items():
        maps.put(step, layer, slice(0, 2), value[:2])
        maps.put(step, layer, slice(2, 3), value[2:])
    for (step, layer), value in kept.items():
        found = maps.get(step, layer, slice(1, 3), like=value)
        torch.testing.assert_close(found, value[1:], rtol=1e-3, atol=1e-4)
        assert found.dtype == torch.float32


def make_fusion(unet, frames, threshold=0.3, words=(False, True, True, False, False), steps=1, max_pixels=256):
    sizes = layer_sizes(unet, *SIZE)
    maps = AttentionMaps(map_shapes(unet, sizes, TOKENS, 2, max_pixels), frames, steps, 2**30)
    state = AttentionFusion(
        frames=CrossFrameAttention(("own", "anchor")),
        maps=maps,
        sizes=sizes,
        source_text=normal(1, TOKENS, 16, seed=100),
        words=torch.tensor(words),
        threshold=threshold,
    )
    state.frames.begin(("image", "full"), 0)
    return state


def record(unet, state, frames: int, seed: int = 0) -> Tensor:
    """The UNet's outputs of groups "image" (text 0, the source's) and "full" (text 1), their maps recorded."""
    state.at("record", 0)
    return run(unet, *inputs(frames, texts=(0, 1), seed=seed))


@pytest.mark.parametrize("make", PROCESSORS[:2])
def test_recording_notes_the_softmax_and_leaves_the_output(make):
    unet, frames = make_unet(), 2
    unet.set_attn_processor(make())
    state = make_fusion(unet, frames)
    with cross_frame_attention(unet, across(("own", "anchor"), groups=("image", "full"))):
        expected = run(unet, *inputs(frames, texts=(0, 1)))
    with changed_attention(unet, state):
        for layer in (SELF, CROSS):
            call, heard = listen(unet, layer)
            state.at("record", 0)
            output = call(*inputs(frames, texts=(0, 1)))
            torch.testing.assert_close(output, expected, **THROUGH)
            ((hidden, text, _),) = heard
            for i in range(frames):
                context = torch.cat([hidden[i], hidden[0]]) if text is None else text[i]
                maps, _ = written_out(attention_layers(unet)[layer], hidden[i], context)
                kept = state.maps.get(0, layer, slice(i, i + 1), like=maps)[0]
                torch.testing.assert_close(kept, maps, rtol=1e-3, atol=1e-4)


def test_words_attended_to_are_summed_over_words_and_layers(unet):
    state, layers, frames = make_fusion(unet, 2, max_pixels=16), attention_layers(unet), 2
    crossing = [name for name, layer in layers.items() if layer.is_cross_attention]
    totals = torch.zeros(frames, 1, *SIZE)
    with changed_attention(unet, state):
        for name in crossing:
            call, heard = listen(unet, name)
            state.at("record", 0)
            call(*inputs(frames, texts=(0, 1)))
            ((hidden, text, _),) = heard
            for i in range(frames):
                maps, _ = written_out(layers[name], hidden[frames + i], text[frames + i])
                words = maps[..., 1:3].sum(-1).mean(0).view(1, 1, *state.sizes[name])
                totals[i] += torch.nn.functional.interpolate(words, SIZE, mode="bilinear")[0]
    torch.testing.assert_close(state.attended[0], totals, **CLOSE)


def test_all_source_makes_the_instruction_see_what_the_source_saw(unet):
    """Above 1: no pixel is edited, so "full" becomes "image", and both the recorded prediction."""
    state = make_fusion(unet, 3, threshold=2.0)
    with changed_attention(unet, state):
        image, full = record(unet, state, 3).chunk(2)
        state.at("fuse", 0)
        fused = run(unet, *inputs(3, texts=(0, 1))).chunk(2)
    assert (image - full).abs().max() > 0.05
    for one in fused:
        torch.testing.assert_close(one, image, rtol=0.0, atol=1e-3)  # maps are kept in float16


def test_all_source_has_the_sources_attention_at_other_latents_too(unet):
    """At the first layer: the source's maps on the edit's values, and the source's cross-attention on the source's."""
    state, layers = make_fusion(unet, 2, threshold=2.0), attention_layers(unet)
    call, heard = listen(unet, SELF)
    with changed_attention(unet, state):
        record(unet, state, 2, seed=0)
        state.at("fuse", 0)
        call(*inputs(2, texts=(0, 1), seed=9))
    ((hidden, _, output),) = heard
    attn, maps = layers[SELF], state.maps.get(0, SELF, slice(0, 2), like=hidden)
    for row, frame in ((1, 1), (2, 0), (3, 1)):
        context = torch.cat([hidden[row], hidden[row - frame]])
        value = attn.to_v(context).unflatten(-1, (2, -1)).movedim(1, 0)
        expected = attn.to_out[0]((maps[frame] @ value).movedim(0, 1).flatten(1))
        torch.testing.assert_close(output[row], expected, **CLOSE)


def test_nothing_of_the_source_is_the_plain_edit(unet):
    sample, text = inputs(3, texts=(0, 1), seed=9)
    with cross_frame_attention(unet, across(("own", "anchor"), groups=("image", "full"))):
        plain = run(unet, sample, text)
    state = make_fusion(unet, 3, threshold=0.0)
    with changed_attention(unet, state):
        record(unet, state, 3)
        state.at("fuse", 0)
        torch.testing.assert_close(run(unet, sample, text), plain, **THROUGH)
        state.threshold = 2.0
        assert (run(unet, sample, text) - plain).abs().max() > 1e-2
        assert not state.at("fuse", 1)  # of which no maps were kept
        assert torch.equal(run(unet, sample, text), plain)


def test_other_groups_are_left_alone(unet):
    sample, text = inputs(2, texts=(0, 1, 2), seed=9)
    groups = ("image", "full", "null")
    with cross_frame_attention(unet, across(("own", "anchor"), groups=groups)):
        plain = run(unet, sample, text)
    state = make_fusion(unet, 2, threshold=2.0)
    with changed_attention(unet, state):
        record(unet, state, 2)
        state.at("fuse", 0)
        state.frames.begin(groups, 0)
        fused = run(unet, sample, text)
    torch.testing.assert_close(fused[4:], plain[4:], **THROUGH)
    assert (fused[:4] - plain[:4]).abs().amax((1, 2, 3)).min() > 1e-2


def test_a_mask_blends_maps_by_rows_and_cross_attention_by_outputs(unet):
    state, layers = make_fusion(unet, 1, threshold=0.5), attention_layers(unet)
    state.frames.begin(("full",), 0)
    state.at("record", 0)
    state.attended[0][:] = torch.linspace(0, 1, 16).view(1, 1, 4, 4)  # the lower half is edited
    state.mode = "fuse"
    source, edit = (normal(1, 2, 16, 32, seed=s).softmax(-1) for s in (1, 2))
    value, other = normal(1, 2, 32, 4, seed=3), normal(1, 2, 32, 4, seed=4)
    for layer, source_value in ((SELF, None), (CROSS, other)):
        state.maps.shapes[layer] = (2, 16, 32)
        state.maps.put(0, layer, slice(0, 1), source)
        output = state.attend(layer, edit, value, source_value)
        torch.testing.assert_close(output[:, :, 8:], edit[:, :, 8:] @ value, **CLOSE)
        expected = source[:, :, :8] @ (value if source_value is None else source_value)
        torch.testing.assert_close(output[:, :, :8], expected, rtol=0.0, atol=1e-2)
    assert layers[CROSS].is_cross_attention


def test_the_mask_is_where_attention_reaches_a_share_of_its_maximum():
    attended = torch.tensor([[0.1, 0.4], [0.31, 1.0]])[None, None].repeat(3, 1, 1, 1)
    attended[1] *= 5  # frame by frame: its scale does not matter
    attended[2] = 0  # no words
    assert blend_mask(attended, (2, 2), 0.3).tolist() == [[False, True, True, True]] * 2 + [[False] * 4]
    assert blend_mask(attended, (2, 2), 0.35)[0].tolist() == [False, True, False, True]
    assert blend_mask(attended, (2, 2), 0.0).all()
    assert not blend_mask(attended, (2, 2), 1.01).any()
    large = blend_mask(attended[:1], (8, 8), 0.3).view(8, 8)
    assert large[4:, 4:].all()
    assert not large[:3, :3].any()


def test_other_kinds_of_model_masks_and_odd_calls_are_refused(unet):
    bare = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    with pytest.raises(InputError, match=r"prior\.model"), cross_frame_attention(bare, across(("own",))):
        pass
    with pytest.raises(ValueError, match="give some of own, anchor, previous"):
        CrossFrameAttention(("next",))
    with cross_frame_attention(unet, across(("own",), groups=("a", "b"))):
        with pytest.raises(ValueError, match="3 rows"):
            run(unet, *inputs(3))
        with pytest.raises(ValueError, match="no attention mask"):
            attention_layers(unet)[SELF](normal(2, 16, 8), attention_mask=torch.zeros(2, 1, 16))
