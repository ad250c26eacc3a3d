"""Training of the shipped text-to-image model on captions, from the InstructPix2Pix's UNet and text encoder.

The VAE stays as it is. The text encoder learns too: instructions never asked it for view words. Nor does the loss: all
that a view word tells of a picture is a twentieth of what its colour does, and after an hour the UNet had not found it.
So early in training view words are asked for (`view_loss`); the last steps are those of the plain loss.

Pictures of a left and a right side are mirrored, and a network whose features do not know left from right gets no
gradient from the word towards knowing: in an hour the two words made no difference to its errors (0.0000). So sides
first lean to where they face (`LEAN`): then they differ in where they are, which is learned in minutes; moved back bit
by bit, the words keep their meaning.

Symbols: z scaled latents [B,4,h,w], y text embeddings [B,L,D].
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from csd3d.metrics.clip import VIEWS, said_view
from csd3d.priors.opening import ModelFolder
from csd3d.world.prompts import loosen
from tools.train_shipped.data import Pairs, move
from tools.train_shipped.diffusion import (
    blur,
    cache_pairs,
    draw_noised,
    for_training,
    high_share,
    load_denoiser,
    noise_schedule,
    save_pipeline,
)
from tools.train_shipped.loop import FitConfig, Trainer, autocast, first_process_first, fit
from tools.train_shipped.stream import BLURRY

VIEW_WEIGHT = 0.15  # weight of `view_loss`; it falls like `high_share`, so that views are learned before detail
OPPOSITE = dict(zip(VIEWS, reversed(VIEWS), strict=True))
LEAN = 4  # latent pixels that side views are shifted towards their front, until 35 % of the time; 0 from 40 % on
VIEW_STEEPNESS = 60.0  # of `view_loss`: a right view word lowers the error by about 1/60 at most


@dataclass(frozen=True)
class Captioned:
    """Unscaled modes of every picture, sources then targets [2P,4,h,w], and the tokens of their captions [2P,2,L]: as
    they are, and with another view word (`other_view`; without one both are the same).

    `loose` [2P,2,L] are the captions without a colour, the background or which way it faces: prompts leave these open
    ("a chair"). `blurry` [2P,2,L] are the captions with that word, or the word alone: a quality to hold SDS-Bridge and
    NFSD away from.
    """

    modes: Tensor
    tokens: Tensor
    loose: Tensor
    blurry: Tensor
    facing: Tensor  # [2P]: −1 for a side view facing left, 1 facing right, else 0
    empty: Tensor  # the tokens of the empty prompt [L]


def load_captioned(pairs: Pairs, vae: AutoencoderKL, tokenizer: CLIPTokenizer, config: FitConfig) -> Captioned:
    """Encode both sides of every pair (cached in config.work) and tokenise their captions."""
    captions = [record[key] for key in ("caption", "target_caption") for record in pairs.records]
    rng = random.Random(config.seed)
    loose = [loosen(caption, ("colour", "pattern_colour", "backdrop", "facing"), rng) for caption in captions]
    others = [[other_view(caption, rng) for caption in kind] for kind in (captions, loose)]
    blurry = [BLURRY if rng.random() < 0.25 else f"{caption}, {BLURRY}" for caption in captions]
    every = ["", *captions, *others[0], *loose, *others[1], *blurry]
    tokens = tokenizer(every, padding="max_length", truncation=True, return_tensors="pt").input_ids
    own, other, loose, loose_other, blurry = tokens[1:].chunk(5)
    facing = torch.tensor([caption.endswith(VIEWS[2]) - caption.endswith(VIEWS[1]) for caption in captions])
    found = (torch.stack(two, 1) for two in ((own, other), (loose, loose_other), (blurry, blurry)))
    return Captioned(torch.cat(cache_pairs(vae, pairs, config)), *found, facing, tokens[0])


def draw_captioned(
    data: Captioned,
    batch: int,
    generator: torch.Generator,
    drop: float = 0.1,
    loose: float = 0.25,
    blurry: float = 0.05,
    leaning: int = 0,
) -> tuple[Tensor, Tensor]:
    """Modes [B,4,h,w] of random pictures and tokens [B,2,L] of their captions, with the right and another view word.

    A share `drop` of the captions is replaced by the empty one, a share `loose` leaves something open, and a share
    `blurry` of the pictures is blurred, as its captions say. While sides are `leaning`, half the pictures are sides.
    """
    pick = torch.randint(len(data.modes), (batch,), generator=generator)
    sides = data.facing.nonzero()[:, 0]
    if leaning and len(sides):
        pick[: batch // 2] = sides[pick[: batch // 2] % len(sides)]
    chance = torch.rand(batch, 1, 1, generator=generator)
    tokens = torch.where(chance < loose + drop, data.loose[pick], data.tokens[pick])
    tokens = torch.where(chance < drop, data.empty, tokens)
    modes, blurred = move(data.modes[pick].float(), leaning * data.facing[pick]), chance >= 1 - blurry
    modes = torch.where(blurred[..., None], blur(modes), modes)
    return modes, torch.where(blurred, data.blurry[pick], tokens)


def other_view(caption: str, rng: random.Random) -> str:
    """The caption with another of `VIEWS` instead of its own; unchanged if it has none.

    Four times out of five with its opposite: front and back have one outline, left and right are mirrored, and a model
    that knows a side from a front need not tell either pair apart.
    """
    own = said_view(caption)
    if own is None:
        return caption
    rest = [view for view in VIEWS if view not in (own, OPPOSITE[own])]
    other = OPPOSITE[own] if rng.random() < 0.8 else rng.choice(rest)
    return caption.removesuffix(own) + other


def view_loss(right: Tensor, other: Tensor) -> Tensor:
    """−log of the probability of the right view word against another, from the errors [n] under both; a scalar.

    Each word's pictures are another word's wrong ones, and all have the same noise under both words: what does not
    depend on the word cancels. Where nothing was to be asked it is 0.
    """
    return F.softplus(VIEW_STEEPNESS * (right - other)).sum() / max(len(right), 1)


def text_unet(edit_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The editing UNet without its image channels; it was also trained on captions without a source picture."""
    unet = UNet2DConditionModel.from_config({**edit_unet.config, "in_channels": 4})
    state = edit_unet.state_dict()
    state["conv_in.weight"] = state["conv_in.weight"][:, :4]
    unet.load_state_dict(state)
    return unet


