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


def perp_neg(eps_null: Tensor, eps_text: Tensor, eps_away: list[Tensor], weights: Tensor, scale: float) -> Tensor:
    """Perp-Neg (arXiv 2304.04968) Eq. 6: ε_∅ + ω (δ − Σ_k w_k δ_k^⊥), δ = ε_y − ε_∅, δ_k^⊥ the part of ε_k − ε_∅ off δ.

    A negative prompt that shares something with the prompt then cannot take it away. Predictions [N, ...], `weights`
    w ≥ 0 [N, K] of the K predictions of `eps_away`. With zero weights it is `cfg`.
    """
    wanted = (eps_text - eps_null).flatten(1)
    total, square = wanted, wanted.square().sum(1, keepdim=True).clamp_min(1e-20)
    for eps, w in zip(eps_away, weights.to(wanted).T, strict=True):
        away = (eps - eps_null).flatten(1)
        across = away - (away * wanted).sum(1, keepdim=True) / square * wanted
        total = total - w[:, None] * across
    return eps_null + scale * total.view_as(eps_null)
