"""What saves memory or time changes no result: attention modes, a sliced VAE, freed encoders, embeddings on disk."""

import gc
import logging
import shutil
import weakref

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnAddedKVProcessor, SlicedAttnProcessor
from safetensors.torch import load_file, save_file

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.embedding_cache import _digest, read_embedding, write_embedding

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = ["make it red", ""]
FOLDERS = ["text_folder", "sdxl_folder", "if_folder", "sd3_folder"]


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder, **options):
    return load_prior(PriorConfig(str(folder), **{"device": "cpu"} | options))


def prediction(prior, prompts=PROMPTS):
    z = noise(len(prompts), *prior.latent_shape(32, 48))
    return prior.predict_noise(z, 400, prior.condition(prompts))


def forbid_encoders(prior, monkeypatch):
    """Makes any use of a text encoder of `prior` an error."""
    for part, network in prior.text.parts.items():
        if part.startswith("text_encoder"):
            monkeypatch.setattr(network, "forward", lambda *_, **__: pytest.fail("a text encoder was asked"))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("attention", ["sdpa", "sliced"])
def test_attention_modes_agree(request, name, attention):
    folder = request.getfixturevalue(name)
    if (name, attention) == ("sd3_folder", "sliced"):
        with pytest.raises(InputError, match=r"prior\.attention.*sd3"):
            opened(folder, attention=attention)
        return
    prior = opened(folder, attention=attention)
    torch.testing.assert_close(prediction(prior), prediction(opened(folder)), **TOLERANCE)
    kinds = {type(processor) for processor in prior.unet.attn_processors.values()}
    assert bool(kinds & {SlicedAttnProcessor, SlicedAttnAddedKVProcessor}) == (attention == "sliced")
    assert len(kinds) == 1 or name == "if_folder"


@pytest.mark.parametrize("name", ["text_folder", "sd3_folder"])
def test_a_sliced_vae_gives_the_same_one_image_at_a_time(request, name):
    folder = request.getfixturevalue(name)
    whole, sliced = opened(folder), opened(folder, vae_slicing=True)
    images, sizes = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    sliced.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sliced.vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    z = whole.encode(images)
    torch.testing.assert_close(sliced.encode(images), z, **TOLERANCE)
    torch.testing.assert_close(sliced.decode(z), whole.decode(z), **TOLERANCE)
    assert sizes == [1] * 6


@pytest.mark.parametrize("name", FOLDERS)
def test_a_dropped_text_encoder_is_freed_by_the_first_prediction(request, name):
    folder = request.getfixturevalue(name)
    prior = opened(folder, drop_text_encoder=True)
    encoders = [weakref.ref(p) for part, p in prior.text.parts.items() if part.startswith("text_encoder")]
    expected = prediction(opened(folder))
    torch.testing.assert_close(prediction(prior), expected, **TOLERANCE)
    gc.collect()
    assert all(encoder() is None for encoder in encoders)
    torch.testing.assert_close(prediction(prior), expected, **TOLERANCE)  # known prompts are still there
    with pytest.raises(InputError, match=r"prior\.drop_text_encoder.*'turn it blue'"):
        prior.embed(["turn it blue"])


def test_a_text_encoder_stays_unless_it_is_to_be_dropped(text_folder):
    prior = opened(text_folder)
    prediction(prior)
    prior.embed(["turn it blue"])
    prior.release_text_encoder()
    prior.embed(["turn it blue"])
    with pytest.raises(InputError, match="'new'"):
        prior.embed(["turn it blue", "new"])


@pytest.mark.parametrize("name", FOLDERS)
def test_embeddings_on_disk_spare_the_encoder(request, name, tmp_path, monkeypatch):
    folder = request.getfixturevalue(name)
    first = opened(folder, embedding_cache=str(tmp_path / "made" / "cache"))
    condition = first.condition(PROMPTS)
    files = list((tmp_path / "made" / "cache").iterdir())
    assert len(files) == 2
    assert all(file.suffix == ".safetensors" for file in files)
    second = opened(folder, embedding_cache=str(tmp_path / "made" / "cache"))
    forbid_encoders(second, monkeypatch)
    again = second.condition(PROMPTS)
    assert torch.equal(again.text, condition.text)
    assert (again.pooled is None) == (condition.pooled is None) == (name in ("text_folder", "if_folder"))
    if again.pooled is not None:
        assert torch.equal(again.pooled, condition.pooled)
    second.release_text_encoder()
    assert torch.equal(second.embed(PROMPTS[::-1]), condition.text.flip(0))
    third = opened(folder, embedding_cache=str(tmp_path / "made" / "cache"))
    forbid_encoders(third, monkeypatch)
    with pytest.raises(pytest.fail.Exception):  # guards the test: the encoder would have been noticed
        third.embed(["turn it blue"])


