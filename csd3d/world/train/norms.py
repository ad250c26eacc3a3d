"""Group normalisation (Wu & He 2018, arXiv 1803.08494) that trains fast on a CPU with channels-last activations.

torch's own backward is 40 times slower there on channels-last bfloat16 than on contiguous tensors (82 against 2 ms for
[16,16,128,128] on a Zen 4 core), while convolutions are up to 3 times faster channels-last. So activations stay
channels-last and are transposed around the normalisation alone. Values and gradients are torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 64 * 64  # pixels from which torch's forward is fast on channels-last tensors as they are


class _TransposedGroupNorm(torch.autograd.Function):
    """y = w (x − mean)/std + b over groups of channels, x [B,C,H,W]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        inner = x if h * w >= LARGE else x.contiguous()
        y, mean, rstd = torch.native_group_norm(inner, weight.to(x.dtype), bias.to(x.dtype), b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            dy.contiguous(), x.contiguous(), mean, rstd, weight.to(x.dtype), b, c, h * w, ctx.groups, [True] * 3
        )
        return dx.contiguous(memory_format=torch.channels_last), dw.to(weight.dtype), db.to(weight.dtype), None, None


class FastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with the transposed path for 4-d CPU tensors in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x of the same shape [B,C,H,W]."""
        if x.ndim != 4 or x.device.type != "cpu" or not torch.is_grad_enabled():
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return _TransposedGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def use_fast_norms(module: nn.Module) -> nn.Module:
    """Turn every nn.GroupNorm inside `module` into a FastGroupNorm, parameters and their names unchanged."""
    for child in module.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = FastGroupNorm
    return module