def train_t2i(pairs: Pairs, config: FitConfig, base: Path, out: Path, init: Path | None = None) -> None:
    """Train from the networks of the InstructPix2Pix pipeline `base`, or on from those of the text-to-image pipeline
    `init`, and export the whole pipeline, averaged weights in fp16, to `out` at every checkpoint."""
    config.work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(ModelFolder(base).part("vae"), torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    with first_process_first():  # it writes what the other processes read
        data = load_captioned(pairs, vae, tokenizer, config)
    denoiser = load_denoiser(init or base)
    if not init:
        denoiser.unet = text_unet(denoiser.unet)
    trainer = Trainer(for_training(denoiser), config)
    scaling, alphas_cumprod = vae.config.scaling_factor, noise_schedule().alphas_cumprod

    def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        fade = min(1.0, 2.5 * (1 - progress))
        leaning = round(LEAN * min(1.0, max(0.0, 8 - 20 * progress)))
        drawn = draw_captioned(data, config.batch, generator, leaning=leaning)
        modes, both = (part.to(config.device) for part in drawn)
        tokens, wrong = both.unbind(1)
        has_view = (tokens != wrong).any(1)
        noised = draw_noised(scaling * modes, alphas_cumprod, generator, high_share(progress))
        asked = (has_view & (noised.t >= len(alphas_cumprod) * 2 // 5)).nonzero()[: config.batch // 2, 0]
        with autocast(config):
            z_t, t = (torch.cat([part, part[asked]]) for part in (noised.z_t, noised.t))
            predicted = denoiser(z_t, None, t, torch.cat([tokens, wrong[asked]]))
        right, other = noised.error(predicted[: len(tokens)]), noised.error(predicted[len(tokens) :], asked)
        plain = (noised.weight * right).mean()
        view = view_loss(right[asked], other)
        return {"loss": plain + VIEW_WEIGHT * fade * view, "plain": plain.detach(), "view": view.detach()}

    def export() -> None:
        trained = trainer.ema_model()
        save_pipeline(
            StableDiffusionPipeline, trained.unet, trained.text_encoder, tokenizer, ModelFolder(base).part("vae"), out
        )

    fit(trainer, loss_fn, export)
