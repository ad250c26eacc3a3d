"""A scene's views are shown at the model's own size and brought back to the capture's."""

from dataclasses import replace

import pytest
import torch
from balls import Ball

from csd3d.datasets import SceneConfig, load_capture
from csd3d.editors.csd_edit_scene import CSDEditScene
from csd3d.editors.scene import SceneEdit, SceneSource, try_out, view_size
from csd3d.errors import InputError
from csd3d.priors import Defaults, PriorConfig, load_prior


@pytest.fixture(scope="module")
def parts(tiny_capture, tiny_prior):
    return load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))


def test_the_shorter_side_becomes_the_models():
    assert view_size((1080, 1920), 512) == (512, 910)
    assert view_size((240, 135), 512) == (910, 512)
    assert view_size((32, 32), 32) == (32, 32)


def test_the_model_sees_its_own_size_and_pictures_come_back(parts):
    prior, capture = parts  # pictures of 32 pixels, a model of 32
    source = SceneSource(replace_defaults(prior, 48), capture, "paint it red")
    edit = SceneEdit(source, Ball(), capture.images.clone(), torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 2])
    assert source.photos.shape[2:] == (48, 48)
    assert source.z.shape[1:] == prior.latent_shape(48, 48)
    rendered = edit.render(rows)
    assert rendered.rgb.shape == (2, 48, 48, 3)
    direction = edit.cameras.image_rays(0)[1].mean(0)
    own = capture.cameras[capture.train].image_rays(0)[1].mean(0)
    torch.testing.assert_close(direction, own, rtol=0, atol=2e-3)  # the same view on a finer raster
    edit.replace(rows, edit.encode(rendered))
    assert edit.images.shape == capture.images.shape
    assert not torch.equal(edit.images[capture.train[rows]], capture.images[capture.train[rows]])


def test_an_unedited_view_comes_back_as_it_was(parts):
    prior, capture = parts
    source = SceneSource(replace_defaults(prior, 48), capture, "paint it red", keep_detail=True)
    edit = SceneEdit(source, Ball(), torch.zeros_like(capture.images), torch.Generator())
    edit.replace(torch.arange(5), source.z)
    torch.testing.assert_close(edit.images[capture.train], capture.images[capture.train], rtol=0, atol=1e-5)


def test_at_the_models_own_size_nothing_is_resized(parts):
    source = SceneSource(*parts, "paint it red")
    assert torch.equal(source.photos, parts[1].images[parts[1].train].permute(0, 3, 1, 2))


def test_a_size_that_cannot_be_is_told_before_any_work(parts):
    with pytest.raises(InputError, match=r"working_size: a view of 4x4 does not suit the model: .*at least 8 pixels"):
        try_out(SceneSource(*parts, "paint it red", side=4))


def test_one_view_is_tried(parts, monkeypatch):
    prior, capture = parts
    before = prior.unet_evaluations
    try_out(SceneSource(prior, capture, "paint it red"))
    assert prior.unet_evaluations == before + 1


def test_matches_of_too_many_views_are_told_before_any_work(parts, monkeypatch):
    editor, source = CSDEditScene(match=1.0), SceneSource(*parts, "paint it red")
    editor.check(source, "editors.csd_edit")
    monkeypatch.setattr("csd3d.memory.memory_bytes", lambda: 30_000)
    replace(editor, views=2).check(source, "editors.csd_edit")
    replace(editor, match_nearest=1).check(source, "editors.csd_edit")
    with pytest.raises(InputError, match=r"editors\.csd_edit\.match: the matches of 25 .*match_nearest to fewer"):
        editor.check(source, "editors.csd_edit")
    CSDEditScene().check(source, "editors.csd_edit")


def replace_defaults(prior, side):
    """The prior, as if it had been trained on pictures of `side` pixels."""
    other = object.__new__(type(prior))
    other.__dict__.update(prior.__dict__, defaults=replace(Defaults(), working_size=side))
    return other
