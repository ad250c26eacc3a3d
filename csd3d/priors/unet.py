"""Noise predictors that are UNets: those of Stable Diffusion and InstructPix2Pix, SDXL, DeepFloyd IF.

Symbols as in `base`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from csd3d.priors.base import Condition


def to_epsilon(output: Tensor, z_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Turns a network's output into the noise ε it implies.

        v_prediction: v = √ᾱ ε − σ z    =>  ε = √ᾱ v + σ z_t           (arXiv 2202.00512, appendix D)
        sample:       z_t = √ᾱ z + σ ε  =>  ε = (z_t − √ᾱ z) / σ

    `output`, `z_t` [B, C, h, w]; `alpha_bar` [B]. Raises ValueError for another prediction type.
    """
    a, sigma = (value.sqrt().reshape(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return a * output + sigma * z_t
    if prediction_type == "sample":
        return (z_t - a * output) / sigma
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


def unet_output(
    unet: Callable[..., Tensor], z_t: Tensor, t: Tensor, condition: Condition, picture_scale: int | None = None
) -> Tensor:
    """What a UNet says of z_t [B, C, h, w] at t [B]: ε, v or z [B, C, h, w].

    A UNet with learned variance (DeepFloyd IF, arXiv 2102.09672) gives 2C channels, the variance last: it is left off.
    `picture_scale`, the pixels to one latent along a side, is given for SDXL, which is told sizes and pooled text
    (arXiv 2307.01952, sections 2.2 and 2.3); ValueError where the condition then lacks pooled text.
    """
    sample = z_t if condition.image is None else torch.cat([z_t, condition.image], dim=1)
    sample = sample.to(memory_format=torch.channels_last)
    added = {} if picture_scale is None else {"added_cond_kwargs": _size_and_pool(z_t, condition, picture_scale)}
    return unet(sample, t, encoder_hidden_states=condition.text, **added)[:, : z_t.shape[1]]


def _size_and_pool(z_t: Tensor, condition: Condition, picture_scale: int) -> dict[str, Tensor]:
    if condition.pooled is None:
        raise ValueError("this model takes pooled text too: build conditions with prior.condition(prompts)")
    time_ids = condition.time_ids
    if time_ids is None:
        height, width = (side * picture_scale for side in z_t.shape[-2:])
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(z_t), -1)
    return {"text_embeds": condition.pooled, "time_ids": time_ids.to(z_t.device, torch.float32)}
