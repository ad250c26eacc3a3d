"""Classifier-free guidance, in one convention: scale 1 is the conditional prediction, 0 the unconditional one."""

from collections.abc import Callable

import torch
from torch import Tensor

from csd3d.distillation.method import Predict, Query, Step


def cfg(eps_uncond: Tensor, eps_cond: Tensor, scale: float) -> Tensor:
    """ε^ω = ε_∅ + ω (ε_y − ε_∅), Ho & Salimans (arXiv 2207.12598) Eq. 6 with ω = 1 + w; exact at 0 and at 1."""
    return torch.lerp(eps_uncond, eps_cond, scale)


def ip2p_guidance(
    eps_null: Tensor, eps_image: Tensor, eps_full: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """ε(∅,∅) + ω_s (ε(x̃,∅) − ε(∅,∅)) + ω_y (ε(x̃,y) − ε(x̃,∅)), InstructPix2Pix (arXiv 2211.09800) Eq. 3.

    Exactly ε(x̃,∅) if ω_s = 1 and the text has no effect.
    """
    return cfg(eps_null, eps_image, image_scale) + text_scale * (eps_full - eps_image)


def perp_neg(eps_null: Tensor, eps_text: Tensor, eps_away: list[Tensor], weights: Tensor, scale: float) -> Tensor:
    """Perp-Neg (arXiv 2304.04968) Eq. 6: ε_∅ + ω (δ − Σ_k w_k δ_k^⊥), δ = ε_y − ε_∅, δ_k^⊥ the part of ε_k − ε_∅ off δ.

    So a negative prompt cannot remove what it shares with the prompt. Predictions are [N, ...], `weights` w ≥ 0 [N, K]
    for the K predictions of `eps_away`. With zero weights it is `cfg`.
    """
    delta = (eps_text - eps_null).flatten(1)
    total, square = delta, delta.square().sum(1, keepdim=True).clamp_min(1e-20)
    for eps, w in zip(eps_away, weights.to(delta).T, strict=True):
        away = (eps - eps_null).flatten(1)
        across = away - (away * delta).sum(1, keepdim=True) / square * delta
        total = total - w[:, None] * across
    return eps_null + scale * total.view_as(eps_null)


def guided_queries(
    step: Step, of: str = "target", *, scale: float | None = None, z_t: Tensor | None = None
) -> dict[str, Query]:
    """The queries for `guided`: the prompt's, the unconditional one unless ω = 1, and those of Perp-Neg's other views.

    Names of the "source" begin with "source_", and Perp-Neg does not apply to it. `scale`: the same as for `guided`;
    `z_t`: a latent in place of the step's. An editing model, told by step.image, is asked for InstructPix2Pix's three
    branches instead: the prompt and the picture, the picture alone, and neither unless ω_s = 1.
    """
    prefix, away = ("source_", ()) if of == "source" else ("", step.away)
    scale = step.guidance_scale if scale is None else scale
    edits = step.image is not None
    queries = {f"{prefix}text": step.query(of=of, z_t=z_t, image=edits)}
    if edits:
        queries = {f"{prefix}image": step.query(step.null_prompt, of=of, z_t=z_t, image=True), **queries}
    if step.image_scale != 1 if edits else scale != 1 or away:
        queries = {f"{prefix}null": step.query(step.null_prompt, of=of, z_t=z_t), **queries}
    return queries | {f"away{k}": step.query(prompts, z_t=z_t) for k, (prompts, _) in enumerate(away)}


def guided(eps: dict[str, Tensor], step: Step, of: str = "target", scale: float | None = None) -> Tensor:
    """ε^ω from the answers to `guided_queries`, ω the step's guidance scale unless `scale` is given.

    Of an editing model it is `ip2p_guidance` with ω_y = ω and ω_s = step.image_scale. A source without an instruction,
    whose prompt is the null prompt, is then guided by the picture alone.
    """
    prefix, scale = "source_" if of == "source" else "", step.guidance_scale if scale is None else scale
    text = eps[f"{prefix}text"]
    if f"{prefix}image" in eps:
        image = eps[f"{prefix}image"]
        return ip2p_guidance(eps.get(f"{prefix}null", image), image, text, scale, step.image_scale)
    if f"{prefix}null" not in eps:
        return text
    null = eps[f"{prefix}null"]
    if of == "source" or not step.away:
        return cfg(null, text, scale)
    weights = torch.stack([weight for _, weight in step.away], 1)
    return perp_neg(null, text, [eps[f"away{k}"] for k in range(len(step.away))], weights, scale)


def edit_queries(
    z_t: Tensor, t: int, prompts: tuple[str, ...], image: Tensor, image_scale: float, null_prompt: str = ""
) -> dict[str, Query]:
    """InstructPix2Pix's branches at z_t: "image" (x̃, ∅), "full" (x̃, y), and "null" (∅, ∅) unless ω_s = 1."""
    nothing = (null_prompt,) * len(z_t)
    queries = {"image": Query(z_t, t, nothing, image), "full": Query(z_t, t, prompts, image)}
    return queries if image_scale == 1 else {**queries, "null": Query(z_t, t, nothing)}


def edit_guided(eps: dict[str, Tensor], text_scale: float, image_scale: float) -> Tensor:
    """`ip2p_guidance` of the answers to `edit_queries`."""
    image = eps["image"]
    return ip2p_guidance(eps.get("null", image), image, eps["full"], text_scale, image_scale)


def edit_predictor(
    predict: Predict,
    prompts: tuple[str, ...],
    image: Tensor,
    text_scale: float,
    image_scale: float,
    null_prompt: str = "",
) -> Callable[[Tensor, int], Tensor]:
    """The guided `predict(z_t, t)` for `ddim_edit`, made from a prior's `predict(queries)`."""

    def predict_guided(z_t: Tensor, t: int) -> Tensor:
        queries = edit_queries(z_t, t, prompts, image, image_scale, null_prompt)
        return edit_guided(predict(queries), text_scale, image_scale)

    return predict_guided
