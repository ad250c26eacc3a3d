"""A whole model in one file: the same as its folder; and what is refused."""

import shutil

import huggingface_hub
import pytest
import torch
from family_checks import refused
from safetensors.torch import load_file, save_file
from single_files import save_single_file

from csd3d.priors import PriorConfig, hub, load_prior


def opened(model, require=None, **options):
    return load_prior(PriorConfig(str(model), **{"device": "cpu"} | options), require)


@pytest.fixture(scope="module")
def configs(edit_folder, tmp_path_factory):
    """The configs and tokenizers of the tiny InstructPix2Pix, without weights."""
    folder = shutil.copytree(edit_folder, tmp_path_factory.mktemp("single") / "configs")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def single(edit_folder, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("single") / "edit v1.safetensors", opened(edit_folder))


def answers(prior):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    image = torch.zeros_like(z) if prior.edits else None
    eps = prior.predict_noise(z, 400, prior.condition(["make it red", ""], image))
    return torch.cat([eps.flatten(), prior.decode(z).flatten(), prior.encode(prior.decode(z)).flatten()])


def test_a_single_file_is_the_model_that_its_folder_is(single, configs, edit_folder):
    prior, plain = opened(single, "edit", config=str(configs)), opened(edit_folder)
    torch.testing.assert_close(answers(prior), answers(plain), rtol=1e-5, atol=1e-6)
    assert "" in prior.files
    assert prior.files[""] == single
    later = opened(single, config=str(configs), drop_text_encoder=True)
    assert torch.equal(answers(later), answers(prior))


def test_the_files_own_channels_say_whether_it_edits(single, text_folder):
    """Configs of a text-to-image model serve an editing model made from it, such as InstructPix2Pix of SDXL."""
    assert opened(single, "edit", config=str(text_folder)).unet.config.in_channels == 8


def test_parts_that_the_file_lacks_come_from_beside_the_configs(single, configs, edit_folder, tmp_path):
    kept = {name: tensor for name, tensor in load_file(single).items() if not name.startswith("cond_stage_model")}
    save_file(kept, tmp_path / "without.safetensors")
    torch.testing.assert_close(
        answers(opened(tmp_path / "without.safetensors", config=str(edit_folder))), answers(opened(edit_folder))
    )
    assert "holds no text_encoder; give prior.config=FOLDER" in refused(
        tmp_path / "without.safetensors", config=str(configs)
    )


def test_a_file_that_lacks_a_tensor_is_refused(single, configs, tmp_path):
    tensors = load_file(single)
    lost = next(name for name in tensors if "time_embed.2.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "broken.safetensors")
    assert "broken.safetensors" in refused(tmp_path / "broken.safetensors", config=str(configs))


def test_without_the_hub_the_line_says_what_to_give(single, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port that nothing listens on
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    told = refused(single)
    assert told.startswith(f"prior.config: {single} is taken for a 'instruct-pix2pix' model")
    assert "timbrooks/instruct-pix2pix" in told
    assert "set prior.config to a diffusers folder" in told


@pytest.mark.parametrize("model", ["folder", "owner/name"])
def test_configs_for_a_model_that_has_its_own_are_refused(edit_folder, configs, model, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)  # told before the hub is asked
    model = str(edit_folder) if model == "folder" else model
    told = f"prior.config: is for a single file only, and prior.model {model!r} is none; leave it out"
    assert refused(model, config=str(configs)) == told


def test_what_is_no_whole_model_is_refused(configs, edit_folder, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"a pickle")
    assert "can run code" in refused(tmp_path / "model.ckpt", config=str(configs))
    (tmp_path / "cut.safetensors").write_bytes((2**60).to_bytes(8, "little"))
    assert "is no safetensors file" in refused(tmp_path / "cut.safetensors", config=str(configs))
    assert "make no model" in refused(edit_folder / "unet/diffusion_pytorch_model.safetensors", config=str(configs))
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    assert "a LoRA goes under prior.lora" in refused(tmp_path / "lora.safetensors", config=str(configs))
