"""Instruct-NeRF2NeRF: which view, from which noise, through which timesteps, under which guidance."""

import pytest
import torch
from asking import edit_branches
from balls import Ball

from csd3d.datasets import SceneConfig, load_capture
from csd3d.editors import in2n
from csd3d.editors.in2n import InstructNeRF2NeRF, leading_timesteps
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.priors import Defaults, PriorConfig, load_prior


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return SceneSource(prior, capture, "paint it red")


def new_edit(source, seed=0, run_seed=7):
    images = source.capture.images.clone()
    return SceneEdit(source, Ball(), images, torch.Generator().manual_seed(seed), run_seed)


@pytest.mark.parametrize("drawn", [20, 137, 500, 980])
def test_timesteps_are_those_of_diffusers_leading_spacing(drawn):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=drawn, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    found = leading_timesteps(drawn, 20)
    assert found == scheduler.timesteps.tolist()
    assert (found[0], found[-1]) == (19 * (drawn // 20) + 1, 1)


def test_a_level_with_fewer_timesteps_than_steps_has_each_once():
    assert leading_timesteps(19, 20) == [1]


def test_the_guided_prediction_is_that_of_the_three_branches(source):
    edit, rows = new_edit(source), torch.tensor([2])
    z = torch.randn(1, *source.z.shape[1:], generator=torch.Generator().manual_seed(3))
    prior = source.prior
    texts = prior.condition(["paint it red"]), prior.condition([""])
    null, image, full = (prior.predict_noise(z, 400, c) for c in edit_branches(*texts, source.image[rows]))
    for scale in (1.0, 1.5):
        found = edit.guided(rows, 5.0, scale)(z, 400)
        wanted = null + scale * (image - null) + 5.0 * (full - image)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_views_take_their_turns_and_others_stay(source):
    edit, editor, reports = new_edit(source), InstructNeRF2NeRF(edit_rate=3, ddim_steps=2), []
    for step in range(5):
        editor.update(edit, step, reports.append)
    changed = [i for i in range(len(edit.images)) if not torch.equal(edit.images[i], source.capture.images[i])]
    assert changed == source.capture.train[:2].tolist()
    assert len(reports) == 2
    before = edit.images.clone()
    editor.update(edit, 15, reports.append)  # after the last of five comes the first again
    assert [i for i in range(len(before)) if not torch.equal(before[i], edit.images[i])] == [source.capture.train[0]]


def test_shared_noise_is_one_for_all_edits_of_a_run(source, monkeypatch):
    started = []

    def spy(predict, z_t, alphas, timesteps, _):
        z = edit.encode(edit.render(torch.tensor([0])))
        alpha = alphas[timesteps[0]].item()
        started.append((z_t - alpha**0.5 * z) / (1 - alpha) ** 0.5)
        return z

    monkeypatch.setattr(in2n, "sample", spy)
    for noise, run_seed in (("shared", 7), ("shared", 8), ("independent", 7)):
        edit = new_edit(source, run_seed=run_seed)
        for step in (0, 5 * 10):  # the same view again
            InstructNeRF2NeRF(noise=noise).update(edit, step, lambda _: None)
    first, again, other_run, _, one, two = started
    torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-4)
    assert (first - other_run).abs().max() > 0.1
    assert (one - two).abs().max() > 0.1


def test_scales_are_the_priors_unless_given(source, monkeypatch):
    edit, rows, z = new_edit(source), torch.tensor([2]), source.z[:1]
    monkeypatch.setattr(source.prior, "defaults", Defaults(sampling_text_scale=2.0, sampling_image_scale=1.25))
    assert torch.equal(edit.guided(rows, None, None)(z, 400), edit.guided(rows, 2.0, 1.25)(z, 400))
    assert not torch.equal(edit.guided(rows, 7.0, None)(z, 400), edit.guided(rows, 2.0, 1.25)(z, 400))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"noise": "camera"}, "noise is 'camera'"),
        ({"edit_rate": 0}, "edit_rate is 0"),
        ({"ddim_steps": 0}, "ddim_steps is 0"),
        ({"t_min": 0.9, "t_max": 0.1}, "the lower first"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        InstructNeRF2NeRF(**keys)


@pytest.mark.parametrize("steps", [4, 40, 333])
def test_each_view_is_edited_as_often_however_long_the_fit_is(source, steps):
    editor, edit = InstructNeRF2NeRF(edits_per_view=3), new_edit(source)
    edit.steps = steps
    due = [number for step in range(steps) for number in editor.due(step, edit)]
    assert due == list(range(3 * 5))
    each = [len(editor.due(step, edit)) for step in range(steps)]
    assert max(each) - min(each) <= 1
