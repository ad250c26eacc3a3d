"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer that predicts the velocity of flow matching.

Its text encoders are two CLIPs and T5, which may be left out. `flow` derives ε from its velocity.

UltraEdit (arXiv 2407.05282) is an editing model made from it as InstructPix2Pix was from SD: the transformer takes the
unscaled latent of the source picture as more channels and, in the version with a mask, that of a picture that is white
where it may edit. We give it a white one: all of the picture. As in its authors' code its z has no shift.

    prior:
      model: stabilityai/stable-diffusion-3.5-medium
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.priors.autoencoder import UnscaledLatent, VaeCodec
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.families.stable_diffusion import EDIT_T_MAX
from csd3d.priors.flow import flow_input, flow_schedule
from csd3d.priors.opening import (
    ModelFolder,
    check_channels,
    check_width,
    load_parts,
    takes_source,
)
from csd3d.priors.prior import Defaults, Options, Prior
from csd3d.priors.schedules import load_flow_schedule
from csd3d.priors.text import TextEncoder, embed_two_clips, pooled_text, tokenized
from csd3d.priors.tokens import check_attention
from csd3d.registry import register

logger = logging.getLogger("csd3d")
T5_TOKENS = 256
T5 = ("text_encoder_3", "tokenizer_3")


@register("family", "sd3", title="Stable Diffusion 3 and 3.5, UltraEdit")
class StableDiffusion3:
    parts = {  # noqa: RUF012 (never changed)
        "vae": "diffusers.AutoencoderKL",
        "transformer": "diffusers.SD3Transformer2DModel",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "tokenizer": "transformers.CLIPTokenizer",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer_2": "transformers.CLIPTokenizer",
        "text_encoder_3": "transformers.T5EncoderModel",
        "tokenizer_3": "transformers.T5TokenizerFast",
    }

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        return folder.config("transformer").get("_class_name") == "SD3Transformer2DModel"

    @staticmethod
    def check(folder: ModelFolder) -> None:
        check_channels(folder, "transformer", 2, 3)
        load_flow_schedule(folder)

    check_options = staticmethod(check_attention)

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return takes_source(folder, "transformer")

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        parts = load_parts(folder, _present(folder), options)
        transformer, config = parts["transformer"], parts["transformer"].config
        codec = VaeCodec(parts["vae"], config.patch_size, slicing=options.vae_slicing)
        patches = (config.sample_size // config.patch_size) ** 2
        alphas_cumprod = flow_schedule(load_flow_schedule(folder), patches)
        source = (None, UnscaledLatent(), MaskedLatent())[config.in_channels // codec.channels - 1]
        if source is not None:
            codec.shift = 0.0
        _check_text(folder, config, parts)
        text = TextEncoder(
            folder,
            parts,
            partial(embed, width=config.joint_attention_dim),
            f"sd3, width={config.joint_attention_dim}, t5={T5[0] in parts}",
            options.device,
            options.embedding_cache,
        )
        return Prior(
            codec,
            transformer,
            text,
            alphas_cumprod,
            partial(forward, timesteps=len(alphas_cumprod)),
            "flow",
            Defaults(
                t_max=Defaults.t_max if source is None else EDIT_T_MAX,
                working_size=config.sample_size * codec.downscale,
            ),
            options,
            source,
        )


class MaskedLatent(UnscaledLatent):
    """UltraEdit's source with a mask: the unscaled modes of the picture and of a white one, side by side.

    The null image is zeros for both, as in its authors' pipeline.
    """

    def encode(self, codec: VaeCodec, x: Tensor, micro_batch: int) -> Tensor:
        return self._with_mask(codec, codec.encode_condition(x, micro_batch))

    def from_latent(self, codec: VaeCodec, z: Tensor) -> Tensor:
        return self._with_mask(codec, codec.unscaled(z))

    def null(self, z_t: Tensor) -> Tensor:
        return torch.zeros_like(z_t).repeat(1, 2, 1, 1)

    @torch.no_grad()
    def _with_mask(self, codec: VaeCodec, image: Tensor) -> Tensor:
        height, width = (side * codec.downscale for side in image.shape[2:])
        mask = codec.encode_condition(image.new_ones(1, 3, height, width), 1)
        return torch.cat([image, mask.expand_as(image)], 1)


def embed(parts: Mapping[str, Any], prompt: str, width: int) -> Embedding:
    """The tokens of two CLIPs, padded with zeros to `width` features, then T5's tokens, padding unmasked.

    Without T5 its tokens are zeros. The pooled text is both CLIPs' projections.
    """
    clip, pooled = embed_two_clips(parts, prompt)
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    if T5[0] in parts:
        tokens = tokenized(parts["text_encoder_3"], parts["tokenizer_3"], prompt, T5_TOKENS)
        t5 = parts["text_encoder_3"](tokens.input_ids)[0][0].float()
    else:
        t5 = clip.new_zeros(T5_TOKENS, width)
    return {"text": torch.cat([clip, t5]), "pooled": torch.cat(pooled)}


def forward(
    network: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    condition: Condition,
    timesteps: int,
) -> Tensor:
    """The velocity v [B, C, h, w] at x_s; the network's time is s · `timesteps`.

    Raises ValueError for a condition without pooled text.
    """
    x_s, s = flow_input(z_t, alpha_bar)
    if condition.image is not None:
        x_s = torch.cat([x_s, condition.image], 1)
    return network(
        hidden_states=x_s,
        timestep=s * timesteps,
        encoder_hidden_states=condition.text,
        pooled_projections=pooled_text(condition),
    )


def _present(folder: ModelFolder) -> dict[str, str]:
    """The classes of the parts; T5, three quarters of all weights, may have been left out."""
    if folder.has(T5[0]):
        return StableDiffusion3.parts
    logger.warning("%s has no text_encoder_3: only its two CLIPs embed the prompts", folder)
    return {part: cls for part, cls in StableDiffusion3.parts.items() if part not in T5}


def _check_text(folder: ModelFolder, config: Any, parts: Mapping[str, Any]) -> None:
    clips = [parts[part].config for part in ("text_encoder", "text_encoder_2")]
    takes = config.joint_attention_dim
    if T5[0] in parts:
        check_width(folder, "transformer", takes, parts[T5[0]].config.d_model)
    # the CLIPs' features may be narrower; they are padded
    check_width(folder, "transformer", takes, max(takes, sum(clip.hidden_size for clip in clips)))
    pooled = sum(clip.projection_dim for clip in clips)
    check_width(folder, "transformer", config.pooled_projection_dim, pooled, "pooled text")
