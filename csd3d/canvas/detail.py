"""Restore the detail that the autoencoder loses, where an edit has not changed the picture."""

import torch.nn.functional as F
from torch import Tensor

KEPT_BELOW = 0.1  # mean difference from the source, in [0, 1], below which detail is restored
NEIGHBOURHOOD = 9  # pixels a side over which the difference is averaged


def restore_detail(decoded: Tensor, decoded_source: Tensor, source: Tensor) -> Tensor:
    """Add the source's detail that the autoencoder loses to edited pictures [M, H, W, 3], where they are unchanged.

        decoded + w (source − decoded_source)

    w is 1 where the decoded edit equals the decoded source, and falls to 0 where their mean difference over a
    neighbourhood and the channels reaches `KEPT_BELOW`. Without any edit the source comes back exactly. All in [0, 1].
    """
    difference = (decoded - decoded_source).abs().mean(-1)[:, None]
    pad = NEIGHBOURHOOD // 2
    near = F.avg_pool2d(F.pad(difference, (pad,) * 4, mode="replicate"), NEIGHBOURHOOD, stride=1)[:, 0, :, :, None]
    weight = (1 - near / KEPT_BELOW).clamp(min=0)
    return (decoded + weight * (source - decoded_source)).clamp(0, 1)


def restore_frames(decoded: Tensor, decoded_source: Tensor, source: Tensor, wrap: bool = False) -> Tensor:
    """`restore_detail` for pictures [M, 3, H, W]; `wrap`: the right border continues at the left."""
    pictures = (decoded, decoded_source, source)
    if not wrap:
        return restore_detail(*(p.permute(0, 2, 3, 1) for p in pictures)).permute(0, 3, 1, 2)
    pad = min(NEIGHBOURHOOD // 2, source.shape[-1])
    rolled = (F.pad(p, (pad, pad, 0, 0), mode="circular").permute(0, 2, 3, 1) for p in pictures)
    return restore_detail(*rolled).permute(0, 3, 1, 2)[..., pad:-pad]
