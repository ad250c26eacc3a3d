"""The one-shot dataset update: which views, from where, and how often."""

import pytest
import torch
from balls import Ball

from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.noise import add_noise
from csd3d.distillation.samplers import sample
from csd3d.editors import one_shot
from csd3d.editors.one_shot import OneShot
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.priors import PriorConfig, load_prior


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return SceneSource(prior, capture, "paint it red", keep_detail=False)


def new_edit(source):
    return SceneEdit(source, Ball(), source.capture.images.clone(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("init", "sampler"), [("noise", "ddim"), ("source", "ddim"), ("source", "dpm++")])
def test_every_view_is_sampled_alone_from_its_start(source, init, sampler):
    """By hand: view 3 of 5, its own noise, its own photo, sampled from `start`."""
    edit, reports = new_edit(source), []
    keys = {"init": init, "sampler": sampler, "text_scale": 5.0, "image_scale": 1.5}
    OneShot(start=0.6, ddim_steps=2, **keys).update(edit, 0, reports.append)
    eps = torch.randn(source.z.shape, generator=torch.Generator().manual_seed(0))[3:4]
    alphas, rows = source.prior.alphas_cumprod, torch.tensor([3])
    timesteps = ddim_timesteps(round(0.6 * len(alphas)), 2)
    z_t = eps if init == "noise" else add_noise(source.z[rows], eps, alphas[timesteps[0]].item())
    z = sample(edit.guided(rows, 5.0, 1.5), z_t, alphas, timesteps, sampler)
    expected = source.brought_back(source.decode(z))[0]
    torch.testing.assert_close(edit.images[source.capture.train[3]], expected, atol=1e-4, rtol=0)
    changed = [i for i in range(len(edit.images)) if not torch.equal(edit.images[i], source.capture.images[i])]
    assert changed == source.capture.train.tolist()
    assert reports == [{"t": float(timesteps[0])}]


def test_later_edits_start_at_renders_and_come_as_often_as_asked(source, monkeypatch):
    started = []
    monkeypatch.setattr(one_shot, "sample", lambda predict, z_t, *_: started.append(z_t) or z_t)
    for keys, steps in (({}, [0]), ({"edits_every": 4}, [0, 4, 8])):
        edit, reports = new_edit(source), []
        due = [step for step in range(10) if not OneShot(**keys).update(edit, step, reports.append) and reports]
        assert len(reports) == len(steps)
        assert due[0] == 0
        assert edit.model.rendered == len(steps) - 1
    edit = new_edit(source)
    OneShot(edits_every=4, start=0.0).update(edit, 4, lambda _: None)
    alpha = source.prior.alphas_cumprod[0].item()
    z = edit.encode(edit.render(torch.arange(5)))
    eps = torch.randn(source.z.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(started[-1], add_noise(z, eps, alpha), atol=1e-5, rtol=0)


def test_shared_noise_is_one_for_all_views(source, monkeypatch):
    started = []
    monkeypatch.setattr(one_shot, "sample", lambda predict, z_t, *_: started.append(z_t) or z_t)
    for noise, equal in (("shared", True), ("independent", False)):
        OneShot(noise=noise).update(new_edit(source), 0, lambda _: None)
        assert torch.equal(started[-1][0], started[-1][1]) is equal


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"noise": "camera"}, "noise is 'camera'"),
        ({"init": "render"}, "init is 'render': choose one of noise, source"),
        ({"start": 1.5}, "start is 1.5"),
        ({"edits_every": 0}, "edits_every is 0"),
        ({"ddim_steps": 0}, "ddim_steps is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        OneShot(**keys)
