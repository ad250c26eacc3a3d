"""Models whose configs or weights cannot be right: told in one line, with file and key, when they are opened."""

import shutil

import pytest
import torch
from family_checks import edit_json, refused
from safetensors.torch import load_file, save_file

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def folder(text_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(text_folder, tmp_path / "prior")


def edit_tensors(path, change):
    """Change the first matrix of a file; return its name."""
    tensors = load_file(path)
    name = min(name for name, tensor in tensors.items() if tensor.ndim > 1)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_class_name", "NopeScheduler", "'NopeScheduler' is no scheduler of diffusers"),
        ("_class_name", "AutoencoderKL", "is no scheduler of diffusers"),
        ("beta_start", "x", "expected a number above 0 and below 1, got 'x'"),
        ("beta_end", 5, "expected a number above 0 and below 1, got 5"),
        ("beta_schedule", "nope", "expected one of linear, scaled_linear, squaredcos_cap_v2, got 'nope'"),
        ("trained_betas", [1, 2, 3], r"expected null, or num_train_timesteps = \d+ numbers .* got \[1, 2, 3\]"),
        ("num_train_timesteps", 1, "expected a whole number from 10 to 100000, 1000 for most models, got 1"),
        ("num_train_timesteps", "x", "got 'x'"),
    ],
)
def test_keys_of_a_schedule_that_cannot_be_are_named(folder, key, value, said):
    file = folder / "scheduler/scheduler_config.json"
    edit_json(file, **{key: value})
    with pytest.raises(InputError, match=f"{file}: {key}: .*{said}|{file}: {key}: {said}"):
        load_prior(PriorConfig(str(folder), device="cpu"))


@pytest.mark.parametrize("key", ["layers_per_block", "transformer_layers_per_block"])
@pytest.mark.parametrize("value", [-1, [1, 10**7]])
def test_more_layers_than_tensors_are_refused_at_once(folder, key, value):
    edit_json(folder / "unet/config.json", **{key: value})
    assert f"unet/config.json: {key}: expected 0 to " in refused(folder)


@pytest.mark.parametrize(("file", "kind", "name"), [(UNET, torch.int8, "I8"), (TEXT, torch.bool, "BOOL")])
def test_whole_numbers_for_weights_are_refused(folder, file, kind, name):
    tensor = edit_tensors(folder / file, lambda x: x.to(kind))
    assert f"{folder / file}: tensor {tensor} holds {name} numbers" in refused(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    name = edit_tensors(folder / TEXT, lambda x: x[:1])
    assert f"text_encoder: {name} has the shape (1, " in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_of_a_tokenizer_is_named(folder, name):
    (folder / "tokenizer" / name).write_text("[]")
    assert refused(folder).startswith(f"{folder / 'tokenizer' / name}: must hold a JSON object")


@pytest.mark.parametrize(("key", "value"), [("norm_eps", "x"), ("freq_shift", "x")])
def test_a_config_that_only_fails_when_it_is_called_is_named(folder, key, value):
    edit_json(folder / "unet/config.json", **{key: value})
    assert f"{folder}/unet/config.json: this model cannot predict: " in refused(folder)


def test_a_vae_that_takes_no_picture_is_named(folder):
    edit_json(folder / "vae/config.json", scaling_factor="x")
    assert f"{folder}/vae/config.json: this VAE takes no picture (TypeError" in refused(folder)


@pytest.mark.parametrize(
    ("file", "value"),
    [(UNET, float("nan")), (TEXT, float("inf")), ("vae/diffusion_pytorch_model.safetensors", float("nan"))],
)
def test_weights_that_are_not_finite_are_named(folder, file, value):
    path = folder / file
    tensors = load_file(path)
    name = min(name for name, tensor in tensors.items() if name.endswith("weight") and "norm" in name)
    save_file(tensors | {name: tensors[name] * value}, path, {"format": "pt"})
    assert refused(folder) == f"{path}: tensor {name} holds values that are not finite"
