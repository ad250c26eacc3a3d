"""Between host and device with few waits: each .item() and each plain copy waits for all work that is queued."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


def to_host(values: Mapping[Hashable, float | Tensor]) -> dict[Hashable, float]:
    """The values as numbers, those that are tensors of one element read together."""
    tensors = {key: value.detach().reshape(()).double() for key, value in values.items() if isinstance(value, Tensor)}
    read = dict(zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)) if tensors else {}
    return {**values, **read}


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, without waiting for the work that is queued there.

    Towards a card that is safe: CUDA reads the host's memory before the call returns, unless it is pinned, which ours
    is not. Towards the host it would not be, because the copy is used at once.
    """
    return x.to(device, non_blocking=device.type != "cpu")
