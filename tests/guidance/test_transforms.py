"""Illusions: transforms are undone exactly, and their gradient is the mean of what each view asks for, turned back."""

from types import SimpleNamespace

import pytest
import torch

from csd3d.guidance.pictures import particles_of
from csd3d.guidance.transforms import INVERSES, TRANSFORMS, seen_by
from csd3d.tasks.text_to_image import TextToImageConfig

PICTURES = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_undone_exactly_and_keeps_lengths(name):
    seen = TRANSFORMS[name](PICTURES)
    torch.testing.assert_close(TRANSFORMS[INVERSES[name]](seen), PICTURES, rtol=0, atol=1e-15)
    assert name == "none" or not torch.equal(seen, PICTURES)
    other = TRANSFORMS[name](PICTURES.flip(0))
    torch.testing.assert_close((seen - other).norm(), (PICTURES - PICTURES.flip(0)).norm())


def test_the_gradient_is_the_mean_of_each_views_turned_back():
    x, names = PICTURES.clone().requires_grad_(), ["none", "rotate_90", "negative"]
    guide = SimpleNamespace(encode=lambda pictures: pictures, pictures=True, prior=None)
    z = particles_of(guide, SimpleNamespace(images=lambda prior: x), names)
    assert z.shape == (6, 3, 5, 5)
    torch.testing.assert_close(z, seen_by(PICTURES, names))
    asked = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ((z * asked).sum() / len(names)).backward()
    first, second, third = asked.split(2)
    torch.testing.assert_close(x.grad, (first + second.rot90(-1, (2, 3)) - third) / 3)


def test_an_illusion_needs_a_transform_for_each_prompt():
    with pytest.raises(ValueError, match="transforms has 1, prompts 2: give one for each prompt"):
        TextToImageConfig(prompts=["a duck", "a chair"], transforms=["mirror"])
    with pytest.raises(ValueError, match="transforms names 'turn': choose from none, rotate_90"):
        TextToImageConfig(prompts=["a duck"], transforms=["turn"])
    both = TextToImageConfig(prompts=["a duck", "a chair"], transforms=["none", "mirror"])
    assert both.parts == {"csd-0": ("csd", ["a duck", "a chair"])}
