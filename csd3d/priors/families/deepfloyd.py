"""DeepFloyd IF, first stage: a UNet on small pictures, with T5 as its text encoder and no VAE.

The variance that it also predicts is dropped. Pictures are resized to the model's own size and back.

    prior:
      model: DeepFloyd/IF-I-M-v1.0
"""

from collections.abc import Mapping
from typing import Any

from csd3d.errors import InputError
from csd3d.priors.autoencoder import PixelCodec
from csd3d.priors.embedding_cache import Embedding
from csd3d.priors.families.stable_diffusion import check_embeddings, forward
from csd3d.priors.memory import set_attention
from csd3d.priors.opening import ModelFolder, check_width, load_parts, read_config
from csd3d.priors.prior import Defaults, Options, Prior
from csd3d.priors.schedules import load_noise_schedule
from csd3d.priors.text import TextEncoder, tokenized
from csd3d.registry import register

TOKENS = 77  # T5 takes more, but the model was trained with this many


@register("family", "deepfloyd", title="DeepFloyd IF, stage I")
class DeepFloyd:
    parts = {  # noqa: RUF012 (never changed)
        "unet": "diffusers.UNet2DConditionModel",
        "text_encoder": "transformers.T5EncoderModel",
        "tokenizer": "transformers.T5TokenizerFast",
    }

    @staticmethod
    def matches(folder: ModelFolder) -> bool:
        unet = folder.config("unet")
        return unet.get("_class_name") == "UNet2DConditionModel" and unet.get("addition_embed_type") == "text"

    @staticmethod
    def check(folder: ModelFolder) -> None:
        check_embeddings(folder)  # refuses stages II and III, which take a noise level as a class
        _check_channels(folder)
        load_noise_schedule(folder)

    @staticmethod
    def edits(folder: ModelFolder) -> bool:
        return False

    @staticmethod
    def load(folder: ModelFolder, options: Options) -> Prior:
        parts = load_parts(folder, DeepFloyd.parts, options)
        schedule = load_noise_schedule(folder)
        unet, config = parts["unet"], parts["unet"].config
        width = config.encoder_hid_dim or config.cross_attention_dim
        check_width(folder, "unet", width, parts["text_encoder"].config.d_model)
        set_attention(unet, options.attention)
        return Prior(
            PixelCodec(config.sample_size, 2 ** (len(config.block_out_channels) - 1)),
            unet,
            TextEncoder(folder, parts, embed, "if", options.device, options.embedding_cache),
            schedule.alphas_cumprod,
            forward,
            schedule.config.prediction_type,
            # guidance as CSD (arXiv 2307.04787) gives for pixels, whose variance is a quarter of a latent's
            Defaults(guidance_scale=20.0, bandwidth=12.0, working_size=config.sample_size),
            options,
        )


def embed(parts: Mapping[str, Any], prompt: str) -> Embedding:
    """T5's last hidden state of the lower-cased prompt, with its padding masked."""
    tokens = tokenized(parts["text_encoder"], parts["tokenizer"], prompt.lower().strip(), TOKENS)
    return {"text": parts["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0][0].float()}


def _check_channels(folder: ModelFolder) -> None:
    config = read_config(folder, "unet")
    takes, gives, size = (config.get(key) for key in ("in_channels", "out_channels", "sample_size"))
    if takes != 3 or gives not in (3, 6) or type(size) is not int:
        raise InputError(
            f"{folder}/unet/config.json: {takes} channels in, {gives} out and sample_size {size!r} are not those of "
            "DeepFloyd IF's first stage (3, 6 or 3, a whole number)"
        )
