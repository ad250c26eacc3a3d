"""Classifier-free guidance, in one convention: scale 1 is the conditional prediction, 0 the unconditional one."""

import torch
from torch import Tensor


def cfg(eps_uncond: Tensor, eps_cond: Tensor, scale: float) -> Tensor:
    """ε^ω = ε_∅ + ω (ε_y − ε_∅), Ho & Salimans (arXiv 2207.12598) Eq. 6 with ω = 1 + w; exact at 0 and at 1."""
    return torch.lerp(eps_uncond, eps_cond, scale)


def ip2p_guidance(
    eps_null: Tensor, eps_image: Tensor, eps_full: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """ε(∅,∅) + ω_s (ε(x̃,∅) − ε(∅,∅)) + ω_y (ε(x̃,y) − ε(x̃,∅)), InstructPix2Pix (arXiv 2211.09800) Eq. 3.

    Exactly ε(x̃,∅) where ω_s = 1 and the text changes nothing.
    """
    return cfg(eps_null, eps_image, image_scale) + text_scale * (eps_full - eps_image)
