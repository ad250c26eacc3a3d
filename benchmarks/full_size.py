"""Models of Stable Diffusion 1.5's size with random weights, in the hub's layout, to measure speed and memory.

`write_model(folder, edits=True)` makes an InstructPix2Pix (859 M parameters in its UNet, fp16 files, about 2 GB).
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

SHIPPED = Path(__file__).resolve().parents[1] / "csd3d" / "assets" / "ip2p"
LENGTH = 77  # tokens of a prompt
WIDTHS, TEXT_WIDTH = (320, 640, 1280, 1280), 768


def write_model(folder: Path, edits: bool = True, device: str = "cpu", shrink: int = 1) -> int:
    """Write the model's parts into `folder`; return the number of parameters of its UNet.

    edits: whether the UNet takes a source image too (8 channels in); device: where the random weights are drawn;
    shrink: channels are divided by this (a power of 2, at most 8), for rehearsals.
    """
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae, text = _unet(8 if edits else 4, shrink), _vae(shrink), _text_encoder(shrink)
    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        network.half().save_pretrained(folder / part, safe_serialization=True)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    _copy_tokenizer(folder / "tokenizer")
    return sum(p.numel() for p in unet.parameters())


def _unet(channels: int, shrink: int) -> nn.Module:
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=channels,
        out_channels=4,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=[width // shrink for width in WIDTHS],
        norm_num_groups=32 // shrink,
        cross_attention_dim=TEXT_WIDTH // shrink,
        attention_head_dim=8,
    )


def _vae(shrink: int) -> nn.Module:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width // shrink for width in (128, 256, 512, 512)],
        norm_num_groups=32 // shrink,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def _text_encoder(shrink: int) -> nn.Module:
    # The shipped tokenizer replaces CLIP's, whose merges are not in the repository; speed does not depend on it.
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH // shrink,
            intermediate_size=4 * TEXT_WIDTH // shrink,
            projection_dim=TEXT_WIDTH // shrink,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=LENGTH,
        )
    )


def _copy_tokenizer(folder: Path) -> None:
    shutil.copytree(SHIPPED / "tokenizer", folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_length": LENGTH, "model_max_length": LENGTH}))
