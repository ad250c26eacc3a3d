"""Metrics of an edited scene against a known truth, on pictures of one size and of several."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.datasets import Capture
from csd3d.evaluation.ground_truth import TrueViews
from csd3d.evaluation.scene import evaluate_edit, evaluate_reconstruction, render_judged
from csd3d.rendering import Rendered

SIDE, COUNT = 24, 4
RED, BLUE, GREY = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8]), torch.tensor([0.5, 0.5, 0.5])


def picture(colour):
    """A square of a colour in the middle of a grey picture."""
    image = GREY.expand(SIDE, SIDE, 3).clone()
    image[9:15, 9:15] = colour
    return image


@dataclass
class Truth:
    answers: tuple

    def views(self, scene, indices):
        rgb = picture(scene).expand(len(indices), -1, -1, -1)
        return TrueViews(rgb, torch.full(rgb.shape[:3], torch.inf), torch.ones(rgb.shape[:3]))


def model(*views):
    images = torch.stack(views)

    def render_views(cameras, indices, shading):
        nothing = torch.zeros(len(indices), SIDE, SIDE)
        return Rendered(images[indices], nothing, nothing, 0)

    return SimpleNamespace(render_views=render_views)


def capture(places=None):
    cameras = orbit(COUNT, 2.0, 10.0, 60.0, SIDE, SIDE)
    indices = torch.arange(COUNT)
    images = picture(torch.tensor([0.1, 0.8, 0.1])).expand(COUNT, -1, -1, -1)
    rest = {"scale": 1.0, "aabb": torch.tensor([-1.0, -1, -1, 1, 1, 1]), "unbounded": False, "folder": None}
    names = [str(i) for i in range(COUNT)]
    return Capture(cameras, images, None, names, indices, indices, torch.eye(4), places=places, **rest)


def judge(views, places=None):
    found = capture(places)
    rendered = render_judged(model(*views), found, "csd_edit")
    return evaluate_edit(rendered, None, found.images, found, Truth((BLUE, RED)))


def test_one_answer_is_chosen_for_all_views():
    figures = judge([(picture(colour) + 0.1).clamp(0, 1) for colour in (RED, RED, RED, BLUE)])
    assert figures["answer"] == 1
    assert figures["psnr_truth"] < 20 - 1  # the dissenting view is held against the common answer
    assert figures["psnr_outside"] == pytest.approx(20, abs=0.01)


def test_padding_does_not_count():
    """Right inside the pictures, wrong in the padding about them."""
    places = torch.tensor([[0, 6, SIDE, 12], [6, 0, 12, SIDE]] * 2)
    views = [torch.zeros(SIDE, SIDE, 3) for _ in range(COUNT)]
    for view, (left, top, width, height) in zip(views, places.tolist(), strict=True):
        window = slice(top, top + height), slice(left, left + width)
        view[window] = picture(RED)[window]
    figures = judge(views, places)
    assert figures["answer"] == 1
    assert [figures["psnr_truth"], figures["ssim_truth"], figures["psnr_outside"]] == pytest.approx([100, 1, 100])
    assert judge(views)["psnr_truth"] < 12
    source = [picture(torch.tensor([0.1, 0.8, 0.1])) * (view.sum(-1, keepdim=True) > 0) for view in views]
    found = capture(places)
    rendered = render_judged(model(*source), found, "reconstruct")
    assert evaluate_reconstruction(rendered, found) == {"psnr": 100, "ssim": 1}
