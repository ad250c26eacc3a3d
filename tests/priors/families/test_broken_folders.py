"""Opening SDXL, DeepFloyd IF and Stable Diffusion 3: broken folders get one line that names the file."""

import json
import shutil
import sys

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from family_checks import refused
from tiny_models import build_t5, build_text_encoder, build_tokenizer, save_tiny_sdxl

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def sdxl(sdxl_folder, tmp_path):
    return shutil.copytree(sdxl_folder, tmp_path / "sdxl")


@pytest.fixture
def deepfloyd(if_folder, tmp_path):
    return shutil.copytree(if_folder, tmp_path / "if")


@pytest.fixture
def sd3(sd3_folder, tmp_path):
    return shutil.copytree(sd3_folder, tmp_path / "sd3")


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("sdxl", "text_encoder_2/config.json"),
        ("sdxl", "text_encoder_2/model.safetensors"),
        ("sdxl", "tokenizer_2"),
        ("sdxl", "vae"),
        ("deepfloyd", "text_encoder/model.safetensors"),
        ("deepfloyd", "text_encoder"),
        ("deepfloyd", "tokenizer/tokenizer.json"),
        ("deepfloyd", "unet/diffusion_pytorch_model.safetensors"),
        ("sd3", "transformer/config.json"),
        ("sd3", "text_encoder_2"),
        ("sd3", "tokenizer_3"),
        ("sd3", "text_encoder_3/model.safetensors"),
        ("sd3", "scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(request, kind, lost):
    folder = request.getfixturevalue(kind)
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    message = refused(folder)
    for name in (str(folder), *lost.split("/")):
        assert name in message


def test_jobs_get_the_model_they_need(sdxl, deepfloyd, sd3, tmp_path):
    for folder in (sdxl, deepfloyd, sd3):
        assert "InstructPix2Pix" in refused(folder, "edit")
    edit = save_tiny_sdxl(tmp_path / "edit", in_channels=8)
    assert "text-to-image" in refused(edit, "text")
    assert load_prior(PriorConfig(str(edit), device="cpu"), "edit").edits


def test_components_of_another_class_are_refused(sdxl, deepfloyd, sd3):
    edit_json(sdxl / "text_encoder_2/config.json", architectures=["CLIPTextModel"])
    assert "CLIPTextModelWithProjection is needed" in refused(sdxl)
    edit_json(deepfloyd / "text_encoder/config.json", architectures=["UMT5EncoderModel"])
    assert "T5EncoderModel is needed" in refused(deepfloyd)
    edit_json(sd3 / "transformer/config.json", _class_name="FluxTransformer2DModel")
    assert "FluxTransformer2DModel" in refused(sd3)


@pytest.mark.parametrize(
    ("key", "value"), [("addition_embed_type", "image"), ("class_embed_type", "timestep"), ("time_cond_proj_dim", 8)]
)
def test_unets_of_another_kind_are_refused(sdxl, key, value):
    edit_json(sdxl / "unet/config.json", **{key: value})
    message = refused(sdxl)
    assert key in message
    assert repr(value) in message


def test_encoders_of_another_width_are_refused(sdxl, deepfloyd, sd3):
    tokenizer = build_tokenizer(sdxl / "tokenizer_2")
    build_text_encoder(tokenizer, 32, 12).save_pretrained(sdxl / "text_encoder_2")
    assert "text of width 40" in refused(sdxl)
    build_text_encoder(tokenizer, 24, 8).save_pretrained(sdxl / "text_encoder_2")
    assert "pooled text of width 12" in refused(sdxl)
    build_t5(24)[1].save_pretrained(deepfloyd / "text_encoder")
    assert "text of width 16" in refused(deepfloyd)
    build_t5(24)[1].save_pretrained(sd3 / "text_encoder_3")
    assert "text of width 48" in refused(sd3)
    shutil.rmtree(sd3 / "text_encoder_3")
    build_text_encoder(tokenizer, 24, 8).save_pretrained(sd3 / "text_encoder_2")
    assert "pooled text of width 28" in refused(sd3)
    build_text_encoder(tokenizer, 40, 12).save_pretrained(sd3 / "text_encoder_2")
    assert "text of width 48, the text encoders give 56" in refused(sd3)


def test_a_vocabulary_of_another_encoder_is_refused(deepfloyd):
    tokenizer = json.loads((deepfloyd / "tokenizer/tokenizer.json").read_text())
    tokenizer["model"]["vocab"] += [["more", -3.0]]
    (deepfloyd / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokens" in refused(deepfloyd)


def test_schedules_must_be_of_the_models_kind(sd3, sdxl, deepfloyd):
    edit_json(sd3 / "scheduler/scheduler_config.json", invert_sigmas=True)
    assert "invert_sigmas" in refused(sd3)
    edit_json(sd3 / "scheduler/scheduler_config.json", _class_name="DDPMScheduler")
    assert "DDPMScheduler" in refused(sd3)
    for folder in (sdxl, deepfloyd):
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
        assert "FlowMatchEulerDiscreteScheduler" in refused(folder)


def test_a_later_stage_of_deepfloyd_is_refused(deepfloyd):
    edit_json(deepfloyd / "unet/config.json", class_embed_type="timestep")
    assert "class_embed_type" in refused(deepfloyd)


def test_zeros_for_an_empty_prompt_must_be_a_truth_value(sdxl):
    edit_json(sdxl / "model_index.json", force_zeros_for_empty_prompt="yes")
    assert "force_zeros_for_empty_prompt" in refused(sdxl)
    (sdxl / "model_index.json").write_text("{")
    assert "model_index.json" in refused(sdxl)
    (sdxl / "model_index.json").unlink()
    assert not load_prior(PriorConfig(str(sdxl), device="cpu")).embed([""]).any()


def test_t5_without_a_fast_tokenizer_says_what_it_needs(deepfloyd, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (deepfloyd / "tokenizer/tokenizer.json").rename(deepfloyd / "tokenizer/spiece.model")
    assert "pip install sentencepiece" in refused(deepfloyd)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": -1, "prediction_type": "x"}, "-1 with prediction_type 'x'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "tokenizer"),
        ("text_encoder/config.json", {"num_attention_heads": -1}, "text_encoder|text encoder"),
        ("text_encoder/config.json", {"architectures": -1, "hidden_size": "x"}, "text_encoder"),
    ],
)
def test_values_of_another_kind_in_a_config_are_told(tiny_prior, tmp_path, file, changes, said):
    folder = shutil.copytree(tiny_prior, tmp_path / "prior")
    edit_json(folder / file, **changes)
    with pytest.raises(InputError, match=said) as error:
        load_prior(PriorConfig(str(folder), device="cpu")).condition(["a prompt"])
    assert "\n" not in str(error.value)
