"""Sketches of flat shapes: drawn where they are, and fitted; backgrounds behind views; the loss on transmittance."""

import pytest
import torch

from csd3d.rendering import Rendered
from csd3d.representations.backdrops import textured
from csd3d.representations.batch import AssetViews, LossConfig, regularisers
from csd3d.representations.sketch import Shape, SketchConfig, draw_shapes, sketch_cameras, start_as_sketch

GREY = torch.tensor([0.5, 0.5, 0.5])


def test_shapes_are_drawn_flat_where_they_are_the_nearer_in_front():
    shapes = [
        Shape("box", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0)),
        Shape("ball", (1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.0, 1.0, 0.0)),
    ]
    cameras = sketch_cameras(SketchConfig(views=6, size=65), 4.0, 60.0)
    pictures = draw_shapes(shapes, cameras, GREY)
    front, back = pictures[0], pictures[3]  # azimuths 0 and 180, both from below
    assert cameras.positions[0, 0] > 3 > -3 > cameras.positions[3, 0]
    assert (front == torch.tensor([0.0, 1.0, 0.0])).all(-1).sum() > 20
    assert not (back == torch.tensor([0.0, 1.0, 0.0])).all(-1).any()  # hidden by the box
    assert (back == torch.tensor([1.0, 0.0, 0.0])).all(-1).sum() > 40
    assert torch.equal(back[0, 0], GREY)
    spread = torch.linalg.norm(cameras.positions, dim=1)
    torch.testing.assert_close(spread, torch.full((6,), 4.0))


def test_a_scene_is_fitted_to_the_sketch_by_its_own_steps():
    seen = []

    class Scene:
        def start_fit(self, config):
            return "optimiser"

        def fit_step(self, optimiser, pictures, config, step, generator):
            seen.append((optimiser, tuple(pictures.images.shape), step))

    config = SketchConfig(shapes=[Shape()], views=3, size=16)
    config.fit.steps = 2
    start_as_sketch(Scene(), config, sketch_cameras(config, 4.0, 30.0), GREY, torch.Generator())
    assert seen == [("optimiser", (3, 16, 16, 3), 0), ("optimiser", (3, 16, 16, 3), 1)]


def test_shapes_out_of_bounds_are_refused():
    for wrong, said in (({"shape": "torus"}, "choose one of box"), ({"size": (0, 1, 1)}, "lengths in"),
                        ({"colour": (2, 0, 0)}, "red, green and blue")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Shape(**wrong)


def test_backgrounds_show_through_what_is_empty():
    behind = textured(9, 12, torch.Generator().manual_seed(0))
    assert behind.shape == (9, 3, 12, 12)
    assert 0 <= behind.min() < behind.max() <= 1
    assert torch.equal(behind, textured(9, 12, torch.Generator().manual_seed(0)))
    opacity = torch.rand(9, 12, 12)
    views = AssetViews(torch.zeros(9, 3, 12, 12), [Rendered(None, None, part, 0) for part in opacity.split(3)], None)
    torch.testing.assert_close(views.before(behind).images, (1 - opacity)[:, None] * behind)


def test_transmittance_is_rewarded_up_to_its_target():
    opacity = torch.stack([torch.full((4, 4), 0.5), torch.full((4, 4), 0.1)]).requires_grad_()
    views = AssetViews(None, [Rendered(None, None, opacity, 0)], None)
    total, found = regularisers(views, LossConfig(transmittance=2.0, empty=(0, 0.4, 10, 0.8)), 10)
    assert found["transmittance"] == pytest.approx(-(0.5 + 0.8) / 2)
    total.backward()
    assert opacity.grad[0].sum().item() == pytest.approx(1.0)
    assert not opacity.grad[1].any()
