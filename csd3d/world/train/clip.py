"""Training of the small CLIP (Radford et al. 2021, arXiv 2103.00020) by which the world's pictures are judged.

Symbols: n images of a batch, I and T their unit embeddings and those of their captions [n,D], s the learnt scale.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from csd3d.metrics.clip import MEAN, STD, VIEWS, embed_images, embed_tokens
from csd3d.world.train.data import Pairs, gather
from csd3d.world.train.loop import FitConfig, Trainer, autocast, fit
from csd3d.world.train.vae import save_whole

MAX_SCALE = 100.0


@dataclass(frozen=True)
class Sentences:
    """Tokens [U,L] of all captions and of their view variants; rows of them by pair.

    `caption` [2,P] of the sources and of the targets; `variants` [U,3] the same caption with the other view words, or
    −1 where it has none.
    """

    tokens: Tensor
    caption: Tensor
    variants: Tensor

    def embed(self, model: CLIPModel) -> Tensor:
        """T [U,D] of them all."""
        return torch.cat([embed_tokens(model, tokens) for tokens in self.tokens.split(256)])


def build_clip(tokenizer: CLIPTokenizer, image_size: int = 128, patch: int = 16, width: int = 192) -> CLIPModel:
    """Both towers, small: patches of `patch`² of a picture of `image_size`², text of width 128."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "image_size": image_size,
        "patch_size": patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def view_variants(caption: str) -> list[str]:
    """The caption with each of the other view words in place of its own; empty where it has none."""
    for view in VIEWS:
        if caption.endswith(view):
            return [caption.removesuffix(view) + other for other in VIEWS if other != view]
    return []


def load_sentences(pairs: Pairs, tokenizer: CLIPTokenizer) -> Sentences:
    """Tokenise every caption of both sides, and its view variants."""
    captions = [[record[key] for record in pairs.records] for key in ("caption", "target_caption")]
    texts = dict.fromkeys(caption for side in captions for caption in side)
    texts |= dict.fromkeys(variant for caption in list(texts) for variant in view_variants(caption))
    row = {text: i for i, text in enumerate(texts)}
    variants = [[row[v] for v in view_variants(text) if v in row] for text in texts]
    none = [-1] * (len(VIEWS) - 1)
    return Sentences(
        tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids,
        torch.tensor([[row[caption] for caption in side] for side in captions]),
        torch.tensor([found if len(found) == len(none) else none for found in variants]),
    )


def clip_loss(image: Tensor, text: Tensor, variants: Tensor, row: Tensor, has_view: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of s I Tᵀ; captions that are equal (`row` [n]) share the target. Plus that of the views.

    `variants` [n,3,D] embed each caption with wrong view words, against which its own image (where `has_view` [n]) must
    choose the right one. Without this nothing asks for the view, since any two captions of a batch differ in much else.
    """
    logits = scale * image @ text.T
    target = (row[:, None] == row[None]).float()
    target = target / target.sum(1, keepdim=True)
    choice = scale * torch.einsum("nd,nvd->nv", image, torch.cat([text[:, None], variants], 1))
    view = F.cross_entropy(choice, torch.zeros_like(row), reduction="none")
    view = (view * has_view).sum() / has_view.sum().clamp_min(1)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) + view


def train_clip(pairs: Pairs, config: FitConfig, tokenizer_folder: Path, out: Path, noise: float = 0.02) -> None:
    """Train on both sides of random pairs, which differ in little, and export the average to `out`, fp16.

    `noise`: standard deviation added to the pixels, since renders of radiance fields are never as clean.
    """
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    model, sentences = build_clip(tokenizer).eval(), load_sentences(pairs, tokenizer)
    model.set_attn_implementation("eager")
    trainer = Trainer(model, config)

    def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        pick = torch.randint(len(pairs), (config.batch // 2,), generator=generator)
        images = torch.cat([gather(side, pick, config.device) for side in (pairs.source, pairs.target)])
        images = images + noise * torch.randn(images.shape, generator=generator).to(images)
        row = sentences.caption[:, pick].flatten()
        variants = sentences.variants[row]
        rows = torch.cat([row, variants.clamp(min=0).flatten()])
        with autocast(config):
            image = embed_images(model, images)
            text = embed_tokens(model, sentences.tokens[rows].to(config.device))
        own, wrong = text[: len(row)], text[len(row) :].unflatten(0, variants.shape)
        scale = model.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = clip_loss(image, own, wrong, row.to(image.device), (variants[:, 0] >= 0).to(image.device), scale)
        return {"loss": loss, "scale": scale.detach()}

    fit(trainer, loss_fn, lambda: export_clip(trainer.ema_model(), tokenizer, out))


def export_clip(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a folder that CLIPModel and CLIPProcessor load, fp16 safetensors, replacing it whole."""
    side = model.config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixels = {"resample": PILImageResampling.BILINEAR, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    save_whole(out, model.half(), tokenizer, CLIPImageProcessor(**size, **pixels))
