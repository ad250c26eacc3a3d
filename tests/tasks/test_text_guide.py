"""What a text job asks of its prior: every branch under its own text, and VSD's network trained beside it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.distillation import DistillConfig, SVGDConfig, distill_step
from csd3d.distillation.methods import METHODS, method_config
from csd3d.errors import InputError
from csd3d.priors import Condition, PriorConfig, load_prior, perceptual_distance
from csd3d.priors.base import scaled_linear_alphas
from csd3d.priors.expected import ExpectedReconstruction
from csd3d.tasks.text_guide import (
    Guide,
    GuideConfig,
    Networks,
    WordsConfig,
    branch_texts,
    check_features,
    embed_all,
    expand_methods,
    open_networks,
)

WORDS = WordsConfig(negative="ugly", good=", sharp", bad=", noisy", unwanted="blurry")
TEXTS = ["a red chair", "a blue chair"]


class TellingPrior:
    """ε(z_t; text) = z_t + the text's number, in the order in which the texts were first asked for."""

    def __init__(self):
        self.alphas_cumprod, self.device, self.unet_evaluations = scaled_linear_alphas(), torch.device("cpu"), 0
        self.numbers, self.asked = {}, []

    def condition(self, prompts):
        self.asked += prompts
        numbers = [self.numbers.setdefault(prompt, len(self.numbers) + 1) for prompt in prompts]
        return Condition(torch.tensor(numbers, dtype=torch.float32)[:, None, None])

    def predict_noise(self, z_t, t, condition):
        return z_t + condition.text[:, 0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_texts_of_every_branch():
    assert branch_texts(TEXTS, WORDS, [["side", "back"], ["top", "top"]], source="a chair") == {
        "null": ["ugly", "ugly"],
        "text": ["a red chair", "a blue chair"],
        "negative": ["blurry", "blurry"],
        "good": ["a red chair, sharp", "a blue chair, sharp"],
        "bad": ["a red chair, noisy", "a blue chair, noisy"],
        "source_null": ["ugly", "ugly"],
        "source_text": ["a chair", "a chair"],
        "away": ["side", "back"],
        "away2": ["top", "top"],
    }
    unsaid = branch_texts(TEXTS, WORDS)
    assert unsaid["source_text"] == unsaid["null"]
    assert unsaid.keys().isdisjoint({"away", "away2"})


@pytest.mark.parametrize(
    ("names", "settings", "asked"),
    [
        (["sds"], {}, ["ugly", *TEXTS]),
        (["sds"], {"perp_neg": True}, ["ugly", *TEXTS, "side", "back"]),
        (["csd", "nfsd+csd"], {}, ["ugly", *TEXTS, "blurry"]),
        (["vsd", "bridge"], {}, ["ugly", *TEXTS, *(t + w for w in (", sharp", ", noisy") for t in TEXTS)]),
        (["dds+csd"], {}, ["ugly", *TEXTS, "a chair"]),
        (["pds"], {"guidance_scale": 1.0}, ["ugly", *TEXTS, "a chair"]),
    ],
)
def test_exactly_the_texts_that_are_used_are_embedded_each_once(names, settings, asked):
    prior = TellingPrior()
    texts = branch_texts(TEXTS, WORDS, [["side", "back"], ["back", "back"]], source="a chair")
    embed_all(prior, texts, names, DistillConfig(**settings))
    assert prior.asked == asked


def test_every_branch_is_predicted_under_its_own_text():
    """Whatever the order, each particle under its own, and "lora" by VSD's network under the text and the cameras."""
    prior, z = TellingPrior(), 100 * torch.arange(8.0)[:, None]
    guide = Guide("sds", Networks(prior), DistillConfig(), GuideConfig(), seeded())
    guide.score = SimpleNamespace(predict=lambda z_t, t, condition, cameras: -z_t - condition.text[:, 0] - cameras)
    texts = branch_texts(TEXTS, WORDS, source="a chair")
    cameras = torch.tensor([[0.25], [0.5]])
    found = guide.predictor(texts, cameras)(z, 500, ("source_text", "lora", "text", "null"))
    number = {text: torch.tensor([float(k)]) for text, k in prior.numbers.items()}
    red, blue = (number[text] for text in TEXTS)
    chair, ugly = number["a chair"], number["ugly"]
    assert len(prior.numbers) == 4
    expected = [z[0] + chair, z[1] + chair, -z[2] - red - 0.25, -z[3] - blue - 0.5]
    assert torch.equal(found, torch.stack([*expected, z[4] + red, z[5] + blue, z[6] + ugly, z[7] + ugly]))


def test_branches_that_are_told_the_same_are_computed_once():
    """NFSD held away from nothing: its negative branch is the unconditional one. At a source's z̃_t it is another's."""
    prior, z, rows = TellingPrior(), 100 * torch.arange(8.0)[:, None], []
    z[4:6] = z[:2]  # "negative" is predicted at the z_t of "null"
    predict_noise = prior.predict_noise
    prior.predict_noise = lambda z_t, t, condition: rows.append(len(z_t)) or predict_noise(z_t, t, condition)
    guide = Guide("nfsd", Networks(prior), DistillConfig(), GuideConfig(), seeded())
    texts = branch_texts(TEXTS, WordsConfig(negative="", unwanted=""))
    found = guide.predictor(texts)(z, 500, ("null", "text", "negative", "source_null"))
    assert rows == [6]
    null, red, blue = (float(prior.numbers[text]) for text in ("", *TEXTS))
    assert torch.equal(found, z + torch.tensor([[null], [null], [red], [blue], [null], [null], [null], [null]]))


def test_all_is_every_method_of_a_text_and_with_a_source_every_method():
    known = {"csd", *METHODS}
    assert set(expand_methods(["all"])) == known - {"dds", "pds"}
    assert set(expand_methods(["all"], source=True)) == known
    assert expand_methods(["pds", "sds", "pds"]) == ["pds", "sds"]
    assert expand_methods(["lmc", "all"])[:3] == ["lmc", "sds", "csd"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")
    return load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")


@pytest.fixture(scope="module")
def networks(prior):
    return open_networks(prior, ["sds", "vsd+csd"], GuideConfig())  # a UNet carries one RenderScore


def trained(networks):
    return {name: value.clone() for name, value in networks.score.state_dict().items()}


def differing(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_vsds_network_takes_one_step_after_every_step(networks):
    """Of AdamW, on the denoising loss of the very renders, drawn from its generator behind the step's own."""
    config, distill = GuideConfig(), method_config("vsd", DistillConfig(steps=10))
    prior, z = networks.prior, torch.randn(2, 4, 4, 4, generator=seeded(1))
    texts, cameras = branch_texts(TEXTS, WORDS), torch.randn(2, 12, generator=seeded(2))

    guide = Guide("vsd", networks, distill, config, seeded(3))
    start, before = trained(networks), prior.unet_evaluations
    gradient, report = guide.step(z, texts, 0, seeded(4), cameras=cameras)
    after = trained(networks)
    assert prior.unet_evaluations - before == 2 * 3 + 2  # null, text and ε_φ; then ε_φ with a graph
    assert {int(state["step"]) for state in guide.optimiser.state.values()} == {1}
    assert {name for name in start if ".lora_B." in name} <= differing(start, after)

    guide, generator = Guide("vsd", networks, distill, config, seeded(3)), seeded(4)
    assert differing(start, trained(networks)) == set()  # a Guide starts the network anew
    assert not guide.optimiser.state
    predict = guide.predictor(texts, cameras)
    expected, _ = distill_step(predict, z, 0, distill, prior.alphas_cumprod, generator)
    assert torch.equal(gradient, expected)
    loss = networks.score.loss(z, prior.condition(TEXTS), cameras, generator)
    assert report["lora_loss"] == loss.item()
    optimiser = torch.optim.AdamW(networks.score.parameters(), config.lora.learning_rate, fused=True)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    assert differing(after, trained(networks)) == set()


def test_the_gradient_of_the_loss_is_the_steps_and_of_features_what_repels_the_images(prior):
    z = torch.randn(2, 4, 4, 4, generator=seeded(1)).requires_grad_()
    images = torch.rand(2, 3, 16, 16, generator=seeded(2)).requires_grad_()
    texts, found = branch_texts(TEXTS, WORDS), {}
    for space in ("clean", "features"):
        svgd = SVGDConfig(space=space, bandwidth=0.7, repulsion=3.0)
        guide = Guide("csd", Networks(prior), method_config("csd", DistillConfig(svgd=svgd)), GuideConfig(), seeded())
        loss, report = guide.loss(z, lambda: images, texts, 0, seeded(4))
        found[space] = torch.autograd.grad(loss, [z, images], allow_unused=True)
    gradient, _ = Guide(
        "csd", Networks(prior), method_config("csd", DistillConfig(svgd=SVGDConfig(space="clean", bandwidth=0.7,
        repulsion=3.0))), GuideConfig(), seeded(),
    ).step(z, texts, 0, seeded(4))  # fmt: skip
    torch.testing.assert_close(found["clean"][0], gradient)
    assert found["clean"][1] is None
    one, two = (prior.features(images[i : i + 1]) for i in range(2))
    apart = perceptual_distance(one, [m.detach() for m in two]), perceptual_distance([m.detach() for m in one], two)
    sigma2 = 1 - prior.alphas_cumprod[int(report["t"])].item()
    count = sum(features.numel() for features in one)  # the kernel's distances are means
    energy = sum(3.0 * sigma2**0.5 / 2 * torch.exp(-0.7 * distance / count) for distance in apart)
    (expected,) = torch.autograd.grad(sigma2 * energy, images)  # w(t) = σ²
    assert expected.abs().max() > 1e-7
    torch.testing.assert_close(found["features"][1], expected, rtol=1e-3, atol=1e-9)


def test_a_prior_without_features_is_refused_for_them(prior):
    bare = SimpleNamespace(device="cpu", features=lambda images: prior_without_vae())
    config = DistillConfig(svgd=SVGDConfig(space="features"))
    with pytest.raises(InputError, match=r"distill\.svgd\.space is \"features\": a pixel-space prior has no VAE"):
        check_features(bare, config)
    check_features(bare, DistillConfig(svgd=SVGDConfig()))
    check_features(prior, config)


def prior_without_vae():
    raise ValueError("a pixel-space prior has no VAE")


def test_other_methods_leave_vsds_network_alone(networks):
    before, evaluations = trained(networks), networks.prior.unet_evaluations
    guide = Guide("csd", networks, method_config("csd", DistillConfig(steps=10)), GuideConfig(), seeded(9))
    _, report = guide.step(torch.randn(2, 4, 4, 4, generator=seeded(1)), branch_texts(TEXTS, WORDS), 0, seeded(4))
    assert guide.score is None
    assert "lora_loss" not in report
    assert differing(before, trained(networks)) == set()
    assert networks.prior.unet_evaluations - evaluations == 4


def test_lmcs_network_is_opened_and_asked(prior, tmp_path):
    """One that has learned nothing is b_ψ(z, t) = z, with which LMC-SDS is SDS."""
    ExpectedReconstruction(4, width=8, blocks=1).save_pretrained(tmp_path / "lmc")
    config = GuideConfig(expected=str(tmp_path / "lmc"))
    z, found = torch.randn(2, 4, 4, 4, generator=seeded(1)), []
    for name in ("lmc", "sds"):
        guide = Guide(
            name, open_networks(prior, [name], config), method_config(name, DistillConfig()), config, seeded()
        )
        found.append(guide.step(z, branch_texts(TEXTS, WORDS), 0, seeded(2))[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_said_with_the_method_that_wants_it(tmp_path):
    nowhere = GuideConfig(expected=str(tmp_path / "nowhere"))
    flow = SimpleNamespace(prediction_type="flow", device="cpu")
    assert open_networks(flow, ["sds", "dds"], nowhere) == Networks(flow)
    with pytest.raises(InputError, match=r"method lmc\+csd: guide\.expected: .*nowhere.*world\.train lmc"):
        open_networks(flow, ["sds", "lmc+csd"], nowhere)
    with pytest.raises(InputError, match=r"method vsd: .* needs a prior with a UNet"):
        open_networks(flow, ["vsd"], nowhere)
