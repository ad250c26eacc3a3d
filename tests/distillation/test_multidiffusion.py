"""MultiDiffusion with Gaussian priors, for which the fused canvas is known."""

import math

import pytest
import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.multidiffusion import fused_predictor, multidiffusion_sample, window_shares
from csd3d.priors import GaussianMixturePrior

FRAMES, HEIGHT, WIDTH, SIZE = 2, 4, 11, 4
TIMESTEPS = ddim_timesteps(900, 12)


def schedule(T: int = 1000) -> Tensor:
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2, dim=0)


class Layout:
    """Windows of 4 x 4 in each of two frames of 4 x 11, the last ones across the seam; a loop over windows."""

    def __init__(self, lefts=(0, 3, 5, 9), shape=(FRAMES, 3, HEIGHT, WIDTH)):
        self.places, self.shape = [(f, left) for f in range(shape[0]) for left in lefts], shape

    def columns(self, left: int) -> Tensor:
        return (left + torch.arange(SIZE)) % self.shape[3]

    def gather(self, canvas: Tensor) -> Tensor:
        return torch.stack([canvas[f][:, :SIZE, self.columns(left)] for f, left in self.places])

    def scatter(self, windows: Tensor) -> Tensor:
        canvas = torch.zeros(self.shape, dtype=windows.dtype)
        for (f, left), window in zip(self.places, windows, strict=True):
            canvas[f][:, :SIZE, self.columns(left)] += window
        return canvas

    def calls(self) -> dict:
        return {"gather": self.gather, "scatter": self.scatter}


def feather() -> Tensor:
    ramp = torch.tensor([0.3, 1.1, 0.9, 0.2], dtype=torch.float64)
    return (ramp[:, None] * ramp)[None, None]


def normal(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_eps(z_t: Tensor, t: int, mean: Tensor, std: Tensor | float) -> Tensor:
    a = schedule()[t].item()
    return math.sqrt(1 - a) * (z_t - math.sqrt(a) * mean) / (a * std**2 + 1 - a)


def test_windows_of_an_exact_prior_give_the_exact_canvas():
    layout = Layout()
    mean, std, z_t = (normal(*layout.shape, seed=seed) for seed in range(3))
    std = 0.2 + std.abs()

    def predict(windows: Tensor, t: int, rows: Tensor) -> Tensor:
        return gaussian_eps(windows, t, layout.gather(mean)[rows], layout.gather(std)[rows])

    expected = ddim_sample(lambda z, t: gaussian_eps(z, t, mean, std), z_t, schedule(), TIMESTEPS)
    for batch in (3, 64):
        found = multidiffusion_sample(
            predict, z_t, schedule(), TIMESTEPS, **layout.calls(), weights=feather(), batch=batch
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_windows_that_disagree_land_on_their_weighted_mean():
    """ε is affine in the mean, so windows with means m_i of their own are a canvas with the mean Σ S_i m_i."""
    layout = Layout()
    z_t, means = normal(*layout.shape), normal(len(layout.places), 3, SIZE, SIZE, seed=1)
    weights = 0.1 + normal(len(layout.places), 1, SIZE, SIZE, seed=2).abs()

    def predict(windows: Tensor, t: int, rows: Tensor) -> Tensor:
        return gaussian_eps(windows, t, means[rows], 0.3)

    found = multidiffusion_sample(predict, z_t, schedule(), TIMESTEPS, **layout.calls(), weights=weights)
    blended = layout.scatter(weights * means) / layout.scatter(weights.expand(-1, 3, -1, -1))
    expected = ddim_sample(lambda z, t: gaussian_eps(z, t, blended, 0.3), z_t, schedule(), TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_single_window_is_plain_ddim_bit_for_bit():
    layout = Layout(lefts=(0,), shape=(1, 3, SIZE, SIZE))
    prior = GaussianMixturePrior(normal(3, 3, SIZE, SIZE).float(), torch.tensor([0.1, 0.3, 0.2]))
    z_t = normal(*layout.shape, seed=1).float()

    def predict(windows: Tensor, t: int, rows: Tensor) -> Tensor:
        return prior.predict_noise(windows, t, prior.condition([""] * len(rows)))

    found = multidiffusion_sample(
        predict, z_t, prior.alphas_cumprod, TIMESTEPS, **layout.calls(), weights=feather().float()
    )
    expected = ddim_sample(lambda z, t: predict(z, t, torch.arange(1)), z_t, prior.alphas_cumprod, TIMESTEPS)
    assert torch.equal(found, expected)


def test_fusing_predictions_is_fusing_what_windows_become():
    """The paper's step: every window takes a DDIM step of its own, then they are averaged."""
    layout, (before, after) = Layout(), (0.3, 0.5)
    z_t, eps = normal(*layout.shape), normal(len(layout.places), 3, SIZE, SIZE, seed=1)
    shares = window_shares(feather(), z_t, layout.gather, layout.scatter)
    fused = fused_predictor(lambda _, __, rows: eps[rows], layout.gather, layout.scatter, shares, batch=5)
    stepped = ddim_step(layout.gather(z_t), eps, before, after)
    weights = feather().expand_as(eps)
    expected = layout.scatter(weights * stepped) / layout.scatter(weights)
    torch.testing.assert_close(ddim_step(z_t, fused(z_t, 0), before, after), expected, rtol=1e-12, atol=1e-12)


def test_shares_are_one_where_a_window_is_alone_and_add_up_to_one_elsewhere():
    layout = Layout()
    canvas = torch.zeros(layout.shape, dtype=torch.float64)
    shares = window_shares(feather(), canvas, layout.gather, layout.scatter)
    torch.testing.assert_close(layout.scatter(shares), torch.ones_like(canvas), rtol=1e-12, atol=0.0)
    alone = layout.gather(layout.scatter(torch.ones_like(shares))) == 1
    assert alone.any()
    assert not alone.all()
    assert (shares[alone] == 1).all()


def test_a_bare_canvas_and_negative_weights_are_refused():
    layout = Layout(lefts=(0, 3))
    canvas = torch.zeros(layout.shape)
    with pytest.raises(ValueError, match="leave 96 of 264 places of the canvas bare"):
        window_shares(torch.ones(1, 1, SIZE, SIZE), canvas, layout.gather, layout.scatter)
    with pytest.raises(ValueError, match="at least 0"):
        window_shares(-torch.ones(1, 1, SIZE, SIZE), canvas, layout.gather, layout.scatter)
