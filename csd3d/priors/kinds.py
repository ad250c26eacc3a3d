"""The kinds of model that a diffusers folder can hold: what each is made of, and how its parts must fit together.

sd    Stable Diffusion 1.x/2.x, InstructPix2Pix      UNet, VAE, CLIP
sdxl  Stable Diffusion XL, and editing models of it  UNet told sizes and pooled text, VAE, two CLIPs
if    DeepFloyd IF, stage I                          UNet on small pictures, T5
sd3   Stable Diffusion 3 and 3.5                     flow-matching transformer, VAE, two CLIPs, T5 if it is there
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from csd3d.errors import InputError
from csd3d.priors.codecs import PixelCodec, VaeCodec
from csd3d.priors.components import (
    load_flow_schedule,
    load_network,
    load_noise_schedule,
    load_tokenizer,
    read_config,
    read_json,
)
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.flow import flow_schedule
from csd3d.priors.text import embed_if, embed_sd, embed_sd3, embed_sdxl

logger = logging.getLogger("csd3d")
Parts = dict[str, Any]

_LATENT_UNET = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
_CLIP = {"text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
_CLIP_2 = {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
_T5_3 = {"text_encoder_3": T5EncoderModel, "tokenizer_3": T5TokenizerFast}
CLASSES = {
    "sd": _LATENT_UNET | _CLIP,
    "sdxl": _LATENT_UNET | _CLIP | _CLIP_2,
    "if": {"unet": UNet2DConditionModel, "text_encoder": T5EncoderModel, "tokenizer": T5TokenizerFast},
    "sd3": {"vae": AutoencoderKL, "transformer": SD3Transformer2DModel}
    | {"text_encoder": CLIPTextModelWithProjection, "tokenizer": CLIPTokenizer}
    | _CLIP_2
    | _T5_3,
}
NETWORKS = sorted({part for classes in CLASSES.values() for part in classes if not part.startswith("tokenizer")})


def find_kind(folder: Path) -> str:
    """Which kind of model a folder holds, by the config of its noise predictor; InputError for a kind unknown here."""
    if (folder / "transformer").is_dir():
        return "sd3"
    unet = read_config(folder, "unet")
    kinds = {None: "sd", "text_time": "sdxl", "text": "if"}
    found = {key: unet.get(key) for key in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim")}
    kind = kinds.get(found.pop("addition_embed_type"))
    for key in ([] if kind else ["addition_embed_type"]) + [key for key, value in found.items() if value is not None]:
        raise InputError(f"{folder}/unet/config.json: {key} = {unet[key]!r} is not supported")
    return kind


def load_parts(folder: Path, kind: str, device: torch.device) -> Parts:
    """The networks of a model, in float32 on `device`, and its tokenizers; a missing T5 of SD3 is left out."""
    classes = CLASSES[kind]
    if kind == "sd3" and not (folder / "text_encoder_3").is_dir():
        logger.warning("%s has no text_encoder_3: its two CLIPs alone read the prompts", folder)
        classes = {part: wanted for part, wanted in classes.items() if part not in _T5_3}
    parts: Parts = {}
    for part, wanted in classes.items():
        if part.startswith("tokenizer"):
            parts[part] = load_tokenizer(folder, part, wanted)
        else:
            parts[part] = load_network(folder, part, wanted).to(device, torch.float32)
    return parts


def make_codec(kind: str, parts: Parts) -> VaeCodec | PixelCodec:
    """What turns images into what the model denoises, and back."""
    if kind == "if":
        unet = parts["unet"].config
        return PixelCodec(unet.sample_size, 2 ** (len(unet.block_out_channels) - 1))
    return VaeCodec(parts["vae"], parts["transformer"].config.patch_size if kind == "sd3" else 1)


def make_recipe(kind: str, folder: Path, parts: Parts) -> tuple[str, Callable[[Parts, str], Embedding]]:
    """How a model's prompts are embedded, and a name for it that no other way shares."""
    if kind == "sdxl":
        zero_null = _zeros_for_empty_prompt(folder)
        return f"sdxl, zero_null={zero_null}", partial(embed_sdxl, zero_null=zero_null)
    if kind == "sd3":
        width = parts["transformer"].config.joint_attention_dim
        return f"sd3, width={width}, t5={'text_encoder_3' in parts}", partial(embed_sd3, width=width)
    return kind, {"sd": embed_sd, "if": embed_if}[kind]


