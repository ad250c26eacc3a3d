"""CLIP as a measure: pictures and embeddings against transformers' own, figures against numbers worked by hand."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from csd3d.errors import InputError
from csd3d.metrics import clip as clip_module
from csd3d.metrics.clip import (
    VIEWS,
    ClipModel,
    check_clip,
    check_open_clip,
    clip_pixels,
    directional_similarity,
    embed_images,
    expected_view,
    image_consistency,
    image_similarity,
    load_clip,
    mean_pairwise_distance,
    read_preparation,
    retrieval_rank,
    text_image_score,
    view_word_accuracy,
)
from csd3d.world.language import view_word
from csd3d.world.scene import Scene
from tools.train_shipped.tokenizer import build_tokenizer

SIDE = 32
TEXTS = ["a red chair", "a blue metal duck, wearing a red hat, front view", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random CLIP saved as transformers saves them, half precision, bilinear squares of 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer(TEXTS)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    vision = shape | {"image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 2}
    CLIPImageProcessorPil(**size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return folder


def picture(height, width, seed=0):
    """Noise [H,W,3] uint8 whose resizing overshoots nowhere past 0 or 255: PIL cuts there after either direction."""
    return np.random.default_rng(seed).integers(70, 185, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(70, 51), (40, 97), (20, 26), (32, 32)])
@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
        {"size": 32, "crop_size": 32, "resample": 3},  # as openai's folders have it
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 3},
    ],
    ids=["bilinear", "bicubic", "crop", "squash"],
)
def test_pictures_are_prepared_as_transformers_does(tmp_path, config, shape):
    config |= {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.25, 0.27]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    image = picture(*shape)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)(images=image, return_tensors="pt").pixel_values
    ours = clip_pixels(torch.tensor(image).permute(2, 0, 1)[None] / 255, **read_preparation(tmp_path, 32))
    # PIL rounds after each direction: half a level, spread by weights whose magnitudes add up to 1.3 at most, and half
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1.2 / 255 / 0.25)


def test_keys_left_out_have_the_processors_defaults(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    image = picture(250, 230)
    theirs = CLIPImageProcessorPil()(images=image, return_tensors="pt").pixel_values
    ours = clip_pixels(torch.tensor(image).permute(2, 0, 1)[None] / 255, **read_preparation(tmp_path, 224))
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1.2 / 255 / 0.25)


def test_pixels_are_resized_and_normalised():
    torch.testing.assert_close(clip_pixels(torch.full((1, 3, 128, 96), 0.75), 64), torch.ones(1, 3, 64, 64))


def test_embeddings_are_the_models_own(folder):
    clip, model = load_clip(folder), CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = build_tokenizer(TEXTS)
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=clip_pixels(images, SIDE))
        alone = [model.get_text_features(**tokenizer([text], return_tensors="pt")) for text in TEXTS]  # not padded
    theirs, alone = getattr(theirs, "pooler_output", theirs), [getattr(x, "pooler_output", x) for x in alone]
    torch.testing.assert_close(clip.embed_images(images), F.normalize(theirs, dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.embed_texts(TEXTS), F.normalize(torch.cat(alone), dim=-1), rtol=1e-4, atol=1e-5)
    assert clip.embed_texts(["a red chair " * 40]).isfinite().all()  # longer than the tower: cut


def test_square_pictures_are_embedded_as_in_training(folder):
    """Training squashes and knows no folder; the exported folder crops. On squares, which it sees, they are one."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(embed_images(model, images), load_clip(folder).embed_images(images))


def test_batches_change_nothing(folder):
    clip = load_clip(folder)
    small = ClipModel(clip.name, clip.image_tower, clip.text_tower, batch=2)
    images = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(small.embed_images(images), clip.embed_images(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.embed_texts(TEXTS), clip.embed_texts(TEXTS), rtol=1e-4, atol=1e-5)


def test_only_the_shipped_clip_is_called_world(folder, tmp_path, monkeypatch):
    copy = tmp_path / "world"
    shutil.copytree(folder, copy)
    assert load_clip(copy).name == f"CLIP ({copy})"
    monkeypatch.setattr(clip_module, "WORLD_FOLDER", folder)
    assert load_clip().name == load_clip("world").name == load_clip(folder).name == "CLIP (world)"
    assert load_clip(copy).name == f"CLIP ({copy})"


def test_loading_prints_nothing(folder, capfd):
    load_clip(folder)
    assert capfd.readouterr() == ("", "")


def spoil_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))


