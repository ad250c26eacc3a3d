"""Evaluate the text models on held-out pairs: CLIP (world) on true pictures, and samples by CLIP (world).

Symbols: P pictures, each with its own caption; I [P,D] and T [P,D] their unit embeddings.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_sample, ddim_timesteps
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.metrics.clip import TwoTowers, embed_images, open_towers
from csd3d.priors import Prior
from tools.train_shipped.clip import Sentences, load_sentences
from tools.train_shipped.data import Pairs, gather, open_pairs
from tools.train_shipped.judge import add_common_options, open_judged, write_report
from tools.train_shipped.sheet import save_sheet

SHEET_ROWS = 24  # a row a caption: the true picture, the sample, and the sample with the camera given


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
    """Evaluate CLIP (world) and, if given, the text-to-image model; write the report and the contact sheet."""
    pairs = open_pairs(options.pairs)
    model, tokenizer = open_towers(options.clip)
    model = model.eval().float()
    sentences = load_sentences(pairs, tokenizer)
    text = sentences.embed(model)
    report: dict = {"clip": judge_clip(model, sentences, text, pairs)}
    if options.model:
        prior = open_judged(options, "text")
        shown = {record["target_caption"]: i for i, record in enumerate(pairs.records)}
        captions = list(shown)[: options.count]
        rows = [shown[caption] for caption in captions]
        settings = {"steps": options.steps, "guidance_scale": options.guidance}
        drawn = [gather(pairs.target, torch.tensor(rows))]
        for name, view in told_views(prior, [pairs.records[i] for i in rows]).items():
            images = sample(prior, captions, options.guidance, options.steps, options.seed, view)
            image = torch.cat([embed_images(model, part) for part in images.split(64)])
            drawn.append(images)
            report[name] = settings | judge_pictures(image, rows, text, sentences, options.among)
        if options.sheet:
            save_sheet(options.sheet, list(zip(captions, zip(*drawn, strict=True), strict=True))[:SHEET_ROWS])
    print(json.dumps(report, indent=1))
    write_report(report, options)


def told_views(prior: Prior, records: list[dict]) -> dict[str, Tensor | None]:
    """Camera conditions by the report's key: none, and [P,3] if the model and the pairs have cameras."""
    told: dict[str, Tensor | None] = {"t2i": None}
    if prior.takes_camera and all("camera" in record for record in records):
        told["t2i, camera told"] = torch.tensor([record["camera"] for record in records])
    return told


@torch.no_grad()
def sample(
    prior: Prior, captions: list[str], scale: float, steps: int, seed: int, view: Tensor | None = None, batch: int = 32
) -> Tensor:
    """Pictures [P,3,S,S] in [0, 1] of the captions, by DDIM from noise that depends on the seed alone.

    `view` [P,3]: azimuth, elevation, distance. As in a method of distillation both branches are told it.
    """
    generator, side = torch.Generator().manual_seed(seed), prior.defaults.working_size
    timesteps = ddim_timesteps(prior.num_train_timesteps - 1, steps)
    pictures = []
    for rows in torch.arange(len(captions)).split(batch):
        texts, seen = tuple(captions[i] for i in rows.tolist()), None if view is None else view[rows]

        def predict(z_t: Tensor, t: int, texts: tuple[str, ...] = texts, seen: Tensor | None = seen) -> Tensor:
            nothing = ("",) * len(texts)
            eps = prior.predict({"null": Query(z_t, t, nothing, view=seen), "text": Query(z_t, t, texts, view=seen)})
            return cfg(eps["null"], eps["text"], scale)

        z = torch.randn(len(rows), *prior.latent_shape(side, side), generator=generator)
        pictures.append(prior.decode(ddim_sample(predict, z, prior.alphas_cumprod, timesteps)))
    return torch.cat(pictures)


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
    """For each picture whose caption `row` [P] has a view word: whether it beats the variants, [≤ P] bool."""
    variants = sentences.variants[row]
    seen = variants[:, 0] >= 0
    right = torch.einsum("nd,nd->n", image[seen], text[row[seen]])
    return right > torch.einsum("nd,nvd->nv", image[seen], text[variants[seen]]).amax(1)


def is_first(image: Tensor, text: Tensor, own: Tensor, others: Tensor, among: int) -> bool:
    """Whether the caption `own` beats the first `among` − 1 different ones of `others`."""
    rows = torch.unique(others[others != own], sorted=False)[: among - 1]
    return bool((text[rows] @ image < text[own] @ image).all())
