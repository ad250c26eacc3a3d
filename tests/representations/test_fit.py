"""Losses and learning rate of the fit of a scene to pictures, in closed form."""

import math

import pytest
import torch
from torch import nn

from csd3d.errors import InputError
from csd3d.rendering import Rendered
from csd3d.representations.fit import FitConfig, check_patches, descend, fit_loss, learning_rate, make_optimiser


def test_learning_rate_warms_up_and_falls():
    config = FitConfig(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    assert learning_rate(config, 0) == pytest.approx(0.1, abs=0.01)
    assert learning_rate(config, 50) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)


def test_fit_loss_is_the_weighted_sum_over_usable_rays():
    rgb, target = torch.tensor([[0.5] * 3, [0.9] * 3, [0.0] * 3]), torch.tensor([[0.6] * 3, [0.9] * 3, [1.0] * 3])
    rendered = Rendered(rgb, None, torch.full((3,), 0.5), 0, distortion=torch.tensor([0.2, 0.4, 0.6]))
    config = FitConfig(opacity_weight=0.1, distortion_weight=0.01)
    loss, report = fit_loss(rendered, target, torch.tensor([True, True, False]), config, None)
    colour = (0.1 - 0.05 / 2) / 2  # smooth L1 past its quadratic part; the second ray is exact, the third unusable
    assert report["colour"] == pytest.approx(colour, rel=1e-5)
    assert loss.item() == pytest.approx(colour + 0.1 * math.log(2) + 0.01 * 0.4, rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    model = nn.Linear(2, 1, bias=False)
    optimiser, before = make_optimiser(model.parameters(), FitConfig()), model.weight.clone()
    assert not descend(model, optimiser, model.weight.sum() * torch.nan, 0.1)
    assert not descend(model, optimiser, (model.weight * torch.tensor([torch.inf, 0.0])).clamp(max=1).sum(), 0.1)
    assert torch.equal(model.weight, before)
    assert descend(model, optimiser, model.weight.sum(), 0.1)
    torch.testing.assert_close(model.weight, before - 0.1)  # Adam's first step is as long as its rate


def test_patches_larger_than_the_pictures_are_refused_at_their_key():
    check_patches(FitConfig(patches=1, patch_size=24), (24, 32), "fit")
    check_patches(FitConfig(patches=0, patch_size=99), (24, 32), "fit")
    with pytest.raises(InputError, match=r"^fit\.patch_size: 25 is more than the pictures' 24"):
        check_patches(FitConfig(patches=1, patch_size=25), (24, 32), "fit")