def test_models_do_not_share_embeddings(text_folder, tmp_path, caplog):
    """The same folder with other encoder weights, and with other tokenizer settings, reads none of the first's."""
    copy = shutil.copytree(text_folder, tmp_path / "copy")
    cache = {"embedding_cache": str(tmp_path / "cache")}
    original = opened(copy, **cache).embed(["red"])
    (weights,) = (copy / "text_encoder").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    changed = opened(copy, **cache).embed(["red"])
    assert (changed - original).abs().max() > 1e-3
    assert torch.equal(changed, opened(copy).embed(["red"]))
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    opened(copy, **cache).embed(["red"])
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not caplog.records


def spoil_truncate(file, other):
    file.write_bytes(file.read_bytes()[:-7])


def spoil_garbage(file, other):
    file.write_bytes(b"not safetensors at all")


def spoil_empty(file, other):
    file.write_bytes(b"")


def spoil_bit(file, other):
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))


def spoil_swap(file, other):
    shutil.copy(other, file)


def spoil_foreign(file, other):
    save_file({"text": torch.zeros(()), "extra": torch.zeros(2)}, file)


def forged(change):
    """Other tensors, with a right digest."""
    return lambda file, other: write_embedding(file, "red", change(load_file(file)))


def spoil_type(file, other):
    whole = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(whole, file, {"prompt": "red", "sha256": _digest(whole)})


FORGED = {
    "not finite": forged(lambda whole: whole | {"text": whole["text"] * torch.nan}),
    "narrow": forged(lambda whole: whole | {"text": whole["text"][:, 1:]}),
    "no rows": forged(lambda whole: whole | {"text": whole["text"][:0]}),
    "no text": forged(lambda whole: {"pooled": whole["pooled"]}),
    "no pooled text": forged(lambda whole: {"text": whole["text"]}),
    "flat": forged(lambda whole: whole | {"text": whole["text"].flatten()}),
}


@pytest.mark.parametrize(
    "spoil",
    [spoil_truncate, spoil_garbage, spoil_empty, spoil_bit, spoil_swap, spoil_foreign, spoil_type, *FORGED.values()],
    ids=["cut", "garbage", "empty", "a bit", "swapped", "foreign", "double", *FORGED],
)
def test_a_corrupt_file_is_embedded_again_and_repaired(sdxl_folder, tmp_path, caplog, spoil):
    cache = {"embedding_cache": str(tmp_path)}
    expected = opened(sdxl_folder, **cache).condition(["red"])
    (file,) = tmp_path.iterdir()
    opened(sdxl_folder, **cache).embed(["blue"])
    (other,) = set(tmp_path.iterdir()) - {file}
    spoil(file, other)
    with caplog.at_level(logging.WARNING, "csd3d"):
        found = opened(sdxl_folder, **cache).condition(["red"])
    assert torch.equal(found.text, expected.text)
    assert torch.equal(found.pooled, expected.pooled)
    assert [file.name in record.getMessage() for record in caplog.records] == [True]
    assert torch.equal(read_embedding(file, "red", bool)["text"], expected.text[0])
    assert set(tmp_path.iterdir()) == {file, other}


def test_a_cache_that_can_not_be_written_costs_a_warning_only(text_folder, tmp_path, caplog):
    prior = opened(text_folder, embedding_cache=str(tmp_path / "cache"))
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file meanwhile")
    with caplog.at_level(logging.WARNING, "csd3d"):
        assert torch.equal(prior.embed(["red"]), opened(text_folder).embed(["red"]))
    assert "not written" in caplog.records[0].getMessage()


def test_a_write_that_breaks_off_leaves_nothing(text_folder, tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    prior = opened(text_folder, embedding_cache=str(tmp_path))
    monkeypatch.setattr("csd3d.priors.embedding_cache.os.replace", fail)
    prior.embed(["red"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_no_warning(tmp_path, caplog):
    assert read_embedding(tmp_path / "none.safetensors", "red", bool) is None
    assert not caplog.records


def test_options_are_checked(text_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for options, key in (
        ({"attention": "flash"}, "prior.attention"),
        ({"embedding_cache": str(tmp_path / "file")}, "prior.embedding_cache"),
    ):
        with pytest.raises(InputError) as error:
            opened(text_folder, **options)
        assert key in str(error.value)
        assert "\n" not in str(error.value)