def spoil_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def lose_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_preparation(**keys):
    def change(folder):
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "holds a clip_text_model"),
        (spoil_weights, "is no safetensors file"),
        (pickle_weights, "a pickle"),
        (lose_tokenizer, r"needs tokenizer\.json"),
        (lose_tensor, "lack 1 of the tensors, visual_projection.weight"),
        (change_preparation(resample=0), "resample 0"),
        (change_preparation(do_normalize=False), "do_normalize must be true"),
        (change_preparation(crop_size=24), "do not lead to the 32 × 32"),
        (change_preparation(size={"shortest_edge": 24}), "do not lead to the 32 × 32"),
        (change_preparation(size={"height": 32, "width": 48}), "do not lead to the 32 × 32"),
        (change_preparation(size={"shortest_edge": "32"}), "do not lead to the 32 × 32"),
        (change_preparation(resample=[3]), r"resample \[3\]"),
        (change_preparation(image_mean=0.5), "image_mean 0.5: expected three numbers"),
        (change_preparation(image_std=[0.2, 0, 0.2]), "image_std .*: expected three numbers"),
    ],
)
def test_a_folder_that_will_not_do_is_refused_in_one_line(folder, tmp_path, spoil, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["everything", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_missing_is_told_before_any_work(folder, tmp_path, lost):
    """Without opening the weights, so it can be asked at the start of a job that needs the CLIP at its end."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    check_clip(str(broken))
    left = list(broken.iterdir()) if lost == "everything" else [broken / lost]
    for file in left:
        file.unlink()
    with pytest.raises(InputError) as error:
        check_clip(str(broken))
    assert str(broken) in str(error.value)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"'/no/such' is no folder"):
        load_clip("/no/such")


def test_a_hub_name_is_downloaded_as_a_transformers_clip(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(clip_module, "fetch_folder", lambda *parts: asked.append(parts) or folder)
    check_clip("openai/clip-vit-large-patch14")
    assert asked == [("openai/clip-vit-large-patch14", clip_module.FILES, "CLIP")]
    assert load_clip("openai/clip-vit-large-patch14").name == "CLIP (openai/clip-vit-large-patch14)"


def test_open_clip_is_asked_for_by_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r'pip install .*"\.\[metrics\]"'):
        load_clip("open_clip:ViT-bigG-14/laion2b_s39b_b160k")
    with pytest.raises(InputError, match="should read"):
        load_clip("open_clip:ViT-bigG-14")


def test_open_clip_is_fetched_before_any_work(monkeypatch):
    fetched = []
    known = {("ViT-B-32", "laion2b"): {"hf_hub": "x/"}}
    stub = SimpleNamespace(
        get_pretrained_cfg=lambda *names: known.get(names, {}), download_pretrained=lambda about: fetched.append(about)
    )
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    check_open_clip("open_clip:ViT-B-32/laion2b")
    assert fetched == [{"hf_hub": "x/"}]
    with pytest.raises(InputError, match="open_clip knows no open_clip:ViT-B-32/nothing"):
        check_open_clip("open_clip:ViT-B-32/nothing")
    stub.download_pretrained = lambda about: (_ for _ in ()).throw(OSError("no route\nto host"))
    with pytest.raises(InputError, match=r"could not fetch open_clip:ViT-B-32/laion2b \(no route to host"):
        check_open_clip("open_clip:ViT-B-32/laion2b")


def test_open_clip_gets_its_own_pixels_and_its_own_name(monkeypatch):
    """A stand-in with the calls of open_clip that are used: create_model, get_tokenizer, encode_*, preprocess_cfg."""
    wanted = {"size": (16, 16), "mean": (0.1, 0.2, 0.3), "std": (2.0, 2.0, 2.0), "interpolation": "bicubic"}
    model = SimpleNamespace(
        visual=SimpleNamespace(preprocess_cfg=wanted | {"resize_mode": "shortest"}),
        encode_image=lambda pixels: pixels.flatten(1),
        encode_text=lambda tokens: 3.0 * tokens,
        eval=lambda: model,
    )
    asked = []
    stub = SimpleNamespace(
        create_model=lambda name, pretrained, device: asked.append((name, pretrained)) or model,
        get_tokenizer=lambda name: lambda texts: torch.tensor([[float(len(text)), 0.0] for text in texts]),
    )
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    clip = load_clip("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert asked == [("ViT-B-32", "laion2b_s34b_b79k")]
    assert clip.name == "CLIP (open_clip:ViT-B-32/laion2b_s34b_b79k)"
    images = torch.rand(2, 3, 24, 30, generator=torch.Generator().manual_seed(0))
    pixels = clip_pixels(images, 16, edge=16, mode="bicubic", mean=wanted["mean"], std=wanted["std"])
    torch.testing.assert_close(clip.embed_images(images), F.normalize(pixels.flatten(1), dim=-1))
    torch.testing.assert_close(clip.embed_texts(["ab"]), torch.tensor([[1.0, 0.0]]))


def direction(*degrees):
    """Unit vectors in the plane."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


def test_text_image_score_is_the_cosine():
    scores = text_image_score(direction(0, 60, 180), direction(0)[0])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64))


def test_the_rank_is_by_the_mean_over_views():
    images = direction(0, 80)  # their mean points to 40°
    assert retrieval_rank(images, direction(40)[0], direction(10, 80, 0)) == 1
    assert retrieval_rank(images, direction(10)[0], direction(40, 75, 200)) == 2
    assert retrieval_rank(images, direction(230)[0], direction(40, 75, 200)) == 4
    assert retrieval_rank(images[:1], direction(10)[0], direction(40, 75, 200)) == 1  # the first view alone says so


