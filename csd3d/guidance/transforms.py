"""How the prompts of an illusion look at one picture: each transform has an exact inverse."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {  # of square pictures [N, C, S, S] in [0, 1]
    "none": lambda x: x,
    "rotate_90": lambda x: x.rot90(1, (2, 3)),  # counter-clockwise
    "rotate_180": lambda x: x.rot90(2, (2, 3)),
    "rotate_270": lambda x: x.rot90(3, (2, 3)),
    "mirror": lambda x: x.flip(3),
    "upside_down": lambda x: x.flip(2),
    "negative": lambda x: 1 - x,
}
INVERSES = {name: name for name in TRANSFORMS} | {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}


def seen_by(pictures: Tensor, names: Sequence[str]) -> Tensor:
    """Pictures [N, 3, S, S] through each of K transforms, [K·N, 3, S, S]; without names, as they are."""
    return torch.cat([TRANSFORMS[name](pictures) for name in names]) if names else pictures
