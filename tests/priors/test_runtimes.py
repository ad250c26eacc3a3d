"""Runtimes: refused in one line, kept in the cache, equal to torch, and not used where a method changes the network."""

import functools
import logging
import os
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from csd3d.errors import InputError
from csd3d.files import whole_folder
from csd3d.identity import defining_values
from csd3d.priors import PriorConfig, load_prior, loading, runtimes
from csd3d.priors.attention import CrossFrameAttention, cross_frame_attention

PROMPTS = ["make it red", "", "a blue chair"]
CASES = [("copied", name) for name in ("edit_folder", "sdxl_folder", "if_folder", "sd3_folder")]
CASES += [("openvino", "if_folder"), ("openvino", "sdxl_folder"), ("onnxruntime", "sd3_folder")]


class Copied:
    """A runtime whose export is the network itself: every rule of csd3d holds for it, without another library."""

    packages = ("torch",)
    dtypes = ("auto", "float32")
    exports = 0
    of_one_size = False  # an export is right for the sizes that it was made with, and otherwise wrong

    @staticmethod
    def export(network, example, names, folder):
        Copied.exports += 1
        torch.save((network, [x.shape[1:] for x in example]), folder / "model.pt")

    def __init__(self, folder, dtype):
        self.network, self.sizes = torch.load(folder / "model.pt", weights_only=False)

    def __call__(self, inputs):
        answer = self.network(*inputs.values()).float()
        return answer if not self.of_one_size or self.sizes == [x.shape[1:] for x in inputs.values()] else answer * 1.1


def needs(runtime):
    """Skip without its packages; importing them here would let them report it."""
    if missing := [name for name in runtimes.BACKENDS[runtime].packages if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder for each test, and a runtime `copied` that needs no other library."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setitem(runtimes.BACKENDS, "copied", Copied)
    monkeypatch.setattr(runtimes, "RUNTIMES", (*runtimes.RUNTIMES, "copied"))
    monkeypatch.setattr(Copied, "exports", 0)
    monkeypatch.setattr(Copied, "of_one_size", False)
    return folder


def opened(folder, runtime="torch", **options):
    return load_prior(PriorConfig(str(folder), runtime=runtime, **{"device": "cpu"} | options))


def prediction(prior, rows=3, size=(32, 48), seed=1):
    z_t = torch.randn(rows, *prior.latent_shape(*size), generator=torch.Generator().manual_seed(seed))
    image = z_t.roll(1, 0) if prior.edits else None
    return prior.predict_noise(z_t, torch.arange(rows) * 100 + 300, prior.condition(PROMPTS[:rows], image))


def relative(answer, expected):
    return ((answer - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"runtime": "tensorrt"}, r"prior\.runtime: 'tensorrt' is none of torch, openvino, onnxruntime"),
        ({"runtime": "onnxruntime", "dtype": "bfloat16"}, r"prior\.dtype: 'bfloat16' is not for onnxruntime"),
        ({"runtime": "openvino", "dtype": "float16"}, r"prior\.dtype: 'float16' is not for openvino, which takes auto"),
        ({"runtime": "openvino", "attention": "sliced"}, r"prior\.attention: sliced is torch's"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused_when_the_config_is_read(keys, says):
    with pytest.raises(InputError, match=says):
        PriorConfig("model", **keys)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_missing_extra_is_told_with_its_command_before_the_model_is_looked_for(monkeypatch, runtime):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf'prior\.runtime: {runtime} needs {runtime}.*: pip install .*"\.\[{runtime}\]"'
    ):
        opened("/there/is/no/model", runtime)


def test_a_runtime_on_cuda_is_refused():
    with pytest.raises(InputError, match=r"prior\.runtime: copied computes on the CPU; set prior\.device=cpu"):
        runtimes.check_installed("copied", torch.device("cuda"))


def test_a_network_that_cannot_be_exported_is_told_when_the_prior_is_opened(edit_folder, cache, monkeypatch):
    def fail(*_):
        raise KeyError("aten::nothing")

    monkeypatch.setattr(Copied, "export", staticmethod(fail))
    with pytest.raises(InputError, match=r"copied cannot export a UNet2DConditionModel \(KeyError: 'aten::nothing'\)"):
        opened(edit_folder, "copied")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_runtime_that_computes_something_else_is_refused(edit_folder, monkeypatch):
    right = Copied.__call__
    monkeypatch.setattr(Copied, "__call__", lambda self, inputs: right(self, inputs) * 1.01)
    with pytest.raises(InputError, match=r"copied cannot compute this model \(relative difference to torch 1\.0e-02\)"):
        opened(edit_folder, "copied")


def test_a_full_disk_is_told_before_anything_is_written(edit_folder, cache, monkeypatch):
    monkeypatch.setattr(runtimes, "ROOM", 1 << 60)
    with pytest.raises(InputError, match=r"prior\.runtime: .*runtimes.*MiB are free there, \d+ MiB are needed"):
        opened(edit_folder, "copied")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("runtime", "name"), CASES)
