"""A hub's models: what is downloaded, in which order, and what a user reads where it can't be."""

import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from family_checks import refused
from safetensors.torch import save_file

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, hub, load_prior
from csd3d.priors.families.sd3 import StableDiffusion3
from csd3d.priors.hub import CONFIGS, wanted_files


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that holds one folder; `asked` are the patterns of each download, which copies what they match."""

    class Hub:
        folder: Path
        asked: list

        def model_info(self, name, timeout):
            files = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
            return SimpleNamespace(sha="0123", siblings=[SimpleNamespace(rfilename=file) for file in files])

        def download(self, name, revision, allow_patterns, local_files_only):
            assert (revision, local_files_only) == ("0123", False)
            self.asked.append(allow_patterns)
            for pattern in allow_patterns:
                for file in self.folder.glob(pattern):
                    (tmp_path / "copy" / file.relative_to(self.folder).parent).mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, tmp_path / "copy" / file.relative_to(self.folder))
            return str(tmp_path / "copy")

    found = Hub()
    found.asked = []
    monkeypatch.setattr(hub, "HfApi", lambda: found)
    monkeypatch.setattr(hub, "snapshot_download", found.download)
    return found


def test_configs_come_first_then_what_the_family_opens(fake_hub, sdxl_folder, tmp_path):
    fake_hub.folder = shutil.copytree(sdxl_folder, tmp_path / "hub")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin", "all.safetensors"):
        (fake_hub.folder / name).write_bytes(b"not to be fetched")
    prior = load_prior(PriorConfig("someone/model", device="cpu"))
    assert prior.embed(["red"]).shape[-1] == 40
    assert fake_hub.asked[0] == CONFIGS
    weights = [name for name in fake_hub.asked[1] if name.endswith(".safetensors")]
    assert sorted(Path(name).parent.name for name in weights) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert not any("fp16" in name or name.endswith(".bin") for name in fake_hub.asked[1])


UNET, FLUX = {"_class_name": "UNet2DConditionModel", "out_channels": 4}, {"_class_name": "FluxTransformer2DModel"}
OTHERS = {  # pipeline: the configs of its predictor and its VAE, and what is said of them
    "Flux2Pipeline": ("transformer", {"_class_name": "Flux2Transformer2DModel"}, {}, "a Flux2Transformer2DModel of a"),
    "SanaPipeline": ("transformer", {"_class_name": "SanaTransformer2DModel"}, {}, "a SanaTransformer2DModel of a"),
    "KandinskyV22Pipeline": ("unet", UNET | {"addition_embed_type": "image"}, {}, "addition_embed_type = 'image' of a"),
    "QwenImagePipeline": ("transformer", {"_class_name": "QwenImageTransformer2DModel"}, {}, "of a QwenImagePipeline"),
    "FluxFillPipeline": ("transformer", FLUX | {"in_channels": 384}, {}, "of a FluxFillPipeline is not"),
    "FluxPipeline": (
        "transformer",
        FLUX | {"in_channels": 128},
        {"latent_channels": 16},
        "128 does not suit a VAE of 16",
    ),
    "StableDiffusionInpaintPipeline": (
        "unet",
        UNET | {"in_channels": 9},
        {"latent_channels": 4},
        "9 channels in and 4 out",
    ),
}


@pytest.mark.parametrize("pipeline", OTHERS)
def test_a_model_that_is_not_supported_is_refused_before_its_weights(fake_hub, tmp_path, pipeline):
    part, predictor, vae, said = OTHERS[pipeline]
    fake_hub.folder = tmp_path / "hub"
    files = {f"{part}/config.json": predictor, "vae/config.json": vae, "model_index.json": {"_class_name": pipeline}}
    for name, config in files.items():
        (fake_hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (fake_hub.folder / name).write_text(json.dumps(config))
    message = refused("someone/model")
    assert said in message
    if not vae:  # else the family is known, and the model is another of it
        for name in ("sd3 (Stable Diffusion 3", "stable_diffusion", "flux_kontext (FLUX.1 Kontext)", "qwen_edit"):
            assert name in message
    assert fake_hub.asked == [CONFIGS]


WRONG = {  # for the job, or with these settings: fixture of the model, what load_prior is given, what is said
    "a text model that is to edit": ("text_folder", {}, "edit", "this job needs an editing model"),
    "an editing model that is to draw": ("kontext_folder", {}, "text", "this job needs a text-to-image model"),
    "an encoder that cannot go": ("qwen_folder", {"drop_text_encoder": True}, None, "sees the pictures; set it false"),
    "attention of a UNet": ("sd3_folder", {"attention": "sliced"}, None, "sliced is for UNets"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_with_a_model_is_told_before_its_weights(fake_hub, request, case):
    name, options, require, said = WRONG[case]
    fake_hub.folder = request.getfixturevalue(name)
    with pytest.raises(InputError, match=said):
        load_prior(PriorConfig("someone/model", device="cpu", **options), require)
    assert fake_hub.asked == [CONFIGS]


def test_a_schedule_that_cannot_be_is_told_before_the_weights(fake_hub, if_folder, tmp_path):
    fake_hub.folder = shutil.copytree(if_folder, tmp_path / "hub")
    config = fake_hub.folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "velocity"}))
    assert "prediction_type 'velocity' is not supported" in refused("someone/model")
    assert fake_hub.asked == [CONFIGS]


def test_the_half_variant_is_downloaded_where_weights_are_kept_in_half(fake_hub, edit_folder, tmp_path):
    fake_hub.folder = shutil.copytree(edit_folder, tmp_path / "hub")
    for part in ("unet", "text_encoder"):
        (whole,) = (fake_hub.folder / part).glob("*.safetensors")
        shutil.copy(whole, whole.with_suffix(".bf16.safetensors"))
        shutil.copy(whole, whole.with_suffix(".fp16.safetensors"))
    load_prior(PriorConfig("someone/model", device="cpu", dtype="bfloat16", weights="bfloat16"))
    weights = sorted(name for name in fake_hub.asked[1] if name.endswith(".safetensors"))
    assert weights == [
        "text_encoder/model.bf16.safetensors",
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_shard_that_the_hub_lacks_is_named_before_any_weight_is_fetched(fake_hub, edit_folder, tmp_path):
    fake_hub.folder = shutil.copytree(edit_folder, tmp_path / "hub")
    (whole,) = (fake_hub.folder / "unet").glob("*.safetensors")
    whole.rename(whole.with_name("diffusion_pytorch_model-00002-of-00002.safetensors"))
    assert "the shard unet/diffusion_pytorch_model-00001-of-00002.safetensors is missing" in refused("someone/model")
    assert fake_hub.asked == [CONFIGS]


def test_a_lora_comes_from_the_hub_with_its_file_alone(fake_hub, edit_folder, tmp_path):
    fake_hub.folder = tmp_path / "hub"
    fake_hub.folder.mkdir()
    save_file({"transformer.a.lora_A.weight": torch.zeros(1, 1)}, fake_hub.folder / "style.safetensors")
    (fake_hub.folder / "style.png").write_bytes(b"not to be fetched")
    for entry in ("someone/style:0.5", "someone/style/style.safetensors"):
        fake_hub.asked = []
        told = refused(edit_folder, lora=[entry])
        assert "is for another model" in told
        assert fake_hub.asked == [["style.safetensors"]]


def test_everything_that_is_opened_is_downloaded_once():
    taken = [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.fp16.safetensors",  # all that there is
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer_3/spiece.model",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    left = [
        "sd3_medium_incl_clips.safetensors",
        "text_encoders/clip_g.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/evil.py",
        "safety_checker/model.safetensors",
    ]
    assert sorted(wanted_files(StableDiffusion3.parts, left + taken)) == sorted(taken)


@pytest.mark.parametrize("model", ["", "./nowhere", "/no/such/folder", "a/b/c", "../prior", "plain"])
def test_a_name_that_is_no_folder_and_no_hub_name_is_refused(model):
    assert "prior.model" in refused(model)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port that nothing listens on
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("csd3d-tests/no-such-model")
    assert "point prior.model to a local folder" in message


def test_a_hub_that_never_answers_fails_fast(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.2)
        start = time.monotonic()
        assert "local folder" in refused("csd3d-tests/no-such-model")
        assert time.monotonic() - start < 8  # the hub library on its own takes 10 s and more


def test_a_hub_model_seen_before_loads_without_a_network(monkeypatch, edit_folder, tmp_path):
    """A cache laid out as the hub's library does: the copy from an earlier run is used when the hub is out of reach."""
    store = tmp_path / "models--someone--tiny"
    shutil.copytree(edit_folder, store / "snapshots/0123456789012345678901234567890123456789")
    (store / "refs").mkdir()
    (store / "refs/main").write_text("0123456789012345678901234567890123456789")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_prior(PriorConfig("someone/tiny", device="cpu"), "edit").num_train_timesteps == 1000
