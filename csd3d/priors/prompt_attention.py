"""Attention of Prompt-to-Prompt (Hertz et al. 2022, arXiv 2208.01626): one prompt's maps taken over by another's.

Symbols as in `attention`; L tokens of text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csd3d.priors.attention import attention_maps, attention_output

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

MODES = ("pass", "record", "edit")


@dataclass(frozen=True)
class WordMaps:
    """How the cross-attention maps of a prompt become those of its edit.

    aligned [L, L]: column j holds the shares of the source's tokens in token j of the edit; zeros: it keeps its own.
    weights [L]: factors of the edit's tokens.
    """

    aligned: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "WordMaps":
        """The same on a device."""
        return WordMaps(self.aligned.to(device), self.weights.to(device))

    def combine(self, source: Tensor, own: Tensor) -> Tensor:
        """c_j (Σ_i M_source,i A_ij if token j is aligned, else M_own,j): maps [..., n, L].

        Section 3.2: "word swap" where A is one word for another, "adding a new phrase" where only common words are
        aligned, "attention re-weighting" by c. As in the paper, rows need not sum to 1.
        """
        aligned, weights = self.aligned.to(own), self.weights.to(own)
        return torch.where(aligned.any(0), source @ aligned, own) * weights


@dataclass
class PromptAttention:
    """The state of an edit, told before each call of the UNet by `at`; see `attention` for how it is called.

    Mode "record" keeps the maps of a call, "edit" uses them in the next call, of as many rows; "pass" changes nothing.
    Cross-attention is edited in the first `cross_steps` steps, self-attention in the first `self_steps`, there only in
    layers of at most `max_pixels` queries: the source's map takes the place of the edit's. One call's maps are kept.
    """

    words: WordMaps
    cross_steps: int
    self_steps: int
    max_pixels: int
    mode: str = "pass"
    step: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def at(self, mode: str, step: int) -> None:
        """Set what the next call does, and the number of the step that it belongs to."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
        self.mode, self.step = mode, step

    def process(
        self, layer: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor, text: Tensor | None
    ) -> Tensor:
        """The output of a layer; its own processor `base` attends where no map is taken over."""
        cross = attn.is_cross_attention
        small = cross or hidden.shape[1] <= self.max_pixels
        if self.mode == "pass" or not small or self.step >= (self.cross_steps if cross else self.self_steps):
            return base(attn, hidden, encoder_hidden_states=text)
        # both modes compute the maps in the same way, so that equal maps give equal bits
        maps, values = attention_maps(attn, hidden, hidden if text is None else text)
        if self.mode == "record":
            self.kept[layer] = maps
        else:
            source = self.kept.pop(layer)
            maps = self.words.combine(source, maps) if cross else source
        return attention_output(attn, maps @ values)
