"""Reading values from the device with one wait: each .item() would let the host wait for all queued work."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


def to_host(values: Mapping[Hashable, float | Tensor]) -> dict[Hashable, float]:
    """The values as numbers, those that are tensors of one element read together."""
    tensors = {key: value.detach().reshape(()).double() for key, value in values.items() if isinstance(value, Tensor)}
    read = dict(zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)) if tensors else {}
    return {**values, **read}
