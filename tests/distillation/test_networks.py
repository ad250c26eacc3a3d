"""VSD's network on a tiny UNet: it answers, learns after every step, and its state is all that a resumed run needs."""

import copy

import pytest
import torch
from asking import asking
from tiny_models import save_tiny_pipeline

from csd3d.distillation.methods.esd import ESD
from csd3d.distillation.methods.vsd import VSD
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.priors import PriorConfig, load_prior

TEXTS = ["a red chair", "a blue chair"]
CONFIG, PLAIN = DistillConfig(steps=10), VSD()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


Z, POSE = (torch.randn(2, *shape, generator=seeded(k)) for k, shape in enumerate([(4, 4, 4), (12,)]))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("vsd-prior"), "text")
    return load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")


@pytest.fixture(scope="module")
def networks(prior):
    return ESD().open(prior)  # a UNet carries one; VSD's is the same


def run(prior, networks, numbers, generator, method=PLAIN):
    found = []
    for number in numbers:
        predict, about = asking(prior, networks), {"prompts": TEXTS, "pose": POSE}
        arguments = prior.alphas_cumprod, generator, networks
        found.append(distill_step(predict, method, Z, number, CONFIG, *arguments, **about))
    return found


def test_it_starts_as_the_prior_and_takes_one_step_after_every_step(prior, networks):
    networks["lora"].reset(seeded(3))
    before, start = prior.unet_evaluations, copy.deepcopy(networks["lora"].state_dict()["score"])
    constant = DistillConfig(steps=10, guidance_scale=1.0)
    predict = asking(prior, networks)
    gradient, report = distill_step(
        predict, VSD(), Z, 0, constant, prior.alphas_cumprod, seeded(4), networks, prompts=TEXTS, pose=POSE
    )
    assert torch.equal(gradient, torch.zeros_like(Z))  # at ω = 1, ε_φ being the prior's own ε
    assert report["lora_loss"] > 0
    assert prior.unet_evaluations - before == 2 + 2 + 2  # text, ε_φ, and ε_φ with a graph
    after = networks["lora"].state_dict()["score"]
    assert {name for name in start if ".lora_B." in name} <= {n for n in start if not torch.equal(start[n], after[n])}
    assert {int(state["step"]) for state in networks["lora"].optimiser.state.values()} == {1}
    assert not prior.predict_noise(Z, 5, prior.condition(TEXTS)).requires_grad


def test_a_resumed_run_is_the_unbroken_one(prior, networks):
    network = networks["lora"]
    network.reset(seeded(3))
    unbroken, generator = run(prior, networks, range(4), seeded(4)), seeded(4)
    network.reset(seeded(3))
    run(prior, networks, range(2), generator)
    saved, state = copy.deepcopy(network.state_dict()), generator.get_state()
    network.reset(seeded(9))
    network.load_state_dict(saved)
    generator = torch.Generator()
    generator.set_state(state)
    for (gradient, report), (expected, was) in zip(run(prior, networks, (2, 3), generator), unbroken[2:], strict=True):
        assert torch.equal(gradient, expected)
        assert report == was


def test_without_a_camera_esd_sees_all_views(prior, networks):
    """A trained network tells cameras apart, and then ESD is not VSD."""
    networks["lora"].reset(seeded(3))
    run(prior, networks, range(3), seeded(4))
    found = [run(prior, networks, (3,), seeded(5), ESD(entropy=1.0))[0][0]]
    networks["lora"].reset(seeded(3))
    run(prior, networks, range(3), seeded(4))
    found.append(run(prior, networks, (3,), seeded(5))[0][0])
    assert not torch.allclose(*found)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="rank is 0, learning_rate"):
        VSD(rank=0)
