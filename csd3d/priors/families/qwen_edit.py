"""Qwen-Image-Edit (arXiv 2508.02324), also 2509 and 2511: a transformer on 2 x 2 latents that edits.

It predicts the velocity of flow matching (see `flow`). The source picture's tokens follow those of z_t. Its text
encoder, Qwen2.5-VL, sees the source picture too, so an embedding is of a prompt *and* a picture: the image condition
[B, C + 3 · 8², h, w] holds z and, 8 x 8 pixels in one, the picture itself. There is no prediction without a picture:
the branches are "image" and "full", so image_scale must stay 1.

diffusers' own pipeline also scales a guided velocity to the length of the one with text; methods here do not.

    prior:
      model: Qwen/Qwen-Image-Edit
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.errors import InputError
from csd3d.files import read_json
from csd3d.priors.autoencoder import VaeCodec
from csd3d.priors.condition import Condition
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.families.stable_diffusion import EDIT_T_MAX
from csd3d.priors.flow import flow_input, flow_schedule
from csd3d.priors.opening import CONFIG, ModelFolder, check_width, load_parts, read_config
from csd3d.priors.prior import Defaults, Options, Prior
from csd3d.priors.schedules import load_flow_schedule
from csd3d.priors.text import TextEncoder
from csd3d.priors.tokens import PATCH, check_options, check_packed_channels, pack, unpack
from csd3d.registry import register

PIPELINES = ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline")
PLUS = "QwenImageEditPlusPipeline"  # 2509 and 2511, which take several pictures; we give them one
WORKING_SIZE = 1024  # pixels
UNIT = 32  # diffusers' pipeline works at multiples of this many pixels
SHOWN_AREA = 384 * 384  # pixels of the picture that the text encoder sees, of "plus" models
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as Qwen2-VL's
LEAST, MOST = 56 * 56, 28 * 28 * 16384  # pixels of a picture that the text encoder sees, where its config says nothing
SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
SYSTEM_TOKENS = 64  # of the prompt's beginning, which the transformer does not get
PAD = "<|image_pad|>"


@register("family", "qwen_edit", title="Qwen-Image-Edit")
class QwenImageEdit:
    """Qwen-Image-Edit, an editing model whose text encoder sees the source picture (arXiv 2508.02324)."""

    parts = {  # noqa: RUF012 (never changed)
        "vae": "diffusers.AutoencoderKLQwenImage",
        "transformer": "diffusers.QwenImageTransformer2DModel",
        "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "transformers.Qwen2Tokenizer",
    }

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        kind = folder.config("transformer").get("_class_name")
        return kind == "QwenImageTransformer2DModel" and folder.index().get("_class_name") in (*PIPELINES, PLUS)

    @staticmethod
    def check(folder: ModelFolder) -> None:
        check_packed_channels(folder, read_config(folder, "vae").get("z_dim", 16))
        config = folder.config("transformer")
        for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise InputError(f"{folder}/transformer/config.json: {key} = {config[key]!r} is not supported")
        seen_limits(folder)
        load_flow_schedule(folder)

    @staticmethod
    def check_options(folder: ModelFolder, options: Options) -> None:
        check_options(folder, options)
        if options.drop_text_encoder:
            raise InputError("prior.drop_text_encoder: Qwen-Image-Edit's text encoder sees the pictures; set it false")

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return True

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        parts = load_parts(folder, QwenImageEdit.parts, options)
        transformer, encoder = parts["transformer"], parts["text_encoder"].config.get_text_config()
        check_width(folder, "transformer", transformer.config.joint_attention_dim, encoder.hidden_size)
        codec = FrameCodec(parts["vae"], options.vae_slicing)
        plus, limits = folder.index().get("_class_name") == PLUS, seen_limits(folder)
        text = TextEncoder(
            folder,
            parts,
            partial(embed, plus=plus, limits=limits),
            f"qwen_edit, plus={plus}, limits={limits}",
            options.device,
            options.embedding_cache,
            partial(seen_picture, codec=codec),
        )
        return Prior(
            codec,
            transformer,
            text,
            flow_schedule(load_flow_schedule(folder), (WORKING_SIZE // (codec.downscale * PATCH)) ** 2),
            forward,
            "flow",
            Defaults(
                text_scale=4.0,
                image_scale=1.0,
                sampling_text_scale=4.0,
                sampling_image_scale=1.0,
                guidance_scale=4.0,
                t_max=EDIT_T_MAX,
                working_size=WORKING_SIZE,
            ),
            options,
            SeenSource(),
        )


# ------------------------------------------------------------------------------------------------------------ pictures


class FrameCodec(VaeCodec):
    """Latents of Qwen's VAE of videos, one frame each: z = (E(x) − mean) / std, per channel."""

    def __init__(self, vae: Any, slicing: bool = False):
        # VaeCodec's own reads the config of another class, and sets a memory format that videos do not have
        if slicing:
            vae.enable_slicing()
        self.vae = vae.eval().requires_grad_(False)
        config, device = vae.config, next(vae.parameters()).device
        self.channels, self.downscale = config.z_dim, 2 ** len(config.temperal_downsample)
        self.multiple = math.lcm(UNIT, self.downscale * PATCH)
        self.shift = torch.tensor(config.latents_mean, device=device).view(-1, 1, 1)
        self.scale = 1 / torch.tensor(config.latents_std, device=device).view(-1, 1, 1)

    @property
    def width(self) -> int:
        return self.vae.config.base_dim

    def _decoded(self, z: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0],)

    def _parameters(self, x: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(x[:, :, None]).latent_dist.parameters[:, :, 0],)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(maps[:, :, 0] for maps in super()._maps(x[:, :, None]))


