"""Held-out bars of the text models: the CLIP's retrieval and view words on true pictures, and the samples it judges.

Symbols: P pictures, each with its own caption; I [P,D] and T [P,D] their unit embeddings.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from csd3d.metrics.clip import TwoTowers, embed_images, open_towers
from tools.train_shipped.clip import Sentences, load_sentences
from tools.train_shipped.data import Pairs, gather, open_pairs
from tools.train_shipped.judge import add_common_options, decode, embed, write_report
from tools.train_shipped.sheet import captioned_sheet


def add_options(part: argparse.ArgumentParser) -> None:
    """The options of `judge-text`."""
    add_common_options(part)
    part.add_argument("--clip", type=Path, required=True, help="CLIP folder")
    part.add_argument("--model", type=Path, help="text-to-image pipeline folder")
    part.add_argument("--count", type=int, default=256, help="captions to draw")
    part.add_argument("--guidance", type=float, default=3.0, help="guidance scale")
    part.add_argument("--among", type=int, default=32, help="captions that a sample is ranked among")


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Judge the CLIP and, where given, the text-to-image pipeline; write the report and the contact sheet."""
    pairs = open_pairs(options.pairs)
    model, tokenizer = open_towers(options.clip)
    model = model.eval().float()
    sentences = load_sentences(pairs, tokenizer)
    text = sentences.embed(model)
    report: dict = {"clip": judge_clip(model, sentences, text, pairs)}
    if options.model:
        shown = {record["target_caption"]: i for i, record in enumerate(pairs.records)}
        captions = list(shown)[: options.count]
        pipeline = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32, safety_checker=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            images = sample(pipeline, captions, options.guidance, options.steps, options.seed)
        settings = {"steps": options.steps, "guidance_scale": options.guidance}
        image = torch.cat([embed_images(model, part) for part in images.split(64)])
        rows = [shown[caption] for caption in captions]
        report["t2i"] = settings | judge_pictures(image, rows, text, sentences, options.among)
        if options.sheet:
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            captioned_sheet(captions, images, options.sheet)
    print(json.dumps(report, indent=1))
    write_report(report, options)


def sample(
    pipeline: StableDiffusionPipeline, captions: list[str], guidance: float, steps: int, seed: int, batch: int = 32
) -> Tensor:
    """Pictures [P,3,S,S] in [0, 1] of the captions, by DDIM from noise that depends on the seed alone."""
    generator, size = torch.Generator().manual_seed(seed), pipeline.unet.config.sample_size
    pictures = []
    for first in range(0, len(captions), batch):
        texts = captions[first : first + batch]
        text = embed(pipeline, [""] * len(texts) + texts)
        z = torch.randn(len(texts), pipeline.unet.config.in_channels, size, size, generator=generator)
        pictures.append(decode(pipeline.vae, _denoise(pipeline, z, text, guidance, steps)))
    return torch.cat(pictures)


def _denoise(pipeline: StableDiffusionPipeline, z: Tensor, text: Tensor, guidance: float, steps: int) -> Tensor:
    """Unscaled latents from noise z [B,4,h,w]; `text` is of the empty prompts, then of the captions."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        null, full = pipeline.unet(torch.cat([z, z]), t, text, return_dict=False)[0].float().chunk(2)
        z = scheduler.step(null + guidance * (full - null), t, z, return_dict=False)[0]
    return z / pipeline.vae.config.scaling_factor


@torch.no_grad()
def judge_clip(
    model: TwoTowers, sentences: Sentences, text: Tensor, pairs: Pairs, among: int = 64
) -> dict[str, float | int]:
    """`judge_pictures` of all true target pictures: share whose own caption is retrieved first, and the rest."""
    image = torch.cat([embed_images(model, gather(pairs.target, i)) for i in torch.arange(len(pairs)).split(64)])
    found = judge_pictures(image, range(len(pairs)), text, sentences, among)
    return {"retrieval_at_1": found.pop("ranked_first"), **found}


def judge_pictures(
    image: Tensor, shown: Sequence[int], text: Tensor, sentences: Sentences, among: int
) -> dict[str, float | int]:
    """Share of pictures whose caption ranks first among `among` different ones, and of right view words.

    I [P,D] of pictures that show the target captions of the pairs `shown` [P]; `text` [U,D] embeds `sentences`.
    """
    everyone = sentences.caption[1]
    row = everyone[torch.as_tensor(shown)]
    first = [is_first(image[k], text, row[k], everyone.roll(-i)[1:], among) for k, i in enumerate(shown)]
    right = view_words_right(image, text, row, sentences)
    return {
        "pictures": len(first),
        "ranked_first": sum(first) / len(first),
        "among": among,
        "view_words": right.float().mean().item(),
        "views": len(right),
    }


def view_words_right(image: Tensor, text: Tensor, row: Tensor, sentences: Sentences) -> Tensor:
    """Of each picture whose caption `row` [P] has a view word: whether it beats the caption's variants, [≤ P] bool."""
    variants = sentences.variants[row]
    seen = variants[:, 0] >= 0
    right = torch.einsum("nd,nd->n", image[seen], text[row[seen]])
    return right > torch.einsum("nd,nvd->nv", image[seen], text[variants[seen]]).amax(1)


def is_first(image: Tensor, text: Tensor, own: Tensor, others: Tensor, among: int) -> bool:
    """Whether the caption `own` beats the first `among` − 1 different ones of `others`."""
    rows = torch.unique(others[others != own], sorted=False)[: among - 1]
    return bool((text[rows] @ image < text[own] @ image).all())
