"""Score distillation via inversion: SDS with noise from DDIM inversion of the render."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_step
from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Predict, Query, Step
from csd3d.distillation.noise import draw_noise, implied_noise
from csd3d.registry import register
from csd3d.schema import Within


@register("method", "sdi", title="SDI")
@dataclass(frozen=True)
class SDI:
    """Score distillation via inversion (Lukoianov et al. 2024, arXiv 2405.15891), Algorithm 1 and the authors' code.

        G = z − ẑ_0(z_t),   z_t from z by DDIM inversion under the prompt;   t falls from 0.98 to 0.25 of T

    As in the authors' code, the inversion takes levels T/`grid` apart up to a level drawn from t + [0, T/`grid`),
    adds η times DDIM's standard deviation of noise at every step, and its final ε is used at t. Their scales ±7.5 in
    ε_y + s (ε_y − ε_∅) are 8.5 and −6.5 here. Our first step predicts at the first level of the grid; theirs passes a
    negative time to the network.

        config = DistillConfig(steps=10000)           # t, its schedule and the weight are the method's
        G, report = distill_step(predict, SDI(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    scale: float = 8.5  # ω, guidance scale of the prediction at z_t
    inversion_scale: float = -6.5  # ω in the inversion; negative, because denoising then moves towards the prompt
    inversion_noise: float = 0.3  # η, share of fresh noise in an inversion step; 0: deterministic
    grid: Annotated[int, Within(1, 1000)] = 10  # number of levels of the inversion over the whole schedule

    perp_neg: ClassVar[bool] = True
    fixed: ClassVar[dict[str, object]] = {"schedule": "annealed", "t_max": 0.98, "t_min": 0.25, "weight": "x0"}

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 <= self.inversion_noise <= 1:
            raise ValueError(f"grid is {self.grid}, inversion_noise {self.inversion_noise}: give >= 1 and [0, 1]")

    def noise(self, step: Step, predict: Predict) -> Step:
        levels = self.levels(step)
        alpha_bars = [1.0] + [step.alphas_cumprod[t].item() for t in levels]
        z_t = step.z
        for at, (alpha_bar, alpha_bar_next) in zip([levels[0], *levels], pairwise(alpha_bars), strict=False):
            queries = {"null": step.query(step.null_prompt, z_t=z_t, t=at), "text": step.query(z_t=z_t, t=at)}
            eps = guided(predict(queries), replace(step, away=()), scale=self.inversion_scale)
            z_t = ddim_step(z_t, eps, alpha_bar, alpha_bar_next)
            if self.inversion_noise and alpha_bar < 1:
                # DDIM's variance between the two levels (arXiv 2010.02502, Eq. 16)
                variance = (1 - alpha_bar) / (1 - alpha_bar_next) * (1 - alpha_bar_next / alpha_bar)
                fresh = draw_noise(z_t, "independent", step.generator)
                z_t = z_t + self.inversion_noise * math.sqrt(variance) * fresh
        return replace(step, eps=implied_noise(z_t, step.z, alpha_bars[-1]))

    def levels(self, step: Step) -> list[int]:
        """The rising timesteps of an inversion: the grid's levels below t, then a random level from t on."""
        total, generator = len(step.alphas_cumprod), step.generator
        spacing = max(total // self.grid, 1)
        above = int(torch.rand((), generator=generator, device=generator.device).item() * spacing)
        return [*range(1, step.t, spacing), min(step.t + above, total - 1)]

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step, scale=self.scale)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return guided(eps, step, scale=self.scale) - step.eps
