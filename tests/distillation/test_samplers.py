"""Samplers against the closed-form flow of a mixture, diffusers' own pipelines, and a flow's own Euler steps."""

from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from tiny_models import save_tiny_pipeline
from torch import Tensor

from csd3d.distillation.ddim import ddim_sample, ddim_timesteps
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.distillation.samplers import sample
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.flow import flow_alphas
from csd3d.priors.mixture import mixture_noise

MEANS, STDS, WEIGHTS = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, 1.5], [0.3, 0.5], [0.3, 0.7]))
# evenly spaced in log σ, from so low a level that the last step to σ = 0 costs nothing
LEVELS = 1 / (1 + torch.logspace(-4, 1, 801, dtype=torch.float64).square())


def exact_eps(z_t: Tensor, t: int) -> Tensor:
    """ε of the mixture in one dimension."""
    weights = WEIGHTS.log().expand(len(z_t), -1)
    return mixture_noise(z_t.double(), LEVELS[t].expand(len(z_t)), MEANS[:, None], STDS, weights)


def share_below(z_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The cumulative distribution of the mixture noised to ᾱ, which the probability flow keeps along each path."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    spread = (alpha_bar * STDS.square() + 1 - alpha_bar).sqrt()
    return (torch.special.ndtr((z_t - alpha_bar.sqrt() * MEANS) / spread) * WEIGHTS).sum(1)


def flow_error(sampler: str, steps: int) -> float:
    z_t = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = sample(exact_eps, z_t, LEVELS, ddim_timesteps(800, steps), sampler)
    return (share_below(z.double(), 1.0) - share_below(z_t, LEVELS[800])).abs().mean().item()


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpm++", 2)])
def test_the_order_of_convergence_to_the_closed_form(sampler, order):
    errors = [flow_error(sampler, steps) for steps in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_euler_is_ddim_in_other_variables():
    z_t, timesteps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], ddim_timesteps(800, 10)
    expected = ddim_sample(exact_eps, z_t, LEVELS, timesteps)
    torch.testing.assert_close(sample(exact_eps, z_t, LEVELS, timesteps, "euler"), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(exact_eps, z_t, LEVELS, timesteps), expected)
    with pytest.raises(ValueError, match="sampler is 'heun': choose one of ddim, euler, dpm"):
        sample(exact_eps, z_t, LEVELS, timesteps, "heun")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")


@pytest.mark.parametrize(
    ("sampler", "kind", "keys"),
    [("euler", EulerDiscreteScheduler, {"timestep_spacing": "leading"}), ("dpm++", DPMSolverMultistepScheduler, {})],
)
def test_a_picture_is_what_diffusers_pipeline_makes_of_it(folder, sampler, kind, keys):
    prior = load_prior(PriorConfig(model=str(folder), device="cpu"), require="text")
    z_t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = ddim_timesteps(980, 5)

    def predict(z_t: Tensor, t: int) -> Tensor:
        eps = prior.predict({"null": Query(z_t, t, ("",)), "text": Query(z_t, t, ("red blue",))})
        return cfg(eps["null"], eps["text"], 5.0)

    found = sample(predict, z_t, prior.alphas_cumprod, timesteps, sampler)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **keys)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"latents": z_t.clone(), "timesteps": timesteps, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipeline("red blue", **asked).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    by_ddim = sample(predict, z_t, prior.alphas_cumprod, timesteps)
    assert torch.allclose(found, by_ddim, rtol=1e-3, atol=1e-4) == (sampler == "euler")


def test_ddim_and_euler_are_a_flows_own_euler_steps():
    """x_s' = x_s + (s' − s) v with x_s = (1 − s) x_0 + s ε, v = ε − x_0, of N(0.4, 0.3²)."""
    s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alphas, timesteps = flow_alphas(s), ddim_timesteps(98, 7)

    def velocity(x_s: Tensor, t: int) -> Tensor:
        gap, variance = x_s - (1 - s[t]) * 0.4, (1 - s[t]) ** 2 * 0.09 + s[t] ** 2
        return s[t] / variance * gap - (0.4 + (1 - s[t]) * 0.09 / variance * gap)

    def predict(z_t: Tensor, t: int) -> Tensor:
        x_s = z_t.double() / (alphas[t].sqrt() + (1 - alphas[t]).sqrt())
        return x_s + (1 - s[t]) * velocity(x_s, t)

    x = start = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for t, after in zip(timesteps, [*(s[t] for t in timesteps[1:]), 0.0], strict=True):
        x = x + (after - s[t]) * velocity(x, t)
    z_t = start * (alphas[98].sqrt() + (1 - alphas[98]).sqrt())
    torch.testing.assert_close(sample(predict, z_t, alphas, timesteps), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sample(predict, z_t, alphas, timesteps, "euler"), x, rtol=1e-4, atol=1e-5)