def test_every_family_gives_the_noise_that_torch_gives(request, name, runtime, cache):
    needs(runtime)
    folder = request.getfixturevalue(name)
    prior, reference = opened(folder, runtime), opened(folder)
    for rows, size in ((3, (32, 48)), (1, (32, 48)), (2, (32, 32))):
        assert relative(prediction(prior, rows, size), prediction(reference, rows, size)) < 1e-5
    assert prior.unet_evaluations == 6  # trying it out does not count
    if "bfloat16" in runtimes.BACKENDS[runtime].dtypes:
        assert 1e-5 < relative(prediction(opened(folder, runtime, dtype="bfloat16")), prediction(reference)) < 3e-2
    # both would report their use to their makers; onnxruntime would keep its reports beside csd3d's cache
    assert [path.name for path in cache.iterdir()] == ["csd3d"]
    assert runtime != "openvino" or sys.modules["openvino_telemetry"] is None
    assert runtime != "onnxruntime" or os.environ["ORT_DISABLE_TELEMETRY"] == "1"


# ---------------------------------------------------------------------------------------------------------------- cache


def test_an_export_is_made_once_and_found_again(edit_folder, cache):
    first = prediction(opened(edit_folder, "copied"))
    assert Copied.exports == 1
    assert torch.equal(prediction(opened(edit_folder, "copied")), first)
    assert Copied.exports == 1
    (folder,) = (cache / "csd3d" / "runtimes").iterdir()
    assert folder.name.startswith("copied-")
    assert not list(cache.rglob(".*"))


def test_the_name_of_an_export_is_that_of_weights_and_versions(edit_folder, text_folder, monkeypatch):
    network = opened(edit_folder).unet
    name = runtimes.fingerprint(network, "copied")
    assert name == runtimes.fingerprint(opened(edit_folder).unet, "copied")
    assert name != runtimes.fingerprint(opened(text_folder).unet, "copied")
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert runtimes.fingerprint(network, "copied") != name
    network = opened(edit_folder).unet
    monkeypatch.setattr(runtimes, "_version", lambda package: "another")
    assert runtimes.fingerprint(network, "copied") != name


def test_a_damaged_export_is_made_again(edit_folder, cache, caplog):
    first = prediction(opened(edit_folder, "copied"))
    for file in cache.rglob("model.pt"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.WARNING, "csd3d"):
        assert torch.equal(prediction(opened(edit_folder, "copied")), first)
    assert "unreadable" in caplog.text
    assert Copied.exports == 2


def test_an_export_that_is_wrong_for_another_size_is_made_again_for_it(edit_folder, monkeypatch):
    monkeypatch.setattr(Copied, "of_one_size", True)
    prior, reference = opened(edit_folder, "copied"), opened(edit_folder)
    for size in ((32, 48), (48, 32), (32, 48)):
        assert relative(prediction(prior, 2, size), prediction(reference, 2, size)) < 1e-5
    assert Copied.exports == 3  # of the model's own size, and of these two


def test_a_folder_is_whole_or_not_there(tmp_path):
    half = whole_folder(tmp_path / "a", 0)
    (half.__enter__() / "file").write_text("half")
    assert not half.__exit__(RuntimeError, RuntimeError("stopped"), None)
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "a", 0) as partial:
        (partial / "file").write_text("first")
        with whole_folder(tmp_path / "a", 0) as other:
            (other / "file").write_text("faster")
    assert (tmp_path / "a" / "file").read_text() == "faster"
    left, young = tmp_path / ".x.partial", tmp_path / ".y.partial"
    left.mkdir()
    young.mkdir()
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    with whole_folder(tmp_path / "b", 0):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".y.partial", "a", "b"]


