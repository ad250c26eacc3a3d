"""Rectified-flow distillation: SDS on velocities."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csd3d.distillation.guidance import guided, guided_queries
from csd3d.distillation.method import Query, Step
from csd3d.registry import register


@register("method", "rfds", title="RFDS")
@dataclass(frozen=True)
class RFDS:
    """Rectified flow distillation sampling (Yang et al. 2024, arXiv 2406.03293): SDS for flow models, on velocities.

        Δ = v^ω(x_s; y) − (ε − z),   x_s = (1 − s) z + s ε

    In our notation x_s = z_t/(√ᾱ + σ), s = σ/(√ᾱ + σ), and v = (ε − x_s)/(1 − s) also holds for predictions, so
    Δ = (ε^ω − ε)/(1 − s) = (1 + σ/√ᾱ)(ε^ω(z_t; y) − ε) without another weight, and the method works with any prior. The
    authors draw t uniformly; the models were trained with "logit_normal". We omit their random factor on the loss,
    which only changes the step size.

        config = DistillConfig(guidance_scale=50, schedule="logit_normal")
        G, report = distill_step(predict, RFDS(), z, number, config, alphas_cumprod, generator, prompts="a red chair")
        z = z - learning_rate * G
    """

    perp_neg: ClassVar[bool] = True
    fixed: ClassVar[dict[str, object]] = {"weight": "one"}

    def queries(self, step: Step) -> dict[str, Query]:
        return guided_queries(step)

    def direction(self, eps: dict[str, Tensor], step: Step) -> Tensor:
        return (1 + step.noise_ratio) * (guided(eps, step) - step.eps)
