"""Guidance: the limits in which it must vanish or be exact, and what it asks the prior for."""

import pytest
import torch
from asking import asking

from csd3d.distillation import cfg, ddim_edit, ip2p_guidance
from csd3d.distillation.guidance import edit_predictor, guided, guided_queries, perp_neg
from csd3d.distillation.step import DistillConfig, new_step
from csd3d.priors import Condition, GaussianMixturePrior
from csd3d.priors.mixture import scaled_linear_alphas


def predictions(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_cfg_is_exact_at_zero_and_one_and_linear_beyond():
    for dtype in (torch.float32, torch.float16):
        uncond, cond = predictions(2, dtype)
        assert torch.equal(cfg(uncond, cond, 0.0), uncond)
        assert torch.equal(cfg(uncond, cond, 1.0), cond)
    uncond, cond = predictions(2, torch.float64)
    torch.testing.assert_close(cfg(uncond, cond, 7.5), uncond + 7.5 * (cond - uncond), rtol=1e-12, atol=1e-12)


def test_ip2p_guidance_is_the_formula():
    null, image, full = predictions(3, torch.float64)
    expected = null + 1.5 * (image - null) + 7.5 * (full - image)
    torch.testing.assert_close(ip2p_guidance(null, image, full, 7.5, 1.5), expected, rtol=1e-12, atol=1e-12)


def test_perp_neg_takes_away_only_what_the_prompt_does_not_say():
    """A negative along the prompt changes nothing; one across it moves the guided prediction straight away from it."""
    null, text = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    along, across = torch.tensor([[5.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    weights = torch.tensor([[0.7, 0.5]])
    assert torch.equal(perp_neg(null, text, [along, along], weights, 4.0), torch.tensor([[8.0, 0.0]]))
    torch.testing.assert_close(perp_neg(null, text, [along, across], weights, 4.0), torch.tensor([[8.0, -2.0]]))
    assert torch.equal(perp_neg(null, text, [across, across], 0 * weights, 4.0), cfg(null, text, 4.0))


def a_step(scale: float, **context):
    config = DistillConfig(guidance_scale=scale, null_prompt="ugly", perp_neg="away" in context)
    z, alphas = torch.randn(2, 3, 4, 4), scaled_linear_alphas()
    step = new_step(z, 300, 0, config, alphas, torch.Generator(), prompts=("a duck", "a cat"), source=z, **context)
    object.__setattr__(step, "eps", torch.randn_like(z))
    return step


@pytest.mark.parametrize("of", ["target", "source"])
def test_at_scale_one_the_prompt_alone_is_asked_for(of):
    prefix = "source_" if of == "source" else ""
    for scale, names in ((1.0, {"text"}), (3.0, {"null", "text"})):
        step = a_step(scale, source_prompts="a dog")
        asked = guided_queries(step, of)
        assert set(asked) == {prefix + name for name in names}
        assert asked[f"{prefix}text"].prompts == (("a dog",) * 2 if prefix else ("a duck", "a cat"))
        answers = {name: torch.full((2, 1), float(k)) for k, name in enumerate(sorted(asked))}
        null, text = answers.get(f"{prefix}null"), answers[f"{prefix}text"]
        assert torch.equal(guided(answers, step, of), text if null is None else cfg(null, text, scale))
        if null is not None:
            assert asked[f"{prefix}null"].prompts == ("ugly",) * 2
    assert set(guided_queries(a_step(3.0), of, scale=1.0)) == {f"{prefix}text"}


@pytest.mark.parametrize("guides_view", [False, True])
def test_the_unconditional_branch_is_told_no_camera_where_guidance_leads_to_it(guides_view):
    view = torch.tensor([[10.0, 20.0, 4.0], [90.0, 30.0, 4.0]])
    asked = guided_queries(a_step(3.0, view=view, guides_view=guides_view))
    assert asked["text"].view is view
    assert asked["null"].view is (None if guides_view else view)


def test_perp_neg_asks_for_the_other_views_even_at_scale_one():
    weights = torch.tensor([0.5, 0.2])
    step = a_step(1.0, away=[(("back", "side"), weights), (("front", "front"), weights)])
    asked = guided_queries(step)
    assert set(asked) == {"null", "text", "away0", "away1"}
    assert asked["away0"].prompts == ("back", "side")
    answers = dict(zip(asked, predictions(4, torch.float64), strict=True))
    answers = {name: value[:2] for name, value in answers.items()}
    away = [answers["away0"], answers["away1"]]
    expected = perp_neg(answers["null"], answers["text"], away, torch.stack([weights] * 2, 1), 1.0)
    assert torch.equal(guided(answers, step), expected)


@pytest.mark.parametrize(("image_scale", "branches"), [(1.0, 2), (1.5, 3)])
def test_edit_predictor_drives_ddim(image_scale, branches):
    """The IN2N edit under Gaussians, of the picture, of the instruction and of nothing, ends at the guided mean."""
    means = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    picture, wanted, nothing = means

    class Editor(GaussianMixturePrior):
        def condition(self, prompts, image=None):
            """With a picture, "" says what it shows."""
            prompts = ["shown" if image is not None and not prompt else prompt for prompt in prompts]
            return Condition(self.embed(prompts), image)

    one = torch.eye(3)
    prior = Editor(means, torch.full((3,), 1e-3), prompts={"": one[2], "red": one[1], "shown": one[0]})
    z, calls = picture[None].repeat(2, 1, 1, 1), []
    predict = edit_predictor(asking(prior, calls=calls), ("red",) * 2, z, 1.0, image_scale)
    edited = ddim_edit(predict, z, prior.alphas_cumprod, start=900, steps=20, generator=torch.Generator())
    expected = wanted + (image_scale - 1) * (picture - nothing)
    torch.testing.assert_close(edited, expected.expand_as(edited), rtol=0.0, atol=0.02)
    assert [len(call) for call in calls] == [branches] * 20
