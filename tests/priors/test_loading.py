"""Opening a prior: what loads, and the one line that each kind of broken input gets."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from family_checks import edit_json, refused
from safetensors.torch import load_file, save_file
from tiny_models import build_unet
from transformers import CLIPTextModel

from csd3d import registry
from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior, opening
from csd3d.priors.opening import SHIPPED
from csd3d.registry import register


@pytest.fixture
def folder(edit_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(edit_folder, tmp_path / "prior")


def test_loads_quietly_and_leaves_the_libraries_as_they_were(edit_folder, capfd):
    import transformers

    level = transformers.utils.logging.get_verbosity()
    load_prior(PriorConfig(str(edit_folder), device="cpu"), "edit")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_half_precision_weights_load_as_float32_under_either_name(folder):
    plain = load_prior(PriorConfig(str(folder), device="cpu"))
    for part, kind in {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}.items():
        model = kind.from_pretrained(folder / part).half()
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
        model.save_pretrained(folder / part, variant="fp16" if part == "unet" else None)
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    half = load_prior(PriorConfig(str(folder), device="cpu"))
    for part in ("vae", "unet", "text_encoder"):
        ours, theirs = (dict(getattr(p, part).named_parameters()) for p in (half, plain))
        for name, parameter in ours.items():
            assert torch.equal(parameter, theirs[name].half().float()), name


def test_a_folder_needs_no_model_index_and_runs_none_of_its_code(folder):
    (folder / "model_index.json").write_text('{"_class_name": ["pipeline", "Evil"], "unet": ["evil", "Evil"]}')
    (folder / "pipeline.py").write_text("raise SystemExit('ran')")
    load_prior(PriorConfig(str(folder), device="cpu"))


def test_a_schedule_saved_by_another_scheduler_is_read(folder):
    edit_json(folder / "scheduler/scheduler_config.json", _class_name="EulerAncestralDiscreteScheduler", beta_end=0.02)
    prior = load_prior(PriorConfig(str(folder), device="cpu"))
    beta = torch.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(prior.alphas_cumprod.double(), (1 - beta).cumprod(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "lost",
    ["vae", "unet/config.json", "text_encoder/model.safetensors", "tokenizer", "scheduler/scheduler_config.json"],
)
def test_a_missing_part_is_named(folder, lost):
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    message = refused(folder)
    assert str(folder) in message
    for name in lost.split("/"):
        assert name in message


def test_a_tokenizer_without_its_merges_is_refused(folder):
    for name in ("tokenizer.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    assert "merges.txt" in refused(folder)


def test_an_empty_folder_is_refused(tmp_path):
    assert "lacks" in refused(tmp_path)


def test_pickled_weights_are_refused(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    message = refused(folder)
    assert "diffusion_pytorch_model.bin" in message
    assert "safe_serialization=True" in message


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_truncated_weights_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(folder / part) in refused(folder)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    lost = sorted(tensors)[3]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    message = refused(folder)
    assert str(folder / part) in message
    assert lost in message


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_of_another_shape_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(name for name, tensor in tensors.items() if tensor.ndim > 1)[0]
    save_file(tensors | {name: tensors[name][:1].clone()}, weights, {"format": "pt"})
    assert str(folder / part) in refused(folder)


@pytest.mark.parametrize("path", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_malformed_json_is_named(folder, path, text):
    (folder / path).write_text(text)
    assert str(folder / path.split("/")[0]) in refused(folder)


def test_components_of_another_class_are_refused(folder):
    edit_json(folder / "vae/config.json", _class_name="AutoencoderTiny")
    assert "AutoencoderTiny" in refused(folder)


def test_the_unet_must_suit_the_job(edit_folder, text_folder):
    assert "is a text-to-image model (it has no `source`); this job needs an editing" in refused(text_folder, "edit")
    assert "is an editing model (it has a `source`); this job needs a text-to-image" in refused(edit_folder, "text")
    load_prior(PriorConfig(str(text_folder), device="cpu"), "text")


class Network(torch.nn.Module):
    """A noise predictor without a diffusers config."""

    def __init__(self):
        super().__init__()
        self.many = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(50))

    def forward(self, z_t, return_dict=False):
        return (z_t,)


def plugin_family(forward):
    """A family as a plugin's: Stable Diffusion's with another network and `forward`."""

    @register("family", "theirs", title="Their family")
    class Theirs:
        parts: ClassVar = {}
        source: ClassVar = None

        @staticmethod
        def matches(folder):
            return folder.has("unet")

        @staticmethod
        def load(folder, options):
            known = registry.get("family", "stable_diffusion").thing.load(folder, options)
            return replace(known, unet=Network(), forward=forward, source=Theirs.source)

    return Theirs


@pytest.fixture
def own_families(monkeypatch):
    registry.names("family")
    monkeypatch.setitem(registry._entries, "family", dict(registry._entries["family"]))


def twice(network, z_t, t, alpha_bar, condition):
    return network(z_t, return_dict=False)


def test_a_network_without_a_config_is_refused_by_its_family_alone(text_folder, own_families):
    family = plugin_family(twice)
    assert "'Their family', is a text-to-image model" in refused(text_folder, "edit", family="theirs")
    family.source = object()
    assert "'Their family', is an editing model" in refused(text_folder, "text", family="theirs")


def test_a_model_that_two_families_know_needs_a_choice(text_folder, own_families):
    plugin_family(twice)
    told = refused(text_folder)
    assert "stable_diffusion (Stable Diffusion 1.x" in told
    assert "theirs (Their family); choose one with prior.family=NAME" in told
    assert load_prior(PriorConfig(str(text_folder), device="cpu", family="theirs"), "text").family == "Their family"


@pytest.mark.parametrize("forward", [twice, partial(twice)])
def test_a_mistake_in_a_forward_is_a_line_that_names_the_family(text_folder, own_families, forward):
    plugin_family(forward)
    prior = load_prior(PriorConfig(str(text_folder), device="cpu", family="theirs"), "text")
    with pytest.raises(InputError) as error:
        prior.predict({"x": Query(torch.zeros(1, 4, 8, 8), 500, ("red",))})
    told = str(error.value)
    assert "Their family: forward failed at" in told
    assert f"{__file__}:{twice.__code__.co_firstlineno + 1} (TypeError: got multiple values" in told
    assert "Linear" not in told
    assert "\n" not in told


def test_a_unet_of_another_latent_space_is_refused(folder):
    build_unet(9).save_pretrained(folder / "unet")
    assert "9 channels in" in refused(folder)


def test_a_tokenizer_of_another_encoder_is_refused(folder):
    for name in ("tokenizer.json",):
        (folder / "tokenizer" / name).unlink()
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab | {"more": len(vocab)}))
    assert "tokens" in refused(folder)


def test_unsupported_schedules_are_refused(folder):
    edit_json(folder / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    assert "FlowMatchEulerDiscreteScheduler" in refused(folder)
    edit_json(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", prediction_type="velocity")
    assert "velocity" in refused(folder)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"dtype": "float8"}, "prior.dtype"),
        ({"dtype": "float16"}, "prior.dtype"),
        ({"device": "tpu"}, "prior.device"),
        ({"device": "cuda:63"}, "prior.device"),
        ({"micro_batch": 0}, "prior.micro_batch"),
    ],
)
def test_options_are_checked(edit_folder, options, key):
    assert key in refused(edit_folder, **options)


def test_shipped_models_share_their_autoencoder():
    """It was there twice; what is opened is the one of the editing model."""
    assert not (SHIPPED / "t2i/vae").exists()
    text, edit = (load_prior(PriorConfig(str(SHIPPED / name), device="cpu")) for name in ("t2i", "ip2p"))
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(text.decode(z), edit.decode(z))
    assert (text.defaults.t_min, text.defaults.t_max, text.defaults.working_size) == (0.2, 0.8, 128)
    assert (edit.defaults.text_scale, edit.defaults.image_scale, edit.defaults.working_size) == (1.5, 1.0, 128)


@pytest.mark.parametrize("place", ["../outside", "/etc", "vae/../../outside"])
def test_shared_parts_stay_in_the_shipped_folder(folder, tmp_path, monkeypatch, place):
    (tmp_path / "outside").mkdir()
    (folder / "csd3d.json").write_text(json.dumps({"parts": {"vae": place}}))
    assert "may share parts" in refused(folder)
    monkeypatch.setattr(opening, "SHIPPED", folder)  # shipped, but it points out of what is shipped
    assert "may share parts" in refused(folder)
    (folder / "csd3d.json").write_text(json.dumps({"parts": {"vae": "twin"}}))
    (folder / "vae").rename(folder / "twin")
    assert load_prior(PriorConfig(str(folder), device="cpu")).edits


def test_a_part_that_the_model_has_not_is_refused(folder):
    (folder / "csd3d.json").write_text('{"parts": {"junk": "../other"}}')
    assert "csd3d.json: parts.junk: the model has no such part; known: vae, unet, text_encoder, tok" in refused(folder)


@pytest.mark.parametrize("size", [-1, 10**9, "x"])
def test_pictures_of_a_size_that_cannot_be_are_refused_unless_csd3d_json_says_another(folder, size):
    edit_json(folder / "unet/config.json", sample_size=size)
    assert f"unet/config.json: sample_size: {size!r} makes no pictures" in refused(folder)
    (folder / "csd3d.json").write_text('{"defaults": {"working_size": 16}}')
    assert load_prior(PriorConfig(str(folder), device="cpu")).defaults.working_size == 16


def test_what_a_config_can_name_is_listed_without_the_heavy_libraries():
    code = (
        "import csd3d.metrics, csd3d.priors, csd3d.run, sys; from csd3d import registry\n"
        "for kind in registry.PACKAGES: registry.entries(kind)\n"
        "assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
