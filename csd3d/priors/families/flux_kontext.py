"""FLUX.1 Kontext (arXiv 2506.15742), which edits, and FLUX.1 dev, which draws: transformers on 2 x 2 latents.

Both predict the velocity of flow matching at shifted times (see `flow`), and take T5's tokens and CLIP's pooled text.
Kontext's source picture is more tokens, whose position has a first coordinate of 1. It was trained without a picture
too, so all of InstructPix2Pix's branches exist: "null" draws from nothing, "image" keeps the picture.

The dev models are distilled from guided predictions: they are told a guidance scale, and the prediction with text
already is a guided one. So the guidance scales that methods apply on top are 1 by default, and the scale that the model
is told is `prior.distilled_guidance`.

    prior:
      model: black-forest-labs/FLUX.1-Kontext-dev
      distilled_guidance: 2.5
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csd3d.priors.autoencoder import VaeCodec
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.families.stable_diffusion import EDIT_T_MAX
from csd3d.priors.flow import flow_input, flow_schedule
from csd3d.priors.opening import ModelFolder, check_width, load_parts, read_config
from csd3d.priors.prior import Defaults, Options, Prior
from csd3d.priors.schedules import load_flow_schedule
from csd3d.priors.text import TextEncoder, clip_tokens, pooled_text, tokenized
from csd3d.priors.tokens import PATCH, SourceTokens, check_options, check_packed_channels, pack, unpack
from csd3d.registry import register

T5_TOKENS = 512
WORKING_SIZE = 1024  # pixels; Kontext was trained on pictures of about 1024² at any ratio
PARTS = {
    "vae": "diffusers.AutoencoderKL",
    "transformer": "diffusers.FluxTransformer2DModel",
    "text_encoder": "transformers.CLIPTextModel",
    "tokenizer": "transformers.CLIPTokenizer",
    "text_encoder_2": "transformers.T5EncoderModel",
    "tokenizer_2": "transformers.T5TokenizerFast",
}


def check(folder: ModelFolder) -> None:
    """Raise InputError where the configs show inputs that neither family has."""
    check_packed_channels(folder, read_config(folder, "vae").get("latent_channels", 4))
    load_flow_schedule(folder)


@register("family", "flux_kontext", title="FLUX.1 Kontext")
class FluxKontext:
    """FLUX.1 Kontext, an editing model (arXiv 2506.15742)."""

    parts = PARTS
    check = staticmethod(check)
    check_options = staticmethod(check_options)

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        return _is_flux(folder, "FluxKontextPipeline", "FluxKontextInpaintPipeline")

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return True

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        return open_flux(folder, options, 2.5, SourceTokens())


@register("family", "flux", title="FLUX.1 dev")
class Flux:
    """FLUX.1 dev, a model of texts: the same transformer as Kontext's, without a source picture."""

    parts = PARTS
    check = staticmethod(check)
    check_options = staticmethod(check_options)

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        return _is_flux(folder, "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return False

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        return open_flux(folder, options, 3.5, None)


def _is_flux(folder: ModelFolder, *pipelines: str) -> bool:
    # the transformers' configs do not differ, only the pipelines
    kind = folder.config("transformer").get("_class_name")
    return kind == "FluxTransformer2DModel" and folder.index().get("_class_name") in pipelines


def open_flux(folder: ModelFolder, options: Options, guidance: float, source: SourceTokens | None) -> Prior:
    """A prior of FLUX.1; `guidance`: the scale that a distilled model is told unless the options say another."""
    parts = load_parts(folder, PARTS, options)
    transformer, config = parts["transformer"], parts["transformer"].config
    codec = VaeCodec(parts["vae"], PATCH, slicing=options.vae_slicing)
    check_width(folder, "transformer", config.joint_attention_dim, parts["text_encoder_2"].config.d_model)
    pooled = parts["text_encoder"].config.hidden_size
    check_width(folder, "transformer", config.pooled_projection_dim, pooled, "pooled text")
    told = None
    if config.guidance_embeds:
        told = guidance if options.distilled_guidance is None else options.distilled_guidance
    scale, edits = guidance if told is None else 1.0, source is not None
    return Prior(
        codec,
        transformer,
        TextEncoder(folder, parts, embed, "flux", options.device, options.embedding_cache),
        flow_schedule(load_flow_schedule(folder), (WORKING_SIZE // codec.multiple) ** 2),
        partial(forward, guidance=told),
        "flow",
        Defaults(
            text_scale=scale,
            image_scale=1.0,
            sampling_text_scale=scale,
            sampling_image_scale=1.0,
            guidance_scale=scale,
            t_max=EDIT_T_MAX if edits else Defaults.t_max,
            working_size=WORKING_SIZE,
        ),
        options,
        source,
        distilled_guidance=told,
    )


def embed(parts: Mapping[str, Any], prompt: str) -> Embedding:
    """T5's tokens, padding unmasked, and CLIP's pooled text."""
    clip, t5 = parts["text_encoder"], parts["text_encoder_2"]
    pooled = clip(clip_tokens(clip, parts["tokenizer"], prompt, warn=False).input_ids).pooler_output
    tokens = tokenized(t5, parts["tokenizer_2"], prompt, T5_TOKENS)
    return {"text": t5(tokens.input_ids)[0][0].float(), "pooled": pooled[0].float()}


def places(z: Tensor, kind: int) -> Tensor:
    """The positions [h/2 · w/2, 3] of the tokens of z [B, C, h, w]: (kind, row, column)."""
    rows, columns = (torch.arange(side // PATCH, device=z.device) for side in z.shape[2:])
    return torch.cartesian_prod(torch.tensor([kind], device=z.device), rows, columns).float()


def forward(
    network: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    condition: Condition,
    guidance: float | None,
) -> Tensor:
    """The velocity v [B, C, h, w] at x_s; the network's time is s. Raises ValueError without pooled text."""
    x_s, s = flow_input(z_t, alpha_bar)
    tokens, ids = pack(x_s), places(x_s, 0)
    if condition.image is not None:
        tokens = torch.cat([tokens, pack(condition.image)], 1)
        ids = torch.cat([ids, places(condition.image, 1)])
    velocity = network(
        hidden_states=tokens,
        timestep=s,
        guidance=None if guidance is None else torch.full_like(s, guidance),
        pooled_projections=pooled_text(condition),
        encoder_hidden_states=condition.text,
        txt_ids=ids.new_zeros(condition.text.shape[1], 3),
        img_ids=ids,
    )
    return unpack(velocity, tuple(z_t.shape[2:]))