class SeenSource:
    """The source picture as z and, `downscale` x `downscale` pixels in one, as itself, for the text encoder."""

    branches = ("image", "full")

    def encode(self, codec: VaeCodec, x: Tensor, micro_batch: int) -> Tensor:
        x = codec.pad(x)
        return torch.cat([codec.encode(x, None, micro_batch), F.pixel_unshuffle(x, codec.downscale)], 1)

    @torch.no_grad()
    def from_latent(self, codec: VaeCodec, z: Tensor) -> Tensor:
        return torch.cat([z, F.pixel_unshuffle(codec.decode(z, None, 1), codec.downscale)], 1)

    def null(self, z_t: Tensor) -> Tensor:
        raise InputError("Qwen-Image-Edit has no prediction without a source picture: image_scale must be 1")


def seen_picture(image: Tensor, codec: VaeCodec) -> Tensor:
    """The picture [3, H, W], uint8, of one row of the image condition."""
    x = F.pixel_shuffle(image[codec.channels :], codec.downscale)
    return ((x / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


# ---------------------------------------------------------------------------------------------------------------- text


def seen_limits(folder: ModelFolder) -> tuple[int, int]:
    """The least and most pixels of a picture for the text encoder, by the processor's config."""
    path = folder.path / "processor" / "preprocessor_config.json"
    config = read_json(path, CONFIG) if path.is_file() else {}
    sides = config["size"] if isinstance(config.get("size"), dict) else {}
    least = config.get("min_pixels") or sides.get("shortest_edge") or LEAST
    most = config.get("max_pixels") or sides.get("longest_edge") or MOST
    if not all(isinstance(value, int) for value in (least, most)) or not 0 < least <= most <= 2**28:
        raise InputError(f"{path}: {least!r} and {most!r} are not the least and the most pixels of a picture")
    return least, most


def embed(parts: Mapping[str, Any], prompt: str, picture: Tensor, plus: bool, limits: tuple[int, int]) -> Embedding:
    """The last hidden states of Qwen2.5-VL for the picture (uint8 [3, H, W]) and then the prompt.

    Positions are those of rows and columns in the picture. diffusers loses them with transformers 5 (its issue 14194),
    whose models ask for `mm_token_type_ids`.
    """
    encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    device, vision = next(encoder.parameters()).device, encoder.config.vision_config
    if plus:
        picture = resized(picture, *(round(side / UNIT) * UNIT for side in same_ratio(picture, SHOWN_AREA)))
    merge = vision.spatial_merge_size
    picture = resized(picture, *seen_size(picture, vision.patch_size * merge, *limits))
    pixels, grid = patches(picture.to(device), vision)
    shown = "Picture 1: " * plus + f"<|vision_start|>{PAD * (math.prod(grid) // merge**2)}<|vision_end|>"
    text = f"{SYSTEM}{shown}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text, return_tensors="pt").to(device)
    takes = inspect.signature(encoder.forward).parameters
    more = {"mm_token_type_ids": (tokens.input_ids == encoder.config.image_token_id).int(), "logits_to_keep": 1}
    output = encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        pixel_values=pixels,
        image_grid_thw=torch.tensor([grid], device=device),
        output_hidden_states=True,
        **{name: value for name, value in more.items() if name in takes},
    )
    return {"text": output.hidden_states[-1][0, SYSTEM_TOKENS:].float()}


def same_ratio(picture: Tensor, area: int) -> tuple[float, float]:
    """(H, W) of `area` pixels with a picture's ratio."""
    scale = math.sqrt(area / (picture.shape[1] * picture.shape[2]))
    return picture.shape[1] * scale, picture.shape[2] * scale


def seen_size(picture: Tensor, unit: int, least: int, most: int) -> tuple[int, int]:
    """(H, W) at which Qwen2-VL sees a picture: multiples of `unit`, `least` to `most` pixels, nearly the same ratio."""
    height, width = (round(side / unit) * unit for side in picture.shape[1:])
    if height * width > most:
        height, width = (max(unit, math.floor(side / unit) * unit) for side in same_ratio(picture, most))
    elif height * width < least:
        height, width = (math.ceil(side / unit) * unit for side in same_ratio(picture, least))
    return height, width


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture [3, H, W], uint8, resized by antialiased bicubic interpolation, as PIL's."""
    if tuple(picture.shape[1:]) == (height, width):
        return picture
    scaled = F.interpolate(picture[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return scaled.round().clamp(0, 255).to(torch.uint8)


def patches(picture: Tensor, vision: Any) -> tuple[Tensor, tuple[int, int, int]]:
    """The patches [N, 3 · T · P²] of a still picture as Qwen2-VL takes them, and how many there are in time and space.

    T = temporal_patch_size equal frames, P = patch_size; the patches that are merged later follow one another.
    """
    side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    mean, std = (torch.tensor(values, device=picture.device).view(3, 1, 1) for values in (MEAN, STD))
    x = (picture / 255 - mean) / std
    rows, columns = x.shape[1] // side, x.shape[2] // side
    x = x.view(3, rows // merge, merge, side, columns // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    x = x.reshape(rows * columns, 3, 1, side * side).expand(-1, -1, frames, -1)
    return x.reshape(rows * columns, -1), (1, rows, columns)


# ---------------------------------------------------------------------------------------------------------- prediction


def forward(network: Callable[..., Tensor], z_t: Tensor, t: Tensor, alpha_bar: Tensor, condition: Condition) -> Tensor:
    """The velocity v [B, C, h, w] at x_s; the network's time is s. Raises ValueError without a source picture."""
    if condition.image is None:
        raise ValueError("this model always takes a source picture")
    x_s, s = flow_input(z_t, alpha_bar)
    grid = (1, z_t.shape[2] // PATCH, z_t.shape[3] // PATCH)
    velocity = network(
        hidden_states=torch.cat([pack(x_s), pack(condition.image[:, : z_t.shape[1]])], 1),
        timestep=s,
        encoder_hidden_states=condition.text,
        encoder_hidden_states_mask=condition.mask,
        img_shapes=[[grid, grid]] * len(z_t),
    )
    return unpack(velocity, tuple(z_t.shape[2:]))
