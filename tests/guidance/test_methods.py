"""The methods of a text job: which a config names, what they are told, and their networks beside the prior."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_pipeline

from csd3d.config_files import CONFIGS
from csd3d.distillation.methods.bridge import Bridge
from csd3d.distillation.methods.lmc import LMC
from csd3d.distillation.methods.nfsd import NFSD
from csd3d.distillation.methods.vsd import VSD
from csd3d.distillation.named import names_for
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.distillation.svgd import SVGDConfig
from csd3d.engine.phase import Job
from csd3d.errors import InputError
from csd3d.guidance.methods import (
    UNSAID,
    Guide,
    check_features,
    embed_prompts,
    method_runs,
    open_networks,
    settle_distill,
)
from csd3d.priors import Defaults, PriorConfig, load_prior, perceptual_distance, perceptual_vectors
from csd3d.priors.expected import ExpectedReconstruction
from csd3d.priors.prior import Prior
from csd3d.run import read, unused
from csd3d.schema import Chosen

TEXTS = ["a red chair", "a blue chair"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def runs_of(*names, settings=None, have=(), **distill):
    return method_runs([Chosen(name) for name in names], settings or {}, DistillConfig(**distill), have)


# ------------------------------------------------------------------------------------------------- what a config names


def test_each_method_is_run_once_with_its_settings_and_svgd_where_its_name_says_so():
    settings = {"vsd": VSD(rank=2)}
    runs = runs_of("vsd", "csd", "vsd+csd", "csd", "fsd", settings=settings)
    assert list(runs) == ["vsd", "csd", "vsd+csd", "fsd"]
    assert runs["vsd"].method is runs["vsd+csd"].method is settings["vsd"]
    assert {name for name, run in runs.items() if run.distill.svgd is not None} == {"csd", "vsd+csd"}
    assert (runs["fsd"].distill.noise, runs["csd"].distill.noise) == ("camera", "independent")
    assert [run.title for run in runs.values()] == [
        "VSD (ProlificDreamer)", "CSD", "VSD (ProlificDreamer) + CSD", "FSD",
    ]  # fmt: skip
    job = Job(config=None, device=torch.device("cpu"))
    assert job.own_identity("vsd", runs["vsd"].method) == {"vsd.rank": 2, "vsd.learning_rate": 1e-3}


def test_settings_at_the_name_win_over_those_beside_it():
    chosen = [Chosen("vsd", VSD(rank=7)), Chosen("all")]
    runs = method_runs(chosen, {"vsd": VSD(rank=2), "esd": None}, DistillConfig())
    assert next(iter(runs)) == "vsd"
    assert runs["vsd"].method.rank == 7
    assert set(runs) == set(names_for())


def test_all_is_every_method_of_a_text_and_with_a_source_those_that_edit():
    plain, edit = runs_of("all"), runs_of("all", have=["source"])
    assert {"sds", "csd", "vsd", "ism", "rsd"} <= set(plain)
    assert set(edit) - set(plain) == {"dds", "pds", "dvrf", "dreamcatalyst"}
    with pytest.raises(ValueError, match=r"method 'pds' edits a source: give source\.image"):
        runs_of("pds")
    with pytest.raises(ValueError, match=r"method 'csd_edit' needs an editing model: use task edit_scene"):
        runs_of("csd_edit", have=["source"])


@pytest.mark.parametrize(
    ("svgd", "names", "said"),
    [
        (None, ["csd"], "svgd is null, but csd collaborates by it: .* name sds instead"),
        (None, ["vsd", "vsd+csd"], r"svgd is null, but vsd\+csd collaborates .* name vsd instead"),
        (None, ["all"], "svgd is null, but all collaborates"),
        (SVGDConfig(), ["sds"], r"svgd is set, but sds does not collaborate: write distill\.svgd=null, or name csd"),
        (SVGDConfig(), ["vsd"], r"or name vsd\+csd"),
    ],
)
def test_svgd_is_never_overwritten_without_a_word(svgd, names, said):
    with pytest.raises(ValueError, match=said):
        settle_distill(DistillConfig(svgd=svgd), names)


def test_a_space_that_a_method_does_not_have_is_refused_at_its_own_key():
    with pytest.raises(InputError, match=r"^command line: methods\.rsd\.space: expected one of features, coarse"):
        read(CONFIGS / "rsd.yaml", ["methods.rsd.space=bogus"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("compare=[dds]", r"sds.yaml \+ command line: method 'dds' edits a source"),
        ("method=csd+vsd", "^command line: method: .*csd stands by itself"),
    ],
)
def test_a_method_that_cannot_be_is_told_as_from_where_it_was_named(override, told):
    with pytest.raises(InputError, match=told):
        read(CONFIGS / "sds.yaml", [override])


def test_what_a_config_does_not_say_of_svgd_follows_from_its_methods():
    assert settle_distill(DistillConfig(svgd=UNSAID), ["sds", "vsd"]).svgd is None
    assert settle_distill(DistillConfig(svgd=UNSAID), ["sds", "csd"]).svgd is UNSAID
    assert settle_distill(DistillConfig(svgd=None), ["sds"]).svgd is None


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("cfd", ["distill.noise=independent"], [r"distill.noise is set, but has no effect with cfd \(surface\)"]),
        ("cfd", ["distill.schedule=annealed"], []),
        ("sdi", ["distill.noise=shared"], [r"distill.noise is set, but has no effect with sdi \(noise of its own\)"]),
        ("sds", ["compare=[cfd]", "distill.noise=shared"], [r"no effect with cfd \(surface\)"]),
        ("sds", ["distill.t_late=0.3"], [r"distill.t_late is set, but has no effect with sds \(schedule annealed\)"]),
        ("rsd", ["method=rsd+csd", "distill.svgd={space: clean}"], [r"distill.svgd.space is set, .*csd \(features\)"]),
        ("rsd", ["particles=1"], []),  # its views repel one another
        ("rsd", ["particles=1", "views_per_step=1"], ["rsd acts between particles, .*particles or views_per_step$"]),
        ("particle-guidance", ["particles=1", "share=assets"], ["particle_guidance acts .*; raise particles$"]),
        ("text-to-image", ["method=[csd,sds]", "particles=1"], ["csd acts between particles, .*: particles is 1"]),
    ],
)
def test_keys_that_a_run_sets_in_vain_are_told_of_and_each_once(name, overrides, told):
    config = read(CONFIGS / f"{name}.yaml", overrides)
    found = list(dict.fromkeys([*unused(config, overrides), *config.ignored]))
    assert len(found) == len(told)
    assert all(re.search(words, line) for words, line in zip(told, found, strict=True)), found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_config_that_ships_sets_a_key_in_vain(path):
    assert list(getattr(read(path, []), "ignored", [])) == []


class Embedding:
    """A prior that lists what it is asked to embed."""

    defaults = Defaults()

    def __init__(self):
        self.asked = []

    def condition(self, prompts):
        self.asked += prompts


@pytest.mark.parametrize(
    ("names", "distill", "asked"),
    [
        (["sds"], {}, ["ugly", *TEXTS]),
        (["csd", "nfsd+csd"], {}, ["ugly", *TEXTS, "blurry"]),
        (["vsd", "bridge"], {}, ["ugly", *TEXTS, *(text + words for words in ("!", "?") for text in TEXTS)]),
        (["sds", "lmc"], {"perp_neg": True}, ["ugly", *TEXTS]),
    ],
)
def test_exactly_the_texts_that_are_used_are_embedded_each_once(names, distill, asked):
    prior, settings = Embedding(), {"nfsd": NFSD(negative_prompt="blurry"), "bridge": Bridge(good="!", bad="?")}
    embed_prompts(prior, runs_of(*names, settings=settings, null_prompt="ugly", **distill), TEXTS)
    assert sorted(prior.asked) == sorted(asked)


def test_what_the_source_shows_is_embedded_for_those_that_edit():
    prior = Embedding()
    embed_prompts(prior, runs_of("dds+csd", have=["source"]), TEXTS, ["a chair"])
    assert sorted(prior.asked) == sorted(["", *TEXTS, "a chair"])


# ---------------------------------------------------------------------------------------------------- on a real prior


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")
    return load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")


@pytest.fixture(scope="module")
def vsd(prior):
    runs = runs_of("sds", "vsd", "vsd+csd", "esd", steps=10)
    return runs, open_networks(prior, runs)  # a UNet carries one LoRA


def trained(networks):
    return {name: value.clone() for name, value in networks["lora"].score.state_dict().items()}


def differing(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_methods_with_the_same_network_share_it_and_others_are_refused(prior, vsd):
    _, networks = vsd
    assert set(networks) == {"vsd", "vsd+csd", "esd"}
    assert networks["vsd"] is networks["vsd+csd"] is networks["esd"]
    with pytest.raises(InputError, match=r"method vsd: .*carries LoRA weights already"):
        open_networks(prior, runs_of("vsd", settings={"vsd": VSD(rank=1)}))


def test_vsds_network_takes_one_step_after_every_step(prior, vsd):
    """Of AdamW, on the denoising loss of the very renders, drawn from its generator behind the step's own."""
    runs, networks = vsd
    run, lora = runs["vsd"], networks["vsd"]
    z, pose = torch.randn(2, 4, 4, 4, generator=seeded(1)), torch.randn(2, 12, generator=seeded(2))

    guide = Guide(prior, run, lora, seeded(3))
    start, before = trained(lora), prior.unet_evaluations
    gradient, report = guide.step(z, 0, seeded(4), prompts=TEXTS, pose=pose)
    after = trained(lora)
    assert prior.unet_evaluations - before == 2 * 3 + 2  # null, text and ε_φ; then ε_φ with a graph
    assert {int(state["step"]) for state in lora["lora"].optimiser.state.values()} == {1}
    assert {name for name in start if ".lora_B." in name} <= differing(start, after)

    Guide(prior, run, lora, seeded(3))
    assert differing(start, trained(lora)) == set()  # a Guide starts the network anew
    assert not lora["lora"].optimiser.state
    generator = seeded(4)
    expected, _ = distill_step(
        lambda asked: prior.predict(asked, lora), run.method, z, 0, run.distill, prior.alphas_cumprod, generator,
        prompts=TEXTS, pose=pose,
    )  # fmt: skip
    assert torch.equal(gradient, expected)
    loss = lora["lora"].score.loss(z, prior.condition(TEXTS), pose, generator)
    assert report["lora_loss"] == loss.item()


