"""What a prior's networks may trade for memory: how attention is computed, and how many images a VAE takes at once."""

from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
)
from torch import nn

ATTENTION = ("auto", "sdpa", "sliced")


def set_attention(unet: nn.Module, mode: str) -> None:
    """Sets how a UNet computes attention, with the same result.

    auto: as diffusers chooses; sdpa: torch's fused kernels, which keep no attention matrix; sliced: the matrix of half
    the heads of one element at a time, for devices whose fused kernel is missing or falls back to the whole matrix.
    """
    if mode == "auto":
        return
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(_processor(module, mode))


def _processor(module: Attention, mode: str) -> object:
    attends_to_added_text = module.added_kv_proj_dim is not None  # DeepFloyd IF's blocks
    if mode == "sdpa":
        return AttnAddedKVProcessor2_0() if attends_to_added_text else AttnProcessor2_0()
    heads = max(1, module.heads // 2)
    return SlicedAttnAddedKVProcessor(heads) if attends_to_added_text else SlicedAttnProcessor(heads)
