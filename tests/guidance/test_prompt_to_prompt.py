"""Prompt-to-Prompt: the alignment of words by hand, maps written out, and equal prompts to the bit."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_tokenizer, save_tiny_pipeline

from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.distillation.samplers import sample
from csd3d.errors import InputError
from csd3d.guidance.prompt_to_prompt import PromptToPrompt, align, edit_predictor, word_spans
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.attention import attention_layers, attention_maps, changed_attention
from csd3d.priors.prompt_attention import WordMaps

CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")
    prior = load_prior(PriorConfig(model=str(folder), device="cpu", micro_batch=2), require="text")
    for layer in attention_layers(prior.unet).values():  # loud enough to be seen in the output
        for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            part.weight.mul_(3)
    return prior


def spans(*lengths: int, words: str = "abcdef"):
    """Words of so many tokens each, in a row."""
    starts = [1 + sum(lengths[:k]) for k in range(len(lengths))]
    return [(words[k], range(s, s + n)) for k, (s, n) in enumerate(zip(starts, lengths, strict=True))]


def test_words_are_where_their_tokens_are(tmp_path):
    tokenizer = build_tokenizer(tmp_path)  # red and blue are one token each, other letters are their own
    assert word_spans(tokenizer, "Red cat, blue", 12) == [
        ("red", range(1, 2)),
        ("cat", range(2, 5)),
        (",", range(5, 6)),
        ("blue", range(6, 7)),
    ]
    assert word_spans(tokenizer, "cat cat cat cat", 8)[-1] == ("cat", range(4, 7))  # the end is kept
    with pytest.raises(InputError, match="cannot be told apart; use plain words"):
        word_spans(lambda text, **_: SimpleNamespace(input_ids=[0] * (len(text.split()) + 2)), "cat, red", 12)


def test_a_swapped_word_takes_over_the_maps_of_the_other_one():
    found = align(spans(1, 2), spans(1, 2, words="xb"), 6, "auto")
    assert torch.equal(found, torch.eye(6))
    spread = align(spans(1, 2), spans(3, 2), 8, "swap")  # one token to three; what follows moves by two
    assert torch.equal(spread[1, 1:4], torch.full((3,), 1 / 3))
    assert spread.nonzero()[:, 0].tolist() == [0, 1, 1, 1, 2, 3, 4, 5]
    assert spread.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(InputError, match=r"prompts, which have 2 and 1: choose refine"):
        align(spans(1, 2), spans(1), 6, "swap")


def test_words_that_are_added_keep_their_own_maps():
    longer = align(spans(1, 1, words="ac"), spans(1, 1, 1, words="abc"), 7, "auto")
    expected = torch.zeros(7, 7)
    for source, edit in ((0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)):
        expected[source, edit] = 1
    assert torch.equal(longer, expected)
    shorter = align(spans(1, 1, 1, words="abc"), spans(1, 1, words="ac"), 7, "refine")
    assert torch.equal(shorter[:, :6], expected.T[:, :6])  # the last of the padding has none to take from
    assert shorter[:, 6].sum() == 0


def test_maps_are_combined_and_weighted_token_by_token():
    source, own = torch.rand(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    aligned = torch.zeros(4, 4)
    aligned[0, 0] = aligned[2, 1] = 1
    aligned[1, 3] = 0.5
    found = WordMaps(aligned, torch.tensor([1.0, 2.0, 3.0, 1.0])).combine(source, own)
    expected = torch.stack([source[..., 0], 2 * source[..., 2], 3 * own[..., 2], 0.5 * source[..., 1]], -1)
    torch.testing.assert_close(found, expected)


def edited(prior, before: str, steps: int = 4, guidance: float = 3.0, count: int = 3, sampler="ddim", **keys):
    """Clean latents before and after, from one noise."""
    edit, timesteps = PromptToPrompt(**keys), ddim_timesteps(999, steps)
    state = edit.attention(prior, before, steps)
    noise = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    predict = edit_predictor(prior, state, (before, edit.after(before)), "", guidance)
    with changed_attention(prior.unet, state):
        return sample(predict, noise.repeat(2, 1, 1, 1), prior.alphas_cumprod, timesteps, sampler).chunk(2)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_equal_prompts_give_the_same_picture_bit_for_bit(prior, sampler):
    before, after = edited(prior, "red blue", prompt="red blue", sampler=sampler)
    assert torch.equal(before, after)
    assert not torch.equal(before[0], before[1])
    plain = edited(prior, "red blue", cross_steps=0.0, self_steps=0.0, sampler=sampler)[0]
    torch.testing.assert_close(before, plain, rtol=1e-3, atol=1e-3)  # the source is not edited


def test_without_shared_maps_the_edit_is_the_other_prompts_own_picture(prior):
    _, after = edited(prior, "red", prompt="blue", cross_steps=0.0, self_steps=0.0)
    own, _ = edited(prior, "blue")
    torch.testing.assert_close(after, own, rtol=1e-3, atol=1e-3)
    _, held = edited(prior, "red", prompt="blue", cross_steps=1.0, self_steps=1.0)
    before, _ = edited(prior, "red")
    assert 0 < (held - before).abs().mean() < 0.7 * (own - before).abs().mean()


def test_a_weight_scales_the_map_of_its_word(prior):
    """The output of a layer, written out: out(Σ_j c_j M_j V_j) with M of the first prompt at the first step."""
    heard, layer, z_t = [], attention_layers(prior.unet)[CROSS], torch.randn(1, 4, 4, 4)
    state = PromptToPrompt(prompt="blue red", weights={"RED": 2.5}, self_steps=0.0).attention(prior, "red red", 1)
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: heard.append((args[0], kwargs, out)), with_kwargs=True
    )
    try:
        with changed_attention(prior.unet, state):
            edit_predictor(prior, state, ("red red", "blue red"), "", 1.0)(z_t.repeat(2, 1, 1, 1), 500)
    finally:
        handle.remove()
    (hidden, kwargs, _), (own_hidden, own_kwargs, output) = heard
    maps, _ = attention_maps(layer, hidden, kwargs["encoder_hidden_states"])
    _, values = attention_maps(layer, own_hidden, own_kwargs["encoder_hidden_states"])
    weights = torch.ones(maps.shape[-1])
    weights[2] = 2.5
    expected = layer.to_out[0](((maps * weights) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_only_conditional_predictions_are_edited_and_in_the_first_steps_alone(prior):
    z_t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    state = PromptToPrompt(prompt="blue", cross_steps=0.5, self_steps=0.0).attention(prior, "red", 2)
    predict = edit_predictor(prior, state, ("red", "blue"), "", 3.0)
    with changed_attention(prior.unet, state):
        first, second = (predict(z_t.repeat(2, 1, 1, 1), 500)[2:] for _ in range(2))
    eps = prior.predict({"null": Query(z_t, 500, ("",) * 2), "text": Query(z_t, 500, ("blue",) * 2)})
    alone = cfg(eps["null"], eps["text"], 3.0)
    torch.testing.assert_close(second, alone, rtol=1e-3, atol=1e-4)
    assert (first - alone).abs().max() > 1e-2


def test_a_weight_of_a_word_that_is_not_there_is_told(prior):
    with pytest.raises(InputError, match=r"weights: 'rad' is no word of 'blue red'; did you mean 'red'"):
        PromptToPrompt(prompt="blue red", weights={"rad": 2.0}).attention(prior, "red red", 4)
    with pytest.raises(ValueError, match=r"weights\.red is inf"):
        PromptToPrompt(weights={"red": float("inf")})