def test_networks_are_part_of_a_checkpoint(prior, vsd):
    runs, networks = vsd
    lora = networks["vsd"]
    guide = Guide(prior, runs["vsd"], lora, seeded(3))
    z = torch.randn(2, 4, 4, 4, generator=seeded(1))
    guide.step(z, 0, seeded(4), prompts=TEXTS)
    state = {"lora": {"score": trained(lora), "optimiser": lora["lora"].optimiser.state_dict()}}
    first = guide.step(z, 1, seeded(5), prompts=TEXTS)[0]
    lora.load_state_dict(state)
    assert torch.equal(guide.step(z, 1, seeded(5), prompts=TEXTS)[0], first)


def test_other_methods_leave_vsds_network_alone(prior, vsd):
    runs, networks = vsd
    before, evaluations = trained(networks["vsd"]), prior.unet_evaluations
    guide = Guide(prior, runs["sds"], networks.get("sds"), seeded(9))
    _, report = guide.step(torch.randn(2, 4, 4, 4, generator=seeded(1)), 0, seeded(4), prompts=TEXTS)
    assert "lora_loss" not in report
    assert differing(before, trained(networks["vsd"])) == set()
    assert prior.unet_evaluations - evaluations == 4


def test_the_gradient_of_the_loss_is_the_steps_and_of_features_what_repels_the_images(prior):
    z = torch.randn(2, 4, 4, 4, generator=seeded(1)).requires_grad_()
    images = torch.rand(2, 3, 16, 16, generator=seeded(2)).requires_grad_()
    coordinates = perceptual_vectors(prior.features(images)).flatten(1).shape[1]  # which a kernel takes the mean over
    found, guides = {}, {}
    for space in ("clean", "features"):
        svgd = SVGDConfig(space=space, bandwidth=0.7 * coordinates, repulsion=3.0)
        guides[space] = Guide(prior, runs_of("csd", svgd=svgd)["csd"], None, seeded())
        loss, report = guides[space].loss(z, lambda: images, 0, seeded(4), prompts=TEXTS)
        found[space] = torch.autograd.grad(loss, [z, images], allow_unused=True)
    gradient, _ = guides["clean"].step(z, 0, seeded(4), prompts=TEXTS)
    torch.testing.assert_close(found["clean"][0], gradient)
    assert found["clean"][1] is None
    one, two = (prior.features(images[i : i + 1]) for i in range(2))
    apart = perceptual_distance(one, [m.detach() for m in two]), perceptual_distance([m.detach() for m in one], two)
    sigma2 = 1 - prior.alphas_cumprod[int(report["t"])].item()
    energy = sum(3.0 * sigma2**0.5 / 2 * torch.exp(-0.7 * distance) for distance in apart)
    (expected,) = torch.autograd.grad(sigma2 * energy, images)  # w(t) = σ²
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found["features"][1], expected, rtol=1e-3, atol=1e-7)


