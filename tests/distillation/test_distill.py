"""Distillation steps on an exact mixture prior: where particles end, and which method becomes which."""

import math
from dataclasses import replace

import pytest
import torch

from csd3d.distillation import SVGDConfig
from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.directions import pds, pds_coefficients
from csd3d.distillation.distill import (
    DistillConfig,
    Extras,
    branches,
    distill_step,
    feature_gradient,
    particle_noise,
    possible_branches,
)
from csd3d.distillation.guidance import cfg, perp_neg
from csd3d.distillation.methods import check_methods, method_config, method_names
from csd3d.distillation.noise import add_noise, draw_noise
from csd3d.distillation.schedules import scheduled_timestep
from csd3d.priors import Condition, GaussianMixturePrior

SECOND, THIRD = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
PROMPTS = {"text": SECOND, "good": SECOND, "bad": THIRD, "negative": THIRD, "source_text": THIRD}


class Prior:
    """predict() of a mixture in 2-D: "text" means its second mode, "source_text" its third, "null" all three."""

    def __init__(self, std: float = 0.2):
        means = torch.tensor([[0.0, 0.0], [1.5, -1.0], [-2.0, 0.5]], dtype=torch.float64)
        prompts = {name: torch.tensor(weights) for name, weights in PROMPTS.items()}
        self.mixture, self.std = GaussianMixturePrior(means, torch.full((3,), std), prompts=prompts), std
        self.alphas, self.target = self.mixture.alphas_cumprod, means[1]

    def __call__(self, z_stack, t, names):
        rows = len(z_stack) // len(names)
        text = self.mixture.embed([{"lora": "text"}.get(name, name) for name in names])
        return self.mixture.predict_noise(z_stack, t, Condition(text.repeat_interleave(rows, 0)))


def answering(prior, **answers):
    """predict() of `prior`, with branches predicted as others."""
    return lambda z_stack, t, names: prior(z_stack, t, tuple(answers.get(name, name) for name in names))


