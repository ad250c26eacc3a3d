"""DreamFields: its direction is the gradient of the mean cosine of crops, and it asks nothing of the prior."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from asking import asking

from csd3d.distillation.methods.dreamfields import ClipNetwork, DreamFields, crop_pictures
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.errors import InputError

PROMPTS = ["a red chair", "a duck", "a duck"]
PICTURES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MAP = torch.randn(5, 3 * 12 * 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WORDS = {"a red chair": 2, "a duck": 3}
ALPHAS = torch.linspace(0.99, 0.01, 1000)


class Linear:
    """A CLIP whose image tower is a matrix."""

    def __init__(self):
        self.asked = []

    def image_tower(self, x):
        return F.normalize(x.flatten(1) @ MAP.T, dim=-1)

    def embed_texts(self, texts):
        self.asked += texts
        return torch.stack([F.normalize(torch.eye(5, dtype=torch.float64)[WORDS[text]] + 0.1, dim=0) for text in texts])


def test_the_direction_is_the_gradient_of_the_mean_cosine_of_crops():
    clip, method = Linear(), DreamFields(crops=3, smallest=0.6)
    predict = asking(None, {"clip": ClipNetwork(clip)})  # a query of the prior would fail
    for _ in range(2):
        generator = torch.Generator().manual_seed(7)
        found, report = distill_step(
            predict, method, PICTURES, 0, DistillConfig(steps=5), ALPHAS, generator, prompts=PROMPTS
        )
    assert clip.asked == ["a red chair", "a duck"]  # each once
    generator = torch.Generator().manual_seed(7)
    torch.rand((), generator=generator)  # t
    places = torch.rand(3, 3, generator=generator)
    x, texts = PICTURES.clone().requires_grad_(), Linear().embed_texts(PROMPTS)
    loss = -sum((clip.image_tower(crop) * texts).sum() for crop in crop_pictures(x, places, 0.6)) / 3
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected)
    assert not report["skipped"]


def test_crops_are_squares_inside_the_picture():
    corner = torch.tensor([[0.0, 0.999, 0.999], [0.999, 0.5, 0.5]])
    small, whole = crop_pictures(PICTURES, corner, 0.5)
    torch.testing.assert_close(small[..., -1, -1], PICTURES[..., -1, -1])
    torch.testing.assert_close(small, F.interpolate(PICTURES[..., 6:, 6:], (12, 12), mode="bilinear"))
    torch.testing.assert_close(whole, PICTURES)


def test_what_is_wrong_is_told():
    with pytest.raises(ValueError, match=r"smallest is 0\.0: give a share"):
        DreamFields(smallest=0.0)
    with pytest.raises(InputError, match=r"method dreamfields: clip: CLIP: '\./no clip' is no folder"):
        DreamFields(clip="./no clip").open(SimpleNamespace(device="cpu"))
