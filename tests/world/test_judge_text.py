"""The judge of the text models: it samples as the pipeline does, and ranks as a loop over all captions would."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from discs import write_discs
from PIL import Image
from tiny_models import save_tiny_pipeline

from csd3d.metrics.clip import embed_images, embed_tokens, open_towers
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
def test_samples_are_the_pipelines_own(tmp_path):
    folder, captions = save_tiny_pipeline(tmp_path / "text", "text"), ["a red disc", "a blue disc", "a disc"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    size = pipeline.unet.config.sample_size
    z = torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(5))
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "pt"}
    theirs = pipeline(captions, latents=z, **settings).images
    torch.testing.assert_close(judge_text.sample(pipeline, captions, 3.0, 4, seed=5), theirs, rtol=1e-3, atol=1e-4)


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
