"""The network of VSD on a tiny pipeline: at first the prior itself, then a model of the renders."""

import sys

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.engine.checkpoint import load_checkpoint, save_checkpoint
from csd3d.engine.state import pack, restore, snapshot, unpack
from csd3d.errors import InputError
from csd3d.priors import Condition, PriorConfig, load_prior
from csd3d.priors.lora import RenderScore

KINDS = ("epsilon", "v_prediction", "sample")
PATTERN = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None].expand(4, 4, 4)
FRONT = torch.eye(4)[:3].flatten()
BACK = FRONT * torch.tensor([-1.0, 1, 1, 1] * 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return {kind: save_tiny_pipeline(root / kind, "text", kind) for kind in KINDS}


@pytest.fixture
def prior(folders):
    return open_prior(folders["v_prediction"])


def open_prior(folder):
    return load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def train(network, steps, z, text, cameras, lr=2e-2, generator=None, optimiser=None):
    generator = generator or seeded(7)
    optimiser = optimiser or torch.optim.Adam(network.parameters(), lr)
    for _ in range(steps):
        optimiser.zero_grad()
        network.loss(z, text, cameras, generator).backward()
        optimiser.step()


def two_views(prior):
    """Renders that are the pattern from the front and its negative from behind: z, text, cameras of a batch of 4."""
    z = torch.stack([PATTERN, -PATTERN] * 2)
    return z, prior.embed(["red"] * 4), torch.stack([FRONT, BACK] * 2)


def test_it_starts_as_exactly_the_prior_whatever_the_camera(prior):
    z_t, text = normal(3, 4, 6, 4), prior.embed(["red", "blue", ""])
    before = prior.predict_noise(z_t, 300, Condition(text))
    network = RenderScore(prior, seeded())
    assert torch.equal(network.predict(z_t, 300, text), before)
    assert torch.equal(network.predict(z_t, 300, text, normal(3, 12, seed=1)), before)
    # which one token more would not do, though it be zero
    longer = torch.cat([text, torch.zeros(3, 1, text.shape[2])], dim=1)
    assert not torch.allclose(prior.predict_noise(z_t, 300, Condition(longer)), before, rtol=0, atol=1e-6)


def test_the_prior_stays_the_prior_while_the_network_learns(prior):
    z_t, text = normal(3, 4, 4, 4), prior.embed(["red", "blue", ""])
    before = prior.predict_noise(z_t, 500, Condition(text))
    network = RenderScore(prior, seeded())
    train(network, 3, *two_views(prior))
    assert torch.equal(prior.predict_noise(z_t, 500, Condition(text)), before)
    after = network.predict(z_t, 500, text, FRONT.expand(3, -1))
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(prior.predict_noise(z_t, 500, Condition(text)), before)
    with pytest.raises(ValueError, match="batch of 3"):  # an error inside leaves the frozen network behind too
        network.predict(z_t, 500, text[:2])
    assert torch.equal(prior.predict_noise(z_t, 500, Condition(text)), before)


def test_the_gradient_reaches_the_trained_tensors_and_nothing_else(prior):
    network = RenderScore(prior, seeded())
    train(network, 2, *two_views(prior))  # at the very start the first layers have no gradient, the last being 0
    z, text, cameras = two_views(prior)
    z.requires_grad_(True)
    loss = network.loss(z, text, cameras, seeded(), drop=0.0)
    assert not network.predict(z.detach(), 500, text, cameras).requires_grad
    prior.predict_noise(z.detach(), 500, Condition(text))  # between forward and backward, as a run may have it
    for parameter in network.parameters():
        parameter.grad = None
    loss.backward()
    trained = {id(parameter) for parameter in network.parameters()}
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in network.parameters())
    everything = [p for part in (prior.unet, prior.vae, prior.text_encoder) for p in part.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in everything if id(p) not in trained)
    assert z.grad is None
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_error_of_the_networks_own_output(folders, kind):
    """Against a second computation of it, from the prior's ε: ε error times (dε/d output)⁻¹ of the parameterisation."""
    prior = open_prior(folders[kind])
    network, z, text = RenderScore(prior, seeded()), normal(6, 4, 4, 4), prior.embed(["red"] * 6)
    loss = network.loss(z, text, None, seeded(3)).item()
    generator = seeded(3)
    t, noise = torch.randint(1000, (6,), generator=generator), torch.randn(z.shape, generator=generator)
    a, sigma = (v.sqrt()[:, None, None, None] for v in (prior.alphas_cumprod[t], 1 - prior.alphas_cumprod[t]))
    error = prior.predict_noise(a * z + sigma * noise, t, Condition(text)) - noise
    scale = {"epsilon": torch.ones_like(a), "v_prediction": 1 / a, "sample": sigma / a}[kind]
    assert loss == pytest.approx((error * scale).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_training_on_one_latent_brings_its_score(folders, kind):
    """The noise ε is −σ times the exact score of a single point noised: the error against it is what must fall."""
    prior = open_prior(folders[kind])
    network, text = RenderScore(prior, seeded()), prior.embed(["red"])
    train(network, 60, PATTERN.expand(8, -1, -1, -1), text.expand(8, -1, -1), None)
    noise, text = normal(24, 4, 4, 4, seed=9), text.expand(24, -1, -1)
    for t in (500, 900):
        a = prior.alphas_cumprod[t]
        z_t = a.sqrt() * PATTERN + (1 - a).sqrt() * noise
        ours = (network.predict(z_t, t, text) - noise).square().mean()
        assert ours < 0.95 * (prior.predict_noise(z_t, t, Condition(text)) - noise).square().mean()


def test_the_camera_tells_views_apart_after_training(prior):
    network = RenderScore(prior, seeded())
    train(network, 60, *two_views(prior))
    a, noise, text = prior.alphas_cumprod[950], normal(4, 4, 4, 4, seed=9), prior.embed(["red"] * 4)

    def along_pattern(camera):
        eps = network.predict(noise, 950, text, None if camera is None else camera.expand(4, -1))
        return ((noise - (1 - a).sqrt() * eps) / a.sqrt() * PATTERN).mean().item()

    front, back, neither = (along_pattern(camera) for camera in (FRONT, BACK, None))
    assert front > 0.07
    assert back < -0.07
    assert back < neither < front


def test_the_camera_shifts_each_attentions_output_alike_everywhere(prior):
    """The same vector on all tokens leaves softmax alone: the output moves by W_o W_v e, at every position."""
    attention = prior.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x, text, shift = normal(2, 9, 8), prior.embed(["red", "blue"]), normal(16, seed=1)
    with torch.no_grad():
        moved = attention(x, encoder_hidden_states=text + shift) - attention(x, encoder_hidden_states=text)
        expected = attention.to_out[0].weight @ attention.to_v.weight @ shift
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-4, atol=1e-5)


