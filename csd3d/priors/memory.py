"""How a UNet computes attention: faster, or in less memory."""

from functools import partial

from torch import nn

from csd3d.priors.later import Later

ATTENTION = ("auto", "sdpa", "sliced")


def set_attention(unet: nn.Module | Later, mode: str) -> None:
    """Set how a UNet computes attention; the result is the same.

    auto: as diffusers chooses; sdpa: torch's fused kernels, which keep no attention matrix; sliced: the matrix of half
    the heads of one element at a time, for devices without a fused kernel that saves memory.
    """
    if mode == "auto":
        return
    if isinstance(unet, Later):
        unet.then(partial(set_attention, mode=mode))
        return
    from diffusers.models import attention_processor as ap

    for module in unet.modules():
        if isinstance(module, ap.Attention):
            with_added_text = module.added_kv_proj_dim is not None  # DeepFloyd IF's blocks
            if mode == "sdpa":
                processor = ap.AttnAddedKVProcessor2_0() if with_added_text else ap.AttnProcessor2_0()
            else:
                kind = ap.SlicedAttnAddedKVProcessor if with_added_text else ap.SlicedAttnProcessor
                processor = kind(max(1, module.heads // 2))
            module.set_processor(processor)
