"""The network of LMC-SDS: what it is before training, and its folder."""

import json

import pytest
import torch
from torch import nn

from csd3d.distillation.noise import add_noise, implied_noise
from csd3d.errors import InputError
from csd3d.priors.expected import ExpectedReconstruction, load_expected


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scrambled(**sizes):
    """A network none of whose layers is 0."""
    model, generator = ExpectedReconstruction(**sizes), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("t", [0, 20, 999, torch.tensor([1, 500, 980])])
def test_it_starts_as_the_identity_with_which_lmc_is_sds(t):
    z, model = normal(3, 4, 5, 7), ExpectedReconstruction(width=16, blocks=2)
    assert torch.equal(model(z, t), z)
    noise, eps = normal(3, 4, 5, 7, seed=1), normal(3, 4, 5, 7, seed=2)
    direction = eps - implied_noise(add_noise(z, noise, 0.3), model(z, t), 0.3)
    torch.testing.assert_close(direction, eps - noise, rtol=1e-5, atol=1e-5)


def test_every_element_has_its_own_time_and_every_time_its_own_answer():
    z, model = normal(3, 4, 6, 6), scrambled(width=16, blocks=2)
    together = model(z, torch.tensor([20, 500, 980]))
    apart = torch.cat([model(z[i : i + 1], t) for i, t in enumerate((20, 500, 980))])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert (model(z, 20) - model(z, 40)).abs().max() > 1e-4


def test_a_corner_of_a_latent_of_16_sees_the_opposite_one():
    z = normal(1, 4, 16, 16).requires_grad_(True)
    scrambled(width=8)(z, 500)[0, 0, 0, 0].backward()
    assert z.grad[0, :, 15, 15].abs().min() > 0


def test_it_learns_from_its_start():
    """Zeroed layers must not be dead ones: one step moves the last, the next every one."""
    model, z = ExpectedReconstruction(width=16, blocks=2), normal(3, 4, 5, 5)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(z, torch.tensor([20, 500, 980])) - 0.5 * z).square().mean().backward()
        optimiser.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_a_saved_network_comes_back_frozen(tmp_path):
    model, z = scrambled(channels=3, width=16, blocks=1), normal(2, 3, 4, 4)
    model.save_pretrained(tmp_path / "b")
    loaded = load_expected(tmp_path / "b")
    assert torch.equal(loaded(z, 77), model(z, 77))
    assert loaded.config == {"channels": 3, "width": 16, "blocks": 1}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def edited(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: None, "missing"),
        (lambda text: text[:20], "JSON"),
        (lambda text: "[1]", "must hold a JSON object"),
        (edited(_class_name="UNet2DModel"), "is not the config"),
        (edited(width=15), "width: 15"),
        (edited(width=10**9), "width"),
        (edited(blocks="2"), "blocks: '2'"),
        (edited(channels=True), "channels: True"),
        (edited(blocks=3), "does not fit"),
        (edited(channels=3), "does not fit"),
    ],
)
def test_broken_configs_are_named(tmp_path, spoil, message):
    ExpectedReconstruction(width=16, blocks=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = spoil(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_expected(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04pickle"])
def test_broken_weights_are_named(tmp_path, content):
    ExpectedReconstruction(width=16, blocks=2).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_expected(tmp_path)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
        ExpectedReconstruction(width=16, blocks=1)(normal(2, 3, 4, 4), 5)
    with pytest.raises(ValueError, match="even"):
        ExpectedReconstruction(width=15)