# ------------------------------------------------------------------------------------------------------- back to torch


def in_torch(prior, monkeypatch):
    """A list that grows by one with every call of the prior's own network."""
    calls, forward = [], type(prior.unet).forward

    @functools.wraps(forward)
    def counted(network, *args, **options):
        calls.extend([1] if network is prior.unet else [])
        return forward(network, *args, **options)

    monkeypatch.setattr(type(prior.unet), "forward", counted)
    return calls


def test_torch_computes_what_a_method_changes(edit_folder, monkeypatch, caplog):
    prior, reference = opened(edit_folder, "copied"), opened(edit_folder)
    plain, calls = prediction(prior), in_torch(prior, monkeypatch)
    prediction(prior)
    assert not calls

    with torch.no_grad(), caplog.at_level(logging.INFO, "csd3d"):
        for _ in range(2):
            with cross_frame_attention(prior.unet, CrossFrameAttention(("anchor", "previous")), ""):
                assert not prior.exported.holds()
        assert prior.exported.holds()
    assert caplog.text.count("torch computes the noise while a method changes the network") == 1
    hook = prior.unet.mid_block.register_forward_hook(lambda module, inputs, output: output * 2)
    assert relative(prediction(prior), plain) > 1e-3
    assert calls
    hook.remove()
    assert torch.equal(prediction(prior), plain)
    assert relative(plain, prediction(reference)) < 1e-5


def test_lora_is_computed_by_torch_and_the_prior_beside_it_by_the_runtime(text_folder, monkeypatch):
    pytest.importorskip("peft")
    prior = opened(text_folder, "copied")
    plain = prediction(prior)
    network, calls = prior.lora(2, torch.Generator().manual_seed(0)), in_torch(prior, monkeypatch)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(0.1)
    z_t = torch.randn(2, *prior.latent_shape(32, 48), generator=torch.Generator().manual_seed(1))
    other = network.predict(z_t, 300, ["a", "b"])
    assert len(calls) == 1
    assert relative(other, prior.predict_noise(z_t, 300, prior.condition(["a", "b"]))) > 1e-3
    assert torch.equal(prediction(prior), plain)
    assert len(calls) == 1
    network.loss(z_t, ["a", "b"], None, torch.Generator().manual_seed(2)).backward()
    assert any(parameter.grad is not None for parameter in network.parameters())


def test_a_checkpoint_belongs_to_a_runtime_and_its_version(monkeypatch):
    monkeypatch.setattr(runtimes, "_version", lambda package: "2026.4.1")
    assert "runtime" not in defining_values(PriorConfig("model"))  # as before there were others
    assert defining_values(PriorConfig("model", runtime="openvino"))["runtime"] == "openvino 2026.4.1"


# ------------------------------------------------------------------------------------------------------------ bfloat16


def test_the_vae_runs_in_bfloat16_with_the_noise_predictor(edit_folder):
    low, full = opened(edit_folder, dtype="bfloat16"), opened(edit_folder)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    z = full.encode(images)
    for answer, expected in [
        (low.encode(images), z),
        (low.encode_condition(images), full.encode_condition(images)),
        (low.decode(z), full.decode(z)),
        *zip(low.features(images), full.features(images), strict=True),
    ]:
        assert answer.dtype == torch.float32
        assert 1e-5 < relative(answer, expected) < 3e-2
    pixels = images.clone().requires_grad_()
    low.encode(pixels).square().sum().backward()
    assert pixels.grad.isfinite().all()


def test_bfloat16_without_its_instructions_is_said_in_one_line(edit_folder, monkeypatch, caplog):
    monkeypatch.setattr(loading, "has_bfloat16", lambda: False)
    with caplog.at_level(logging.WARNING, "csd3d"):
        prior = opened(edit_folder, dtype="bfloat16")
    assert [record.getMessage() for record in caplog.records] == [
        "prior.dtype: bfloat16: this processor has no instructions for it, float32 is faster"
    ]
    assert prior.options.dtype == torch.bfloat16