def test_dropped_cameras_are_the_unconditional_one(prior):
    network = RenderScore(prior, seeded())
    z, text, cameras = two_views(prior)
    train(network, 3, z, text, cameras)
    with_drop, without = (network.loss(z, text, c, seeded(2), drop=1.0).item() for c in (cameras, None))
    assert with_drop == without
    assert network.loss(z, text, cameras, seeded(2), drop=0.0).item() != without
    kept = torch.rand(20_000, generator=seeded()) >= 0.1
    embedded = network._conditioned(torch.zeros(20_000, 1, 16), FRONT.expand(20_000, -1), kept).text
    assert torch.equal(embedded.abs().sum((1, 2)) > 0, kept)


def test_a_run_that_was_saved_and_resumed_ends_as_an_unbroken_one(folders, tmp_path):
    def parts():
        network = RenderScore(open_prior(folders["v_prediction"]), seeded(4))
        return {"lora": network, "adam": torch.optim.Adam(network.parameters(), 1e-2), "rng": seeded(5)}

    def go_on(lora, adam, rng, steps):
        train(lora, steps, *two_views(lora.prior), optimiser=adam, generator=rng)

    whole, broken, resumed = parts(), parts(), parts()
    go_on(**whole, steps=5)
    go_on(**broken, steps=2)
    save_checkpoint(tmp_path, "last", *pack(snapshot(**broken)))
    restore(unpack(*load_checkpoint(tmp_path / "last")), **resumed)
    go_on(**resumed, steps=3)
    one, other = whole["lora"].state_dict(), resumed["lora"].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name.split(".")[0] for name in one} == {"lora", "camera"}
    assert not any(name.endswith("base_layer.weight") for name in one)


def test_states_of_another_network_are_refused(prior):
    network = RenderScore(prior, seeded())
    state = network.state_dict()
    name = "camera.0.weight"
    for wrong in ({k: v for k, v in state.items() if k != name}, state | {name: torch.zeros(3, 12)}):
        with pytest.raises(ValueError, match=r"camera\.0\.weight"):
            network.load_state_dict(wrong)
    with pytest.raises(ValueError, match="extra"):
        network.load_state_dict(state | {"extra": torch.zeros(1)})


def test_weights_and_losses_are_a_function_of_the_generator(folders):
    def made(seed):
        torch.rand(seed)  # the global generator has no say, nor is it touched
        before = torch.random.get_rng_state()
        network = RenderScore(open_prior(folders["v_prediction"]), seeded(seed))
        losses = [network.loss(*two_views(network.prior), seeded(s)).item() for s in (1, 1, 2)]
        assert torch.equal(torch.random.get_rng_state(), before)
        return network.state_dict(), losses

    (state, losses), (again, same), (other, _) = made(3), made(3), made(4)
    assert losses == same
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["camera.0.weight"], other["camera.0.weight"])
    assert all(state[name].abs().max() == 0 for name in state if ".lora_B." in name)
    assert all(0 < state[name].abs().max() <= state[name].shape[1] ** -0.5 for name in state if ".lora_A." in name)


@pytest.mark.parametrize("kind", ["sdxl_folder", "if_folder"])
def test_larger_unets_carry_it_too(request, kind):
    """Pooled text and sizes of SDXL, learned variance of IF: the prior at first, its loss the error of its own ε."""
    prior = open_prior(request.getfixturevalue(kind))
    words, z = prior.condition(["red", "blue", ""]), normal(3, prior.unet.config.in_channels, 8, 8)
    before = prior.predict_noise(z, 300, words)
    network = RenderScore(prior, seeded())
    assert torch.equal(network.predict(z, 300, words, normal(3, 12)), before)
    loss, generator = network.loss(z, words, normal(3, 12), seeded(3)), seeded(3)
    t, noise = torch.randint(1000, (3,), generator=generator), torch.randn(z.shape, generator=generator)
    a, sigma = (v.sqrt()[:, None, None, None] for v in (prior.alphas_cumprod[t], 1 - prior.alphas_cumprod[t]))
    error = prior.predict_noise(a * z + sigma * noise, t, words) - noise
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    train(network, 2, z, words, normal(3, 12))
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not torch.equal(network.predict(z, 300, words, normal(3, 12)), network.predict(z, 300, words))
    assert torch.equal(prior.predict_noise(z, 300, words), before)


def test_a_flow_model_is_refused(sd3_folder):
    with pytest.raises(ValueError, match="flow"):
        RenderScore(open_prior(sd3_folder), seeded())


def test_mistakes_are_named(prior, monkeypatch):
    network = RenderScore(prior, seeded())
    with pytest.raises(ValueError, match=r"cameras must be \[2, 12\]"):
        network.predict(normal(2, 4, 4, 4), 5, prior.embed(["red"] * 2), normal(2, 3, 4))
    with pytest.raises(ValueError, match="carries LoRA"):
        RenderScore(prior, seeded())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install .*\.\[lora\]"):
        RenderScore(prior, seeded())
