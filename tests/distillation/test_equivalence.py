"""The engine against the two steps that it replaces: the same G from the same generator, to float32's rounding."""

from dataclasses import replace

import pytest
import torch
from asking import asking
from correspondences import C, H, W, identity, random_correspondence

from csd3d.distillation import SVGDConfig, distill, edit
from csd3d.distillation.collaborative_edit import CollaborativeEditConfig, collaborative_edit
from csd3d.distillation.methods.csd_edit import CSDEdit
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.step import DistillConfig, distill_step, new_step, step_gradient
from csd3d.priors import Condition, GaussianMixturePrior

SHAPE = (C, H, W)
TEXTS = {
    **{"null": "", "image": "", "text": "a duck", "away": "a back", "away2": "a side"},
    **{"full": "make it red", "full/0": "make it red", "full/1": "make it blue"},
}
SETTINGS = [
    {},
    {"noise": "shared", "weight": "x0", "guidance_final": 1.0},
    {"perp_neg": True},
    {"schedule": "annealed"},
    {"schedule": "staged", "noise": "camera"},
]


def mixture(**prompts) -> GaussianMixturePrior:
    """Two answers, of which every prompt likes others."""
    weights = torch.Generator().manual_seed(3)
    texts = {text: torch.rand(2, generator=weights) + 0.1 for text in TEXTS.values() if text}
    means = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    return GaussianMixturePrior(means, torch.tensor([0.3, 0.5]), prompts=texts)


class Editor(GaussianMixturePrior):
    """A mixture that sees its image condition: it is drawn towards it."""

    def predict_noise(self, z_t, t, condition):
        eps = super().predict_noise(z_t, t, condition)
        return eps if condition.image is None else eps + 0.3 * (z_t - condition.image)


def editor() -> Editor:
    prior = mixture()
    return Editor(prior.means, prior.stds, prompts=prior.prompts)


def old_predict(prior, image=None):
    """The stacks of branches that the old steps ask for."""

    def predict(z_stack, t, names, indices=None):
        parts = []
        for name, z_t in zip(names, z_stack.chunk(len(names)), strict=True):
            shown = None if image is None or name == "null" else image[indices]
            parts.append(prior.predict_noise(z_t, t, Condition(prior.embed([TEXTS[name]] * len(z_t)), shown)))
        return torch.cat(parts)

    return predict


def latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


SVGD = [None, SVGDConfig(), SVGDConfig(normalize="row", space="clean", bandwidth=0.7), SVGDConfig(compat="official")]


@pytest.mark.parametrize("svgd", SVGD)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_distillation_step_is_the_old_one(svgd, settings):
    prior, z, weights = mixture(), latents(5), torch.rand(5, 2)
    groups, noise = torch.tensor([0, 1, 0, 0, 1]), latents(5, 9)
    for number in (0, 7, 9):
        old, new = (
            config(steps=10, t_min=0.1, t_max=0.9, svgd=svgd, **settings)
            for config in (distill.DistillConfig, DistillConfig)
        )
        extras = distill.Extras(camera_noise=noise, away=weights, groups=groups)
        arguments = prior.alphas_cumprod, torch.Generator().manual_seed(number)
        expected, was = distill.distill_step(old_predict(prior), z, number, old, *arguments, extras)
        arguments = prior.alphas_cumprod, torch.Generator().manual_seed(number)
        away = [([text] * 5, weights[:, k]) for k, text in enumerate(("a back", "a side"))]
        options = {"prompts": "a duck", "camera_noise": noise, "away": away, "groups": groups}
        found, report = distill_step(asking(prior), SDS(), z, number, new, *arguments, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for key, value in was.items():
            assert report[key] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("svgd", SVGD)
@pytest.mark.parametrize(
    "scales", [(7.5, 1.5, "image"), (3.0, 1.0, "image"), (3.0, 1.5, "guided"), (3.0, 1.2, "noise")]
)
@pytest.mark.parametrize("correspond", [None, random_correspondence(count=5).select])
@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_an_edit_is_the_old_one(svgd, scales, correspond, noise):
    prior, source, image = editor(), latents(5), latents(5, 4)
    loop = {"steps": 4, "batch": 3, "noise": noise, "init": "noise", "lr": 0.5, "lr_decay_every": 2, "svgd": svgd}
    text_scale, image_scale, baseline = scales
    old = edit.CollaborativeEditConfig(text_scale=text_scale, image_scale=image_scale, baseline=baseline, **loop)
    seen = [], []
    expected = edit.collaborative_edit(
        old_predict(prior, image), source, old, prior.alphas_cumprod, torch.Generator().manual_seed(2),
        lambda *a: seen[0].append(a), correspond=correspond,
    )  # fmt: skip
    found = collaborative_edit(
        asking(prior), CSDEdit(*scales), source, image, CollaborativeEditConfig(**loop), prior.alphas_cumprod,
        torch.Generator().manual_seed(2), prompts="make it red", callback=lambda *a: seen[1].append(a),
        correspond=correspond,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    for (_, _, was), (_, _, report) in zip(*seen, strict=True):
        assert report == pytest.approx(was, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("maps", [None, identity(4)])
@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_an_edit_by_regions_is_the_old_one(image_scale, maps):
    """Two instructions, a particle that has neither and one that has both; the common branches are asked for once."""
    prior, z, source, image, eps = editor(), latents(4), latents(4, 1), latents(4, 2), latents(4, 3)
    shares = torch.zeros(2, 4, 1, H, W)
    shares[0, :2], shares[1, 1:3, :, :, 2:] = 0.4, 0.6
    svgd, t = SVGDConfig(normalize="row"), 300
    old = edit.CollaborativeEditConfig(image_scale=image_scale, svgd=svgd)
    particles = edit.Particles(z, source, eps, shares, maps)
    a = prior.alphas_cumprod[t].item()
    expected, was = edit.edit_gradient(old_predict(prior, image), particles, t, torch.arange(4), old, a)
    config, calls = CollaborativeEditConfig(svgd=svgd), []
    step = new_step(
        z, t, 0, config, prior.alphas_cumprod, torch.Generator(), source=source, image=image, shares=shares,
        instructions=(("make it red",) * 4, ("make it blue",) * 4), sharing=maps,
    )  # fmt: skip
    predict, method = asking(prior, calls=calls), CSDEdit(image_scale=image_scale)
    found, report = step_gradient(predict, method, replace(step, eps=eps), config)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert report["gradient_rms"] == pytest.approx(was["gradient_rms"], rel=1e-6)
    rows = [None if query.rows is None else query.rows.tolist() for query in calls[0]]
    assert len(calls) == 1
    assert sorted(rows, key=str) == sorted([None, [0, 1], [1, 2], *([None] * (1 if image_scale == 1 else 2))], key=str)
