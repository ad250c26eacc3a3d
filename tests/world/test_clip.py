"""The small CLIP: its loss against the definition, and that it learns what it is trained on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from discs import write_discs
from transformers import CLIPTokenizer, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from csd3d.metrics.clip import embed_images
from csd3d.world.language import caption
from csd3d.world.render import camera_row, render
from csd3d.world.scene import Scene
from csd3d.world.shapes import KINDS
from tools.train_shipped import clip, judge_text
from tools.train_shipped.__main__ import main
from tools.train_shipped.data import gather, move, open_pairs
from tools.train_shipped.tokenizer import build_tokenizer


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_the_loss_is_the_mean_of_both_ways_and_the_choice_of_views_written_out():
    image, text, variants = unit(3, 8), unit(3, 8, seed=1), unit(3, 3, 8, seed=2)
    row, has_view, s = torch.arange(3), torch.tensor([True, False, True]), torch.tensor(5.0)
    total = 0.0
    for i in range(3):
        own = math.exp(5 * image[i] @ text[i])
        texts = sum(math.exp(5 * image[i] @ text[j]) for j in range(3))
        images = sum(math.exp(5 * image[j] @ text[i]) for j in range(3))
        total -= (math.log(own / texts) + math.log(own / images)) / 2 / 3
        if has_view[i]:  # two of the three have a view word
            total -= math.log(own / (own + sum(math.exp(5 * image[i] @ variants[i, v]) for v in range(3)))) / 2
    assert clip.clip_loss(image, text, variants, row, has_view, s).item() == pytest.approx(total, rel=1e-9)


def test_equal_captions_are_no_negatives_of_each_other():
    image, text = unit(2, 8), unit(1, 8, seed=1).repeat(2, 1)
    none = torch.zeros(2, dtype=torch.bool)
    loss = clip.clip_loss(image, text, unit(2, 3, 8), torch.tensor([7, 7]), none, torch.tensor(3.0))
    by_image = math.log(2)  # both columns are the same text: half each, whatever the image
    by_text = -(0.5 * (3 * image @ text[0]).log_softmax(0)).sum().item()
    assert loss.item() == pytest.approx((by_image + by_text) / 2, rel=1e-9)


def test_variants_change_the_view_word_alone():
    assert clip.view_variants("a red chair, grey background, side view, facing left") == [
        "a red chair, grey background, front view",
        "a red chair, grey background, side view, facing right",
        "a red chair, grey background, back view",
    ]
    assert clip.view_variants("a red ball, grey background") == []


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.has_front])
def test_mirrored_captions_say_what_mirrored_renders_show(kind):
    scene, azimuths = Scene(kind, "red"), (10, 70, 110, 170, -70)
    rows = {a: camera_row(a, 25, 4.0, 31.0, 48) for a in range(-180, 181, 10)}
    depth = dict(zip(rows, render([scene] * len(rows), np.stack(list(rows.values())), 48, 48).depth, strict=True))
    for azimuth in azimuths:
        mirrored = depth[azimuth][:, ::-1]
        same = min(depth, key=lambda a: np.abs(depth[a] - mirrored).mean())
        assert np.abs(depth[same] - mirrored).mean() < 1e-3
        assert clip.mirror_caption(caption(scene, azimuth, 25)) == caption(scene, same, 25)


def test_pictures_are_drawn_with_what_they_then_show(tmp_path):
    pairs = open_pairs(write_discs(tmp_path / "pairs", 8))
    halves = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    halves[:, :, :16] = 200  # bright where "left" is said, at the left
    words = ["a red duck, side view, facing left", "a red disc"] * 4
    records = [{"caption": word, "target_caption": word} for word in words]
    pairs = replace(pairs, source=halves, target=halves, records=records)
    sentences = clip.load_sentences(pairs, build_tokenizer([*words, *clip.view_variants(words[0])]))
    images, row = clip.draw(pairs, sentences, 2000, torch.Generator().manual_seed(0))
    facing = torch.where(sentences.variants[row, 0] < 0, 0, torch.where(row == 0, -1, 1))
    bright_left = images[:, 0, 16, 0] > images[:, 0, 16, -1]
    assert (facing != 0).float().mean().item() == pytest.approx(7 / 8, abs=0.04)  # three quarters, and half the rest
    assert torch.equal(facing[facing != 0] < 0, bright_left[facing != 0])
    assert (facing > 0).float().mean().item() == pytest.approx(7 / 16, abs=0.04)
    border = (images[:, 0, 16] > 0.5).sum(1)
    assert (border.min().item(), border.max().item()) == (16 - clip.JITTER, 16 + clip.JITTER)


def test_moving_repeats_the_border():
    image = torch.arange(12.0).view(1, 1, 3, 4).repeat(2, 1, 1, 1)
    moved = move(image, torch.tensor([1, -2]), torch.tensor([0, 1]))
    assert moved[0, 0].tolist() == [[0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10]]
    assert moved[1, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]


def test_it_learns_to_tell_the_discs_apart_and_is_an_ordinary_dual_encoder(tmp_path):
    folder = write_discs(tmp_path / "pairs", 48)
    pairs = open_pairs(folder)
    tokenizer = build_tokenizer([r[key] for r in pairs.records for key in ("caption", "target_caption")])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--pairs", str(folder), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "clip")]
    options += ["--work", str(tmp_path / "w"), "--batch", "32", "--warmup", "5", "--ema", "0.8", "--precision", "fp32"]
    assert main(["clip", *options, "--steps", "90", "--lr", "5e-4"]) == 0
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "clip", dtype=torch.float32).eval()
    sentences = clip.load_sentences(pairs, CLIPTokenizer.from_pretrained(tmp_path / "clip"))
    report = judge_text.judge_clip(model, sentences, sentences.embed(model), pairs, among=8)
    assert report["retrieval_at_1"] > 0.8  # chance: 1 in 8
    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "clip")
    image = gather(pairs.target, torch.arange(1))
    inputs = processor(text=["a red disc"], images=image[0], do_rescale=False, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (128, 128)
    with torch.no_grad():
        theirs = model(**inputs).image_embeds
    assert F.cosine_similarity(theirs, embed_images(model, image)).item() > 0.99
