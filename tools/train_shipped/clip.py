"""Training of CLIP (world), a small CLIP (Radford et al. 2021, arXiv 2103.00020) that evaluates pictures of the world.

What a view word tells is the hard part (see `conv_clip`). So most pictures drawn have such a word; all are mirrored or
not, as their captions then say, and moved a little; and a linear layer, not exported, names kind and view from the
image tower's features, which asks them for it before two words' embeddings differ enough to.

Symbols: n images of a batch, I and T their unit embeddings and those of their captions [n,D], s the learnt scale.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.image_utils import PILImageResampling

from csd3d.metrics.clip import MEAN, STD, VIEWS, TwoTowers, embed_tokens, image_features, project_images, said_view
from csd3d.metrics.conv_clip import ConvTowerConfig
from csd3d.world.prompts import parse_prompt
from csd3d.world.shapes import KINDS
from tools.train_shipped.data import Pairs, gather, move
from tools.train_shipped.loop import FitConfig, Trainer, autocast, fit
from tools.train_shipped.vae import save_whole

MAX_SCALE = 100.0
JITTER = 8  # largest random shift of a picture in pixels
VIEWED = 0.75  # least share of drawn pairs whose captions have a view word


@dataclass(frozen=True)
class Sentences:
    """Tokens [U,L] of all captions and of their view variants; rows of them by pair.

    `caption` [2,P] of the sources and of the targets; `variants` [U,3] the same caption with the other view words, or
    −1 where it has none; `mirror` [U] what the mirrored picture shows; `label` [U] a `view_label`.
    """

    tokens: Tensor
    caption: Tensor
    variants: Tensor
    mirror: Tensor
    label: Tensor

    def embed(self, model: TwoTowers) -> Tensor:
        """T [U,D] of them all."""
        return torch.cat([embed_tokens(model, tokens) for tokens in self.tokens.split(256)])


def build_clip(tokenizer: CLIPTokenizer) -> VisionTextDualEncoderModel:
    """Build both small towers: a convolutional one for 128² pixels, and a CLIP text encoder of width 128."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ConvTowerConfig(), text, projection_dim=128)
    return VisionTextDualEncoderModel(config)


def view_variants(caption: str) -> list[str]:
    """The caption with each of the other view words instead of its own; empty if it has none."""
    own = said_view(caption)
    return [caption.removesuffix(own) + other for other in VIEWS if other != own] if own else []


def mirror_caption(caption: str) -> str:
    """The caption of the mirrored picture. Only the mug is not its own mirror image: its handle is at the left, so a
    mirrored front is a back."""
    one, other = (VIEWS[0], VIEWS[3]) if " mug" in caption else (VIEWS[1], VIEWS[2])
    own = said_view(caption)
    return caption.removesuffix(own) + {one: other, other: one}.get(own, own) if own else caption


def view_label(caption: str) -> int:
    """An index of the caption's kind and view, −1 without a view word."""
    view = said_view(caption)
    said = parse_prompt(caption) if view else None
    return len(VIEWS) * list(KINDS).index(said["kind"]) + VIEWS.index(view) if said else -1


def load_sentences(pairs: Pairs, tokenizer: CLIPTokenizer) -> Sentences:
    """Tokenise all captions of both sides, with their view variants and mirrored captions."""
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
        torch.tensor([row[mirror_caption(text)] for text in texts]),
        torch.tensor([view_label(text) for text in texts]),
    )


def draw(pairs: Pairs, sentences: Sentences, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw both sides of random pairs [B,3,S,S], randomly mirrored and shifted, and the rows of their captions [B]."""
    pick = torch.randint(len(pairs), (batch // 2,), generator=generator)
    viewed = (sentences.variants[sentences.caption[0], 0] >= 0).nonzero()[:, 0]
    if len(viewed):
        most = round(VIEWED * len(pick))
        pick[:most] = viewed[pick[:most] % len(viewed)]
    images = torch.cat([gather(side, pick) for side in (pairs.source, pairs.target)])
    row = sentences.caption[:, pick].flatten()
    mirrored = torch.rand(len(row), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    row = torch.where(mirrored, sentences.mirror[row], row)
    right, down = torch.randint(-JITTER, JITTER + 1, (2, len(row)), generator=generator)
    return move(images, right, down), row


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
    """Train on random pairs (`draw`) and export the average to `out`, fp16.

    `noise`: standard deviation added to the pixels, since renders of radiance fields are never as clean.
    """
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    model, sentences = build_clip(tokenizer).eval(), load_sentences(pairs, tokenizer)
    model.text_model.set_attn_implementation("eager")
    head = nn.Linear(model.config.vision_config.hidden_size, len(VIEWS) * len(KINDS))
    trainer = Trainer(nn.ModuleDict({"clip": model, "head": head}), config)

    def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        images, row = draw(pairs, sentences, config.batch, generator)
        images = images + noise * torch.randn(images.shape, generator=generator)
        variants = sentences.variants[row]
        rows = torch.cat([row, variants.clamp(min=0).flatten()])
        with autocast(config):
            seen = image_features(model, images.to(config.device))
            image = project_images(model, seen)
            text = embed_tokens(model, sentences.tokens[rows].to(config.device))
            named = head(seen).float()
        own, wrong = text[: len(row)], text[len(row) :].unflatten(0, variants.shape)
        scale = model.logit_scale.exp().clamp(max=MAX_SCALE)
        has_view = (variants[:, 0] >= 0).to(image.device)
        loss = clip_loss(image, own, wrong, row.to(image.device), has_view, scale)
        label = sentences.label[row].to(image.device)
        views = F.cross_entropy(named, label, ignore_index=-1, reduction="sum") / (label >= 0).sum().clamp_min(1)
        return {"loss": loss + views, "clip": loss.detach(), "views": views.detach(), "scale": scale.detach()}

    fit(trainer, loss_fn, lambda: export_clip(trainer.ema_model()["clip"], tokenizer, out))


def export_clip(model: TwoTowers, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a folder that VisionTextDualEncoderModel and -Processor load, fp16 safetensors, replacing it whole."""
    side = model.config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixels = {"resample": PILImageResampling.BILINEAR, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    save_whole(out, model.half(), tokenizer, CLIPImageProcessor(**size, **pixels))
