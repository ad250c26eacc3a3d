"""Which weight files a network has, by variants and shards, and which are opened."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from family_checks import refused
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior, loading, opening
from csd3d.priors.quantised import lowered
from csd3d.priors.weights import find_weights, preferred, tensor_shapes, weight_sets

STEM = "diffusion_pytorch_model"
OPEN = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@pytest.fixture
def folder(edit_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(edit_folder, tmp_path / "prior v1.5 ü")


def rewrite(folder, variant, shard_size=None):
    """Saves every network again as that variant, in float16, as diffusers and transformers do."""
    for part, kind in OPEN.items():
        network = kind.from_pretrained(folder / part).half()
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        network.save_pretrained(folder / part, variant=variant, max_shard_size=shard_size or "5GB")


def opened_alike(folder, edit_folder):
    """Whether the model opens with the original's weights, rounded to float16."""
    ours, theirs = (load_prior(PriorConfig(str(place), device="cpu")) for place in (folder, edit_folder))
    for part in OPEN:
        known = dict(getattr(theirs, part).named_parameters())
        for name, value in getattr(ours, part).named_parameters():
            assert value.dtype == torch.float32
            assert torch.equal(value, known[name].half().float()), name


@pytest.mark.parametrize(("variant", "shard_size"), [("fp16", "20KB"), ("bf16", None), ("non_ema", "20KB")])
def test_every_variant_opens_whole_and_in_shards(folder, edit_folder, variant, shard_size):
    rewrite(folder, variant, shard_size)
    index = folder / f"unet/{STEM}.safetensors.index.{variant}.json"
    assert index.is_file() == (shard_size is not None)  # the name is diffusers' own
    opened_alike(folder, edit_folder)


def test_a_missing_shard_is_named_before_anything_is_opened(folder, monkeypatch):
    rewrite(folder, "fp16", "20KB")
    lost = sorted((folder / "unet").glob("*.safetensors"))[1]
    lost.unlink()
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the VAE was opened"))
    told = refused(folder)
    assert f"the shard {lost.name} is missing, of " in told
    (folder / f"unet/{STEM}.safetensors.index.fp16.json").unlink()
    assert "no index of the shards" in refused(folder)


def test_broken_weights_are_named_before_anything_is_opened(folder, monkeypatch):
    """Empty, cut off, with a header that lies, a folder; and a shard that another was copied over."""
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the VAE was opened"))
    (file,) = (folder / "unet").glob("*.safetensors")
    whole = file.read_bytes()
    for content in (b"", whole[:-100], (1 << 50).to_bytes(8, "little") + b"{}"):
        file.write_bytes(content)
        assert f"{file}: " in refused(folder)
    file.unlink()
    file.mkdir()
    assert f"{file}: cannot be read as safetensors" in refused(folder)
    file.rmdir()
    file.write_bytes(whole)