def particles(count=6, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descend(config, lr=0.1, seed=0, start=None, **options):
    prior, generator = Prior(), torch.Generator().manual_seed(seed)
    z = particles() if start is None else start
    for step in range(config.steps):
        gradient, _ = distill_step(prior, z, step, config, prior.alphas, generator, **options)
        z = z - lr * gradient
    return prior, z


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("weight", ["sigma2", "one"])
def test_sds_seeks_the_mode_of_the_prompt(noise, weight):
    prior, z = descend(DistillConfig(steps=600, guidance_scale=1.0, noise=noise, weight=weight), lr=0.05)
    torch.testing.assert_close(z.mean(0), prior.target, rtol=0, atol=0.15)


@pytest.mark.parametrize("method", ["sds", "vsd", "lmc", "bridge", "nfsd", "dds", "pds"])
def test_one_particle_with_svgd_is_the_method_alone(method):
    for step in (0, 9):  # both stages of bridge
        config = DistillConfig(method, steps=10)
        collaborative = DistillConfig(method, steps=10, svgd=SVGDConfig())
        found = []
        for settings in (config, collaborative):
            arguments = (Prior(), particles(1), step, settings, Prior().alphas, torch.Generator().manual_seed(step))
            found.append(distill_step(*arguments, Extras(expected=lambda z, t: z, source=particles(1, seed=1)))[0])
        assert torch.equal(*found)


def test_bridge_is_sds_before_its_switch_and_two_descriptions_from_there_on():
    prior, z = Prior(), particles()
    for step, same in ((4, True), (5, False)):
        steps = [DistillConfig(method, steps=10) for method in ("sds", "bridge")]
        g = [distill_step(prior, z, step, c, prior.alphas, torch.Generator().manual_seed(1))[0] for c in steps]
        assert torch.equal(*g) == same
    assert branches(DistillConfig("nfsd"), 0, 199) == ("null", "text")
    assert branches(DistillConfig("nfsd"), 0, 200) == ("null", "text", "negative")
    assert branches(steps[1], 4, 500) == ("null", "text")
    assert branches(steps[1], 5, 500) == ("good", "bad")
    assert possible_branches(steps[1]) == {"null", "text", "good", "bad"}
    assert possible_branches(DistillConfig("nfsd")) == {"null", "text", "negative"}
    assert possible_branches(DistillConfig("vsd", perp_neg=True)) == {"null", "text", "away", "away2"}


def test_vsd_with_a_perfect_network_of_the_renders_has_zero_direction():
    prior, z = Prior(), particles()
    config = DistillConfig("vsd", guidance_scale=1.0)  # "lora" answers as "text" does: the renders are samples
    gradient, _ = distill_step(prior, z, 0, config, prior.alphas, torch.Generator().manual_seed(0))
    assert torch.equal(gradient, torch.zeros_like(z))


def test_lmc_with_the_latent_itself_is_sds():
    prior, z, g = Prior(), particles(), []
    for method in ("sds", "lmc"):
        config, generator = DistillConfig(method, guidance_scale=3.0), torch.Generator().manual_seed(2)
        g.append(distill_step(prior, z, 0, config, prior.alphas, generator, Extras(expected=lambda z, t: z))[0])
    torch.testing.assert_close(*g, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="b_ψ"):
        distill_step(prior, z, 0, config, prior.alphas, torch.Generator())


def test_inversion_finds_the_noise_that_the_flow_of_a_gaussian_has():
    """On N(μ, s²) the flow keeps the quantile: z_t = √ᾱ μ + (z − μ)/s √(ᾱ s² + 1 − ᾱ)."""
    prior, z, t = Prior(), particles(), 700
    config = DistillConfig(noise="inverted", inversion_steps=700, inversion_scale=1.0, inversion_noise=0.0)
    eps = particle_noise(prior, z, t, config, prior.alphas, torch.Generator())
    a = prior.alphas[t].item()
    quantile = (z - prior.target) / prior.std
    expected = math.sqrt(a) * prior.target + quantile * math.sqrt(a * prior.std**2 + 1 - a)
    torch.testing.assert_close(add_noise(z, eps, a), expected, rtol=0.02, atol=0.01)


def test_sdi_with_exact_inversion_follows_ddim():
    """z − ẑ_0(z_t) at the inverted z_t is the rest of DDIM's way: a sample of the prior stays where it is at low t."""
    prior = Prior()
    z = prior.target + prior.std * particles()
    settings = {"steps": 1, "schedule": "annealed", "weight": "x0", "guidance_scale": 1.0, "t_min": 0.0}
    exact = {"noise": "inverted", "inversion_scale": 1.0, "inversion_noise": 0.0, "inversion_steps": 1000}
    for t_max in (0.05, 0.3, 0.7):
        config = DistillConfig(t_max=t_max, **settings, **exact)
        gradient, report = distill_step(prior, z, 0, config, prior.alphas, torch.Generator())
        a = prior.alphas[int(report["t"])].item()
        # ẑ_0 = μ + (z_t − √ᾱ μ) √ᾱ s²/v with v = ᾱ s² + 1 − ᾱ: shrunk towards the mean by √ᾱ s/√v
        shrunk = math.sqrt(a) * prior.std / math.sqrt(a * prior.std**2 + 1 - a)
        torch.testing.assert_close(gradient, (1 - shrunk) * (z - prior.target), rtol=0.05, atol=0.02)


def test_camera_noise_is_used_as_it_is_and_asked_for():
    prior, z = Prior(), particles()
    config = DistillConfig(noise="camera", guidance_scale=1.0, schedule="annealed", steps=2)
    eps = particles(seed=5)
    gradient, report = distill_step(prior, z, 0, config, prior.alphas, torch.Generator(), Extras(camera_noise=eps))
    a = prior.alphas[int(report["t"])].item()
    predicted = prior(add_noise(z, eps, a), int(report["t"]), ("text",))
    torch.testing.assert_close(gradient, (1 - a) * (predicted - eps))
    with pytest.raises(ValueError, match="camera_noise"):
        distill_step(prior, z, 0, config, prior.alphas, torch.Generator())


def test_timesteps_keep_to_their_ranges():
    generator = torch.Generator().manual_seed(0)
    staged = DistillConfig(steps=10, schedule="staged", t_min=0.1, t_max=0.9, t_late=0.3, switch=0.5)
    early = [scheduled_timestep(staged, 4, 1000, generator) for _ in range(300)]
    late = [scheduled_timestep(staged, 5, 1000, generator) for _ in range(300)]
    assert min(early) >= 100
    assert 850 < max(early) <= 900
    assert max(late) <= 300
    annealed = DistillConfig(steps=3, schedule="annealed", t_min=0.2, t_max=0.8)
    assert [scheduled_timestep(annealed, step, 1000, generator) for step in range(3)] == [800, 500, 200]
    assert ddim_timesteps(500, 5)[0] == 500


def test_guidance_goes_to_its_final_scale():
    """A step under the falling schedule is a step at the scale it has come to, and at 1 asks for the text alone."""
    falling = DistillConfig(steps=5, guidance_scale=7.0, guidance_final=1.0)
    assert [falling.guidance(step) for step in range(5)] == [7.0, 5.5, 4.0, 2.5, 1.0]
    prior, z = Prior(), particles()
    for step in range(5):
        asked = []

        def asking(z_stack, t, names, asked=asked):
            asked.append(names)
            return prior(z_stack, t, names)

        constant = DistillConfig(steps=5, guidance_scale=falling.guidance(step))
        found = [
            distill_step(asking, z, step, config, prior.alphas, torch.Generator().manual_seed(step))[0]
            for config in (falling, constant)
        ]
        assert torch.equal(*found)
        assert asked == [("null", "text") if step < 4 else ("text",)] * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "csd"}, "method"),
        ({"noise": "pink"}, "noise"),
        ({"t_min": 0.99}, "t_min"),
        ({"steps": 0}, "steps"),
        ({"method": "pds", "psi": -1.0}, "psi is -1.0: give a number of at least 0"),
        ({"method": "pds", "psi": math.inf}, "psi is inf"),
        ({"method": "pds", "perp_neg": True}, "perp_neg is for sds, vsd, lmc: with method pds"),
        ({"method": "dds", "noise": "inverted"}, "choose independent, shared or camera"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DistillConfig(**settings)


def test_particles_share_within_their_group_only():
    """Two groups at once are the two groups one by one, and groups of one are no collaboration."""
    prior, z = Prior(), particles(6)
    config = DistillConfig(guidance_scale=1.0, noise="shared", svgd=SVGDConfig())

    def step(z, groups, settings=config):
        extras = Extras(groups=groups)
        return distill_step(prior, z, 0, settings, prior.alphas, torch.Generator().manual_seed(4), extras)[0]

    groups = torch.tensor([0, 1, 0, 1, 1, 0])
    together = step(z, groups)
    for group in (0, 1):
        torch.testing.assert_close(together[groups == group], step(z[groups == group], None))
    alone = DistillConfig(guidance_scale=1.0, noise="shared")
    torch.testing.assert_close(step(z, torch.arange(6)), step(z, None, alone))


def test_perp_neg_takes_away_only_what_the_prompt_does_not_say():
    """A negative along the prompt changes nothing; one across it moves the guided prediction straight away from it."""
    null, text = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    along, across = torch.tensor([[5.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    weights = torch.tensor([[0.7, 0.5]])
    assert torch.equal(perp_neg(null, text, [along, along], weights, 4.0), torch.tensor([[8.0, 0.0]]))
    torch.testing.assert_close(perp_neg(null, text, [along, across], weights, 4.0), torch.tensor([[8.0, -2.0]]))
    assert torch.equal(perp_neg(null, text, [across, across], 0 * weights, 4.0), cfg(null, text, 4.0))


def test_perp_neg_without_weights_is_the_method_and_asks_for_them():
    prior, z = Prior(), particles()
    predict = answering(prior, away="bad", away2="null")
    plain, held = DistillConfig(), DistillConfig(perp_neg=True)
    steps = []
    for config, away in ((plain, None), (held, torch.zeros(6, 2)), (held, torch.ones(6, 2))):
        generator = torch.Generator().manual_seed(1)
        steps.append(distill_step(predict, z, 0, config, prior.alphas, generator, Extras(away=away))[0])
    torch.testing.assert_close(steps[0], steps[1])
    assert not torch.allclose(steps[0], steps[2])
    with pytest.raises(ValueError, match="away"):
        distill_step(predict, z, 0, held, prior.alphas, torch.Generator())
    with pytest.raises(ValueError, match="perp_neg"):
        DistillConfig("nfsd", perp_neg=True)


def test_names_make_methods():
    """The name csd is SDS that collaborates; +csd goes with any; a method's own settings win over the config's."""
    base = DistillConfig(schedule="uniform", svgd=SVGDConfig(bandwidth=0.5))
    assert method_config("sds", base).svgd is None
    assert method_config("csd", base) == method_config("sds+csd", base) == replace(base, method="sds")
    assert method_config("csd", DistillConfig()).svgd == SVGDConfig()
    sdi = method_config("sdi+csd", base)
    assert (sdi.noise, sdi.weight, sdi.schedule, sdi.svgd) == ("inverted", "x0", "annealed", base.svgd)
    assert method_config("pds+csd", base) == replace(base, method="pds")
    with pytest.raises(ValueError, match="choose one of"):
        method_config("sds+ism", base)


def test_what_edits_a_source_is_a_method_only_where_there_is_one():
    assert set(method_names(source=True)) - set(method_names()) == {"dds", "pds"}
    check_methods(["dds", "pds+csd", "sds"], DistillConfig(), source=True)
    with pytest.raises(
        ValueError, match=r"'pds\+csd' edits a source, and there is none: .*source\.image, or one of sds"
    ):
        check_methods(["sds", "pds+csd"], DistillConfig())
    with pytest.raises(ValueError, match="use task edit_scene"):
        check_methods(["csd_edit"], DistillConfig(), source=True)
    with pytest.raises(ValueError, match=r"'sdd': choose one of .* dds, pds"):
        check_methods(["sdd"], DistillConfig(), source=True)
    inverted = DistillConfig(noise="inverted")
    check_methods(["sds"], inverted, source=True)
    with pytest.raises(ValueError, match=r'"inverted".* dds needs'):
        check_methods(["sds", "dds"], inverted, source=True)


@pytest.mark.parametrize("method", ["dds", "pds"])
def test_the_source_is_asked_for_under_its_own_prompt_and_its_own_null(method):
    assert branches(DistillConfig(method), 0, 500) == ("null", "text", "source_null", "source_text")
    plain = DistillConfig(method, guidance_scale=1.0)
    assert branches(plain, 0, 500) == ("text", "source_text")
    assert possible_branches(plain) == {"null", "text", "source_text"}
    prior, z = Prior(), particles()
    for source, got in ((None, "nothing"), (z[:1], r"\(1, 2\)")):  # one row would be broadcast
        with pytest.raises(ValueError, match=rf"{method}: it needs source, latents \(6, 2\) to edit, got {got}"):
            distill_step(prior, z, 0, plain, prior.alphas, torch.Generator(), Extras(source=source))


@pytest.mark.parametrize("noise", ["independent", "shared", "camera"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("method", ["dds", "pds"])
def test_a_source_that_is_what_is_wanted_stays(method, scale, noise):
    """Exactly: both are noised alike."""
    prior, z = Prior(), particles()
    config = DistillConfig(method, guidance_scale=scale, noise=noise)
    extras = Extras(source=z.clone(), camera_noise=particles(seed=1))
    for predict, still in ((answering(prior, source_text="text"), True), (prior, False)):
        gradient, _ = distill_step(predict, z, 0, config, prior.alphas, torch.Generator().manual_seed(3), extras)
        assert torch.equal(gradient, torch.zeros_like(z)) == still


@pytest.mark.parametrize(("svgd", "steps"), [(None, 60), (SVGDConfig(repulsion=0.0), 600)])
def test_dds_takes_every_particle_from_the_sources_mode_as_far_as_to_the_targets(svgd, steps):
    """Of N(μ, s²), z̃ goes to z̃ + μ_target − μ_source, at every t: how it differs from its mode is kept."""
    prior = Prior()
    means = prior.mixture.means
    source = means[2] + prior.std * particles()
    config = DistillConfig("dds", steps, guidance_scale=1.0, weight="x0", noise="shared", svgd=svgd)
    _, z = descend(config, lr=1.0, start=source, extras=Extras(source=source))
    torch.testing.assert_close(z, source + means[1] - means[2], rtol=0, atol=1e-4)


def test_pds_is_dds_and_a_pull_to_the_source():
    prior, z, source = Prior(), particles(), particles(seed=1)

    def direction(method, psi=None):
        config = DistillConfig(method, weight="one", psi=psi)
        return distill_step(prior, z, 0, config, prior.alphas, torch.Generator().manual_seed(0), Extras(source=source))

    assert torch.equal(direction("pds", 0.0)[0], direction("dds")[0])
    pull = direction("pds", 0.25)[0] - direction("dds")[0]
    torch.testing.assert_close(pull, 0.25 * (z - source), rtol=1e-9, atol=1e-12)


def test_pds_stops_where_the_pull_is_as_strong():
    """DDS of equal Gaussians is c (z − z̃ − shift), c = √(ᾱ(1−ᾱ))/(ᾱs² + 1 − ᾱ): so z − z̃ ends as shift c/(c + ψ)."""
    prior, source = Prior(), particles(seed=1)
    fixed = {"schedule": "annealed", "t_min": 0.4, "t_max": 0.4, "weight": "one", "guidance_scale": 1.0}
    _, z = descend(DistillConfig("pds", 200, psi=0.5, **fixed), lr=0.5, start=source, extras=Extras(source=source))
    a = prior.alphas[400].item()
    c = math.sqrt(a * (1 - a)) / (a * prior.std**2 + 1 - a)
    shift = prior.mixture.means[1] - prior.mixture.means[2]
    torch.testing.assert_close(z, source + shift * c / (c + 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0, 2, 101, 401, 901])
def test_pds_without_a_psi_is_the_authors_over_chi(t):
    prior, z, source = Prior(), particles(), particles(seed=1)
    settings = {"schedule": "annealed", "t_min": 0.0, "t_max": t / 1000, "weight": "one", "guidance_scale": 1.0}
    generator, extras = torch.Generator().manual_seed(0), Extras(source=source)
    gradient, report = distill_step(prior, z, 0, DistillConfig("pds", **settings), prior.alphas, generator, extras)
    eps, a = draw_noise(z, "independent", torch.Generator().manual_seed(0)), prior.alphas.tolist()
    answers = [prior(add_noise(x, eps, a[t]), t, (name,)) for x, name in ((z, "text"), (source, "source_text"))]
    at = max(t, 2)  # the first that has a t − 2
    psi, chi = pds_coefficients(a[at], a[at - 2], a[at] / a[at - 1])
    assert report["t"] == t
    torch.testing.assert_close(chi * gradient, pds(z, source, *answers, psi, chi), rtol=1e-9, atol=1e-9)


def test_features_stand_in_for_the_latents_in_the_kernel_within_each_group():
    """φ = z_t by hand: what z and φ descend is together what the "noisy" kernel gives, groups and weight included."""
    prior, z, groups = Prior(), particles(5, seed=3), torch.tensor([0, 1, 0, 1, 0])
    config = DistillConfig(steps=10, t_min=0.3, t_max=0.3, svgd=SVGDConfig(repulsion=2.0))
    extras = Extras(groups=groups)
    expected, report = distill_step(prior, z, 0, config, prior.alphas, seeded(), extras)
    t = int(report["t"])
    z_t = add_noise(z, draw_noise(z, "independent", after_time(config, prior)), prior.alphas[t].item())
    by_features = replace(config, svgd=SVGDConfig(repulsion=2.0, space="features"))
    shared, _ = distill_step(prior, z, 0, by_features, prior.alphas, seeded(), replace(extras, features=z_t))
    force = feature_gradient(z_t, t, by_features, prior.alphas, groups)
    assert force.abs().max() > 0.01
    torch.testing.assert_close(shared + force, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="needs features"):
        distill_step(prior, z, 0, by_features, prior.alphas, seeded(), extras)


def seeded():
    return torch.Generator().manual_seed(7)


def after_time(config, prior):
    """The generator as a step has it once its t is drawn."""
    generator = seeded()
    scheduled_timestep(config, 0, len(prior.alphas), generator)
    return generator