def make_schedule(kind: str, folder: Path, parts: Parts) -> tuple[Tensor, str]:
    """ᾱ_t [T] and what the model predicts: epsilon | v_prediction | sample | flow."""
    if kind == "sd3":
        config = parts["transformer"].config
        return flow_schedule(load_flow_schedule(folder), (config.sample_size // config.patch_size) ** 2), "flow"
    schedule = load_noise_schedule(folder)
    return schedule.alphas_cumprod, schedule.config.prediction_type


def check_fit(folder: Path, kind: str, parts: Parts, require: str | None) -> None:
    """Raises InputError where the parts do not belong together, or the model is not of the kind that is needed."""
    predictor = "transformer" if kind == "sd3" else "unet"
    config = parts[predictor].config
    if kind == "if":
        _check_pixel_channels(folder, config)
        latent = config.in_channels
    else:
        latent = parts["vae"].config.latent_channels
        _check_latent_channels(folder, predictor, config, latent, editing=kind != "sd3")
    if require not in (None, "edit" if config.in_channels == 2 * latent else "text"):
        needed = {"edit": "an InstructPix2Pix model (8 channels)", "text": "a text-to-image model (4 channels)"}[
            require
        ]
        raise InputError(
            f"prior.model: the {'UNet' if predictor == 'unet' else predictor} of {folder} takes {config.in_channels} "
            f"channels; this job needs {needed}"
        )
    _check_text(folder, kind, parts, predictor)


def _check_latent_channels(folder: Path, predictor: str, config: Any, latent: int, editing: bool) -> None:
    if config.in_channels not in (latent, 2 * latent if editing else latent) or config.out_channels != latent:
        also = f" or {2 * latent} (editing)" if editing else ""
        raise InputError(
            f"{folder}/{predictor}: {config.in_channels} channels in and {config.out_channels} out do not suit a VAE "
            f"of {latent}: {latent} (text to image){also} in and {latent} out would"
        )


def _check_pixel_channels(folder: Path, config: Any) -> None:
    if config.in_channels != 3 or config.out_channels not in (3, 6) or not isinstance(config.sample_size, int):
        raise InputError(
            f"{folder}/unet/config.json: {config.in_channels} channels in, {config.out_channels} out and sample_size "
            f"{config.sample_size!r} are not those of DeepFloyd IF's first stage (3, 6 or 3, a whole number)"
        )


def _check_text(folder: Path, kind: str, parts: Parts, predictor: str) -> None:
    """Text and pooled widths that the predictor takes against those that the encoders give; vocabularies."""
    config = parts[predictor].config
    clips = [parts[part].config for part in ("text_encoder", "text_encoder_2") if part in parts]
    if kind == "sd3":
        takes = config.joint_attention_dim
        if "text_encoder_3" in parts:
            _check_widths(folder, predictor, takes, parts["text_encoder_3"].config.d_model, "text")
        _check_widths(folder, predictor, takes, max(takes, sum(clip.hidden_size for clip in clips)), "text")
        pooled = sum(clip.projection_dim for clip in clips)
        _check_widths(folder, predictor, config.pooled_projection_dim, pooled, "pooled text")
    elif kind == "if":
        width = config.encoder_hid_dim or config.cross_attention_dim
        _check_widths(folder, predictor, width, clips[0].d_model, "text")
    else:
        _check_widths(folder, predictor, config.cross_attention_dim, sum(c.hidden_size for c in clips), "text")
    if kind == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        _check_widths(folder, predictor, pooled, clips[1].projection_dim, "pooled text")
    for part in (part for part in parts if part.startswith("tokenizer")):
        encoder = part.replace("tokenizer", "text_encoder")
        if len(parts[part]) > parts[encoder].config.vocab_size:
            raise InputError(
                f"{folder}: {encoder} ({parts[encoder].config.vocab_size} tokens) does not suit {part} "
                f"({len(parts[part])} tokens)"
            )


def _check_widths(folder: Path, predictor: str, takes: int, given: int, what: str) -> None:
    if takes != given:
        raise InputError(f"{folder}/{predictor}: is for {what} of width {takes}, the text encoders give {given}")


def _zeros_for_empty_prompt(folder: Path) -> bool:
    """SDXL's `force_zeros_for_empty_prompt`, all that is ever read of model_index.json; true where it does not say."""
    path = folder / "model_index.json"
    value = read_json(path).get("force_zeros_for_empty_prompt", True) if path.is_file() else True
    if not isinstance(value, bool):
        raise InputError(f"{path}: force_zeros_for_empty_prompt must be true or false, is {value!r}")
    return value
