"""The networks of the shipped InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800), and its tokenizer's folder."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.train_shipped.data import Pairs, texts
from tools.train_shipped.diffusion import Denoiser
from tools.train_shipped.tokenizer import build_tokenizer


def build_unet(channels: tuple[int, ...], latent_size: int, text_width: int = 128) -> UNet2DConditionModel:
    """The 8-channel UNet: no attention at the top level, where the CPU is slow at it; heads of 32 below."""
    cross = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * cross,
        up_block_types=("CrossAttnUpBlock2D",) * cross + ("UpBlock2D",),
        cross_attention_dim=text_width,
        attention_head_dim=tuple(c // 32 for c in channels),  # diffusers means the number of heads
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 3) -> CLIPTextModel:
    """A small CLIP text transformer with heads of 32, for the tokenizer's vocabulary and length."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_denoiser(tokenizer: CLIPTokenizer, channels: tuple[int, ...], latent_size: int, scaling: float) -> Denoiser:
    """Both networks; the condition enters unscaled, so its input weights start at `scaling` times theirs."""
    unet = build_unet(channels, latent_size)
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] *= scaling
        unet.conv_out.weight.mul_(0.1)
    return Denoiser(unet, build_text_encoder(tokenizer))


def write_tokenizer(pairs: Pairs, work: Path) -> None:
    """Write `work/tokenizer`, built from the texts of the pairs, unless it is there: models learn its numbers."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        save_tokenizer(build_tokenizer(texts(pairs)), folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the new layout (tokenizer.json) and the classic one (vocab.json, merges.txt) for older loaders."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