def test_a_prior_without_features_is_refused_for_them(prior):
    def features(images):
        raise ValueError("a pixel-space prior has no VAE")

    bare = SimpleNamespace(device="cpu", features=features)
    runs = runs_of("csd", svgd=SVGDConfig(space="features"))
    with pytest.raises(InputError, match=r"method csd: distill\.svgd\.space is \"features\": a pixel-space prior"):
        check_features(bare, runs)
    with pytest.raises(InputError, match=r"method rsd: .*a pixel-space prior"):
        check_features(bare, runs_of("rsd"))
    check_features(bare, runs_of("csd"))
    check_features(prior, runs)


def test_lmcs_network_is_opened_and_asked(prior, tmp_path):
    """One that has learned nothing is b_ψ(z, t) = z, with which LMC-SDS is SDS."""
    ExpectedReconstruction(4, width=8, blocks=1).save_pretrained(tmp_path / "lmc")
    z, found = torch.randn(2, 4, 4, 4, generator=seeded(1)), []
    runs = runs_of("lmc", "sds", settings={"lmc": LMC(folder=str(tmp_path / "lmc"))})
    networks = open_networks(prior, runs)
    assert networks["lmc"].state_dict() == {}  # nothing of it is trained
    for name, run in runs.items():
        guide = Guide(prior, run, networks.get(name), seeded())
        found.append(guide.step(z, 0, seeded(2), prompts=TEXTS)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_said_with_the_method_that_wants_it(tmp_path):
    flow = SimpleNamespace(prediction_type="flow", device="cpu")
    flow.lora, flow.expected = partial(Prior.lora, flow), partial(Prior.expected, flow)
    assert open_networks(flow, runs_of("sds", "dds", have=["source"])) == {}
    nowhere = {"lmc": LMC(folder=str(tmp_path / "nowhere"))}
    with pytest.raises(InputError, match=r"method lmc.*folder: .*nowhere.*train_shipped lmc"):
        open_networks(flow, runs_of("sds", "lmc+csd", settings=nowhere))
    with pytest.raises(InputError, match=r"method vsd: .* needs a prior with a UNet"):
        open_networks(flow, runs_of("vsd"))


@pytest.mark.parametrize("name", ["sds", "vsd", "sdi", "nfsd", "ism"])
def test_every_query_of_a_method_is_told_the_camera(name):
    seen = []

    def predict(asked, networks):
        seen.extend(asked.values())
        return {key: torch.zeros_like(query.z_t) for key, query in asked.items()}

    prior = SimpleNamespace(predict=predict, alphas_cumprod=torch.linspace(0.99, 0.01, 1000), defaults=Defaults())
    guide = Guide(prior, runs_of(name)[name], None, seeded())
    view, pose = torch.tensor([[10.0, 20.0, 4.0], [90.0, 30.0, 4.0]]), torch.zeros(2, 12)
    guide.step(torch.zeros(2, 4, 4, 4), 0, seeded(1), prompts=TEXTS, view=view, pose=pose)
    assert seen
    assert all(query.view is view and query.pose is pose for query in seen)
