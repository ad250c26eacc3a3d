"""Training of the shipped InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): UNet and text encoder, from scratch.

Symbols: z scaled target latents [B,4,h,w], c the unscaled posterior mode of the source [B,4,h,w], t timesteps [B],
ᾱ alphas_cumprod [T], y text embeddings [B,L,D].
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.train_shipped.data import Pairs, texts
from tools.train_shipped.diffusion import (
    Denoiser,
    cache_pairs,
    for_training,
    load_denoiser,
    noise_schedule,
    save_pipeline,
    velocity_loss,
)
from tools.train_shipped.loop import FitConfig, Trainer, autocast, first_process_first, fit
from tools.train_shipped.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Examples:
    """Training data: unscaled modes of source and target [P,4,h,w], tokens [U,L], and their rows [P]."""

    source: Tensor
    target: Tensor
    tokens: Tensor
    instruction: Tensor
    caption: Tensor


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


def drop_masks(count: int, generator: torch.Generator, rate: float = 0.05) -> tuple[Tensor, Tensor]:
    """Which text and which image conditions to drop, bool [B] each: rate text only, rate image only, rate both."""
    u = torch.rand(count, generator=generator)
    both = (u >= 2 * rate) & (u < 3 * rate)
    return (u < rate) | both, ((u >= rate) & (u < 2 * rate)) | both


def draw_batch(examples: Examples, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Target and source modes [B,4,h,w] and tokens [B,L], drops applied; one text in ten is a target caption."""
    pick = torch.randint(len(examples.source), (batch,), generator=generator)
    captioned = torch.rand(batch, generator=generator) < 0.1
    rows = torch.where(captioned, examples.caption[pick], examples.instruction[pick])
    no_text, no_image = drop_masks(batch, generator)
    rows = rows.masked_fill(no_text, 0)  # row 0 is the empty prompt
    source = examples.source[pick].float().masked_fill(no_image[:, None, None, None], 0)
    return examples.target[pick].float(), source, examples.tokens[rows]


def ip2p_loss(
    denoiser: Denoiser, batch: tuple[Tensor, ...], alphas_cumprod: Tensor, generator: torch.Generator
) -> Tensor:
    """`velocity_loss` of a batch of (z scaled, c unscaled, tokens)."""
    z, condition, tokens = batch
    return velocity_loss(lambda noisy, t: denoiser(noisy, condition, t, tokens), z, alphas_cumprod, generator)


def load_examples(pairs: Pairs, vae: AutoencoderKL, tokenizer: CLIPTokenizer, config: FitConfig) -> Examples:
    """Encode both sides of every pair (cached in config.work) and tokenise every text."""
    sentences = texts(pairs)
    rows = {sentence: i for i, sentence in enumerate(sentences)}
    tokens = tokenizer(sentences, padding="max_length", truncation=True, return_tensors="pt").input_ids
    columns = [torch.tensor([rows[r[key]] for r in pairs.records]) for key in ("instruction", "target_caption")]
    return Examples(*cache_pairs(vae, pairs, config), tokens, *columns)


def work_tokenizer(pairs: Pairs, work: Path, init: Path | None = None) -> CLIPTokenizer:
    """The work folder's tokenizer: `init`'s, or built from the pairs' texts the first time; a resumed run must not
    build another."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        found = CLIPTokenizer.from_pretrained(init / "tokenizer") if init else build_tokenizer(texts(pairs))
        save_tokenizer(found, folder)
    return CLIPTokenizer.from_pretrained(folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the new layout (tokenizer.json) and the classic one (vocab.json, merges.txt) for older loaders."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def train_ip2p(
    pairs: Pairs, config: FitConfig, vae_folder: Path, out: Path, channels: tuple[int, ...], init: Path | None = None
) -> None:
    """Train from scratch, or on from the networks of pipeline `init`, on cached latents; export the whole pipeline,
    averaged weights in fp16, to `out` at every checkpoint."""
    config.work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    with first_process_first():  # it writes what the other processes read
        tokenizer = work_tokenizer(pairs, config.work, init)
        examples = load_examples(pairs, vae, tokenizer, config)
    scaling, alphas_cumprod = vae.config.scaling_factor, noise_schedule().alphas_cumprod
    denoiser = load_denoiser(init) if init else build_denoiser(tokenizer, channels, pairs.size // 8, scaling)
    trainer = Trainer(for_training(denoiser), config)

    def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        z, c, tokens = (part.to(config.device) for part in draw_batch(examples, config.batch, generator))
        with autocast(config):
            return {"loss": ip2p_loss(denoiser, (scaling * z, c, tokens), alphas_cumprod, generator)}

    def export() -> None:
        trained, kind = trainer.ema_model(), StableDiffusionInstructPix2PixPipeline
        save_pipeline(kind, trained.unet, trained.text_encoder, tokenizer, vae_folder, out)

    fit(trainer, loss_fn, export)