def test_a_shard_without_its_tensors_is_named(folder):
    rewrite(folder, None, "20KB")
    first, second = sorted((folder / "unet").glob("*-of-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    assert f"{second}: lacks " in refused(folder)


@pytest.mark.parametrize("listed", [{"weight_map": {"a": "../outside.safetensors"}}, {"weight_map": [1]}, {}])
def test_an_index_names_files_of_its_folder(tmp_path, listed):
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"weight_map|is no name of a file"):
        find_weights(tmp_path, STEM)


def test_the_half_variant_is_preferred_where_weights_are_kept_in_half():
    names = [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors", f"{STEM}.ema.safetensors"]
    sets = weight_sets(STEM, names)
    assert [preferred(sets, kept) for kept in ("float32", "float16", "bfloat16")] == [None, "fp16", "bf16"]
    assert preferred(weight_sets(STEM, names[2:]), "float32") == "bf16"
    assert preferred(weight_sets(STEM, names[3:]), "float16") == "ema"


def test_older_names_of_shards_are_known():
    names = [f"{STEM}-0000{i}-of-00003.fp16.safetensors" for i in (1, 3)]
    found = weight_sets(STEM, [*names, f"{STEM}.safetensors.fp16.index.json", "other.safetensors"])
    assert list(found) == ["fp16"]
    assert found["fp16"].files == [*names, f"{STEM}.safetensors.fp16.index.json"]
    assert found["fp16"].missing == f"{STEM}-00002-of-00003.fp16.safetensors"


def test_a_header_is_measured_before_it_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    for content in (
        b"",
        b"\xff" * 8,
        (10**12).to_bytes(8, "little") + b"{}",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is no safetensors file"):
            tensor_shapes(file)


def test_a_dropped_text_encoder_is_gone_before_the_predictor_is_opened(edit_folder):
    prior = load_prior(PriorConfig(str(edit_folder), device="cpu", drop_text_encoder=True, attention="sliced"))
    condition = prior.edit_conditions(["red"], torch.zeros(1, 4, 8, 8))["full"]
    assert "unet" not in vars(prior)
    assert prior.outline.config.cross_attention_dim == 16
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got = prior.predict_noise(z, 500, condition)
    assert not prior.text.parts
    assert "Sliced" in type(next(iter(prior.unet.attn_processors.values()))).__name__
    plain = load_prior(PriorConfig(str(edit_folder), device="cpu"))
    torch.testing.assert_close(got, plain.predict_noise(z, 500, condition), rtol=1e-4, atol=1e-5)


def test_a_predictor_that_is_opened_later_is_checked_at_once(folder):
    file = folder / f"unet/{STEM}.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    assert lost in refused(folder, drop_text_encoder=True)
    save_file(tensors | {lost: torch.zeros(1)}, file, {"format": "pt"})
    assert lost in refused(folder, drop_text_encoder=True)
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in refused(folder, drop_text_encoder=True)


def test_weights_kept_in_half_are_half_but_for_the_vae(edit_folder):
    prior = load_prior(PriorConfig(str(edit_folder), device="cpu", dtype="bfloat16", weights="bfloat16"))
    kinds = {part: next(getattr(prior, part).parameters()).dtype for part in OPEN}
    assert kinds == {"vae": torch.float32, "unet": torch.bfloat16, "text_encoder": torch.bfloat16}
    plain = load_prior(PriorConfig(str(edit_folder), device="cpu"))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got, wanted = (p.predict_noise(z, 500, p.condition(["red", ""], torch.zeros_like(z))) for p in (prior, plain))
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    score = prior.lora(2, torch.Generator().manual_seed(0))  # VSD trains on top of half weights
    score.prior.source = None
    loss = (
        score.prior.output(z, torch.tensor([5, 500]), prior.condition(["red", ""], torch.zeros_like(z))).square().mean()
    )
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": "float8"}, "prior.weights: 'float8' is none of"),
        ({"weights": "float16"}, "prior.weights: float16 needs prior.dtype=float16"),
        ({"offload": "disk"}, "prior.offload: 'disk' is none of none, model"),
        ({"quantise": "int3"}, "prior.quantise: 'int3' is none of none, bnb-int8"),
        (
            {"quantise": "bnb-nf4"},
            'prior.quantise: bnb-nf4 needs bitsandbytes: pip install -c constraints.txt -e ".[quantise]"',
        ),
        ({"quantise": "bnb-nf4", "offload": "model"}, "prior.offload: does not go with prior.quantise=bnb-nf4"),
        ({"runtime": "openvino", "compile": True}, "prior.compile: does not go with prior.runtime=openvino"),
    ],
)
def test_ways_of_keeping_weights_are_checked(edit_folder, options, told):
    assert told in refused(edit_folder, **options)


def test_the_predictor_alone_is_quantised_as_it_is_loaded(edit_folder, monkeypatch):
    """With a stub in place of torchao, which need not be installed."""
    given, load = [], UNet2DConditionModel.from_pretrained
    monkeypatch.setattr(opening, "quantisation", lambda *told: {"quantization_config": told})
    monkeypatch.setattr(loading, "check_quantise", lambda _: None)
    monkeypatch.setattr(
        UNet2DConditionModel,
        "from_pretrained",
        lambda path, quantization_config, **options: given.append(quantization_config) or load(path, **options),
    )
    load_prior(PriorConfig(str(edit_folder), device="cpu", quantise="torchao-int8"))
    assert given == [("torchao-int8", torch.float32, torch.device("cpu"))]


def test_torchao_predicts_nearly_the_same(edit_folder):
    pytest.importorskip("torchao")
    prior, plain = (
        load_prior(PriorConfig(str(edit_folder), device="cpu", quantise=way)) for way in ("torchao-int8", "none")
    )
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got, wanted = (p.predict_noise(z, 500, p.condition(["red", ""], torch.zeros_like(z))) for p in (prior, plain))
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.02


def test_times_keep_their_precision_in_a_quantised_network():
    inputs = {"sample": torch.ones(1, 2), "timestep": torch.tensor([999.0]), "ids": torch.ones(1, 2, dtype=torch.long)}
    kinds = {name: value.dtype for name, value in lowered(inputs, torch.bfloat16).items()}
    assert kinds == {"sample": torch.bfloat16, "timestep": torch.float32, "ids": torch.long}


def test_a_compiled_predictor_is_used_unless_a_method_changes_it(edit_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: lambda *args, **options: (network(*args, **options)[0] + 1,))
    prior, plain = (load_prior(PriorConfig(str(edit_folder), device="cpu", compile=on)) for on in (True, False))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = plain.condition(["red"], torch.zeros_like(z))
    torch.testing.assert_close(prior.predict_noise(z, 5, condition), plain.predict_noise(z, 5, condition) + 1)
    hook = prior.unet.mid_block.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(prior.predict_noise(z, 5, condition), plain.predict_noise(z, 5, condition))
    hook.remove()
    monkeypatch.setattr("csd3d.priors.compiled.shutil.which", lambda _: None)
    assert "prior.compile: needs g++ on the CPU" in refused(edit_folder, compile=True)
