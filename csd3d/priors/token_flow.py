"""TokenFlow's attention (Geyer et al. 2023, arXiv 2307.10373): the edited features of key frames flow to the others.

Symbols as in `key_views`; its views are the frames of a video here, its key views key frames.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.priors.key_views import InjectedAttention

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

SOURCE = "source"  # the group whose states are matched: the source video's own latents


class TokenFlowAttention(InjectedAttention):
    """Key frames attend to all key frames; others take over the outputs of the key frames before and after them.

        φ(K) = softmax(Q_K K_Kᵀ/√d) V_K                     over the pixels of all key frames at once
        φ_i(p) = w_i φ_a(m_ia(p)) + (1 − w_i) φ_b(m_ib(p)),   m_ik(p) = argmax_q cos(h_i(p), h_k(q))

    a ≤ i ≤ b are the key frames next to frame i, or the only one where i lies before the first or after the last; h the
    states of the group "source", whose rows attend to themselves alone. w_i = (b − i)/(b − a), so that a key frame has
    its own output. The authors' weight is σ of it, which never leaves a frame to one key frame.
    """

    def __init__(self) -> None:
        super().__init__(torch.empty(0, 0), lambda *_: None)

    def of_keys(self, layer: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor) -> Tensor:
        outputs = []
        for group, own in self.by_group(hidden).items():
            if group == SOURCE:
                self._states[layer] = F.normalize(own.float(), dim=-1)
                outputs.append(base(attn, own))
            else:  # as one long picture every pixel attends to those of all key frames
                outputs.append(base(attn, own.flatten(0, 1)[None]).view_as(own))
                self._outputs[layer, group] = outputs[-1]
        return torch.cat(outputs)

    def of_views(self, layer: str, base: Callable[..., Tensor], attn: "Attention", hidden: Tensor) -> Tensor:
        outputs = []
        for group, own in self.by_group(hidden).items():
            frames = self.views[self.first : self.first + len(own)].tolist()
            if group == SOURCE:
                for frame, states in zip(frames, own, strict=True):
                    self._matches[layer, frame] = self.match(layer, frame, states)
                outputs.append(base(attn, own))
            else:
                outputs.append(torch.stack([self.injected(layer, group, frame) for frame in frames]).to(own))
        return torch.cat(outputs)

    def nearest(self, view: int) -> tuple[list[int], list[float]]:
        """The places in `keys`, which rise, of the key frames before and after frame `view`, and their weights."""
        after = int(torch.searchsorted(self.keys, view))
        if after in (0, len(self.keys)):
            return [min(after, len(self.keys) - 1)], [1.0]
        a, b = self.keys[after - 1 : after + 1].tolist()
        weight = (b - view) / (b - a)
        return [after - 1, after], [weight, 1 - weight]
