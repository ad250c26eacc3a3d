"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752), and InstructPix2Pix (arXiv 2211.09800), which edits.

A UNet on the latents of a VAE, with the last hidden state of one CLIP as its text. InstructPix2Pix has twice the input
channels: z_t, then the unscaled latent of the source picture. Models shipped with csd3d may take cameras too; their
UNet has `class_embed_type` "projection" and the width of `camera_embedding`, and may see `camera_map` beside z_t.

    prior:
      model: timbrooks/instruct-pix2pix
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csd3d.errors import InputError
from csd3d.priors.autoencoder import UnscaledLatent, VaeCodec
from csd3d.priors.camera_embedding import CAMERA_WIDTH, MAP_CHANNELS, camera_map
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.memory import set_attention
from csd3d.priors.opening import (
    ModelFolder,
    check_channels,
    check_width,
    load_parts,
    takes_source,
)
from csd3d.priors.prior import Defaults, Options, Prior
from csd3d.priors.schedules import load_noise_schedule
from csd3d.priors.text import TextEncoder, clip_tokens
from csd3d.registry import register

EDIT_T_MAX = 0.8  # noise level from which CSD-Edit starts


@register("family", "stable_diffusion", title="Stable Diffusion 1.x and 2.x, InstructPix2Pix")
class StableDiffusion:
    parts = {  # noqa: RUF012 (never changed)
        "vae": "diffusers.AutoencoderKL",
        "unet": "diffusers.UNet2DConditionModel",
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer",
    }

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        unet = folder.config("unet")
        return unet.get("_class_name") == "UNet2DConditionModel" and unet.get("addition_embed_type") is None

    @staticmethod
    def check(folder: ModelFolder) -> None:
        check_embeddings(folder, class_embed_types=(None, "projection"))
        unet = folder.config("unet")
        check_channels(folder, "unet", 2, more=MAP_CHANNELS if unet.get("class_embed_type") == "projection" else 0)
        load_noise_schedule(folder)
        width = unet.get("projection_class_embeddings_input_dim")
        # other models project something else, such as unCLIP's picture embedding
        if unet.get("class_embed_type") == "projection" and width != CAMERA_WIDTH:
            raise InputError(
                f"{folder}/unet/config.json: class_embed_type = 'projection' with "
                f"projection_class_embeddings_input_dim = {width} is not supported: a camera's would be {CAMERA_WIDTH}"
            )

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return takes_source(folder, "unet")

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        parts = load_parts(folder, StableDiffusion.parts, options)
        schedule = load_noise_schedule(folder)
        unet, codec = parts["unet"], VaeCodec(parts["vae"], slicing=options.vae_slicing)
        check_width(folder, "unet", unet.config.cross_attention_dim, parts["text_encoder"].config.hidden_size)
        set_attention(unet, options.attention)
        takes_camera = unet.config.class_embed_type == "projection"
        edits = StableDiffusion.edits(folder)
        sees_map = takes_camera and unet.config.in_channels == codec.channels + MAP_CHANNELS
        return Prior(
            codec,
            unet,
            TextEncoder(folder, parts, embed, "sd", options.device, options.embedding_cache),
            schedule.alphas_cumprod,
            partial(forward, sees_map=True) if sees_map else forward,
            schedule.config.prediction_type,
            defaults_of(unet.config, codec.downscale, edits),
            options,
            UnscaledLatent() if edits else None,
            camera_width=unet.config.projection_class_embeddings_input_dim if takes_camera else 0,
        )


def embed(parts: Mapping[str, Any], prompt: str) -> Embedding:
    """The last hidden state of one CLIP."""
    encoder = parts["text_encoder"]
    tokens = clip_tokens(encoder, parts["tokenizer"], prompt)
    # like diffusers, mask the padding only for the few text encoders that were trained with a mask
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return {"text": encoder(tokens.input_ids, attention_mask=mask)[0][0].float()}


def forward(
    network: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    condition: Condition,
    sees_map: bool = False,
    **options: Any,
) -> Tensor:
    """The output of a UNet called with `options` too, for z_t [B, C, h, w] at t [B]; see `prior.Prior.forward`.

    sees_map: `camera_map` goes beside z_t.  A UNet with learned variance (arXiv 2102.09672) gives 2C channels; the last
    C, the variance, are dropped.
    """
    sample = z_t if condition.image is None else torch.cat([z_t, condition.image], dim=1)
    if condition.camera is not None:
        options["class_labels"] = condition.camera
    if sees_map:
        sample = torch.cat([sample, camera_map(condition.camera, *z_t.shape[2:])], dim=1)
    sample = sample.to(memory_format=torch.channels_last)
    return network(sample, t, encoder_hidden_states=condition.text, **options)[:, : z_t.shape[1]]


def check_embeddings(folder: ModelFolder, class_embed_types: tuple[str | None, ...] = (None,)) -> None:
    """Raise InputError for a UNet with inputs that no family here supports: a guidance scale (LCM), classes."""
    unet = folder.config("unet")
    for key, known in {"time_cond_proj_dim": (None,), "class_embed_type": class_embed_types}.items():
        if unet.get(key) not in known:
            raise InputError(f"{folder}/unet/config.json: {key} = {unet[key]!r} is not supported")


def defaults_of(config: Any, downscale: int, edits: bool) -> Defaults:
    """What suits a predictor with this config. Edits start below pure noise, to keep the source's layout."""
    own = Defaults(working_size=working_size(config, downscale))
    return replace(own, t_max=EDIT_T_MAX) if edits else own


def working_size(config: Any, downscale: int) -> int:
    """Shorter side, in pixels, of the pictures that a predictor was trained on."""
    size = config.sample_size or 64
    return (min(size) if isinstance(size, (list, tuple)) else size) * downscale
