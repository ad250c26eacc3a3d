"""A tiny Stable Diffusion in one file, under the names of the original code, as model-sharing sites have them."""

import re
from pathlib import Path

from safetensors.torch import save_file

from csd3d.priors.prior import Prior

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
VAE |= {"to_out.0": "proj_out", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block": "mid"}
VAE |= {"down_blocks": "down", "up_blocks": "up", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}


def unet_name(name: str, layers: int) -> str:
    """The original name of a UNet's tensor."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    middle = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    down = re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", name)
    up = re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", name)
    if middle:
        kind, number, rest = middle.groups()
        stem = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
    else:
        block, kind, number, rest = (down or up).groups()
        at = (layers + 1) * int(block) + int(number)
        if down:
            stem = f"input_blocks.{at + 1}.{int(kind == 'attentions')}"
            if kind == "downsamplers":
                return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.op.{rest.removeprefix('conv.')}"
        else:
            stem = f"output_blocks.{at}.{int(kind == 'attentions')}"
            if kind == "upsamplers":  # the tiny UNet's upsampler follows a block without attention
                return f"output_blocks.{(layers + 1) * int(block) + layers}.1.{rest}"
    if kind == "resnets":
        head, _, last = rest.rpartition(".")
        rest = f"{RESNET[head]}.{last}"
    return f"{stem}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """The original name of a VAE's tensor."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up_blocks.{blocks - 1 - int(found[1])}", name)
    for ours, theirs in VAE.items():
        name = name.replace(ours, theirs)
    return name.replace(".resnets.", ".block.")


def save_single_file(file: Path, prior: Prior) -> Path:
    """Saves a tiny Stable Diffusion as one file."""
    tensors = {}
    for name, tensor in prior.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, 1)}"] = tensor
    for name, tensor in prior.vae.state_dict().items():
        attention = "attentions" in name and tensor.ndim == 2  # products as 1x1 convolutions
        tensors[f"first_stage_model.{vae_name(name, 4)}"] = tensor[:, :, None, None] if attention else tensor
    for name, tensor in prior.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
