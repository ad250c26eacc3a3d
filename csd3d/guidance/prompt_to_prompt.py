"""Prompt-to-Prompt (Hertz et al. 2022, arXiv 2208.01626): one noise drawn under two prompts, sharing attention maps.

Symbols: `before` and `after` are the two prompts; L tokens each, padding included; N pictures of each.
"""

import math
import re
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Annotated, Literal

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.errors import InputError, closest
from csd3d.priors import Prior
from csd3d.priors.prompt_attention import PromptAttention, WordMaps
from csd3d.schema import Share, Within

WORDS = re.compile(r"[^\s,.;:!?]+|[,.;:!?]+")
Spans = list[tuple[str, range]]  # each word of a prompt in small letters, and the positions of its tokens


@dataclass(frozen=True)
class PromptToPrompt:
    """An edit of sampled pictures by another prompt.

    Three edits of the paper, which go together: words are swapped ("a red chair" to "a blue chair"), added ("a red
    chair with a hat"), and weighted (weights: {red: 2}). Unlike the authors' code (github.com/google/prompt-to-prompt):

    * Words are aligned as whole words, by difflib's matching blocks; there, tokens by Needleman-Wunsch.
    * The k-th token behind the last word takes the map of the k-th one behind the other prompt's last word; there,
      of the one at the same position, which may be a word.
    * There is no local blend, and no inversion: the pictures are sampled, not given.

        sampling: {prompt_to_prompt: {prompt: "a blue chair", self_steps: 0.2}}
    """

    prompt: str = ""  # the prompt after the edit; "": the same, for weights alone
    # words that take over maps: swap (by position), refine (equal words), or auto (swap for as many words, else refine)
    align: Literal["auto", "swap", "refine"] = "auto"
    # share of the steps, from the first, that take over cross-attention maps
    cross_steps: Share = 0.8
    # share of the steps, from the first, that take over self-attention maps, which hold the layout
    self_steps: Share = 0.4
    weights: dict[str, float] = field(default_factory=dict)  # factors of the maps of words of `prompt`; others have 1
    # self-attention maps are taken over only in layers of at most this many latent pixels
    max_pixels: Annotated[int, Within(0, 2**24)] = 256

    def __post_init__(self) -> None:
        for word, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"weights.{word} is {weight}: give a finite number")

    def after(self, before: str) -> str:
        """The prompt after the edit."""
        return self.prompt.strip() or before

    def attention(self, prior: Prior, before: str, steps: int) -> PromptAttention:
        """The state of the attention for a job of `steps`; InputError where the prompts cannot be aligned."""
        if prior.options.drop_text_encoder or "tokenizer" not in prior.text.parts:
            raise InputError("prior.drop_text_encoder: prompt_to_prompt needs the tokenizer; set it to false")
        length = prior.condition([""]).text.shape[1]
        x, y = (word_spans(prior.tokenizer, text, length) for text in (before, self.after(before)))
        maps = align(x, y, length, self.align)
        factors = torch.ones(length)
        for word, weight in self.weights.items():
            places = [place for known, places in y for place in places if known == word.lower()]
            if not places:
                hint = closest(word, [known for known, _ in y])
                raise InputError(
                    f"sampling.prompt_to_prompt.weights: {word!r} is no word of {self.after(before)!r}; did you mean "
                    f"{hint!r}?"
                )
            factors[places] = weight
        maps = WordMaps(maps, factors).to(prior.device)
        return PromptAttention(maps, round(self.cross_steps * steps), round(self.self_steps * steps), self.max_pixels)


def word_spans(tokenizer, prompt: str, length: int) -> Spans:
    """The words of a prompt with their positions among `length` tokens, the first of which is the start.

    Words that do not fit are left out. Raises InputError where tokens span words.
    """
    spans, place = [], 1
    for word in WORDS.findall(prompt):
        count = len(tokenizer(word).input_ids) - 2  # without start and end
        spans.append((word.lower(), range(place, min(place + count, length - 1))))
        place += count
    if place + 1 != len(tokenizer(prompt, verbose=False).input_ids):
        raise InputError(f"sampling.prompt_to_prompt: the words of {prompt!r} cannot be told apart; use plain words")
    return [(word, places) for word, places in spans if places]


def align(x: Spans, y: Spans, length: int, kind: str) -> Tensor:
    """A [L, L]: column j says which maps of the prompt x, in which shares, become the map of token j of y.

    Columns of zeros are tokens of y that keep their own map. A word of several tokens spreads over as many as the other
    has. Raises InputError for a swap of different numbers of words.
    """
    if kind == "swap" and len(x) != len(y):
        raise InputError(
            f"sampling.prompt_to_prompt.align: swap needs as many words in both prompts, which have {len(x)} and "
            f"{len(y)}: choose refine"
        )
    if kind == "refine" or len(x) != len(y):
        blocks = SequenceMatcher(None, [w for w, _ in x], [w for w, _ in y], autojunk=False).get_matching_blocks()
        pairs = [(x[b.a + k][1], y[b.b + k][1]) for b in blocks for k in range(b.size)]
    else:
        pairs = [(one, other) for (_, one), (_, other) in zip(x, y, strict=True)]
    found = torch.zeros(length, length)
    found[0, 0] = 1  # the start of the text
    for one, other in pairs:
        if len(one) == len(other):
            found[list(one), list(other)] = 1
        else:
            found[one.start : one.stop, other.start : other.stop] = 1 / len(other)
    ends = [spans[-1][1].stop if spans else 1 for spans in (x, y)]
    rest = torch.arange(length - max(ends))
    found[ends[0] + rest, ends[1] + rest] = 1
    return found


def edit_predictor(
    prior: Prior, state: PromptAttention, prompts: tuple[str, str], null_prompt: str, guidance_scale: float
) -> PredictNoise:
    """The guided ε(z_t, t) [2N, ...] of N pictures under the first prompt, then N under the second.

    Maps of the second's conditional predictions are the first's by `state`; the unconditional ones are left alone, as
    in the authors' code. Both are predicted in calls of equal shape, so that equal prompts give equal bits. Call it
    inside `changed_attention(prior.unet, state)`, once for each step.
    """
    number = -1

    def ask(z_t: Tensor, t: int, prompt: str, mode: str) -> Tensor:
        state.at(mode, number)
        return prior.predict({"asked": Query(z_t, t, (prompt,) * len(z_t))})["asked"]

    def predict(z_t: Tensor, t: int) -> Tensor:
        nonlocal number
        number += 1
        found: list[list[Tensor]] = [[], []]
        for pair in zip(*(half.split(prior.micro_batch) for half in z_t.chunk(2)), strict=True):
            for half, (part, mode) in enumerate(zip(pair, ("record", "edit"), strict=True)):
                conditional = ask(part, t, prompts[half], mode)
                null = conditional if guidance_scale == 1 else ask(part, t, null_prompt, "pass")
                found[half].append(cfg(null, conditional, guidance_scale))
        return torch.cat([*found[0], *found[1]])

    return predict
