"""Score distillation of the training views: the known end of a descent, rounds, and what an editing model is asked."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from balls import Ball

from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.guidance import ip2p_guidance
from csd3d.distillation.method import Query
from csd3d.distillation.methods.dds import DDS
from csd3d.distillation.step import DistillConfig, new_step
from csd3d.editors import distilled
from csd3d.editors.distilled import Distilled
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.priors import Defaults, GaussianMixturePrior, PriorConfig, load_prior
from csd3d.schema import choose


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return SceneSource(prior, capture, "paint it red")


def test_dds_takes_every_view_from_the_mode_of_the_photos_to_that_of_the_instruction():
    """On Gaussians of equal width every z̃ goes to z̃ + μ_target − μ_source: how it differs from its mode is kept."""
    means = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=torch.float64)[:, :, None, None]
    first, second = torch.eye(2)
    words = {"": first, "paint it red": second}
    prior = GaussianMixturePrior(means, torch.full((2,), 0.2, dtype=torch.float64), prompts=words)
    z = 0.2 * torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = SimpleNamespace(prompt="paint it red", z=z, image=z)
    edit = SimpleNamespace(prior=prior, source=seen, generator=torch.Generator().manual_seed(0))
    editor = Distilled(steps=400, learning_rate=0.02, text_scale=1.0, image_scale=1.0)  # scales of 1: no guidance
    found = editor.descend(edit, z, range(400), lambda _: None)
    torch.testing.assert_close(found, z + means[1] - means[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_an_editing_model_is_asked_with_the_picture_and_its_source_without_an_instruction(source, image_scale):
    """DDS by hand: InstructPix2Pix's Eq. 3 of the target, minus the prediction guided by the photo alone."""
    prior, photos, z = source.prior, source.image[:2], source.z[:2] + 0.3
    about = {"prompts": "paint it red", "source": source.z[:2], "image": photos, "image_scale": image_scale}
    config = DistillConfig(guidance_scale=5.0)
    step = new_step(z, 400, 0, config, prior.alphas_cumprod, torch.Generator(), **about)
    step = replace(step, eps=torch.randn(z.shape, generator=torch.Generator().manual_seed(3)))
    queries = DDS().queries(step)
    found = DDS().direction(prior.predict(queries), step)

    def answer(z_t, prompt, image):
        return prior.predict({"one": Query(z_t, 400, (prompt,) * 2, image)})["one"]

    null, image, full = (answer(step.z_t, *of) for of in (("", None), ("", photos), ("paint it red", photos)))
    target = ip2p_guidance(null, image, full, 5.0, image_scale)
    null, image = (answer(step.source_t, "", of) for of in (None, photos))
    torch.testing.assert_close(found, target - null - image_scale * (image - null), atol=1e-5, rtol=1e-5)
    different = {query.key for query in queries.values()}
    assert len(different) == (3 if image_scale == 1 else 5)  # the source's two equal queries are one


def test_rounds_share_the_steps_and_later_ones_start_at_renders(source, monkeypatch):
    taken = []

    def spy(predict, method, z, number, config, *rest, **about):
        taken.append((number, z.clone()))
        return torch.zeros_like(z), {"skipped": 0.0}

    monkeypatch.setattr(distilled, "distill_step", spy)
    edit = SceneEdit(source, Ball(), source.capture.images.clone(), torch.Generator())
    editor = Distilled(steps=5, rounds=2, edit_every=3)
    for step in range(10):
        editor.update(edit, step, lambda _: None)
    assert [number for number, _ in taken] == [0, 1, 2, 3, 4]
    renders = edit.encode(edit.render(torch.arange(5)))
    for k, start in ((0, source.z), (1, source.z), (2, renders)):
        assert torch.equal(taken[k][1], start)


def test_every_view_changes_and_a_step_that_is_not_finite_moves_nothing(source, monkeypatch):
    edit = SceneEdit(source, Ball(), source.capture.images.clone(), torch.Generator().manual_seed(0))
    reports = []
    Distilled(method=choose("method", "pds"), steps=2).update(edit, 0, reports.append)
    changed = [i for i in range(len(edit.images)) if not torch.equal(edit.images[i], source.capture.images[i])]
    assert changed == source.capture.train.tolist()
    assert [report["skipped"] for report in reports] == [0.0, 0.0]
    bad = lambda *a, **k: (torch.full_like(a[2], torch.nan), {"skipped": 1.0})  # noqa: E731
    monkeypatch.setattr(distilled, "distill_step", bad)
    assert torch.equal(Distilled().descend(edit, source.z, range(2), reports.append), source.z)


def test_numbers_are_the_priors_unless_given():
    defaults = Defaults(text_scale=4.0, t_max=0.7, t_min=0.1)
    found = Distilled(t_min=None).distill(defaults)
    assert (found.guidance_scale, found.t_min, found.t_max) == (4.0, 0.1, 0.7)
    found = Distilled(text_scale=2.0, t_max=0.9).distill(defaults)
    assert (found.guidance_scale, found.t_min, found.t_max) == (2.0, 0.2, 0.9)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": choose("method", "sds")}, "method is 'sds': choose one that edits a source, of dds, dreamcatalyst"),
        ({"method": choose("method", "csd_edit")}, "method is 'csd_edit'"),
        ({"noise": "camera"}, "noise is 'camera': choose one of independent, shared"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        (
            {"method": choose("method", "dreamcatalyst"), "schedule": "logit_normal"},
            "schedule is 'logit_normal': dreamcatalyst has annealed; leave schedule out",
        ),
        ({"t_min": 0.5, "t_max": 0.4}, "t_min is 0.5: give at most 0.4"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Distilled(**keys)
