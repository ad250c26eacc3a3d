"""The hash encoding by tinycudann, whose layout of the table hashgrid.py follows."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def encode_tcnn(positions: Tensor, table: Tensor, offsets: Sequence[int], resolutions: Sequence[float]) -> Tensor:
    """`hash_encode` in float32 on CUDA. Raises RuntimeError if tinycudann lays this grid out differently."""
    encoding = _encoding(tuple(offsets), tuple(resolutions), table.shape[1])
    return torch.func.functional_call(encoding, {"params": table.flatten()}, (positions.clamp(0, 1),)).to(table.dtype)


@functools.lru_cache(maxsize=8)
def _encoding(offsets: tuple[int, ...], resolutions: tuple[float, ...], features: int) -> torch.nn.Module:
    import tinycudann

    levels, largest = len(resolutions), max(b - a for a, b in itertools.pairwise(offsets))
    config = {
        "otype": "HashGrid",
        "n_levels": levels,
        "n_features_per_level": features,
        "log2_hashmap_size": math.ceil(math.log2(largest)),
        "base_resolution": round(resolutions[0]),
        "per_level_scale": (resolutions[-1] / resolutions[0]) ** (1 / max(levels - 1, 1)),
    }
    encoding = tinycudann.Encoding(3, config, dtype=torch.float32)
    if encoding.params.numel() != offsets[-1] * features:
        raise RuntimeError(f"tinycudann lays this grid out differently: {encoding.params.numel()} parameters, {config}")
    return encoding
