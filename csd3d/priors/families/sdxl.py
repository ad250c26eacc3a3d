"""Stable Diffusion XL (arXiv 2307.01952), and editing models made from it as InstructPix2Pix was from SD.

The UNet takes the last but one hidden states of two CLIPs side by side, the pooled text of the second, and the
picture's sizes (sections 2.2 and 2.3).

    prior:
      model: stabilityai/stable-diffusion-xl-base-1.0
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.priors.autoencoder import UnscaledLatent, VaeCodec
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.families import stable_diffusion
from csd3d.priors.families.stable_diffusion import check_embeddings, defaults_of
from csd3d.priors.memory import set_attention
from csd3d.priors.opening import (
    ModelFolder,
    check_channels,
    check_width,
    load_parts,
    takes_source,
)
from csd3d.priors.prior import Options, Prior
from csd3d.priors.schedules import load_noise_schedule
from csd3d.priors.text import TextEncoder, embed_two_clips, pooled_text
from csd3d.registry import register


@register("family", "sdxl", title="Stable Diffusion XL, and editing models of it")
class StableDiffusionXL:
    parts = {  # noqa: RUF012 (never changed)
        "vae": "diffusers.AutoencoderKL",
        "unet": "diffusers.UNet2DConditionModel",
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer_2": "transformers.CLIPTokenizer",
    }

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        unet = folder.config("unet")
        return unet.get("_class_name") == "UNet2DConditionModel" and unet.get("addition_embed_type") == "text_time"

    @staticmethod
    def check(folder: ModelFolder) -> None:
        check_embeddings(folder)
        check_channels(folder, "unet", 2)
        load_noise_schedule(folder)

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return takes_source(folder, "unet")

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        zero_null = _zeros_for_empty_prompt(folder)
        parts = load_parts(folder, StableDiffusionXL.parts, options)
        schedule = load_noise_schedule(folder)
        unet, codec = parts["unet"], VaeCodec(parts["vae"], slicing=options.vae_slicing)
        _check_fit(folder, unet.config, parts)
        set_attention(unet, options.attention)
        text = TextEncoder(
            folder,
            parts,
            partial(embed, zero_null=zero_null),
            f"sdxl, zero_null={zero_null}",
            options.device,
            options.embedding_cache,
        )
        edits = StableDiffusionXL.edits(folder)
        return Prior(
            codec,
            unet,
            text,
            schedule.alphas_cumprod,
            partial(forward, downscale=codec.downscale),
            schedule.config.prediction_type,
            defaults_of(unet.config, codec.downscale, edits),
            options,
            UnscaledLatent() if edits else None,
        )


def embed(parts: Mapping[str, Any], prompt: str, zero_null: bool) -> Embedding:
    """The tokens of two CLIPs, and the second's projection as pooled text.

    With `zero_null`, the pipeline's `force_zeros_for_empty_prompt`, the embedding of "" is all zeros.
    """
    text, (_, pooled) = embed_two_clips(parts, prompt)
    embedding = {"text": text, "pooled": pooled}
    return {name: torch.zeros_like(x) for name, x in embedding.items()} if zero_null and not prompt else embedding


def forward(
    network: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    condition: Condition,
    downscale: int,
) -> Tensor:
    """`stable_diffusion.forward` with pooled text and sizes; a latent pixel is `downscale` pixels wide.

    Raises ValueError for a condition without pooled text.
    """
    time_ids = condition.time_ids
    if time_ids is None:
        height, width = (side * downscale for side in z_t.shape[-2:])
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(z_t), -1)
    added = {"text_embeds": pooled_text(condition), "time_ids": time_ids.to(z_t.device, torch.float32)}
    return stable_diffusion.forward(network, z_t, t, alpha_bar, condition, added_cond_kwargs=added)


def _check_fit(folder: ModelFolder, config: Any, parts: Mapping[str, Any]) -> None:
    clips = [parts[part].config for part in ("text_encoder", "text_encoder_2")]
    check_width(folder, "unet", config.cross_attention_dim, sum(clip.hidden_size for clip in clips))
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    check_width(folder, "unet", pooled, clips[1].projection_dim, "pooled text")


def _zeros_for_empty_prompt(folder: ModelFolder) -> bool:
    """`force_zeros_for_empty_prompt` of model_index.json; true by default."""
    value = folder.index().get("force_zeros_for_empty_prompt", True)
    if not isinstance(value, bool):
        raise InputError(f"{folder}/model_index.json: force_zeros_for_empty_prompt must be true or false, is {value!r}")
    return value
