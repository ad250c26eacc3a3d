"""The engine of a step on an exact mixture prior: where particles end, and what it asks, shares and checks."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from asking import asking

from csd3d.distillation import SVGDConfig
from csd3d.distillation.methods.bridge import Bridge
from csd3d.distillation.methods.dds import DDS
from csd3d.distillation.methods.ism import ISM
from csd3d.distillation.methods.lmc import LMC
from csd3d.distillation.methods.nfsd import NFSD
from csd3d.distillation.methods.rsd import RSD
from csd3d.distillation.methods.sdi import SDI
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.methods.vsd import VSD
from csd3d.distillation.named import create_method, method_title, named_config, names_for, parse_name
from csd3d.distillation.noise import add_noise, draw_noise
from csd3d.distillation.schedule import scheduled_timestep
from csd3d.distillation.step import (
    DistillConfig,
    configured,
    distill_step,
    feature_gradient,
    new_step,
    possible_prompts,
)
from csd3d.priors import GaussianMixturePrior

MEANS = torch.tensor([[0.0, 0.0], [1.5, -1.0], [-2.0, 0.5]], dtype=torch.float64)
WORDS = {"a duck": torch.tensor([0.0, 1.0, 0.0]), "a cat": torch.tensor([0.0, 0.0, 1.0])}


def mixture() -> GaussianMixturePrior:
    return GaussianMixturePrior(MEANS, torch.full((3,), 0.2), prompts=WORDS)


PRIOR = mixture()


def particles(count=6, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def step(method, config, z=None, number=0, generator=None, predict=None, **context):
    z, generator = particles() if z is None else z, seeded() if generator is None else generator
    context = {"prompts": "a duck", **context}
    return distill_step(predict or asking(PRIOR), method, z, number, config, PRIOR.alphas_cumprod, generator, **context)


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("weight", ["sigma2", "one"])
def test_sds_seeks_the_mode_of_the_prompt(noise, weight):
    config, z, generator = (
        DistillConfig(steps=600, guidance_scale=1.0, noise=noise, weight=weight),
        particles(),
        seeded(0),
    )
    for number in range(config.steps):
        z = z - 0.05 * step(SDS(), config, z, number, generator)[0]
    torch.testing.assert_close(z.mean(0), MEANS[1], rtol=0, atol=0.15)


def test_a_step_is_one_call_of_different_queries():
    """Branches that are told the same are one query: a source that shows nothing is told what the null branch is."""
    for method, context, rows in ((SDS(), {}, 2), (DDS(), {"source": particles(seed=1)}, 3), (NFSD("ugly"), {}, 3)):
        calls = []
        step(method, DistillConfig(t_min=0.3), predict=asking(PRIOR, calls=calls), **context)
        assert [len(call) for call in calls] == [rows]


def test_camera_noise_is_used_as_it_is_and_asked_for():
    config = DistillConfig(noise="camera", guidance_scale=1.0, schedule="annealed", steps=2)
    z, eps = particles(), particles(seed=5)
    gradient, report = step(SDS(), config, z, camera_noise=eps)
    a = PRIOR.alphas_cumprod[int(report["t"])].item()
    v = a * 0.2**2 + 1 - a
    predicted = math.sqrt(1 - a) * (add_noise(z, eps, a) - math.sqrt(a) * MEANS[1]) / v
    torch.testing.assert_close(gradient, (1 - a) * (predicted - eps), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="camera_noise"):
        step(SDS(), config, z)


def test_timesteps_keep_to_their_ranges():
    generator = seeded(0)
    staged = DistillConfig(steps=10, schedule="staged", t_min=0.1, t_max=0.9, t_late=0.3, switch=0.5)
    early = [scheduled_timestep(staged, 4, 1000, generator) for _ in range(300)]
    late = [scheduled_timestep(staged, 5, 1000, generator) for _ in range(300)]
    assert min(early) >= 100
    assert 850 < max(early) <= 900
    assert max(late) <= 300
    annealed = DistillConfig(steps=3, schedule="annealed", t_min=0.2, t_max=0.8)
    assert [scheduled_timestep(annealed, number, 1000, generator) for number in range(3)] == [800, 500, 200]


def test_logit_normal_times_are_most_often_half_way():
    """Quantiles of 1/(1 + e^−n), kept within the range."""
    config, generator = DistillConfig(schedule="logit_normal", t_min=0.2, t_max=0.9), seeded(0)
    drawn = torch.tensor([scheduled_timestep(config, 0, 1000, generator) for _ in range(4000)]).double()
    quantiles = drawn.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) / 1000
    expected = torch.sigmoid(torch.tensor([-0.6745, 0.0, 0.6745], dtype=torch.float64))
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.015)
    assert (drawn.min(), drawn.max()) == (200, 900)


def test_guidance_goes_to_its_final_scale():
    """A step under the falling schedule is a step at the scale it has come to, and at 1 asks for the text alone."""
    falling = DistillConfig(steps=5, guidance_scale=7.0, guidance_final=1.0)
    assert [falling.guidance(number) for number in range(5)] == [7.0, 5.5, 4.0, 2.5, 1.0]
    for number in range(5):
        calls, constant = [], DistillConfig(steps=5, guidance_scale=falling.guidance(number))
        found = [
            step(SDS(), config, number=number, predict=asking(PRIOR, calls=calls))[0] for config in (falling, constant)
        ]
        assert torch.equal(*found)
        assert [len(call) for call in calls] == [2 if number < 4 else 1] * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "pink"}, "noise is 'pink': choose one of independent, shared, camera"),
        ({"weight": "sigma"}, "weight is 'sigma'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"t_min": 0.99}, "t_min"),
        ({"steps": 0}, "steps is 0: give a whole number of at least 1"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DistillConfig(**settings)


def test_particles_share_within_their_group_only():
    """Two groups at once are the two groups one by one, and groups of one are no collaboration."""
    z, config = particles(6), DistillConfig(guidance_scale=1.0, noise="shared", svgd=SVGDConfig())
    groups = torch.tensor([0, 1, 0, 1, 1, 0])
    together, _ = step(SDS(), config, z, groups=groups)
    for group in (0, 1):
        torch.testing.assert_close(together[groups == group], step(SDS(), config, z[groups == group])[0])
    alone = replace(config, svgd=None)
    torch.testing.assert_close(step(SDS(), config, z, groups=torch.arange(6))[0], step(SDS(), alone, z)[0])


def test_perp_neg_without_weights_is_the_method_and_asks_for_them():
    plain, held = DistillConfig(), DistillConfig(perp_neg=True)
    found = [
        step(SDS(), config, away=[(["a cat"] * 6, weights), ([""] * 6, weights)])[0]
        for config, weights in ((plain, torch.ones(6)), (held, torch.zeros(6)), (held, torch.ones(6)))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    with pytest.raises(ValueError, match="perp_neg is on: it needs away"):
        step(SDS(), held)
    with pytest.raises(ValueError, match=r"perp_neg is for .* with nfsd set it to false"):
        step(NFSD(), held)


def test_a_gradient_that_is_not_finite_says_so():
    predict = lambda asked: {name: torch.full_like(query.z_t, math.nan) for name, query in asked.items()}  # noqa: E731
    assert step(SDS(), DistillConfig(), predict=predict)[1]["skipped"] == 1.0
    assert step(SDS(), DistillConfig())[1]["skipped"] == 0.0


def test_a_kernel_too_narrow_to_share_is_warned_about_once(caplog):
    config = DistillConfig(svgd=SVGDConfig(bandwidth=100.0))
    with caplog.at_level(logging.WARNING, "csd3d"):
        step(SDS(), config, number=1)
        step(SDS(), DistillConfig(svgd=SVGDConfig(bandwidth=0.1)))
        step(SDS(), replace(config, svgd=SVGDConfig(bandwidth=100.0, share=False)))
        assert not caplog.text
        step(SDS(), config)
    assert "particles hardly share" in caplog.text
    assert "lower distill.svgd.bandwidth, which is 100" in caplog.text


def test_a_methods_own_keys_win():
    config = configured(SDI(), DistillConfig(weight="one", schedule="uniform", t_max=0.5))
    assert (config.weight, config.schedule, config.t_max, config.t_min) == ("x0", "annealed", 0.98, 0.25)
    svgd = configured(RSD(repulsion=7.0), DistillConfig(svgd=SVGDConfig(bandwidth=0.5))).svgd
    assert svgd == SVGDConfig(bandwidth=0.5, share=False, repulsion=7.0, space="features")
    assert configured(SDS(), config) is config


def test_every_prompt_of_a_run_is_known_beforehand():
    config, texts = DistillConfig(steps=10, null_prompt="ugly"), ["a duck, front", "a duck, back"]
    assert possible_prompts(SDS(), config, texts) == ["ugly", *texts]
    assert set(possible_prompts(NFSD("blurry"), config, texts)) == {"ugly", "blurry", *texts}
    told = {text + words for text in texts for words in ("!", "?")}
    assert set(possible_prompts(Bridge(0.8, "!", "?"), config, texts)) == {"ugly", *texts, *told}
    assert set(possible_prompts(Bridge(0.0, "!", "?"), config, texts)) == {"ugly", *told}
    assert set(possible_prompts(DDS(), config, texts, ["a cat"])) == {"ugly", *texts, "a cat"}
    assert set(possible_prompts(DDS(), config, texts)) == {"ugly", *texts}
    for method in (SDI(), ISM(), VSD(), LMC()):
        assert set(possible_prompts(method, replace(config, guidance_scale=1.0), texts)) == {"ugly", *texts}
    away = possible_prompts(VSD(), replace(config, perp_neg=True), texts, away=["side"])
    assert set(away) == {"ugly", *texts, "side"}


class Counting:
    """A method with a network that learns: how its hooks are called."""

    def queries(self, step):
        return {"own": step.query(network="own")}

    def direction(self, eps, step):
        return eps["own"] - step.eps

    def after(self, step, networks):
        networks["own"].seen.append(step.z)
        return {"loss": float(len(networks["own"].seen))}


def test_networks_answer_and_learn_after_the_step():
    class Own:
        def __init__(self):
            self.seen = []

        def answer(self, query):
            return 2 * query.z_t

    own, z, config = Own(), particles(), DistillConfig(schedule="annealed", weight="one", noise="shared")
    networks = {"own": own}
    options = {"predict": asking(PRIOR, networks), "networks": networks}
    gradient, report = step(Counting(), config, z, **options)
    a, eps = PRIOR.alphas_cumprod[int(report["t"])].item(), draw_noise(z, "shared", seeded())
    torch.testing.assert_close(gradient, 2 * add_noise(z, eps, a) - eps)
    assert report["loss"] == 1.0
    assert torch.equal(own.seen[0], z)


# Names.


def test_names_make_methods():
    """The name csd is SDS that collaborates; +csd goes with any; a method's own settings win over the config's."""
    base = DistillConfig(schedule="uniform", svgd=SVGDConfig(bandwidth=0.5))
    config = lambda name, base=base: named_config(name, create_method(name), base)  # noqa: E731
    assert config("sds").svgd is None
    assert config("csd") == config("sds+csd") == base
    assert config("csd", DistillConfig()).svgd == SVGDConfig()
    assert config("sdi+csd").svgd == base.svgd
    assert config("rsd").svgd == replace(base.svgd, share=False, repulsion=100.0, space="features")
    assert parse_name("pds+csd") == ("pds", True)
    assert create_method("bridge", {"switch": 0.8}) == Bridge(switch=0.8)
    assert [method_title(name) for name in ("csd", "vsd+csd", "sdi")] == ["CSD", "VSD (ProlificDreamer) + CSD", "SDI"]
    with pytest.raises(ValueError, match=r"sds\+ism.*stands csd, as in sds\+csd"):
        parse_name("sds+ism")
    with pytest.raises(ValueError, match="unknown method 'clasifier'; did you mean classifier"):
        parse_name("clasifier")
    with pytest.raises(ValueError, match="method bridge has no key 'scale'; it has switch, good, bad"):
        create_method("bridge", {"scale": 2})


def test_a_job_is_offered_the_methods_it_can_run():
    plain = names_for()
    assert plain[:2] == ["sds", "csd"]
    assert set(names_for(["source"])) - set(plain) == {"dds", "pds", "dvrf", "dreamcatalyst"}
    assert set(names_for(["source", "image"])) - set(names_for(["source"])) == {"csd_edit"}


# Features.


def test_features_stand_in_for_the_latents_in_the_kernel_within_each_group():
    """φ = z_t by hand: what z and φ descend is together what the "noisy" kernel gives, groups and weight included."""
    z, groups = particles(5, seed=3), torch.tensor([0, 1, 0, 1, 0])
    config = DistillConfig(steps=10, t_min=0.3, t_max=0.3, svgd=SVGDConfig(repulsion=2.0))
    expected, report = step(SDS(), config, z, groups=groups)
    t, after = int(report["t"]), seeded()
    scheduled_timestep(config, 0, 1000, after)  # the generator as a step has it once its t is drawn
    z_t = add_noise(z, draw_noise(z, "independent", after), PRIOR.alphas_cumprod[t].item())
    by_features = replace(config, svgd=SVGDConfig(repulsion=2.0, space="features"))
    shared, _ = step(SDS(), by_features, z, groups=groups, features=z_t)
    force = feature_gradient(z_t, t, by_features, PRIOR.alphas_cumprod, groups)
    assert force.abs().max() > 0.01
    torch.testing.assert_close(shared + force, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="needs features"):
        step(SDS(), by_features, z)


def test_a_step_knows_its_own_latents_once():
    z = particles()
    told = replace(new_step(z, 300, 0, DistillConfig(), PRIOR.alphas_cumprod, seeded(), prompts="a", source=z), eps=z)
    z_t, rows = told.z_t, torch.tensor([0, 2])
    other = told.with_prompts(("b",) * 6, rows)
    assert other.z_t is z_t
    assert other.query().rows is rows
    assert other.query("").rows is None
    assert told.query("x").key == other.query("x").key
    assert told.query().key != other.query().key
    assert told.query(z_t=z, t=5).t == 5
    with pytest.raises(ValueError, match="6 latents and 2 prompts"):
        told.query(("a", "b"))
