"""`prior.lora`: what is read, what it does to the weights, and the one line that a LoRA for another model gets."""

import shutil

import pytest
import torch
from family_checks import refused
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_sdxl

from csd3d.priors import PriorConfig, load_prior

UNET = ["to_q", "to_k", "to_v", "to_out.0"]


def opened(folder, **options):
    return load_prior(PriorConfig(str(folder), **{"device": "cpu"} | options))


def save_lora(file, prior, parts=("unet", "text_encoder"), seed=0):
    """Saves a random LoRA of these parts as diffusers' training scripts do; returns it by name."""
    tensors = {}
    for part in parts:
        network = getattr(prior, part)
        targets = UNET if part == "unet" else ["q_proj", "out_proj", "fc1"]
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name="made")
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in get_peft_model_state_dict(network, adapter_name="made").items():
            tensors[f"{part}.{name}"] = torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, file)
    return tensors


@pytest.fixture(scope="module")
def lora(text_folder, tmp_path_factory):
    """(the LoRA's file, its tensors)."""
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return file, save_lora(file, opened(text_folder))


def prediction(prior):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return prior.predict_noise(z, 400, prior.condition(["make it red", ""]))


def test_a_lora_adds_its_product_to_the_weights(text_folder, lora):
    """W' = W + scale · B A, in the predictor and in the text encoder; nothing of peft is left."""
    file, tensors = lora
    plain, prior = opened(text_folder), opened(text_folder, lora=[f"{file}:0.5"])
    for part in ("unet", "text_encoder"):
        before, after = (dict(getattr(p, part).named_parameters()) for p in (plain, prior))
        assert before.keys() == after.keys()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        products = {
            name.removeprefix(f"{part}.").replace(".lora_A", ""): 0.5
            * tensors[name.replace("lora_A", "lora_B")]
            @ tensors[name]
            for name in tensors
            if name.startswith(f"{part}.") and "lora_A" in name
        }
        assert sorted(changed) == sorted(products)
        for name, product in products.items():
            torch.testing.assert_close(after[name], before[name] + product, rtol=1e-5, atol=1e-6)
        assert not getattr(getattr(prior, part), "peft_config", None)
    assert (prediction(prior) - prediction(plain)).abs().max() > 1e-3


def test_several_add_up_and_a_scale_of_one_is_the_default(text_folder, lora):
    once, twice = (
        opened(text_folder, lora=[f"{lora[0]}:1.0"]),
        opened(text_folder, lora=[f"{lora[0]}:0.25", f"{lora[0]}:.75"]),
    )
    torch.testing.assert_close(prediction(twice), prediction(once), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        prediction(opened(text_folder, lora=[str(lora[0].parent)])), prediction(once)
    )  # a folder with one


def test_kohyas_names_are_read(text_folder, lora, tmp_path):
    file, tensors = lora
    renamed = {}
    for name, tensor in tensors.items():
        part, _, inside = name.partition(".")
        module, _, kind = inside.removesuffix(".weight").rpartition(".")
        prefix = "lora_unet" if part == "unet" else "lora_te"
        module = module if part == "unet" else f"text_model.{module.removeprefix('text_model.')}"
        stem = f"{prefix}_{module.replace('.', '_')}"
        renamed[f"{stem}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(renamed, tmp_path / "kohya.safetensors")
    ours, theirs = (opened(text_folder, lora=[str(place)]) for place in (tmp_path / "kohya.safetensors", file))
    torch.testing.assert_close(prediction(ours), prediction(theirs), rtol=1e-4, atol=1e-5)


def test_vsds_own_lora_works_on_top(text_folder, lora):
    prior = opened(text_folder, lora=[str(lora[0])])
    score = prior.lora(2, torch.Generator().manual_seed(0))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score.predict(z, 400, ["red"]), prior.predict_noise(z, 400, prior.condition(["red"])))
    with torch.no_grad():
        score.parameters()[1].add_(1.0)
    assert (score.predict(z, 400, ["red"]) - prior.predict_noise(z, 400, prior.condition(["red"]))).abs().max() > 1e-3


def test_cached_embeddings_and_checkpoints_tell_loras_apart(text_folder, lora, tmp_path):
    cache = {"embedding_cache": str(tmp_path / "cache")}
    plain, prior = opened(text_folder, **cache), opened(text_folder, lora=[f"{lora[0]}:2"], **cache)
    assert not torch.equal(plain.embed(["red"]), prior.embed(["red"]))
    assert set(prior.files) - set(plain.files) == {"lora 0 x 2.0"}


def test_a_lora_for_another_model_is_refused(text_folder, edit_folder, lora, tmp_path, capfd):
    sdxl = opened(save_tiny_sdxl(tmp_path / "sdxl"))
    save_lora(tmp_path / "xl.safetensors", sdxl, ["unet"])
    capfd.readouterr()
    told = refused(text_folder, lora=[str(tmp_path / "xl.safetensors")])
    assert capfd.readouterr().err == ""  # the library's own report of it would come before our line
    assert "prior.lora" in told
    assert "xl.safetensors" in told
    state = {
        name.replace("unet.", "transformer.", 1): value for name, value in lora[1].items() if name.startswith("unet")
    }
    save_file(state, tmp_path / "dit.safetensors")
    assert "is for another model" in refused(text_folder, lora=[str(tmp_path / "dit.safetensors")])
    unknown = {name.replace("attn1", "attn9"): value for name, value in lora[1].items() if name.startswith("unet")}
    save_file(unknown, tmp_path / "unknown.safetensors")
    assert "prior.lora" in refused(text_folder, lora=[str(tmp_path / "unknown.safetensors")])
    assert opened(edit_folder, lora=[str(lora[0])]).edits  # of the same UNet, but for its first layer


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("nowhere.safetensors", "no .safetensors file"),
        (":0.5", "no .safetensors file"),
        ("loras/nowhere.safetensors:0.5", "no .safetensors file"),
        ("x:1000", "no PLACE or PLACE:SCALE"),
        ("", "no PLACE or PLACE:SCALE"),
    ],
)
def test_entries_are_checked(text_folder, entry, told):
    assert told in refused(text_folder, lora=[entry])


def test_what_is_no_lora_is_refused(text_folder, tmp_path):
    shutil.copy(text_folder / "unet/diffusion_pytorch_model.safetensors", tmp_path / "unet.safetensors")
    assert "holds no LoRA" in refused(text_folder, lora=[str(tmp_path / "unet.safetensors")])
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 40)
    assert "is no safetensors file" in refused(text_folder, lora=[str(tmp_path / "cut.safetensors")])
    torch.save(load_file(tmp_path / "unet.safetensors"), tmp_path / "lora.bin")
    assert "no .safetensors file" in refused(text_folder, lora=[str(tmp_path / "lora.bin")])
    assert "2 .safetensors files" in refused(text_folder, lora=[str(tmp_path)])
