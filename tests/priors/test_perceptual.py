"""Perceptual distances against closed forms, and LPIPS's absence."""

import sys

import pytest
import torch

from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_lpips, load_prior, perceptual_distance, perceptual_vectors


def test_distance_is_two_minus_two_cosines_averaged():
    a = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).T.reshape(
        1, 2, 1, 2
    )  # columns: channels (3, 0) and (4, 1) at two positions
    b = torch.tensor([[0.0, 4.0], [0.0, 3.0]]).T.reshape(1, 2, 1, 2)
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=1)
    torch.testing.assert_close(perceptual_distance([a], [b]), (2 - 2 * cosines).mean())
    torch.testing.assert_close(perceptual_distance([a, a], [b, a]), (2 - 2 * cosines).mean() / 2)
    torch.testing.assert_close(perceptual_distance([a], [-a]), torch.tensor(4.0))
    torch.testing.assert_close(perceptual_distance([7 * a], [a]), torch.tensor(0.0))


def test_vectors_are_as_far_apart_as_their_images():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, *shape, generator=generator) for shape in ((4, 6, 5), (8, 3, 2))]
    vectors = perceptual_vectors(maps)
    assert vectors.shape == (3, 4 * 30 + 8 * 6)
    for i, j in ((0, 1), (1, 2), (2, 2)):
        apart = perceptual_distance([m[i : i + 1] for m in maps], [m[j : j + 1] for m in maps])
        torch.testing.assert_close((vectors[i] - vectors[j]).square().sum(), apart, rtol=1e-5, atol=1e-7)


def test_features_without_any_signal_have_a_finite_gradient():
    a = torch.zeros(1, 4, 3, 3, requires_grad=True)
    perceptual_distance([a], [torch.rand(1, 4, 3, 3)]).backward()
    assert a.grad.isfinite().all()


def test_descending_it_through_the_encoder_brings_an_image_to_its_target(edit_folder):
    prior = load_prior(PriorConfig(str(edit_folder), device="cpu"))
    generator = torch.Generator().manual_seed(0)
    target = prior.features(torch.rand(1, 3, 16, 16, generator=generator))
    image = torch.rand(1, 3, 16, 16, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([image], lr=0.02)
    losses = []
    for _ in range(40):
        loss = perceptual_distance(prior.features(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_unlike_features_are_refused():
    with pytest.raises(ValueError, match="same shapes"):
        perceptual_distance([torch.rand(1, 2, 3, 3)], [torch.rand(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="same shapes"):
        perceptual_distance([], [])


def test_lpips_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r'pip install .*"\.\[metrics\]"'):
        load_lpips()
