"""Self-attention of the views of a scene to a few of them, the key views: in DGE's way, and in GaussCtrl's.

A prediction of all views has two parts. First all key views go through the UNet in one call, since they see one another
in every layer; what the others need of them is kept by layer and group. Then the other views follow, in as many calls
as they need. The kept tensors are replaced at the next prediction.

Symbols: groups and frames (here: views) as in `attention`; B groups, K key views, M views of a call, n pixels of a
layer, D its width; "states" are the inputs [.., n, D] of a layer's self-attention.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

GUIDE = "image"  # the group whose states are matched: the source picture without the instruction
Base = Callable[..., Tensor]  # a layer's own processor
Allowed = Callable[[str, int, int], Tensor | None]  # (layer, view, key view) -> [n, n] bool, or None: every pixel


class KeyViewAttention:
    """The state of a prediction: which views are the key views, and which views the next calls hold.

    Subclasses define `of_keys` and `of_views`: a layer's output [B M, n, D] for states [B M, n, D], in the call of the
    key views and in the calls of the others. They may keep what they need between the two.
    """

    def __init__(self) -> None:
        self.keys = self.views = torch.empty(0, dtype=torch.long)
        self.groups: tuple[str, ...] = ()
        self.first = 0

    def hold(self, keys: Tensor, views: Tensor | None = None) -> None:
        """Announce calls for `views` [V], numbers of views; None: one call for the key views `keys` [K] themselves."""
        self.keys, self.views = keys, keys if views is None else views

    def begin(self, groups: tuple[str, ...], first: int) -> None:
        """Announce a call of the UNet: its groups, and the place of its first view among those announced."""
        self.groups, self.first = groups, first

    def attend(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        """The output of a self-attention layer; see `attention.self_attention`."""
        count, rest = divmod(len(hidden), len(self.groups) or 1)
        of_keys = self.views is self.keys
        if not self.groups or rest or (of_keys and count != len(self.keys)):
            raise ValueError(f"a call of {len(hidden)} rows does not hold whole views of groups {self.groups}")
        return (self.of_keys if of_keys else self.of_views)(layer, base, attn, hidden)

    def of_keys(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def of_views(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def by_group(self, hidden: Tensor) -> dict[str, Tensor]:
        """Rows [B M, ...] by group, [M, ...] each."""
        return dict(zip(self.groups, hidden.unflatten(0, (len(self.groups), -1)), strict=True))


class InjectedAttention(KeyViewAttention):
    """DGE (Chen et al. 2024, arXiv 2404.18929): key views attend to all key views; others take over their outputs.

        φ(K) = softmax(Q_K K_Kᵀ/√d) V_K                     over the pixels of all key views at once
        φ_i(p) = Σ_k w_ik φ_k(m_ik(p)),   m_ik(p) = argmax_q cos(h_i(p), h_k(q)) among the pixels q that are allowed

    k are the two key views nearest to view i; h are the states of the group "image", whose matches serve all groups.
    `distances` [N, N] lie between the cameras of all views; with d₁ ≤ d₂, w_i1 = σ(d₂/(d₁ + d₂)) and w_i2 = 1 − w_i1,
    as in the authors' code. `allowed` says which pixels lie near an epipolar line; where none does, all are allowed.
    """

    def __init__(self, distances: Tensor, allowed: Allowed) -> None:
        super().__init__()
        self.distances, self.allowed = distances, allowed
        self._states: dict[str, Tensor] = {}  # of the key views in group GUIDE, [K, n, D] of unit length
        self._outputs: dict[tuple[str, str], Tensor] = {}  # of the key views, [K, n, D]
        self._matches: dict[tuple[str, int], Tensor] = {}  # of a view, [2, n] pixels of its nearest key views

    def of_keys(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        count = len(self.keys)
        # as one long picture for each group, every pixel attends to those of all key views
        joined = hidden.unflatten(0, (-1, count)).flatten(1, 2)
        outputs = base(attn, joined).unflatten(1, (count, -1)).flatten(0, 1)
        self._outputs |= {(layer, group): part for group, part in self.by_group(outputs).items()}
        if GUIDE in self.groups:
            self._states[layer] = F.normalize(self.by_group(hidden)[GUIDE].float(), dim=-1)
        return outputs

    def of_views(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        outputs = []
        for group, own in self.by_group(hidden).items():
            views = self.views[self.first : self.first + len(own)].tolist()
            if group == GUIDE:
                for view, states in zip(views, own, strict=True):
                    self._matches[layer, view] = self.match(layer, view, states)
            outputs += [self.injected(layer, group, view) for view in views]
        return torch.stack(outputs).to(hidden)

    def nearest(self, view: int) -> tuple[list[int], list[float]]:
        """The places in `keys` of the one or two key views nearest to `view`, the nearest first, and their weights."""
        distances, order = self.distances[view, self.keys].sort(stable=True)
        if len(order) == 1:
            return [0], [1.0]
        one, two = distances[:2].tolist()
        weight = torch.sigmoid(torch.tensor(two / (one + two) if two > 0 else 0.5)).item()
        return order[:2].tolist(), [weight, 1 - weight]

    def match(self, layer: str, view: int, states: Tensor) -> Tensor:
        """m_ik(p) [1 or 2, n] of the pixels of `view`, whose states are [n, D]."""
        own, found = F.normalize(states.float(), dim=-1), []
        for place in self.nearest(view)[0]:
            likeness = own @ self._states[layer][place].T
            if (near := self.allowed(layer, view, int(self.keys[place]))) is not None:
                likeness = likeness.masked_fill(near.any(1, keepdim=True) & ~near, -torch.inf)
            found.append(likeness.argmax(1))
        return torch.stack(found)

    def injected(self, layer: str, group: str, view: int) -> Tensor:
        """φ_i [n, D] of `view`."""
        outputs, (places, weights) = self._outputs[layer, group], self.nearest(view)
        parts = zip(places, weights, self._matches[layer, view], strict=True)
        return torch.stack([weight * outputs[place][pixels] for place, weight, pixels in parts]).sum(0)


class AlignedAttention(KeyViewAttention):
    """GaussCtrl (Wu et al. 2024, arXiv 2403.08733): a view's own attention mixed with that to each key view.

        φ_i = λ A(Q_i, K_i, V_i) + (1 − λ) 1/K Σ_k A(Q_i, K_k, V_k)

    for all views, key views too. `own_weight` is λ in [0, 1]; 1 leaves the attention as it is.
    """

    def __init__(self, own_weight: float) -> None:
        super().__init__()
        self.own_weight = own_weight
        self._states: dict[tuple[str, str], Tensor] = {}  # of the key views, [K, n, D]

    def of_keys(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        self._states |= {(layer, group): part for group, part in self.by_group(hidden).items()}
        return self.of_views(layer, base, attn, hidden)

    def of_views(self, layer: str, base: Base, attn: "Attention", hidden: Tensor) -> Tensor:
        count = len(hidden) // len(self.groups)
        keys = torch.stack([self._states[layer, group] for group in self.groups], 1)  # [K, B, n, D]
        seen = [base(attn, hidden, encoder_hidden_states=key.repeat_interleave(count, 0)) for key in keys]
        return torch.lerp(torch.stack(seen).mean(0), base(attn, hidden), self.own_weight)