def test_who_tells_nothing_apart_comes_last():
    assert retrieval_rank(direction(30), direction(10)[0], direction(10, 10)) == 3


def test_a_text_may_be_told_of_each_view():
    images, told = direction(0, 90), direction(10, 80)
    torch.testing.assert_close(text_image_score(images, told), text_image_score(images[:1], told[0]).repeat(2))
    swapped, alike = told.flip(0), torch.stack([direction(5)[0], direction(85)[0]])
    assert retrieval_rank(images, told, torch.stack([swapped])) == 1
    assert retrieval_rank(images, told, torch.stack([swapped, alike])) == 2


def test_directional_similarity_knows_its_signs():
    source, source_text = direction(10, 10, 10, 10), direction(200)[0]
    along = direction(240)[0] - source_text
    edited = source + torch.stack(
        [2 * along, -along, along @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), 0 * along]
    )
    found = directional_similarity(edited, source, direction(240)[0], source_text)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64))
    same = directional_similarity(edited, source, source_text, source_text)  # the texts say the same: no direction
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.float64))


def test_similarity_pairs_images_and_consistency_pairs_neighbours():
    a = direction(0, 60, 120)
    torch.testing.assert_close(image_similarity(a, direction(0, 0, 0)), torch.tensor([1.0, 0.5, -0.5]).double())
    torch.testing.assert_close(image_consistency(a), torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(image_consistency(a, closed=True), torch.tensor([0.5, 0.5, -0.5]).double())


def test_diversity_is_the_mean_over_pairs():
    a, far = direction(0, 60, 150), 1 + math.cos(math.radians(30))
    assert mean_pairwise_distance(a) == pytest.approx((0.5 + far + 1.0) / 3)
    assert mean_pairwise_distance(direction(20, 20, 20)) == pytest.approx(0, abs=1e-12)
    views = torch.stack([a, direction(0, 0, 60)], 1)  # [N, V, D]: each view is compared with its like
    assert mean_pairwise_distance(views) == pytest.approx((0.5 + far + 1.0 + 0.0 + 0.5 + 0.5) / 6)
    with pytest.raises(ValueError, match="at least two"):
        mean_pairwise_distance(a[:1])


def oracle(read):
    """A CLIP to which a picture of brightness k / 10 is of VIEWS[read(k)]."""

    def images(pictures):
        return torch.stack([torch.eye(4)[read(round(10 * float(x.mean())))] for x in pictures])

    def texts(sentences):
        assert all(text.startswith("a red chair, ") and text.count("view") == 1 for text in sentences)
        return torch.stack([torch.eye(4)[VIEWS.index(text.removeprefix("a red chair, "))] for text in sentences])

    return ClipModel("CLIP (oracle)", images, texts)


AZIMUTHS = list(range(0, 360, 30))


def shown(words):
    return torch.stack([torch.full((3, 4, 4), VIEWS.index(word) / 10) for word in words])


@pytest.mark.parametrize("said", ["", ", back view", ", Overhead view.", ", side view, facing left"])
def test_right_views_are_right_and_a_janus_is_not(said):
    prompt = f"a red chair{said}"
    truth = shown([expected_view(a) for a in AZIMUTHS])
    right = view_word_accuracy(oracle(lambda k: k), truth, prompt, AZIMUTHS)
    assert right["accuracy"] == 1.0
    assert right["by_azimuth"] == {str(a): 1.0 for a in AZIMUTHS}
    janus = view_word_accuracy(oracle(lambda k: k), shown(["front view"] * 12), prompt, AZIMUTHS)
    assert janus["accuracy"] == 3 / 12
    assert janus["by_view"] == {view: float(view == "front view") for view in VIEWS}
    assert [a for a, share in janus["by_azimuth"].items() if share] == ["0", "30", "330"]


def test_views_of_several_objects_are_averaged_by_azimuth():
    images = shown(["front view", "back view", "back view", "back view"])
    report = view_word_accuracy(oracle(lambda k: k), images, "a red chair", [0, 0, 180, 180])
    assert report == {
        "accuracy": 0.75,
        "by_azimuth": {"0": 0.5, "180": 1.0},
        "by_view": {"front view": 0.5, "back view": 1.0},
    }


def test_a_tie_of_views_is_no_win():
    blind = ClipModel("CLIP (blind)", lambda x: torch.ones(len(x), 1), lambda texts: torch.ones(len(texts), 1))
    assert view_word_accuracy(blind, shown(["front view"] * 12), "a red chair", AZIMUTHS)["accuracy"] == 0


def test_views_are_called_as_the_captions_call_them():
    chair = Scene("chair", "red")
    for azimuth in range(-360, 721, 5):
        assert expected_view(azimuth) == view_word(chair, azimuth, 30)
    assert [expected_view(a, (20, 100)) for a in (15, 25, 95, 105)] == [VIEWS[0], VIEWS[1], VIEWS[1], VIEWS[3]]
