"""A family from outside: registered here, found by its config, and nothing in csd3d knows of it."""

import json

import pytest
import torch
from torch import nn

from csd3d import registry
from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import Defaults, Prior, PriorConfig, load_prior, scaled_linear_alphas
from csd3d.priors.autoencoder import PixelCodec
from csd3d.priors.text import TextEncoder


class Gain(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, z_t, return_dict=False):
        return (z_t * self.gain,)


class Toy:
    """ε = gain · z_t, its gain in the config."""

    parts = {}  # noqa: RUF012

    @staticmethod
    def matches(folder):
        return folder.config("transformer").get("_class_name") == "ToyTransformer"

    @staticmethod
    def load(folder, options):
        return Prior(
            PixelCodec(8),
            Gain(folder.config("transformer")["gain"]),
            TextEncoder(folder, {}, lambda parts, prompt: {"text": torch.zeros(1, 1)}, "toy", options.device),
            scaled_linear_alphas(),
            lambda network, z_t, t, alpha_bar, condition: network(z_t),
            defaults=Defaults(working_size=8),
            options=options,
        )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_entries", {kind: dict(found) for kind, found in registry._entries.items()})
    registry.names("family")
    registry.register("family", "toy", title="A toy")(Toy)
    (tmp_path / "transformer").mkdir()
    write(tmp_path, "transformer/config.json", _class_name="ToyTransformer", gain=0.5)
    return tmp_path


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_it_is_found_by_its_config(folder, monkeypatch):
    prior = load_prior(PriorConfig(str(folder), device="cpu"), "text")
    monkeypatch.setattr(prior.text, "_embed", lambda prompt: {"text": torch.zeros(1, 1)})  # it has no encoder to ask
    z = torch.randn(2, 3, 8, 8)
    assert torch.equal(prior.predict({"x": Query(z, 5, ("a", "b"))})["x"], 0.5 * z)


def test_a_family_can_be_named(folder):
    write(folder, "transformer/config.json", _class_name="Unheard", gain=0.5)
    with pytest.raises(InputError, match=r"a Unheard is not supported.*stable_diffusion \(.*toy \(A toy\)"):
        load_prior(PriorConfig(str(folder), device="cpu"))
    load_prior(PriorConfig(str(folder), device="cpu", family="toy"))
    with pytest.raises(InputError, match="did you mean toy"):
        load_prior(PriorConfig(str(folder), device="cpu", family="toys"))


def test_a_models_own_defaults_win(folder):
    assert load_prior(PriorConfig(str(folder), device="cpu")).defaults == Defaults(working_size=8)
    write(folder, "csd3d.json", defaults={"text_scale": 3, "working_size": 16})
    found = load_prior(PriorConfig(str(folder), device="cpu")).defaults
    assert found == Defaults(text_scale=3.0, working_size=16)
    assert isinstance(found.text_scale, float)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"defaults": {"text_scales": 3}}, r"defaults\.text_scales: .*did you mean defaults\.text_scale\?"),
        ({"defaults": {"text_scale": "3"}}, r'defaults\.text_scale: expected a number, got "3"'),
        ({"defaults": {"text_scale": True}}, "expected a number, got true"),
        ({"defaults": {"text_scale": -1}}, "expected a number from 0 to 1000000, got -1"),
        ({"defaults": {"working_size": 12.5}}, "expected a whole number, got 12.5"),
        ({"defaults": {"working_size": 0}}, r"defaults\.working_size: expected a whole number from 8 to 8192, got 0"),
        ({"defaults": {"t_max": 5}}, "expected a number from 0 to 1, got 5"),
        ({"default": {}}, r"default: there is no such key; did you mean defaults\?"),
        ({"knows": 5}, "knows: 5 is no ground truth"),
        ({"knows": "mars"}, "knows: 'mars' is no ground truth; leave it out, or give .*world"),
        ({"parts": {"transformer": "a\0b"}}, "only models in .*assets may share parts"),
        ({"defaults": [1]}, "must be an object"),
        ({"parts": {"transformer": "../other"}}, "only models in .*assets may share parts"),
        ({"parts": {"transformer": 1}}, "parts must say a folder"),
    ],
)
def test_mistakes_in_csd3d_json_are_named(folder, content, said):
    write(folder, "csd3d.json", **content)
    with pytest.raises(InputError, match=f"csd3d.json.*{said}") as error:
        load_prior(PriorConfig(str(folder), device="cpu"))
    assert "\n" not in str(error.value)
