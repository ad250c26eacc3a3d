"""Attention to key views, against softmax and matching written out, on one layer."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from csd3d.priors.key_views import AlignedAttention, InjectedAttention

VIEWS, PIXELS, WIDTH = 6, 9, 8
GROUPS = ("image", "full")
KEYS, OTHERS = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Attention(WIDTH, heads=2, dim_head=4).requires_grad_(False)
        for part in (layer.to_q, layer.to_k):
            part.weight.mul_(4)
    return layer


@pytest.fixture
def states() -> dict[str, Tensor]:
    """The states of all views, by group."""
    generator = torch.Generator().manual_seed(1)
    return {group: torch.randn(VIEWS, PIXELS, WIDTH, generator=generator) for group in GROUPS}


def distances() -> Tensor:
    place = torch.tensor([0.0, 1.0, 2.2, 3.0, 4.0, 6.0])[:, None]
    return torch.cdist(place, place)


def near(name: str, view: int, key: int) -> Tensor:
    """About a third of the pixels, and for pixel 0 none."""
    allowed = torch.rand(PIXELS, PIXELS, generator=torch.Generator().manual_seed(10 * view + key)) < 0.3
    allowed[0] = False
    return allowed


def written_out(attn, query_of: Tensor, context: Tensor) -> Tensor:
    """The output [n, D] for one view, head by head."""
    q, k, v = attn.to_q(query_of), attn.to_k(context), attn.to_v(context)
    heads = [slice(0, 4), slice(4, 8)]
    parts = [torch.softmax(q[:, own] @ k[:, own].T / 2.0, -1) @ v[:, own] for own in heads]
    return attn.to_out[0](torch.cat(parts, -1))


def call(state, layer, states, groups, rows: Tensor, first: int = 0) -> dict[str, Tensor]:
    """One call of the layer for some views, by group."""
    state.begin(groups, first)
    hidden = torch.cat([states[group][rows] for group in groups])
    return dict(zip(groups, state.attend("it", layer.processor, layer, hidden).chunk(len(groups)), strict=True))


def all_views(state, layer, states, keys=KEYS, others=OTHERS, groups=GROUPS) -> dict[str, Tensor]:
    """Outputs of all views, by group, in one call for the key views and one for the others."""
    found = {group: torch.empty(VIEWS, PIXELS, WIDTH) for group in groups}
    for rows, views in ((keys, None), (others, others)):
        if len(rows):
            state.hold(keys, views)
            for group, output in call(state, layer, states, groups, rows).items():
                found[group][rows] = output
    return found


def test_key_views_attend_to_the_pixels_of_all_key_views(layer, states):
    found = all_views(InjectedAttention(distances(), near), layer, states)
    for group in GROUPS:
        context = states[group][KEYS].flatten(0, 1)
        for key in KEYS.tolist():
            torch.testing.assert_close(found[group][key], written_out(layer, states[group][key], context), **CLOSE)


def test_where_all_are_key_views_it_is_plain_extended_attention(layer, states):
    everyone = torch.arange(VIEWS)
    found = all_views(InjectedAttention(distances(), near), layer, states, everyone, torch.tensor([]))
    for group in GROUPS:
        context = states[group].flatten(0, 1)
        expected = torch.stack([written_out(layer, own, context) for own in states[group]])
        torch.testing.assert_close(found[group], expected, **CLOSE)


def test_other_views_take_over_outputs_along_allowed_matches(layer, states):
    found, gap = all_views(InjectedAttention(distances(), near), layer, states), distances()
    matched = torch.nn.functional.normalize(states["image"], dim=-1)
    for view in OTHERS.tolist():
        first, second = sorted(KEYS.tolist(), key=lambda key: gap[view, key])
        share = gap[view, second] / (gap[view, first] + gap[view, second])
        weights = {first: torch.sigmoid(share), second: 1 - torch.sigmoid(share)}
        for group in GROUPS:
            expected = torch.zeros(PIXELS, WIDTH)
            for key, weight in weights.items():
                for p in range(PIXELS):
                    among = near("", view, key)[p].nonzero()[:, 0].tolist() or range(PIXELS)
                    q = max(among, key=lambda q: float(matched[view, p] @ matched[key, q]))
                    expected[p] += weight * found[group][key][q]
            torch.testing.assert_close(found[group][view], expected, **CLOSE)


def test_a_view_like_its_key_view_gets_its_output(layer, states):
    """With one key view; the constraint is left out where cameras stand at the same point."""
    states = {group: x[KEYS[:1]].expand(VIEWS, -1, -1) for group, x in states.items()}
    found = all_views(InjectedAttention(distances(), lambda *_: None), layer, states, KEYS[:1], OTHERS)
    for group in GROUPS:
        torch.testing.assert_close(found[group][OTHERS], found[group][KEYS[:1]].expand(4, -1, -1), **CLOSE)


@pytest.mark.parametrize("make", [lambda: InjectedAttention(distances(), near), lambda: AlignedAttention(0.6)])
def test_several_calls_are_as_one(make, layer, states):
    whole, state = all_views(make(), layer, states), make()
    state.hold(KEYS)
    for group in GROUPS:
        torch.testing.assert_close(call(state, layer, states, (group,), KEYS)[group], whole[group][KEYS], **CLOSE)
    state.hold(KEYS, OTHERS)
    for group in GROUPS:
        for part in torch.arange(4).split(3):
            found = call(state, layer, states, (group,), OTHERS[part], int(part[0]))[group]
            torch.testing.assert_close(found, whole[group][OTHERS[part]], **CLOSE)


def test_aligned_views_mix_their_own_attention_with_the_mean_over_key_views(layer, states):
    found = all_views(AlignedAttention(0.6), layer, states)
    for group in GROUPS:
        for view, own in enumerate(states[group]):
            seen = [written_out(layer, own, states[group][key]) for key in KEYS.tolist()]
            expected = 0.6 * written_out(layer, own, own) + 0.4 * torch.stack(seen).mean(0)
            torch.testing.assert_close(found[group][view], expected, **CLOSE)


def test_a_weight_of_one_changes_nothing(layer, states):
    found = all_views(AlignedAttention(1.0), layer, states)
    assert torch.equal(found["full"][OTHERS], layer(torch.cat([states[g][OTHERS] for g in GROUPS])).chunk(2)[1])


def test_calls_that_do_not_hold_whole_views_are_refused(layer, states):
    state = AlignedAttention(0.6)
    state.hold(KEYS)
    with pytest.raises(ValueError, match="3 rows does not hold whole views"):
        call(state, layer, states, ("image",), torch.arange(3))
    state.begin((), 0)
    with pytest.raises(ValueError, match="does not hold whole views"):
        state.attend("it", layer.processor, layer, states["image"])
