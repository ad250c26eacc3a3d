"""Samplers: how a picture is denoised from one noise level to the next.

    ddim    DDIM with η = 0 (arXiv 2010.02502), see `ddim`
    euler   Euler steps of dx/dσ = ε (arXiv 2206.00364, Eq. 1 and 3), by diffusers' EulerDiscreteScheduler
    dpm++   DPM-Solver++ (2M) (arXiv 2211.01095, Algorithm 2), by diffusers' DPMSolverMultistepScheduler

Symbols: z_t, ᾱ and ε as in `ddim`; x = z_t/√ᾱ = z + σ ε with σ = √(1 − ᾱ)/√ᾱ.

All take the same timesteps and the same number of predictions. DDIM and Euler are the same step in other variables, so
they differ by rounding alone; diffusers' pipelines with them differ more because of their timesteps and first noise.
Flow-matching models (`priors.flow`) are sampled in the same terms. There DDIM and Euler are the flow's own Euler step
x_s' = x_s + (s' − s) v, and DPM++ is of second order in log(√ᾱ/σ_t), which the change of scale leaves alone.
"""

from typing import Literal

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise, ddim_sample

Sampler = Literal["ddim", "euler", "dpm++"]
TITLES = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM++ (2M)"}


def sample(
    predict: PredictNoise, z_t: Tensor, alphas_cumprod: Tensor, timesteps: list[int], sampler: Sampler = "ddim"
) -> Tensor:
    """Denoise `z_t` [N, ...], at level timesteps[0], through the falling `timesteps` to ᾱ = 1 by `sampler`.

    Euler and DPM++ compute in float32. Raises ValueError for an unknown sampler.
    """
    if sampler == "ddim":
        return ddim_sample(predict, z_t, alphas_cumprod, timesteps)
    scheduler = open_scheduler(sampler, alphas_cumprod, timesteps)
    x = z_t * scheduler.init_noise_sigma
    for t, at in zip(timesteps, scheduler.timesteps, strict=True):
        eps = predict(scheduler.scale_model_input(x, at), t)
        x = scheduler.step(eps, at, x, return_dict=False)[0]
    return x


def open_scheduler(sampler: Sampler, alphas_cumprod: Tensor, timesteps: list[int]):
    """Diffusers' scheduler for `sampler`, set to `timesteps` of the schedule ᾱ [T]; it takes predictions of ε."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    common = {"num_train_timesteps": len(alphas_cumprod), "prediction_type": "epsilon"}
    if sampler == "euler":
        # any spacing but "linspace" starts at x = z_t √(σ² + 1), which is z_t/√ᾱ
        scheduler = EulerDiscreteScheduler(**common, timestep_spacing="leading")
    elif sampler == "dpm++":
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    else:
        raise ValueError(f"sampler is {sampler!r}: choose one of {', '.join(TITLES)}")
    # not by trained_betas, whose float32 product would differ from the prior's ᾱ where that is near 1
    scheduler.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler
