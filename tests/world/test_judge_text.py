"""The judge of the text models: it samples as written out by hand, and ranks as a loop over all captions would."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from discs import write_discs
from PIL import Image
from tiny_models import save_tiny_pipeline

from csd3d.metrics.clip import WORLD_FOLDER, embed_images, embed_tokens, open_towers
from csd3d.priors import PriorConfig, load_prior
from tools.train_shipped import judge_text
from tools.train_shipped.__main__ import main
from tools.train_shipped.clip import build_clip, export_clip, load_sentences
from tools.train_shipped.data import gather, open_pairs
from tools.train_shipped.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return open_pairs(write_discs(tmp_path_factory.mktemp("data") / "pairs", 12))


@pytest.fixture(scope="module")
def clip_folder(pairs, tmp_path_factory):
    """A CLIP that has learnt nothing."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([record["target_caption"] for record in pairs.records])
    folder = tmp_path_factory.mktemp("clip") / "clip"
    export_clip(build_clip(tokenizer), tokenizer, folder)
    return folder


@torch.no_grad()
def test_samples_are_guided_ddim_of_the_pipelines_own_networks(tmp_path):
    folder, captions = save_tiny_pipeline(tmp_path / "text", "text"), ["a red disc", "a blue disc", "a disc"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    unet, alphas = pipeline.unet, pipeline.scheduler.alphas_cumprod
    size = unet.config.sample_size
    z = torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(5))
    full, null = pipeline.encode_prompt(captions, "cpu", 1, True)
    levels = (999, 749, 500, 250)
    for t, a, after in zip(levels, alphas[list(levels)], [*alphas[list(levels[1:])], torch.tensor(1.0)], strict=True):
        free, told = (unet(z, t, text, return_dict=False)[0] for text in (null, full))
        eps = free + 3.0 * (told - free)
        z = after.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - after).sqrt() * eps
    pictures = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
    prior = load_prior(PriorConfig(model=str(folder), device="cpu"))
    found = judge_text.sample(prior, captions, 3.0, 4, seed=5)
    torch.testing.assert_close(found, pictures.clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_the_shipped_model_is_judged_with_the_camera_told_and_without():
    prior = load_prior(PriorConfig(model=str(WORLD_FOLDER.parent / "t2i"), device="cpu"), require="text")
    records = [{"camera": [0.0, 15.0, 4.0]}, {"camera": [180.0, 15.0, 4.0]}]
    views = judge_text.told_views(prior, records)
    assert list(views) == ["t2i", "t2i, camera told"]
    free, told = (judge_text.sample(prior, ["a red car"] * 2, 3.0, 1, 0, view) for view in views.values())
    assert not torch.allclose(free, told, atol=1e-2)
    assert list(judge_text.told_views(prior, [*records, {}])) == ["t2i"]


@torch.no_grad()
def test_a_sample_is_first_where_no_other_caption_suits_it_better(pairs, clip_folder):
    model, tokenizer = open_towers(clip_folder)
    model = model.eval().float()
    captions = list(dict.fromkeys(record["target_caption"] for record in pairs.records))
    image = embed_images(model, gather(pairs.target, torch.arange(len(captions))))
    rows = [[record["target_caption"] for record in pairs.records].index(caption) for caption in captions]
    sentences = load_sentences(pairs, tokenizer)
    report = judge_text.judge_pictures(image, rows, sentences.embed(model), sentences, among=99)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    scores = image @ embed_tokens(model, tokens).T
    first = (scores.argmax(1) == torch.arange(len(captions))).float().mean().item()
    assert report["ranked_first"] == pytest.approx(first)
    assert report["pictures"] == len(captions)


def test_it_writes_its_report_and_sheet(pairs, clip_folder, tmp_path):
    folder = write_discs(tmp_path / "pairs", 12)
    model = save_tiny_pipeline(tmp_path / "text", "text")
    files = ["--json", str(tmp_path / "j.json"), "--sheet", str(tmp_path / "s.png"), "--clip", str(clip_folder)]
    options = ["--pairs", str(folder), "--model", str(model), "--count", "3", "--steps", "2"]
    assert main(["judge-text", *options, *files]) == 0
    report = json.loads((tmp_path / "j.json").read_text())
    assert report["clip"]["pictures"] == 12
    assert report["t2i"]["pictures"] == 3
    assert Image.open(tmp_path / "s.png").width > 3 * 32
