"""Collaborative editing with Gaussian priors, for which the edited latents are known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csd3d.distillation import SVGDConfig
from csd3d.distillation.ddim import ddim_sample
from csd3d.distillation.edit_loop import (
    CollaborativeEditConfig,
    collaborative_edit,
    edit_step,
    inner_edit,
    start_latents,
)
from csd3d.distillation.method import Query
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.methods.dds import DDS
from csd3d.distillation.noise import draw_noise
from csd3d.distillation.schedule import scheduled_timestep

SHAPE = (4, 2, 3)  # channels, height, width of a toy latent


def schedule(T: int = 1000) -> Tensor:
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2, dim=0)


class GaussianBranches:
    """predict(queries) of N(mean, s²): without a picture one mean, with it a_i, under the instruction b; counts rows.

    The picture of particle i is filled with its number.
    """

    def __init__(self, N: int = 3, std: float = 0.1, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.null, self.b = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
        self.a = torch.randn(N, *SHAPE, generator=generator, dtype=torch.float64)
        self.alphas, self.std, self.calls, self.rows = schedule(), std, 0, 0

    @property
    def pictures(self) -> Tensor:
        return torch.arange(len(self.a))[:, None, None, None].expand(-1, *SHAPE)

    def mean(self, query: Query) -> Tensor:
        if query.prompts[0]:
            return self.b
        return self.null if query.image is None else self.a[query.image[:, 0, 0, 0]]

    def __call__(self, asked: dict[str, Query]) -> dict[str, Tensor]:
        self.calls, self.rows = self.calls + 1, self.rows + sum(len(query.z_t) for query in asked.values())
        return {name: self.answer(query) for name, query in asked.items()}

    def answer(self, query: Query) -> Tensor:
        alpha_bar = self.alphas[query.t].item()
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return math.sqrt(1 - alpha_bar) * (query.z_t - math.sqrt(alpha_bar) * self.mean(query)) / variance


METHOD = ("text_scale", "image_scale", "baseline")


def edit(prior: GaussianBranches, seed: int = 1, callback=None, **settings) -> Tensor:
    method = CSDEdit(**{key: settings.pop(key) for key in METHOD if key in settings})
    config = CollaborativeEditConfig(**{"lr": 1.0, "weight": "x0", "lr_decay": 1.0, "steps": 60, **settings})
    arguments = prior.a.clone(), prior.pictures, config, prior.alphas, torch.Generator().manual_seed(seed)
    return collaborative_edit(prior, method, *arguments, prompts="make it b", callback=callback)


@pytest.mark.parametrize("schedule", ["uniform", "annealed", "staged"])
@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("text_scale", [1.0, 3.0])
def test_gaussian_edit_lands_on_the_instruction(schedule, noise, text_scale):
    """Δ = 0 only at z = z̃ + ω_y (b − a): the noise cancels exactly against the source's, whatever it is."""
    prior = GaussianBranches()
    edited = edit(prior, schedule=schedule, noise=noise, text_scale=text_scale, image_scale=1.0, svgd=None)
    torch.testing.assert_close(edited, prior.a + text_scale * (prior.b - prior.a), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("baseline", ["image", "guided"])
def test_image_guidance_shifts_the_answer_unless_the_baseline_is_guided(baseline):
    """With the paper's baseline the answer carries (ω_s − 1)(a − null) besides; the authors' guided one cancels it."""
    prior = GaussianBranches()
    edited = edit(prior, text_scale=2.0, image_scale=1.5, baseline=baseline, svgd=None)
    excess = 0.5 * (prior.a - prior.null) if baseline == "image" else 0.0
    torch.testing.assert_close(edited, prior.a + 2 * (prior.b - prior.a) + excess, rtol=0.0, atol=1e-6)


def test_noise_for_a_baseline_is_sds():
    """The paper's ablation: one step in the latent's units lands on E[z | z_t] of the z_t that was drawn."""
    prior, eps = GaussianBranches(), draw_noise(GaussianBranches().a, "independent", torch.Generator().manual_seed(1))
    settings = {"steps": 1, "schedule": "annealed", "text_scale": 1.0, "image_scale": 1.0, "svgd": None}
    edited = edit(prior, baseline="noise", **settings)
    alpha_bar = prior.alphas[500].item()
    noisy = alpha_bar**0.5 * prior.a + (1 - alpha_bar) ** 0.5 * eps
    gain = alpha_bar**0.5 * prior.std**2 / (alpha_bar * prior.std**2 + 1 - alpha_bar)
    expected = prior.b + gain * (noisy - alpha_bar**0.5 * prior.b)
    torch.testing.assert_close(edited, expected, rtol=0.0, atol=1e-9)


def test_published_step_size_reaches_the_same_answer():
    prior = GaussianBranches()
    edited = edit(prior, steps=200, lr=2.0, lr_decay=0.9, weight="sigma2", text_scale=1.0, image_scale=1.0, svgd=None)
    torch.testing.assert_close(edited, prior.b.expand_as(edited), rtol=0.0, atol=1e-3)


def test_shared_scores_agree_on_a_common_shift():
    """Equal displacements have equal Δ, so a row-normalised kernel of any width leaves the answer where it was."""
    prior = GaussianBranches(N=5)
    prior.a[:] = prior.a[:1]
    svgd = SVGDConfig(repulsion=0.0, normalize="row")
    edited = edit(prior, noise="independent", text_scale=1.0, image_scale=1.0, svgd=svgd)
    torch.testing.assert_close(edited, prior.b.expand_as(edited), rtol=0.0, atol=1e-5)


def test_constant_kernel_moves_every_particle_by_the_mean_edit():
    """bandwidth 0 averages: each view keeps its own content and gets the mean of the N displacements."""
    prior = GaussianBranches(N=4)
    edited = edit(prior, text_scale=1.0, image_scale=1.0, svgd=SVGDConfig(bandwidth=0.0))
    torch.testing.assert_close(edited, prior.a + (prior.b - prior.a).mean(0), rtol=0.0, atol=1e-6)


def test_repulsion_keeps_edited_particles_apart():
    prior = GaussianBranches(N=4)
    together, apart = (
        edit(prior, noise="shared", text_scale=1.0, image_scale=1.0, svgd=SVGDConfig(repulsion=r, normalize="row"))
        for r in (0.0, 1.0)
    )
    assert torch.pdist(apart.flatten(1)).mean() > 1.5 * torch.pdist(together.flatten(1)).mean()


def test_an_instruction_without_effect_leaves_the_source_bit_for_bit():
    prior = GaussianBranches(N=1)
    prior.b = prior.a[0]
    assert torch.equal(edit(prior, text_scale=7.5, image_scale=1.0), prior.a)


def test_noise_start_reaches_the_same_answer():
    prior = GaussianBranches()
    start = start_latents(prior.a, CollaborativeEditConfig(init="noise"), torch.Generator().manual_seed(5))
    assert (start - prior.a).abs().mean() > 0.5
    edited = edit(prior, init="noise", text_scale=1.0, image_scale=1.0, svgd=None, schedule="annealed", t_max=0.98)
    torch.testing.assert_close(edited, prior.b.expand_as(edited), rtol=0.0, atol=1e-6)


def test_mini_batches_reach_every_particle():
    prior = GaussianBranches(N=6)
    edited = edit(prior, steps=200, batch=2, text_scale=1.0, image_scale=1.0, svgd=None)
    torch.testing.assert_close(edited, prior.b.expand_as(edited), rtol=0.0, atol=1e-4)
    assert prior.rows == 200 * 2 * 3


@pytest.mark.parametrize(
    ("settings", "rows"), [({}, 4), ({"image_scale": 1.0}, 3), ({"baseline": "guided"}, 5), ({"baseline": "noise"}, 3)]
)
def test_one_network_call_a_step_of_the_counted_rows(settings, rows):
    prior = GaussianBranches(N=3)
    edit(prior, steps=7, **settings)
    assert (prior.calls, prior.rows) == (7, 7 * 3 * rows)


def test_broken_off_and_resumed_is_the_unbroken_run():
    prior, config = GaussianBranches(), CollaborativeEditConfig(steps=12, batch=2)
    generator = torch.Generator().manual_seed(7)
    about = {"prompts": "make it b"}
    unbroken = collaborative_edit(prior, CSDEdit(), prior.a, prior.pictures, config, prior.alphas, generator, **about)
    generator = torch.Generator().manual_seed(7)
    z = start_latents(prior.a, config, generator)
    for step in range(5):
        z, _, _ = edit_step(
            prior, CSDEdit(), z, prior.a, prior.pictures, step, config, prior.alphas, generator, **about
        )
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    for step in range(5, 12):
        z = edit_step(prior, CSDEdit(), z, prior.a, prior.pictures, step, config, prior.alphas, resumed, **about)[0]
    assert torch.equal(z, unbroken)


def test_source_is_left_alone_and_callback_reports():
    prior, seen = GaussianBranches(), []
    source = prior.a.clone()
    edit(prior, steps=4, schedule="annealed", lr_decay=0.5, lr_decay_every=2, callback=lambda *a: seen.append(a))
    assert torch.equal(prior.a, source)
    assert [info["t"] for _, _, info in seen] == [500, 340, 180, 20]
    assert [info["lr"] for _, _, info in seen] == [1.0, 1.0, 0.5, 0.5]
    assert all(info["gradient_rms"] > 0 and info["kernel_mean"] > 0 and not info["skipped"] for _, _, info in seen)


def test_staged_schedule_narrows_at_the_switch():
    config = CollaborativeEditConfig(steps=100, schedule="staged", t_min=0.1, t_max=0.98, t_late=0.3, switch=0.4)
    generator = torch.Generator().manual_seed(8)
    drawn = [scheduled_timestep(config, step, 1000, generator) for step in range(100)]
    assert max(drawn[:40]) > 700
    assert max(drawn[40:]) <= 300
    assert min(drawn) >= 100


def test_non_finite_steps_are_skipped_then_refused(caplog):
    prior, calls = GaussianBranches(), []

    def broken(asked):
        calls.append(asked)
        return {name: eps * (math.nan if len(calls) in bad else 1.0) for name, eps in prior(asked).items()}

    config, skipped = CollaborativeEditConfig(steps=8), []
    bad = {2, 3, 6}
    arguments = CSDEdit(), prior.a, prior.pictures, config, prior.alphas
    note = lambda k, z, info: skipped.append(info["skipped"])  # noqa: E731
    z = collaborative_edit(broken, *arguments, torch.Generator(), prompts="make it b", callback=note)
    assert torch.isfinite(z).all()
    assert skipped == [0, 1, 1, 0, 0, 1, 0, 0]
    assert "not finite at step 1" in caplog.text
    calls.clear()
    bad = {2, 3, 4}
    with pytest.raises(FloatingPointError, match="3 steps in a row, at 3"):
        collaborative_edit(broken, *arguments, torch.Generator(), prompts="make it b")


@pytest.mark.parametrize("svgd", [None, SVGDConfig(normalize="row", repulsion=0.0)])
def test_any_method_that_edits_can_drive_the_loop(svgd):
    """DDS in mini-batches, each particle with a source prompt of its own: an edit from what it shows to b."""
    prior, calls = GaussianBranches(N=5), []
    about = {"prompts": "b", "source_prompts": [f"a{i}" for i in range(5)]}

    def predict(asked):
        calls.append({name: query.prompts for name, query in asked.items()})
        return prior({name: query for name, query in asked.items() if "source" not in name}) | {
            name: prior.answer(Query(query.z_t, query.t, ("",) * len(query.z_t), numbers(query.prompts)))
            for name, query in asked.items()
            if "source" in name
        }

    def numbers(prompts):
        return torch.tensor([int(prompt[1:]) for prompt in prompts])[:, None, None, None].expand(-1, *SHAPE)

    config = CollaborativeEditConfig(steps=120, batch=2, lr=0.3, lr_decay=1.0, svgd=svgd, guidance_scale=1.0)
    generator = torch.Generator().manual_seed(3)
    edited = collaborative_edit(predict, DDS(), prior.a, None, config, prior.alphas, generator, **about)
    torch.testing.assert_close(edited, prior.b.expand_as(edited), rtol=0.0, atol=0.05 if svgd is None else 1.0)
    assert all(len(call["0/source_text"]) == 2 and set(call["0/text"]) == {"b"} for call in calls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr_decay": 1.5}, "lr_decay is 1.5"),
        ({"t_max": 1.2}, "t_max is 1.2"),
        ({"t_min": 0.6}, "t_min is 0.6: give at most 0.5"),
        ({"schedule": "staged", "t_late": 0.01}, "t_min is 0.02: give at most 0.01"),
        ({"batch": 0}, "batch is 0"),
        ({"noise": "none"}, "noise is 'none': choose one of independent, shared, camera"),
        ({"weight": "sigma"}, "weight is 'sigma'"),
        ({"init": "zero"}, "init is 'zero'"),
        ({"steps": -1}, "steps is -1"),
        ({"noise": "camera"}, "noise is 'camera': choose one of independent, shared"),
        ({"svgd": SVGDConfig(space="coarse")}, "noisy, scaled or clean"),
        ({"svgd": SVGDConfig(space="features")}, "noisy, scaled or clean"),
    ],
)
def test_config_names_the_wrong_key(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        CollaborativeEditConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_package_imports_torch_only():
    """`distillation` is the layer of tensors: it knows the registry, the errors and how tensors are read, no diffusers.

    The networks that two methods have are opened by the prior, which they are handed.
    """
    import ast
    from pathlib import Path

    import csd3d.distillation

    allowed = {"torch", "math", "logging", "dataclasses", "collections", "itertools", "typing", "functools"}
    known = ("csd3d.distillation", "csd3d.registry", "csd3d.errors", "csd3d.schema", "csd3d.waits", "csd3d.optimisers")
    for file in Path(csd3d.distillation.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.Import | ast.ImportFrom) and names != ["csd3d"]:
                assert all(n.startswith(known) or n.split(".")[0] in allowed for n in names), file


@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_below_settle_an_edit_is_ddim(kept):
    """With the noise as baseline, z after a step is ẑ_0; steps that keep the implied noise are DDIM, Eq. 12."""
    prior = GaussianBranches()
    method = CSDEdit(3.0, 1.0, "noise")
    config = replace(inner_edit(), steps=6, t_max=0.8, t_min=0.02, settle=kept, svgd=None)
    seen = []

    def predict(asked):
        seen.append((next(iter(asked.values())).t, next(iter(asked.values())).z_t))
        return prior(asked)

    generator = torch.Generator().manual_seed(3)
    args = predict, method, prior.a, prior.pictures, config, prior.alphas, generator
    z = collaborative_edit(*args, prompts="0.3")
    settled = [k for k, (t, _) in enumerate(seen) if k and t < kept * len(prior.alphas)]
    assert len(settled) == {1.0: 5, 0.4: 3}[kept]
    first = settled[0] - 1

    def guided(z_t, t):
        pictures, words = prior.pictures, ("0.3",) * len(z_t)
        eps = prior({"image": Query(z_t, t, ("",) * len(z_t), pictures), "full": Query(z_t, t, words, pictures)})
        return eps["image"] + 3.0 * (eps["full"] - eps["image"])

    timesteps = [t for t, _ in seen[first:]]
    torch.testing.assert_close(z, ddim_sample(guided, seen[first][1], prior.alphas, timesteps))


@pytest.mark.parametrize("key", ["settle", "share_above"])
def test_particles_share_at_high_noise_only(key):
    """The kernel acts in the first of two steps."""
    prior = GaussianBranches()
    config = replace(inner_edit(), steps=2, t_max=0.8, t_min=0.1, svgd=SVGDConfig(bandwidth=0.0), **{key: 0.5})
    reports = []
    collaborative_edit(
        prior, CSDEdit(3.0, 1.0, "noise"), prior.a, prior.pictures, config, prior.alphas,
        torch.Generator().manual_seed(0), prompts="0.3", callback=lambda n, z, report: reports.append(report),
    )  # fmt: skip
    assert [report["together"] for report in reports] == [1.0, 0.0]


def test_settle_goes_with_all_particles_only():
    with pytest.raises(ValueError, match=r"settle is 0\.4 and batch 8"):
        CollaborativeEditConfig(settle=0.4, batch=8)


def test_each_step_leaves_z_adjusted():
    """What `adjust` returns is the next step's z, and the noise that is kept is that of the adjusted z."""
    prior, levels = GaussianBranches(), []
    config = replace(inner_edit(), steps=3, t_max=0.8, t_min=0.1, settle=1.0, svgd=None)

    def adjust(z, level):
        levels.append(level)
        return torch.zeros_like(z)

    args = prior, CSDEdit(3.0, 1.0, "noise"), prior.a, prior.pictures
    z, eps, _ = edit_step(
        *args[:2], prior.a, prior.a, prior.pictures, 0, config, prior.alphas, torch.Generator().manual_seed(0),
        prompts="0.3", adjust=adjust,
    )  # fmt: skip
    assert not z.any()
    drawn = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).double().expand_as(prior.a)
    alpha_bar = prior.alphas[800].item()
    torch.testing.assert_close(eps, (math.sqrt(alpha_bar / (1 - alpha_bar))) * prior.a + drawn)
    z = collaborative_edit(*args, config, prior.alphas, torch.Generator().manual_seed(0), prompts="0.3", adjust=adjust)
    assert not z.any()
    assert levels == pytest.approx([0.8, 0.8, 0.45, 0.1], abs=0.002)
